"""Compare a rule's credit vectors with the gradient, and with what the loss does.

With h_l the hidden states that are compared, a_l the credit a training rule gives there and g_l the
gradient of each sample's OWN loss (not divided by the batch size):

- Γ_l, alignment: the cosine of a_l and g_l per sample, averaged over the batch. Norms are floored
  at 1e-30 and nothing else is clamped.
- ρ_l, perturbation correlation: M random unit directions v per sample; Pearson's correlation, over
  all samples and directions at once, of ⟨a_l, εv⟩ with loss(h_l + εv) − loss(h_l). 0 where either
  has a standard deviation below 1e-12. It needs no gradient, and so does not share its faults.
- nudge: the mean change of the loss when h_l moves by −η·a_l.
- null: Γ with credit whose random feedback is drawn anew, mean ± standard deviation over the draws:
  what alignment looks like where there is none.
- deep: the mean over l ≥ 1, without the first credit vector.

Source: 'Beyond Accuracy and Alignment' protocol, arXiv 2606.21126.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._common.tables import number, text_table
from .capture import Output, Probe, untouched
from .capture.batches import check_batch, device_of, to_device
from .capture.points import Select, unwrap
from .capture.reduction import SampleReduction, reduction_of
from .ops import reference

# (x, y) → one credit vector per state, [B, ...] per sample; None where a state gets none.
CreditFunction = Callable[[Any, Any], Sequence[Tensor | None]]
# (logits, y) → the loss of each sample, [B].
SampleLoss = Callable[[Tensor, Any], Tensor]

# A correlation of less spread than this is one of rounding errors (the protocol's limit).
SMALLEST_SPREAD = 1e-12


@dataclass(frozen=True)
class LayerCredit:
    """What the credit at one hidden state is worth.

    Attributes:
        layer: the state's name.
        gamma: Γ_l in [-1, 1]; None where the state gets no credit.
        perturbation: ρ_l in [-1, 1], or None.
        nudge: mean change of a sample's loss, in the loss's unit, or None.
        null_mean: mean Γ_l of fresh feedback, or None where nothing can be drawn anew.
        null_sd: its standard deviation over the draws.
        credit_norm: median ‖a_l‖ over the batch.
        grad_norm: median ‖g_l‖ of the samples' own losses: B times that of the batch's mean.
    """

    layer: str
    gamma: float | None = None
    perturbation: float | None = None
    nudge: float | None = None
    null_mean: float | None = None
    null_sd: float | None = None
    credit_norm: float | None = None
    grad_norm: float | None = None


@dataclass(frozen=True)
class CreditReport:
    """The credit of one network on one batch; print it, or take the record apart.

    Attributes:
        layers: per state that may get credit, from the first block's output to the last one's.
        deep_null_mean: mean over fresh draws of the deep Γ, None without draws.
        deep_null_sd: its standard deviation over the draws.
        reason: why there is no credit, "" where there is.
    """

    layers: tuple[LayerCredit, ...] = ()
    deep_null_mean: float | None = None
    deep_null_sd: float | None = None
    reason: str = ""

    @property
    def gammas(self) -> list[float | None]:
        """Γ per layer."""
        return [layer.gamma for layer in self.layers]

    @property
    def perturbations(self) -> list[float | None]:
        """ρ per layer."""
        return [layer.perturbation for layer in self.layers]

    @property
    def deep_gamma(self) -> float | None:
        """Mean Γ over l ≥ 1, None where no such layer has credit."""
        return _mean_of(self.gammas[1:])

    @property
    def deep_perturbation(self) -> float | None:
        """Mean ρ over l ≥ 1, None where no such layer has credit."""
        return _mean_of(self.perturbations[1:])

    @property
    def deep_nudge(self) -> float | None:
        """Mean change of the loss over l ≥ 1, None where no such layer has credit."""
        return _mean_of([layer.nudge for layer in self.layers[1:]])

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain Python values."""
        return {
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "deep_gamma": self.deep_gamma,
            "deep_perturbation": self.deep_perturbation,
            "deep_nudge": self.deep_nudge,
            "deep_null_mean": self.deep_null_mean,
            "deep_null_sd": self.deep_null_sd,
            "reason": self.reason,
        }

    def rows(self) -> list[list[str]]:
        """Return the table as text: layer, Γ, null, ρ, nudge, ‖a‖, ‖g‖; N/A where there is none."""
        deep = LayerCredit(
            "deep (l ≥ 1)",
            self.deep_gamma,
            self.deep_perturbation,
            self.deep_nudge,
            self.deep_null_mean,
            self.deep_null_sd,
        )
        return [
            [
                layer.layer,
                _figure(layer.gamma),
                _interval(layer.null_mean, layer.null_sd),
                _figure(layer.perturbation),
                "N/A" if layer.nudge is None else f"{layer.nudge:+.2e}",
                "" if layer is deep else _norm(layer.credit_norm),
                "" if layer is deep else _norm(layer.grad_norm),
            ]
            for layer in (*self.layers, deep)
        ]

    def __str__(self) -> str:
        if not self.layers:
            return f"credit: N/A: {self.reason}"
        header = ["credit at", "Γ", "Γ of fresh feedback", "ρ", "nudge", "‖a‖", "‖g‖"]
        lines = text_table(header, self.rows())
        return "\n".join([*lines, *([f"N/A: {self.reason}"] if self.reason else [])])


