"""Find a safetensors file's tensors by its header, and know the header again.

The header is JSON with every tensor's dtype, shape and place. What does not pass the checks here is
left to the safetensors package, which says what is wrong with it.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray

from .content import wrapper_prefix
from .files import SAFETENSORS_MAX_HEADER
from .layouts import ALIGNMENT, Found, TensorPlace, make_layout

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
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

# Headers kept: a study has one per architecture, or one per file if the metadata differ.
_MOST_KEPT = 64

_known: OrderedDict[tuple[bytes, int, int], Found] = OrderedDict()
_lock = threading.Lock()


def start_in_slab(head: bytes) -> int:
    """Return where to put a file so that its tensors, and not its header, lie on the alignment."""
    return -(8 + int.from_bytes(head[:8], "little")) % ALIGNMENT


def find_layout(data: NDArray[np.uint8], start: int, size: int) -> Found | None:
    """Return what the file at data[start : start + size] holds, None if odd."""
    length = int.from_bytes(data[start : start + 8].tobytes(), "little")
    if length > min(size - 8, SAFETENSORS_MAX_HEADER):
        return None
    header = data[start + 8 : start + 8 + length].tobytes()
    key = (header, start, size)
    found = _known.get(key)
    if found is None:
        try:
            found = _parse(header, start + 8 + length, start + size)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        with _lock:
            _known[key] = found
            while len(_known) > _MOST_KEPT:
                _known.popitem(last=False)
    return found


def _parse(header: bytes, first: int, stop: int) -> Found:
    entries = json.loads(header)
    metadata = entries.pop("__metadata__", {})
    places = {}
    spans = []
    for name, entry in sorted(entries.items()):
        begin, end = entry["data_offsets"]
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        for number in (begin, end, *shape):
            if type(number) is not int or number < 0:
                raise ValueError("no count")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError("another size")
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        places[name] = TensorPlace(first + begin, dtype, shape, stride)
        spans.append((begin, end))
    # The format allows neither gaps nor overlaps, and ends with the file.
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise ValueError("a gap")
        at = end
    if first + at != stop or not places:
        raise ValueError("another length")
    if not all(isinstance(word, str) for pair in metadata.items() for word in pair):
        raise ValueError("metadata that is no text")
    removed = wrapper_prefix(places)
    layout = make_layout({name[len(removed) :]: places[name] for name in places}, stop)
    return Found("safetensors", layout, "bare", removed, metadata)
