"""Check what a user hands over, before the work: what was expected, what came, what to do."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils.data import Dataset, IterableDataset

from .._common.arguments import describe

# Of these exactly: a subclass says more by its type than by its text.
_RENAMED = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)


def check_module(model: object, caller: str) -> None:
    """Raise TypeError for what is not a network."""
    if isinstance(model, nn.Module | ExportedProgram):
        return
    if isinstance(model, type):
        hint = f"; call it: {model.__name__}(…)"
    elif isinstance(model, Mapping):
        hint = "; build the network and give it these weights by load_state_dict"
    elif isinstance(model, str):
        hint = "; build the network, or read a program's file by fadiag_fast.load_packaged"
    elif callable(model):
        hint = "; call it, or wrap it in a Module"
    else:
        hint = ""
    raise TypeError(f"{caller}: model: expected a torch.nn.Module, got {describe(model)}{hint}")


def check_how(loss: object, batch_dim: object, caller: str) -> None:
    """Raise TypeError for a loss that cannot be called, or a dimension that is no number."""
    if loss is not None and not callable(loss):
        raise TypeError(
            f"{caller}: loss: expected a function of (model output, y), got {describe(loss)}"
        )
    if isinstance(loss, type):
        raise TypeError(f"{caller}: loss: expected a function, got {describe(loss)}; call it")
    if not isinstance(batch_dim, int) or isinstance(batch_dim, bool):
        raise TypeError(
            f"{caller}: batch_dim: expected the number of a dimension, got {describe(batch_dim)}"
        )


def each_batch(batches: Any, caller: str) -> Iterator[Any]:
    """Return the batches one by one.

    Raises:
        TypeError: what was given are no batches.
        ValueError: an iterator that has nothing left; an empty list is one of no batches.
    """
    where = f"{caller}: eval_batches: expected batches (x, y), such as a DataLoader or a list"
    if isinstance(batches, Tensor):
        raise TypeError(f"{where}, got a tensor, {describe(batches)}; give [(x, y)]")
    if isinstance(batches, Mapping):
        raise TypeError(f"{where}, got one dict; give a list of batches: [batch]")
    if isinstance(batches, tuple | list) and len(batches) == 2:
        x, y = batches
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            raise TypeError(f"{where}, got one batch (x, y); give a list of batches: [(x, y)]")
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise TypeError(
            f"{where}, got {describe(batches)}, a data set of samples; give "
            f"DataLoader(dataset, batch_size=128), or with batch_size=None if its items are batches"
        )
    if isinstance(batches, str | bytes) or not isinstance(batches, Iterable):
        # A sequence of the old protocol has __getitem__ alone.
        if callable(batches) and not hasattr(batches, "__getitem__"):
            raise TypeError(f"{where}, got a function; call it")
        if isinstance(batches, str | bytes) or not hasattr(batches, "__getitem__"):
            raise TypeError(f"{where}, got {describe(batches)}")
    return _not_used_up(batches, caller)


def _not_used_up(batches: Iterable[Any], caller: str) -> Iterator[Any]:
    iterator = iter(batches)
    number = -1
    for number, batch in enumerate(iterator):  # noqa: B007  # read after the loop
        yield batch
    if number < 0 and iterator is batches:
        raise ValueError(
            f"{caller}: eval_batches: expected batches, got an iterator that has none left; it is "
            f"used up by whoever reads it first: give a list, or make it anew"
        )


def check_fits_forward(index: int, model: nn.Module, x: Any, caller: str) -> None:
    """Raise TypeError where a batch has other arguments than the model's forward."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # a program's
        return
    try:
        if isinstance(x, Mapping):
            signature.bind(**x)
        elif isinstance(x, tuple):
            signature.bind(*x)
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "nothing"
        given = f"a dict with {', '.join(map(str, x))}" if isinstance(x, Mapping) else len(x)
        hint = "; give pairs such as (batch['image'], batch['label'])"
        raise TypeError(
            f"{caller}: batch {index}: expected what {type(model).__name__}.forward takes, "
            f"{takes}, got {given}{' arguments' if isinstance(x, tuple) else ''} ({error})"
            + (hint if isinstance(x, Mapping) else "")
        ) from None


@contextmanager
def named_failures(model: nn.Module, where: str) -> Iterator[None]:
    """Say of an error inside the forward pass in which layer it arose, and what that was given.

    Args:
        model: whose layers are named.
        where: caller and batch.
    """
    try:
        yield
    except _RENAMED as error:
        if type(error) not in _RENAMED:
            raise
        place = _failing_layer(model, error.__traceback__)
        if place is None:
            raise
        raise type(error)(f"{where}: {place} ({error})") from error


def _failing_layer(model: nn.Module, trace: TracebackType | None) -> str | None:
    names = {id(module): name for name, module in model.named_modules()}
    found: tuple[nn.Module, list[Any]] | None = None
    while trace is not None:
        frame = trace.tb_frame
        module = frame.f_locals.get("self")
        if (
            isinstance(module, nn.Module)
            and id(module) in names
            and frame.f_code.co_name == "forward"
        ):
            code = frame.f_code
            arguments = code.co_varnames[1 : code.co_argcount]
            found = module, [frame.f_locals.get(name) for name in arguments]
        trace = trace.tb_next
    if found is None:
        return None
    module, given = found
    tensors = [describe(value) for value in given if isinstance(value, Tensor)]
    kind, name = type(module).__name__, names[id(module)]
    layer = f"layer {name!r} ({kind})" if name else f"the model ({kind})"
    return f"{layer}: expected {_expected(module)}, got {' and '.join(tensors) or 'no tensor'}"


def _expected(module: nn.Module) -> str:
    """Return what a layer of torch takes; of others only that its forward does not take all."""
    weight = getattr(module, "weight", None)
    dtype = describe(weight).partition(" ")[0] if isinstance(weight, Tensor) else "a tensor"
    if isinstance(module, nn.Linear):
        return f"{dtype} [..., {module.in_features}]"
    if isinstance(module, nn.modules.conv._ConvNd):
        sizes = ", …" * len(module.kernel_size)
        return f"{dtype} [N, {module.in_channels}{sizes}]"
    if isinstance(module, nn.Embedding):
        return f"int64 indices from 0 to {module.num_embeddings - 1}"
    if isinstance(module, nn.LayerNorm):
        return f"{dtype} [..., {', '.join(map(str, module.normalized_shape))}]"
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return f"{dtype} with {module.num_features} channels"
    return "what its forward can work on"