def measure_credit(
    model: nn.Module,
    credit: CreditFunction,
    batch: Any,
    *,
    fresh: Callable[[int], CreditFunction] | None = None,
    null_draws: int = 20,
    num_directions: int = 32,
    epsilon: float = 1e-3,
    nudge_size: float = 0.01,
    seed: int = 0,
    loss: SampleLoss | None = None,
    taps: Select | None = None,
    reduction: str | SampleReduction = "flatten",
    output: Output | None = None,
    batch_dim: int = 0,
) -> CreditReport:
    """Measure Γ, ρ, nudge and null of a credit function on one batch.

    Args:
        model: any module whose states the taps can see and replace; left as it was found.
        credit: (x, y) → one tensor per hidden state ``[B, ...]``, per sample and not divided by B,
            or None for a state without credit. As many as there are states, or one fewer, which
            leaves out the first (the embedding's output): a rule's ``credit`` method.
        batch: a pair (x, y), moved to the model's device.
        fresh: seed → a credit function with feedback drawn anew; None leaves out the null.
        null_draws: number of fresh draws, at least 2.
        num_directions: M, at least 1; every one costs a forward pass per layer.
        epsilon: length ε of a perturbation, above 0.
        nudge_size: η.
        seed: of the directions, and the first of the fresh draws' seeds.
        loss: (logits, y) → the loss of each sample ``[B]``; None is cross-entropy, averaged over
            the tokens where there is a label for each. Computed on float64 logits.
        taps: where the states are, see :func:`fadiag_fast.capture.taps.find_taps`.
        reduction: ``"flatten"``, or ``"cls"`` for the first position of ``[B, T, D]`` alone.
        output: which part of a structured model output counts as logits.
        batch_dim: the dimension of the states that counts samples.

    Returns:
        A printable :class:`CreditReport`. A credit of zeros has Γ 0, one that is not finite NaN.

    Raises:
        ValueError: numbers out of range, another number of credit vectors than states, or one of
            another shape than its state.
        TapError: a state cannot be found or replaced.

    Source: 'Beyond Accuracy and Alignment' protocol, arXiv 2606.21126 (M 32, ε 1e-3, η 0.01, 20
    draws).
    """
    how = reduction_of(reduction)  # type: ignore[arg-type]
    if how.kind not in ("flatten", "cls"):
        raise ValueError(f"measure_credit: reduction: expected flatten or cls, got {how.kind}")
    for name, value, fits in (
        ("null_draws: expected at least 2", null_draws, null_draws >= 2),
        ("num_directions: expected at least 1", num_directions, num_directions >= 1),
        ("epsilon: expected a finite number above 0", epsilon, 0 < epsilon < math.inf),
        ("nudge_size: expected a finite number", nudge_size, math.isfinite(nudge_size)),
    ):
        if not fits:
            raise ValueError(f"measure_credit: {name}, got {value}")
    model = unwrap(model)
    x, y = to_device(check_batch(0, batch, batch_dim), device_of(model))
    sample_loss = loss or sample_cross_entropy
    probe = Probe(
        model,
        select=taps,
        # The sum, so that row b of every gradient is sample b's own.
        loss=lambda found, labels: sample_loss(probe.logits_of(found).double(), labels).sum(),
        output=output,
        batch_dim=batch_dim,
    )
    with untouched(model):
        captured = probe.capture(x, y)
        credits, first = _matched(probe, credit(x, y), captured.grads)
        labels = probe.taps.labels[first:]
        grads = [how.of_grad(grad) for grad in captured.grads[first:]]
        aligned = _alignment(credits, grads, how)
        draws = (
            None
            if fresh is None
            else torch.stack(
                [
                    _alignment(
                        _matched(probe, fresh(seed + k)(x, y), captured.grads)[0], grads, how
                    ).gamma
                    for k in range(null_draws)
                ]
            )
        )
        measure = _Measure(probe, x, y, sample_loss, how)
        generator = torch.Generator().manual_seed(seed)
        layers = []
        for l, (label, a) in enumerate(zip(labels, credits, strict=True)):
            if a is None:
                layers.append(LayerCredit(label, grad_norm=float(aligned.grad_norm[l])))
                continue
            null_mean, null_sd = _spread(None if draws is None else draws[:, l])
            layers.append(
                LayerCredit(
                    label,
                    float(aligned.gamma[l]),
                    measure.perturbation(first + l, a, num_directions, epsilon, generator),
                    measure.nudge(first + l, a, nudge_size),
                    null_mean,
                    null_sd,
                    float(aligned.credit_norm[l]),
                    float(aligned.grad_norm[l]),
                )
            )
    if all(a is None for a in credits):
        return CreditReport(tuple(layers), reason="the rule gives its blocks no credit")
    deep = None if draws is None or len(layers) < 2 else draws[:, 1:].nanmean(dim=1)
    return CreditReport(tuple(layers), *_spread(deep))


