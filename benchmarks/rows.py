"""Write measurements as CSV rows that say where, when, with what and by which command."""

import csv
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fadiag_fast

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor with the cores that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return f"{found.group(1) if found else model} ({torch.get_num_threads()} threads)"


def slug(name: str) -> str:
    """Return a name fit for a file."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _commit() -> str:
    """Return the commit that was measured; ``-modified`` where the sources differ from it."""
    if asked := os.environ.get("FADIAG_COMMIT"):
        return asked
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        # Results and tables change by measuring; only sources matter.
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "csrc")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{head}-modified" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def _command() -> str:
    """Return the command without the results folder, which says nothing of the measurement."""
    words: list[str] = []
    arguments = iter(sys.argv[1:])
    for word in arguments:
        if word == "--results":
            next(arguments, None)
        elif not word.startswith("--results="):
            words.append(word)
    return " ".join(["python -m benchmarks", *words])


def _load() -> str:
    """Return the runnable processes per core before the run: above 0.2 or so others disturb it."""
    try:
        return f"{os.getloadavg()[0] / (os.cpu_count() or 1):.2f}"
    except (AttributeError, OSError):
        return ""


def environment(device: torch.device) -> Row:
    """Return the columns that every row carries."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "fadiag_fast": fadiag_fast.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": _command(),
        "load": _load(),
    }


def results_path(results: Path, name: str, device: torch.device, quick: bool) -> Path:
    """Return where rows go; quick ones aside, so that they never replace real ones."""
    ending = "_quick" if quick else ""
    return results / f"{name}_{slug(device_name(device))}{ending}.csv"


def write(path: Path, rows: Sequence[Row], replace: str = "") -> Path:
    """Write rows to a CSV.

    Args:
        path: the file; its folder is made.
        rows: dictionaries; the columns are the union of their keys in order of appearance.
        replace: a column. Rows of the file whose value there was not measured now are kept: a run
            of a few workloads completes the file instead of emptying it.
    """
    kept: list[Row] = []
    if replace and path.exists():
        fresh = {str(row[replace]) for row in rows}
        kept = [row for row in read(path) if row.get(replace) not in fresh]
    everything = [*kept, *rows]
    columns = list(dict.fromkeys(column for row in [*rows, *kept] for column in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    # A cut-off run leaves the old file, never half of a new one.
    partial = path.with_suffix(".csv.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(everything)
    partial.replace(path)
    return path


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV, as text."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def number(row: dict[str, str], column: str) -> float:
    """Return a column as a number, NaN where it is empty or no number."""
    try:
        return float(row.get(column) or "nan")
    except ValueError:
        return float("nan")
