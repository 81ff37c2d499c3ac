"""Find the tensors of a torch.save zip file where they lie, and know the next file at a glance.

A file of a new kind is loaded as load_checkpoint does it, with every check. Then torch's
weights-only reader reads its pickle once more, with tensors that have no data, and says where each
storage lies. From that and the zip file's own tables a template is made. The next checkpoint of the
study matches it if all bytes that decide on the layout are the same: the pickle, the tables but for
dates, checksums and the archive's name, and the small records. Then nothing is unpickled at all.

Most pickles of a study differ, in the epoch or a loss. Where a file differs from a template in such
values only, the template is widened. It is not reasoned that a value cannot matter but tried: the
old pickle is read again with one of the new values in it, and must give the same tensors in the
same places and exactly one other number, truth value or text in `extra`. From then on these bytes
may be anything, and are put into `extra` where they belong.
"""

from __future__ import annotations

import functools
import io
import pickle
import pickletools
import struct
import sys
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .content import find_state_dict, without_wrapper_prefixes
from .errors import CheckpointError
from .layouts import Found, TensorPlace, last_byte, make_layout, without_data

_Bytes = NDArray[np.uint8]

_END = struct.Struct("<4s4H2LH")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")

# Date, time and checksum, which say nothing of the layout, in either kind of header.
_CENTRAL_FREE = slice(12, 20)
_LOCAL_FREE = slice(10, 18)

# Records that change how torch reads a file.
_DECIDING = ("version", "byteorder", ".format_version", ".storage_alignment")

# Templates kept, over all file sizes and of one; and how many values of one may vary.
_MOST_SIZES = 64
_MOST_OF_A_SIZE = 4
_MOST_FREE_VALUES = 64


class _Record(NamedTuple):
    name: str
    header: int
    start: int
    size: int
    central: int


class _Tables(NamedTuple):
    records: dict[str, _Record]
    prefix: str
    directory: int


@dataclass(frozen=True)
class _Value:
    """Say which bytes of the pickle are a value in `extra`, and where in `extra` it belongs."""

    start: int
    stop: int
    decode: Callable[[bytes], Any]
    path: tuple[Any, ...]


class _Fixed(NamedTuple):
    """Know bytes in certain places, of which some may be anything.

    They are compared as one whole number: numpy would leave the interpreter's lock at every step,
    and a reader among many waits each time until it has it back.
    """

    spans: tuple[slice, ...]
    mask: int
    value: int

    @classmethod
    def of(cls, data: _Bytes, masks: Sequence[tuple[int, _Bytes]]) -> _Fixed:
        """Know a file's bytes by pairs of where some begin and 255 for those that count, else 0."""
        spans = tuple(slice(start, start + len(mask)) for start, mask in masks)
        mask = int.from_bytes(b"".join(mask.tobytes() for _, mask in masks), "little")
        return cls(spans, mask, _number(data.data, spans) & mask)

    def match(self, data: memoryview) -> bool:
        return _number(data, self.spans) & self.mask == self.value


def _number(data: memoryview, spans: tuple[slice, ...]) -> int:
    return int.from_bytes(b"".join([data[span] for span in spans]), "little")


@dataclass(frozen=True)
class _Template:
    """Know a file by the bytes that decide on its layout.

    Attributes:
        found: the file that the template was made of.
        pickle_start: where the pickle begins in the file.
        pickle: that file's.
        values: what may differ in it.
        pickle_mask: 0 for those bytes, else 255.
        directory: where the zip file's tables begin.
        tables: what must be the same of them, to the end of the file, and of the records' headers;
            and small records that decide.
        prefixes: where the archive's name stands in the tables, counted from where they begin, one
            for each record.
        prefix_length: its bytes.
    """

    found: Found
    pickle_start: int
    pickle: _Bytes
    pickle_mask: _Bytes
    directory: int
    tables: _Fixed
    prefixes: tuple[int, ...]
    prefix_length: int
    values: tuple[_Value, ...] = ()
    pickle_fixed: _Fixed = field(init=False)

    def __post_init__(self) -> None:
        fixed = _Fixed.of(self.pickle, [(0, self.pickle_mask)])
        start = self.pickle_start
        placed = fixed._replace(spans=(slice(start, start + len(self.pickle)),))
        object.__setattr__(self, "pickle_fixed", placed)

    def tables_match(self, data: _Bytes) -> bool:
        view = data.data
        if not self.tables.match(view):
            return False
        directory = view[self.directory :].tobytes()
        first = self.prefixes[0]
        name = directory[first : first + self.prefix_length]
        return all(directory.startswith(name, at) for at in self.prefixes)

    def match(self, data: _Bytes) -> Found | None:
        """Return what a file of the same size holds, or None if it is another kind of file."""
        if not self.pickle_fixed.match(data.data) or not self.tables_match(data):
            return None
        if not self.values:
            return self.found
        stream = data[self.pickle_start : self.pickle_start + len(self.pickle)].tobytes()
        changes: dict[Any, Any] = {}
        try:
            for value in self.values:
                inner = changes
                for key in value.path[:-1]:
                    inner = inner.setdefault(key, {})
                inner[value.path[-1]] = _Leaf(value.decode(stream[value.start : value.stop]))
        except (KeyError, ValueError):  # no truth value, no text
            return None
        return self.found._replace(extra=_changed(self.found.extra, changes))


