"""What a study found: audited checkpoints, runs, and all of them, as Python and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..credit import CreditReport, LayerCredit
from ..protocol import Diagnostic, DiagnosticThresholds, Figures, Protocol, verdict_of
from ..protocol.explanations import find_causes
from ..protocol.judging import judge_figures
from .suites import Suite


@dataclass(frozen=True)
class AuditedStep:
    """One audited checkpoint.

    Attributes:
        step: updates before it.
        figures: what the diagnostics read, ``frozen_baseline_acc`` that of the frozen run of the
            same model and seed at the same step, where there is one.
        credit: Γ and ρ, at a run's last step; None at others.
    """

    step: int
    figures: Figures
    credit: CreditReport | None = None

    def diagnostics(self, protocol: Protocol) -> tuple[Diagnostic, ...]:
        """Judge (a) to (d) by one protocol at its default thresholds."""
        return self._paper if protocol == "paper" else self._calibrated

    def verdict(self, protocol: Protocol) -> str:
        """Return ``trustworthy``, ``needs walk-back: …`` or ``not enough data``."""
        return verdict_of(self.diagnostics(protocol), protocol)

    @cached_property
    def _paper(self) -> tuple[Diagnostic, ...]:
        return judge_figures(self.figures, protocol="paper")

    @cached_property
    def _calibrated(self) -> tuple[Diagnostic, ...]:
        return judge_figures(self.figures, protocol="calibrated")

    @cached_property
    def alone(self) -> AuditedStep:
        """The same checkpoint without its baseline: (d) is not evaluated."""
        figures = replace(self.figures, frozen_baseline_acc=None, frozen_test_size=None)
        return AuditedStep(self.step, figures, self.credit)

    @cached_property
    def causes(self) -> tuple[str, ...]:
        """Sentences of the calibrated protocol on what made the figures what they are."""
        return find_causes(self.figures, self._calibrated, DiagnosticThresholds())

    @property
    def accuracy(self) -> float | None:
        """Fraction of the test set classified correctly."""
        return self.figures.headline_acc

    @property
    def hidden_norm(self) -> float:
        """Median ‖h_L‖ on the first evaluation batch."""
        return self.figures.residual_norms[-1] if self.figures.residual_norms else math.nan

    @property
    def grad_norm(self) -> float:
        """Median ‖g_L‖ on the first evaluation batch, of its mean cross-entropy."""
        return self.figures.bp_grad_norms[-1] if self.figures.bp_grad_norms else math.nan

    @property
    def credit_gain(self) -> float:
        """Median ‖g_L‖ / ‖∂loss/∂logits‖ on the first evaluation batch."""
        return self.figures.credit_gains[-1] if self.figures.credit_gains else math.nan

    @property
    def growth(self) -> float | None:
        """The paper protocol's (a)."""
        return self._paper[0].value

    @property
    def stability(self) -> float | None:
        """The paper protocol's (c)."""
        return self._paper[2].value

    @property
    def deep_gamma(self) -> float | None:
        """Mean Γ over l ≥ 1; None where there is none."""
        return None if self.credit is None else self.credit.deep_gamma

    @property
    def mean_gamma(self) -> float | None:
        """Mean Γ over all blocks, the figure papers report; None where there is none."""
        known = [] if self.credit is None else [g for g in self.credit.gammas if g is not None]
        return sum(known) / len(known) if known else None

    @property
    def deep_rho(self) -> float | None:
        """Mean ρ over l ≥ 1; None where there is none."""
        return None if self.credit is None else self.credit.deep_perturbation


@dataclass(frozen=True)
class RunRecord:
    """One model, trained by one rule from one seed.

    Attributes:
        model: the suite's label.
        variant: key of the published figures: see :attr:`StudyModel.variant`.
        rule: the rule's name.
        penalty: λ of the residual penalty.
        seed: of the run.
        reason: why it failed, "" where it did not.
        steps: its audited checkpoints, ascending.
        seconds: of training; of one that was stopped, without those after its last checkpoint.
        environment: versions and device it was trained with.
    """

    model: str
    variant: str
    rule: str
    penalty: float
    seed: int
    reason: str = ""
    steps: tuple[AuditedStep, ...] = ()
    seconds: float = 0.0
    environment: str = ""

    @property
    def label(self) -> str:
        """The rule's name, with its penalty if it has one."""
        return self.rule if self.penalty == 0 else f"{self.rule} λ={self.penalty:g}"

    @property
    def last(self) -> AuditedStep | None:
        """The last checkpoint, None in a run that failed."""
        return self.steps[-1] if self.steps and not self.reason else None


@dataclass(frozen=True)
class StudyResult:
    """What a study found: every run, with figures that both protocols judge.

    Attributes:
        suite: what was run.
        dataset: the data's name.
        num_classes: of the data; 1 by it is the accuracy of chance.
        steps_per_epoch: updates in one pass over the training images.
        runs: in the suite's order: by model, rule, penalty, seed.
        trained: runs trained in this call; the others were done before, or failed.
    """

    suite: Suite
    dataset: str
    num_classes: int
    steps_per_epoch: int
    runs: tuple[RunRecord, ...]
    trained: int = 0
    folder: Path | None = field(default=None, compare=False)

    @property
    def failed(self) -> list[RunRecord]:
        """The runs that have a reason in place of figures."""
        return [run for run in self.runs if run.reason]


def with_frozen(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Give every step the accuracy of the frozen run of its model and seed at that step."""
    frozen = {
        (run.model, run.seed, step.step): step.figures
        for run in runs
        if run.rule == "frozen" and not run.reason
        for step in run.steps
    }
    found = []
    for run in runs:
        steps = []
        for step in run.steps:
            beside = frozen.get((run.model, run.seed, step.step))
            if beside is not None and run.rule != "frozen":
                figures = replace(
                    step.figures,
                    frozen_baseline_acc=beside.headline_acc,
                    frozen_test_size=beside.test_size,
                )
                step = AuditedStep(step.step, figures, step.credit)
            steps.append(step)
        found.append(replace(run, steps=tuple(steps)))
    return found


# Records as files


def step_to_dict(step: AuditedStep) -> dict[str, Any]:
    return {
        "step": step.step,
        "figures": asdict(step.figures),
        "credit": None if step.credit is None else step.credit.to_dict(),
    }


def step_from_dict(record: Mapping[str, Any]) -> AuditedStep:
    figures = {
        one.name: _tuples(record["figures"][one.name])
        for one in fields(Figures)
        if one.name in record["figures"]
    }
    saved = record["credit"]
    credit = None
    if saved is not None:
        layers = tuple(LayerCredit(**layer) for layer in saved["layers"])
        credit = CreditReport(
            layers, saved["deep_null_mean"], saved["deep_null_sd"], saved["reason"]
        )
    return AuditedStep(record["step"], Figures(**figures), credit)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
