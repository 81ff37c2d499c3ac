"""State Bridge: credit through a learned prediction of the last hidden state."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import ForwardStates, Rule
from .bridge import BridgeNetwork


class StateBridge(Rule):
    """Train the blocks with the gradient through a network that predicts h_L from their output.

    Formulas, per sample: a_l = ∂/∂h CE(head(norm(G(h, t_{l+1}, e))), y) at h = h_{l+1}, with
    t_l = l/L and e = softmax − onehot, held fixed. G learns from the forward pass beside the
    blocks: it descends the mean over l = 1 … L and over the batch of ‖G(h_l, t_l, e) − h_L‖² / D,
    D the number of features, all states detached. Block l descends mean_b ⟨f_l(h_l), a_l⟩, norm
    and head descend mean_b CE_b at the true h_L.

    Choices where the protocol is open: G is a GELU perceptron on the raw states (see
    :class:`~fadiag_fast.zoo.rules.bridge.BridgeNetwork`), shared by all layers, learns by the
    model's optimiser at the model's learning rate, and predicts h_L from h_L too, so that the last
    block gets its credit as the others do. In a transformer "state" means the class token, in a
    convolutional network the flattened map.

    Args:
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
        self, model: nn.Module, *, width: int = 256, num_layers: int = 3, **common: Any
    ) -> None:
        self.width, self.num_layers = width, num_layers
        super().__init__(model, **common)

    def setup(self, generator: torch.Generator) -> None:
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

    @property
    def first_predicted(self) -> int:
        """Index of the lowest state that gets credit: h_0 where the embedding learns."""
        return 0 if self.train_embed else 1

    def block_credit(self, states: ForwardStates) -> list[Tensor]:
        return [self._credit_at(index, states) for index in range(1, len(states.hiddens))]

    def embed_credit(self, states: ForwardStates) -> Tensor:
        return self._credit_at(0, states)

    def _credit_at(self, index: int, states: ForwardStates) -> Tensor:
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
            if index >= self.first_predicted
        ]
        return torch.stack(losses).mean()