class _Leaf(NamedTuple):
    value: Any


def _changed(node: Any, changes: dict[Any, Any]) -> Any:
    """Return a copy with some leaves changed that shares with the old what did not change."""
    new = dict(node) if isinstance(node, dict) else list(node)
    for key, change in changes.items():
        new[key] = change.value if type(change) is _Leaf else _changed(node[key], change)
    return tuple(new) if type(node) is tuple else new


_templates: OrderedDict[int, tuple[_Template, ...]] = OrderedDict()
_lock = threading.Lock()


def recognise(data: _Bytes) -> Found | None:
    """Return what a torch.save zip file holds if it is like one that was learnt, else None."""
    for template in _templates.get(len(data), ()):
        found = template.match(data)
        if found is not None:
            return found
    return None


def learn(data: _Bytes) -> Found | None:
    """Return what a torch.save zip file of a new kind holds, and recognise the next one.

    The caller has loaded the file in torch's usual way before: what the pickle claims of the
    storages' sizes is judged only there.

    Args:
        data: the whole file. Parts are overwritten for a moment.

    Returns None for a file that cannot be used where it lies.
    """
    tables = _read_tables(data)
    if tables is None:
        return None
    found = _unpickle(data, tables)
    if found is not None:
        _keep_template(data, tables, found)
    return found


def stream(data: _Bytes) -> Any:
    """Return bytes in memory as a file, without a copy."""
    return _Stream(data)


def forget_templates() -> None:
    """Forget all templates, as a new process would."""
    with _lock:
        _templates.clear()


# ------------------------------------------------------------------------------------------------
# A file of a new kind


class _Stream(io.RawIOBase):
    """Read bytes in memory as a file without copying them first, as io.BytesIO would."""

    def __init__(self, data: _Bytes) -> None:
        self._data = data.data
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, target: Any) -> int:
        part = self._data[self._at : self._at + len(target)]
        target[: len(part)] = part
        self._at += len(part)
        return len(part)


def _read_tables(data: _Bytes) -> _Tables | None:
    """Return a zip file's records if it is as plain as torch.save writes them."""
    try:
        # load_checkpoint looks with Python's zipfile first, which is stricter than torch.
        with zipfile.ZipFile(_Stream(data)):
            return _parse_tables(data.data)
    except Exception:
        # zipfile raises many types.
        return None


def _parse_tables(data: memoryview) -> _Tables:
    end = len(data) - _END.size
    signature, *_, count, length, directory, comment = _END.unpack_from(data, max(end, 0))
    if signature != b"PK\5\6" or comment or directory + length > end or not count:
        raise ValueError("no end, a comment, or more than 4 GB")
    records = {}
    at, prefix = directory, None
    for _ in range(count):
        if at + _CENTRAL.size > directory + length:
            raise ValueError("too few records")
        fields = _CENTRAL.unpack_from(data, at)
        method, packed, size, name_length, extra, note, header = (
            fields[i] for i in (4, 8, 9, 10, 11, 12, 16)
        )
        name = str(data[at + _CENTRAL.size : at + _CENTRAL.size + name_length], "utf-8")
        local = _LOCAL.unpack_from(data, header)
        start = header + _LOCAL.size + local[9] + local[10]
        if fields[0] != b"PK\1\2" or local[0] != b"PK\3\4" or method or packed != size:
            raise ValueError("damaged or compressed")
        if prefix is None:
            prefix = name[: name.index("/") + 1]
        if not name.startswith(prefix) or start + size > directory or name in records:
            raise ValueError("several folders, a record outside, or a name twice")
        records[name[len(prefix) :]] = _Record(name, header, start, size, at)
        at += _CENTRAL.size + name_length + extra + note
    assert prefix is not None  # count is not 0
    return _Tables(records, prefix, directory)


