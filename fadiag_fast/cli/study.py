"""The command ``fadiag study``."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .._common.jsonio import strict
from .._common.tables import text_table
from .._common.terminal import EXIT_INTERRUPTED, draws_bars, progress_bars, say
from .._common.text import echo
from ..study.progress import StudyProgress
from ..study.running import run_study
from ..study.suites import SUITES, Suite, load_suite
from ..study.tables import (
    MEAN_HEADER,
    decision_lines,
    decision_table,
    mean_table,
    run_rows,
    write_tables,
)
from ..zoo import load_dataset
from .common import reported_errors
from .options import DeviceOption, check_output_folder, chosen_device, tell_unused

EXIT_DONE, EXIT_FAILED = 0, 3


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""

    @app.command("study")
    def study_command(
        context: typer.Context,
        out: Annotated[Path, typer.Option(help="The study's folder; made if need be.")],
        suite: Annotated[
            str, typer.Option(help=f"{', '.join(SUITES)}, or a file that ends in .toml.")
        ] = "quick",
        data: Annotated[
            str | None, typer.Option(help="As in fadiag train; default: the suite's.")
        ] = None,
        models: Annotated[
            list[str] | None,
            typer.Option(help="Of the suite's models only these; repeat, or separate by commas."),
        ] = None,
        rules: Annotated[
            list[str] | None,
            typer.Option(help="These rules in place of the suite's, package.module:Class too."),
        ] = None,
        seeds: Annotated[
            list[str] | None, typer.Option(help="These seeds in place of the suite's: 42,123,456.")
        ] = None,
        penalties: Annotated[
            list[str] | None, typer.Option(help="λ of the residual penalty: 0,1e-2.")
        ] = None,
        steps: Annotated[int | None, typer.Option(help="Updates of every run.")] = None,
        epochs: Annotated[int | None, typer.Option(help="Or passes over the data.")] = None,
        checkpoints: Annotated[
            int | None, typer.Option(help="Checkpoints of a run, at log-spaced steps.")
        ] = None,
        device: DeviceOption = "auto",
        jobs: Annotated[
            int | None, typer.Option(help="Runs at a time; default: 8 on CUDA, else 1.")
        ] = None,
        quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
        json_lines: Annotated[
            bool, typer.Option("--json", help="Progress and outcome as JSON lines.")
        ] = False,
    ) -> None:
        """Train the rules of a suite, audit every checkpoint and print the tables.

        Stop it and start it again: finished runs are kept, and one that was stopped half-way goes
        on from its last checkpoint. Exit codes: 0 all runs are audited, 3 an error, or a run that
        failed; the others are in the tables.
        """
        with reported_errors():
            check_output_folder("--out", out)
            tell_unused(
                context, ("quiet", not json_lines, "beside --json, which prints nothing else")
            )
            chosen = _narrowed(
                load_suite(suite), models, rules, seeds, penalties, steps, epochs, checkpoints
            )
            source = data or chosen.data
            if not source:
                raise ValueError(
                    f"--data: the suite {chosen.name!r} needs images of yours: expected "
                    f"cifar10:FOLDER, fashion-mnist:FOLDER or another set, got none"
                )
            dataset = load_dataset(source)
            with _shown(quiet, json_lines) as show:
                try:
                    result = run_study(
                        chosen, dataset, out, device=chosen_device(device), jobs=jobs, progress=show
                    )
                except KeyboardInterrupt:
                    say(f"fadiag: interrupted; the runs that are finished are in {out}. Run again.")
                    raise typer.Exit(EXIT_INTERRUPTED) from None
            written = write_tables(result, out, command=_command())
            if json_lines:
                decisions = decision_table(result.runs, result.num_classes)
                record = {
                    "folder": str(out),
                    "runs": run_rows(result),
                    "decisions": [asdict(row) for row in decisions],
                }
                print(json.dumps(strict(record)))
            else:
                echo("\n".join(text_table(MEAN_HEADER, mean_table(result))))
                for model in dict.fromkeys(run.model for run in result.runs):
                    echo(f"\n{model}: runs that a strategy walks back")
                    echo("\n".join(text_table(*decision_lines(result, model))))
                echo(f"\n{', '.join(path.name for path in written)} in {out}")
            for run in result.failed:
                say(f"fadiag: {run.model}/{run.label}/seed_{run.seed}: {run.reason}", "red")
            raise typer.Exit(EXIT_FAILED if result.failed else EXIT_DONE)


def _command() -> str:
    """Return the command line as it was called, for the report."""
    return shlex.join(["fadiag", *sys.argv[1:]])


def _split(values: list[str]) -> list[str]:
    return [part for value in values for part in value.replace(",", " ").split()]


def _numbers(option: str, values: list[str], kind: type[int] | type[float]) -> tuple[Any, ...]:
    found = []
    for text in _split(values):
        try:
            found.append(kind(text))
        except ValueError:
            what = "whole numbers" if kind is int else "numbers"
            raise ValueError(f"{option}: expected {what}, got {text!r}") from None
    return tuple(found)


def _narrowed(
    suite: Suite,
    models: list[str] | None,
    rules: list[str] | None,
    seeds: list[str] | None,
    penalties: list[str] | None,
    steps: int | None,
    epochs: int | None,
    checkpoints: int | None,
) -> Suite:
    """Return the suite with what the command line says in place of its own."""
    changes: dict[str, Any] = {}
    chosen = suite.models
    if models:
        known = {model.label: model for model in suite.models}
        names = _split(models)
        for name in names:
            if name not in known:
                raise ValueError(f"--models: expected some of {', '.join(known)}, got {name!r}")
        chosen = tuple(known[name] for name in dict.fromkeys(names))
    if steps is not None and epochs is not None:
        raise ValueError(f"expected --steps or --epochs, got both: {steps} and {epochs}")
    if steps is not None or epochs is not None:
        changes |= {"steps": steps, "epochs": epochs}
        chosen = tuple(replace(model, steps=None) for model in chosen)
    changes["models"] = chosen
    if rules:
        changes["rules"] = tuple(_split(rules))
        kept = suite.rule_options.items()
        changes["rule_options"] = {rule: o for rule, o in kept if rule in changes["rules"]}
    if seeds:
        changes["seeds"] = _numbers("--seeds", seeds, int)
    if penalties:
        changes["penalties"] = _numbers("--penalties", penalties, float)
    if checkpoints is not None:
        changes["checkpoints"] = checkpoints
    return replace(suite, **changes)


@contextmanager
def _shown(quiet: bool, json_lines: bool) -> Iterator[Callable[[StudyProgress], None] | None]:
    """Offer a bar on a terminal, a line per run elsewhere, or JSON lines."""
    if json_lines:
        yield lambda at: print(json.dumps(asdict(at)), flush=True)
    elif quiet:
        yield None
    elif draws_bars():
        with progress_bars(time_left=False) as bars:
            update = bars("runs")
            yield lambda at: update(
                at.done,
                at.total,
                f"{at.done}/{at.total}, {at.run} {at.step}/{at.steps}, {at.rate:,.1f} steps/s, "
                f"{at.seconds_left:,.0f} s left",
            )
    else:

        def line(at: StudyProgress) -> None:
            if at.state != "training":
                say(
                    f"{at.done} of {at.total} runs: {at.run} {at.state}; "
                    f"{at.rate:,.1f} steps a second, {at.seconds_left:,.0f} s left"
                )

        yield line
