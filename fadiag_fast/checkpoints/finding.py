"""Find a checkpoint's weights in a file or a folder: one way for all that read them.

Where the bytes of a file go is the caller's: into memory that is there already, or nowhere before
it is known which of them are weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .content import find_content, has_weights
from .distributed import METADATA, load_distributed
from .errors import NoStateDict, UnreadableCheckpoint, at, listed, printable
from .files import Loaded, read_file
from .folders import (
    INDEX_SUFFIX,
    by_shard,
    check_shard,
    find_weights,
    read_index,
    shard_of,
    trainer_state,
)
from .opening import Files, OpenFile, Source
from .places import TensorPlace


class Space(Protocol):
    """Take the files of a checkpoint, and count their bytes through."""

    def reserve(self, sizes: Sequence[int], /) -> None:
        """Be told how large the files are that come next."""

    def add(self, file: OpenFile, /) -> tuple[Source, int]:
        """Return where a file's bytes are to be had, and the number of the first one."""


class Found(NamedTuple):
    """Hold what a checkpoint is.

    Attributes:
        format, container, removed_prefix, extra_state, notes: as in Checkpoint.
        state: the weights: the places of their bytes, or tensors where torch had to read them.
        extra: as in Checkpoint, with places for tensors in the same way.
    """

    format: str
    state: Mapping[str, Tensor | TensorPlace]
    container: str
    removed_prefix: str
    extra: dict[str, Any]
    extra_state: dict[str, Any]
    notes: tuple[str, ...]


def find_checkpoint(
    path: Path, files: Files, space: Space, unsafe_pickle: bool, key: str | None = None
) -> Found:
    """Find the weights of a file or folder of this machine."""
    # os.path.isdir is False, not an error, for a path with a NUL byte.
    if os.path.isdir(path):
        loaded = _read_folder(path, files, space, unsafe_pickle, key)
    elif path.name.endswith(INDEX_SUFFIX):
        loaded = _read_sharded(path, files, space, unsafe_pickle)
    else:
        loaded = _read_one(path, files, space, unsafe_pickle)
    return found_in(loaded, path, unsafe_pickle, key)


def found_in(
    loaded: Loaded, path: str | os.PathLike[str], unsafe_pickle: bool, key: str | None = None
) -> Found:
    """Find the weights in what a file held."""
    # A reader that looked for the weights has taken the key into account.
    key = None if loaded.container else key
    try:
        content = find_content(loaded.content, path, unsafe_pickle, key)
    except NoStateDict as error:
        if loaded.refusal is None or has_weights(loaded.content):
            raise
        # They may be in what was not loaded.
        raise loaded.refusal from error
    state = content.state
    for name, tensor in state.items():
        if isinstance(tensor, TensorPlace):
            continue
        if kind := _not_dense(tensor):
            raise UnreadableCheckpoint(
                at(path, f"expected dense tensors, got {printable(name)}: {kind}")
            )
        state[name] = tensor.resolve_conj().resolve_neg()
    notes = (*loaded.notes, *content.notes)
    if loaded.refusal is not None:
        notes += (f"not loaded beside the weights: {listed(loaded.refusal.globals_needed)}",)
    return Found(
        loaded.format,
        state,
        loaded.container or content.container,
        content.removed_prefix,
        {**content.extra, **(loaded.extra or {})},
        content.extra_state,
        notes,
    )


def _not_dense(tensor: Tensor) -> str:
    if tensor.is_quantized:
        return "quantized"
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return f"{tensor.layout} on {tensor.device}"
    return ""


def _read_one(path: Path, files: Files, space: Space, unsafe_pickle: bool) -> Loaded:
    with files.open(path) as file:
        source, base = space.add(file)
        return read_file(source, path, base, unsafe_pickle)


def _read_folder(
    folder: Path, files: Files, space: Space, unsafe_pickle: bool, key: str | None
) -> Loaded:
    """Read a folder's weights and, from a Hugging Face Trainer's, the step and epoch."""
    weights = find_weights(folder)
    if weights.name == METADATA:
        found = load_distributed(folder, files, key)
    elif weights.name.endswith(INDEX_SUFFIX):
        found = _read_sharded(weights, files, space, unsafe_pickle)
    else:
        found = _read_one(weights, files, space, unsafe_pickle)
    trainer = trainer_state(folder, files)
    if not trainer:
        return found
    return replace(found, extra={**(found.extra or {}), **trainer})


def _read_sharded(index: Path, files: Files, space: Space, unsafe_pickle: bool) -> Loaded:
    """Read the shards that an index names and put them together in the index's order."""
    weight_map = read_index(index, files)
    shards = by_shard(weight_map)
    opened = {}
    for shard in shards:
        with files.open(index.parent / shard) as file:
            opened[shard] = file.size
    space.reserve(list(opened.values()))
    held: dict[str, Tensor | TensorPlace] = {}
    formats = set()
    for shard, names in shards.items():
        path = index.parent / shard
        loaded = _read_one(path, files, space, unsafe_pickle)
        if loaded.refusal is not None:
            raise loaded.refusal
        state = shard_of(loaded.content, path)
        check_shard(index, shard, names, state)
        held.update(state)
        formats.add(loaded.format)
    form = "safetensors-sharded" if formats == {"safetensors"} else "torch-sharded"
    # The index's own metadata is the total size, which says nothing more.
    return Loaded(form, {name: held[name] for name in weight_map}, {})
