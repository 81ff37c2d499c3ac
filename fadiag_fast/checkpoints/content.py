"""Find the state dict in what a file held."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import NoStateDict, UnreadableCheckpoint, at, brief, listed, printable
from .places import TensorPlace

# Where training scripts put the state dict, in the order in which we look.
CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model")

# What DataParallel / DistributedDataParallel and torch.compile put in front of every key.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Hold a model's weights and where they came from.

    Attributes:
        path: the file or folder, as given; text for a URL.
        state_dict: the weights, without wrapper prefixes in their names.
        format: 'torch-zip', 'torch-legacy', 'safetensors', 'pickle' (a plain pickle, which is read
            only with unsafe_pickle=True), 'torch-sharded', 'safetensors-sharded', or 'distributed'.
        container: how the state dict was found: 'bare', the top-level key that held it, or
            'module' for a whole pickled module.
        removed_prefix: what was removed from the front of every key, such as 'module.'.
        extra: the other top-level entries; for safetensors, the file's metadata; for a folder with
            a trainer_state.json, its 'global_step' and 'epoch'.
    """

    path: Path | str
    # Kept out of the repr: printing a checkpoint should not print its weights.
    state_dict: dict[str, Tensor] = field(repr=False)
    format: str
    container: str
    removed_prefix: str
    extra: dict[str, Any] = field(repr=False)


def find_state_dict(
    content: Any, path: str | os.PathLike[str], unsafe_pickle: bool
) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    state = as_state_dict(content, path)
    if state is not None:
        return state, "module" if isinstance(content, nn.Module) else "bare", {}
    if isinstance(content, Mapping):
        for container in CONTAINERS:
            state = as_state_dict(content.get(container), path)
            if state is not None:
                extra = {str(key): value for key, value in content.items() if key != container}
                return state, container, extra
    whole = " or a whole nn.Module" if unsafe_pickle else ""
    raise NoStateDict(
        at(
            path,
            f"expected a state dict (names to tensors), bare or under one of "
            f"{', '.join(map(repr, CONTAINERS))}{whole}, got {_outline(content)}",
        )
    )


def as_state_dict(content: Any, path: str | os.PathLike[str]) -> dict[str, Tensor] | None:
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
    if not isinstance(content, Mapping) or not content:
        return None
    if not all(isinstance(key, str) for key in content):
        return None
    # A reader that finds tensors where they lie gives their places.
    if not all(_is_tensor(value) for value in content.values()):
        return None
    # A dict that can carry load_state_dict's per-module versions, which state dicts come with.
    state: OrderedDict[str, Any] = OrderedDict(
        (key, value if type(value) is TensorPlace else value.detach())
        for key, value in content.items()
    )
    versions = getattr(content, "_metadata", None)
    if isinstance(versions, Mapping) and all(isinstance(key, str) for key in versions):
        state._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    return state


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
            text += f" with {listed(strays)}" if strays else " (empty)"
        entries.append(text)
    return f"a dict with {listed(entries)}"


def _is_tensor(value: Any) -> bool:
    return type(value) is TensorPlace or isinstance(value, Tensor)


def _named(key: Any) -> str:
    return printable(repr(key[:200] if isinstance(key, str) else key))


def _type_name(value: Any) -> str:
    return "Tensor" if isinstance(value, TensorPlace) else printable(type(value).__name__)


def without_wrapper_prefixes(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    removed = wrapper_prefix(state)
    return (without_prefix(state, removed), removed) if removed else (state, "")


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


def wrapper_prefix(keys: Iterable[str]) -> str:
    """Return the longest run of wrapper prefixes that every key starts with."""
    keys = list(keys)
    found = ""
    while keys:
        for prefix in _WRAPPER_PREFIXES:
            # A key needs a name of its own after the prefix.
            longer = found + prefix
            if all(key.startswith(longer) and len(key) > len(longer) for key in keys):
                found = longer
                break
        else:
            break
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