@functools.cache
def _offsets_come_from() -> str:
    """Find out how this torch says where storages lie: it differs between versions."""
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(1)}, buffer)
    for way in ("meta", "fake", ""):
        buffer.seek(0)
        if way and hasattr(_load(buffer, way)["w"].untyped_storage(), "_checkpoint_offset"):
            break
    return way


def _load(stream: Any, way: str) -> Any:
    """Read a file with torch's weights-only reader, without the tensors' data."""
    if way == "meta":
        return torch.load(stream, map_location="meta", weights_only=True)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.load(stream, weights_only=True)


@contextmanager
def _looked_up(data: _Bytes, records: dict[str, _Record]) -> Iterator[None]:
    """Make torch look every storage up in the tables, as it does where it reads their data.

    Where a file says that torch may, it calculates the places of storages without data instead,
    from sizes that the pickle claims.
    """
    record = records.get(".format_version")
    if record is None:
        yield
        return
    place = slice(record.start, record.start + record.size)
    before = data[place].copy()
    data[place] = ord("0")
    try:
        yield
    finally:
        data[place] = before


def _unpickle(data: _Bytes, tables: _Tables) -> Found | None:
    records = tables.records
    order = records.get("byteorder")
    if order is not None:
        said = data[order.start : order.start + order.size].tobytes().decode("latin1")
    else:
        said = "little" if torch.serialization.get_default_load_endianness() is None else ""
    way = _offsets_come_from()
    if "data.pkl" not in records or "constants.pkl" in records or said != sys.byteorder or not way:
        return None
    try:
        with _looked_up(data, records):
            content = _load(_Stream(data), way)
        state, container, extra = find_state_dict(content, Path(), unsafe_pickle=False)
    except CheckpointError:
        return None
    except Exception:
        # Unsafe, damaged or strange: load_checkpoint tells them apart.
        return None
    state, removed_prefix = without_wrapper_prefixes(state)
    stored = {record.start: record.size for record in records.values()}
    places = {}
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            return None
        storage = tensor.untyped_storage()
        begin = getattr(storage, "_checkpoint_offset", None)
        if begin not in stored or tensor.is_conj() or tensor.is_neg():
            return None
        offset = begin + tensor.storage_offset() * tensor.dtype.itemsize
        place = TensorPlace(offset, tensor.dtype, tuple(tensor.shape), tensor.stride())
        if last_byte(*place) > begin + stored[begin]:
            return None
        places[name] = place
    layout = make_layout(places, len(data))
    return Found("torch-zip", layout, container, removed_prefix, without_data(extra))


# ------------------------------------------------------------------------------------------------
# Templates


def _keep_template(data: _Bytes, tables: _Tables, found: Found) -> None:
    """Widen a template so that it fits this file, or make a new one."""
    size = len(data)
    known = _templates.get(size, ())
    for template in known:
        if template.tables_match(data):
            wider = _widened(template, data, tables, found)
            if wider is not None:
                others = tuple(other for other in known if other is not template)
                _keep(size, (wider, *others))
                return
    _keep(size, (_new_template(data, tables, found), *known))


def _keep(size: int, templates: tuple[_Template, ...]) -> None:
    with _lock:
        _templates[size] = templates[:_MOST_OF_A_SIZE]
        _templates.move_to_end(size)
        while len(_templates) > _MOST_SIZES:
            _templates.popitem(last=False)


def _new_template(data: _Bytes, tables: _Tables, found: Found) -> _Template:
    directory, length = tables.directory, len(tables.prefix.encode())
    mask = np.full(len(data) - directory, 255, np.uint8)
    header = np.full(_LOCAL.size, 255, np.uint8)
    header[_LOCAL_FREE] = 0
    masks = [(directory, mask)]
    prefixes = []
    for name, record in tables.records.items():
        central = record.central - directory
        first = central + _CENTRAL.size
        mask[central + _CENTRAL_FREE.start : central + _CENTRAL_FREE.stop] = 0
        mask[first : first + length] = 0
        prefixes.append(first)
        masks.append((record.header, header))
        if name in _DECIDING:
            masks.append((record.start, np.full(record.size, 255, np.uint8)))
    stream = tables.records["data.pkl"]
    given = data[stream.start : stream.start + stream.size].copy()
    return _Template(
        found,
        stream.start,
        given,
        np.full(len(given), 255, np.uint8),
        directory,
        _Fixed.of(data, masks),
        tuple(prefixes),
        length,
    )


