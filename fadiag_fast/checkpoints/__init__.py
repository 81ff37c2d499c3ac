"""Read, apply and write model checkpoints without running code from them.

A checkpoint is untrusted input: a pickle can run any program. Pickles are therefore read by a
reader of our own (restricted_pickle), which knows plain containers and the few functions that make
up tensors. What it understands and does not know is left to torch's weights-only reader if that
allows its names; the full unpickler is used only when the caller says so, and only for a file that
both refuse. What kind of file it is is decided from its bytes, because extensions lie (and
torch.load itself dispatches on ".safetensors").

What a scan reads into rows of memory and what `load_checkpoint` returns is found by the same code
(finding), so that both agree on what is a valid file and on every byte of it.

Every failure is a CheckpointError, grouped by what the user can do about it:

    UnreadableCheckpoint   get the file again, or another file (MissingCheckpoint: fix the path)
    UnsafeCheckpoint       decide whether to trust the file (UntrustedProgram: a program)
    NoStateDict            point at the file that holds the weights, or save them differently
    StateDictMismatch      build the model that belongs to the weights
    MissingFsspec          install the extra, or what fsspec asks for
    UnsavableCheckpoint    change what is saved
    UnwritableCheckpoint   change where it is saved
    SlabTooSmall           give read_into more memory
"""

from __future__ import annotations

from .applying import load_into
from .buffers import SlabCheckpoint, SlabTooSmall, read_into
from .content import Checkpoint, state_signature
from .errors import (
    CheckpointError,
    MissingCheckpoint,
    MissingFsspec,
    NoStateDict,
    StateDictMismatch,
    UnreadableCheckpoint,
    UnsafeCheckpoint,
    UnsavableCheckpoint,
    UntrustedProgram,
    UnwritableCheckpoint,
)
from .loading import load_checkpoint
from .places import TensorPlace
from .saving import save_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "MissingCheckpoint",
    "MissingFsspec",
    "NoStateDict",
    "SlabCheckpoint",
    "SlabTooSmall",
    "StateDictMismatch",
    "TensorPlace",
    "UnreadableCheckpoint",
    "UnsafeCheckpoint",
    "UnsavableCheckpoint",
    "UntrustedProgram",
    "UnwritableCheckpoint",
    "load_checkpoint",
    "load_into",
    "read_into",
    "save_checkpoint",
    "state_signature",
]
