"""Find, while a scan runs, how its checkpoints and batches best share forward passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .auditor import Auditor, PendingFigures, seconds_of
from .batching import BatchingPlan
from .weight_layout import Fit

# Stacks grow by this, for each takes a trial, and on a GPU a graph; one must pay to be kept. On an
# H100 a ResidualMLP (d=256, L=4, 1,280 samples) takes 1.4 ms alone, 0.38 in a stack of 8, 0.20 in
# one of 64 and 0.18 in one of 256, where reading it takes longer.
_GROWTH = {"cpu": 8, "cuda": 64}
_WORTHWHILE = 1.10
LARGEST_STACK = 64
# On a CPU a first run pays for little: one that takes this many seconds is not repeated, and one
# that is this much slower than the best neither.
_LONG = 0.5
_HOPELESS = 2.0
# A checkpoint that takes this many seconds alone gains nothing from company: on a CPU a stack saves
# the interpreter's time, some milliseconds, and a GPU is filled by one that takes that long.
_LONG_ALONE = {"cpu": 0.02, "cuda": 0.003}
# Trials take the time of some ten checkpoints.
_FEWEST_FOR_TRIALS = 16


class Search:
    """Measure stacks of checkpoints, and go over to another way where that is faster.

    Ways of sharing passes between batches are tried on the first checkpoint, then stacks on the
    groups that come. What a trial measures counts: no checkpoint is measured for a trial alone.

    Args:
        auditor: measures.
        stack: checkpoints side by side, or ``"auto"``.
        most: how many memory may be expected to hold.
        total: checkpoints of the scan.
    """

    def __init__(
        self, auditor: Auditor, stack: int | Literal["auto"], most: int, total: int
    ) -> None:
        if stack != "auto" and (not isinstance(stack, int) or stack < 1):
            raise ValueError(f"scan: stack: expected 'auto' or at least 1, got {stack!r}")
        self._auditor = auditor
        self._on_cpu = auditor.device.type == "cpu"
        self._growth = _GROWTH["cpu" if self._on_cpu else "cuda"]
        self._growing = stack == "auto"
        self.way = BatchingPlan(stack=1 if stack == "auto" else stack)
        self.most = self.way.stack
        if self._growing:
            # A stack of a fourth of all leaves something to gain after it was tried.
            self.most = max(1, min(most, LARGEST_STACK, total // 4))
        self._tried = total < _FEWEST_FOR_TRIALS
        self._growing = self._growing and not self._tried and self.most > 1
        self._best: tuple[float, BatchingPlan] = (float("inf"), self.way)

    def measure(self, rows: Tensor, fit: Fit) -> PendingFigures:
        """Compute the figures of at most ``way.stack`` checkpoints.

        Raises what the model raises.
        """
        if not self._tried:
            found = self._try_ways(rows[:1], fit)
            if found is not None and len(rows) == 1:
                return found
        if self._growing and len(rows) == self.way.stack > 1:
            return self._grow(rows, fit)
        return self._auditor.measure(rows, fit, self.way)

    def _try_ways(self, row: Tensor, fit: Fit) -> PendingFigures | None:
        """Choose how batches share passes; return the figures of the quickest way."""
        candidates = self._auditor.candidates()
        seconds = float("inf")
        if candidates and not self._on_cpu:
            # There to compare figures with: a GPU wants more at once, and its graph would take as
            # long to record as a hundred small checkpoints take to measure.
            reference = self._auditor.measure(row, fit, BatchingPlan(), graph=False)
        else:
            reference, seconds = self._timed(row, fit, BatchingPlan())
        if not reference.result().finite[0]:
            return None  # says nothing; the next one may
        self._tried = True
        best = (seconds, BatchingPlan(), reference)

        def attempt(way: BatchingPlan) -> bool:
            nonlocal best
            try:
                found, seconds = self._timed(row, fit, way, best[0])
            except Exception:  # a trial: what fails is not taken
                _release(self._auditor)
                return False
            if seconds < best[0] and self._auditor.alike(found.columns, reference.columns):
                best = (seconds, way, found)
                return True
            return False

        # Larger passes are not tried where smaller ones are quicker.
        any(attempt(way) for way in candidates)
        if best[0] == float("inf"):
            reference, seconds = self._timed(row, fit, BatchingPlan())
            best = (seconds, BatchingPlan(), reference)
        other = self._auditor.with_other_layout(best[1])
        if other is not None:
            attempt(other)
        self._best = best[:2]
        if best[0] > _LONG_ALONE.get(self._auditor.device.type, 0.0):
            self._growing = False
        stack = min(self._growth, self.most) if self._growing else self.way.stack
        self.way = replace(best[1], stack=stack)
        return best[2]

    def _grow(self, rows: Tensor, fit: Fit) -> PendingFigures:
        """Measure a stack and decide whether the next is larger."""
        pending, seconds = self._timed(rows, fit, self.way, self._best[0])
        if seconds * _WORTHWHILE <= self._best[0]:
            self._best = (seconds, self.way)
            larger = min(self.way.stack * self._growth, self.most)
            self._growing = larger > self.way.stack
            self.way = replace(self.way, stack=larger)
        else:
            self.way, self._growing = self._best[1], False
        return pending

    def _timed(
        self, rows: Tensor, fit: Fit, way: BatchingPlan, best: float = float("inf")
    ) -> tuple[PendingFigures, float]:
        """Return figures and seconds per checkpoint of the second run, or of a hopeless first."""

        def run() -> PendingFigures:
            return self._auditor.measure(rows, fit, way)

        pending, seconds = seconds_of(run, self._auditor.device)
        # A GPU's first run records a graph, which says nothing of the second.
        if not self._on_cpu or seconds < min(_LONG, _HOPELESS * best * len(rows)):
            pending, seconds = seconds_of(run, self._auditor.device)
        return pending, seconds / len(rows)

    def shrink(self, count: int) -> None:
        """Halve the stack after an error for want of memory."""
        _release(self._auditor)
        if count == 1:  # even one: batches go through alone
            self.way = BatchingPlan()
        else:
            self.way = replace(self.way, stack=max(1, count // 2))
        self.most = self.way.stack
        self._growing = False

    def refuse(self) -> None:
        """Give up stacking: checkpoints take turns."""
        self.way = replace(self.way, stack=1)
        self._growing = False


def _release(auditor: Auditor) -> None:
    auditor.forget_graphs()
    if auditor.device.type == "cuda":
        torch.cuda.empty_cache()
