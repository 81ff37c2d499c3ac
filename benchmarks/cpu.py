"""Claim: on a CPU too the operator reads at the memory's speed, and is nowhere slower than eager.

Two workloads against a plain read loop and the eager path, and a sweep of N × D. Every thread that
torch uses takes part on both sides. Under 4 GB of memory and 3 minutes.
"""

from pathlib import Path

import torch

import fadiag_fast

from . import ceilings, pure, rows
from .operator import OPERATOR, Workload, release, table_rows
from .timing import Plan, Run, choose_cache, fastest, measure, pick

WORKLOADS = [
    Workload("L4 N256 D75648 fp32", 4, 256, (75648,), torch.float32, {"share": 0.8, "ratio": 1.5}),
    Workload("L4 N256 D75648 bf16", 4, 256, (75648,), torch.bfloat16, {"share": 0.6, "ratio": 8.0}),
]
# The whole range of the claim in steps of eight and sixteen; a cell's h and g stay under 128 MiB.
SWEEP_SAMPLES = (1, 8, 64, 512, 8192)
SWEEP_WIDTHS = (16, 256, 4096, 65536, 1 << 20)
SWEEP_LAYERS = 2
_MOST_ELEMENTS = 1 << 24


def workload_rows(
    workload: Workload, device: torch.device, plan: Plan, read: ceilings.ReadLoop
) -> list[rows.Row]:
    """Measure one workload against eager and a plain read, in the same rounds."""
    # Without foreach and torch.compile: the claim is against eager, and the time is bounded.
    hiddens, grads = workload.make(device)
    expected = fadiag_fast.layer_statistics(hiddens, grads)
    runs, rejected = pure.checked({"eager": pure.eager}, hiddens, grads, expected)
    variants: dict[str, Run] = {
        OPERATOR: lambda: fadiag_fast.layer_statistics(hiddens, grads),
        **runs,
        read.name: read.run,
    }
    timings = measure(variants, device, plan, choose_cache(workload.nbytes, device)) + rejected
    return table_rows(
        workload.name, timings, read, workload.nbytes, workload.flops, workload.targets
    )


def sweep_rows(device: torch.device, plan: Plan, most_elements: int) -> list[rows.Row]:
    """Measure the operator against eager over N × D × dtype."""
    found: list[rows.Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        for samples in SWEEP_SAMPLES:
            for width in SWEEP_WIDTHS:
                if samples * width * SWEEP_LAYERS > most_elements:
                    continue
                name = "fp32" if dtype == torch.float32 else "bf16"
                cell = Workload(
                    f"sweep N{samples} D{width} {name}", SWEEP_LAYERS, samples, (width,), dtype
                )
                hiddens, grads = cell.make(device)
                expected = fadiag_fast.layer_statistics(hiddens, grads)
                runs, rejected = pure.checked({"eager": pure.eager}, hiddens, grads, expected)
                variants: dict[str, Run] = {
                    OPERATOR: lambda h=hiddens, g=grads: fadiag_fast.layer_statistics(h, g),
                    **runs,
                }
                cache = choose_cache(cell.nbytes, device)
                timings = measure(variants, device, plan, cache) + rejected
                mine, eager = pick(timings, OPERATOR), pick(timings, "eager")
                ratio = eager.median_us / mine.median_us
                found.append(
                    {
                        "workload": cell.name,
                        "samples": samples,
                        "width": width,
                        "dtype": name,
                        "layers": SWEEP_LAYERS,
                        **mine.columns(),
                        "bytes": cell.nbytes,
                        "tb_per_s": ceilings.bandwidth(cell.nbytes, mine),
                        "best_pure": fastest(timings, ["eager"]).variant,
                        "best_pure_us": round(eager.median_us, 3),
                        "ratio": round(ratio, 3),
                        "verdict": "met" if ratio >= 1 else f"missed: {1 / ratio - 1:.0%} slower",
                    }
                )
    return found


def run(device: torch.device, results: Path, quick: bool = False) -> list[Path]:
    """Measure both; write and return the CSVs."""
    plan = Plan(10, budget_s=4.0) if quick else Plan(100, budget_s=40.0)
    cell_plan = Plan(5, 0.3, 0.2e-3) if quick else Plan(100, 1.2)
    where = rows.environment(device)
    size = ceilings.READ_BYTES // 4 if quick else ceilings.READ_BYTES
    # No copy: it would hold twice the memory for a figure that no claim needs.
    reading = Plan(10, budget_s=3.0) if quick else Plan(100, budget_s=15.0)
    read, found = ceilings.find_ceilings(device, reading, size, copy=False)
    for workload in WORKLOADS:
        found += workload_rows(workload, device, plan, read)
        release(device)
    path = rows.results_path(results, "cpu", device, quick)
    rows.write(path, [{**row, **where} for row in found])
    # The read buffer is not needed any more, and the sweep's larger cells are.
    del read
    cells = sweep_rows(device, cell_plan, _MOST_ELEMENTS >> 3 if quick else _MOST_ELEMENTS)
    sweep = rows.results_path(results, "cpu-sweep", device, quick)
    rows.write(sweep, [{**row, **where} for row in cells])
    return [path, sweep]
