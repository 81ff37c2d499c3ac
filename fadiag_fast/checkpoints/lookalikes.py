"""Say what a file is that is no checkpoint."""

from __future__ import annotations

from .errors import printable

HEAD_BYTES = 512

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
_WEB_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")


def what_it_is(head: bytes, size: int) -> str:
    """Describe a file that is no checkpoint from its first bytes."""
    for signature, description in _LOOKALIKES:
        if head.startswith(signature):
            return description
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
