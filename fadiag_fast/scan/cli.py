"""The commands that read a finished scan: ``fadiag thresholds`` and ``fadiag report``."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from .html import write_report
from .plots import write_plots
from .results import ScanResult
from .thresholds import sweep_thresholds

FolderArgument = Annotated[Path, typer.Argument(help="A scan's folder.", show_default=False)]
ConfigOption = Annotated[
    str | None,
    typer.Option("--config", help="Only rows of this probe configuration: its hash or a start."),
]


def register(app: typer.Typer, reported_errors: Callable[[], AbstractContextManager[Any]]) -> None:
    """Add the commands to the command line.

    Args:
        app: where to.
        reported_errors: a context that turns an expected failure into a line and an exit code.
    """

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
                print(json.dumps([sweep.to_dict() for sweep in sweeps], ensure_ascii=False))
            else:
                print("\n\n".join(str(sweep) for sweep in sweeps))

    @app.command("report")
    def report_command(
        folder: FolderArgument,
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
            result = ScanResult.load(folder, config_hash=config)
            write_report(result, out, title=title)
            print(f"{out}: {len(result):,} checkpoints, {out.stat().st_size / 1e6:.1f} MB")
            if plots is not None:
                written = write_plots(result, plots, most_runs=most_plots)
                print(f"{plots}: {len(written)} files")
