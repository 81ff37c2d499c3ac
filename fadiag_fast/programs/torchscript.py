"""Run a TorchScript program module by module, so that its hidden states can be observed.

Inside the TorchScript interpreter no Python hook fires, and a script module takes none. Its graphs
can be read, though: every submodule's ``forward`` is a list of operators and of calls of further
submodules. Here each submodule becomes an ordinary nn.Module under its own name, whose forward goes
through that list, calls the operators from Python and the submodules like any module. It is the
program itself, not a guess at it: skip connections, branches, loops and modules that are used twice
come out as they were written. The first pass is still compared with the program's own.

What cannot be run like this (``torch.jit.fork``, TorchScript classes, isinstance refinements) is an
error that names it.
"""

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..capture.points import TapError

# The program runs the same operators; only a fuser may have ordered a sum otherwise.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE_TOLERANCE = 5e-2

WAY_OUT = (
    "save it with torch.export.save (a .pt2 file), or build the network from its source and load "
    "its state_dict"
)

# Operators that behave otherwise in training, and where they are told so.
TRAINING_ARGUMENTS = {
    "aten::dropout": 2,
    "aten::dropout_": 2,
    "aten::feature_dropout": 2,
    "aten::alpha_dropout": 2,
    "aten::feature_alpha_dropout": 2,
    "aten::native_dropout": 2,
    "aten::batch_norm": 5,
    "aten::native_batch_norm": 5,
    "aten::_native_batch_norm_legit": 5,
    "aten::_native_batch_norm_legit_functional": 5,
    "aten::cudnn_batch_norm": 5,
}

_Values = dict[str, Any]  # by the name that a value has in its graph
_Step = Callable[[_Values], None]


def _append(items: list[Any], item: Any) -> list[Any]:
    items.append(item)
    return items


def _extend(items: list[Any], more: list[Any]) -> list[Any]:
    items.extend(more)
    return items


def _set_item(items: Any, key: Any, value: Any) -> Any:
    items[key] = value
    return items


def _insert(items: list[Any], place: int, item: Any) -> None:
    items.insert(place, item)


def _raise(message: object, *_: object) -> None:
    raise RuntimeError(str(message))


def _tensor(data: Any, dtype: int | None, device: Any, requires_grad: bool) -> Tensor:
    made = torch.tensor(data, device=device)
    # TorchScript counts dtypes, and only its own operators know the numbers.
    return made if dtype is None else torch.ops.aten.to.dtype(made, dtype)


# torch.ops copies lists on the way in, which loses what is written to them, and takes none at all
# where the schema says "a list of anything".
_OF_CONTAINERS: dict[str, Callable[..., Any]] = {
    "aten::len": len,
    "aten::__getitem__": operator.getitem,
    "aten::_set_item": _set_item,
    "aten::append": _append,
    "aten::extend": _extend,
    "aten::insert": _insert,
    "aten::pop": lambda items, *place: items.pop(*place),
    "aten::clear": lambda items: items.clear(),
    "aten::reverse": lambda items: items.reverse(),
    "aten::Delete": operator.delitem,
    "aten::copy": lambda items: items.copy(),
    "aten::list": list,
    "aten::slice": lambda items, start, end, step: items[start:end:step],
    "aten::add": operator.add,
    "aten::add_": _extend,
    "aten::mul": operator.mul,
    "aten::eq": operator.eq,
    "aten::ne": operator.ne,
    "aten::__contains__": operator.contains,
    "aten::keys": lambda items: list(items.keys()),
    "aten::values": lambda items: list(items.values()),
    "aten::items": lambda items: list(items.items()),
    "aten::get": lambda items, *key: items.get(*key),
    "aten::tensor": _tensor,
}
_CONTAINER_TYPES = ("ListType", "DictType", "TupleType", "StringType")

# What the language itself does.
_OF_LANGUAGE: dict[str, Callable[..., Any]] = {
    "prim::unchecked_cast": lambda value: value,
    "prim::TupleConstruct": lambda *items: items,
    "prim::ListConstruct": lambda *items: list(items),
    "prim::DictConstruct": lambda *items: dict(zip(items[::2], items[1::2], strict=True)),
    "prim::TupleIndex": operator.getitem,
    "prim::TupleUnpack": lambda items: items,
    "prim::ListUnpack": lambda items: items,
    "prim::Uninitialized": lambda: None,
    "prim::RaiseException": _raise,
    "prim::Print": lambda *_: None,
    "aten::warn": lambda *_: None,
    "aten::__is__": operator.is_,
    "aten::__isnot__": operator.is_not,
    # What is observed is differentiated: a pass without gradients has to go the same way.
    "aten::is_grad_enabled": lambda: True,
    "aten::format": lambda text, *values: text.format(*values),
}


