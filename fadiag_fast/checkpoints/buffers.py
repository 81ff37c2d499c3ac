"""Read checkpoints into memory that is already there: what a scan's reader threads do.

Reading is one system call for the whole file, into its place; tensors are views of the bytes where
they lie. Interpreted code then only looks at some kilobytes (see torch_zip and
safetensors_layouts), so that threads do not wait for each other's interpreter lock: it is left
while a file is read and hashed.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import torch_legacy
from .copying import without_data
from .distributed import METADATA
from .errors import CheckpointError, UnreadableCheckpoint, at
from .files import read_file
from .finding import Found, find_checkpoint, found_in
from .layouts import ALIGNMENT, aligned, layout_of
from .opening import Files, MemorySource, OpenFile, Source, read_steadily
from .places import TensorPlace
from .remote import fetch_file, is_url, local_copy
from .safetensors_layouts import bytes_before_tensors, looks_like_safetensors

_Bytes = NDArray[np.uint8]

# Bytes that tell the formats apart.
_HEAD = 512

# For files that are hashed without being kept: larger than a disk's read-ahead, small in the cache.
_CHUNK = 1 << 20


class Hasher(Protocol):
    """Take a checkpoint's bytes as they pass by, as hashlib's objects do."""

    def update(self, data: Any, /) -> None:
        """Add bytes; anything with the buffer protocol, C-contiguous."""


class SlabTooSmall(CheckpointError):
    """Report a slab into which a checkpoint does not fit; `needed` bytes will do."""

    needed: int = 0


@dataclass(frozen=True, eq=False)
class SlabCheckpoint:
    """Say what was read into a slab, and where it lies.

    Attributes:
        path: the file or folder, as given; text for a URL.
        layout: name to offset, dtype, shape and stride. Checkpoints of one study share one object.
        signature: as `state_signature` gives it.
        start: the first byte of the slab that any tensor uses, and
        stop: the one after the last: what to copy to a device.
        format, container, removed_prefix, extra_state, notes: as in Checkpoint.
        beside: what `extra` is made of when it is asked for.
        versions: what `load_state_dict` is told of the modules' versions; None if the file says
            nothing of them.
        nbytes: size of a file that was read as it is; None of folders and of what was loaded.
    """

    path: Path | str
    layout: Mapping[str, TensorPlace] = field(repr=False)
    signature: str
    start: int
    stop: int
    format: str
    container: str
    removed_prefix: str
    beside: Mapping[str, Any] = field(repr=False)
    versions: Mapping[str, Any] | None = field(default=None, repr=False)
    nbytes: int | None = None
    extra_state: Mapping[str, Any] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    @cached_property
    def extra(self) -> Mapping[str, Any]:
        """As in Checkpoint, but tensors in it have no data (they are on the meta device)."""
        found: Mapping[str, Any] = without_data(self.beside)
        return found

    def tensors(self, buffer: Tensor, base: int = 0) -> dict[str, Tensor]:
        """Return the state dict as views of the slab, or of a copy of it on any device.

        Args:
            buffer: uint8 `[bytes]`, holding the slab's bytes from `base` on. The address of its
                first byte, less `base`, must be a multiple of 16.
            base: which byte of the slab the buffer's first one is: `start` for a copy of
                ``slab[start:stop]``.
        """
        state = OrderedDict((name, place.view(buffer, base)) for name, place in self.layout.items())
        if self.versions is not None:
            state._metadata = self.versions  # type: ignore[attr-defined]
        return state


def read_into(
    path: str | os.PathLike[str],
    slab: Tensor,
    *,
    hasher: Hasher | None = None,
    unsafe_pickle: bool = False,
    key: str | None = None,
) -> SlabCheckpoint:
    """Read a checkpoint's bytes into a slab, and say where its tensors are.

    Reads what `load_checkpoint` reads, with the same checks and errors: it is the same reader.
    Files of torch.save and safetensors files (also in shards) are read as they are, in one piece;
    tensors that lie where their dtype cannot be read are copied behind it. What only torch can read
    (members that are compressed or of the other byte order, sparse tensors beside the weights), and
    distributed checkpoints, are loaded and then copied.

    Several threads may read at the same time, into a slab each.

    Whether the bytes are hashed is the caller's choice. A scan wants it: a file that was replaced
    under its name must be audited again. Checksums in a zip file would be free, but they are what
    the file says of itself, and may be switched off where it is written. What is hashed is what was
    read into the slab; of a distributed checkpoint, whose files are not read whole, it is what they
    hold, and they have not changed since.

    Args:
        path: file, folder or URL, as for `load_checkpoint`.
        slab: uint8 `[bytes]` in the CPU's memory, pinned or not, beginning at a multiple of 64 (as
            torch allocates). It may be used again once the tensors in it are not needed any more.
        hasher: is given the file's bytes in order. Of a folder, for each file that is read, sorted
            by name: ``f"{len(name)} {size} "``, the name, the bytes.
        unsafe_pickle, key: as for `load_checkpoint`.

    Raises:
        SlabTooSmall: with the bytes `needed`; what the slab holds is undefined.
        CheckpointError: as `load_checkpoint`.
        ValueError, TypeError: the slab is not as described.
    """
    data = _bytes_of(slab)
    if isinstance(path, str) and is_url(path):
        return _read_url(path, data, hasher, unsafe_pickle, key)
    return _read_local(Path(path), data, hasher, unsafe_pickle, key)


def _bytes_of(slab: Tensor) -> _Bytes:
    if not isinstance(slab, Tensor):
        raise TypeError(f"read_into: slab: expected a tensor, got {type(slab).__name__}")
    if slab.dtype != torch.uint8 or slab.dim() != 1 or slab.device.type != "cpu":
        raise ValueError(
            "read_into: slab: expected one dimension of uint8 on the CPU, got "
            f"{list(slab.shape)} of {slab.dtype} on {slab.device}"
        )
    if not slab.is_contiguous() or slab.data_ptr() % ALIGNMENT:
        raise ValueError(
            f"read_into: slab: expected contiguous bytes from a multiple of {ALIGNMENT} on, got "
            f"stride {slab.stride(0)} and an address of {slab.data_ptr() % ALIGNMENT} beyond one"
        )
    return slab.numpy()


def _read_local(
    path: Path, data: _Bytes, hasher: Hasher | None, unsafe_pickle: bool, key: str | None
) -> SlabCheckpoint:
    def read(files: Files) -> tuple[Found, _SlabSpace, Files]:
        space = _SlabSpace(data)
        return find_checkpoint(path, files, space, unsafe_pickle, key), space, files

    found, space, files = read_steadily(path, read)
    if path in space.regions:
        start, size = space.regions[path]
        return _finished(path, found, data, start, size, hasher)
    if hasher is not None:
        _hash_files(hasher, path, files, space)
    return _placed(path, found, data, space.end)


def _read_url(
    url: str, data: _Bytes, hasher: Hasher | None, unsafe_pickle: bool, key: str | None
) -> SlabCheckpoint:
    def room(size: int) -> Tensor:
        _check_room(url, data, size)
        return torch.from_numpy(data)

    fetched = fetch_file(url, room)
    if fetched is None:
        with local_copy(url, key) as copy:
            found = _read_local(copy, data, hasher, unsafe_pickle, key)
        return replace(found, path=url, nbytes=None)
    size = len(fetched)
    start = _shift(bytes(data[:_HEAD]))
    _check_room(url, data, start + size)
    if start:
        data[start : start + size] = data[:size].copy()
    source = MemorySource(data.data[start : start + size])
    loaded = read_file(source, url, start, unsafe_pickle)
    found_there = found_in(loaded, url, unsafe_pickle, key)
    return _finished(url, found_there, data, start, size, hasher)


def _shift(head: bytes) -> int:
    """Return where to put a file so that its tensors, and not its header, lie on the alignment."""
    return -bytes_before_tensors(head) % ALIGNMENT if looks_like_safetensors(head) else 0


class _SlabSpace:
    """Read files into a slab, one behind the other.

    Attributes:
        regions: where each file begins, and its bytes.
        end: the byte after the last.
    """

    def __init__(self, data: _Bytes) -> None:
        self._data = data
        self.regions: dict[Path, tuple[int, int]] = {}
        self.end = 0

    def view(self, start: int, size: int) -> memoryview:
        """Return bytes of the slab."""
        return self._data.data[start : start + size]

    def reserve(self, sizes: Sequence[int], /) -> None:
        needed = self.end + sum(aligned(size) + ALIGNMENT for size in sizes)
        _check_room("its files", self._data, needed)

    def add(self, file: OpenFile, /) -> tuple[Source, int]:
        size, path, view = file.size, file.path, self._data.data
        start = aligned(self.end)
        # Where a safetensors file belongs in the slab stands in its head. All others are read at
        # once, and looked at in the slab.
        if path.name.endswith(".safetensors") or start + size > len(view):
            head = file.read(0, _HEAD)
            if not (
                head.startswith(b"PK\x03\x04")
                or looks_like_safetensors(head)
                or torch_legacy.looks_like(head)
            ):
                return file, 0  # no checkpoint, for which room would be made in vain
            start += _shift(head)
            _check_room(path, self._data, start + size)
        done = file.read_into(view[start : start + size])
        shift = _shift(bytes(view[start : start + min(size, _HEAD)]))
        if shift and not path.name.endswith(".safetensors"):
            _check_room(path, self._data, start + shift + size)
            self._data[start + shift : start + shift + size] = self._data[
                start : start + size
            ].copy()
            start += shift
        if done < size:
            raise UnreadableCheckpoint(at(path, f"expected {size} bytes, got {done}"))
        self.regions[path] = (start, size)
        self.end = start + size
        return MemorySource(view[start : start + size]), start


def _finished(
    path: Path | str, found: Found, data: _Bytes, start: int, size: int, hasher: Hasher | None
) -> SlabCheckpoint:
    """Hash one file, and place what it holds."""
    if hasher is not None:
        hasher.update(data[start : start + size].data)
    # Where torch has read its tensors, its bytes are not needed any more.
    in_place = any(isinstance(value, TensorPlace) for value in found.state.values())
    return _placed(path, found, data, start + size if in_place else 0, size)


def _placed(
    path: Path | str, found: Found, data: _Bytes, end: int, nbytes: int | None = None
) -> SlabCheckpoint:
    """Copy to the slab what is not there yet, and say where all is."""
    places, end = _copied(path, found.state, data, end)
    layout = layout_of(places, end)
    _check_room(path, data, layout.needed)
    for source, target, length in layout.moves:
        data[target : target + length] = data[source : source + length]
    return SlabCheckpoint(
        path,
        layout.places,
        layout.signature,
        layout.start,
        layout.stop,
        found.format,
        found.container,
        found.removed_prefix,
        found.extra,
        getattr(found.state, "_metadata", None),
        nbytes,
        found.extra_state,
        found.notes,
    )


def _check_room(path: Path | str, data: _Bytes, needed: int) -> None:
    if needed > len(data):
        error = SlabTooSmall(
            at(
                path,
                f"expected a slab of at least {needed} bytes, got one of {len(data)}",
                caller="read_into",
            )
        )
        error.needed = needed
        raise error


def _copied(
    path: Path | str, state: Mapping[str, Tensor | TensorPlace], data: _Bytes, end: int
) -> tuple[dict[str, TensorPlace], int]:
    """Copy tensors to the slab, whole storages, so that what is shared stays shared."""
    offsets: dict[tuple[int, int], int] = {}
    sources: list[tuple[int, Tensor]] = []
    places: dict[str, TensorPlace] = {}
    for name, tensor in state.items():
        if isinstance(tensor, TensorPlace):
            places[name] = tensor
            continue
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes())
        if key not in offsets:
            offsets[key] = end = aligned(end)
            # Also keeps a storage that was made here alive, and with it its address.
            sources.append((end, torch.empty(0, dtype=torch.uint8).set_(storage)))
            end += storage.nbytes()
        offset = offsets[key] + int(tensor.storage_offset()) * tensor.dtype.itemsize
        places[name] = TensorPlace(offset, tensor.dtype, tuple(tensor.shape), tensor.stride())
    _check_room(path, data, end)
    for offset, source in sources:
        data[offset : offset + len(source)] = source.numpy()
    return places, end


def _hash_files(hasher: Hasher, path: Path, files: Files, space: _SlabSpace) -> None:
    folder = path if path.is_dir() else path.parent
    paths = files.paths
    if folder / METADATA in paths:
        # Its files are read in parts, and all of them are part of it.
        paths = [entry for entry in folder.iterdir() if entry.is_file()]
    for file in sorted(paths, key=lambda file: file.name):
        name = os.fsencode(file.name)
        for part, size in _parts(file, files, space):
            if size is not None:
                # The lengths keep "a" + "bc" and "ab" + "c" apart.
                hasher.update(f"{len(name)} {size} ".encode())
                hasher.update(name)
            hasher.update(part)
    if files.changed():
        raise UnreadableCheckpoint(
            at(
                path,
                "expected files that nobody is writing, got some that changed while they "
                "were hashed; try again when the program that saves them is done",
            )
        )


def _parts(
    path: Path, files: Files, space: _SlabSpace
) -> Iterator[tuple[bytes | memoryview, int | None]]:
    """Yield a file's bytes in parts, with its size at the first."""
    if path in space.regions:
        start, size = space.regions[path]
        yield space.view(start, size), size
    elif path in files.texts:
        yield files.texts[path], len(files.texts[path])
    else:
        with files.open(path, empty=True) as file:
            buffer = bytearray(_CHUNK)
            at_byte = 0
            yield b"", file.size
            while at_byte < file.size:
                count = file.read_into(memoryview(buffer)[: file.size - at_byte], at_byte)
                yield memoryview(buffer)[:count], None
                at_byte += count or file.size
