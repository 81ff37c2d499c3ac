"""Claims beside speed: range at full speed, the same bits always, any size, any strides."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fadiag_fast
from fadiag_fast import LayerStatistics

from . import ceilings, rows
from .operator import release, verdict
from .timing import Plan, Run, choose_cache, failed, measure, pick, synchronize

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_MANTISSA_BITS = {torch.bfloat16: 7, torch.float32: 23}
_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def _bits(figures: Tensor) -> Tensor:
    """Return figures as integers, so that NaN equals NaN and 0 differs from -0."""
    return figures.contiguous().view(_INTEGER[figures.dtype.itemsize])


def _figures(statistics: LayerStatistics) -> list[Tensor]:
    return [statistics.hidden_norm, statistics.grad_norm, *statistics.grad_mean]


def _same(a: LayerStatistics, b: LayerStatistics) -> bool:
    pairs = zip(_figures(a), _figures(b), strict=True)
    return all(torch.equal(_bits(x), _bits(y)) for x, y in pairs)


# --- range ---


def half_subnormal(ordinary: Tensor) -> Tensor:
    """Return a copy in which every other element is subnormal: exponent 0, a random mantissa."""
    # Built from bits: a multiplication might flush what it should make.
    mixed = ordinary.clone()
    integers = mixed.view(_INTEGER[mixed.dtype.itemsize]).view(-1)[::2]
    integers.random_(1, 1 << _MANTISSA_BITS[mixed.dtype])
    return mixed


RANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "ordinary": lambda x: x,
    "1e25": lambda x: x * 1e25,
    "1e-25": lambda x: x * 1e-25,
    "zeros": torch.zeros_like,
    "half subnormal": half_subnormal,
}


def range_rows(device: torch.device, plan: Plan, samples: int, width: int) -> list[rows.Row]:
    """Measure the same shape with values all over the range, in the same rounds."""
    found: list[rows.Row] = []
    for dtype in _MANTISSA_BITS:
        base = [torch.randn(samples, width, device=device).to(dtype) for _ in range(4)]
        variants: dict[str, Run] = {}
        for name, change in RANGES.items():
            data = [change(x) for x in base]
            variants[name] = lambda d=data: fadiag_fast.layer_statistics(d[:2], d[2:])
        nbytes = sum(x.nbytes for x in base)
        timings = measure(variants, device, plan, choose_cache(nbytes, device))
        for timing in timings:
            ordinary = pick(timings, "ordinary", timing.mode)
            ratio = timing.median_us / ordinary.median_us
            found.append(
                {
                    "workload": f"range L2 N{samples} D{width} {_NAMES[dtype]}",
                    **timing.columns(),
                    "bytes": nbytes,
                    "tb_per_s": ceilings.bandwidth(nbytes, timing),
                    "value": round(ratio, 4),
                    "verdict": verdict(ratio, 1.10, True),
                }
            )
    return found


# --- bits ---


def portable_layers(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return layers whose values are the same on every machine and with every torch."""
    # Integers over powers of two: nothing is rounded before the storage type, and numpy promises
    # the same stream of PCG64 integers forever. Widths with and without a tail, wide and narrow.
    generator = np.random.Generator(np.random.PCG64(20))
    layers = []
    for width, dtype in [
        (75648, torch.bfloat16),
        (1021, torch.float32),
        (16, torch.float32),
        (4096, torch.float16),
        (262147, torch.float32),
    ]:
        pair = []
        for _ in range(2):
            raw = generator.integers(-(1 << 15), 1 << 15, size=(33, width), dtype=np.int32)
            data = torch.from_numpy(raw).to(torch.float32) / 4096
            pair.append(data.to(device=device, dtype=dtype))
        layers.append((pair[0], pair[1]))
    return layers


def digest(statistics: LayerStatistics) -> str:
    """Return the first 16 hexadecimal digits of the figures' SHA-256."""
    hashed = hashlib.sha256()
    for figures in _figures(statistics):
        hashed.update(_bits(figures).cpu().numpy().tobytes())
    return hashed.hexdigest()[:16]


