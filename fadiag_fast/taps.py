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

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .tracing import ModuleCall, Sighting, Trace, clean_name, trace

Select = str | type[nn.Module] | nn.Module | Sequence["Select"]

_CountsSamples = Callable[[Tensor], bool]

_MOST_LISTED = 12
_MOST_PASSED_OVER = 4
# That one pattern of names may make, as in a network that is called for each of three inputs.
_MOST_CHAINS = 4
# Of a network of more layers, one after the other, blocks are found; to look would take long.
_LONGEST_TRUNK = 64
# h + f(h) done twice may be fused or ordered otherwise; a wrong reading is off by the order of one.
_SUM_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE_TOLERANCE = 5e-2

SELECTOR_HELP = (
    "a module's name (its output), NAME:input, a glob (* within one part of a name, ** across "
    "parts), re:EXPRESSION, class:NAME, or chain:PATTERN for blocks one after another"
)


class TapError(ValueError):
    """Report a network whose hidden states cannot be found where they were asked for."""


@dataclass(frozen=True)
class Tap:
    """One place at which a hidden state is seen.

    Attributes:
        module: qualified name of a module; "" is the model itself.
        at: whether the module's input or output, or the state number ``call`` that the model
            hands out under ``return_hidden=True``.
        call: which of the module's calls, from 0.
        label: the state's name in reports.
    """

    module: str
    at: Literal["input", "output", "hidden"]
    call: int
    label: str

    @property
    def where(self) -> str:
        """The place in words, for messages."""
        if self.at == "hidden":
            return f"hidden {self.call}"
        again = f" (call {self.call + 1})" if self.call else ""
        return f"{self.at} of {self.module or 'the model'}{again}"


@dataclass(frozen=True)
class Taps:
    """Where the hidden states of a network are.

    Attributes:
        points: one per hidden state, in the order in which they are passed.
        chosen: how they were found, in words.
        asked: how many modules were asked for.
        unseen: names among them that were never called.
        remarks: sentences that a reader of the figures should know.
        chain_starts: indices of the states with which a second or later chain of blocks begins.
        passed_over: other chains that might have been observed, in words.
    """

    points: tuple[Tap, ...]
    chosen: str
    asked: int
    unseen: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    chain_starts: tuple[int, ...] = ()
    passed_over: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(tap.label for tap in self.points)

    @property
    def hands_out(self) -> bool:
        """Whether the model must be called with ``return_hidden=True``."""
        return bool(self.points) and self.points[0].at == "hidden"

    @property
    def coverage(self) -> str:
        """What was asked for and what was seen."""
        seen = self.asked - len(self.unseen)
        return f"{self.chosen}: asked for {self.asked}, saw {seen}, {len(self.points)} states"

    @property
    def observed(self) -> str:
        """What is observed and what is not, in one line."""
        seen = self.asked - len(self.unseen)
        line = f"observed: {self.chosen}, asked for {self.asked}, saw {seen}"
        if self.unseen:
            line += f" (not called: {_listed(self.unseen)})"
        line += f"; {len(self.points)} states, {self.points[0].label} to {self.points[-1].label}"
        if self.passed_over:
            line += f"; passed over: {', '.join(self.passed_over)}"
        return line


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile`` and (Distributed)DataParallel wrappers."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def sighting_at(seen: Trace, tap: Tap) -> Sighting | None:
    """Return what a trace saw at a tap; None if the module was not called that often."""
    if tap.at == "hidden":
        _, hiddens = split_hidden(seen.output, "the model")
        return seen.recorder.sighting(hiddens[tap.call]) if tap.call < len(hiddens) else None
    for call in seen.calls:
        if call.name == tap.module and call.call == tap.call:
            return call.input if tap.at == "input" else call.output
    return None


