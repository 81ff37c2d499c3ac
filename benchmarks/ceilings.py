"""Measure the memory's ceilings: what a plain read and a plain copy reach on this machine."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from .timing import Plan, Run, Timing, fastest, measure

READ_BYTES = 1 << 30
READ = "plain read"


@dataclass(frozen=True)
class ReadLoop:
    """The fastest plain read found, to be timed again beside whatever is compared with it."""

    name: str
    run: Run
    nbytes: int


def _read_loops(device: torch.device, nbytes: int) -> dict[str, Run]:
    # Random, not zeros: zeros can run faster than data do.
    data = torch.randn(nbytes // 4, device=device)
    rows = data.view(1024, -1)
    loops: dict[str, Run] = {
        "read: sum float32": lambda: torch.sum(data),
        "read: sum of rows": lambda: torch.sum(rows, dim=1),
        "read: largest float32": lambda: torch.amax(data, 0),
        "read: norm float32": lambda: torch.linalg.vector_norm(data),
    }
    if device.type == "cpu":
        # Each thread one piece: a loop over contiguous memory without torch's scheduler.
        pieces = np.array_split(data.numpy(), torch.get_num_threads())
        pool = ThreadPoolExecutor(torch.get_num_threads())
        loops["read: numpy largest, threads"] = lambda: list(pool.map(np.max, pieces))
    else:
        loops["read: sum int32"] = lambda: torch.sum(data.view(torch.int32), dtype=torch.int32)
    return loops


def find_ceilings(
    device: torch.device, plan: Plan, nbytes: int = READ_BYTES, copy: bool = True
) -> tuple[ReadLoop, list[dict[str, object]]]:
    """Time plain reads and a copy; return the fastest read and the rows of all.

    Args:
        device: where to read.
        plan: how long.
        nbytes: the size of what is read; no cache may hold it.
        copy: whether to time a copy too, which needs twice the memory.
    """
    loops = _read_loops(device, nbytes)
    variants: dict[str, Callable[[], object]] = dict(loops)
    if copy:
        source = torch.randn(nbytes // 4, device=device)
        target = torch.empty_like(source)
        variants["copy"] = lambda: target.copy_(source)
    timings = measure(variants, device, plan)
    best = fastest(timings, list(loops), "eager")
    rows = [
        {
            "workload": "ceilings",
            **timing.columns(),
            "bytes": moved,
            "tb_per_s": bandwidth(moved, timing),
        }
        for timing in timings
        for moved in [nbytes * 2 if timing.variant == "copy" else nbytes]
    ]
    return ReadLoop(best.variant, loops[best.variant], nbytes), rows


def bandwidth(nbytes: float, timing: Timing) -> float:
    """Return TB/s, counting 10**12, to five digits."""
    return float(f"{nbytes / timing.median_us * 1e-6:.5g}")
