"""Which torch call makes each tapped state, and the gradient taps placed there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .points import TapError
from .tracing import Source, tensors_in, with_leaves

Path = Literal["torch.func", "autograd"]


class GradientTap(torch.autograd.Function):
    """Pass a state on; in the backward, give its gradient to ``slot`` as well."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, slot: Tensor, clone: bool, reached: set[int], index: int) -> Tensor:
        return h.clone() if clone else h.view_as(h)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.reached, ctx.index = inputs[3], inputs[4]
        ctx.set_materialize_grads(False)  # no gradient is not a gradient of zero

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if grad is not None:
            ctx.reached.add(ctx.index)
        return grad, grad, None, None, None


@dataclass(frozen=True)
class Spot:
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
        overwritten: per tap whether something writes into the state after the tap.
        output: index of the logits' spot; of the last state's where there are none.
        has_output: whether there are.
        before_link: whether the logits' spot is in front of a softmax or the like.
        writes_input: whether the model writes into its input.
        unreachable: why ``torch.func`` cannot reach the taps; "" where it can.
    """

    spots: list[Spot] = field(default_factory=list)
    of_tap: list[int | None] = field(default_factory=list)
    overwritten: list[bool] = field(default_factory=list)
    output: int = -1
    has_output: bool = True
    before_link: bool = False
    writes_input: bool = False
    unreachable: str = ""


class Mismatch(RuntimeError):
    """Report a forward pass that went another way than the one that was traced."""


class NotRequired(RuntimeError):
    """Report a hook of the user's on a tensor in front of where the graph begins."""


@contextmanager
def hooks_explained(start: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if start == "parameters" or "n't require gradient" not in str(error):
            raise
        raise NotRequired(str(error)) from error


class Unreached(TapError):
    """Report states to which no gradient of the loss leads."""


def changed_input(plan: Plan, x: Any, change: Callable[[int, Tensor], Tensor]) -> Any:
    """Return an input with ``change(spot, tensor)`` in place of the tensors that taps see."""
    leaves = list(tree_leaves(x))
    if plan.writes_input:
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    for index, spot in enumerate(plan.spots):
        if spot.source is not None and spot.source.kind == "input":
            leaves[spot.source.number] = change(index, leaves[spot.source.number])
    return with_leaves(x, leaves)


class Calls(TorchFunctionMode):
    """Count torch calls as the recorder did; change the results of those that a plan names."""

    def __init__(self, plan: Plan, change: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        self.num_calls = 0
        self.change = change
        self.by_call: dict[int, list[tuple[int, Spot, int]]] = {}
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
                raise Mismatch(f"call {self.num_calls} returned something else than when traced")
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
