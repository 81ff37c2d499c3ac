"""Draw a study's curves over the steps, one picture per model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .._common.extras import MissingExtra, require
from .._common.files import whole_file
from ..protocol import DiagnosticThresholds
from .records import RunRecord, StudyResult

# Figure, title, whether its axis is in powers of ten, the field of the paper's limit.
_CURVES = (
    ("accuracy", "accuracy", False, None),
    ("growth", "(a) growth", True, "scale_growth"),
    ("grad_norm", "(b) ‖g_L‖", True, "gradient_floor"),
    ("credit_gain", "credit gain", True, "credit_gain_floor"),
    ("hidden_norm", "‖h_L‖", True, None),
    ("stability", "(c) direction stability", False, "direction_stability"),
)

# Of lines, by penalty; rules differ in colour.
_STYLES = ("-", "--", "-.", ":", (0, (1, 4)))


def write_curves(result: StudyResult, folder: Path) -> list[Path]:
    """Write ``curves-{model}.png`` for every model with audited runs.

    Returns the files written: none where matplotlib is not installed.
    """
    try:
        require("matplotlib", "curves", extra="bench").use("Agg")
        pyplot = require("matplotlib.pyplot", "curves", extra="bench")
    except MissingExtra:
        return []
    written = []
    for model in dict.fromkeys(run.model for run in result.runs):
        runs = [run for run in result.runs if run.model == model and run.last is not None]
        if not runs:
            continue
        path = folder / f"curves-{model}.png"
        figure = _figure(model, runs, pyplot)
        try:
            with whole_file(path) as partial:
                figure.savefig(partial, dpi=130, format="png")
        finally:
            pyplot.close(figure)
        written.append(path)
    return written


def _figure(model: str, runs: list[RunRecord], pyplot: Any) -> Any:
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6.4), layout="constrained")
    rules = list(dict.fromkeys(run.rule for run in runs))
    penalties = sorted({run.penalty for run in runs})
    limits = DiagnosticThresholds()
    for axis, (name, title, log, field) in zip(axes.flat, _CURVES, strict=True):
        for run in runs:
            points = [(step.step, getattr(step, name)) for step in run.steps]
            points = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
            first = run is next(other for other in runs if other.label == run.label)
            axis.plot(
                [x for x, _ in points],
                [y for _, y in points],
                marker=".",
                linewidth=1.1,
                color=f"C{rules.index(run.rule) % 10}",
                linestyle=_STYLES[penalties.index(run.penalty) % len(_STYLES)],
                label=run.label if first else None,
            )
        if field is not None:
            axis.axhline(getattr(limits, field), color="0.4", linestyle="--", linewidth=0.8)
        axis.set_xscale("log")
        if log:
            axis.set_yscale("log")
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(True, color="#e1e5eb", linewidth=0.6)
        axis.set_xlabel("step", fontsize=9)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(model, fontsize=11, x=0.01, ha="left")
    return figure
