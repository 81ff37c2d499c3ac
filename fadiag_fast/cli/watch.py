"""The command of training runs: ``fadiag watch``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from .._common.text import echo
from ..checkpoints.errors import escaped
from ..training.records import StepRecord
from ..training.sinks import read_jsonlines
from ..training.watch import Line, Tail, find_log, view
from .common import reported_errors

_POLL_SECONDS = 1.0


def register(app: typer.Typer) -> None:
    """Add ``fadiag watch`` to the command line."""

    @app.command("watch")
    def watch_command(
        path: Annotated[
            Path, typer.Argument(help="A file of step records, or a folder.", show_default=False)
        ],
        last: Annotated[int, typer.Option(help="Recorded steps to draw.")] = 100,
        follow: Annotated[
            bool | None,
            typer.Option("--follow/--once", help="Go on as it grows; default: on a terminal."),
        ] = None,
    ) -> None:
        """Draw the last steps of a training run: norms, gains, growth and alarms.

        Exit codes: 0 all well, 1 an alarm stands, 2 too few records to judge, 3 an error; also
        after Ctrl-C, which ends the following of a file.
        """
        console = Console(highlight=False)
        with reported_errors():
            file, others = find_log(path)
            tail = Tail(file, last)
            tail.read()
            if not tail.count and tail.damaged:
                read_jsonlines(file)  # says what is wrong with it
            if follow is None:
                follow = console.is_terminal
            if not follow:
                _print(console, view(tail, others))
            else:
                with suppress(KeyboardInterrupt):
                    _follow(console, tail, others)
            raise typer.Exit(tail.exit_code)


def _print(console: Console, lines: Sequence[Line]) -> None:
    if not console.is_terminal:
        echo("\n".join(escaped(line.text) for line in lines))
        return
    console.print(_text(lines))


def _text(lines: Sequence[Line]) -> Text:
    drawn = Text(no_wrap=True, overflow="ellipsis")
    for line in lines:
        drawn.append(escaped(line.text) + "\n", style=line.style or None)
    return drawn


def _follow(console: Console, tail: Tail, others: Sequence[Path]) -> None:
    """Draw anew whenever the file has grown, until the user has had enough."""
    if not console.is_terminal or console.is_dumb_terminal:
        _print(console, view(tail, others))
        told = len(tail.events)
        while True:
            time.sleep(_POLL_SECONDS)
            for entry in tail.read():
                if isinstance(entry, StepRecord) and entry.layers:
                    print(
                        f"step {entry.step}: ‖h_L‖ {entry.hidden_norms[-1]:.3g}, growth "
                        f"{entry.growth:.3g}, ‖g_L‖ {entry.grad_norms[-1]:.3g}, credit gain "
                        f"{entry.credit_gains[-1]:.3g}",
                        flush=True,
                    )
            for event in tail.events[told:]:
                echo(escaped(event.sentence), flush=True)
            told = len(tail.events)
    with Live(_text(view(tail, others)), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(_POLL_SECONDS)
            if tail.read():
                live.update(_text(view(tail, others)), refresh=True)
