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
- (d) with a 95% interval from the number of test images: it fires if all of it is below the limit.

Medians are over the samples of all batches, not of the first one only: how the same samples are cut
into batches then makes no difference. Figures without them (rows of older scans) are judged by
those of the first batch.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from .protocol import (
    NOT_ENOUGH_DATA,
    OUTPUT,
    Diagnostic,
    DiagnosticThresholds,
    Figures,
    Protocol,
    Status,
    evaluate,
    middle_layer,
)
from .protocol import depth_utility as published_depth_utility

# A LayerNorm with its usual eps, 1e-5, does not tell states of a smaller RMS apart. Growth is
# counted from there on: a class token that starts at 1e-6 may grow to the size of other tokens.
STATE_FLOOR = math.sqrt(1e-5)
# Below this a median ‖softmax − onehot‖ (at most √2) counts as a solved task.
SOLVED_ERROR = 0.1
# Behind a terminal norm gain · RMS is the norm of the head's map, which is of order one.
_ORDER_ONE = (1e-3, 1e3)
# 97.5% of a normal distribution lie below.
_NORMAL_975 = 1.959963984540054
# Smallest subnormal number per dtype: below it there is only zero.
_SMALLEST = {
    "float16": 2.0**-24,
    "bfloat16": 2.0**-133,
    "float32": 2.0**-149,
    "float64": 2.0**-1074,
}


def judge_figures(
    figures: Figures,
    thresholds: DiagnosticThresholds | None = None,
    protocol: Protocol = "paper",
) -> tuple[Diagnostic, ...]:
    """Evaluate (a) to (d) by one of the protocols."""
    limits = thresholds or DiagnosticThresholds()
    if protocol == "paper":
        return evaluate(figures, limits)
    growth, floor = scale_growth(figures, limits), credit_gain(figures, limits)
    stability = direction_mode(figures, limits, growth.fired or floor.fired)
    return growth, floor, stability, depth_utility(figures, limits)


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


def scale_growth(figures: Figures, thresholds: DiagnosticThresholds) -> Diagnostic:
    """Evaluate (a): does the residual stream grow beyond measure, at a block or over all?"""
    scales = state_scales(figures)
    names = figures.layers

    def outcome(
        status: Status, label: str, value: float | None, layer: int | None, evidence: str
    ) -> Diagnostic:
        return Diagnostic(
            "a", "scale growth", value, thresholds.scale_growth, ">", status, label, layer, evidence
        )

    if not scales:
        return outcome(
            Status.NOT_ENOUGH_DATA, NOT_ENOUGH_DATA, None, None, "no batch with a sample"
        )
    recorded = len(figures.sizes) == len(scales)
    what = "RMS" if recorded else "median norm"
    floor = STATE_FLOOR if recorded else 1e-30
    steps = [
        (later / max(earlier, floor), l + 1)
        for l, (earlier, later) in enumerate(pairwise(scales))
        if not math.isnan(later / max(earlier, floor))
    ]
    value, layer = max(steps, default=(1.0, 0))
    bad = next((l for l, scale in enumerate(scales) if not math.isfinite(scale)), None)
    if bad is None and figures.num_non_finite and figures.num_samples:
        bad = 0 if 2 * figures.num_non_finite > figures.num_samples else None
    if bad is not None:
        where = f"the hidden states at {names[bad]} are not finite in most {figures.row_name}"
        if math.isfinite(scales[bad]):
            where = (
                f"{figures.num_non_finite} of {figures.num_samples} {figures.row_name} have a "
                f"state or a gradient that is not finite"
            )
        return outcome(Status.FIRED, "NON-FINITE", scales[bad], bad, where)
    dead = next((l for l, scale in enumerate(scales) if l and scale == 0.0), None)
    if dead is not None:
        return outcome(
            Status.FIRED,
            "DEAD",
            value,
            dead,
            f"the hidden states at {names[dead]} are exactly zero in most {figures.row_name}",
        )
    if value > thresholds.scale_growth:
        return outcome(
            Status.FIRED,
            "EXPLODED",
            value,
            layer,
            f"{names[layer]} takes the {what} from {scales[layer - 1]:.3g} to {scales[layer]:.3g}",
        )
    total, first, last = largest_growth(scales, floor)
    text = (
        f"over {last - first} blocks, {names[first]} to {names[last]}, it grows by {total:.3g}, "
        f"against a limit of {thresholds.total_growth:.3g}"
    )
    step = f"the largest step of the {what} is {value:.3g}, at {names[layer]}"
    if total > thresholds.total_growth:
        return outcome(Status.FIRED, "EXPLODED", value, last, f"{text}; {step}")
    if len(scales) < 2:
        return outcome(
            Status.PASSED, "OK", 1.0, 0, "fewer than two hidden states: 1.0 by definition"
        )
    return outcome(Status.PASSED, "OK", value, layer, f"{step}; {text}")


