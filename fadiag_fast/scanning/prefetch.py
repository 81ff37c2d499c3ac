"""Read a study's checkpoints on threads, ahead of what computes: each into a row of bytes."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..checkpoints import (
    CheckpointError,
    MissingCheckpoint,
    NoStateDict,
    SlabTooSmall,
    StateDictMismatch,
    UnsafeCheckpoint,
    read_into,
)
from ..checkpoints.errors import at
from ..checkpoints.layouts import aligned
from ..checkpoints.remote import is_url
from .hashing import ContentHasher, content_hash
from .memory import free_host_bytes, lacks_memory
from .run_names import Entry
from .weight_layout import Fit, Fitter
from .writer import ScanWriter

# Files that one task reads, where each reader still has a task of a group: to hand over a task and
# its outcome, threads wait for the interpreter's lock some six times.
_MOST_OF_A_PIECE = 4
# What a file has between two tensors: a zip entry's header, a name, and the way to a boundary.
_BETWEEN_TENSORS = 512
# What a file has beside its tensors: counters, a configuration, the losses so far.
_BESIDE_TENSORS = 1 << 16
# A file may have a network's size so many times over, with an optimiser's state say, and is still
# read into a buffer that its thread keeps. Larger ones are read one at a time.
_KEPT_SIZES = 4
# Of the memory that is free, what all threads' buffers may take, and what a large file may.
_BUFFER_SHARE, _LARGE_SHARE = 0.25, 0.8
# Files of a folder that are looked at to tell its size: it may be a data set.
_MOST_FILES = 10_000


# Given what stands beside a checkpoint's weights, says why they are not of the model, or None.
Refuse: TypeAlias = Callable[[Mapping[str, Any]], str | None]


@dataclass
class Read:
    """What became of one checkpoint; its weights are in its row.

    Attributes:
        entry: which.
        fit: where its tensors lie; None if it is not to be measured.
        content: hash of its bytes; None where they could not be read.
        nbytes: its size.
        reused: whether an earlier scan has its figures.
        container: where in it the weights were, and
        notes: what was taken where it left a choice, and what was left out.
        error_kind: what is wrong with it, in the words of a record, and
        error: in a sentence.
    """

    entry: Entry
    fit: Fit | None = None
    content: str | None = None
    nbytes: int | None = None
    reused: bool = False
    container: str | None = None
    notes: tuple[str, ...] = ()
    error_kind: str | None = None
    error: str | None = None


class Rows:
    """Rows of memory on the device that computes, for a group of checkpoints."""

    def __init__(self, count: int, width: int, device: torch.device) -> None:
        self._bytes = torch.empty((count, width), dtype=torch.uint8, device=device)
        if self._bytes.is_cuda:
            # The allocator may hand out memory that work under way in this stream still uses, and
            # readers write from streams of their own.
            torch.cuda.current_stream(device).synchronize()

    def hold(self, count: int, width: int) -> bool:
        """Return whether so many rows of so many bytes are here."""
        return self._bytes.shape[0] >= count and self._bytes.shape[1] >= width

    def __getitem__(self, index: int) -> Tensor:
        # With a version counter of its own: autograd, which computes other rows meanwhile, would
        # take what a reader writes for a change of theirs.
        return self._bytes[index].data

    def of(self, fit: Fit, indices: Sequence[int]) -> Tensor:
        """Return the bytes that a fit's places count from, ``[len(indices), ...]``."""
        first, count = indices[0], len(indices)
        if list(indices) == list(range(first, first + count)):
            rows = self._bytes[first : first + count]
        else:
            rows = self._bytes[list(indices)]
        return rows if self._bytes.is_cuda else rows[:, fit.start :]


@dataclass
class Group:
    """Checkpoints that are read together, some of them by one task."""

    rows: Rows
    pieces: list[Future[list[Read]]]

    def reads(self) -> Iterator[Read]:
        """Yield what became of each checkpoint, in their order, as they are read."""
        for piece in self.pieces:
            yield from piece.result()


