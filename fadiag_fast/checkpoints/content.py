"""Find the state dict in what a file held."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .errors import NoStateDict, UnreadableCheckpoint, at, brief, listed, printable
from .placeholders import is_opaque, shown
from .places import TensorPlace

# Where training scripts put the weights, in the order in which we look: what is trained first, then
# averages of it. Each is also looked for further down.
_TRAINED = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",  # DeepSpeed
    "net",
    "net_state_dict",
    "network",
    "params",
    "weights",
    "model_weights",
    "student",
    "generator",
    "netG",
)
AVERAGED = (
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "ema_model",
    "model_ema_state_dict",
    "params_ema",
    "ema",
    "teacher",
    "generator_ema",
    "netG_ema",
)
CONTAINERS = _TRAINED + AVERAGED

# What holds the weights' container among other things.
_OUTER = ("state", "checkpoint", "ckpt", "app", "trainer")

# Mappings that are looked into: a file may hold any number of them.
_MOST_MAPPINGS = 200

# What wrappers put before a name: in front of every key, torch.compile, FSDP and activation
# checkpointing also before a part's, where a part is wrapped by itself.
_INNER_WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"}
)
_WRAPPER_PREFIXES = ("module.", *(f"{name}." for name in sorted(_INNER_WRAPPERS)))

# AveragedModel's own count of averages beside the names that it puts 'module.' before.
_AVERAGES = "n_averaged"

# What modules store beside tensors stands under this name, whatever it is.
_EXTRA_STATE = "_extra_state"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Hold a model's weights and where they came from.

    Attributes:
        path: the file or folder, as given; text for a URL.
        state_dict: the weights, without wrapper prefixes in their names.
        format: 'torch-zip', 'torch-legacy', 'safetensors', 'pickle' (a plain pickle, which is read
            only with unsafe_pickle=True), 'torch-sharded', 'safetensors-sharded', or 'distributed'.
        container: where the state dict was: 'bare', the key that held it (with dots where it was
            further down, such as 'state.model'), or 'module' for a whole pickled module.
        removed_prefix: what was removed from the front of every key, such as 'module.'.
        extra: the other entries, of all levels above the state dict; for safetensors, the file's
            metadata; for a folder with a trainer_state.json, its 'global_step' and 'epoch'.
        extra_state: by name, what modules stored beside tensors (`get_extra_state`), where that is
            no tensor.
        notes: what was taken where the file left a choice, and what was left out.
    """

    path: Path | str
    # Kept out of the repr: printing a checkpoint should not print its weights.
    state_dict: dict[str, Tensor] = field(repr=False)
    format: str
    container: str
    removed_prefix: str
    extra: dict[str, Any] = field(repr=False)
    extra_state: dict[str, Any] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()


class Content(NamedTuple):
    """Hold a state dict as it was found in a file; see Checkpoint."""

    state: dict[str, Tensor]
    container: str
    extra: dict[str, Any]
    extra_state: dict[str, Any]
    notes: tuple[str, ...]
    removed_prefix: str


def find_content(
    content: Any, path: str | os.PathLike[str], unsafe_pickle: bool, key: str | None = None
) -> Content:
    """Find the weights in what a file held, under their plain names.

    Args:
        content: what the file held.
        path: for messages.
        unsafe_pickle: whether a whole module would have been read.
        key: where the weights are, with dots between levels; None for the first of CONTAINERS, or
            of what is nested in them, that holds a state dict. It may also be the beginning of the
            names of a part of a state dict.

    Raises:
        NoStateDict: there is none, or none at `key`.
    """
    part = ""
    taken: _Place | None
    if key is None:
        taken = _first_state(content)
        if taken is None:
            raise NoStateDict(_nothing(content, path, unsafe_pickle))
    else:
        at_key = _place(content, key)
        if at_key is not None:
            taken, part = at_key
            if not part:
                taken = _first_state(_at(content, taken), taken)
        if at_key is None or taken is None:
            raise NoStateDict(_nothing_at(content, path, key))
    found = _at(content, taken)
    state, extra_state = _as_state(found, path)
    if not state:
        raise NoStateDict(_nothing(content, path, unsafe_pickle))
    notes: list[str] = []
    extra: dict[str, Any] = {}
    for depth in reversed(range(len(taken))):
        level = _at(content, taken[:depth])
        beside = {str(shown(name)): value for name, value in level.items() if name != taken[depth]}
        extra = {**extra, **beside}
    container = ".".join(taken) or ("module" if isinstance(found, nn.Module) else "bare")
    if part:
        container = part[:-1] if container == "bare" else f"{container}.{part[:-1]}"
        state, others = _part(state, part), len(state)
        extra_state = _part(extra_state, part)
        others -= len(state)
        if others:
            notes.append(f"left out the {others} tensors whose names do not start with {part!r}")
    elif key is None:
        others_found = [place for place in _states(content, taken) if place != taken]
        if others_found:
            notes.append(chose(container, map(".".join, others_found)))
        elif len(taken) > 1 or container in AVERAGED:
            notes.append(f"took the weights under {printable(container)!r}")
    names = plain_names(state)
    for name in names.dropped:
        extra.setdefault(name.rpartition(".")[2], state[name])
    return Content(
        renamed(state, names),
        container,
        extra,
        {names.of(name): value for name, value in extra_state.items()},
        (*notes, *names.notes),
        names.prefix,
    )


