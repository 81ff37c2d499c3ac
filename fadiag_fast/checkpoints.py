"""Read, apply and write model checkpoints without running code from them.

A checkpoint file is untrusted input: a pickle can run any program. Everything here therefore goes
through torch's weights-only reader; the full unpickler is used only when the caller says so, and
only for a file the weights-only reader has refused. What kind of file it is is decided from its
bytes, because extensions lie (and torch.load itself dispatches on ".safetensors").

Every failure is a CheckpointError, grouped by what the user can do about it:

    UnreadableCheckpoint   get the file again, or another file (MissingCheckpoint: fix the path)
    UnsafeCheckpoint       decide whether to trust the file
    NoStateDict            point at the file that holds the weights, or save them differently
    StateDictMismatch      build the model that belongs to the weights
    MissingSafetensors     install the extra
    UnsavableCheckpoint    change what is saved
    UnwritableCheckpoint   change where it is saved
"""

from __future__ import annotations

import difflib
import io
import mmap
import os
import pickle
import pickletools
import re
import secrets
import shutil
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "MissingCheckpoint",
    "MissingSafetensors",
    "NoStateDict",
    "StateDictMismatch",
    "UnreadableCheckpoint",
    "UnsafeCheckpoint",
    "UnsavableCheckpoint",
    "UnwritableCheckpoint",
    "load_checkpoint",
    "load_into",
    "save_checkpoint",
]

# Where training scripts put the state dict, in the order in which we look.
_CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model")

# What DataParallel / DistributedDataParallel and torch.compile put in front of every key.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")

# A message that lists a thousand keys is not read; ten show the pattern.
_MOST_LISTED = 10

# The number that opens every file torch.save wrote before the zip format (torch.serialization).
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

# A legacy file holds five pickles (magic, protocol, system, object, storage keys), then raw bytes.
_LEGACY_PICKLES = 5

# The format's own limit on its JSON header, which keeps random bytes from looking like a header.
_SAFETENSORS_MAX_HEADER = 100_000_000

_HEAD_BYTES = 512

