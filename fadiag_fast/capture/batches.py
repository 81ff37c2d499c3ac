"""Check evaluation batches, and bring them to the model's device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .points import TapError


def device_of(model: nn.Module) -> torch.device:
    """Return the device that holds all of a model's parameters, or buffers if it has none."""
    places: dict[torch.device, str] = {}
    named: list[tuple[str, Tensor]] = [*model.named_parameters()]
    for name, tensor in named or model.named_buffers():
        places.setdefault(tensor.device, name)
    if len(places) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise TapError(f"{type(model).__name__}: expected a model on one device, got {found}")
    return next(iter(places), torch.device("cpu"))


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch; those made under inference_mode become ordinary ones."""
    return tree_map_only(Tensor, lambda tensor: _moved(tensor, device), batch)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    tensor = tensor.to(device)
    if tensor.is_inference():
        with torch.inference_mode(False):
            return tensor.clone()
    return tensor


def sample_counts(x: Any, batch_dim: int) -> list[int]:
    """Return how many samples a batch's first tensor may hold.

    Its first dimension, and the one that counts samples in the states: an input may be batch-first
    where the states are not. Empty where it has no dimension.
    """
    first = next(leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor))
    fits = -first.dim() <= batch_dim < first.dim()
    dimensions = {0, batch_dim % first.dim()} if fits else {0}
    return [first.shape[dimension] for dimension in sorted(dimensions) if dimension < first.dim()]


def possible_samples(x: Any, batch_dim: int) -> set[int]:
    """Return how many samples an input may hold, by any of its tensors' dimensions.

    The first dimension of each, and the one that counts samples in the states.
    """
    tensors = [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.dim()]
    sizes = {leaf.shape[0] for leaf in tensors}
    fitting = [leaf for leaf in tensors if -leaf.dim() <= batch_dim < leaf.dim()]
    return sizes | {leaf.shape[batch_dim] for leaf in fitting}


def counts_samples(x: Any, state: Tensor, batch_dim: int) -> bool:
    """Return whether a state's batch dimension is as long as one of the input's."""
    counts = possible_samples(x, batch_dim)
    fits = -state.dim() <= batch_dim < state.dim()
    return not counts or (fits and state.shape[batch_dim] in counts)


def check_batch(
    index: int, batch: object, batch_dim: int = 0, caller: str = "diagnose"
) -> tuple[Any, Any]:
    """Return a batch as (x, y); a mapping is the whole input of a model that has its own loss.

    Raises:
        TypeError: it is no pair, or x holds no tensor.
        ValueError: x has no batch dimension, or y another number of samples.
    """
    if isinstance(batch, Mapping):
        return dict(batch), None
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TypeError(
            f"{caller}: batch {index}: expected a pair (x, y), got {type(batch).__name__}"
            + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
            + _as_pair(batch)
        )
    x, y = batch
    x = dict(x) if isinstance(x, Mapping) else x
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(x)):
        raise TypeError(
            f"{caller}: batch {index}: expected x to be a tensor, a tuple or a dict of tensors, "
            f"got {type(x).__name__}"
            + ("; make one by torch.as_tensor(x)" if hasattr(x, "__array__") else "")
        )
    counts = sample_counts(x, batch_dim)
    if not counts:
        raise ValueError(f"{caller}: batch {index}: expected x with a batch dimension")
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        # One for each sample, or for each position of all samples.
        fitting = [*counts, x.shape[0] * x.shape[1]] if x.dim() > 1 else counts
        if y.dim() == 0 or len(y) not in fitting:
            got = "no batch dimension" if y.dim() == 0 else len(y)
            raise ValueError(
                f"{caller}: batch {index}: expected as many labels as samples, "
                f"{' or '.join(map(str, counts))}, got {got}"
            )
    return x, y


def _as_pair(batch: object) -> str:
    """Return what to do with a batch that is no pair."""
    if isinstance(batch, Tensor):
        return "; give its labels too, (x, y)"
    if isinstance(batch, tuple | list) and len(batch) > 2:
        return "; give ((x, y) for x, y, *_ in batches), or ((a, b), y) for two inputs"
    return ""


def check_labels(index: int, y: object, logits: torch.Size, caller: str = "diagnose") -> None:
    """Raise where labels are not what :func:`fadiag_fast.capture.classification_loss` takes.

    On a GPU a label out of range would abort the process's CUDA context instead of raising.

    Args:
        index: of the batch.
        y: labels.
        logits: their shape.
        caller: for the message.

    Raises:
        TypeError: no tensor, or of a type that is neither class index nor probability.
        ValueError: a class index has no logit, or the shape does not fit.
    """
    where = f"{caller}: batch {index}: labels"
    if not isinstance(y, Tensor):
        raise TypeError(
            f"{where}: expected a tensor, got {type(y).__name__}; make one by torch.as_tensor(y), "
            f"or give loss="
        )
    if len(logits) < 2:
        return
    per_token = len(logits) == 3 and y.shape == logits[:-1]
    classes = logits[-1 if per_token else 1]
    shape = [*logits[:1], *logits[2:]]
    expected = f"class indices, int64 {shape}"
    if y.is_floating_point() or y.is_complex():
        if y.shape != logits or y.is_complex():
            fix = "; y.long() if they are indices" if list(y.shape) == shape else ""
            raise TypeError(
                f"{where}: expected {expected}, or probabilities {list(logits)}, got "
                f"{_described(y)}{fix}; of another task, give loss="
            )
        return
    if y.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"{where}: expected {expected}, got {_described(y)}; give y.long()")
    if not per_token and list(y.shape) != shape:
        one_hot = y.shape == logits and int(y.sum()) == y.shape[0]
        fix = "y.argmax(1)" if one_hot else "y.squeeze(1)" if y.shape[1:2] == (1,) else "loss="
        raise ValueError(f"{where}: expected {expected}, got {_described(y)}; give {fix}")
    counted = y[y != -100]
    low, high = (int(counted.min()), int(counted.max())) if counted.numel() else (0, 0)
    if low < 0 or high >= classes:
        raise ValueError(
            f"{caller}: batch {index}: expected labels from 0 to {classes - 1}, "
            f"got labels from {low} to {high}"
        )


def _described(y: Tensor) -> str:
    return f"{str(y.dtype).removeprefix('torch.')} {list(y.shape)}"
