"""What a scan's record and report cost: writing, reading, sweeping, rendering, opening, hashing.

The rows are those of a made-up study (:mod:`benchmarks.study`); no network is audited. Chromium is
timed as a process, with its start and end, beside an empty page; where it is absent, that row says
so.
"""

import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import xxhash

from fadiag_fast.reports.html import write_report
from fadiag_fast.scanning import (
    CheckpointRecord,
    ScanResult,
    ScanWriter,
    config_hash,
    content_hash,
    sweep_thresholds,
)

from . import rows, study
from .rows import Row

CHECKPOINTS, LAYERS = 10_000, 5
# Seconds, for all the checkpoints.
TARGETS = {"write rows and tables": 5.0, "open the report, from navigation": 2.0}
# A browser alone: no network, no profile, no screen.
CHROMIUM_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def run(device: torch.device, results: Path, quick: bool) -> Path:
    """Measure and write the rows; ``quick`` takes a tenth of the checkpoints, once each."""
    count, repetitions = (CHECKPOINTS // 10, 1) if quick else (CHECKPOINTS, 3)
    with TemporaryDirectory() as name:
        measured = _measure(Path(name), count, repetitions)
    here = rows.environment(device)
    path = rows.results_path(results, "scan-report", device, quick)
    return rows.write(path, [{**row, **here} for row in measured])


def _measure(folder: Path, count: int, repetitions: int) -> list[Row]:
    workload = f"{count} checkpoints, {LAYERS} states"
    found: list[Row] = []

    def add(case: str, seconds: list[float], **more: object) -> None:
        best = sorted(seconds)[len(seconds) // 2] if seconds else float("nan")
        row = {"workload": workload, "case": case, "median_s": round(best, 4), **more}
        if case in TARGETS and seconds and count == CHECKPOINTS:
            limit = TARGETS[case]
            row["target_s"] = limit
            row["verdict"] = "met" if best <= limit else f"missed by {best / limit - 1:.1%}"
        found.append({**row, "repetitions": len(seconds)})

    outcomes = list(study.records(count, config_hash(study.CONFIG), layers=LAYERS))
    folders = [folder / f"scan{i}" for i in range(repetitions)]
    add("write rows and tables", [_timed(lambda f=f: _write(f, outcomes)) for f in folders])
    scan = folders[0]
    add("read tables", _repeated(lambda: ScanResult.load(scan), repetitions))
    result = ScanResult.load(scan)
    add("sweep all thresholds", _repeated(lambda: sweep_thresholds(result), repetitions))
    page = folder / "report.html"
    add("render the report", _repeated(lambda: write_report(result, page), repetitions))
    found[-1]["bytes"] = page.stat().st_size
    found += _hash_rows(folder, repetitions)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    cases = ("open the report, from navigation", "open the report, whole process")
    if chromium is None:
        for case in cases:
            add(case, [], note="no chromium on the PATH")
        return found
    empty = folder / "empty.html"
    empty.write_text("<!doctype html><title>empty</title>")
    profile = folder / "profile"
    _open(chromium, empty, profile)  # makes the profile, which a user has already
    opened = [_open(chromium, page, profile) for _ in range(repetitions)]
    add(cases[0], [ready for _, ready in opened])
    add(cases[1], [whole for whole, _ in opened])
    add(
        "open an empty page, whole process",
        [_open(chromium, empty, profile)[0] for _ in range(repetitions)],
    )
    return found


def _write(folder: Path, outcomes: list[CheckpointRecord]) -> None:
    with ScanWriter(folder) as writer:
        writer.configure(study.CONFIG)
        for outcome in outcomes:
            writer.add(outcome)


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _repeated(action: Callable[[], object], repetitions: int) -> list[float]:
    return [_timed(action) for _ in range(repetitions)]


def _hash_rows(folder: Path, repetitions: int) -> list[Row]:
    """The rate of hashing a file in the page cache, beside other hashes of the same bytes."""
    size = 1 << 27
    data = os.urandom(size)
    file = folder / "bytes"
    file.write_bytes(data)
    measured: list[Row] = []
    for case, action in (
        ("hash a file", lambda: content_hash(file)),
        ("XXH3 of memory", lambda: xxhash.xxh3_128(data).digest()),
        ("SHA-256 of memory", lambda: hashlib.sha256(data).digest()),
        ("read a file", lambda: file.read_bytes()),
    ):
        seconds = sorted(_repeated(action, max(3, repetitions)))
        median = seconds[len(seconds) // 2]
        measured.append(
            {
                "workload": "128 MiB, one thread",
                "case": case,
                "median_s": round(median, 4),
                "bytes": size,
                "gb_per_s": round(size / median / 1e9, 3),
                "repetitions": len(seconds),
            }
        )
    return measured


def _open(chromium: str, page: Path, profile: Path) -> tuple[float, float]:
    """Return the seconds of the whole process, and those from navigation to the last drawing."""
    start = time.perf_counter()
    done = subprocess.run(
        [chromium, *CHROMIUM_OPTIONS, "--dump-dom", f"--user-data-dir={profile}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    whole = time.perf_counter() - start
    ready = re.search(r'data-ready="(\d+)"', done.stdout)
    return whole, int(ready.group(1)) / 1000 if ready else float("nan")
