"""Which training run a checkpoint belongs to, and at which step it was taken.

Either a pattern reads it off the path, or a manifest lists it. Files that match nothing are
scanned all the same: as part of the run named by their folder, at no step.
"""

from __future__ import annotations

import csv
import difflib
import io
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, time
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any

from .._common.extras import parquet, require
from ..checkpoints.errors import printable
from ..checkpoints.opening import check_regular
from ..checkpoints.remote import is_url

# Tried in this order where no pattern is given: a step says more than an iteration or an epoch, and
# a file's name more than its folder's.
DEFAULT_PATTERNS = (
    "{run}/step_{step}.*",
    "{run}/step-{step}.*",
    "{run}/step{step}.*",
    "{run}/*step={step}*.*",
    "{run}/*_step_{step}.*",
    "{run}/*_step{step}.*",
    "{run}/step_{step}",
    "{run}/step-{step}",
    "{run}/global_step{step}",
    "{run}/global_step_{step}",
    "{run}/checkpoint-{step}",
    "{run}/checkpoint_{step}.*",
    "{run}/checkpoint-{step}.*",
    "{run}/checkpoint_{step}",
    "{run}/iter_{step}.*",
    "{run}/*_iter_{step}.*",
    "{run}/iter_{step}",
    "{run}/epoch_{step}.*",
    "{run}/epoch-{step}.*",
    "{run}/epoch{step}.*",
    "{run}/*_epoch_{step}.*",
    "{run}/*_epoch{step}.*",
    "{run}/*epoch={step}*.*",
    "{run}/epoch_{step}",
    "{run}/step_{step}/*",
    "{run}/step-{step}/*",
    "{run}/global_step{step}/*",
    "{run}/global_step_{step}/*",
    "{run}/checkpoint-{step}/*",
    "{run}/checkpoint_{step}/*",
    "{run}/iter_{step}/*",
    "{run}/epoch_{step}/*",
    # Words that other numbers follow too: in such a folder a shard's, or a rank's.
    "{run}/model_{step}.*",
    "{run}/model-{step}.*",
    "{run}/ckpt_{step}.*",
    "{run}/ckpt-{step}.*",
)

_KNOWN = (
    "run",
    "step",
    "accuracy",
    "frozen_accuracy",
    "frozen_run",
    "test_size",
    "frozen_test_size",
)
_FIELD = re.compile(r"\{([^{}]*)\}")
_MOST_STEPS = 2**63 - 1  # that a table holds
_DIGITS = re.compile(r"(\d+)")


class SeriesError(ValueError):
    """Report a pattern or a manifest that does not say what it should."""


@dataclass(frozen=True)
class Entry:
    """One checkpoint to scan, and its place in the study.

    Attributes:
        path: where it is.
        run: the training run.
        step: its step; None where nothing says it.
        fields: whatever else the pattern or manifest says.
        accuracy: to be judged in place of the measured one, a fraction.
        frozen_accuracy: with frozen blocks, a fraction: evaluates (d).
        frozen_run: the run whose accuracy is the frozen baseline.
        matched: whether the pattern or the manifest knew it.
        test_size: images behind ``accuracy``.
        frozen_test_size: images behind ``frozen_accuracy``; None for as many.
    """

    path: str
    run: str
    step: int | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    accuracy: float | None = None
    frozen_accuracy: float | None = None
    frozen_run: str | None = None
    matched: bool = True
    test_size: int | None = None
    frozen_test_size: int | None = None


