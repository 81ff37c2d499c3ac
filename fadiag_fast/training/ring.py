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
        rows: R, how many may be under way; memory is 4·R·width·8 bytes.
        width: numbers in a row.
        device: where they are computed.

    When R rows are under way the oldest ones are waited for, with one warning: nothing is lost.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.rows = rows
        self.device = device
        self.on_gpu = device.type == "cuda"

        def memory() -> Tensor:
            return torch.empty((rows, width), dtype=torch.float64, pin_memory=self.on_gpu)

        self._host_rows = memory()
        self._host_places: dict[int, tuple[Tensor, ...]] = {}  # by the numbers in a row
        self._free_events: list[Any] = []
        # What was sent off together: its event, and (meta, place on the host) of each row.
        self._under_way: deque[tuple[Any, list[tuple[Any, Tensor]]]] = deque()
        self._count = 0
        self._next = 0
        self._warned = False
        # Of steps that a CUDA graph replays: written at a place that is counted on the device, and
        # sent to the same place on the host.
        self._device_rows = torch.zeros((rows, width), dtype=torch.float64, device=device)
        self._device_places = self._device_rows.unbind(0)
        self._device_next = torch.zeros(1, dtype=torch.int64, device=device)
        self._replayed_rows = memory()
        self._replayed_places = self._replayed_rows.unbind(0)
        self._replayed: list[Any] = []
        self._read_from = 0

    def __len__(self) -> int:
        return self._count + len(self._replayed)

    def push(self, row: Tensor, meta: Any) -> list[tuple[Any, list[float]]]:
        """Send a row of at most ``[width]`` off; return what had to be waited for to make room."""
        # Rows of graphs that were written before this one go before it.
        waited = self.send_replayed() if self._replayed else []
        waited += self._make_room(1)
        width = len(row)
        if width not in self._host_places:
            self._host_places[width] = self._host_rows[:, :width].unbind(0)
        place = self._host_places[width][self._next]
        self._next = (self._next + 1) % self.rows
        place.copy_(row, non_blocking=True)
        self._sent([(meta, place)])
        return waited

    def _make_room(self, count: int) -> list[tuple[Any, list[float]]]:
        waited: list[tuple[Any, list[float]]] = []
        while self._under_way and self._count + count > self.rows:
            event = self._under_way[0][0]
            if event is not None and not event.query():
                if not self._warned:
                    self._warned = True
                    warnings.warn(
                        f"StepProbe: the device is {self.rows} recorded steps behind, as many as "
                        f"the ring holds: waiting for the oldest; give a larger ring=",
                        RuntimeWarning,
                        stacklevel=5,
                    )
                event.synchronize()
            waited += self._take()
        return waited

    def _new_event(self) -> Any:
        return torch.cuda.Event() if self.on_gpu else None

    def _sent(self, rows: list[tuple[Any, Tensor]]) -> None:
        event = self._free_events.pop() if self._free_events else self._new_event()
        if event is not None:
            event.record()
        self._under_way.append((event, rows))
        self._count += len(rows)

    def _take(self) -> list[tuple[Any, list[float]]]:
        event, rows = self._under_way.popleft()
        if event is not None:
            self._free_events.append(event)
        self._count -= len(rows)
        return [(meta, place.tolist()) for meta, place in rows if meta is not None]

    def ready(self) -> list[tuple[Any, list[float]]]:
        """Return (meta, row) of all that have arrived, oldest first, without waiting."""
        found: list[tuple[Any, list[float]]] = []
        while self._under_way and (self._under_way[0][0] is None or self._under_way[0][0].query()):
            found += self._take()
        return found

    def drain(self) -> list[tuple[Any, list[float]]]:
        """Wait for all rows and return them, oldest first."""
        found = self.send_replayed()
        if self._under_way and self._under_way[-1][0] is not None:
            self._under_way[-1][0].synchronize()
        return found + self.ready()

    # ---- steps that a CUDA graph replays

    def push_captured(self, row: Tensor) -> None:
        """Write a row at the device's own place; for a call that is captured into a graph."""
        self._device_rows[:, : len(row)].index_copy_(0, self._device_next, row[None])
        self._device_next.add_(1).remainder_(self.rows)

    def replayed(self, meta: Any, at_once: bool = False) -> list[tuple[Any, list[float]]]:
        """Say that a graph wrote a row, None for one that nobody wants.

        R/4 of them go off together, unless ``at_once``. Returns as :meth:`push` does.
        """
        self._replayed.append(meta)
        if at_once or len(self._replayed) >= max(1, self.rows // 4):
            return self.send_replayed()
        return []

    def send_replayed(self) -> list[tuple[Any, list[float]]]:
        """Send off the rows that graphs wrote since the last time."""
        metas, self._replayed = self._replayed, []
        waited: list[tuple[Any, list[float]]] = []
        while metas:
            first = self._read_from
            count = min(len(metas), self.rows - first)
            waited += self._make_room(count)
            places = self._replayed_places[first : first + count]
            if count == 1:
                places[0].copy_(self._device_places[first], non_blocking=True)
            else:
                rows = self._replayed_rows[first : first + count]
                rows.copy_(self._device_rows[first : first + count], non_blocking=True)
            self._sent(list(zip(metas, places, strict=False)))
            metas = metas[count:]
            self._read_from = (first + count) % self.rows
        return waited
