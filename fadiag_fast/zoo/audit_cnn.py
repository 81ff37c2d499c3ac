"""Audit a folder of SmallCNN checkpoints: five credit rules, three seeds, one table.

The network has no terminal norm and its states are feature maps; the logic is the protocol's all
the same: growth of the flattened ‖h_l‖ from block to block, and ‖g_l‖ at the deepest state.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoints import CheckpointError, MissingCheckpoint, load_checkpoint, load_into
from ..diagnosis import diagnose
from ..protocol import TRUSTWORTHY
from ..protocol.figures import NORM_FLOOR
from ..report import DiagnosticReport
from .data import ImageDataset
from .models import build_model
from .training import accuracy

METHODS = ("bp", "dfa", "state_bridge", "credit_bridge", "ep")
SEEDS = (42, 123, 456)

# The norms belong to the first evaluation batch of this size: ‖g‖ carries 1/B.
BATCH_SIZE = 128

_COLUMNS = ("method", "seed", "acc", "h_max/h_min", "max/block", "||g_L||")
_WIDTHS = (16, 6, 8, 14, 14, 14)


@dataclass(frozen=True)
class AuditRow:
    """Hold what the audit found in one checkpoint.

    Attributes:
        method: name of the credit rule, from the file's name.
        seed: from the file's name.
        report: the whole diagnosis; its states are the outputs of the four blocks.
    """

    method: str
    seed: int
    report: DiagnosticReport

    @property
    def acc(self) -> float:
        """Fraction of the test set classified correctly."""
        value = self.report.figures.headline_acc
        return math.nan if value is None else value

    @property
    def h_norms(self) -> list[float]:
        """Median ‖h_l‖ of each block's flattened output, first batch."""
        return self.report.residual_norms

    @property
    def g_norms(self) -> list[float]:
        """Median ‖∂CE/∂h_l‖ of the batch's mean loss, first batch."""
        return self.report.bp_grad_norms

    @property
    def h_ratio(self) -> float:
        """Largest by smallest of ``h_norms``, the denominator floored at 1e-30."""
        return max(self.h_norms) / max(min(self.h_norms), NORM_FLOOR)

    @property
    def max_per_block(self) -> float:
        """Diagnostic (a): largest ‖h_{l+1}‖ / ‖h_l‖."""
        value = self.report["a"].value
        return math.nan if value is None else value

    @property
    def verdict(self) -> str:
        """``trustworthy`` or ``walk-back: (a)+(b)``; (c) and (d) take no part."""
        fired = [f"({key})" for key in ("a", "b") if self.report[key].fired]
        return f"walk-back: {'+'.join(fired)}" if fired else TRUSTWORTHY

    def to_dict(self) -> dict[str, Any]:
        """Return the row as strict JSON values: NaN and infinity become strings."""
        record = json.loads(self.report.to_json())
        return {
            "method": self.method,
            "seed": self.seed,
            "acc": self.acc,
            "h_norms": record["residual_norms"],
            "g_norms": record["bp_grad_norms"],
            "max_per_block": record["diagnostics"]["a"]["value"],
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class SkippedRow:
    """Name a checkpoint that could not be audited.

    Attributes:
        method: name of the credit rule.
        seed: its seed.
        reason: what was expected and what was there.
        missing: whether there simply is no such file.
    """

    method: str
    seed: int
    reason: str
    missing: bool

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method, "seed": self.seed, "reason": self.reason}