# Things that often carry a checkpoint's name: first bytes, what it is, what to do.
_LOOKALIKES = (
    (
        b"version https://git-lfs.github.com/spec/v1",
        "a Git LFS pointer, not the file it stands for (run 'git lfs pull')",
    ),
    (b"\x1f\x8b", "a gzip-compressed file (decompress it first)"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes"),
    (b"\x93NUMPY", "a NumPy array file"),
)
_WEB_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")

# With this variable set, torch.load ignores weights_only=False.
FORCE_SAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"

_EXPECTED = "a torch.save or safetensors file"

_UNSAFE_WAY_OUT = (
    "If you trust where it came from, pass unsafe_pickle=True (command line: --unsafe-pickle). "
    "Warning: that runs code from the file, with all your rights."
)


class CheckpointError(ValueError):
    """Report that a checkpoint cannot be used as asked."""


class UnreadableCheckpoint(CheckpointError):
    """Report a file that is damaged, truncated, out of reach, or no checkpoint at all."""


class MissingCheckpoint(UnreadableCheckpoint, FileNotFoundError):
    """Report a path at which there is no file."""


class MissingSafetensors(CheckpointError, ImportError):
    """Report a safetensors file where the safetensors package is not installed."""


class UnsafeCheckpoint(CheckpointError):
    """Report a file that only the full unpickler, which runs code from the file, can read.

    `globals_needed` holds the functions and classes the file asks for beyond those that
    torch's weights-only reader allows, sorted.
    """

    globals_needed: tuple[str, ...] = ()


class NoStateDict(CheckpointError):
    """Report a file that loads but holds no state dict where one is looked for."""


class StateDictMismatch(CheckpointError):
    """Report weights that do not belong to the model."""


class UnsavableCheckpoint(CheckpointError):
    """Report content that could not be read back without running code from the file."""


class UnwritableCheckpoint(CheckpointError):
    """Report a path that cannot be written."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Hold a model's weights and where they came from.

    Attributes:
        path: the file, as given.
        state_dict: the weights, without wrapper prefixes in their names.
        format: 'torch-zip', 'torch-legacy', 'safetensors', or 'pickle' (a plain pickle, which is
            read only with unsafe_pickle=True).
        container: how the state dict was found: 'bare', the top-level key that held it, or
            'module' for a whole pickled module.
        removed_prefix: what was removed from the front of every key, such as 'module.'.
        extra: the other top-level entries; for safetensors, the file's metadata.
    """

    path: Path
    # Kept out of the repr: printing a checkpoint should not print its weights.
    state_dict: dict[str, Tensor] = field(repr=False)
    format: str
    container: str
    removed_prefix: str
    extra: dict[str, Any] = field(repr=False)


# ------------------------------------------------------------------------------------------------
# Loading


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
    head, size = read_head(path)
    if head.startswith(b"PK\x03\x04"):
        form, content = "torch-zip", _load_zip(path, device, unsafe_pickle)
    elif _looks_like_safetensors(head):
        form = "safetensors"
        content, metadata = _load_safetensors(path, device)
    else:
        form, content = _load_pickle(path, device, unsafe_pickle, head, size)

    state, container, extra = _find_state_dict(content, path, unsafe_pickle)
    if form == "safetensors":
        extra = metadata
    state, removed_prefix = _without_wrapper_prefixes(state)
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


def read_head(
    path: Path, expected: str = _EXPECTED, caller: str = "load_checkpoint"
) -> tuple[bytes, int]:
    """Return a regular file's first bytes and its size.

    Raises:
        UnreadableCheckpoint: it cannot be opened, is empty, or is no regular file.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableCheckpoint(at(path, f"expected {expected}, got a directory", caller))
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableCheckpoint(at(path, f"expected {expected}, got a special file", caller))
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except FileNotFoundError as error:
        raise MissingCheckpoint(
            at(path, f"expected {expected}, got no such file", caller)
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        if isinstance(error, CheckpointError):
            raise
        raise UnreadableCheckpoint(
            at(
                path,
                f"expected {expected}, got a file that cannot be opened ({brief(error)})",
                caller,
            )
        ) from error
    if status.st_size == 0:
        raise UnreadableCheckpoint(at(path, f"expected {expected}, got an empty file", caller))
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
    pickles = _pickles_in_zip(path)
    try:
        return _torch_load_zip(path, device, weights_only=True)
    except Exception as error:
        scan = _scan_zip(path, pickles)
        unsafe = _unsafe_globals(scan.names) | _unsafe_globals_by_torch(path)
        if not _refused_as_unsafe(scan, unsafe, error):
            raise damaged(path, error) from error
        if not unsafe_pickle:
            raise _needs_full_unpickler(path, "torch.save file", unsafe) from error
    with _full_unpickler_errors(path):
        return _torch_load_zip(path, device, weights_only=False)


def _torch_load_zip(path: Path, device: torch.device, *, weights_only: bool) -> Any:
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
    scan = _scan_pickle_file(path, pickles=1)
    if not scan.complete:
        raise UnreadableCheckpoint(at(path, f"expected {_EXPECTED}, got {_what_it_is(head, size)}"))
    if scan.integer != _LEGACY_MAGIC:
        # torch.load would first unpickle such a file and then object to it, so it never sees one.
        if not unsafe_pickle:
            raise _needs_full_unpickler(
                path, "plain pickle (not written by torch.save)", _unsafe_globals(scan.names)
            )
        with _full_unpickler_errors(path), path.open("rb") as file:
            return "pickle", _moved(pickle.load(file), device)
    try:
        with path.open("rb") as file:
            return "torch-legacy", torch.load(
                file, map_location=device, weights_only=True, mmap=False
            )
    except Exception as error:
        scan = _scan_pickle_file(path, _LEGACY_PICKLES)
        unsafe = _unsafe_globals(scan.names)
        if not _refused_as_unsafe(scan, unsafe, error):
            raise damaged(path, error) from error
        if not unsafe_pickle:
            raise _needs_full_unpickler(path, "legacy torch.save file", unsafe) from error
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


def damaged(
    path: Path, error: BaseException, caller: str = "load_checkpoint"
) -> UnreadableCheckpoint:
    """Return the error of a file whose content cannot be made sense of."""
    # torch's CPU allocator reports a lack of memory as a RuntimeError with its own name in it.
    lacks_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if lacks_memory or "DefaultCPUAllocator" in str(error):
        return UnreadableCheckpoint(
            at(
                path,
                "expected enough memory for its tensors, got too little, or a damaged file that "
                f"claims too much ({brief(error)})",
                caller,
            )
        )
    return UnreadableCheckpoint(
        at(
            path,
            f"expected a whole checkpoint, got a truncated or damaged one ({brief(error)})",
            caller,
        )
    )


def _needs_full_unpickler(path: Path, kind: str, unsafe: Iterable[str]) -> UnsafeCheckpoint:
    needed = tuple(sorted(_printable(name) for name in unsafe))
    asks = (
        f"asks for {listed(needed)}"
        if needed
        else "asks for no other function or class by name but uses pickle instructions that "
        "torch's weights-only reader does not accept"
    )
    error = UnsafeCheckpoint(
        at(
            path,
            f"expected a file of tensors and plain containers, got a {kind} that {asks}. "
            f"Nothing was run. {_UNSAFE_WAY_OUT}",
        )
    )
    error.globals_needed = needed
    return error


# ------------------------------------------------------------------------------------------------
# Looking at pickles without running them


@dataclass
class _Scan:
    """Collect what pickle streams name.

    `complete` says that they reach their ends; `integer` is the first one's value if it is nothing
    but an integer.
    """

    names: set[str] = field(default_factory=set)
    complete: bool = False
    integer: int | None = None


_STRING_OPCODES = (
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "UNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE",
    "BINUNICODE8",
)
_GET_OPCODES = ("GET", "BINGET", "LONG_BINGET")
_PUT_OPCODES = ("PUT", "BINPUT", "LONG_BINPUT")
_COMPUTED = "(a name computed while loading)"


def _scan_pickle(stream: Any, scan: _Scan) -> None:
    """Add one pickle's globals to `scan`.

    Raises whatever the disassembler does on a stream that is no whole pickle.
    """
    # Only strings matter, for the opcode that takes its names from the stack. What is not followed
    # exactly counts as unknown: the list informs people, and the weights-only reader decides.
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    integers, others = [], 0
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in ("PROTO", "FRAME", "STOP"):
            continue
        others += 1
        if name in ("GLOBAL", "INST"):
            scan.names.add(str(argument).replace(" ", ".", 1))
            stack.append(None)
        elif name == "STACK_GLOBAL":
            parts = stack[-2:]
            known = len(parts) == 2 and all(isinstance(part, str) for part in parts)
            scan.names.add(".".join(parts) if known else _COMPUTED)
            stack[-2:] = [None]
        elif name in ("EXT1", "EXT2", "EXT4"):
            scan.names.add(f"(copyreg extension {argument})")
            stack.append(None)
        elif name in _STRING_OPCODES:
            stack.append(argument)
        elif name in _GET_OPCODES:
            stack.append(memo.get(argument))
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1] if stack else None
        elif name in _PUT_OPCODES:
            memo[argument] = stack[-1] if stack else None
        else:
            if name in ("LONG", "LONG1", "LONG4"):
                integers.append(argument)
            stack.append(None)
        # Two strings are all that STACK_GLOBAL can take; a long file should not fill the memory.
        del stack[:-2]
        del integers[1:]
    if scan.integer is None and others == 1 and integers:
        scan.integer = integers[0]


def _pickles_in_zip(path: Path) -> list[str]:
    """Return the pickle records of a torch.save zip file, refusing any other zip file."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.namelist()
    except Exception as error:
        raise damaged(path, error) from error
    if any(_is_record(entry, "constants.pkl") for entry in entries):
        what = (
            "a TorchScript archive (fadiag_fast.load_packaged reads it as a model; for its weights "
            "alone save the model's state_dict())"
        )
    else:
        pickles = [entry for entry in entries if _is_record(entry, "data.pkl")]
        if pickles:
            return pickles
        held = listed([_printable(entry) for entry in entries])
        what = f"a zip archive that holds {held or 'nothing'}"
    raise UnreadableCheckpoint(at(path, f"expected {_EXPECTED}, got {what}"))


def _scan_zip(path: Path, pickles: list[str]) -> _Scan:
    scan = _Scan()
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in pickles:
                with archive.open(entry) as stream:
                    _scan_pickle(stream, scan)
        scan.complete = True
    except Exception:
        # zipfile, zlib and the disassembler raise many types; the scan then stays incomplete.
        return scan
    return scan


def _is_record(entry: str, name: str) -> bool:
    # Every record lies in one folder, named after the file or 'archive'.
    return entry.count("/") == 1 and entry.endswith(f"/{name}")


def _scan_pickle_file(path: Path, pickles: int) -> _Scan:
    """List what the first pickles of a file name."""
    scan = _Scan()
    try:
        # A mapping reads no more than there is, whatever length the stream claims.
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream,
        ):
            for _ in range(pickles):
                _scan_pickle(stream, scan)
        scan.complete = True
    except Exception:
        # The disassembler raises many types on bytes that are no pickle.
        return scan
    return scan


