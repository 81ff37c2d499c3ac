"""The files of a scan's folder: written whole, with a checksum, by one process at a time."""

from __future__ import annotations

import errno
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from .._common.extras import arrow, require
from . import seals
from .errors import LockedResults, UnwritableResults
from .store import LOCK, OWNER, PARTS

_TEMPORARY = ".partial"


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


class LockedFolder:
    """A folder that one process writes to.

    Args:
        folder: made if need be.
        disk: the operations on files.
        started: since when, for whoever finds it locked.

    Raises:
        LockedResults: another scan is writing here; the message says which.
        UnwritableResults: the folder cannot be written.
        MissingExtra: filelock is not installed.
    """

    def __init__(self, folder: Path, disk: Disk, started: datetime) -> None:
        self.folder = folder
        self._disk = disk
        try:
            (folder / PARTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.unwritable(error) from error
        self._lock: Any = self._acquire(started)

    def _acquire(self, started: datetime) -> Any:
        filelock = require("filelock", "a scan's folder")
        lock = filelock.FileLock(self.folder / LOCK, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise LockedResults(
                f"scan results: {self.folder}: expected to write here alone, got another scan "
                f"at it ({_owner_text(self.folder / OWNER)}); wait for it to end, or choose "
                f"another folder"
            ) from None
        except OSError as error:
            raise self.unwritable(error) from error
        owner = {
            "pid": os.getpid(),
            "host": platform.node(),
            "since": started.isoformat(timespec="seconds"),
        }
        try:
            self.put(self.folder / OWNER, json.dumps(owner).encode())
        except OSError as error:
            lock.release()
            raise self.unwritable(error) from error
        except BaseException:
            lock.release()
            raise
        return lock

    @property
    def is_held(self) -> bool:
        """Whether this process still writes here."""
        return self._lock is not None

    def release(self) -> None:
        """Let others write here."""
        lock, self._lock = self._lock, None
        try:
            self._disk.remove(self.folder / OWNER)
        finally:
            lock.release()

    def remove(self, path: Path) -> None:
        """Remove a file that may be gone already."""
        self._disk.remove(path)

    def remove_leftovers(self) -> None:
        """Remove what a writer that was killed had not finished."""
        for folder in (self.folder, self.folder / PARTS):
            for path in folder.glob(f".*{_TEMPORARY}"):
                self._disk.remove(path)

    def put_part(self, path: Path, table: Any) -> None:
        """Write a table as an Arrow file."""
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
        self.put(path, sealed(sink, blank))

    def put(self, path: Path, data: Any) -> None:
        """Write a file that is there whole or as it was.

        Raises:
            OSError: the disk refuses; see :meth:`unwritable`.
        """
        temporary = path.with_name(f".{path.name}{_TEMPORARY}")
        try:
            self._disk.write(temporary, data)
            self._disk.rename(temporary, path)
            self._disk.sync_folder(path.parent)
        except OSError:
            with suppress(OSError):  # else the next writer cleans up
                self._disk.remove(temporary)
            raise

    def unwritable(self, error: OSError, waiting: int = 0) -> UnwritableResults:
        """Return the error for a disk that refuses, with the number of rows that wait for it."""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else f"it cannot be written ({error})"
        rows = f"; {waiting} rows wait to be written" if waiting else ""
        return UnwritableResults(
            f"scan results: {self.folder}: {what}{rows}; what was written before stays "
            f"readable, and the same scan, started again, goes on from there"
        )


def sealed(sink: Any, blank: Mapping[bytes, bytes]) -> bytearray:
    """Return what was written to a sink, with its checksum."""
    data = bytearray(sink.getvalue())
    seals.seal(data, blank)
    return data


def _owner_text(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it left no name"
