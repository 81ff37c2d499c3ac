"""The command line: demo, train, diagnose, scan, audit-cnn, study, watch, doctor.

Exit codes: 0 trustworthy, 1 needs walk-back, 2 not enough data, 3 an error, 130 after Ctrl-C.
"""

from typing import Annotated

import typer

from .._version import __version__
from . import audit_cnn, demo, diagnose, doctor, scan, study, train, watch
from .common import Commands

app = typer.Typer(
    name="fadiag",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fadiag_fast {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Find out whether a network's hidden states and gradients can be trusted.

    Exit codes: 0 trustworthy, 1 needs walk-back, 2 not enough data, 3 an error, 130 after Ctrl-C.
    """


for _command in (train, diagnose, audit_cnn, demo, doctor, scan, watch, study):
    _command.register(app)
