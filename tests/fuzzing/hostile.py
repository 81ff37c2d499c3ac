"""Pickles that would run code, take all memory or never end, and files that carry them.

Whatever runs leaves a mark: the file `fuzz_mark`, or a line in `fuzzing.marks.MARKS`.
"""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile

from .files import AHEAD as _AHEAD
from .files import Kind, with_members

_COMMAND = b"touch fuzz_mark"


def _text(text: bytes) -> bytes:
    return b"X" + struct.pack("<L", len(text)) + text


def _call(module: bytes, name: bytes, *arguments: bytes) -> bytes:
    return b"c" + module + b"\n" + name + b"\n(" + b"".join(arguments) + b"tR"


def _stack_global(module: bytes, name: bytes) -> bytes:
    return _text(module) + _text(name) + b"\x93"


_MARK = b"cfuzzing.marks\nMark\n"
_NESTED = b"\x80\x02" + _call(b"os", b"system", _text(_COMMAND)) + b"."
_TRIPLE = b"ctorch._utils\n_rebuild_tensor_v2\n"
_FLOATS = b"ctorch\nFloatStorage\n"


def _long(number: int) -> bytes:
    data = number.to_bytes(16, "little", signed=True)
    return b"\x8a\x10" + data


def _tensor(storage: bytes, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """Return a tensor of a storage that the file has, or has not."""
    sizes = b"(" + b"".join(map(_long, shape)) + b"t"
    strides = b"(" + b"".join(map(_long, stride)) + b"t"
    hooks = b"ccollections\nOrderedDict\n)R"
    return _TRIPLE + b"(" + storage + _long(offset) + sizes + strides + b"\x89" + hooks + b"tR"


def _storage(key: bytes, numel: int, kind: bytes = _FLOATS) -> bytes:
    return b"(" + _text(b"storage") + kind + _text(key) + _text(b"cpu") + _long(numel) + b"tQ"


CALLS = {
    "os.system": _call(b"os", b"system", _text(_COMMAND)),
    "posix.system": _call(b"posix", b"system", _text(_COMMAND)),
    "subprocess": _call(
        b"subprocess", b"Popen", b"(" + _text(b"touch") + _text(b"fuzz_mark") + b"l"
    ),
    "exec": _call(b"builtins", b"exec", _text(b"open('fuzz_mark','w')")),
    "eval": _call(b"__builtin__", b"eval", _text(b"open('fuzz_mark','w')")),
    "open": _call(b"builtins", b"open", _text(b"fuzz_mark"), _text(b"w")),
    "io.FileIO": _call(b"_io", b"FileIO", _text(b"fuzz_mark"), _text(b"w")),
    "import": _call(b"builtins", b"__import__", _text(b"antigravity")),
    "getattr": _call(b"builtins", b"getattr", b"cos\nenviron\n", _text(b"clear")) + b")R",
    "reduce in reduce": _call(b"functools", b"partial", b"cos\nsystem\n", _text(_COMMAND)) + b")R",
    "reduce as argument": _call(
        b"collections", b"OrderedDict", _call(b"os", b"system", _text(_COMMAND))
    ),
    "INST": b"(" + _text(_COMMAND) + b"ios\nsystem\n",
    "OBJ": b"(cos\nsystem\n" + _text(_COMMAND) + b"o",
    "STACK_GLOBAL": _stack_global(b"os", b"system") + _text(_COMMAND) + b"\x85R",
    "dotted name": _stack_global(b"fuzzing.marks", b"Mark.leave") + b")R",
    "NEWOBJ": _MARK + b")\x81",
    "NEWOBJ_EX": _MARK + b")}\x92",
    "BUILD with __setstate__": _MARK + b")\x81}b",
    "BUILD of attributes": _MARK + b")\x81N}" + _text(b"a") + b"K\x01s\x86b",
    "items of a subclass": _MARK + b")\x81" + _text(b"a") + b"K\x01s",
    "appending": _MARK + b")\x81K\x01a",
    "persistent id": _MARK + b")\x81Q",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00)R",
    "EXT4": b"\x84\x01\x00\x00\x00)R",
    "copyreg": _call(b"copyreg", b"_reconstructor", _MARK, b"c__builtin__\nobject\n", b"N"),
    "add_extension": _call(b"copyreg", b"add_extension", _text(b"os"), _text(b"system"), b"K\x07"),
    "nested pickle": _call(
        b"torch.storage", b"_load_from_bytes", b"B" + struct.pack("<L", len(_NESTED)) + _NESTED
    ),
    "nested pickle of protocol 2": _call(
        b"torch.storage",
        b"_load_from_bytes",
        b"c_codecs\nencode\n"
        + _text(_NESTED.decode("latin1").encode())
        + _text(b"latin1")
        + b"\x86R",
    ),
    "pickle.loads": _call(b"pickle", b"loads", b"C" + bytes([len(_NESTED)]) + _NESTED),
    "torch.load": _call(b"torch", b"load", _text(b"a.pt")),
    "torch.hub": _call(b"torch.hub", b"load_state_dict_from_url", _text(b"http://127.0.0.1:9/a")),
    "torch.jit.load": _call(b"torch.jit", b"load", _text(b"a.pt")),
    "torch.ops": _call(b"torch._ops.ops.aten", b"from_file", _text(b"fuzz_mark"), b"\x88K\x04"),
    "from_type_v2": _call(
        b"torch._tensor",
        b"_rebuild_from_type_v2",
        b"cos\nsystem\n",
        b"cfuzzing.marks\nMark\n",
        _text(_COMMAND) + b"\x85",
        b"}",
    ),
    "parameter with state": _call(
        b"torch._utils", b"_rebuild_parameter_with_state", _MARK + b")\x81", b"\x89", b"N", b"}"
    ),
    "numpy from elsewhere": _call(
        b"torch._utils", b"_rebuild_device_tensor_from_numpy", _MARK + b")\x81", b"N", b"N", b"\x89"
    ),
    "codec": b"c_codecs\nencode\n" + _text(b"a") + _text(b"fuzzing.marks") + b"\x86R",
    "codec that imports": b"c_codecs\ndecode\nC\x01a" + _text(b"antigravity") + b"\x86R",
    "an ordered dict's methods": b"ccollections\nOrderedDict\n)R}"
    + _text(b"items")
    + b"cos\nabort\nsb",
    "abort": b"cos\nabort\n)R",
    "segfault": _call(b"ctypes", b"string_at", b"K\x00"),
    "a module": b"cfuzzing.unseen\nanything\n",
    "a device": _call(b"torch", b"device", _text(b"privateuseone:0")),
    "a network's class": b"ctorch.nn.modules.linear\nLinear\n)\x81}" + _text(b"x") + b"K\x01sb",
}

