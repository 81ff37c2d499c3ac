"""Read ahead, measure, and hand results on while the device computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from .auditor import Auditor, PendingFigures
from .autotuner import Search
from .batching import BatchingPlan
from .memory import free_host_bytes, lacks_memory
from .prefetch import Group, Read, Reader, Rows, kind_of
from .records import NON_FINITE_WEIGHTS, CheckpointRecord
from .run_names import Entry
from .weight_layout import Fit
from .writer import ScanWriter, test_size_of

# Groups of checkpoints that are read before their turn comes, on a GPU: as many as sixteen readers
# finish while the first graphs are recorded.
MOST_AHEAD = 15


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


class Pipeline:
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
            if lacks_memory(error) and (len(part) > 1 or way != BatchingPlan()):
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
        self.parts: list[tuple[list[int], PendingFigures]] = []
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


def most_rows(device: torch.device, row_bytes: int) -> int:
    """Return how many checkpoints' weights fit, beside a group that is read and a graph's own."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()
    # Activations are not known yet; an error for want of memory shrinks the stack.
    return max(1, int(_MEMORY_SHARE * free / (4 * row_bytes)))
