"""Read a checkpoint from wherever it is: a file, a folder or a URL."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .content import Checkpoint, find_state_dict, without_wrapper_prefixes
from .files import load_file, usable_device
from .folders import INDEX_SUFFIX, load_folder, load_sharded
from .remote import is_url, local_copy


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    map_location: str | torch.device = "cpu",
    unsafe_pickle: bool = False,
) -> Checkpoint:
    """Read a model's weights from a file, folder or URL without running code from it.

    A file: a bare state dict, one under 'state_dict' (as in Lightning's .ckpt),
    'model_state_dict', 'model_state' or 'model' (the first of these that holds one; the others stay
    in `extra`), or a safetensors file. A folder, by the first of these in it:

        .metadata                       torch.distributed.checkpoint; no process group is needed
        model.safetensors[.index.json]  Hugging Face: one file, or shards with their index
        pytorch_model.bin[.index.json]  the same in torch's format

    with 'global_step' and 'epoch' of a trainer_state.json in `extra`. Of a distributed checkpoint
    only tensors are read, and the optimizer's are left out. An index file may be given instead of
    its folder. A 'module.' or '_orig_mod.' that every key carries is removed, however they are
    nested.

    Zip files are memory-mapped, privately: writing to a tensor does not change the file. Replace
    such a file (as `save_checkpoint` does) rather than overwrite it while its weights are in use.

    Args:
        path: the file or folder; a file's content decides its format, not its extension. Text with
            '://' in it is a URL for fsspec ('s3://…', 'memory://…'), copied to a temporary folder
            unless it is a file:// URL; fsspec comes with the extra `scan`, and what it needs for a
            protocol is the user's to install.
        map_location: the device on which the tensors end up.
        unsafe_pickle: allow the full unpickler, WHICH RUNS CODE FROM THE FILE, for a file that the
            weights-only reader refuses; a whole pickled nn.Module is then accepted too. Not for
            distributed checkpoints, which never need it.

    Raises:
        UnreadableCheckpoint: the file is missing (MissingCheckpoint, also a FileNotFoundError),
            empty, truncated, not readable, or not a checkpoint, as a TorchScript or ``.pt2`` file
            is not; a shard is missing, or the index and the shards do not agree.
        UnsafeCheckpoint: the file needs the full unpickler; the message lists what it asks for.
        NoStateDict: the file holds no state dict; the message lists what it does hold.
        MissingSafetensors: the safetensors package is needed and not installed.
        MissingFsspec: a URL, and fsspec or what it needs for the protocol is not installed.
        ValueError: map_location names no device of this machine.
    """
    device = usable_device(map_location)
    if isinstance(path, str) and is_url(path):
        with local_copy(path) as copy:
            loaded = load_local(copy, device, unsafe_pickle)
        return Checkpoint(
            path,
            loaded.state_dict,
            loaded.format,
            loaded.container,
            loaded.removed_prefix,
            loaded.extra,
        )
    return load_local(Path(path), device, unsafe_pickle)


def load_local(path: Path, device: torch.device, unsafe_pickle: bool) -> Checkpoint:
    """Read a file or folder of this machine."""
    # os.path.isdir is False, not an error, for a path with a NUL byte.
    if os.path.isdir(path):
        found = load_folder(path, device, unsafe_pickle)
    elif path.name.endswith(INDEX_SUFFIX):
        found = load_sharded(path, device, unsafe_pickle)
    else:
        found = load_file(path, device, unsafe_pickle)
    state, container, extra = find_state_dict(found.content, path, unsafe_pickle)
    state, removed_prefix = without_wrapper_prefixes(state)
    return Checkpoint(
        path,
        state,
        found.format,
        found.container or container,
        removed_prefix,
        extra if found.extra is None else {**extra, **found.extra},
    )
