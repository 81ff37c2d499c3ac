"""Put a model back as it was where loading fails half-way."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def loads_in_its_own_way(module: nn.Module) -> bool:
    """Return whether loading does more than torch's own modules do: copy values by name."""
    kind = type(module)
    own = kind._load_from_state_dict is not nn.Module._load_from_state_dict
    # torch's own modules only rewrite state dicts that lack names.
    foreign = own and not kind._load_from_state_dict.__module__.startswith("torch.nn.")
    return (
        foreign
        or kind.load_state_dict is not nn.Module.load_state_dict
        or bool(module._load_state_dict_pre_hooks)
        or bool(module._load_state_dict_post_hooks)
        or kind.set_extra_state is not nn.Module.set_extra_state
    )


@contextmanager
def as_it_was_on_failure(model: nn.Module) -> Iterator[None]:
    """Put values, tensors, attributes and extra state back if what is done inside fails."""
    kept = [_Kept(module) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module in kept:
            module.restore()
        raise


class _Kept:
    """Keep what a module holds."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = dict(module.__dict__)
        self._held = [dict(held) for held in _holders(module)]
        tensors = [*module._parameters.values(), *module._buffers.values()]
        self._tensors = [_KeptTensor(tensor) for tensor in tensors if tensor is not None]
        self._has_extra_state = type(module).get_extra_state is not nn.Module.get_extra_state
        self._extra_state = (
            copy.deepcopy(module.get_extra_state()) if self._has_extra_state else None
        )

    def restore(self) -> None:
        module = self._module
        for name in module.__dict__.keys() - self._attributes.keys():
            del module.__dict__[name]
        module.__dict__.update(self._attributes)
        for now, before in zip(_holders(module), self._held, strict=True):
            now.clear()
            now.update(before)
        for tensor in self._tensors:
            tensor.restore()
        if self._has_extra_state:
            module.set_extra_state(self._extra_state)


class _KeptTensor:
    """Keep a tensor's values; a lazy one has none yet."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._type = type(tensor)
        self._values = None if nn.parameter.is_lazy(tensor) else tensor.detach().clone()

    def restore(self) -> None:
        tensor, values = self._tensor, self._values
        if values is None:
            if type(tensor) is not self._type:
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                tensor.__class__ = self._type
        elif (tensor.shape, tensor.dtype) == (values.shape, values.dtype):
            tensor.data.copy_(values)
        else:
            tensor.data = values


def _holders(module: nn.Module) -> list[dict[str, Any]]:
    return [module._parameters, module._buffers, module._modules]
