"""Decide where a network is observed.

A network that follows the residual contract has ``embed``, ``blocks``, an optional ``out_ln`` and
``out_head``: the hidden states are the embedding's output h_0 and the state after every block. What
``blocks[l](h)`` returns, the branch that its caller adds to h or the full next state, is not
written anywhere; it is found by comparing the logits that either reading gives with ``model(x)``.
A network without these attributes may offer ``model(x, return_hidden=True)`` instead.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Style = Literal["branch", "state", "return_hidden"]

_ATTRIBUTES = ("embed", "blocks", "out_head")
# What two runs of the same operations may differ by, relative to the largest logit: the model may
# fuse or order them otherwise. A wrong reading of the blocks is off by the order of one.
_LOGIT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_COARSE_TOLERANCE = 5e-2


class ContractError(ValueError):
    """Report a network whose hidden states cannot be found."""


@dataclass(frozen=True)
class Taps:
    """Where the hidden states of a network are.

    Attributes:
        style: how they are read: ``blocks`` return branches or states, or ``return_hidden=True``.
        names: one per hidden state, for the report.
    """

    style: Style
    names: tuple[str, ...]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile`` and (Distributed)DataParallel wrappers."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def tensor_from(value: object, where: str) -> Tensor:
    """Return a value that must be one tensor."""
    if not isinstance(value, Tensor):
        raise ContractError(f"{where}: expected one tensor, got {type(value).__name__}")
    return value


def steps_of(model: nn.Module, style: Style) -> list[Callable[[Tensor], Tensor]]:
    """Return the functions h_l → h_{l+1} of a network with ``blocks``, then h_L → logits."""
    module: Any = model

    def step(index: int) -> Callable[[Tensor], Tensor]:
        def run(h: Tensor) -> Tensor:
            out = tensor_from(module.blocks[index](h), f"blocks.{index}")
            return h + out if style == "branch" else out

        return run

    def head(h: Tensor) -> Tensor:
        if getattr(module, "out_ln", None) is not None:
            h = module.out_ln(h)
        return tensor_from(module.out_head(h), "out_head")

    return [*(step(index) for index in range(len(module.blocks))), head]


def _logits(model: Any, style: Style, x: Tensor) -> Tensor:
    state = tensor_from(model.embed(x), "embed")
    for step in steps_of(model, style):
        state = step(state)
    return state


def _largest_difference(a: Tensor, b: Tensor) -> float:
    """Return max|a - b| relative to max|b|, over the elements in which b is finite."""
    if a.shape != b.shape:
        return float("inf")
    finite = b.isfinite()
    if not finite.any():
        return float("nan")
    a, b = a[finite].double(), b[finite].double()
    scale = float(b.abs().max())
    return float((a - b).abs().max()) / scale if scale > 0 else float((a - b).abs().max())


def find_taps(model: nn.Module, x: Tensor) -> Taps:
    """Find the hidden states of a network in eval mode, with forward passes on ``x`` alone.

    Args:
        model: an unwrapped module; its forward takes ``x``.
        x: any input batch that the model accepts.

    Raises:
        ContractError: the attributes are missing, or neither reading of ``blocks`` reproduces
            ``model(x)``; the message shows both differences.
    """
    missing = [name for name in _ATTRIBUTES if not hasattr(model, name)]
    offers_hidden = "return_hidden" in inspect.signature(model.forward).parameters
    if missing and not offers_hidden:
        raise ContractError(
            f"{type(model).__name__}: expected the attributes embed, blocks and out_head (and "
            f"optionally out_ln), or a forward with return_hidden=True; missing: "
            f"{', '.join(missing)}"
        )
    with torch.no_grad():
        if missing:
            return _handed_taps(model, x)
        expected = tensor_from(model(x), f"{type(model).__name__}.forward")
        differences: dict[Style, float | str] = {}
        for style in ("branch", "state"):
            try:
                differences[style] = _largest_difference(_logits(model, style, x), expected)
            except ContractError:
                raise
            except RuntimeError as error:
                # Branch and stream of different shape cannot be added, for example.
                differences[style] = str(error).splitlines()[0]
    blocks: Any = model.blocks
    names = ("embed", *(f"blocks.{index}" for index in range(len(blocks))))
    numbers = {s: d for s, d in differences.items() if isinstance(d, float)}
    if any(d != d for d in numbers.values()):
        # No logit is finite, so none can tell; nor does any later figure depend on the answer.
        return Taps("branch", names)
    tolerance = _LOGIT_TOLERANCE.get(expected.dtype, _COARSE_TOLERANCE)
    best = min(numbers, key=lambda style: numbers[style], default=None)
    if best is None or not numbers[best] <= tolerance:
        if offers_hidden:
            with torch.no_grad():
                return _handed_taps(model, x)
        shown = "; ".join(
            f"as {style}: {d:.3g}" if isinstance(d, float) else f"as {style}: {d}"
            for style, d in differences.items()
        )
        raise ContractError(
            f"{type(model).__name__}: expected embed, blocks, out_ln and out_head to reproduce "
            f"model(x) within {tolerance:g} of the largest logit, with blocks as branches or as "
            f"states; got differences {shown}"
        )
    return Taps(best, names)


def _handed_taps(model: nn.Module, x: Tensor) -> Taps:
    _, hiddens = split_hidden(model(x, return_hidden=True), type(model).__name__)
    return Taps("return_hidden", tuple(f"hidden {i}" for i in range(len(hiddens))))


def split_hidden(output: object, where: str) -> tuple[Tensor, list[Tensor]]:
    """Split what ``model(x, return_hidden=True)`` returned into logits and hidden states."""
    if not isinstance(output, tuple | list) or len(output) != 2:
        raise ContractError(
            f"{where}: expected (logits, hiddens) from return_hidden=True, "
            f"got {type(output).__name__}"
        )
    logits, hiddens = output
    if not isinstance(hiddens, tuple | list) or len(hiddens) == 0:
        raise ContractError(
            f"{where}: expected a non-empty list of hidden states from return_hidden=True, "
            f"got {type(hiddens).__name__}"
            + (" of length 0" if isinstance(hiddens, tuple | list) else "")
        )
    states = [tensor_from(h, f"{where}: hidden {i}") for i, h in enumerate(hiddens)]
    return tensor_from(logits, f"{where}: logits"), states
