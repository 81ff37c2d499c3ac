"""Watch one forward pass: what each module is called with, and which torch call made each tensor.

A hidden state is often no module's output: the sum after a residual add is made by an operator in
the parent's forward, and is seen only as the INPUT of what comes next. What is differentiated must
be the tensor itself, with all of its uses, so every tensor is traced back to its source: the k-th
torch function call of the pass that returned one, or a leaf of the model's input.
"""

import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


class Source(NamedTuple):
    """Where a tensor comes from in a forward pass that is run again in the same way.

    Attributes:
        kind: ``call`` for a torch function, ``input`` for a leaf of the model's input.
        number: of the call among those that return tensors, or of the leaf.
        item: which of the call's tensors.
    """

    kind: Literal["call", "input"]
    number: int
    item: int = 0


def tensors_in(result: object) -> list[Tensor]:
    """Return the tensors that a torch function returned, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, tuple | list):
        return [item for item in result if isinstance(item, Tensor)]
    return []


def state_in(value: object) -> Tensor | None:
    """Return the state among a module's arguments or results: the first floating tensor."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() or value.is_complex() else None
    if isinstance(value, Mapping):  # the ModelOutput of transformers is one
        items = list(value.values())
    elif isinstance(value, tuple | list):
        items = list(value)
    else:
        items = list(vars(value).values()) if hasattr(value, "__dataclass_fields__") else []
    for item in items:
        if isinstance(item, Tensor) and (item.is_floating_point() or item.is_complex()):
            return item
    return None


def argument_state(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor | None:
    """Return the state among a module's arguments."""
    found = state_in(args)
    if found is None:
        found = state_in([kwargs.get("hidden_states"), *kwargs.values()])
    return found


class Recorder(TorchFunctionMode):
    """Number the torch calls that return tensors, and remember which one made which tensor."""

    def __init__(self, inputs: object) -> None:
        super().__init__()
        self.num_calls = 0
        self._made: dict[int, tuple[weakref.ref[Tensor], Source]] = {}
        for index, leaf in enumerate(tree_leaves(inputs)):
            if isinstance(leaf, Tensor):
                self._made[id(leaf)] = (weakref.ref(leaf), Source("input", index))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = tensors_in(result)
        if found:
            for item, tensor in enumerate(found):
                source = Source("call", self.num_calls, item)
                self._made[id(tensor)] = (weakref.ref(tensor), source)
            self.num_calls += 1
        return result

    def source_of(self, tensor: Tensor) -> Source | None:
        """Return where a tensor comes from; None if no torch call of Python's returned it."""
        made = self._made.get(id(tensor))
        # An id is used again once its tensor is gone.
        return made[1] if made is not None and made[0]() is tensor else None

    def sighting(self, tensor: Tensor) -> "Sighting":
        """Return a tensor as it is now."""
        return Sighting(tensor, tensor._version, self.source_of(tensor))


@dataclass
class Sighting:
    """One tensor as it was when a module received or returned it.

    Attributes:
        tensor: kept alive until the trace is dropped.
        version: the count of in-place writes to its memory at that moment.
        source: see :class:`Source`.
    """

    tensor: Tensor
    version: int
    source: Source | None

    @property
    def overwritten(self) -> bool:
        """Whether something wrote into the tensor's memory after it was seen."""
        return self.tensor._version != self.version


@dataclass
class ModuleCall:
    """One call of one module.

    Attributes:
        name: the module's qualified name, "" for the model itself.
        call: how often that module had been called before.
        begin, end: moments, counted over all modules' entries and exits.
        input, output: the states, None where there is no floating tensor.
        output_type: what the module returned, for messages.
    """

    name: str
    call: int
    begin: int
    input: Sighting | None
    end: int = -1
    output: Sighting | None = None
    output_type: str = ""


@dataclass
class Trace:
    """One forward pass.

    Attributes:
        calls: of all modules, in the order of entry.
        output: what the model returned.
        recorder: knows every living tensor's source.
    """

    calls: list[ModuleCall]
    output: Any
    recorder: Recorder


def clean_name(name: str) -> str:
    """Drop what torch.compile puts into the names of the modules it wraps."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def call_model(model: nn.Module, x: Any, **options: Any) -> Any:
    """Call a model with a tensor, a tuple or list of arguments, or a mapping of keywords."""
    if isinstance(x, Mapping):
        return model(**x, **options)
    if isinstance(x, tuple | list):
        return model(*x, **options)
    return model(x, **options)


def signature(x: Any) -> tuple[Any, ...]:
    """Return what decides how a forward pass on ``x`` runs: shapes, dtypes, devices, options."""
    return tuple(
        (tuple(leaf.shape), leaf.dtype, str(leaf.device))
        if isinstance(leaf, Tensor)
        else repr(leaf)
        for leaf in tree_leaves(x)
    )


def with_leaves(x: Any, leaves: list[Any]) -> Any:
    """Return ``x`` with its leaves replaced."""
    return tree_unflatten(leaves, tree_flatten(x)[1])


def as_plain(x: Any) -> Any:
    """Turn a mapping that is no dict (a BatchEncoding, say) into one that pytree can walk."""
    return dict(x) if isinstance(x, Mapping) and not isinstance(x, dict) else x


@contextmanager
def watched(
    modules: Mapping[str, nn.Module],
    entered: Any,
    left: Any,
) -> Iterator[None]:
    """Call ``entered(name, args, kwargs)`` and ``left(name, result)`` around modules' calls."""
    handles = []
    try:
        for name, module in modules.items():
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: entered(name, args, kwargs),
                    with_kwargs=True,
                )
            )
            handles.append(
                module.register_forward_hook(lambda _, args, result, name=name: left(name, result))
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def eager() -> Iterator[None]:
    """Run Python where torch would take a short cut around it.

    Compiled modules and regions don't call hooks that came after them, and the fused path of
    nn.TransformerEncoderLayer is taken without gradients only.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # Nothing can be compiled where the compiler, which takes seconds to import, is not.
        compiler = "torch._dynamo" in sys.modules
        with torch.compiler.set_stance("force_eager") if compiler else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def trace(model: nn.Module, x: Any, **options: Any) -> Trace:
    """Run a forward pass without gradients and return what was seen.

    Args:
        model: in eval mode; its parameters and buffers are used as they are.
        x: a tensor, a tuple of arguments or a dict of keywords.
        options: more keywords for the model's forward.

    All states of the pass live as long as the result: as much memory as a backward pass needs.
    """
    recorder = Recorder(x)
    calls: list[ModuleCall] = []
    open_calls: list[ModuleCall] = []
    counts: dict[str, int] = {}
    moment = 0

    def sighting(tensor: Tensor | None) -> Sighting | None:
        return None if tensor is None else recorder.sighting(tensor)

    def entered(name: str, args: Any, kwargs: Any) -> None:
        nonlocal moment
        counts[name] = counts.get(name, -1) + 1
        found = ModuleCall(name, counts[name], moment, sighting(argument_state(args, kwargs)))
        calls.append(found)
        open_calls.append(found)
        moment += 1

    def left(name: str, result: Any) -> None:
        nonlocal moment
        found = open_calls.pop()
        while found.name != name:  # a module whose exit hook another hook's error kept from running
            found = open_calls.pop()
        found.end, moment = moment, moment + 1
        found.output, found.output_type = sighting(state_in(result)), type(result).__name__

    modules = {
        clean_name(name): module
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)  # takes no hooks
    }
    with torch.no_grad(), eager(), watched(modules, entered, left), recorder:
        output = call_model(model, x, **options)
    return Trace(calls, output, recorder)
