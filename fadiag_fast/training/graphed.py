"""Reduce a step of small states by one CUDA graph: a copy and a launch in place of calls.

Where a step computes for three milliseconds on the device, the host's time for launching the
reduction is what the training feels. The kept states and gradients are copied to fixed places by
one call, and a graph that reads them there does the rest, up to the row in the device's ring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import ops
from .figures import StepFigures
from .rows import StepRows

# Shapes that stay for so many steps are taken to stay; warm-up steps have also loaded all kernels.
_STEPS_BEFORE = 4

Shapes = list[tuple[torch.Size, torch.dtype]]


def shapes_of(tensors: Sequence[Tensor]) -> Shapes:
    """Return what must stay the same from step to step."""
    return [(tensor.shape, tensor.dtype) for tensor in tensors]


class Replay:
    """A reduction of fixed shapes as a CUDA graph.

    Args:
        tensors: of the step at hand: the shapes, and where they lie.
        reduce: computes on tensors like these and writes where graphs write; it is captured, and
            runs with every call.

    Raises:
        RuntimeError: something in ``reduce`` cannot be captured.
    """

    def __init__(
        self, tensors: Sequence[Tensor], reduce: Callable[[Sequence[Tensor]], None]
    ) -> None:
        self.shapes = shapes_of(tensors)
        self._places = [torch.empty_like(tensor) for tensor in tensors]
        self._graph = torch.cuda.CUDAGraph()
        device = tensors[0].device
        current = torch.cuda.current_stream(device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # Not torch.cuda.graph, which waits for the device. Other threads go on meanwhile.
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                reduce(self._places)
            finally:
                self._graph.capture_end()
        current.wait_stream(stream)

    def __call__(self, tensors: list[Tensor]) -> None:
        """Reduce tensors of the same shapes."""
        torch._foreach_copy_(self._places, tensors)
        self._graph.replay()


class GraphedReduction:
    """The reduction of steps whose shapes stay, from the states to the row, as one CUDA graph.

    Args:
        rows: where the row is written.
        direction_layers: indices of the states whose directions are kept.

    Attributes:
        replay: the graph at hand; None before the shapes have stayed for some steps.
        refused: nothing is captured any more; steps are reduced call by call.
    """

    def __init__(self, rows: StepRows, direction_layers: Sequence[int]) -> None:
        self._rows = rows
        self._layers = tuple(direction_layers)
        self.replay: Replay | None = None
        self.refused = False
        self._starts = 0
        self._shapes: Shapes = []
        self._alike = 0

    def forget(self) -> None:
        """Let the graph go: it writes into a ring that was."""
        self.replay = None

    def reduce(self, tensors: list[Tensor], alone: Callable[[], bool]) -> Shapes | None:
        """Reduce a step, if a graph will do.

        Args:
            tensors: n states, their gradients, and that of the logits, all on one GPU.
            alone: says whether no other rank's figures belong to the step.

        Returns:
            The shapes of the tensors; None where the step must be reduced call by call.
        """
        directions = self._rows.directions
        starts = 0 if directions is None else directions.starts
        if self.replay is not None and self._starts != starts:
            self.replay = None  # it reads and writes directions where they were
        shapes = shapes_of(tensors)
        if self.replay is None or self.replay.shapes != shapes:
            made = self._make(tensors, shapes, alone)
            if made is None:
                return None
            self.replay, self._starts = made, starts
        self.replay(tensors)
        return shapes

    def _make(
        self, tensors: Sequence[Tensor], shapes: Shapes, alone: Callable[[], bool]
    ) -> Replay | None:
        """Return a graph that reduces tensors like these, once they are what keeps coming."""
        n, logits = len(tensors) // 2, tensors[-1]
        states, grads = shapes[:n], shapes[n:-1]
        if logits.is_complex() or states != grads:
            return None
        if any(shape[0] != len(logits) or dtype != logits.dtype for shape, dtype in grads):
            return None
        self._alike = self._alike + 1 if shapes == self._shapes else 1
        self._shapes = shapes
        if self.refused or not alone() or self._alike <= _STEPS_BEFORE:
            return None
        if self._rows.opened().device != tensors[0].device:
            return None

        def reduce(places: Sequence[Tensor]) -> None:
            found = ops.layer_statistics([*places[:n], places[-1]], places[n:], means=self._layers)
            assert isinstance(found, ops.PackedStatistics)
            means: list[Tensor | None] = [found.mean_of(l) for l in self._layers]
            figures = StepFigures(found.norms, means, set(), len(places[-1]))
            self._rows.write(figures, None, captured=True)

        try:
            return Replay(tensors, reduce)
        except Exception:
            # It goes on call by call, as it has so far.
            self.refused = True
            return None
