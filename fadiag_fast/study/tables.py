"""A study's tables: figures by rule, decisions by strategy, first firings; Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._common.files import write_whole
from .._common.tables import markdown_table, number
from ..protocol import NOT_ENOUGH_DATA, PROTOCOLS, TRUSTWORTHY, Diagnostic, Protocol, Status
from ..protocol.intervals import NORMAL_975
from .plots import write_curves
from .published import MISSING, PUBLISHED, PUBLISHED_DECISIONS, PUBLISHED_FIRST
from .records import AuditedStep, RunRecord, StudyResult

# True: the claim is walked back; False: it stands; None: the strategy has nothing to judge.
Decision = bool | None


# ---- decisions


def accuracy_only(step: AuditedStep, chance: float) -> Decision:
    """Walk back where the accuracy's 95% interval reaches down to chance."""
    accuracy, count = step.accuracy, step.figures.test_size
    if accuracy is None or not count:
        return None
    half_width = NORMAL_975 * math.sqrt(accuracy * (1 - accuracy) / count)
    return accuracy - half_width <= chance


def accuracy_and_gamma(step: AuditedStep, chance: float) -> Decision:
    """Walk back by accuracy, or where the mean Γ over all blocks is not above zero.

    That mean is the figure that papers report; without credit (Γ N/A) accuracy alone decides.
    """
    by_accuracy = accuracy_only(step, chance)
    gamma = step.mean_gamma
    if gamma is None:
        return by_accuracy
    return bool(by_accuracy) or not gamma > 0


def _one(key: str, protocol: Protocol = "paper") -> Callable[[AuditedStep, float], Decision]:
    def decide(step: AuditedStep, chance: float) -> Decision:
        return _outcome(step.diagnostics(protocol)["abcd".index(key)])

    return decide


def _outcome(diagnostic: Diagnostic) -> Decision:
    if diagnostic.status in (Status.FIRED, Status.PASSED):
        return diagnostic.fired
    return None


def _verdict(
    protocol: Protocol, *, baseline: bool = True
) -> Callable[[AuditedStep, float], Decision]:
    def decide(step: AuditedStep, chance: float) -> Decision:
        verdict = (step if baseline else step.alone).verdict(protocol)
        return None if verdict == NOT_ENOUGH_DATA else verdict != TRUSTWORTHY

    return decide


STRATEGIES: dict[str, Callable[[AuditedStep, float], Decision]] = {
    "accuracy only": accuracy_only,
    "accuracy + Γ": accuracy_and_gamma,
    "(a) alone": _one("a"),
    "(b) alone": _one("b"),
    "(c) alone": _one("c"),
    "(d) alone": _one("d"),
    "full, paper": _verdict("paper"),
    "full, calibrated": _verdict("calibrated"),
    # On an easy set depth is worth nothing to any rule, and (d) says so of all of them.
    "without (d), paper": _verdict("paper", baseline=False),
    "without (d), calibrated": _verdict("calibrated", baseline=False),
}


@dataclass(frozen=True)
class DecisionRow:
    """What one strategy walks back among the last checkpoints of one model.

    Attributes:
        model: the suite's label.
        strategy: a key of ``STRATEGIES``.
        walked: rule → (runs walked back, runs judged); rules with a penalty are named so.
    """

    model: str
    strategy: str
    walked: dict[str, tuple[int, int]]

    @property
    def rules(self) -> list[str]:
        """Rules of which more than half of the judged runs are walked back, but for "frozen".

        The frozen blocks are the baseline, not a claim.
        """
        return [
            rule
            for rule, (count, of) in self.walked.items()
            if rule != "frozen" and of and 2 * count > of
        ]

    @property
    def judged(self) -> list[str]:
        """Rules, but for "frozen", of which at least one run was judged."""
        return [rule for rule, (_, of) in self.walked.items() if rule != "frozen" and of]


