"""Direct feedback alignment: every block gets the output error through its own fixed matrix."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from .base import ForwardStates, Rule


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

    def setup(self, generator: torch.Generator) -> None:
        num_classes = self.anatomy.num_classes
        embed_count, *block_counts = self.anatomy.feature_counts

        def draw(count: int) -> Tensor:
            matrix = torch.randn(count, num_classes, generator=generator) / math.sqrt(num_classes)
            return matrix.to(self.like)

        for index, count in enumerate(block_counts):
            self.tensors[f"feedback.{index}"] = draw(count)
        # Drawn last, so that the blocks' matrices do not depend on the option.
        if self.train_embed:
            self.tensors["embed_feedback"] = draw(embed_count)

    def block_credit(self, states: ForwardStates) -> list[Tensor]:
        return [
            self.anatomy.as_state(states.error @ self.tensors[f"feedback.{index}"].T, like=h)
            for index, h in enumerate(states.hiddens[1:])
        ]

    def embed_credit(self, states: ForwardStates) -> Tensor:
        credit = states.error @ self.tensors["embed_feedback"].T
        return self.anatomy.as_state(credit, like=states.hiddens[0])
