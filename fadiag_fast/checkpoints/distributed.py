"""Read torch.distributed.checkpoint folders, in one process and without a model.

Such a folder has a pickle, `.metadata`, that says which tensors there are and where their pieces
lie, and files in which each piece is a small torch.save file of its own. torch's own reader
unpickles `.metadata` without restraint. Here every class it may name becomes an empty shell that
keeps what it is given, every other name is refused before anything is unpickled, and each value is
checked before it is used; the pieces go through torch's weights-only reader.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .content import CONTAINERS
from .errors import (
    CheckpointError,
    NoStateDict,
    UnreadableCheckpoint,
    at,
    damaged,
    listed,
    needs_full_unpickler,
    printable,
)
from .files import Loaded, is_plain_name
from .pickles import scan_pickle_file

METADATA = ".metadata"

# What the metadata of any version names beside dtypes; nothing of it is called.
_SHELLS = frozenset(
    {
        "torch.Size",
        "torch.serialization._get_layout",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        *(
            f"torch.distributed.checkpoint.metadata.{name}"
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        *(
            f"torch.distributed._shard.sharded_tensor.metadata.{name}"
            for name in ("MEM_FORMAT_ENCODING", "TensorProperties")
        ),
        *(
            f"{module}.{name}"
            for module in ("pathlib", "pathlib._local")
            for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
        ),
    }
)

# Top-level entries whose tensors are the optimizer's: 'optim', 'optimizer', 'optimizer_states', …
_OPTIMIZER = "optim"


class _Shell:
    """Keep what a pickle builds an object from."""

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> _Shell:
        made = object.__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        return self.state.get(name) if isinstance(self.state, dict) else None


class _ShellUnpickler(pickle.Unpickler):
    def __init__(self, stream: io.BufferedIOBase) -> None:
        super().__init__(stream)
        # Made anew for each file: what a pickle might do to a class ends with it.
        self._shells: dict[str, type[_Shell]] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _SHELLS:
            return self._shells.setdefault(full, type(name, (_Shell,), {}))
        if _is_dtype(full):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{full} is not allowed")


def _is_dtype(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    return module == "torch" and isinstance(getattr(torch, attribute, None), torch.dtype)


@dataclass(frozen=True)
class _Piece:
    """Say where a part of a tensor lies: in the tensor, and in which bytes of which file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class _Entry:
    """Describe a stored tensor; `path` is where it was in the saved, nested dict."""

    path: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[_Piece, ...]


def load_distributed(folder: Path, device: torch.device) -> Loaded:
    """Read the model's tensors of a torch.distributed.checkpoint folder.

    Where the saved dict had the weights under one of the usual names, also one level down as an
    application's state has, those are read; else all tensors that are not the optimizer's.
    """
    entries = _read_entries(folder)
    container, chosen = _select(entries)
    if not chosen:
        tops = sorted({printable(entry.path[0]) for entry in entries})
        raise NoStateDict(
            at(
                folder,
                "expected a model's tensors, got "
                + (f"tensors only under {listed(tops)}" if tops else "no tensor at all"),
            )
        )
    state = {name: _read_tensor(folder, name, entry, device) for name, entry in chosen.items()}
    return Loaded("distributed", state, {}, container)


def _select(entries: list[_Entry]) -> tuple[str, dict[str, _Entry]]:
    """Return the container and the model's entries by name."""
    for depth in range(min((len(entry.path) for entry in entries), default=0)):
        for container in CONTAINERS:
            chosen = {
                ".".join(entry.path[depth + 1 :]): entry
                for entry in entries
                if entry.path[depth] == container and len(entry.path) > depth + 1
            }
            if chosen:
                return container, chosen
        if len({entry.path[depth] for entry in entries}) > 1:
            break
    return "bare", {
        ".".join(entry.path): entry for entry in entries if not entry.path[0].startswith(_OPTIMIZER)
    }


def _read_entries(folder: Path) -> list[_Entry]:
    path = folder / METADATA
    metadata = _unpickle(path)
    try:
        return _entries(metadata)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UnreadableCheckpoint(
            at(path, f"expected a distributed checkpoint's metadata, got one in which {error}")
        ) from error


def _unpickle(path: Path) -> Any:
    scan = scan_pickle_file(path, pickles=1)
    if not scan.complete:
        raise damaged(path, EOFError("it is no whole pickle"))
    unknown = {name for name in scan.names if name not in _SHELLS and not _is_dtype(name)}
    if unknown:
        raise needs_full_unpickler(path, "metadata file", unknown, way_out=False)
    try:
        with path.open("rb") as file:
            return _ShellUnpickler(file).load()
    except Exception as error:
        raise damaged(path, error) from error


def _entries(metadata: Any) -> list[_Entry]:
    if not isinstance(metadata, _Shell) or type(metadata).__name__ != "Metadata":
        raise TypeError("there is no Metadata")
    described = _expect("state_dict_metadata", metadata.get("state_dict_metadata"), dict)
    paths = metadata.get("planner_data")
    places = _places(_expect("storage_data", metadata.get("storage_data"), dict))
    found = []
    for name, value in described.items():
        _expect("a tensor's name", name, str)
        if isinstance(value, _Shell) and type(value).__name__ == "TensorStorageMetadata":
            path = paths.get(name) if isinstance(paths, Mapping) else None
            whole = isinstance(path, tuple) and path
            keys = tuple(map(str, path)) if isinstance(path, tuple) and whole else (name,)
            found.append(_entry(name, keys, value, places))
    return found


