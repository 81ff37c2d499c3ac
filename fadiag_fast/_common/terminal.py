"""What commands say on stderr, and how they show how far they are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from .text import for_terminal

EXIT_INTERRUPTED = 130

# done, total, text beside the bar.
Update = Callable[[int, int, str], None]


@cache
def _errors() -> Console:
    # Made when it is first needed: it looks at the terminal and the environment once.
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str, style: str | None = None) -> None:
    """Print a line on stderr as it is: names of files may hold what rich takes for markup."""
    _errors().print(for_terminal(text), style=style, markup=False)


def draws_bars() -> bool:
    """Return whether stderr is a terminal that can redraw a line."""
    console = _errors()
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def progress_bars(*, time_left: bool = True) -> Iterator[Callable[[str], Update]]:
    """Offer bars: a function that adds one by its name and returns how to move it.

    What stands beside a bar is a text that the caller has made. No column formats a figure, for a
    bar is drawn before there is one.
    """
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True)),
    ]
    if time_left:
        columns.append(TimeRemainingColumn())
    with Progress(*columns, console=_errors()) as bars:

        def add(name: str) -> Update:
            task = bars.add_task(name, total=None, text="")
            return lambda done, total, text: bars.update(
                task, completed=done, total=total, text=for_terminal(text)
            )

        yield add