def bits_rows(device: torch.device, repetitions: int) -> list[rows.Row]:
    """Check that the figures' bits depend on nothing but the layer's own values."""
    layers = portable_layers(device)
    hiddens, grads = [h for h, _ in layers], [g for _, g in layers]
    first = fadiag_fast.layer_statistics(hiddens, grads)

    differing = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(repetitions):
        again = fadiag_fast.layer_statistics(hiddens, grads)
        for x, y in zip(_figures(first), _figures(again), strict=True):
            # Compared and counted on the device: no repetition waits for the host.
            differing += (_bits(x) != _bits(y)).sum()

    alone = [fadiag_fast.layer_statistics([h], [g]) for h, g in layers]
    company = LayerStatistics(
        torch.cat([s.hidden_norm for s in alone]),
        torch.cat([s.grad_norm for s in alone]),
        tuple(s.grad_mean[0] for s in alone),
    )
    turned = fadiag_fast.layer_statistics(hiddens[::-1], grads[::-1])
    order = LayerStatistics(
        turned.hidden_norm.flip(0), turned.grad_norm.flip(0), turned.grad_mean[::-1]
    )
    checks = {
        f"{repetitions} repetitions": differing.item() == 0,
        "each layer alone": _same(first, company),
        "layers in reverse": _same(first, order),
    }
    if device.type == "cpu":
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            checks["one thread"] = _same(first, fadiag_fast.layer_statistics(hiddens, grads))
        finally:
            torch.set_num_threads(threads)
    found: list[rows.Row] = [
        {
            "workload": "same bits",
            "variant": name,
            "value": int(same),
            "verdict": "met" if same else "missed: bits differ",
        }
        for name, same in checks.items()
    ]
    # Not judged here: equal digests of two machines are the claim.
    found.append({"workload": "same bits", "variant": "digest", "value": digest(first)})
    return found


# --- size ---


