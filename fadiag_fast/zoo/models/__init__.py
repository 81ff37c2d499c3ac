"""Small networks of the kind the protocol audits, and a registry that builds them by name.

The residual networks have three attributes, ``embed``, ``blocks`` and ``out_head``, and may have a
fourth, ``out_ln``; ``blocks[l](h)`` returns only the branch f_l(h), and whoever calls it adds the
skip: h_{l+1} = h_l + f_l(h_l). A network of another build says in its attribute ``anatomy`` how it
is read: see :mod:`fadiag_fast.zoo.residual_contract`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..._common.process import DEFAULT_GENERATORS
from .cnn import SmallCNN
from .residual import ResidualBlock, ResidualMLP, StudentNet
from .vit import TransformerBlock, ViTMini

__all__ = [
    "MODELS",
    "ModelSpec",
    "ResidualBlock",
    "ResidualMLP",
    "SmallCNN",
    "StudentNet",
    "TransformerBlock",
    "ViTMini",
    "build_model",
    "model_spec",
]


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


def _build_student(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    d_hidden: int = 128,
    num_blocks: int = 4,
) -> StudentNet:
    return StudentNet(math.prod(input_shape), num_classes, d_hidden, num_blocks)


MODELS: dict[str, ModelSpec] = {
    "resmlp": ModelSpec("resmlp", _build_residual_mlp, flatten_input=True),
    "smallcnn": ModelSpec("smallcnn", SmallCNN, flatten_input=False),
    "student": ModelSpec("student", _build_student, flatten_input=True),
    "vit-mini": ModelSpec("vit-mini", ViTMini, flatten_input=False),
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
        name: short name, a key of ``MODELS``: "resmlp", "smallcnn", "student" or "vit-mini".
        input_shape: shape of ONE sample, for example ``(1, 28, 28)``.
        num_classes: number of logits.
        seed: draw the initial weights from this seed and leave torch's random state as it was;
            ``None`` draws them from torch's current random state.
        options: keyword options of that model ("resmlp": d_hidden, num_blocks, terminal_norm;
            "smallcnn": channels, d_hidden; "student": d_hidden, num_blocks; "vit-mini": d_hidden,
            num_blocks, num_heads, mlp_ratio, patch_size).

    Returns the module in float32 on the CPU. Raises ValueError for an unknown name (the message
    lists those that exist) or a size that does not fit, and TypeError for an option the model does
    not have.
    """
    spec = model_spec(name)
    with DEFAULT_GENERATORS:
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
