"""Registers, spills, stack and shared memory of every kernel, as the compiler reports them."""

import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from . import rows

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_NAME = re.compile(r"fadiag::(\w+(?:<[^(]*>)?)\(")


def _nvcc() -> str:
    found = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(found).is_file():
        raise RuntimeError("registers: expected nvcc on PATH or in /usr/local/cuda/bin, found none")
    return found


def _demangle(name: str) -> str:
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    match = _NAME.search(text)
    return match.group(1).replace("fadiag::", "") if match else text.strip()


def report(source: Path, architecture: str = "90") -> list[rows.Row]:
    """Compile one source and return a row per kernel."""
    include = Path(torch.__file__).parent / "include"
    with TemporaryDirectory() as folder:
        command = [_nvcc(), "-O3", "-std=c++17", "-DUSE_CUDA", "-DTORCH_STABLE_ONLY"]
        command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(include)]
        command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
        command += ["-Xptxas", "-v", "-c", str(source), "-o", str(Path(folder, "kernel.o"))]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found: list[rows.Row] = []
    for line in text.splitlines():
        if entry := _ENTRY.search(line):
            found.append({"kernel": _demangle(entry.group(1)), "target": entry.group(2)})
        elif frame := _FRAME.search(line):
            stack, stores, loads = frame.groups()
            found[-1] |= {"stack": stack, "spill_stores": stores, "spill_loads": loads}
        elif used := _USED.search(line):
            found[-1] |= {"registers": used.group(1), "static_shared": used.group(2) or "0"}
    return found


def run(device: torch.device, results: Path, quick: bool) -> Path:
    """Compile csrc/cuda and write the report; no GPU is needed. ``quick`` changes nothing."""
    del quick
    measured = [
        row for source in sorted((rows.ROOT / "csrc/cuda").glob("*.cu")) for row in report(source)
    ]
    here = rows.environment(device)
    return rows.write(results / "registers_sm90.csv", [{**row, **here} for row in measured])
