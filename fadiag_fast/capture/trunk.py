"""Choose taps automatically: the longest chain of repeated blocks and what runs beside it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import nn

from .chains import find_chains, is_passed_on, links_between, split_calls
from .points import CountsSamples, Taps
from .tracing import ModuleCall, Trace, clean_name

_MOST_PASSED_OVER = 4


# Of a network of more layers, one after the other, blocks are found; to look would take long.
_LONGEST_TRUNK = 64


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


def sibling_key(name: str) -> str:
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


def _candidates(model: nn.Module, seen: Trace, counts_samples: CountsSamples) -> list[_Candidate]:
    modules = {clean_name(name): module for name, module in model.named_modules()}
    siblings: dict[str, list[ModuleCall]] = {}
    for call in seen.calls:
        if call.name and next(modules[call.name].parameters(), None) is not None:
            siblings.setdefault(sibling_key(call.name), []).append(call)
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
        passed = sum(link is not None for link in links_between(seen, blocks)[:-1])
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
    """Return whether blocks are parts of other blocks in which a skip leads around them.

    The blocks of a stage are the stage; the convolutions of a residual block are not the block.
    """
    for whole in outer.blocks:
        parts = [b for b in inner.blocks if whole.begin < b.begin and b.end < whole.end]
        if not parts:
            continue
        around = seen.depends(whole.output, whole.input, without=[part.output for part in parts])
        if around or (around is None and not is_passed_on(parts[-1].output, whole.output)):
            return True
    return False


def _repeats_in(inner: _Candidate, outer: _Candidate) -> bool:
    """Return whether blocks of several classes are one unit that other blocks repeat.

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


def _trunk(model: nn.Module, seen: Trace, counts_samples: CountsSamples) -> _Candidate | None:
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
        ", ".join(dict.fromkeys(sibling_key(layer.name) for layer in layers)),
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


def automatic_taps(
    model: nn.Module,
    seen: Trace,
    counts_samples: CountsSamples,
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
        split = split_calls(seen, candidate.blocks)
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
    taps, remarks, starts = find_chains(seen, chains, None)
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
    key = sibling_key(best.blocks[0].name)
    unseen: list[str] = []
    others: set[str] = set()
    remarks: list[str] = []
    for name, module in model.named_modules():
        name, kind = clean_name(name), type(module).__name__
        if sibling_key(name) != key or name in inside:
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


def hint_at_samples(model: nn.Module, seen: Trace) -> str:
    """Name a chain whose states do not count samples where they were looked for."""
    chains = [
        c for c in _candidates(model, seen, lambda state: True) if split_calls(seen, c.blocks)
    ]
    best = max(chains, key=lambda found: found.rank, default=None)
    if best is None or best.blocks[0].output is None or not best.passed:
        return ""
    return (
        f" {best.pattern} is a chain of {len(best.blocks)} {', '.join(best.kinds)} whose states "
        f"have shape {list(best.blocks[0].output.tensor.shape)}: batch_dim says which dimension "
        f"counts samples."
    )
