"""Read checkpoints that are folders: shards with an index, and what trainers leave.

An index is as untrusted as a pickle: it names files. Only names of files in its own folder are
followed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .content import as_state_dict
from .distributed import METADATA, load_distributed
from .errors import MissingCheckpoint, UnreadableCheckpoint, at, brief, damaged, listed, printable
from .files import Loaded, is_plain_name, load_file

INDEX_SUFFIX = ".index.json"

# Where Hugging Face's save_pretrained and Trainer put the weights, the safer format first.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")

TRAINER_STATE = "trainer_state.json"

# What of the trainer's state belongs to the checkpoint; its log is as long as the training.
_TRAINER_KEYS = ("global_step", "epoch")

_EXPECTED_FOLDER = (
    f"a checkpoint file, or a folder with {METADATA}, "
    + " or ".join(f"{name}[{INDEX_SUFFIX}]" for name in WEIGHTS)
    + " in it"
)


def load_folder(folder: Path, device: torch.device, unsafe_pickle: bool) -> Loaded:
    """Read a folder's weights and, from a Hugging Face Trainer's, the step and epoch."""
    weights = find_weights(folder)
    if weights.name == METADATA:
        found = load_distributed(folder, device)
    elif weights.name.endswith(INDEX_SUFFIX):
        found = load_sharded(weights, device, unsafe_pickle)
    else:
        found = load_file(weights, device, unsafe_pickle)
    trainer = trainer_state(folder)
    if not trainer:
        return found
    return Loaded(found.format, found.content, {**(found.extra or {}), **trainer}, found.container)


def find_weights(folder: Path) -> Path:
    """Return the file of a folder with which reading begins."""
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        raise UnreadableCheckpoint(
            at(folder, f"expected a folder that can be listed, got {brief(error)}")
        ) from error
    if METADATA in names:
        return folder / METADATA
    for name in WEIGHTS:
        # The index first: a stale single file may lie beside the shards of a larger model.
        for candidate in (name + INDEX_SUFFIX, name):
            if candidate in names:
                return folder / candidate
    held = listed(sorted(printable(name) for name in names))
    raise UnreadableCheckpoint(
        at(folder, f"expected {_EXPECTED_FOLDER}, got a directory with {held or 'nothing in it'}")
    )


def trainer_state(folder: Path) -> dict[str, int | float]:
    """Return the step and epoch that a Trainer wrote beside the weights, if it did."""
    path = folder / TRAINER_STATE
    if not path.is_file():
        return {}
    state = _read_json(path)
    return {
        key: state[key]
        for key in _TRAINER_KEYS
        if isinstance(state.get(key), int | float) and not isinstance(state[key], bool)
    }


def load_sharded(index: Path, device: torch.device, unsafe_pickle: bool) -> Loaded:
    """Read the shards that an index names and put them together in the index's order."""
    weight_map = read_index(index)
    held: dict[str, Tensor] = {}
    formats = set()
    for shard, names in by_shard(weight_map).items():
        path = index.parent / shard
        found = load_file(path, device, unsafe_pickle)
        state = as_state_dict(found.content, path)
        if state is None:
            raise UnreadableCheckpoint(
                at(path, "expected a shard that holds names and tensors, got other content")
            )
        check_shard(index, shard, names, state)
        held.update(state)
        formats.add(found.format)
    form = "safetensors-sharded" if formats == {"safetensors"} else "torch-sharded"
    # The index's own metadata is the total size, which says nothing more.
    return Loaded(form, {name: held[name] for name in weight_map}, {})


def by_shard(weight_map: dict[str, str]) -> dict[str, list[str]]:
    """Return the names of each shard."""
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, []).append(name)
    return shards


def check_shard(index: Path, shard: str, names: list[str], held: Mapping[str, Any]) -> None:
    """Refuse a shard that lacks a tensor, or has one that the index does not know."""
    absent = [printable(name) for name in names if name not in held]
    if absent:
        raise UnreadableCheckpoint(
            at(index, f"expected {shard!r} to hold {listed(absent)}, got a shard without")
        )
    # Shards of another save would be mixed in silently.
    strays = [printable(name) for name in held.keys() - set(names)]
    if strays:
        raise UnreadableCheckpoint(
            at(
                index,
                f"expected every tensor of {shard!r} in the index, got a shard that also holds "
                f"{listed(sorted(strays))}",
            )
        )


def read_index(index: Path) -> dict[str, str]:
    """Return which shard holds each tensor, having checked that the shards are there."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnreadableCheckpoint(
            at(index, "expected a 'weight_map' of tensors to files, got an index without")
        )
    for shard in weight_map.values():
        if not isinstance(shard, str) or not is_plain_name(shard):
            raise UnreadableCheckpoint(
                at(
                    index,
                    "expected names of files in the same folder, got "
                    f"{printable(repr(shard))}, which is not followed",
                )
            )
    for shard in dict.fromkeys(weight_map.values()):
        if not (index.parent / shard).is_file():
            # Not MissingCheckpoint: the checkpoint is there, and it is not whole.
            raise UnreadableCheckpoint(
                at(index, f"expected the shard {printable(repr(shard))}, got no such file")
            )
    return weight_map


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise MissingCheckpoint(at(path, "expected a JSON file, got no such file")) from error
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(found, dict):
        raise UnreadableCheckpoint(
            at(path, f"expected a JSON object, got a {type(found).__name__}")
        )
    return found
