"""Capture by ``torch.func``: a function of the parameters, to be mapped and traced.

The result of the torch call that makes a tapped state passes through a gradient slot, an identity
whose backward hands the gradient to a second, empty argument; the loss is differentiated with
respect to the slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._common.process import eager
from .captured import Captured
from .network import ObservedNetwork
from .plan import Calls, GradientTap, Mismatch, Plan, changed_input
from .points import split_hidden


def capture_functional(
    network: ObservedNetwork,
    plan: Plan,
    x: Any,
    y: Any,
    constants: Mapping[str, Tensor] | None,
) -> Captured:
    """Run one forward and one backward pass; see :meth:`.Probe.capture`.

    Raises:
        Mismatch: the pass went another way than the one that was traced.
    """
    if plan.unreachable:
        raise Mismatch(plan.unreachable)
    reached: set[int] = set()
    num_taps = len(network.taps.points)
    of_tap = [index for index in plan.of_tap if index is not None]

    def run(slots: Sequence[Tensor]) -> tuple[Tensor, tuple[Any, ...]]:
        values: dict[int, Tensor] = {}
        passed: dict[int, Tensor] = {}
        met: list[int] = []

        def slot(index: int, tensor: Tensor) -> Tensor:
            values[index] = tensor
            clone = plan.spots[index].clone
            passed[index] = GradientTap.apply(  # type: ignore[no-untyped-call]
                tensor, slots[index], clone, reached, index
            )
            return passed[index]

        def see(l: int, tensor: Tensor | None) -> None:
            index = plan.of_tap[l]
            if index is None or tensor is None or passed.get(index) is not tensor:
                raise Mismatch(f"{network.taps.points[l].where} is not the tensor traced")
            met.append(l)

        inputs = changed_input(plan, x, slot)
        with network.watch(see), Calls(plan, slot):
            output = network.forward(inputs, constants)
        if network.taps.hands_out:
            for l, state in enumerate(split_hidden(output, "the model")[1][:num_taps]):
                see(l, state)
        if len(met) < num_taps:
            missing = next(l for l in range(num_taps) if l not in met)
            raise Mismatch(f"{network.taps.points[missing].where} was not reached")
        network.note_order(met)
        logits = network.output_of(output)
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
        loss = network.loss_of(network.for_loss(output, logits), logits, y)
        hiddens = [values[index] for index in of_tap]
        return loss, (hiddens, values[plan.output])

    slots = [torch.zeros((), dtype=s.dtype, device=s.device).expand(s.shape) for s in plan.spots]
    # The outer no_grad keeps the parameters out of any graph; grad has its own.
    with torch.inference_mode(False), torch.no_grad(), eager():
        grads, (loss, (hiddens, logits)) = torch.func.grad_and_value(run, has_aux=True)(slots)
    network.check_reached([index in reached for index in of_tap])
    return network.captured(
        hiddens, [grads[index] for index in of_tap], logits, grads[plan.output], loss
    )
