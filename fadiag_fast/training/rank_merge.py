"""Merge a step over ranks: whether there are others, what each sends, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .exchange import Exchange, PendingMerge, Share, all_present, default_group, fingerprint
from .figures import StepFigures
from .options import ProbeOptions
from .rows import RowMeta
from .scaling import ScalerState, overflowed
from .schedule import Budget, Schedule
from .tensor_parallel import TensorRanks

# Seconds that a rank waits in its first step for the others'. Ranks whose backward passes wait for
# each other's are close together there.
_SYNCHRONOUS_PATIENCE, _PATIENCE = 2.0, 10.0


class MergedStep(NamedTuple):
    """A step whose figures are over all ranks."""

    figures: StepFigures
    meta: RowMeta
    scaling: ScalerState | None


class RankMerge:
    """The steps of one probe, merged with those of the other ranks of its group.

    Args:
        model: the probed one.
        synchronous: whether its backward pass waits for the other ranks', as under
            DistributedDataParallel.
        options: of the probe.
        schedule: by which all ranks must record the same steps.
        share: is told whether this rank leads.
    """

    def __init__(
        self,
        model: nn.Module,
        synchronous: bool,
        options: ProbeOptions,
        schedule: Schedule,
        share: Share,
    ) -> None:
        self._model = model
        self._patience = _SYNCHRONOUS_PATIENCE if synchronous else _PATIENCE
        self._options = options
        self._schedule = schedule
        self._share = share
        self._is_alone: bool | None = None  # whether other ranks of the group record nothing
        self._exchange: Exchange | None = None
        self._pending: tuple[PendingMerge, RowMeta, ScalerState | None] | None = None

    def group(self, tensor_ranks: TensorRanks | None) -> Any:
        """Return the process group to merge over; None where there is nothing to merge.

        Raises:
            ValueError: the group does not hold all parts of a copy of the model.
            RuntimeError: a rank that holds a part has no probe.
        """
        found = default_group(self._options.group)
        if found is not None and not self._is_there(found, tensor_ranks):
            return None
        if found is not None or tensor_ranks is None:
            return found
        if len(tensor_ranks.groups) > 1:
            raise ValueError(
                "StepProbe: group: expected a process group around a mesh of tensor parallelism "
                "with several dimensions, got False; give one of a copy's ranks"
            )
        return tensor_ranks.groups[0]

    def _is_there(self, group: Any, tensor_ranks: TensorRanks | None) -> bool:
        """Return, decided once, whether every rank of the group records its steps."""
        if self._is_alone is None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the host may be far ahead of the other ranks' hosts
            self._is_alone = not all_present(group, self._patience)
            if self._is_alone and tensor_ranks is not None:
                raise RuntimeError(
                    "StepProbe: expected a probe on every rank that holds a part of the model; "
                    "build it on all of them"
                )
        return not self._is_alone

    def start(
        self,
        group: Any,
        figures: StepFigures,
        meta: RowMeta,
        scaling: ScalerState | None,
        labels: Sequence[str],
        tensor_ranks: TensorRanks | None,
    ) -> None:
        """Begin to merge a step; the one before must have been settled."""
        exchange = self._exchange
        if exchange is None:
            exchange = self._exchange = self._begin(group, labels, tensor_ranks)
        # The mean of no samples is NaN, and their sum zero.
        empty = figures.samples == 0
        sums = [
            mean if mean is None else torch.zeros_like(mean) if empty else mean * figures.weight
            for mean in figures.means
        ]
        rows = torch.cat([figures.norms.flatten(0, 1), figures.root_mean_squares()])
        self._pending = (exchange.start(rows, sums), meta, scaling)
        self._share.leads = exchange.leads

    def _begin(
        self, group: Any, labels: Sequence[str], tensor_ranks: TensorRanks | None
    ) -> Exchange:
        if isinstance(self._schedule, Budget):
            raise ValueError(
                "StepProbe: schedule: expected one by which all ranks record the same steps, got a "
                "share of each rank's own time; give a number, 'every' or 'log'"
            )
        # Every rank must decide alike: by the parameters, not by what a step happened to see.
        wide = any(p.dtype == torch.float64 for p in self._model.parameters())
        # A group that the user names shares a batch, whatever weights its ranks hold.
        compared = self._options.group is None and tensor_ranks is None
        return Exchange(
            group,
            self._options.max_samples,
            wide,
            tensor_ranks,
            tuple(labels),
            fingerprint(self._model.parameters()) if compared else None,
        )

    def settle(self) -> MergedStep | None:
        """Return the step whose collective is under way, merged; None if there is none."""
        if self._pending is None:
            return None
        assert self._exchange is not None
        (pending, meta, scaling), self._pending = self._pending, None
        found = pending.wait()
        samples = found.counts.double().sum()
        norms, rms = _of_rows(found.samples)
        # The optimiser sees the average of the copies' gradients, each of its own samples only.
        norms[1].div_(len(found.counts))
        means: list[Tensor | None] = [
            None if s is None else s / samples.to(s.dtype) for s in found.directions
        ]
        figures = StepFigures(norms, means, set(meta.missing), None, samples, rms=rms)
        if scaling is not None:
            scaling.overflowed(overflowed(figures))
        meta = meta._replace(samples=None, world_size=self._exchange.world)
        return MergedStep(figures, meta, scaling)


def _of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Take apart what each rank sent: norms of n + 1 states and gradients, n root mean squares.

    Ranks pad their batches to lengths of their own, so that these are sent as well.
    """
    states = (len(rows) + 1) // 3
    return rows[: 2 * states].view(2, states, -1), rows[2 * states :]
