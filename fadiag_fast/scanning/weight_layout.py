"""The weights of many checkpoints in rows of bytes, as files have them."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checkpoints import SlabCheckpoint, TensorPlace, load_into
from ..checkpoints.content import Checkpoint, plain_names
from ..checkpoints.layouts import ALIGNMENT, aligned
from ..checkpoints.places import last_byte
from ..checkpoints.restoring import loads_in_its_own_way

# Layouts whose answers are remembered.
_MOST_LAYOUTS = 64


@dataclass(frozen=True)
class Fit:
    """Where a model's tensors lie in a row of bytes.

    Attributes:
        places: by the names of the model's parameters and buffers, counted from ``start``; tied
            weights have one, and what no checkpoint holds (non-persistent buffers) has none.
        start: the first byte of the row that is used, a multiple of 64, and
        stop: the one after the last.
    """

    places: Mapping[str, TensorPlace]
    start: int
    stop: int

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the tensors as views of bytes.

        Args:
            rows: uint8 ``[S, bytes]`` or ``[bytes]``, beginning at the fit's ``start``.
        """
        lead, ahead = tuple(rows.shape[:-1]), rows.stride()[:-1]
        found = {}
        for name, place in self.places.items():
            size = place.dtype.itemsize
            # Any stretch of the row of this dtype's length: as_strided counts from its beginning.
            typed = rows[..., place.offset : place.offset + size].view(place.dtype)
            found[name] = typed.as_strided(
                (*lead, *place.shape), (*(step // size for step in ahead), *place.stride)
            )
        return found


def canonical(model: nn.Module) -> Fit:
    """Return a fit in which a model's persistent tensors lie one behind the other."""
    places = {}
    end = 0
    for name, tensor in _persistent(model).items():
        stride = torch.empty(tensor.shape, device="meta").stride()
        places[name] = TensorPlace(end, tensor.dtype, tuple(tensor.shape), stride)
        end = aligned(end + tensor.numel() * tensor.element_size())
    return Fit(places, 0, max(end, ALIGNMENT))


def _persistent(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that checkpoints hold, each under one name."""
    held = model.state_dict(keep_vars=True)
    every = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in every.items() if name in held}


class Fitter:
    """Tell where a model's tensors lie in checkpoints that were read into rows.

    Args:
        model: the architecture.

    Attributes:
        canonical: where they lie once a checkpoint that does not fit as it is was loaded.
    """

    def __init__(self, model: nn.Module) -> None:
        self.canonical = canonical(model)
        self._expected = _persistent(model)
        # Copied now: while checkpoints are loaded the model itself runs, with weights of others.
        self._spare: nn.Module | Exception
        try:
            self._spare = copy.deepcopy(model).cpu()
        except Exception as error:  # a model that cannot be copied can still be read into
            self._spare = error
        self._plain = not any(map(loads_in_its_own_way, model.modules()))
        state = model.state_dict(keep_vars=True)
        # Every name of a state dict, with the name under which its tensor is expected.
        by_tensor = {id(tensor): name for name, tensor in self._expected.items()}
        names = plain_names(state)
        self._names = {plain: by_tensor.get(id(state[n])) for n, plain in names.plain.items()}
        self._fits: OrderedDict[int, tuple[object, Fit | None]] = OrderedDict()
        self._known: list[Fit] = []
        self._lock = threading.Lock()

    def fit(self, found: SlabCheckpoint) -> Fit | None:
        """Return where the model's tensors lie in what was read, None if it must be loaded.

        That is asked of each layout once: checkpoints of one study share it. Threads may ask at
        the same time, and only wait for each other where a layout is new.
        """
        key = id(found.layout)
        entry = self._fits.get(key)
        if entry is None or entry[0] is not found.layout:
            with self._lock:
                # The layout is kept, so that no other gets its id.
                entry = self._fits[key] = (found.layout, self._look(found))
                if len(self._fits) > _MOST_LAYOUTS:  # each file may have one of its own
                    self._fits.popitem(last=False)
        return entry[1]

    def _look(self, found: SlabCheckpoint) -> Fit | None:
        if not self._plain or found.extra_state or found.layout.keys() != self._names.keys():
            return None
        places: dict[str, TensorPlace] = {}
        for stored, name in self._names.items():
            if name is None:
                return None
            place, expected = found.layout[stored], self._expected[name]
            if place.dtype != expected.dtype or place.shape != tuple(expected.shape):
                return None
            # Tied weights that lie apart may differ, which loading finds out.
            place = place._replace(offset=place.offset - found.start)
            if places.setdefault(name, place) != place:
                return None
        if _overlap(places.values()):
            return None  # loading gives each tensor memory of its own
        return self._shared(Fit(places, found.start, found.stop))

    def _shared(self, fit: Fit) -> Fit:
        """Return the fit of this kind that others have, too; the lock is held."""
        for known in self._known:
            if known == fit:
                return known
        self._known = [*self._known[1 - _MOST_LAYOUTS :], fit]
        return fit

    def moved_to_start(self, fit: Fit) -> Fit:
        """Return where tensors lie once the bytes of a fit are copied to a row's start."""
        with self._lock:
            return self._shared(Fit(fit.places, 0, fit.stop - fit.start))

    def load(
        self, found: SlabCheckpoint, buffer: Tensor, row: Tensor
    ) -> tuple[Fit, tuple[str, ...]]:
        """Load what was read into ``buffer``, with all checks, and lay it out in ``row``.

        Both may be the same. Returns also what is to be told of it, as load_into does.

        Raises:
            StateDictMismatch: it is not of this model.
        """
        if isinstance(self._spare, Exception):
            raise self._spare
        model = copy.deepcopy(self._spare)
        notes = load_into(
            model,
            Checkpoint(
                path=found.path,
                state_dict=found.tensors(buffer),
                format=found.format,
                container=found.container,
                removed_prefix=found.removed_prefix,
                extra=dict(found.extra),
                extra_state=dict(found.extra_state),
            ),
        )
        with torch.no_grad():
            loaded = _persistent(model)  # a copy: what is read no longer needs the row
            for name, view in self.canonical.views(row).items():
                view.copy_(loaded[name])
        return self.canonical, notes


def _overlap(places: Iterable[TensorPlace]) -> bool:
    """Return whether tensors share bytes with each other, or elements of one do (expanded ones).

    Tensors that are interleaved without sharing a byte count as well: nobody saves such.
    """
    end = 0
    for first, stop, place in sorted(
        ((p.offset, last_byte(*p), p) for p in places), key=lambda span: span[:2]
    ):
        if stop == first:  # empty
            continue
        reach = 1  # elements from the first to behind the last of the inner dimensions
        for step, size in sorted(zip(place.stride, place.shape, strict=True)):
            if size > 1 and step < reach:
                return True
            reach += (size - 1) * step
        if first < end:
            return True
        end = stop
    return False
