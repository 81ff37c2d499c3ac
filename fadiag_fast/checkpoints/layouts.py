"""Where a file's tensors lie in it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .content import state_signature
from .places import TensorPlace, last_byte

# The boundary at which slabs begin and parts of them are put: a cache line, and what torch.save
# aligns storages to. No dtype and no vector instruction wants more.
ALIGNMENT = 64

# Layouts kept: a study has one, or a few if what lies before the weights differs in length.
_MOST_KEPT = 64


class Move(NamedTuple):
    """Say which bytes to copy to where their dtype may be read."""

    source: int
    target: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Describe a file's tensors, as far as files of one study have it in common.

    Attributes:
        places: where each tensor lies, in the state dict's order.
        moves: what to copy first, because it does not lie where its dtype can be read.
        start: a multiple of the alignment, at or before the first byte of any tensor.
        stop: the byte after the last of any tensor.
        needed: bytes of slab.
        signature: as state_signature gives it.
    """

    places: Mapping[str, TensorPlace]
    moves: tuple[Move, ...]
    start: int
    stop: int
    needed: int
    signature: str


def aligned(offset: int) -> int:
    """Return the next multiple of the alignment."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


_known: OrderedDict[tuple[object, ...], Layout] = OrderedDict()
_lock = threading.Lock()


def layout_of(places: Mapping[str, TensorPlace], file_stop: int) -> Layout:
    """Return the layout of these places, the same object for the same ones."""
    key = (file_stop, tuple(places), tuple(places.values()))
    found = _known.get(key)
    if found is None:
        found = make_layout(places, file_stop)
        with _lock:
            found = _known.setdefault(key, found)
            while len(_known) > _MOST_KEPT:
                _known.popitem(last=False)
    return found


def make_layout(places: Mapping[str, TensorPlace], file_stop: int) -> Layout:
    """Put what is misaligned behind the file, and sum up."""
    moves, end = _moves(places, file_stop)
    final: dict[str, TensorPlace] = {}
    for name, place in places.items():
        stop = last_byte(*place)
        if stop > place.offset and place.offset % place.dtype.itemsize:
            move = next(move for move in moves if _serves(move, place))
            place = place._replace(offset=place.offset - move.source + move.target)
        elif stop == place.offset:
            place = place._replace(offset=0)  # no bytes, so that any place will do
        final[name] = place
    spans = [(p.offset, last_byte(*p)) for p in final.values() if last_byte(*p) > p.offset]
    # On the alignment, so that a copy from there on keeps every tensor's.
    start = min((first for first, _ in spans), default=0) // ALIGNMENT * ALIGNMENT
    stop = max((last for _, last in spans), default=0)
    return Layout(final, moves, start, stop, end, state_signature(final))


def _moves(places: Mapping[str, TensorPlace], end: int) -> tuple[tuple[Move, ...], int]:
    """Return moves after which every tensor lies where its dtype can be read, and their end.

    What overlaps is moved together, so that what is shared stays shared.
    """
    spans = {
        (place.offset, last_byte(*place), place.dtype.itemsize)
        for place in places.values()
        if place.offset % place.dtype.itemsize and last_byte(*place) > place.offset
    }
    moves: list[Move] = []
    for first, last, itemsize in sorted(spans):
        before = moves[-1] if moves else None
        if (
            before
            and first < before.source + before.length
            and not ((first - before.source) % itemsize)
        ):
            length = max(before.length, last - before.source)
            moves[-1] = before._replace(length=length)
        else:
            moves.append(Move(first, aligned(end), last - first))
        end = moves[-1].target + moves[-1].length
    return tuple(moves), end


def _serves(move: Move, place: TensorPlace) -> bool:
    inside = move.source <= place.offset and last_byte(*place) <= move.source + move.length
    return inside and (place.offset - move.source) % place.dtype.itemsize == 0
