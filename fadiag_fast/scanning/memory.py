"""How much memory the machine, or the container, has left for a scan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

# Where the system does not say.
_ASSUMED = 4 << 30
_CGROUPS = Path("/sys/fs/cgroup")


def free_host_bytes() -> int:
    """Return how many bytes this process may still take, as far as the system says."""
    return min([*_free_of_machine(), *_free_of_container()], default=_ASSUMED)


def _free_of_machine() -> Iterator[int]:
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    yield int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return


def _free_of_container() -> Iterator[int]:
    """Yield what a container's limit leaves: who goes beyond is killed, not refused."""
    for folder, limit, used, cache in (
        (_CGROUPS, "memory.max", "memory.current", "inactive_file "),
        (
            _CGROUPS / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file ",
        ),
    ):
        try:
            most = int((folder / limit).read_text())  # "max" where there is none
            taken = int((folder / used).read_text())
            # What the system gives back by itself: pages of files.
            for line in (folder / "memory.stat").read_text().splitlines():
                if line.startswith(cache):
                    taken -= int(line.split()[1])
            yield max(0, most - taken)
        except (OSError, ValueError, IndexError):
            continue


def lacks_memory(error: BaseException) -> bool:
    """Return whether an error is one for want of memory: the CPU's allocator has no type for it."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "DefaultCPUAllocator" in str(error)
        or "not enough memory" in str(error)
    )
