"""From the micro-batches of a step to its record: reduce, merge, write a row, read it later."""

from __future__ import annotations

import math
from typing import Any

from ..capture.points import Taps
from ..protocol import OUTPUT
from .delivery import Delivery
from .figures import StepFigures, merged
from .forward_pass import Settings
from .graphed import GraphedReduction
from .installation import Installation
from .observer import NOT_COMPILED, CompiledFlaws
from .options import ProbeOptions
from .rank_merge import RankMerge
from .rows import RowMeta, StepRows
from .scaling import ScalerState, scaler_state


class StepRecorder:
    """What becomes of the micro-batches when a step ends.

    Args:
        options: of the probe.
        merge: of the steps of all ranks.
        delivery: where records go.
        installation: whose observer has the micro-batches.
    """

    def __init__(
        self,
        options: ProbeOptions,
        merge: RankMerge,
        delivery: Delivery,
        installation: Installation,
    ) -> None:
        self._options = options
        self._merge = merge
        self._delivery = delivery
        self._installation = installation
        self._observer = installation.observer
        self._flaws = CompiledFlaws(self._observer, installation.warn_without_output)
        self._rows: StepRows | None = None  # until the taps are known
        self._graphed: GraphedReduction | None = None
        self._unresolved: ScalerState | None = None
        self._held: tuple[RowMeta, ScalerState] | None = None
        self._captured: RowMeta | None = None  # of a step within the training's own CUDA graph
        # What graphs write to, for as long as the probe lives: they outlive a change of shapes.
        self._graph_memory: list[Any] = []

    # ---- the taps

    def installed(self, taps: Taps, settings: Settings) -> None:
        """Begin the rows of a choice of taps."""
        layers = settings.direction_layers
        self._rows = StepRows(taps, layers, self._options, self._flaws.tell)
        self._graphed = GraphedReduction(self._rows, layers)

    def may_change_taps(self) -> bool:
        """Return whether the taps can be chosen again: not by one rank alone, nor in a graph."""
        return self._is_alone() and self._captured is None

    def finish_rows(self) -> None:
        """Hand out all records under way, before the taps are chosen again."""
        self.resolve()
        self.drain()

    def _is_alone(self) -> bool:
        return self._group() is None

    def _group(self) -> Any:
        return self._merge.group(self._installation.tensor_ranks)

    # ---- a step

    def take_parts(self) -> list[StepFigures]:
        """Return the micro-batches since the last step.

        Raises:
            RuntimeError: compiled ones cannot be shown as they are.
        """
        self._observer.reduce_finished()
        parts, compiled = self._observer.take_parts()
        if compiled and self._installation.tensor_ranks is not None:
            raise RuntimeError(NOT_COMPILED)
        self._flaws.count(compiled)
        return parts

    def reduce_by_graph(self, step: int) -> bool:
        """Record the step at hand through a CUDA graph of its reduction, if one will do.

        One micro-batch whose states were all kept, with the same shapes as those before it, in a
        process of its own and without a scaler.
        """
        observer, rows, graphed = self._observer, self._rows, self._graphed
        if rows is None or rows.ring is None or not rows.ring.on_gpu or graphed is None:
            return False
        observation = None if self._options.scaler is not None else observer.only_observation()
        tensors = None if observation is None else observation.whole()
        if observation is None or tensors is None or not tensors[0].is_cuda:
            return False
        shapes = graphed.reduce(tensors, self._is_alone)
        if shapes is None:
            return False
        observer.take_over(observation.of)
        observer.observations = []
        observer.backward_of = None
        observation.forget()
        sizes = tuple([math.prod(shape[1:]) for shape, _ in shapes[: len(shapes) // 2]])
        samples, autocast = tensors[-1].shape[0], observation.of.autocast
        meta = RowMeta(step, sizes, OUTPUT, samples, 1, autocast, (), False)
        self._delivery.hand_out(rows.send(meta))
        return True

    def record(self, parts: list[StepFigures], step: int) -> None:
        """Write the row of a step; with other ranks, when theirs have come."""
        figures = merged(parts)
        rows, installation, device = self._rows, self._installation, figures.norms.device
        assert rows is not None
        assert self._graphed is not None
        if rows.ring is None or rows.ring.device != device:
            self._graphed.forget()
            self._delivery.hand_out(rows.open(device))
        installation.look_for_replaced(figures, step)
        self._delivery.share.look()
        group = self._group()
        meta = self._meta(figures, step, group is not None)
        scaling = scaler_state(self._options.scaler, figures)
        if group is None:
            rows.write(figures, scaling)
            if scaling is None:
                self._delivery.hand_out(rows.send(meta))
            else:
                self._held, self._unresolved = (meta, scaling), scaling
            return
        self.settle()
        self._unresolved = scaling
        ranks = installation.tensor_ranks
        self._merge.start(group, figures, meta, scaling, rows.labels, ranks)

    def record_replay(self, step: int | None) -> bool:
        """Take note of a replay of the training's own graph, with None for a step nobody wants.

        Returns:
            Whether a step was ever captured into such a graph.
        """
        if self._captured is None:
            return False
        assert self._rows is not None
        meta = None if step is None else self._captured._replace(step=step)
        self._delivery.hand_out(self._rows.send(meta, at_once=False))
        return True

    def capture(self, parts: list[StepFigures]) -> None:
        """Record a step into a CUDA graph; each replay then leaves a row in the device's ring."""
        figures, rows = merged(parts), self._rows
        if rows is None or rows.ring is None or rows.ring.device != figures.norms.device:
            raise RuntimeError(
                "StepProbe: expected at least one step outside of the CUDA graph first; run one "
                "before capturing"
            )
        if not self._is_alone():
            raise RuntimeError(
                "StepProbe: expected a single process inside of a CUDA graph, got a process group; "
                "give group=False to observe each rank's own samples"
            )
        meta = self._meta(figures, -1)
        rows.write(figures, scaler_state(self._options.scaler, figures), captured=True)
        self._graph_memory.append(rows.memory())
        self._captured = meta

    def _meta(self, figures: StepFigures, step: int, exchanged: bool = False) -> RowMeta:
        reference = OUTPUT
        if not figures.has_error:
            assert self._rows is not None
            reference = self._rows.labels[-1]
            figures.norms[1, -1].copy_(figures.norms[1, -2])
        return RowMeta(
            step,
            () if exchanged or figures.rms is not None else figures.sizes,
            reference,
            figures.samples,
            figures.micro_batches,
            self._observer.autocast,
            tuple(sorted(figures.missing)),
            self._options.scaler is not None,
        )

    # ---- what comes later

    def settle(self) -> None:
        """Finish the step whose collective is under way."""
        step = self._merge.settle()
        if step is not None:
            assert self._rows is not None
            self._rows.write(step.figures, step.scaling)
            self._delivery.hand_out(self._rows.send(step.meta))

    def resolve(self) -> None:
        """Finish the step whose scaler has been updated since: what it says comes afterwards."""
        if self._unresolved is not None:
            self._unresolved.resolve()
            self._unresolved = None
        if self._held is not None:
            (meta, scaling), self._held = self._held, None
            assert self._rows is not None
            self._rows.rewrite_scaling(scaling)
            self._delivery.hand_out(self._rows.send(meta))

    def ready(self) -> None:
        """Hand out the records that have arrived."""
        if self._rows is not None:
            self._delivery.hand_out(self._rows.ready())

    def drain(self) -> None:
        """Wait for all rows under way, and hand out their records."""
        if self._rows is not None:
            self._delivery.hand_out(self._rows.drain())
