"""Carry the figures of steps from the device to the host without making either wait."""

from __future__ import annotations

import warnings
from collections import deque
from typing import Any

import torch
from torch import Tensor

# While the device does so many steps, the host comes back from waiting in time.
_AMPLE = 8


class Ring:
    """Rows of figures on their way to the host.

    A row is written on the device, copied into pinned memory behind that, and read once its event
    has passed, some steps later. On a CPU it is there at once, and goes the same way.

    Args:
        rows: R, how many may be under way; memory is 2·R·width·8 bytes.
        width: numbers in a row.
        device: where they are computed.

    Attributes:
        device_rows: ``[R, width]`` float64.
        places: ``[3]`` int64, see :func:`fadiag_fast.ops.step_row`.

    When R rows are under way the oldest ones are waited for: nothing is lost. The device has R - 1
    steps to do meanwhile; where these are few it may stand still, and a warning says so once.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.rows = rows
        self.device = device
        self.on_gpu = device.type == "cuda"

        # Written by :func:`fadiag_fast.ops.step_row`, which counts its places on the device.
        self.device_rows = torch.zeros((rows, width), dtype=torch.float64, device=device)
        self.places = torch.zeros(3, dtype=torch.int64, device=device)
        self._device_places = self.device_rows.unbind(0)
        self._host_rows = torch.empty((rows, width), dtype=torch.float64, pin_memory=self.on_gpu)
        self._host_places = self._host_rows.unbind(0)
        self._free_events: list[Any] = []
        # What was sent off together: its event, and (meta, place on the host) of each row.
        self._under_way: deque[tuple[Any, list[tuple[Any, Tensor]]]] = deque()
        self._count = 0
        self._written: list[Any] = []
        self._read_from = 0
        self._warned = False

    def __len__(self) -> int:
        return self._count + len(self._written)

    def newest(self) -> Tensor:
        """Return the row on the device that :meth:`written` will be told of next."""
        return self._device_places[(self._read_from + len(self._written)) % self.rows]

    def written(self, meta: Any, at_once: bool = True) -> list[tuple[Any, list[float]]]:
        """Send off a row that was written on the device, with None for one that nobody wants.

        With ``at_once=False``, as for those of a CUDA graph, R/4 of them go together. Returns what
        had to be waited for to make room.
        """
        self._written.append(meta)
        if at_once or len(self._written) >= max(1, self.rows // 4):
            return self.send()
        return []

    def send(self) -> list[tuple[Any, list[float]]]:
        """Send off what was written since the last time; returns as :meth:`written` does."""
        waited: list[tuple[Any, list[float]]] = []
        while self._written:
            first = self._read_from
            count = min(len(self._written), self.rows - first)
            waited += self._make_room(count)
            places = self._host_places[first : first + count]
            if count == 1:
                places[0].copy_(self._device_places[first], non_blocking=True)
            else:
                rows = self._host_rows[first : first + count]
                rows.copy_(self.device_rows[first : first + count], non_blocking=True)
            self._sent(list(zip(self._written, places, strict=False)))
            # Not before: what was interrupted while it waited is sent by the next call.
            del self._written[:count]
            self._read_from = (first + count) % self.rows
        return waited

    def _make_room(self, count: int) -> list[tuple[Any, list[float]]]:
        waited: list[tuple[Any, list[float]]] = []
        while self._under_way and self._count + count > self.rows:
            event = self._under_way[0][0]
            if event is not None and not event.query():
                if not self._warned and self.rows < _AMPLE:
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
            if self.on_gpu and torch.cuda.current_device() != self.device.index:
                event.record(torch.cuda.current_stream(self.device))
            else:
                event.record()
        self._under_way.append((event, rows))
        self._count += len(rows)

    def _take(self) -> list[tuple[Any, list[float]]]:
        """Return the oldest rows, which have arrived together."""
        event, rows = self._under_way.popleft()
        if event is not None:
            self._free_events.append(event)
        self._count -= len(rows)
        return [(meta, place.tolist()) for meta, place in rows if meta is not None]

    def ready(self) -> list[tuple[Any, list[float]]]:
        """Return (meta, row) of what has arrived, oldest first, without waiting."""
        found: list[tuple[Any, list[float]]] = []
        while self._under_way:
            event = self._under_way[0][0]
            if event is not None and not event.query():
                break
            found += self._take()
        return found

    def drain(self) -> list[tuple[Any, list[float]]]:
        """Wait for all rows and return them, oldest first."""
        found = self.send()
        if self._under_way and self._under_way[-1][0] is not None:
            self._under_way[-1][0].synchronize()
        return found + self.ready()
