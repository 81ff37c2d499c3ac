"""The four diagnostics and the verdict, from plain figures.

Source: the diagnostic protocol of "Beyond Accuracy and Alignment" (arXiv 2606.21126). Everything
here is arithmetic on Python numbers: a scan, a training probe and ``diagnose`` share it.
"""

import math

from .figures import NOT_ENOUGH_DATA, Diagnostic, Figures, Status, growth_ratios, middle_layer
from .thresholds import DiagnosticThresholds


def scale_growth(figures: Figures, thresholds: DiagnosticThresholds) -> Diagnostic:
    """Evaluate (a): does any block multiply the norm of the residual stream beyond measure?"""
    norms = figures.residual_norms

    def outcome(
        status: Status, label: str, value: float | None, layer: int | None, evidence: str
    ) -> Diagnostic:
        return Diagnostic(
            "a", "scale growth", value, thresholds.scale_growth, ">", status, label, layer, evidence
        )

    if len(norms) == 0:
        return outcome(
            Status.NOT_ENOUGH_DATA, NOT_ENOUGH_DATA, None, None, "no batch with a sample"
        )
    undefined = next((l for l, norm in enumerate(norms) if math.isnan(norm)), None)
    ratios = growth_ratios(norms, figures.chain_starts)
    defined = [(ratio, l + 1) for l, ratio in enumerate(ratios) if not math.isnan(ratio)]
    value, layer = max(defined, key=lambda pair: pair[0], default=(1.0, 0))
    if value > thresholds.scale_growth:
        return outcome(
            Status.FIRED,
            "EXPLODED",
            value,
            layer,
            f"{figures.layers[layer]} takes the median norm from {norms[layer - 1]:.3g} to "
            f"{norms[layer]:.3g}",
        )
    if undefined is not None or math.isinf(norms[0]):
        at = undefined if undefined is not None else 0
        return outcome(
            Status.FIRED,
            "NON-FINITE",
            norms[at],
            at,
            f"the hidden states at {figures.layers[at]} are not finite in any sample",
        )
    if len(norms) < 2:
        return outcome(
            Status.PASSED, "OK", 1.0, 0, "fewer than two hidden states: 1.0 by definition"
        )
    return outcome(
        Status.PASSED,
        "OK",
        value,
        layer,
        f"the largest step is at {figures.layers[layer]}: {norms[layer - 1]:.3g} to "
        f"{norms[layer]:.3g}",
    )


def gradient_floor(figures: Figures, thresholds: DiagnosticThresholds) -> Diagnostic:
    """Evaluate (b): is the gradient at the deepest hidden state at the numerical floor?"""
    floor = thresholds.gradient_floor
    if len(figures.bp_grad_norms) == 0:
        return Diagnostic(
            "b",
            "gradient floor",
            None,
            floor,
            "<",
            Status.NOT_ENOUGH_DATA,
            NOT_ENOUGH_DATA,
            None,
            "no batch with a sample",
        )
    layer = len(figures.bp_grad_norms) - 1
    value = figures.bp_grad_norms[layer]
    where = f"median ‖g_L‖ at {figures.layers[layer]} over {figures.rows}"
    status, label, evidence = Status.PASSED, "OK", where
    if not math.isfinite(value):
        status, label = Status.FIRED, "NON-FINITE"
        evidence = (
            f"the gradients at {figures.layers[layer]} are not finite in most {figures.row_name}"
        )
    elif value < floor:
        status, label = Status.FIRED, "AT FLOOR"
        stability = figures.stabilities[middle_layer(len(figures.stabilities))]
        if not math.isnan(stability):
            drift = stability > thresholds.direction_stability
            evidence += (
                "; its direction is the same for every batch: drift"
                if drift
                else "; its direction differs from batch to batch: noise"
            )
    return Diagnostic("b", "gradient floor", value, floor, "<", status, label, layer, evidence)


def direction_stability(figures: Figures, thresholds: DiagnosticThresholds) -> Diagnostic:
    """Evaluate (c): do disjoint batches ask for the same mean direction?"""
    limit = thresholds.direction_stability

    def outcome(
        status: Status, label: str, value: float | None, layer: int | None, evidence: str
    ) -> Diagnostic:
        return Diagnostic(
            "c", "direction stability", value, limit, ">", status, label, layer, evidence
        )

    if len(figures.stabilities) == 0:
        return outcome(
            Status.NOT_ENOUGH_DATA, NOT_ENOUGH_DATA, None, None, "no batch with a sample"
        )
    layer = middle_layer(len(figures.stabilities))
    found = figures.num_directions[layer]
    value = figures.stabilities[layer]
    where = f"mean cosine over all pairs of {found} batches at {figures.layers[layer]}"
    lost = figures.num_batches - found
    if lost:
        where += f"; {lost} more have no direction there (a zero or non-finite mean gradient)"
    if found < thresholds.min_batches:
        return outcome(
            Status.NOT_ENOUGH_DATA,
            NOT_ENOUGH_DATA,
            None if math.isnan(value) else value,
            layer,
            f"{where}; at least {thresholds.min_batches} batches are needed",
        )
    if value > limit:
        return outcome(Status.FIRED, "DRIFT", value, layer, where)
    return outcome(Status.PASSED, "OK", value, layer, where)


def depth_utility(
    figures: Figures, thresholds: DiagnosticThresholds, frozen_baseline_acc: float | None = None
) -> Diagnostic:
    """Evaluate (d): is the network better than the same one with frozen blocks?

    ``frozen_baseline_acc`` stands in where the figures have none.
    """
    headline = figures.headline_acc
    frozen = figures.frozen_baseline_acc
    if frozen is None:
        frozen = frozen_baseline_acc
    if headline is None or frozen is None:
        absent = " and ".join(
            name
            for name, value in (("headline", headline), ("frozen-blocks", frozen))
            if value is None
        )
        return Diagnostic(
            "d",
            "depth utility",
            None,
            thresholds.depth_utility,
            "<",
            Status.NOT_EVALUATED,
            "not evaluated",
            None,
            f"no {absent} accuracy given",
        )
    # Rounded to what an accuracy over 1e7 samples can resolve: .35 - .33 is 2 points, not less.
    value = round(100.0 * (headline - frozen), 5)
    fires = value < thresholds.depth_utility
    return Diagnostic(
        "d",
        "depth utility",
        value,
        thresholds.depth_utility,
        "<",
        Status.FIRED if fires else Status.PASSED,
        "UNDERCUT" if fires else "clears",
        None,
        f"headline {100 * headline:.2f}%, frozen blocks {100 * frozen:.2f}% "
        f"({value:+.2f} percentage points)",
    )


def evaluate(
    figures: Figures, thresholds: DiagnosticThresholds | None = None
) -> tuple[Diagnostic, ...]:
    """Evaluate all four diagnostics, (a) to (d)."""
    limits = thresholds or DiagnosticThresholds()
    return tuple(
        diagnostic(figures, limits)
        for diagnostic in (scale_growth, gradient_floor, direction_stability, depth_utility)
    )
