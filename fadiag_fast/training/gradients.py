"""What a backward pass does with its gradients: whether it trains, and whether they were used."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .figures import ELSEWHERE, HANDED_OUT, TRAINS

_node_at_work: Callable[[], Any] = torch._C._current_autograd_node
_LEAF: Any = type(torch.autograd.graph.get_gradient_edge(torch.empty(0, requires_grad=True)).node)
_will_execute: Callable[[Any], bool] = torch._C._will_engine_execute_node
# Backward passes after which a parameter with a gradient is looked for.
_SEARCHES = 8


def _purpose(gradients: Gradients) -> int:
    """Return what the backward pass under way does with its gradients; 0 for none of the above.

    Called in a hook. Walks down the graph, along what is executed, to the first leaf of the model's
    whose gradient is added up: rarely more than a few nodes.
    """
    start = _node_at_work()
    # Most often the bias of the head: no list of what is ahead then.
    for after, _ in start.next_functions:
        if type(after) is _LEAF and gradients.owns(after.variable):
            try:
                if _will_execute(after):
                    return TRAINS
            except RuntimeError:
                break
    found, left_out, parameters = 0, False, False
    todo, seen = [start], {start}
    while todo:
        node = todo.pop()
        leaf = node.variable if _is_leaf(node) else None
        try:
            # torch does not count the root, where a hook may be, among the graph's nodes.
            executed = (node is start and leaf is None) or _will_execute(node)
        except RuntimeError:
            # torch answers so for a leaf whose gradient torch.autograd.grad returns. A graph of
            # gradients is made for another backward pass.
            if isinstance(leaf, nn.Parameter) and not torch.is_grad_enabled():
                return HANDED_OUT
            executed = False
        if not executed:
            left_out = True
        elif leaf is None:
            ahead = [after for after, _ in node.next_functions if after is not None]
            ahead = [after for after in ahead if after not in seen]
            seen.update(ahead)
            todo += sorted(ahead, key=_is_leaf)  # leaves first: they are what is looked for
        elif gradients.owns(leaf):
            return TRAINS
        else:
            found = ELSEWHERE
            parameters |= isinstance(leaf, nn.Parameter)
            if not gradients.owns_any:
                break
    # backward(inputs=[x]) leaves out what there is beside x.
    return 0 if left_out and not parameters else found


class Gradients:
    """What is known of the parameters' gradients from outside of a backward pass.

    Args:
        model: whose parameters.
        forget: is called when the gradients of earlier backward passes were cleared, and no
            optimiser has used them.
    """

    def __init__(self, model: nn.Module, forget: Callable[[], None]) -> None:
        # The probe and its model may be gone before what a compiled graph holds.
        self._model = weakref.ref(model)
        self._forget = weakref.WeakMethod(forget)
        self._owned: dict[int, weakref.ref[Tensor]] = {}
        self._up_to_date = False
        self._witness: weakref.ref[Tensor] | None = None
        self._searches = 0
        self._seen: tuple[int, int] | None = None
        self._task, self._purpose = -1, 0
        self.ignored = False  # whether a backward pass was not looked at

    def purpose(self, task: int) -> int:
        """Return what the backward pass under way does with its gradients, once for each."""
        if task != self._task:
            self._up_to_date = False
            self._task, self._purpose = task, _purpose(self)
            self.ignored |= not self._purpose
        return self._purpose

    @property
    def owns_any(self) -> bool:
        """Whether the model had a parameter that trains when last looked at."""
        return bool(self._owned)

    def owns(self, leaf: Tensor) -> bool:
        """Return whether a leaf is one of the model's parameters."""
        known = self._owned.get(id(leaf))
        if known is not None and known() is leaf:
            return True
        model = self._model()
        if self._up_to_date or model is None:
            return False
        # Once for each backward pass: parameters may have come since.
        self._up_to_date = True
        self._owned = {id(p): weakref.ref(p) for p in model.parameters() if p.requires_grad}
        return id(leaf) in self._owned

    def ended(self) -> None:
        """Note what a finished backward pass has left in one parameter."""
        one = None if self._witness is None else self._witness()
        grad = None if one is None else one.grad
        model = self._model() if grad is None and self._searches < _SEARCHES else None
        if model is not None:
            self._searches += 1
            there = [p for p in model.parameters() if p.grad is not None]
            one = min(there, key=Tensor.numel, default=None)
            self._witness = None if one is None else weakref.ref(one)
            grad = None if one is None else one.grad
        # An optimiser inside of the backward pass leaves none.
        self._seen = None if one is None or grad is None else (one._version, grad._version)

    def begins(self) -> None:
        """Note that a backward pass begins: those before it may have been given up."""
        seen, self._seen = self._seen, None
        one = None if self._witness is None else self._witness()
        if seen is None or one is None or one._version != seen[0]:
            return  # an optimiser has used them
        grad = one.grad
        if grad is not None:
            if grad._version == seen[1] or type(grad) is not Tensor or capturing(grad):
                return
            # Something wrote into it: set to zero or clipped, say. Rare; this waits for the device.
            if grad.layout != torch.strided or not grad.numel() or bool(grad.detach().any()):
                return
        forget = self._forget()
        if forget is not None:
            forget()


def _is_leaf(node: Any) -> bool:
    return type(node) is _LEAF


def capturing(tensor: Tensor) -> bool:
    """Return whether a tensor's device is capturing a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
