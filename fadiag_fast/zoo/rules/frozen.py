"""The frozen baseline: what a network reaches when its blocks never learn."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from .base import ForwardStates, Rule, module_parameters


class FrozenBlocks(Rule):
    """Keep the blocks at their initial values; train embed, norm and head by backpropagation.

    Formula: descend mean_b CE_b in the parameters of ``embed``, ``out_ln`` and ``out_head`` only;
    the embedding's gradient passes through the fixed blocks. The blocks get no weight decay
    either. :meth:`credit` is a list of None. See :class:`Rule` for the arguments. Source: 'Beyond
    Accuracy and Alignment' protocol, arXiv 2606.21126 (the baseline of depth utility).
    """

    name: ClassVar[str] = "frozen"

    def trained_parameters(self) -> list[nn.Parameter]:
        return module_parameters([self.embed, *self.head_modules])

    def block_credit(self, states: ForwardStates) -> list[None]:
        return [None] * len(self.blocks)

    def update(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        loss = F.cross_entropy(self.model(x), y)
        self.descend(loss)
        return {"loss": loss.detach()}
