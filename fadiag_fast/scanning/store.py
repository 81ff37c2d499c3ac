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

import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._common.extras import arrow, compute, parquet, require
from .._common.text import first_line
from .._common.warn import user_level
from ..checkpoints.errors import printable
from ..checkpoints.opening import check_regular
from ..protocol import DiagnosticThresholds, Figures, Protocol
from . import seals
from .errors import NewerResults, UnreadableResults
from .records import (
    AUDITED,
    Row,
    figures_of,
    judgement,
)
from .run_names import natural_key
from .schema import (
    LAYER_FIGURES,
    SCHEMA_VERSION,
    VERSION_KEY,
    checkpoint_schema,
    layer_schema,
    part_schema,
)

CHECKPOINTS_FILE, LAYERS_FILE = "checkpoints.parquet", "layers.parquet"
PARTS, LOCK, OWNER = "parts", "scan.lock", "scan.owner.json"
_PART_NAME = re.compile(r"part-(\d+)-(\d+)\.arrow")


# A table's row groups have about as many rows: fewer cost a hundred columns' headers each time, and
# more would let memory grow.
_GROUP_ROWS = 1024

# What says by which limits a row was judged, if it was.
JUDGED_BY = [
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
    begun = (folder / CHECKPOINTS_FILE).exists() or (folder / LOCK).exists()
    if not begun and not part_files(folder):
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


def part_files(folder: Path) -> list[Path]:
    """Return the parts, by record number and then level."""
    try:
        names = os.listdir(folder / PARTS)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [(int(match[2]), int(match[1]), name) for name in names if (match := _part(name))]
    return [folder / PARTS / name for _, _, name in sorted(found)]


def _part(name: str) -> re.Match[str] | None:
    return _PART_NAME.fullmatch(name)


def first_record(name: str) -> int:
    match = _part(name)
    assert match is not None
    return int(match[2])


def read_file(path: Path, schema: Any, names: Sequence[str] | None = None) -> Any:
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
            f"({printable(first_line(error))}); remove {which}, and the next scan audits the "
            f"checkpoints again"
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
    parts = [read_file(path, part_schema()) for path in part_files(folder)]
    tables = []
    for name, schema in ((CHECKPOINTS_FILE, checkpoint_schema()), (LAYERS_FILE, layer_schema())):
        try:
            tables.append(read_file(folder / name, schema))
        except FileNotFoundError:
            tables.append(schema.empty_table())
    checkpoints, layers = tables
    if parts:
        part = first_of_each_record(pa.concat_tables(parts))
        fresh = _without(part, checkpoints)
        checkpoints = pa.concat_tables([checkpoints, fresh.drop_columns(["layers"])])
        layers = pa.concat_tables([layers, flattened(_without(part, layers))])
    checkpoints = _latest(checkpoints)
    layers = _ordered_layers(layers, checkpoints)
    if layers.num_rows != (compute().sum(checkpoints["num_layers"]).as_py() or 0):
        raise _Moved
    return Tables(checkpoints.combine_chunks(), layers.combine_chunks())


def numbers(table: Any, column: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(table[column].to_numpy(), dtype=np.int64)


def first_of_each_record(part: Any) -> Any:
    """Drop rows that stand in a part and in the larger one that it was joined to."""
    _, first = np.unique(numbers(part, "record"), return_index=True)
    return part if len(first) == part.num_rows else part.take(arrow().array(np.sort(first)))


def _without(part: Any, table: Any) -> Any:
    """Drop the rows of a part that a table has already."""
    known = np.isin(numbers(part, "record"), numbers(table, "record"))
    return part.filter(arrow().array(~known)) if known.any() else part


def table_of(rows: Sequence[Row]) -> Any:
    """Return rows of a part as a table.

    They are turned into columns in one call: arrow's own way makes three for each of a hundred, and
    all leave the interpreter's lock, for which a scan's readers wait in a row.
    """
    pa, schema = arrow(), part_schema()
    structs = pa.array(rows, type=pa.struct(list(schema)))
    batch = pa.RecordBatch.from_struct_array(structs)
    return pa.Table.from_batches([batch]).replace_schema_metadata(schema.metadata)


def joined_table(parts: Iterable[Any]) -> Iterator[Any]:
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


def natural_place(run: str, step: int | None, path: str, config: str) -> tuple[Any, ...]:
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
        place = natural_place(runs[index], steps[index], paths[index], configs[index])
        return (*place, records[index])

    return _taken(checkpoints, np.array(sorted(last.values(), key=key), dtype=np.int64))


def _taken(table: Any, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Any:
    """Return rows of a table in this order; the table itself, not a copy, where it is so."""
    if np.array_equal(rows, np.arange(table.num_rows)):
        return table
    return table.take(arrow().array(rows))


def _ordered_layers(layers: Any, checkpoints: Any) -> Any:
    """Keep the layers of the given checkpoints, in their order."""
    wanted = numbers(checkpoints, "record")
    by_record = np.argsort(wanted)
    records = numbers(layers, "record")
    at = np.searchsorted(wanted, records, sorter=by_record)
    at = np.minimum(at, max(len(wanted) - 1, 0))
    if len(wanted) == 0:
        return layers.slice(0, 0)
    rank = by_record[at]
    kept = np.flatnonzero(wanted[rank] == records)
    order = np.lexsort((numbers(layers, "layer")[kept], rank[kept]))
    return _taken(layers, kept[order])


def layers_by_record(layers: Any) -> dict[int, tuple[int, int]]:
    """Return per record where its layers begin and how many there are, in an ordered table."""
    records = numbers(layers, "record")
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


def figures_in(
    tables: Tables, rows: Sequence[Row], protocol: Protocol = "paper"
) -> Iterator[Figures]:
    """Yield what a protocol reads of each row.

    Args:
        tables: as :func:`read_tables` returns them.
        rows: audited rows of its ``checkpoints``.
        protocol: which protocol's figures to read; others may be missing.
    """
    where = layers_by_record(tables.layers)
    # Where further chains of blocks begin is read off the growth.
    read = ["name", "hidden_norm", "growth", "grad_norm", "credit_gain", "stability"]
    read += ["num_directions"]
    if protocol == "calibrated":
        read += ["sample_shape", "pooled_norm", "pooled_gain", "stability_error", "stability_null"]
    layers = tables.layers.select(read).to_pylist()
    for row in rows:
        start, count = where.get(row["record"], (0, 0))
        yield figures_of(row, layers[start : start + count])


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
    chosen = everything if rows is None else [everything[index] for index in rows]
    audited = [row for row in chosen if row["status"] == AUDITED]
    for row, figures in zip(audited, figures_in(tables, audited, protocol), strict=True):
        row.update(judgement(figures, thresholds, protocol))
    checkpoints = pa.Table.from_pylist(everything, schema=checkpoint_schema())
    return Tables(checkpoints, tables.layers)