# ---- (b)


def credit_gain(figures: Figures, thresholds: DiagnosticThresholds) -> Diagnostic:
    """Evaluate (b): does the output error arrive at the deepest hidden state, and at the others?"""
    floor = thresholds.credit_gain_floor
    gains = list(figures.pooled_gains or figures.credit_gains)
    names = figures.layers

    def outcome(
        status: Status, label: str, value: float | None, layer: int | None, evidence: str
    ) -> Diagnostic:
        return Diagnostic("b", "credit gain", value, floor, "<", status, label, layer, evidence)

    def short(why: str) -> Diagnostic:
        return outcome(Status.NOT_ENOUGH_DATA, NOT_ENOUGH_DATA, None, None, why)

    if not gains:
        return short("no batch with a sample")
    layer = len(gains) - 1
    value = gains[layer]
    count, measurable = figures.num_samples, figures.num_measurable
    finite = math.isfinite(figures.bp_grad_norms[layer]) and math.isfinite(figures.output_grad_norm)
    if count is not None and figures.num_non_finite is not None:
        finite = finite and 2 * figures.num_non_finite <= count
    if not finite or math.isinf(value):
        return outcome(
            Status.FIRED,
            "NON-FINITE",
            value,
            layer,
            f"the gradients at {names[layer]} are not finite in most {figures.row_name}",
        )
    if math.isnan(value):
        what = "zero" if figures.output_grad_norm == 0 else "below its dtype's normal numbers"
        return short(f"the output error is {what} in every sample")
    if figures.equal_logits and not any(gains):
        return short("all logits are equal in every sample, as a head of zeros makes them")
    if figures.gain_reference != OUTPUT and not any(gain == 0.0 for gain in gains):
        return short(
            f"the network has no output with a row for each sample: gains are relative to the "
            f"gradient at {figures.gain_reference} itself"
        )
    where = f"median ‖g_L‖ / ‖∂loss/∂logits‖ at {names[layer]}"
    if count is None or measurable is None:
        where += f" over {figures.rows}"
    else:
        where += f" over {measurable} of {count} {figures.row_name}"
        if measurable < count:
            where += "; the others have no measurable output error"
    if value < floor:
        return outcome(Status.FIRED, "AT FLOOR", value, layer, where)
    # An exact zero is no matter of a limit: a layer after it passes nothing on.
    dead = next((l for l in reversed(range(layer)) if gains[l] == 0.0), None)
    if dead is not None:
        return outcome(
            Status.FIRED,
            "DEAD",
            value,
            dead,
            f"the gradient arrives at {names[layer]}, and is exactly zero at {names[dead]} in most "
            f"{figures.row_name}",
        )
    return outcome(Status.PASSED, "OK", value, layer, where)


# ---- (c)


