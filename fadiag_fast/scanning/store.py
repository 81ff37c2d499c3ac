"""The folder of a scan: written so that no moment of being killed costs more than the last batch.

    checkpoints.parquet, layers.parquet   the tables, as of the last time a scan was closed
    parts/part-FULL-RECORD.arrow          batches finished since; a row is a checkpoint with layers
    scan.lock, scan.owner.json            held while a scan writes; who holds it

Parts are Arrow files: of a few rows with many columns, they are written and read more quickly than
Parquet. Every file is written under another name, synced and renamed into place, so that it is
there whole or not at all. Rows are only ever added, each with a higher record number; of several
rows for one path and configuration the highest stands. That makes every order of files correct: a
part that is still there after its rows went into the tables changes nothing. Parts are joined to
larger ones as they pile up, and to the tables on closing; only then are they removed.

Every file has a checksum of all its bytes in its metadata (see :mod:`.seals`), which reading
compares: a bit that flipped on the disk is an error that names the file.

Reading takes no lock. A reader looks at the parts first and at the tables after, so that rows on
their way from the ones to the others are seen at least once.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..checkpoints.errors import printable
from ..checkpoints.opening import check_regular
from ..protocol import DiagnosticThresholds, Protocol, check_protocol
from . import seals
from .extras import arrow, compute, parquet, require
from .hashing import config_hash, config_text
from .records import (
    AUDITED,
    CheckpointRecord,
    Row,
    clean,
    fields_text,
    figures_of,
    judgement,
    protocol_of,
    row_of,
    thresholds_of,
    utc_now,
)
from .schema import (
    LAYER_FIGURES,
    SCHEMA_VERSION,
    VERSION_KEY,
    checkpoint_schema,
    layer_schema,
    part_schema,
)
from .series import Entry, natural_key

CHECKPOINTS_FILE, LAYERS_FILE = "checkpoints.parquet", "layers.parquet"
_PARTS, _LOCK, _OWNER = "parts", "scan.lock", "scan.owner.json"
_SMALL_PART = "part-0-"
_PART_NAME = re.compile(r"part-(\d+)-(\d+)\.arrow")
_TEMPORARY = ".partial"

# As many parts of a few rows each, as a slow scan writes them, become one. Full parts stay as they
# are until the tables are written, so that memory holds few rows at a time.
_FAN_IN = 32

# A table's row groups have about as many rows: fewer cost a hundred columns' headers each time, and
# more would let memory grow.
_GROUP_ROWS = 1024

# What says by which limits a row was judged, if it was.
_JUDGED_BY = [
    "status",
    "protocol",
    "gradient_floor",
    "a_threshold",
    "b_threshold",
    "c_threshold",
    "d_threshold",
    "min_batches",
    "credit_gain_floor",
]

# A reader that meets files on their way from parts to tables looks again; each look is a whole one.
_READ_ATTEMPTS = 8


class ResultsError(RuntimeError):
    """Report that a scan's folder cannot be used as asked."""


class UnreadableResults(ResultsError):
    """Report a folder without a scan in it, or with a damaged one."""


class NewerResults(ResultsError):
    """Report rows that a later version of fadiag_fast has written."""


class UnwritableResults(ResultsError):
    """Report that rows could not be written; those written before are as readable as ever."""


class LockedResults(ResultsError):
    """Report that another scan is writing into the folder."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, fit for a message."""
    lines = str(error).strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__


class Disk:
    """The operations on files; each either happens or does not.

    One object, so that tests can stop between any two of them.
    """

    def write(self, path: Path, data: Any) -> None:
        """Write a new file and wait until it is on the disk."""
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def rename(self, source: Path, target: Path) -> None:
        """Put a file in another's place, at once."""
        os.replace(source, target)

    def sync_folder(self, folder: Path) -> None:
        """Wait until the names in a folder are on the disk."""
        if os.name == "nt":  # where folders cannot be opened, and renaming waits by itself
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        """Remove a file that may be gone already."""
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------
# Reading


class _Moved(Exception):
    """Files changed while they were read."""


