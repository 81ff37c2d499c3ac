"""Read a checkpoint from wherever it is: a file, a folder or a URL."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .content import Checkpoint
from .copying import copied, without_data
from .distributed import OPTIMIZER
from .errors import damaged
from .files import read_file, usable_device
from .finding import Found, find_checkpoint, found_in
from .gathering import Gathered
from .opening import Files, MemorySource, OpenFile, Source, read_steadily
from .placeholders import shown
from .places import TensorPlace
from .remote import fetch_file, is_url, local_copy


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    map_location: str | torch.device = "cpu",
    unsafe_pickle: bool = False,
    key: str | None = None,
) -> Checkpoint:
    """Read a model's weights from a file, folder or URL without running code from it.

    A file: a safetensors file, a bare state dict, or one under a key. Of several that hold one the
    first of these is taken: 'state_dict' (as in Lightning's .ckpt), 'model_state_dict',
    'model_state', 'model', 'module' (DeepSpeed), 'net', 'net_state_dict', 'network', 'params',
    'weights', 'model_weights', 'student', 'generator', 'netG'; then averages, 'state_dict_ema',
    'ema_state_dict', 'model_ema', 'ema_model', 'model_ema_state_dict', 'params_ema', 'ema',
    'teacher', 'generator_ema', 'netG_ema'. Each may hold the next ('model.state_dict'), and
    'state', 'checkpoint', 'ckpt', 'app' and 'trainer' may stand before ('state.model'). Which was
    taken is `container`, and the others are named in `notes`; `key` chooses. A folder, by the first
    of these in it:

        .metadata                       torch.distributed.checkpoint; no process group is needed
        model.safetensors[.index.json]  Hugging Face: one file, or shards with their index
        pytorch_model.bin[.index.json]  the same in torch's format

    with 'global_step' and 'epoch' of a trainer_state.json in `extra`. Of a distributed checkpoint
    only tensors are read, and the optimizer's are left out. An index file may be given instead of
    its folder. Names are those of the network inside its wrappers: a 'module.' that every name
    begins with is removed, and what torch.compile, FSDP and activation checkpointing add
    ('_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module') wherever it is; what
    AveragedModel counts ('n_averaged') goes to `extra`.

    Objects of other classes beside the weights (an argparse.Namespace, a Path, numpy's numbers) are
    not made: something that prints as ``<argparse.Namespace, not loaded>`` stands for each in
    `extra`. Weights inside such an object are refused.

    The tensors have memory of their own: what happens to the file afterwards does not matter. Only
    the bytes of tensors are read that are returned; those in entries of `extra` with 'optim' in
    their names have no data (they are on the meta device), as an optimizer's state is twice the
    weights. A file that is written to while it is read is read again, a few times.

    Args:
        path: the file or folder; a file's content decides its format, not its extension. Text with
            '://' in it is a URL for fsspec ('s3://…', 'memory://…'), copied to a temporary folder
            unless it is a file:// URL; fsspec comes with the extra `scan`, and what it needs for a
            protocol is the user's to install.
        map_location: the device on which the tensors end up.
        unsafe_pickle: allow the full unpickler, WHICH RUNS CODE FROM THE FILE, for a file that the
            weights-only reader refuses; a whole pickled nn.Module is then accepted too. Not for
            distributed checkpoints, which never need it.
        key: where in the file the weights are, with dots between levels ('state.ema'). It may end
            with the beginning of names: 'state_dict.generator' takes the part of a state dict whose
            names start with 'generator.'.

    Raises:
        UnreadableCheckpoint: the file is missing (MissingCheckpoint, also a FileNotFoundError),
            empty, truncated, not readable, or not a checkpoint, as a TorchScript or ``.pt2`` file
            is not; a shard is missing, or the index and the shards do not agree.
        UnsafeCheckpoint: the file needs the full unpickler; the message lists what it asks for.
        NoStateDict: the file holds no state dict, or none at `key`; the message lists what it does
            hold.
        MissingFsspec: a URL, and fsspec or what it needs for the protocol is not installed.
        ValueError: map_location names no device of this machine.
    """
    device = usable_device(map_location)
    if isinstance(path, str) and is_url(path):
        return _load_url(path, device, unsafe_pickle, key)
    return _load_local(Path(path), device, unsafe_pickle, key)


def _load_local(
    path: Path, device: torch.device, unsafe_pickle: bool, key: str | None
) -> Checkpoint:
    def read(files: Files) -> Checkpoint:
        space = _FileSpace(files)
        found = find_checkpoint(path, files, space, unsafe_pickle, key)
        return _checkpoint(path, found, space.fill, device)

    return read_steadily(path, read)


def _load_url(url: str, device: torch.device, unsafe_pickle: bool, key: str | None) -> Checkpoint:
    fetched = fetch_file(url)
    if fetched is None:
        with local_copy(url, key) as copy:
            return replace(_load_local(copy, device, unsafe_pickle, key), path=url)
    view = fetched.numpy().data
    loaded = read_file(MemorySource(view), url, 0, unsafe_pickle)
    found = found_in(loaded, url, unsafe_pickle, key)

    def fill(start: int, target: memoryview) -> None:
        target[:] = view[start : start + len(target)]

    return _checkpoint(url, found, fill, device)


class _FileSpace:
    """Number the bytes of files one behind the other, and read those that are asked for."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._starts: list[int] = []
        self._paths: list[Path] = []
        self._end = 0

    def reserve(self, sizes: Sequence[int], /) -> None:
        """Need nothing: no byte is read before it is asked for."""

    def add(self, file: OpenFile, /) -> tuple[Source, int]:
        base = self._end
        self._starts.append(base)
        self._paths.append(file.path)
        self._end = base + file.size
        return file, base

    def fill(self, start: int, target: memoryview) -> None:
        index = bisect_right(self._starts, start) - 1
        with self._files.open(self._paths[index]) as file:
            # What is too short has changed, and is read again.
            file.read_into(target, start - self._starts[index])


def _checkpoint(
    path: Path | str,
    found: Found,
    fill: Callable[[int, memoryview], None],
    device: torch.device,
) -> Checkpoint:
    """Read the tensors of which the places are known."""
    # An optimizer's state is twice the size of the weights, and nobody asks for it.
    left_out = {key: value for key, value in found.extra.items() if OPTIMIZER in key.lower()}
    kept = {key: value for key, value in found.extra.items() if key not in left_out}
    places = [place for place in found.state.values() if isinstance(place, TensorPlace)]

    def note(value: Any) -> Any:
        if isinstance(value, TensorPlace):
            places.append(value)
        return value

    copied(kept, note)
    try:
        tensor_of = Gathered(places, fill, device)
    except (RuntimeError, MemoryError) as error:
        raise damaged(path, error) from error

    def made(value: Any) -> Any:
        if isinstance(value, TensorPlace):
            return tensor_of(value)
        return value.to(device) if isinstance(value, Tensor) else shown(value)

    state = OrderedDict((name, made(value)) for name, value in found.state.items())
    if (versions := getattr(found.state, "_metadata", None)) is not None:
        state._metadata = versions  # type: ignore[attr-defined]
    kept, left_out = copied(kept, made), without_data(left_out)
    extra = {key: (kept if key in kept else left_out)[key] for key in found.extra}
    return Checkpoint(
        path,
        state,
        found.format,
        found.container,
        found.removed_prefix,
        extra,
        found.extra_state,
        found.notes,
    )