def find_taps(
    model: nn.Module,
    x: Any,
    select: Select | None = None,
    counts_samples: _CountsSamples = lambda state: True,
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
    contract = contract and _is_container(model.blocks)
    if select is None and not contract and _offers_hidden(model):
        return _handed(model, x)
    seen = trace(model, x)
    found: Taps | None
    if select is not None:
        found = _selected(model, seen, select)
    elif contract:
        found = _contract(model, seen)
    else:
        found = _automatic(model, seen, counts_samples, batch_dim, several)
    if found is None:
        raise TapError(
            f"{type(model).__name__}: expected the residual contract (embed, blocks, out_head), a "
            f"forward with return_hidden=True, or at least two sibling blocks of one class in a "
            f"row, to choose taps by; got {_outline(seen)}. Name the taps: {SELECTOR_HELP}."
            f"{_hint_at_samples(model, seen)}"
        )
    scripted = [name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    outermost = [name for name in scripted if name.rpartition(".")[0] not in scripted]
    if outermost:
        remark = f"TorchScript takes no hooks and was not looked into: {_listed(outermost)}."
        found = replace(found, remarks=(*found.remarks, remark))
    return found, seen


def _offers_hidden(model: nn.Module) -> bool:
    return "return_hidden" in inspect.signature(model.forward).parameters


def _handed(model: nn.Module, x: Any) -> tuple[Taps, Trace]:
    seen = trace(model, x, return_hidden=True)
    _, hiddens = split_hidden(seen.output, type(model).__name__)
    points = tuple(Tap("", "hidden", i, f"hidden {i}") for i in range(len(hiddens)))
    return Taps(points, "return_hidden=True", len(points)), seen


def split_hidden(output: object, where: str) -> tuple[Tensor, list[Tensor]]:
    """Split what ``model(x, return_hidden=True)`` returned into logits and hidden states."""
    if not isinstance(output, tuple | list) or len(output) != 2:
        raise TapError(
            f"{where}: expected (logits, hiddens) from return_hidden=True, "
            f"got {type(output).__name__}"
        )
    logits, hiddens = output
    if not isinstance(hiddens, tuple | list) or len(hiddens) == 0:
        raise TapError(
            f"{where}: expected a non-empty list of hidden states from return_hidden=True, "
            f"got {type(hiddens).__name__}"
            + (" of length 0" if isinstance(hiddens, tuple | list) else "")
        )
    for name, value in (("logits", logits), *((f"hidden {i}", h) for i, h in enumerate(hiddens))):
        if not isinstance(value, Tensor):
            raise TapError(f"{where}: {name}: expected one tensor, got {type(value).__name__}")
    return logits, list(hiddens)


# ---- chains of blocks


def is_sum(state: Tensor, before: Tensor, branch: Tensor) -> bool:
    """Say whether a state is the sum of two tensors, but for rounding."""
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


def _links(seen: Trace, blocks: Sequence[ModuleCall]) -> list[Literal["state", "branch"] | None]:
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
    return any(_is_passed_on(sighting, given) for given in seen.recorder.inputs())


def _split(seen: Trace, blocks: Sequence[ModuleCall]) -> list[list[ModuleCall]] | None:
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


def _chains(
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
    links = _links(seen, blocks)
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


def _is_container(blocks: object) -> bool:
    """Say whether blocks are in a container; in an exported program it has lost its class."""
    if not isinstance(blocks, nn.Module):
        return False
    names = [name for name, _ in blocks.named_children()]
    numbered = bool(names) and all(name.isdigit() for name in names)
    return isinstance(blocks, nn.ModuleList | nn.Sequential | nn.ModuleDict) or numbered


def _contract(model: Any, seen: Trace) -> Taps:
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
        taps, remarks, starts = _chains(seen, _split(seen, blocks) or [blocks], "embed")
        if called != [path for path in names if path in called]:
            remarks.append(f"The forward pass calls the blocks in the order {_listed(called)}.")
    elif asked:
        raise TapError(
            f"{name}: expected forward to call its blocks, got no call of {_listed(names)}"
        )
    else:
        closer = "out_ln" if getattr(model, "out_ln", None) is not None else "out_head"
        taps, remarks, starts = [Tap(closer, "input", 0, "embed")], [], ()
    return Taps(tuple(taps), "residual contract", asked, tuple(unseen), tuple(remarks), starts)


@dataclass(frozen=True)
class _Candidate:
    """Modules at sibling names, called one after another."""

    pattern: str
    blocks: list[ModuleCall]
    kind_of: list[str]  # each block's class
    passed: int  # states that visibly go from one block to the next
    matrices: int  # parameters of two and more dimensions
    size: int  # elements of all parameters
    chains: int = 1  # that they make

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.kind_of))

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(block.name for block in self.blocks))

    @property
    def rank(self) -> tuple[int, int, int, int]:
        # Without a state that visibly passes on, the deeper part of the network counts.
        length = len(self.blocks) if self.passed else 0
        return (length, self.passed, self.matrices, self.size)


