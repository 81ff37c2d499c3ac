"""What one capture returns: states, gradients, and how the samples lie in them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn


class Captured(NamedTuple):
    """One batch, seen from inside.

    Attributes:
        hiddens: one per tap, ``[B, ...]`` each.
        grads: the gradients of the loss at ``hiddens``, same shapes and dtypes. A loss with mean
            reduction puts the factor 1/B into them.
        logits: the network's output, or the tensor chosen from it; what goes into a softmax or the
            like where it ends in one. Of a network that has no output with a row for each sample,
            the last hidden state.
        logit_grads: the gradient of the loss at ``logits``.
        loss: scalar.
    """

    hiddens: list[Tensor]
    grads: list[Tensor]
    logits: Tensor
    logit_grads: Tensor
    loss: Tensor


NO_GRADIENT = "autograd kernel was not registered"


class Held(nn.Module):
    """A model in which something is done while its parameters are replaced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, do: Callable[[], Any]) -> Any:
        return do()
