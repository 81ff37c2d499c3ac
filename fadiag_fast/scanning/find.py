"""Find checkpoints: folders, patterns, URLs and manifests."""

from __future__ import annotations

import glob
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from ..checkpoints.errors import CheckpointError
from ..checkpoints.folders import find_weights
from ..checkpoints.remote import expand_url, is_url, open_filesystem
from .run_names import Entry, read_manifest, series

# Of files that are looked for in a folder that is given in place of a glob.
_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".pt2")


_T = TypeVar("_T")


# What a scan may be given: paths, URLs and globs, or entries.
Checkpoints: TypeAlias = str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | Sequence[Entry]


def find_entries(
    checkpoints: Checkpoints,
    pattern: str | Sequence[str] | None = None,
    manifest: str | os.PathLike[str] | None = None,
) -> list[Entry]:
    """Return what is to be scanned, in order of run and step.

    Args, errors and warnings are those of :func:`scan`.
    """
    if manifest is not None:
        listed = read_manifest(manifest)
        if not checkpoints:
            return listed
    else:
        listed = []
    if isinstance(checkpoints, str | os.PathLike):
        checkpoints = [checkpoints]
    given: list[Any] = list(checkpoints)
    if given and all(isinstance(item, Entry) for item in given):
        found = _once(given, lambda entry: entry.path)
    else:
        matches = {item: _matches(item) for item in map(os.fspath, given)}
        found_paths = (path for matched in matches.values() for path in matched)
        # ./a.pt is a.pt, also for a later scan into the same folder.
        paths = [path if is_url(path) else str(Path(path)) for path in found_paths]
        empty = [item for item, matched in matches.items() if not matched]
        if empty and not paths:
            raise ValueError(f"scan: expected files that match {', '.join(empty)}, got none")
        for item in empty:
            warnings.warn(f"scan: {item}: no file matches", UserWarning, stacklevel=3)
        # Run names that do not depend on which files a glob happens to find.
        magic = [item for item in map(os.fspath, given) if glob.has_magic(item)]
        root = _root_of(magic[0]) if len(given) == len(magic) == 1 else None
        found = series(_once(paths, str), pattern, root=root)
    known = {_absolute(entry.path): entry for entry in listed}
    found = [known.pop(_absolute(entry.path), entry) for entry in found]
    if not found:
        raise ValueError("scan: expected at least one checkpoint, got none")
    return found


def _matches(item: str) -> list[str]:
    # A name with brackets is a name where there is such a file.
    if not glob.has_magic(item) or (not is_url(item) and os.path.lexists(item)):
        if not is_url(item) and os.path.isdir(item):
            _check_folder(item)
        return [item]
    return expand_url(item) if is_url(item) else sorted(glob.glob(item, recursive=True))


def _check_folder(folder: str) -> None:
    """Raise ValueError for a folder that is no checkpoint itself and holds some."""
    try:
        find_weights(Path(folder))
    except CheckpointError as error:
        for pattern in (f"*{suffix}" for suffix in _SUFFIXES):
            for depth in (pattern, f"**/{pattern}"):
                if next(Path(folder).glob(depth), None) is not None:
                    raise ValueError(
                        f"scan: {folder}: expected a checkpoint or a glob, got a folder that holds "
                        f"checkpoints; give '{os.path.join(folder, depth)}'"
                    ) from error


def _once(items: Iterable[_T], path_of: Callable[[_T], str]) -> list[_T]:
    """Return what names different files: of several names of one, the first."""
    places: dict[str, _T] = {}
    for item in items:
        places.setdefault(_absolute(path_of(item)), item)
    return list(places.values())


def _absolute(path: str) -> str:
    return path if is_url(path) else os.path.abspath(path)


def _root_of(pattern: str) -> str:
    """Return the folder that the runs of a glob are named from."""
    folder, name = os.path.split(pattern)
    if is_url(pattern) or not glob.has_magic(name) or glob.has_magic(folder):
        return _fixed_part(pattern)
    # One folder of checkpoints is a run: it has its name from the folder above.
    return os.path.dirname(folder or os.getcwd())


def _fixed_part(pattern: str) -> str:
    """Return the folder above a glob's first wildcard."""
    if is_url(pattern):
        plain = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.split("/"))
        filesystem, path = open_filesystem("/".join(plain))
        return str(filesystem.unstrip_protocol(path))  # as the matches are written
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return str(Path(*parts[:fixed])) if fixed else ""