def _widened(template: _Template, data: _Bytes, tables: _Tables, found: Found) -> _Template | None:
    """Return a template that fits this file too, None if it differs in more than values."""
    old, start = template.pickle, template.pickle_start
    given = data[start : start + len(old)]
    new = given.copy()
    differing = np.flatnonzero((old ^ new) & template.pickle_mask)
    touched = _touched_values(old.tobytes(), differing)
    if touched is None or len(touched) + len(template.values) > _MOST_FREE_VALUES:
        return None
    mask, values = template.pickle_mask.copy(), list(template.values)
    try:
        for first, stop, decode in touched:
            given[:] = old
            given[first:stop] = new[first:stop]
            tried = _unpickle(data, tables)
            path = _only_difference(template.found, tried)
            if path is None or tried is None:
                return None
            before, after = (decode(stream[first:stop].tobytes()) for stream in (old, new))
            if not _is(_at(template.found.extra, path), before):
                return None
            if not _is(_at(tried.extra, path), after):
                return None
            values.append(_Value(first, stop, decode, path))
            mask[first:stop] = 0
    except (KeyError, ValueError):  # bytes that are no truth value or no text
        return None
    finally:
        given[:] = new
    wider = replace(template, pickle_mask=mask, values=tuple(values))
    # What the template now says of this file must be what the file says.
    again = wider.match(data)
    return wider if again is not None and _differences(again, found) == [] else None


_TRUTH = {b"\x88": True, b"\x89": False}


def _text(data: bytes) -> str:
    return str(data, "utf-8", "surrogatepass")


# Opcodes with a value of fixed width: bytes before the value, and how to read it.
_VALUES: dict[str, tuple[int, Callable[[bytes], Any]]] = {
    "BININT1": (1, lambda data: data[0]),
    "BININT2": (1, lambda data: struct.unpack("<H", data)[0]),
    "BININT": (1, lambda data: struct.unpack("<i", data)[0]),
    "LONG1": (2, pickle.decode_long),
    "BINFLOAT": (1, lambda data: struct.unpack(">d", data)[0]),
    "BINUNICODE": (5, _text),
    "NEWTRUE": (0, _TRUTH.__getitem__),
    "NEWFALSE": (0, _TRUTH.__getitem__),
}


def _touched_values(
    stream: bytes, differing: NDArray[np.intp]
) -> list[tuple[int, int, Callable[[bytes], Any]]] | None:
    """Return the values that differing bytes belong to, None if one belongs to none."""
    positions: list[tuple[Any, int]] = [(op, at or 0) for op, _, at in pickletools.genops(stream)]
    stops = [at for _, at in positions[1:]] + [len(stream)]
    touched = []
    left = differing
    for (opcode, at), stop in zip(positions, stops, strict=True):
        if not len(left) or left[0] >= stop:
            continue
        if opcode.name not in _VALUES:
            return None
        skip, decode = _VALUES[opcode.name]
        if left[0] < at + skip:
            return None
        touched.append((at + skip, stop, decode))
        left = left[left >= stop]
    return touched


def _only_difference(a: Found, b: Found | None) -> tuple[Any, ...] | None:
    """Return where in `extra` two files differ, if all else is the same."""
    paths = None if b is None else _differences(a, b)
    return paths[0] if paths is not None and len(paths) == 1 and paths[0] else None


def _differences(a: Found, b: Found) -> list[tuple[Any, ...]] | None:
    """Return the paths of leaves that differ in `extra`, None if more than that differs."""
    if a._replace(extra={}) != b._replace(extra={}) or list(a.layout.places) != list(
        b.layout.places
    ):
        return None
    paths: list[tuple[Any, ...]] = []
    return paths if _compare(a.extra, b.extra, (), paths) else None


def _compare(a: Any, b: Any, path: tuple[Any, ...], paths: list[tuple[Any, ...]]) -> bool:
    """Add the paths of leaves that differ; return whether the containers are alike."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(_compare(a[k], b[k], (*path, k), paths) for k in a)
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(
            _compare(x, y, (*path, i), paths) for i, (x, y) in enumerate(zip(a, b, strict=True))
        )
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
    if type(a) in (int, float, bool, str):
        if not _is(a, b):
            paths.append(path)
        return True
    # What else a pickle may hold, such as sets or numpy's numbers.
    try:
        return bool(a == b)
    except Exception:
        return False


def _is(a: Any, b: Any) -> bool:
    """Tell whether two plain values are the same, NaN included."""
    return type(a) is type(b) and (a == b or (a != a and b != b))


def _at(node: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        node = node[key]
    return node
