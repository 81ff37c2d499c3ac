"""Show what a diagnosis found: plain text, JSON and Markdown, from the same record."""

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ._common.jsonio import strict
from ._common.tables import markdown_table, number, table_cell, text_table
from ._common.text import for_terminal
from .protocol import Diagnostic, Figures, Protocol, growth_ratios, verdict_of


@dataclass(frozen=True)
class DiagnosticReport:
    """The outcome of one diagnosis; print it, or take the record apart.

    Attributes:
        method_name: what was diagnosed.
        figures: the medians and cosines behind the diagnostics.
        diagnostics: (a) to (d), see :class:`fadiag_fast.protocol.Diagnostic`.
        notes: the caller's remark.
        remarks: sentences on what a reader should know: a solved task, samples left out, …
        provenance: versions, device, dtype, batch sizes, loss, taps.
        protocol: by which the diagnostics were judged.
        causes: sentences of the calibrated protocol on what made the figures what they are.
    """

    method_name: str
    figures: Figures
    diagnostics: tuple[Diagnostic, ...]
    notes: str = ""
    remarks: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    protocol: Protocol = "paper"
    causes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """``trustworthy``, ``needs walk-back: (a)+(b)`` or ``not enough data``."""
        return verdict_of(self.diagnostics, self.protocol)

    @property
    def residual_norms(self) -> list[float]:
        """Median ‖h_l‖ over the first batch, per hidden state."""
        return list(self.figures.residual_norms)

    @property
    def bp_grad_norms(self) -> list[float]:
        """Median ‖g_l‖ over the first batch, per hidden state; carries the loss's factor 1/B."""
        return list(self.figures.bp_grad_norms)

    @property
    def credit_gains(self) -> list[float]:
        """Median ‖g_l‖ / ‖∂loss/∂logits‖ over the first batch, per hidden state."""
        return list(self.figures.credit_gains)

    @property
    def cross_batch_direction_stability(self) -> float | None:
        """Mean cosine over all pairs of batches at layer L/2; None without a pair."""
        return self["c"].value

    def __getitem__(self, key: str) -> Diagnostic:
        """Return a diagnostic by its letter."""
        for diagnostic in self.diagnostics:
            if diagnostic.key == key:
                return diagnostic
        raise KeyError(f"expected one of a, b, c, d, got {key!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain Python values; NaN and infinity stay floats."""
        figures = self.figures
        # What the calibrated diagnostics read beyond the figures of either protocol.
        pooled = {
            "pooled_norms": list(figures.pooled_norms),
            "pooled_gains": list(figures.pooled_gains),
            "num_samples": figures.num_samples,
            "num_measurable": figures.num_measurable,
            "num_non_finite": figures.num_non_finite,
            "output_error": figures.output_error,
            "stability_errors": list(figures.stability_errors),
            "stability_nulls": list(figures.stability_nulls),
            "test_size": figures.test_size,
            "frozen_test_size": figures.frozen_test_size,
        }
        return {
            "method_name": self.method_name,
            "notes": self.notes,
            "verdict": self.verdict,
            "protocol": self.protocol,
            "causes": list(self.causes),
            "layers": list(self.figures.layers),
            "residual_norms": self.residual_norms,
            "bp_grad_norms": self.bp_grad_norms,
            "credit_gains": self.credit_gains,
            "rms_norms": self.figures.rms_norms,
            "shapes": [list(shape) for shape in self.figures.shapes],
            "cross_batch_stability": self.cross_batch_direction_stability,
            "cross_batch_stability_by_layer": list(self.figures.stabilities),
            "output_grad_norm": self.figures.output_grad_norm,
            "headline_acc": self.figures.headline_acc,
            "frozen_baseline_acc": self.figures.frozen_baseline_acc,
            **(pooled if self.protocol == "calibrated" else {}),
            "diagnostics": {
                d.key: {**dataclasses.asdict(d), "status": d.status.value} for d in self.diagnostics
            },
            "remarks": list(self.remarks),
            "provenance": dict(self.provenance),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """Return strict JSON; non-finite figures become the strings NaN, Infinity, -Infinity."""
        return json.dumps(strict(self.to_dict()), indent=indent, ensure_ascii=False)

    def layer_rows(self) -> list[list[str]]:
        """Return the per-layer table as text, the columns of :meth:`layer_header`."""
        starts = self.figures.chain_starts
        growth = ["", *(number(ratio) for ratio in growth_ratios(self.residual_norms, starts))]
        rms_growth = [
            "",
            *(number(ratio) for ratio in growth_ratios(self.figures.rms_norms, starts)),
        ]
        return [
            [
                f"h_{l}",
                self.figures.layers[l],
                *(["×".join(map(str, self.figures.shapes[l]))] if self._has_positions else []),
                number(self.residual_norms[l]),
                growth[l],
                *([rms_growth[l]] if self._has_sizes else []),
                number(self.bp_grad_norms[l]),
                number(self.credit_gains[l]),
                number(self.figures.stabilities[l]),
            ]
            for l in range(len(self.residual_norms))
        ]

    def layer_header(self) -> list[str]:
        """Return the per-layer table's columns.

        ``shape`` is there where a state has positions, ``RMS growth`` where the states' sizes
        differ.
        """
        return [
            "layer",
            "after",
            *(["shape"] if self._has_positions else []),
            "‖h‖",
            "growth",
            *(["RMS growth"] if self._has_sizes else []),
            "‖g‖",
            "gain",
            "cosine",
        ]

    @property
    def _has_positions(self) -> bool:
        return any(len(shape) > 1 for shape in self.figures.shapes)

    @property
    def _has_sizes(self) -> bool:
        return len(set(self.figures.sizes)) > 1

    def diagnostic_rows(self) -> list[list[str]]:
        """Return the four diagnostics as text: name, value, limit, label, evidence."""
        return [
            [
                f"({d.key}) {d.name}",
                number(d.value),
                f"{d.comparison} {number(d.threshold)}",
                d.label,
                d.evidence,
            ]
            for d in self.diagnostics
        ]

    def __str__(self) -> str:
        lines = [f"{self.method_name}: {self.verdict}"]
        if self.protocol != "paper":
            lines.append(f"judged by the {self.protocol} protocol")
        if self.notes:
            lines.append(self.notes)
        if rows := self.layer_rows():
            lines += ["", *text_table(self.layer_header(), rows)]
        lines += ["", *text_table(DIAGNOSTIC_HEADER, self.diagnostic_rows())]
        lines += ["", *(f"note: {remark}" for remark in self.remarks)] if self.remarks else []
        lines += ["", *(f"cause: {cause}" for cause in self.causes)] if self.causes else []
        lines += ["", f"verdict: {self.verdict}", ""]
        lines += textwrap.wrap("; ".join(self._provenance_lines()), width=100)
        return for_terminal("\n".join(lines))

    def to_markdown(self) -> str:
        """Return the report for a paper's appendix: two tables, remarks, provenance."""
        lines = [f"### {table_cell(self.method_name)}: {self.verdict}", ""]
        if self.notes:
            lines += [self.notes, ""]
        if rows := self.layer_rows():
            lines += [*markdown_table(self.layer_header(), rows), ""]
        lines += [*markdown_table(DIAGNOSTIC_HEADER, self.diagnostic_rows()), ""]
        if self.protocol != "paper":
            lines += [f"Judged by the {self.protocol} protocol.", ""]
        lines += [f"- {remark}" for remark in (*self.causes, *self.remarks)]
        lines += ["", *(f"*{line}*  " for line in self._provenance_lines())]
        return "\n".join(lines) + "\n"

    def _provenance_lines(self) -> list[str]:
        return [f"{key.replace('_', ' ')}: {value}" for key, value in self.provenance.items()]


DIAGNOSTIC_HEADER = ["diagnostic", "value", "fires", "label", "evidence"]


@dataclass(frozen=True)
class SummaryRow:
    """One network in a table of several."""

    report: DiagnosticReport
    depth_utility: Diagnostic | None = None

    def cells(self) -> list[str]:
        report = self.report
        acc = report.figures.headline_acc
        utility = self.depth_utility or report["d"]
        return [
            report.method_name,
            "-" if acc is None else f"{100 * acc:.1f}%",
            number(report["a"].value),
            number(report.bp_grad_norms[-1] if report.bp_grad_norms else None),
            number(report.credit_gains[-1] if report.credit_gains else None),
            number(report["c"].value),
            "-" if utility.value is None else f"{utility.value:+.1f} pp {utility.label}",
            report.verdict,
        ]


SUMMARY_HEADER = ["network", "accuracy", "(a) growth", "(b) ‖g_L‖", "gain", "(c) cosine"]
SUMMARY_HEADER += ["(d) against frozen", "verdict by (a)-(c)"]


def summary_table(rows: Sequence[SummaryRow]) -> str:
    """Return one aligned line per network."""
    return "\n".join(text_table(SUMMARY_HEADER, [row.cells() for row in rows]))
