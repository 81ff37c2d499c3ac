"""Content hash of a checkpoint, and hash of a probe's configuration.

A scan that is run again skips what it has, and a file that was replaced under the same name must
not be skipped; so the key is the content. XXH3 with 128 bits is as quick as memory, so that a scan
reads at the disk's rate and not at a hash's: SHA-256 made 1.7 GB/s of a core where XXH3 made 35
(AMD EPYC of the benchmarks). It tells files apart that differ by accident, which is what happens to
checkpoints, and does not withstand somebody who builds two files with one hash. It leaves the
interpreter's lock, so that readers on threads add up.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from .._common.extras import require

# Large enough to be read at the disk's rate, small enough to stay in the cache while it is hashed.
_CHUNK = 1 << 20


class _Buffer(Protocol):
    def __buffer__(self, flags: int, /) -> memoryview: ...


class ContentHasher:
    """Hash bytes as they pass by, for a reader that needs them anyway.

    Feed it a file's bytes in order; the result is that of :func:`content_hash` on the file.

    Attributes:
        count: bytes so far.
    """

    def __init__(self) -> None:
        self._hash = require("xxhash", "a scan").xxh3_128()
        self.count = 0

    def update(self, data: bytes | bytearray | memoryview | _Buffer) -> None:
        """Add bytes; anything with the buffer protocol, C-contiguous."""
        self._hash.update(data)
        self.count += memoryview(data).nbytes

    def result(self) -> str:
        """Return the algorithm and 32 hexadecimal digits."""
        return f"xxh3:{self._hash.hexdigest()}"


def content_hash(path: str | os.PathLike[str]) -> str:
    """Return the hash of a file's bytes, or of a folder's files with their names.

    A folder's hash depends on the relative names and contents of the files in it, at any depth, and
    on nothing else: neither on dates nor on the folder's own name. It is streamed: memory stays at
    1 MiB whatever the size.

    Raises:
        OSError: something cannot be read, or is a FIFO, a socket or a device.
    """
    path = Path(path)
    hasher = ContentHasher()
    if not path.is_dir():
        _add_file(hasher, path)
        return hasher.result()
    files = sorted(
        (Path(folder, name).relative_to(path).as_posix(), Path(folder, name))
        for folder, _, names in os.walk(path, onerror=_raise)
        for name in names
    )
    for name, file in files:
        # The lengths keep "a" + "bc" and "ab" + "c" apart.
        encoded = name.encode("utf-8", "surrogateescape")
        hasher.update(f"{len(encoded)} {file.stat().st_size} ".encode())
        hasher.update(encoded)
        _add_file(hasher, file)
    return hasher.result()


def _add_file(hasher: ContentHasher, path: Path) -> None:
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    if not stat.S_ISREG(path.stat().st_mode):  # nobody may ever write to a FIFO, or end a device
        raise OSError(errno.EINVAL, "expected a regular file", str(path))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(view[:count])


def _raise(error: OSError) -> None:
    raise error


def config_hash(config: Mapping[str, Any]) -> str:
    """Return the hash of a probe's configuration: equal for equal values in any order.

    Args:
        config: JSON values with text keys, nested at will; tuples count as lists. Put in what the
            figures depend on (model, data, batches, loss, dtype, version of the figures), and not
            what they don't: thresholds, device, stack size.

    Raises:
        TypeError: a value that is no JSON value.
        ValueError: a number that is not finite.
    """
    return f"sha256:{hashlib.sha256(config_text(config).encode()).hexdigest()[:32]}"


def config_text(config: Mapping[str, Any]) -> str:
    """Return the configuration as the JSON text that :func:`config_hash` hashes."""
    _check_json("config", config)
    return json.dumps(config, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _check_json(where: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"config_hash: {where}: expected text keys, got {key!r}")
            _check_json(f"{where}.{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(f"{where}[{index}]", item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"config_hash: {where}: expected a finite number, got {value}")
    elif value is not None and not isinstance(value, str | bool | int | float):
        raise TypeError(f"config_hash: {where}: expected a JSON value, got {type(value).__name__}")
