"""What torch.save's pickles name, as far as tensors and plain values need it.

The names are those that torch's weights-only reader allows. Tensors become the places of their
bytes, after the checks that torch's own functions make, and one more: nothing outside of a storage.
What is left out here (sparse and quantized tensors, subclasses, and what a program has added) stays
a Shell, and torch is asked.
"""

from __future__ import annotations

import functools
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from .places import TensorPlace
from .restricted_pickle import Call, PickleError, Shell, Shortcut, Unknown, check_key

_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    # Only what is rebuilt by other functions has these.
    "QInt8": torch.qint8,
    "QInt32": torch.qint32,
    "QUInt8": torch.quint8,
    "QUInt4x2": torch.quint4x2,
    "QUInt2x4": torch.quint2x4,
}

# Dtypes of which a tensor can be made from bytes.
_DENSE = frozenset(
    {
        torch.complex32,
        *(dtype for name, dtype in _STORAGES.items() if not name.startswith("Q")),
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
    }
)

_LIMIT = 1 << 63


class StorageType:
    """Stand for a storage class, which says the dtype."""

    __slots__ = ("dtype", "itemsize")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.itemsize = dtype.itemsize


class Storage(NamedTuple):
    """Say where a storage's bytes lie."""

    start: int
    nbytes: int
    dtype: torch.dtype
    numel: int


@functools.cache
def offered() -> Mapping[str, Any]:
    """Return what these pickles may name."""
    found: dict[str, Any] = {
        "torch._utils._rebuild_tensor": Call(_rebuild_tensor),
        "torch._utils._rebuild_tensor_v2": Call(_rebuild_tensor_v2),
        "torch._utils._rebuild_tensor_v3": Call(_rebuild_tensor_v3),
        "torch._utils._rebuild_parameter": Call(_rebuild_parameter),
        "torch._utils._rebuild_nested_tensor": Call(_refuse_nested),
        "collections.OrderedDict": Call(_ordered_dict),
        "collections.Counter": Call(_counter),
        "torch.Size": Call(_torch_size),
        "torch.device": Call(_torch_device),
        "_codecs.encode": Call(_encode),
        "torch.storage.UntypedStorage": StorageType(torch.uint8),
    }
    for module in ("builtins", "__builtin__"):  # the latter is Python 2's, and protocol 2's
        found[f"{module}.set"] = Call(_set)
        found[f"{module}.bytearray"] = Call(_bytearray)
        found[f"{module}.complex"] = Call(_complex)
    for name, dtype in _STORAGES.items():
        for module in ("torch", "torch.cuda"):
            found[f"{module}.{name}Storage"] = StorageType(dtype)
    for value in vars(torch).values():
        if isinstance(value, torch.dtype):
            found[str(value)] = value
    return found


def find_storages(
    place_of: Callable[[str, int], int], *, views: bool = False
) -> Callable[[Any], Any]:
    """Return what leads from a storage's persistent id to the storage.

    Args:
        place_of: is given a storage's key and its bytes; returns where it begins, or raises
            PickleError if there is none of this size.
        views: whether an id ends with what part of another storage it is, if any; the format
            before torch 1.6.
    """
    known: dict[str, Storage] = {}
    parts = 6 if views else 5

    def storage_of(persistent_id: Any) -> Any:
        if type(persistent_id) is not tuple:
            raise PickleError("it refers to something by other than a tuple")
        if persistent_id[0] != "storage":
            if persistent_id[0] == "module" and type(persistent_id[1]) is Unknown:
                return persistent_id[1]  # a module's class, beside its source
            raise PickleError("it refers to something else than a storage")
        if len(persistent_id) != parts or (views and persistent_id[5] is not None):
            raise PickleError("it has a storage that is a part of another one")
        _, kind, key, location, numel = persistent_id if parts == 5 else persistent_id[:5]
        if type(kind) is not StorageType:
            raise PickleError("it refers to something else than a storage")
        if type(key) is not str or type(location) is not str or type(numel) is not int:
            raise PickleError("it refers to a storage by other than its name and size")
        found = known.get(key)
        if found is None:
            nbytes = numel * kind.itemsize
            found = known[key] = Storage(place_of(key, nbytes), nbytes, kind.dtype, numel)
        elif found.dtype is not kind.dtype or found.numel != numel:
            raise PickleError("it gives one storage two types or sizes")
        return found

    return storage_of