def sample_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Compute each sample's cross-entropy ``[B]``, averaged over its tokens where it has several.

    Args:
        logits: ``[B, C]``; ``[B, T, C]`` with labels ``[B, T]``; or ``[B, C, ...]`` with
            ``[B, ...]``.
        y: class indices, or probabilities shaped like the logits.
    """
    if logits.dim() == 3 and y.shape == logits.shape[:-1]:
        logits = logits.transpose(1, 2)
    losses = nn.functional.cross_entropy(logits, y, reduction="none")
    return losses if losses.dim() == 1 else losses.flatten(1).mean(dim=1)


@dataclass(frozen=True)
class _Alignment:
    """Per layer ``[L]``: Γ and the median norms; NaN where a layer has no credit."""

    gamma: Tensor
    credit_norm: Tensor
    grad_norm: Tensor


def _alignment(
    credits: Sequence[Tensor | None], grads: Sequence[Tensor], how: SampleReduction
) -> _Alignment:
    reduced = [
        torch.full_like(grad, torch.nan) if a is None else how.of_grad(a)
        for a, grad in zip(credits, grads, strict=True)
    ]
    found = reference.credit_statistics(reduced, grads)
    return _Alignment(
        found.cosine.mean(dim=1).cpu(),
        found.credit_norm.median(dim=1).values.cpu(),
        found.grad_norm.median(dim=1).values.cpu(),
    )


def _matched(
    probe: Probe, credits: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> tuple[list[Tensor | None], int]:
    """Return the credit vectors and the index of the state that the first one belongs to."""
    first = len(grads) - len(credits)
    if first not in (0, 1):
        raise ValueError(
            f"measure_credit: expected {len(grads)} credit vectors, one for each of "
            f"{', '.join(probe.taps.labels)}, or one fewer, got {len(credits)}"
        )
    for a, grad, label in zip(credits, grads[first:], probe.taps.labels[first:], strict=True):
        if a is not None and a.shape != grad.shape:
            raise ValueError(
                f"measure_credit: {label}: expected credit of shape {list(grad.shape)}, that of "
                f"the state, got {list(a.shape)}"
            )
    return [None if a is None else a.detach() for a in credits], first


@dataclass(frozen=True)
class _Measure:
    """Ask the loss itself: forward passes with one state moved."""

    probe: Probe
    x: Any
    y: Any
    loss: SampleLoss
    how: SampleReduction

    def losses(self, l: int, offset: Tensor) -> Tensor:
        """Return each sample's loss with h_l moved, ``[B]`` float64."""
        return self.loss(self.probe.logits_with(self.x, l, offset).double(), self.y)

    def nudge(self, l: int, credit: Tensor, size: float) -> float:
        still = self.losses(l, torch.zeros_like(credit))
        return float((self.losses(l, -size * credit) - still).mean())

    def perturbation(
        self, l: int, credit: Tensor, count: int, epsilon: float, generator: torch.Generator
    ) -> float:
        still = self.losses(l, torch.zeros_like(credit))
        expected, observed = [], []
        for _ in range(count):
            direction = torch.randn(credit.shape, generator=generator, dtype=torch.float64)
            if self.how.kind == "cls" and direction.dim() == 3:
                direction[:, 1:] = 0
            norm = direction.flatten(1).norm(dim=1)
            direction /= norm.reshape(-1, *[1] * (direction.dim() - 1))
            offset = (epsilon * direction).to(credit.device)
            expected.append((credit.double() * offset).flatten(1).sum(dim=1))
            observed.append(self.losses(l, offset.to(credit.dtype)) - still)
        return _correlation(torch.cat(expected), torch.cat(observed))


def _correlation(a: Tensor, b: Tensor) -> float:
    """Return Pearson's correlation of two ``[N]`` float64, 0 where either hardly varies."""
    spreads = a.std(correction=0), b.std(correction=0)
    if any(float(spread) < SMALLEST_SPREAD for spread in spreads):
        return 0.0
    # Unit spread first: the product of the deviations could leave the range.
    units = [(t - t.mean()) / spread for t, spread in zip((a, b), spreads, strict=True)]
    return float((units[0] * units[1]).mean())


def _spread(draws: Tensor | None) -> tuple[float | None, float | None]:
    if draws is None or bool(draws.isnan().all()):
        return None, None
    values = draws.tolist()
    return statistics.fmean(values), float(draws.std())


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _figure(value: float | None) -> str:
    return "N/A" if value is None else f"{value:+.4f}"


def _interval(mean: float | None, sd: float | None) -> str:
    return "N/A" if mean is None or sd is None else f"{mean:+.4f} ± {sd:.4f}"


def _norm(value: float | None) -> str:
    return "N/A" if value is None else number(value)