@dataclass(frozen=True)
class Tables:
    """A scan's rows as Arrow tables, in natural order; layers in the order of their checkpoints.

    Of several rows for one path and configuration only the last is here.
    """

    checkpoints: Any
    layers: Any


def read_tables(folder: str | os.PathLike[str]) -> Tables:
    """Read a scan's folder, whether its scan is done, was killed or is running.

    Raises:
        UnreadableResults: there is no scan in it, or a file is damaged.
        NewerResults: a later version wrote it.
    """
    folder = Path(folder)
    # A scan that has just begun has nothing but its lock.
    begun = (folder / CHECKPOINTS_FILE).exists() or (folder / _LOCK).exists()
    if not begun and not _part_files(folder):
        what = "a folder without one" if folder.is_dir() else "no folder"
        raise UnreadableResults(
            f"scan results: {folder}: expected a scan's folder with {CHECKPOINTS_FILE}, got {what}"
        )
    for attempt in range(_READ_ATTEMPTS):
        try:
            return _read_once(folder)
        except (_Moved, FileNotFoundError):
            time.sleep(0.01 * attempt)
    raise UnreadableResults(
        f"scan results: {folder}: expected as many layers as its checkpoints have, got others: "
        f"{CHECKPOINTS_FILE} and {LAYERS_FILE} do not belong together; scan again into a new folder"
    )


def _part_files(folder: Path) -> list[Path]:
    """Return the parts, by record number and then level."""
    try:
        names = os.listdir(folder / _PARTS)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [(int(match[2]), int(match[1]), name) for name in names if (match := _part(name))]
    return [folder / _PARTS / name for _, _, name in sorted(found)]


def _part(name: str) -> re.Match[str] | None:
    return _PART_NAME.fullmatch(name)


def _first_record(name: str) -> int:
    match = _part(name)
    assert match is not None
    return int(match[2])


def _read_file(path: Path, schema: Any, names: Sequence[str] | None = None) -> Any:
    """Read one file into a schema: older versions lack columns, which are then empty.

    Args:
        path: a part or a table.
        schema: of its kind.
        names: of a part's columns, where not all are needed.
    """
    pa = arrow()
    check_regular(path, UnreadableResults, f"scan results: {path}")
    if names is not None:
        fields = [schema.field(index) for index in sorted(map(schema.get_field_index, names))]
        schema = pa.schema(fields, metadata=schema.metadata)
    try:
        # Not a file of Python's: Arrow's threads let go of one when they like, and a process that
        # is just ending then aborts.
        with pa.OSFile(os.fsencode(path), "rb") as file:
            data = file.read_buffer()
        sealed = seals.check(data)
        if path.suffix == ".arrow":
            table = _read_part(data, names)
        else:
            table = parquet().ParquetFile(pa.BufferReader(data)).read()
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise UnreadableResults(f"scan results: {path}: cannot be opened ({error})") from None
    # A damaged file may make Arrow say anything.
    except (pa.ArrowException, seals.BrokenSeal, OSError, ValueError, KeyError) as error:
        which = "it" if path.suffix == ".arrow" else f"{CHECKPOINTS_FILE} and {LAYERS_FILE}"
        raise UnreadableResults(
            f"scan results: {path}: expected a readable table, got a damaged one "
            f"({first_line(error)}); remove {which}, and the next scan audits the checkpoints again"
        ) from None
    version = (table.schema.metadata or {}).get(VERSION_KEY)
    if version is None or not version.isdigit():
        raise UnreadableResults(f"scan results: {path}: expected a table of a scan, got another")
    if int(version) > SCHEMA_VERSION:
        raise NewerResults(
            f"scan results: {path}: expected schema version {SCHEMA_VERSION} or older, got "
            f"{int(version)}: a later fadiag_fast wrote it; update fadiag_fast to read it"
        )
    if not sealed:
        _say_unsealed(path)
    same = table.schema.equals(schema)
    return table.replace_schema_metadata(schema.metadata) if same else _conform(table, schema)


# Folders of which it was said that their tables have no checksum.
_told: set[Path] = set()