def _refused_as_unsafe(scan: _Scan, unsafe: set[str], error: Exception) -> bool:
    """Tell a whole file that needs the full unpickler from a damaged one."""
    # Where warnings are errors, torch's remark on an unusual pickle protocol is the refusal.
    return scan.complete and (
        bool(unsafe) or isinstance(error, pickle.UnpicklingError | UserWarning)
    )


def _unsafe_globals(names: Iterable[str]) -> set[str]:
    """Return those names that torch's weights-only reader does not allow."""
    # torch tells this only of a checkpoint, so one is made that names each of them and nothing
    # else. A name that does not fit into the instruction cannot be one that torch allows.
    fitting = {name for name in names if "." in name and name.isascii() and name.isprintable()}
    stream = io.BytesIO()
    stream.write(b"\x80\x02")
    for name in sorted(fitting):
        module, _, attribute = name.rpartition(".")
        stream.write(f"c{module}\n{attribute}\n".encode())
    stream.write(b".")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        archive.writestr("archive/version", b"3\n")
    buffer.seek(0)
    try:
        refused = set(torch.serialization.get_unsafe_globals_in_checkpoint(buffer))
    except Exception:
        # Better to list too much than to hide what a file asks for.
        refused = fitting
    return refused | (set(names) - fitting)


