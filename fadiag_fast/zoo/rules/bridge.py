"""The auxiliary network that State Bridge and Credit Bridge share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..residual_contract import Anatomy


def credit_offset(owner: str, anatomy: Anatomy, credit_at: str | None) -> int:
    """Return 0 where block l's credit is read at its input h_l, 1 for its output h_{l+1}.

    Args:
        owner: the rule's name, for messages.
        anatomy: of the model.
        credit_at: "input", "output", or None for the input where there are skips, else the output.

    Raises ValueError for another text, and for "input" without skips: credit has the shape of the
    block's output.
    """
    if credit_at is None:
        credit_at = "input" if anatomy.skip else "output"
    if credit_at not in ("input", "output"):
        raise ValueError(f"{owner}: credit_at: expected input or output, got {credit_at!r}")
    if credit_at == "input" and not anatomy.skip:
        raise ValueError(
            f"{owner}: credit_at: expected output for a model without skips, whose states change "
            f"their shape, got input"
        )
    return 1 if credit_at == "output" else 0


class BridgeNetwork(nn.Module):
    """Compute a function of (h_l, t_l, e): a GELU perceptron with one input layer per state shape.

    Formula: z = R(h_l) + S·(t_l, e), then ``num_layers − 1`` times z ← W·GELU(z). Where all states
    have one shape, R and S together are one linear layer on the concatenation. Its input is not
    normalised: how a bridge fares when the states grow is what the protocol looks at.

    Args:
        shapes: of the features of h_0 … h_L; states of equal shape share the input layer R.
        num_classes: length of the output error e.
        num_outputs: length of the result.
        width: of the hidden layers.
        num_layers: linear layers from input to output, at least 2.
        generator: draws the weights and biases from U(−1, 1)/√fan-in, torch's usual scale.

    ``forward(h, index, error)`` takes the features ``[B, D]`` of h_index, 0 ≤ index ≤ L, and the
    error ``[B, C]``; t = index / L. It returns ``[B, num_outputs]``. Raises ValueError for a width
    below 1 or fewer than two layers.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        num_classes: int,
        num_outputs: int,
        *,
        width: int,
        num_layers: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if width < 1 or num_layers < 2:
            raise ValueError(
                "BridgeNetwork: expected a width of at least 1 and num_layers of at least 2, "
                f"got {width} and {num_layers}"
            )
        distinct = list(dict.fromkeys(shapes))
        self.reader_of = [distinct.index(shape) for shape in shapes]
        self.condition = _linear(1 + num_classes, width, generator)
        self.readers = nn.ModuleList(
            _linear(math.prod(shape), width, generator) for shape in distinct
        )
        sizes = [width] * (num_layers - 1) + [num_outputs]
        self.layers = nn.ModuleList(
            _linear(inputs, outputs, generator) for inputs, outputs in pairwise(sizes)
        )

    def forward(self, h: Tensor, index: int, error: Tensor) -> Tensor:
        time = h.new_full((h.shape[0], 1), index / (len(self.reader_of) - 1))
        z: Tensor = self.readers[self.reader_of[index]](h)
        z = z + self.condition(torch.cat([time, error], dim=1))
        for layer in self.layers:
            z = layer(F.gelu(z))
        return z


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    # Without torch's own initialisation, which would draw from the global generator.
    layer = cast(nn.Linear, nn.utils.skip_init(nn.Linear, inputs, outputs))
    bound = 1 / math.sqrt(inputs)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
