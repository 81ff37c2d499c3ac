"""What a scan's figures depend on beside the weights, for its configuration's hash.

Two scans with equal configurations may take over each other's rows, in whatever process they run:
so it says what networks, losses and other functions do, and not where they stand in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..capture.reduction import SampleReduction
from .hashing import ContentHasher


def configuration(
    model: nn.Module,
    batches: Sequence[Any],
    taps: Sequence[str],
    loss: Any,
    how: SampleReduction,
    *,
    output: Any,
    batch_dim: int,
    key: str | None = None,
) -> dict[str, Any]:
    """Return all that decides the figures of given weights, but for rounding.

    Args:
        model: the architecture; its weights count by name, shape and dtype only.
        batches: (x, y), by their bytes.
        taps: where the network is observed.
        loss: a function or an object; None for cross-entropy.
        how: what a sample is.
        output, batch_dim, key: see :func:`fadiag_fast.scan`.
    """
    hasher = ContentHasher()
    for leaf in tree_leaves(batches):
        if isinstance(leaf, Tensor):
            hasher.update(_bytes(leaf))
    weights = (*model.named_parameters(), *model.named_buffers())
    return {
        "model": type(model).__name__,
        "weights": [[name, list(t.shape), str(t.dtype)] for name, t in weights],
        "batches": hasher.result(),
        "network": network_hash(model),
        "taps": [*taps],
        "loss": "cross-entropy" if loss is None else described(loss),
        "reduction": how.kind,
        "feature_dim": how.feature_dim,
        "output": described(output),
        "batch_dim": batch_dim,
        # Without one a configuration is what it was before there was one.
        **({} if key is None else {"key": key}),
    }


def network_hash(model: nn.Module) -> str:
    """Return a hash of what modules do with their weights: their code and their plain settings."""
    hasher = ContentHasher()
    for name, module in model.named_modules():
        kind = type(module)
        foreign = ("torch.", "builtins")
        own = [base for base in kind.__mro__ if not base.__module__.startswith(foreign)]
        known = [_settings(base) for base in own], _settings(module)
        hasher.update(repr((name, kind.__module__, kind.__qualname__, known)).encode())
    return hasher.result()


def _settings(holder: Any) -> list[tuple[str, str]]:
    """Return the plain values and the functions that a module or a class holds."""
    found = []
    for key, value in sorted(vars(holder).items()):
        plain = not key.startswith("_") and key != "training" and _is_plain(value)
        if plain or hasattr(value, "__code__") or isinstance(value, BuiltinFunctionType):
            found.append((key, described(value)))
    return found


def _is_plain(value: Any) -> bool:
    """Return whether a value's text says all of it."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, str | bytes | int | float | bool | None)


def described(value: Any, depth: int = 5) -> str:
    """Return what a value is and does, as text that is the same in every process.

    Of a function these are its code, its defaults and what it closes over, of a tensor its bytes,
    of an object its class and what it holds; of what is nested deeper it is the type.
    """
    kind = type(value)
    name = str(getattr(value, "__qualname__", kind.__qualname__))
    if _is_plain(value):
        return repr(value)
    if isinstance(value, Tensor):
        return _hashed(name, (str(value.dtype), [*value.shape], _bytes(value).hex()))
    if depth == 0 or isinstance(value, type | BuiltinFunctionType):
        return name
    if isinstance(value, tuple | list):
        held = [*value]
    elif isinstance(value, Mapping):
        held = [part for item in value.items() for part in item]
    elif isinstance(value, partial):
        held = [value.func, value.args, value.keywords]
    elif (code := getattr(value, "__code__", None)) is not None:
        cells = getattr(value, "__closure__", None) or ()
        held = [*map(_content, cells), *(value.__defaults__ or ()), value.__kwdefaults__]
        held = [_code(code), *held, getattr(value, "__self__", None)]
    elif isinstance(value, nn.Module):
        held = [network_hash(value), {**value.state_dict()}]
    else:
        calls = (vars(base).get("__call__") for base in kind.__mro__)
        held = [next(filter(None, calls), None), getattr(value, "__dict__", None)]
    return _hashed(name, [described(part, depth - 1) for part in held])


def _hashed(name: str, parts: Any) -> str:
    hasher = ContentHasher()
    hasher.update(repr(parts).encode())
    return f"{name} {hasher.result()}"


def _bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, in the order of its elements."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty: a name that is bound later
        return None


def _code(code: Any) -> tuple[Any, ...]:
    """Return what a function does, without where it stands."""
    consts = (_code(c) if hasattr(c, "co_code") else _constant(c) for c in code.co_consts)
    return (code.co_code.hex(), code.co_names, *consts)


def _constant(value: Any) -> str:
    # A set of texts has another order in every process.
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)
