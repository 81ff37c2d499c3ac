"""Write files whole: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str], *, sync: bool = False) -> Iterator[Path]:
    """Give the path of a new file, which takes the place of ``path`` when the block ends well.

    Through a link, the file it points to is replaced, not the link; it keeps its mode.

    Args:
        path: the file to write.
        sync: wait until the bytes are on the disk before the old file is given up.

    Raises:
        OSError: the file cannot be written, or is a folder, device or pipe.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"{path}: expected a regular file to write, got a folder, device or pipe")
    # Not tempfile: it would give the file the mode 0600 instead of the user's own.
    partial = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        yield partial
        if sync:
            with partial.open("r+b") as file:
                os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, partial)
        os.replace(partial, target)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], text: str, *, sync: bool = False) -> None:
    """Write a text file in UTF-8; see :func:`whole_file`."""
    with whole_file(path, sync=sync) as partial:
        partial.write_text(text, encoding="utf-8")
