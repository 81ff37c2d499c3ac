"""Equilibrium propagation: credit from letting the hidden states settle under a nudge."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import ForwardStates, Rule


class EquilibriumPropagation(Rule):
    """Train every block on what it fails to explain once the output has been nudged.

    Formulas, per sample, with residuals r_l = h_{l+1} − h_l − f_l(h_l):

    - energy ½ Σ_l ‖r_l‖²; the forward pass is its minimum, zero (the free phase);
    - nudged phase: h_1 … h_L descend energy + β·CE from the forward pass, all at once, in
      ``relaxation_steps`` steps of ``relaxation_rate``; h_0 = embed(x) is clamped. The result is
      h*_l, with residuals r*_l;
    - credit a_l = −r*_l / β. At equilibrium it tends to ∂CE_b/∂h_{l+1} as β → 0. (The state's own
      displacement, another credit in use, is :meth:`displacement`.)
    - block l descends mean_b ½‖r*_l‖²/β in its parameters, at the nudged states; the gradient is
      that of mean_b ⟨f_l(h*_l), a_l⟩. Norm and head descend mean_b CE_b at the free h_L.

    Args:
        beta: strength of the nudge, not 0; the default is far from infinitesimal.
        relaxation_steps: steps of the nudged phase, at least 1. The nudge moves one block down per
            step, so fewer than L steps leave the lowest blocks without credit.
        relaxation_rate: step size of the nudged phase.
        train_embed: also descend ½‖r*_0‖²/β in the embedding, with h_0 = embed(x), that is, treat
            the embedding as part of the first block. As β → 0 this too is the BP gradient.

    The other arguments are those of :class:`Rule`. The energy is that of a residual network: raises
    TypeError for a model without skips, and ValueError for a zero or non-finite ``beta`` and for
    ``relaxation_steps`` below 1. Source: 'Beyond Accuracy and Alignment'
    protocol, arXiv 2606.21126.
    """

    name: ClassVar[str] = "ep"

    def __init__(
        self,
        model: nn.Module,
        *,
        beta: float = 0.5,
        relaxation_steps: int = 20,
        relaxation_rate: float = 0.5,
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
        self.relaxation_rate = relaxation_rate
        super().__init__(model, **common)
        if not self.anatomy.skip:
            raise TypeError(
                "EquilibriumPropagation: expected a model whose blocks have skips, "
                f"got {type(model).__name__}"
            )

    def nudged_hiddens(self, states: ForwardStates) -> list[Tensor]:
        """Relax the hidden states under the nudge: h*_0 … h*_L, detached."""
        blocks = self.blocks
        depth = len(blocks)
        h = [hidden.clone() for hidden in states.hiddens]
        branches = [branch.detach() for branch in states.branches]
        for step in range(self.relaxation_steps):
            # The nudge enters at h_L and reaches one block further down with every step. Below
            # `first` nothing has moved yet, and h_0 never does: those branches are still known.
            first = max(1, depth - step)
            moving = [state.detach().requires_grad_() for state in h[first:]]
            with torch.enable_grad():
                active = [
                    block(state) for block, state in zip(blocks[first:], moving[:-1], strict=True)
                ]
                logits = self.anatomy.logits(moving[-1])
                # The sum, so that row b of the gradient is sample b's own.
                loss = F.cross_entropy(logits, states.labels, reduction="sum")
            with torch.no_grad():
                branches[first:] = [branch.detach() for branch in active]
                residuals = [h[i + 1] - (h[i] + branches[i]) for i in range(first - 1, depth)]
                # One backward through the blocks side by side: J_lᵀ r_l for each of them, and the
                # nudge −β ∂CE/∂h_L. Parameters are no inputs, so their gradients are not computed.
                pulls = torch.autograd.grad(
                    [*active, loss],
                    moving,
                    [*residuals[1:], torch.full_like(loss, -self.beta)],
                )
                for index, pull in enumerate(pulls):
                    # −∂energy/∂h_l = r_l + J_lᵀ r_l − r_{l−1}; h_L has no block above it.
                    force = pull - residuals[index]
                    if index + 1 < len(residuals):
                        force += residuals[index + 1]
                    h[first + index].add_(force, alpha=self.relaxation_rate)
        return h

    def block_credit(self, states: ForwardStates) -> list[Tensor]:
        nudged = self.nudged_hiddens(states)
        with torch.no_grad():
            return [
                (nudged[index] + block(nudged[index]) - nudged[index + 1]) / self.beta
                for index, block in enumerate(self.blocks)
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

    def update(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        states = self.forward_states(x, y)
        nudged = self.nudged_hiddens(states)
        if self.train_embed:
            # Both the skip and the branch of the first block carry the embedding's graph.
            residual = nudged[1] - states.embedded - self.blocks[0](states.embedded)
        else:
            residual = nudged[1] - states.hiddens[0] - states.branches[0]
        energy = residual.square().flatten(1).sum(dim=1)
        for index, block in enumerate(self.blocks[1:], start=1):
            residual = nudged[index + 1] - nudged[index] - block(nudged[index])
            energy = energy + residual.square().flatten(1).sum(dim=1)
        loss = F.cross_entropy(states.logits, y)
        local_loss = energy.mean() / (2 * self.beta)
        self.descend(loss + local_loss)
        return {"loss": loss.detach(), "local_loss": local_loss.detach()}