def _entry(
    name: str,
    path: tuple[str, ...],
    value: _Shell,
    places: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]],
) -> _Entry:
    properties = _expect(f"{name}'s properties", value.get("properties"), _Shell)
    # A tuple with the dtype first, in every version so far.
    state = properties.state
    dtype = state[0] if isinstance(state, tuple) and state else properties.get("dtype")
    pieces = []
    for chunk in _expect(f"{name}'s chunks", value.get("chunks"), list):
        chunk = _expect(f"a chunk of {name}", chunk, _Shell)
        offsets, sizes = _size(chunk.get("offsets")), _size(chunk.get("sizes"))
        if (name, offsets) not in places:
            raise KeyError(f"no place is given for a chunk of {printable(name)}")
        pieces.append(_Piece(offsets, sizes, *places[name, offsets]))
    shape = _size(value.get("size"))
    for piece in pieces:
        fits = len(piece.offsets) == len(piece.sizes) == len(shape) and all(
            start + size <= whole
            for start, size, whole in zip(piece.offsets, piece.sizes, shape, strict=True)
        )
        if not fits:
            raise ValueError(f"a chunk of {printable(name)} lies outside the tensor")
    return _Entry(path, _expect(f"{name}'s dtype", dtype, torch.dtype), shape, tuple(pieces))


def _places(
    storage_data: dict[Any, Any],
) -> dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]:
    """Return the file, start and length of each piece of a tensor."""
    found = {}
    for index, info in storage_data.items():
        index = _expect("an index", index, _Shell)
        if index.get("offset") is None:
            continue  # no tensor
        info = _expect("a place", info, _Shell)
        if info.get("transform_descriptors"):
            raise ValueError("the tensors are stored compressed, which is not supported")
        file = _expect("a file's name", info.get("relative_path"), str)
        if not is_plain_name(file):
            raise ValueError(f"{printable(repr(file))} is no file of the same folder")
        start, length = (_count(info.get(key)) for key in ("offset", "length"))
        found[_expect("a name", index.get("fqn"), str), _size(index.get("offset"))] = (
            file,
            start,
            length,
        )
    return found


def _size(value: Any) -> tuple[int, ...]:
    """Return a torch.Size that was pickled as its class and one tuple."""
    arguments = value.arguments if isinstance(value, _Shell) else (value,)
    (numbers,) = arguments or ((),)
    return tuple(map(_count, _expect("a size", numbers, tuple)))


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{printable(repr(value))} stands for a count")
    return value


def _expect(what: str, value: Any, kind: type[Any]) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{printable(what)} is a {type(value).__name__}")
    return value


def _read_tensor(folder: Path, name: str, entry: _Entry, device: torch.device) -> Tensor:
    whole, covered = math.prod(entry.shape), sum(math.prod(p.sizes) for p in entry.pieces)
    try:
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        written = torch.zeros(entry.shape, dtype=torch.bool)
    except (RuntimeError, MemoryError) as error:
        raise damaged(folder, error) from error
    for piece in entry.pieces:
        where = tuple(
            slice(start, start + size)
            for start, size in zip(piece.offsets, piece.sizes, strict=True)
        )
        tensor[where] = _read_piece(folder, name, entry, piece)
        written[where] = True
    # As many elements as there are, and each of them: no gap, and no chunk over another.
    if covered != whole or not written.all():
        raise UnreadableCheckpoint(
            at(
                folder,
                f"expected chunks that make up the {whole} elements of {printable(name)}, got "
                f"chunks of {covered} that {'overlap' if covered >= whole else 'leave gaps'}",
            )
        )
    return tensor.to(device)


def _read_piece(folder: Path, name: str, entry: _Entry, piece: _Piece) -> Tensor:
    path = folder / piece.file
    try:
        with path.open("rb") as file:
            file.seek(piece.start)
            stored = file.read(min(piece.length, path.stat().st_size))
        if len(stored) < piece.length:
            raise EOFError(f"it ends {piece.length - len(stored)} bytes too early")
        found = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UnreadableCheckpoint(
            at(folder, f"expected the file {piece.file!r}, got no such file")
        ) from error
    except pickle.UnpicklingError as error:
        raise needs_full_unpickler(path, "piece of a tensor", (), way_out=False) from error
    except CheckpointError:
        raise
    except Exception as error:
        raise damaged(path, error) from error
    if not isinstance(found, Tensor):
        raise UnreadableCheckpoint(
            at(path, f"expected a piece of {printable(name)}, got a {type(found).__name__}")
        )
    if tuple(found.shape) != piece.sizes or found.dtype != entry.dtype:
        raise UnreadableCheckpoint(
            at(
                path,
                f"expected a piece of {printable(name)} of shape {list(piece.sizes)} and "
                f"{entry.dtype}, got {list(found.shape)} and {found.dtype}",
            )
        )
    return found.detach()
