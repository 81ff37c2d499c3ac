"""Feedback alignment: the error goes back block by block, through fixed random matrices."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import ForwardStates, Rule

# Side of the random kernels between two maps, that of the usual forward convolution.
KERNEL_SIZE = 3


class FeedbackAlignment(Rule):
    """Train the blocks with the output error, sent back through a chain of fixed random matrices.

    Formula: a_{L−1} = e·B_{L−1}ᵀ with e = softmax − onehot ``[B, C]``, below it
    a_l = a_{l+1}·B_lᵀ. B_{L−1} ``[d, C]`` is drawn once from N(0, 1)/√C, as in direct feedback
    alignment, and B_l ``[d_l, d_{l+1}]`` from N(0, 1)/√d_{l+1}, which keeps the norm of a vector
    where the widths are equal. The chain has no skip of its own, also where the network has. Block
    l descends mean_b ⟨f_l(h_l), a_l⟩, norm and head descend mean_b CE_b.

    Between two maps ``[c_l, H_l, W_l]`` and ``[c_{l+1}, H_{l+1}, W_{l+1}]`` of a convolutional
    network a matrix would have gigabytes. B_l is then a random 3×3 convolution from c_{l+1} to c_l
    channels, N(0, 1)/√(9·c_{l+1}), followed by the nearest-neighbour enlargement that is the
    adjoint of pooling, divided by the root of the factor by which the area grows: what a random
    transposed convolution in place of the forward one's does, the usual feedback alignment of
    convolutional networks. It ties the feedback of the positions of a map to one another, as the
    forward pass does; a dense matrix would not. It does not decide the verdict: a narrow SmallCNN
    trained through dense matrices for 120 steps has much the same growth and gradient. In a
    transformer the class token alone gets credit.

    Args:
        train_embed: also let the embedding descend ⟨embed(x), a_0·B_embedᵀ⟩ with one matrix more.
            Off by default, for the reason given at direct feedback alignment.

    The other arguments are those of :class:`Rule`. :meth:`state_dict` returns the matrices and
    kernels. Source: Lillicrap et al., arXiv 1411.0247; 'Beyond Accuracy and Alignment' protocol,
    arXiv 2606.21126.
    """

    name: ClassVar[str] = "fa"
    trains_embed: ClassVar[bool] = False

    def setup(self, generator: torch.Generator) -> None:
        embed_shape, *shapes = self.anatomy.feature_shapes
        targets = [*shapes[1:], (self.anatomy.num_classes,)]

        def draw(shape: tuple[int, ...], above: tuple[int, ...]) -> Tensor:
            sizes: tuple[int, ...] = (math.prod(shape), math.prod(above))
            if len(shape) == 3 and len(above) == 3:
                sizes = (shape[0], above[0], KERNEL_SIZE, KERNEL_SIZE)
            draws = torch.randn(sizes, generator=generator) / math.sqrt(math.prod(sizes[1:]))
            return draws.to(self.like)

        for index, (shape, above) in enumerate(zip(shapes, targets, strict=True)):
            self.tensors[f"feedback.{index}"] = draw(shape, above)
        if self.train_embed:
            self.tensors["embed_feedback"] = draw(embed_shape, shapes[0])

    def block_credit(self, states: ForwardStates) -> list[Tensor]:
        shapes = self.anatomy.feature_shapes[1:]
        features = states.error
        credits = []
        for index in reversed(range(len(shapes))):
            features = send_back(self.tensors[f"feedback.{index}"], features, shapes[index])
            credits.append(self.anatomy.as_state(features.flatten(1), states.hiddens[index + 1]))
        return credits[::-1]

    def embed_credit(self, states: ForwardStates) -> Tensor:
        lowest = self.block_credit(states)[0]
        shapes = self.anatomy.feature_shapes
        features = self.anatomy.features(lowest).unflatten(1, shapes[1])
        credit = send_back(self.tensors["embed_feedback"], features, shapes[0])
        return self.anatomy.as_state(credit.flatten(1), like=states.hiddens[0])


def send_back(feedback: Tensor, credit: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Send credit ``[B, ...]`` one block down, to the features of ``shape``: ``[B, *shape]``.

    ``feedback`` is a matrix ``[prod(shape), features of the credit]``, or a kernel between maps.
    """
    if feedback.dim() == 2:
        flat: Tensor = credit.flatten(1) @ feedback.T
        return flat.reshape(-1, *shape)
    sent = F.conv2d(credit, feedback, padding=KERNEL_SIZE // 2)
    growth = shape[1] * shape[2] / (sent.shape[2] * sent.shape[3])
    enlarged = F.interpolate(sent, size=shape[1:], mode="nearest")
    return enlarged / math.sqrt(growth)
