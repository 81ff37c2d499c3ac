"""Audit many checkpoints of one architecture: read ahead, stack, compute, record."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..batches import check_batch, device_of, sample_counts, to_device
from ..capture import Loss, Output, untouched
from ..checkpoints import (
    CheckpointError,
    MissingCheckpoint,
    NoStateDict,
    StateDictMismatch,
    UnsafeCheckpoint,
    load_checkpoint,
    load_into,
)
from ..protocol import DiagnosticThresholds
from ..statistics import Reduction, SampleReduction
from ..taps import Select, unwrap
from .hashing import ContentHasher, content_hash
from .records import CheckpointRecord
from .results import ScanResult
from .series import Entry, read_manifest, series
from .stack import Auditor, Layout, RowModel, Slab
from .store import ScanWriter

# Sizes that the search for a stack goes through; a step must pay to be kept.
_GROWTH = 4
_WORTHWHILE = 1.10
_LARGEST_STACK = 256
# Of the memory that is free, what a stack may be expected to take.
_MEMORY_SHARE = 0.6


@dataclass(frozen=True)
class Progress:
    """How far a scan is.

    Attributes:
        done: checkpoints finished: audited, failed or taken over from an earlier scan.
        failed, reused: of these.
        total: to be scanned.
        bytes: read so far.
        seconds: since the scan began.
        stack: checkpoints that are computed together at present.
        path: the last one.
    """

    done: int
    failed: int
    reused: int
    total: int
    bytes: int
    seconds: float
    stack: int
    path: str

    @property
    def rate(self) -> float:
        """Checkpoints per second."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float:
        """At the present rate."""
        return (self.total - self.done) / self.rate if self.rate else float("inf")


@dataclass
class _Read:
    """What a reader thread made of one checkpoint; its weights are in the slab's row."""

    entry: Entry
    content: str | None = None
    nbytes: int | None = None
    reused: bool = False
    error_kind: str | None = None
    error: str | None = None


