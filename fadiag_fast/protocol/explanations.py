"""Explanations in words: why a diagnostic fired, and why two protocols disagree."""

import math
from collections.abc import Sequence

from .calibrated import state_scales
from .figures import (
    OUTPUT,
    Diagnostic,
    Figures,
    Status,
    growth_ratios,
)
from .paper import CREDIT_GAIN_FLOOR, GRADIENT_FLOOR
from .thresholds import DiagnosticThresholds

# The batch size the floor of 1e-7 belongs to: under a mean-reduced loss ‖g‖ falls as 1/B.
_FLOOR_BATCH_SIZE = 128


# Below this a median ‖softmax − onehot‖ (at most √2) counts as a solved task.
SOLVED_ERROR = 0.1


def explain_disagreement(
    figures: Figures, floor: Diagnostic, thresholds: DiagnosticThresholds
) -> str | None:
    """Return in a sentence why (b) and the credit gain disagree, None where they agree.

    ‖g_L‖ is the credit gain times the output error, with the loss's factor 1/B in it. So (b)
    fires on a solved task and on large batches, and passes a dead gradient in small ones.
    """
    if floor.value is None or not figures.credit_gains or not math.isfinite(floor.value):
        return None
    if figures.gain_reference != OUTPUT:
        return None
    gain = figures.credit_gains[-1]
    if math.isnan(gain):
        return (
            "The output error is zero in every sample, so there is no gradient to judge: the task "
            "is solved to the last bit."
        )
    lost = CREDIT_GAIN_FLOOR.is_beyond(gain, thresholds)
    if floor.fired == lost:
        return None
    error = figures.output_grad_norm * figures.batch_size
    causes = []
    if floor.fired:
        if error < SOLVED_ERROR:
            causes.append(f"the output error is small (median {error:.2g}: a solved task)")
        if figures.batch_size > _FLOOR_BATCH_SIZE:
            causes.append(
                f"a mean-reduced loss divides by {figures.batch_size} samples, and the floor "
                f"belongs to {_FLOOR_BATCH_SIZE}"
            )
        because = " and ".join(causes) or "of the loss's scale"
        return (
            f"(b) fires, but the credit gain at the deepest state, {gain:.3g}, is above its floor "
            f"{thresholds.credit_gain_floor:.3g}: the gradient arrives intact and is small only "
            f"because {because}."
        )
    if figures.batch_size < _FLOOR_BATCH_SIZE:
        causes.append(
            f"a mean-reduced loss divides by {figures.batch_size} samples only, and the floor "
            f"belongs to {_FLOOR_BATCH_SIZE}"
        )
    because = " and ".join(causes) or "of the loss's scale"
    return (
        f"(b) passes, but the credit gain at the deepest state, {gain:.3g}, is below its floor "
        f"{thresholds.credit_gain_floor:.3g}: the gradient is lost on its way and clears (b) only "
        f"because {because}."
    )


def explain_shapes(figures: Figures, growth: Diagnostic) -> str | None:
    """Return in a sentence what (a) is worth where states have different numbers of features.

    A norm grows with the number of features: (a) compares only like shapes. The root mean square
    does not.
    """
    if len(set(figures.sizes)) < 2 or growth.layer is None or growth.value is None:
        return None
    ratios = growth_ratios(figures.rms_norms, figures.chain_starts)
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    if not known:
        return None
    largest = max(known)
    where = figures.layers[ratios.index(largest) + 1]
    return (
        f"The states differ in size, and (a) compares only like shapes: by root mean square per "
        f"feature the largest growth is {largest:.3g}, at {where}."
    )


# Behind a terminal norm gain · RMS is the norm of the head's map, which is of order one.
_ORDER_ONE = (1e-3, 1e3)


# Smallest subnormal number per dtype: below it there is only zero.
_SMALLEST = {
    "float16": 2.0**-24,
    "bfloat16": 2.0**-133,
    "float32": 2.0**-149,
    "float64": 2.0**-1074,
}


def find_causes(
    figures: Figures, diagnostics: Sequence[Diagnostic], thresholds: DiagnosticThresholds
) -> tuple[str, ...]:
    """Return in sentences what made the figures what they are.

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
    if GRADIENT_FLOOR.is_beyond(figures.bp_grad_norms[-1], thresholds) or left_out:
        return [
            f"Solved task: the median output error is {error:.2g}; ‖g_L‖ = "
            f"{figures.bp_grad_norms[-1]:.2g} is small for that, whatever the gain."
        ]
    return []
