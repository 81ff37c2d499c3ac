"""Copy what lies beside weights, as the graph it is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from .placeholders import NotLoaded, shown
from .places import TensorPlace

_ATOMS = frozenset({str, int, float, bool, type(None), bytes, complex})
_MOST_NESTED_TUPLES = 100


def copied(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return nested containers with other leaves; what is shared or recursive stays so.

    Args:
        value: dicts, lists and tuples in each other; of any depth, but for tuples in tuples, of
            which the inner ones are left out from some depth on.
        leaf: is given what is neither a container nor a plain value.
    """
    memo: dict[int, Any] = {}
    to_fill: list[tuple[Any, Any]] = []

    def convert(item: Any, depth: int = 0) -> Any:
        kind = type(item)
        if kind in _ATOMS:
            return item
        if id(item) in memo:
            return memo[id(item)]
        new: Any
        if isinstance(item, dict):
            new = OrderedDict() if kind is OrderedDict else {}
            to_fill.append((item, new))
        elif kind is list:
            new = []
            to_fill.append((item, new))
        elif kind is tuple:
            if depth > _MOST_NESTED_TUPLES:
                return NotLoaded("a tuple nested too deeply")
            new = tuple(convert(part, depth + 1) for part in item)
        else:
            new = leaf(item)
        memo[id(item)] = new
        return new

    result = convert(value)
    while to_fill:
        old, new = to_fill.pop()
        if isinstance(new, dict):
            for key, item in old.items():
                new[shown(key)] = convert(item)
        else:
            new.extend(map(convert, old))
    return result


def without_data(value: Any) -> Any:
    """Replace the tensors in nested containers by tensors on the meta device."""
    return copied(value, _on_meta)


def _on_meta(value: Any) -> Any:
    if type(value) is TensorPlace:
        return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")
    if isinstance(value, torch.Tensor):
        return value.detach().to("meta") if value.layout == torch.strided else None
    return shown(value)
