"""Read checkpoints into memory that is already there: what a scan's reader threads do.

Reading is one system call for the whole file, into its place; tensors are views of the bytes where
they lie. Interpreted code then only looks at some kilobytes (see zip_layouts and
safetensors_layouts), so that threads do not wait for each other's interpreter lock: it is left
while a file is read and hashed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import safetensors_layouts, zip_layouts
from .content import Checkpoint, wrapper_prefix
from .distributed import METADATA
from .errors import CheckpointError, UnreadableCheckpoint, at, brief, printable
from .files import looks_like_safetensors, read_head
from .folders import (
    INDEX_SUFFIX,
    TRAINER_STATE,
    by_shard,
    check_shard,
    find_weights,
    read_index,
    trainer_state,
)
from .layouts import (
    ALIGNMENT,
    Found,
    Layout,
    TensorPlace,
    aligned,
    make_layout,
    without_data,
)
from .loading import load_local
from .remote import is_local, is_url, local_copy, open_filesystem, unreachable

_Bytes = NDArray[np.uint8]

# Bytes that tell the formats apart: a safetensors header's length and its first character.
_HEAD = 9

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
        format, container, removed_prefix: as in Checkpoint.
        extra: as in Checkpoint, but tensors in it have no data (they are on the meta device), and
            it is shared between checkpoints where it is the same: not to be written to.
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
    extra: Mapping[str, Any] = field(repr=False)
    nbytes: int | None = None

    def tensors(self, buffer: Tensor, base: int = 0) -> dict[str, Tensor]:
        """Return the state dict as views of the slab, or of a copy of it on any device.

        Args:
            buffer: uint8 `[bytes]`, holding the slab's bytes from `base` on. The address of its
                first byte, less `base`, must be a multiple of 16.
            base: which byte of the slab the buffer's first one is: `start` for a copy of
                ``slab[start:stop]``.
        """
        return {name: place.view(buffer, base) for name, place in self.layout.items()}


def read_into(
    path: str | os.PathLike[str],
    slab: Tensor,
    *,
    hasher: Hasher | None = None,
    unsafe_pickle: bool = False,
) -> SlabCheckpoint:
    """Read a checkpoint's bytes into a slab, and say where its tensors are.

    Reads what `load_checkpoint` reads, with the same checks and errors. torch.save zip files and
    safetensors files (also in shards) are read as they are, in one piece; tensors that lie where
    their dtype cannot be read are copied behind it. Other formats are loaded and then copied.

    Several threads may read at the same time, into a slab each. Python takes 0.05 ms of a file like
    one that was read before (40 tensors), and some 10 ms of the first of its kind. Of one kind are
    torch.save files that differ in weights, in numbers and truth values beside the weights, and in
    texts of the same length; safetensors files with the same header.

    Whether the bytes are hashed is the caller's choice. A scan wants it: a file that was replaced
    under its name must be audited again. Checksums in a zip file would be free, but they are what
    the file says of itself, and may be switched off where it is written.

    Args:
        path: file, folder or URL, as for `load_checkpoint`.
        slab: uint8 `[bytes]` in the CPU's memory, pinned or not, beginning at a multiple of 64 (as
            torch allocates). It may be used again once the tensors in it are not needed any more.
        hasher: is given the file's bytes in order. Of a folder, for each file that is read, sorted
            by name: ``f"{len(name)} {size} "``, the name, the bytes.
        unsafe_pickle: as for `load_checkpoint`.

    Raises:
        SlabTooSmall: with the bytes `needed`; what the slab holds is undefined.
        CheckpointError: as `load_checkpoint`.
        ValueError, TypeError: the slab is not as described.
    """
    data = _bytes_of(slab)
    if isinstance(path, str) and is_url(path):
        return _read_url(path, data, hasher, unsafe_pickle)
    return _read_local(Path(path), data, hasher, unsafe_pickle)


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
    path: Path, data: _Bytes, hasher: Hasher | None, unsafe_pickle: bool
) -> SlabCheckpoint:
    if path.name.endswith(INDEX_SUFFIX) and not path.is_dir():
        return _read_sharded(path, path, data, hasher, unsafe_pickle)
    read = loaded = None
    with _opened(path) as file:
        # Without a descriptor it is a folder that the system or its permissions don't let open.
        folder = file is None or stat.S_ISDIR(file.status.st_mode)
        if file is not None and stat.S_ISREG(file.status.st_mode):
            # Where a safetensors file belongs in the slab stands in its head. All others are read
            # at once, and looked at in the slab.
            at_once = not path.name.endswith(".safetensors")
            read = _read_stream(path, file, file.status.st_size, data, 0, at_once=at_once)
    if folder:
        return _read_folder(path, data, hasher, unsafe_pickle)
    found = None if read is None else _find(read, data)
    if found is None:
        # Loaded before it is hashed: what is no checkpoint need not be.
        loaded = load_local(path, torch.device("cpu"), unsafe_pickle)
        if read is not None and read.zipped:
            found = zip_layouts.learn(data[: read.size])
    if read is not None and found is not None:
        return _finished(path, read, found, data, hasher)
    assert loaded is not None  # found is None
    copied = _copied(loaded, data)
    if hasher is not None:
        _hash_file(hasher, path)
    return copied


# Without waiting: nobody may ever write to a named pipe.
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)


class _Descriptor:
    """An open file, without what Python's own ask the system about it beyond its status.

    Every system call costs a reader the interpreter's lock, for which others wait too.
    """

    def __init__(self, number: int, status: os.stat_result) -> None:
        self._number = number
        self.status = status

    def read(self, size: int) -> bytes:
        return os.read(self._number, size)

    def readinto(self, target: memoryview) -> int:
        if hasattr(os, "readv"):
            # Not more at once than every system takes.
            return os.readv(self._number, [target[: 1 << 30]])
        data = os.read(self._number, len(target))
        target[: len(data)] = data
        return len(data)


@contextmanager
def _opened(path: Path) -> Iterator[_Descriptor | None]:
    """Open what is there, also a folder; None for a folder that cannot be opened."""
    number = _open(path)
    if number is None:
        yield None
        return
    try:
        yield _Descriptor(number, os.fstat(number))
    finally:
        os.close(number)


def _open(path: Path) -> int | None:
    try:
        return os.open(path, _FLAGS)
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):
            if stat.S_ISDIR(os.stat(path).st_mode):
                return None
        read_head(path)  # says why
        if isinstance(error, BlockingIOError):  # who has leased it must give it up first
            return os.open(path, os.O_RDONLY)
        raise


class _InSlab(NamedTuple):
    """Say where a file lies in the slab, and which of the two formats it has."""

    start: int
    size: int
    zipped: bool


def _read_stream(
    path: Path | str, file: Any, size: int, data: _Bytes, first: int, *, at_once: bool = False
) -> _InSlab | None:
    """Read an open file to the slab's byte `first`, None if it must be loaded instead.

    Args:
        path: for messages.
        file: with `read` and `readinto`.
        size: its bytes.
        data: the slab.
        first: see above; a safetensors file begins a little further, on account of its alignment.
        at_once: without looking at its head first, if there is room.
    """
    view = data.data
    start = first
    try:
        if at_once and first + size <= len(data):
            done = _fill(file, view[first : first + size])
            head = bytes(view[first : first + min(done, _HEAD)])
        else:
            head = file.read(_HEAD)[:size]
            done = 0
        zipped = head.startswith(b"PK\x03\x04")
        if not zipped:
            if not looks_like_safetensors(head):
                return None
            start += safetensors_layouts.start_in_slab(head)
        _check_room(path, data, start + size)
        if not done:
            view[start : start + len(head)] = head
            done = len(head) + _fill(file, view[start + len(head) : start + size])
        elif start != first:  # a safetensors file under another name
            view[start : start + size] = view[first : first + size]
        if done < size:
            return None  # shorter than it was
    except OSError as error:
        raise UnreadableCheckpoint(
            at(path, f"expected a file that can be read, got {brief(error)}")
        ) from error
    return _InSlab(start, size, zipped)


def _fill(file: Any, view: memoryview) -> int:
    """Read until a view is full or the file ends; return how many bytes that are."""
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            break
        done += count
    return done


def _find(read: _InSlab, data: _Bytes) -> Found | None:
    """Return what a file in the slab holds if that is to be seen without loading it."""
    if read.zipped:
        return zip_layouts.recognise(data[: read.size])
    return safetensors_layouts.find_layout(data, read.start, read.size)


def _finished(
    path: Path | str, read: _InSlab, found: Found, data: _Bytes, hasher: Hasher | None
) -> SlabCheckpoint:
    if hasher is not None:
        hasher.update(data[read.start : read.start + read.size].data)
    _move(path, found.layout, data)
    return _described(path, found, read.size)


def _move(path: Path | str, layout: Layout, data: _Bytes) -> None:
    _check_room(path, data, layout.needed)
    for source, target, length in layout.moves:
        data[target : target + length] = data[source : source + length]


def _described(path: Path | str, found: Found, nbytes: int | None = None) -> SlabCheckpoint:
    layout = found.layout
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
        nbytes,
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


# ------------------------------------------------------------------------------------------------
# What is not one file to be read as it is


def _copied(loaded: Checkpoint, data: _Bytes) -> SlabCheckpoint:
    """Copy loaded weights to the slab, whole storages, so that what is shared stays shared."""
    offsets: dict[tuple[int, int], int] = {}
    sources: list[tuple[int, Tensor]] = []
    places = {}
    end = 0
    for name, tensor in loaded.state_dict.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            kind = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
            raise UnreadableCheckpoint(
                at(loaded.path, f"expected dense tensors, got {printable(name)}: {kind}")
            )
        tensor = tensor.resolve_conj().resolve_neg()
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes())
        if key not in offsets:
            offsets[key] = end
            # Also keeps a storage that was made here alive, and with it its address.
            sources.append((end, torch.empty(0, dtype=torch.uint8).set_(storage)))
            end = aligned(end + storage.nbytes())
        offset = offsets[key] + int(tensor.storage_offset()) * tensor.dtype.itemsize
        places[name] = TensorPlace(offset, tensor.dtype, tuple(tensor.shape), tensor.stride())
    _check_room(loaded.path, data, end)
    for offset, source in sources:
        data[offset : offset + len(source)] = source.numpy()
    found = Found(
        loaded.format,
        make_layout(places, end),
        loaded.container,
        loaded.removed_prefix,
        without_data(loaded.extra),
    )
    return _described(loaded.path, found)


def _read_folder(
    folder: Path, data: _Bytes, hasher: Hasher | None, unsafe_pickle: bool
) -> SlabCheckpoint:
    weights = find_weights(folder)
    if weights.name == METADATA:
        found = _copied(load_local(folder, torch.device("cpu"), unsafe_pickle), data)
        names = {entry.name for entry in folder.iterdir() if entry.is_file()}
    else:
        found = _read_local(weights, data, None, unsafe_pickle)
        names = {weights.name}
        if weights.name.endswith(INDEX_SUFFIX):
            names |= set(read_index(weights).values())
        found = replace(found, extra={**found.extra, **trainer_state(folder)})
        names |= {TRAINER_STATE} & set(os.listdir(folder))
    if hasher is not None:
        _hash_files(hasher, folder, names)
    return replace(found, path=folder, nbytes=None)


def _read_sharded(
    path: Path, index: Path, data: _Bytes, hasher: Hasher | None, unsafe_pickle: bool
) -> SlabCheckpoint:
    """Read safetensors shards one behind the other, other shards through load_checkpoint."""
    weight_map = read_index(index)
    shards = by_shard(weight_map)
    places: dict[str, TensorPlace] = {}
    end = 0
    if all(shard.endswith(".safetensors") for shard in shards):
        sizes = [(index.parent / shard).stat().st_size for shard in shards]
        _check_room(index, data, sum(aligned(size) + ALIGNMENT for size in sizes))
    for shard, names in shards.items():
        read = None
        # A hint only: other shards are loaded, and need not be read here first.
        if shard.endswith(".safetensors"):
            with _opened(index.parent / shard) as file:
                if file is not None and stat.S_ISREG(file.status.st_mode):
                    size = file.status.st_size
                    read = _read_stream(index.parent / shard, file, size, data, end)
        found = None if read is None or read.zipped else _find(read, data)
        if found is None:
            whole = _copied(load_local(index, torch.device("cpu"), unsafe_pickle), data)
            break
        # A prefix belongs to all shards or none; one shard cannot know.
        prefix, layout = found.removed_prefix, found.layout
        held = {prefix + name: place for name, place in layout.places.items()}
        check_shard(index, shard, names, held)
        _move(index, layout, data)
        places |= held
        end = aligned(layout.needed)
    else:
        removed = wrapper_prefix(weight_map)
        layout = make_layout({name[len(removed) :]: places[name] for name in weight_map}, end)
        whole = _described(index, Found("safetensors-sharded", layout, "bare", removed, {}))
    if hasher is not None:
        _hash_files(hasher, index.parent, [index.name, *shards])
    return replace(whole, path=path)


def _read_url(url: str, data: _Bytes, hasher: Hasher | None, unsafe_pickle: bool) -> SlabCheckpoint:
    filesystem, path = open_filesystem(url)
    if not is_local(filesystem) and not path.endswith(INDEX_SUFFIX):
        try:
            if not filesystem.isdir(path):
                with filesystem.open(path, "rb") as file:
                    read = _read_stream(url, file, filesystem.size(path), data, 0)
                found = None if read is None else _find(read, data)
                if found is None and read is not None and read.zipped and _loads(data[: read.size]):
                    found = zip_layouts.learn(data[: read.size])
                if read is not None and found is not None:
                    return _finished(url, read, found, data, hasher)
        except CheckpointError:
            raise
        except Exception as error:
            raise unreachable(url, error) from error
    # An index needs its shards, so that the folder is fetched.
    with local_copy(url) as copy:
        return replace(_read_local(copy, data, hasher, unsafe_pickle), path=url, nbytes=None)


def _loads(data: _Bytes) -> bool:
    """Tell whether torch reads a file in memory; why not is found out by load_checkpoint."""
    try:
        torch.load(zip_layouts.stream(data), map_location="cpu", weights_only=True)
    except Exception:
        return False
    return True


def _hash_files(hasher: Hasher, folder: Path, names: Iterable[str]) -> None:
    for name in sorted(names):
        encoded = os.fsencode(name)
        # The lengths keep "a" + "bc" and "ab" + "c" apart.
        hasher.update(f"{len(encoded)} {(folder / name).stat().st_size} ".encode())
        hasher.update(encoded)
        _hash_file(hasher, folder / name)


def _hash_file(hasher: Hasher, path: Path) -> None:
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                hasher.update(view[:count])
    except OSError as error:
        raise UnreadableCheckpoint(
            at(path, f"expected a file that can be read, got {brief(error)}")
        ) from error
