"""The four diagnostics and the verdict, from plain figures.

Source: the diagnostic protocol of "Beyond Accuracy and Alignment" (arXiv 2606.21126). Everything
here is arithmetic on Python numbers: a scan, a training probe and ``diagnose`` share it.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from itertools import pairwise
from typing import Literal, get_args

# What credit gains are relative to where the network has logits.
OUTPUT = "output"

# How figures are judged: as published, or calibrated (see fadiag_fast.calibrated).
Protocol = Literal["paper", "calibrated"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

TRUSTWORTHY = "trustworthy"
NOT_ENOUGH_DATA = "not enough data"

# The batch size the floor of 1e-7 belongs to: under a mean-reduced loss ‖g‖ falls as 1/B.
_FLOOR_BATCH_SIZE = 128
# Below this a median output error ‖softmax − onehot‖ (at most √2) counts as small.
_SMALL_OUTPUT_ERROR = 0.1
_NORM_FLOOR = 1e-30


@dataclass(frozen=True)
class DiagnosticThresholds:
    """The limits beyond which a diagnostic fires; the defaults are the published ones.

    Attributes:
        scale_growth: (a) fires above this ratio of consecutive median norms.
        gradient_floor: (b) fires below this median ‖g_L‖. It belongs to batches of 128 and a
            mean-reduced loss.
        direction_stability: (c) fires above this mean cosine.
        depth_utility: (d) fires below this gain over frozen blocks, in percentage points.
        min_batches: (c) needs at least this many batches with a direction.
        credit_gain_floor: below this median ‖g_L‖ / ‖∂loss/∂logits‖ the report says that the
            gradient is lost on its way, whatever (b) says: 1e-7 · 128, at unit output error.

    Raises:
        ValueError: a threshold is negative or not finite, or ``min_batches`` is below 2.
    """

    scale_growth: float = 50.0
    gradient_floor: float = 1e-7
    direction_stability: float = 0.30
    depth_utility: float = 2.0
    min_batches: int = 8
    credit_gain_floor: float = 1.28e-5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            lowest = 2 if field.name == "min_batches" else 0
            # A stability or utility threshold may be negative: both figures can be.
            free = field.name in ("direction_stability", "depth_utility")
            if not math.isfinite(value) or (value < lowest and not free):
                raise ValueError(
                    f"DiagnosticThresholds: {field.name}: expected a finite number"
                    f"{'' if free else f' of at least {lowest}'}, got {value}"
                )

    @property
    def total_growth(self) -> float:
        """The limit of the calibrated (a) on growth over several blocks: the inverse gain floor.

        A terminal norm divides the gradient by the stream's scale, so that this growth takes a
        gain of 1 to its floor. With the defaults it is 7.8e4: above the largest of the published
        healthy runs (equilibrium propagation, about 9e2 over four blocks), below the smallest of
        the published exploded ones (direct feedback alignment, 4.6e7).
        """
        return 1.0 / self.credit_gain_floor if self.credit_gain_floor else math.inf


def check_protocol(name: str, caller: str) -> None:
    """Raise ValueError where a protocol is not one of :data:`PROTOCOLS`."""
    if name not in PROTOCOLS:
        raise ValueError(f"{caller}: protocol: expected {' or '.join(PROTOCOLS)}, got {name!r}")


class Status(Enum):
    """What came of a diagnostic."""

    PASSED = "passed"
    FIRED = "fired"
    NOT_ENOUGH_DATA = NOT_ENOUGH_DATA
    NOT_EVALUATED = "not evaluated"


@dataclass(frozen=True)
class Diagnostic:
    """One diagnostic's outcome.

    Attributes:
        key: ``a`` … ``d``.
        name: what it measures.
        value: the figure; None where there is none.
        threshold: the limit.
        comparison: ``>`` or ``<``: it fires where ``value comparison threshold``.
        status: what came of it.
        label: the protocol's word for it.
        layer: index of the hidden state concerned, where there is one.
        evidence: one sentence with the figures behind the label.
    """

    key: str
    name: str
    value: float | None
    threshold: float
    comparison: str
    status: Status
    label: str
    layer: int | None
    evidence: str

    @property
    def fired(self) -> bool:
        return self.status is Status.FIRED


@dataclass(frozen=True)
class Figures:
    """What the diagnostics read, as plain numbers; n = L + 1 hidden states.

    Attributes:
        layers: names of the hidden states, ``n``.
        residual_norms: median ‖h_l‖ on the first batch, ``n``; empty without any sample.
        bp_grad_norms: median ‖g_l‖ on the first batch, ``n``.
        credit_gains: median ‖g_l‖ / ‖∂loss/∂logits‖ on the first batch, ``n``.
        output_grad_norm: median ‖∂loss/∂logits‖ on the first batch.
        batch_size: samples of the first batch.
        stabilities: per state the mean cosine over all pairs of batches that have a direction,
            ``n``; NaN where no pair has.
        num_directions: per state the number of batches that have a direction, ``n``.
        num_batches: batches given that hold a sample.
        headline_acc: fraction in [0, 1], or None.
        frozen_baseline_acc: fraction in [0, 1], or None.
        shapes: of one sample's state, ``n``; empty where not recorded.
        sizes: features under one norm, ``n``; empty where not recorded.
        pooled_norms: median ‖h_l‖ over the samples of all batches, ``n``. This and all that
            follows is read by the calibrated protocol only, and empty or None where not recorded.
        pooled_gains: median ‖g_l‖ / ‖∂loss/∂logits‖ over the measurable samples of all batches,
            ``n``: those whose ‖∂loss/∂logits‖ is at least the smallest normal number of its dtype.
        num_samples: samples of all batches.
        num_measurable: of these, the measurable ones.
        num_non_finite: of these, those with a state or gradient that is not finite.
        equal_logits: whether in every sample all logits are the same number.
        output_error: median ‖softmax − onehot‖ over all batches, in [0, √2]: free of the loss's
            scale. None where labels are no classes.
        grad_dtype: of the deepest state's gradient, such as ``float16``.
        stability_errors: jackknife standard error of ``stabilities`` over the batches, ``n``.
        stability_nulls: what ``stabilities`` exceed in 5% of all sign flips of the batches'
            directions, ``n``: as far as chance takes them without a common direction.
        test_size: images behind ``headline_acc``.
        frozen_test_size: images behind ``frozen_baseline_acc``; None: as many as ``test_size``.
        chain_starts: indices of the states with which a second or later chain of blocks begins;
            growth is compared inside a chain only.
        num_rows: rows of the first batch's states, which are more than its samples where every
            position counts; None for the samples.
        gain_reference: what credit gains are relative to: ``output``, or the name of the last
            observed state where the network has no output with a row for each sample.
    """

    layers: Sequence[str]
    residual_norms: Sequence[float]
    bp_grad_norms: Sequence[float]
    credit_gains: Sequence[float]
    output_grad_norm: float
    batch_size: int
    stabilities: Sequence[float]
    num_directions: Sequence[int]
    num_batches: int
    headline_acc: float | None = None
    frozen_baseline_acc: float | None = None
    shapes: Sequence[tuple[int, ...]] = ()
    sizes: Sequence[int] = ()
    pooled_norms: Sequence[float] = ()
    pooled_gains: Sequence[float] = ()
    num_samples: int | None = None
    num_measurable: int | None = None
    num_non_finite: int | None = None
    equal_logits: bool | None = None
    output_error: float | None = None
    grad_dtype: str | None = None
    stability_errors: Sequence[float] = ()
    stability_nulls: Sequence[float] = ()
    test_size: int | None = None
    frozen_test_size: int | None = None
    chain_starts: Sequence[int] = ()
    gain_reference: str = OUTPUT
    num_rows: int | None = None

    @property
    def rows(self) -> str:
        """Say how many rows of states the first batch's medians are over, and what a row is."""
        rows = self.batch_size if self.num_rows is None else self.num_rows
        return f"{rows} {self.row_name}"

    @property
    def row_name(self) -> str:
        """Return what one row of the states is: a sample, or a position of one."""
        return "samples" if self.num_rows in (None, self.batch_size) else "positions"

    @property
    def rms_norms(self) -> list[float]:
        """Median root mean square of the hidden states' features: ‖h_l‖ / √D_l."""
        return [
            norm / math.sqrt(size) if size else math.nan
            for norm, size in zip(self.residual_norms, self.sizes, strict=False)
        ]