class Reader:
    """Read groups of checkpoints on threads.

    For the CPU a file is read into the row where it is computed. For a GPU each thread has one
    pinned buffer, reads into that, and copies what is weights to the row on a stream of its own.
    Rows are as wide as the network needs. A file that is larger, with an optimiser's state say, is
    read into a buffer of its thread, and one that is much larger into a buffer of its own, one such
    file at a time. What memory does not hold is a failure of that file alone.

    Args:
        model: the architecture.
        device: where it is computed.
        writer: knows what is done.
        config: hash of the scan's configuration.
        unsafe_pickle: run code from files that need it to load.
        workers: threads.
        key: where in a file the weights are.
        refuse: see :func:`fadiag_fast.scan`.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        writer: ScanWriter,
        config: str,
        unsafe_pickle: bool,
        workers: int,
        *,
        key: str | None = None,
        refuse: Refuse | None = None,
    ) -> None:
        self._fitter = Fitter(model)
        self._device = device
        self._writer = writer
        self._config = config
        self._how: dict[str, Any] = {"unsafe_pickle": unsafe_pickle, "key": key}
        self._refuse = refuse
        self._workers = workers
        self._closed = False
        # The current device is a thread's own, and pinning asks it.
        self._pool = ThreadPoolExecutor(
            workers,
            thread_name_prefix="fadiag-read",
            initializer=partial(torch.cuda.set_device, device) if device.type == "cuda" else None,
        )
        self._local = threading.local()
        self._free: list[Rows] = []
        own = self._fitter.canonical
        # What the network needs, and not what lies among the checkpoints: that may be anything.
        self.row_bytes = aligned(own.stop + len(own.places) * _BETWEEN_TENSORS + _BESIDE_TENSORS)
        share = int(_BUFFER_SHARE * free_host_bytes() / workers)
        self._kept_bytes = max(self.row_bytes, min(_KEPT_SIZES * self.row_bytes, share))
        self._one_large_file = threading.Lock()

    def close(self) -> None:
        """Wait for what is being read, and drop the rest."""
        self._closed = True
        self._pool.shutdown(cancel_futures=True)

    def begin(self, entries: Sequence[Entry]) -> Group:
        """Begin to read a group, into the rows of one that is done with, if they are enough."""
        width = self.row_bytes
        rows = self._free.pop() if self._free else None
        if rows is None or not rows.hold(len(entries), width):
            rows = None  # its memory is free before the new ones are there
            rows = Rows(len(entries), width, self._device)
        size = max(1, min(_MOST_OF_A_PIECE, len(entries) // self._workers))
        pieces = [
            self._pool.submit(self._read_piece, entries[first : first + size], rows, first)
            for first in range(0, len(entries), size)
        ]
        return Group(rows, pieces)

    def done_with(self, group: Group) -> None:
        """Say that a group's rows may be read into again."""
        self._free.append(group.rows)

    def _read_piece(self, entries: Sequence[Entry], rows: Rows, first: int) -> list[Read]:
        """Read checkpoints into the rows from ``first`` on."""
        reads = []
        for index, entry in enumerate(entries, first):
            if self._closed:  # nobody waits for the rest
                break
            reads.append(self._read(entry, rows[index]))
        return reads

    def _read(self, entry: Entry, row: Tensor) -> Read:
        """Read one checkpoint into a row; raises nothing."""
        found = Read(entry)
        try:
            self._read_into(found, row)
        except Exception as error:  # whatever a file holds, the others go on
            found.error_kind, found.error = kind_of(error), str(error) or repr(error)
            if found.nbytes is None:
                found.nbytes = _size(entry.path)
            # What is no checkpoint may be of any size, and nobody needs its hash.
            small = found.nbytes is not None and found.nbytes <= self._kept_bytes
            if found.content is None and small and not is_url(entry.path):
                with suppress(OSError, ValueError):  # ValueError: a path with a NUL byte
                    found.content = content_hash(entry.path)
        return found

    def _read_into(self, found: Read, row: Tensor) -> None:
        # How large a file is turns out while it is read: to ask before would be one more wait.
        buffer = row if self._device.type == "cpu" else self._kept(self.row_bytes)
        try:
            self._read_through(found, buffer, row)
        except SlabTooSmall as error:
            needed = error.needed
            if needed <= self._kept_bytes:
                self._read_through(found, self._kept(needed), row)
                return
            with self._one_large_file:
                free = free_host_bytes()
                if needed > _LARGE_SHARE * free:
                    raise MemoryError(
                        f"scan: {found.entry.path!r}: expected a file that fits into memory beside "
                        f"the scan, got one that needs {needed:,} bytes where {free:,} are free"
                    ) from None
                self._read_through(found, torch.empty(needed, dtype=torch.uint8), row)

    def _read_through(self, found: Read, buffer: Tensor, row: Tensor) -> None:
        """Read into a buffer, which may be the row, and put the weights into the row."""
        path, on_cpu = found.entry.path, self._device.type == "cpu"
        hasher = ContentHasher()
        read = read_into(path, buffer, hasher=hasher, **self._how)
        found.content = hasher.result()
        # Of a folder all files count, also those that are not read.
        found.nbytes = _size(path) if read.nbytes is None else read.nbytes
        if found.nbytes is None:
            found.nbytes = hasher.count
        refusal = None if self._refuse is None else self._refuse(read.extra)
        if refusal is None and self._writer.done(found.content, self._config):
            found.reused = True
            return
        found.container, found.notes = read.container, read.notes
        fit = self._fitter.fit(read)
        in_place = buffer is row
        if fit is None or (not in_place and fit.stop - fit.start > len(row)):
            target = row if on_cpu else torch.empty(self.row_bytes, dtype=torch.uint8)
            fit, notes = self._fitter.load(read, buffer, target)
            found.notes += notes
            buffer, in_place = target, on_cpu
        if refusal is not None:  # after what is plainer: other names or shapes
            raise StateDictMismatch(at(path, refusal, "scan"))
        if not in_place:
            self._copy(buffer[fit.start : fit.stop], row)
            # On the CPU a fit says where tensors lie in the row itself.
            fit = self._fitter.moved_to_start(fit) if on_cpu else fit
        found.fit = fit

    def _kept(self, needed: int) -> Tensor:
        """Return this thread's buffer, larger if need be: pinned where a GPU copies from it."""
        buffer: Tensor | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < needed:
            self._local.buffer = None
            # A little more: the next file may be a little larger, and pinning is slow.
            size = aligned(min(needed + needed // 8, max(needed, self._kept_bytes)))
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            self._local.buffer = buffer
        return buffer

    def _copy(self, source: Tensor, row: Tensor) -> None:
        """Copy from a buffer to a row, on the CPU or a GPU."""
        if self._device.type == "cpu":
            row[: len(source)].copy_(source)
            return
        if not hasattr(self._local, "stream"):
            # A current stream is a thread's own, so that this is said once.
            self._local.stream = torch.cuda.Stream(self._device)
            torch.cuda.set_stream(self._local.stream)
        # One call that leaves the interpreter's lock once and returns when the row may be read in
        # any stream. A copy that does not block, an event and its waiting leave it three times.
        row[: len(source)].copy_(source)


def kind_of(error: BaseException) -> str:
    """Return the word for an error that a row has."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PermissionError):
            return "permission"
        if lacks_memory(cause):
            return "out of memory"
        cause = cause.__cause__ or cause.__context__
    for kind, types in (
        ("missing", (MissingCheckpoint, FileNotFoundError)),
        ("unsafe", (UnsafeCheckpoint,)),
        ("no weights", (NoStateDict,)),
        ("wrong model", (StateDictMismatch,)),
        ("unreadable", (CheckpointError, OSError)),
    ):
        if isinstance(error, types):
            return kind
    return "error"


def _size(path: str) -> int | None:
    """Return the bytes of a file or folder; None of a URL, or where it cannot be seen."""
    if is_url(path):
        return None
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            return _size_of_folder(path)
        return status.st_size
    except (OSError, ValueError):  # ValueError: a path with a NUL byte
        return None


def _size_of_folder(path: str) -> int | None:
    total = count = 0
    for folder, _, names in os.walk(path):
        for name in names:
            count += 1
            if count > _MOST_FILES:
                return None
            status = os.stat(os.path.join(folder, name))
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total