def natural_key(text: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sorting key by which ``step_9`` comes before ``step_10``."""
    return tuple(
        (0, int(piece), piece) if piece.isascii() and piece.isdigit() else (1, 0, piece)
        for piece in _DIGITS.split(text)
        if piece
    )


def series_key(entry: Any) -> tuple[Any, ...]:
    """Return the key that sorts by run, then step (none last), then path, all naturally."""
    step = entry.step
    return (natural_key(entry.run), step is None, step or 0, natural_key(entry.path))


class Pattern:
    """A path with fields in braces, such as ``{run}/step_{step}.pt``.

    ``{step}`` stands for digits. ``{run}`` stands for one folder or more, every other name for a
    piece of one folder's or file's name; ``*`` for any such piece that nobody needs. A pattern is
    matched against the end of a path, at the start of a name.

    Args:
        text: the pattern.
        decimals: whether ``{step}`` may be the whole part of a number: 3 of ``epoch_3.5.pt``.

    Raises:
        SeriesError: the pattern has no ``{run}`` or ``{step}``, a field that is nearly one of these
            (``{steps}``), a field twice, two fields with nothing between them, or unbalanced
            braces.
    """

    def __init__(self, text: str, decimals: bool = True) -> None:
        self.text = text
        pieces = _FIELD.split(text)
        literals, names = pieces[::2], pieces[1::2]
        for literal in literals:
            if "{" in literal or "}" in literal:
                raise self._error("expected every { to have its }")
        for name in names:
            if not name.isidentifier():
                raise self._error(f"expected a name in braces, got {{{name}}}")
            if names.count(name) > 1:
                raise self._error(f"expected {{{name}}} once, got it {names.count(name)} times")
        for name in names:
            near = difflib.get_close_matches(name.lower(), ("run", "step"), n=1, cutoff=0.75)
            if near and name not in near and near[0] not in names:
                raise self._error(f"expected {{{near[0]}}}, got {{{name}}}")
        if not {"run", "step"} & set(names):
            raise self._error("expected {run} or {step}, or both")
        for before, literal, after in zip(names, literals[1:], names[1:], strict=False):
            if not literal:
                raise self._error(
                    f"expected something between {{{before}}} and {{{after}}} to tell them apart"
                )
        self.names = tuple(names)
        expression = self._literal(literals[0])
        for name, literal in zip(names, literals[1:], strict=True):
            digits = r"\d+" if decimals else r"\d+(?!\.\d+(?:\.|$))"
            kind = {"step": digits, "run": r".+"}.get(name, r"[^/]+?")
            expression += f"(?P<{name}>{kind}){self._literal(literal)}"
        # {run} in front takes all folders there are: where it begins need not be looked for.
        before = "" if text.startswith("{run}") else "(?:^|.*?/)"
        self._expression = re.compile(f"{before}{expression}$", re.DOTALL)

    def _error(self, why: str) -> SeriesError:
        return SeriesError(f"pattern {self.text!r}: {why}, as in '{{run}}/step_{{step}}.pt'")

    @staticmethod
    def _literal(text: str) -> str:
        return "[^/]*".join(re.escape(piece) for piece in text.split("*"))

    def match(self, path: str) -> dict[str, str] | None:
        """Return the fields of a path, None where it does not match."""
        found = self._expression.match(path)
        return found.groupdict() if found else None


def _slashes(path: str) -> str:
    return path.replace(os.sep, "/") if os.sep != "/" else path


def _plain(path: str) -> str:
    """Return a path without ``.``, ``..`` and slashes that say nothing; nothing for here."""
    if is_url(path):
        return path.rstrip("/")
    plain = posixpath.normpath(_slashes(path))
    return "" if plain == "." else plain


def _folder_of(path: str) -> str:
    return str(PurePosixPath(path).parent) if "/" in path else ""


def _fields(path: str, patterns: Iterable[Pattern]) -> dict[str, str] | None:
    return next((f for p in patterns if (f := p.match(path)) is not None), None)


def _common_start(sequences: Sequence[Sequence[str]]) -> list[str]:
    """Return the pieces with which all sequences begin."""
    alike: list[str] = []
    for pieces in zip(*sequences, strict=False):
        if len(set(pieces)) > 1:
            break
        alike.append(pieces[0])
    return alike


def _shortened(folders: Sequence[str]) -> dict[str, str]:
    """Return names without the folders that all share, but never without the last."""
    split = {folder: [piece for piece in folder.split("/") if piece] for folder in set(folders)}
    shared = _common_start(list(split.values()))
    keep = min((len(pieces) for pieces in split.values()), default=0) - 1
    cut = max(0, min(len(shared), keep))
    return {folder: "/".join(pieces[cut:]) or "." for folder, pieces in split.items()}


def series(
    paths: Iterable[str | os.PathLike[str]],
    pattern: str | Sequence[str] | None = None,
    *,
    root: str | os.PathLike[str] | None = None,
) -> list[Entry]:
    """Place checkpoints in their runs, in natural order of run and step.

    Args:
        paths: files, folders or URLs; a path given twice counts once.
        pattern: as :class:`Pattern` takes it, or several to be tried in turn; None for
            :data:`DEFAULT_PATTERNS`.
        root: the folder that runs are named from. Without it they are named from the deepest folder
            that all of them share, and that name changes with the files that are scanned.

    Returns:
        One entry per path. Without ``{run}`` in the pattern, the run is made of its other fields,
        or is the folder. A path that matches no pattern has its folder as run, no step, and
        ``matched`` False.

    Raises:
        SeriesError: the pattern is none.
    """
    if pattern:
        given = [pattern] if isinstance(pattern, str) else list(pattern)
        patterns = [Pattern(text) for text in given]
    else:
        # Behind other words than step a number may be a figure: checkpoint_0.91.pt.
        patterns = [
            Pattern(text, "step" in text.replace("{step}", "")) for text in DEFAULT_PATTERNS
        ]
    above = "" if root is None else _plain(os.fspath(root))
    start = above and above.rstrip("/") + "/"
    found: list[tuple[Entry, bool]] = []
    names = list(dict.fromkeys(os.fspath(path) for path in paths))
    # A root above where we are, or one folder by two names.
    absolute = start.startswith("/") or (not start and any(map(os.path.isabs, names)))
    for path in names:
        seen = _plain(path)
        if absolute and not seen.startswith("/") and "://" not in seen:
            seen = _slashes(os.path.abspath(path))
        seen = seen[len(start) :] if start and seen.startswith(start) else seen
        fields = _fields(seen, patterns)
        if fields is None and not seen.startswith("/") and "://" not in seen:
            # {run} is a folder: the one where we are, where a path names no other.
            fields = _fields(f"./{seen}", patterns)
        matched = fields is not None
        fields = dict(fields or {})
        step = fields.pop("step", None)
        if step is not None and int(step) > _MOST_STEPS:  # a hash, or a time in small pieces
            step = None
        run = fields.pop("run", None)
        named_by_folder = run is not None or not fields
        if run is None:
            run = "/".join(fields.values()) or _folder_of(seen)
        entry = Entry(path, run, None if step is None else int(step), fields, matched=matched)
        found.append((entry, named_by_folder))
    folders = [entry.run for entry, named_by_folder in found if named_by_folder]
    named = root is not None
    short = {folder: folder or "." for folder in folders} if named else _shortened(folders)
    entries = [
        replace(entry, run=short[entry.run]) if named_by_folder else entry
        for entry, named_by_folder in found
    ]
    return sorted(entries, key=series_key)


def read_manifest(path: str | os.PathLike[str]) -> list[Entry]:
    """Read the checkpoints of a study from a CSV, Parquet or TOML file.

    Columns: ``path`` (required; relative to the manifest's folder, or absolute, or a URL), ``run``,
    ``step``, ``accuracy``, ``frozen_accuracy``, ``frozen_run``, ``test_size`` and
    ``frozen_test_size`` (images behind the two accuracies); any other becomes a field. An empty
    cell is as good as none, and in CSV blanks around a name or a value count for nothing. In TOML,
    ``[[checkpoint]]`` tables hold the same keys, and ``[runs.NAME]`` what all checkpoints of a run
    share.

    Returns:
        Entries in natural order of run and step.

    Raises:
        SeriesError: the message names the file, the line or entry, the column, what was expected.
        OSError: the file cannot be read.
        MissingExtra: Parquet without pyarrow, TOML on Python 3.10 without tomli.
    """
    path = Path(path)
    reader = {".csv": _read_csv, ".parquet": _read_parquet, ".toml": _read_toml}.get(
        path.suffix.lower()
    )
    if reader is None:
        raise SeriesError(f"manifest {path}: expected a .csv, .parquet or .toml file")
    check_regular(path, SeriesError, f"manifest {path}")
    entries: list[Entry] = []
    places: dict[str, str] = {}
    for place, cells in reader(path):
        entry = _entry(path, place, cells)
        where = entry.path if "://" in entry.path else os.path.abspath(entry.path)
        if where in places:
            raise SeriesError(
                f"manifest {path}: {place}: {entry.path} is already at {places[where]}"
            )
        places[where] = place
        entries.append(entry)
    short = _shortened([_folder_of(_slashes(e.path)) for e in entries if not e.run])
    entries = [
        entry if entry.run else replace(entry, run=short[_folder_of(_slashes(entry.path))])
        for entry in entries
    ]
    return sorted(entries, key=series_key)


_Cells = Iterable[tuple[str, Mapping[str, Any]]]


def _text_of(path: Path, kind: str) -> str:
    """Return a manifest's text."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise SeriesError(
            f"manifest {path}: line {line}: expected a {kind} file in UTF-8, got {error.reason}"
        ) from None


def _read_csv(path: Path) -> _Cells:
    # Blanks beside a comma are for the eye.
    reader = csv.DictReader(io.StringIO(_text_of(path, "CSV"), newline=""), skipinitialspace=True)
    try:
        names = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = names
        if "path" not in names:
            raise SeriesError(
                f"manifest {path}: expected a column 'path', got "
                f"{_listed(names) or 'an empty file'}"
            )
        _check_names(path, names)
        for cells in reader:
            place = f"line {reader.line_num}"
            if None in cells:
                raise SeriesError(
                    f"manifest {path}: {place}: expected {len(names)} cells like the header, "
                    f"got more"
                )
            yield place, {name: value and value.strip() for name, value in cells.items()}
    except csv.Error as error:
        raise SeriesError(
            f"manifest {path}: line {reader.line_num + 1}: expected CSV: {error}"
        ) from None


def _check_names(path: Path, names: Sequence[str]) -> None:
    twice = next((name for name, count in Counter(names).items() if name and count > 1), None)
    if twice is not None:
        raise SeriesError(f"manifest {path}: expected one column {twice!r}, got several")


def _listed(names: Sequence[str]) -> str:
    return printable(", ".join(names))


def _read_parquet(path: Path) -> _Cells:
    pq = parquet()
    with path.open("rb"):  # what the system says, in its words
        pass
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        rows = table.to_pylist()
    # Of a damaged file pyarrow says OSError, ValueError and more, without its name.
    except Exception as error:
        raise SeriesError(
            f"manifest {path}: expected a Parquet file, got a damaged one: "
            f"{printable(str(error).strip().partition(chr(10))[0])}"
        ) from None
    if "path" not in table.column_names:
        raise SeriesError(
            f"manifest {path}: expected a column 'path', got {_listed(table.column_names)}"
        )
    _check_names(path, table.column_names)
    for index, cells in enumerate(rows):
        yield f"row {index + 1}", cells


def _read_toml(path: Path) -> _Cells:
    try:
        toml = require("tomllib", "a TOML manifest", extra="")
    except ImportError:
        toml = require("tomli", "a TOML manifest on Python 3.10", extra="")
    try:
        content = toml.loads(_text_of(path, "TOML"))
    # It ends on numbers of thousands of digits (ValueError) and on brackets as deep, too.
    except (ValueError, RecursionError) as error:
        if isinstance(error, SeriesError):
            raise
        raise SeriesError(f"manifest {path}: expected a TOML file: {error}") from None
    tables, runs = content.get("checkpoint", []), content.get("runs", {})
    if not isinstance(tables, list) or not tables:
        raise SeriesError(f"manifest {path}: expected [[checkpoint]] tables, got none")
    if not isinstance(runs, dict) or not all(isinstance(run, dict) for run in runs.values()):
        raise SeriesError(
            f"manifest {path}: runs: expected tables [runs.NAME], got {printable(repr(runs))}"
        )
    for index, cells in enumerate(tables):
        place = f"checkpoint {index + 1}"
        if not isinstance(cells, dict):
            raise SeriesError(f"manifest {path}: {place}: expected a table")
        run = cells.get("run")
        shared = runs.get(run, {}) if isinstance(run, str) else {}
        yield place, {**shared, **cells}


def _entry(manifest: Path, place: str, cells: Mapping[str, Any]) -> Entry:
    # pandas writes the missing cells of a float column as NaN, and those compare unequal to all.
    given = {
        name: value
        for name, value in cells.items()
        if value is not None and value != "" and not (isinstance(value, float) and value != value)
    }
    for name, value in given.items():
        # A list, a table or bytes of a column is no cell.
        if not isinstance(value, str | int | float | Decimal | date | time) or (
            name in ("run", "frozen_run") and isinstance(value, bool | date | time)
        ):
            raise SeriesError(
                f"manifest {manifest}: {place}: {printable(str(name))}: expected one text or "
                f"number, got {printable(repr(value))}"
            )
    location = given.pop("path", "")
    if not location:
        raise SeriesError(f"manifest {manifest}: {place}: expected a path, got none")
    if not isinstance(location, str) or "\0" in location:
        raise SeriesError(
            f"manifest {manifest}: {place}: path: expected a text, got {printable(repr(location))}"
        )
    if "://" not in location:
        location = os.path.normpath(manifest.parent / location)
    known = {name: given.pop(name) for name in _KNOWN if name in given}

    def fail(name: str, expected: str) -> SeriesError:
        return SeriesError(
            f"manifest {manifest}: {place}: {name}: expected {expected}, got "
            f"{printable(repr(known[name]))}"
        )

    def fraction(name: str) -> float | None:
        if name not in known:
            return None
        try:
            if isinstance(known[name], bool):
                raise TypeError
            value = float(known[name])
        except (TypeError, ValueError, OverflowError):
            raise fail(name, "a fraction from 0 to 1") from None
        if not 0.0 <= value <= 1.0:
            raise fail(name, "a fraction from 0 to 1")
        return value

    def whole(name: str, lowest: int | None = None) -> int | None:
        if name not in known:
            return None
        expected = "a whole number" if lowest is None else f"a whole number of at least {lowest}"
        text = str(known[name]).strip()
        try:
            if len(text) > 100:
                raise ValueError
            # Where one is missing, pandas writes the others of the column as 9.0.
            if not float(text).is_integer():
                raise ValueError
        except ValueError:
            raise fail(name, expected) from None
        number = int(text) if text.isdigit() else int(float(text))
        if (lowest is not None and number < lowest) or abs(number) > _MOST_STEPS:
            raise fail(name, expected)
        return number

    step = whole("step")
    return Entry(
        path=location,
        run=str(known.get("run", "")),
        step=step,
        fields={name: str(value) for name, value in given.items()},
        accuracy=fraction("accuracy"),
        frozen_accuracy=fraction("frozen_accuracy"),
        frozen_run=str(known["frozen_run"]) if "frozen_run" in known else None,
        test_size=whole("test_size", 1),
        frozen_test_size=whole("frozen_test_size", 1),
    )
