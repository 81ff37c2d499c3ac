"""A step's row of figures: written on the device, read on the host as a record."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from operator import truediv
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .._common.row_layout import RowLayout
from ..capture.points import Taps
from .directions import Directions
from .figures import StepFigures, root_of
from .options import ProbeOptions
from .records import StepRecord
from .ring import Ring
from .scaling import ScalerState


class RowMeta(NamedTuple):
    """What the host knows of a row on its way.

    Attributes:
        sizes: features of each state; empty where the row has the root mean squares.
        reference: what credit gains are relative to.
        samples: of the step; None where the row has their number.
        missing: indices of states of which something did not arrive.
        scaled: whether the row has what a gradient scaler did.
    """

    step: int
    sizes: tuple[int, ...]
    reference: str
    samples: int | None
    micro_batches: int
    autocast: str | None
    missing: tuple[int, ...]
    scaled: bool
    world_size: int = 1


@functools.lru_cache
def row_layout(
    states: int,
    cosines: int,
    scaled: bool = True,
    measured: bool = True,
    counted: bool = True,
) -> RowLayout:
    """Return the columns of a step's row; the widest one without the last three arguments.

    The medians and the cosines are what :func:`fadiag_fast.ops.step_row` computes, in its order;
    behind them come its extras.

    Args:
        states: n.
        cosines: of all directions that are kept.
        scaled: whether a gradient scaler is in use.
        measured: whether the host does not know the features of a state, so that the row has the
            root mean squares.
        counted: whether only the device knows the number of samples.
    """
    return RowLayout(
        {
            "hidden_norms": states,
            "hidden_norm_of_output": 1,  # has no meaning
            "grad_norms": states,
            "output_grad_norm": 1,
            "credit_gains": states,
            "cosines": cosines,
            "scaling": 2 if scaled else 0,
            "rms_norms": states if measured else 0,
            "num_samples": 1 if counted else 0,
        }
    )


@functools.lru_cache
def _roots(sizes: tuple[int, ...]) -> tuple[float, ...]:
    """Return what turns norms of so many features into root mean squares; NaN where unknown."""
    return tuple(map(root_of, sizes))


class StepRows:
    """The rows of one choice of taps: their ring, and the directions that cosines are taken of.

    Args:
        taps: what is observed.
        direction_layers: indices of the states whose directions are kept.
        options: of the probe.
        without_error: is called when a row has no output error.

    Attributes:
        labels: of the states.
        directions: None where none are kept.
        ring: None before the first row.
    """

    def __init__(
        self,
        taps: Taps,
        direction_layers: tuple[int, ...],
        options: ProbeOptions,
        without_error: Callable[[], None],
    ) -> None:
        self._chain_starts = taps.chain_starts
        self.labels = taps.labels
        self._observed = taps.observed
        self._layers = direction_layers
        self._options = options
        self._without_error = without_error
        chosen = options.directions
        self.directions = (
            Directions(len(direction_layers), chosen.window, chosen.sketch)
            if direction_layers
            else None
        )
        self._cosines = len(direction_layers) * (chosen.window + 1)
        self.ring: Ring | None = None

    # ---- on the device

    def open(self, device: torch.device) -> list[StepRecord]:
        """Make a ring on a device unless there is one; return what was under way in another."""
        if self.ring is not None and self.ring.device == device:
            return []
        left = self.drain()
        # A row that waits for what the scaler did needs a place beside the next one's.
        rows = self._options.ring if self._options.scaler is None else max(2, self._options.ring)
        self.ring = Ring(rows, row_layout(len(self.labels), self._cosines).width, device)
        return left

    def opened(self) -> Ring:
        """Return the ring, which is there once a step was recorded."""
        assert self.ring is not None
        return self.ring

    def write(
        self, figures: StepFigures, scaling: ScalerState | None, captured: bool = False
    ) -> None:
        """Write all figures of a step into the ring, in the order of :func:`row_layout`."""
        ring, norms, kept = self.opened(), figures.norms, self.directions
        directions = None if kept is None else kept.take(figures.means, captured)
        extras: list[Tensor] = []
        if kept is not None and directions is None:
            extras.append(norms.new_full((self._cosines,), torch.nan))
        if scaling is not None:
            extras.append(scaling.figures())
        if figures.rms is not None:
            extras.append(torch.nanmedian(figures.rms, 1).values)
        if figures.samples is None and figures.count is not None:
            extras.append(figures.count.reshape(1).double())
        ops.step_row(
            norms.contiguous(),
            directions or (),
            kept.kept if kept is not None and directions else (),
            ring.device_rows,
            ring.places,
            decay=self._options.directions.decay,
            extras=extras,
        )

    def rewrite_scaling(self, scaling: ScalerState) -> None:
        """Write into the newest row what the scaler has done since."""
        place = row_layout(len(self.labels), self._cosines)["scaling"]
        self.opened().newest()[place] = scaling.figures()

    def memory(self) -> tuple[Tensor, ...]:
        """Return what a CUDA graph of a step writes to."""
        ring = self.opened()
        return ring.device_rows, ring.places, *(self.directions.kept if self.directions else ())

    # ---- on the host

    def send(self, meta: RowMeta | None, at_once: bool = True) -> list[StepRecord]:
        """Send off the row that was written last; return as :meth:`.Ring.written` does."""
        return self._records(self.opened().written(meta, at_once))

    def ready(self) -> list[StepRecord]:
        """Return the records that have arrived, without waiting."""
        return [] if self.ring is None else self._records(self.ring.ready())

    def drain(self) -> list[StepRecord]:
        """Wait for all rows under way and return their records."""
        return [] if self.ring is None else self._records(self.ring.drain())

    def _records(self, rows: Sequence[tuple[RowMeta, list[float]]]) -> list[StepRecord]:
        return [self._record(meta, row) for meta, row in rows]

    def _record(self, meta: RowMeta, row: list[float]) -> StepRecord:
        # Hot path: every step passes here, on the training's thread.
        labels = self.labels
        n = len(labels)
        at = row_layout(n, self._cosines, meta.scaled, not meta.sizes, meta.samples is None)
        hidden, grad = row[at["hidden_norms"]], row[at["grad_norms"]]
        (error,) = row[at["output_grad_norm"]]
        if error != error:  # NaN
            self._without_error()
        stabilities, averages, num_directions = self._cosines_of(row[at["cosines"]])
        scale, skipped = 1.0, False
        if meta.scaled:
            scale, skip = row[at["scaling"]]
            skipped = skip != 0
            grad = [norm / scale for norm in grad]
        if meta.sizes:
            rms = tuple(map(truediv, hidden, _roots(meta.sizes)))
        else:
            rms = tuple(row[at["rms_norms"]])
        samples = meta.samples
        if samples is None:
            samples = int(*row[at["num_samples"]])
        return StepRecord.of(
            step=meta.step,
            layers=labels,
            hidden_norms=tuple(hidden),
            rms_norms=rms,
            grad_norms=tuple(grad),
            credit_gains=tuple(row[at["credit_gains"]]),
            output_grad_norm=error / scale,
            stabilities=tuple(stabilities),
            average_cosines=tuple(averages),
            num_directions=num_directions,
            num_samples=samples,
            micro_batches=meta.micro_batches,
            skipped=skipped,
            loss_scale=scale,
            autocast=meta.autocast,
            unreached=tuple([labels[l] for l in meta.missing]) if meta.missing else (),
            loss_reduction=self._options.loss_reduction,
            world_size=meta.world_size,
            chain_starts=self._chain_starts,
            gain_reference=meta.reference,
            observed=self._observed,
        )

    def _cosines_of(self, cosines: list[float]) -> tuple[list[float], list[float], int]:
        """Return per state the mean cosine and that with the average, and how many there are."""
        n, window = len(self.labels), self._options.directions.window
        stabilities, averages = [math.nan] * n, [math.nan] * n
        num_directions = 0
        for place, layer in enumerate(self._layers):
            *known, average = cosines[place * (window + 1) : (place + 1) * (window + 1)]
            averages[layer] = average
            total = math.fsum(known)
            if math.isnan(total):
                known = [cosine for cosine in known if not math.isnan(cosine)]
                total = math.fsum(known)
            num_directions = max(num_directions, len(known))
            if known:
                stabilities[layer] = total / len(known)
        return stabilities, averages, num_directions
