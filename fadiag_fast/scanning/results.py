"""What a scan found: tables, verdicts, when each diagnostic first fired, trends, a summary."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .._common.extras import arrow, require
from .._common.tables import text_table
from .._common.text import display_name, for_terminal
from ..protocol import (
    NOT_ENOUGH_DATA,
    TRUSTWORTHY,
    DiagnosticThresholds,
    Figures,
    Protocol,
    Status,
    check_protocol,
)
from ..protocol.paper import DEPTH_UTILITY, percentage_points
from .errors import UnreadableResults
from .records import AUDITED, NON_FINITE_WEIGHTS, Row, figures_of, protocol_of, thresholds_of
from .store import Tables, figures_in, judge, layers_by_record, read_tables

KEYS = ("a", "b", "c", "d")

# The figures that have a trend, and whether it is read in powers of ten.
TREND_FIGURES = {
    "growth": True,
    "grad_norm": True,
    "credit_gain": True,
    "stability": False,
    "accuracy": False,
}

# More lines than this nobody reads in a terminal; the report shows all.
_MOST_RUNS = 40
_LONGEST_NAME = 40
_MOST_FAILURES = 3  # of a kind


@dataclass(frozen=True)
class Moment:
    """A checkpoint in its run: its step, if it has one, and its path."""

    step: int | None
    path: str

    def __str__(self) -> str:
        return (
            self.path.replace(os.sep, "/").rsplit("/", 1)[-1]
            if self.step is None
            else str(self.step)
        )


@dataclass(frozen=True)
class FirstFired:
    """When one diagnostic fired in one run.

    Attributes:
        first, last: the first and last checkpoint at which it fired; None if it never did.
        stayed: the checkpoint from which it fired to the end; None if it did not at the last one.
        judged: checkpoints at which it was evaluated. The others are passed over: failed ones,
            too few batches, no frozen accuracy.
    """

    first: Moment | None
    last: Moment | None
    stayed: Moment | None
    judged: int

    def __str__(self) -> str:
        if self.judged == 0:
            return "-"
        if self.first is None:
            return "never"
        if self.stayed is None:
            return f"at {self.first}" if self.first == self.last else f"{self.first} to {self.last}"
        if self.stayed == self.first:
            return f"from {self.first}"
        return f"at {self.first}, from {self.stayed}"


@dataclass(frozen=True)
class Trend:
    """How one figure went in one run.

    Attributes:
        figure: a column of ``checkpoints``.
        count: checkpoints with a step at which it is finite.
        first, last: at the first and last of them.
        lowest, highest: over all of them.
        slope: by least squares per 1,000 steps; NaN without two steps. For growth, norms and gains
            in powers of ten, over the values above zero: 1.0 says tenfold.
    """

    figure: str
    count: int
    first: float
    last: float
    lowest: float
    highest: float
    slope: float


@dataclass(frozen=True)
class FrozenComparison:
    """One checkpoint beside its frozen baseline.

    Attributes:
        path, run, step: the checkpoint.
        accuracy: its own.
        frozen_accuracy: the baseline's.
        baseline: ``given`` for a number that came with the checkpoint, else the run's name.
        utility: difference in percentage points.
        undercut: whether (d) fires.
    """

    path: str
    run: str
    step: int | None
    accuracy: float
    frozen_accuracy: float
    baseline: str
    utility: float
    undercut: bool


@dataclass(frozen=True)
class ScanCounts:
    """What became of the checkpoints that one scan was given.

    Attributes:
        total: all of them: audited, reused and failed.
        audited: by this scan.
        reused: taken over from an earlier one.
        failed: with a row that says why.
        unmatched: paths that no pattern matched, and that have no step therefore.
        rejudged: rows of earlier scans, also of other checkpoints, that were judged by other limits
            or another protocol, and are judged by this scan's now, from their figures.
    """

    total: int
    audited: int
    reused: int
    failed: int
    unmatched: Sequence[str] = ()
    rejudged: int = 0


class ScanResult:
    """The rows of a scan, and what follows from them.

    Rows are in natural order of run, step and path. Where a checkpoint was scanned under several
    configurations, its last row is here; ask :meth:`load` for another configuration by its hash.

    Attributes:
        folder: where they were read.
        counts: of the scan that returned this; None for rows that were only read.
    """

    def __init__(
        self, tables: Tables | None, folder: Path | None = None, counts: ScanCounts | None = None
    ) -> None:
        self._found = tables
        self.folder = folder
        self.counts = counts

    @property
    def _tables(self) -> Tables:
        if self._found is None:
            assert self.folder is not None
            self._found = self.load(self.folder)._found
            assert self._found is not None
        return self._found

    @classmethod
    def of(cls, folder: str | os.PathLike[str], counts: ScanCounts | None = None) -> ScanResult:
        """Return a finished scan's rows, which are read when they are first asked for.

        Raises nothing; that of :meth:`load` comes with the first question.
        """
        return cls(None, Path(folder), counts)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, config_hash: str | None = None) -> ScanResult:
        """Read a scan's folder: finished, killed or still running.

        Args:
            folder: where the scan wrote.
            config_hash: take only rows of this configuration; a beginning of it will do.

        Raises:
            UnreadableResults: no scan in the folder, a damaged one, or none of this configuration.
            NewerResults: a later version wrote it.
            MissingExtra: pyarrow is not installed.
        """
        tables = read_tables(folder)
        configs = tables.checkpoints["config_hash"].to_pylist()
        records = tables.checkpoints["record"].to_pylist()
        if config_hash is not None:
            wanted = {
                config
                for config in configs
                if config.startswith(config_hash)
                or config.partition(":")[2].startswith(config_hash)
            }
            if len(wanted) != 1 or not config_hash:
                raise UnreadableResults(
                    f"scan results: {folder}: expected one configuration {config_hash!r}, got "
                    f"{', '.join(sorted(set(configs))) or 'none'}"
                )
            keep = [config in wanted for config in configs]
        else:
            last: dict[str, int] = {}
            paths = tables.checkpoints["path"].to_pylist()
            for path, record in zip(paths, records, strict=True):
                last[path] = max(record, last.get(path, -1))
            keep = [last[p] == record for p, record in zip(paths, records, strict=True)]
        if not all(keep):
            pa = arrow()
            kept = np.asarray(records)[np.asarray(keep)]
            of_kept = np.isin(tables.layers["record"].to_numpy(), kept)
            tables = Tables(
                tables.checkpoints.filter(pa.array(keep)), tables.layers.filter(pa.array(of_kept))
            )
        return cls(tables, Path(folder))

    # -- tables

    def __len__(self) -> int:
        return int(self._tables.checkpoints.num_rows)

    def to_arrow(self, table: str = "checkpoints") -> Any:
        """Return ``checkpoints`` or ``layers`` as a pyarrow Table; see the schema in docs/scan.md.

        Raises:
            ValueError: another name.
        """
        if table not in ("checkpoints", "layers"):
            raise ValueError(f"ScanResult: expected checkpoints or layers, got {table!r}")
        return getattr(self._tables, table)

    def to_pandas(self, table: str = "checkpoints") -> Any:
        """Return ``checkpoints`` or ``layers`` as a pandas DataFrame.

        pandas has no column of whole numbers with gaps: steps become floats where one is missing,
        and a missing number cannot be told from NaN. :meth:`to_arrow` and :meth:`to_polars` keep
        both.
        """
        require("pandas", "ScanResult.to_pandas", extra="")
        return self.to_arrow(table).to_pandas()

    def to_polars(self, table: str = "checkpoints") -> Any:
        """Return ``checkpoints`` or ``layers`` as a polars DataFrame."""
        return require("polars", "ScanResult.to_polars", extra="").from_arrow(self.to_arrow(table))

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of ``checkpoints`` as dictionaries."""
        rows: list[Row] = self._tables.checkpoints.to_pylist()
        return rows

    def figures(self) -> Iterator[Figures | None]:
        """Yield what the diagnostics read, per checkpoint; None where it failed."""
        where = layers_by_record(self._tables.layers)
        for row in self.rows:
            if row["status"] != AUDITED:
                yield None
                continue
            start, count = where.get(row["record"], (0, 0))
            yield figures_of(row, self._tables.layers.slice(start, count).to_pylist())

    def paper_figures(self, *, last: bool = False) -> list[Figures]:
        """Return what the paper protocol reads of each audited checkpoint.

        Args:
            last: only of the last audited checkpoint of each run.
        """
        runs = [in_time(run) for run in self.runs().values()] if last else [self.rows]
        rows = [[row for row in run if row["status"] == AUDITED] for run in runs]
        chosen = [row for run in rows for row in (run[-1:] if last else run)]
        return list(figures_in(self._tables, chosen, "paper"))

    # -- judgement

    @property
    def thresholds(self) -> DiagnosticThresholds:
        """The limits by which the last audited row was judged; the published ones without any."""
        audited = [row for row in self.rows if row["status"] == AUDITED]
        if not audited:
            return DiagnosticThresholds()
        return thresholds_of(max(audited, key=lambda row: int(row["record"])))

    @property
    def protocol(self) -> Protocol:
        """The protocol by which the last audited row was judged; the paper's without any."""
        audited = [row for row in self.rows if row["status"] == AUDITED]
        return protocol_of(max(audited, key=lambda row: int(row["record"]))) if audited else "paper"

    def judged(
        self, thresholds: DiagnosticThresholds | None = None, protocol: Protocol | None = None
    ) -> ScanResult:
        """Return the same figures judged by other limits or another protocol.

        Nothing on the disk changes.

        Args:
            thresholds: the limits; None for the present ones.
            protocol: ``"paper"`` or ``"calibrated"``; None for the present one.

        Raises:
            ValueError: an unknown protocol.
        """
        chosen = protocol or self.protocol
        check_protocol(chosen, "ScanResult.judged")
        limits = thresholds or self.thresholds
        return ScanResult(judge(self._tables, limits, protocol=chosen), self.folder, self.counts)

    def verdicts(self) -> dict[str, str]:
        """Return the verdict per path; ``failed: KIND`` where there is none."""
        return {row["path"]: _outcome(row) for row in self.rows}

    def verdict_counts(self) -> dict[str, int]:
        """Return how many checkpoints have which verdict: trustworthy first, failures last."""
        counts = Counter(row["verdict"] for row in self.rows if row["status"] == AUDITED)
        order = {TRUSTWORTHY: 0, NOT_ENOUGH_DATA: 2}
        return dict(sorted(counts.items(), key=lambda item: (order.get(item[0], 1), item[0])))

    def failures(self) -> dict[str, list[Row]]:
        """Return the failed rows by kind of error, the most frequent first."""
        kinds: dict[str, list[Row]] = {}
        for row in self.rows:
            if row["status"] != AUDITED:
                kinds.setdefault(row["error_kind"], []).append(row)
        return dict(sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0])))

    def configurations(self) -> dict[str, int]:
        """Return how many rows each probe configuration has, by its hash."""
        return dict(Counter(row["config_hash"] for row in self.rows))

    # -- series

    def runs(self) -> dict[str, list[Row]]:
        """Return the rows of each run, in order of step; those without a step last."""
        runs: dict[str, list[Row]] = {}
        for row in self.rows:
            runs.setdefault(row["run"], []).append(row)
        return runs

    def first_fired(self) -> dict[str, dict[str, FirstFired]]:
        """Return per run and diagnostic when it first fired, and from when it fired to the end.

        In a run with steps, checkpoints without one (``last.pt``) are passed over; in a run without
        any, the order of the paths stands for time.
        """
        return {
            run: {key: _first_fired(in_time(rows), key) for key in KEYS}
            for run, rows in self.runs().items()
        }

    def trends(self) -> dict[str, dict[str, Trend]]:
        """Return per run how each figure went with the step."""
        return {
            run: {
                figure: _trend(rows, figure, logarithmic)
                for figure, logarithmic in TREND_FIGURES.items()
            }
            for run, rows in self.runs().items()
        }

    def against_frozen(self) -> list[FrozenComparison]:
        """Compare checkpoints with the frozen baseline that their rows name.

        A number given with the checkpoint comes first. Else the named run's accuracy at the same
        step is taken, or at its last step before. Checkpoints without either are left out.
        """
        thresholds = self.thresholds
        runs = self.runs()
        found = []
        for row in self.rows:
            accuracy, frozen, baseline = row["accuracy"], row["frozen_accuracy"], "given"
            if frozen is None and row["frozen_run"] is not None:
                baseline = row["frozen_run"]
                frozen = _accuracy_at(runs.get(baseline, []), row["step"])
            if accuracy is None or frozen is None:
                continue
            utility = percentage_points(accuracy, frozen)
            found.append(
                FrozenComparison(
                    path=row["path"],
                    run=row["run"],
                    step=row["step"],
                    accuracy=accuracy,
                    frozen_accuracy=frozen,
                    baseline=baseline,
                    utility=utility,
                    undercut=DEPTH_UTILITY.is_beyond(utility, thresholds),
                )
            )
        return found

    # -- text

    def __str__(self) -> str:
        audited = sum(row["status"] == AUDITED for row in self.rows)
        failed = len(self) - audited
        runs = self.runs()
        where = f"{self.folder}: " if self.folder is not None else ""
        lines = [
            f"{where}{audited:,} of {len(self):,} checkpoints audited, {failed:,} failed, "
            f"in {len(runs):,} run{'' if len(runs) == 1 else 's'}"
        ]
        counts = self.counts
        if counts is not None and (counts.reused or counts.total != len(self)):
            lines.append(
                f"this scan: {counts.reused:,} of {counts.total:,} checkpoints taken over from "
                f"before, {counts.audited:,} audited, {counts.failed:,} failed"
            )
        if counts is not None and counts.rejudged:
            lines.append(
                f"{counts.rejudged:,} stored rows, judged otherwise before, are judged by this "
                f"scan's protocol and limits now"
            )
        if self.protocol != "paper":
            lines.append(f"judged by the {self.protocol} protocol")
        verdicts = [[verdict, f"{count:,}"] for verdict, count in self.verdict_counts().items()]
        if verdicts:
            lines += ["", *text_table(["verdict", "checkpoints"], verdicts)]
        if failures := self.failures():
            table = [[kind, f"{len(rows):,}"] for kind, rows in failures.items()]
            lines += ["", *text_table(["failed", "checkpoints"], table)]
        for kind, rows in failures.items():
            # One is told in full: of another model, the names and shapes come after the first line.
            first, *others = (_failure(row) for row in rows[:_MOST_FAILURES])
            lines += ["", f"{kind}:", *first, *(other[0] for other in others)]
            if len(rows) > _MOST_FAILURES:
                lines.append(f"  … and {len(rows) - _MOST_FAILURES:,} more")
        if audited:
            lines += ["", *self._run_lines(runs)]
        if counts is not None and counts.unmatched:
            lines += ["", _unmatched_note(counts.unmatched)]
        if len(configurations := self.configurations()) > 1:
            lines += [
                "",
                f"note: {len(configurations)} probe configurations: figures of different ones may "
                f"not compare",
            ]
        return for_terminal("\n".join(lines))

    def _run_lines(self, runs: dict[str, list[Row]]) -> list[str]:
        fired = self.first_fired()
        header = ["run", "checkpoints", "steps", "at the end", *(f"({key}) fires" for key in KEYS)]
        table = []
        for run, rows in list(runs.items())[:_MOST_RUNS]:
            steps = [row["step"] for row in rows if row["step"] is not None]
            # The last one says how the run ended, also where its weights are no numbers any more.
            ends = [row for row in in_time(rows) if _is_known(row)]
            table.append(
                [
                    _shorten(for_terminal(run), _LONGEST_NAME),
                    f"{len(rows):,}",
                    f"{steps[0]:,}-{steps[-1]:,}" if steps else "-",
                    ends[-1]["verdict"] or NON_FINITE_WEIGHTS if ends else "-",
                    *(str(fired[run][key]) for key in KEYS),
                ]
            )
        lines = text_table(header, table)
        if len(runs) > _MOST_RUNS:
            lines.append(f"… and {len(runs) - _MOST_RUNS:,} more runs")
        return lines

    def __repr__(self) -> str:
        return f"ScanResult({len(self)} checkpoints, folder={self.folder!s})"


