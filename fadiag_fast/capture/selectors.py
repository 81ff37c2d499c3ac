"""Taps that the caller names: patterns, classes, modules and functions."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from .chains import find_chains, split_calls
from .points import Select, Tap, TapError, Taps, listed, sighting_at, unwrap
from .tracing import ModuleCall, Trace, clean_name
from .trunk import sibling_key

SELECTOR_HELP = (
    "a module's name (its output), NAME:input, a glob (* within one part of a name, ** across "
    "parts), re:EXPRESSION, class:NAME, or chain:PATTERN for blocks one after another"
)


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
                f"has {listed(sorted({type(m).__name__ for m in modules.values()}))}"
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
                f"the nearest names are {listed(near)}"
                if near and not text.startswith("class:")
                else f"the model has the classes {listed(classes)}"
            )
        )
    return names, at  # type: ignore[return-value]


def _class_of(item: type[nn.Module] | nn.Module) -> type[nn.Module]:
    return item if isinstance(item, type) else type(item)


def select_taps(model: nn.Module, seen: Trace, select: Select) -> Taps:
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
                f"{listed(names)}; called were {listed(others)}"
            )
        if at == "chain":
            blocks = _plain(calls, names)
            found, more, _ = find_chains(seen, split_calls(seen, blocks) or [blocks], None)
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
        remarks.append(f"Asked for but never called: {listed(unseen)}.")
    points = tuple(tap for _, tap in sorted(distinct.values(), key=lambda pair: pair[0]))
    starts = _starts(seen, points)
    return Taps(points, "named", len(asked), tuple(unseen), tuple(remarks), starts)


def _starts(seen: Trace, points: Sequence[Tap]) -> tuple[int, ...]:
    """Return which named taps begin a further chain.

    Those that the state before does not lead to, and the first of several siblings behind several
    others, as those of a decoder behind those of an encoder.
    """
    keys = [(sibling_key(tap.module), tap.at) for tap in points]
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
