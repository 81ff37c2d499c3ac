"""Draw the last steps of a run in the terminal, from the JSON lines it writes."""

from __future__ import annotations

import json
import math
import os
import statistics
import warnings
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .._common.extras import arrow
from .._common.tables import text_table
from .._common.warn import user_level
from ..checkpoints.opening import check_regular
from ..protocol import OUTPUT, Figures
from ..scanning.records import CheckpointRecord, row_of
from ..scanning.results import ScanResult
from ..scanning.schema import checkpoint_schema, part_schema
from ..scanning.store import Tables, flattened
from .alarms import Alarm, AlarmPolicy, Alarms, Event
from .records import StepRecord
from .sinks import LineReader, StepLog, read_jsonlines

_BARS = "▁▂▃▄▅▆▇█"
_SPARK = 16  # columns of a sparkline
_LONGEST_NAME = 32
_MOST_EVENTS = 5


def find_log(path: str | os.PathLike[str]) -> tuple[Path, list[Path]]:
    """Return the file to watch and, of a folder, the other files of step records in it.

    Args:
        path: a file, or a folder with ``*.jsonl`` files at any depth: the one written to last.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return path, []
    if not path.is_dir():
        raise FileNotFoundError(f"watch: {path}: expected a file or a folder, got neither")
    found = sorted((p for p in path.rglob("*.jsonl") if _is_log(p)), key=_written_at)
    if not found:
        raise FileNotFoundError(
            f"watch: {path}: expected a file *.jsonl of step records, got none in the folder"
        )
    return found[-1], found[:-1][::-1]


def _written_at(path: Path) -> float:
    return path.stat().st_mtime


def _is_log(path: Path) -> bool:
    if not path.is_file():  # a FIFO would be waited for
        return False
    with open(path, "rb") as file:
        return file.read(16).startswith(b'{"fadiag_steps"')


class Tail:
    """Read a file of step records as it grows, and judge it.

    Alarms that the run itself has written count; where it has written none, the records are judged
    by ``policy``. A session that goes on from a checkpoint is judged anew, as its own alarms begin
    anew; what an earlier one has said of steps before that is still shown.

    Args:
        path: the file.
        last: records to keep.
        policy: the limits; the default ones without.

    Attributes:
        records: the last records, in order of step.
        count: records read so far, without those that a later session has replaced.
        superseded: those.
        damaged: lines that could not be read.
        own: whether the run has written alarms itself.
    """

    def __init__(self, path: Path, last: int = 100, policy: AlarmPolicy | None = None) -> None:
        if last < 1:
            raise ValueError(f"watch: last: expected at least 1, got {last}")
        self.path, self._last, self._policy = path, last, policy
        self._begin()

    def _begin(self) -> None:
        self.records = deque[StepRecord](maxlen=self._last)
        self._steps = array("q")  # of all records that count
        self.superseded = self.damaged = 0
        self._offset = 0
        self._reader = LineReader(self.path)
        self.own = False
        self._earlier: list[Event] = []
        self._begin_session()

    def _begin_session(self) -> None:
        self._of_session = 0
        self._own: list[Event] = []
        self._judge = Alarms(self._policy, actions=())

    def read(self) -> list[StepRecord | Event]:
        """Return the records and events that have come since, whole lines only.

        Raises:
            OSError: the file cannot be read.
            ValueError: a later version wrote it, or it is no regular file.
        """
        check_regular(self.path, ValueError, f"watch: {self.path}")
        with open(self.path, "rb") as file:
            if file.seek(0, os.SEEK_END) < self._offset:
                # The file was begun anew.
                self._begin()
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        found: list[StepRecord | Event] = []
        for line in whole.splitlines():
            entry = self._reader.read(line)
            if entry is None:
                self.damaged += bool(line.strip())
            elif self._reader.session < self._reader.sessions:  # a later one has begun
                self.superseded += isinstance(entry, StepRecord)
            elif isinstance(entry, StepRecord):
                self._take(entry)
                found.append(entry)
            elif isinstance(entry, dict):
                self._earlier += self._current
                self._begin_session()
                if entry.get("alarms"):
                    self._judged_by_the_run()
            else:
                self._judged_by_the_run()
                self._own.append(entry)
                found.append(entry)
        return found

    def _judged_by_the_run(self) -> None:
        if not self.own:  # what was judged here before is not the run's word
            self.own, self._earlier = True, []

    def _take(self, record: StepRecord) -> None:
        # A session that went on from a checkpoint.
        while self.records and self.records[-1].step >= record.step:
            self.records.pop()
        while self._steps and self._steps[-1] >= record.step:
            self._steps.pop()
            self.superseded += 1
        while self._earlier and self._earlier[-1].step >= record.step:
            self._earlier.pop()
        self.records.append(record)
        self._steps.append(record.step)
        self._of_session += 1
        self._judge(record)

    @property
    def count(self) -> int:
        return len(self._steps)

    @property
    def _current(self) -> list[Event]:
        return self._own if self.own else self._judge.events

    @property
    def events(self) -> list[Event]:
        return [*self._earlier, *self._current]

    @property
    def standing(self) -> list[Alarm]:
        """The alarms of an episode of this session that has not ended."""
        found: list[Alarm] = []
        for event in reversed(self._current):
            if not isinstance(event, Alarm):
                break
            found.append(event)
        return found[::-1]

    @property
    def exit_code(self) -> int:
        """0 all well, 1 an alarm stands, 2 too few records to judge."""
        if self.standing:
            return 1
        policy = self._judge.policy
        return 2 if self._of_session < policy.warmup + policy.min_window else 0


def sparkline(values: Sequence[float], width: int = _SPARK) -> str:
    """Return a curve of figures on a logarithmic scale, one character per group of them.

    The lowest bar is the smallest figure, the highest the largest; ``!`` stands for a group with an
    infinite figure, a space for one without any. A curve within one percent is flat.
    """
    groups = [
        values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)
    ]
    if len(values) <= width:
        groups = [[value] for value in values]
    logs: list[float | None] = []
    for group in groups:
        known = [value for value in group if not math.isnan(value)]
        if any(math.isinf(value) for value in known):
            logs.append(math.inf)
        else:
            positive = [math.log(value) for value in known if value > 0]
            logs.append(statistics.median(positive) if positive else None)
    finite = [value for value in logs if value is not None and not math.isinf(value)]
    low = min(finite, default=0.0)
    span = max(finite, default=0.0) - low

    def character(value: float | None) -> str:
        if value is None:
            return " "
        if math.isinf(value):
            return "!"
        if span < 0.01:
            return _BARS[3]
        return _BARS[round((value - low) / span * (len(_BARS) - 1))]

    return "".join(character(value) for value in logs)


@dataclass(frozen=True)
class Line:
    """One line of the view: its text and a style of rich."""

    text: str
    style: str = ""


def view(tail: Tail, others: Iterable[Path] = ()) -> list[Line]:
    """Return the view: the state, the alarms, growth, and a row of curves per layer."""
    records = list(tail.records)
    if not records:
        return [Line(f"{tail.path}: no step recorded yet")]
    last = records[-1]
    standing = tail.standing
    state = {0: "all well", 1: "ALARM", 2: "too few records to judge yet"}[tail.exit_code]
    lines = [
        Line(
            f"{tail.path}: steps {records[0].step} to {last.step}, {tail.count} recorded: {state}",
            "bold red" if standing else "bold",
        )
    ]
    for event in tail.events[-_MOST_EVENTS:]:
        lines.append(Line(event.sentence, "red" if event in standing else "dim"))
    lines += [Line(f"also here: {other}", "dim") for other in list(others)[:3]]
    skipped = sum(record.skipped for record in records)
    if last.observed:
        lines.append(Line(last.observed, "dim"))
    if last.gain_reference != OUTPUT:
        lines.append(Line(f"credit gains are relative to {last.gain_reference}", "dim"))
    remarks = [
        f"{tail.damaged} lines could not be read" if tail.damaged else "",
        f"{tail.superseded} records of earlier sessions are replaced by later ones"
        if tail.superseded
        else "",
        f"{skipped} of these steps were skipped by the gradient scaler" if skipped else "",
        f"not reached in the last step: {', '.join(last.unreached)}" if last.unreached else "",
        "" if tail.own or not tail.events else "judged here, by the default limits",
    ]
    lines += [Line(remark, "dim") for remark in remarks if remark]
    lines.append(Line(""))
    if not last.layers:
        return lines
    of_these = [record for record in records if record.layers == last.layers]
    growths = [record.growth for record in of_these]
    rows = [
        [
            _short(name),
            *(
                cell
                for figure in ("hidden_norms", "grad_norms", "credit_gains")
                for cell in _cells([getattr(record, figure)[l] for record in of_these])
            ),
        ]
        for l, name in enumerate(last.layers)
    ]
    where = f"at {_short(last.growth_layer)}" if len(last.layers) > 1 else ""
    lines.append(Line(f"growth {sparkline(growths)} {last.growth:.3g} {where}".rstrip()))
    lines.append(Line(""))
    header, *body = text_table(["layer", "‖h‖", "", "‖g‖", "", "credit gain", ""], rows)
    concerned = {_short(alarm.layer) for alarm in standing}
    lines.append(Line(header, "bold"))
    lines += [
        Line(text, "red" if row[0] in concerned else "")
        for text, row in zip(body, rows, strict=True)
    ]
    return lines


def _cells(values: Sequence[float]) -> list[str]:
    last = values[-1]
    return [sparkline(values), "-" if math.isnan(last) else f"{last:.3g}"]


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


# -- the HTML report of a scan


def _states_of(record: StepRecord) -> list[int]:
    """Return the states that have a norm: one in front of which all is frozen has no gradient.

    (b) reads the deepest one, which must have one.
    """
    reached = [name not in record.unreached for name in record.layers]
    known = [l for l, norm in enumerate(record.hidden_norms) if reached[l] or not math.isnan(norm)]
    while known and not reached[known[-1]]:
        known.pop()
    return known


def _starts_among(kept: Sequence[int], chain_starts: Sequence[int]) -> tuple[int, ...]:
    """Return the places of the states that begin a chain among those that are kept."""
    return tuple(
        place
        for place, (before, l) in enumerate(pairwise(kept), 1)
        if any(before < start <= l for start in chain_starts)
    )


def scan_result_of(
    paths: Sequence[str | os.PathLike[str]], policy: AlarmPolicy | None = None
) -> Any:
    """Return step records as the rows of a scan, for its HTML report: a run per file.

    Skipped steps and states that no forward pass reached are left out, and behind the last state
    with a gradient all others. (b) is judged by the credit gain:
    its limit is the gain's floor times the step's own output error. (c) is never judged, for past
    steps of a moving network are not batches of one; its figures are shown.

    Args:
        paths: files of :class:`~fadiag_fast.training.sinks.JsonLines`.
        policy: whose thresholds judge; the published ones without.

    Returns:
        A :class:`~fadiag_fast.scanning.ScanResult`.

    Warns:
        UserWarning: lines of a file could not be read; their numbers.

    Raises:
        ValueError: a file holds no step records.
        MissingExtra: pyarrow is not installed.
    """
    from dataclasses import replace

    limits = (policy or AlarmPolicy()).thresholds
    rows: list[dict[str, Any]] = []
    for path in map(Path, paths):
        log: StepLog = read_jsonlines(path)
        if not log.records:
            raise ValueError("; ".join([f"{path}: expected step records, got none", *log.notes]))
        if log.damaged:
            warnings.warn(f"{path}: {log.notes[-1]}", UserWarning, stacklevel=user_level())
        alarmed = {event.step: event.sentence for event in log.events}
        for record in log.records:
            kept = _states_of(record)
            if record.skipped or not kept:
                continue

            def chosen(values: Sequence[Any], kept: list[int] = kept) -> list[Any]:
                return [values[l] for l in kept]

            figures = Figures(
                layers=chosen(record.layers),
                residual_norms=chosen(record.hidden_norms),
                bp_grad_norms=chosen(record.grad_norms),
                credit_gains=chosen(record.credit_gains),
                output_grad_norm=record.output_grad_norm,
                batch_size=record.num_samples,
                stabilities=chosen(record.stabilities),
                num_directions=[limits.min_batches] * len(kept),
                num_batches=limits.min_batches,
                chain_starts=_starts_among(kept, record.chain_starts),
                gain_reference=record.gain_reference,
            )
            error = record.output_grad_norm
            of_step = replace(
                limits,
                gradient_floor=limits.credit_gain_floor * error if math.isfinite(error) else 0.0,
                direction_stability=2.0,  # beyond every cosine
            )
            row = row_of(
                CheckpointRecord(
                    path=f"{path}: step {record.step}",
                    run=str(path),
                    step=record.step,
                    config_hash="training",
                    content_hash="",
                    figures=figures,
                    remarks=[alarmed[record.step]] if record.step in alarmed else [],
                ),
                of_step,
            )
            session = {
                "record": len(rows),
                "config": json.dumps(
                    {
                        "source": "step records of a training run",
                        "observed": record.observed,
                        "credit gains relative to": record.gain_reference,
                    }
                ),
                "session_started_at": row["finished_at"],
            }
            rows.append({**row, **session})
    pa = arrow()
    part = pa.Table.from_pylist(rows, schema=part_schema())
    tables = Tables(pa.Table.from_pylist(rows, schema=checkpoint_schema()), flattened(part))
    return ScanResult(tables)
