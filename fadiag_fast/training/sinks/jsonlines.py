"""Step records as JSON lines, and their reader."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..._version import __version__
from ...checkpoints.opening import check_regular
from ..alarms import Event, event_from_dict
from ..exchange import Share
from ..records import FIGURES, StepRecord
from .base import Sink

FORMAT_VERSION = 2


# The header's key; a line without it and without "event" is a record.
_HEADER = "fadiag_steps"


class JsonLines(Sink):
    """Write one line of JSON per record, flushed line by line: a reader may follow the file.

    A header line precedes the first record of each session: the format's version, the names of the
    layers and whatever else the session's records have in common, which they leave out. A last line
    that a crash has cut is left as it is, on a line of its own.

    Where ranks share their figures the first of them writes the file, and the others nothing. Where
    they hold different layers, as the stages of a pipeline do, the first rank of each stage writes
    a file of its own beside it: ``steps.rank2.jsonl``.

    Args:
        path: the file; its folder is made if need be.
        append: add to a file that exists, else replace it.
        every_rank: every rank writes; all but the first one to files of their own as above.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike[str], append: bool = True, *, every_rank: bool = False
    ) -> None:
        self.path = Path(path)
        self.share = Share()
        self._append, self._every_rank = append, every_rank
        self.path.parent.mkdir(parents=True, exist_ok=True)
        open(self.path, "ab").close()  # says at once what is wrong with it
        self._file: IO[str] | None = None
        self._is_closed = self._is_silent = False
        self._lock = threading.Lock()  # alarms may be written from the training's thread
        self._session = uuid.uuid4().hex[:8]
        self._common: dict[str, Any] = {}
        self._told: set[Event] = set()

    def __call__(self, record: StepRecord) -> None:
        with self._lock:
            file = self._opened()
            if file is None:
                return
            values = record.to_mapping()
            if not self._common:
                self._write_header(file, values)
            line = {
                name: value
                for name, value in values.items()
                if name in FIGURES or value != self._common[name]
            }
            self._write(file, json.dumps({"session": self._session, **line}))

    def _write_header(self, file: IO[str], values: Mapping[str, Any]) -> None:

        self._common = {name: value for name, value in values.items() if name not in FIGURES}
        header = {
            _HEADER: FORMAT_VERSION,
            "fadiag_fast": __version__,
            "time": time.time(),
            "session": self._session,
            "alarms": self.share.judged,
            **self._common,
        }
        self._write(file, json.dumps(header))

    def event(self, event: Event) -> None:
        """Write an alarm or an all clear among the records, once."""
        with self._lock:
            file = self._opened()
            if file is None or event in self._told:
                return
            self._told.add(event)
            values = {"session": self._session, **event.to_dict()}
            self._write(file, json.dumps(values, ensure_ascii=False))

    def _opened(self) -> IO[str] | None:
        """Return the file, opened now that this rank's place is known; None on a silent rank."""
        if self._is_closed:
            raise ValueError(f"JsonLines: {self.path}: expected an open file, got a closed one")
        if self._file is None and not self._is_silent:
            path = self.share.file(self.path, self._every_rank)
            self._is_silent = path is None
            if path is not None:
                cut = self._append and _ends_within_a_line(path)
                self._file = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115
                if not self._append:
                    self._file.truncate(0)
                if cut:
                    self._file.write("\n")
        return self._file

    def _write(self, file: IO[str], line: str) -> None:
        file.write(line + "\n")
        file.flush()

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        self._is_closed = True
        if self._file is not None:
            self._file.close()
            self._file = None

    def __repr__(self) -> str:
        return f"JsonLines({str(self.path)!r})"


