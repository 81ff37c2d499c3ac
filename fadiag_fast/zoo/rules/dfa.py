"""Direct feedback alignment: every block gets the output error through its own fixed matrix."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import ForwardStates, Rule, mean_inner_product


class DirectFeedbackAlignment(Rule):
    """Train the blocks with the output error, sent through fixed random matrices.

    Formula: a_l = e·B_lᵀ with e = softmax − onehot ``[B, C]`` and B_l ``[d, C]`` drawn once from
    N(0, 1)/√C; block l descends mean_b ⟨f_l(h_l), a_l⟩, norm and head descend mean_b CE_b.

    In a convolutional network d counts all features of block l's output map, and a_l has the map's
    shape. In a transformer d is the width of a token, and the class token alone gets a_l: the head
    reads no other, so no other has an output error of its own.

    Args:
        train_embed: also let the embedding descend mean_b ⟨embed(x), e·B_embedᵀ⟩ with a matrix of
            its own. Off by default: with a fixed embedding the residual stream inflates without
            limit, the failure the protocol is about, while a trained embedding grows along and
            hides it from the scale-growth ratio. A network without an embedding has no such
            option.

    The other arguments are those of :class:`Rule`. The matrices are float32 draws from ``seed``
    on the CPU, the same on every device; :meth:`state_dict` returns them. Source: 'Beyond
    Accuracy and Alignment' protocol, arXiv 2606.21126.
    """

    name: ClassVar[str] = "dfa"
    trains_embed: ClassVar[bool] = False

    def __init__(self, model: nn.Module, *, seed: int = 0, **common: Any) -> None:
        super().__init__(model, seed=seed, **common)
        num_classes = self.anatomy.num_classes
        embed_count, *block_counts = self.anatomy.feature_counts
        head_weight = model.get_parameter("out_head.weight")
        generator = torch.Generator().manual_seed(seed)

        def draw(count: int) -> Tensor:
            matrix = torch.randn(count, num_classes, generator=generator) / math.sqrt(num_classes)
            return matrix.to(head_weight)

        self.feedback = [draw(count) for count in block_counts]
        # Drawn last, so that the blocks' matrices do not depend on the option.
        self.embed_feedback = draw(embed_count) if self.train_embed else None

    def block_credit(self, states: ForwardStates) -> list[Tensor]:
        return [
            self.anatomy.as_state(states.error @ matrix.T, like=h)
            for matrix, h in zip(self.feedback, states.hiddens[1:], strict=True)
        ]

    def embed_loss(self, states: ForwardStates) -> Tensor:
        if self.embed_feedback is None:
            return super().embed_loss(states)
        embedded = self.anatomy.features(states.embedded)
        return mean_inner_product(embedded, states.error @ self.embed_feedback.T)

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"feedback.{index}": matrix for index, matrix in enumerate(self.feedback)}
        if self.embed_feedback is not None:
            state["embed_feedback"] = self.embed_feedback
        return state