def chose(container: str, others: Iterable[str]) -> str:
    """Say that of several places with weights one was taken."""
    return (
        f"took the weights under {printable(container)!r}; there are others under "
        f"{listed(printable(repr(name)) for name in others)} (choose with key=, on the command "
        "line --key)"
    )


_Place = tuple[str, ...]


def _at(content: Any, place: _Place) -> Any:
    for name in place:
        content = content[name]
    return content


def _first_state(content: Any, above: _Place = ()) -> _Place | None:
    """Return where the first state dict is, in the order of CONTAINERS."""
    seen: set[int] = set()

    def look(content: Any, above: _Place) -> _Place | None:
        if _is_state(content):
            return above
        if not isinstance(content, Mapping) or id(content) in seen or len(seen) > _MOST_MAPPINGS:
            return None
        seen.add(id(content))
        for name in (*CONTAINERS, *_OUTER):
            inner = content.get(name)
            if name in CONTAINERS and _holds_opaque(inner):
                raise _OpaqueError
            found = look(inner, (*above, name))
            if found is not None:
                return found
        return None

    try:
        return look(content, above)
    except _OpaqueError:
        # What comes later in the order is not what was meant to come first.
        return None


class _OpaqueError(Exception):
    """Say that weights may be in something that is not loaded."""


def _holds_opaque(content: Any) -> bool:
    """Return whether this is no state dict only for something that is not loaded."""
    if is_opaque(content):
        return True
    if not isinstance(content, Mapping):
        return False
    opaque = [name for name, value in content.items() if is_opaque(value)]
    return bool(opaque) and any(isinstance(v, Tensor | TensorPlace) for v in content.values())


def has_weights(content: Any) -> bool:
    """Return whether there is a state dict anywhere."""
    return bool(_states(content))


def _states(content: Any, known: _Place | None = None) -> list[_Place]:
    """Return where all state dicts are, but those of optimizers; one may be known."""
    found: list[_Place] = []
    level: list[tuple[_Place, Any]] = [((), content)]
    seen: set[int] = set()
    while level:
        below: list[tuple[_Place, Any]] = []
        for place, value in level:
            if place == known or _is_state(value):
                found.append(place)
            elif isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                if len(seen) > _MOST_MAPPINGS:
                    return found
                below += [
                    ((*place, name), item)
                    for name, item in value.items()
                    if isinstance(name, str) and "optim" not in name.lower()
                ]
        level = below
    return found


def _place(content: Any, key: str) -> tuple[_Place, str] | None:
    """Return where a key leads, and the beginning of names there; None if it leads nowhere."""
    if _is_state(content):
        part = f"{key}."
        return ((), part) if any(name.startswith(part) for name in _names(content)) else None
    if not isinstance(content, Mapping):
        return None
    if key in content:
        return (key,), ""
    for name in content:
        # A name may have dots of its own.
        if isinstance(name, str) and name and key.startswith(f"{name}."):
            found = _place(content[name], key[len(name) + 1 :])
            if found is not None:
                return (name, *found[0]), found[1]
    return None


def _part(state: dict[str, Any], part: str) -> dict[str, Any]:
    return without_prefix({name: v for name, v in state.items() if name.startswith(part)}, part)


def _names(content: Any) -> Iterable[str]:
    return content.state_dict() if isinstance(content, nn.Module) else content