def _sibling_key(name: str) -> str:
    """Return a name with ``*`` for its numbers, those with a letter too: ``inception3a``."""
    return re.sub(r"\d+([a-z](?=[._]|$))?", "*", name)


def _pattern(names: Sequence[str]) -> str:
    """Return sibling names as one, with ``*`` where they differ."""
    split = [re.split(r"(\d+(?:[a-z](?=[._]|$))?)", name) for name in names]
    return "".join(parts[0] if len(set(parts)) == 1 else "*" for parts in zip(*split, strict=True))


def _is_composite(module: nn.Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in module.children())


def _mixed(modules: dict[str, nn.Module], calls: Sequence[ModuleCall]) -> list[ModuleCall]:
    """Return the sibling blocks among calls of several classes: all of a CoAtNet's stages.

    From the first to the last call of a class that keeps a state's shape; what stands outside of
    that is a stem or a head. What has no parts of its own (a norm, a convolution between stages)
    is no block.
    """
    blocks = [call for call in calls if _is_composite(modules[call.name])]
    kept = {
        type(modules[call.name])
        for call in blocks
        if call.input is not None
        and call.output is not None
        and call.input.tensor.shape == call.output.tensor.shape
    }
    places = [i for i, call in enumerate(blocks) if type(modules[call.name]) in kept]
    return blocks[places[0] : places[-1] + 1] if places else []


def _candidates(model: nn.Module, seen: Trace, counts_samples: _CountsSamples) -> list[_Candidate]:
    modules = {clean_name(name): module for name, module in model.named_modules()}
    siblings: dict[str, list[ModuleCall]] = {}
    for call in seen.calls:
        if call.name and next(modules[call.name].parameters(), None) is not None:
            siblings.setdefault(_sibling_key(call.name), []).append(call)
    groups: list[list[ModuleCall]] = []
    for calls in siblings.values():
        kinds: dict[type, list[ModuleCall]] = {}
        for call in calls:
            kinds.setdefault(type(modules[call.name]), []).append(call)
        groups += kinds.values()
        if len(kinds) > 1:
            groups.append(_mixed(modules, calls))
    found = []
    for blocks in groups:
        states = [state for block in blocks for state in (block.input, block.output)]
        if len(blocks) < 2 or any(state is None for state in states):
            continue
        if not all(counts_samples(state.tensor) for state in states if state is not None):
            continue
        if any(a.end > b.begin for a, b in pairwise(blocks)):
            continue
        passed = sum(link is not None for link in _links(seen, blocks)[:-1])
        names = list(dict.fromkeys(block.name for block in blocks))
        parameters = [p for name in names for p in modules[name].parameters()]
        found.append(
            _Candidate(
                _pattern(names),
                blocks,
                [type(modules[block.name]).__name__ for block in blocks],
                passed,
                sum(p.dim() > 1 for p in parameters),
                sum(p.numel() for p in parameters),
            )
        )
    return found


def _is_inside_a_branch(seen: Trace, inner: _Candidate, outer: _Candidate) -> bool:
    """Say whether blocks are parts of other blocks in which a skip leads around them.

    The blocks of a stage are the stage; the convolutions of a residual block are not the block.
    """
    for whole in outer.blocks:
        parts = [b for b in inner.blocks if whole.begin < b.begin and b.end < whole.end]
        if not parts:
            continue
        around = seen.depends(whole.output, whole.input, without=[part.output for part in parts])
        if around or (around is None and not _is_passed_on(parts[-1].output, whole.output)):
            return True
    return False


