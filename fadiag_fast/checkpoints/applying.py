"""Copy a checkpoint's weights into a model."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .content import Checkpoint, without_prefix, wrapper_prefix
from .errors import StateDictMismatch, at, listed


def load_into(model: nn.Module, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Copy a checkpoint's weights into a model that has exactly these names and shapes.

    Names are compared without wrapper prefixes on either side, so the model may be wrapped by
    DistributedDataParallel or torch.compile or not, whatever the file was saved from. Another
    prefix that all of the checkpoint's names have, such as a LightningModule's 'model.' or 'net.',
    is left out where the names are the model's without it. Values are converted to the model's
    dtypes and devices. A tied weight may be stored under any or all of its names, but not with
    different values. Non-persistent buffers are no part of a state dict and keep their values.
    Everything is compared before anything is copied.

    Returns notes on what was not taken as it was: the prefix, if one was left out.

    Raises:
        StateDictMismatch: a name is missing or unexpected, a shape differs, tied weights disagree,
            or a tensor has no data; the model is as it was.
    """
    # keep_vars: the model's own tensors, which tells lazy parameters from initialised ones.
    own = model.state_dict(keep_vars=True)
    wrapper = wrapper_prefix(own)
    expected: dict[str, Any] = {key[len(wrapper) :]: value for key, value in own.items()}
    weights, notes = checkpoint.state_dict, []
    prefix = _prefix_that_fits(expected, weights)
    if prefix:
        weights = without_prefix(weights, prefix)
        notes.append(f"left out {prefix!r}, with which every name in the checkpoint starts")
    given = dict(weights)
    missing, disagreeing = _resolve_tied(expected, given)
    unexpected = [key for key in given if key not in expected]
    reshaped, without_data = [], []
    for key, tensor in given.items():
        target = expected.get(key)
        if not isinstance(target, Tensor):
            continue
        lazy = nn.parameter.is_lazy(target)
        if not lazy and target.shape != tensor.shape:
            reshaped.append(f"{key}: expected {list(target.shape)}, got {list(tensor.shape)}")
        if tensor.is_meta or (target.is_meta and not lazy):
            without_data.append(f"{key} (in the {'checkpoint' if tensor.is_meta else 'model'})")

    problems = [
        f"{title} ({len(entries)}): {listed(entries)}"
        for title, entries in (
            ("missing from the checkpoint", missing),
            ("unexpected in the checkpoint", _with_buffer_notes(model, wrapper, unexpected)),
            ("of another shape", reshaped),
            ("tied in the model but different in the checkpoint", disagreeing),
            ("on the meta device, without data", without_data),
        )
        if entries
    ]
    if problems:
        hint = _name_hint(missing, unexpected)
        raise StateDictMismatch(
            at(
                checkpoint.path,
                f"expected the names and shapes of {type(model).__name__}, got a state dict that "
                "does not match; the model is unchanged\n  "
                + "\n  ".join([*problems, *([hint] if hint else [])]),
                caller="load_into",
            )
        )

    state: OrderedDict[str, Tensor] = OrderedDict(
        (wrapper + key, tensor) for key, tensor in given.items()
    )
    versions = getattr(weights, "_metadata", None)
    if versions is not None:
        state._metadata = OrderedDict(  # type: ignore[attr-defined]
            (f"{wrapper}{key}".rstrip("."), value) for key, value in versions.items()
        )
    try:
        model.load_state_dict(state, strict=True)
    except Exception as error:
        # Only a module with a loading method or hook of its own can still object here.
        raise StateDictMismatch(
            at(
                checkpoint.path,
                f"expected {type(model).__name__} to accept names and shapes like its own, got a "
                f"refusal from its load_state_dict; the model may be partly loaded\n  {error}",
                caller="load_into",
            )
        ) from error
    return tuple(notes)


def _prefix_that_fits(expected: Mapping[str, Any], given: Mapping[str, Tensor]) -> str:
    """Return what to remove from every given name so that they are the expected ones, or ''."""
    first = next(iter(given), "")
    if all(key in expected for key in given):
        return ""
    for end in (i + 1 for i, c in enumerate(first) if c == "."):
        prefix = first[:end]
        if not all(key.startswith(prefix) for key in given):
            break
        if first[end:] in expected:
            shorter = {key[end:]: value for key, value in given.items()}
            if all(key in expected for key in shorter) and not _resolve_tied(expected, shorter)[0]:
                return prefix
    return ""


def _resolve_tied(
    expected: Mapping[str, Any], given: dict[str, Tensor]
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


def _same_values(a: Tensor, b: Tensor) -> bool:
    if a.is_meta or b.is_meta:
        return True  # without data there is nothing to disagree; that is reported by itself
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # Bits, so that NaN equals itself and types without a comparison (float8) work.
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def _with_buffer_notes(model: nn.Module, wrapper: str, unexpected: list[str]) -> list[str]:
    buffers = {name[len(wrapper) :] for name, _ in model.named_buffers()}
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