def decision_table(runs: Sequence[RunRecord], num_classes: int) -> list[DecisionRow]:
    """Return per model and strategy how many runs of each rule are walked back.

    Args:
        runs: judged at their last checkpoint; failed ones are left out.
        num_classes: 1 by it is the accuracy of chance.
    """
    rows = []
    for model in dict.fromkeys(run.model for run in runs):
        mine = [run for run in runs if run.model == model]
        for strategy, decide in STRATEGIES.items():
            walked = {}
            for label in dict.fromkeys(run.label for run in mine):
                decisions = [
                    decide(run.last, 1 / num_classes)
                    for run in mine
                    if run.label == label and run.last is not None
                ]
                judged = [decision for decision in decisions if decision is not None]
                walked[label] = (sum(judged), len(judged))
            rows.append(DecisionRow(model, strategy, walked))
    return rows


# ---- first firings


def first_fired(run: RunRecord, protocol: Protocol = "paper") -> dict[str, int | None]:
    """Return the first audited step at which each of (a) to (d) fired; None where it never did."""
    return {
        key: next(
            (step.step for step in run.steps if step.diagnostics(protocol)[index].fired), None
        )
        for index, key in enumerate("abcd")
    }


# ---- thresholds


@dataclass(frozen=True)
class ThresholdGap:
    """How far one limit of the paper protocol may move before a decision of a study changes.

    Attributes:
        model: the suite's label.
        key: of the diagnostic, ``a`` … ``d``.
        limit: the published one.
        low, high: the same runs fire for every limit strictly between; infinite where no run
            lies on that side.
        fired: runs that fire, at their last checkpoint.
        judged: runs with a figure.
    """

    model: str
    key: str
    limit: float
    low: float
    high: float
    fired: int
    judged: int


def threshold_gaps(runs: Sequence[RunRecord]) -> list[ThresholdGap]:
    """Return per model and diagnostic the nearest figures on both sides of the published limit.

    Figures that are not finite are counted as fired, and do not bound the gap.
    """
    gaps = []
    for model in dict.fromkeys(run.model for run in runs):
        steps = [run.last for run in runs if run.model == model and run.last is not None]
        for index, key in enumerate("abcd"):
            found = [step.diagnostics("paper")[index] for step in steps]
            judged = [d for d in found if _outcome(d) is not None and d.value is not None]
            if not judged:
                continue
            limit = judged[0].threshold
            values = [d.value for d in judged if d.value is not None and math.isfinite(d.value)]
            low = max((value for value in values if value <= limit), default=-math.inf)
            high = min((value for value in values if value > limit), default=math.inf)
            fired = sum(d.fired for d in judged)
            gaps.append(ThresholdGap(model, key, limit, low, high, fired, len(judged)))
    return gaps


# ---- rows


def run_rows(result: StudyResult) -> list[dict[str, Any]]:
    """Return a row per run, at its last checkpoint: plain values, None where there is none."""
    rows = []
    for run in result.runs:
        published = PUBLISHED.get((run.variant, run.rule)) if run.penalty == 0 else None
        row: dict[str, Any] = {**_identity(run), "status": "failed" if run.reason else "audited"}
        row |= {"reason": run.reason, "seconds": run.seconds}
        row |= _figures(run.last)
        last = run.last
        row["deep_gamma"] = None if last is None else last.deep_gamma
        row["mean_gamma"] = None if last is None else last.mean_gamma
        row["deep_rho"] = None if last is None else last.deep_rho
        row["causes"] = "" if last is None else " ".join(last.causes)
        for protocol in PROTOCOLS:
            first = first_fired(run, protocol)
            row |= {f"first_{key}_{protocol}": first[key] for key in "abcd"}
        for name in ("accuracy", "hidden_norm", "growth", "grad_norm", "stability", "fires"):
            row[f"cifar10_{name}"] = None if published is None else getattr(published, name)
        rows.append(row)
    return rows


