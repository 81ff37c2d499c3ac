"""Small files as the package writes them: a scan that ended, one that was stopped, step records."""

from pathlib import Path

import torch
from torch import nn

from fadiag_fast import StepProbe
from fadiag_fast.protocol import Figures
from fadiag_fast.scanning import ScanWriter
from fadiag_fast.scanning.records import CheckpointRecord


def checkpoint_record(step: int, config: str, run: str = "a") -> CheckpointRecord:
    figures = Figures(
        layers=("embed", "blocks.0"),
        residual_norms=(1.0 + step, 2.0),
        bp_grad_norms=(0.1, 0.2),
        credit_gains=(0.5, 0.25),
        output_grad_norm=0.4,
        batch_size=8,
        stabilities=(0.1, 0.2),
        num_directions=(8, 8),
        num_batches=8,
    )
    return CheckpointRecord(f"{run}/{step}.pt", run, step, config, f"xxh3:{step}", figures)


def finished_scan(folder: Path, count: int = 8, run: str = "a") -> Path:
    """Write a folder whose rows are in the tables."""
    with ScanWriter(folder, flush_rows=4) as writer:
        config = writer.configure({"batches": 8})
        writer.add(*(checkpoint_record(step, config, run) for step in range(count)))
    return folder


def stopped_scan(folder: Path, count: int = 8, flush_rows: int = 4) -> Path:
    """Write a folder that has parts, and no tables yet."""
    writer = ScanWriter(folder, flush_rows=flush_rows)
    config = writer.configure({"batches": 8})
    for step in range(count):
        writer.add(checkpoint_record(step, config))
    writer._files.release()
    return folder


def step_records(path: Path) -> Path:
    """Write the records of four steps as JSON lines."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    probe = StepProbe(net, sink=str(path), alarms=False)
    for _ in range(4):
        net(torch.randn(8, 4)).square().mean().backward()
        probe.step()
    probe.remove()
    return path
