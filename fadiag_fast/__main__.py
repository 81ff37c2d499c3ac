"""Run the command line: ``fadiag`` or ``python -m fadiag_fast``."""

import io
import sys

from .interrupts import quiet_interrupts


def main() -> None:
    """Start the command line, or say which extra it needs."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that has no ‖ or ━ shows a ? in its place.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with quiet_interrupts(True):
            from .cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(
            f"fadiag: the command line needs {error.name}, which is not installed: "
            f"pip install 'fadiag-fast[cli]'",
            file=sys.stderr,
        )
        raise SystemExit(3) from None
    from .text import finish_output

    try:
        try:
            app()
        finally:
            finish_output()
    except OSError as error:  # of stdout: what the commands do themselves is reported by them
        print(f"fadiag: {error}", file=sys.stderr)
        raise SystemExit(3) from None


if __name__ == "__main__":
    main()
