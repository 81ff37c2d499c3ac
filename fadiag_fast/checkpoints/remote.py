"""Reach checkpoints by URL, through fsspec."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from .distributed import METADATA, files_of
from .errors import (
    EXPECTED,
    CheckpointError,
    MissingCheckpoint,
    MissingFsspec,
    UnreadableCheckpoint,
    at,
    brief,
)
from .folders import INDEX_SUFFIX, MOST_JSON, TRAINER_STATE, choose_weights, weight_map_of
from .opening import Files
from .restricted_pickle import MOST_BYTES

_CHUNK = 1 << 22

# Two letters at least: C:// is a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::.+)?://")


def is_url(path: str) -> bool:
    """Tell a URL from a path."""
    return _URL.match(path) is not None


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL and the path in it.

    Raises:
        MissingFsspec: fsspec, or what it needs for the protocol, is not installed.
        UnreadableCheckpoint: fsspec knows no such protocol, or cannot connect.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise MissingFsspec(
            at(
                url,
                "expected the fsspec package to read this URL, got no such package; install it "
                "with: pip install 'fadiag-fast[scan]'",
            )
        ) from error
    try:
        filesystem, path = url_to_fs(url)
    except ImportError as error:
        # fsspec says what to install, such as s3fs.
        raise MissingFsspec(
            at(url, f"expected what fsspec needs for this protocol, got {brief(error)}")
        ) from error
    except Exception as error:
        raise unreachable(url, error) from error
    return filesystem, path


@contextmanager
def local_copy(url: str, key: str | None = None) -> Iterator[Path]:
    """Give a URL's file or folder as a path of this machine, for as long as the block lasts.

    What is local already is not copied. Of a folder, and of what lies beside an index, only the
    files that are needed are.
    """
    filesystem, path = open_filesystem(url)
    if is_local(filesystem):
        yield Path(path)
        return
    with TemporaryDirectory(prefix="fadiag-") as folder:
        path = path.rstrip("/")
        above, _, name = path.rpartition("/")
        copy = Path(folder, "checkpoint", name or "all")
        fetch = _Fetch(filesystem, url.rstrip("/"))
        try:
            if filesystem.isdir(path):
                copy.mkdir(parents=True)
                _fetch_folder(fetch, path, copy, key)
            else:
                copy.parent.mkdir()
                fetch(path, copy, MOST_JSON if name.endswith(INDEX_SUFFIX) else None)
                if name.endswith(INDEX_SUFFIX):
                    _fetch_shards(fetch, above, copy)
            yield copy
        except CheckpointError as error:
            # The user knows the URL and not the copy.
            error.args = tuple(
                word.replace(os.fspath(copy), url.rstrip("/")).replace(
                    os.fspath(copy.parent), url.rstrip("/").rpartition("/")[0]
                )
                if isinstance(word, str)
                else word
                for word in error.args
            )
            raise


class _Fetch:
    """Copy files of a file system to this machine."""

    def __init__(self, filesystem: Any, url: str) -> None:
        self._filesystem = filesystem
        self._url = url

    def names(self, path: str) -> set[str]:
        """Return the names of what lies in a folder."""
        try:
            listing = self._filesystem.ls(path, detail=False)
        except Exception as error:
            raise unreachable(self._url, error) from error
        return {found.rstrip("/").rpartition("/")[2] for found in listing}

    def __call__(self, source: str, target: Path, most: int | None = None) -> None:
        """Copy one file, of which no more bytes are taken than it is said to have."""
        try:
            size = size_of(self._filesystem, source)
            if most is not None and size > most:
                raise UnreadableCheckpoint(
                    at(target, f"expected a file of at most {most} bytes, got {size}")
                )
            left = size
            with self._filesystem.open(source, "rb") as file, target.open("xb") as copy:
                while left and (part := file.read(min(left, _CHUNK))):
                    copy.write(part)
                    left -= len(part)
            if left:
                raise EOFError(f"it ends {left} bytes too early")
        except CheckpointError:
            raise
        except Exception as error:
            raise unreachable(self._url, error) from error


def size_of(filesystem: Any, path: str) -> int:
    """Return the bytes of a file.

    Raises:
        ValueError: the file system does not say.
    """
    size = filesystem.size(path)
    if not isinstance(size, int) or size < 0:
        raise ValueError("the server does not say how large the file is")
    return size


def _fetch_folder(fetch: _Fetch, path: str, copy: Path, key: str | None) -> None:
    names = fetch.names(path)
    weights = choose_weights(copy, names)
    if weights == METADATA:
        fetch(f"{path}/{weights}", copy / weights, MOST_BYTES)
        needed = files_of(copy, Files(), key)
    elif weights.endswith(INDEX_SUFFIX):
        fetch(f"{path}/{weights}", copy / weights, MOST_JSON)
        needed = set(weight_map_of(Files(), copy / weights).values())
    else:
        needed = {weights}
    # What is not there is missed where it is read.
    for name in sorted(needed & names):
        fetch(f"{path}/{name}", copy / name)
    if TRAINER_STATE in names:
        fetch(f"{path}/{TRAINER_STATE}", copy / TRAINER_STATE, MOST_JSON)


def _fetch_shards(fetch: _Fetch, above: str, index: Path) -> None:
    needed = set(weight_map_of(Files(), index).values())
    for name in sorted(needed & fetch.names(above)):
        fetch(f"{above}/{name}", index.parent / name)


def _new_bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def fetch_file(url: str, make: Callable[[int], Tensor] = _new_bytes) -> Tensor | None:
    """Return the bytes of a URL's file; None for a folder, an index, or a file of this machine.

    Args:
        url: of the file.
        make: returns memory, uint8 ``[bytes]``, for so many bytes.
    """
    filesystem, path = open_filesystem(url)
    try:
        if is_local(filesystem) or path.endswith(INDEX_SUFFIX) or filesystem.isdir(path):
            return None
        size = size_of(filesystem, path)
        target = make(size)[:size]
        view, done = target.numpy().data, 0
        with filesystem.open(path, "rb") as file:
            while done < size and (part := file.read(min(size - done, _CHUNK))):
                view[done : done + len(part)] = part
                done += len(part)
    except CheckpointError:
        raise
    except Exception as error:
        raise unreachable(url, error) from error
    if done < size:
        raise unreachable(url, EOFError(f"it ends {size - done} bytes too early"))
    if not size:
        raise UnreadableCheckpoint(at(url, f"expected {EXPECTED}, got an empty file"))
    return target


def expand_url(pattern: str) -> list[str]:
    """Return the URLs that a glob matches, sorted.

    Raises:
        CheckpointError: as :func:`open_filesystem`, or the file system cannot be listed.
    """
    filesystem, path = open_filesystem(pattern)
    try:
        return sorted(filesystem.unstrip_protocol(found) for found in filesystem.glob(path))
    except Exception as error:
        raise unreachable(pattern, error) from error


def is_local(filesystem: Any) -> bool:
    protocol = filesystem.protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


def unreachable(url: str, error: Exception) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return MissingCheckpoint(at(url, "expected a checkpoint, got no such file"))
    return UnreadableCheckpoint(at(url, f"expected a URL that can be read, got {brief(error)}"))
