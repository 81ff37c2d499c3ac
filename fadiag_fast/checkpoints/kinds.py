"""Which kinds of numbers may become which."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def wrong_kind(source: Tensor, target: Tensor) -> str:
    """Return why values of one tensor cannot be another's, '' if they can.

    Floating-point numbers become others if they stay in range, all other numbers if they stay the
    same. What a whole number stands for as a weight only the code that wrote it knows.
    """
    refusal = f"expected {_kind(target)}, got {_kind(source)}"
    if source.layout != target.layout or source.is_nested != target.is_nested:
        return refusal
    if source.dtype == target.dtype:
        return ""
    if source.is_quantized or target.is_quantized:
        return refusal
    if source.dtype.is_complex != target.dtype.is_complex:
        return refusal
    if target.dtype.is_floating_point and not source.dtype.is_floating_point:
        return refusal
    try:
        if target.dtype.is_floating_point or target.dtype.is_complex:
            lost = _leaves_the_range(source, target.dtype)
        else:
            lost = _changes(source, target.dtype)
    except (RuntimeError, TypeError):  # a type that torch can only store
        return refusal
    return f"{refusal} with values that it cannot hold" if lost else ""


def may_round(source: torch.dtype, target: torch.dtype) -> bool:
    """Return whether floating-point numbers of one type may be rounded in another."""
    if source == target or not (source.is_floating_point and target.is_floating_point):
        return False
    from_, to = torch.finfo(source), torch.finfo(target)
    return from_.eps < to.eps or from_.tiny < to.tiny


def _kind(tensor: Tensor) -> str:
    return (
        f"{tensor.dtype}" if tensor.layout == torch.strided else f"{tensor.dtype} {tensor.layout}"
    )


def _leaves_the_range(source: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a finite number is larger than any of another type."""
    most = torch.finfo(dtype).max
    if most >= torch.finfo(source.dtype).max:
        return False
    values = torch.view_as_real(source.resolve_conj()) if source.is_complex() else source
    # Compared in a type that can hold the limit.
    values = values.float() if values.element_size() < 4 else values
    return bool(((values.abs() > most) & values.isfinite()).any())


def _changes(source: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a number is another one as a whole number or truth value."""
    converted = source.to(dtype)
    # A changed sign comes back as it was.
    sign = (source < 0) != (converted < 0)
    return bool((sign | (converted.to(source.dtype) != source)).any())


class KindsChecked(TorchFunctionMode):
    """Refuse to copy numbers of another kind into a tensor, whoever copies them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.copy_ and len(args) > 1 and isinstance(args[1], Tensor):
            target, source = args[:2]
            wrong = "" if target.is_meta or source.is_meta else wrong_kind(source, target)
            if wrong:
                raise ValueError(wrong)
        return func(*args, **(kwargs or {}))