@dataclass(frozen=True)
class _Program:
    """A graph as a list of steps, and the names of what goes in and comes out."""

    inputs: list[str]
    steps: list[_Step]
    outputs: list[str]

    def run(self, arguments: Sequence[Any]) -> Any:
        values: _Values = dict(zip(self.inputs, arguments, strict=True))
        for step in self.steps:
            step(values)
        found = tuple(values[name] for name in self.outputs)
        return found[0] if len(found) == 1 else found


class ScriptedModule(nn.Module):
    """One module of a TorchScript program, run from Python.

    Parameters and buffers are those of the program. A subclass with the module's original name is
    made for each, so that reports and ``class:NAME`` read as they would with the source. Its own
    names begin with an underscore: the others are the program's.
    """

    _script: Any
    _others: dict[str, Any]
    _programs: dict[str, _Program]
    _method: str
    _where: str

    def __init__(self, script: Any, where: str, shared: dict[int, nn.Parameter]) -> None:
        super().__init__()
        # Not a submodule: it would give every parameter a second name.
        self.__dict__.update(
            _script=script, _others={}, _programs={}, _method="forward", _where=where
        )
        self.training = bool(script.training) if hasattr(script, "training") else False
        for name, tensor in script.named_parameters(recurse=False, remove_duplicate=False):
            self.register_parameter(name, _parameter(tensor, shared))
        for name, tensor in script.named_buffers(recurse=False, remove_duplicate=False):
            self.register_buffer(name, tensor)
        for name, child in script._modules.items():
            inside = f"{where}.{name}" if where else name
            self.add_module(name, _class_of(child, ScriptedModule)(child, inside, shared))

    def forward(self, *args: Any, **lifted: Any) -> Any:
        """Run the program's ``forward``, or the one of its copies that the caller has chosen.

        Args:
            args: what the program gives the module, less ``lifted``.
            lifted: parameters that tracing passes along, by their place among the arguments: no
                state of the network, and so kept apart from those.
        """
        arguments = list(args)
        for place in sorted(lifted, key=_place):
            arguments.insert(_place(place), lifted[place])
        return self._run(self._method, arguments)

    def _run(self, method: str, arguments: Sequence[Any]) -> Any:
        """Run one of the module's methods."""
        if method not in self._programs:
            graph = self._script._c._get_method(method).graph
            self._programs[method] = _program(graph, self._where)
        return self._programs[method].run([self, *arguments])

    def _attribute(self, name: str) -> Any:
        """Return what the program calls ``self.NAME``."""
        for place in (self._parameters, self._buffers, self._modules):
            if name in place:
                return place[name]
        if name == "training":
            return self.training
        if name not in self._others:
            self._others[name] = self._script._c.getattr(name)
        return self._others[name]

    def _set_attribute(self, name: str, value: Any) -> None:
        """Do what the program writes as ``self.NAME = value``."""
        if name in self._parameters or name in self._buffers:
            setattr(self, name, value)
        else:
            self._others[name] = value

    def _apply(self, fn: Any, recurse: bool = True) -> "ScriptedModule":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # The program itself, with which the first pass is compared, moves along.
        for name, tensor in (*self._parameters.items(), *self._buffers.items()):
            if tensor is not None:
                self._script._c.setattr(name, tensor.detach())
        return self