def _nothing_at(content: Any, path: str | os.PathLike[str], key: str) -> str:
    places = [printable(repr(".".join(place))) for place in _states(content) if place]
    there = f"weights under {listed(places)}" if places else _outline(content)
    return at(path, f"expected weights under key={printable(key)!r}, got {there}")


def _nothing(content: Any, path: str | os.PathLike[str], unsafe_pickle: bool) -> str:
    whole = " or a whole nn.Module" if unsafe_pickle else ""
    text = (
        "expected a state dict (names to tensors), bare or under one of "
        f"{', '.join(map(repr, _TRAINED[:4]))} and the like{whole}, got {_outline(content)}"
    )
    places = [printable(repr(".".join(place))) for place in _states(content)]
    if places:
        text += f"; tensors by name are under {listed(places)}: choose with key= (--key)"
    return at(path, text)


def _is_state(content: Any) -> bool:
    """Return whether this is a state dict: tensors by name, and at least one."""
    if isinstance(content, nn.Module):
        return True
    if not isinstance(content, Mapping):
        return False
    tensors = 0
    for name, value in content.items():
        if not isinstance(name, str):
            return False
        # A reader that finds tensors where they lie gives their places.
        if _is_tensor(value):
            tensors += 1
        elif name.rpartition(".")[2] != _EXTRA_STATE:
            return False
    return tensors > 0


def as_state_dict(content: Any, path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return a state dict with its tensors detached, None if the content is none."""
    if not _is_state(content):
        return None
    state, extra_state = _as_state(content, path)
    return {**state, **extra_state} or None


def _as_state(
    content: Any, path: str | os.PathLike[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a state dict's tensors, and what else modules stored in it."""
    if isinstance(content, nn.Module):
        try:
            content = content.state_dict()
        except Exception as error:  # the module's class is whatever the file says it is
            raise UnreadableCheckpoint(
                at(
                    path,
                    f"expected a module with a state dict, got one that fails ({brief(error)})",
                )
            ) from error
    # A dict that can carry load_state_dict's per-module versions, which state dicts come with.
    state: OrderedDict[str, Tensor] = OrderedDict()
    extra_state: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Tensor):
            state[name] = value.detach()
        elif type(value) is TensorPlace:
            state[name] = value  # type: ignore[assignment]
        else:
            extra_state[name] = value
    versions = getattr(content, "_metadata", None)
    if isinstance(versions, Mapping) and all(isinstance(key, str) for key in versions):
        state._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    return state, extra_state


def _outline(content: Any) -> str:
    """Describe what a file holds: its type, and for a dict its keys with their types."""
    if not isinstance(content, Mapping):
        return f"a {_type_name(content)}"
    if not content:
        return "an empty dict"
    entries = []
    for key, value in content.items():
        text = f"{_named(key)}: {_type_name(value)}"
        if key in CONTAINERS and isinstance(value, Mapping):
            strays = [
                f"{_named(name)}: {_type_name(entry)}"
                for name, entry in value.items()
                if not (isinstance(name, str) and _is_tensor(entry))
            ]
            if strays:
                text += f" with {listed(strays)}"
            else:
                text += " of tensors" if value else " (empty)"
        entries.append(text)
    return f"a dict with {listed(entries)}"


def _is_tensor(value: Any) -> bool:
    return type(value) is TensorPlace or isinstance(value, Tensor)


def _named(key: Any) -> str:
    return printable(repr(key[:200] if isinstance(key, str) else key))


def _type_name(value: Any) -> str:
    if is_opaque(value):
        return f"{printable(value.name)} (not loaded)"
    return "Tensor" if isinstance(value, TensorPlace) else printable(type(value).__name__)


def without_prefix(state: Mapping[str, Tensor], removed: str) -> dict[str, Tensor]:
    """Remove what every key starts with, from the modules' versions too."""
    renamed: OrderedDict[str, Tensor] = OrderedDict(
        (key[len(removed) :], value) for key, value in state.items()
    )
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        # Modules are named without the final dot, so the wrapped module itself becomes ''.
        renamed._metadata = OrderedDict(  # type: ignore[attr-defined]
            (f"{key}."[len(removed) : -1], value)
            for key, value in versions.items()
            if f"{key}.".startswith(removed)
        )
    return renamed


