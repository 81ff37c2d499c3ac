"""Look at pickles without running them."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from .opening import Source, SourceStream
from .torch_zip import Archive


@dataclass
class Scan:
    """Collect what pickle streams name.

    `complete` says that they reach their ends.
    """

    names: set[str] = field(default_factory=set)
    complete: bool = False


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
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in ("PROTO", "FRAME", "STOP"):
            continue
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
            stack.append(None)
        # Two strings are all that STACK_GLOBAL can take; a long file should not fill the memory.
        del stack[:-2]


def scan_zip(source: Source, archive: Archive) -> Scan:
    """List what the pickle of a torch.save zip file names."""
    member = archive.members[b"data.pkl"]
    return _scanned(io.BytesIO(source.read(member.start, member.size)), 1)


def scan_pickles(source: Source, count: int) -> Scan:
    """List what the first pickles of a file name."""
    return _scanned(SourceStream(source), count)


def _scanned(stream: Any, count: int) -> Scan:
    scan = Scan()
    try:
        for _ in range(count):
            scan_pickle(stream, scan)
        scan.complete = True
    except Exception:
        # The disassembler raises many types on bytes that are no pickle; the scan stays incomplete.
        return scan
    return scan


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
