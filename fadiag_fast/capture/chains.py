"""Chains of modules: which passes its result to which, and where a residual sum is made."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .points import Tap, TapError, Taps, listed, sighting_at
from .tracing import ModuleCall, Sighting, Trace, clean_name

# That one pattern of names may make, as in a network that is called for each of three inputs.
_MOST_CHAINS = 4


# h + f(h) done twice may be fused or ordered otherwise; a wrong reading is off by the order of one.
_SUM_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


_COARSE_TOLERANCE = 5e-2


def is_sum(state: Tensor, before: Tensor, branch: Tensor) -> bool:
    """Return whether a state is the sum of two tensors, but for rounding."""
    if state.shape != before.shape or state.shape != branch.shape:
        return False
    if any(t.layout is not torch.strided for t in (state, before, branch)):
        return False
    tolerance = _SUM_TOLERANCE.get(state.dtype, _COARSE_TOLERANCE)
    away = state - before - branch
    known = away.isfinite()
    if not known.all():  # broken weights: what is left must do
        if not known.any() or not torch.equal(known, (before + branch).isfinite()):
            return False
        state, away = state[known], away[known]
    scale = torch.linalg.vector_norm(state)
    return bool(torch.linalg.vector_norm(away) <= tolerance * scale)


def _link(
    seen: Trace, block: ModuleCall, following: ModuleCall | None
) -> Literal["state", "branch"] | None:
    """Say what a block returned, judged by the state that the next module received."""
    state = None if following is None else following.input
    if state is None or block.input is None or block.output is None:
        return None
    if state.tensor is block.output.tensor and state.version == block.output.version:
        return "state"
    if state.tensor is block.input.tensor and state.version != block.input.version:
        return "branch"  # h += block(h)
    if is_sum(state.tensor, block.input.tensor, block.output.tensor):
        return "branch"
    if following is not None and not state.tensor.isfinite().any():
        # By broken weights nothing can be told of sums; the label must be as by others.
        parts = (block.input.tensor, block.output.tensor)
        added = seen.recorder.is_sum_with(state.tensor, parts)
        if added and _leads_around(seen, block, following):
            return "branch"
    return None


def links_between(
    seen: Trace, blocks: Sequence[ModuleCall]
) -> list[Literal["state", "branch"] | None]:
    following = [*blocks[1:], _after(seen, blocks[-1])]
    return [_link(seen, block, after) for block, after in zip(blocks, following, strict=True)]


def _after(seen: Trace, block: ModuleCall, around: bool = False) -> ModuleCall | None:
    """Return the first module called after a block ended that takes a state of the stream.

    The stream's shape is that of the block's output, and it comes from there; with ``around`` it
    comes from the block's input too.
    """
    if block.output is None:
        return None
    shape = block.output.tensor.shape
    for call in seen.calls:
        if (
            call.begin > block.end
            and call.input is not None
            and call.input.tensor.shape == shape
            and seen.depends(call.input, block.output) is not False
            and (not around or _leads_around(seen, block, call))
        ):
            return call
    return None


def _is_model_input(seen: Trace, sighting: Sighting) -> bool:
    """Return whether a state is the network's input itself, or a part of it as it stands."""
    if sighting.source is not None and sighting.source.kind == "input":
        return True
    return any(is_passed_on(sighting, given) for given in seen.recorder.inputs())


def split_calls(seen: Trace, blocks: Sequence[ModuleCall]) -> list[list[ModuleCall]] | None:
    """Return the chains that blocks make: in one of them each block sees what the last returned.

    A network that is called twice, or two towers of one kind, make two. None where the blocks make
    none, as those of parallel branches.
    """
    chains: list[list[ModuleCall]] = []
    passed_by: list[tuple[list[ModuleCall], int]] = []  # chains that lead to a block of another
    for block in blocks:
        leading = []
        for chain in sorted(chains, key=lambda chain: chain[-1].end, reverse=True):
            depends = _reads(seen, block, chain[-1].output)
            if depends is not False:
                leading.append(chain)
            if depends is None:  # it cannot be told: the last one called comes first
                break
        if not leading:
            chains.append([block])
            continue
        leading[0].append(block)
        passed_by += [(chain, len(chain)) for chain in leading[1:]]
    if any(len(chain) > length for chain, length in passed_by):
        return None
    if len(chains) > 1 and any(len(chain) < 2 for chain in chains):
        return None
    return chains if len(chains) <= _MOST_CHAINS else None


def _reads(seen: Trace, block: ModuleCall, state: Sighting | None) -> bool | None:
    """Return whether any of a block's arguments was computed from a state; None if unknown."""
    found = [seen.depends(given, state) for given in (block.input, *block.others)]
    if any(found):
        return True
    return None if None in found else False


def _leads_around(seen: Trace, block: ModuleCall, following: ModuleCall) -> bool:
    """Return whether a block's input comes to the next block beside its output too."""
    return seen.depends(following.input, block.input, without=[block.output]) is not False


def _is_output(seen: Trace, block: ModuleCall) -> bool:
    """Return whether what a block returns is what the model returns, but for a softmax."""
    given = [leaf for leaf in tree_leaves(seen.output) if isinstance(leaf, Tensor)]
    return block.output is not None and any(
        block.output.tensor is leaf or block.output.tensor is seen.recorder.before_link(leaf)
        for leaf in given
    )


