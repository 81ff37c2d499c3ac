"""What a scan says of one checkpoint, and the rows that say it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from itertools import pairwise
from typing import Any

import torch

from .._version import __version__
from ..protocol import (
    OUTPUT,
    DiagnosticThresholds,
    Figures,
    Protocol,
    growth_ratios,
    middle_layer,
    verdict_of,
)
from ..protocol.explanations import find_causes
from ..protocol.judging import judge_figures

AUDITED, FAILED = "audited", "failed"
# Kind of error of a checkpoint that holds what is no number.
NON_FINITE_WEIGHTS = "non-finite weights"

Row = dict[str, Any]


def utc_now() -> datetime:
    """Return the time, with its zone."""
    return datetime.now(timezone.utc)


@dataclass(frozen=True)
class CheckpointRecord:
    """One checkpoint's outcome: the figures of an audit, or why there are none.

    Attributes:
        path: the checkpoint as it was named to the scan.
        run: the training run it belongs to.
        step: its step in the run, if known.
        config_hash: as :meth:`fadiag_fast.scanning.ScanWriter.configure` returned it.
        content_hash: of the checkpoint's bytes; None where they could not be read.
        figures: what was measured; None for a failure. Its accuracies are the row's.
        error_kind: why there are no figures, in a word: ``missing``, ``permission``,
            ``unreadable``, ``unsafe``, ``no weights``, ``wrong model``, ``non-finite weights``,
            ``out of memory``, ``worker died``, ``error``; None for an audit.
        error: the same in a sentence.
        remarks: sentences on what a reader should know.
        fields: further fields of the path's pattern or the manifest.
        frozen_run: the run whose accuracy is this one's frozen baseline.
        measured_accuracy: over the evaluation batches, where labels are classes. The accuracy that
            (d) judges is the figures': this one, unless a better one was given.
        sample_shapes: per hidden state the shape of one sample, where known.
        container: where in the file the weights were, as `Checkpoint.container` says it.
        bytes: size of the checkpoint.
        device: what computed the figures.
        seconds: wall time spent on it; its share, where several went together.
        finished_at: when it was done.

    Raises:
        ValueError: neither figures nor an error kind, or both; shapes for another number of states.
    """

    path: str
    run: str
    step: int | None
    config_hash: str
    content_hash: str | None = None
    figures: Figures | None = None
    error_kind: str | None = None
    error: str | None = None
    remarks: Sequence[str] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    frozen_run: str | None = None
    measured_accuracy: float | None = None
    sample_shapes: Sequence[Sequence[int]] | None = None
    container: str | None = None
    bytes: int | None = None
    device: str = ""
    seconds: float = 0.0
    finished_at: datetime = field(default_factory=utc_now)

    def __post_init__(self) -> None:
        if (self.figures is None) == (not self.error_kind):
            raise ValueError(
                f"CheckpointRecord: {self.path}: expected either figures or an error_kind, got "
                f"{'neither' if self.figures is None else 'both'}"
            )
        if self.figures is not None and self.content_hash is None:
            raise ValueError(
                f"CheckpointRecord: {self.path}: expected a content_hash with the figures"
            )
        if self.sample_shapes is not None and (
            self.figures is None or len(self.sample_shapes) != len(self.figures.layers)
        ):
            states = 0 if self.figures is None else len(self.figures.layers)
            raise ValueError(
                f"CheckpointRecord: {self.path}: expected one sample shape for each of {states} "
                f"hidden states, got {len(self.sample_shapes)}"
            )


def clean(text: str) -> str:
    """Return text that any file can hold: a file name that is no UTF-8 has its bytes escaped."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def fields_text(fields: Mapping[str, str]) -> str:
    """Return further fields as the JSON text that a row holds."""
    return clean(json.dumps(dict(fields), sort_keys=True, ensure_ascii=False)) if fields else "{}"


@cache
def _versions() -> tuple[str, str]:

    return __version__, str(torch.__version__)