def step_rows(result: StudyResult) -> list[dict[str, Any]]:
    """Return a row per audited checkpoint: figures, and what fired by both protocols."""
    rows = []
    for run in result.runs:
        for step in run.steps:
            row = {**_identity(run), **_figures(step)}
            row["epoch"] = step.step / result.steps_per_epoch
            for protocol in PROTOCOLS:
                for diagnostic in step.diagnostics(protocol):
                    row[f"{diagnostic.key}_{protocol}"] = diagnostic.status.value
            rows.append(row)
    return rows


def _identity(run: RunRecord) -> dict[str, Any]:
    return {"model": run.model, "rule": run.rule, "penalty": run.penalty, "seed": run.seed}


def _figures(step: AuditedStep | None) -> dict[str, Any]:
    names = ("step", "accuracy", "hidden_norm", "growth", "grad_norm", "credit_gain", "stability")
    row: dict[str, Any] = {name: None if step is None else getattr(step, name) for name in names}
    row["frozen_accuracy"] = None if step is None else step.figures.frozen_baseline_acc
    row["verdict_paper"] = "" if step is None else step.verdict("paper")
    row["verdict_calibrated"] = "" if step is None else step.verdict("calibrated")
    return row


# ---- tables as text

RUN_HEADER = ["model", "rule", "seed", "accuracy", "‖h_L‖", "(a) growth", "‖g_L‖", "gain", "(c)"]
RUN_HEADER += ["deep Γ", "deep ρ", "paper", "calibrated"]
MEAN_HEADER = ["model", "rule", "seeds", "accuracy", "‖h_L‖", "(a) growth", "‖g_L‖", "gain", "(c)"]
MEAN_HEADER += ["deep Γ", "deep ρ", "walked back: paper", "calibrated"]
PUBLISHED_HEADER = ["accuracy", "‖h_L‖", "growth", "‖g_L‖", "(c)", "fires"]


def run_table(result: StudyResult) -> list[list[str]]:
    """Return the columns of ``RUN_HEADER`` for every run; a failed one says why."""
    rows = []
    for run in result.runs:
        last = run.last
        start = [run.model, run.label, str(run.seed)]
        if last is None:
            rows.append([*start, *[MISSING] * 8, f"failed: {run.reason}", MISSING])
            continue
        rows.append(
            [
                *start,
                _decimal(last.accuracy),
                *(number(v) for v in (last.hidden_norm, last.growth, last.grad_norm)),
                number(last.credit_gain),
                _decimal(last.stability),
                _signed(last.deep_gamma),
                _signed(last.deep_rho),
                _short(last.verdict("paper")),
                _short(last.verdict("calibrated")),
            ]
        )
    return rows


def mean_table(result: StudyResult, *, beside: bool = False) -> list[list[str]]:
    """Return the columns of ``MEAN_HEADER`` for every model and rule, over its seeds.

    Accuracy, (c), Γ and ρ are mean ± standard deviation (divisor n, as in the protocol's own
    tables); norms, growth and gain, which differ by orders of magnitude, geometric means.
    ``beside`` adds the columns of ``PUBLISHED_HEADER``.
    """
    rows = []
    for model in dict.fromkeys(run.model for run in result.runs):
        mine = [run for run in result.runs if run.model == model]
        for label in dict.fromkeys(run.label for run in mine):
            group = [run for run in mine if run.label == label]
            steps = [run.last for run in group if run.last is not None]
            row = [model, label, f"{len(steps)}/{len(group)}"]
            row.append(spread([step.accuracy for step in steps]))
            row += [
                geometric([getattr(step, name) for step in steps])
                for name in ("hidden_norm", "growth", "grad_norm", "credit_gain")
            ]
            row.append(spread([step.stability for step in steps]))
            row.append(spread([step.deep_gamma for step in steps]))
            row.append(spread([step.deep_rho for step in steps]))
            row += [_walked(steps, "paper"), _walked(steps, "calibrated")]
            if beside:
                one = PUBLISHED.get((group[0].variant, group[0].rule))
                row += (
                    [MISSING] * len(PUBLISHED_HEADER)
                    if one is None or group[0].penalty
                    else [
                        one.accuracy,
                        one.hidden_norm,
                        one.growth,
                        one.grad_norm,
                        one.stability,
                        one.fires,
                    ]
                )
            rows.append(row)
    return rows