def find_chains(
    seen: Trace, chains: Sequence[Sequence[ModuleCall]], first_label: str | None
) -> tuple[list[Tap], list[str], tuple[int, ...]]:
    """Return the taps of chains one after another, remarks, and where further chains begin."""
    several = {block.name for blocks in chains for block in blocks if block.call}
    taps: list[Tap] = []
    remarks: list[str] = []
    starts: list[int] = []
    for blocks in chains:
        found, more = _chain(seen, blocks, None if taps else first_label, several)
        places = [(tap.module, tap.at, tap.call) for tap in found]
        if taps and (taps[-1].module, taps[-1].at, taps[-1].call) in places:
            taps.pop()  # two chains end in one state: it is the last one's
        if taps and found:
            last, first = sighting_at(seen, taps[-1]), sighting_at(seen, found[0])
            if last is not None and first is not None and last.tensor is first.tensor:
                found = found[1:]  # what one chain hands on to the next
            else:
                starts.append(len(taps))
        taps += found
        remarks += [remark for remark in more if remark not in remarks]
    return taps, remarks, tuple(starts)


def _chain(
    seen: Trace, blocks: Sequence[ModuleCall], first_label: str | None, several: set[str]
) -> tuple[list[Tap], list[str]]:
    """Return the taps before, between and after blocks that are called one after another."""
    links = links_between(seen, blocks)
    pairs = list(pairwise(blocks))

    def label(block: ModuleCall) -> str:
        return f"{block.name} (call {block.call + 1})" if block.name in several else block.name

    first = blocks[0]
    remarks: list[str] = []
    taps: list[Tap] = []
    # The network's input itself is no hidden state.
    if first.input is not None and not _is_model_input(seen, first.input):
        taps.append(Tap(first.name, "input", first.call, first_label or f"input of {label(first)}"))
    returns_states = links.count("state") > links.count("branch")
    if not returns_states and 2 * links.count("branch") < len(links):
        # Other operations stand between the blocks. A sum that another module's call cannot show
        # (h + 0.5·f(h), say) comes as an input; without a way around the blocks they are the way.
        returns_states = any(
            block.output is None
            or following.input is None
            or block.output.tensor.shape != following.input.tensor.shape
            for block, following in pairs
        ) or 2 * sum(_leads_around(seen, a, b) for a, b in pairs) <= len(pairs)
    if returns_states:
        # The output of the network is no hidden state either, where that can be left out.
        plain = "state" not in links[:-1] and _is_output(seen, blocks[-1])
        if (
            plain and len(blocks) == 2
        ):  # what comes to the head shows more than what a layer hands on
            name = f"input of {label(blocks[1])}"
            return [*taps, Tap(blocks[1].name, "input", blocks[1].call, name)], remarks
        kept = blocks[:-1] if plain else blocks
        return taps + [Tap(b.name, "output", b.call, label(b)) for b in kept], remarks
    for link, (block, following) in zip(links[:-1], pairs, strict=True):
        name = label(block) if link == "branch" else f"input of {label(following)}"
        taps.append(Tap(following.name, "input", following.call, name))
    closer = _after(seen, blocks[-1], around=links[-1] is None)
    if closer is None:
        remarks.append(
            f"The state after {label(blocks[-1])} is no module's input: it was not seen."
        )
    else:
        # Something may lie between the last block and what receives a state of its shape.
        last = label(blocks[-1]) if links[-1] == "branch" else f"input of {closer.name}"
        if links[-1] != "branch" and closer.call:
            last += f" (call {closer.call + 1})"
        taps.append(Tap(closer.name, "input", closer.call, last))
    return taps, remarks


def is_container(blocks: object) -> bool:
    """Return whether blocks are in a container; in an exported program it has lost its class."""
    if not isinstance(blocks, nn.Module):
        return False
    names = [name for name, _ in blocks.named_children()]
    numbered = bool(names) and all(name.isdigit() for name in names)
    return isinstance(blocks, nn.ModuleList | nn.Sequential | nn.ModuleDict) or numbered


def contract_chain(model: Any, seen: Trace) -> Taps:
    name = type(model).__name__
    first_names = {id(module): clean_name(path) for path, module in model.named_modules()}
    # One module may stand at several places; it is known by its first name.
    names = list(dict.fromkeys(first_names[id(module)] for module in model.blocks.children()))
    blocks = [call for call in seen.calls if call.name in names]
    called = list(dict.fromkeys(block.name for block in blocks))
    unseen = [path for path in names if path not in called]
    for block in blocks:
        if block.output is None:
            raise TapError(f"{name}: {block.name}: expected one tensor, got {block.output_type}")
        if block.input is None:
            raise TapError(f"{name}: {block.name}: expected to be called with a floating tensor")
    asked = len(names)
    if blocks:
        taps, remarks, starts = find_chains(seen, split_calls(seen, blocks) or [blocks], "embed")
        if called != [path for path in names if path in called]:
            remarks.append(f"The forward pass calls the blocks in the order {listed(called)}.")
    elif asked:
        raise TapError(
            f"{name}: expected forward to call its blocks, got no call of {listed(names)}"
        )
    else:
        closer = "out_ln" if getattr(model, "out_ln", None) is not None else "out_head"
        taps, remarks, starts = [Tap(closer, "input", 0, "embed")], [], ()
    return Taps(tuple(taps), "residual contract", asked, tuple(unseen), tuple(remarks), starts)


def is_passed_on(a: Sighting | None, b: Sighting | None) -> bool:
    """Return whether two sightings show the same values in the same memory, as views perhaps."""
    if a is None or b is None or a.version != b.version:
        return False
    if a.tensor.layout is not torch.strided or b.tensor.layout is not torch.strided:
        return a.tensor is b.tensor
    try:
        return a.tensor.untyped_storage().data_ptr() == b.tensor.untyped_storage().data_ptr()
    except RuntimeError:  # a DTensor has no memory of its own
        return a.tensor is b.tensor