def row_of(
    record: CheckpointRecord, thresholds: DiagnosticThresholds, protocol: Protocol = "paper"
) -> Row:
    """Return a record as a row of a part file: all but what only the writer knows."""
    version, torch_version = _versions()
    row: Row = {
        "path": clean(record.path),
        "run": clean(record.run),
        "step": record.step,
        "fields": fields_text(record.fields),
        "status": FAILED if record.figures is None else AUDITED,
        "error_kind": record.error_kind,
        "error": None if record.error is None else clean(record.error),
        "remarks": [clean(remark) for remark in record.remarks],
        "frozen_run": None if record.frozen_run is None else clean(record.frozen_run),
        "measured_accuracy": record.measured_accuracy,
        "content_hash": record.content_hash,
        "container": None if record.container is None else clean(record.container),
        "config_hash": record.config_hash,
        "bytes": record.bytes,
        "fadiag_fast": version,
        "torch": torch_version,
        "device": record.device,
        "seconds": float(record.seconds),
        "finished_at": record.finished_at,
        "num_layers": 0,
        "layers": [],
    }
    if record.figures is not None:
        row.update(_figure_columns(record.figures))
        row.update(judgement(record.figures, thresholds, protocol))
        row["layers"] = _layers(record.figures, record.sample_shapes)
    return row


def _figure_columns(figures: Figures) -> Row:
    states = len(figures.layers)
    middle = middle_layer(states) if states else 0
    ratios = growth_ratios(figures.residual_norms, figures.chain_starts)
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    return {
        "growth": max(known, default=1.0) if states else None,
        "grad_norm": float(figures.bp_grad_norms[-1]) if states else None,
        "credit_gain": float(figures.credit_gains[-1]) if states else None,
        "stability": float(figures.stabilities[middle]) if states else None,
        "num_directions": int(figures.num_directions[middle]) if states else None,
        "output_grad_norm": float(figures.output_grad_norm),
        "batch_size": figures.batch_size,
        "num_batches": figures.num_batches,
        "num_layers": states,
        "accuracy": figures.headline_acc,
        "frozen_accuracy": figures.frozen_baseline_acc,
        "test_size": figures.test_size,
        "frozen_test_size": figures.frozen_test_size,
        "num_samples": figures.num_samples,
        "num_measurable": figures.num_measurable,
        "num_non_finite": figures.num_non_finite,
        "equal_logits": None if figures.equal_logits is None else int(figures.equal_logits),
        "output_error": figures.output_error,
        "grad_dtype": figures.grad_dtype,
        "gain_reference": figures.gain_reference,
    }


def judgement(
    figures: Figures, thresholds: DiagnosticThresholds, protocol: Protocol = "paper"
) -> Row:
    """Return the columns that depend on thresholds and protocol: diagnostics, verdict, causes."""
    diagnostics = judge_figures(figures, thresholds, protocol)
    calibrated = protocol == "calibrated"
    row: Row = {
        "verdict": verdict_of(diagnostics, protocol),
        "protocol": protocol,
        "causes": list(find_causes(figures, diagnostics, thresholds)) if calibrated else None,
        # Whichever of the two limits (b) does not read stands here for the other protocol.
        "gradient_floor": thresholds.gradient_floor,
        "min_batches": thresholds.min_batches,
        "credit_gain_floor": thresholds.credit_gain_floor,
        "depth_utility": diagnostics[3].value,
    }
    for diagnostic in diagnostics:
        key = diagnostic.key
        row[f"{key}_value"] = diagnostic.value
        row[f"{key}_status"] = diagnostic.status.value
        row[f"{key}_label"] = diagnostic.label
        layer = diagnostic.layer
        row[f"{key}_layer"] = None if layer is None else figures.layers[layer]
        row[f"{key}_threshold"] = diagnostic.threshold
    return row


def _layers(figures: Figures, shapes: Sequence[Sequence[int]] | None) -> list[Row]:
    growth: list[float | None] = [
        None,
        *growth_ratios(figures.residual_norms, figures.chain_starts),
    ]
    pooled_norms, pooled_gains, errors, nulls = (
        _recorded_or_none(values, len(figures.layers))
        for values in (
            figures.pooled_norms,
            figures.pooled_gains,
            figures.stability_errors,
            figures.stability_nulls,
        )
    )
    rows = []
    for l, name in enumerate(figures.layers):
        shape = None if shapes is None else [int(size) for size in shapes[l]]
        norm = float(figures.residual_norms[l])
        rows.append(
            {
                "layer": l,
                "name": name,
                "hidden_norm": norm,
                "growth": growth[l],
                "grad_norm": float(figures.bp_grad_norms[l]),
                "credit_gain": float(figures.credit_gains[l]),
                "stability": float(figures.stabilities[l]),
                "num_directions": int(figures.num_directions[l]),
                "sample_shape": shape,
                "rms": norm / math.sqrt(math.prod(shape))
                if shape is not None and 0 not in shape
                else None,
                "pooled_norm": pooled_norms[l],
                "pooled_gain": pooled_gains[l],
                "stability_error": errors[l],
                "stability_null": nulls[l],
            }
        )
    return rows


