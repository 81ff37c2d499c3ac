"""The published protocol: four diagnostics on the first batch, (c) on all batches.

Source: the diagnostic protocol of "Beyond Accuracy and Alignment" (arXiv 2606.21126).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter

from .figures import (
    NOT_ENOUGH_DATA,
    Diagnostic,
    Figures,
    Status,
    growth_ratios,
    middle_layer,
)
from .rules import Criterion, DiagnosticProtocol, DiagnosticRule, Reading, Statistic
from .thresholds import DiagnosticThresholds

_NO_SAMPLE = "no batch with a sample"


class ScaleGrowth(DiagnosticRule):
    """(a): does any block multiply the norm of the residual stream beyond measure?"""

    key, name = "a", "scale growth"
    threshold, comparison = "scale_growth", ">"
    logarithmic = True

    def statistics(self, figures: Figures) -> list[Statistic]:
        """Return the growth into each state, where it is defined."""
        ratios = growth_ratios(figures.residual_norms, figures.chain_starts)
        # A NaN is unequal to itself.
        return [(ratio, l) for l, ratio in enumerate(ratios, 1) if ratio == ratio]

    def read(
        self, figures: Figures, thresholds: DiagnosticThresholds, earlier: Sequence[Diagnostic] = ()
    ) -> Reading:
        norms = figures.residual_norms
        if len(norms) == 0:
            return self.not_enough_data(thresholds, _NO_SAMPLE)
        broken = next((l for l, norm in enumerate(norms) if math.isnan(norm)), None)
        if broken is None and math.isinf(norms[0]):
            broken = 0
        largest = max(self.statistics(figures), key=itemgetter(0), default=(1.0, 0))
        value, layer = largest[0], largest[1] or 0

        def describe(fires: bool) -> Diagnostic:
            if fires and self.is_beyond(value, thresholds):
                return self.diagnostic(
                    thresholds,
                    Status.FIRED,
                    "EXPLODED",
                    value,
                    layer,
                    f"{figures.layers[layer]} takes the median norm from {norms[layer - 1]:.3g} to "
                    f"{norms[layer]:.3g}",
                )
            if broken is not None:
                return self.diagnostic(
                    thresholds,
                    Status.FIRED,
                    "NON-FINITE",
                    norms[broken],
                    broken,
                    f"the hidden states at {figures.layers[broken]} are not finite in any sample",
                )
            evidence = (
                "fewer than two hidden states: 1.0 by definition"
                if len(norms) < 2
                else f"the largest step is at {figures.layers[layer]}: {norms[layer - 1]:.3g} to "
                f"{norms[layer]:.3g}"
            )
            return self.diagnostic(thresholds, Status.PASSED, "OK", value, layer, evidence)

        return Reading(value if broken is None else self.always, describe)


class BatchesWithDirection(Criterion):
    """Batches with a direction at the middle state: (c) lacks data below a number of them."""

    name = "batches"
    threshold, comparison = "min_batches", "<"

    def statistics(self, figures: Figures) -> list[Statistic]:
        """Return the number of batches."""
        if len(figures.stabilities) == 0:
            return []
        layer = middle_layer(len(figures.stabilities))
        return [(figures.num_directions[layer], layer)]


class DirectionStability(DiagnosticRule):
    """(c): do disjoint batches ask for the same mean direction?"""

    key, name = "c", "direction stability"
    threshold, comparison = "direction_stability", ">"
    requirement = BatchesWithDirection()

    def statistics(self, figures: Figures) -> list[Statistic]:
        """Return the mean cosine at the middle state, NaN where no pair has a direction."""
        if len(figures.stabilities) == 0:
            return []
        layer = middle_layer(len(figures.stabilities))
        return [(figures.stabilities[layer], layer)]

    def read(
        self, figures: Figures, thresholds: DiagnosticThresholds, earlier: Sequence[Diagnostic] = ()
    ) -> Reading:
        if len(figures.stabilities) == 0:
            return self.not_enough_data(thresholds, _NO_SAMPLE)
        layer = middle_layer(len(figures.stabilities))
        value = figures.stabilities[layer]

        def describe(fires: bool) -> Diagnostic:
            found = figures.num_directions[layer]
            where = f"mean cosine over all pairs of {found} batches at {figures.layers[layer]}"
            lost = figures.num_batches - found
            if lost:
                where += (
                    f"; {lost} more have no direction there (a zero or non-finite mean gradient)"
                )
            if not self.has_data(figures, thresholds):
                return self.diagnostic(
                    thresholds,
                    Status.NOT_ENOUGH_DATA,
                    NOT_ENOUGH_DATA,
                    None if math.isnan(value) else value,
                    layer,
                    f"{where}; at least {thresholds.min_batches} batches are needed",
                )
            status, label = (Status.FIRED, "DRIFT") if fires else (Status.PASSED, "OK")
            return self.diagnostic(thresholds, status, label, value, layer, where)

        return Reading(self.never if math.isnan(value) else value, describe)


class GradientFloor(DiagnosticRule):
    """(b): is the gradient at the deepest hidden state at the numerical floor?

    Args:
        mode: tells drift from noise where it is.
    """

    key, name = "b", "gradient floor"
    threshold, comparison = "gradient_floor", "<"
    logarithmic = True

    def __init__(self, mode: Criterion) -> None:
        self.mode = mode

    def statistics(self, figures: Figures) -> list[Statistic]:
        """Return the median ‖g_L‖ at the deepest state."""
        norms = figures.bp_grad_norms
        return [(norms[-1], len(norms) - 1)] if len(norms) else []

    def read(
        self, figures: Figures, thresholds: DiagnosticThresholds, earlier: Sequence[Diagnostic] = ()
    ) -> Reading:
        if len(figures.bp_grad_norms) == 0:
            return self.not_enough_data(thresholds, _NO_SAMPLE)
        layer = len(figures.bp_grad_norms) - 1
        value = figures.bp_grad_norms[layer]
        finite = math.isfinite(value)

        def describe(fires: bool) -> Diagnostic:
            name = figures.layers[layer]
            evidence = f"median ‖g_L‖ at {name} over {figures.rows}"
            status, label = Status.PASSED, "OK"
            if not finite:
                status, label = Status.FIRED, "NON-FINITE"
                evidence = f"the gradients at {name} are not finite in most {figures.row_name}"
            elif fires:
                status, label = Status.FIRED, "AT FLOOR"
                for cosine, _ in self.mode.statistics(figures):
                    if not math.isnan(cosine):
                        evidence += (
                            "; its direction is the same for every batch: drift"
                            if self.mode.is_beyond(cosine, thresholds)
                            else "; its direction differs from batch to batch: noise"
                        )
            return self.diagnostic(thresholds, status, label, value, layer, evidence)

        return Reading(value if finite else self.always, describe)


class CreditGainFloor(Criterion):
    """The credit gain at the deepest state: what (b) would be without batch size and output error.

    A report mentions it where it disagrees with (b).
    """

    name = "credit gain"
    threshold, comparison = "credit_gain_floor", "<"
    logarithmic = True

    def statistics(self, figures: Figures) -> list[Statistic]:
        """Return the median ‖g_L‖ / ‖∂loss/∂logits‖, nothing without an output error."""
        gains = figures.credit_gains
        if len(gains) == 0 or math.isnan(gains[-1]):
            return []
        return [(gains[-1], len(gains) - 1)]


class DepthUtility(DiagnosticRule):
    """(d): is the network better than the same one with frozen blocks?"""

    key, name = "d", "depth utility"
    threshold, comparison = "depth_utility", "<"

    def statistics(self, figures: Figures) -> list[Statistic]:
        """Return the difference of the accuracies, in percentage points."""
        headline, frozen = figures.headline_acc, figures.frozen_baseline_acc
        if headline is None or frozen is None:
            return []
        return [(percentage_points(headline, frozen), None)]

    def read(
        self, figures: Figures, thresholds: DiagnosticThresholds, earlier: Sequence[Diagnostic] = ()
    ) -> Reading:
        headline, frozen = figures.headline_acc, figures.frozen_baseline_acc
        if headline is None or frozen is None:
            return self._not_evaluated(figures, thresholds)
        value = percentage_points(headline, frozen)

        def describe(fires: bool) -> Diagnostic:
            return self.diagnostic(
                thresholds,
                Status.FIRED if fires else Status.PASSED,
                "UNDERCUT" if fires else "clears",
                value,
                None,
                f"headline {100 * headline:.2f}%, frozen blocks {100 * frozen:.2f}% "
                f"({value:+.2f} percentage points)",
            )

        return Reading(value, describe)

    def _not_evaluated(self, figures: Figures, thresholds: DiagnosticThresholds) -> Reading:
        absent = " and ".join(
            name
            for name, value in (
                ("headline", figures.headline_acc),
                ("frozen-blocks", figures.frozen_baseline_acc),
            )
            if value is None
        )
        return Reading(
            None,
            lambda _: self.diagnostic(
                thresholds,
                Status.NOT_EVALUATED,
                "not evaluated",
                None,
                None,
                f"no {absent} accuracy given",
            ),
        )


def percentage_points(headline: float, frozen: float) -> float:
    """Return by how many percentage points the first accuracy is above the second.

    Rounded to what an accuracy over 1e7 samples can resolve: .35 - .33 is 2 points, not less.
    """
    return round(100.0 * (headline - frozen), 5)


SCALE_GROWTH = ScaleGrowth()
DIRECTION_STABILITY = DirectionStability()
GRADIENT_FLOOR = GradientFloor(DIRECTION_STABILITY)
CREDIT_GAIN_FLOOR = CreditGainFloor()
DEPTH_UTILITY = DepthUtility()

PAPER = DiagnosticProtocol(
    "paper",
    (SCALE_GROWTH, GRADIENT_FLOOR, DIRECTION_STABILITY, DEPTH_UTILITY),
    remarks=(CREDIT_GAIN_FLOOR,),
)


def evaluate(
    figures: Figures, thresholds: DiagnosticThresholds | None = None
) -> tuple[Diagnostic, ...]:
    """Evaluate all four diagnostics, (a) to (d)."""
    return PAPER.evaluate(figures, thresholds)


def depth_utility(
    figures: Figures, thresholds: DiagnosticThresholds, frozen_baseline_acc: float | None = None
) -> Diagnostic:
    """Evaluate (d); ``frozen_baseline_acc`` stands in where the figures have none."""
    if figures.frozen_baseline_acc is None:
        figures = replace(figures, frozen_baseline_acc=frozen_baseline_acc)
    return DEPTH_UTILITY.evaluate(figures, thresholds)
