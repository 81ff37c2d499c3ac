"""Capture hidden states and the gradients of the loss with respect to them.

(parameters, x, y) → hiddens, grads, and the gradient at the logits: one forward and one backward
pass, no gradient of a parameter, no copy of a state; row b of a gradient is sample b's. A first
forward pass without gradients (:mod:`fadiag_fast.tracing`) tells which torch call makes each tapped
state. There are two ways from there, and they give the same figures:

``torch.func``: the result of that call passes through a gradient slot, an identity whose backward
hands the gradient to a second, empty argument, and the loss is differentiated with respect to the
slots. That is a function of the parameters: it can be mapped over a stack of checkpoints
(``torch.vmap``) and traced into one graph. Its wrappers cost host time at every operation.

``autograd``: the states are seen by hooks and differentiated as they are. One model that runs
eagerly is captured so: it costs no more than the two passes (benchmarks/capture.py), and it also
serves what torch.func refuses: autograd functions of the old style, saved-tensor hooks, buffers
that the forward pass updates, sharded parameters.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .taps import Select, Tap, TapError, Taps, find_taps, sighting_at, split_hidden
from .tracing import (
    Source,
    Trace,
    argument_state,
    as_plain,
    call_model,
    clean_name,
    eager,
    signature,
    state_in,
    tensors_in,
    trace,
    watched,
    with_leaves,
)

Loss = Callable[[Any, Any], Tensor]
Output = str | int | Callable[[Any], Tensor]
Path = Literal["torch.func", "autograd"]


class Captured(NamedTuple):
    """One batch, seen from inside.

    Attributes:
        hiddens: one per tap, ``[B, ...]`` each.
        grads: the gradients of the loss at ``hiddens``, same shapes and dtypes. A loss with mean
            reduction puts the factor 1/B into them.
        logits: the network's output, or the tensor chosen from it.
        logit_grads: the gradient of the loss at ``logits``.
        loss: scalar.
    """

    hiddens: list[Tensor]
    grads: list[Tensor]
    logits: Tensor
    logit_grads: Tensor
    loss: Tensor


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; leave modes, buffers and random number generators as they were."""
    modes = [(module, module.training) for module in model.modules()]
    # A forward pass may update buffers even in eval mode: a counter, for example.
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        model.eval()
        with torch.random.fork_rng(devices=sorted(devices, key=str), enabled=True):
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def constants_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers by name, detached: no gradient is taken at them."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return parameters | {name: buffer.detach() for name, buffer in model.named_buffers()}


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


