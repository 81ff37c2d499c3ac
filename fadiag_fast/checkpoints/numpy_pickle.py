"""What pickles of numpy arrays name, for the restricted reader.

Only arrays of numbers are made, of bytes that the pickle holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .restricted_pickle import Call, Made, PickleError

_NUMBERS = re.compile("[?bBhHiIlLqQefdFD]|b1|[iu][1248]|f[248]|c8|c16")
_ORDERS = ("<", ">", "=", "|")


class PickledDtype(Made):
    """Hold a dtype, whose byte order a pickle gives afterwards."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        code = _text(code)
        if type(code) is not str or _NUMBERS.fullmatch(code) is None:
            raise PickleError("it has an array of other than numbers")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        order = _text(state[1])
        if order not in _ORDERS or any(part is not None for part in state[2:5]):
            raise PickleError("it has an array of other than numbers")
        self.dtype = self.dtype.newbyteorder(order)


class PickledArray(Made):
    """Hold an array, None until the pickle has said what is in it."""

    def __init__(self) -> None:
        self.array: npt.NDArray[Any] | None = None

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        if type(fortran) is not bool:
            raise PickleError("it has an array of no known order")
        self.fill(content, dtype, shape, "F" if fortran else "C")

    def fill(self, content: Any, dtype: Any, shape: Any, order: Any) -> None:
        if type(dtype) is not PickledDtype or type(content) not in (bytes, bytearray):
            raise PickleError("it has an array of other than numbers")
        if type(shape) is not tuple or not all(type(size) is int and size >= 0 for size in shape):
            raise PickleError("it has an array of no known shape")
        if len(content) != math.prod(shape) * dtype.dtype.itemsize:
            raise PickleError("it has an array of another size than its content")
        self.array = np.frombuffer(content, dtype.dtype).reshape(shape, order=order)


def _reconstruct(kind: Any, shape: Any, dtype: Any) -> PickledArray:
    if kind is not np.ndarray:
        raise PickleError("it makes an array of what is no array's class")
    return PickledArray()


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
    if order not in ("C", "F"):
        raise PickleError("it has an array of no known order")
    made = PickledArray()
    made.fill(content, dtype, shape, order)
    return made


def _encode(text: Any, encoding: Any) -> bytes:
    # So protocols before 3 write bytes. Other codecs would compress, import and more.
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise PickleError(f"refused the codec {encoding!r:.80}")
    return text.encode("latin1")


def _text(value: Any) -> Any:
    return value.decode("latin1") if type(value) is bytes else value


# numpy 2 writes numpy._core where numpy 1 wrote numpy.core.
OFFERED: Mapping[str, Any] = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": Call(PickledDtype),
    "_codecs.encode": Call(_encode),
    # Of no bytes protocols before 3 make a call without arguments.
    "builtins.bytes": Call(lambda: b""),
    "__builtin__.bytes": Call(lambda: b""),
    **{f"numpy.{core}.multiarray._reconstruct": Call(_reconstruct) for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": Call(_frombuffer) for core in ("core", "_core")},
}
