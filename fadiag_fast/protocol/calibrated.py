"""The calibrated protocol: the four diagnostics, freed of what is not the network's.

The published diagnostics move with the batch size, the loss's scale, the number of features and how
well the task is solved. Here each reads a figure that does not:

- (a) growth of the root mean square (of the norms themselves where shapes are alike): the largest
  step from one state to the next, against the published 50, and the largest growth over several
  blocks, against the inverse of the credit gain's floor (``DiagnosticThresholds.total_growth``).
- (b) the credit gain at the deepest state against the floor that 1e-7 is at batches of 128 and unit
  output error, 1.28e-5. Samples without a measurable output error are left out.
- (c) with a 95% interval over batches and its null. Healthy networks have a common direction early
  in training, so it only says which mode of failure (a) or (b) found, drift or noise.
- (d) with a 95% interval from the number of test images: it fires if all of it is below the
  threshold.

Medians are over the samples of all batches, not of the first one only: how the same samples are cut
into batches then makes no difference. Figures without them (rows of older scans) are judged by
those of the first batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from . import paper
from .figures import NORM_FLOOR, OUTPUT, Diagnostic, Figures, Status, middle_layer
from .intervals import accuracy_difference, student_975
from .rules import DiagnosticProtocol, DiagnosticRule, Reading, Statistic
from .thresholds import DiagnosticThresholds

# A LayerNorm with its usual eps, 1e-5, does not tell states of a smaller RMS apart. Growth is
# counted from there on: a class token that starts at 1e-6 may grow to the size of other tokens.
STATE_FLOOR = math.sqrt(1e-5)


# ---- (a)


def state_scales(figures: Figures) -> list[float]:
    """Return what (a) compares, per state: the median norm / √features, or the norm where the
    number of features is not recorded."""
    norms = list(figures.pooled_norms or figures.residual_norms)
    if len(figures.sizes) != len(norms):
        return norms
    return [norm / math.sqrt(max(size, 1)) for norm, size in zip(norms, figures.sizes, strict=True)]


def largest_growth(scales: Sequence[float], floor: float) -> tuple[float, int, int]:
    """Return the largest ``scales[m] / scales[l]`` over l < m, with l and m.

    Args:
        scales: per state; NaN is passed over.
        floor: a smaller denominator counts as this.
    """
    found = (1.0, 0, 0)
    lowest: int | None = None
    for l, scale in enumerate(scales):
        if math.isnan(scale):
            continue
        if lowest is not None:
            growth = scale / max(scales[lowest], floor)
            if growth > found[0] or found[2] == 0:
                found = (growth, lowest, l)
        if lowest is None or scale < scales[lowest]:
            lowest = l
    return found


class ScaleGrowth(DiagnosticRule):
    """(a): does the residual stream grow beyond measure, at a block or over all?"""

    key, name = "a", "scale growth"
    threshold, comparison = "scale_growth", ">"
    logarithmic = True

    def statistics(self, figures: Figures) -> list[Statistic]:
        """Return the growth of the scale into each state, where it is defined."""
        scales = state_scales(figures)
        return _growths(scales, _scale_floor(figures, scales))

    def read(
        self, figures: Figures, thresholds: DiagnosticThresholds, earlier: Sequence[Diagnostic] = ()
    ) -> Reading:
        scales, names = state_scales(figures), figures.layers
        if not scales:
            return self.not_enough_data(thresholds, "no batch with a sample")
        floor = _scale_floor(figures, scales)
        value, layer = max(_growths(scales, floor), default=(1.0, 0))
        at = layer or 0
        bad = next((l for l, scale in enumerate(scales) if not math.isfinite(scale)), None)
        if bad is None and figures.num_non_finite and figures.num_samples:
            bad = 0 if 2 * figures.num_non_finite > figures.num_samples else None
        dead = next((l for l, scale in enumerate(scales) if l and scale == 0.0), None)
        total, first, last = largest_growth(scales, floor)
        exploded = total > thresholds.total_growth

        def fired(label: str, value: float, layer: int, evidence: str) -> Diagnostic:
            return self.diagnostic(thresholds, Status.FIRED, label, value, layer, evidence)

        def describe(fires: bool) -> Diagnostic:
            if bad is not None:
                where = (
                    f"the hidden states at {names[bad]} are not finite in most {figures.row_name}"
                )
                if math.isfinite(scales[bad]):
                    where = (
                        f"{figures.num_non_finite} of {figures.num_samples} "
                        f"{figures.row_name} have a state or a gradient that is not finite"
                    )
                return fired("NON-FINITE", scales[bad], bad, where)
            if dead is not None:
                where = (
                    f"the hidden states at {names[dead]} are exactly zero in most "
                    f"{figures.row_name}"
                )
                return fired("DEAD", value, dead, where)
            what = "RMS" if len(figures.sizes) == len(scales) else "median norm"
            if fires and self.is_beyond(value, thresholds):
                change = f"from {scales[at - 1]:.3g} to {scales[at]:.3g}"
                return fired("EXPLODED", value, at, f"{names[at]} takes the {what} {change}")
            text = (
                f"over {last - first} blocks, {names[first]} to {names[last]}, it grows by "
                f"{total:.3g}, against a limit of {thresholds.total_growth:.3g}"
            )
            step = f"the largest step of the {what} is {value:.3g}, at {names[at]}"
            if exploded:
                return fired("EXPLODED", value, last, f"{text}; {step}")
            evidence = (
                "fewer than two hidden states: 1.0 by definition"
                if len(scales) < 2
                else f"{step}; {text}"
            )
            return self.diagnostic(thresholds, Status.PASSED, "OK", value, at, evidence)

        broken = bad is not None or dead is not None or exploded
        return Reading(self.always if broken else value, describe)


def _growths(scales: Sequence[float], floor: float) -> list[Statistic]:
    growths = (later / max(earlier, floor) for earlier, later in pairwise(scales))
    # A NaN is unequal to itself.
    return [(growth, l) for l, growth in enumerate(growths, 1) if growth == growth]


def _scale_floor(figures: Figures, scales: Sequence[float]) -> float:
    """Return the smallest scale that growth is counted from."""
    return STATE_FLOOR if len(figures.sizes) == len(scales) else NORM_FLOOR


# ---- (b)


class CreditGain(DiagnosticRule):
    """(b): does the output error arrive at the deepest hidden state, and at the others?"""

    key, name = "b", "credit gain"
    threshold, comparison = "credit_gain_floor", "<"
    logarithmic = True

    def statistics(self, figures: Figures) -> list[Statistic]:
        """Return the median ‖g_L‖ / ‖∂loss/∂logits‖ at the deepest state; NaN without an error."""
        gains = figures.pooled_gains or figures.credit_gains
        return [(gains[-1], len(gains) - 1)] if len(gains) else []

    def read(
        self, figures: Figures, thresholds: DiagnosticThresholds, earlier: Sequence[Diagnostic] = ()
    ) -> Reading:
        gains, names = list(figures.pooled_gains or figures.credit_gains), figures.layers
        if not gains:
            return self.not_enough_data(thresholds, "no batch with a sample")
        layer = len(gains) - 1
        value = gains[layer]
        if not _is_finite(figures, layer) or math.isinf(value):
            evidence = f"the gradients at {names[layer]} are not finite in most {figures.row_name}"
            return Reading(
                self.always,
                lambda _: self.diagnostic(
                    thresholds, Status.FIRED, "NON-FINITE", value, layer, evidence
                ),
            )
        unmeasured = _without_output_error(figures, gains)
        if unmeasured is not None:
            return self.not_enough_data(thresholds, unmeasured)
        # An exact zero needs no threshold: a later layer blocks the gradient.
        dead = next((l for l in reversed(range(layer)) if gains[l] == 0.0), None)

        def describe(fires: bool) -> Diagnostic:
            if dead is not None and not self.is_beyond(value, thresholds):
                return self.diagnostic(
                    thresholds,
                    Status.FIRED,
                    "DEAD",
                    value,
                    dead,
                    f"the gradient arrives at {names[layer]}, and is exactly zero at {names[dead]} "
                    f"in most {figures.row_name}",
                )
            where = f"median ‖g_L‖ / ‖∂loss/∂logits‖ at {names[layer]}"
            count, measurable = figures.num_samples, figures.num_measurable
            if count is None or measurable is None:
                where += f" over {figures.rows}"
            else:
                where += f" over {measurable} of {count} {figures.row_name}"
                if measurable < count:
                    where += "; the others have no measurable output error"
            status, label = (Status.FIRED, "AT FLOOR") if fires else (Status.PASSED, "OK")
            return self.diagnostic(thresholds, status, label, value, layer, where)

        return Reading(value if dead is None else self.always, describe)


def _is_finite(figures: Figures, layer: int) -> bool:
    """Return whether gradients and output error are finite in most samples."""
    count, broken = figures.num_samples, figures.num_non_finite
    if count is not None and broken is not None and 2 * broken > count:
        return False
    return math.isfinite(figures.bp_grad_norms[layer]) and math.isfinite(figures.output_grad_norm)


def _without_output_error(figures: Figures, gains: Sequence[float]) -> str | None:
    """Return why the gains are relative to no output error; None where they are."""
    if math.isnan(gains[-1]):
        what = "zero" if figures.output_grad_norm == 0 else "below its dtype's normal numbers"
        return f"the output error is {what} in every sample"
    if figures.equal_logits and not any(gains):
        return "all logits are equal in every sample, as a head of zeros makes them"
    if figures.gain_reference != OUTPUT and not any(gain == 0.0 for gain in gains):
        return (
            f"the network has no output with a row for each sample: gains are relative to the "
            f"gradient at {figures.gain_reference} itself"
        )
    return None


# ---- (c)


class DirectionMode(DiagnosticRule):
    """(c): which mode of failure is it, drift or noise?

    Args:
        broken_by: the diagnostics whose failure has a mode. Where none of them fires, this one has
            nothing to name, and passes.
    """

    key, name = "c", "direction stability"
    threshold, comparison = "direction_stability", ">"
    decisive = False
    requirement = paper.DIRECTION_STABILITY.requirement

    def __init__(self, broken_by: Sequence[DiagnosticRule]) -> None:
        self.broken_by = tuple(broken_by)

    def statistics(self, figures: Figures) -> list[Statistic]:
        """Return the mean cosine at the middle state, NaN where no pair has a direction."""
        return paper.DIRECTION_STABILITY.statistics(figures)

    def read(
        self, figures: Figures, thresholds: DiagnosticThresholds, earlier: Sequence[Diagnostic] = ()
    ) -> Reading:
        if len(figures.stabilities) == 0:
            return self._not_evaluated(thresholds, None, None, "no batch with a sample")
        layer = middle_layer(len(figures.stabilities))
        found, value = figures.num_directions[layer], figures.stabilities[layer]
        where = f"mean cosine over all pairs of {found} batches at {figures.layers[layer]}"
        if math.isnan(value) or not self.has_data(figures, thresholds):
            return self._not_evaluated(
                thresholds,
                None if math.isnan(value) else value,
                layer,
                f"{where}; at least {thresholds.min_batches} batches are needed to name a mode",
            )
        low = high = value
        null = -1.0
        if figures.stability_errors:
            half = student_975(found - 1) * figures.stability_errors[layer]
            low, high = max(value - half, -1.0), min(value + half, 1.0)
            null = figures.stability_nulls[layer]
            where += (
                f", 95% interval {low:.2f} to {high:.2f}; directions of random sign stay below "
                f"{null:.2f} in 95% of cases"
            )
        broken = self._is_broken(figures, thresholds, earlier)

        def describe(fires: bool) -> Diagnostic:
            status, label, evidence = Status.PASSED, "undecided", where
            if not broken:
                label, evidence = "OK", f"{where}; of no mode: (a), (b) pass"
            elif fires:
                status, label = Status.FIRED, "DRIFT"
            elif high <= self.threshold_in(thresholds):
                label = "NOISE"
            else:
                evidence = f"{where}; the interval holds the limit"
            return self.diagnostic(thresholds, status, label, value, layer, evidence)

        fires_at_all = broken and value > null and not math.isnan(low)
        return Reading(low if fires_at_all else self.never, describe)

    def _is_broken(
        self, figures: Figures, thresholds: DiagnosticThresholds, earlier: Sequence[Diagnostic]
    ) -> bool:
        known = {diagnostic.key: diagnostic for diagnostic in earlier}
        return any(
            (known.get(rule.key) or rule.evaluate(figures, thresholds)).fired
            for rule in self.broken_by
        )

    def _not_evaluated(
        self,
        thresholds: DiagnosticThresholds,
        value: float | None,
        layer: int | None,
        evidence: str,
    ) -> Reading:
        return Reading(
            None,
            lambda _: self.diagnostic(
                thresholds, Status.NOT_EVALUATED, "not evaluated", value, layer, evidence
            ),
        )


# ---- (d)


class DepthUtility(paper.DepthUtility):
    """(d): is the network surely no better than with frozen blocks?"""

    def read(
        self, figures: Figures, thresholds: DiagnosticThresholds, earlier: Sequence[Diagnostic] = ()
    ) -> Reading:
        headline, frozen = figures.headline_acc, figures.frozen_baseline_acc
        published = super().read(figures, thresholds)
        if headline is None or frozen is None:
            return published
        size = figures.test_size
        other = figures.frozen_test_size or size

        def outcome(status: Status, label: str, evidence: str) -> Diagnostic:
            given = published.describe(False)
            return self.diagnostic(
                thresholds, status, label, given.value, None, f"{given.evidence}; {evidence}"
            )

        if not size or not other:
            return Reading(
                None,
                lambda _: outcome(
                    Status.NOT_ENOUGH_DATA,
                    "undecided",
                    "no number of test images given, so it has no interval",
                ),
            )
        low, high = (100 * end for end in accuracy_difference(headline, size, frozen, other))

        def describe(fires: bool) -> Diagnostic:
            sizes = f"{size}" if other == size else f"{size} and {other}"
            evidence = f"95% interval {low:+.2f} to {high:+.2f} over {sizes} test images"
            if fires:
                return outcome(Status.FIRED, "UNDERCUT", evidence)
            if low >= self.threshold_in(thresholds):
                return outcome(Status.PASSED, "clears", evidence)
            return outcome(Status.NOT_ENOUGH_DATA, "undecided", f"{evidence}; it holds the limit")

        return Reading(high, describe)


_SCALE_GROWTH, _CREDIT_GAIN = ScaleGrowth(), CreditGain()

CALIBRATED = DiagnosticProtocol(
    "calibrated",
    (
        _SCALE_GROWTH,
        _CREDIT_GAIN,
        DirectionMode(broken_by=(_SCALE_GROWTH, _CREDIT_GAIN)),
        DepthUtility(),
    ),
)