def student_975(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t.

    By its expansion around the normal quantile (Abramowitz and Stegun, 26.7.5), four terms: from
    five degrees of freedom on right to 0.1%.
    """
    z, n = _NORMAL_975, float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n ** (power + 1) for power, term in enumerate(terms))


def direction_mode(
    figures: Figures, thresholds: DiagnosticThresholds, broken: bool = True
) -> Diagnostic:
    """Evaluate (c): which mode of failure is it, drift or noise?

    Args:
        figures: as recorded.
        thresholds: the limits.
        broken: whether (a) or (b) fired; else (c) has nothing to name, and passes.
    """
    limit = thresholds.direction_stability

    def outcome(
        status: Status, label: str, value: float | None, layer: int | None, evidence: str
    ) -> Diagnostic:
        return Diagnostic(
            "c", "direction stability", value, limit, ">", status, label, layer, evidence
        )

    if len(figures.stabilities) == 0:
        return outcome(Status.NOT_EVALUATED, "not evaluated", None, None, "no batch with a sample")
    layer = middle_layer(len(figures.stabilities))
    found, value = figures.num_directions[layer], figures.stabilities[layer]
    where = f"mean cosine over all pairs of {found} batches at {figures.layers[layer]}"
    if found < thresholds.min_batches or math.isnan(value):
        return outcome(
            Status.NOT_EVALUATED,
            "not evaluated",
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
    if not broken:
        return outcome(Status.PASSED, "OK", value, layer, f"{where}; of no mode: (a), (b) pass")
    if low > limit and value > null:
        return outcome(Status.FIRED, "DRIFT", value, layer, where)
    if high <= limit:
        return outcome(Status.PASSED, "NOISE", value, layer, where)
    return outcome(
        Status.PASSED, "undecided", value, layer, f"{where}; the interval holds the limit"
    )


# ---- (d)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95% score interval of a proportion. Source: Wilson (1927)."""
    z2 = _NORMAL_975**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    spread = share * (1 - share) / count + z2 / (4 * count * count)
    half = _NORMAL_975 / (1 + z2 / count) * math.sqrt(spread)
    # At 0 and 1 an end is the share itself, which rounding must not pass.
    return min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)


def accuracy_difference(
    first: float, first_size: int, second: float, second_size: int
) -> tuple[float, float]:
    """Return the 95% interval of the difference of two accuracies, in fractions.

    The two count as independent. Networks tested on the same images mostly fail on the same ones,
    and the interval is then wider than need be: it errs towards not firing.

    Source: Newcombe (1998), method 10, the hybrid of two score intervals.
    """
    low1, high1 = wilson(first, first_size)
    low2, high2 = wilson(second, second_size)
    difference = first - second
    return (
        difference - math.hypot(first - low1, high2 - second),
        difference + math.hypot(high1 - first, second - low2),
    )


def depth_utility(figures: Figures, thresholds: DiagnosticThresholds) -> Diagnostic:
    """Evaluate (d): is the network surely no better than with frozen blocks?"""
    published = published_depth_utility(figures, thresholds)
    headline, frozen = figures.headline_acc, figures.frozen_baseline_acc
    if headline is None or frozen is None:
        return published
    limit = thresholds.depth_utility

    def outcome(status: Status, label: str, evidence: str) -> Diagnostic:
        return Diagnostic(
            "d", "depth utility", published.value, limit, "<", status, label, None, evidence
        )

    size = figures.test_size
    if not size:
        return outcome(
            Status.NOT_ENOUGH_DATA,
            "undecided",
            f"{published.evidence}; no number of test images given, so it has no interval",
        )
    other = figures.frozen_test_size or size
    low, high = (100 * end for end in accuracy_difference(headline, size, frozen, other))
    sizes = f"{size}" if other == size else f"{size} and {other}"
    evidence = (
        f"{published.evidence}; 95% interval {low:+.2f} to {high:+.2f} over {sizes} test images"
    )
    if high < limit:
        return outcome(Status.FIRED, "UNDERCUT", evidence)
    if low >= limit:
        return outcome(Status.PASSED, "clears", evidence)
    return outcome(Status.NOT_ENOUGH_DATA, "undecided", f"{evidence}; it holds the limit")


# ---- causes


def find_causes(
    figures: Figures, diagnostics: Sequence[Diagnostic], thresholds: DiagnosticThresholds
) -> tuple[str, ...]:
    """Say in sentences what made the figures what they are.

    Args:
        figures: as recorded.
        diagnostics: of the calibrated protocol.
        thresholds: the limits.

    Returns:
        In this order, those that apply: non-finite, underflow, dead layer, residual growth, zero
        head, solved task, drift or noise. Empty where nothing calls for one.
    """
    if not figures.layers:
        return ()
    growth, floor, stability = diagnostics[:3]
    labels = (growth.label, floor.label)
    if "NON-FINITE" in labels:
        first = growth if growth.label == "NON-FINITE" else floor
        return (f"Non-finite: {first.evidence}.",)
    causes: list[str] = []
    underflow = _underflow(figures, floor, thresholds)
    if underflow:
        causes.append(underflow)
    if "DEAD" in labels and not underflow:
        dead = growth if growth.label == "DEAD" else floor
        causes.append(f"Dead layer: {dead.evidence}.")
    if not underflow and "DEAD" not in labels:
        causes += _growth_cause(figures, growth, floor)
    if floor.status is Status.NOT_ENOUGH_DATA and "all logits are equal" in floor.evidence:
        causes.append(
            "Zero head: the logits do not depend on the hidden states, so that no gradient can "
            "reach them; train at least one step."
        )
    causes += _solved(figures, floor, thresholds)
    if stability.label == "DRIFT":
        causes.append(
            f"Drift: the mean gradients of disjoint batches point the same way "
            f"({stability.value:.2f}); what is left of the gradient hardly depends on the samples."
        )
    elif stability.label == "NOISE":
        causes.append(
            f"Noise: the mean gradients of disjoint batches do not point the same way "
            f"({stability.value:.2f}); what is left of the gradient differs from batch to batch."
        )
    return tuple(causes)


