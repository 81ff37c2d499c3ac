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

from .content import as_state_dict
from .distributed import METADATA
from .errors import UnreadableCheckpoint, at, brief, damaged, listed, printable
from .files import is_plain_name
from .opening import Files

INDEX_SUFFIX = ".index.json"

# Where Hugging Face's save_pretrained and Trainer put the weights, the safer format first.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")

TRAINER_STATE = "trainer_state.json"

# Thrice the index of the largest models; parsed, a hostile one takes twenty times its bytes.
MOST_JSON = 1 << 25

# What of the trainer's state belongs to the checkpoint; its log is as long as the training.
_TRAINER_KEYS = ("global_step", "epoch")

_EXPECTED_FOLDER = (
    f"a checkpoint file, or a folder with {METADATA}, "
    + " or ".join(f"{name}[{INDEX_SUFFIX}]" for name in WEIGHTS)
    + " in it"
)


def find_weights(folder: Path) -> Path:
    """Return the file of a folder with which reading begins."""
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        raise UnreadableCheckpoint(
            at(folder, f"expected a folder that can be listed, got {brief(error)}")
        ) from error
    return folder / choose_weights(folder, names)


def choose_weights(folder: str | os.PathLike[str], names: set[str]) -> str:
    """Return which of a folder's files to begin with."""
    # The index first: a stale single file may lie beside the shards of a larger model.
    usual = (end for name in WEIGHTS for end in (name + INDEX_SUFFIX, name))
    for candidate in (METADATA, *usual):
        if candidate in names:
            return candidate
    held = listed(sorted(printable(name) for name in names))
    raise UnreadableCheckpoint(
        at(folder, f"expected {_EXPECTED_FOLDER}, got a directory with {held or 'nothing in it'}")
    )


def trainer_state(folder: Path, files: Files) -> dict[str, int | float]:
    """Return the step and epoch that a Trainer wrote beside the weights, if it did."""
    path = folder / TRAINER_STATE
    if not os.path.lexists(path):
        return {}
    state = _read_json(path, files)
    return {
        key: state[key]
        for key in _TRAINER_KEYS
        if isinstance(state.get(key), int | float) and not isinstance(state[key], bool)
    }


def shard_of(content: Any, path: Path) -> dict[str, Any]:
    """Return the names and tensors that a shard's content is."""
    state = as_state_dict(content, path)
    if state is None:
        raise UnreadableCheckpoint(
            at(path, "expected a shard that holds names and tensors, got other content")
        )
    return state


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


def read_index(index: Path, files: Files) -> dict[str, str]:
    """Return which shard holds each tensor, having checked that the shards are there."""
    weight_map = weight_map_of(files, index)
    for shard in dict.fromkeys(weight_map.values()):
        if not os.path.exists(index.parent / shard):
            # Not MissingCheckpoint: the checkpoint is there, and it is not whole.
            raise UnreadableCheckpoint(
                at(index, f"expected the shard {printable(repr(shard[:200]))}, got no such file")
            )
    return weight_map


def weight_map_of(files: Files, index: Path) -> dict[str, str]:
    """Return which file of the same folder an index says each tensor to be in."""
    weight_map = _read_json(index, files).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnreadableCheckpoint(
            at(index, "expected a 'weight_map' of tensors to files, got an index without")
        )
    for shard in weight_map.values():
        if not isinstance(shard, str) or not is_plain_name(shard):
            shown = shard[:200] if isinstance(shard, str) else shard
            raise UnreadableCheckpoint(
                at(
                    index,
                    "expected names of files in the same folder, got "
                    f"{printable(repr(shown))}, which is not followed",
                )
            )
    return weight_map


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that stands twice, of which readers take one or the other."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has a name twice")
    return found


def _read_json(path: Path, files: Files) -> dict[str, Any]:
    text = files.read_text(path, "a JSON file", MOST_JSON)
    try:
        # As bytes it would be tried in other encodings too.
        found = json.loads(text.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(found, dict):
        raise UnreadableCheckpoint(
            at(path, f"expected a JSON object, got a {type(found).__name__}")
        )
    return found