# The thirty instructions that torch.save writes for a tensor, from the second mark on.
_GET, _PUT, _INT = rb"(h.|j....)", rb"(q.|r....)", rb"(?:K.|M..|J....)"
_SIZES = rb"(\)|%b\x85|%b{2}\x86|%b{3}\x87|\(%b{4,8}t)(q.|r....|)" % (_INT, _INT, _INT, _INT)
_TENSOR = re.compile(
    rb"\(%b%b(?:X(.)\0\0\0([0-9]{1,9})%b|%b)%b(%b)t%bQ(%b)%b%b([\x88\x89])%b\)R%bt%bR%b"
    % (_GET, _GET, _PUT, _GET, _GET, _INT, _PUT, _INT, _SIZES, _SIZES, _GET, _PUT, _PUT, _PUT),
    re.DOTALL,
)
# To find where they end is faster without groups.
_TENSOR_SPAN = re.compile(re.sub(rb"(?<!\\)\((?!\?)", b"(?:", _TENSOR.pattern), re.DOTALL)
_NUMBERS = re.compile(_INT, re.DOTALL)

# Decoded instructions kept: of a few architectures.
_MOST_KEPT = 1 << 14
_decoded: dict[bytes, tuple[Any, ...]] = {}


def follow_tensors(storage_of: Callable[[Any], Any]) -> Shortcut:
    """Return what follows a tensor's instructions at once, ten times as fast as one by one."""

    rebuild = offered()["torch._utils._rebuild_tensor_v2"]
    ordered_dict = offered()["collections.OrderedDict"]
    get_match, get_parts = _TENSOR_SPAN.match, _decoded.get

    def follow(data: bytes, at: int, stack: list[Any], memo: dict[int, Any]) -> int:
        match = get_match(data, at)
        if match is None:
            return 0
        code = match[0]
        parts = get_parts(code)
        if parts is None:
            if len(_decoded) >= _MOST_KEPT:
                _decoded.clear()
            groups = _TENSOR.fullmatch(code)
            if groups is None:
                return 0
            parts = _decoded[code] = _decode(groups)
        of_storage, of_tensor, reach = parts
        word, kind, key, put_key, get_key, location, numel, put_id, offset = of_storage
        shape, put_shape, stride, put_stride, grad, hooks, put_hooks, put_all, put_result = (
            of_tensor
        )
        # What is remembered under these numbers differs from file to file.
        if (
            memo.get(word) != "storage"
            or stack[-1] is not rebuild
            or memo.get(hooks) is not ordered_dict
            or grad
            or offset < 0
        ):
            return 0
        if key is None:
            key = memo.get(get_key)
        else:
            memo[put_key] = key
        memo[put_id] = reference = ("storage", memo.get(kind), key, memo.get(location), numel)
        storage = storage_of(reference)
        if put_shape is not None:
            memo[put_shape] = shape
        if put_stride is not None:
            memo[put_stride] = stride
        memo[put_hooks] = made = OrderedDict[Any, Any]()
        memo[put_all] = (storage, offset, shape, stride, grad, made)
        dtype, itemsize = storage.dtype, storage.dtype.itemsize
        if reach and (offset + reach) * itemsize > storage.nbytes:
            raise PickleError("it has a tensor that reaches beyond its storage")
        if dtype not in _DENSE:
            raise PickleError("it makes a tensor of a dtype that is not dense")
        memo[put_result] = stack[-1] = TensorPlace(
            storage.start + offset * itemsize, dtype, shape, stride
        )
        return match.end()

    return follow


def _decode(match: re.Match[bytes]) -> tuple[Any, ...]:
    """Return the numbers of a tensor's instructions, in their order."""
    found = match.groups()
    word, kind, length, key, put_key, get_key, location, numel, put_id, offset = found[:10]
    shape, put_shape, stride, put_stride, grad, hooks, put_hooks, put_all, put_result = found[10:]
    if key is not None and length[0] != len(key):
        raise PickleError("it has a text of another length")

    def sizes(text: bytes) -> tuple[int, ...]:
        return tuple(map(_number, _NUMBERS.findall(text, 1 if text[:1] == b"(" else 0)))

    def index(text: bytes | None) -> int | None:
        return int.from_bytes(text[1:], "little") if text else None

    shape_now, stride_now = sizes(shape), sizes(stride)
    if len(shape_now) != len(stride_now):
        raise PickleError("it has a tensor of which the parts do not fit together")
    of_storage = (
        *(index(word), index(kind), None if key is None else key.decode(), index(put_key)),
        *(index(get_key), index(location), _number(numel), index(put_id), _number(offset)),
    )
    of_tensor = (
        *(shape_now, index(put_shape), stride_now, index(put_stride), grad == b"\x88"),
        *(index(hooks), index(put_hooks), index(put_all), index(put_result)),
    )
    return of_storage, of_tensor, _reach(shape_now, stride_now)


def _number(text: bytes) -> int:
    return int.from_bytes(text[1:], "little", signed=text[:1] == b"J")


