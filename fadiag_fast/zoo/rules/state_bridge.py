"""State Bridge: credit through a learned prediction of the last hidden state."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import ForwardStates, Rule
from .bridge import BridgeNetwork, credit_offset


class StateBridge(Rule):
    """Train the blocks with the gradient through a network that predicts h_L from a state.

    Formulas, per sample: a_l = ∂/∂h CE(head(norm(G(h, t_l, e))), y) at h = h_l, with t_l = l/L and
    e = softmax − onehot, held fixed. G learns from the forward pass beside the blocks, all states
    detached: it descends ‖G(h_l, t_l, e) − h_L‖² / D, D the number of features, in the mean over
    the batch and the states at which G is read. Block l descends mean_b ⟨f_l(h_l), a_l⟩, norm and
    head descend mean_b CE_b at the true h_L.

    **Where G is read decides the verdict.** The protocol's formula reads it at h_l, the INPUT of
    block l, though what the block adds is felt at h_{l+1}. Block 0, whose input does not grow with
    what G has to predict, then inflates the stream of a ResidualMLP, as the protocol reports. Read
    at the block's OUTPUT, which ``credit_at`` can ask for, the stream stays bounded, and so it does
    in SmallCNN, where without skips the shapes leave no other place and the protocol reports a
    healthy growth too. The width of G and its number of layers do not change the verdict.

    Choices where the protocol is open: G is a GELU perceptron on the raw states (see
    :class:`~fadiag_fast.zoo.rules.bridge.BridgeNetwork`), shared by all layers, and learns by the
    model's optimiser at the model's learning rate. In a transformer "state" means the class token,
    in a convolutional network the flattened map.

    Args:
        credit_at: "input" or "output" of block l; None takes the input where there are skips.
        width: of G's hidden layers.
        num_layers: of G, from input to output.
        train_embed: also let the embedding descend ⟨embed(x), a⟩ with the credit at h_0. Off by
            default, for the reason given at direct feedback alignment.

    The other arguments are those of :class:`Rule`. :meth:`state_dict` returns G's weights. Source:
    'Beyond Accuracy and Alignment' protocol, arXiv 2606.21126 (width 256, 3 layers, lr 1e-3).
    """

    name: ClassVar[str] = "state-bridge"
    trains_embed: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        *,
        credit_at: str | None = None,
        width: int = 256,
        num_layers: int = 3,
        **common: Any,
    ) -> None:
        self.credit_at = credit_at
        self.width, self.num_layers = width, num_layers
        super().__init__(model, **common)

    def setup(self, generator: torch.Generator) -> None:
        self.offset = credit_offset("StateBridge", self.anatomy, self.credit_at)
        self.networks["predictor"] = BridgeNetwork(
            self.anatomy.feature_shapes,
            self.anatomy.num_classes,
            self.anatomy.feature_counts[-1],
            width=self.width,
            num_layers=self.num_layers,
            generator=generator,
        )

    @property
    def predictor(self) -> BridgeNetwork:
        return cast(BridgeNetwork, self.networks["predictor"])

    def block_credit(self, states: ForwardStates) -> list[Tensor]:
        return [self._gradient_at(index + self.offset, states) for index in range(len(self.blocks))]

    def embed_credit(self, states: ForwardStates) -> Tensor:
        return self._gradient_at(0, states)

    def _gradient_at(self, index: int, states: ForwardStates) -> Tensor:
        with torch.enable_grad():
            h = self.anatomy.features(states.hiddens[index]).detach().requires_grad_()
            predicted = self.predictor(h, index, states.error)
            logits = self.anatomy.logits(self.anatomy.as_state(predicted, states.hiddens[-1]))
            # The sum, so that row b of the gradient is sample b's own.
            loss = F.cross_entropy(logits, states.labels, reduction="sum")
        (credit,) = torch.autograd.grad(loss, [h])
        return self.anatomy.as_state(credit, like=states.hiddens[index])

    def auxiliary_loss(self, states: ForwardStates) -> Tensor:
        last = self.anatomy.features(states.hiddens[-1])
        losses = [
            F.mse_loss(self.predictor(self.anatomy.features(h), index, states.error), last)
            for index, h in enumerate(states.hiddens)
            if 0 <= index - self.offset < len(self.blocks) or (index == 0 and self.train_embed)
        ]
        return torch.stack(losses).mean()
