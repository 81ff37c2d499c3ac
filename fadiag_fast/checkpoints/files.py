"""Read one file of any format that holds tensors, without running code from it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import torch_legacy
from .errors import (
    EXPECTED,
    UnreadableCheckpoint,
    UnsafeCheckpoint,
    at,
    brief,
    damaged,
    needs_full_unpickler,
)
from .lookalikes import HEAD_BYTES, first_member_of_another, what_it_is
from .opening import Source, SourceStream, open_regular
from .pickles import scan_pickles, scan_zip, unsafe_globals
from .restricted_pickle import PickleError, UnknownInstruction
from .safetensors_layouts import SafetensorsError, looks_like_safetensors, read_header
from .torch_zip import (
    Archive,
    ZipError,
    pickle_of,
    read_archive,
    read_content,
    unpacked,
)

# With this variable set, torch.load ignores weights_only=False.
FORCE_SAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@dataclass(frozen=True)
class Loaded:
    """Hold what was read, before the state dict is looked for in it.

    Attributes:
        format: as in Checkpoint.
        content: the object that was in the file, tensors in it being the places of their bytes
            where the file's own were found; or the weights of a folder's files.
        extra: what is to be told beside the content's other entries.
        container, notes: where the reader found the weights, if it looked for them itself, and what
            it passed over.
        refusal: why the content is not whole, for the case that there are no weights in it.
    """

    format: str
    content: Any
    extra: dict[str, Any] | None = None
    container: str = ""
    notes: tuple[str, ...] = ()
    refusal: UnsafeCheckpoint | None = None


def read_head(
    path: Path, expected: str = EXPECTED, caller: str = "load_checkpoint"
) -> tuple[bytes, int]:
    """Return a regular file's first bytes and its size.

    Raises:
        UnreadableCheckpoint: it cannot be opened, is empty, or is no regular file.
    """
    with open_regular(path, expected, caller) as file:
        return file.read(0, HEAD_BYTES), file.size


def usable_device(map_location: str | torch.device) -> torch.device:
    try:
        device = torch.device(map_location)
        # Reaching the device now keeps "no CUDA here" apart from "the file is damaged".
        torch.empty(0, device=device)
    except Exception as error:
        raise ValueError(
            "load_checkpoint: map_location: expected a device of this machine such as 'cpu', "
            f"got {map_location!r} ({brief(error)})"
        ) from error
    return device


def read_file(
    source: Source, path: str | os.PathLike[str], base: int = 0, unsafe_pickle: bool = False
) -> Loaded:
    """Return what a file holds; its content decides the format.

    Args:
        source: the file's bytes. The same ones are given to torch where a file needs it.
        path: for messages.
        base: is added to the places of tensors.
        unsafe_pickle: run code from the file if it needs that.
    """
    head = source.read(0, HEAD_BYTES)
    if head.startswith(b"PK\x03\x04"):
        return _loaded("torch-zip", _read_zip(source, path, base, unsafe_pickle))
    if looks_like_safetensors(head):
        try:
            places, metadata = read_header(source, base)
        except SafetensorsError as error:
            raise damaged(path, error) from error
        return Loaded("safetensors", places, metadata)
    return _loaded(*_read_pickle(source, path, base, unsafe_pickle, head))


class _Partly(NamedTuple):
    """Hold what a file holds but for objects that only others make, and why those are left out."""

    value: Any
    refusal: UnsafeCheckpoint


def _loaded(form: str, content: Any) -> Loaded:
    if isinstance(content, _Partly):
        return Loaded(form, content.value, refusal=content.refusal)
    return Loaded(form, content)


def _read_zip(source: Source, path: str | os.PathLike[str], base: int, unsafe_pickle: bool) -> Any:
    try:
        archive = read_archive(source)
    except ZipError as error:
        if what := first_member_of_another(source.read(0, HEAD_BYTES)):
            raise UnreadableCheckpoint(at(path, f"expected {EXPECTED}, got {what}")) from error
        raise damaged(path, error) from error
    if archive.foreign:
        raise UnreadableCheckpoint(at(path, f"expected {EXPECTED}, got {archive.foreign}"))
    packed = archive.packed
    try:
        if packed:
            source = unpacked(source)
            archive = read_archive(source)
        content = read_content(source.read, archive, pickle_of(source.read, archive), base)
    except ZipError as error:
        raise damaged(path, error) from error
    except PickleError as error:
        return _refused_zip(source, path, archive, unsafe_pickle, error)
    if content.native and not content.unknown and not packed:
        return content.value
    # What the weights-only reader allows by name neither runs code nor takes more memory than the
    # file; what would has been refused above.
    if unsafe := unsafe_globals(content.unknown):
        if content.native and not packed and not unsafe_pickle:
            return _Partly(content.value, needs_full_unpickler(path, "torch.save file", unsafe))
        return _with_full_unpickler(source, path, "torch.save file", unsafe, unsafe_pickle)
    try:
        return _load(source, weights_only=True)
    except Exception as error:
        if content.native and not packed and not unsafe_pickle and _by_instruction(error):
            refusal = needs_full_unpickler(path, "torch.save file", content.unknown)
            return _Partly(content.value, refusal)
        return _refused_zip(source, path, archive, unsafe_pickle, error)


def _load(source: Source, *, weights_only: bool) -> Any:
    stream: Any = SourceStream(source)
    return torch.load(stream, map_location="cpu", weights_only=weights_only, mmap=False)


def _refused_zip(
    source: Source,
    path: str | os.PathLike[str],
    archive: Archive,
    unsafe_pickle: bool,
    error: Exception,
) -> Any:
    """Tell a whole file that needs the full unpickler from a damaged one."""
    scan = scan_zip(source, archive)
    unsafe = unsafe_globals(scan.names)
    if not scan.complete or not (unsafe or _by_instruction(error)):
        raise damaged(path, error) from error
    return _with_full_unpickler(source, path, "torch.save file", unsafe, unsafe_pickle, error)


def _by_instruction(error: Exception) -> bool:
    # Where warnings are errors, torch's remark on an unusual pickle protocol is the refusal.
    return isinstance(error, UnknownInstruction | pickle.UnpicklingError | UserWarning)


def _with_full_unpickler(
    source: Source,
    path: str | os.PathLike[str],
    kind: str,
    unsafe: set[str],
    unsafe_pickle: bool,
    error: Exception | None = None,
) -> Any:
    if not unsafe_pickle:
        raise needs_full_unpickler(path, kind, unsafe) from error
    with _full_unpickler_errors(path):
        return _load(source, weights_only=False)


def _read_pickle(
    source: Source,
    path: str | os.PathLike[str],
    base: int,
    unsafe_pickle: bool,
    head: bytes,
) -> tuple[str, Any]:
    """Read torch's older format or, if allowed, a plain pickle."""
    if not torch_legacy.looks_like(head):
        scan = scan_pickles(source, 1)
        if not scan.complete:
            what = what_it_is(head, source.size)
            raise UnreadableCheckpoint(at(path, f"expected {EXPECTED}, got {what}"))
        # torch.load would first unpickle such a file and then object to it, so it never sees one.
        if not unsafe_pickle:
            raise needs_full_unpickler(
                path, "plain pickle (not written by torch.save)", unsafe_globals(scan.names)
            )
        with _full_unpickler_errors(path):
            return "pickle", pickle.loads(source.read(0, source.size))
    kind = "legacy torch.save file"
    try:
        value, unknown = torch_legacy.read_content(source, base)
        if not unknown:
            return "torch-legacy", value
        if unsafe := unsafe_globals(unknown):
            if not unsafe_pickle:
                return "torch-legacy", _Partly(value, needs_full_unpickler(path, kind, unsafe))
            return "torch-legacy", _with_full_unpickler(source, path, kind, unsafe, unsafe_pickle)
        try:
            return "torch-legacy", _load(source, weights_only=True)
        except Exception as error:
            if unsafe_pickle or not _by_instruction(error):
                raise
            return "torch-legacy", _Partly(value, needs_full_unpickler(path, kind, unknown))
    except UnsafeCheckpoint:
        raise
    except Exception as error:
        scan = scan_pickles(source, torch_legacy.PICKLES)
        unsafe = unsafe_globals(scan.names)
        if not scan.complete or not (unsafe or _by_instruction(error)):
            raise damaged(path, error) from error
        return "torch-legacy", _with_full_unpickler(
            source, path, kind, unsafe, unsafe_pickle, error
        )


def moved(content: Any, device: torch.device) -> Any:
    """Move tensors and modules of a dict, or the one that it is, to a device."""
    if isinstance(content, Tensor | nn.Module):
        return content.to(device)
    if isinstance(content, dict):
        # In place: the dict's own type and attributes (a state dict's versions) are kept.
        for key, value in content.items():
            content[key] = moved(value, device)
    return content


@contextmanager
def _full_unpickler_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise UnreadableCheckpoint(
            at(
                path,
                "expected a pickle whose classes can be imported here, "
                f"got one whose cannot ({brief(error)}); import or install what it names",
            )
        ) from error
    except Exception as error:
        if os.environ.get(FORCE_SAFE) and isinstance(error, pickle.UnpicklingError):
            raise UnsafeCheckpoint(
                at(
                    path,
                    "expected an environment that allows unsafe_pickle=True, got one that sets "
                    f"{FORCE_SAFE}, which makes torch refuse",
                )
            ) from error
        raise damaged(path, error) from error


def is_plain_name(name: str) -> bool:
    """Tell a file's name from a path that leads elsewhere, on any system."""
    return name not in ("", ".", "..") and not any(c in name for c in "/\\:\0")