def _unsafe_globals_by_torch(path: Path) -> set[str]:
    # torch reads zip files a little differently from Python's zipfile, and what it would load is
    # what counts; but it gives up on pickles of other protocols, so this only adds to our list.
    try:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(os.fspath(path)))
    except Exception:
        return set()


# ------------------------------------------------------------------------------------------------
# Finding the state dict


def _find_state_dict(
    content: Any, path: Path, unsafe_pickle: bool
) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    state = _as_state_dict(content, path)
    if state is not None:
        return state, "module" if isinstance(content, nn.Module) else "bare", {}
    if isinstance(content, Mapping):
        for container in _CONTAINERS:
            state = _as_state_dict(content.get(container), path)
            if state is not None:
                extra = {str(key): value for key, value in content.items() if key != container}
                return state, container, extra
    whole = " or a whole nn.Module" if unsafe_pickle else ""
    raise NoStateDict(
        at(
            path,
            f"expected a state dict (names to tensors), bare or under one of "
            f"{', '.join(map(repr, _CONTAINERS))}{whole}, got {_outline(content)}",
        )
    )


def _as_state_dict(content: Any, path: Path) -> dict[str, Tensor] | None:
    if isinstance(content, nn.Module):
        try:
            content = content.state_dict()
        except Exception as error:  # the module's class is whatever the file says it is
            raise UnreadableCheckpoint(
                at(
                    path,
                    f"expected a module with a state dict, got one that fails ({brief(error)})",
                )
            ) from error
    if not isinstance(content, Mapping) or not content:
        return None
    if not all(isinstance(key, str) for key in content):
        return None
    if not all(isinstance(value, Tensor) for value in content.values()):
        return None
    # A dict that can carry load_state_dict's per-module versions, which state dicts come with.
    state: OrderedDict[str, Tensor] = OrderedDict(
        (key, value.detach()) for key, value in content.items()
    )
    versions = getattr(content, "_metadata", None)
    if isinstance(versions, Mapping) and all(isinstance(key, str) for key in versions):
        state._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    return state


