"""Scans: the record of many audited checkpoints, and what can be read from it.

The rows are written by :class:`ScanWriter` and read by :class:`ScanResult`; the extra
``fadiag-fast[scan]`` installs what both need.
"""

from .extras import MissingExtra
from .hashing import ContentHasher, config_hash, content_hash
from .series import Entry, Pattern, SeriesError, read_manifest, series

__all__ = [
    "ContentHasher",
    "Entry",
    "MissingExtra",
    "Pattern",
    "SeriesError",
    "config_hash",
    "content_hash",
    "read_manifest",
    "series",
]