class ScriptedRoot(ScriptedModule):
    """A whole TorchScript program; see :func:`from_torchscript`.

    Attributes:
        packaging_remarks: what a reader of the figures should know about the file.
    """

    packaging_remarks: tuple[str, ...] = ()

    def __init__(self, script: Any) -> None:
        super().__init__(script, "", {})
        schema = script._c._get_method("forward").schema
        self._arguments = [
            (a.name, a.has_default_value(), a.default_value) for a in schema.arguments[1:]
        ]
        self._compared = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program with arguments by position or by name.

        Raises:
            TapError: the first pass does not give what TorchScript gives, or the program has
                something that cannot be run from Python.
            TypeError: an argument is missing or unknown.
        """
        arguments = self._bound(args, kwargs)
        if self._compared or torch._C._are_functorch_transforms_active():
            return self._run("forward", arguments)
        expected = self._by_torchscript(arguments)
        found = self._run("forward", arguments)
        _check_equal(type(self).__name__, found, expected)
        self._compared = True
        return found

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        name = type(self).__name__
        names = [argument for argument, _, _ in self._arguments]
        unknown = [key for key in kwargs if key not in names[len(args) :]]
        if len(args) > len(names) or unknown:
            got = ", ".join(unknown) or f"{len(args)} of them"
            raise TypeError(f"{name}: expected the arguments {', '.join(names)}, got {got}")
        bound = list(args)
        for argument, optional, default in self._arguments[len(args) :]:
            if argument not in kwargs and not optional:
                raise TypeError(f"{name}: expected the argument {argument!r}, got none")
            bound.append(kwargs.get(argument, default))
        return bound

    def _by_torchscript(self, arguments: list[Any]) -> Any:
        """Run the program in TorchScript's own interpreter, leaving no trace."""
        arguments = tree_map_only(Tensor, lambda t: t.detach().clone(), arguments)
        buffers = [(tensor, tensor.detach().clone()) for tensor in self.buffers()]
        devices = {p.device for p in self.parameters() if p.device.type == "cuda"}
        # Whoever counts torch calls should count those of the pass that is observed.
        with (
            torch.random.fork_rng(devices=sorted(devices, key=str)),
            torch._C.DisableTorchFunction(),
            torch.no_grad(),
            _in_mode_of(self),
        ):
            result = self._script(*arguments)
            for tensor, value in buffers:
                tensor.copy_(value)
        return result


def from_torchscript(script: torch.jit.ScriptModule) -> ScriptedRoot:
    """Return an ordinary module that runs a TorchScript program and can be observed.

    Args:
        script: from ``torch.jit.load``, ``torch.jit.script`` or ``torch.jit.trace``. It shares its
            parameters and buffers with the result and is not changed.

    Raises:
        TapError: the program has no submodules, so that there is nothing to observe.
    """
    name = _name_of(script)
    if not script._modules.items():
        raise TapError(
            f"{name}: expected a TorchScript program with submodules, got one without: "
            f"torch.jit.freeze and optimize_for_inference dissolve them; save it unfrozen, or "
            f"{WAY_OUT}"
        )
    root: ScriptedRoot = _class_of(script, ScriptedRoot)(script)
    remarks = ["The network was read from TorchScript, which torch has deprecated."]
    fixed = sorted(set(_fixed_in_training(root)))
    if fixed:
        remarks.append(
            f"The program was traced in training mode: {', '.join(fixed)} behave as in training, "
            f"and the figures with them; trace it after model.eval()."
        )
    root.packaging_remarks = tuple(remarks)
    return root


# ---- modules


def _parameter(tensor: Tensor, shared: dict[int, nn.Parameter]) -> nn.Parameter:
    """Return one parameter per tensor: tied weights stay tied."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    if id(tensor) not in shared:
        shared[id(tensor)] = nn.Parameter(tensor.detach(), tensor.requires_grad)
        # A tensor that dies would leave its id to another one.
        shared[id(tensor)].__dict__["_of_script"] = tensor
    return shared[id(tensor)]


def _name_of(script: Any) -> str:
    return str(getattr(script, "original_name", "") or type(script).__name__)


_classes: dict[tuple[str, type, bool], Any] = {}


def named_class(name: str, base: type, numbered: bool) -> Any:
    """Return the subclass with a module's original name; ``numbered`` gives it a length."""
    key = (name, base, numbered)
    if key not in _classes:
        # Without children, a length of 0 would make the module false.
        members = {"__len__": lambda self: len(self._modules)} if numbered else {}
        _classes[key] = type(name, (base,), members)
    return _classes[key]


def is_numbered(names: Sequence[str]) -> bool:
    """Return whether children are named as those of a ModuleList are."""
    return bool(names) and all(name == str(index) for index, name in enumerate(names))


def _class_of(script: Any, base: type) -> Any:
    return named_class(
        _name_of(script), base, is_numbered([name for name, _ in script._modules.items()])
    )


@contextmanager
def _in_mode_of(module: ScriptedModule) -> Iterator[None]:
    """Put a script module into its counterpart's mode for a while."""
    parts = [part for part in module.modules() if isinstance(part, ScriptedModule)]
    scripts = [part._script._c for part in parts]
    modes = [s.getattr("training") if s.hasattr("training") else None for s in scripts]
    try:
        for part, script, mode in zip(parts, scripts, modes, strict=True):
            if mode is not None:
                script.setattr("training", part.training)
        yield
    finally:
        for script, mode in zip(scripts, modes, strict=True):
            if mode is not None:
                script.setattr("training", mode)