class _Slot(torch.autograd.Function):
    """Pass a state on; in the backward, give its gradient to ``slot`` as well."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, slot: Tensor, clone: bool, reached: set[int], index: int) -> Tensor:
        return h.clone() if clone else h.view_as(h)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.reached, ctx.index = inputs[3], inputs[4]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        ctx.reached.add(ctx.index)
        return grad, grad, None, None, None


@dataclass(frozen=True)
class _Spot:
    """A tensor of the forward pass that one or more taps see."""

    source: Source | None  # None: what the model returns
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    clone: bool  # something writes into it after the tap


@dataclass
class Plan:
    """How the taps are reached for inputs of one shape.

    Attributes:
        spots: the tensors to be differentiated.
        of_tap: per tap the index of its spot; None where its source is not known.
        output: index of the logits' spot.
        unreachable: why ``torch.func`` cannot reach the taps; "" where it can.
    """

    spots: list[_Spot] = field(default_factory=list)
    of_tap: list[int | None] = field(default_factory=list)
    output: int = -1
    unreachable: str = ""


class _Mismatch(RuntimeError):
    """Report a forward pass that went another way than the one that was traced."""


class _Calls(TorchFunctionMode):
    """Count torch calls as the recorder did; change the results of those that a plan names."""

    def __init__(self, plan: Plan, change: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        self.num_calls = 0
        self.change = change
        self.by_call: dict[int, list[tuple[int, _Spot, int]]] = {}
        for index, spot in enumerate(plan.spots):
            if spot.source is not None and spot.source.kind == "call":
                place = (index, spot, spot.source.item)
                self.by_call.setdefault(spot.source.number, []).append(place)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not tensors_in(result):
            return result
        for index, spot, item in self.by_call.get(self.num_calls, ()):
            tensors = tensors_in(result)
            if item >= len(tensors) or tensors[item].shape != spot.shape:
                raise _Mismatch(f"call {self.num_calls} returned something else than when traced")
            result = _with_item(result, item, self.change(index, tensors[item]))
        self.num_calls += 1
        return result


def _with_item(result: Any, item: int, tensor: Tensor) -> Any:
    if isinstance(result, Tensor):
        return tensor
    places = [i for i, value in enumerate(result) if isinstance(value, Tensor)]
    values = list(result)
    values[places[item]] = tensor
    if isinstance(result, list):
        return values
    # A plain tuple and torch.return_types take a sequence, a NamedTuple takes its fields.
    return type(result)(*values) if hasattr(result, "_fields") else type(result)(values)


def choose_output(output: Any, choose: Output | None) -> Tensor:
    """Return the tensor of a model's output that counts as its logits.

    A tensor is taken itself; else ``logits``, ``out``, ``last_hidden_state`` or the first floating
    tensor. ``choose`` names an attribute, key or index instead, or computes the tensor.

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
    elif isinstance(output, Tensor):
        found = output
    else:
        for name in ("logits", "out", "last_hidden_state"):
            found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
            if isinstance(found, Tensor):
                break
        else:
            found = state_in(output)
    if not isinstance(found, Tensor):
        keys = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        asked = f" at output={choose!r}" if choose is not None else " or something with logits"
        raise TapError(
            f"output: expected the model to return a tensor{asked}, got "
            f"{type(output).__name__}{keys}"
        )
    return found


