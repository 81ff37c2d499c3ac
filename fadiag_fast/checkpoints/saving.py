"""Write checkpoints that are whole, or not at all, and safe to read back."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch

from .._common.files import whole_file
from .errors import (
    CheckpointError,
    UnsavableCheckpoint,
    UnwritableCheckpoint,
    at,
    brief,
    listed,
    printable,
)
from .opening import open_regular
from .pickles import scan_zip, unsafe_globals
from .torch_zip import read_archive


def save_checkpoint(obj: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a dict so that the file is either whole or untouched, and safe to read back.

    The content goes to a temporary file in the same folder, is read back with torch's weights-only
    reader, and then takes the path's place in one step.

    Raises:
        TypeError: obj is not a dict.
        UnsavableCheckpoint: obj holds something that torch.load(weights_only=True) refuses, or the
            path ends in '.safetensors', which this is not.
        UnwritableCheckpoint: the folder does not exist, cannot be written, or is full.
    """
    if not isinstance(obj, dict):
        raise TypeError(f"save_checkpoint: expected a dict, got {type(obj).__name__}")
    path = Path(path)
    if path.suffix == ".safetensors":
        raise UnsavableCheckpoint(
            at(
                path,
                "expected a name such as 'model.pt' for torch's format, got one in '.safetensors', "
                "which readers would take for the other format",
                caller="save_checkpoint",
            )
        )
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("a folder, device or pipe")
        with whole_file(path, sync=True) as partial:
            with partial.open("xb") as file:
                _write(obj, file, path)
            _check_read_back(partial, path)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte, or without a name
        raise UnwritableCheckpoint(
            at(
                path,
                f"expected a file that can be written, got {brief(error)}",
                caller="save_checkpoint",
            )
        ) from error


def _write(obj: dict[str, Any], file: io.BufferedWriter, path: Path) -> None:
    try:
        torch.save(obj, file)
    except OSError:
        raise
    except Exception as error:
        raise UnsavableCheckpoint(
            at(
                path,
                "expected tensors and plain containers, got something that cannot be pickled "
                f"({brief(error)})",
                caller="save_checkpoint",
            )
        ) from error


def _check_read_back(temporary: Path, path: Path) -> None:
    try:
        with temporary.open("rb") as file:
            torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:
        with open_regular(temporary) as source:
            archive = read_archive(source)
            unsafe = sorted(map(printable, unsafe_globals(scan_zip(source, archive).names)))
        what = listed(unsafe) or brief(error)
        raise UnsavableCheckpoint(
            at(
                path,
                "expected tensors and plain containers, got content that "
                f"torch.load(weights_only=True) could not read back: {what}",
                caller="save_checkpoint",
            )
        ) from error