def _repeats_in(inner: _Candidate, outer: _Candidate) -> bool:
    """Say whether blocks of several classes are one unit that other blocks repeat.

    The attention and the feed-forward part of each T5Block are such a unit; the blocks are the
    chain then.
    """
    if len(inner.kinds) == 1 or len(outer.kinds) > 1:
        return False
    units = [
        tuple(
            kind
            for block, kind in zip(inner.blocks, inner.kind_of, strict=True)
            if whole.begin < block.begin and block.end < whole.end
        )
        for whole in outer.blocks
    ]
    return len(units[0]) > 1 and len(set(units)) == 1


def _is_passed_on(a: Sighting | None, b: Sighting | None) -> bool:
    """Say whether two sightings show the same values in the same memory, as views perhaps."""
    if a is None or b is None or a.version != b.version:
        return False
    if a.tensor.layout is not torch.strided or b.tensor.layout is not torch.strided:
        return a.tensor is b.tensor
    try:
        return a.tensor.untyped_storage().data_ptr() == b.tensor.untyped_storage().data_ptr()
    except RuntimeError:  # a DTensor has no memory of its own
        return a.tensor is b.tensor


def _is_nested(inner: _Candidate, outer: _Candidate) -> bool:
    return all(any(name.startswith(f"{whole}.") for whole in outer.names) for name in inner.names)


def _depth(candidate: _Candidate, candidates: Sequence[_Candidate]) -> int:
    """Return how many layers the part of the network has that blocks make up.

    Blocks, the stages around them and the layers inside are of one part.
    """
    return max(
        other.matrices
        for other in candidates
        if other is candidate
        or _is_nested(other, candidate)
        or (_is_nested(candidate, other) and 2 * candidate.matrices >= other.matrices)
    )


def _is_apart(candidate: _Candidate, chosen: Sequence[_Candidate]) -> bool:
    """Return whether no block is part of a chosen one, or the reverse."""
    names = {name for one in chosen for name in one.names}
    return all(
        name not in names
        and not any(a.startswith(f"{name}.") or name.startswith(f"{a}.") for a in names)
        for name in candidate.names
    )


def _is_further(
    candidate: _Candidate, best: _Candidate, modules: Mapping[str, nn.Module], batch_dim: int | None
) -> bool:
    """Return whether blocks beside the best ones are a chain of their own worth to be observed."""
    # A stem, or what lies between stages, is small beside the stages.
    if (not candidate.passed and best.passed) or 4 * candidate.matrices < best.matrices:
        return False
    if not all(_is_composite(modules[name]) for name in candidate.names):
        alike = set(candidate.kinds) == set(best.kinds)
        if not alike or 2 * len(candidate.blocks) < len(best.blocks):
            return False
    if batch_dim is None:
        return True
    lengths = {
        state.tensor.shape[batch_dim]
        for one in (candidate, best)
        for block in one.blocks
        for state in (block.input, block.output)
        if state is not None
    }
    return len(lengths) == 1


def _trunk(model: nn.Module, seen: Trace, counts_samples: _CountsSamples) -> _Candidate | None:
    """Return all layers with weights of a network in which each leads to the next and nowhere else.

    None for any other network.
    """
    modules = {clean_name(name): module for name, module in model.named_modules()}
    layers = [
        call
        for call in seen.calls
        if call.name
        and not any(True for _ in modules[call.name].children())
        and any(p.dim() > 1 for p in modules[call.name].parameters())
    ]
    if len(layers) < 3 or len(layers) > _LONGEST_TRUNK or any(layer.call for layer in layers):
        return None
    for layer in layers:
        if layer.input is None or layer.output is None or not counts_samples(layer.output.tensor):
            return None
    for before, after in pairwise(layers):
        if not seen.depends(after.input, before.output):
            return None
    first, last = layers[0].output, layers[-1].output
    if any(seen.depends(last, first, without=[one.output]) is not False for one in layers[1:-1]):
        return None
    kinds = [type(modules[layer.name]).__name__ for layer in layers]
    return _Candidate(
        ", ".join(dict.fromkeys(_sibling_key(layer.name) for layer in layers)),
        layers,
        kinds,
        0,
        len(layers),
        sum(p.numel() for layer in layers for p in modules[layer.name].parameters()),
    )


