"""Tell a program from weights by a file's first bytes and the names in it; nothing in it is run.

A TorchScript archive and a ``.pt2`` file are programs: what they compute with is code, and so is
much of what describes it. No list of what is forbidden would be complete, so that neither is opened
unless the caller trusts it. What kind a file is decides on the words and on the loader for a
trusted one, never on safety: readers of weights do not call a loader of programs at all.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from .errors import EXPECTED, UntrustedProgram, at, damaged
from .files import read_head
from .lookalikes import PROGRAMS, SAVE_WEIGHTS, ProgramKind, is_shared_library, program_in_zip


def program_kind(
    path: str | os.PathLike[str], expected: str = EXPECTED, caller: str = "load_checkpoint"
) -> ProgramKind | None:
    """Return the kind of program that a file holds, None for everything else.

    Raises:
        UnreadableCheckpoint: the file is missing, empty, no regular one, or a damaged zip file.
    """
    path = Path(path)
    head, _ = read_head(path, expected, caller)
    if is_shared_library(head):
        return "compiled"
    if not head.startswith(b"PK\x03\x04"):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:  # zipfile raises many types
        raise damaged(path, error, caller) from error
    return program_in_zip(names)


def untrusted(path: str | os.PathLike[str], kind: ProgramKind, caller: str) -> UntrustedProgram:
    """Return the refusal of a program that the caller has not said to trust."""
    return UntrustedProgram(
        at(
            path,
            f"expected trust_code=True (command line: --trust-code), got {PROGRAMS[kind]} without "
            "it. Such a file is a program: opening and calling it can run any code, with all your "
            "rights. Nothing was run. Pass trust_code=True only if you trust where the file came "
            f"from (unsafe_pickle is for pickles and does not open it); {SAVE_WEIGHTS}",
            caller,
        )
    )