def _ends_within_a_line(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class StepLog:
    """What a file of JSON lines holds.

    Attributes:
        path: the file.
        records: in order of step. Where a session went on from an earlier step than the one before
            it had reached, its records take the place of the old ones.
        events: alarms and all clears that the run itself has written, of the same steps.
        sessions: how often a run began to write.
        superseded: records that a later session has replaced.
        cut: whether the last line is not whole, as while it is being written or after a crash.
        damaged: numbers, from 1, of the lines that could not be read, the cut one left out.
    """

    path: Path
    records: tuple[StepRecord, ...]
    events: tuple[Event, ...] = ()
    sessions: int = 1
    superseded: int = 0
    cut: bool = False
    damaged: tuple[int, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What a reader should know of the file, in sentences."""
        found = []
        if self.superseded:
            found.append(
                f"{self.superseded} records of earlier sessions are replaced by later ones"
            )
        if self.cut:
            found.append("the last line is cut off: it is being written, or the run has crashed")
        if self.damaged:
            lines = ", ".join(map(str, self.damaged[:5]))
            more = f" and {len(self.damaged) - 5} more" if len(self.damaged) > 5 else ""
            found.append(f"could not be read: line {lines}{more}")
        return found


def read_jsonlines(path: str | os.PathLike[str]) -> StepLog:
    """Read what :class:`JsonLines` has written, also while it is being written.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds lines, but none of them is of this format, or a later version wrote it;
            or it is no regular file.
    """
    path = Path(path)
    check_regular(path, ValueError, f"{path}")
    lines = path.read_bytes().split(b"\n")
    last_is_whole = lines[-1] == b""
    entries: list[tuple[int, StepRecord | Event]] = []  # with the session's number
    reader, cut, understood = LineReader(path), False, False
    damaged: list[int] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        entry = reader.read(line)
        if entry is None:
            if number == len(lines) and not last_is_whole:
                cut = True
            else:
                damaged.append(number)
            continue
        understood = True
        if not isinstance(entry, dict):
            entries.append((reader.session, entry))
    if not understood and damaged:
        raise ValueError(f"{path}: expected JSON lines of step records, got none among its lines")
    records, events, superseded = _latest_sessions(entries)
    return StepLog(
        path,
        tuple(records),
        tuple(events),
        max(reader.sessions, 1),
        superseded,
        cut,
        tuple(damaged),
    )


class LineReader:
    """Read the lines of a file of step records one after another.

    A session's header says what its records have in common. Each line names its session, for two
    that write into one file at a time take turns.

    Attributes:
        sessions: headers read so far.
        session: the number, from 1, of the session that the last line belongs to; 0 without header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sessions = self.session = 0
        self._known: dict[str, tuple[int, dict[str, Any]]] = {}

    def read(self, line: bytes) -> StepRecord | Event | dict[str, Any] | None:
        """Return what a line holds; a header as a dictionary; None for a line that is damaged.

        Raises:
            ValueError: it is the header of a later version.
        """
        try:
            values = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            return None
        if not isinstance(values, dict):
            return None
        if _HEADER in values:
            return self._header(values)
        name = values.pop("session", None)
        # The lines of version 1 are whole, and belong to the header before them.
        whole = (self.sessions, dict[str, Any]())
        number, common = whole if name is None else self._known.get(str(name), (-1, {}))
        if number < 0:
            return None
        try:
            event = "event" in values
            found = event_from_dict(values) if event else StepRecord.from_mapping(common | values)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return None
        self.session = number
        return found

    def _header(self, values: dict[str, Any]) -> dict[str, Any]:
        version = values[_HEADER]
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"{self.path}: expected step records of version {FORMAT_VERSION} or earlier, got "
                f"version {version}"
            )
        self.sessions = self.session = self.sessions + 1
        if version > 1:
            self._known[str(values.get("session"))] = self.session, values
        return values


def _latest_sessions(
    entries: Sequence[tuple[int, StepRecord | Event]],
) -> tuple[list[StepRecord], list[Event], int]:
    """Return records and events without those that a later session has replaced, and how many.

    Each by its own step: an alarm is of an earlier one than the record behind which it stands. What
    a session writes once a later one has begun is replaced too.
    """
    latest = 0
    records: list[tuple[int, StepRecord]] = []
    events: list[tuple[int, Event]] = []
    superseded = 0
    for session, entry in entries:
        if session < latest:
            superseded += isinstance(entry, StepRecord)
            continue
        latest = session
        if not isinstance(entry, StepRecord):
            events.append((session, entry))
            continue
        while records and records[-1][0] < session and records[-1][1].step >= entry.step:
            records.pop()
            superseded += 1
        while events and events[-1][0] < session and events[-1][1].step >= entry.step:
            events.pop()
        records.append((session, entry))
    return [record for _, record in records], [event for _, event in events], superseded
