"""Run the command line: ``fadiag`` or ``python -m fadiag_fast``."""

import sys


def main() -> None:
    """Start the command line, or say which extra it needs."""
    try:
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
    app()


if __name__ == "__main__":
    main()
