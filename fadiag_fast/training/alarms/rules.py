"""The rules: what one record meets, with the evidence before it is put into words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...protocol import growth_ratios, middle_layer
from ...protocol.paper import (
    CREDIT_GAIN_FLOOR,
    DIRECTION_STABILITY,
)
from ...protocol.paper import (
    GRADIENT_FLOOR as GRADIENT_FLOOR_RULE,
)
from ...protocol.paper import (
    SCALE_GROWTH as SCALE_GROWTH_RULE,
)
from ..records import StepRecord
from .events import (
    CREDIT_GAIN,
    GRAD_NORM,
    GRADIENT_FLOOR,
    GROWTH,
    HIDDEN_NORM,
    NON_FINITE,
    SCALE_GROWTH,
)
from .policy import AlarmPolicy


@dataclass
class Finding:
    """A rule that one record meets: the evidence before it is put into words."""

    rule: str
    figure: str
    layer: str
    value: float
    threshold: float
    median: float = math.nan
    mad: float = math.nan
    note: str = ""


def non_finite(record: StepRecord) -> list[Finding]:
    """Return where a norm is infinite or NaN: at most one place."""
    for figure, norms in ((HIDDEN_NORM, record.hidden_norms), (GRAD_NORM, record.grad_norms)):
        bad = [
            l
            for l, norm in enumerate(norms)
            if not math.isfinite(norm) and record.layers[l] not in record.unreached
        ]
        if bad:
            # Data flow down the depth in the forward pass, and up in the backward pass.
            at = bad[0] if figure == HIDDEN_NORM else bad[-1]
            note = ""
            following = at + 1
            if (
                figure == GRAD_NORM
                and following < len(norms)
                and following not in record.chain_starts
                and math.isfinite(norms[following])
            ):
                note = (
                    f" At {record.layers[following]} it is {norms[following]:.3g}: it breaks "
                    f"on the way back through that block."
                )
            name = record.layers[at]
            return [Finding(NON_FINITE, figure, name, norms[at], math.inf, note=note)]
    return []


def beyond_protocol(record: StepRecord, policy: AlarmPolicy, level: float) -> list[Finding]:
    """Return what passes ``level`` times the published thresholds."""
    thresholds, found = policy.thresholds, []
    reached = [name not in record.unreached for name in record.layers]
    ratios = growth_ratios(record.hidden_norms, record.chain_starts)
    grown = [
        (ratio, l + 1)
        for l, ratio in enumerate(ratios)
        if reached[l] and reached[l + 1] and SCALE_GROWTH_RULE.is_beyond(ratio, thresholds, level)
    ]
    if grown:
        ratio, at = max(grown)
        threshold = SCALE_GROWTH_RULE.threshold_in(thresholds)
        found.append(Finding(SCALE_GROWTH, GROWTH, record.layers[at], ratio, threshold))
    by_gain = policy.floor == "credit_gain"
    floor = CREDIT_GAIN_FLOOR if by_gain else GRADIENT_FLOOR_RULE
    value = (record.credit_gains if by_gain else record.grad_norms)[-1]
    if reached[-1] and floor.is_beyond(value, thresholds, level):
        found.append(
            Finding(
                GRADIENT_FLOOR,
                CREDIT_GAIN if by_gain else GRAD_NORM,
                record.layers[-1],
                value,
                floor.threshold_in(thresholds),
                note=_mode(record, policy),
            )
        )
    return found


def _mode(record: StepRecord, policy: AlarmPolicy) -> str:
    stability = record.stabilities[middle_layer(len(record.layers))]
    if math.isnan(stability):
        return ""
    if DIRECTION_STABILITY.is_beyond(stability, policy.thresholds):
        return f" Its direction stays the same from step to step ({stability:.2f}): drift."
    return f" Its direction differs from step to step ({stability:.2f}): noise."


def forward_cause(
    record: StepRecord, gradient: Finding, others: Sequence[Finding], judged: bool
) -> Finding | None:
    """Return where the forward pass broke in a record whose gradients are not finite.

    Args:
        record: at hand.
        gradient: the gradient that is not finite.
        others: what the other rules find in the record.
        judged: whether the warm-up is over.
    """
    causes = [finding for finding in others if finding.figure in (HIDDEN_NORM, GROWTH)]
    grown = [finding for finding in causes if finding.rule == SCALE_GROWTH]
    if not judged:
        # A young network may grow: only the block at which the gradient is lost is suspect.
        after = record.layers.index(gradient.layer) + 1
        grown = [f for f in grown if f.layer in record.layers[after - 1 : after + 1]]
        causes = []
    if not (grown or causes):
        return None
    cause = grown[0] if grown else first_cause(causes)
    note = f" The median ‖g‖ at {gradient.layer} is {gradient.value:.3g}."
    return replace(cause, rule=NON_FINITE, note=note)


def first_cause(findings: list[Finding]) -> Finding:
    """Return the finding to name: the shallowest state that a break of the forward pass shows at.

    What breaks at a layer passes on to all that follow, so the shallowest comes first; it must have
    moved half as far as the farthest, lest the noise of another be named. Gradients break from the
    head down: without a hidden state among the findings the deepest gain is named.
    """

    def moved(finding: Finding) -> float:
        if not (finding.value > 0 and finding.median > 0):
            return math.inf
        return abs(math.log(finding.value) - math.log(finding.median))

    forward = [finding for finding in findings if finding.figure in (HIDDEN_NORM, GROWTH)]
    if not forward:
        return findings[-1]
    farthest = max(moved(finding) for finding in forward)
    large = [finding for finding in forward if moved(finding) >= farthest / 2]
    hidden = [finding for finding in large if finding.figure == HIDDEN_NORM]
    return (hidden or large)[0]
