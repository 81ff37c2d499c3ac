"""Scans: the record of many audited checkpoints, and what can be read from it.

The rows are written by :class:`ScanWriter` and read by :class:`ScanResult`; the extra
``fadiag-fast[scan]`` installs what both need.
"""

from .._common.extras import MissingExtra
from .driver import scan
from .errors import LockedResults, NewerResults, ResultsError, UnreadableResults, UnwritableResults
from .hashing import ContentHasher, config_hash, content_hash
from .pipeline import Progress
from .records import CheckpointRecord
from .results import FirstFired, FrozenComparison, Moment, ScanCounts, ScanResult, Trend
from .run_names import Entry, Pattern, SeriesError, read_manifest, series
from .schema import SCHEMA_VERSION
from .thresholds import ThresholdSweep, sweep_thresholds
from .writer import ScanWriter

__all__ = [
    "SCHEMA_VERSION",
    "CheckpointRecord",
    "ContentHasher",
    "Entry",
    "FirstFired",
    "FrozenComparison",
    "LockedResults",
    "MissingExtra",
    "Moment",
    "NewerResults",
    "Pattern",
    "Progress",
    "ResultsError",
    "ScanCounts",
    "ScanResult",
    "ScanWriter",
    "SeriesError",
    "ThresholdSweep",
    "Trend",
    "UnreadableResults",
    "UnwritableResults",
    "config_hash",
    "content_hash",
    "read_manifest",
    "scan",
    "series",
    "sweep_thresholds",
]
