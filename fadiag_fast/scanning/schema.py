"""The two tables of a scan: their columns, what each means, and their version.

``checkpoints`` has one row per checkpoint, ``layers`` one per checkpoint and hidden state. Together
they hold every number that a diagnosis read: :func:`fadiag_fast.scanning.records.figures_of` gives
back the same :class:`~fadiag_fast.protocol.Figures` to the last bit, so that thresholds can be
moved without the checkpoints.

A version only ever adds columns, all nullable, and never changes what one means. So an older file
is read by adding empty columns, and a newer one is refused: its rows may need columns to be
understood that are not known here.

Version 2 adds where in a file the weights were, what the calibrated protocol reads, and by which
protocol a row was judged. A row of version 1 has nulls there: it was judged as published, and the
calibrated protocol judges it by the figures of the first batch, without intervals of (c) and with
(d) undecided.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from .._common.extras import arrow

SCHEMA_VERSION = 2

# Where the version stands in a file's key-value metadata.
VERSION_KEY = b"fadiag_scan_schema_version"

# Columns in which two scans of the same files with the same configuration differ.
VOLATILE = ("record", "seconds", "finished_at", "session_started_at")


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: as in the file.
        type: ``text``, ``number`` (float64), ``integer`` (int64), ``time`` (UTC, microseconds),
            ``texts`` or ``integers`` (lists).
        doc: what it holds; where it is null.
    """

    name: str
    type: str
    doc: str


def _diagnostic_columns() -> tuple[Column, ...]:
    columns: list[Column] = []
    for key, name in (
        ("a", "scale growth"),
        ("b", "gradient floor"),
        ("c", "direction stability"),
        ("d", "depth utility"),
    ):
        columns += [
            Column(
                f"{key}_value", "number", f"({key}) {name}: its value; null where there is none"
            ),
            Column(
                f"{key}_status", "text", "`passed`, `fired`, `not enough data` or `not evaluated`"
            ),
            Column(f"{key}_label", "text", "the protocol's word for it, such as `EXPLODED`"),
            Column(f"{key}_layer", "text", "name of the hidden state concerned, if there is one"),
            Column(f"{key}_threshold", "number", "the limit it was judged by"),
        ]
    return tuple(columns)


CHECKPOINT_COLUMNS: tuple[Column, ...] = (
    Column("record", "integer", "number in order of writing, unique in a folder; joins the tables"),
    Column("path", "text", "the checkpoint as it was named to the scan"),
    Column("run", "text", "the training run it belongs to"),
    Column("step", "integer", "its step in the run; null where the path names none"),
    Column("fields", "text", "further fields from the path or manifest, a JSON object of strings"),
    Column("status", "text", "`audited` or `failed`"),
    Column("error_kind", "text", "why it failed, in a word; null where audited"),
    Column("error", "text", "why it failed, in a sentence; null where audited"),
    Column(
        "verdict",
        "text",
        "`trustworthy`, `needs walk-back: (a)+(b)` or `not enough data`; null where failed",
    ),
    Column("remarks", "texts", "sentences a reader should know: a solved task, samples left out"),
    *_diagnostic_columns(),
    Column("min_batches", "integer", "batches with a direction that (c) was asked to have"),
    Column("credit_gain_floor", "number", "the limit under which a gradient counts as lost"),
    Column("growth", "number", "largest ‖h_{l+1}‖ / ‖h_l‖ of the medians"),
    Column("grad_norm", "number", "median ‖g_L‖ at the deepest state; carries the loss's 1/B"),
    Column("credit_gain", "number", "median ‖g_L‖ / ‖∂loss/∂logits‖ at the deepest state"),
    Column("stability", "number", "mean cosine over all pairs of batches at layer L/2"),
    Column("num_directions", "integer", "batches that have a direction at layer L/2"),
    Column("output_grad_norm", "number", "median ‖∂loss/∂logits‖; carries the loss's 1/B"),
    Column("batch_size", "integer", "samples of the first batch"),
    Column("num_batches", "integer", "batches that hold a sample"),
    Column("num_layers", "integer", "hidden states: rows of this checkpoint in `layers`"),
    Column("accuracy", "number", "accuracy that (d) judges, a fraction; null if there is none"),
    Column("measured_accuracy", "number", "accuracy over the evaluation batches; null likewise"),
    Column(
        "frozen_accuracy", "number", "accuracy with frozen blocks, a fraction; null if not given"
    ),
    Column(
        "frozen_run", "text", "the run whose accuracy is the frozen baseline; null if not given"
    ),
    Column("depth_utility", "number", "accuracy minus frozen accuracy in percentage points"),
    Column("content_hash", "text", "of the checkpoint's bytes; null where they could not be read"),
    Column(
        "container",
        "text",
        "where in the file the weights were: `bare` or a key; null where it could not be read",
    ),
    Column(
        "config_hash",
        "text",
        "of the probe's configuration: batches, taps, loss, reduction, output, batch dimension, "
        "and the network's code and settings",
    ),
    Column("config", "text", "the probe's configuration, a JSON object"),
    Column("bytes", "integer", "size of the checkpoint; null where unknown"),
    Column("fadiag_fast", "text", "version of fadiag_fast"),
    Column("torch", "text", "version of torch"),
    Column("device", "text", "what computed the figures"),
    Column("seconds", "number", "wall time spent on it: its share, where several went together"),
    Column("finished_at", "time", "when it was done"),
    Column("session_started_at", "time", "start of the process that wrote the row"),
    # Since version 2:
    Column("protocol", "text", "`paper` or `calibrated`: how it was judged; null: as published"),
    Column("causes", "texts", "sentences of the calibrated protocol; null where not judged by it"),
    Column(
        "gradient_floor",
        "number",
        "the paper protocol's limit of (b), whichever judged; null: `b_threshold`",
    ),
    Column("test_size", "integer", "images behind `accuracy`; null if not known"),
    Column("frozen_test_size", "integer", "images behind `frozen_accuracy`; null: as many"),
    Column("num_samples", "integer", "samples of all batches"),
    Column("num_measurable", "integer", "of these, those whose ‖∂loss/∂logits‖ is a normal number"),
    Column("num_non_finite", "integer", "of these, those with a state or gradient not finite"),
    Column("equal_logits", "integer", "1 where in every sample all logits are one number, else 0"),
    Column(
        "output_error", "number", "median ‖softmax − onehot‖ over all batches; null without classes"
    ),
    Column("grad_dtype", "text", "dtype of the deepest state's gradient"),
    Column(
        "gain_reference",
        "text",
        "what credit gains are relative to: `output`, or the name of the last state; null: "
        "`output`",
    ),
)

