"""Say what is wrong with the input of an operator: op, layer, what was expected, what came.

The native kernels make the same checks and would raise RuntimeError; these give the error its type.
"""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from .reference import LayerStatistics

FLOATING = ("torch.float16", "torch.bfloat16", "torch.float32", "torch.float64")
_FLOATING_TEXT = "float16, bfloat16, float32 or float64"


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _check_tensor(where: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: expected a tensor, got {type(value).__name__}")
    if str(value.dtype) not in FLOATING:
        raise TypeError(f"{where}: expected {_FLOATING_TEXT}, got {_name(value.dtype)}")


def check_lists(op: str, **lists: object) -> None:
    """Raise TypeError where a list of tensors, one a layer, is something else.

    A tensor has a length and elements too: its rows would be taken for layers.
    """
    for name, value in lists.items():
        if isinstance(value, Tensor):
            raise TypeError(
                f"{op}: {name}: expected a list of tensors, one a layer, got one tensor of shape "
                f"{list(value.shape)}; give [{name}] if it is one layer's"
            )
        if isinstance(value, str) or not isinstance(value, Sequence):
            hint = f"; give list({name})" if isinstance(value, Iterator) else ""
            hint = f"; give list({name}.values())" if isinstance(value, Mapping) else hint
            raise TypeError(
                f"{op}: {name}: expected a list of tensors, one a layer, got "
                f"{type(value).__name__}{hint}"
            )


def check_directions(grad_means: object) -> None:
    """Raise TypeError where K batches of L tensors are something else."""
    op = "direction_cosines"
    check_lists(op, grad_means=grad_means)
    assert isinstance(grad_means, Sequence)
    for batch, layers in enumerate(grad_means):
        if isinstance(layers, LayerStatistics):
            raise TypeError(
                f"{op}: batch {batch}: expected its mean gradients, a list of tensors, got "
                f"LayerStatistics; give its .grad_mean"
            )
        if type(layers) not in (list, tuple):
            check_lists(op, **{f"grad_means[{batch}]": layers})


def check_statistics_input(
    hiddens: Sequence[Tensor], grads: Sequence[Tensor], stacked: bool
) -> None:
    """Raise TypeError or ValueError for input that ``layer_statistics`` does not accept."""
    op = "layer_statistics"
    if len(hiddens) == 0:
        raise ValueError(f"{op}: expected at least one layer, got an empty list")
    if len(hiddens) != len(grads):
        raise ValueError(
            f"{op}: expected one grad per hidden, got {len(hiddens)} hiddens and {len(grads)} grads"
        )
    batch_dim = 1 if stacked else 0
    dimensions = "a stack and a batch" if stacked else "a batch"
    first = hiddens[0]
    for layer, (hidden, grad) in enumerate(zip(hiddens, grads, strict=True)):
        where = f"{op}: layer {layer}"
        _check_tensor(where, hidden)
        _check_tensor(f"{where}, grad", grad)
        if hidden.dim() <= batch_dim:
            raise ValueError(
                f"{where}: expected {dimensions} dimension, got shape {list(hidden.shape)}"
            )
        if grad.dtype != hidden.dtype:
            raise TypeError(
                f"{where}: expected a grad of the hidden's dtype {_name(hidden.dtype)}, "
                f"got {_name(grad.dtype)}"
            )
        if grad.shape != hidden.shape:
            raise ValueError(
                f"{where}: expected a grad of the hidden's shape {list(hidden.shape)}, "
                f"got {list(grad.shape)}"
            )
        for kind, tensor in (("hidden", hidden), ("grad", grad)):
            if tensor.device != first.device:
                raise ValueError(
                    f"{where}: expected the {kind} on {first.device} like layer 0, "
                    f"got {tensor.device}"
                )
        if hidden.shape[batch_dim] != first.shape[batch_dim]:
            raise ValueError(
                f"{where}: expected {first.shape[batch_dim]} samples like layer 0, "
                f"got {hidden.shape[batch_dim]}"
            )
        if stacked and hidden.shape[0] != first.shape[0]:
            raise ValueError(
                f"{where}: expected a stack of {first.shape[0]} like layer 0, got {hidden.shape[0]}"
            )


def check_cosines_input(grad_means: Sequence[Sequence[Tensor]], stacked: bool) -> None:
    """Raise TypeError or ValueError for input that ``direction_cosines`` does not accept."""
    op = "direction_cosines"
    if len(grad_means) == 0 or len(grad_means[0]) == 0:
        raise ValueError(f"{op}: expected at least one direction, got an empty list")
    for batch, layers in enumerate(grad_means):
        if len(layers) != len(grad_means[0]):
            raise ValueError(
                f"{op}: batch {batch}: expected {len(grad_means[0])} layers like batch 0, "
                f"got {len(layers)}"
            )
        for layer, direction in enumerate(layers):
            where = f"{op}: batch {batch}, layer {layer}"
            _check_tensor(where, direction)
            first = grad_means[0][layer]
            overall = grad_means[0][0]
            if direction.dtype != overall.dtype:
                raise TypeError(
                    f"{where}: expected dtype {_name(overall.dtype)} like batch 0, layer 0, "
                    f"got {_name(direction.dtype)}"
                )
            if direction.shape != first.shape:
                raise ValueError(
                    f"{where}: expected shape {list(first.shape)} like batch 0, "
                    f"got {list(direction.shape)}"
                )
            if direction.device != overall.device:
                raise ValueError(
                    f"{where}: expected {overall.device} like batch 0, layer 0, "
                    f"got {direction.device}"
                )
            if stacked and (direction.dim() < 1 or direction.shape[0] != overall.shape[0]):
                raise ValueError(
                    f"{where}: expected a stack like batch 0, layer 0, "
                    f"got shape {list(direction.shape)}"
                )