def _say_unsealed(path: Path) -> None:
    from ..training.alarms import user_level

    folder = path.parent.parent if path.suffix == ".arrow" else path.parent
    if folder not in _told:
        _told.add(folder)
        warnings.warn(
            f"scan results: {folder}: an earlier fadiag_fast wrote its tables, without checksums: "
            f"damage to the files may go unnoticed; the next scan that writes there adds them",
            UserWarning,
            stacklevel=user_level(),
        )


def _read_part(data: Any, names: Sequence[str] | None) -> Any:
    ipc = require("pyarrow.ipc", "a scan's tables")
    # Small columns are read sooner than threads are woken.
    options = ipc.IpcReadOptions(use_threads=False)
    reader = ipc.open_file(data, options=options)
    if names is not None:
        known = enumerate(reader.schema.names)
        options.included_fields = [index for index, name in known if name in names]
        reader = ipc.open_file(data, options=options)
    return reader.read_all()


def _conform(table: Any, schema: Any) -> Any:
    pa = arrow()
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _read_once(folder: Path) -> Tables:
    pa = arrow()
    parts = [_read_file(path, part_schema()) for path in _part_files(folder)]
    tables = []
    for name, schema in ((CHECKPOINTS_FILE, checkpoint_schema()), (LAYERS_FILE, layer_schema())):
        try:
            tables.append(_read_file(folder / name, schema))
        except FileNotFoundError:
            tables.append(schema.empty_table())
    checkpoints, layers = tables
    if parts:
        part = _first_of_each_record(pa.concat_tables(parts))
        fresh = _without(part, checkpoints)
        checkpoints = pa.concat_tables([checkpoints, fresh.drop_columns(["layers"])])
        layers = pa.concat_tables([layers, flattened(_without(part, layers))])
    checkpoints = _latest(checkpoints)
    layers = _ordered_layers(layers, checkpoints)
    if layers.num_rows != (compute().sum(checkpoints["num_layers"]).as_py() or 0):
        raise _Moved
    return Tables(checkpoints.combine_chunks(), layers.combine_chunks())


