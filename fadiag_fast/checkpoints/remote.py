"""Reach checkpoints by URL, through fsspec."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .errors import (
    CheckpointError,
    MissingCheckpoint,
    MissingFsspec,
    UnreadableCheckpoint,
    at,
    brief,
)
from .folders import INDEX_SUFFIX

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
def local_copy(url: str) -> Iterator[Path]:
    """Give a URL's file or folder as a path of this machine, for as long as the block lasts.

    What is local already is not copied. A memory map of the copy outlives the block where the
    system allows it, and elsewhere (Windows) nothing is mapped.
    """
    filesystem, path = open_filesystem(url)
    if is_local(filesystem):
        yield Path(path)
        return
    with TemporaryDirectory(prefix="fadiag-") as folder:
        above, _, name = path.rstrip("/").rpartition("/")
        copy = Path(folder, "checkpoint", name or "all")
        try:
            if name.endswith(INDEX_SUFFIX):
                # Its shards lie beside it.
                filesystem.get(above, os.fspath(copy.parent), recursive=True)
            else:
                filesystem.get(path, os.fspath(copy), recursive=filesystem.isdir(path))
        except Exception as error:
            raise unreachable(url, error) from error
        try:
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
