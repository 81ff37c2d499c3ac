"""Find which torch call makes each tapped state, for inputs of one shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .network import ObservedNetwork
from .plan import Plan, Spot
from .points import TapError, sighting_at
from .tracing import Source, Trace, signature


class Planner:
    """Make a plan for each shape of input, once.

    Args:
        network: what is observed.
    """

    def __init__(self, network: ObservedNetwork) -> None:
        self._network = network
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def plan_for(self, x: Any) -> Plan:
        """Return how the taps are reached for inputs shaped like ``x``.

        Raises:
            TapError: see :meth:`.Probe.prepare`.
        """
        key = signature(x)
        if key not in self._plans:
            with torch.inference_mode(False):
                x = tree_map_only(Tensor, torch.clone, x)  # some models write into their input
            self._plans[key] = make_plan(self._network, x, self._network.trace(x))
        return self._plans[key]

    def plan_again(self, x: Any) -> Plan:
        """Return a new plan: a model may keep something from its first pass, as positions."""
        del self._plans[signature(x)]
        return self.plan_for(x)


def make_plan(network: ObservedNetwork, x: Any, seen: Trace) -> Plan:
    """Find the source of every tapped state, and of the output, in a traced forward pass."""
    plan = Plan(writes_input=seen.recorder.wrote_input)
    spots: dict[Source, int] = {}
    devices: dict[str, str] = {}
    sightings: list[Tensor] = []

    for tap in network.taps.points:
        sighting = sighting_at(seen, tap)
        if sighting is None:
            raise TapError(
                f"{network.name}: {tap.where}: expected a call as in the first batch, got none: "
                f"the forward pass depends on its input"
            )
        network.check_state(x, tap, sighting.tensor)
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
            plan.spots.append(Spot(sighting.source, state.shape, state.dtype, state.device, clone))
        plan.of_tap.append(spots[sighting.source])
    if len(devices) > 1:
        places = ", ".join(f"{where} on {device}" for device, where in devices.items())
        raise TapError(f"{network.name}: expected all states on one device, got {places}")
    logits = network.output_of(seen.output)
    plan.has_output = network.has_rows(logits, sightings)
    if logits is None or not plan.has_output:
        plan.output = -1 if not plan.of_tap or plan.of_tap[-1] is None else plan.of_tap[-1]
        network.has_output = False
        return plan
    made = seen.recorder.before_link(logits)
    source = None
    if made is not logits and seen.recorder.source_of(made) is not None:
        plan.before_link, logits = True, made
        source = seen.recorder.source_of(made)
    elif not (isinstance(seen.output, Tensor) or network.taps.hands_out):
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