def _walked(steps: Sequence[AuditedStep], protocol: Protocol) -> str:
    """Return "2/3 (a)+(d), 1 undecided": runs walked back, and what fired in any of them."""
    decisions = [_verdict(protocol)(step, 0.0) for step in steps]
    back = [step for step, decision in zip(steps, decisions, strict=True) if decision]
    undecided = decisions.count(None)
    fired = sorted({d.key for step in back for d in step.diagnostics(protocol) if d.fired})
    named = " " + "+".join(f"({key})" for key in fired) if fired else ""
    return f"{len(back)}/{len(steps)}{named}{f', {undecided} undecided' if undecided else ''}"


def decision_lines(result: StudyResult, model: str) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of one model's decision table."""
    table = [row for row in decision_table(result.runs, result.num_classes) if row.model == model]
    rules = list(table[0].walked) if table else []
    variant = next(run.variant for run in result.runs if run.model == model)
    header = ["strategy", *rules, "rules walked back"]
    published = variant == "resmlp"
    header += ["published (CIFAR-10)"] if published else []
    rows = []
    for row in table:
        cells = [f"{count}/{of}" if of else "N/A" for count, of in row.walked.values()]
        cells.append(f"{len(row.rules)} of {len(row.judged)}")
        cells += [PUBLISHED_DECISIONS.get(row.strategy, MISSING)] if published else []
        rows.append([row.strategy, *cells])
    return header, rows


FIRST_HEADER = ["model", "rule", "seed", *(f"({key})" for key in "abcd")]
FIRST_HEADER += [f"({key}) calibrated" for key in "abd"]


def first_table(result: StudyResult) -> list[list[str]]:
    """Return the columns of ``FIRST_HEADER`` for every run with figures."""
    rows = []
    for run in result.runs:
        if run.last is None:
            continue
        paper, calibrated = first_fired(run), first_fired(run, "calibrated")
        cells = [paper[key] for key in "abcd"] + [calibrated[key] for key in "abd"]
        rows.append(
            [run.model, run.label, str(run.seed)]
            + [MISSING if step is None else str(step) for step in cells]
        )
    return rows


GAP_HEADER = ["model", "diagnostic", "fired", "nearest below", "published limit", "nearest above"]


def gap_table(result: StudyResult) -> list[list[str]]:
    """Return the columns of ``GAP_HEADER`` for every model and diagnostic."""
    return [
        [
            gap.model,
            f"({gap.key})",
            f"{gap.fired}/{gap.judged}",
            *(
                number(value) if math.isfinite(value) else MISSING
                for value in (gap.low, gap.limit, gap.high)
            ),
        ]
        for gap in threshold_gaps(result.runs)
    ]


def spread(values: Sequence[float | None]) -> str:
    """Return mean ± standard deviation (divisor n), or N/A without a value."""
    known = [value for value in values if value is not None]
    if not known:
        return "N/A"
    mean = math.fsum(known) / len(known)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / len(known))
    return f"{mean:.3f} ± {sd:.3f}" if len(known) > 1 else f"{mean:.3f}"


def geometric(values: Sequence[float | None]) -> str:
    """Return the geometric mean; one value that is not finite or not above 0 is shown as it is."""
    known = [value for value in values if value is not None]
    if not known:
        return "N/A"
    for value in known:
        if not 0 < value < math.inf:
            return number(value)
    return number(math.exp(math.fsum(map(math.log, known)) / len(known)))


