"""Claim: no cliffs over N × D × dtype × L, and no cell slower than the pure path. On a GPU.

The pure path of a cell is the faster of eager and foreach, each whole and graphed. torch.compile
stays out: half a minute of compilation for each of more than a hundred cells; it competes in
operator.py. Each path is checked in each cell, as everywhere.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

import fadiag_fast

from . import ceilings, pure, rows
from .operator import OPERATOR, release, verdict
from .timing import Plan, Run, choose_cache, fastest, measure, pick

SAMPLES = (1, 2, 4, 8, 32, 64, 512, 4096, 8192)
WIDTHS = (16, 256, 4096, 65536, 1 << 20, 1 << 24)
LAYERS = (1, 8, 32, 100)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MOST_BYTES = 4 << 30
# Of the bandwidth that a neighbour leads one to expect.
LEAST_SHARE = 0.7
_MOST_FOREACH_SAMPLES = 2048

Cell = tuple[str, int, int, int]  # dtype, L, N, D


def cell_row(
    cell: Cell, pool: torch.Tensor, device: torch.device, plan: Plan, reading: float
) -> rows.Row:
    """Measure one cell on views of a pool of random numbers.

    Args:
        cell: dtype, L, N, D.
        pool: at least 2·L·N·D random elements; drawing them anew for each cell takes longer than
            measuring it.
        device: where the pool is.
        plan: how long.
        reading: TB/s of a plain read.
    """
    dtype, layers, samples, width = cell
    views = pool[: 2 * layers * samples * width].view(2, layers, samples, width)
    hiddens, grads = list(views[0].unbind(0)), list(views[1].unbind(0))
    expected = fadiag_fast.layer_statistics(hiddens, grads)
    found: dict[str, pure.Path] = {"eager": pure.eager}
    if layers * samples <= _MOST_FOREACH_SAMPLES:
        found["foreach"] = pure.foreach
    runs, rejected = pure.checked(found, hiddens, grads, expected)
    variants: dict[str, Run] = {
        OPERATOR: lambda: fadiag_fast.layer_statistics(hiddens, grads),
        **runs,
    }
    nbytes = views.nbytes + 2 * layers * samples * 8 + layers * width * 4
    timings = measure(variants, device, plan, choose_cache(nbytes, device))
    eager = pick(timings, OPERATOR)
    mine = fastest(timings, [OPERATOR])
    best = fastest(timings, list(runs))
    ratio_eager = fastest(timings, list(runs), "eager").median_us / eager.median_us
    graphed = pick(timings, OPERATOR, "graphed").median_us
    ratio_graphed = fastest(timings, list(runs), "graphed").median_us / graphed
    # Like with like: a whole call against a whole call, a replay against a replay.
    ratios = [ratio for ratio in (ratio_eager, ratio_graphed) if not math.isnan(ratio)]
    least = min(ratios, default=math.nan)
    achieved = ceilings.bandwidth(nbytes, mine)
    return {
        "workload": f"L{layers} N{samples} D{width} {dtype}",
        "dtype": dtype,
        "layers": layers,
        "samples": samples,
        "width": width,
        **mine.columns(),
        "eager_us": round(eager.median_us, 3),
        "graphed_us": round(graphed, 3),
        "bytes": nbytes,
        "tb_per_s": achieved,
        "share_of_read": round(achieved / reading, 4),
        "best_pure": f"{best.variant}, {best.mode}",
        "best_pure_us": round(best.median_us, 3),
        "ratio_eager": round(ratio_eager, 3),
        "ratio_graphed": round(ratio_graphed, 3),
        "ratio": round(least, 3),
        "verdict": verdict(least, 1.0, False),
        "note": "; ".join(timing.note for timing in (*timings, *rejected) if timing.note),
    }


def neighbours(cell: Cell, cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells one step of the measured grid away, along L, N or D; of the same dtype."""
    found: list[Cell] = []
    for axis in (1, 2, 3):
        others = [
            c for c in cells if all(c[i] == cell[i] for i in range(4) if i != axis) and c != cell
        ]
        below = [c for c in others if c[axis] < cell[axis]]
        above = [c for c in others if c[axis] > cell[axis]]
        if below:
            found.append(max(below, key=lambda c: c[axis]))
        if above:
            found.append(min(above, key=lambda c: c[axis]))
    return found


def find_cliffs(times: dict[Cell, float], nbytes: dict[Cell, float]) -> dict[Cell, Cell]:
    """Return the cells under .7 of what a neighbour leads one to expect, with that neighbour.

    A small call costs a launch whatever it reads, so bandwidth rises with size and a plain
    comparison of bandwidths would call every small cell a cliff. Expected is therefore the
    neighbour's time scaled by the bytes, plus the quickest call with as many layers; a cell is a
    cliff where it takes more than that over .7. Where time is proportional to bytes this is .7 of
    the neighbour's bandwidth.
    """
    times = {cell: time for cell, time in times.items() if not math.isnan(time)}
    floors: dict[int, float] = {}
    for cell, time in times.items():
        floors[cell[1]] = min(time, floors.get(cell[1], math.inf))
    cliffs: dict[Cell, Cell] = {}
    for cell, time in times.items():
        for other in neighbours(cell, list(times)):
            expected = floors[cell[1]] + times[other] * nbytes[cell] / nbytes[other]
            if time * LEAST_SHARE > expected:
                cliffs[cell] = other
                break
    return cliffs


def run(device: torch.device, results: Path, quick: bool = False) -> Path:
    """Measure the grid; write and return the CSV."""
    on_gpu = device.type == "cuda"
    most_bytes = (256 << 20 if quick else _MOST_BYTES) if on_gpu else 8 << 20
    plan = Plan(5, 0.2, 0.2e-3) if quick else Plan(20, 0.25, 0.3e-3)
    where = rows.environment(device)
    size = ceilings.READ_BYTES if on_gpu else ceilings.READ_BYTES // 8
    _, reads = ceilings.find_ceilings(device, plan, size, copy=False)
    reading = max(row["tb_per_s"] for row in reads if row["repetitions"])
    found: list[rows.Row] = []
    for name, dtype in DTYPES.items():
        pool = torch.randn(most_bytes // dtype.itemsize, dtype=dtype, device=device)
        for layers in LAYERS:
            for samples in SAMPLES:
                for width in WIDTHS:
                    if 2 * layers * samples * width <= pool.numel():
                        cell = (name, layers, samples, width)
                        found.append(cell_row(cell, pool, device, plan, reading))
        del pool
        release(device)
        print(f"sweep: {name} done, {len(found)} cells", flush=True)
    cells = [(row["dtype"], row["layers"], row["samples"], row["width"]) for row in found]
    cliffs = find_cliffs(
        dict(zip(cells, (row["median_us"] for row in found), strict=True)),
        dict(zip(cells, (row["bytes"] for row in found), strict=True)),
    )
    for cell, row in zip(cells, found, strict=True):
        beside = cliffs.get(cell)
        row["cliff"] = f"beside L{beside[1]} N{beside[2]} D{beside[3]}" if beside else ""
        row |= where
    return rows.write(rows.results_path(results, "sweep", device, quick), found)