def _large_errors(hidden: Tensor, grad: Tensor, got: LayerStatistics) -> float:
    """Return the largest relative error, against float64 in pieces of columns."""
    squares = torch.zeros(2, hidden.shape[0], dtype=torch.float64, device=hidden.device)
    error = torch.zeros((), dtype=torch.float64, device=hidden.device)
    step = max(1, (1 << 27) // hidden.shape[0])
    for begin in range(0, hidden.shape[1], step):
        piece = slice(begin, begin + step)
        h, g = hidden[:, piece].double(), grad[:, piece].double()
        squares[0] += (h * h).sum(1)
        squares[1] += (g * g).sum(1)
        # Relative to the gradients, not to the mean: means of random signs may be near zero.
        off = (got.grad_mean[0][piece].double() - g.mean(0)).abs() / g.abs().amax(0).clamp_min(
            1e-30
        )
        error = torch.maximum(error, off.max())
    norms = torch.stack([got.hidden_norm[0], got.grad_norm[0]])
    return float(torch.maximum(error, ((norms - squares.sqrt()).abs() / squares.sqrt()).max()))


def large_rows(device: torch.device, plan: Plan) -> list[rows.Row]:
    """Measure and check layers of more than 2**31 elements: few long samples, many short ones."""
    found: list[rows.Row] = []
    for samples, width in ((2, 1_200_000_000), (40_000, 60_000)):
        name = f"past 2^31: L1 N{samples} D{width} bf16"
        if device.type != "cuda":
            reason = "left out: 10 GB of memory and minutes on a CPU"
            found.append({"workload": name, **failed("fadiag_fast", "eager", reason).columns()})
            continue
        hidden = torch.randn(samples, width, dtype=torch.bfloat16, device=device)
        grad = torch.randn(samples, width, dtype=torch.bfloat16, device=device)

        def call(h: Tensor = hidden, g: Tensor = grad) -> LayerStatistics:
            return fadiag_fast.layer_statistics([h], [g])

        error = _large_errors(hidden, grad, call())
        nbytes = hidden.nbytes + grad.nbytes + 16 * samples + 4 * width
        for timing in measure({"fadiag_fast": call}, device, plan, choose_cache(nbytes, device)):
            found.append(
                {
                    "workload": name,
                    **timing.columns(),
                    "bytes": nbytes,
                    "tb_per_s": ceilings.bandwidth(nbytes, timing),
                    "value": f"{error:.1e}",
                    "verdict": "met" if error < 1e-6 else "missed: wrong figures",
                }
            )
        del hidden, grad, call
        release(device)
    return found


# --- strides ---


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Return the same values [N, D] as views of differently laid out memory."""
    samples, width = x.shape

    def inside(rows_: int, columns: int) -> Tensor:
        return torch.zeros(rows_, columns, dtype=x.dtype, device=x.device)

    found = {"contiguous": x}
    shifted = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(samples, width)
    found["one element off"] = shifted.copy_(x)
    found["rows padded by 64"] = inside(samples, width + 64)[:, :width].copy_(x)
    found["rows padded by 1"] = inside(samples, width + 1)[:, :width].copy_(x)
    found["every second row"] = inside(2 * samples, width)[::2].copy_(x)
    found["every second column"] = inside(samples, 2 * width)[:, ::2].copy_(x)
    found["transposed"] = inside(width, samples).t().copy_(x)
    return found


def layout_rows(device: torch.device, plan: Plan, samples: int, width: int) -> list[rows.Row]:
    """Measure the same values in several layouts, in the same rounds."""
    found: list[rows.Row] = []
    for dtype in _MANTISSA_BITS:
        x, y = (torch.randn(samples, width, device=device).to(dtype) for _ in range(2))
        pairs = {name: (h, layouts(y)[name]) for name, h in layouts(x).items()}
        expected = fadiag_fast.layer_statistics([x], [y])
        # One row repeated without memory of its own: other values, so checked by themselves.
        pairs["expanded"] = (x[:1].expand_as(x), y[:1].expand_as(y))
        repeated = fadiag_fast.layer_statistics(
            [x[:1].repeat(samples, 1)], [y[:1].repeat(samples, 1)]
        )
        variants: dict[str, Run] = {}
        same: dict[str, bool] = {}
        close: dict[str, float] = {}
        for name, (h, g) in pairs.items():
            got = fadiag_fast.layer_statistics([h], [g])
            right = repeated if name == "expanded" else expected
            same[name] = _same(got, right)
            close[name] = max(
                float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))
                for a, b in zip(_figures(got), _figures(right), strict=True)
            )
            variants[name] = lambda h=h, g=g: fadiag_fast.layer_statistics([h], [g])
        nbytes = x.nbytes + y.nbytes
        timings = measure(variants, device, plan, choose_cache(nbytes, device))
        for timing in timings:
            plain = pick(timings, "contiguous", timing.mode)
            right = close[timing.variant] < 1e-6
            found.append(
                {
                    "workload": f"layout L1 N{samples} D{width} {_NAMES[dtype]}",
                    **timing.columns(),
                    "bytes": nbytes,
                    "tb_per_s": ceilings.bandwidth(nbytes, timing),
                    # No target: what a layout costs is a figure to know, that it is right is not.
                    "value": round(timing.median_us / plain.median_us, 4),
                    "verdict": "met" if right else "missed: wrong figures",
                    "same_bits": int(same[timing.variant]),
                }
            )
        release(device)
    return found


def run(device: torch.device, results: Path, quick: bool = False) -> Path:
    """Measure all of it; write and return the CSV."""
    on_gpu = device.type == "cuda"
    # The GPU's are far beyond its L2; a CPU's beyond its last level, and quick to make.
    samples, width = (512, 262144) if on_gpu else (64, 262144 // (8 if quick else 1))
    plan = Plan(5, 2.0, 0.5e-3) if quick else Plan(100, 20.0)
    where = rows.environment(device)
    path = rows.results_path(results, "special", device, quick)
    found: list[rows.Row] = []
    parts: list[Callable[[], list[rows.Row]]] = [
        lambda: range_rows(device, plan, samples, width),
        lambda: layout_rows(device, plan, samples, width),
        lambda: bits_rows(device, 1000 if on_gpu and not quick else 20 if quick else 100),
        lambda: large_rows(device, plan),
    ]
    for part in parts:
        found += part()
        release(device)
        synchronize(device)
        rows.write(path, [{**row, **where} for row in found])
    return path
