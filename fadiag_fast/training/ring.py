"""Carry the figures of steps from the device to the host without making either wait."""

from __future__ import annotations

import warnings
from collections import deque
from typing import Any

import torch
from torch import Tensor


class Ring:
    """Rows of figures on their way to the host.

    A row is copied into pinned memory behind the work that computes it, and read once its event has
    passed, some steps later. On a CPU it is there at once, and goes the same way.

    Args:
        rows: R, how many may be under way; memory is 2·R·width·8 bytes.
        width: numbers in a row.
        device: where they are computed.

    When R rows are under way the oldest one is waited for, with one warning: nothing is lost.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.rows = rows
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.host = torch.empty((rows, width), dtype=torch.float64, pin_memory=self.on_gpu)
        self._host_rows = list(self.host.unbind(0))
        self._events: list[Any] = [torch.cuda.Event() for _ in range(rows)] if self.on_gpu else []
        self._under_way: deque[tuple[int, Any]] = deque()
        self._next = 0
        self._warned = False
        # Of steps that a CUDA graph replays: written at a place that is counted on the device.
        self._device_rows = torch.zeros((rows, width), dtype=torch.float64, device=device)
        self._device_next = torch.zeros(1, dtype=torch.int64, device=device)
        self._replayed: list[Any] = []
        self._read_from = 0

    def __len__(self) -> int:
        return len(self._under_way) + len(self._replayed)

    def push(self, row: Tensor, meta: Any) -> list[tuple[Any, list[float]]]:
        """Send a row of at most ``[width]`` off; return what had to be waited for to make room."""
        waited: list[tuple[Any, list[float]]] = []
        if len(self._under_way) == self.rows:
            if not self._done(self._under_way[0][0]):
                if not self._warned:
                    self._warned = True
                    warnings.warn(
                        f"StepProbe: the device is {self.rows} recorded steps behind, as many as "
                        f"the ring holds: waiting for the oldest; give a larger ring=",
                        RuntimeWarning,
                        stacklevel=4,
                    )
                self._wait(self._under_way[0][0])
            waited.append(self._take())
        at = self._next
        self._next = (at + 1) % self.rows
        place = self._host_rows[at]
        place = place if len(row) == len(place) else place[: len(row)]
        place.copy_(row, non_blocking=True)
        if self.on_gpu:
            self._events[at].record()
        self._under_way.append((at, meta))
        return waited

    def _done(self, at: int) -> bool:
        return not self.on_gpu or bool(self._events[at].query())

    def _wait(self, at: int) -> None:
        if self.on_gpu:
            self._events[at].synchronize()

    def _take(self) -> tuple[Any, list[float]]:
        at, meta = self._under_way.popleft()
        return meta, self._host_rows[at].tolist()

    def ready(self) -> list[tuple[Any, list[float]]]:
        """Return (meta, row) of all that have arrived, oldest first, without waiting."""
        found = []
        while self._under_way and self._done(self._under_way[0][0]):
            found.append(self._take())
        return found

    def drain(self) -> list[tuple[Any, list[float]]]:
        """Wait for all rows and return them, oldest first."""
        self.send_replayed()
        if self._under_way:
            self._wait(self._under_way[-1][0])
        return self.ready()

    # ---- steps that a CUDA graph replays

    def push_captured(self, row: Tensor) -> None:
        """Write a row at the device's own place; for a call that is captured into a graph."""
        self._device_rows[:, : len(row)].index_copy_(0, self._device_next, row[None])
        self._device_next.add_(1).remainder_(self.rows)

    def replayed(self, meta: Any) -> list[tuple[Any, list[float]]]:
        """Say that a graph wrote a row, None for one that nobody wants; R/4 of them go together."""
        self._replayed.append(meta)
        if len(self._replayed) >= max(1, self.rows // 4):
            return self.send_replayed()
        return []

    def send_replayed(self) -> list[tuple[Any, list[float]]]:
        """Send off the rows that graphs wrote since the last time."""
        waited = []
        for meta in self._replayed:
            row = self._device_rows[self._read_from]
            self._read_from = (self._read_from + 1) % self.rows
            if meta is not None:
                waited += self.push(row, meta)
        self._replayed = []
        return waited
