"""Capture hidden states and the gradients of the loss with respect to them.

(parameters, x, y) → hiddens, grads, and the gradient at the logits: one forward and one backward
pass, no gradient of a parameter, no copy of a state; row b of a gradient is sample b's. A first
forward pass without gradients (:mod:`.tracing`) tells which torch call makes each tapped
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

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map_only

from .._common.process import eager, own_warnings
from .captured import NO_GRADIENT, Captured, Held
from .isolation import check_model, constants_of, is_sharded
from .links import before_link
from .outputs import (
    Loss,
    Output,
    choose_output,
    classification_loss,
    loss_in,
    output_of,
    sample_rows,
)
from .plan import Calls, Mismatch, NotRequired, Path, Plan, Slot, Spot, Unreached, hooks_explained
from .points import Select, Tap, TapError, Taps, sighting_at, split_hidden
from .taps import find_taps
from .tracing import (
    Source,
    Trace,
    argument_state,
    as_plain,
    call_model,
    clean_name,
    signature,
    state_in,
    trace,
    watched,
    with_leaves,
)


class Probe:
    """Capture batch after batch of one model.

    Args:
        model: an unwrapped module in eval mode (see :func:`untouched`).
        select: what to observe, see :func:`fadiag_fast.capture.taps.find_taps`; None chooses.
        loss: (model output, y) → scalar; its reduction scales every gradient. None takes
            :func:`classification_loss`, or without labels the loss that the model returns.
        output: which part of a structured output counts as the logits, see :func:`choose_output`.
        batch_dim: the dimension of every state that counts samples.
        path: ``"torch.func"`` or ``"autograd"`` to force one; by default autograd for the model's
            own parameters and torch.func for given ones.
        several: whether more than one chain of blocks may be chosen.

    Attributes:
        taps: from the first batch on.
        path: the way taken, from the first batch on, and ``path_reason`` why not the other.
        reordered: whether a forward pass reached the taps in another order than the first one.
        has_output: whether the network has an output with a row for each sample.
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
        several: bool = True,
    ) -> None:
        check_model(model)
        self.model = model
        self.select = select
        self.loss = loss
        self.output = output
        self.batch_dim = batch_dim
        self.path: Path | None = path
        self.path_reason = ""
        self.reordered = False
        self.several = several
        self.has_output = True
        self._order: list[int] = []
        if path is None and is_sharded(model):
            self.path = "autograd"
        self._captured_once = False
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
            TapError: see :func:`.find_taps`; and where a state does not count
                samples along ``batch_dim``, lies on another device than the first one, or is
                sparse.
        """
        x = as_plain(x)
        key = signature(x)
        if key in self._plans:
            return self._plans[key]
        with torch.inference_mode(False):
            x = tree_map_only(Tensor, torch.clone, x)  # some models write into their input
        if self._taps is None:
            self._taps, seen = find_taps(
                self.model,
                x,
                self.select,
                lambda state: self.counts_samples(x, state),
                batch_dim=self.batch_dim,
                several=self.several,
            )
        else:
            options = {"return_hidden": True} if self.taps.hands_out else {}
            seen = trace(self.model, x, **options)
        self._plans[key] = self._plan(x, seen)
        return self._plans[key]

    def _plan(self, x: Any, seen: Trace) -> Plan:
        plan = Plan(writes_input=seen.recorder.wrote_input)
        name = type(self.model).__name__
        spots: dict[Source, int] = {}
        devices: dict[str, str] = {}
        sightings: list[Tensor] = []

        for tap in self.taps.points:
            sighting = sighting_at(seen, tap)
            if sighting is None:
                raise TapError(
                    f"{name}: {tap.where}: expected a call as in the first batch, got none: the "
                    f"forward pass depends on its input"
                )
            self._check_state(x, tap, sighting.tensor)
            sightings.append(sighting.tensor)
            devices.setdefault(str(sighting.tensor.device), tap.where)
            plan.overwritten.append(sighting.overwritten)
            if sighting.source is None:
                plan.of_tap.append(None)
                plan.unreachable = f"{tap.where} is not what a torch call returned"
                continue
            if sighting.source not in spots:
                spots[sighting.source] = len(plan.spots)
                state, clone = sighting.tensor, sighting.overwritten
                plan.spots.append(
                    Spot(sighting.source, state.shape, state.dtype, state.device, clone)
                )
            plan.of_tap.append(spots[sighting.source])
        if len(devices) > 1:
            places = ", ".join(f"{where} on {device}" for device, where in devices.items())
            raise TapError(f"{name}: expected all states on one device, got {places}")
        logits = self._output_of(seen.output)
        plan.has_output = self._has_rows(logits, sightings)
        if logits is None or not plan.has_output:
            plan.output = -1 if not plan.of_tap or plan.of_tap[-1] is None else plan.of_tap[-1]
            self.has_output = False
            return plan
        made = seen.recorder.before_link(logits)
        source = None
        if made is not logits and seen.recorder.source_of(made) is not None:
            plan.before_link, logits = True, made
            source = seen.recorder.source_of(made)
        elif not (isinstance(seen.output, Tensor) or self.taps.hands_out):
            # The loss reads the structure, so that the tensor inside has to be the slotted one.
            source = seen.recorder.source_of(logits)
            if source is None:
                plan.unreachable = "the output is not what a torch call returned"
        if source in spots:
            plan.output = spots[source]
        else:
            plan.output = len(plan.spots)
            plan.spots.append(Spot(source, logits.shape, logits.dtype, logits.device, False))
        return plan

    def _output_of(self, output: Any) -> Tensor | None:
        if self.taps.hands_out and not isinstance(output, Tensor):
            return split_hidden(output, type(self.model).__name__)[0]
        return output_of(output, self.output)

    def _has_rows(self, logits: Tensor | None, states: Sequence[Tensor]) -> bool:
        """Return whether a network's output can be told apart by the samples of its states."""
        if logits is None or not states:
            return logits is not None
        try:
            samples = states[0].shape[self.batch_dim]
            sample_rows(logits, samples, self.batch_dim, type(self.model).__name__)
        except TapError:
            # What is asked for by name must fit.
            if self.output is not None:
                raise
            return False
        return True

    def _sample_counts(self, x: Any) -> set[int]:
        """Return how many samples an input may hold: the lengths of its tensors' dimensions.

        The first dimension, and the one that counts samples in the states.
        """
        tensors = [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.dim()]
        sizes = {leaf.shape[0] for leaf in tensors}
        return sizes | {
            leaf.shape[self.batch_dim]
            for leaf in tensors
            if -leaf.dim() <= self.batch_dim < leaf.dim()
        }

    def counts_samples(self, x: Any, state: Tensor) -> bool:
        """Say whether a state's batch dimension is as long as one of the input's."""
        counts = self._sample_counts(x)
        fits = -state.dim() <= self.batch_dim < state.dim()
        return not counts or (fits and state.shape[self.batch_dim] in counts)

    def _check_state(self, x: Any, tap: Tap, state: Tensor) -> None:
        name = type(self.model).__name__
        if state.layout is not torch.strided:
            raise TapError(f"{name}: {tap.where}: expected a dense state, got {state.layout}")
        if self.counts_samples(x, state):
            return
        counts = self._sample_counts(x)
        others = [i for i, size in enumerate(state.shape) if size in counts]
        hint = f"; batch_dim={others[0]} would fit" if others else ""
        raise TapError(
            f"{name}: {tap.where}: expected a state with {' or '.join(map(str, sorted(counts)))} "
            f"samples along dimension {self.batch_dim}, got shape {list(state.shape)}{hint}"
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
        if self._captured_once:  # looking at warnings makes torch repeat the others
            return self._capture(x, y, constants)
        with self._gradients_required():
            captured = self._capture(x, y, constants)
        self._captured_once = True
        return captured

    def logits_with(self, x: Any, l: int | None, offset: Tensor | None) -> Tensor:
        """Return the logits, a row for each sample, of a forward pass with one state moved.

        Args:
            x: input batch, as for :meth:`capture`.
            l: index of the tap whose state is moved; every later use of it sees the moved state,
                a skip around the next block included. None moves nothing.
            offset: what is added to the state, ``[B, ...]`` with the samples first.

        Raises:
            TapError: the state is not what a torch call returned, and cannot be replaced.
        """
        x = as_plain(x)
        plan = self.prepare(x)
        index = None if l is None else plan.of_tap[l]
        if l is not None and index is None:
            raise TapError(
                f"{type(self.model).__name__}: {self.taps.points[l].where}: expected a state that "
                f"a torch call returned, got one that cannot be replaced in the forward pass"
            )
        moved = False

        def move(spot: int, tensor: Tensor) -> Tensor:
            nonlocal moved
            if spot != index or offset is None:
                return tensor
            moved = True
            by = offset if self.batch_dim == 0 else offset.movedim(0, self.batch_dim)
            return tensor + by

        with torch.inference_mode(False), torch.no_grad(), eager():
            leaves = list(tree_leaves(x))
            if plan.writes_input:
                leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            for spot, place in enumerate(plan.spots):
                if place.source is not None and place.source.kind == "input":
                    leaves[place.source.number] = move(spot, leaves[place.source.number])
            with Calls(plan, move):
                output = self._forward(with_leaves(x, leaves), None)
        if l is not None and not moved:
            raise self._changed(self.taps.points[l])
        logits = self.logits_of(output)
        samples = logits.shape[0] if offset is None else offset.shape[0]
        return sample_rows(logits, samples, self.batch_dim, type(self.model).__name__)

    @contextmanager
    def _gradients_required(self) -> Iterator[None]:
        """Refuse operators without a gradient, of which torch only warns and passes nothing on."""
        with own_warnings():
            warnings.filterwarnings("error", message=f".*{NO_GRADIENT}")
            try:
                yield
            except UserWarning as warning:
                operator, found, _ = str(warning).partition(f": an {NO_GRADIENT}")
                if not found:
                    raise
                raise TapError(
                    f"{type(self.model).__name__}: expected operators that have a gradient, got "
                    f"{operator}, through which none passes; probe the model before it is "
                    f"quantised, or name taps behind it"
                ) from None

    def _capture(self, x: Any, y: Any, constants: Mapping[str, Tensor] | None) -> Captured:
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
        except Mismatch:
            if plan.unreachable:
                raise
            # A model may keep something from its first pass: relative positions, for example.
            del self._plans[signature(x)]
            plan = self.prepare(x)
        try:
            return self._by_func(plan, x, y, constants)
        except Mismatch as mismatch:
            raise TapError(
                f"{type(self.model).__name__}: expected a forward pass that goes the same way when "
                f"it is run again, got one in which {mismatch}"
            ) from None

    def _note_order(self, met: list[int]) -> None:
        self._order = self._order or list(met)
        self.reordered |= met != self._order

    def _loss_of(self, output: Any, logits: Tensor | None, y: Any) -> Tensor:
        found: Any
        if self.loss is not None:
            found = self.loss(output, y)
        elif y is not None and logits is not None:
            found = classification_loss(logits, y)
        else:
            found = loss_in(output)
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
        running: dict[str, list[int]] = {}  # a module may call itself
        wanted: dict[tuple[str, str, int], list[int]] = {}
        for l, tap in enumerate(self.taps.points):
            wanted.setdefault((tap.module, tap.at, tap.call), []).append(l)

        def entered(name: str, args: Any, kwargs: Any) -> None:
            counts[name] = counts.get(name, -1) + 1
            running.setdefault(name, []).append(counts[name])
            for l in wanted.get((name, "input", counts[name]), ()):
                see(l, argument_state(args, kwargs))

        def left(name: str, result: Any) -> None:
            for l in wanted.get((name, "output", running[name].pop()), ()):
                see(l, state_in(result))

        if self.taps.hands_out:
            return watched({}, entered, left)
        names = {tap.module for tap in self.taps.points}
        return watched({name: self._modules[name] for name in names}, entered, left)

    def _by_func(
        self, plan: Plan, x: Any, y: Any, constants: Mapping[str, Tensor] | None
    ) -> Captured:
        if plan.unreachable:
            raise Mismatch(plan.unreachable)
        reached: set[int] = set()
        num_taps = len(self.taps.points)
        of_tap = [index for index in plan.of_tap if index is not None]

        def run(slots: Sequence[Tensor]) -> tuple[Tensor, tuple[Any, ...]]:
            values: dict[int, Tensor] = {}
            passed: dict[int, Tensor] = {}
            met: list[int] = []

            def slot(index: int, tensor: Tensor) -> Tensor:
                values[index] = tensor
                clone = plan.spots[index].clone
                passed[index] = Slot.apply(  # type: ignore[no-untyped-call]
                    tensor, slots[index], clone, reached, index
                )
                return passed[index]

            def see(l: int, tensor: Tensor | None) -> None:
                index = plan.of_tap[l]
                if index is None or tensor is None or passed.get(index) is not tensor:
                    raise Mismatch(f"{self.taps.points[l].where} is not the tensor traced")
                met.append(l)

            leaves = list(tree_leaves(x))
            if plan.writes_input:
                leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            for index, spot in enumerate(plan.spots):
                if spot.source is not None and spot.source.kind == "input":
                    leaves[spot.source.number] = slot(index, leaves[spot.source.number])
            with self._watch(see), Calls(plan, slot):
                output = self._forward(with_leaves(x, leaves), constants)
            if self.taps.hands_out:
                for l, state in enumerate(split_hidden(output, "the model")[1][:num_taps]):
                    see(l, state)
            if len(met) < num_taps:
                missing = next(l for l in range(num_taps) if l not in met)
                raise Mismatch(f"{self.taps.points[missing].where} was not reached")
            self._note_order(met)
            logits = self._output_of(output)
            if plan.output < 0:
                raise Mismatch("there is no output with a row for each sample")
            if plan.has_output and not plan.before_link:
                if logits is None:
                    raise Mismatch("there is no output")
                if plan.spots[plan.output].source is None:
                    logits = slot(plan.output, logits)
                elif passed.get(plan.output) is not logits:
                    raise Mismatch("the output is not the tensor that was traced")
            elif plan.output not in passed:
                raise Mismatch("the output is not what was traced")
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
        Where that is not known it begins at the input, or at the parameters if no floating input
        leads to the first state. Their gradients are still never asked for, but what a backward
        pass through them would need is kept for nothing, and may not be overwritten.
        """
        if None not in plan.of_tap and not is_sharded(self.model):
            try:
                return self._autograd_pass(plan, x, y, constants, "states")
            except Mismatch:
                # A model may keep something from its first pass: relative positions, for example.
                del self._plans[signature(x)]
                plan = self.prepare(x)
            except NotRequired:
                pass
        try:
            return self._autograd_pass(plan, x, y, constants, "input")
        except (Unreached, NotRequired):
            return self._autograd_pass(plan, x, y, constants, "parameters")

    def _autograd_pass(
        self,
        plan: Plan,
        x: Any,
        y: Any,
        constants: Mapping[str, Tensor] | None,
        start: Literal["states", "input", "parameters"],
    ) -> Captured:
        num_taps = len(self.taps.points)
        hiddens: list[Tensor | None] = [None] * num_taps
        # A tensor's gradient edge stays that of the moment, whatever is written into it later.
        edges: list[GradientEdge | None] = [None] * num_taps
        met: list[int] = []
        passed: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}

        def change(index: int, tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
            values[index] = tensor
            passed[index] = tensor.clone() if plan.spots[index].clone else tensor
            return passed[index]

        def see(l: int, tensor: Tensor | None) -> None:
            if tensor is None:
                return
            met.append(l)
            if start == "states":
                index = plan.of_tap[l]
                if index not in passed or passed[index] is not tensor:
                    raise Mismatch(f"{self.taps.points[l].where} is not the tensor traced")
                hiddens[l] = values[index]  # no torch calls here: they are being counted
                return
            edges[l] = get_gradient_edge(tensor) if tensor.requires_grad else None
            hiddens[l] = tensor.detach().clone() if plan.overwritten[l] else tensor

        def differentiable(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()
            floating = tensor.is_floating_point() or tensor.is_complex()
            return tensor.requires_grad_() if floating else tensor

        def run() -> Captured:
            inputs = x if start == "states" else tree_map_only(Tensor, differentiable, x)
            if plan.writes_input:
                inputs = tree_map_only(Tensor, torch.clone, inputs)
            counted: AbstractContextManager[object] = nullcontext()
            if start == "states":
                leaves = list(tree_leaves(inputs))
                for index, spot in enumerate(plan.spots):
                    if spot.source is not None and spot.source.kind == "input":
                        leaves[spot.source.number] = change(index, leaves[spot.source.number])
                inputs, counted = with_leaves(inputs, leaves), Calls(plan, change)
            with self._watch(see), counted:
                output = self._forward(inputs, None)
            logits = self._output_of(output)
            if self.taps.hands_out:
                for l, state in enumerate(split_hidden(output, "the model")[1][:num_taps]):
                    see(l, state)
            for l, tap in enumerate(self.taps.points):
                seen = hiddens[l]
                if seen is None:
                    raise self._changed(tap)
                if start == "states":
                    edges[l] = get_gradient_edge(seen)
            self._note_order(met)
            loss = self._loss_of(self._for_loss(output, logits), logits, y)
            if logits is not None and plan.has_output:
                edge = get_gradient_edge(logits) if logits.requires_grad else None
                made = before_link(logits) if edge is not None else None
                if plan.before_link and plan.output in values:
                    logits = values[plan.output]
                    edge = get_gradient_edge(logits) if logits.requires_grad else None
                elif made is not None:
                    edge = GradientEdge(*made)
            else:
                logits, edge = hiddens[-1], edges[-1]
            assert logits is not None  # a tap has been seen
            targets = [*edges, edge]
            at = {i: target for i, target in enumerate(targets) if target is not None}
            found: Sequence[Tensor | None] = ()
            if at and loss.requires_grad:
                found = self._gradients(loss, list(at.values()))
            grads = dict(zip(at, found, strict=False))
            self._check_reached([grads.get(l) is not None for l in range(num_taps)])
            logit_grads = grads.get(num_taps)
            return self._captured(
                [h.detach() for h in hiddens if h is not None],
                [grad for l in range(num_taps) if (grad := grads[l]) is not None],
                logits.detach(),
                torch.zeros_like(logits) if logit_grads is None else logit_grads,
                loss.detach(),
            )

        with torch.inference_mode(False), torch.enable_grad(), eager(), hooks_explained(start):
            if constants is None and is_sharded(self.model):
                return run()
            constants = constants_of(self.model) if constants is None else constants
            if start == "parameters":
                buffers = {name for name, _ in self.model.named_buffers()}
                constants = {
                    name: t if name in buffers else differentiable(t)
                    for name, t in constants.items()
                }
            # The backward pass is inside: a checkpointed block runs its forward again in it.
            held = {f"model.{name}": tensor for name, tensor in constants.items()}
            captured: Captured = torch.func.functional_call(
                Held(self.model), held, (run,), strict=False
            )
            return captured

    def _gradients(self, loss: Tensor, at: Sequence[GradientEdge]) -> Sequence[Tensor | None]:
        try:
            return torch.autograd.grad(loss, at, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise TapError(
                f"{type(self.model).__name__}: expected torch.utils.checkpoint with "
                f"use_reentrant=False, or none in eval mode, got use_reentrant=True, which can be "
                f"differentiated by parameters only"
            ) from None

    def logits_of(self, output: Any) -> Tensor:
        """Return the part of the model's output that counts as its logits.

        Raises:
            TapError: there is none.
        """
        found = self._output_of(output)
        return choose_output(output, self.output) if found is None else found

    def _for_loss(self, output: Any, logits: Tensor | None) -> Any:
        """Return what a loss function is given: a structured output as it is, else the logits."""
        whole = self.taps.hands_out or isinstance(output, Tensor)
        return logits if whole and logits is not None else output

    def _changed(self, tap: Tap) -> TapError:
        return TapError(
            f"{type(self.model).__name__}: {tap.where}: expected a call as in the first batch, got "
            f"none: the forward pass depends on its input"
        )

    def _check_reached(self, reached: Sequence[bool]) -> None:
        lost = [tap.where for tap, yes in zip(self.taps.points, reached, strict=True) if not yes]
        parameters = list(self.model.parameters())
        frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
        if lost and frozen and is_sharded(self.model):
            raise Unreached(
                f"{type(self.model).__name__}: {', '.join(lost)}: expected a state that autograd "
                f"can reach, got one behind sharded parameters that are all frozen; unfreeze one "
                f"before the first tap"
            )
        if lost:
            raise Unreached(
                f"{type(self.model).__name__}: {', '.join(lost)}: expected a state that the loss "
                f"depends on, got one that is detached, unused or overwritten; name taps "
                f"without it"
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

        if hiddens and self.has_output:
            samples = by_sample(hiddens[0]).shape[0]
            name = type(self.model).__name__
            logits, logit_grads = (
                sample_rows(t, samples, self.batch_dim, name) for t in (logits, logit_grads)
            )
        elif hiddens:
            logits, logit_grads = by_sample(logits), by_sample(logit_grads)
        return Captured(
            [by_sample(h) for h in hiddens],
            [by_sample(g) for g in grads],
            logits,
            logit_grads,
            loss,
        )
