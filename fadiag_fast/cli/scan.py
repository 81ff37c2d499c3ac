"""The commands of scans: ``fadiag scan``, ``fadiag thresholds`` and ``fadiag report``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from .._common.terminal import EXIT_INTERRUPTED, draws_bars, progress_bars, say
from .._common.text import echo
from ..protocol import NOT_ENOUGH_DATA, TRUSTWORTHY, DiagnosticThresholds
from ..reports.html import write_report
from ..reports.scan_plots import write_plots
from ..scanning.driver import scan
from ..scanning.find import find_entries
from ..scanning.pipeline import Progress
from ..scanning.records import NON_FINITE_WEIGHTS
from ..scanning.results import ScanResult
from ..scanning.run_names import Entry, Pattern
from ..scanning.thresholds import sweep_thresholds
from ..training.watch import scan_result_of
from ..zoo import load_dataset
from .common import reported_errors
from .networks import build_network
from .options import (
    BatchDimOption,
    BatchesOption,
    BatchSizeOption,
    DataOption,
    DataOptionsOption,
    DeviceOption,
    FlattenOption,
    KeyOption,
    MaxGrowthOption,
    MaxStabilityOption,
    MinGainOption,
    MinGradientOption,
    MinUtilityOption,
    ModelOption,
    OptionsOption,
    OutputOption,
    ProtocolOption,
    ReductionOption,
    TapsOption,
    UnsafePickleOption,
    check_output_file,
    check_output_folder,
    chosen_device,
    chosen_output,
    parse_options,
    tell_unused,
)
from .saved_configs import SavedNetwork

FolderArgument = Annotated[Path, typer.Argument(help="A scan's folder.", show_default=False)]
ConfigOption = Annotated[
    str | None,
    typer.Option("--config", help="Only rows of this probe configuration: its hash or a start."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""

    @app.command("scan")
    def scan_command(
        context: typer.Context,
        out: Annotated[Path, typer.Option(help="The folder of results; made if need be.")],
        checkpoints: Annotated[
            list[str] | None, typer.Argument(help="Files, folders or globs ('runs/**/*.pt').")
        ] = None,
        model: ModelOption = "resmlp",
        data: DataOption = "fashion-mnist-mini",
        data_option: DataOptionsOption = None,
        pattern: Annotated[
            list[str] | None,
            typer.Option(help="Run and step in a path: '{run}/step_{step}.pt'; repeatable."),
        ] = None,
        manifest: Annotated[
            Path | None, typer.Option(help="CSV, Parquet or TOML with path, run, step, accuracies.")
        ] = None,
        taps: TapsOption = None,
        reduction: ReductionOption = "flatten",
        batch_dim: BatchDimOption = 0,
        output: OutputOption = None,
        batches: BatchesOption = 10,
        batch_size: BatchSizeOption = 128,
        flatten: FlattenOption = None,
        stack: Annotated[
            str, typer.Option(help="Checkpoints computed together, or auto.")
        ] = "auto",
        workers: Annotated[int | None, typer.Option(help="Threads that read ahead.")] = None,
        protocol: ProtocolOption = "paper",
        max_growth: MaxGrowthOption = 50.0,
        min_gradient: MinGradientOption = 1e-7,
        min_gain: MinGainOption = 1.28e-5,
        max_stability: MaxStabilityOption = 0.30,
        min_utility: MinUtilityOption = 2.0,
        model_option: OptionsOption = None,
        device: DeviceOption = "auto",
        unsafe_pickle: UnsafePickleOption = False,
        key: KeyOption = None,
        quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
        json_lines: Annotated[
            bool, typer.Option("--json", help="Progress and outcome as JSON lines.")
        ] = False,
    ) -> None:
        """Audit every checkpoint of a study; kill it and start it again, and nothing is lost."""
        with reported_errors():
            check_output_folder("--out", out)
            target = chosen_device(device)
            tell_unused(
                context,
                ("quiet", not json_lines, "beside --json, which prints nothing else"),
                (
                    "pattern",
                    bool(checkpoints),
                    "without checkpoints: --manifest gives run and step",
                ),
                ("min_utility", manifest is not None, "without the accuracies of a --manifest"),
            )
            _tell_fields(pattern)
            dataset = load_dataset(data, **parse_options(data_option))
            entries = _found(checkpoints, pattern, manifest)
            options = parse_options(model_option)
            refuse = None
            if ":" in model:
                network, flat = build_network(model, dataset, options)
            else:  # only of a network of the zoo is it known what its builder was given
                saved = SavedNetwork(
                    entries, model, dataset, options, _say, unsafe_pickle=unsafe_pickle, key=key
                )
                network, flat, refuse = saved.network, saved.flat, saved.refuse
            flat = flat if flatten is None else flatten
            thresholds = DiagnosticThresholds(
                scale_growth=max_growth,
                gradient_floor=min_gradient,
                direction_stability=max_stability,
                depth_utility=min_utility,
                credit_gain_floor=min_gain,
            )
            with _shown(quiet, json_lines) as show:
                try:
                    result = scan(
                        entries,
                        network.to(target),
                        dataset.eval_batches(batch_size, batches, flatten=flat, device=target),
                        out,
                        protocol=protocol,  # type: ignore[arg-type]  # checked by scan
                        thresholds=thresholds,
                        taps=taps,
                        reduction=reduction,  # type: ignore[arg-type]  # checked by scan
                        output=chosen_output(output),
                        batch_dim=batch_dim,
                        stack=_stack(stack),
                        workers=workers,
                        unsafe_pickle=unsafe_pickle,
                        key=key,
                        refuse=refuse,
                        on_progress=show,
                    )
                except KeyboardInterrupt:
                    say(f"fadiag: interrupted; what is finished is in {out}. Run again.")
                    raise typer.Exit(EXIT_INTERRUPTED) from None
            if json_lines:
                counts = result.counts
                assert counts is not None
                record = {**asdict(counts), "unmatched": len(counts.unmatched)}
                outcome = {"folder": str(out), "verdicts": result.verdict_counts(), **record}
                print(json.dumps(outcome))
            elif not quiet:
                echo(result)
            raise typer.Exit(_exit_code(result))

    @app.command("thresholds")
    def thresholds_command(
        folder: FolderArgument,
        json_out: Annotated[
            bool, typer.Option("--json", help="Print every interval, as JSON.")
        ] = False,
        last: Annotated[
            bool, typer.Option("--last", help="Only the last audited checkpoint of each run.")
        ] = False,
        config: ConfigOption = None,
    ) -> None:
        """Move each threshold over a scan's rows: where verdicts change, how wide the gap is."""
        with reported_errors():
            result = ScanResult.load(folder, config_hash=config)
            sweeps = sweep_thresholds(result, last=last)
            if json_out:
                print(json.dumps([sweep.to_dict() for sweep in sweeps]))
            else:
                echo("\n\n".join(str(sweep) for sweep in sweeps))

    @app.command("report")
    def report_command(
        context: typer.Context,
        folder: Annotated[
            Path,
            typer.Argument(
                help="A scan's folder, or a training run's step records (*.jsonl).",
                show_default=False,
            ),
        ],
        out: Annotated[Path, typer.Option("-o", "--out", help="The HTML file to write.")] = Path(
            "report.html"
        ),
        title: Annotated[str | None, typer.Option(help="Heading; default: the folder.")] = None,
        plots: Annotated[
            Path | None, typer.Option(help="Write the curves as PNG and SVG into this folder.")
        ] = None,
        most_plots: Annotated[int, typer.Option(help="Runs that get a plot of their own.")] = 20,
        config: ConfigOption = None,
    ) -> None:
        """Write a scan as one HTML file that needs no network, and its curves as pictures."""
        with reported_errors():
            check_output_file("--out", out, [folder], replaced=True)
            check_output_folder("--plots", plots)
            tell_unused(context, ("most_plots", plots is not None, "without --plots"))
            steps = folder.suffix == ".jsonl"
            if steps and config is not None:
                raise ValueError("--config: expected a scan's folder with it, got step records")
            result = (
                scan_result_of([folder]) if steps else ScanResult.load(folder, config_hash=config)
            )
            write_report(result, out, title=title or (folder.stem if steps else None))
            what = "steps" if steps else "checkpoints"
            echo(f"{out}: {len(result):,} {what}, {out.stat().st_size / 1e6:.1f} MB")
            if plots is not None:
                written = write_plots(result, plots, most_runs=most_plots)
                echo(f"{plots}: {len(written)} files")


