"""Find a safetensors file's tensors by its header.

The header is JSON with every tensor's dtype, shape and place. What the safetensors package refuses
is refused here: gaps, overlaps, and sizes that do not agree.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from typing import Any

import torch

from .errors import printable
from .opening import Source
from .places import TensorPlace

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}

# The format's own limit on its JSON header, which keeps random bytes from looking like a header.
_MOST_HEADER = 100_000_000
_LIMIT = 1 << 63

# Headers kept: a study has one per architecture, or one per file if the metadata differ.
_MOST_KEPT = 64

_Header = tuple[dict[str, TensorPlace], dict[str, str]]

_known: OrderedDict[tuple[bytes, int, int], _Header] = OrderedDict()
_lock = threading.Lock()


class SafetensorsError(Exception):
    """Say what is wrong with a safetensors file."""


def looks_like_safetensors(head: bytes) -> bool:
    """Return whether a file of these first bytes has this format."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MOST_HEADER


def bytes_before_tensors(head: bytes) -> int:
    """Return how many bytes come before the first tensor."""
    return 8 + int.from_bytes(head[:8], "little")


def read_header(source: Source, base: int) -> tuple[dict[str, TensorPlace], dict[str, str]]:
    """Return where a file's tensors lie, by name, and its metadata.

    Args:
        source: the file's bytes.
        base: is added to the places.

    Raises:
        SafetensorsError: the file is damaged.
    """
    first = bytes_before_tensors(source.read(0, 8))
    if first > source.size:
        raise SafetensorsError("its header is longer than the file")
    header = source.read(8, first - 8)
    key = (header, source.size, base)
    found = _known.get(key)
    if found is None:
        try:
            found = _parse(header, base + first, base + source.size)
        except SafetensorsError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SafetensorsError("its header does not describe tensors") from error
        with _lock:
            _known[key] = found
            while len(_known) > _MOST_KEPT:
                _known.popitem(last=False)
    places, metadata = found
    return dict(places), dict(metadata)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise SafetensorsError("its header has a name twice")
    return found


def _parse(header: bytes, first: int, stop: int) -> _Header:
    entries = json.loads(header.decode(), object_pairs_hook=_once)
    metadata = entries.pop("__metadata__", None) or {}
    "".join([*entries, *metadata, *map(str, metadata.values())]).encode()  # no half characters
    places = {}
    spans = []
    for name, entry in sorted(entries.items()):
        begin, end = entry["data_offsets"]
        kind, shape = entry["dtype"], tuple(entry["shape"])
        if kind not in _DTYPES:
            raise SafetensorsError(f"it has tensors of {printable(repr(kind[:100]))}")
        dtype = _DTYPES[kind]
        for number in (begin, end, *shape):
            if type(number) is not int or not 0 <= number < _LIMIT:
                raise SafetensorsError("its header has sizes that are no counts")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise SafetensorsError(f"{printable(repr(name[:100]))} has two sizes")
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        if len(shape) > 64 or math.prod(size or 1 for size in shape) >= _LIMIT:
            raise SafetensorsError("it has a tensor of more elements than there can be")
        places[name] = TensorPlace(first + begin, dtype, shape, stride)
        spans.append((begin, end))
    # The format allows neither gaps nor overlaps, and ends with the file.
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise SafetensorsError("its tensors overlap, or there are bytes that belong to none")
        at = end
    if first + at != stop:
        raise SafetensorsError(f"its tensors have {at} bytes, and there are {stop - first}")
    if not all(isinstance(word, str) for pair in metadata.items() for word in pair):
        raise SafetensorsError("its metadata is no text")
    return places, metadata
