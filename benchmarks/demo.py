"""The demo's verdicts on three seeds: rows from the reports that ``fadiag demo`` writes."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from . import rows

SEEDS = (42, 123, 456)
RULES = ("bp", "dfa", "ep", "frozen")


def run(device: torch.device, results: Path, quick: bool) -> Path:
    """Train and audit the four networks for each seed; ``quick`` takes the first seed only."""
    seeds = SEEDS[:1] if quick else SEEDS
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fadiag_fast", "demo", "--quiet", "--out", folder]
        command += ["--device", device.type]
        for seed in seeds:
            command += ["--seed", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"fadiag demo failed:\n{done.stdout}{done.stderr}")
        measured = [
            row_of(seed, rule, json.loads(Path(folder, f"{rule}_s{seed}.json").read_text()))
            for seed in seeds
            for rule in RULES
        ]
    frozen = {row["seed"]: row["accuracy"] for row in measured if row["rule"] == "frozen"}
    for row in measured:
        row["points_over_frozen"] = round(100 * (row["accuracy"] - frozen[row["seed"]]), 2)
    here = rows.environment(device)
    path = rows.results_path(results, "demo", device, quick)
    return rows.write(path, [{**row, **here} for row in measured])


def row_of(seed: int, rule: str, record: rows.Row) -> rows.Row:
    """Return one report's figures as a row."""
    diagnostics = record["diagnostics"]
    return {
        "seed": seed,
        "rule": rule,
        "accuracy": record["headline_acc"],
        "growth": diagnostics["a"]["value"],
        "grad_norm": diagnostics["b"]["value"],
        "credit_gain": record["credit_gains"][-1],
        "stability": diagnostics["c"]["value"],
        "verdict": record["verdict"],
    }
