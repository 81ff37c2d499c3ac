"""Leave a network as it was found: modes, buffers, hooks, random generators."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._common.process import forked_generators
from .points import TapError

# What nn.Module itself keeps in every module: parameters, submodules, hooks, the mode.
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; leave it and the random number generators as they were.

    Modes, buffers and the modules' own attributes (a counter, a kept attention map) are put back.
    What a forward pass writes into a list or dict that a module holds stays written.
    """
    modes = [(module, module.training) for module in model.modules()]
    # A forward pass may update buffers even in eval mode: a counter, for example.
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    kept = [
        (
            module,
            dict(module._buffers),
            own_attributes(module),
        )
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        model.eval()
        with forked_generators(devices):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, own_buffers, attributes in kept:
            module._buffers.update(own_buffers)
            for name in module.__dict__.keys() - attributes.keys() - _OF_EVERY_MODULE:
                del module.__dict__[name]
            module.__dict__.update(attributes)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes beyond those that every module has."""
    return {k: v for k, v in module.__dict__.items() if k not in _OF_EVERY_MODULE}


def constants_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers by name, detached: no gradient is taken at them."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return parameters | {name: buffer.detach() for name, buffer in model.named_buffers()}


def check_model(model: nn.Module) -> None:
    """Raise TapError for a model that no path can differentiate."""
    name = type(model).__name__
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TapError(
                f"{name}: {path or 'the model'}: expected torch's fully_shard, got its predecessor "
                f"FullyShardedDataParallel, which gives parameters to its own forward only; probe "
                f"the module before it is wrapped"
            )
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise TapError(
                f"{name}: {path}: expected a tensor with values, got a lazy module's before its "
                f"first call; call the model once"
            )
        if tensor.is_inference():
            raise TapError(
                f"{name}: {path}: expected an ordinary tensor, got one made under "
                f"torch.inference_mode, which autograd cannot use; build the model outside of it"
            )
        if tensor.is_meta:
            raise TapError(
                f"{name}: {path}: expected a tensor with values, got one on the meta device; load "
                f"the weights first"
            )


def is_sharded(model: nn.Module) -> bool:
    """Return whether parameters are sharded: only the model itself can gather them."""
    # Nothing can be a DTensor where its module, which takes a while to import, is not.
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and any(
        isinstance(parameter, distributed.DTensor) for parameter in model.parameters()
    )
