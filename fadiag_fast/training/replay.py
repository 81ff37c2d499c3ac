"""Reduce a step of small states by one CUDA graph: a copy and a launch in place of calls.

Where a step computes for three milliseconds on the device, the host's time for launching the
reduction is what the training feels. The kept states and gradients are copied to fixed places by
one call, and a graph that reads them there does the rest, up to the row in the device's ring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Shapes that stay for so many steps are taken to stay; warm-up steps have also loaded all kernels.
STEPS_BEFORE = 4


def like_of(tensors: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
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
        self.like = like_of(tensors)
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