def _stack(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--stack: expected auto or a whole number of at least 1, got {text!r}")
    return int(text)


@contextmanager
def _shown(quiet: bool, json_lines: bool) -> Iterator[Callable[[Progress], None] | None]:
    """Offer a bar on a terminal, a line per group elsewhere, or JSON lines."""
    if json_lines:
        yield lambda at: print(json.dumps({**asdict(at), "rate": round(at.rate, 3)}), flush=True)
    elif quiet:
        yield None
    elif draws_bars():
        with progress_bars() as bars:
            update = bars("checkpoints")
            yield lambda at: update(
                at.done,
                at.total,
                f"{at.done:,}/{at.total:,}, {at.rate:,.1f}/s, {at.failed:,} failed, "
                f"{at.bytes / 1e6:,.0f} MB, stack {at.stack}",
            )
    else:
        yield lambda at: say(
            f"{at.done:,} of {at.total:,} checkpoints ({at.failed:,} failed), "
            f"{at.bytes / 1e6:,.0f} MB, {at.rate:,.1f} a second, {at.seconds_left:,.0f} s left"
        )


def _tell_fields(patterns: Sequence[str] | None) -> None:
    """Say what becomes of a pattern's fields that do not place a checkpoint."""
    names = [name for text in patterns or () for name in Pattern(text).names]
    others = [f"{{{name}}}" for name in dict.fromkeys(names) if name not in ("run", "step")]
    if others:
        say(
            f"fadiag: --pattern: {', '.join(others)} only label a checkpoint: {{run}} and {{step}} "
            f"say where it belongs",
            "yellow",
        )


def _found(
    checkpoints: list[str] | None, pattern: list[str] | None, manifest: Path | None
) -> list[Entry]:
    """Return what is to be scanned; a glob that matches nothing beside others is a line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        entries = find_entries(checkpoints or [], pattern, manifest)
    for warning in caught:
        if str(warning.message).startswith("scan: "):
            say(f"fadiag: {warning.message}", "yellow")
        else:  # of a library
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return entries


def _say(text: str) -> None:
    say(f"fadiag: {text}", "yellow")


def _exit_code(result: ScanResult) -> int:
    """Return 0 trustworthy, 1 needs walk-back, 2 not enough data, 3 nothing could be audited.

    A network whose weights are no numbers is not one to trust: beside others it counts as 1.
    """
    verdicts = result.verdict_counts()
    if not verdicts:
        return 3
    if NON_FINITE_WEIGHTS in result.failures() or set(verdicts) - {TRUSTWORTHY, NOT_ENOUGH_DATA}:
        return 1
    return 2 if NOT_ENOUGH_DATA in verdicts else 0