def _outcome(row: Row) -> str:
    return row["verdict"] if row["status"] == AUDITED else f"failed: {row['error_kind']}"


def _failure(row: Row) -> list[str]:
    """Return the lines that say what is wrong with a checkpoint, the first with its path."""
    text = (row["error"] or row["error_kind"]).strip()
    name = display_name(row["path"])
    where = "" if row["path"] in text.partition("\n")[0] else f"{name}: "
    return [f"  {line}" for line in f"{where}{text}".splitlines()]


def _unmatched_note(paths: Sequence[str]) -> str:
    count = len(paths)
    return (
        f"note: {count:,} checkpoint{'' if count == 1 else 's'} without a step: no pattern matches "
        f"{display_name(paths[0])}{'' if count == 1 else ', for one'}; give one by --pattern "
        f"(pattern= of scan), as in '{{run}}/step_{{step}}.pt'"
    )


def _shorten(text: str, length: int) -> str:
    """Cut the middle out of a long name: both its ends tell it from others."""
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def in_time(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that have a place in time: those with steps, or all if none has.

    A step of a checkpoint that could not be read places no verdict.
    """
    stepped = [row for row in rows if row["step"] is not None]
    return stepped if any(map(_is_known, stepped)) else list(rows)


def _is_known(row: Row) -> bool:
    return bool(row["status"] == AUDITED or row["error_kind"] == NON_FINITE_WEIGHTS)


def _first_fired(rows: Sequence[Row], key: str) -> FirstFired:
    decided = (Status.FIRED.value, Status.PASSED.value)
    judged = [row for row in rows if row[f"{key}_status"] in decided]
    fired = [row[f"{key}_status"] == Status.FIRED.value for row in judged]
    first = last = stayed = None
    if any(fired):
        first = _moment(judged[fired.index(True)])
        last = _moment(judged[len(fired) - 1 - fired[::-1].index(True)])
    if fired and fired[-1]:
        passed = [index for index, one in enumerate(fired) if not one]
        stayed = _moment(judged[passed[-1] + 1 if passed else 0])
    return FirstFired(first, last, stayed, len(judged))


def _moment(row: Row) -> Moment:
    return Moment(row["step"], row["path"])


def _trend(rows: Sequence[Row], figure: str, logarithmic: bool) -> Trend:
    points = [
        (row["step"], row[figure])
        for row in rows
        if row["step"] is not None and row[figure] is not None and math.isfinite(row[figure])
    ]
    if not points:
        return Trend(figure, 0, *(math.nan,) * 5)
    values = [value for _, value in points]
    fitted = [
        (x, math.log10(y) if logarithmic else y) for x, y in points if y > 0 or not logarithmic
    ]
    slope = math.nan
    if len({x for x, _ in fitted}) > 1:
        x, y = np.array(fitted, dtype=np.float64).T
        x = (x - x.mean()) / 1000.0
        slope = float((x * (y - y.mean())).sum() / (x * x).sum())
    return Trend(figure, len(points), values[0], values[-1], min(values), max(values), slope)


def _accuracy_at(rows: Sequence[Row], step: int | None) -> float | None:
    """Return the accuracy of a run at a step, or at its last step before it."""
    known = [row for row in in_time(rows) if row["accuracy"] is not None]
    if step is not None:
        known = [row for row in known if row["step"] is None or row["step"] <= step]
    return known[-1]["accuracy"] if known else None


__all__ = ["KEYS", "FirstFired", "FrozenComparison", "Moment", "ScanCounts", "ScanResult", "Trend"]