class Probe:
    """Capture batch after batch of one model.

    Args:
        model: an unwrapped module in eval mode (see :func:`untouched`).
        select: what to observe, see :func:`fadiag_fast.taps.find_taps`; None chooses.
        loss: (model output, y) → scalar; its reduction scales every gradient. None takes
            :func:`classification_loss`, or without labels the loss that the model returns.
        output: which part of a structured output counts as the logits, see :func:`choose_output`.
        batch_dim: the dimension of every state that counts samples.
        path: ``"torch.func"`` or ``"autograd"`` to force one; by default autograd for the model's
            own parameters and torch.func for given ones.

    Attributes:
        taps: from the first batch on.
        path: the way taken, from the first batch on, and ``path_reason`` why not the other.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        select: Select | None = None,
        loss: Loss | None = None,
        output: Output | None = None,
        batch_dim: int = 0,
        path: Path | None = None,
    ) -> None:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_inference():
                raise TapError(
                    f"{type(model).__name__}: {name}: expected an ordinary tensor, got one made "
                    f"under torch.inference_mode, which autograd cannot use; build the model "
                    f"outside of it"
                )
        self.model = model
        self.select = select
        self.loss = loss
        self.output = output
        self.batch_dim = batch_dim
        self.forced_path = path
        self.path: Path | None = path
        self.path_reason = ""
        self._taps: Taps | None = None
        self._plans: dict[tuple[Any, ...], Plan] = {}
        modules = {clean_name(name): module for name, module in model.named_modules()}
        self._modules: Mapping[str, nn.Module] = modules

    @property
    def taps(self) -> Taps:
        if self._taps is None:
            raise RuntimeError("Probe.taps: expected prepare or capture to be called first")
        return self._taps

    # ---- planning

    def prepare(self, x: Any) -> Plan:
        """Find the taps, and how they are reached for inputs shaped like ``x``.

        Raises:
            TapError: see :func:`fadiag_fast.taps.find_taps`; and where a state does not count
                samples along ``batch_dim``, lies on another device than the first one, is sparse,
                or is overwritten beyond reach.
        """
        x = as_plain(x)
        key = signature(x)
        if key in self._plans:
            return self._plans[key]
        if self._taps is None:
            self._taps, seen = find_taps(
                self.model, x, self.select, lambda state: self._counts_samples(x, state)
            )
        else:
            options = {"return_hidden": True} if self.taps.hands_out else {}
            seen = trace(self.model, x, **options)
        self._plans[key] = self._plan(x, seen)
        return self._plans[key]

    def _plan(self, x: Any, seen: Trace) -> Plan:
        plan = Plan()
        name = type(self.model).__name__
        spots: dict[Source, int] = {}
        devices: dict[str, str] = {}

        for tap in self.taps.points:
            sighting = sighting_at(seen, tap)
            if sighting is None:
                raise TapError(
                    f"{name}: {tap.where}: expected a call as in the first batch, got none: the "
                    f"forward pass depends on its input"
                )
            self._check_state(x, tap, sighting.tensor)
            devices.setdefault(str(sighting.tensor.device), tap.where)
            if sighting.source is None:
                plan.of_tap.append(None)
                plan.unreachable = f"{tap.where} is not made by a torch call"
                if sighting.overwritten:
                    raise TapError(
                        f"{name}: {tap.where}: expected a state that rests after the tap, got one "
                        f"that is overwritten in place and not made by a torch call"
                    )
                continue
            if sighting.source not in spots:
                spots[sighting.source] = len(plan.spots)
                state, clone = sighting.tensor, sighting.overwritten
                plan.spots.append(
                    _Spot(sighting.source, state.shape, state.dtype, state.device, clone)
                )
            plan.of_tap.append(spots[sighting.source])
        if len(devices) > 1:
            places = ", ".join(f"{where} on {device}" for device, where in devices.items())
            raise TapError(f"{name}: expected all states on one device, got {places}")
        logits = self.logits_of(seen.output)
        source = None
        if not (isinstance(seen.output, Tensor) or self.taps.hands_out):
            # The loss reads the structure, so that the tensor inside has to be the slotted one.
            source = seen.recorder.source_of(logits)
            if source is None:
                plan.unreachable = "the output is not made by a torch call"
        if source in spots:
            plan.output = spots[source]
        else:
            plan.output = len(plan.spots)
            plan.spots.append(_Spot(source, logits.shape, logits.dtype, logits.device, False))
        return plan

    def _counts_samples(self, x: Any, state: Tensor) -> bool:
        """Say whether a state's batch dimension is as long as the input's."""
        first = next((leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)), None)
        if first is None or first.dim() == 0:
            return True
        sizes = {first.shape[0]}
        if -first.dim() <= self.batch_dim < first.dim():
            sizes.add(first.shape[self.batch_dim])
        fits = -state.dim() <= self.batch_dim < state.dim()
        return fits and state.shape[self.batch_dim] in sizes

    def _check_state(self, x: Any, tap: Tap, state: Tensor) -> None:
        name = type(self.model).__name__
        if state.layout is not torch.strided:
            raise TapError(f"{name}: {tap.where}: expected a dense state, got {state.layout}")
        if self._counts_samples(x, state):
            return
        first = next(leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor))
        others = [i for i, size in enumerate(state.shape) if size == first.shape[0]]
        hint = f"; batch_dim={others[0]} would fit" if others else ""
        raise TapError(
            f"{name}: {tap.where}: expected a state with {first.shape[0]} samples along dimension "
            f"{self.batch_dim}, got shape {list(state.shape)}{hint}"
        )

    # ---- capturing

    def capture(self, x: Any, y: Any, *, constants: Mapping[str, Tensor] | None = None) -> Captured:
        """Run one forward and one backward pass and return what :class:`Captured` lists.

        Args:
            x: input batch: a tensor, a tuple of arguments, or a dict of keywords.
            y: targets, passed to the loss.
            constants: parameters and buffers by name; None takes the model's own.

        Raises:
            TapError: a state cannot be observed, or the loss does not depend on it.
            ValueError: the loss is not a scalar.
        """
        x = as_plain(x)
        plan = self.prepare(x)
        if constants is not None and self.path is None:
            self.path = "torch.func"
        if self.path == "autograd":
            return self._by_autograd(plan, x, y, constants)
        if self.path == "torch.func":
            return self._by_func_again(plan, x, y, constants)
        try:
            captured = self._by_autograd(plan, x, y, constants)
            self.path = "autograd"
            return captured
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            if plan.unreachable:
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        captured = self._by_func_again(plan, x, y, constants)
        self.path, self.path_reason = "torch.func", f"autograd: {reason}"
        return captured

    def _by_func_again(
        self, plan: Plan, x: Any, y: Any, constants: Mapping[str, Tensor] | None
    ) -> Captured:
        """Capture by torch.func; where the pass went another way, trace it once more."""
        try:
            return self._by_func(plan, x, y, constants)
        except _Mismatch:
            if plan.unreachable:
                raise
            # A model may keep something from its first pass: relative positions, for example.
            del self._plans[signature(x)]
            return self._by_func(self.prepare(x), x, y, constants)

    def _loss_of(self, output: Any, logits: Tensor, y: Any) -> Tensor:
        found: Any
        if self.loss is not None:
            found = self.loss(output, y)
        elif y is not None:
            found = classification_loss(logits, y)
        else:
            given = isinstance(output, Mapping)
            found = output.get("loss") if given else getattr(output, "loss", None)
            if found is None:
                raise TapError(
                    f"{type(self.model).__name__}: expected labels, a loss function, or a model "
                    f"that returns its loss, got {type(output).__name__} without one"
                )
        if not isinstance(found, Tensor):
            raise ValueError(f"loss: expected a scalar tensor, got {type(found).__name__}")
        if found.dim() != 0:
            raise ValueError(f"loss: expected a scalar, got shape {list(found.shape)}")
        return found

    def _forward(self, x: Any, constants: Mapping[str, Tensor] | None) -> Any:
        options = {"return_hidden": True} if self.taps.hands_out else {}
        if constants is None:
            return call_model(self.model, x, **options)
        args = () if isinstance(x, Mapping) else tuple(x) if isinstance(x, tuple | list) else (x,)
        kwargs = {**x, **options} if isinstance(x, Mapping) else options
        return torch.func.functional_call(self.model, dict(constants), args, kwargs, strict=False)

    def _watch(self, see: Callable[[int, Tensor | None], None]) -> Any:
        """Return a context in which ``see(l, tensor)`` is called at every tap's call."""
        counts: dict[str, int] = {}
        wanted: dict[tuple[str, str, int], list[int]] = {}
        for l, tap in enumerate(self.taps.points):
            wanted.setdefault((tap.module, tap.at, tap.call), []).append(l)

        def entered(name: str, args: Any, kwargs: Any) -> None:
            counts[name] = counts.get(name, -1) + 1
            for l in wanted.get((name, "input", counts[name]), ()):
                see(l, argument_state(args, kwargs))

        def left(name: str, result: Any) -> None:
            # A module that calls itself would end its inner call first; none of torch's does.
            for l in wanted.get((name, "output", counts[name]), ()):
                see(l, state_in(result))

        if self.taps.hands_out:
            return watched({}, entered, left)
        names = {tap.module for tap in self.taps.points}
        return watched({name: self._modules[name] for name in names}, entered, left)

    def _by_func(
        self, plan: Plan, x: Any, y: Any, constants: Mapping[str, Tensor] | None
    ) -> Captured:
        if plan.unreachable:
            raise _Mismatch(plan.unreachable)
        reached: set[int] = set()
        num_taps = len(self.taps.points)
        of_tap = [index for index in plan.of_tap if index is not None]

        def run(slots: Sequence[Tensor]) -> tuple[Tensor, tuple[Any, ...]]:
            values: dict[int, Tensor] = {}
            passed: dict[int, Tensor] = {}
            met: set[int] = set()

            def slot(index: int, tensor: Tensor) -> Tensor:
                values[index] = tensor
                clone = plan.spots[index].clone
                passed[index] = _Slot.apply(  # type: ignore[no-untyped-call]
                    tensor, slots[index], clone, reached, index
                )
                return passed[index]

            def see(l: int, tensor: Tensor | None) -> None:
                index = plan.of_tap[l]
                if index is None or tensor is None or passed.get(index) is not tensor:
                    raise _Mismatch(f"{self.taps.points[l].where} is not the tensor traced")
                met.add(l)

            leaves = list(tree_leaves(x))
            for index, spot in enumerate(plan.spots):
                if spot.source is not None and spot.source.kind == "input":
                    leaves[spot.source.number] = slot(index, leaves[spot.source.number])
            with self._watch(see), _Calls(plan, slot):
                output = self._forward(with_leaves(x, leaves), constants)
            if self.taps.hands_out:
                for l, state in enumerate(split_hidden(output, "the model")[1][:num_taps]):
                    see(l, state)
            if len(met) < num_taps:
                missing = next(l for l in range(num_taps) if l not in met)
                raise _Mismatch(f"{self.taps.points[missing].where} was not reached")
            logits = self.logits_of(output)
            if plan.spots[plan.output].source is None:
                logits = slot(plan.output, logits)
            elif passed.get(plan.output) is not logits:
                raise _Mismatch("the output is not the tensor that was traced")
            loss = self._loss_of(self._for_loss(output, logits), logits, y)
            hiddens = [values[index] for index in of_tap]
            return loss, (hiddens, values[plan.output])

        slots = [
            torch.zeros((), dtype=s.dtype, device=s.device).expand(s.shape) for s in plan.spots
        ]
        # The outer no_grad keeps the parameters out of any graph; grad has its own.
        with torch.inference_mode(False), torch.no_grad(), eager():
            grads, (loss, (hiddens, logits)) = torch.func.grad_and_value(run, has_aux=True)(slots)
        self._check_reached([index in reached for index in of_tap])
        return self._captured(
            hiddens, [grads[index] for index in of_tap], logits, grads[plan.output], loss
        )

    def _by_autograd(
        self, plan: Plan, x: Any, y: Any, constants: Mapping[str, Tensor] | None
    ) -> Captured:
        """Capture by ordinary autograd.

        The graph begins at the states, which are made to require gradients where torch makes them.
        Where that is not known it begins at the parameters, whose gradients are still never asked
        for: what a backward pass through them would need is kept for nothing.
        """
        known = None not in plan.of_tap and not _is_sharded(self.model)
        if known:
            try:
                return self._autograd_pass(plan, x, y, constants, from_weights=False)
            except _Mismatch:
                # A model may keep something from its first pass: relative positions, for example.
                del self._plans[signature(x)]
                plan = self.prepare(x)
        return self._autograd_pass(plan, x, y, constants, from_weights=True)

    def _autograd_pass(
        self,
        plan: Plan,
        x: Any,
        y: Any,
        constants: Mapping[str, Tensor] | None,
        from_weights: bool,
    ) -> Captured:
        num_taps = len(self.taps.points)
        hiddens: list[Tensor | None] = [None] * num_taps
        passed: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}

        def change(index: int, tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
            values[index] = tensor
            passed[index] = tensor.clone() if plan.spots[index].clone else tensor
            return passed[index]

        def see(l: int, tensor: Tensor | None) -> None:
            index = plan.of_tap[l]
            if index in passed and passed[index] is tensor:
                hiddens[l] = values[index]
            elif from_weights:
                hiddens[l] = tensor
            else:
                raise _Mismatch(f"{self.taps.points[l].where} is not the tensor traced")

        def differentiable(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()
            floating = tensor.is_floating_point() or tensor.is_complex()
            return tensor.requires_grad_() if floating else tensor

        with torch.inference_mode(False), torch.enable_grad(), eager():
            if constants is None and not _is_sharded(self.model):
                constants = constants_of(self.model)
            if from_weights:
                buffers = {name for name, _ in self.model.named_buffers()}
                if constants is not None:
                    constants = {
                        name: t if name in buffers else differentiable(t)
                        for name, t in constants.items()
                    }
                x = tree_map_only(Tensor, differentiable, x)
            leaves = list(tree_leaves(x))
            for index, spot in enumerate(plan.spots):
                if spot.source is not None and spot.source.kind == "input":
                    leaves[spot.source.number] = change(index, leaves[spot.source.number])
            counted = not from_weights or any(spot.clone for spot in plan.spots)
            with self._watch(see), _Calls(plan, change) if counted else nullcontext():
                output = self._forward(with_leaves(x, leaves), constants)
            logits = self.logits_of(output)
            if self.taps.hands_out:
                for l, state in enumerate(split_hidden(output, "the model")[1][:num_taps]):
                    see(l, state)
            for l, tap in enumerate(self.taps.points):
                if hiddens[l] is None:
                    raise self._changed(tap)
            states = [h for h in hiddens if h is not None]
            loss = self._loss_of(self._for_loss(output, logits), logits, y)
            targets = [*states, logits]
            if loss.requires_grad:
                at = [i for i, target in enumerate(targets) if target.requires_grad]
                found = torch.autograd.grad(loss, [targets[i] for i in at], allow_unused=True)
                grads = dict(zip(at, found, strict=True))
            else:
                grads = {}
        self._check_reached([grads.get(l) is not None for l in range(num_taps)])
        logit_grads = grads.get(num_taps)
        return self._captured(
            [h.detach() for h in states],
            [grads[l] for l in range(num_taps)],
            logits.detach(),
            torch.zeros_like(logits) if logit_grads is None else logit_grads,
            loss.detach(),
        )

    def logits_of(self, output: Any) -> Tensor:
        """Return the part of the model's output that counts as its logits."""
        if self.taps.hands_out and not isinstance(output, Tensor):
            return split_hidden(output, type(self.model).__name__)[0]
        return choose_output(output, self.output)

    def _for_loss(self, output: Any, logits: Tensor) -> Any:
        """Return what a loss function is given: a structured output as it is, else the logits."""
        return logits if self.taps.hands_out or isinstance(output, Tensor) else output

    def _changed(self, tap: Tap) -> TapError:
        return TapError(
            f"{type(self.model).__name__}: {tap.where}: expected a call as in the first batch, got "
            f"none: the forward pass depends on its input"
        )

    def _check_reached(self, reached: Sequence[bool]) -> None:
        lost = [tap.where for tap, yes in zip(self.taps.points, reached, strict=True) if not yes]
        if lost:
            raise TapError(
                f"{type(self.model).__name__}: {', '.join(lost)}: expected a state that the loss "
                f"depends on, got one that is detached, unused or overwritten; name taps without it"
            )

    def _captured(
        self,
        hiddens: Sequence[Tensor],
        grads: Sequence[Tensor],
        logits: Tensor,
        logit_grads: Tensor,
        loss: Tensor,
    ) -> Captured:
        def by_sample(tensor: Tensor) -> Tensor:
            return tensor if self.batch_dim == 0 else tensor.movedim(self.batch_dim, 0)

        samples = by_sample(hiddens[0]).shape[0] if hiddens else None
        if samples is not None and logits.dim() and logits.shape[0] != samples:
            logits, logit_grads = by_sample(logits), by_sample(logit_grads)
        return Captured(
            [by_sample(h) for h in hiddens],
            [by_sample(g) for g in grads],
            logits,
            logit_grads,
            loss,
        )


def _is_sharded(model: nn.Module) -> bool:
    """Say whether parameters are spread over processes: only the model itself can gather them."""
    return any(type(p.detach()) is not Tensor for p in model.parameters())
