"""Watch one forward pass: what each module is called with, and which torch call made each tensor.

A hidden state is often no module's output: the sum after a residual add is made by an operator in
the parent's forward, and is seen only as the INPUT of what comes next. What is differentiated must
be the tensor itself, with all of its uses, so every tensor is traced back to its source: the k-th
torch function call of the pass that returned one, or a leaf of the model's input.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .._common.process import eager

# What a model may end in though a loss could do it, and what may stand behind that: as in
# :func:`fadiag_fast.capture.before_link`, by the names of torch's functions.
_LINKS = frozenset({"softmax", "log_softmax", "sigmoid", "logsigmoid", "special_expit"})
_BEHIND_LINKS = frozenset(
    {"view", "reshape", "to", "float", "double", "contiguous", "clone", "transpose", "permute"}
    | {"squeeze", "unsqueeze", "flatten", "log", "clamp", "clamp_min", "add", "__getitem__"}
)
_MOST_BEHIND_LINKS = 8


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


def transformed() -> bool:
    """Return whether a function transform of ``torch.func`` is under way.

    Its tensors stand for many, or for a derivative, and mean nothing once it has ended.
    """
    return torch._C._functorch.maybe_current_level() is not None


def exporting() -> bool:
    """Return whether the model is exported.

    ``torch.compiler.is_exporting`` says so of every compilation, in torch before 2.13, where the
    compiler comes across it.
    """
    return torch.compiler._is_exporting_flag


def recorded() -> bool:
    """Return whether the model is exported, traced or run without data, and not trained."""
    if torch._C._get_tracing_state() is not None or exporting():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    keys = torch._C._TorchDispatchModeKey
    recording = (keys.FAKE, keys.PROXY, keys.FUNCTIONAL)
    return any(torch._C._get_dispatch_mode(key) is not None for key in recording)


def tensors_in(result: object) -> list[Tensor]:
    """Return the tensors that a torch function returned, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, tuple | list):
        return [item for item in result if isinstance(item, Tensor)]
    return []


def state_in(value: object) -> Tensor | None:
    """Return the state among a module's arguments or results: the first floating tensor.

    One that stands directly in a tuple, list, mapping or dataclass comes before one deeper inside.
    """
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
    inner = (state_in(item) for item in items if not isinstance(item, Tensor))
    return next((state for state in inner if state is not None), None)