def growth_ratios(
    residual_norms: Sequence[float], chain_starts: Collection[int] = ()
) -> list[float]:
    """Return ‖h_{l+1}‖ / ‖h_l‖ for consecutive norms, the denominator floored at 1e-30.

    Args:
        residual_norms: of the n states.
        chain_starts: indices of states with which another chain of blocks begins: no block leads
            from the state before to such a one, and the ratio is NaN.
    """
    ratios = [
        # A NaN is unequal to itself. A scan asks this three times of each checkpoint.
        later / (earlier if earlier > _NORM_FLOOR else _NORM_FLOOR)
        if earlier == earlier
        else math.nan
        for earlier, later in pairwise(residual_norms)
    ]
    for start in chain_starts:
        if 0 < start <= len(ratios):
            ratios[start - 1] = math.nan
    return ratios


def middle_layer(num_states: int) -> int:
    """Return the index L/2 of the hidden state that (c) reads, for L = num_states - 1 blocks."""
    return (num_states - 1) // 2


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


def verdict_of(diagnostics: Sequence[Diagnostic], protocol: Protocol = "paper") -> str:
    """Return ``trustworthy``, ``needs walk-back: (a)+(b)`` or ``not enough data``.

    What fired decides. Where nothing did, a diagnostic without enough data keeps the verdict open;
    (d) without a frozen accuracy does not. In the calibrated protocol (c) names a mode of what (a)
    or (b) found, and is not part of the verdict.
    """
    if protocol == "calibrated":
        diagnostics = [diagnostic for diagnostic in diagnostics if diagnostic.key != "c"]
    fired = [f"({diagnostic.key})" for diagnostic in diagnostics if diagnostic.fired]
    if fired:
        return f"needs walk-back: {'+'.join(fired)}"
    if any(diagnostic.status is Status.NOT_ENOUGH_DATA for diagnostic in diagnostics):
        return NOT_ENOUGH_DATA
    return TRUSTWORTHY


def explain_disagreement(
    figures: Figures, floor: Diagnostic, thresholds: DiagnosticThresholds
) -> str | None:
    """Say in a sentence why (b) and the credit gain disagree, None where they agree.

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
    lost = gain < thresholds.credit_gain_floor
    if floor.fired == lost:
        return None
    error = figures.output_grad_norm * figures.batch_size
    causes = []
    if floor.fired:
        if error < _SMALL_OUTPUT_ERROR:
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
    """Say in a sentence what (a) is worth where states have different numbers of features.

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
