"""The library's C entry points, which a prepared call uses beside torch's dispatcher."""

import ctypes
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .native import LIBRARIES, NATIVE_DEVICES

DONE, DIFFERS = 0, 1  # csrc/prepared.h, PreparedResult


@dataclass(frozen=True)
class _EntryPoints:
    """The C functions of one native library."""

    prepare: Any
    run: Any
    release: Any
    last_error: Any
    exchange: int


def _entry_points(device: str) -> _EntryPoints | None:
    """Return a library's C functions; None where this torch offers no exchange of tensors."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or not LIBRARIES[device].loaded:
        return None
    try:
        pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
        pointer_of.restype = ctypes.c_void_p
        pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]
        exchange = pointer_of(capsule, b"dlpack_exchange_api")
        library = ctypes.PyDLL(str(LIBRARIES[device].path))
        prepare, run = library.fadiag_prepare, library.fadiag_run
        release, last_error = library.fadiag_release, library.fadiag_last_error
    except (ValueError, OSError, AttributeError):
        return None
    objects = [ctypes.py_object] * 3
    counts = ctypes.POINTER(ctypes.c_int64)
    prepare.restype = ctypes.c_void_p
    prepare.argtypes = [ctypes.c_void_p, *objects, ctypes.c_int, counts, ctypes.c_int64, counts]
    run.restype = ctypes.c_int
    run.argtypes = [ctypes.c_void_p, *objects]
    release.restype = None
    release.argtypes = [ctypes.c_void_p]
    last_error.restype = ctypes.c_char_p
    last_error.argtypes = []
    return _EntryPoints(prepare, run, release, last_error, exchange)


ENTRY_POINTS: dict[str, _EntryPoints] = {
    device: points
    for device in ("cpu", "cuda")
    if device in NATIVE_DEVICES and (points := _entry_points(device)) is not None
}
