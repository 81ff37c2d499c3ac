"""Open files that somebody else may be writing, and nothing but files.

Beside weights may lie a FIFO that nobody ever writes to, a device without an end, or a link to one.
And a training run saves over what is read: then the bytes are half of one save and half of another.
Every file is therefore opened here, and what was read counts only if afterwards each of them is
still the same file of the same size and times.
"""

from __future__ import annotations

import io
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar

from .errors import EXPECTED, CheckpointError, MissingCheckpoint, UnreadableCheckpoint, at, brief

_T = TypeVar("_T")

# Without waiting: nobody may ever write to a named pipe.
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
)

# How often a file that changes is read, and the pause after the first time, doubled each time.
_ATTEMPTS = 5
_PAUSE_S = 0.02

# Times of files go in steps: 10 ms of the system's clock at most, 2 s where they are whole seconds.
# A file that changed within the last step may change again without showing it.
_STEP_NS = 12_000_000
_WHOLE_SECONDS_NS = 2_000_000_000


# What a stream reads ahead, and the longest line.
_AHEAD, _LINE = 1 << 16, 4096


class Source(Protocol):
    """Give a file's bytes, from wherever they are.

    Attributes:
        size: bytes.
    """

    @property
    def size(self) -> int: ...

    def read(self, start: int, length: int, /) -> bytes:
        """Return so many bytes from a place on, fewer where the file ends."""


class MemorySource:
    """Give the bytes of a file that is in memory."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.size = len(view)

    def read(self, start: int, length: int, /) -> bytes:
        return bytes(self.view[start : start + length])


class SourceStream(io.RawIOBase):
    """Read a source as a file, for readers that want one; nothing is copied ahead."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._at = 0
        self._ahead, self._ahead_at = b"", 0

    def _peek(self, size: int) -> bytes:
        """Return some of the next bytes, read in larger pieces."""
        first = self._at - self._ahead_at
        if not 0 <= first <= len(self._ahead) - size:
            self._ahead, self._ahead_at, first = self._source.read(self._at, _AHEAD), self._at, 0
        return self._ahead[first : first + size]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._source.size - self._at)
        wanted = left if size is None or size < 0 else min(size, left)
        found = self._peek(wanted) if wanted <= _LINE else self._source.read(self._at, wanted)
        self._at += len(found)
        return found

    def readinto(self, target: Any) -> int:
        found = self.read(len(target))
        target[: len(found)] = found
        return len(found)

    def readline(self, size: int | None = -1, /) -> bytes:
        # No name in a pickle is longer; without an end the whole file would be one line.
        head = self._peek(_LINE)
        line = head[: head.find(b"\n") + 1] or head
        self._at += len(line)
        return line


