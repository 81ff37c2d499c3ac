"""Record work on a GPU as a CUDA graph, on the device that the work is on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

# A value that no statistic has: norms are not negative, and cosines not below -1. What a replay
# should write is filled with it first, so that a replay that writes nothing is noticed.
UNWRITTEN = -2.0

_T = TypeVar("_T")
_lock = threading.Lock()
_capture_streams: dict[int, torch.cuda.Stream] = {}


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: streams, events and graphs are made on that; no-op on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def record(
    run: Callable[[], _T],
    device: torch.device,
    *,
    warm_up: int = 1,
    capture_error_mode: str = "global",
) -> tuple[torch.cuda.CUDAGraph, _T]:
    """Run work ``warm_up`` times, then record it; return the graph and what its replays write.

    Args:
        run: the work, all of it on ``device``; it returns the tensors that replays write.
        device: a GPU, the current one or another.
        warm_up: runs before, in which libraries choose their kernels and take their workspaces.
        capture_error_mode: see :class:`torch.cuda.graph`.

    Raises:
        RuntimeError: something in ``run`` cannot be recorded.
    """
    with on_device(device):
        current = torch.cuda.current_stream(device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                run()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Without a stream torch.cuda.graph takes one that the process shares, on the device of
        # whoever came first: work on any other device would run there and not be recorded.
        with torch.cuda.graph(
            graph, stream=_capture_stream(device), capture_error_mode=capture_error_mode
        ):
            written = run()
    return graph, written


def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    # One a device: libraries keep a workspace of megabytes for every stream they have seen.
    index = torch.cuda.current_device() if device.index is None else device.index
    with _lock:
        if index not in _capture_streams:
            _capture_streams[index] = torch.cuda.Stream(index)
        return _capture_streams[index]


def mark_unwritten(written: Iterable[Tensor]) -> None:
    """Fill what a replay is about to write."""
    for tensor in written:
        tensor.fill_(UNWRITTEN)
