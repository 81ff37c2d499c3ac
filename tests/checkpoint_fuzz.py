"""Make files that are almost checkpoints: whole ones of every format, and ways to damage them.

A mutation is a function of a whole file's bytes and a random generator that returns other bytes;
more of them are added to MUTATIONS. What torch itself makes of a file is the oracle.
"""

from __future__ import annotations

import io
import random
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Mutation = Callable[[bytes, random.Random], bytes]

# Random bytes that mean something to zip files and pickles.
_TOKENS = (
    *(
        b"PK\1\2",
        b"PK\3\4",
        b"PK\5\6",
        b"PK\6\6",
        b"PK\6\7",
        b"\xff\xff\xff\xff",
        bytes(4),
        bytes(8),
    ),
    *(b"K\x00", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\xff", b"r\xff\xff\xff\x0a", b"\x85", b"R"),
    *(b"cos\nsystem\n", b"c__builtin__\nset\n", b"ctorch\nBoolStorage\n", b"data/1", b"DATA/0"),
    *(
        b"\x88",
        b"\x89",
        b"(",
        b"t",
        b"Q",
        b")",
        b".",
        b"h\x00",
        b"q\x00",
        b"\x8a\x08",
        b"ctorch\nbits8\n",
    ),
)


def contents() -> dict[str, Any]:
    """Return objects that torch.save writes and torch.load(weights_only=True) reads."""
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    state = OrderedDict(
        weight=torch.randn(3, 5),
        half=torch.randn(7).half(),
        brain=torch.randn(2, 2).bfloat16(),
        count=torch.tensor(3),
        mask=torch.tensor([True, False]),
        empty=torch.zeros(0, 4),
        small=torch.ones(3).to(torch.float8_e5m2),
        unsigned=torch.arange(3).to(torch.uint16),
        turned=base.t(),
        shared=base[1:],
        expanded=torch.randn(3, 1).expand(3, 4),
        parameter=torch.nn.Parameter(torch.randn(2)),
    )
    state._metadata = OrderedDict({"": {"version": 2}})  # type: ignore[attr-defined]
    plain = {"epoch": 3, "losses": [0.5, 0.25, 1e-9], "name": "größe", "big": 2**40, "none": None}
    return {
        "bare": dict(state),
        "model": {"model": state, **plain},
        "optimizer": {
            **plain,
            "state_dict": {"w": torch.ones(300)},
            "optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2)}}},
        },
        "odd": {
            "model": {"w": torch.ones(3)},
            "seen": {1, 2},
            "raw": b"\x00\xff",
            "counts": Counter("aab"),
            "size": torch.Size([1, 2]),
            "dtype": torch.float16,
            "device": torch.device("cpu"),
            "complex": 1 + 2j,
            "sparse": torch.eye(2).to_sparse(),
        },
    }


def old_dtypes(content: dict[str, Any]) -> dict[str, Any]:
    """Leave out what has a dtype for which there is no storage class."""
    return {
        key: old_dtypes(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if not isinstance(value, Tensor) or value.dtype not in (torch.uint16, torch.float8_e5m2)
    }


def whole_files() -> dict[str, bytes]:
    """Return whole files, by the name of their kind."""
    found = {}
    for name, content in contents().items():
        for form, zipped in (("zip", True), ("legacy", False)):
            if not zipped and name in ("bare", "model"):
                # torch does not read tensors of newer dtypes that it wrote in this format.
                content = old_dtypes(content)
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
            found[f"{form} {name}"] = buffer.getvalue()
    found["zip by zipfile"] = repacked(found["zip model"])
    found["zip packed"] = repacked(found["zip model"], zipfile.ZIP_DEFLATED)
    return found


def repacked(whole: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """Write a zip file's members anew with Python's zipfile."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return buffer.getvalue()


def flip_bits(whole: bytes, rng: random.Random) -> bytes:
    """Flip one to three bits anywhere."""
    data = bytearray(whole)
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def damage_the_pickle(whole: bytes, rng: random.Random) -> bytes:
    """Change, insert or remove bytes of the pickle, the member's sizes being made right again."""
    if not whole.startswith(b"PK"):
        at = rng.randrange(min(len(whole), 2000))
        return whole[:at] + rng.choice(_TOKENS) + whole[at + rng.randint(0, 4) :]

    def change(pickle: bytes) -> bytes:
        for _ in range(rng.randint(1, 2)):
            at = rng.randrange(len(pickle))
            new = rng.choice((*_TOKENS, rng.randbytes(1), rng.randbytes(1), b""))
            pickle = pickle[:at] + new + pickle[at + rng.choice((0, 1, len(new))) :]
        return pickle

    return with_members(whole, lambda name, data: (name, change(data) if is_pickle(name) else data))


def damage_the_structure(whole: bytes, rng: random.Random) -> bytes:
    """Write over bytes at the end, where a zip file's directory is."""
    data = bytearray(whole)
    at = rng.randrange(max(0, len(data) - 1200), len(data))
    token = rng.choice((*_TOKENS, struct.pack("<L", rng.randrange(len(data)))))
    data[at : at + len(token)] = token
    return bytes(data)


def cut(whole: bytes, rng: random.Random) -> bytes:
    """Leave out a piece: the end, the beginning, or from the middle."""
    a, b = sorted((rng.randrange(len(whole) + 1), rng.randrange(len(whole) + 1)))
    return rng.choice((whole[:b], whole[a:], whole[:a] + whole[b:]))


def double(whole: bytes, rng: random.Random) -> bytes:
    """Put something before, behind or in a file."""
    at = rng.choice((0, len(whole), rng.randrange(len(whole))))
    new = rng.choice((whole, rng.randbytes(30), bytes(64), whole[-120:], whole[:60]))
    return whole[:at] + new + whole[at:]


def swap_members(whole: bytes, rng: random.Random) -> bytes:
    """Rename members of a zip file to each other's names, leave some out or write them twice."""
    if not whole.startswith(b"PK"):
        return flip_bits(whole, rng)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        names = archive.namelist()
    new = dict(zip(names, rng.sample(names, len(names)), strict=True))
    chosen = set(rng.sample(names, 2))

    def change(name: str, data: bytes) -> Any:
        if name not in chosen:
            return name, data
        return rng.choice(((new[name], data), (name.upper(), data), (name, data[:-1]), None))

    return with_members(whole, change)


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits,
    damage_the_pickle,
    damage_the_pickle,
    damage_the_structure,
    cut,
    double,
    swap_members,
)


def is_pickle(name: str) -> bool:
    return name.endswith("/data.pkl")


def with_members(whole: bytes, change: Callable[[str, bytes], Any]) -> bytes:
    """Write a zip file anew with other members; None leaves one out."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            made = change(info.filename, old.read(info))
            if made is not None:
                new.writestr(zipfile.ZipInfo(made[0]), made[1])
    return buffer.getvalue()


def mutated_files(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield a kind and a damaged file of it, so many times."""
    rng = random.Random(seed)
    whole = whole_files()
    for _ in range(count):
        kind = rng.choice(sorted(whole))
        mutation = rng.choice(MUTATIONS)
        yield f"{kind}, {mutation.__name__}", mutation(whole[kind], rng)


def by_torch(data: bytes) -> Any:
    """Return what torch makes of a file, or None if it refuses it."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:
        return None


def tensors_in(content: Any) -> dict[str, Tensor] | None:
    """Return a state dict where ours looks for it first, found without the package's help."""
    for found in (content, *(content.get(key) for key in _CONTAINERS if isinstance(content, dict))):
        if isinstance(found, dict) and {
            (type(key), isinstance(value, Tensor)) for key, value in found.items()
        } == {(str, True)}:
            return found
    return None


_CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model")
