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

from .figures import NOT_ENOUGH_DATA, OUTPUT, Diagnostic, Figures, Status, middle_layer
from .intervals import accuracy_difference, student_975
from .paper import depth_utility as published_depth_utility
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