def _is_poor(candidate: _Candidate, layers: _Candidate) -> bool:
    """Return whether blocks are a head behind other layers, or less than half of all layers."""
    before = sum(layer.end < candidate.blocks[0].begin for layer in layers.blocks)
    return before > 1 or 2 * candidate.matrices < layers.matrices


def _automatic(
    model: nn.Module,
    seen: Trace,
    counts_samples: _CountsSamples,
    batch_dim: int | None,
    several: bool,
) -> Taps | None:
    """Return the longest chain of repeated sibling blocks that no residual branch hides.

    In the deepest part of the network; with ``several`` further chains too.
    """
    modules = {clean_name(name): module for name, module in model.named_modules()}
    found = _candidates(model, seen, counts_samples)
    candidates = sorted(found, key=lambda one: (_depth(one, found), *one.rank), reverse=True)
    chosen: list[_Candidate] = []
    passed_over: list[_Candidate] = []
    chains: list[list[ModuleCall]] = []
    for candidate in candidates:
        if chosen and not _is_apart(candidate, [*chosen, *passed_over]):
            continue
        split = _split(seen, candidate.blocks)
        if split is None or any(
            _repeats_in(candidate, other) or _is_inside_a_branch(seen, candidate, other)
            for other in candidates
        ):
            continue
        if not chosen:
            plain = not candidate.passed and not _is_composite(modules[candidate.names[0]])
            layers = _trunk(model, seen, counts_samples) if plain else None
            if layers is not None and _is_poor(candidate, layers):
                chosen, chains = [layers], [layers.blocks]
                break
        if not chosen or (several and _is_further(candidate, chosen[0], modules, batch_dim)):
            chosen.append(replace(candidate, chains=len(split)))
            chains += split
        else:
            passed_over.append(candidate)
    if not chosen:
        return None
    chains.sort(key=lambda blocks: blocks[0].begin)
    taps, remarks, starts = _chains(seen, chains, None)
    called = {call.name for call in seen.calls}
    unseen: list[str] = []
    for best in chosen:
        missing, more = _beside(model, best, called)
        unseen += missing
        remarks += more
    asked = sum(len(best.names) for best in chosen) + len(unseen)
    return Taps(
        tuple(taps),
        " and ".join(
            _described(best) for best in sorted(chosen, key=lambda one: one.blocks[0].begin)
        ),
        asked,
        tuple(unseen),
        tuple(remarks),
        starts,
        tuple(_counted(other) for other in passed_over[:_MOST_PASSED_OVER]),
    )


def _described(candidate: _Candidate) -> str:
    if candidate.chains > 1:
        return f"{candidate.chains} chains of together {_counted(candidate)}"
    return f"chain of {_counted(candidate)}"


def _counted(candidate: _Candidate) -> str:
    return f"{len(candidate.blocks)} {', '.join(candidate.kinds)} in {candidate.pattern}"


def _beside(model: nn.Module, best: _Candidate, called: set[str]) -> tuple[list[str], list[str]]:
    """Return the names of a chain's siblings that were not called, and remarks on the others."""
    inside = set(best.names)
    key = _sibling_key(best.blocks[0].name)
    unseen: list[str] = []
    others: set[str] = set()
    remarks: list[str] = []
    for name, module in model.named_modules():
        name, kind = clean_name(name), type(module).__name__
        if _sibling_key(name) != key or name in inside:
            continue
        if kind in best.kinds and name not in called:
            unseen.append(name)
        elif kind not in best.kinds and _is_composite(module):
            others.add(kind)
    if others:
        remarks.append(
            f"Beside the chain {best.pattern} has {', '.join(sorted(others))}: "
            f"taps='chain:{best.pattern}' takes all of them."
        )
    if not best.passed:
        remarks.append(
            f"Between the blocks of {best.pattern} other operations change the state; if they are "
            f"not the blocks that you mean, name the taps."
        )
    return unseen, remarks


