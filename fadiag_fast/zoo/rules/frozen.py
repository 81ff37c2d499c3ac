"""The frozen baseline: what a network reaches when its blocks never learn."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from .base import ForwardStates, Rule


class FrozenBlocks(Rule):
    """Keep the blocks at their initial values; train embed, norm and head by backpropagation.

    Formula: descend mean_b CE_b in the parameters of ``embed``, ``out_ln`` and ``out_head`` only;
    the embedding's gradient passes through the fixed blocks. The blocks get no weight decay
    either. :meth:`credit` is a list of None. BatchNorm inside a block keeps its initial weights;
    its running statistics are measured, not learned, and follow the data.

    Args:
        train_embed: let the embedding learn, as in the protocol. ``False`` keeps it as it was
            drawn too, which leaves a linear read-out of random features: a weaker baseline.

    The other arguments are those of :class:`Rule`; raises ValueError for a penalty. Source:
    'Beyond Accuracy and Alignment' protocol, arXiv 2606.21126 (the baseline of depth utility).
    """

    name: ClassVar[str] = "frozen"

    def __init__(self, model: nn.Module, **common: Any) -> None:
        super().__init__(model, **common)
        if self.penalty != 0:
            raise ValueError(
                "FrozenBlocks: expected no penalty, because no block has a local loss, "
                f"got {self.penalty}"
            )

    def fixed_modules(self) -> list[nn.Module]:
        return [*super().fixed_modules(), *self.blocks]

    def block_credit(self, states: ForwardStates) -> list[None]:
        return [None] * len(self.blocks)

    def losses(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.model(x), y)}