def argument_state(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor | None:
    """Return the state among a module's arguments."""
    if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
        return args[0]
    found = state_in(args)
    if found is None:
        found = state_in([kwargs.get("hidden_states"), *kwargs.values()])
    return found


class _Made(NamedTuple):
    """A tensor as its source left it; an id is used again once its tensor is gone."""

    tensor: "weakref.ref[Tensor]"
    version: int
    source: Source


class Recorder(TorchFunctionMode):
    """Number the torch calls that return tensors, and remember which one made which tensor.

    Args:
        inputs: of the model.
        constants: its parameters and buffers, which come from nowhere.
    """

    def __init__(self, inputs: object, constants: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.num_calls = 0
        # Per call what it read: tensors of calls (0 and up) and of inputs (below 0), None unknown.
        self._read: list[set[int | None]] = []
        self._numbers_grow = True  # along every way from a tensor to what was computed from it
        self._constants = {id(constant) for constant in constants}
        self._made: dict[int, _Made] = {}
        # By the id of what a softmax or the like returned: that tensor, the function, its argument.
        self._changed: dict[int, tuple[Tensor, str, Tensor]] = {}
        self._inputs = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        self._versions = [leaf._version for leaf in self._inputs]
        for index, leaf in enumerate(tree_leaves(inputs)):
            if isinstance(leaf, Tensor):
                self._note(leaf, Source("input", index))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = self._nodes((args, kwargs))
        result = func(*args, **(kwargs or {}))
        found = tensors_in(result)
        if func is Tensor.__setitem__ and (self._node(args[0]) or -1) >= 0:
            self._read[self._node(args[0])] |= read  # type: ignore[index]
            self._numbers_grow = False
        if found:
            kind = getattr(func, "__name__", "")
            if (kind in _LINKS or kind in _BEHIND_LINKS) and isinstance(result, Tensor):
                first = args[0] if args else (kwargs or {}).get("input")
                if isinstance(first, Tensor):
                    self._changed[id(result)] = (result, kind, first)
            self._read.append(read)
            for item, tensor in enumerate(found):
                # Dropout in eval mode, contiguous and others may return their argument as it is:
                # the same tensor, made where it was made before.
                if self.source_of(tensor) is None:
                    self._note(tensor, Source("call", self.num_calls, item))
            self.num_calls += 1
        return result

    def before_link(self, output: Tensor) -> Tensor:
        """Return the logits of a model that ends in a softmax or the like; else its output."""
        found = output
        for _ in range(_MOST_BEHIND_LINKS):
            if id(found) not in self._changed or self._changed[id(found)][0] is not found:
                return output
            _, kind, found = self._changed[id(found)]
            if kind in _LINKS:
                return found
        return output

    def is_sum_with(self, total: Tensor, parts: Iterable[Tensor]) -> bool:
        """Return whether an addition made a tensor, one of these being its first summand."""
        made = self._changed.get(id(total))
        if made is None or made[0] is not total or made[1] != "add":
            return False
        return any(made[2] is part for part in parts)

    def _note(self, tensor: Tensor, source: Source) -> None:
        self._made[id(tensor)] = _Made(weakref.ref(tensor), tensor._version, source)

    def source_of(self, tensor: Tensor) -> Source | None:
        """Return where a tensor with the values it has now comes from.

        None if no torch call of Python's returned it, or if something wrote into it since then
        that did not return it: an assignment to its elements, or to a view of it.
        """
        made = self._made.get(id(tensor))
        if made is None or made.tensor() is not tensor or made.version != tensor._version:
            return None
        return made.source

    def inputs(self) -> "list[Sighting]":
        """Return the tensors of the model's input."""
        return [
            Sighting(leaf, version, self.source_of(leaf))
            for leaf, version in zip(self._inputs, self._versions, strict=True)
        ]

    @property
    def wrote_input(self) -> bool:
        """Whether the pass wrote into the model's input."""
        pairs = zip(self._inputs, self._versions, strict=True)
        return any(leaf._version != version for leaf, version in pairs)

    def _node(self, tensor: Tensor) -> int | None:
        made = self._made.get(id(tensor))
        if made is None or made.tensor() is not tensor:
            return None
        return _number(made.source)

    def _nodes(self, arguments: object) -> set[int | None]:
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        return {self._node(tensor) for tensor in tensors if id(tensor) not in self._constants}

    def depends(
        self, later: Source | None, earlier: Source | None, without: Iterable[Source | None] = ()
    ) -> bool | None:
        """Return whether one tensor was computed from another.

        Args:
            later, earlier: where they come from.
            without: tensors that the way between them must not pass.

        Returns:
            None where it cannot be told: not all tensors come from torch calls of Python's.
        """
        if later is None or earlier is None:
            return None
        start, end = _number(later), _number(earlier)
        known = True
        passed = {_number(source) for source in without if source is not None}
        waiting: list[int | None] = [start]
        while waiting:
            node = waiting.pop()
            if node == end and node not in passed:
                return True
            if node is None:
                known = False
                continue
            if node in passed or (self._numbers_grow and node < end):
                continue
            passed.add(node)
            if node >= 0:
                waiting += self._read[node]
        return False if known else None

    def sighting(self, tensor: Tensor) -> "Sighting":
        """Return a tensor as it is now."""
        return Sighting(tensor, tensor._version, self.source_of(tensor))


def _number(source: Source) -> int:
    """Return a source as one number: calls from 0 up, inputs below."""
    return source.number if source.kind == "call" else -1 - source.number


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
        others: further floating tensors among the arguments, as the state of a recurrent cell.
        output_type: what the module returned, for messages.
    """

    name: str
    call: int
    begin: int
    input: Sighting | None
    end: int = -1
    output: Sighting | None = None
    output_type: str = ""
    others: tuple[Sighting, ...] = ()


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

    def depends(
        self,
        later: Sighting | None,
        earlier: Sighting | None,
        without: Iterable[Sighting | None] = (),
    ) -> bool | None:
        """Return whether a tensor was computed from another; see :meth:`Recorder.depends`."""
        if later is None or earlier is None:
            return None
        cut = [sighting.source for sighting in without if sighting is not None]
        return self.recorder.depends(later.source, earlier.source, cut)


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
    """Call ``entered(name, args, kwargs)`` and ``left(name, result)`` around modules' calls.

    ``entered`` sees what the caller passed, before the modules' own hooks replace it (sharded
    modules pass on a copy), ``left`` what the caller receives, after them.
    """
    handles = []
    try:
        for name, module in modules.items():
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: entered(name, args, kwargs),
                    prepend=True,
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


def trace(model: nn.Module, x: Any, **options: Any) -> Trace:
    """Run a forward pass without gradients and return what was seen.

    Args:
        model: in eval mode; its parameters and buffers are used as they are.
        x: a tensor, a tuple of arguments or a dict of keywords.
        options: more keywords for the model's forward.

    All states of the pass live as long as the result: as much memory as a backward pass needs.
    """
    try:
        with torch.no_grad():
            return _trace(model, x, options)
    except Exception as error:
        # A model that differentiates in its own forward (forces from an energy), or a hook that
        # registers another one on what a module returns, needs the graph.
        try:
            with torch.enable_grad():
                return _trace(model, x, options)
        except Exception:
            raise error from None


def _trace(model: nn.Module, x: Any, options: Mapping[str, Any]) -> Trace:
    recorder = Recorder(x, [*model.parameters(), *model.buffers()])
    calls: list[ModuleCall] = []
    open_calls: list[ModuleCall] = []
    counts: dict[str, int] = {}
    moment = 0

    def sighting(tensor: Tensor | None) -> Sighting | None:
        return None if tensor is None or transformed() else recorder.sighting(tensor)

    def entered(name: str, args: Any, kwargs: Any) -> None:
        nonlocal moment
        counts[name] = counts.get(name, -1) + 1
        state = argument_state(args, kwargs)
        found = ModuleCall(name, counts[name], moment, sighting(state))
        found.others = tuple(
            recorder.sighting(leaf)
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor) and leaf is not state and leaf.is_floating_point()
        )
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
        if transformed():
            found.output_type += " inside of vmap or another function transform"

    modules = {
        clean_name(name): module
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)  # takes no hooks
    }
    # Tensors made under the caller's inference mode would not count the writes into them.
    # Leaving that mode sets gradients to be recorded or not anew.
    gradients = torch.set_grad_enabled(torch.is_grad_enabled())
    plain = torch.inference_mode(False)
    with plain, gradients, eager(), watched(modules, entered, left), recorder:
        output = call_model(model, x, **options)
    return Trace(calls, output, recorder)