def _hint_at_samples(model: nn.Module, seen: Trace) -> str:
    """Name a chain whose states do not count samples where they were looked for."""
    chains = [c for c in _candidates(model, seen, lambda state: True) if _split(seen, c.blocks)]
    best = max(chains, key=lambda found: found.rank, default=None)
    if best is None or best.blocks[0].output is None or not best.passed:
        return ""
    return (
        f" {best.pattern} is a chain of {len(best.blocks)} {', '.join(best.kinds)} whose states "
        f"have shape {list(best.blocks[0].output.tensor.shape)}: batch_dim says which dimension "
        f"counts samples."
    )


# ---- taps named by the caller


def _glob(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*|\?|\[[^\]]+\])", pattern)
    known = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    return re.compile(
        "".join(
            known.get(p, p.replace("[!", "[^") if p.startswith("[") else re.escape(p))
            for p in parts
        )
    )


def _matcher(text: str) -> Callable[[str, nn.Module], bool]:
    if text.startswith("re:"):
        try:
            expression = re.compile(text[3:])
        except re.error as error:
            raise TapError(f"taps: {text!r}: expected a regular expression: {error}") from None
        return lambda name, module: expression.fullmatch(name) is not None
    if text.startswith("class:"):
        wanted = text[6:]
        return lambda name, module: any(c.__name__ == wanted for c in type(module).__mro__)
    expression = _glob(text)
    return lambda name, module: expression.fullmatch(name) is not None


def _flat(select: Select) -> Iterable[str | type[nn.Module] | nn.Module]:
    if isinstance(select, nn.ModuleList | nn.ModuleDict):  # never called itself
        yield from select.children()
    elif isinstance(select, str | type | nn.Module):
        yield select
    elif isinstance(select, Sequence):
        for item in select:
            yield from _flat(item)
    else:
        raise TypeError(
            f"taps: expected names, classes, modules or a list of them, got {type(select).__name__}"
        )


def _matches(
    model: nn.Module, item: str | type[nn.Module] | nn.Module
) -> tuple[list[str], Literal["input", "output", "chain"]]:
    """Return the names of the modules that a selector means, and what of them."""
    modules = {
        clean_name(name): module for name, module in model.named_modules(remove_duplicate=False)
    }
    # One module may stand at several places; it is known by its first name.
    first_names = {id(module): clean_name(name) for name, module in model.named_modules()}

    def known(found: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(first_names[id(modules[name])] for name in found))

    if isinstance(item, nn.Module):
        names = known(name for name, module in modules.items() if module is unwrap(item))
        if not names:
            raise TapError(f"taps: expected a module of the model, got a {type(item).__name__}")
        return names, "output"
    if isinstance(item, type):
        names = known(name for name, module in modules.items() if isinstance(module, item))
        if not names:
            raise TapError(
                f"taps: expected a class of which the model has modules, got {item.__name__}; it "
                f"has {_listed(sorted({type(m).__name__ for m in modules.values()}))}"
            )
        return names, "output"
    text, at = item, "output"
    if text.startswith("chain:"):
        text, at = text[6:], "chain"
    for suffix in ("input", "output"):
        if at != "chain" and text.endswith(f":{suffix}"):
            text, at = text[: -len(suffix) - 1], suffix
    matches = _matcher(text)
    names = known(name for name, module in modules.items() if name and matches(name, module))
    if not names:
        near = difflib.get_close_matches(text, list(modules), n=5, cutoff=0.4)
        classes = sorted({type(module).__name__ for module in modules.values()})
        raise TapError(
            f"taps: {item!r} matches no module; "
            + (
                f"the nearest names are {_listed(near)}"
                if near and not text.startswith("class:")
                else f"the model has the classes {_listed(classes)}"
            )
        )
    return names, at  # type: ignore[return-value]


def _class_of(item: type[nn.Module] | nn.Module) -> type[nn.Module]:
    return item if isinstance(item, type) else type(item)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_LISTED])
    return shown + (f", … ({len(names)} in all)" if len(names) > _MOST_LISTED else "")


