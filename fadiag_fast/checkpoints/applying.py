"""Copy a checkpoint's weights into a model."""

from __future__ import annotations

import difflib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .content import Checkpoint, plain_names, renamed
from .errors import StateDictMismatch, at, escaped, listed
from .kinds import KindsChecked, may_round, wrong_kind
from .restoring import as_it_was_on_failure, loads_in_its_own_way

_MOST_SAID = 1000


def load_into(model: nn.Module, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Copy a checkpoint's weights into a model that has exactly these names and shapes.

    Names are compared without those of wrappers on either side, so the model may be wrapped by
    DistributedDataParallel, torch.compile, FSDP or activation checkpointing, whole or in parts, or
    not, whatever the file was saved from. Another prefix that all of the checkpoint's names have,
    such as a LightningModule's 'model.' or 'net.', and a 'module.' inside names, as of a part that
    was wrapped by DistributedDataParallel, are left out where the names are the model's without
    them. A tied weight may be stored under any or all of its names, but not with different values.
    Non-persistent buffers are no part of a state dict and keep their values.

    What modules themselves do for files of their earlier versions is done, as by load_state_dict:
    a file of batch norms without num_batches_tracked is taken, or one of the older weight_norm.

    Values are converted to the model's dtypes and devices where they stay what they are: floating
    point to floating point within its range, and whole numbers or truth values where they stay the
    same. Codes of quantized weights, truth values and complex numbers are no weights of floating
    point.

    Returns notes on what was not taken as it was: a prefix that was left out, rounding to a smaller
    type; and the checkpoint's own notes.

    Raises:
        StateDictMismatch: a name is missing or unexpected, a shape or a kind of number differs,
            tied weights disagree, a tensor has no data, or a module refuses what it is given; the
            model is as it was.
    """
    target = _Target(model)
    stored = _Given.of(checkpoint, target)
    comparisons = _comparisons(target, stored)
    fitting = next((found for found in comparisons if not found.problems), None)
    if fitting is None and target.own_loading:
        # Only its own loading methods and hooks know what they make of other names.
        fitting = min(comparisons, key=lambda found: len(found.unexpected))
        if fitting.certain_problems:
            fitting = None
    if fitting is None:
        raise _mismatch(model, checkpoint, comparisons[0])
    state = fitting.given.for_model(target)
    try:
        if target.own_loading:
            with as_it_was_on_failure(model), KindsChecked():
                model.load_state_dict(state, strict=True)
        else:  # nothing is left to fail half-way
            model.load_state_dict(state, strict=True)
    except Exception as error:
        if fitting.problems:
            raise _mismatch(model, checkpoint, comparisons[0], error) from error
        # Only a module with a loading method or hook of its own can still object here.
        raise StateDictMismatch(
            at(
                checkpoint.path,
                f"expected {type(model).__name__} to accept names and shapes like its own, got a "
                "refusal from its load_state_dict; the model is unchanged\n  " + _said(error),
                caller="load_into",
            )
        ) from error
    return (*checkpoint.notes, *fitting.given.notes, *fitting.notes)


class _Target:
    """Say what a model's state dict has, under plain names.

    Attributes:
        expected: plain name to the model's own tensor, or to extra state.
        own_loading: whether loading does more than copying, by methods or hooks that are not
            torch's.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # keep_vars: the model's own tensors, which tells lazy parameters from initialised ones.
        own = model.state_dict(keep_vars=True)
        self.names = plain_names(own)
        self.expected: dict[str, Any] = {plain: own[n] for n, plain in self.names.plain.items()}
        self.dropped = {name: own[name] for name in self.names.dropped}
        self.own_loading = any(map(loads_in_its_own_way, model.modules()))
        self.buffers = {
            self.names.of(name): (name, buffer) for name, buffer in model.named_buffers()
        }

    def ignored(self, name: str) -> bool:
        """Return whether the model names what only older files have, as transformers do."""
        for module in self.model.modules():
            patterns = getattr(module, "_keys_to_ignore_on_load_unexpected", None)
            if isinstance(patterns, list | tuple | set) and any(
                isinstance(pattern, str) and re.search(pattern, name) for pattern in patterns
            ):
                return True
        return False


@dataclass
class _Given:
    """Hold what a checkpoint gives under certain names.

    Attributes:
        tensors: with the modules' versions.
        extra_state: what is no tensor.
        beside: wrappers' own counts.
        notes: how the names were made from the stored ones.
    """

    tensors: dict[str, Tensor]
    extra_state: dict[str, Any]
    beside: dict[str, Any]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint, target: _Target) -> _Given:
        # A checkpoint that was made by hand may still have wrappers' names.
        names = plain_names(checkpoint.state_dict)
        extra_state = {names.of(n): value for n, value in checkpoint.extra_state.items()}
        beside = {n.rpartition(".")[2]: checkpoint.state_dict[n] for n in names.dropped}
        for name in target.dropped:
            last = name.rpartition(".")[2]
            value = beside.get(last, checkpoint.extra.get(last))
            if isinstance(value, Tensor) and not value.is_meta:
                beside[last] = value
        return cls(renamed(checkpoint.state_dict, names), extra_state, beside, names.notes)

    def under(self, rename: Callable[[str], str], note: str) -> _Given:
        """Return the same under other names."""
        tensors: OrderedDict[str, Tensor] = OrderedDict(
            (rename(name), tensor) for name, tensor in self.tensors.items()
        )
        versions = getattr(self.tensors, "_metadata", None)
        if versions is not None:
            tensors._metadata = OrderedDict(  # type: ignore[attr-defined]
                (rename(f"{name}._" if name else "_").rpartition(".")[0], value)
                for name, value in versions.items()
            )
        extra_state = {rename(name): value for name, value in self.extra_state.items()}
        return _Given(tensors, extra_state, self.beside, (*self.notes, note))

    def for_model(self, target: _Target) -> OrderedDict[str, Any]:
        """Return a state dict under the model's own names."""
        own = {plain: name for name, plain in target.names.plain.items()}
        values = {**self.tensors, **self.extra_state}
        state: OrderedDict[str, Any] = OrderedDict(
            (own.get(name, target.names.prefix + name), value) for name, value in values.items()
        )
        for name, value in target.dropped.items():
            state[name] = self.beside.get(name.rpartition(".")[2], value)
        versions = getattr(self.tensors, "_metadata", None)
        if versions is not None:
            state._metadata = OrderedDict(  # type: ignore[attr-defined]
                (name, _own_version(versions[plain]))
                for name, _ in target.model.named_modules(remove_duplicate=False)
                if (plain := target.names.of(f"{name}._" if name else "_").rpartition(".")[0])
                in versions
            )
        return state


