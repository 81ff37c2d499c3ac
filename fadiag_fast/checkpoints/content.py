"""Find the state dict in what a file held."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .errors import NoStateDict, UnreadableCheckpoint, at, brief, listed, printable

# Where training scripts put the state dict, in the order in which we look.
_CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model")

# What DataParallel / DistributedDataParallel and torch.compile put in front of every key.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Hold a model's weights and where they came from.

    Attributes:
        path: the file, as given.
        state_dict: the weights, without wrapper prefixes in their names.
        format: 'torch-zip', 'torch-legacy', 'safetensors', or 'pickle' (a plain pickle, which is
            read only with unsafe_pickle=True).
        container: how the state dict was found: 'bare', the top-level key that held it, or
            'module' for a whole pickled module.
        removed_prefix: what was removed from the front of every key, such as 'module.'.
        extra: the other top-level entries; for safetensors, the file's metadata.
    """

    path: Path
    # Kept out of the repr: printing a checkpoint should not print its weights.
    state_dict: dict[str, Tensor] = field(repr=False)
    format: str
    container: str
    removed_prefix: str
    extra: dict[str, Any] = field(repr=False)


def find_state_dict(
    content: Any, path: Path, unsafe_pickle: bool
) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    state = _as_state_dict(content, path)
    if state is not None:
        return state, "module" if isinstance(content, nn.Module) else "bare", {}
    if isinstance(content, Mapping):
        for container in _CONTAINERS:
            state = _as_state_dict(content.get(container), path)
            if state is not None:
                extra = {str(key): value for key, value in content.items() if key != container}
                return state, container, extra
    whole = " or a whole nn.Module" if unsafe_pickle else ""
    raise NoStateDict(
        at(
            path,
            f"expected a state dict (names to tensors), bare or under one of "
            f"{', '.join(map(repr, _CONTAINERS))}{whole}, got {_outline(content)}",
        )
    )


def _as_state_dict(content: Any, path: Path) -> dict[str, Tensor] | None:
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
    if not all(isinstance(value, Tensor) for value in content.values()):
        return None
    # A dict that can carry load_state_dict's per-module versions, which state dicts come with.
    state: OrderedDict[str, Tensor] = OrderedDict(
        (key, value.detach()) for key, value in content.items()
    )
    versions = getattr(content, "_metadata", None)
    if isinstance(versions, Mapping) and all(isinstance(key, str) for key in versions):
        state._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    return state


def _outline(content: Any) -> str:
    """Describe what a file holds: its type, and for a dict its keys with their types."""
    if not isinstance(content, Mapping):
        return f"a {printable(type(content).__name__)}"
    if not content:
        return "an empty dict"
    entries = []
    for key, value in content.items():
        text = f"{printable(repr(key))}: {printable(type(value).__name__)}"
        if key in _CONTAINERS and isinstance(value, Mapping):
            strays = [
                f"{printable(repr(name))}: {printable(type(entry).__name__)}"
                for name, entry in value.items()
                if not (isinstance(name, str) and isinstance(entry, Tensor))
            ]
            text += f" with {listed(strays)}" if strays else " (empty)"
        entries.append(text)
    return f"a dict with {listed(entries)}"


def without_wrapper_prefixes(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    removed = wrapper_prefix(state)
    if not removed:
        return state, ""
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
    return renamed, removed


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