def _selected(model: nn.Module, seen: Trace, select: Select) -> Taps:
    items = list(_flat(select))
    if not items:
        raise TapError("taps: expected at least one selector, got an empty list")
    taps: list[tuple[int, Tap]] = []
    asked: list[str] = []
    unseen: list[str] = []
    remarks: list[str] = []
    order: list[int] = []
    for item in items:
        names, at = _matches(model, item)
        asked += [name for name in names if name not in asked]
        calls = [call for call in seen.calls if call.name in names]
        called = {call.name for call in calls}
        unseen += [name for name in names if name not in called and name not in unseen]
        if not calls:
            others = sorted({call.name for call in seen.calls} - {""})
            asked_for = repr(item) if isinstance(item, str) else _class_of(item).__name__
            raise TapError(
                f"taps: {asked_for}: expected a module that the forward pass calls, got no call of "
                f"{_listed(names)}; called were {_listed(others)}"
            )
        if at == "chain":
            blocks = _plain(calls, names)
            found, more, _ = _chains(seen, _split(seen, blocks) or [blocks], None)
            remarks += more
            position = {(c.name, c.call): c for c in seen.calls}
            for tap in found:
                call = position[tap.module, tap.call]
                taps.append((call.begin if tap.at == "input" else call.end, tap))
            continue
        several = {call.name for call in calls if call.call}
        suffix = ":input" if at == "input" else ""
        for call in calls:
            what = call.input if at == "input" else call.output
            tap = Tap(
                call.name,
                at,
                call.call,
                f"{call.name}{suffix}"
                + (f" (call {call.call + 1})" if call.name in several else ""),
            )
            if what is None:
                got = call.output_type if at == "output" else "no floating tensor"
                raise TapError(f"taps: {tap.where}: expected a floating tensor, got {got}")
            taps.append((call.begin if at == "input" else call.end, tap))
        order.append(calls[0].begin)
    distinct = {(tap.module, tap.at, tap.call): (moment, tap) for moment, tap in reversed(taps)}
    if order != sorted(order):
        remarks.append(
            "The taps are reported in the order in which the forward pass reaches them, which is "
            "not the order in which they were named."
        )
    if unseen:
        remarks.append(f"Asked for but never called: {_listed(unseen)}.")
    points = tuple(tap for _, tap in sorted(distinct.values(), key=lambda pair: pair[0]))
    starts = _starts(seen, points)
    return Taps(points, "named", len(asked), tuple(unseen), tuple(remarks), starts)


def _starts(seen: Trace, points: Sequence[Tap]) -> tuple[int, ...]:
    """Return which named taps begin a further chain.

    Those that the state before does not lead to, and the first of several siblings behind several
    others, as those of a decoder behind those of an encoder.
    """
    keys = [(_sibling_key(tap.module), tap.at) for tap in points]
    starts = []
    for l, (before, tap) in enumerate(pairwise(points), 1):
        earlier, later = sighting_at(seen, before), sighting_at(seen, tap)
        if earlier is not None and later is not None and earlier.tensor is later.tensor:
            continue
        behind = keys[l] != keys[l - 1] and keys.count(keys[l]) > 1 and keys.count(keys[l - 1]) > 1
        if seen.depends(later, earlier) is False or behind:
            starts.append(l)
    return tuple(starts)


def _plain(calls: Sequence[ModuleCall], names: Sequence[str]) -> list[ModuleCall]:
    """Check that calls can be blocks of a chain: one after the other, each with states."""
    for call in calls:
        if call.input is None or call.output is None:
            raise TapError(
                f"taps: {call.name}: expected a block that takes and returns a floating tensor, "
                f"got {call.output_type}"
            )
    for a, b in pairwise(calls):
        if a.end > b.begin:
            raise TapError(
                f"taps: expected blocks that are called one after another, got {b.name} within "
                f"{a.name}"
            )
    return list(calls)


def _outline(seen: Trace) -> str:
    """Name the modules that were called with a state, outermost first."""
    names = sorted(
        {c.name for c in seen.calls if c.name and c.output is not None},
        key=lambda name: (name.count("."), name),
    )
    return _listed(names) if names else "no module that returns a floating tensor"