def _recorded_or_none(values: Sequence[float], states: int) -> Sequence[float | None]:
    """Return the states' figures; None for each where none was recorded."""
    return [float(value) for value in values] if len(values) else [None] * states


def figures_of(row: Row, layers: Sequence[Row]) -> Figures:
    """Rebuild what the diagnostics read from an audited row and its layers, to the last bit.

    Args:
        row: a row of ``checkpoints``.
        layers: the rows of ``layers`` with its ``record``, in the order of ``layer``.
    """
    # Judging anew reads the figures' columns only.
    known = all(layer.get("sample_shape") is not None for layer in layers)
    shapes = tuple(tuple(layer["sample_shape"]) for layer in layers) if known else ()
    return Figures(
        layers=tuple(layer["name"] for layer in layers),
        residual_norms=tuple(layer["hidden_norm"] for layer in layers),
        bp_grad_norms=tuple(layer["grad_norm"] for layer in layers),
        credit_gains=tuple(layer["credit_gain"] for layer in layers),
        output_grad_norm=row["output_grad_norm"],
        batch_size=row["batch_size"],
        stabilities=tuple(layer["stability"] for layer in layers),
        num_directions=tuple(layer["num_directions"] for layer in layers),
        num_batches=row["num_batches"],
        headline_acc=row["accuracy"],
        frozen_baseline_acc=row["frozen_accuracy"],
        shapes=shapes,
        sizes=tuple(math.prod(shape) for shape in shapes),
        pooled_norms=_recorded(layers, "pooled_norm"),
        pooled_gains=_recorded(layers, "pooled_gain"),
        num_samples=row.get("num_samples"),
        num_measurable=row.get("num_measurable"),
        num_non_finite=row.get("num_non_finite"),
        equal_logits=None if row.get("equal_logits") is None else bool(row["equal_logits"]),
        output_error=row.get("output_error"),
        grad_dtype=row.get("grad_dtype"),
        stability_errors=_recorded(layers, "stability_error"),
        stability_nulls=_recorded(layers, "stability_null"),
        test_size=row.get("test_size"),
        frozen_test_size=row.get("frozen_test_size"),
        chain_starts=_chain_starts(layers),
        gain_reference=OUTPUT if row.get("gain_reference") is None else row["gain_reference"],
    )


def _chain_starts(layers: Sequence[Row]) -> tuple[int, ...]:
    """Return where further chains begin: at states without growth though both norms are known."""
    return tuple(
        l
        for l, (before, layer) in enumerate(pairwise(layers), 1)
        if _is_nan(layer.get("growth", 0.0))
        and not (_is_nan(before["hidden_norm"]) or _is_nan(layer["hidden_norm"]))
        and not (math.isinf(before["hidden_norm"]) and math.isinf(layer["hidden_norm"]))
    )


def _is_nan(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _recorded(layers: Sequence[Row], column: str) -> tuple[float, ...]:
    """Return a column of the layers, nothing where an older version did not record it."""
    values = [layer.get(column) for layer in layers]
    known = [float(value) for value in values if value is not None]
    return tuple(known) if len(known) == len(values) else ()


def protocol_of(row: Row) -> Protocol:
    """Return the protocol by which a row was judged."""
    return "calibrated" if row.get("protocol") == "calibrated" else "paper"


def thresholds_of(row: Row) -> DiagnosticThresholds:
    """Return the limits by which an audited row was judged."""
    return DiagnosticThresholds(
        scale_growth=row["a_threshold"],
        gradient_floor=(
            row["b_threshold"] if row.get("gradient_floor") is None else row["gradient_floor"]
        ),
        direction_stability=row["c_threshold"],
        depth_utility=row["d_threshold"],
        min_batches=row["min_batches"],
        credit_gain_floor=row["credit_gain_floor"],
    )
