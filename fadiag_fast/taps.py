"""Decide where a network is observed.

A tap is a place at which one hidden state is seen: the input or the output of a module, or a state
that the model hands out itself. Taps are named by the caller, or chosen from one forward pass:

1. the residual contract: a model with ``blocks`` and ``out_head`` (and ``embed``, ``out_ln``) is
   observed along its blocks;
2. a forward with ``return_hidden=True`` hands out its states;
3. else the longest chain of repeated sibling blocks, one class, names that differ in their numbers;
4. else the caller must name the taps, and the error lists what there is.

A chain of L blocks has L + 1 states: the input of the first block and the state after every block.
Where the blocks return the next state, that is their output. Where they return only the branch and
the caller adds the skip, it is the input of whatever comes next: which of the two holds is seen in
the pass and not assumed.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .tracing import ModuleCall, Sighting, Trace, clean_name, trace

Select = str | type[nn.Module] | nn.Module | Sequence["Select"]

_CountsSamples = Callable[[Tensor], bool]

_MOST_LISTED = 12
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
    """

    points: tuple[Tap, ...]
    chosen: str
    asked: int
    unseen: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    chain_starts: tuple[int, ...] = ()

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
        found = _automatic(model, seen, counts_samples)
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
    scale = torch.linalg.vector_norm(state)
    return bool(torch.linalg.vector_norm(state - before - branch) <= tolerance * scale)


def _link(block: ModuleCall, state: Sighting | None) -> Literal["state", "branch"] | None:
    """Say what a block returned, judged by the state that the next module received."""
    if state is None or block.input is None or block.output is None:
        return None
    if state.tensor is block.output.tensor and state.version == block.output.version:
        return "state"
    if state.tensor is block.input.tensor and state.version != block.input.version:
        return "branch"  # h += block(h)
    if is_sum(state.tensor, block.input.tensor, block.output.tensor):
        return "branch"
    return None


def _links(seen: Trace, blocks: Sequence[ModuleCall]) -> list[Literal["state", "branch"] | None]:
    closer = _after(seen, blocks[-1])
    following = [*(block.input for block in blocks[1:]), None if closer is None else closer.input]
    return [_link(block, state) for block, state in zip(blocks, following, strict=True)]


def _after(seen: Trace, block: ModuleCall) -> ModuleCall | None:
    """Return the first module called after a block ended that takes a state of the stream's shape.

    The stream's shape is that of the block's output.
    """
    if block.output is None:
        return None
    shape = block.output.tensor.shape
    for call in seen.calls:
        if call.begin > block.end and call.input is not None and call.input.tensor.shape == shape:
            return call
    return None


def _is_model_input(sighting: Sighting) -> bool:
    return sighting.source is not None and sighting.source.kind == "input"


def _chain(
    seen: Trace, blocks: Sequence[ModuleCall], first_label: str | None
) -> tuple[list[Tap], list[str]]:
    """Return the taps before, between and after blocks that are called one after another."""
    links = _links(seen, blocks)
    several = {block.name for block in blocks if block.call}

    def label(block: ModuleCall) -> str:
        return f"{block.name} (call {block.call + 1})" if block.name in several else block.name

    first = blocks[0]
    remarks: list[str] = []
    taps: list[Tap] = []
    # The network's input itself is no hidden state.
    if first.input is not None and not _is_model_input(first.input):
        taps.append(Tap(first.name, "input", first.call, first_label or f"input of {label(first)}"))
    # A sum that another module's call cannot show (0.5·f(h), say) also comes as an input.
    returns_states = links.count("state") > links.count("branch")
    if not returns_states and "branch" not in links:
        returns_states = any(
            block.output is None
            or following.input is None
            or block.output.tensor.shape != following.input.tensor.shape
            for block, following in pairwise(blocks)
        )
    if returns_states:
        return taps + [Tap(b.name, "output", b.call, label(b)) for b in blocks], remarks
    for block, following in pairwise(blocks):
        taps.append(Tap(following.name, "input", following.call, label(block)))
    closer = _after(seen, blocks[-1])
    if closer is None:
        remarks.append(
            f"The state after {label(blocks[-1])} is no module's input: it was not seen."
        )
    else:
        # Something may lie between the last block and what receives a state of its shape.
        alike = links[-1] is not None or None in links[:-1]
        last = label(blocks[-1]) if alike else f"input of {closer.name}"
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
        taps, remarks = _chain(seen, blocks, "embed")
        if called != [path for path in names if path in called]:
            remarks.append(f"The forward pass calls the blocks in the order {_listed(called)}.")
    elif asked:
        raise TapError(
            f"{name}: expected forward to call its blocks, got no call of {_listed(names)}"
        )
    else:
        closer = "out_ln" if getattr(model, "out_ln", None) is not None else "out_head"
        taps, remarks = [Tap(closer, "input", 0, "embed")], []
    return Taps(tuple(taps), "residual contract", asked, tuple(unseen), tuple(remarks))


@dataclass(frozen=True)
class _Candidate:
    """Modules at sibling names, called one after another."""

    pattern: str
    blocks: list[ModuleCall]
    kind_of: list[str]  # each block's class
    passed: int  # states that visibly go from one block to the next
    matrices: int  # parameters of two and more dimensions
    size: int  # elements of all parameters

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.kind_of))

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


def _is_chain(seen: Trace, candidate: _Candidate) -> bool:
    """Say whether every block sees what the one before it returned: not so in parallel branches."""
    return all(
        seen.depends(after.input, before.output) is not False
        for before, after in pairwise(candidate.blocks)
    )


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
    return a.tensor.untyped_storage().data_ptr() == b.tensor.untyped_storage().data_ptr()


def _automatic(model: nn.Module, seen: Trace, counts_samples: _CountsSamples) -> Taps | None:
    """Return the longest chain of repeated sibling blocks that no residual branch hides."""
    candidates = sorted(
        _candidates(model, seen, counts_samples), key=lambda found: found.rank, reverse=True
    )
    best = next(
        (
            found
            for found in candidates
            if _is_chain(seen, found)
            and not any(
                _repeats_in(found, other) or _is_inside_a_branch(seen, found, other)
                for other in candidates
            )
        ),
        None,
    )
    if best is None:
        return None
    taps, remarks = _chain(seen, best.blocks, None)
    called = {call.name for call in seen.calls}
    inside = {block.name for block in best.blocks}
    key = _sibling_key(best.blocks[0].name)
    unseen, others = [], set()
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
    what = f"chain of {len(best.blocks)} {', '.join(best.kinds)} in {best.pattern}"
    return Taps(tuple(taps), what, len(inside) + len(unseen), tuple(unseen), tuple(remarks))


def _hint_at_samples(model: nn.Module, seen: Trace) -> str:
    """Name a chain whose states do not count samples where they were looked for."""
    chains = [c for c in _candidates(model, seen, lambda state: True) if _is_chain(seen, c)]
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
            found, more = _chain(seen, _plain(calls, names), None)
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
    return Taps(points, "named", len(asked), tuple(unseen), tuple(remarks))


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
