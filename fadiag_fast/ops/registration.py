"""Teach torch the operators' shapes and batching rules."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import validation as checks
from .native import NATIVE_DEVICES, OPERATORS


def _register_rules() -> None:
    """Teach torch the operators' shapes and batching rules, and that none has a gradient."""
    library = torch.library.Library("fadiag", "IMPL")
    for name in OPERATORS:
        # Without this the outputs would claim to be differentiable and yield no gradient.
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    _register_rules.library = library  # type: ignore[attr-defined]  # a Library ends with its object

    @torch.library.register_fake("fadiag::layer_statistics")
    def _(
        hiddens: Sequence[Tensor],
        grads: Sequence[Tensor],
        stacked: bool = False,
        without_mean: Sequence[int] = (),
    ) -> Tensor:
        checks.check_statistics_input(hiddens, grads, stacked)
        batch_dims = 2 if stacked else 1
        *stack, rows = hiddens[0].shape[:batch_dims]
        wide = hiddens[0].dtype == torch.float64
        width = sum(
            math.prod(hidden.shape[batch_dims:])
            for layer, hidden in enumerate(hiddens)
            if layer not in without_mean
        )
        width = width + (2 if wide else 4) * len(hiddens) * rows
        if stacked and not wide:
            width = width + width % 2
        dtype = torch.float64 if wide else torch.float32
        return grads[0].new_empty((*stack, width), dtype=dtype)

    @torch.library.register_fake("fadiag::direction_cosines")
    def _(grad_means: Sequence[Tensor], num_batches: int, stacked: bool = False) -> Tensor:
        stack = grad_means[0].shape[:1] if stacked else ()
        layers = len(grad_means) // num_batches
        return grad_means[0].new_empty(
            (*stack, layers, num_batches, num_batches), dtype=torch.float64
        )

    @torch.library.register_fake("fadiag::step_row")
    def _(*_: Any) -> None:
        return None

    @torch.library.custom_op("fadiag::reinterpret_as_double", mutates_args=())
    def reinterpret(words: Tensor) -> Tensor:
        return words.view(torch.float64).clone()

    @reinterpret.register_fake
    def _(words: Tensor) -> Tensor:
        return words.new_empty((*words.shape[:-1], words.shape[-1] // 2), dtype=torch.float64)

    @torch.library.register_vmap("fadiag::reinterpret_as_double")
    def _(info: Any, in_dims: Any, words: Tensor) -> tuple[Tensor, int]:
        return reinterpret(words.movedim(in_dims[0], 0)), 0

    @torch.library.register_vmap("fadiag::layer_statistics")
    def _(
        info: Any,
        in_dims: Any,
        hiddens: Sequence[Tensor],
        grads: Sequence[Tensor],
        stacked: bool = False,
        without_mean: Sequence[int] = (),
    ) -> tuple[Tensor, int]:
        hidden_dims, grad_dims = in_dims[:2]
        packed = statistics_op(
            _stack(hiddens, hidden_dims, info.batch_size, stacked),
            _stack(grads, grad_dims, info.batch_size, stacked),
            True,
            without_mean,
        )
        return (packed.unflatten(0, (info.batch_size, -1)) if stacked else packed), 0

    @torch.library.register_vmap("fadiag::direction_cosines")
    def _(
        info: Any,
        in_dims: Any,
        grad_means: Sequence[Tensor],
        num_batches: int,
        stacked: bool = False,
    ) -> tuple[Tensor, int]:
        cosines = cosines_op(
            _stack(grad_means, in_dims[0], info.batch_size, stacked), num_batches, True
        )
        return (cosines.unflatten(0, (info.batch_size, -1)) if stacked else cosines), 0


def _stack(
    tensors: Sequence[Tensor], dims: Sequence[int | None], size: int, stacked: bool
) -> list[Tensor]:
    """Bring vmap's dimension to the front, without a copy; merge it with a stack that is there."""
    moved = [
        tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, dims, strict=True)
    ]
    return [tensor.flatten(0, 1) for tensor in moved] if stacked else moved


if "cpu" in NATIVE_DEVICES:
    _register_rules()
    # Bound once: looking an overload up costs as much as a small kernel.
    statistics_op = torch.ops.fadiag.layer_statistics.default
    cosines_op = torch.ops.fadiag.direction_cosines.default
    step_row_op = torch.ops.fadiag.step_row.default
