"""Read torch.distributed.checkpoint folders, in one process and without a model.

Such a folder has a pickle, `.metadata`, that says which tensors there are and where their pieces
lie, and files in which each piece is a small torch.save file of its own. torch's own reader
unpickles `.metadata` without restraint. Here every class it may name becomes an empty shell that
keeps what it is given, every other name is refused before anything is unpickled, and each value is
checked before it is used; the pieces are read as any torch.save file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .content import CONTAINERS, chose
from .errors import (
    CheckpointError,
    MissingCheckpoint,
    NoStateDict,
    UnreadableCheckpoint,
    UnsafeCheckpoint,
    at,
    damaged,
    listed,
    needs_full_unpickler,
    printable,
)
from .files import Loaded, is_plain_name, read_file
from .gathering import Gathered
from .opening import Files, MemorySource
from .pickles import scan_pickles
from .places import TensorPlace
from .restricted_pickle import MOST_BYTES, PickleError, Shell, read_pickle

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

# Pieces that no cut parts are compared in pairs, up to so many.
_MOST_COMPARED = 500

# Top-level entries whose tensors are the optimizer's: 'optim', 'optimizer', 'optimizer_states', …
OPTIMIZER = "optim"


def _dtype_names() -> list[str]:
    return [
        f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)
    ]


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


def load_distributed(folder: Path, files: Files, key: str | None = None) -> Loaded:
    """Read the model's tensors of a torch.distributed.checkpoint folder.

    Where the saved dict had the weights under one of the usual names, also one level down as an
    application's state has, those are read; else all tensors that are not the optimizer's. With a
    key those are read whose place in the saved dict begins with it.
    """
    entries = _read_entries(folder, files)
    container, chosen, notes = _select(entries, key)
    if not chosen:
        tops = sorted({printable(entry.path[0]) for entry in entries})
        raise NoStateDict(
            at(
                folder,
                f"expected a model's tensors{'' if key is None else f' under key={key!r}'}, got "
                + (f"tensors only under {listed(tops)}" if tops else "no tensor at all"),
            )
        )
    for name, entry in chosen.items():
        _check_chunks(folder, name, entry)
    _check_places(folder, files, chosen)
    state = {name: _read_tensor(folder, files, name, entry) for name, entry in chosen.items()}
    return Loaded("distributed", state, {}, container, notes)


def files_of(folder: Path, files: Files, key: str | None) -> set[str]:
    """Return the names of the files that hold the model's tensors."""
    _, chosen, _ = _select(_read_entries(folder, files), key)
    return {piece.file for entry in chosen.values() for piece in entry.pieces}


def _select(
    entries: list[_Entry], key: str | None
) -> tuple[str, dict[str, _Entry], tuple[str, ...]]:
    """Return the container, the model's entries by name, and notes on other containers."""
    named = {".".join(entry.path): entry for entry in entries}
    if key is not None:
        front = f"{key}."
        inside_key = {n[len(front) :]: entry for n, entry in named.items() if n.startswith(front)}
        return key, inside_key, ()
    for depth in range(min((len(entry.path) for entry in entries), default=0)):
        inside = {entry.path[depth] for entry in entries if len(entry.path) > depth + 1}
        containers = [container for container in CONTAINERS if container in inside]
        if containers:
            first, *others = (".".join((*entries[0].path[:depth], name)) for name in containers)
            chosen = {
                ".".join(entry.path[depth + 1 :]): entry
                for entry in entries
                if entry.path[depth] == containers[0] and len(entry.path) > depth + 1
            }
            return containers[0], chosen, (chose(first, others),) if others else ()
        if len({entry.path[depth] for entry in entries}) > 1:
            break
    weights = {n: entry for n, entry in named.items() if not entry.path[0].startswith(OPTIMIZER)}
    return "bare", weights, ()


def _read_entries(folder: Path, files: Files) -> list[_Entry]:
    path = folder / METADATA
    try:
        metadata = _unpickle(path, files.read_text(path, "a metadata file", MOST_BYTES))
        return _entries(metadata)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise UnreadableCheckpoint(
            at(path, f"expected a distributed checkpoint's metadata, got one in which {error}")
        ) from error


