"""Find the tensors of a file in the format that torch.save wrote before version 1.6.

It holds five pickles, one behind the other: a number, the format's version, the machine, the
object, and the storages' keys. The storages follow in the keys' order, each behind its size.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from .errors import printable
from .opening import Source
from .restricted_pickle import MOST_BYTES, EndsEarly, PickleError, read_pickle
from .torch_pickle import Storage, find_storages, offered

PICKLES = 5

# The number that opens every such file (torch.serialization).
_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001

_UNTYPED = ".UntypedStorage"

_COUNT = struct.Struct("<q")
# Enough for the pickles of most files.
_FIRST_BYTES = 1 << 18


def looks_like(head: bytes) -> bool:
    """Return whether a file of these first bytes has this format."""
    try:
        return bool(read_pickle(head, {})[0] == _MAGIC)
    except PickleError:
        return False


def read_content(source: Source, base: int) -> tuple[Any, set[str]]:
    """Return what a file holds, and the functions and classes that are not offered.

    Args:
        source: the file's bytes.
        base: is added to the places of tensors.

    Raises:
        PickleError: it is damaged, or claims what is not there.
    """
    size = _FIRST_BYTES
    while True:
        data = source.read(0, size)
        try:
            return _read(source, data, base)
        except EndsEarly:
            if size >= min(source.size, MOST_BYTES):
                raise
            size *= 8


def _read(source: Source, data: bytes, base: int) -> tuple[Any, set[str]]:
    magic, at, _ = read_pickle(data, {})
    version, at, _ = read_pickle(data, {}, start=at)
    if magic != _MAGIC or version != _VERSION:
        raise PickleError("it has another version")
    _, at, _ = read_pickle(data, {}, start=at)
    # Where the storages lie is known once all are named.
    sizes: dict[str, int] = {}

    def note(key: str, nbytes: int) -> int:
        sizes[key] = nbytes
        return 0

    # Of tensors of newer dtypes, which torch writes in this format, it reads none.
    names = {name: value for name, value in offered().items() if not name.endswith(_UNTYPED)}
    storage_of, found = find_storages(note, views=True), {}

    def noted(persistent_id: Any) -> Any:
        storage = storage_of(persistent_id)
        if type(storage) is Storage:
            found[persistent_id[2]] = storage
        return storage

    _, keys_at, _ = read_pickle(data, names, noted, at)
    keys, end, _ = read_pickle(data, {}, start=keys_at)
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise PickleError("its storages have no list of names")
    if sorted(keys) != sorted(sizes):
        raise PickleError("it has other storages than it names")
    starts = _starts(source, keys, found, end)
    value, _, unknown = read_pickle(
        data, names, find_storages(lambda key, _: base + starts[key], views=True), at
    )
    return value, unknown


def _starts(
    source: Source, keys: list[str], storages: Mapping[str, Storage], at: int
) -> dict[str, int]:
    starts = {}
    for key in keys:
        storage = storages[key]
        count = source.read(at, _COUNT.size)
        if len(count) < _COUNT.size or _COUNT.unpack(count)[0] != storage.numel:
            raise PickleError(f"storage {printable(key)} has another size where it lies")
        starts[key] = at + _COUNT.size
        at = starts[key] + storage.nbytes
        if at > source.size:
            raise PickleError("it ends too early")
    return starts
