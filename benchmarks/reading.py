"""Claim: a scan's readers reach 60% of what ``cat`` does of files in the page cache.

Files of 5 MB with their own weights, epoch and loss, in both formats, read by one thread and by
several; beside them ``cat``, a bare ``readinto``, and what a scan would do otherwise: torch.load
and load_state_dict. All variants take turns, and torch's own operators run on one thread: several
gain nothing at this size, and wait for each other where other programs run. The interpreter's part
is that of files with as many tensors and next to no bytes. The files go into the temporary folder
(TMPDIR) and are deleted.
"""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from fadiag_fast.checkpoints import read_into
from fadiag_fast.scanning.hashing import ContentHasher

from . import rows
from .rows import Row

LINEARS, WIDTH = 20, 256
# The claim's number of files where the machine is one for scans; a fifth of it elsewhere.
FILES, FEWER_FILES, QUICK_FILES = 1024, 200, 32
# What takes ten times as long a file is timed on so many.
_SLOW_FILES = 100
# No round begins after so many seconds, if there were three.
_BUDGET_S, _FEWEST_ROUNDS = 60.0, 3
TARGET_SHARE = 0.6
# Python's part per file that lets 16 threads deliver 1,000 files a second with room to spare.
TARGET_INTERPRETER_US = 500.0

Read = Callable[[Sequence[Path]], None]


def network(width: int = WIDTH) -> nn.Module:
    """Return the network whose checkpoints are read: 5.3 MB at the usual width."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(LINEARS)))


def write_study(folder: Path, count: int, width: int = WIDTH) -> dict[str, list[Path]]:
    """Write a study in both formats; return its files."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = network(width)
    found: dict[str, list[Path]] = {"zip": [], "safetensors": []}
    for i in range(count):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3)
        state = model.state_dict()
        name = f"w{width}_step_{i:05}"
        saved = {"model_state": state, "config": {"width": width}, "epoch": i, "loss": 1 / (i + 1)}
        found["zip"].append(folder / f"{name}.pt")
        torch.save(saved, found["zip"][-1])
        found["safetensors"].append(folder / f"{name}.safetensors")
        save_file(state, found["safetensors"][-1])
    return found


def _new_slab(size: int) -> torch.Tensor:
    slab = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    return slab.zero_()  # touched: a scan uses its slabs again and again


def _slab_reader(size: int, hashed: bool) -> Read:
    slab = _new_slab(size)

    def run(paths: Sequence[Path]) -> None:
        for path in paths:
            read_into(path, slab, hasher=ContentHasher() if hashed else None)

    return run


def _bare_reader(size: int) -> Read:
    view = memoryview(_new_slab(size).numpy())

    def run(paths: Sequence[Path]) -> None:
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                file.readinto(view)

    return run


def _cat(paths: Sequence[Path]) -> None:
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(["cat", *paths], stdout=nowhere, check=True)


def _loader(mmap: bool) -> Read:
    model = network()

    def run(paths: Sequence[Path]) -> None:
        for path in paths:
            saved = torch.load(path, weights_only=True, mmap=mmap)
            model.load_state_dict(saved["model_state"])

    return run


def _variants(
    files: dict[str, list[Path]], size: int
) -> dict[tuple[str, int], tuple[Callable[[], None], int]]:
    """Return what to time and how many files that reads, by name and number of threads."""
    cores = os.cpu_count() or 1
    counts = [1, *(n for n in (2, 4, 8, 16) if n <= cores)]
    found: dict[tuple[str, int], tuple[Callable[[], None], int]] = {}

    def add(
        name: str, kind: str, threads: int, make: Callable[[], Read], most: int | None = None
    ) -> None:
        paths = files[kind][:most]
        # One reader a thread: each has a slab of its own.
        readers = [make() for _ in range(threads)]
        parts = [paths[i::threads] for i in range(threads)]

        def run() -> None:
            if threads == 1:
                readers[0](paths)
                return
            with ThreadPoolExecutor(threads) as pool:
                for future in [pool.submit(*pair) for pair in zip(readers, parts, strict=True)]:
                    future.result()

        found[name, threads] = (run, len(paths))

    for threads in counts:
        add("cat", "zip", threads, lambda: _cat)
        add("readinto", "zip", threads, lambda: _bare_reader(size))
        for kind in ("zip", "safetensors"):
            for hashed in (False, True):
                name = f"read_into, {kind}{', XXH3' if hashed else ''}"
                add(name, kind, threads, partial(_slab_reader, size, hashed))
    add("torch.load + load_state_dict", "zip", 1, lambda: _loader(False), _SLOW_FILES)
    add("torch.load(mmap) + load_state_dict", "zip", 1, lambda: _loader(True), _SLOW_FILES)
    return found


