"""Backpropagation: the rule the others are measured against."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import ForwardStates, Rule


class Backpropagation(Rule):
    """Descend the gradient of the mean cross-entropy through the whole network.

    Formula: a_l = ∂CE_b/∂h_{l+1} per sample; the update is plain autograd on mean_b CE_b, plus
    Σ_l λ·mean_b ‖f_l(h_l)‖² with a penalty, whose gradient also runs through the whole network. See
    :class:`Rule` for the arguments. Source: 'Beyond Accuracy and Alignment' protocol, arXiv
    2606.21126.
    """

    name: ClassVar[str] = "bp"

    def block_credit(self, states: ForwardStates) -> list[Tensor]:
        # A forward pass of its own: the states of ForwardStates are cut between the blocks.
        with torch.enable_grad():
            h = states.hiddens[0].clone().requires_grad_()
            outputs = []
            for index in range(len(self.blocks)):
                h = self.anatomy.advance(h, self.anatomy.branch(index, h))
                outputs.append(h)
            # Samples do not interact, so the gradient of the SUM holds each sample's own.
            logits = self.anatomy.logits(h)
            loss = F.cross_entropy(logits, states.labels, reduction="sum")
        return list(torch.autograd.grad(loss, outputs))

    def losses(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if self.penalty == 0:
            return {"loss": F.cross_entropy(self.model(x), y)}
        h = self.anatomy.embed(x)
        penalty = h.new_zeros(())
        for index in range(len(self.blocks)):
            branch = self.anatomy.branch(index, h)
            penalty = penalty + self.penalty_of(branch)
            h = self.anatomy.advance(h, branch)
        return {"loss": F.cross_entropy(self.anatomy.logits(h), y), "local_loss": penalty}
