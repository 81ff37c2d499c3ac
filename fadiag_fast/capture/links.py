"""Follow a state back through operations that only pass it on."""

import functools
import re
from typing import Any

from torch import Tensor

# What a model may end in that the losses of the field otherwise do themselves: ∂loss/∂logits is
# taken in front of it. Its gradient behind is of another scale, and does not fall as a task is
# solved.
_LINKS = frozenset({"Softmax", "LogSoftmax", "Sigmoid", "LogSigmoid"})


# What may stand between it and the output: the same numbers in another shape or type, and the
# logarithm of a softmax with what keeps it finite.
_BEHIND_LINKS = frozenset(
    {"View", "UnsafeView", "ReshapeAlias", "Alias", "ToCopy", "Clone", "Transpose", "T", "Permute"}
    | {"Squeeze", "Unsqueeze", "Expand", "Slice", "Select", "Log", "Clamp", "ClampMin", "Add"}
)


_MOST_BEHIND_LINKS = 8


_NODE = re.compile(r"(\w+?)Backward\d*$")


@functools.lru_cache
def operator_of(node: str) -> str | None:
    """Return the operator whose gradient a node of autograd's computes, by the node's name."""
    found = _NODE.match(node)
    return None if found is None else found[1]


def before_link(output: Tensor) -> tuple[Any, int] | None:
    """Return the node of the graph that makes the logits of a model that ends in a softmax.

    Args:
        output: what the model returns, with its graph.

    Returns:
        The node and which of its outputs they are; None where the output itself is the logits.
    """
    node = output.grad_fn
    for _ in range(_MOST_BEHIND_LINKS):
        operator = None if node is None else operator_of(node.name())
        if node is None or (operator not in _LINKS and operator not in _BEHIND_LINKS):
            return None
        inputs = [(one, index) for one, index in node.next_functions if one is not None]
        if operator in _LINKS:
            return inputs[0] if inputs else None
        if len(inputs) != 1:
            return None
        node = inputs[0][0]
    return None