def _timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def reading_rows(folder: Path, count: int, rounds: int) -> list[Row]:
    """Measure all variants on one study of `count` files."""
    files = write_study(folder, count)
    nbytes = sum(path.stat().st_size for path in files["zip"])
    size = max(path.stat().st_size for paths in files.values() for path in paths) + 4096
    variants = _variants(files, size)
    for kind in files:  # into the page cache; their writing back must not fall into the timing
        _cat(files[kind])
    os.sync()
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in variants}
    order = list(variants)
    begin = time.perf_counter()
    for i in range(rounds + 1):
        if i > _FEWEST_ROUNDS and time.perf_counter() - begin > _BUDGET_S:
            break
        # The first round warms up. Turning the order spreads what follows upon what.
        for key in order[i % len(order) :] + order[: i % len(order)]:
            seconds = _timed(variants[key][0])
            if i:
                taken[key].append(seconds)
    cat = float(np.median(taken["cat", 1])) / count  # a file
    found: list[Row] = []
    for (name, threads), seconds in taken.items():
        read = variants[name, threads][1]
        low, median, high = (float(value) for value in np.percentile(seconds, (10, 50, 90)))
        row: Row = {
            "workload": f"{count} files of {nbytes / count / 1e6:.1f} MB",
            "case": name,
            "threads": threads,
            "median_s": round(median, 4),
            "p10_s": round(low, 4),
            "p90_s": round(high, 4),
            "files": read,
            "files_per_s": round(read / median, 1),
            "gb_per_s": round(nbytes / count * read / median / 1e9, 3),
            "of_cat": round(cat * read / median, 3),
        }
        if name.startswith("read_into"):
            share = cat * read / median
            row["target"] = f"{TARGET_SHARE:.0%} of one cat"
            row["verdict"] = (
                "met" if share >= TARGET_SHARE else f"missed by {1 - share / TARGET_SHARE:.1%}"
            )
        found.append({**row, "repetitions": len(seconds)})
    return found


def interpreter_rows(folder: Path, repetitions: int) -> list[Row]:
    """Measure the part that is not reading, on files of the same structure and a few bytes."""
    files = write_study(folder, 64, width=2)
    slab = _new_slab(1 << 20)
    found: list[Row] = []

    def add(case: str, paths: Sequence[Path]) -> None:
        spent = []
        for _ in range(repetitions):
            for path in paths:
                start = time.thread_time()
                read_into(path, slab)
                spent.append(1e6 * (time.thread_time() - start))
        median = float(np.median(spent))
        row: Row = {
            "workload": f"as many tensors ({2 * LINEARS}), next to no bytes",
            "case": f"read_into, {case}",
            "threads": 1,
            "cpu_us": round(median, 1),
        }
        over = median / TARGET_INTERPRETER_US - 1
        row["target"] = f"{TARGET_INTERPRETER_US:.0f} µs"
        row["verdict"] = "met" if over <= 0 else f"missed by {over:.1%}"
        found.append({**row, "repetitions": len(spent)})

    for kind in ("zip", "safetensors"):
        for path in files[kind]:
            read_into(path, slab)
        add(kind, files[kind])
    return found


def run(device: torch.device, results: Path, quick: bool = False) -> Path:
    """Measure and write the rows."""
    count = FILES if (os.cpu_count() or 1) >= 8 else FEWER_FILES
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="fadiag-reading-") as name:
        found = reading_rows(Path(name), QUICK_FILES if quick else count, 2 if quick else 7)
        found += interpreter_rows(Path(name), 2 if quick else 10)
    torch.set_num_threads(threads)
    where = rows.environment(device)
    path = rows.results_path(results, "reading", device, quick)
    return rows.write(path, [{**row, **where} for row in found])
