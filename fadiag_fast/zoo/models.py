"""Small networks of the kind the protocol audits, and a registry that builds them by name.

A network that the training rules of :mod:`fadiag_fast.zoo.rules` can train has three attributes,
``embed``, ``blocks`` and ``out_head``, and may have a fourth, ``out_ln``. ``blocks[l](h)`` returns
only the branch f_l(h); whoever calls it adds the skip: h_{l+1} = h_l + f_l(h_l).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

# A branch this small leaves a fresh network close to the identity: cos(h_L, h_0) is about .98.
BRANCH_INIT_STD = 0.01


class ResidualBlock(nn.Module):
    """Compute the branch f(h) = W2·GELU(W1·LN(h)) of one pre-LayerNorm residual block.

    Args:
        dim: width d of the residual stream; both weights are [d, d].

    ``forward`` takes ``[B, d]`` and returns ``[B, d]`` in the parameters' dtype, WITHOUT the skip.
    W2 starts as N(0, 0.01²) with a zero bias. Source: 'Beyond Accuracy and Alignment' protocol,
    arXiv 2606.21126.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(dim)
        self.w1 = nn.Linear(dim, dim)
        self.w2 = nn.Linear(dim, dim)
        nn.init.normal_(self.w2.weight, std=BRANCH_INIT_STD)
        nn.init.zeros_(self.w2.bias)

    def forward(self, h: Tensor) -> Tensor:
        return cast(Tensor, self.w2(nn.functional.gelu(self.w1(self.ln(h)))))


class ResidualMLP(nn.Module):
    """Build the protocol's pre-LayerNorm residual MLP.

    Args:
        input_dim: features of one flattened input sample.
        d_hidden: width d of the residual stream.
        num_classes: number of logits C.
        num_blocks: number of residual blocks L.
        terminal_norm: normalise h_L before the head. ``False`` leaves the attribute ``out_ln`` out
            altogether, as in the protocol's control without a terminal norm.

    ``forward`` takes ``[B, input_dim]`` and returns logits ``[B, num_classes]`` in the parameters'
    dtype. Raises ValueError for a size below 1 or an input of another shape. Source: 'Beyond
    Accuracy and Alignment' protocol, arXiv 2606.21126 (audit size d = 256, L = 4).
    """

    def __init__(
        self,
        input_dim: int,
        d_hidden: int,
        num_classes: int,
        num_blocks: int,
        terminal_norm: bool = True,
    ) -> None:
        super().__init__()
        sizes = {
            "input_dim": input_dim,
            "d_hidden": d_hidden,
            "num_classes": num_classes,
            "num_blocks": num_blocks,
        }
        for size_name, size in sizes.items():
            if size < 1:
                raise ValueError(f"ResidualMLP: expected {size_name} of at least 1, got {size}")
        self.embed = nn.Linear(input_dim, d_hidden)
        self.blocks = nn.ModuleList(ResidualBlock(d_hidden) for _ in range(num_blocks))
        if terminal_norm:
            self.out_ln = nn.LayerNorm(d_hidden)
        self.out_head = nn.Linear(d_hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.embed.in_features:
            raise ValueError(
                f"ResidualMLP: expected an input of shape [B, {self.embed.in_features}], "
                f"got {list(x.shape)}"
            )
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        if hasattr(self, "out_ln"):
            h = self.out_ln(h)
        return cast(Tensor, self.out_head(h))


@dataclass(frozen=True)
class ModelSpec:
    """Describe one model of the registry.

    Attributes:
        name: the short name.
        builder: called as ``builder(input_shape, num_classes, **options)``; returns the module.
        flatten_input: whether the model takes ``[B, D]`` rather than ``[B, C, H, W]``.
    """

    name: str
    builder: Callable[..., nn.Module]
    flatten_input: bool


def _build_residual_mlp(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    d_hidden: int = 256,
    num_blocks: int = 4,
    terminal_norm: bool = True,
) -> ResidualMLP:
    return ResidualMLP(math.prod(input_shape), d_hidden, num_classes, num_blocks, terminal_norm)


MODELS: dict[str, ModelSpec] = {
    "resmlp": ModelSpec("resmlp", _build_residual_mlp, flatten_input=True),
}


def model_spec(name: str) -> ModelSpec:
    """Look up a model of the registry by its short name.

    Raises ValueError that lists the names that exist.
    """
    try:
        return MODELS[name]
    except KeyError:
        known = ", ".join(sorted(MODELS))
        raise ValueError(f"build_model: expected one of {known}, got {name!r}") from None


def build_model(
    name: str,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    seed: int | None = None,
    **options: object,
) -> nn.Module:
    """Build a model of the registry for inputs of one shape.

    Args:
        name: short name, a key of ``MODELS`` ("resmlp").
        input_shape: shape of ONE sample, for example ``(1, 28, 28)``.
        num_classes: number of logits.
        seed: draw the initial weights from this seed and leave torch's random state as it was;
            ``None`` draws them from torch's current random state.
        options: keyword options of that model ("resmlp": d_hidden, num_blocks, terminal_norm).

    Returns the module in float32 on the CPU. Raises ValueError for an unknown name (the message
    lists those that exist) and TypeError for an option the model does not have.
    """
    spec = model_spec(name)
    if seed is None:
        return spec.builder(input_shape, num_classes, **options)
    # Modules draw from the default CPU generator. Only that one is seeded and put back:
    # torch.manual_seed would also reset every accelerator's generator.
    generator = torch.default_generator
    state = generator.get_state()
    try:
        generator.manual_seed(seed)
        return spec.builder(input_shape, num_classes, **options)
    finally:
        generator.set_state(state)
