"""Find the outputs to differentiate, and reduce a loss over samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .points import TapError

Loss = Callable[[Any, Any], Tensor]


Output = str | int | Callable[[Any], Tensor]


def classification_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy over samples, or over tokens where there is a label for each.

    Args:
        logits: ``[B, C]``; ``[B, T, C]`` with labels ``[B, T]``; or ``[B, C, ...]`` with
            ``[B, ...]``.
        y: class indices (−100 is left out), or probabilities shaped like the logits.
    """
    if logits.dim() == 3 and y.shape == logits.shape[:-1]:
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    return nn.functional.cross_entropy(logits, y)


def _first_output(value: object) -> Tensor | None:
    """Return the first floating tensor that is no number, as a loss is; one at the top first."""
    if isinstance(value, Mapping):
        items = [item for key, item in value.items() if "loss" not in str(key).lower()]
    elif isinstance(value, tuple | list):
        items = list(value)
    else:
        items = list(vars(value).values()) if hasattr(value, "__dataclass_fields__") else []
    direct = (item for item in items if isinstance(item, Tensor) and item.dim())
    for item in direct:
        if item.is_floating_point() or item.is_complex():
            return item
    inner = (_first_output(item) for item in items if not isinstance(item, Tensor))
    return next((found for found in inner if found is not None), None)


def output_of(output: Any, choose: Output | None) -> Tensor | None:
    """Return the tensor of a model's output that counts as its logits; None where it has none.

    A tensor is taken itself; else ``logits``, ``out``, ``last_hidden_state`` or the first floating
    tensor. A number, such as a loss, is never taken. ``choose`` names an attribute, key or index
    instead, or computes the tensor.

    Raises:
        TapError: there is no tensor where ``choose`` says.
    """
    if choose is not None:
        return choose_output(output, choose)
    if isinstance(output, Tensor):
        return output if output.dim() else None
    for name in ("logits", "out", "last_hidden_state"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor) and found.dim():
            return found
    return _first_output(output)


def loss_in(output: Any) -> Any:
    """Return the loss that a model returns: ``loss``, the first number, or the sum of a dict's."""
    if isinstance(output, Tensor):
        return output if output.dim() == 0 else None
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found
    numbers = [
        value
        for value in (output.values() if isinstance(output, Mapping) else ())
        if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()
    ]
    if numbers and len(numbers) == len(output):  # the parts of a detector's loss
        return torch.stack(numbers).sum()
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0] if output[0].dim() == 0 else None
    return found


def choose_output(output: Any, choose: Output | None) -> Tensor:
    """Return the tensor that counts as logits as :func:`output_of` does.

    Raises:
        TapError: there is none.
    """
    found: Any = None
    if callable(choose):
        found = choose(output)
    elif choose is not None:
        try:
            found = (
                output[choose] if not hasattr(output, str(choose)) else getattr(output, str(choose))
            )
        except (KeyError, IndexError, TypeError):
            found = None
    else:
        found = output_of(output, None)
    if not isinstance(found, Tensor):
        keys = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        asked = f" at output={choose!r}" if choose is not None else " or something with logits"
        raise TapError(
            f"output: expected the model to return a tensor{asked}, got "
            f"{type(output).__name__}{keys}"
        )
    return found


def sample_rows(logits: Tensor, samples: int, batch_dim: int, name: str) -> Tensor:
    """Return logits or their gradients with a row for each sample.

    Args:
        logits: as the model returns them.
        samples: how many samples the states count along ``batch_dim``.
        batch_dim: the dimension of the states that counts samples.
        name: of the model, for the message.

    Raises:
        TapError: no dimension counts the samples.
    """
    shape = logits.shape
    # Logits [B, C] of states [T, B, D] are by sample already; [T, B, C] are not.
    fits = -len(shape) <= batch_dim < len(shape) and shape[batch_dim] == samples
    if fits and (len(shape) > 2 or shape[0] != samples):
        # Not moved where it stands first already: a compiler takes even that for a permutation, and
        # would read the gradient of the logits once more for their norm.
        return logits.movedim(batch_dim, 0) if batch_dim else logits
    if shape and shape[0] == samples:
        return logits
    if shape and samples and shape[0] % samples == 0 and batch_dim in (0, 1):
        positions = shape[0] // samples  # [B·T, C], or [T·B, C] of states [T, B, D]
        order = (positions, samples) if batch_dim else (samples, positions)
        return logits.reshape(*order, *shape[1:]).movedim(batch_dim, 0)
    raise TapError(
        f"{name}: output: expected logits with a row for each of {samples} samples, got shape "
        f"{list(shape)}; choose them by output=, or say batch_dim= if the states count samples "
        f"elsewhere than in dimension {batch_dim}"
    )


def by_sample(state: Tensor, batch_dim: int) -> Tensor:
    return state if batch_dim == 0 else state.movedim(batch_dim, 0)