def _numbers(table: Any, column: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(table[column].to_numpy(), dtype=np.int64)


def _first_of_each_record(part: Any) -> Any:
    """Drop rows that stand in a part and in the larger one that it was joined to."""
    _, first = np.unique(_numbers(part, "record"), return_index=True)
    return part if len(first) == part.num_rows else part.take(arrow().array(np.sort(first)))


def _without(part: Any, table: Any) -> Any:
    """Drop the rows of a part that a table has already."""
    known = np.isin(_numbers(part, "record"), _numbers(table, "record"))
    return part.filter(arrow().array(~known)) if known.any() else part


def _table_of(rows: Sequence[Row]) -> Any:
    """Return rows of a part as a table.

    They are turned into columns in one call: arrow's own way makes three for each of a hundred, and
    all leave the interpreter's lock, for which a scan's readers wait in a row.
    """
    pa, schema = arrow(), part_schema()
    structs = pa.array(rows, type=pa.struct(list(schema)))
    batch = pa.RecordBatch.from_struct_array(structs)
    return pa.Table.from_batches([batch]).replace_schema_metadata(schema.metadata)


def _joined(parts: Iterable[Any]) -> Iterator[Any]:
    """Join parts until they have so many rows as a table's row group is worth its own tables."""
    held: list[Any] = []
    for part in parts:
        held.append(part)
        if sum(table.num_rows for table in held) >= _GROUP_ROWS:
            yield arrow().concat_tables(held)
            held = []
    if held:
        yield arrow().concat_tables(held)


def flattened(part: Any) -> Any:
    """Return the layers nested in a part's rows as rows of their own."""
    pa, pc = arrow(), compute()
    column = part["layers"].combine_chunks()
    parents = pc.list_parent_indices(column)
    inner = column.flatten()
    figures = dict(zip((c.name for c in LAYER_FIGURES), inner.flatten(), strict=True))
    columns = [
        figures[field.name] if field.name in figures else part[field.name].take(parents)
        for field in layer_schema()
    ]
    return pa.table(columns, schema=layer_schema())


def _natural_place(run: str, step: int | None, path: str, config: str) -> tuple[Any, ...]:
    return (natural_key(run), step is None, step or 0, natural_key(path), config)


def _latest(checkpoints: Any) -> Any:
    """Keep the last row of each path and configuration, in natural order of run, step and path."""
    last: dict[tuple[str, str], int] = {}
    columns = [checkpoints[name].to_pylist() for name in ("path", "config_hash", "record")]
    for index, (path, config, record) in enumerate(zip(*columns, strict=True)):
        other = last.get((path, config))
        if other is None or columns[2][other] < record:
            last[path, config] = index
    runs, steps = checkpoints["run"].to_pylist(), checkpoints["step"].to_pylist()
    paths, configs, records = columns

    def key(index: int) -> tuple[Any, ...]:
        place = _natural_place(runs[index], steps[index], paths[index], configs[index])
        return (*place, records[index])

    return _taken(checkpoints, np.array(sorted(last.values(), key=key), dtype=np.int64))


def _taken(table: Any, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Any:
    """Return rows of a table in this order; the table itself, not a copy, where it is so."""
    if np.array_equal(rows, np.arange(table.num_rows)):
        return table
    return table.take(arrow().array(rows))


def _ordered_layers(layers: Any, checkpoints: Any) -> Any:
    """Keep the layers of the given checkpoints, in their order."""
    wanted = _numbers(checkpoints, "record")
    by_record = np.argsort(wanted)
    records = _numbers(layers, "record")
    at = np.searchsorted(wanted, records, sorter=by_record)
    at = np.minimum(at, max(len(wanted) - 1, 0))
    if len(wanted) == 0:
        return layers.slice(0, 0)
    rank = by_record[at]
    kept = np.flatnonzero(wanted[rank] == records)
    order = np.lexsort((_numbers(layers, "layer")[kept], rank[kept]))
    return _taken(layers, kept[order])


def layers_by_record(layers: Any) -> dict[int, tuple[int, int]]:
    """Return per record where its layers begin and how many there are, in an ordered table."""
    records = _numbers(layers, "record")
    if len(records) == 0:
        return {}
    starts = np.flatnonzero(np.r_[True, records[1:] != records[:-1]])
    counts = np.diff(np.r_[starts, len(records)])
    return {
        int(records[start]): (int(start), int(count))
        for start, count in zip(starts, counts, strict=True)
    }


# ------------------------------------------------------------------------------------------------
# Writing


@dataclass
class _Known:
    """What a writer remembers of the last row of a path."""

    record: int
    content_hash: str | None
    config_hash: str
    row: tuple[Any, ...]


# What a row says beyond content and configuration.
_PLACE = (
    *("run", "step", "fields", "accuracy", "frozen_accuracy", "frozen_run"),
    *("test_size", "frozen_test_size"),
)


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a row says beyond content and configuration, to see whether it still holds."""
    return tuple(row[name] for name in _PLACE)


def test_size_of(entry: Entry, measured: float | None, num_samples: int | None) -> int | None:
    """Return how many images are behind the accuracy that a row judges; None if not known."""
    if entry.accuracy is not None or entry.test_size is not None:
        return entry.test_size
    return None if measured is None else num_samples


class ScanWriter:
    """Write the rows of a scan into a folder, as they come, and take up what is there.

    A context manager; one writer per folder at a time. After a kill, open another on the same
    folder and skip what :meth:`done` or :meth:`reuse` know.

    Args:
        folder: where the tables are or will be; made if need be.
        thresholds: the limits to judge by. Rows that were judged by others are judged again, from
            their figures, when the writer is closed.
        protocol: by which to judge; the same holds for rows judged by another.
        flush_rows: rows that may wait in memory.
        flush_seconds: how long they may wait, looked at when the next one comes.
        disk: the file operations, for tests.

    Attributes:
        rejudged: stored rows that were judged again.

    Raises:
        LockedResults: another scan is writing here; the message says which.
        NewerResults: a later version wrote here.
        UnreadableResults: a file is damaged.
        UnwritableResults: the folder cannot be written.
        MissingExtra: pyarrow or filelock is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        thresholds: DiagnosticThresholds | None = None,
        protocol: Protocol = "paper",
        flush_rows: int = 128,
        flush_seconds: float = 2.0,
        disk: Disk | None = None,
    ) -> None:
        self.folder = Path(folder)
        check_protocol(protocol, "ScanWriter")
        self.thresholds = thresholds or DiagnosticThresholds()
        self.protocol: Protocol = protocol
        self._flush_rows = flush_rows
        self._flush_seconds = flush_seconds
        self._disk = disk or Disk()
        self._started = utc_now()
        self._last_flush = time.monotonic()
        self._waiting: list[Row] = []
        self._configs: dict[str, str] = {}
        self._audited: dict[tuple[str, str], int] = {}
        self._paths: dict[str, _Known] = {}
        self._next_record = 0
        self._measured: dict[int, float] = {}
        self._samples: dict[int, int | None] = {}
        # The folder's rows, read when an earlier audit is given to another entry.
        self._tables: Tables | None = None
        self._stored_at: dict[int, tuple[int, int, int]] | None = None
        self._dirty = False
        self.rejudged = 0
        # The first rows make arrow import pandas, where there is one: 0.2 seconds alone, and
        # many times that while readers compete for the interpreter.
        _table_of([])
        try:
            (self.folder / _PARTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        self._lock = self._acquire()
        try:
            self._take_up()
        except BaseException:
            self._release()
            raise

    # -- the lock

    def _acquire(self) -> Any:
        filelock = require("filelock", "a scan's folder")
        lock = filelock.FileLock(self.folder / _LOCK, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise LockedResults(
                f"scan results: {self.folder}: expected to write here alone, got another scan "
                f"at it ({_owner_text(self.folder / _OWNER)}); wait for it to end, or choose "
                f"another folder"
            ) from None
        except OSError as error:
            raise self._unwritable(error) from error
        owner = {
            "pid": os.getpid(),
            "host": platform.node(),
            "since": self._started.isoformat(timespec="seconds"),
        }
        try:
            self._put(self.folder / _OWNER, json.dumps(owner).encode())
        except BaseException:
            lock.release()
            raise
        return lock

    def _release(self) -> None:
        try:
            self._disk.remove(self.folder / _OWNER)
        finally:
            self._lock.release()

    # -- what is there

    def _take_up(self) -> None:
        for folder in (self.folder, self.folder / _PARTS):
            for path in folder.glob(f".*{_TEMPORARY}"):
                self._disk.remove(path)
        if (self.folder / CHECKPOINTS_FILE).exists() or _part_files(self.folder):
            tables = read_tables(self.folder)
            names = ["record", "path", "status", "content_hash", "config_hash", "config"]
            names += [*_PLACE, "measured_accuracy", "num_samples"]
            # In the order of writing, so that the last row of a path is the one remembered.
            for row in tables.checkpoints.select(names).sort_by("record").to_pylist():
                self._remember(row)
            self._dirty = bool(_part_files(self.folder))
        else:
            self._dirty = True

    def _remember(self, row: Mapping[str, Any]) -> None:
        record, config = row["record"], row["config_hash"]
        self._next_record = max(self._next_record, record + 1)
        if row["config"] is not None:
            self._configs.setdefault(config, row["config"])
        if row["status"] == AUDITED:
            self._audited[row["content_hash"], config] = record
            if row["measured_accuracy"] is not None:
                self._measured[record] = row["measured_accuracy"]
                self._samples[record] = row["num_samples"]
        self._paths[row["path"]] = _Known(record, row["content_hash"], config, _place(row))

    def configure(self, config: Mapping[str, Any]) -> str:
        """Make a probe's configuration known, and return its hash for the records.

        See :func:`fadiag_fast.scanning.config_hash` on what belongs in it.
        """
        digest = config_hash(config)
        self._configs[digest] = clean(config_text(config))
        return digest

    def done(self, content_hash: str, config_hash: str) -> bool:
        """Return whether this content was audited under this configuration, whatever its name.

        A failure does not count: permissions, memory and installed packages change, and to find a
        broken file broken again costs little.
        """
        return (content_hash, config_hash) in self._audited

    def reuse(self, entry: Entry, content_hash: str, config_hash: str) -> bool:
        """Give an entry the figures of an earlier audit of the same content, if there is one.

        The row is new where the path, its run, step or accuracies are, and judged anew; where
        nothing changed there is nothing to write. So runs that start from the same weights each
        have their first point, and a file that was moved keeps its figures.

        Returns:
            Whether there was one; if not, the checkpoint has to be audited.
        """
        record = self._audited.get((content_hash, config_hash))
        if record is None:
            return False
        measured = self._measured.get(record)
        accuracy = measured if entry.accuracy is None else entry.accuracy
        test_size = test_size_of(entry, measured, self._samples.get(record))
        changed = {
            "run": clean(entry.run),
            "step": entry.step,
            "fields": fields_text(entry.fields),
            "accuracy": accuracy,
            "frozen_accuracy": entry.frozen_accuracy,
            "frozen_run": None if entry.frozen_run is None else clean(entry.frozen_run),
            "test_size": test_size,
            "frozen_test_size": entry.frozen_test_size,
        }
        path = clean(entry.path)
        known = self._paths.get(path)
        if (
            known is not None
            and (known.content_hash, known.config_hash) == (content_hash, config_hash)
            and known.row == _place(changed)
        ):
            return True
        row, layers = self._stored(record)
        figures = replace(
            figures_of(row, layers),
            headline_acc=accuracy,
            frozen_baseline_acc=entry.frozen_accuracy,
            test_size=test_size,
            frozen_test_size=entry.frozen_test_size,
        )
        self._append(
            {
                **row,
                **changed,
                **judgement(figures, self.thresholds, self.protocol),
                "path": path,
                "layers": layers,
                # Only the time of an audit counts as the scan's cost.
                "seconds": 0.0,
                "finished_at": utc_now(),
            }
        )
        return True

    def _stored(self, record: int) -> tuple[Row, list[Row]]:
        """Return an audited row and its layers, from memory or from the folder."""
        for row in self._waiting:
            if row["record"] == record:
                return row, row["layers"]
        if self._stored_at is None or record not in self._stored_at:
            self._tables = read_tables(self.folder)
            records = self._tables.checkpoints["record"].to_pylist()
            spans = layers_by_record(self._tables.layers)
            self._stored_at = {r: (i, *spans.get(r, (0, 0))) for i, r in enumerate(records)}
        assert self._tables is not None
        index, start, count = self._stored_at[record]
        (row,) = self._tables.checkpoints.slice(index, 1).to_pylist()
        names = [column.name for column in LAYER_FIGURES]
        return row, self._tables.layers.select(names).slice(start, count).to_pylist()

    # -- rows

    def add(self, *records: CheckpointRecord) -> None:
        """Take the outcome of checkpoints; they are on the disk after the next :meth:`flush`.

        Raises:
            ValueError: a configuration that :meth:`configure` was not told of.
            UnwritableResults: it was time to flush, and the disk refused; the rows still wait.
        """
        for record in records:
            if record.config_hash not in self._configs:
                raise ValueError(
                    f"ScanWriter: {record.path}: expected a config_hash from configure(), got "
                    f"{record.config_hash!r}"
                )
            self._append(row_of(record, self.thresholds, self.protocol))
        waited = time.monotonic() - self._last_flush
        if len(self._waiting) >= self._flush_rows or waited > self._flush_seconds:
            self.flush()

    def _append(self, row: Row) -> None:
        row["record"] = self._next_record
        row["config"] = self._configs[row["config_hash"]]
        row["session_started_at"] = self._started
        for name in (*_PLACE, "num_samples"):
            row.setdefault(name, None)
        self._waiting.append(row)
        self._remember(row)

    def flush(self) -> None:
        """Put the rows that wait on the disk, as one part that is there whole or not at all.

        Raises:
            UnwritableResults: the disk is full, say. Earlier rows stay readable, and these wait:
                call again once there is room.
        """
        self._last_flush = time.monotonic()
        if not self._waiting:
            return
        table = _table_of(self._waiting)
        try:
            self._put_part(self._part_path(table), table)
            self._waiting.clear()
            self._dirty = True
            self._join_parts()
        except OSError as error:
            raise self._unwritable(error) from error

    def _part_path(self, table: Any) -> Path:
        full = int(table.num_rows >= self._flush_rows)
        first = int(_numbers(table, "record")[0])
        return self.folder / _PARTS / f"part-{full}-{first:012d}.arrow"

    def _join_parts(self) -> None:
        """Join small parts to a larger one where they have piled up."""
        paths = [path for path in _part_files(self.folder) if path.name.startswith(_SMALL_PART)]
        if len(paths) < _FAN_IN:
            return
        tables = [_read_file(path, part_schema()) for path in paths]
        table = _first_of_each_record(arrow().concat_tables(tables)).sort_by("record")
        joined = self._part_path(table)
        self._put_part(joined, table)
        for path in paths:
            if path != joined:
                self._disk.remove(path)
        del tables, table
        arrow().default_memory_pool().release_unused()

    def close(self) -> None:
        """Flush, join all parts to the two tables, and let go of the folder.

        Raises:
            UnwritableResults: the disk refused; what was flushed before is readable as it is, and
                the next scan joins it.
        """
        if self._lock is None:
            return
        try:
            self.flush()
            self._merge()
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            self._release()
            self._lock = None

    def _merge(self) -> None:
        parts = sorted(_part_files(self.folder), key=lambda path: _first_record(path.name))
        alone = parts and not (self.folder / CHECKPOINTS_FILE).exists()
        if alone and self._come_in_turn(parts):
            # So a scan brings its rows, and memory does not grow with the study.
            pieces = _joined(_read_file(path, part_schema()) for path in parts)
            self._finish(
                parts, ((piece.drop_columns(["layers"]), flattened(piece)) for piece in pieces)
            )
            return
        if not self._dirty and not parts:
            tables = read_tables(self.folder)
            if not self._judged_by_others(tables.checkpoints):
                return
        elif parts or (self.folder / CHECKPOINTS_FILE).exists():
            tables = read_tables(self.folder)
        else:
            tables = Tables(checkpoint_schema().empty_table(), layer_schema().empty_table())
        tables = self._judged(tables)
        self._finish(parts, [(tables.checkpoints, tables.layers)])

    def _come_in_turn(self, parts: Sequence[Path]) -> bool:
        """Say whether the tables can be written part by part, each row as it stands.

        That is in natural order, once for each path and configuration, and judged as it should be.
        """
        names = ("record", "run", "step", "path", "config_hash")
        last_record, last_place = -1, None
        # By their hashes, which take less memory: two that meet only send the rows the longer way.
        seen: set[int] = set()
        for path in parts:
            part = _read_file(path, part_schema(), (*names, *_JUDGED_BY))
            columns = (part[name].to_pylist() for name in names)
            for record, *place_of in zip(*columns, strict=True):
                place, row = _natural_place(*place_of), hash(tuple(place_of[2:]))
                unsorted = last_place is not None and place <= last_place
                if record <= last_record or unsorted or row in seen:
                    return False
                last_record, last_place = record, place
                seen.add(row)
            judged = part.select(_JUDGED_BY).group_by(_JUDGED_BY).aggregate([])
            if self._judged_by_others(judged):
                return False
        return True

    def _finish(self, parts: Sequence[Path], pieces: Iterable[tuple[Any, Any]]) -> None:
        """Write both tables from their pieces, and remove the parts that are in them."""
        sinks = [arrow().BufferOutputStream() for _ in range(2)]
        blank = seals.unsealed()
        schemas = [
            schema.with_metadata({**schema.metadata, **blank})
            for schema in (checkpoint_schema(), layer_schema())
        ]
        with ExitStack() as writers:
            files = [
                writers.enter_context(parquet().ParquetWriter(sink, schema, compression="zstd"))
                for sink, schema in zip(sinks, schemas, strict=True)
            ]
            for piece in pieces:
                for file, table in zip(files, piece, strict=True):
                    file.write_table(table)
        checkpoints, layers = (_sealed(sink, blank) for sink in sinks)
        # Layers first: a checkpoint without its layers would look like a damaged table.
        self._put(self.folder / LAYERS_FILE, layers)
        self._put(self.folder / CHECKPOINTS_FILE, checkpoints)
        for path in parts:
            self._disk.remove(path)
        # Whoever reads the tables next should not find their memory still held by arrow's pool.
        arrow().default_memory_pool().release_unused()

    def _judged_by_others(self, checkpoints: Any) -> list[int]:
        """Return the audited rows that were judged by other limits than this writer's."""
        mine = self.thresholds
        limits = {
            "a_threshold": mine.scale_growth,
            "c_threshold": mine.direction_stability,
            "d_threshold": mine.depth_utility,
            "min_batches": mine.min_batches,
            "credit_gain_floor": mine.credit_gain_floor,
        }
        rows = checkpoints.select(_JUDGED_BY).to_pylist()
        return [
            index
            for index, row in enumerate(rows)
            if row["status"] == AUDITED
            and (
                any(row[name] != limit for name, limit in limits.items())
                or thresholds_of(row).gradient_floor != mine.gradient_floor
                or protocol_of(row) != self.protocol
            )
        ]

    def _judged(self, tables: Tables) -> Tables:
        others = self._judged_by_others(tables.checkpoints)
        self.rejudged += len(others)
        return judge(tables, self.thresholds, others, self.protocol) if others else tables

    def __enter__(self) -> ScanWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except ResultsError:
            # What ended the scan says more than what then went wrong with its last rows.
            if error is None:
                raise

    # -- files

    def _put_part(self, path: Path, table: Any) -> None:
        sink = arrow().BufferOutputStream()
        ipc = require("pyarrow.ipc", "a scan's tables")
        # A part is gone when the scan is over. With zstd, a fourth smaller, each of some hundred
        # small columns costs a context: five times the time to write, and four times to read.
        # And to wake a thread for each takes longer than to do it here.
        options = ipc.IpcWriteOptions(compression="lz4", use_threads=False)
        blank = seals.unsealed()
        schema = table.schema.with_metadata({**table.schema.metadata, **blank})
        with ipc.new_file(sink, schema, options=options) as file:
            file.write_table(table)
        self._put(path, _sealed(sink, blank))

    def _put(self, path: Path, data: Any) -> None:
        temporary = path.with_name(f".{path.name}{_TEMPORARY}")
        try:
            self._disk.write(temporary, data)
            self._disk.rename(temporary, path)
            self._disk.sync_folder(path.parent)
        except OSError as error:
            with suppress(OSError):  # else the next writer cleans up
                self._disk.remove(temporary)
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UnwritableResults:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else f"it cannot be written ({error})"
        waiting = f"; {len(self._waiting)} rows wait to be written" if self._waiting else ""
        return UnwritableResults(
            f"scan results: {self.folder}: {what}{waiting}; what was written before stays "
            f"readable, and the same scan, started again, goes on from there"
        )


def _sealed(sink: Any, blank: Mapping[bytes, bytes]) -> bytearray:
    """Return what was written to a sink, with its checksum."""
    data = bytearray(sink.getvalue())
    seals.seal(data, blank)
    return data


def judge(
    tables: Tables,
    thresholds: DiagnosticThresholds,
    rows: Sequence[int] | None = None,
    protocol: Protocol = "paper",
) -> Tables:
    """Return the tables judged by other limits, from the figures that they hold.

    Args:
        tables: as :func:`read_tables` returns them.
        thresholds: the limits.
        rows: which checkpoints; None for all. Failed ones stay as they are.
        protocol: how.
    """
    pa = arrow()
    everything = tables.checkpoints.to_pylist()
    where = layers_by_record(tables.layers)
    read = ["name", "hidden_norm", "grad_norm", "credit_gain", "stability", "num_directions"]
    if protocol == "calibrated":
        read += ["sample_shape", "pooled_norm", "pooled_gain", "stability_error", "stability_null"]
    layers = tables.layers.select(read).to_pylist()
    for index in range(len(everything)) if rows is None else rows:
        row = everything[index]
        if row["status"] == AUDITED:
            start, count = where.get(row["record"], (0, 0))
            figures = figures_of(row, layers[start : start + count])
            row.update(judgement(figures, thresholds, protocol))
    checkpoints = pa.Table.from_pylist(everything, schema=checkpoint_schema())
    return Tables(checkpoints, tables.layers)


def _owner_text(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it left no name"
