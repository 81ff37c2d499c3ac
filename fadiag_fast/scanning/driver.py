"""Audit many checkpoints of one architecture: read ahead, stack, compute, record."""

from __future__ import annotations

import glob
import itertools
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import nn

from ..arguments import (
    check_count,
    check_fits_forward,
    check_how,
    check_module,
    check_thresholds,
    each_batch,
    named_failures,
)
from ..batches import check_batch, device_of, sample_counts, to_device
from ..capture import Loss, Output, untouched
from ..checkpoints.errors import CheckpointError
from ..checkpoints.folders import find_weights
from ..checkpoints.remote import expand_url, is_url, open_filesystem
from ..cuda_graphs import on_device
from ..process import prompt_switches
from ..protocol import DiagnosticThresholds, Protocol, check_protocol
from ..statistics import Reduction, SampleReduction
from ..taps import Select, unwrap
from .configuration import configuration
from .memory import free_host_bytes, lacks_memory
from .passes import Auditor, Pending, Way
from .reading import Group, Read, Reader, Refuse, Rows, kind_of
from .records import NON_FINITE_WEIGHTS, CheckpointRecord
from .results import ScanCounts, ScanResult
from .search import LARGEST_STACK, Search
from .series import Entry, read_manifest, series
from .store import ScanWriter, test_size_of
from .weights import Fit

# A reader reaches 1 to 2 GB/s of files in the page cache.
_MOST_WORKERS = 16
# Groups of checkpoints that are read before their turn comes, on a GPU: as many as sixteen readers
# finish while the first graphs are recorded.
_MOST_AHEAD = 15
# Of the memory that is free, what a stack may be expected to take.
_MEMORY_SHARE = 0.6
# Of files that are looked for in a folder that is given in place of a glob.
_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".pt2")


_T = TypeVar("_T")

# What a scan may be given: paths, URLs and globs, or entries.
Checkpoints: TypeAlias = str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | Sequence[Entry]


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