_DEEP = 100_000
BOMBS = {
    "a memo index": b"Nr\xff\xff\xff\x0f",
    "a memo index as text": b"Np" + b"9" * 100_000 + b"\n",
    "bytes that are not there": b"\x8e" + struct.pack("<Q", 1 << 60),
    "text that is not there": b"\x8d" + struct.pack("<Q", 1 << 60) + b"a",
    "a frame": b"\x95" + struct.pack("<Q", 1 << 60) + b"N",
    "a long number": b"\x8b" + struct.pack("<L", 0x7FFFFFFF) + b"\x01",
    "a long number as text": b"L" + b"9" * 500_000 + b"L\n",
    "a bytearray": _call(b"builtins", b"bytearray", _long(1 << 40)),
    "a bytearray of protocol 5": b"\x96" + struct.pack("<Q", 1 << 40),
    "bytes": _call(b"builtins", b"bytes", _long(1 << 40)),
    "lists that double": b"]q\x00"
    + b"(h\x00h\x00l0" * 1
    + b"".join(b"]q\x00(h\x00h\x00e" for _ in range(60)),
    "tuples that double": b")" + b"2\x86" * 40,
    "a set of tuples that double": _call(
        b"__builtin__", b"set", b"](" + b")" + b"2\x86" * 30 + b"e"
    ),
    "a key of tuples that double": b"})" + b"2\x86" * 30 + b"Ns",
    "deep tuples": b")" + b"\x85" * _DEEP,
    "deep lists": b"]" * _DEEP + b"a" * (_DEEP - 1),
    "deep marks": b"(" * _DEEP + b"t" * _DEEP,
    "deep dicts": b"}K\x00" * 50_000 + b"}" + b"s" * 50_000,
    "a list in itself": b"]q\x00h\x00a",
    "a dict in itself": b"}q\x00" + _text(b"a") + b"h\x00s",
    "keys that collide": b"}("
    + b"".join(_long(k * ((1 << 61) - 1)) + b"N" for k in range(5000))
    + b"u",
    "a device's name": _call(b"torch", b"device", _text(b"a" * 100_000)),
    "surrogates": _text(b"\xed\xa0\x80"),
    "a size": _call(b"torch", b"Size", b"(" + _long(1 << 90) + b"l"),
    "a Counter of itself": b"ccollections\nCounter\n}q\x00h\x00K\x01s\x85R",
    "a storage that is not there": _tensor(_storage(b"99", 1 << 40), 0, (1 << 40,), (1,)),
    "a storage of more than memory": _tensor(_storage(b"0", 1 << 60), 0, (1 << 60,), (1,)),
    "a storage of less than nothing": _tensor(_storage(b"0", -1), 0, (0,), (1,)),
    "a tensor without strides": _tensor(_storage(b"0", 1), 0, (1 << 40,), (0,)),
    "a tensor of 2^64": _tensor(_storage(b"0", 1), 0, (1 << 32, 1 << 32), (0, 0)),
    "a tensor before its storage": _tensor(_storage(b"0", 1), -4, (1,), (1,)),
    "a tensor with strides below nothing": _tensor(_storage(b"0", 1), 0, (2,), (-1,)),
    "a storage elsewhere": _tensor(_storage(b"../version", 1), 0, (1,), (1,)),
    "a tensor behind its storage": _tensor(_storage(b"0", 1), 1 << 61, (1,), (1,)),
}

