"""What can go wrong with a checkpoint, by remedy, and the words for it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import torch

# A message that lists a thousand keys is not read; ten show the pattern.
_MOST_LISTED = 10
_MOST_OF_A_TEXT = 120
_MOST_OF_A_NAME = 1000

EXPECTED = "a torch.save or safetensors file"

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


class MissingFsspec(CheckpointError, ImportError):
    """Report a URL where fsspec, or what fsspec needs for its protocol, is not installed."""


class UnsafeCheckpoint(CheckpointError):
    """Report a file that only the full unpickler, which runs code from the file, can read.

    `globals_needed` holds the functions and classes the file asks for beyond those that
    torch's weights-only reader allows, sorted.
    """

    globals_needed: tuple[str, ...] = ()


class UntrustedProgram(UnsafeCheckpoint):
    """Report a program, TorchScript or ``.pt2``, that was to be opened without ``trust_code``."""


class NoStateDict(CheckpointError):
    """Report a file that loads but holds no state dict where one is looked for."""


class StateDictMismatch(CheckpointError):
    """Report weights that do not belong to the model."""


class UnsavableCheckpoint(CheckpointError):
    """Report content that could not be read back without running code from the file."""


class UnwritableCheckpoint(CheckpointError):
    """Report a path that cannot be written."""


def damaged(
    path: str | os.PathLike[str], error: BaseException, caller: str = "load_checkpoint"
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


def needs_full_unpickler(
    path: str | os.PathLike[str], kind: str, unsafe: Iterable[str], way_out: bool = True
) -> UnsafeCheckpoint:
    needed = tuple(sorted(printable(name) for name in unsafe))
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
            "Nothing was run." + (f" {_UNSAFE_WAY_OUT}" if way_out else ""),
        )
    )
    error.globals_needed = needed
    return error


def at(path: str | os.PathLike[str], text: str, caller: str = "load_checkpoint") -> str:
    return f"{caller}: {os.fspath(path)!r}: {text}"


def listed(entries: Iterable[str]) -> str:
    shown: list[str] = []
    more = 0
    for entry in entries:
        if len(shown) < _MOST_LISTED:
            shown.append(escaped(entry[:_MOST_OF_A_NAME]))
        else:
            more += 1
    return ", ".join(shown) + (f" (+{more} more)" if more > 0 else "")


def escaped(text: str) -> str:
    """Make text from a file fit for a terminal: no control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable(text: str) -> str:
    """Make text from a file fit for a message: no control characters and not endless."""
    # Cut first: what a file says may be as long as the file.
    safe = escaped(text[:_MOST_OF_A_TEXT])
    return safe if len(text) <= len(safe) <= 120 else safe[:117] + "..."


def brief(error: BaseException) -> str:
    """Return an error's type and the first line of what it says."""
    text = str(error)[: 8 * _MOST_OF_A_TEXT]
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().splitlines()
    first = lines[0] if lines else ""
    return f"{type(error).__name__}: {printable(first)}" if first else type(error).__name__