@dataclass(frozen=True)
class CNNAudit:
    """Hold the audit of a folder; print it, or write its record.

    Attributes:
        title: what was audited, on which data.
        entries: audited and skipped checkpoints, seed by seed, methods in their order.
    """

    title: str
    entries: tuple[AuditRow | SkippedRow, ...]

    @property
    def rows(self) -> list[AuditRow]:
        return [entry for entry in self.entries if isinstance(entry, AuditRow)]

    @property
    def skipped(self) -> list[SkippedRow]:
        return [entry for entry in self.entries if isinstance(entry, SkippedRow)]

    def to_json(self) -> str:
        """Return strict JSON: ``rows`` with the protocol script's keys, and ``skipped``."""
        record = {
            "rows": [row.to_dict() for row in self.rows],
            "skipped": [row.to_dict() for row in self.skipped],
        }
        return json.dumps(record, indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        return "\n".join([self.title, "", *self._table(), "", *self._means()])

    def _table(self) -> list[str]:
        header = "".join(
            name.ljust(width) if name == "method" else name.rjust(width)
            for name, width in zip(_COLUMNS, _WIDTHS, strict=True)
        )
        lines = [f"{header}  verdict"]
        for entry in self.entries:
            name = f"{entry.method:<16}{entry.seed:>6}"
            if isinstance(entry, SkippedRow):
                lines.append(f"{name}  SKIPPED ({entry.reason})")
                continue
            lines.append(
                f"{name}{entry.acc:>8.4f}{entry.h_ratio:>14.2e}{entry.max_per_block:>14.2e}"
                f"{entry.g_norms[-1]:>14.2e}  {entry.verdict}"
            )
        return lines

    def _means(self) -> list[str]:
        lines = ["means over the seeds, per block where there are several figures:"]
        for method in dict.fromkeys(row.method for row in self.rows):
            rows = [row for row in self.rows if row.method == method]
            accs = np.array([row.acc for row in rows])
            h_means = np.mean([row.h_norms for row in rows], axis=0)
            g_means = np.mean([row.g_norms for row in rows], axis=0)
            growth = np.mean([row.max_per_block for row in rows])
            lines.append(
                f"{method.upper()} ({len(rows)} {'seed' if len(rows) == 1 else 'seeds'}): "
                # The spread of these seeds (divisor n), as the protocol's own script gives it.
                f"acc={accs.mean():.4f}±{accs.std():.4f}, h_means={_figures(h_means)}, "
                f"g_means={_figures(g_means)}, max-per-block={growth:.2e}"
            )
        return lines if self.rows else ["no checkpoint was audited"]


def _figures(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:.3g}' for value in values)}]"


def audit_cnn(
    folder: Path,
    dataset: ImageDataset,
    *,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = SEEDS,
    model_options: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    unsafe_pickle: bool = False,
) -> CNNAudit:
    """Audit the SmallCNN checkpoints ``{method}_s{seed}.pt`` of one folder.

    Args:
        folder: where the files are. One that is missing, damaged, or of another network is
            skipped with the reason.
        dataset: the accuracy is over its whole test set, the norms are medians over the first 128
            test images, unshuffled.
        methods: credit rules to look for, in the order of the table.
        seeds: seeds to look for.
        model_options: options of "smallcnn" beyond those a checkpoint was saved with.
        device: where to evaluate.
        unsafe_pickle: run code from files that need it to load.

    Returns the table's rows. (a) and (b) are judged, at the published limits; (c) needs several
    batches and (d) a frozen network. Raises ValueError for a test set of fewer than 128 images, a
    set whose shape SmallCNN does not take, or an option that does not fit. Source: 'Beyond Accuracy
    and Alignment' protocol, arXiv 2606.21126.
    """
    batches = dataset.eval_batches(BATCH_SIZE, 1, device=device)
    options = dict(model_options or {})
    # An option or a data set that fits no SmallCNN is an error of the call, not of every file.
    _build(dataset, options)
    entries: list[AuditRow | SkippedRow] = []
    for seed in seeds:
        for method in methods:
            path = folder / f"{method}_s{seed}.pt"
            try:
                checkpoint = load_checkpoint(path, unsafe_pickle=unsafe_pickle)
                model = _build(dataset, {**_saved_options(checkpoint.extra), **options})
                load_into(model, checkpoint)
            except (CheckpointError, TypeError, ValueError) as error:
                missing = isinstance(error, MissingCheckpoint)
                reason = f"no such file: {path}" if missing else str(error)
                entries.append(SkippedRow(method, seed, reason, missing))
                continue
            model = model.to(device)
            report = diagnose(
                model,
                batches,
                accuracy(model, dataset.test_images, dataset.test_labels, flatten=False),
                method_name=f"{method}_s{seed}",
            )
            entries.append(AuditRow(method, seed, report))
    title = f"SmallCNN (no terminal norm) on {dataset.name}: {folder}"
    return CNNAudit(title, tuple(entries))


def _build(dataset: ImageDataset, options: Mapping[str, Any]) -> torch.nn.Module:
    return build_model(
        "smallcnn",
        input_shape=dataset.input_shape,
        num_classes=dataset.num_classes,
        **options,
    )


def _saved_options(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that ``fadiag train`` saved with a SmallCNN; none for other files."""
    config = extra.get("config")
    if not isinstance(config, dict) or config.get("model") != "smallcnn":
        return {}
    options = config.get("model_options", {})
    return dict(options) if isinstance(options, dict) else {}