def _fixed_in_training(root: nn.Module) -> Iterator[str]:
    """Name the operators that are told to behave as in training whatever the module's mode."""
    for part in root.modules():
        if not isinstance(part, ScriptedModule):
            continue
        for method in part._script._c._method_names():
            for node in _nodes(part._script._c._get_method(method).graph):
                place = TRAINING_ARGUMENTS.get(node.kind())
                if place is None or node.inputsAt(place).toIValue() is not True:
                    continue
                if place == 2 and node.inputsAt(1).toIValue() == 0:
                    continue  # dropout of nothing
                yield node.kind().removeprefix("aten::")


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _check_equal(name: str, found: Any, expected: Any) -> None:
    found, expected = (
        [t.detach() if isinstance(t, Tensor) else t for t in tree_leaves(result)]
        for result in (found, expected)
    )
    pairs = [(a, b) for a, b in zip(found, expected, strict=False) if isinstance(b, Tensor)]
    if len(found) != len(expected) or any(not isinstance(a, Tensor) for a, _ in pairs):
        raise TapError(
            f"{name}: expected {len(expected)} outputs as from TorchScript, got {len(found)}; "
            f"{WAY_OUT}"
        )
    for index, (a, b) in enumerate(pairs):
        if a.shape != b.shape or a.dtype != b.dtype:
            off = f"{a.dtype} {list(a.shape)} for {b.dtype} {list(b.shape)}"
        elif torch.equal(torch.isfinite(a), torch.isfinite(b)):
            exact = not (b.is_floating_point() or b.is_complex())
            tolerance = 0.0 if exact else _TOLERANCE.get(b.dtype, _COARSE_TOLERANCE)
            wide = torch.complex128 if b.is_complex() else torch.float64
            a, b = (torch.where(torch.isfinite(t), t, torch.zeros_like(t)).to(wide) for t in (a, b))
            far, size = (float(torch.linalg.vector_norm(t)) for t in (a - b, b))
            if far <= tolerance * size:
                continue
            off = f"{far:.3g} for a norm of {size:.3g} (tolerance {tolerance:g} of it)"
        else:
            off = "other non-finite elements"
        raise TapError(
            f"{name}: output {index}: expected what TorchScript computes, got a difference when "
            f"the modules are called one by one: {off}; {WAY_OUT}"
        )


# ---- graphs


def _program(graph: Any, where: str) -> _Program:
    return _Program(
        [value.debugName() for value in graph.inputs()],
        _steps(graph, where),
        [value.debugName() for value in graph.outputs()],
    )


def _steps(block: Any, where: str) -> list[_Step]:
    made = (_step(node, where) for node in block.nodes())
    return [step for step in made if step is not None]


def _step(node: Any, where: str) -> _Step | None:
    kind = node.kind()
    inputs = [value.debugName() for value in node.inputs()]
    outputs = [value.debugName() for value in node.outputs()]
    if kind == "prim::Constant":
        if node.output().type().kind() == "FunctionType":
            return None  # read where it is called
        constant = node.output().toIValue()
        return _setter(lambda: constant, [], outputs)
    if kind == "prim::If":
        return _if(node, inputs, outputs, where)
    if kind == "prim::Loop":
        return _loop(node, inputs, outputs, where)
    if kind == "prim::GetAttr":
        name = node.s("name")
        return _setter(lambda owner: _module(owner, where)._attribute(name), inputs, outputs)
    if kind == "prim::SetAttr":
        name = node.s("name")
        return _setter(lambda owner, v: _module(owner, where)._set_attribute(name, v), inputs, [])
    if kind == "prim::CallMethod":
        return _setter(_method_call(node, where), inputs, outputs)
    if kind == "prim::CallFunction":
        function = _program(_inlined(node), where)
        return _setter(lambda *values: function.run(values), inputs[1:], outputs)
    if kind == "prim::TupleSlice":
        begin, end = node.i("beg"), node.i("end")
        return _setter(lambda items: items[begin:end], inputs, outputs)
    first = next((value.type().kind() for value in node.inputs()), "")
    if kind in _OF_CONTAINERS and first in _CONTAINER_TYPES:
        return _setter(_OF_CONTAINERS[kind], inputs, outputs)
    if kind in _OF_LANGUAGE:
        return _setter(_OF_LANGUAGE[kind], inputs, outputs)
    return _setter(_operator(node, where), inputs, outputs)