LAYER_COLUMNS: tuple[Column, ...] = (
    Column("record", "integer", "the checkpoint's `record`"),
    Column("path", "text", "as in `checkpoints`"),
    Column("run", "text", "as in `checkpoints`"),
    Column("step", "integer", "as in `checkpoints`"),
    Column("content_hash", "text", "as in `checkpoints`"),
    Column("config_hash", "text", "as in `checkpoints`"),
    Column("layer", "integer", "index l of the hidden state; 0 is the embedding's output"),
    Column("name", "text", "name of the hidden state"),
    Column("hidden_norm", "number", "median ‖h_l‖ on the first batch"),
    Column("growth", "number", "‖h_l‖ / ‖h_{l-1}‖ of the medians; null at l = 0"),
    Column("grad_norm", "number", "median ‖g_l‖ on the first batch"),
    Column("credit_gain", "number", "median ‖g_l‖ / ‖∂loss/∂logits‖ on the first batch"),
    Column("stability", "number", "mean cosine over all pairs of batches"),
    Column("num_directions", "integer", "batches that have a direction"),
    Column("sample_shape", "integers", "shape of one sample's state; null if not recorded"),
    Column("rms", "number", "hidden_norm / √(elements of a sample); null without a shape"),
    # Since version 2:
    Column("pooled_norm", "number", "median ‖h_l‖ over the samples of all batches"),
    Column("pooled_gain", "number", "median credit gain over all batches' measurable samples"),
    Column("stability_error", "number", "jackknife standard error of `stability` over the batches"),
    Column("stability_null", "number", "95% quantile of `stability` over all sign flips"),
)

# What a part file adds to its checkpoints: the layers' own columns, nested.
LAYER_FIGURES = LAYER_COLUMNS[6:]


def _type(name: str) -> Any:
    pa = arrow()
    return {
        "text": pa.string(),
        "number": pa.float64(),
        "integer": pa.int64(),
        "time": pa.timestamp("us", tz="UTC"),
        "texts": pa.list_(pa.string()),
        "integers": pa.list_(pa.int64()),
    }[name]


def _schema(columns: tuple[Column, ...], *more: Any) -> Any:
    pa = arrow()
    return pa.schema(
        [*(pa.field(column.name, _type(column.type)) for column in columns), *more],
        metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()},
    )


@cache
def checkpoint_schema() -> Any:
    """Return the Arrow schema of ``checkpoints``, its version in the metadata."""
    return _schema(CHECKPOINT_COLUMNS)


@cache
def layer_schema() -> Any:
    """Return the Arrow schema of ``layers``, its version in the metadata."""
    return _schema(LAYER_COLUMNS)


@cache
def part_schema() -> Any:
    """Return the Arrow schema of a part file: a checkpoint with its layers in one row."""
    pa = arrow()
    layer = pa.struct([(column.name, _type(column.type)) for column in LAYER_FIGURES])
    return _schema(CHECKPOINT_COLUMNS, pa.field("layers", pa.list_(layer)))


def markdown(columns: tuple[Column, ...]) -> str:
    """Return the columns as a Markdown table."""
    lines = ["| column | type | what it holds |", "| --- | --- | --- |"]
    lines += [f"| `{column.name}` | {column.type} | {column.doc} |" for column in columns]
    return "\n".join(lines) + "\n"