def _underflow(figures: Figures, floor: Diagnostic, thresholds: DiagnosticThresholds) -> str | None:
    dtype = figures.grad_dtype
    smallest = _SMALLEST.get(dtype or "")
    if smallest is None:
        return None
    advice = f"Underflow of {dtype}: {{}}; scale the loss up, or use bfloat16 or float32."
    if floor.status is Status.NOT_ENOUGH_DATA:
        if figures.num_measurable == 0 and (figures.output_error or 0.0) >= SOLVED_ERROR:
            return advice.format(
                f"the output error, {figures.output_error:.2g} by the logits, has left the range "
                f"of the loss's gradients"
            )
        return None
    if not floor.fired:
        return None
    # Elements of a gradient whose gain is at the floor: can the dtype hold them?
    features = figures.sizes[-1] if figures.sizes else 1
    held = thresholds.credit_gain_floor * figures.output_grad_norm / math.sqrt(features)
    if held >= smallest or (floor.value != 0.0 and floor.label != "DEAD"):
        return None
    at = figures.layers[-1 if floor.layer is None else floor.layer]
    return advice.format(
        f"the gradient at {at} is exactly zero in most samples, and one at the floor would be "
        f"{held:.1g} per feature, below the smallest number, {smallest:.1g}"
    )


def _growth_cause(figures: Figures, growth: Diagnostic, floor: Diagnostic) -> list[str]:
    scales = state_scales(figures)
    gain = floor.value
    if len(figures.sizes) != len(scales):
        if growth.fired:
            return [f"Residual growth: {growth.evidence}."]
        return []
    if not growth.fired and floor.label != "AT FLOOR":
        return []
    scale = scales[-1]
    through_norm = (
        gain is not None and scale > 1.0 and _ORDER_ONE[0] <= gain * scale <= _ORDER_ONE[1]
    )
    if through_norm:
        assert gain is not None
        return [
            f"Residual growth under a terminal norm: the stream reaches an RMS of {scale:.3g}, and "
            f"the gain at the deepest state, {gain:.3g}, is its inverse but for a factor of "
            f"{gain * scale:.2g}: the norm divides the gradient by the scale."
        ]
    if growth.fired:
        shown = "-" if gain is None else f"{gain:.3g}"
        return [
            f"Residual growth: {growth.evidence}; the gain at the deepest state, {shown}, is not "
            f"its inverse, so that no terminal norm hides it."
        ]
    return [
        f"Gradient lost behind the last block: the gain at the deepest state is {floor.value:.3g} "
        f"at an RMS of {scale:.3g}, so that the scale does not account for it."
    ]


def _solved(figures: Figures, floor: Diagnostic, thresholds: DiagnosticThresholds) -> list[str]:
    error = figures.output_error
    every = floor.status is Status.NOT_ENOUGH_DATA and "output error" in floor.evidence
    if error is None:
        if every:
            return [
                f"Solved task, or underflow: {floor.evidence}; without class labels the two cannot "
                f"be told apart."
            ]
        return []
    if error >= SOLVED_ERROR:
        return []
    if every:
        return [f"Solved task: {floor.evidence}; there is no gradient to judge."]
    left_out = (figures.num_samples or 0) > (figures.num_measurable or 0)
    if figures.bp_grad_norms[-1] < thresholds.gradient_floor or left_out:
        return [
            f"Solved task: the median output error is {error:.2g}; ‖g_L‖ = "
            f"{figures.bp_grad_norms[-1]:.2g} is small for that, whatever the gain."
        ]
    return []
