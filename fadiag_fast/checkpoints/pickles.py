"""Look at pickles without running them."""

from __future__ import annotations

import io
import mmap
import os
import pickle
import pickletools
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import EXPECTED, UnreadableCheckpoint, at, damaged, listed, printable
from .lookalikes import PROGRAMS, SAVE_WEIGHTS, program_in_zip


@dataclass
class Scan:
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


def scan_pickle(stream: Any, scan: Scan) -> None:
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


def pickles_in_zip(path: Path) -> list[str]:
    """Return the pickle records of a torch.save zip file, refusing any other zip file."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.namelist()
    except Exception as error:
        raise damaged(path, error) from error
    program = program_in_zip(entries)
    if program is not None:
        what = f"{PROGRAMS[program]}, which is a program and is not opened; {SAVE_WEIGHTS}"
    else:
        pickles = [entry for entry in entries if _is_record(entry, "data.pkl")]
        if pickles:
            return pickles
        names = listed([printable(entry) for entry in entries])
        what = f"a zip archive that holds {names or 'nothing'}"
    raise UnreadableCheckpoint(at(path, f"expected {EXPECTED}, got {what}"))


def scan_zip(path: Path, pickles: list[str]) -> Scan:
    scan = Scan()
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in pickles:
                with archive.open(entry) as stream:
                    scan_pickle(stream, scan)
        scan.complete = True
    except Exception:
        # zipfile, zlib and the disassembler raise many types; the scan then stays incomplete.
        return scan
    return scan


def _is_record(entry: str, name: str) -> bool:
    # Every record lies in one folder, named after the file or 'archive'.
    return entry.count("/") == 1 and entry.endswith(f"/{name}")


def scan_pickle_file(path: Path, pickles: int) -> Scan:
    """List what the first pickles of a file name."""
    scan = Scan()
    try:
        # A mapping reads no more than there is, whatever length the stream claims.
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream,
        ):
            for _ in range(pickles):
                scan_pickle(stream, scan)
        scan.complete = True
    except Exception:
        # The disassembler raises many types on bytes that are no pickle.
        return scan
    return scan


def refused_as_unsafe(scan: Scan, unsafe: set[str], error: Exception) -> bool:
    """Tell a whole file that needs the full unpickler from a damaged one."""
    # Where warnings are errors, torch's remark on an unusual pickle protocol is the refusal.
    return scan.complete and (
        bool(unsafe) or isinstance(error, pickle.UnpicklingError | UserWarning)
    )


def unsafe_globals(names: Iterable[str]) -> set[str]:
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


def unsafe_globals_by_torch(path: Path) -> set[str]:
    # torch reads zip files a little differently from Python's zipfile, and what it would load is
    # what counts; but it gives up on pickles of other protocols, so this only adds to our list.
    try:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(os.fspath(path)))
    except Exception:
        return set()
