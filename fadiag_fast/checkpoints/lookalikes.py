"""Identify common files that are not checkpoints by their first bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from .errors import printable

HEAD_BYTES = 512

# What CompiledProbe.save puts beside a program.
PROBE_METADATA = "fadiag_probe.json"

ProgramKind = Literal["torchscript", "exported", "probe", "compiled", "package"]

PROGRAMS: dict[ProgramKind, str] = {
    "torchscript": "a TorchScript archive",
    "exported": "an exported program (torch.export.save)",
    "probe": "a probe of CompiledProbe.save",
    "compiled": "a program compiled by AOTInductor",
    "package": "a torch.package archive",
}

SAVE_WEIGHTS = (
    "for its weights alone, save them where the network is at hand: "
    "torch.save(module.state_dict(), 'weights.pt')"
)

# Things that often carry a checkpoint's name: first bytes, what it is, what to do.
_LOOKALIKES = (
    (
        b"version https://git-lfs.github.com/spec/v1",
        "a Git LFS pointer, not the file it stands for (run 'git lfs pull')",
    ),
    (b"\x1f\x8b", "a gzip-compressed file (decompress it first)"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes"),
    (b"\x93NUMPY", "a NumPy array file"),
)
# What FlatBuffers have behind their first offset.
_FLATBUFFERS = {
    b"ET12": "an ExecuTorch program, which holds no checkpoint",
    b"PTMF": "a TorchScript program for mobile devices, which holds no checkpoint",
    b"TFL3": "a TensorFlow Lite program, which holds no checkpoint",
}
_SHARED_LIBRARIES = (b"\x7fELF", b"\xcf\xfa\xed\xfe", b"MZ")  # of Linux, of macOS, of Windows
_WEB_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")


def program_in_zip(names: Iterable[str]) -> ProgramKind | None:
    """Return the kind of program that a zip file's names belong to, None for all other zip files.

    torch.save writes none of the names that are looked for.
    """
    # torch finds members whatever their case. Nearly all lie in one folder, named after the file or
    # 'archive'; torch up to 2.7 exported without one.
    whole = [name.replace("\\", "/").lower() for name in names]
    inside = [name.partition("/")[2] for name in whole]
    members = {*whole, *inside}
    if any(name.startswith("data/aotinductor/") for name in inside):
        return "compiled"
    if any(name.endswith(f"/{PROBE_METADATA}") for name in whole):
        return "probe"
    if members & {"archive_format", "serialized_exported_program.json"}:
        return "exported"
    if any(name.startswith("models/") for name in inside):
        return "exported"
    if members & {"constants.pkl", "bytecode.pkl"}:
        return "torchscript"
    if any(name.startswith("code/") for name in inside):
        return "torchscript"
    if ".data/extern_modules" in inside or any(name.endswith(".py") for name in whole):
        return "package"
    return None


def is_shared_library(head: bytes) -> bool:
    return head.startswith(_SHARED_LIBRARIES)


def first_member_of_another(head: bytes) -> str:
    """Return what a zip file is by its first member; '' if torch.save may have written it.

    torch.save writes everything into one folder.
    """
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if b"/" in name or not name:
        return ""
    if name.endswith(b".npy"):
        return "an archive of NumPy arrays (.npz)"
    return f"a zip archive that begins with {printable(repr(name.decode('utf-8', 'replace')))}"


def what_it_is(head: bytes, size: int) -> str:
    """Describe a file that is no checkpoint from its first bytes."""
    for signature, description in _LOOKALIKES:
        if head.startswith(signature):
            return description
    if is_shared_library(head):
        return "a shared library or an executable, which is machine code"
    if head[4:8] in _FLATBUFFERS:
        return _FLATBUFFERS[head[4:8]]
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x3a", b"\x42"):  # fields of its protobuf
        return "an ONNX model, whose weights are not read; save the PyTorch module's state_dict()"
    if head.lstrip().lower().startswith(_WEB_PAGES):
        return "a web page, perhaps a download's error message or login form"
    if head[257:262] == b"ustar":
        return "a tar archive (unpack it first)"
    if head[:1] == b"\x80" or b"PK\x03\x04".startswith(head):
        return f"a truncated or damaged file of {size} bytes"
    start = head[:40]
    try:
        text = head.decode("utf-8", errors="strict" if size <= HEAD_BYTES else "ignore")
    except UnicodeDecodeError:
        return f"a file of {size} bytes that starts with {start!r}"
    if all(c.isprintable() or c.isspace() for c in text):
        return f"a text file that starts with {printable(text[:40])!r}"
    return f"a file of {size} bytes that starts with {start!r}"
