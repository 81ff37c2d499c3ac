"""What the libraries that the formats belong to make of a file: the values it should have.

Each answers None where the library refuses. Nothing here is told what the package has read, but for
where in the file it found the weights.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor


def torch_content(data: bytes) -> Any:
    """Return what torch.load makes of a file without trusting it."""
    return _unless_refused(
        data, lambda file: torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    )


def _unless_refused(data: bytes, load: Callable[[io.BytesIO], Any]) -> Any:
    try:
        return load(io.BytesIO(data))
    except UnicodeDecodeError:
        # A leniency: torch decodes a number that it writes into its own log and nowhere else.
        plain = _without_number(data)
        return None if plain == data else _unless_refused(plain, load)
    except Exception:
        return None


def _without_number(data: bytes) -> bytes:
    """Write ones over that number, where the file has it."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            (info,) = (i for i in archive.infolist() if i.filename.endswith("/serialization_id"))
    except Exception:
        return data
    name_size, extra_size = struct.unpack_from("<2H", data, info.header_offset + 26)
    first = info.header_offset + 30 + name_size + extra_size
    return data[:first] + b"1" * info.file_size + data[first + info.file_size :]


# What torch's weights-only reader follows (torch._weights_only_unpickler).
_FOLLOWED = [
    "APPEND",
    "APPENDS",
    "BINFLOAT",
    "BINGET",
    "BININT",
    "BININT1",
    "BININT2",
    "BINPERSID",
    "BINPUT",
    "BINUNICODE",
    "BUILD",
    "EMPTY_DICT",
    "EMPTY_LIST",
    "EMPTY_SET",
    "EMPTY_TUPLE",
    "GLOBAL",
    "LONG1",
    "LONG_BINGET",
    "LONG_BINPUT",
    "MARK",
    "NEWFALSE",
    "NEWOBJ",
    "NEWTRUE",
    "NONE",
    "PROTO",
    "REDUCE",
    "SETITEM",
    "SETITEMS",
    "SHORT_BINSTRING",
    "STOP",
    "TUPLE",
    "TUPLE1",
    "TUPLE2",
    "TUPLE3",
]


def has_other_instructions(data: bytes) -> bool:
    """Say whether a file of torch.save has instructions that torch's own reader does not follow."""
    count = 5
    if data.startswith(b"PK"):
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
                data, count = archive.read(name), 1
        except Exception:
            return False
    stream = io.BytesIO(data)
    try:
        return any(
            opcode.name not in _FOLLOWED
            for _ in range(count)
            for opcode, _, _ in pickletools.genops(stream)
        )
    except Exception:
        return False


class Stub:
    """Stand for an object of a class that is not to be made."""

    def __init__(self, *arguments: Any, **named: Any) -> None: ...
    def __call__(self, *arguments: Any, **named: Any) -> Stub:
        return self

    def __setstate__(self, state: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def __iter__(self) -> Any:
        return iter(())

    def append(self, value: Any) -> None: ...
    def extend(self, values: Any) -> None: ...


_MADE = frozenset(
    {
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor_v3"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch.storage", "UntypedStorage"),
        *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    }
)


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Python's own unpickler, to which everything but tensors is a stub."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if (module, name) in _MADE else Stub

    def load_persid(self) -> None:
        # Protocol 0 writes what torch refers to a storage by as text, which torch reads no more.
        text = re.sub(r"<class '([^']*)'>", r"'\1'", self.readline()[:-1].decode("ascii"))
        of, kind, *rest = ast.literal_eval(text)
        self.append(self.persistent_load((of, self.find_class(*kind.rsplit(".", 1)), *rest)))

    def load_frame(self) -> None:
        self.read(8)  # the unpickler in C asks no more of it than that it lies within the file

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,  # type: ignore[attr-defined]
        pickle.PERSID[0]: load_persid,
        pickle.FRAME[0]: load_frame,
    }


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


_STUBS = SimpleNamespace(Unpickler=_Unpickler, load=_load, __name__="stubs")


def stubbed_content(data: bytes) -> Any:
    """Return what torch.load makes of a file with stubs for what it does not know."""
    return _unless_refused(
        data,
        lambda file: torch.load(file, "cpu", pickle_module=_STUBS, weights_only=False, mmap=False),
    )


def at_key(content: Any, container: str) -> Any:
    """Return what is where the package says to have found the weights."""
    if container == "bare":
        return content
    for name in container.split("."):
        if not isinstance(content, Mapping):
            return None
        content = content.get(name)
    return content


def tensors_of(content: Any) -> dict[str, Tensor] | None:
    """Return a state dict, None if this is none."""
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        return None
    found = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    others = content.keys() - found.keys()
    return found if found and all(n.endswith("_extra_state") for n in others) else None


def safetensors_content(data: bytes) -> dict[str, Tensor] | None:
    from safetensors.torch import load

    try:
        return load(data)
    except Exception:
        return None


def _content(data: bytes) -> Any:
    return safetensors_content(data) if data[8:9] == b"{" else torch_content(data)


def sharded_content(index: Path) -> dict[str, Tensor] | None:
    """Return what the shards of an index hold, each tensor of the shard that the index names."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards = {
            name: _content((index.parent / name).read_bytes()) for name in weight_map.values()
        }
        return {name: shards[shard][name] for name, shard in weight_map.items()}
    except Exception:
        return None


class _OfMetadata(pickle._Unpickler):  # type: ignore[name-defined]
    """Python's own unpickler, for what distributed checkpoints' metadata name."""

    def find_class(self, module: str, name: str) -> Any:
        front = ("torch.distributed.checkpoint.", "torch.distributed._shard.", "pathlib")
        value = super().find_class(module, name) if module.startswith((*front, "torch")) else None
        if isinstance(value, type) and (module.startswith(front) or value is torch.Size):
            return value
        if isinstance(value, torch.dtype) or name == "_get_layout":
            return value
        raise pickle.UnpicklingError(name)


def distributed_content(folder: Path, container: str) -> dict[str, Tensor] | None:
    """Return what torch.distributed.checkpoint reads of a folder.

    Args:
        folder: a checkpoint.
        container: the last name of where the saved dict has the weights.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    # torch unpickles the metadata without restraint.
    unrestrained = filesystem.pickle
    filesystem.pickle = SimpleNamespace(load=lambda file: _OfMetadata(file).load())
    try:
        reader = dcp.FileSystemReader(folder)
        metadata = reader.read_metadata()
        paths, state = {}, {}
        for name, entry in metadata.state_dict_metadata.items():
            path = (metadata.planner_data or {}).get(name, (name,))
            if not isinstance(entry, TensorStorageMetadata):
                continue
            if container == "bare" or path[0] == container:
                paths[name] = ".".join(map(str, path[container != "bare" :]))
                state[name] = torch.zeros(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, storage_reader=reader, no_dist=True)
        return {paths[name]: tensor for name, tensor in state.items()}
    except Exception:
        return None
    finally:
        filesystem.pickle = unrestrained
