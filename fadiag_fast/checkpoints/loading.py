"""Read a checkpoint without running code from it."""

from __future__ import annotations

import os
import pickle
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .content import Checkpoint, find_state_dict, without_wrapper_prefixes
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
_SAFETENSORS_MAX_HEADER = 100_000_000


# With this variable set, torch.load ignores weights_only=False.
_FORCE_SAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    map_location: str | torch.device = "cpu",
    unsafe_pickle: bool = False,
) -> Checkpoint:
    """Read a model's weights from a file without running code from it.

    Accepts a bare state dict, one under 'state_dict', 'model_state_dict', 'model_state' or 'model'
    (the first of these that holds one; the others stay in `extra`), and a safetensors file. A
    'module.' or '_orig_mod.' that every key carries is removed, however they are nested.

    Zip files are memory-mapped, privately: writing to a tensor does not change the file. Replace
    such a file (as `save_checkpoint` does) rather than overwrite it while its weights are in use.

    Args:
        path: the file; its content decides the format, not its extension.
        map_location: the device on which the tensors end up.
        unsafe_pickle: allow the full unpickler, WHICH RUNS CODE FROM THE FILE, for a file that the
            weights-only reader refuses; a whole pickled nn.Module is then accepted too.

    Raises:
        UnreadableCheckpoint: the file is missing (MissingCheckpoint, also a FileNotFoundError),
            empty, truncated, not readable, or not a checkpoint.
        UnsafeCheckpoint: the file needs the full unpickler; the message lists what it asks for.
        NoStateDict: the file holds no state dict; the message lists what it does hold.
        MissingSafetensors: the safetensors package is needed and not installed.
        ValueError: map_location names no device of this machine.
    """
    path = Path(path)
    device = _usable_device(map_location)
    head, size = _read_head(path)
    if head.startswith(b"PK\x03\x04"):
        form, content = "torch-zip", _load_zip(path, device, unsafe_pickle)
    elif _looks_like_safetensors(head):
        form = "safetensors"
        content, metadata = _load_safetensors(path, device)
    else:
        form, content = _load_pickle(path, device, unsafe_pickle, head, size)

    state, container, extra = find_state_dict(content, path, unsafe_pickle)
    if form == "safetensors":
        extra = metadata
    state, removed_prefix = without_wrapper_prefixes(state)
    return Checkpoint(path, state, form, container, removed_prefix, extra)


def _usable_device(map_location: str | torch.device) -> torch.device:
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


def _read_head(path: Path) -> tuple[bytes, int]:
    """Return a regular file's first bytes and its size."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableCheckpoint(at(path, f"expected {EXPECTED}, got a directory"))
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableCheckpoint(at(path, f"expected {EXPECTED}, got a special file"))
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError as error:
        raise MissingCheckpoint(at(path, f"expected {EXPECTED}, got no such file")) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        if isinstance(error, CheckpointError):
            raise
        raise UnreadableCheckpoint(
            at(path, f"expected {EXPECTED}, got a file that cannot be opened ({brief(error)})")
        ) from error
    if status.st_size == 0:
        raise UnreadableCheckpoint(at(path, f"expected {EXPECTED}, got an empty file"))
    return head, status.st_size


def _looks_like_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _SAFETENSORS_MAX_HEADER


def _load_safetensors(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
    # torch.load maps only what it is given by name.
    if os.name != "nt" and path.suffix != ".safetensors":
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
        if os.environ.get(_FORCE_SAFE) and isinstance(error, pickle.UnpicklingError):
            raise UnsafeCheckpoint(
                at(
                    path,
                    "expected an environment that allows unsafe_pickle=True, got one that sets "
                    f"{_FORCE_SAFE}, which makes torch refuse",
                )
            ) from error
        raise damaged(path, error) from error