def scan(
    checkpoints: Checkpoints,
    model: nn.Module,
    eval_batches: Iterable[tuple[Any, Any]],
    out: str | os.PathLike[str],
    *,
    pattern: str | Sequence[str] | None = None,
    manifest: str | os.PathLike[str] | None = None,
    protocol: Protocol = "paper",
    thresholds: DiagnosticThresholds | None = None,
    loss: Loss | None = None,
    taps: Select | None = None,
    reduction: Reduction | SampleReduction = "flatten",
    output: Output | None = None,
    batch_dim: int = 0,
    stack: int | Literal["auto"] = "auto",
    workers: int | None = None,
    unsafe_pickle: bool = False,
    key: str | None = None,
    refuse: Refuse | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ScanResult:
    """Audit every checkpoint of a study and record what was found, as it is found.

    Args:
        checkpoints: paths, URLs, globs (``runs/**/*.pt``, ``s3://bucket/runs/*.pt``) or entries
            that already have run and step. A file that is named twice, once by an absolute path for
            example, counts once, by its first name.
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
        protocol: ``"paper"`` or ``"calibrated"``, see :func:`fadiag_fast.diagnose`. Rows that were
            judged by another are judged again, from their figures.
        thresholds: other limits than the published ones.
        loss, taps, reduction, output, batch_dim: see :func:`fadiag_fast.diagnose`.
        stack: checkpoints computed together; ``"auto"`` grows it while that is faster and memory
            allows. Figures differ between stack sizes by rounding only.
        workers: threads that read ahead; by default one a core, up to 16.
        unsafe_pickle: run code from files that need it to load.
        key: where in each file the weights are; see
            :func:`fadiag_fast.checkpoints.load_checkpoint`.
        refuse: given what stands beside a checkpoint's weights, as ``Checkpoint.extra``, says in a
            sentence why they are not of this model; None where they are. Weights of the same shapes
            may be of another network: more heads, another activation. Called by several threads.
        on_progress: called after every group of checkpoints.

    Returns:
        The folder's rows, of this scan and of earlier ones; they are read when first asked for. Its
        ``counts`` are of this scan.

    Raises:
        TapError: the model cannot be observed.
        ResultsError: the folder cannot be written, or another scan is at it.
        ValueError: there is nothing to scan, no glob matches, or no batch; an unknown
            protocol; no worker.

    Warns:
        UserWarning: of several paths and globs one glob matches nothing.

    What is wrong with one checkpoint stands in its row, with a kind of error as in
    :class:`~fadiag_fast.scanning.records.CheckpointRecord`, and stops nothing. After Ctrl-C, what
    is finished is on the disk.
    """
    check_module(model, "scan")
    given = each_batch(eval_batches, "scan")
    check_thresholds(thresholds, "scan")
    check_how(loss, batch_dim, "scan")
    check_protocol(protocol, "scan")
    check_count("workers", workers, "scan")
    entries = find_entries(checkpoints, pattern, manifest)
    model = unwrap(model)
    device = device_of(model)
    batches = []
    for index, batch in enumerate(given):
        x, y = check_batch(index, batch, batch_dim, "scan")
        check_fits_forward(index, model, x, "scan")
        if 0 not in sample_counts(x, batch_dim):
            batches.append(to_device((x, y), device))
    if not batches:
        raise ValueError("scan: expected at least one evaluation batch, got none")
    how = reduction if isinstance(reduction, SampleReduction) else SampleReduction(reduction)
    with (
        untouched(model),
        prompt_switches(),
        # Events, streams and graphs belong to the current device.
        on_device(device),
        ScanWriter(out, thresholds=thresholds, protocol=protocol) as writer,
    ):
        loss = None if loss is nn.functional.cross_entropy else loss
        options = {"select": taps, "loss": loss, "output": output, "batch_dim": batch_dim}
        with named_failures(model, "scan: evaluation batches"):
            auditor = Auditor(model, batches, options, how)
        where = [tap.where for tap in auditor.taps.points]
        config = writer.configure(
            configuration(
                model, batches, where, loss, how, output=output, batch_dim=batch_dim, key=key
            )
        )
        workers = workers or min(_MOST_WORKERS, os.cpu_count() or 1)
        reader = Reader(
            model, device, writer, config, unsafe_pickle, workers, key=key, refuse=refuse
        )
        try:
            most = _most(device, reader.row_bytes)
            search = Search(auditor, stack, most, len(entries))
            run = _Scan(auditor, reader, search, writer, config, len(entries), on_progress)
            on_gpu = device.type == "cuda"
            fewest = min(max(2 * workers, LARGEST_STACK if on_gpu else 0), most)
            # A GPU's own memory is large, and reading goes on while its graphs are recorded.
            ahead = max(1, min(_MOST_AHEAD, most // fewest - 1)) if on_gpu else 1
            run.run(entries, fewest, ahead)
        finally:
            reader.close()
    unmatched = [entry.path for entry in entries if not entry.matched]
    audited = run.done - run.reused - run.failed
    counts = ScanCounts(run.done, audited, run.reused, run.failed, unmatched, writer.rejudged)
    return ScanResult.of(out, counts)


def find_entries(
    checkpoints: Checkpoints,
    pattern: str | Sequence[str] | None = None,
    manifest: str | os.PathLike[str] | None = None,
) -> list[Entry]:
    """Return what is to be scanned, in order of run and step.

    Args, errors and warnings are those of :func:`scan`.
    """
    if manifest is not None:
        listed = read_manifest(manifest)
        if not checkpoints:
            return listed
    else:
        listed = []
    if isinstance(checkpoints, str | os.PathLike):
        checkpoints = [checkpoints]
    given: list[Any] = list(checkpoints)
    if given and all(isinstance(item, Entry) for item in given):
        found = _once(given, lambda entry: entry.path)
    else:
        matches = {item: _matches(item) for item in map(os.fspath, given)}
        found_paths = (path for matched in matches.values() for path in matched)
        # ./a.pt is a.pt, also for a later scan into the same folder.
        paths = [path if is_url(path) else str(Path(path)) for path in found_paths]
        empty = [item for item, matched in matches.items() if not matched]
        if empty and not paths:
            raise ValueError(f"scan: expected files that match {', '.join(empty)}, got none")
        for item in empty:
            warnings.warn(f"scan: {item}: no file matches", UserWarning, stacklevel=3)
        # Run names that do not depend on which files a glob happens to find.
        magic = [item for item in map(os.fspath, given) if glob.has_magic(item)]
        root = _root_of(magic[0]) if len(given) == len(magic) == 1 else None
        found = series(_once(paths, str), pattern, root=root)
    known = {_absolute(entry.path): entry for entry in listed}
    found = [known.pop(_absolute(entry.path), entry) for entry in found]
    if not found:
        raise ValueError("scan: expected at least one checkpoint, got none")
    return found


def _matches(item: str) -> list[str]:
    # A name with brackets is a name where there is such a file.
    if not glob.has_magic(item) or (not is_url(item) and os.path.lexists(item)):
        if not is_url(item) and os.path.isdir(item):
            _check_folder(item)
        return [item]
    return expand_url(item) if is_url(item) else sorted(glob.glob(item, recursive=True))


def _check_folder(folder: str) -> None:
    """Raise ValueError for a folder that is no checkpoint itself and holds some."""
    try:
        find_weights(Path(folder))
    except CheckpointError as error:
        for pattern in (f"*{suffix}" for suffix in _SUFFIXES):
            for depth in (pattern, f"**/{pattern}"):
                if next(Path(folder).glob(depth), None) is not None:
                    raise ValueError(
                        f"scan: {folder}: expected a checkpoint or a glob, got a folder that holds "
                        f"checkpoints; give '{os.path.join(folder, depth)}'"
                    ) from error


def _once(items: Iterable[_T], path_of: Callable[[_T], str]) -> list[_T]:
    """Return what names different files: of several names of one, the first."""
    places: dict[str, _T] = {}
    for item in items:
        places.setdefault(_absolute(path_of(item)), item)
    return list(places.values())


def _absolute(path: str) -> str:
    return path if is_url(path) else os.path.abspath(path)


def _root_of(pattern: str) -> str:
    """Return the folder that the runs of a glob are named from."""
    folder, name = os.path.split(pattern)
    if is_url(pattern) or not glob.has_magic(name) or glob.has_magic(folder):
        return _fixed_part(pattern)
    # One folder of checkpoints is a run: it has its name from the folder above.
    return os.path.dirname(folder or os.getcwd())


def _fixed_part(pattern: str) -> str:
    """Return the folder above a glob's first wildcard."""
    if is_url(pattern):
        plain = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.split("/"))
        filesystem, path = open_filesystem("/".join(plain))
        return str(filesystem.unstrip_protocol(path))  # as the matches are written
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return str(Path(*parts[:fixed])) if fixed else ""


class _Scan:
    """One scan under way."""

    def __init__(
        self,
        auditor: Auditor,
        reader: Reader,
        search: Search,
        writer: ScanWriter,
        config: str,
        total: int,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.auditor, self.reader, self.search = auditor, reader, search
        self.writer, self.config, self.total = writer, config, total
        self.on_progress = on_progress
        self.started = time.perf_counter()
        self.done = self.failed = self.reused = self.bytes = 0
        cuda = auditor.device.type == "cuda"
        self.device_name = torch.cuda.get_device_name(auditor.device) if cuda else "cpu"

    def run(self, entries: Sequence[Entry], fewest: int, ahead: int) -> None:
        """Read groups ahead while one is computed and others are written down.

        Args:
            fewest: checkpoints of a group at least, so that all readers are at work.
            ahead: groups that are read while one is computed, and that may wait to be written down.
        """
        at = 0
        groups: deque[Group] = deque()

        def begin() -> None:
            nonlocal at
            stack = self.search.way.stack
            chunk = entries[at : at + -(-fewest // stack) * stack]
            at += len(chunk)
            if chunk:
                groups.append(self.reader.begin(chunk))

        refused = False

        def record(launched: _Launched) -> Progress | None:
            nonlocal refused
            if refused:  # what waited behind it; the scan is about to end
                return None
            try:
                return self._finish(launched)
            except BaseException:
                refused = True
                raise

        # One thread, so that rows are written in order; what the disk refuses is raised here.
        with ThreadPoolExecutor(1, thread_name_prefix="fadiag-record") as recorder:
            computed: _Launched | None = None
            recorded: deque[Future[Progress | None]] = deque()

            def tell(most: int) -> None:
                """Tell what is written down; wait until at most so many groups are not."""
                while recorded and (len(recorded) > most or recorded[0].done()):
                    self._tell(recorded.popleft().result())

            def finish(launched: _Launched) -> None:
                launched.wait()
                self.reader.done_with(launched.group)
                begin()
                # Figures are small. Still, memory stays bounded: as many groups wait to be written
                # down as are read ahead, so that who computes rarely waits for who writes.
                tell(ahead - 1)
                recorded.append(recorder.submit(record, launched.without_rows()))

            for _ in range(ahead):
                begin()
            while groups:
                try:
                    launched = self._launch(groups.popleft())
                except KeyboardInterrupt:
                    if computed is not None:  # the group before the one that was stopped is whole
                        computed.wait()
                        recorder.submit(record, computed.without_rows()).result()
                    raise
                if computed is not None:
                    finish(computed)
                else:
                    begin()
                computed = launched
            if computed is not None:
                finish(computed)
            tell(0)

    def _tell(self, progress: Progress | None) -> None:
        if progress is not None and self.on_progress is not None:
            self.on_progress(progress)

    def _launch(self, group: Group) -> _Launched:
        """Begin to compute a group, stack by stack, as they are read."""
        launched = _Launched(group)
        waiting: dict[int, tuple[Fit, list[int]]] = {}

        def measure(fit: Fit, indices: list[int], at_least: int) -> None:
            while len(indices) >= max(1, at_least):
                part = indices[: self.search.way.stack]
                if self._measure(group.rows, fit, part, launched):
                    del indices[: len(part)]

        for i, read in enumerate(group.reads()):
            launched.reads.append(read)
            if read.fit is not None:
                fit, indices = waiting.setdefault(id(read.fit), (read.fit, []))
                indices.append(i)
                measure(fit, indices, self.search.way.stack)
        for fit, indices in waiting.values():
            measure(fit, indices, 1)
        return launched

    def _measure(self, rows: Rows, fit: Fit, part: list[int], launched: _Launched) -> bool:
        """Begin to compute a stack; return whether it is dealt with, or must be tried again."""
        way = self.search.way
        try:
            launched.parts.append((part, self.search.measure(rows.of(fit, part), fit)))
        except Exception as error:  # a model's forward may raise anything
            if lacks_memory(error) and (len(part) > 1 or way != Way()):
                self.search.shrink(len(part))
                return False
            if way.stack > 1:
                # A model that cannot be mapped over; or one bad row: alone they are told apart.
                self.search.refuse()
                return False
            launched.failed[part[0]] = error
        return True

    def _finish(self, launched: _Launched) -> Progress:
        """Write down what was computed, and say how far the scan is."""
        outcomes: dict[int, Any] = dict(launched.failed)
        for part, pending in launched.parts:
            measured = pending.result()
            for index, i in enumerate(part):
                outcomes[i] = (measured, index)
        records = []
        for i, read in enumerate(launched.reads):
            if read.reused and read.content is not None:
                self.writer.reuse(read.entry, read.content, self.config)
                self.reused += 1
            else:
                records.append(self._record(read, outcomes.get(i), launched.seconds_each))
        self.writer.add(*records)
        self.failed += sum(record.figures is None for record in records)
        self.done += len(launched.reads)
        self.bytes += sum(read.nbytes or 0 for read in launched.reads)
        return Progress(
            self.done,
            self.failed,
            self.reused,
            self.total,
            self.bytes,
            time.perf_counter() - self.started,
            self.search.way.stack,
            launched.reads[-1].entry.path,
        )

    def _record(self, read: Read, outcome: Any, seconds: float) -> CheckpointRecord:
        entry = read.entry
        kind, error, figures, accuracy = read.error_kind, read.error, None, None
        if isinstance(outcome, BaseException):
            kind, error = kind_of(outcome), str(outcome) or repr(outcome)
        elif outcome is not None:
            measured, index = outcome
            if measured.finite[index]:
                accuracy = measured.accuracies[index]
                figures = measured.figures(
                    index,
                    headline_acc=accuracy if entry.accuracy is None else entry.accuracy,
                    frozen_baseline_acc=entry.frozen_accuracy,
                    test_size=test_size_of(entry, accuracy, measured.num_samples),
                    frozen_test_size=entry.frozen_test_size,
                )
            else:
                kind, error = NON_FINITE_WEIGHTS, "some weights are NaN or infinite"
        return CheckpointRecord(
            path=entry.path,
            run=entry.run,
            step=entry.step,
            config_hash=self.config,
            content_hash=read.content,
            container=read.container,
            remarks=read.notes,
            figures=figures,
            error_kind=kind,
            error=error,
            fields=entry.fields,
            frozen_run=entry.frozen_run,
            measured_accuracy=accuracy,
            sample_shapes=None if figures is None else figures.shapes,
            bytes=read.nbytes,
            device=self.device_name,
            seconds=seconds if figures is not None else 0.0,
        )


class _Launched:
    """A group whose figures are being computed."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.reads: list[Read] = []
        self.parts: list[tuple[list[int], Pending]] = []
        self.failed: dict[int, BaseException] = {}
        self.seconds_each = 0.0
        self._began = time.perf_counter()

    def wait(self) -> None:
        """Wait until the figures are there, and the rows may be written to."""
        for _, pending in self.parts:
            pending.wait()
        count = sum(len(part) for part, _ in self.parts)
        self.seconds_each = (time.perf_counter() - self._began) / max(1, count)

    def without_rows(self) -> _Launched:
        """Return the outcome: rows that are too small for later groups need not wait with it."""
        del self.group
        return self


def _most(device: torch.device, row_bytes: int) -> int:
    """Return how many checkpoints' weights fit, beside a group that is read and a graph's own."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()
    # Activations are not known yet; an error for want of memory shrinks the stack.
    return max(1, int(_MEMORY_SHARE * free / (4 * row_bytes)))
