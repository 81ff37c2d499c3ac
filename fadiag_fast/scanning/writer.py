"""Write a scan's folder: batches as they finish, tables on closing, one writer at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from .._common.extras import arrow, parquet
from ..protocol import DiagnosticThresholds, Protocol, check_protocol
from . import seals
from .errors import ResultsError
from .folder import Disk, LockedFolder, sealed
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
from .run_names import Entry
from .schema import (
    LAYER_FIGURES,
    checkpoint_schema,
    layer_schema,
    part_schema,
)
from .store import (
    CHECKPOINTS_FILE,
    JUDGED_BY,
    LAYERS_FILE,
    PARTS,
    Tables,
    first_of_each_record,
    first_record,
    flattened,
    joined_table,
    judge,
    layers_by_record,
    natural_place,
    numbers,
    part_files,
    read_file,
    read_tables,
    table_of,
)

_SMALL_PART = "part-0-"


# As many parts of a few rows each, as a slow scan writes them, become one. Full parts stay as they
# are until the tables are written, so that memory holds few rows at a time.
_FAN_IN = 32


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
        table_of([])
        self._files = LockedFolder(self.folder, disk or Disk(), self._started)
        try:
            self._take_up()
        except BaseException:
            self._files.release()
            raise

    # -- what is there

    def _take_up(self) -> None:
        self._files.remove_leftovers()
        if (self.folder / CHECKPOINTS_FILE).exists() or part_files(self.folder):
            tables = read_tables(self.folder)
            names = ["record", "path", "status", "content_hash", "config_hash", "config"]
            names += [*_PLACE, "measured_accuracy", "num_samples"]
            # In the order of writing, so that the last row of a path is the one remembered.
            for row in tables.checkpoints.select(names).sort_by("record").to_pylist():
                self._remember(row)
            self._dirty = bool(part_files(self.folder))
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
        table = table_of(self._waiting)
        try:
            self._files.put_part(self._part_path(table), table)
            self._waiting.clear()
            self._dirty = True
            self._join_parts()
        except OSError as error:
            raise self._files.unwritable(error, len(self._waiting)) from error

    def _part_path(self, table: Any) -> Path:
        full = int(table.num_rows >= self._flush_rows)
        first = int(numbers(table, "record")[0])
        return self.folder / PARTS / f"part-{full}-{first:012d}.arrow"

    def _join_parts(self) -> None:
        """Join small parts to a larger one where they have piled up."""
        paths = [path for path in part_files(self.folder) if path.name.startswith(_SMALL_PART)]
        if len(paths) < _FAN_IN:
            return
        tables = [read_file(path, part_schema()) for path in paths]
        table = first_of_each_record(arrow().concat_tables(tables)).sort_by("record")
        joined = self._part_path(table)
        self._files.put_part(joined, table)
        for path in paths:
            if path != joined:
                self._files.remove(path)
        del tables, table
        arrow().default_memory_pool().release_unused()

    def close(self) -> None:
        """Flush, join all parts to the two tables, and let go of the folder.

        Raises:
            UnwritableResults: the disk refused; what was flushed before is readable as it is, and
                the next scan joins it.
        """
        if not self._files.is_held:
            return
        try:
            self.flush()
            self._merge()
        except OSError as error:
            raise self._files.unwritable(error, len(self._waiting)) from error
        finally:
            self._files.release()

    def _merge(self) -> None:
        parts = sorted(part_files(self.folder), key=lambda path: first_record(path.name))
        alone = parts and not (self.folder / CHECKPOINTS_FILE).exists()
        if alone and self._come_in_turn(parts):
            # So a scan brings its rows, and memory does not grow with the study.
            pieces = joined_table(read_file(path, part_schema()) for path in parts)
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
        """Return whether the tables can be written part by part, each row as it stands.

        That is in natural order, once for each path and configuration, and judged as it should be.
        """
        names = ("record", "run", "step", "path", "config_hash")
        last_record, last_place = -1, None
        # By their hashes, which take less memory: two that meet only send the rows the longer way.
        seen: set[int] = set()
        for path in parts:
            part = read_file(path, part_schema(), (*names, *JUDGED_BY))
            columns = (part[name].to_pylist() for name in names)
            for record, *place_of in zip(*columns, strict=True):
                place, row = natural_place(*place_of), hash(tuple(place_of[2:]))
                unsorted = last_place is not None and place <= last_place
                if record <= last_record or unsorted or row in seen:
                    return False
                last_record, last_place = record, place
                seen.add(row)
            judged = part.select(JUDGED_BY).group_by(JUDGED_BY).aggregate([])
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
        checkpoints, layers = (sealed(sink, blank) for sink in sinks)
        # Layers first: a checkpoint without its layers would look like a damaged table.
        self._files.put(self.folder / LAYERS_FILE, layers)
        self._files.put(self.folder / CHECKPOINTS_FILE, checkpoints)
        for path in parts:
            self._files.remove(path)
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
        rows = checkpoints.select(JUDGED_BY).to_pylist()
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