def _own_version(version: Any) -> Any:
    """Return a module's version without torch's note to itself to take tensors uncopied.

    load_state_dict(assign=True) leaves it in the dict that it was given, which may then be saved.
    """
    if not isinstance(version, Mapping):
        return version
    return {name: value for name, value in version.items() if name != "assign_to_params_buffers"}


@dataclass
class _Comparison:
    """Say how what is given differs from what is expected.

    `by_name` holds what is missing and unexpected before modules' rules for older files.
    """

    given: _Given
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    other_kinds: list[str] = field(default_factory=list)
    disagreeing: list[str] = field(default_factory=list)
    without_data: list[str] = field(default_factory=list)
    by_name: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    notes: tuple[str, ...] = ()

    @property
    def certain_problems(self) -> bool:
        """Whether something is wrong that no method of a module can set right."""
        return bool(self.other_kinds or self.disagreeing or self.without_data)

    @property
    def problems(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped or self.certain_problems)


def _comparisons(target: _Target, stored: _Given) -> list[_Comparison]:
    """Compare names as they are stored and, as long as they do not fit, in other ways."""
    found = []
    for given in _ways(target.expected, stored):
        found.append(_compare(target, given))
        if not found[-1].problems:
            break
    return found


def _ways(expected: Mapping[str, Any], stored: _Given) -> Iterator[_Given]:
    yield stored
    names = list(stored.tensors)
    for prefix in _common_prefixes(names):
        if any(name[len(prefix) :] in expected for name in names):
            yield stored.under(
                partial(_behind, len(prefix)),
                f"left out {prefix!r}, with which every name in the checkpoint starts",
            )
    # Parts that were wrapped by DistributedDataParallel, in the file, the model or both.
    own = {_without_module(name): name for name in expected}
    if len(own) < len(expected) or len({*map(_without_module, names)}) < len(names):
        return
    if any("module" in name.split(".") for name in (*names, *expected)):
        yield stored.under(
            lambda name: own.get(_without_module(name), name),
            "took names with or without 'module.' inside them, as the model's are",
        )


def _behind(length: int, name: str) -> str:
    return name[length:]


def _common_prefixes(names: list[str]) -> Iterator[str]:
    first = next(iter(names), "")
    for end in (i + 1 for i, c in enumerate(first) if c == "."):
        if not all(name.startswith(first[:end]) and len(name) > end for name in names):
            break
        yield first[:end]


