"""Make text from files and names fit for a terminal and for files of text."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from typing import Any

# What moves a cursor, changes colours, sets titles, turns the writing direction or begins a line
# that is none: control characters but for the end of a line, and half characters, of which names
# that are not UTF-8 are made in Python.
_UNFIT = re.compile(
    "[\0-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def for_terminal(text: str) -> str:
    """Return text with what a terminal would obey spelled out; ends of lines stay."""
    if text.isascii() and text.isprintable():
        return text
    return _UNFIT.sub(lambda match: _spelled(match[0]), text)


def display_name(name: str | os.PathLike[str]) -> str:
    """Return a file's name on one line: bytes that are not UTF-8, and controls, spelled out."""
    text = os.fspath(name)
    with suppress(UnicodeEncodeError):  # half characters that stand for no byte
        text = os.fsencode(text).decode("utf-8", "backslashreplace")
    return for_terminal(text).replace("\n", "\\n")


def json_bytes(text: str) -> bytes:
    """Return JSON text in UTF-8, half characters as JSON's own escapes: nothing is lost."""
    return text.encode("utf-8", "backslashreplace")


def echo(*values: Any, end: str = "\n", flush: bool = False) -> None:
    """Print on stdout what may come from a file; all output of commands that is text goes here."""
    text = for_terminal(" ".join(map(str, values)))
    try:
        print(text, end=end, flush=flush)
    except UnicodeEncodeError:  # a terminal or a pipe of few characters
        encoding = sys.stdout.encoding or "ascii"
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=flush)


def finish_output() -> None:
    """Write what was printed on stdout; nothing where nobody reads it any more (``| head``).

    Raises:
        OSError: it cannot be written for another reason, such as a full disk.
    """
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except OSError as error:
        # What is left of it would be tried again as Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def first_line(error: BaseException, *, named: bool = False) -> str:
    """Return the first line of what an error says; its class where it says nothing.

    Args:
        error: any.
        named: put the error's class in front.
    """
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    if not lines:
        return name
    return f"{name}: {lines[0]}" if named else lines[0]


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode()
