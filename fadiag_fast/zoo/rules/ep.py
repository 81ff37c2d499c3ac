"""Equilibrium propagation: credit from letting the hidden states settle under a nudge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import ForwardStates, Rule, mean_inner_product


class EquilibriumPropagation(Rule):
    """Train every block on what it fails to explain once the output has been nudged.

    Formulas, per sample, with residuals r_l = h_{l+1} − h_l − f_l(h_l), or h_{l+1} − f_l(h_l) in a
    network without skips:

    - energy ½ Σ_l ‖r_l‖²; the forward pass is its minimum, zero (the free phase);
    - nudged phase: h_1 … h_L descend energy + β·CE from the forward pass, all at once, in
      ``relaxation_steps`` steps of ``relaxation_rate``; h_0 = embed(x) is clamped. The result is
      h*_l, with residuals r*_l;
    - credit a_l = −r*_l / β. At equilibrium it tends to ∂CE_b/∂h_{l+1} as β → 0. (The state's own
      displacement, another credit in use, is :meth:`displacement`.)
    - block l descends mean_b ½‖r*_l‖²/β in its parameters, at the nudged states; the gradient is
      that of mean_b ⟨f_l(h*_l), a_l⟩. A penalty is taken there too: λ·mean_b ‖f_l(h*_l)‖². Norm
      and head descend mean_b CE_b at the free h_L.

    BatchNorm in training mode uses the batch's statistics in both phases, the same function of the
    states, so that the free phase is the minimum; only the forward pass counts towards its running
    statistics.

    Args:
        beta: strength of the nudge, not 0; the default is far from infinitesimal.
        relaxation_steps: steps of the nudged phase, at least 1. The nudge moves one block down per
            step, so fewer than L steps leave the lowest blocks without credit.
        relaxation_rate: step size of the nudged phase; None takes 0.5, or 0.1 in a network without
            skips, whose blocks stretch more: gradient descent on the energy diverges once the
            rate passes 2 over its largest curvature, which grows with the square of a block's
            derivative.
        train_embed: also descend ½‖r*_0‖²/β in the embedding, with h_0 = embed(x), that is, treat
            the embedding as part of the first block. As β → 0 this too is the BP gradient.

    The other arguments are those of :class:`Rule`. Raises ValueError for a zero or non-finite
    ``beta`` and for ``relaxation_steps`` below 1. Source: 'Beyond Accuracy and Alignment' protocol,
    arXiv 2606.21126 (β 0.5, 20 steps); the relaxation rate, the local loss and the energy without
    skips are this package's choice.
    """

    name: ClassVar[str] = "ep"

    def __init__(
        self,
        model: nn.Module,
        *,
        beta: float = 0.5,
        relaxation_steps: int = 20,
        relaxation_rate: float | None = None,
        **common: Any,
    ) -> None:
        # The second test is False for NaN too.
        if beta == 0 or not abs(beta) < float("inf"):
            raise ValueError(
                f"EquilibriumPropagation: expected a finite beta other than 0, got {beta}"
            )
        if relaxation_steps < 1:
            raise ValueError(
                "EquilibriumPropagation: expected relaxation_steps of at least 1, "
                f"got {relaxation_steps}"
            )
        self.beta = beta
        self.relaxation_steps = relaxation_steps
        super().__init__(model, **common)
        if relaxation_rate is None:
            relaxation_rate = 0.5 if self.anatomy.skip else 0.1
        self.relaxation_rate = relaxation_rate

    def nudged_hiddens(self, states: ForwardStates) -> list[Tensor]:
        """Relax the hidden states under the nudge: h*_0 … h*_L, detached."""
        with self._buffers_kept():
            return self._relaxed(states)

    def _relaxed(self, states: ForwardStates) -> list[Tensor]:
        anatomy = self.anatomy
        depth = len(self.blocks)
        h = [hidden.clone() for hidden in states.hiddens]
        branches = [branch.detach() for branch in states.branches]
        for step in range(self.relaxation_steps):
            # The nudge enters at h_L and reaches one block further down with every step. Below
            # `first` nothing has moved yet, and h_0 never does: those branches are still known.
            first = max(1, depth - step)
            moving = [state.detach().requires_grad_() for state in h[first:]]
            with torch.enable_grad():
                active = [
                    anatomy.branch(index, state)
                    for index, state in enumerate(moving[:-1], start=first)
                ]
                logits = anatomy.logits(moving[-1])
                # The sum, so that row b of the gradient is sample b's own.
                loss = F.cross_entropy(logits, states.labels, reduction="sum")
            with torch.no_grad():
                branches[first:] = [branch.detach() for branch in active]
                residuals = [
                    h[index + 1] - anatomy.advance(h[index], branches[index])
                    for index in range(first - 1, depth)
                ]
                # One backward through the blocks side by side: J_lᵀ r_l for each of them, and the
                # nudge −β ∂CE/∂h_L. Parameters are no inputs, so their gradients are not computed.
                pulls = torch.autograd.grad(
                    [*active, loss],
                    moving,
                    [*residuals[1:], torch.full_like(loss, -self.beta)],
                )
                # −∂energy/∂h_l = [r_l +] J_lᵀ r_l − r_{l−1}, with the first term where there is a
                # skip; h_L has no block above it. All l at once: on a GPU each call costs as much.
                forces = torch._foreach_sub(pulls, residuals)
                if anatomy.skip and len(forces) > 1:
                    torch._foreach_add_(forces[:-1], residuals[1:])
                torch._foreach_add_(h[first:], forces, alpha=self.relaxation_rate)
        return h

    @contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        """Let the blocks run at nudged states without a trace in running statistics."""
        kept = [(module, dict(module._buffers)) for module in self.model.modules()]
        try:
            # Copies to write into: writing the values back would touch what the forward pass's
            # graph has saved.
            for module, buffers in kept:
                module._buffers.update(
                    {name: b if b is None else b.clone() for name, b in buffers.items()}
                )
            yield
        finally:
            for module, buffers in kept:
                module._buffers.update(buffers)

    def block_credit(self, states: ForwardStates) -> list[Tensor]:
        nudged = self.nudged_hiddens(states)
        with torch.no_grad(), self._buffers_kept():
            return [
                (self.anatomy.advance(h, self.anatomy.branch(index, h)) - nudged[index + 1])
                / self.beta
                for index, h in enumerate(nudged[:-1])
            ]

    def displacement(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Compute the credit −(h*_{l+1} − h_{l+1})/β, l = 0 … L−1, from where the states went.

        Same arguments, shapes and indices as :meth:`credit`. It adds up the credit of all blocks
        below, so it is not the gradient in the limit of a small nudge, and no block descends it;
        some reports compare it with the gradient all the same.
        """
        states = self.forward_states(x, y)
        nudged = self.nudged_hiddens(states)
        pairs = zip(states.hiddens[1:], nudged[1:], strict=True)
        return [(free - moved) / self.beta for free, moved in pairs]

    def losses(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        states = self.forward_states(x, y)
        nudged = self.nudged_hiddens(states)
        loss = F.cross_entropy(states.logits, y)
        local_loss = torch.zeros_like(loss)
        # h_0 is clamped; the embedding learns through it, by the skip and the first branch.
        inputs = [states.embedded if self.train_embed else nudged[0], *nudged[1:-1]]
        with self._buffers_kept():
            for index, h in enumerate(inputs):
                branch = self.anatomy.branch(index, h)
                residual = nudged[index + 1] - self.anatomy.advance(h, branch)
                local_loss = local_loss + mean_inner_product(residual, residual) / (2 * self.beta)
                if self.penalty:
                    local_loss = local_loss + self.penalty_of(branch)
        return {"loss": loss, "local_loss": local_loss}
