"""Read one file of any format that holds tensors, without running code from it."""

from __future__ import annotations

import os
import pickle
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import (
    EXPECTED,
    CheckpointError,
    MissingCheckpoint,
    MissingSafetensors,
    UnreadableCheckpoint,
    UnsafeCheckpoint,
    at,
    brief,
    damaged,
    needs_full_unpickler,
)
from .lookalikes import HEAD_BYTES, what_it_is
from .pickles import (
    pickles_in_zip,
    refused_as_unsafe,
    scan_pickle_file,
    scan_zip,
    unsafe_globals,
    unsafe_globals_by_torch,
)

# The number that opens every file torch.save wrote before the zip format (torch.serialization).
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

# A legacy file holds five pickles (magic, protocol, system, object, storage keys), then raw bytes.
_LEGACY_PICKLES = 5

# The format's own limit on its JSON header, which keeps random bytes from looking like a header.
SAFETENSORS_MAX_HEADER = 100_000_000

# With this variable set, torch.load ignores weights_only=False.
FORCE_SAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@dataclass(frozen=True)
class Loaded:
    """Hold what was read, before the state dict is looked for in it.

    Attributes:
        format: as in Checkpoint.
        content: the object that was in the file, or the weights of a folder's files.
        extra: what is to be told beside the content's other entries.
        container: where the reader found the weights, if it looked for them itself.
    """

    format: str
    content: Any
    extra: dict[str, Any] | None = None
    container: str = ""


def load_file(path: Path, device: torch.device, unsafe_pickle: bool) -> Loaded:
    """Read a file; its content decides the format."""
    head, size = read_head(path)
    if head.startswith(b"PK\x03\x04"):
        return Loaded("torch-zip", _load_zip(path, device, unsafe_pickle))
    if looks_like_safetensors(head):
        return Loaded("safetensors", *load_safetensors(path, device))
    return Loaded(*_load_pickle(path, device, unsafe_pickle, head, size))


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


def read_head(
    path: Path, expected: str = EXPECTED, caller: str = "load_checkpoint"
) -> tuple[bytes, int]:
    """Return a regular file's first bytes and its size.

    Raises:
        UnreadableCheckpoint: it cannot be opened, is empty, or is no regular file.
    """

    def got(what: str) -> str:
        return at(path, f"expected {expected}, got {what}", caller)

    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableCheckpoint(got("a directory"))
        if not stat.S_ISREG(status.st_mode):
            special = _special_file(status.st_mode)
            raise UnreadableCheckpoint(
                at(path, f"expected a regular file or folder, got {special}", caller)
            )
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError as error:
        raise MissingCheckpoint(got("no such file")) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        if isinstance(error, CheckpointError):
            raise
        raise UnreadableCheckpoint(got(f"a file that cannot be opened ({brief(error)})")) from error
    if status.st_size == 0:
        raise UnreadableCheckpoint(got("an empty file"))
    return head, status.st_size


def _special_file(mode: int) -> str:
    """Return what a file is that is neither a regular one nor a folder."""
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def looks_like_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= SAFETENSORS_MAX_HEADER


def load_safetensors(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise MissingSafetensors(
            at(
                path,
                "expected the safetensors package to read this safetensors file, got no such "
                "package; install it with: pip install 'fadiag-fast[checkpoints]'",
            )
        ) from error
    try:
        with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            # One tensor at a time, so that a copy for another device never doubles the memory.
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise damaged(path, error) from error
    return tensors, metadata


def _load_zip(path: Path, device: torch.device, unsafe_pickle: bool) -> Any:
    pickles = pickles_in_zip(path)
    try:
        return torch_load_zip(path, device, weights_only=True)
    except Exception as error:
        if "TorchScript archives" in str(error):
            # zipfile has not seen the program, and torch.load without weights_only would run it.
            raise damaged(path, error) from error
        scan = scan_zip(path, pickles)
        unsafe = unsafe_globals(scan.names) | unsafe_globals_by_torch(path)
        if not refused_as_unsafe(scan, unsafe, error):
            raise damaged(path, error) from error
        if not unsafe_pickle:
            raise needs_full_unpickler(path, "torch.save file", unsafe) from error
    with _full_unpickler_errors(path):
        return torch_load_zip(path, device, weights_only=False)


def torch_load_zip(path: Path, device: torch.device, *, weights_only: bool) -> Any:
    # On Windows a mapped file cannot be replaced, so a training run could no longer save over the
    # checkpoint under study. A name in ".safetensors" would send torch.load to another reader, and
    # torch.load maps only what it is given by name, and only by names that are UTF-8.
    is_utf8 = os.fspath(path).encode("utf-8", "replace") == os.fsencode(path)
    if os.name != "nt" and path.suffix != ".safetensors" and is_utf8:
        try:
            return torch.load(
                os.fspath(path), map_location=device, weights_only=weights_only, mmap=True
            )
        except RuntimeError as error:
            # Some network and FUSE file systems cannot map files; they can still be read.
            if "unable to mmap" not in str(error):
                raise
    with path.open("rb") as file:
        return torch.load(file, map_location=device, weights_only=weights_only, mmap=False)


def _load_pickle(
    path: Path, device: torch.device, unsafe_pickle: bool, head: bytes, size: int
) -> tuple[str, Any]:
    """Read torch's older format or, if allowed, a plain pickle."""
    scan = scan_pickle_file(path, pickles=1)
    if not scan.complete:
        raise UnreadableCheckpoint(at(path, f"expected {EXPECTED}, got {what_it_is(head, size)}"))
    if scan.integer != _LEGACY_MAGIC:
        # torch.load would first unpickle such a file and then object to it, so it never sees one.
        if not unsafe_pickle:
            raise needs_full_unpickler(
                path, "plain pickle (not written by torch.save)", unsafe_globals(scan.names)
            )
        with _full_unpickler_errors(path), path.open("rb") as file:
            return "pickle", _moved(pickle.load(file), device)
    try:
        with path.open("rb") as file:
            return "torch-legacy", torch.load(
                file, map_location=device, weights_only=True, mmap=False
            )
    except Exception as error:
        scan = scan_pickle_file(path, _LEGACY_PICKLES)
        unsafe = unsafe_globals(scan.names)
        if not refused_as_unsafe(scan, unsafe, error):
            raise damaged(path, error) from error
        if not unsafe_pickle:
            raise needs_full_unpickler(path, "legacy torch.save file", unsafe) from error
    with _full_unpickler_errors(path), path.open("rb") as file:
        return "torch-legacy", torch.load(file, map_location=device, weights_only=False, mmap=False)


def _moved(content: Any, device: torch.device) -> Any:
    """Move what a plain pickle held, for which torch.load's map_location does not exist."""
    if isinstance(content, Tensor | nn.Module):
        return content.to(device)
    if isinstance(content, dict):
        # In place: the dict's own type and attributes (a state dict's versions) are kept.
        for key, value in content.items():
            content[key] = _moved(value, device)
    return content


@contextmanager
def _full_unpickler_errors(path: Path) -> Iterator[None]:
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
