"""Capture by ordinary autograd: the states are seen by hooks and differentiated as they are.

It costs one model that runs eagerly no more than the two passes, and serves what torch.func
refuses: autograd functions of the old style, saved-tensor hooks, buffers that the forward pass
updates, sharded parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map_only

from .._common.process import eager
from .captured import Captured, Held
from .isolation import constants_of, is_sharded
from .links import before_link
from .network import ObservedNetwork
from .plan import Calls, Mismatch, NotRequired, Plan, Unreached, changed_input, hooks_explained
from .planning import Planner
from .points import TapError, split_hidden


def capture_by_autograd(
    network: ObservedNetwork,
    planner: Planner,
    x: Any,
    y: Any,
    constants: Mapping[str, Tensor] | None,
) -> Captured:
    """Run one forward and one backward pass; see :meth:`.Probe.capture`.

    The graph begins at the states, which are made to require gradients where torch makes them.
    Where that is not known it begins at the input, or at the parameters if no floating input
    leads to the first state. Their gradients are still never asked for, but what a backward
    pass through them would need is kept for nothing, and may not be overwritten.
    """
    plan = planner.plan_for(x)
    if None not in plan.of_tap and not is_sharded(network.model):
        try:
            return _pass(network, plan, x, y, constants, "states")
        except Mismatch:
            plan = planner.plan_again(x)
        except NotRequired:
            pass
    try:
        return _pass(network, plan, x, y, constants, "input")
    except (Unreached, NotRequired):
        return _pass(network, plan, x, y, constants, "parameters")


def _pass(
    network: ObservedNetwork,
    plan: Plan,
    x: Any,
    y: Any,
    constants: Mapping[str, Tensor] | None,
    start: Literal["states", "input", "parameters"],
) -> Captured:
    num_taps = len(network.taps.points)
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
                raise Mismatch(f"{network.taps.points[l].where} is not the tensor traced")
            hiddens[l] = values[index]  # no torch calls here: they are being counted
            return
        edges[l] = get_gradient_edge(tensor) if tensor.requires_grad else None
        hiddens[l] = tensor.detach().clone() if plan.overwritten[l] else tensor

    def differentiable(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        floating = tensor.is_floating_point() or tensor.is_complex()
        return tensor.requires_grad_() if floating else tensor

    def run() -> Captured:
        counted: AbstractContextManager[object] = nullcontext()
        if start == "states":
            inputs, counted = changed_input(plan, x, change), Calls(plan, change)
        else:
            inputs = tree_map_only(Tensor, differentiable, x)
            if plan.writes_input:
                inputs = tree_map_only(Tensor, torch.clone, inputs)
        with network.watch(see), counted:
            output = network.forward(inputs, None)
        logits = network.output_of(output)
        if network.taps.hands_out:
            for l, state in enumerate(split_hidden(output, "the model")[1][:num_taps]):
                see(l, state)
        for l, tap in enumerate(network.taps.points):
            seen = hiddens[l]
            if seen is None:
                raise network.changed(tap)
            if start == "states":
                edges[l] = get_gradient_edge(seen)
        network.note_order(met)
        loss = network.loss_of(network.for_loss(output, logits), logits, y)
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
            found = _gradients(network, loss, list(at.values()))
        grads = dict(zip(at, found, strict=False))
        network.check_reached([grads.get(l) is not None for l in range(num_taps)])
        logit_grads = grads.get(num_taps)
        return network.captured(
            [h.detach() for h in hiddens if h is not None],
            [grad for l in range(num_taps) if (grad := grads[l]) is not None],
            logits.detach(),
            torch.zeros_like(logits) if logit_grads is None else logit_grads,
            loss.detach(),
        )

    with torch.inference_mode(False), torch.enable_grad(), eager(), hooks_explained(start):
        if constants is None and is_sharded(network.model):
            return run()
        constants = constants_of(network.model) if constants is None else constants
        if start == "parameters":
            buffers = {name for name, _ in network.model.named_buffers()}
            constants = {
                name: t if name in buffers else differentiable(t) for name, t in constants.items()
            }
        # The backward pass is inside: a checkpointed block runs its forward again in it.
        held = {f"model.{name}": tensor for name, tensor in constants.items()}
        captured: Captured = torch.func.functional_call(
            Held(network.model), held, (run,), strict=False
        )
        return captured


def _gradients(
    network: ObservedNetwork, loss: Tensor, at: Sequence[GradientEdge]
) -> Sequence[Tensor | None]:
    try:
        return torch.autograd.grad(loss, at, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise TapError(
            f"{network.name}: expected torch.utils.checkpoint with "
            f"use_reentrant=False, or none in eval mode, got use_reentrant=True, which can be "
            f"differentiated by parameters only"
        ) from None
