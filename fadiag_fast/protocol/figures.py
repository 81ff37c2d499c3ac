"""The figures that the protocols judge, and what a judgement is."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

# What credit gains are relative to where the network has logits.
OUTPUT = "output"


TRUSTWORTHY = "trustworthy"


NOT_ENOUGH_DATA = "not enough data"


# A smaller norm in a denominator counts as this.
NORM_FLOOR = 1e-30


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
        """How many rows of states the first batch's medians are over, and what a row is."""
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
        later / (earlier if earlier > NORM_FLOOR else NORM_FLOOR)
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