def _outline(content: Any) -> str:
    """Describe what a file holds: its type, and for a dict its keys with their types."""
    if not isinstance(content, Mapping):
        return f"a {_printable(type(content).__name__)}"
    if not content:
        return "an empty dict"
    entries = []
    for key, value in content.items():
        text = f"{_printable(repr(key))}: {_printable(type(value).__name__)}"
        if key in _CONTAINERS and isinstance(value, Mapping):
            strays = [
                f"{_printable(repr(name))}: {_printable(type(entry).__name__)}"
                for name, entry in value.items()
                if not (isinstance(name, str) and isinstance(entry, Tensor))
            ]
            text += f" with {listed(strays)}" if strays else " (empty)"
        entries.append(text)
    return f"a dict with {listed(entries)}"


def _without_wrapper_prefixes(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    removed = _wrapper_prefix(state)
    if not removed:
        return state, ""
    renamed: OrderedDict[str, Tensor] = OrderedDict(
        (key[len(removed) :], value) for key, value in state.items()
    )
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        # Modules are named without the final dot, so the wrapped module itself becomes ''.
        renamed._metadata = OrderedDict(  # type: ignore[attr-defined]
            (f"{key}."[len(removed) : -1], value)
            for key, value in versions.items()
            if f"{key}.".startswith(removed)
        )
    return renamed, removed


def _wrapper_prefix(keys: Iterable[str]) -> str:
    """Return the longest run of wrapper prefixes that every key starts with."""
    keys = list(keys)
    found = ""
    while keys:
        for prefix in _WRAPPER_PREFIXES:
            # A key needs a name of its own after the prefix.
            longer = found + prefix
            if all(key.startswith(longer) and len(key) > len(longer) for key in keys):
                found = longer
                break
        else:
            break
    return found


# ------------------------------------------------------------------------------------------------
# Applying a checkpoint


def load_into(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model that has exactly these names and shapes.

    Names are compared without wrapper prefixes on either side, so the model may be wrapped by
    DistributedDataParallel or torch.compile or not, whatever the file was saved from. Values are
    converted to the model's dtypes and devices. A tied weight may be stored under any or all of
    its names, but not with different values. Non-persistent buffers are no part of a state dict
    and keep their values. Everything is compared before anything is copied.

    Raises:
        StateDictMismatch: a name is missing or unexpected, a shape differs, tied weights disagree,
            or a tensor has no data; the model is as it was.
    """
    # keep_vars: the model's own tensors, which tells lazy parameters from initialised ones.
    own = model.state_dict(keep_vars=True)
    wrapper = _wrapper_prefix(own)
    expected: dict[str, Any] = {key[len(wrapper) :]: value for key, value in own.items()}
    given = dict(checkpoint.state_dict)
    missing, disagreeing = _resolve_tied(expected, given)
    unexpected = [key for key in given if key not in expected]
    reshaped, without_data = [], []
    for key, tensor in given.items():
        target = expected.get(key)
        if not isinstance(target, Tensor):
            continue
        lazy = nn.parameter.is_lazy(target)
        if not lazy and target.shape != tensor.shape:
            reshaped.append(f"{key}: expected {list(target.shape)}, got {list(tensor.shape)}")
        if tensor.is_meta or (target.is_meta and not lazy):
            without_data.append(f"{key} (in the {'checkpoint' if tensor.is_meta else 'model'})")

    problems = [
        f"{title} ({len(entries)}): {listed(entries)}"
        for title, entries in (
            ("missing from the checkpoint", missing),
            ("unexpected in the checkpoint", _with_buffer_notes(model, wrapper, unexpected)),
            ("of another shape", reshaped),
            ("tied in the model but different in the checkpoint", disagreeing),
            ("on the meta device, without data", without_data),
        )
        if entries
    ]
    if problems:
        hint = _name_hint(missing, unexpected)
        raise StateDictMismatch(
            at(
                checkpoint.path,
                f"expected the names and shapes of {type(model).__name__}, got a state dict that "
                "does not match; the model is unchanged\n  "
                + "\n  ".join([*problems, *([hint] if hint else [])]),
                caller="load_into",
            )
        )

    state: OrderedDict[str, Tensor] = OrderedDict(
        (wrapper + key, tensor) for key, tensor in given.items()
    )
    versions = getattr(checkpoint.state_dict, "_metadata", None)
    if versions is not None:
        state._metadata = OrderedDict(  # type: ignore[attr-defined]
            (f"{wrapper}{key}".rstrip("."), value) for key, value in versions.items()
        )
    try:
        model.load_state_dict(state, strict=True)
    except Exception as error:
        # Only a module with a loading method or hook of its own can still object here.
        raise StateDictMismatch(
            at(
                checkpoint.path,
                f"expected {type(model).__name__} to accept names and shapes like its own, got a "
                f"refusal from its load_state_dict; the model may be partly loaded\n  {error}",
                caller="load_into",
            )
        ) from error


def _resolve_tied(
    expected: Mapping[str, Any], given: dict[str, Tensor]
) -> tuple[list[str], list[str]]:
    """Give tied weights that are stored once all their names; return missing and disagreeing.

    safetensors stores shared memory once, so a file of a tied model lacks the other names.
    """
    groups: dict[object, list[str]] = {}
    for key, value in expected.items():
        groups.setdefault(_identity(value), []).append(key)
    missing, disagreeing = [], []
    for names in groups.values():
        present = [name for name in names if name in given]
        if not present:
            missing.extend(names)
            continue
        source = given[present[0]]
        for name in present[1:]:
            # load_state_dict would let the last of them win, silently.
            if not _same_values(source, given[name]):
                disagreeing.append(f"{present[0]} and {name}")
        for name in names:
            given.setdefault(name, source)
    return missing, disagreeing


def _identity(value: Any) -> object:
    """Return a key that two entries share if and only if they are one tensor in memory."""
    if not isinstance(value, Tensor):
        return object()  # a module's extra state is never tied
    if (
        type(value) in (Tensor, nn.Parameter)
        and not nn.parameter.is_lazy(value)
        and value.layout == torch.strided
        and not value.is_meta
        and value.numel() > 0
    ):
        # Tying by .data makes two Parameter objects over one memory, so identity is not enough.
        return (value.device, value.dtype, value.data_ptr(), value.shape, value.stride())
    return id(value)


def _same_values(a: Tensor, b: Tensor) -> bool:
    if a.is_meta or b.is_meta:
        return True  # without data there is nothing to disagree; that is reported by itself
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # Bits, so that NaN equals itself and types without a comparison (float8) work.
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def _with_buffer_notes(model: nn.Module, wrapper: str, unexpected: list[str]) -> list[str]:
    buffers = {name[len(wrapper) :] for name, _ in model.named_buffers()}
    return [
        f"{key} (a non-persistent buffer of the model)" if key in buffers else key
        for key in unexpected
    ]


def _name_hint(missing: list[str], unexpected: list[str]) -> str:
    """Say what would reconcile the names, if one prefix or a close spelling does."""
    if not missing or not unexpected:
        return ""
    for longer, shorter, text in (
        (unexpected, missing, "the checkpoint's names have {!r} in front of the model's"),
        (missing, unexpected, "the model's names have {!r} in front of the checkpoint's"),
    ):
        prefix = _common_extra_prefix(longer, shorter)
        if prefix:
            return f"hint: {text.format(prefix)}, for example {prefix + shorter[0]!r}"
    # Spelling is compared for one name only: the comparison is slow, and one shows the pattern.
    close = difflib.get_close_matches(missing[0], unexpected, n=1)
    return f"hint: {missing[0]!r} is missing, and the checkpoint has {close[0]!r}" if close else ""


def _common_extra_prefix(longer: list[str], shorter: list[str]) -> str:
    """Return the prefix that turns every shorter name into one of the longer ones, or ''."""
    available = set(longer)
    for name in longer:
        if name.endswith(f".{shorter[0]}"):
            prefix = name[: -len(shorter[0])]
            if all(prefix + other in available for other in shorter):
                return prefix
    return ""


# ------------------------------------------------------------------------------------------------
# Saving


def save_checkpoint(obj: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a dict so that the file is either whole or untouched, and safe to read back.

    The content goes to a temporary file in the same folder, is read back with torch's weights-only
    reader, and then takes the path's place in one step.

    Raises:
        TypeError: obj is not a dict.
        UnsavableCheckpoint: obj holds something that torch.load(weights_only=True) refuses, or the
            path ends in '.safetensors', which this is not.
        UnwritableCheckpoint: the folder does not exist, cannot be written, or is full.
    """
    if not isinstance(obj, dict):
        raise TypeError(f"save_checkpoint: expected a dict, got {type(obj).__name__}")
    path = Path(path)
    if path.suffix == ".safetensors":
        raise UnsavableCheckpoint(
            at(
                path,
                "expected a name such as 'model.pt' for torch's format, got one in '.safetensors', "
                "which readers would take for the other format",
                caller="save_checkpoint",
            )
        )
    temporary = None
    try:
        # Through a link, the file it points to is replaced, not the link.
        target = Path(os.path.realpath(path))
        # Not tempfile: it would give the checkpoint the mode 0600 instead of the user's own.
        temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
        with temporary.open("xb") as file:
            _write(obj, file, path)
            file.flush()
            os.fsync(file.fileno())
        _check_read_back(temporary, path)
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte, or without a name
        raise UnwritableCheckpoint(
            at(
                path,
                f"expected a file that can be written, got {brief(error)}",
                caller="save_checkpoint",
            )
        ) from error
    finally:
        # Gone already if all went well, and never made if the folder was the problem.
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _write(obj: dict[str, Any], file: io.BufferedWriter, path: Path) -> None:
    try:
        torch.save(obj, file)
    except OSError:
        raise
    except Exception as error:
        raise UnsavableCheckpoint(
            at(
                path,
                "expected tensors and plain containers, got something that cannot be pickled "
                f"({brief(error)})",
                caller="save_checkpoint",
            )
        ) from error


def _check_read_back(temporary: Path, path: Path) -> None:
    try:
        _torch_load_zip(temporary, torch.device("cpu"), weights_only=True)
    except Exception as error:
        unsafe = sorted(_printable(name) for name in _unsafe_globals_by_torch(temporary))
        what = listed(unsafe) or brief(error)
        raise UnsavableCheckpoint(
            at(
                path,
                "expected tensors and plain containers, got content that "
                f"torch.load(weights_only=True) could not read back: {what}",
                caller="save_checkpoint",
            )
        ) from error


# ------------------------------------------------------------------------------------------------
# Wording


def at(path: Path, text: str, caller: str = "load_checkpoint") -> str:
    return f"{caller}: {os.fspath(path)!r}: {text}"


def listed(entries: Iterable[str]) -> str:
    entries = list(entries)
    more = len(entries) - _MOST_LISTED
    shown = ", ".join(map(_escaped, entries[:_MOST_LISTED]))
    return shown + (f" (+{more} more)" if more > 0 else "")


def _escaped(text: str) -> str:
    """Make text from a file fit for a terminal: no control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _printable(text: str) -> str:
    """Make text from a file fit for a message: no control characters and not endless."""
    safe = _escaped(text)
    return safe if len(safe) <= 120 else safe[:117] + "..."


def brief(error: BaseException) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {_printable(first)}" if first else type(error).__name__


def _what_it_is(head: bytes, size: int) -> str:
    """Describe a file that is no checkpoint from its first bytes."""
    for signature, description in _LOOKALIKES:
        if head.startswith(signature):
            return description
    if head.lstrip().lower().startswith(_WEB_PAGES):
        return "a web page, perhaps a download's error message or login form"
    if head[257:262] == b"ustar":
        return "a tar archive (unpack it first)"
    if head[:1] == b"\x80" or b"PK\x03\x04".startswith(head):
        return f"a truncated or damaged file of {size} bytes"
    start = head[:40]
    try:
        text = head.decode("utf-8", errors="strict" if size <= _HEAD_BYTES else "ignore")
    except UnicodeDecodeError:
        return f"a file of {size} bytes that starts with {start!r}"
    if all(c.isprintable() or c.isspace() for c in text):
        return f"a text file that starts with {_printable(text[:40])!r}"
    return f"a file of {size} bytes that starts with {start!r}"