def _unpickle(path: Path, data: bytes) -> Any:
    offered = {name: getattr(torch, name.removeprefix("torch.")) for name in _dtype_names()}
    try:
        metadata, _, names = read_pickle(data, offered)
    except PickleError as error:
        scan = scan_pickles(MemorySource(memoryview(data)), 1)
        names, metadata = scan.names, None
        if not scan.complete or not (names - _SHELLS - offered.keys()):
            raise damaged(path, error) from error
    if unknown := names - _SHELLS - offered.keys():
        raise needs_full_unpickler(path, "metadata file", unknown, way_out=False)
    return metadata


def _entries(metadata: Any) -> list[_Entry]:
    if not _is_a(metadata, "Metadata"):
        raise TypeError("there is no Metadata")
    described = _expect("state_dict_metadata", metadata.get("state_dict_metadata"), dict)
    paths = metadata.get("planner_data")
    places = _places(_expect("storage_data", metadata.get("storage_data"), dict))
    found = []
    for name, value in described.items():
        _expect("a tensor's name", name, str)
        if _is_a(value, "TensorStorageMetadata"):
            path = paths.get(name) if isinstance(paths, Mapping) else None
            keys = _keys(name, path) if isinstance(path, tuple) and path else (name,)
            found.append(_entry(name, keys, value, places))
    return found


def _keys(name: str, path: tuple[Any, ...]) -> tuple[str, ...]:
    """Return where a tensor was in the saved dict: names, and numbers of a list's items."""
    if not all(isinstance(key, str | int) for key in path):
        raise TypeError(f"the place of {printable(name)} in the saved dict is not made of names")
    return tuple(map(str, path))


def _entry(
    name: str,
    path: tuple[str, ...],
    value: Shell,
    places: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]],
) -> _Entry:
    properties = _expect(f"{name}'s properties", value.get("properties"), Shell)
    # A tuple with the dtype first, in every version so far.
    state = properties.state
    dtype = state[0] if isinstance(state, tuple) and state else properties.get("dtype")
    pieces = []
    for chunk in _expect(f"{name}'s chunks", value.get("chunks"), list):
        chunk = _expect(f"a chunk of {name}", chunk, Shell)
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
        index = _expect("an index", index, Shell)
        if index.get("offset") is None:
            continue  # no tensor
        info = _expect("a place", info, Shell)
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


def _is_a(value: Any, name: str) -> bool:
    if not isinstance(value, Shell):
        return False
    _check_not_extended(value)
    return value.name.endswith(f".{name}")


def _check_not_extended(value: Shell) -> None:
    """Refuse items put into an object: none of the classes of the metadata has such."""
    if value.extended:
        raise TypeError(f"items are put into a {value.name.rpartition('.')[2]}")


def _size(value: Any) -> tuple[int, ...]:
    """Return a torch.Size that was pickled as its class and one tuple."""
    if isinstance(value, Shell):
        _check_not_extended(value)
    arguments = value.arguments if isinstance(value, Shell) else (value,)
    (numbers,) = arguments or ((),)
    return tuple(map(_count, _expect("a size", numbers, tuple)))


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{printable(repr(value))} stands for a count")
    return value


def _expect(what: str, value: Any, kind: type[Any]) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{printable(what)} is a {type(value).__name__}")
    if isinstance(value, Shell):
        _check_not_extended(value)
    return value


def _check_chunks(folder: Path, name: str, entry: _Entry) -> None:
    """Check before any memory is taken that chunks make up a tensor, without gap or overlap."""
    whole, covered = math.prod(entry.shape), sum(math.prod(p.sizes) for p in entry.pieces)
    if covered == whole and not _overlap([piece for piece in entry.pieces if 0 not in piece.sizes]):
        return
    raise UnreadableCheckpoint(
        at(
            folder,
            f"expected chunks that make up the {whole} elements of {printable(name)}, got "
            f"chunks of {covered} that {'overlap' if covered >= whole else 'leave gaps'}",
        )
    )


