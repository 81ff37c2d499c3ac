"""Claim: the statistics of all layers cost one read of them. Eight workloads, on a GPU.

Bytes are counted once each: h and g read, norms and means written. The share is of the bandwidth
that a plain read of 1 GiB reaches, timed in the same rounds. A ratio is the time of the best
pure-PyTorch path (see pure.py) over the operator's.
"""

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import fadiag_fast

from . import ceilings, pure, rows
from .timing import (
    Plan,
    Run,
    Timing,
    choose_cache,
    failed,
    fastest,
    measure,
    pick,
)

OPERATOR = "fadiag_fast"
PREPARED = "fadiag_fast, prepared"
NO_MEANS = "fadiag_fast, no means"
# Of the operator itself, not paths that compete with it.
_OWN = {OPERATOR, PREPARED, NO_MEANS}
STATISTICS = "layer_statistics"
COSINE_BATCHES = 10


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    Attributes:
        name: as the tables show it.
        layers, samples: L and N.
        shape: of one sample.
        dtype: of h and g.
        targets: what is claimed of it, by measure (see :func:`verdicts`).
        channels_last: whether the layers lie in memory with channels fastest.
        cosines: whether the direction cosines of ten batches are timed beside it.
    """

    name: str
    layers: int
    samples: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    targets: dict[str, float] = field(default_factory=dict)
    channels_last: bool = False
    cosines: bool = False

    @property
    def width(self) -> int:
        """D, the features of one sample."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The fewest bytes that must move: inputs read once, outputs written once."""
        return self.nbytes_without_means + self.layers * self.width * (
            4 << (self.dtype == torch.float64)
        )

    @property
    def nbytes_without_means(self) -> int:
        """The same of a call that asks for no mean."""
        read = 2 * self.layers * self.samples * self.width * self.dtype.itemsize
        return read + 2 * self.layers * self.samples * 8

    @property
    def flops(self) -> int:
        """Multiply and add for each element's square, and one more add for the mean of g."""
        return 5 * self.layers * self.samples * self.width

    def make(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """Return fresh random layers: hiddens and gradients."""
        generator = torch.Generator(device).manual_seed(0)

        def layer() -> Tensor:
            size = (self.samples, *self.shape)
            data = torch.randn(size, dtype=self.dtype, device=device, generator=generator)
            if self.channels_last:
                return data.contiguous(memory_format=torch.channels_last)
            return data

        return [layer() for _ in range(self.layers)], [layer() for _ in range(self.layers)]


_BF16, _FP32 = torch.bfloat16, torch.float32
# Targets: `share` of the plain read, `ratio` of the best pure path in any mode to the operator's
# whole call, `ratio_eager` and `ratio_graphed` within one mode, `eager_us` and `graphed_us` times.
WORKLOADS = [
    Workload("L13 N256 D75648 bf16", 13, 256, (75648,), _BF16, {"share": 0.95, "ratio": 2.8}),
    Workload(
        "L4 N512 D262144 fp32",
        4,
        512,
        (262144,),
        _FP32,
        {"share": 0.97, "ratio": 1.48},
        False,
        True,
    ),
    Workload(
        "L32 N16 D2097152 bf16",
        32,
        16,
        (2097152,),
        _BF16,
        {"share": 0.93, "ratio": 2.2},
        False,
        True,
    ),
    Workload(
        "L17 N256 D100352 bf16 channels_last",
        17,
        256,
        (512, 14, 14),
        _BF16,
        {"share": 0.93, "ratio": 2.5},
        True,
    ),
    Workload(
        "L16 N1 D4194304 bf16",
        16,
        1,
        (4194304,),
        _BF16,
        {"share": 0.85, "share_no_means": 0.95, "ratio_by_hand": 1.0},
    ),
    Workload(
        "L16 N2 D4194304 bf16",
        16,
        2,
        (4194304,),
        _BF16,
        {"share": 0.88, "share_no_means": 0.95, "ratio_by_hand": 1.0},
    ),
    Workload(
        "L16 N4 D4194304 bf16",
        16,
        4,
        (4194304,),
        _BF16,
        {"share": 0.92, "share_no_means": 0.95, "ratio_by_hand": 1.0},
    ),
    Workload(
        "L1 N1 D4194304 bf16",
        1,
        1,
        (4194304,),
        _BF16,
        {"graphed_us": 15.0, "ratio_by_hand": 1.0},
    ),
    Workload("L1 N4 D4194304 bf16", 1, 4, (4194304,), _BF16, {"ratio_by_hand": 1.0}),
    Workload(
        "L13 N4 D150528 bf16",
        13,
        4,
        (150528,),
        _BF16,
        {"graphed_us": 12.0, "ratio_by_hand": 1.0},
    ),
    Workload(
        "L25 N12 D786432 bf16",
        25,
        12,
        (786432,),
        _BF16,
        {"share": 0.93, "ratio_by_hand": 1.0},
    ),
    Workload("L8 N8192 D128 fp32", 8, 8192, (128,), _FP32, {"share": 0.75, "ratio": 2.0}),
    Workload(
        "L32 N128 D1024 fp32",
        32,
        128,
        (1024,),
        _FP32,
        {"eager_us": 30.0, "prepared_us": 18.0, "ratio_graphed": 12.0},
    ),
    Workload(
        "L5 N128 D256 fp32",
        5,
        128,
        (256,),
        _FP32,
        {
            "eager_us": 12.0,
            "prepared_us": 6.0,
            "graphed_us": 5.0,
            "ratio_eager": 25.0,
            "ratio_graphed": 8.0,
        },
    ),
    Workload("L100 N64 D512 fp32", 100, 64, (512,), _FP32, {"eager_us": 60.0, "prepared_us": 25.0}),
]

# Measures of which less is better.
_TIMES = ("eager_us", "prepared_us", "graphed_us", "added")


def verdict(value: float, target: float, less_is_better: bool) -> str:
    """Return ``met`` or ``missed by ...`` with the relative distance; a NaN was not measured."""
    if math.isnan(value):
        return "not measured"
    reached = target / value if less_is_better else value / target
    return "met" if reached >= 1 else f"missed by {1 - reached:.1%}"


def verdicts(measures: dict[str, float], targets: dict[str, float]) -> str:
    """Return one line on every target: ``share 0.96 ≥ 0.95 met; ...``."""
    parts = []
    for name, target in targets.items():
        value = measures.get(name, math.nan)
        sign = "≤" if name in _TIMES else "≥"
        parts.append(f"{name} {value:.3g} {sign} {target:g} {verdict(value, target, sign == '≤')}")
    return "; ".join(parts)


def compare(
    timings: Sequence[Timing],
    read: ceilings.ReadLoop,
    nbytes: int,
    nbytes_without_means: int = 0,
) -> dict[str, float]:
    """Return the measures of a workload from the timings of its variants.

    Args:
        timings: of the operator, the pure paths and the plain read.
        read: which plain read was among them.
        nbytes: what the workload must move.
        nbytes_without_means: what it must move where no mean is wanted.
    """
    paths = list({t.variant for t in timings} - _OWN - {read.name, pure.BY_HAND})
    plain = [path for path in paths if path not in pure.STACKING]
    eager, graphed = pick(timings, OPERATOR), pick(timings, OPERATOR, "graphed")
    reading = ceilings.bandwidth(read.nbytes, pick(timings, read.name))
    best_graphed = fastest(timings, paths, "graphed").median_us
    no_means = pick(timings, NO_MEANS)
    by_hand = pick(timings, pure.BY_HAND, "graphed")
    return {
        "eager_us": eager.median_us,
        "prepared_us": pick(timings, PREPARED).median_us,
        "graphed_us": graphed.median_us,
        "share_no_means": ceilings.bandwidth(nbytes_without_means, no_means) / reading
        if no_means.repetitions
        else math.nan,
        "ratio_by_hand": by_hand.median_us / graphed.median_us,
        "tb_per_s": ceilings.bandwidth(nbytes, eager),
        "share": ceilings.bandwidth(nbytes, eager) / reading,
        "share_graphed": ceilings.bandwidth(nbytes, graphed) / reading,
        "ratio": fastest(timings, paths).median_us / eager.median_us,
        "ratio_without_stacking": fastest(timings, plain).median_us / eager.median_us,
        "ratio_eager": fastest(timings, paths, "eager").median_us / eager.median_us,
        "ratio_eager_without_stacking": (
            fastest(timings, plain, "eager").median_us / eager.median_us
        ),
        "ratio_graphed": best_graphed / graphed.median_us,
        "ratio_graphed_without_stacking": (
            fastest(timings, plain, "graphed").median_us / graphed.median_us
        ),
    }


def table_rows(
    workload: str,
    timings: Sequence[Timing],
    read: ceilings.ReadLoop,
    nbytes: int,
    flops: int,
    targets: dict[str, float],
    nbytes_without_means: int = 0,
) -> list[rows.Row]:
    """Return a row per timing, with bandwidth and share, and the measures in the operator's row."""
    measures = compare(timings, read, nbytes, nbytes_without_means)
    paths = list({t.variant for t in timings} - _OWN - {read.name, pure.BY_HAND})
    best = fastest(timings, paths)
    reading = ceilings.bandwidth(read.nbytes, pick(timings, read.name))
    found: list[rows.Row] = []
    for timing in timings:
        moved = (
            read.nbytes
            if timing.variant == read.name
            else nbytes_without_means
            if timing.variant == NO_MEANS
            else nbytes
        )
        achieved = ceilings.bandwidth(moved, timing)
        row: rows.Row = {
            "workload": workload,
            **timing.columns(),
            "bytes": moved,
            "flops": 0 if timing.variant == read.name else flops,
            "tb_per_s": achieved,
            "share_of_read": round(achieved / reading, 4),
        }
        if timing.variant == OPERATOR and timing.mode == "eager":
            row |= {name: round(value, 4) for name, value in measures.items() if name != "tb_per_s"}
            row |= {
                "best_pure": f"{best.variant}, {best.mode}",
                "best_pure_us": round(best.median_us, 3),
                "verdict": verdicts(measures, targets),
            }
        found.append(row)
    return found


def statistics_rows(
    workload: Workload,
    device: torch.device,
    plan: Plan,
    read: ceilings.ReadLoop,
    compiled: bool,
    autotune: bool = False,
) -> list[rows.Row]:
    """Measure one workload: the operator, the pure paths and a plain read, in the same rounds."""
    hiddens, grads = workload.make(device)
    expected = fadiag_fast.layer_statistics(hiddens, grads)
    found, left_out = pure.paths(hiddens, grads, compiled, autotune)
    runs, rejected = pure.checked(found, hiddens, grads, expected)
    variants: dict[str, Run] = {
        OPERATOR: lambda: fadiag_fast.layer_statistics(hiddens, grads),
        **runs,
    }
    if "prepared_us" in workload.targets:
        variants[PREPARED] = partial(fadiag_fast.prepare_statistics(hiddens, grads), hiddens, grads)
    if "share_no_means" in workload.targets:
        variants[NO_MEANS] = partial(fadiag_fast.layer_statistics, hiddens, grads, means=())
    cache = choose_cache(workload.nbytes, device)
    timings = [*measure({**variants, read.name: read.run}, device, plan, cache)]
    timings += [*left_out, *rejected]
    return table_rows(
        workload.name,
        timings,
        read,
        workload.nbytes,
        workload.flops,
        workload.targets,
        workload.nbytes_without_means,
    )


def cosine_rows(
    workload: Workload, device: torch.device, plan: Plan, compiled: bool
) -> list[rows.Row]:
    """Measure what the cosines of ten batches' directions add to ten times the statistics."""
    hiddens, grads = workload.make(device)
    generator = torch.Generator(device).manual_seed(1)
    batches = [
        [torch.randn(workload.width, device=device, generator=generator) for _ in hiddens]
        for _ in range(COSINE_BATCHES)
    ]
    expected = fadiag_fast.direction_cosines(batches)
    paths = {"eager": pure.cosines, "stack": pure.stacked_cosines}
    if compiled:
        torch._dynamo.reset()
        paths["compile"] = torch.compile(pure.cosines, dynamic=False, fullgraph=True)
    variants: dict[str, Run] = {
        STATISTICS: lambda: fadiag_fast.layer_statistics(hiddens, grads),
        OPERATOR: lambda: fadiag_fast.direction_cosines(batches),
    }
    rejected = []
    for name, path in paths.items():
        try:
            # Absolute: a cosine near 0 has no relative error to speak of.
            error = (path(batches).double() - expected).abs().max().item()
        except Exception as problem:  # a path that does not run is a row with its reason
            rejected.append(failed(name, "eager", f"{type(problem).__name__}: {problem}"))
            continue
        if error <= pure.TOLERANCE:
            variants[name] = lambda path=path: path(batches)
        else:
            rejected.append(failed(name, "eager", f"wrong: error {error:.1e}"))
    moved = sum(d.nbytes for batch in batches for d in batch) + expected.nbytes
    # The directions of ten batches do not wait in the cache: the statistics' inputs pass through.
    timings = measure(variants, device, plan, choose_cache(moved, device, device.type == "cuda"))
    found: list[rows.Row] = []
    for timing in (*timings, *rejected):
        row: rows.Row = {"workload": f"{workload.name}, cosines K{COSINE_BATCHES}"}
        row |= timing.columns()
        if timing.variant != STATISTICS:
            base = pick(timings, STATISTICS, timing.mode).median_us
            added = timing.median_us / (COSINE_BATCHES * base)
            row |= {
                "bytes": moved,
                "tb_per_s": ceilings.bandwidth(moved, timing),
                "added": round(added, 5),
            }
            if timing.variant == OPERATOR:
                row["verdict"] = verdicts({"added": added}, {"added": 0.10})
        found.append(row)
    return found


def release(device: torch.device) -> None:
    """Give back the last workload's memory: graphs and compiled code hold some in cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def run(
    device: torch.device,
    results: Path,
    quick: bool = False,
    only: str = "",
    compiled: bool = True,
    autotune: bool = False,
) -> Path:
    """Measure the workloads whose name contains ``only``; write and return the CSV."""
    plan = Plan(repetitions=10, sample_s=0.5e-3) if quick else Plan(sample_s=2e-3)
    chosen = [workload for workload in WORKLOADS if only in workload.name]
    if not chosen:
        names = ", ".join(workload.name for workload in WORKLOADS)
        raise ValueError(f"--only: no workload contains {only!r}; there are {names}")
    where = rows.environment(device)
    read, found = ceilings.find_ceilings(device, plan)
    path = rows.results_path(results, "operator", device, quick)
    for workload in chosen:
        found += statistics_rows(workload, device, plan, read, compiled, autotune)
        release(device)
        if workload.cosines:
            found += cosine_rows(workload, device, plan, compiled)
            release(device)
        # Written after each: a run that is cut off keeps what it has measured.
        rows.write(path, [{**row, **where} for row in found], replace="workload")
        print(f"operator: {workload.name} done", flush=True)
    return path
