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

from __future__ import annotations

from .captured import Captured
from .isolation import check_model, constants_of, own_attributes, untouched
from .links import before_link
from .outputs import Loss, Output, choose_output, classification_loss, output_of, sample_rows
from .plan import Path
from .prober import Probe

__all__ = [
    "Captured",
    "Loss",
    "Output",
    "Path",
    "Probe",
    "before_link",
    "check_model",
    "choose_output",
    "classification_loss",
    "constants_of",
    "output_of",
    "own_attributes",
    "sample_rows",
    "untouched",
]