def _overlap(pieces: list[_Piece]) -> bool:
    """Return whether two pieces have an element in common."""
    # Cut along one dimension after the other as long as that parts them: what a program wrote
    # falls into single pieces so.
    groups, before = [pieces] if pieces else [], -1
    while groups and before != len(groups):
        before = len(groups)
        for axis in range(len(pieces[0].sizes)):
            groups = [part for group in groups for part in _cut(group, axis) if len(part) > 1]
    return any(
        len(group) > _MOST_COMPARED or any(_meet(*pair) for pair in combinations(group, 2))
        for group in groups
    )


def _cut(pieces: list[_Piece], axis: int) -> list[list[_Piece]]:
    """Group pieces by what overlaps along a dimension."""
    groups: list[list[_Piece]] = []
    reach = -1
    for piece in sorted(pieces, key=lambda piece: piece.offsets[axis]):
        start = piece.offsets[axis]
        if start >= reach:
            groups.append([])
        groups[-1].append(piece)
        reach = max(reach, start + piece.sizes[axis])
    return groups


def _meet(one: _Piece, other: _Piece) -> bool:
    return all(
        a < b + length_b and b < a + length_a
        for a, length_a, b, length_b in zip(
            one.offsets, one.sizes, other.offsets, other.sizes, strict=True
        )
    )


def _check_places(folder: Path, files: Files, entries: Mapping[str, _Entry]) -> None:
    """Check before any memory is taken that the files hold what the metadata says they do."""
    claimed: dict[str, list[tuple[int, int]]] = {}
    for name, entry in entries.items():
        for piece in entry.pieces:
            nbytes = math.prod(piece.sizes) * entry.dtype.itemsize
            if nbytes > piece.length:
                raise UnreadableCheckpoint(
                    at(
                        folder,
                        f"expected {nbytes} bytes of a chunk of {printable(name)}, got a place "
                        f"of {piece.length} in {piece.file[:200]!r}",
                    )
                )
            claimed.setdefault(piece.file, []).append((piece.start, piece.start + piece.length))
    for file_name, spans in claimed.items():
        path = folder / file_name
        try:
            with files.open(path) as file:
                size = file.size
        except MissingCheckpoint as error:
            raise UnreadableCheckpoint(
                at(folder, f"expected the file {file_name[:200]!r}, got no such file")
            ) from error
        end = 0
        for start, stop in sorted(spans):
            if start < end:
                raise UnreadableCheckpoint(
                    at(folder, f"expected chunks apart from each other in {file_name[:200]!r}")
                )
            end = stop
        if end > size:
            raise damaged(path, EOFError(f"it ends {end - size} bytes too early"))


def _read_tensor(folder: Path, files: Files, name: str, entry: _Entry) -> Tensor:
    try:
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
    except (RuntimeError, MemoryError) as error:
        raise damaged(folder, error) from error
    for piece in entry.pieces:
        where = tuple(
            slice(start, start + size)
            for start, size in zip(piece.offsets, piece.sizes, strict=True)
        )
        tensor[where] = _read_piece(folder, files, name, entry, piece)
    return tensor


def _read_piece(folder: Path, files: Files, name: str, entry: _Entry, piece: _Piece) -> Tensor:
    path = folder / piece.file
    with files.open(path) as file:
        stored = file.read(piece.start, piece.length)
    try:
        loaded = read_file(MemorySource(memoryview(stored)), path)
        if loaded.refusal is not None:
            raise loaded.refusal
        found = loaded.content
    except UnsafeCheckpoint as error:
        raise needs_full_unpickler(
            path, "piece of a tensor", error.globals_needed, way_out=False
        ) from error
    if isinstance(found, TensorPlace):
        found = Gathered([found], _filler(stored), torch.device("cpu"))(found)
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


def _filler(stored: bytes) -> Callable[[int, memoryview], None]:
    def fill(start: int, view: memoryview) -> None:
        view[:] = stored[start : start + len(view)]

    return fill
