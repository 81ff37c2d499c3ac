"""Draw a scan's curves and layers as PNG and SVG, for papers and slides."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._common.extras import require
from ..protocol import NOT_ENOUGH_DATA, TRUSTWORTHY
from ..scanning.records import AUDITED, Row
from ..scanning.results import KEYS, ScanResult, in_time
from ..scanning.store import layers_by_record

# Column, title, whether the axis is in powers of ten, the threshold's field.
_CURVES = (
    ("growth", "(a) growth", True, "scale_growth"),
    ("grad_norm", "(b) ‖g_L‖", True, "gradient_floor"),
    ("credit_gain", "credit gain", True, "credit_gain_floor"),
    ("stability", "(c) direction stability", False, "direction_stability"),
)
_COLOURS = {TRUSTWORTHY: "#0b7d76", NOT_ENOUGH_DATA: "#a67400"}
_WALK_BACK = "#cf3f12"


def write_plots(
    result: ScanResult,
    folder: str | os.PathLike[str],
    *,
    most_runs: int = 20,
    formats: Sequence[str] = ("png", "svg"),
) -> list[Path]:
    """Write ``runs.*``, the curves of all runs, and one file per run with curves and layers.

    Args:
        result: the rows.
        folder: made if need be.
        most_runs: runs that get a file of their own: first those in which something fired.
        formats: endings that matplotlib knows.

    Returns:
        The files written.

    Raises:
        MissingExtra: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    require("matplotlib", "plots", extra="bench").use("Agg")
    pyplot = require("matplotlib.pyplot", "plots", extra="bench")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def save(figure: Any, name: str) -> None:
        for ending in formats:
            path = folder / f"{name}.{ending}"
            figure.savefig(path, dpi=150)
            written.append(path)
            # Laid out once; to do it again for each format takes most of the time.
            figure.set_layout_engine("none")
        pyplot.close(figure)

    runs = result.runs()
    save(_overview(result, pyplot), "runs")
    fired = result.first_fired()
    order = sorted(runs, key=lambda run: all(fired[run][key].first is None for key in KEYS))
    taken: set[str] = {"runs"}
    for run in order[:most_runs]:
        save(_run_figure(result, run, runs[run], pyplot), _file_name(run, taken))
    return written


def _file_name(run: str, taken: set[str]) -> str:
    """Return a name for a run's file that no other run has, on any file system."""
    base = f"run-{re.sub(r'[^A-Za-z0-9._-]+', '-', run).strip('.-')[:80] or 'x'}"
    name, number = base, 2
    while name.lower() in taken:
        name, number = f"{base}-{number}", number + 1
    taken.add(name.lower())
    return name


def _points(rows: Sequence[Row], column: str) -> tuple[list[float], list[float]]:
    """Return steps and finite values; positions where the run has no steps."""
    steps, values = [], []
    for index, row in enumerate(in_time(rows)):
        value = row[column]
        if row["status"] == AUDITED and value is not None and math.isfinite(value):
            steps.append(float(index if row["step"] is None else row["step"]))
            values.append(value)
    return steps, values


def _curves(axes: Any, result: ScanResult, runs: Sequence[Sequence[Row]], alpha: float) -> None:
    limits = result.thresholds
    for axis, (column, title, log, field) in zip(axes, _CURVES, strict=True):
        positive = False
        for rows in runs:
            steps, values = _points(rows, column)
            audited = [row for row in in_time(rows) if row["status"] == AUDITED]
            verdict = audited[-1]["verdict"] if audited else NOT_ENOUGH_DATA
            colour = _COLOURS.get(verdict, _WALK_BACK)
            marker = "." if len(steps) < 60 else ""
            axis.plot(steps, values, marker=marker, linewidth=1.2, color=colour, alpha=alpha)
            positive = positive or any(value > 0 for value in values)
        axis.axhline(getattr(limits, field), color=_WALK_BACK, linestyle="--", linewidth=0.8)
        if log and positive:
            axis.set_yscale("log")
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(True, color="#e1e5eb", linewidth=0.6)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.set_xlabel("step", fontsize=9)


def _overview(result: ScanResult, pyplot: Any) -> Any:
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    runs = list(result.runs().values())
    _curves(axes.flat, result, runs, alpha=min(0.9, max(0.1, 3 / math.sqrt(len(runs) or 1))))
    _title(figure, f"{len(runs):,} runs, {len(result):,} checkpoints")
    return figure


def _title(figure: Any, text: str) -> None:
    # A run's name is text: a $ in it starts no formula.
    figure.suptitle(text.replace("$", r"\$"), fontsize=11, x=0.01, ha="left")


def _run_figure(result: ScanResult, run: str, rows: Sequence[Row], pyplot: Any) -> Any:
    figure = pyplot.figure(figsize=(10, 8.4), layout="constrained")
    axes = figure.subplot_mosaic([["a", "b"], ["c", "d"], ["e", "f"]])
    _curves([axes[key] for key in "abcd"], result, [rows], alpha=1.0)
    table = result.to_arrow("layers")
    where = layers_by_record(table)
    spans = [where[row["record"]] for row in rows if row["record"] in where]
    for key, column, title in (
        ("e", "hidden_norm", "‖h‖ by layer"),
        ("f", "grad_norm", "‖g‖ by layer"),
    ):
        axis = axes[key]
        axis.set_title(title, loc="left", fontsize=10)
        depth = max((count for _, count in spans), default=0)
        picture = np.full((depth, len(spans)), np.nan)
        for at, (start, count) in enumerate(spans):
            picture[:count, at] = table[column].slice(start, count).to_numpy()
        picture[~(np.isfinite(picture) & (picture > 0))] = np.nan
        if not np.isfinite(picture).any():
            axis.set_axis_off()
            continue
        image = axis.imshow(np.log10(picture), aspect="auto", interpolation="nearest")
        names = table["name"].slice(*max(spans, key=lambda span: span[1])).to_pylist()
        every = max(1, math.ceil(depth / 12))
        axis.set_yticks(range(0, depth, every), names[::every], fontsize=8)
        axis.set_xlabel("checkpoint", fontsize=9)
        figure.colorbar(image, ax=axis, label="log₁₀")
    _title(figure, run)
    return figure
