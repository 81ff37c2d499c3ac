"""What all commands share: exit codes, reported errors, progress."""

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from .._common.terminal import EXIT_INTERRUPTED, draws_bars, progress_bars, say
from .._common.text import display_name, for_terminal

EXIT_TRUSTWORTHY, EXIT_WALK_BACK, EXIT_NOT_ENOUGH_DATA, EXIT_ERROR = 0, 1, 2, 3


class Commands(TyperGroup):
    """Commands whose wrong usage is an error as others are: click's own code for it is 2."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _usage_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _usage_errors():
            return super().invoke(ctx)


@contextmanager
def _usage_errors() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        error.exit_code = EXIT_ERROR
        error.message = for_terminal(error.message)
        raise
    except SystemExit as error:  # rich's, where nobody reads the help any more; 1 is a verdict
        if error.code != 1:
            raise
        raise typer.Exit(EXIT_ERROR) from None


# Typer has it from click, or of its own, by its version.
_UsageError: Any = typer.BadParameter.__base__


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turn an expected failure into one line on stderr and exit code 3, and Ctrl-C into 130.

    Any other has that code too, for 1 is a verdict, and shows where it came from. Warnings, which
    may name files, are fit for a terminal meanwhile.
    """
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *args, **options: for_terminal(plain(*args, **options))
    try:
        yield
    except (typer.Exit, _UsageError):  # to Python a RuntimeError, to typer the normal way out
        raise
    except KeyboardInterrupt:  # typer's own code for it is 1, a verdict
        say("fadiag: interrupted")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:  # nobody reads stdout any more, as after | head
        raise typer.Exit(EXIT_ERROR) from None
    except Exception as error:
        if not isinstance(error, EXPECTED_ERRORS):
            say(traceback.format_exc())
        say(f"fadiag: {sentence(error)}", "red")
        raise typer.Exit(EXIT_ERROR) from None
    finally:
        warnings.formatwarning = plain


@contextmanager
def shown_progress(quiet: bool) -> Iterator[Callable[[str], Callable[[int, int, str], None]]]:
    """Offer progress bars on a terminal, one line per finished task elsewhere."""
    if quiet:
        yield lambda name: lambda done, total, loss: None
    elif draws_bars():
        with progress_bars() as bars:

            def bar(name: str) -> Callable[[int, int, str], None]:
                update = bars(f"{name:<8}")
                return lambda done, total, loss: update(
                    done, total, f"{done}/{total} steps, loss {loss}"
                )

            yield bar
    else:

        def line(name: str) -> Callable[[int, int, str], None]:
            def update(done: int, total: int, loss: str) -> None:
                if done == total:
                    say(f"trained {name}: {total} steps, last loss {loss}")

            return update

        yield line


def name_of(subject: Path | int) -> str:
    return f"seed {subject}" if isinstance(subject, int) else str(subject)


def shown_name(subject: Path | int) -> str:
    return display_name(name_of(subject))


# What says in a sentence what is wrong; any other error is a surprise.
EXPECTED_ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError)


def sentence(error: BaseException) -> str:
    """Return what an error says; with its type, where the type is not made to be read without."""
    text = str(error).strip()
    if text and isinstance(error, EXPECTED_ERRORS):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def short_sentence(error: BaseException) -> str:
    """Return the first line of :func:`sentence`."""
    return sentence(error).partition("\n")[0]