def _without_module(name: str) -> str:
    *parts, last = name.split(".")
    return ".".join([*(part for part in parts if part != "module"), last])


def _compare(target: _Target, stored: _Given) -> _Comparison:
    expected = target.expected
    tensors: OrderedDict[str, Tensor] = OrderedDict(stored.tensors)
    if hasattr(stored.tensors, "_metadata"):
        tensors._metadata = stored.tensors._metadata  # type: ignore[attr-defined]
    given = _Given(tensors, stored.extra_state, stored.beside, stored.notes)
    found = _Comparison(given)
    values = {**tensors, **given.extra_state}
    found.missing, found.disagreeing = _resolve_tied(expected, values)
    for name in values.keys() - tensors.keys() - given.extra_state.keys():
        tensors[name] = values[name]
    found.unexpected = [name for name in values if name not in expected]
    found.by_name = found.missing, found.unexpected[:]
    left_out = [name for name in found.unexpected if _may_be_left_out(target, name, values[name])]
    for name in left_out:
        found.unexpected.remove(name)
        tensors.pop(name, None)
    if left_out:
        found.notes += (f"left out {listed(left_out)}, which the model does not load",)
    if (found.missing or found.unexpected) and not target.own_loading:
        _apply_torchs_rules(target, found)
    rounded: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        own = expected.get(name)
        if not isinstance(own, Tensor):
            continue
        lazy = nn.parameter.is_lazy(own)
        # Scalars of torch 0.3 have one dimension.
        as_scalar = not lazy and own.dim() == 0 and tuple(tensor.shape) == (1,)
        if not lazy and own.shape != tensor.shape and not as_scalar:
            found.reshaped.append(f"{name}: expected {list(own.shape)}, got {list(tensor.shape)}")
        elif tensor.is_meta or (own.is_meta and not lazy):
            where = "checkpoint" if tensor.is_meta else "model"
            found.without_data.append(f"{name} (in the {where})")
        elif not _converted_by_its_module(target, name):
            wrong = wrong_kind(tensor, own)
            if wrong:
                found.other_kinds.append(f"{name}: {wrong}")
            elif may_round(tensor.dtype, own.dtype):
                rounded.setdefault(f"{tensor.dtype} to {own.dtype}", []).append(name)
    found.notes += tuple(
        f"rounded from {types}: {listed(names)}" for types, names in rounded.items()
    )
    return found


def _may_be_left_out(target: _Target, name: str, value: Any) -> bool:
    """Return whether an older file's buffer is one that the model makes itself."""
    if target.ignored(name):
        return True
    _, buffer = target.buffers.get(name, ("", None))
    return (
        isinstance(buffer, Tensor)
        and isinstance(value, Tensor)
        and (not buffer.is_meta and not value.is_meta and _same_values(buffer.cpu(), value.cpu()))
    )


def _apply_torchs_rules(target: _Target, found: _Comparison) -> None:
    """Leave to torch's own modules what they make of names of their earlier versions."""
    state = found.given.for_model(target)
    own = target.names.plain
    if any(nn.parameter.is_lazy(value) for value in target.expected.values()):
        return
    for name, value in state.items():
        if isinstance(value, Tensor):
            # Of the model's shape where it has one: shapes are compared for themselves.
            like = target.expected.get(own.get(name, ""), value)
            state[name] = torch.empty_like(
                like if isinstance(like, Tensor) else value, device="meta"
            )
    try:
        with _without_tensors(target.model):
            # Assigned, so that nothing is copied.
            missing, unexpected = target.model.load_state_dict(state, strict=False, assign=True)
    except Exception:
        return  # what is compared by name stands
    found.missing = [target.names.of(name) for name in missing]
    found.unexpected = [target.names.of(name) for name in unexpected]


@contextmanager
def _without_tensors(model: nn.Module) -> Iterator[None]:
    """Give a model's modules tensors without data for a while."""
    held = []
    try:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    held.append((tensors, name, tensor))
                    empty = torch.empty_like(tensor.detach(), device="meta")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(empty, False) if is_parameter else empty  # type: ignore[assignment]
        yield
    finally:
        for tensors, name, tensor in held:
            tensors[name] = tensor  # type: ignore[assignment]