def _place(
    storage: Any,
    dtype: torch.dtype,
    offset: Any,
    shape: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
) -> TensorPlace:
    if type(storage) is not Storage or dtype not in _DENSE:
        raise PickleError("it makes a tensor of what is no storage, or has no dense dtype")
    if (
        type(offset) is not int
        or not 0 <= offset < _LIMIT
        or type(shape) not in _TUPLES
        or type(stride) not in _TUPLES
        or len(shape) != len(stride)
        or type(hooks) is not OrderedDict
        or (requires_grad is not False and requires_grad is not True)
    ):
        raise PickleError("it has a tensor of which the parts do not fit together")
    if requires_grad and not (dtype.is_floating_point or dtype.is_complex):
        raise PickleError(f"it has a tensor of {dtype} that requires a gradient")
    end = (offset + _reach(shape, stride)) * dtype.itemsize
    if end > storage.nbytes and 0 not in shape:
        raise PickleError("it has a tensor that reaches beyond its storage")
    return TensorPlace(storage.start + offset * dtype.itemsize, dtype, tuple(shape), tuple(stride))


def _reach(shape: tuple[Any, ...], stride: tuple[Any, ...]) -> int:
    """Return how many elements lie between a tensor's first and last one, both counted."""
    reach = numel = 1
    for size, step in zip(shape, stride, strict=True):
        if type(size) is not int or type(step) is not int or size < 0 or not 0 <= step < _LIMIT:
            raise PickleError("it has a tensor with sizes or strides that are no counts")
        reach += (size - 1) * step
        numel *= size or 1
    if numel >= _LIMIT or len(shape) > 64:
        raise PickleError("it has a tensor of more elements or dimensions than there can be")
    return 0 if 0 in shape else reach


_TUPLES = (tuple, torch.Size)
_NO_HOOKS: OrderedDict[Any, Any] = OrderedDict()


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> TensorPlace:
    return _place(storage, storage.dtype, offset, shape, stride, False, _NO_HOOKS)


def _rebuild_tensor_v2(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    metadata: Any = None,
) -> TensorPlace | Shell:
    place = _place(storage, storage.dtype, offset, shape, stride, requires_grad, hooks)
    if metadata:  # conjugate or negative: only torch knows how to keep that
        return Shell("torch._utils._rebuild_tensor_v2", ())
    return place


def _rebuild_tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> TensorPlace | Shell:
    if type(dtype) is torch.dtype and dtype not in _DENSE:
        return Shell("torch._utils._rebuild_tensor_v3", ())
    place = _place(storage, dtype, offset, shape, stride, requires_grad, hooks)
    return Shell("torch._utils._rebuild_tensor_v3", ()) if metadata else place


def _rebuild_parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
    if type(data) is Shell:
        return Shell("torch._utils._rebuild_parameter", ())
    if type(data) is not TensorPlace or type(hooks) is not OrderedDict:
        raise PickleError("it makes a parameter of what is no tensor")
    if requires_grad is not False and (
        requires_grad is not True or not (data.dtype.is_floating_point or data.dtype.is_complex)
    ):
        raise PickleError(f"it has a parameter of {data.dtype} that requires a gradient")
    return data


def _refuse_nested(*_: Any) -> None:
    # torch does not compare the places of its parts with the memory that they are to lie in.
    raise PickleError("it has a nested tensor, which is not read")


def _ordered_dict(pairs: Any = ()) -> OrderedDict[Any, Any]:
    if not pairs:
        return OrderedDict()
    found: OrderedDict[Any, Any] = OrderedDict()
    for key, value in pairs.items() if type(pairs) in (dict, OrderedDict) else pairs:
        check_key(key)
        found[key] = value
    return found


def _counter(counts: Any = None) -> Counter[Any]:
    if counts is None:
        return Counter()
    if type(counts) is not dict:
        raise PickleError("it has a Counter made of other than a dict")
    return Counter(counts)


def _set(items: Any = ()) -> set[Any]:
    if type(items) not in (list, tuple):
        raise PickleError("it has a set made of other than a list")
    for item in items:
        check_key(item)
    return set(items)


def _bytearray(*arguments: Any) -> bytearray:
    # With a number it would be as large as that.
    if arguments and type(arguments[0]) not in (bytes, str):
        raise PickleError("it has a bytearray made of other than bytes")
    return bytearray(*arguments)


def _complex(real: Any = 0.0, imaginary: Any = 0.0) -> complex:
    return complex(real, imaginary)


def _encode(text: Any, encoding: Any = "") -> bytes:
    # So protocol 2 writes bytes. Other codecs would compress, import and more.
    if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8", "utf8"):
        raise PickleError("it has bytes in an encoding that pickles don't use")
    return text.encode(encoding)


def _torch_size(sizes: Any = ()) -> torch.Size:
    if type(sizes) not in (list, *_TUPLES) or not all(
        type(size) is int and abs(size) < _LIMIT for size in sizes
    ):
        raise PickleError("it has a torch.Size that is none")
    return torch.Size(sizes)


def _torch_device(kind: Any, index: Any = None) -> torch.device:
    if type(kind) is not str or len(kind) > 64:
        raise PickleError("it has a torch.device that is none")
    return torch.device(kind) if index is None else torch.device(kind, index)