def _decimal(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "N/A" if value is None else f"{value:+.3f}"


def _short(verdict: str) -> str:
    return verdict.replace("needs walk-back: ", "")


# ---- files


def markdown(result: StudyResult, *, command: str = "", images: Sequence[str] = ()) -> str:
    """Return the report: means beside the published figures, decisions, first firings, runs."""
    suite = result.suite
    environments = dict.fromkeys(run.environment for run in result.runs if run.environment)
    lines = [f"# Study `{suite.name}` on {result.dataset}", ""]
    if command:
        lines += [f"`{command}`", ""]
    lines += [
        f"{len(result.runs)} runs, {len(result.failed)} failed; AdamW, learning rate "
        f"{suite.learning_rate:g}, weight decay {suite.weight_decay:g}, batches of "
        f"{suite.batch_size}, cosine schedule; "
        f"{sum(run.seconds for run in result.runs):,.0f} s of training.",
        "",
        *_training_lines(result),
        *(f"- trained with {where}" for where in environments),
        "",
        "## Rules",
        "",
        "Last checkpoint, over the seeds: mean ± standard deviation (divisor n); norms, growth and "
        "gain: geometric mean. (d) is against the frozen run of the same model and seed. The last "
        "columns are the published figures, on CIFAR-10 after 100 epochs: another data set and "
        "another length of training than here, unless you chose them so.",
        "",
        *markdown_table(
            [*MEAN_HEADER, *(f"published: {name}" for name in PUBLISHED_HEADER)],
            mean_table(result, beside=True),
        ),
        "",
        "## Decisions",
        "",
        "Runs walked back, of those that a strategy can judge (N/A: none, or not enough data for "
        "an interval to decide). A rule counts as walked back where "
        "more than half of its runs are; the frozen baseline does not count. *Accuracy only*: the "
        "95% interval reaches chance. *Accuracy + Γ*: that, or a mean Γ over all blocks that is "
        "not above 0.",
        "",
    ]
    for model in dict.fromkeys(run.model for run in result.runs):
        lines += [f"### {model}", "", *markdown_table(*decision_lines(result, model)), ""]
    lines += [
        "## First firings",
        "",
        f"First audited step at which a diagnostic fired; an epoch is {result.steps_per_epoch} "
        f"steps. (d) compares with the frozen run at the same step.",
        "",
        *markdown_table(FIRST_HEADER, first_table(result)),
        "",
    ]
    variants = dict.fromkeys(run.variant for run in result.runs)
    lines += [
        f"Published first epochs of DFA on {variant}, (a)/(b) of seeds 42, 123, 456: "
        f"{PUBLISHED_FIRST[variant]}; BP never."
        for variant in variants
        if variant in PUBLISHED_FIRST
    ]
    lines += [
        "",
        "## Thresholds",
        "",
        "The figures nearest to the published limits, at the last checkpoints: a limit anywhere "
        "between them decides alike.",
        "",
        *markdown_table(GAP_HEADER, gap_table(result)),
    ]
    lines += ["", "## Runs", "", *markdown_table(RUN_HEADER, run_table(result)), ""]
    lines += [f"![{name}]({name})" for name in images]
    return "\n".join(lines).rstrip() + "\n"


def _training_lines(result: StudyResult) -> list[str]:
    lines = []
    for model in result.suite.models:
        steps = max(
            (s.step for run in result.runs if run.model == model.label for s in run.steps),
            default=None,
        )
        options = ", ".join(f"{name}={value}" for name, value in model.options.items())
        lines.append(
            f"- {model.label}: {model.model}{f' ({options})' if options else ''}, "
            f"{'no run ended' if steps is None else f'{steps} steps'}"
        )
    return lines


def write_tables(result: StudyResult, folder: Path, *, command: str = "") -> list[Path]:
    """Write ``report.md``, ``runs.csv`` and ``steps.csv``, and curves where matplotlib is there.

    Returns the files written. Raises OSError for a folder that cannot be written.
    """

    images = write_curves(result, folder)
    written = [*images]
    for name, rows in (("runs.csv", run_rows(result)), ("steps.csv", step_rows(result))):
        write_whole(folder / name, _csv(rows), sync=True)
        written.append(folder / name)
    report = markdown(result, command=command, images=[path.name for path in images])
    write_whole(folder / "report.md", report, sync=True)
    return [*written, folder / "report.md"]


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
