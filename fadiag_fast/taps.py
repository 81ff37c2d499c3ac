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
from dataclasses import dataclass
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
    """

    points: tuple[Tap, ...]
    chosen: str
    asked: int
    unseen: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

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
    if select is None and not hasattr(model, "blocks") and _offers_hidden(model):
        return _handed(model, x)
    seen = trace(model, x)
    if select is not None:
        return _selected(model, seen, select), seen
    if all(hasattr(model, name) for name in ("embed", "blocks", "out_head")):
        return _contract(model, seen), seen
    found = _automatic(model, seen, counts_samples)
    if found is not None:
        return found, seen
    if _offers_hidden(model):
        return _handed(model, x)
    raise TapError(
        f"{type(model).__name__}: expected the residual contract (embed, blocks, out_head), a "
        f"forward with return_hidden=True, or at least two sibling blocks of one class in a row, "
        f"to choose taps by; got {_outline(seen)}. Name the taps: {SELECTOR_HELP}."
    )


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


def _is_sum(state: Tensor, before: Tensor, branch: Tensor) -> bool:
    if state.shape != before.shape or state.shape != branch.shape:
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
    if _is_sum(state.tensor, block.input.tensor, block.output.tensor):
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
        taps.append(Tap(closer.name, "input", closer.call, label(blocks[-1])))
    return taps, remarks


def _contract(model: Any, seen: Trace) -> Taps:
    name = type(model).__name__
    blocks: list[ModuleCall] = []
    unseen = []
    for index in range(len(model.blocks)):
        found = [call for call in seen.calls if call.name == f"blocks.{index}"]
        blocks += found
        if not found:
            unseen.append(f"blocks.{index}")
    for block in blocks:
        if block.input is None or block.output is None:
            raise TapError(
                f"{name}: {block.name}: expected one tensor, got {block.output_type or 'nothing'}"
            )
    asked = len(model.blocks)
    if blocks:
        taps, remarks = _chain(seen, blocks, "embed")
    elif asked:
        raise TapError(
            f"{name}: expected forward to call its blocks, got no call of blocks.0 to "
            f"blocks.{asked - 1}"
        )
    else:
        closer = "out_ln" if getattr(model, "out_ln", None) is not None else "out_head"
        taps, remarks = [Tap(closer, "input", 0, "embed")], []
    return Taps(tuple(taps), "residual contract", asked, tuple(unseen), tuple(remarks))


@dataclass(frozen=True)
class _Candidate:
    """Modules of one class at sibling names, called one after another."""

    kind: str
    pattern: str
    blocks: list[ModuleCall]
    passed: int  # states that visibly go from one block to the next
    size: int  # parameters

    @property
    def rank(self) -> tuple[int, int, int]:
        return self.passed, len(self.blocks), self.size


def _candidates(model: nn.Module, seen: Trace, counts_samples: _CountsSamples) -> list[_Candidate]:
    modules = {clean_name(name): module for name, module in model.named_modules()}
    groups: dict[tuple[type, str], list[ModuleCall]] = {}
    for call in seen.calls:
        module = modules[call.name]
        if call.name and next(module.parameters(), None) is not None:
            key = (type(module), re.sub(r"\d+", "*", call.name))
            groups.setdefault(key, []).append(call)
    found = []
    for (kind, pattern), blocks in groups.items():
        states = [state for block in blocks for state in (block.input, block.output)]
        if len(blocks) < 2 or any(state is None for state in states):
            continue
        if not all(counts_samples(state.tensor) for state in states if state is not None):
            continue
        if any(a.end > b.begin for a, b in pairwise(blocks)):
            continue
        passed = sum(link is not None for link in _links(seen, blocks)[:-1])
        names = {block.name for block in blocks}
        size = sum(p.numel() for name in names for p in modules[name].parameters())
        found.append(_Candidate(kind.__name__, pattern, blocks, passed, size))
    return found


def _is_inside_a_branch(inner: _Candidate, outer: _Candidate) -> bool:
    """Say whether blocks are parts of other blocks that return something else than the last part.

    The blocks of a stage are the stage; the convolutions of a residual block are not the block.
    """
    ends: dict[int, ModuleCall] = {}
    for block in inner.blocks:
        for index, whole in enumerate(outer.blocks):
            if whole.begin < block.begin and block.end < whole.end:
                ends[index] = block
    if not ends:
        return False
    same = sum(_is_passed_on(block.output, outer.blocks[i].output) for i, block in ends.items())
    return same < 0.9 * len(ends)


def _is_passed_on(a: Sighting | None, b: Sighting | None) -> bool:
    """Say whether two sightings show the same values in the same memory, as views perhaps."""
    if a is None or b is None or a.version != b.version:
        return False
    return a.tensor.untyped_storage().data_ptr() == b.tensor.untyped_storage().data_ptr()


def _automatic(model: nn.Module, seen: Trace, counts_samples: _CountsSamples) -> Taps | None:
    """Return the longest chain of repeated sibling blocks that no residual branch hides."""
    candidates = _candidates(model, seen, counts_samples)
    outermost = [
        c for c in candidates if not any(_is_inside_a_branch(c, other) for other in candidates)
    ]
    if not outermost:
        return None
    best = max(outermost, key=lambda candidate: candidate.rank)
    taps, remarks = _chain(seen, best.blocks, None)
    called = {block.name for block in best.blocks}
    asked, unseen, others = 0, [], set()
    for name, module in model.named_modules():
        name = clean_name(name)
        if re.sub(r"\d+", "*", name) != best.pattern:
            continue
        if type(module).__name__ == best.kind:
            asked += 1
            unseen += [name] if name not in called else []
        elif next(module.parameters(), None) is not None:
            others.add(type(module).__name__)
    if others:
        remarks.append(
            f"The chain is of one class; beside it {best.pattern} has {', '.join(sorted(others))}: "
            f"taps='chain:{best.pattern}' takes all of them."
        )
    what = f"chain of {len(best.blocks)} {best.kind} in {best.pattern}"
    return Taps(tuple(taps), what, asked, tuple(unseen), tuple(remarks))


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
    if isinstance(select, str | type | nn.Module):
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
    modules = {clean_name(name): module for name, module in model.named_modules()}
    if isinstance(item, nn.Module):
        names = [name for name, module in modules.items() if module is unwrap(item)]
        if not names:
            raise TapError(f"taps: expected a module of the model, got a {type(item).__name__}")
        return names, "output"
    if isinstance(item, type):
        names = [name for name, module in modules.items() if isinstance(module, item)]
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
    names = [name for name, module in modules.items() if name and matches(name, module)]
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
            raise TapError(
                f"taps: {item!r}: expected a module that the forward pass calls, got no call of "
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
