"""What a capture costs beside the passes that it cannot do without.

The yardstick is one forward pass plus one backward pass from the loss to the first observed state,
without gradients of parameters: the same network, batch and loss, written in plain PyTorch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fadiag_fast import CompiledProbe
from fadiag_fast.capture import Probe, untouched
from fadiag_fast.capture.statistics import reduce_captured

from . import rows
from .timing import Plan, measure, pick
from .vision import import_torchvision

BASELINE = "forward+backward"


@dataclass(frozen=True)
class _Network:
    name: str
    architecture: str
    batch: int
    pixels: int
    dtype: torch.dtype
    inductor: bool  # whether to compile it, which takes most of the run's time


def _networks(device: torch.device, quick: bool) -> list[_Network]:
    if device.type != "cuda" or quick:
        return [_Network("ResNet-18, 8×3×64², float32", "resnet18", 8, 64, torch.float32, False)]
    return [
        _Network(f"{name}, 128×3×224², {label}", architecture, 128, 224, dtype, inductor)
        for name, architecture in (("ResNet-50", "resnet50"), ("ViT-B/16", "vit_b_16"))
        for label, dtype, inductor in (
            ("float32 (TF32)", torch.float32, False),
            ("bfloat16", torch.bfloat16, True),
        )
    ]


def plain(model: nn.Module, first: str, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    """Return the yardstick: the gradient of the loss at the input of module ``first``."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    block = model.get_submodule(first)

    def run() -> Any:
        seen: list[torch.Tensor] = []

        def begin(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            seen.append(args[0].detach().requires_grad_())
            return (seen[0], *args[1:])

        handle = block.register_forward_pre_hook(begin)
        try:
            loss = nn.functional.cross_entropy(model(x), y)
        finally:
            handle.remove()
        return torch.autograd.grad(loss, seen)

    return run


def run(device: torch.device, results: Path, quick: bool, compiled: bool = True) -> Path:
    """Time the captures against the yardstick, interleaved; write the ratios."""
    models = import_torchvision().models
    torch.set_float32_matmul_precision("high")
    plan = Plan(repetitions=10 if quick else 100, sample_s=0.0, budget_s=8.0, graphs=False)
    written = []
    here = rows.environment(device)
    for network in _networks(device, quick):
        torch.manual_seed(0)
        model = getattr(models, network.architecture)().to(device, network.dtype).eval()
        shape = (network.batch, 3, network.pixels, network.pixels)
        x = torch.randn(shape, device=device, dtype=network.dtype)
        y = torch.randint(0, 1000, (network.batch,), device=device)
        with untouched(model):
            variants = _variants(model, x, y, network.inductor and compiled)
            timings = measure(variants, device, plan)
            baseline = pick(timings, BASELINE).median_us
            for timing in timings:
                written.append(
                    {
                        "network": network.name,
                        **timing.columns(),
                        "ratio": round(timing.median_us / baseline, 4),
                        **here,
                    }
                )
        del variants, model
    # A run without compilation keeps the rows of an earlier one's compiled variants.
    path = rows.results_path(results, "capture", device, quick)
    return rows.write(path, written, replace="variant")


def _variants(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, inductor: bool
) -> Mapping[str, Callable[[], Any]]:
    by_func = Probe(model, path="torch.func")
    by_autograd = Probe(model, path="autograd")
    for probe in (by_func, by_autograd):
        probe.prepare(x)
    first = by_func.taps.points[0].module
    variants: dict[str, Callable[[], Any]] = {
        "capture, torch.func": lambda: by_func.capture(x, y),
        "capture, autograd": lambda: by_autograd.capture(x, y),
        "capture, autograd, and statistics": lambda: reduce_captured(by_autograd.capture(x, y)),
        "CompiledProbe, traced": _compiled(model, x, y, None, False),
    }
    on_gpu = x.device.type == "cuda"
    if on_gpu:
        variants["CompiledProbe, traced, CUDA graph"] = _compiled(model, x, y, None, True)
    if inductor:
        variants["CompiledProbe, inductor"] = _compiled(model, x, y, "inductor", False)
        variants["CompiledProbe, inductor, CUDA graph"] = _compiled(model, x, y, "inductor", on_gpu)
    return {BASELINE: plain(model, first, x, y), **variants}


def _compiled(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, backend: str | None, graph: bool
) -> Callable[[], Any]:
    probe = CompiledProbe(model, backend=backend, graph=graph)
    return lambda: probe(x, y)