@dataclass(frozen=True)
class PlainNames:
    """Say what names are without those of wrappers.

    Attributes:
        plain: stored name to plain name, in the stored order.
        prefix: what every name began with.
        dropped: stored names of what is a wrapper's own.
        notes: what was removed elsewhere than in front of every name.
        shorter: whether wrappers' names were removed inside names.
    """

    plain: Mapping[str, str]
    prefix: str
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    shorter: bool = False

    def of(self, name: str) -> str:
        """Return the plain name of a tensor or a module."""
        inner = name[len(self.prefix) :] if name.startswith(self.prefix) else name
        return without_inner_wrappers(inner) if self.shorter else inner


def plain_names(names: Iterable[str]) -> PlainNames:
    """Return names without what wrappers put into them; see :func:`_plain_names`."""
    return _plain_names(tuple(names))


@functools.lru_cache(maxsize=64)  # files of one study have the same names
def _plain_names(names: tuple[str, ...]) -> PlainNames:
    """Return names without what DataParallel, torch.compile, FSDP and their like put into them.

    'module.' is removed where every name begins with it: a network may well have a part of this
    name. The names of other wrappers are removed wherever they are, unless two names would become
    one. AveragedModel's count of averages is left out beside the names that it wrapped.
    """
    left = list(names)
    prefix, dropped = "", []
    while left:
        counts = [name for name in left if name == prefix + _AVERAGES]
        for wrapper in _WRAPPER_PREFIXES:
            longer = prefix + wrapper
            inside = [name for name in left if name not in counts] if counts else left
            # A name needs something of its own after the prefix.
            if inside and all(n.startswith(longer) and len(n) > len(longer) for n in inside):
                if wrapper != "module." and counts:
                    continue
                prefix, left = longer, inside
                dropped += counts
                break
        else:
            break
    notes = []
    if dropped:
        notes.append(f"left out {listed(dropped)}, AveragedModel's count of averages")
    plain = {name: name[len(prefix) :] for name in left}
    shorter = {name: without_inner_wrappers(short) for name, short in plain.items()}
    inner = shorter != plain and len(set(shorter.values())) == len(shorter)
    if inner:
        removed = {part for name in plain.values() for part in name.split(".")} & _INNER_WRAPPERS
        notes.append(f"took names without {listed(repr(n) for n in sorted(removed))} inside them")
        plain = shorter
    return PlainNames(plain, prefix, tuple(dropped), tuple(notes), inner)


def without_inner_wrappers(name: str) -> str:
    """Return a name without the parts that only wrappers are called by, but for the last part."""
    *parts, last = name.split(".")
    return ".".join([*(part for part in parts if part not in _INNER_WRAPPERS), last])


def renamed(state: dict[str, Tensor], names: PlainNames) -> dict[str, Tensor]:
    """Return a state dict under plain names, with its modules' versions."""
    if not (names.prefix or names.dropped or names.shorter):
        return state
    found: OrderedDict[str, Tensor] = OrderedDict(
        (plain, state[name]) for name, plain in names.plain.items()
    )
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        found._metadata = plain_versions(versions, names)  # type: ignore[attr-defined]
    return found


def plain_versions(versions: Mapping[str, Any], names: PlainNames) -> OrderedDict[str, Any]:
    """Return modules' versions by their plain names; a wrapped module's is that of the inner one.

    Modules are named without the final dot, so that the wrapped module itself becomes ''.
    """
    found: OrderedDict[str, Any] = OrderedDict()
    for module, value in versions.items():
        if f"{module}.".startswith(names.prefix):
            found[names.of(f"{module}._").rpartition(".")[0]] = value
    return found


class _Described(Protocol):
    """Say what a tensor is like: a tensor, or a place in a slab."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> Sequence[int]: ...


def state_signature(state_dict: Mapping[str, _Described]) -> str:
    """Return a key that state dicts share if their names, shapes and dtypes are the same.

    Checkpoints of one architecture have one signature, whatever their values and the order of
    their names; it is text, so that it can be stored, and the same in every process.

    Args:
        state_dict: names to tensors, or to anything with a `shape` and a `dtype`.

    >>> import torch
    >>> state_signature({"w": torch.zeros(2, 3)}) == state_signature({"w": torch.ones(2, 3)})
    True
    """
    described = [[name, str(t.dtype), *t.shape] for name, t in sorted(state_dict.items())]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]