def _mismatch(
    model: nn.Module, checkpoint: Checkpoint, found: _Comparison, error: Exception | None = None
) -> StateDictMismatch:
    problems = [
        f"{title} ({len(entries)}): {listed(entries)}"
        for title, entries in (
            ("missing from the checkpoint", found.missing),
            ("unexpected in the checkpoint", _with_buffer_notes(model, found.unexpected)),
            ("of another shape", found.reshaped),
            ("of another kind of number", found.other_kinds),
            ("tied in the model but different in the checkpoint", found.disagreeing),
            ("on the meta device, without data", found.without_data),
        )
        if entries
    ]
    hint = _name_hint(*found.by_name)
    if error is not None:
        problems.append(f"its own loading says: {_said(error)}")
    return StateDictMismatch(
        at(
            checkpoint.path,
            f"expected the names, shapes and kinds of numbers of {type(model).__name__}, got a "
            "state dict that does not match; the model is unchanged\n  "
            + "\n  ".join([*problems, *([hint] if hint else []), *checkpoint.notes]),
            caller="load_into",
        )
    )


def _converted_by_its_module(target: _Target, name: str) -> bool:
    """Return whether the module of a tensor loads in its own way, which may convert it."""
    if not target.own_loading:
        return False
    own = {plain: stored for stored, plain in target.names.plain.items()}
    try:
        module = target.model.get_submodule(own[name].rpartition(".")[0])
    except (AttributeError, KeyError):
        return False
    return loads_in_its_own_way(module)


def _said(error: Exception) -> str:
    """Return what torch's loading says, which may list as many names as there are."""
    text = escaped(" ".join(f"{type(error).__name__}: {error}".split()))
    return text if len(text) <= _MOST_SAID else f"{text[:_MOST_SAID]}..."


def _resolve_tied(
    expected: Mapping[str, Any], given: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Give tied weights that are stored once all their names; return missing and disagreeing.

    safetensors stores shared memory once, so a file of a tied model lacks the other names.
    """
    groups: dict[object, list[str]] = {}
    for key, value in expected.items():
        groups.setdefault(_identity(value), []).append(key)
    missing, disagreeing = [], []
    for names in groups.values():
        present = [name for name in names if name in given]
        if not present:
            missing.extend(names)
            continue
        source = given[present[0]]
        for name in present[1:]:
            # load_state_dict would let the last of them win, silently.
            if not _same_values(source, given[name]):
                disagreeing.append(f"{present[0]} and {name}")
        for name in names:
            given.setdefault(name, source)
    return missing, disagreeing


def _identity(value: Any) -> object:
    """Return a key that two entries share if and only if they are one tensor in memory."""
    if not isinstance(value, Tensor):
        return object()  # a module's extra state is never tied
    if (
        type(value) in (Tensor, nn.Parameter)
        and not nn.parameter.is_lazy(value)
        and value.layout == torch.strided
        and not value.is_meta
        and value.numel() > 0
    ):
        # Tying by .data makes two Parameter objects over one memory, so identity is not enough.
        return (value.device, value.dtype, value.data_ptr(), value.shape, value.stride())
    return id(value)


def _same_values(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b  # extra state, which is not tied
    if a.is_meta or b.is_meta:
        return True  # without data there is nothing to disagree; that is reported by itself
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # Bits, so that NaN equals itself and types without a comparison (float8) work.
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def _with_buffer_notes(model: nn.Module, unexpected: list[str]) -> list[str]:
    names = plain_names(model.state_dict())
    buffers = {names.of(name) for name, _ in model.named_buffers()}
    return [
        f"{key} (a non-persistent buffer of the model)" if key in buffers else key
        for key in unexpected
    ]


def _name_hint(missing: list[str], unexpected: list[str]) -> str:
    """Say what would reconcile the names, if one prefix or a close spelling does."""
    if not missing or not unexpected:
        return ""
    for longer, shorter, text in (
        (unexpected, missing, "the checkpoint's names have {!r} in front of the model's"),
        (missing, unexpected, "the model's names have {!r} in front of the checkpoint's"),
    ):
        prefix = _common_extra_prefix(longer, shorter)
        if prefix:
            return f"hint: {text.format(prefix)}, for example {prefix + shorter[0]!r}"
    # Spelling is compared for one name only: the comparison is slow, and one shows the pattern.
    close = difflib.get_close_matches(missing[0], unexpected, n=1)
    return f"hint: {missing[0]!r} is missing, and the checkpoint has {close[0]!r}" if close else ""


def _common_extra_prefix(longer: list[str], shorter: list[str]) -> str:
    """Return the prefix that turns every shorter name into one of the longer ones, or ''."""
    available = set(longer)
    for name in longer:
        if name.endswith(f".{shorter[0]}"):
            prefix = name[: -len(shorter[0])]
            if all(prefix + other in available for other in shorter):
                return prefix
    return ""