class _Stamp(NamedTuple):
    """What tells a file from another one, and from what it was."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int


def _stamp(status: os.stat_result) -> _Stamp:
    return _Stamp(
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )


class OpenFile:
    """A regular file, open for reading; use it in a with statement.

    Attributes:
        path: as given.
        size: its bytes as it was opened.
    """

    def __init__(self, path: Path, number: int, status: os.stat_result) -> None:
        self.path = path
        self.size = status.st_size
        self.stamp = _stamp(status)
        self._number = number

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._number)

    def still(self) -> bool:
        """Return whether the file is as it was when it was opened."""
        return _stamp(os.fstat(self._number)) == self.stamp

    def read(self, start: int, length: int, /) -> bytes:
        """Return so many bytes from a place on, fewer where the file ends."""
        length = max(0, min(length, self.size - start))
        parts = []
        try:
            while length:
                if hasattr(os, "pread"):
                    part = os.pread(self._number, min(length, 1 << 30), start)
                else:
                    os.lseek(self._number, start, os.SEEK_SET)
                    part = os.read(self._number, min(length, 1 << 30))
                if not part:
                    break
                parts.append(part)
                start, length = start + len(part), length - len(part)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, view: memoryview, start: int = 0) -> int:
        """Fill a view from a place on; return how many bytes that are, fewer at the end."""
        done = 0
        try:
            if start or not hasattr(os, "readv"):
                os.lseek(self._number, start, os.SEEK_SET)
            while done < len(view):
                # Not more at once than every system takes.
                part = view[done : done + (1 << 30)]
                if hasattr(os, "readv"):
                    count = os.readv(self._number, [part])
                else:
                    data = os.read(self._number, len(part))
                    count = len(data)
                    part[:count] = data
                if not count:
                    break
                done += count
        except OSError as error:
            raise _unreadable(self.path, error) from error
        return done


def _unreadable(path: str | os.PathLike[str], error: OSError) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(at(path, f"expected a file that can be read, got {brief(error)}"))


def open_regular(
    path: Path, expected: str = EXPECTED, caller: str = "load_checkpoint", *, empty: bool = False
) -> OpenFile:
    """Open a file for reading.

    Args:
        path: the file, or a link to it.
        expected: what it should be, for messages.
        caller: the function, for messages.
        empty: whether it may have no bytes.

    Raises:
        MissingCheckpoint: there is none.
        UnreadableCheckpoint: it cannot be opened, is empty, or is no regular file.
    """

    def got(what: str) -> str:
        return at(path, f"expected {expected}, got {what}", caller)

    try:
        try:
            number = os.open(path, _FLAGS)
        except BlockingIOError:  # who has leased it must give it up first
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise
            number = os.open(path, os.O_RDONLY)
        except PermissionError:
            # Windows opens no folder.
            if stat.S_ISDIR(os.stat(path).st_mode):
                raise UnreadableCheckpoint(got("a directory")) from None
            raise
    except FileNotFoundError as error:
        raise MissingCheckpoint(got("no such file")) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        if isinstance(error, CheckpointError):
            raise
        kind = None
        with suppress(OSError, ValueError):  # a socket cannot be opened
            kind = _special(os.stat(path).st_mode)
        if kind is not None:
            raise UnreadableCheckpoint(
                at(path, f"expected a regular file or folder, got {kind}", caller)
            ) from error
        raise UnreadableCheckpoint(got(f"a file that cannot be opened ({brief(error)})")) from error
    file = OpenFile(path, number, os.fstat(number))
    try:
        mode = os.fstat(number).st_mode
        if stat.S_ISDIR(mode):
            raise UnreadableCheckpoint(got("a directory"))
        if (kind := _special(mode)) is not None:
            raise UnreadableCheckpoint(
                at(path, f"expected a regular file or folder, got {kind}", caller)
            )
        if not file.size and not empty:
            raise UnreadableCheckpoint(got("an empty file"))
    except BaseException:
        file.close()
        raise
    return file


def check_regular(path: Path, error: type[Exception], what: str) -> None:
    """Refuse what is no regular file and would be waited for, or read without an end.

    Args:
        path: a file, or a link to one; that it is missing or a folder, opening it will say.
        error: what is raised.
        what: the beginning of the message.
    """
    kind = None
    with suppress(OSError, ValueError):
        kind = _special(os.stat(path).st_mode)
    if kind is not None:
        raise error(f"{what}: expected a regular file, got {kind}")


def _special(mode: int) -> str | None:
    """Return what a file is that is neither a regular one nor a folder, else None."""
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


class _ChangedError(Exception):
    """Say that a file is not what it was a moment ago."""


class Files:
    """The files that one reading opens."""

    def __init__(self) -> None:
        self._stamps: dict[Path, _Stamp] = {}
        # What was read of small files, whole.
        self.texts: dict[Path, bytes] = {}

    def open(self, path: Path, expected: str = EXPECTED, *, empty: bool = False) -> OpenFile:
        """Open a regular file, as `open_regular`, and watch it until the end of the reading."""
        file = open_regular(path, expected, empty=empty)
        if path not in self._stamps:
            _settle(file)
        if self._stamps.setdefault(path, file.stamp) != file.stamp:
            file.close()
            raise _ChangedError
        return file

    @property
    def paths(self) -> list[Path]:
        """The files that were opened."""
        return list(self._stamps)

    def read_text(self, path: Path, expected: str, most: int) -> bytes:
        """Return a small file, whole.

        Args:
            path: the file.
            expected: what it should be, for messages.
            most: bytes.
        """
        with self.open(path, expected, empty=True) as file:
            if file.size > most:
                raise UnreadableCheckpoint(
                    at(path, f"expected {expected} of at most {most} bytes, got {file.size}")
                )
            self.texts[path] = text = file.read(0, file.size)
        return text

    def changed(self) -> bool:
        """Return whether a path leads to another file than it did, or a file was written to."""
        try:
            return any(_stamp(os.stat(path)) != stamp for path, stamp in self._stamps.items())
        except OSError:
            return True


def _settle(file: OpenFile) -> None:
    """Wait until a file's next change would show in its times, if the last one is so young."""
    times = (file.stamp.modified, file.stamp.changed)
    step = _STEP_NS if any(when % 1_000_000_000 for when in times) else _WHOLE_SECONDS_NS
    age = time.time_ns() - max(times)
    if 0 <= age < step:
        time.sleep((step - age) / 1e9)


def read_steadily(
    path: str | os.PathLike[str], read: Callable[[Files], _T], most: int = _ATTEMPTS
) -> _T:
    """Return what a reading returns during which no file changed that it opened.

    Args:
        path: for messages.
        read: is called again where a file changed.
        most: times that it is called.

    Raises:
        UnreadableCheckpoint: a file changed each time.
    """
    pause = _PAUSE_S
    for attempt in range(most):
        if attempt:
            time.sleep(pause)
            pause *= 2
        files = Files()
        try:
            found = read(files)
        except _ChangedError:
            continue
        except CheckpointError:
            if files.changed():  # perhaps what is wrong with it is that it is being written
                continue
            raise
        if not files.changed():
            return found
    raise UnreadableCheckpoint(
        at(
            path,
            f"expected files that nobody is writing, got some that changed each of the {most} "
            "times they were read; try again when the program that saves them is done",
        )
    )
