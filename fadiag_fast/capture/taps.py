"""Decide where a network is observed.

A tap is a place at which one hidden state is seen: the input or the output of a module, or a state
that the model hands out itself. Taps are named by the caller, or chosen from one forward pass:

1. the residual contract: a model with ``blocks`` and ``out_head`` (and ``embed``, ``out_ln``) is
   observed along its blocks;
2. a forward with ``return_hidden=True`` hands out its states;
3. else the longest chain of repeated sibling blocks, one class, names that differ in their numbers,
   in the deepest part of the network, and further chains beside it: a decoder's, a second tower's,
   those of a second call;
4. else the caller must name the taps, and the error lists what there is.

A chain of L blocks has L + 1 states: the input of the first block and the state after every block.
A name stands for one tensor: what is called ``blocks.0`` in a chain is what that block returned,
or, where its caller adds the skip, the sum; what else comes to a block is ``input of blocks.1``.
The selector ``blocks.0`` is the module's own output: the branch, where its caller adds the skip.
Where the blocks return the next state, that is their output. Where they return only the branch and
the caller adds the skip, it is the input of whatever comes next: which of the two holds is seen in
the pass and not assumed.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .chains import contract_chain, is_container
from .points import CountsSamples, Select, TapError, Taps, handed, listed, offers_hidden
from .selectors import SELECTOR_HELP, select_taps
from .tracing import Trace, trace
from .trunk import automatic_taps, hint_at_samples


def find_taps(
    model: nn.Module,
    x: Any,
    select: Select | None = None,
    counts_samples: CountsSamples = lambda state: True,
    *,
    batch_dim: int | None = None,
    several: bool = True,
) -> tuple[Taps, Trace]:
    """Find the hidden states of a network with one forward pass (two to read ``return_hidden``).

    Args:
        model: an unwrapped module in eval mode.
        x: an input batch: a tensor, a tuple of arguments, or a dict of keywords.
        select: None to choose, or selectors: names, patterns, classes, modules, or a list of them.
            A string is the name of a module, whose OUTPUT is meant, ``NAME:input`` for its input,
            a glob (``*`` within one part of the dotted name, ``**`` across parts),
            ``re:EXPRESSION`` (must match the whole name), ``class:NAME``, or ``chain:PATTERN``
            for blocks of which the states before, between and after are meant.
        counts_samples: says whether a tensor can be a state of this batch; a chain is chosen only
            among blocks whose states are.
        batch_dim: the dimension of the states that counts samples: several chains are chosen only
            where all have as many.
        several: whether more than one chain may be chosen.

    Returns:
        The taps and the trace they were found in.

    Raises:
        TapError: nothing matches (with the nearest names), a named module is not called, or what
            it receives or returns is no floating tensor.
    """
    contract = all(hasattr(model, name) for name in ("embed", "blocks", "out_head"))
    contract = contract and is_container(model.blocks)
    if select is None and not contract and offers_hidden(model):
        return handed(model, x)
    seen = trace(model, x)
    found: Taps | None
    if select is not None:
        found = select_taps(model, seen, select)
    elif contract:
        found = contract_chain(model, seen)
    else:
        found = automatic_taps(model, seen, counts_samples, batch_dim, several)
    if found is None:
        raise TapError(
            f"{type(model).__name__}: expected the residual contract (embed, blocks, out_head), a "
            f"forward with return_hidden=True, or at least two sibling blocks of one class in a "
            f"row, to choose taps by; got {_outline(seen)}. Name the taps: {SELECTOR_HELP}."
            f"{hint_at_samples(model, seen)}"
        )
    scripted = [name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    outermost = [name for name in scripted if name.rpartition(".")[0] not in scripted]
    if outermost:
        remark = f"TorchScript takes no hooks and was not looked into: {listed(outermost)}."
        found = replace(found, remarks=(*found.remarks, remark))
    return found, seen


# ---- chains of blocks


# ---- taps named by the caller


def _outline(seen: Trace) -> str:
    """Name the modules that were called with a state, outermost first."""
    names = sorted(
        {c.name for c in seen.calls if c.name and c.output is not None},
        key=lambda name: (name.count("."), name),
    )
    return listed(names) if names else "no module that returns a floating tensor"