PAYLOADS = {**CALLS, **BOMBS}


def _body(data: bytes) -> bytes:
    """Return a pickle's instructions without its protocol and its end."""
    return (data[2:] if data[:1] == b"\x80" else data)[:-1]


def _content(payload: bytes, whole: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Put something into a pickle: in its place, beside it, in it as a value or as a key."""
    front = b"\x80\x02}" + _text(b"state_dict")
    body = _body(whole)
    made = {
        "instead of all": b"\x80\x02" + payload + b".",
        "beside": front + body + b"s" + _text(b"x") + payload + b"s.",
        "before": b"\x80\x02}" + _text(b"x") + payload + b"s" + front[3:] + body + b"s.",
        "in the weights": b"\x80\x02" + body + _text(b"x") + payload + b"s.",
        "as the weights": front + payload + b"s.",
        "as a key": b"\x80\x02" + body + payload + b"Ns.",
    }
    how = rng.choice(sorted(made))
    return how, made[how]


def _split_legacy(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Return what stands before, in and behind the fourth pickle of the older format."""
    import pickletools

    stream = io.BytesIO(data)
    ends = []
    for _ in range(4):
        for _ in pickletools.genops(stream):
            pass
        ends.append(stream.tell())
    return data[: ends[2]], data[ends[2] : ends[3]], data[ends[3] :]


def hostile_files(kind: Kind, rng: random.Random) -> tuple[str, dict[str, bytes | str]] | None:
    """Put a hostile pickle where a kind's files have one; None where they have none."""
    name = rng.choice(sorted(PAYLOADS))
    payload = PAYLOADS[name]
    pickled = [n for n, data in kind.files.items() if _has_pickle(n, data)]
    if not pickled:
        return None
    file = rng.choice(sorted(pickled))
    data, how = kind.files[file], "instead of all"
    if data.startswith(b"PK"):
        how, data = _in_zip(payload, data, rng)
    elif data.startswith(_AHEAD):
        how, data = _in_zip(payload, data[len(_AHEAD) :], rng)
        metadata = _with_length(kind.files[".metadata"], file, len(data))
        return f"{name} {how} in {file}", {
            **kind.files,
            file: _AHEAD + data,
            ".metadata": metadata,
        }
    elif data.startswith(b"\x80\x02\x8a\x0a"):
        before, whole, behind = _split_legacy(data)
        how, new = _content(payload, whole, rng)
        data = before + new + behind
    elif file == ".metadata":
        how, data = _content(payload, data, rng)
    else:
        protocol = rng.randrange(6)
        data = (b"\x80" + bytes([protocol]) if protocol > 1 else b"") + payload + b"."
    return f"{name} {how} in {file}", {**kind.files, file: data}


def _in_zip(payload: bytes, whole: bytes, rng: random.Random) -> tuple[str, bytes]:
    chosen: list[str] = []

    def change(member: str, old: bytes) -> tuple[str, bytes]:
        if not member.endswith("data.pkl") or chosen:
            return member, old
        placed, new = _content(payload, old, rng)
        chosen.append(placed)
        return member, new

    data = with_members(whole, change)
    return chosen[0], data


def _with_length(metadata: bytes, file: str, length: int) -> bytes:
    """Say in a distributed checkpoint's own metadata, which is trusted, how long a piece is."""
    found = pickle.loads(metadata)
    for info in found.storage_data.values():
        if info.relative_path == file:
            info.length = length
    return pickle.dumps(found)


def _has_pickle(name: str, data: bytes) -> bool:
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any(member.endswith("data.pkl") for member in archive.namelist())
    if data.startswith(_AHEAD):
        return True
    return name == ".metadata" or name.endswith((".pkl", ".pt"))
