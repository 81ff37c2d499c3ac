"""The rate of a scan, against a plain loop over the same files in the same run.

The loop is what a script does: ``torch.load``, ``load_state_dict``, a forward pass that keeps the
states, ``torch.autograd.grad``, norms and medians with ``.item()``, cosines with
``F.cosine_similarity``. Files lie in the page cache for both; the scan writes its rows, the loop
keeps its figures in a list.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fadiag_fast.scanning import scan
from fadiag_fast.zoo import build_model

from . import rows

ROUNDS = 3


@dataclass(frozen=True)
class Study:
    """One architecture with the number of its checkpoints and evaluation batches."""

    name: str
    build: Callable[[], nn.Module]
    states: Callable[[Any, Tensor], tuple[list[Tensor], Tensor]]
    shape: tuple[int, ...]
    checkpoints: int
    batches: int
    batch_size: int
    target: float  # times as fast as the loop
    dtype: torch.dtype = torch.float32


def _residual_states(model: Any, x: Tensor) -> tuple[list[Tensor], Tensor]:
    h = model.embed(x)
    hiddens = [h]
    for block in model.blocks:
        h = h + block(h)
        hiddens.append(h)
    return hiddens, model.out_head(model.out_ln(h))


def _cnn_states(model: Any, x: Tensor) -> tuple[list[Tensor], Tensor]:
    hiddens = []
    for index, block in enumerate(model.blocks):
        x = block(x.flatten(1) if index == len(model.blocks) - 1 else x)
        hiddens.append(x)
    return hiddens, model.out_head(x)


def _vit_states(model: Any, x: Tensor) -> tuple[list[Tensor], Tensor]:
    h = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    hiddens = [h]
    for block in model.blocks:
        h = block(h)
        hiddens.append(h)
    return hiddens, model.forward_head(model.norm(h))


def _vit(dtype: torch.dtype) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model("vit_small_patch16_224", num_classes=10)
        return model.to(dtype)

    return build


def studies(device: torch.device, quick: bool) -> list[Study]:
    """Return what is measured on a device."""
    large = device.type == "cuda" and not quick
    image = (3, 32, 32)

    def resmlp() -> nn.Module:
        return build_model("resmlp", input_shape=image, num_classes=10)

    def smallcnn() -> nn.Module:
        return build_model("smallcnn", input_shape=image, num_classes=10)

    few = 8 if quick else 128
    vits = [
        Study(
            f"ViT-S/16 {name}, 4×64", _vit(dtype), _vit_states, (3, 224, 224), 64, 4, 64, 1.5, dtype
        )
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ]
    return [
        Study(
            "ResidualMLP d256 L4, 10×128",
            resmlp,
            _residual_states,
            (3072,),
            1024 if large else few,
            10,
            128,
            30.0 if large else 2.0,
        ),
        Study(
            "SmallCNN, 8×128",
            smallcnn,
            _cnn_states,
            image,
            256 if large else max(4, few // 4),
            8,
            128,
            10.0 if large else 1.3,
        ),
        *(vits if large else []),
    ]


def plain_loop(study: Study, paths: list[Path], batches: list[Any], model: nn.Module) -> list[Any]:
    """Audit checkpoints one after another in plain PyTorch."""
    found = []
    model.eval()
    for path in paths:
        model.load_state_dict(
            torch.load(path, weights_only=True, map_location=batches[0][0].device)
        )
        means: list[list[Tensor]] = []
        norms: list[tuple[float, float, float]] = []
        for index, (x, y) in enumerate(batches):
            hiddens, logits = study.states(model, x)
            grads = torch.autograd.grad(F.cross_entropy(logits, y), [*hiddens, logits])
            if index == 0:
                error = grads[-1].norm(dim=1)
                for h, g in zip(hiddens, grads, strict=False):
                    gn = g.flatten(1).norm(dim=1)
                    norms.append(
                        (
                            h.flatten(1).norm(dim=1).median().item(),
                            gn.median().item(),
                            (gn / error).median().item(),
                        )
                    )
            means.append([g.flatten(1).mean(0) for g in grads[:-1]])
        layer = (len(means[0]) - 1) // 2
        cosines = [
            F.cosine_similarity(means[i][layer], means[j][layer], dim=0).item()
            for i in range(len(means))
            for j in range(i)
        ]
        found.append((norms, sum(cosines) / len(cosines)))
    return found


def _busy(paths: list[Path], model: nn.Module, batches: list[Any]) -> float:
    """Return the share of a scan's wall time in which a kernel ran, from torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as out:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            began = time.perf_counter()
            scan(paths, model, batches, out)
            torch.cuda.synchronize()
            wall = time.perf_counter() - began
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
            and "memcpy" not in event.name.lower()
        )
    covered, last = 0.0, 0.0
    for start, end in spans:
        covered += max(0.0, end - max(start, last))
        last = max(last, end)
    return round(covered / 1e6 / wall, 3)


def run(device: torch.device, results: Path, quick: bool, only: str = "") -> Path:
    """Time loop and scan in turns over the same files, of studies whose name has ``only``."""
    written = []
    here = rows.environment(device)
    chosen = [one for one in studies(device, quick) if only.lower() in one.name.lower()]
    if not chosen:
        raise ValueError(f"scan-rate: no study has {only!r} in its name")
    for study in chosen:
        torch.manual_seed(0)
        template = study.build().to(device)
        batches = [
            (
                torch.randn(study.batch_size, *study.shape, device=device, dtype=study.dtype),
                torch.randint(0, 10, (study.batch_size,), device=device),
            )
            for _ in range(study.batches)
        ]
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for step in range(study.checkpoints):
                path = Path(folder, f"step_{step}.pt")
                torch.manual_seed(step)
                torch.save(study.build().state_dict(), path)
                paths.append(path)
            nbytes = sum(path.stat().st_size for path in paths)
            plain_loop(study, paths[:4], batches, template)  # warm
            times: dict[str, list[float]] = {"plain loop": [], "scan": []}
            stack = 0

            def note(progress: Any) -> None:
                nonlocal stack
                stack = progress.stack

            # The loop takes as long for each: of a large study a part tells.
            some = paths if device.type == "cpu" else paths[:64]
            for _ in range(1 if quick else ROUNDS):
                began = time.perf_counter()
                plain_loop(study, some, batches, template)
                times["plain loop"].append((time.perf_counter() - began) / len(some))
                with tempfile.TemporaryDirectory() as out:
                    began = time.perf_counter()
                    found = scan(paths, template, batches, out, on_progress=note)
                    times["scan"].append((time.perf_counter() - began) / len(paths))
                    assert len(found) == len(paths)
            busy = _busy(paths, template, batches) if device.type == "cuda" else None
            median = {name: sorted(seconds)[len(seconds) // 2] for name, seconds in times.items()}
            for name, seconds in median.items():
                written.append(
                    {
                        "study": study.name,
                        "variant": name,
                        "checkpoints": study.checkpoints,
                        "megabytes": round(nbytes / 1e6, 1),
                        "ms_each": round(1e3 * seconds, 3),
                        "ratio": round(median["plain loop"] / seconds, 2),
                        "target": study.target if name == "scan" else "",
                        "stack": stack if name == "scan" else "",
                        "device_busy": busy if name == "scan" else "",
                        "rounds": len(times[name]),
                        **here,
                    }
                )
        # After each: a run that is cut short leaves what it has.
        path = rows.results_path(results, "scan-rate", device, quick)
        rows.write(path, written, replace="study")
    return path