def _setter(function: Callable[..., Any], inputs: list[str], outputs: list[str]) -> _Step:
    """Return the step that calls a function with values and names what it returns."""
    if len(outputs) == 1:
        (only,) = outputs

        def one(values: _Values) -> None:
            values[only] = function(*[values[name] for name in inputs])

        return one

    def several(values: _Values) -> None:
        result = function(*[values[name] for name in inputs])
        if outputs:
            values.update(zip(outputs, result, strict=True))

    return several


def _if(node: Any, inputs: list[str], outputs: list[str], where: str) -> _Step:
    ways = [
        (_steps(block, where), [value.debugName() for value in block.outputs()])
        for block in node.blocks()
    ]

    def step(values: _Values) -> None:
        steps, results = ways[0 if values[inputs[0]] else 1]
        for inner in steps:
            inner(values)
        values.update({name: values[result] for name, result in zip(outputs, results, strict=True)})

    return step


def _loop(node: Any, inputs: list[str], outputs: list[str], where: str) -> _Step:
    (block,) = node.blocks()
    steps = _steps(block, where)
    counter, *carried = [value.debugName() for value in block.inputs()]
    goes_on, *results = [value.debugName() for value in block.outputs()]

    def step(values: _Values) -> None:
        most, on = values[inputs[0]], values[inputs[1]]
        state = [values[name] for name in inputs[2:]]
        count = 0
        while on and count < most:
            values[counter] = count
            values.update(zip(carried, state, strict=True))
            for inner in steps:
                inner(values)
            on, state = values[goes_on], [values[name] for name in results]
            count += 1
        values.update(zip(outputs, state, strict=True))

    return step


def _module(value: Any, where: str) -> ScriptedModule:
    if not isinstance(value, ScriptedModule):
        raise _cannot(f"an object of TorchScript's own ({type(value).__name__})", where)
    return value


def _method_call(node: Any, where: str) -> Callable[..., Any]:
    name = node.s("name")
    # Tracing gives a module that is called again a copy of its forward.
    is_forward = re.fullmatch(r"forward\d*", name) is not None
    lifted = {
        index
        for index, value in enumerate(list(node.inputs())[1:])
        if value.node().kind() == "prim::GetAttr" and value.type().kind() == "TensorType"
    }

    def call(owner: Any, *arguments: Any) -> Any:
        module = _module(owner, where)
        if not is_forward:
            return module._run(name, arguments)
        states = [value for index, value in enumerate(arguments) if index not in lifted]
        try:
            module.__dict__["_method"] = name
            return module(*states, **{f"argument_{index}": arguments[index] for index in lifted})
        finally:
            module.__dict__["_method"] = "forward"

    return call


def _place(keyword: str) -> int:
    return int(keyword.removeprefix("argument_"))


def _inlined(call: Any) -> Any:
    """Return the graph of the function that a node calls, with all that it calls in turn."""
    graph: Any = torch._C.Graph()
    function, *arguments = call.inputs()
    constant = graph.createClone(function.node(), lambda value: value)
    graph.insertNode(constant)
    places = [constant.output()]
    for value in arguments:
        place = graph.addInput()
        place.setType(value.type())
        places.append(place)
    following = iter(places)
    clone = graph.createClone(call, lambda value: next(following))
    graph.insertNode(clone)
    for value in clone.outputs():
        graph.registerOutput(value)
    torch._C._jit_pass_inline(graph)
    return graph


def _operator(node: Any, where: str) -> Callable[..., Any]:
    kind = node.kind()
    text = node.schema()
    if text == "(no schema)":
        raise _cannot(kind, where)
    schema = torch._C.parse_schema(text)
    namespace, _, name = kind.partition("::")
    try:
        packet = getattr(getattr(torch.ops, namespace), name)
        found = getattr(packet, schema.overload_name or "default")
    except (AttributeError, RuntimeError) as error:
        raise _cannot(f"{kind} ({error})", where) from None
    keywords = [argument.name for argument in schema.arguments if argument.kwarg_only]
    if not keywords:
        return found  # type: ignore[no-any-return]
    count = len(schema.arguments) - len(keywords)

    def call(*arguments: Any) -> Any:
        named = dict(zip(keywords, arguments[count:], strict=True))
        return found(*arguments[:count], **named)

    return call


def _cannot(what: str, where: str) -> TapError:
    return TapError(
        f"TorchScript: {where or 'the program'}: expected operators that can be called one by one, "
        f"got {what}; {WAY_OUT}"
    )
