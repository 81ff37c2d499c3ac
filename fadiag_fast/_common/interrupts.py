"""End a command at Ctrl-C while it is still importing, as it ends later."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def runs_as_command() -> bool:
    """Return whether Python was started for the command line, not for a program."""
    started = sys.argv[0] if sys.argv else ""
    if started == "-m":  # until the package is found
        return any(word in ("fadiag_fast", "-mfadiag_fast") for word in sys.orig_argv)
    return os.path.basename(started).partition(".")[0].removesuffix("-script") == "fadiag"


@contextmanager
def quiet_interrupts(is_command: bool) -> Iterator[None]:
    """Turn Ctrl-C into one line and the exit code 130, where this is the command line."""
    try:
        yield
    except KeyboardInterrupt:
        if not is_command:
            raise
        print("fadiag: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
