"""A checksum of a whole table file, inside the file, so that no flipped bit becomes a figure.

Parquet's own checksums cover pages, and neither their headers nor the footer; Arrow's IPC files
have none. Here a table's metadata holds a text of fixed length, the seal, in two copies. It is
written with zeros in place of the checksum; the checksum of those bytes then takes their place.
A file is whole or not by itself, so that nothing beside it has to be kept in step.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from typing import Any

# The names under which the metadata holds the two copies: one would be missed with its beginning.
_KEYS = (b"fadiag_scan_seal", b"fadiag_scan_seal_again")
_DIGITS = 32
# A number of the file's own keeps a text that some column happens to hold from being one.
_SEAL = re.compile(rb"fadiag-seal:([0-9a-f]{16}):([0-9a-f]{%d})" % _DIGITS)
# Metadata stands at the end of a Parquet file, and at both ends of an Arrow file.
_WITHIN = 1 << 20


class BrokenSeal(ValueError):
    """Report bytes that are not those that were written."""


def unsealed() -> dict[bytes, bytes]:
    """Return what a table's metadata must hold for :func:`seal`."""
    blank = _text(secrets.token_hex(8).encode(), b"0" * _DIGITS)
    return dict.fromkeys(_KEYS, blank)


def seal(data: bytearray, metadata: Mapping[bytes, bytes]) -> None:
    """Put the checksum of a file's bytes into its seals.

    Args:
        data: a file whose metadata holds what :func:`unsealed` returned.
        metadata: that.
    """
    blank = metadata[_KEYS[0]]
    digest = _digest(data, [])
    for _, stop, found in _seals(data):
        if found == blank:
            data[stop - _DIGITS : stop] = digest


def check(data: Any) -> bool:
    """Return whether a file is sealed.

    Args:
        data: all its bytes.

    Raises:
        BrokenSeal: it is, and its bytes are not those that were sealed.
    """
    seals = _seals(data)
    if not seals:
        return False
    last = seals[-1][2]  # behind all rows
    own = [(start, stop) for start, stop, text in seals if text[:-_DIGITS] == last[:-_DIGITS]]
    digest = _digest(data, [(stop - _DIGITS, stop) for _, stop in own])
    texts = {bytes(memoryview(data)[stop - _DIGITS : stop]) for _, stop in own}
    if texts != {digest} or len(own) < len(_KEYS):
        raise BrokenSeal("its checksum is another")
    return True


def _text(number: bytes, digest: bytes) -> bytes:
    return b"fadiag-seal:" + number + b":" + digest


def _seals(data: Any) -> list[tuple[int, int, bytes]]:
    """Return where seals begin and end, and their texts, in order."""
    view = memoryview(data)
    found = {}
    for first in (0, max(0, len(view) - _WITHIN)):
        for match in _SEAL.finditer(view[first : first + _WITHIN]):
            found[first + match.start()] = (first + match.end(), match[0])
    return [(start, stop, text) for start, (stop, text) in sorted(found.items())]


def _digest(data: Any, blanks: list[tuple[int, int]]) -> bytes:
    """Return the checksum of bytes as they are with zeros, the characters, in some places."""
    view = memoryview(data)
    digest = hashlib.blake2b(digest_size=_DIGITS // 2)
    at = 0
    for start, stop in blanks:
        digest.update(view[at:start])
        digest.update(b"0" * (stop - start))
        at = stop
    digest.update(view[at:])
    return digest.hexdigest().encode()