def scan(
    checkpoints: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | Sequence[Entry],
    model: nn.Module,
    eval_batches: Iterable[tuple[Any, Any]],
    out: str | os.PathLike[str],
    *,
    pattern: str | Sequence[str] | None = None,
    manifest: str | os.PathLike[str] | None = None,
    thresholds: DiagnosticThresholds | None = None,
    loss: Loss | None = None,
    taps: Select | None = None,
    reduction: Reduction | SampleReduction = "flatten",
    output: Output | None = None,
    batch_dim: int = 0,
    stack: int | Literal["auto"] = "auto",
    workers: int | None = None,
    unsafe_pickle: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> ScanResult:
    """Audit every checkpoint of a study and record what was found, as it is found.

    Args:
        checkpoints: paths, a glob (``runs/**/*.pt``) or entries that already have run and step.
        model: the architecture that they belong to, on the device that is to compute. Its own
            weights are not used, and it is left as it was.
        eval_batches: (x, y) pairs, as :func:`fadiag_fast.diagnose` takes them; all are kept on the
            device. (a) and (b) read the first, (c) all of them.
        out: the folder of results. A scan into a folder that has some takes over what is done:
            content and configuration decide, not names.
        pattern: how run and step are read from a path, such as ``{run}/step_{step}.pt``; see
            :func:`fadiag_fast.scanning.series`.
        manifest: a CSV, Parquet or TOML file with run, step and accuracies per path; see
            :func:`fadiag_fast.scanning.read_manifest`. ``checkpoints`` may then be empty.
        thresholds: other limits than the published ones.
        loss, taps, reduction, output, batch_dim: see :func:`fadiag_fast.diagnose`.
        stack: checkpoints computed together; ``"auto"`` grows it while that is faster and memory
            allows. Figures differ between stack sizes by rounding only.
        workers: threads that read ahead; by default up to eight.
        unsafe_pickle: run code from files that need it to load.
        on_progress: called after every group of checkpoints.

    Returns:
        The folder's rows, of this scan and of earlier ones.

    Raises:
        TapError: the model cannot be observed.
        ResultsError: the folder cannot be written, or another scan is at it.
        ValueError: there is nothing to scan, or no batch.

    What is wrong with one checkpoint stands in its row, with a kind of error as in
    :class:`~fadiag_fast.scanning.records.CheckpointRecord`, and stops nothing. After Ctrl-C, what
    is finished is on the disk.
    """
    entries = _entries(checkpoints, pattern, manifest)
    model = unwrap(model)
    device = device_of(model)
    batches = []
    for index, batch in enumerate(eval_batches):
        x, y = check_batch(index, batch, batch_dim, "scan")
        if 0 not in sample_counts(x, batch_dim):
            batches.append(to_device((x, y), device))
    if not batches:
        raise ValueError("scan: expected at least one evaluation batch, got none")
    how = reduction if isinstance(reduction, SampleReduction) else SampleReduction(reduction)
    with untouched(model), ScanWriter(out, thresholds=thresholds) as writer:
        loss = None if loss is nn.functional.cross_entropy else loss
        options = {"select": taps, "loss": loss, "output": output, "batch_dim": batch_dim}
        auditor = Auditor(model, batches, options, how)
        run = _Scan(model, device, auditor, writer, unsafe_pickle, workers, on_progress)
        run.config = writer.configure(_configuration(model, batches, auditor, loss, how))
        run.scan(entries, stack)
    return ScanResult.load(out)


def _entries(checkpoints: Any, pattern: str | Sequence[str] | None, manifest: Any) -> list[Entry]:
    """Return what is to be scanned, in order of run and step."""
    if manifest is not None:
        listed = read_manifest(manifest)
        if not checkpoints:
            return listed
    else:
        listed = []
    if isinstance(checkpoints, str | os.PathLike):
        checkpoints = [checkpoints]
    given = list(checkpoints)
    if given and all(isinstance(item, Entry) for item in given):
        found = given
    else:
        paths: list[str] = []
        for item in map(os.fspath, given):
            matches = sorted(glob.glob(item, recursive=True)) if glob.has_magic(item) else [item]
            paths += matches or [item]
        # Run names that do not depend on which files a glob happens to find.
        magic = [item for item in map(os.fspath, given) if glob.has_magic(item)]
        root = _fixed_part(magic[0]) if len(given) == len(magic) == 1 else None
        found = series(paths, pattern, root=root)
    known = {os.path.abspath(entry.path): entry for entry in listed}
    found = [known.pop(os.path.abspath(entry.path), entry) for entry in found]
    if not found:
        raise ValueError("scan: expected at least one checkpoint, got none")
    return found


def _fixed_part(pattern: str) -> str:
    """Return the folder above a glob's first wildcard."""
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return str(Path(*parts[:fixed])) if fixed else ""


def _configuration(
    model: nn.Module, batches: Sequence[Any], auditor: Auditor, loss: Any, how: SampleReduction
) -> dict[str, Any]:
    """Return all that decides the figures of given weights, but for rounding."""
    hasher = ContentHasher()
    for leaf in tree_leaves(batches):
        if isinstance(leaf, Tensor):
            raw = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            hasher.update(raw.numpy().tobytes())
    return {
        "model": type(model).__name__,
        "weights": [[p.name, list(p.shape), str(p.dtype)] for p in auditor.layout.places],
        "batches": hasher.result(),
        "taps": [tap.where for tap in auditor.taps.points],
        "loss": "cross-entropy" if loss is None else getattr(loss, "__qualname__", repr(loss)),
        "reduction": how.kind,
        "feature_dim": how.feature_dim,
    }


class _Scan:
    """One scan under way."""

    config = ""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        auditor: Auditor,
        writer: ScanWriter,
        unsafe_pickle: bool,
        workers: int | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.model, self.device, self.auditor, self.writer = model, device, auditor, writer
        self.unsafe_pickle = unsafe_pickle
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.on_progress = on_progress
        self.layout: Layout = auditor.layout
        # Each reader needs a model to load into; there are as many as readers.
        self.row_models: SimpleQueue[RowModel] = SimpleQueue()
        tensors = (*model.named_parameters(), *model.named_buffers())
        values = {name: tensor.detach().cpu() for name, tensor in tensors}
        for _ in range(self.workers):
            self.row_models.put(RowModel(model, self.layout, values))
        self.started = time.perf_counter()
        self.done = self.failed = self.reused = self.bytes = 0
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.device_name = name

    # ---- reading

    def _read(self, entry: Entry, row: Tensor) -> _Read:
        """Read one checkpoint into a row. Runs in a reader thread; raises nothing."""
        found = _Read(entry)
        model = self.row_models.get()
        try:
            with suppress(OSError):
                found.nbytes = _size(Path(entry.path))
            found.content = content_hash(entry.path)
            if self.writer.done(found.content, self.config):
                found.reused = True
                return found
            checkpoint = load_checkpoint(entry.path, unsafe_pickle=self.unsafe_pickle)
            with torch.no_grad():
                load_into(model.at(row), checkpoint)
        except Exception as error:  # whatever a file holds, the others go on
            found.error_kind, found.error = _kind(error), str(error) or repr(error)
        finally:
            self.row_models.put(model)
        return found

    # ---- computing

    def scan(self, entries: Sequence[Entry], stack: int | Literal["auto"]) -> None:
        most = self._most()
        search = _Search(stack, most)
        search.total = len(entries)
        waiting = _chunks(entries, search, min(2 * self.workers, most))
        with ThreadPoolExecutor(self.workers, thread_name_prefix="fadiag-read") as pool:
            slabs: list[Slab | None] = [None, None]
            turn = 0
            pending = self._begin(pool, next(waiting, []), slabs, turn)
            while pending is not None:
                chunk, slab, reads = pending
                # The next group is read while this one is computed.
                turn = 1 - turn
                following = self._begin(pool, next(waiting, []), slabs, turn)
                self._finish(chunk, slab, [read.result() for read in reads], search)
                pending = following

    def _most(self) -> int:
        """Return how many checkpoints' weights fit, twice on the host and once on the device."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
        else:
            free = _free_host_bytes()
        # Activations are not known yet; an error for want of memory shrinks the stack.
        return max(1, int(_MEMORY_SHARE * free / (4 * self.layout.row_bytes)))

    def _begin(
        self,
        pool: ThreadPoolExecutor,
        chunk: list[Entry],
        slabs: list[Slab | None],
        turn: int,
    ) -> tuple[list[Entry], Slab, list[Future[_Read]]] | None:
        if not chunk:
            return None
        slab = slabs[turn]
        if slab is None or len(slab) < len(chunk):
            slab = slabs[turn] = Slab(self.layout, len(chunk), self.device)
        reads = [pool.submit(self._read, entry, slab.on_host[i]) for i, entry in enumerate(chunk)]
        return chunk, slab, reads

    def _finish(self, chunk: list[Entry], slab: Slab, reads: list[_Read], search: _Search) -> None:
        began = time.perf_counter()
        good = [i for i, read in enumerate(reads) if read.error_kind is None and not read.reused]
        records: list[CheckpointRecord] = []
        if good:
            rows = slab.to_device(len(chunk))
            rows = rows if len(good) == len(chunk) else rows[good]
            outcome = self._measure(rows, search)
            seconds = (time.perf_counter() - began) / len(good)
            search.measured(len(good), seconds)
            for position, i in enumerate(good):
                records.append(self._record(reads[i], outcome[position], seconds))
        for read in reads:
            if read.reused and read.content is not None:
                self.writer.reuse(read.entry, read.content, self.config)
                self.reused += 1
            elif read.error_kind is not None:
                records.append(self._record(read, None, 0.0))
        self.writer.add(*records)
        self.failed += sum(record.figures is None for record in records)
        self.done += len(chunk)
        self.bytes += sum(read.nbytes or 0 for read in reads)
        if self.on_progress is not None:
            seconds = time.perf_counter() - self.started
            self.on_progress(
                Progress(
                    self.done,
                    self.failed,
                    self.reused,
                    search.total,
                    self.bytes,
                    seconds,
                    search.size,
                    chunk[-1].path,
                )
            )

    def _measure(self, rows: Tensor, search: _Search) -> list[Any]:
        """Return per row (figures, finite, accuracy), or the exception that it met."""
        found: list[Any] = []
        at = 0
        while at < len(rows):
            count = min(search.size, len(rows) - at)
            part = rows[at : at + count]
            try:
                stacked = count > 1 and search.can_stack
                if stacked:
                    self.auditor.prepare_stacks()
                measured = self.auditor.measure(part, stacked)
            except torch.OutOfMemoryError as error:
                _release(self.device)
                if count > 1:
                    search.shrink(count)
                    continue
                found.append(error)
            except Exception as error:  # a model's forward may raise anything
                if count > 1 and search.can_stack:
                    # A model that cannot be mapped over; or one bad row: alone they are told apart.
                    search.refuse(error)
                    continue
                if count > 1:
                    search.size = 1
                    continue
                found.append(error)
            else:
                found += zip(measured.figures, measured.finite, measured.accuracies, strict=True)
            at += count
        return found

    def _record(self, read: _Read, outcome: Any, seconds: float) -> CheckpointRecord:
        entry = read.entry
        kind, error, figures, accuracy = read.error_kind, read.error, None, None
        if isinstance(outcome, BaseException):
            kind, error = _kind(outcome), str(outcome)
        elif outcome is not None:
            figures, finite, accuracy = outcome
            if not finite:
                figures, accuracy = None, None
                kind, error = "non-finite weights", "some weights are NaN or infinite"
        if figures is not None:
            figures = replace(
                figures,
                headline_acc=accuracy if entry.accuracy is None else entry.accuracy,
                frozen_baseline_acc=entry.frozen_accuracy,
            )
        return CheckpointRecord(
            path=entry.path,
            run=entry.run,
            step=entry.step,
            config_hash=self.config,
            content_hash=read.content,
            figures=figures,
            error_kind=kind,
            error=error,
            fields=entry.fields,
            frozen_run=entry.frozen_run,
            measured_accuracy=accuracy,
            sample_shapes=None if figures is None else figures.shapes,
            bytes=read.nbytes,
            device=self.device_name,
            seconds=seconds,
        )


class _Search:
    """Find the stack size: grow while that is faster, shrink for want of memory."""

    def __init__(self, asked: int | Literal["auto"], most: int) -> None:
        if asked != "auto" and (not isinstance(asked, int) or asked < 1):
            raise ValueError(f"scan: stack: expected 'auto' or at least 1, got {asked!r}")
        self.automatic = asked == "auto"
        self.size = 1 if asked == "auto" else int(asked)
        self.most = max(1, min(most, _LARGEST_STACK)) if self.automatic else self.size
        self.can_stack = True
        self.reason = ""
        self.total = 0
        self._best: tuple[float, int] = (float("inf"), 1)
        self._settled = not self.automatic
        self._warm = False

    def measured(self, count: int, seconds_each: float) -> None:
        """Take note of what a full group of the present size cost per checkpoint."""
        if self._settled or count < self.size:
            return
        if seconds_each > 2 * self._best[0]:
            self.size, self._settled = self._best[1], True  # no second look at what is this slow
            return
        if not self._warm:
            self._warm = True  # the first group of a size pays for allocations and autotuning
            return
        if seconds_each * _WORTHWHILE < self._best[0]:
            self._best = (seconds_each, self.size)
            larger = min(self.size * _GROWTH, self.most)
            self._settled = larger == self.size
            self.size, self._warm = larger, False
        else:
            self.size, self._settled = self._best[1], True

    def shrink(self, count: int) -> None:
        """Halve the stack after an error for want of memory."""
        self.size = self.most = max(1, count // 2)
        self._settled = True

    def refuse(self, error: BaseException) -> None:
        """Give up stacking."""
        self.can_stack, self.reason = False, str(error).splitlines()[0] if str(error) else ""
        self.size, self._settled = 1, True


def _chunks(entries: Sequence[Entry], search: _Search, fewest: int) -> Iterator[list[Entry]]:
    """Cut the entries into groups that are read together: of a stack, and enough for all readers.

    The size is asked for anew for each group.
    """
    at = 0
    while at < len(entries):
        size = max(search.size, fewest)
        size -= size % search.size
        yield list(entries[at : at + size])
        at += size


def _kind(error: BaseException) -> str:
    """Return the word for an error that a row has."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PermissionError):
            return "permission"
        cause = cause.__cause__ or cause.__context__
    for kind, types in (
        ("missing", (MissingCheckpoint, FileNotFoundError)),
        ("unsafe", (UnsafeCheckpoint,)),
        ("no weights", (NoStateDict,)),
        ("wrong model", (StateDictMismatch,)),
        ("unreadable", (CheckpointError, OSError)),
        ("out of memory", (torch.OutOfMemoryError, MemoryError)),
    ):
        if isinstance(error, types):
            return kind
    return "error"


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def _free_host_bytes() -> int:
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
