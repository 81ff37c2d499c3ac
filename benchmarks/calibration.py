"""Claim: the calibrated protocol fires on no healthy network, and passes no broken one.

Healthy cases are networks trained by backpropagation at every stage, from the first step to far
past zero training error, and random weights of the zoo's and of other people's networks. Broken
ones are constructed, each with a cause that is known. Every case is captured once, and its figures
are judged by both protocols. A false alarm is a healthy case with ``needs walk-back``; a miss is a
broken one with ``trustworthy``. A broken case that comes out as ``not enough data`` is no miss: its
figures are refused with the reason.

No limit was fitted to these cases: 50 and the gain's floor are the published ones, and the limit on
total growth is the floor's inverse. The column ``half`` splits the cases for whoever wants to fit.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fadiag_fast import DiagnosticReport, diagnose
from fadiag_fast.protocol import DiagnosticThresholds, growth_ratios, verdict_of
from fadiag_fast.protocol.calibrated import state_scales
from fadiag_fast.protocol.explanations import find_causes
from fadiag_fast.protocol.judging import judge_figures
from fadiag_fast.zoo import build_model, load_dataset, model_spec, train

from . import architectures, rows

Batches = list[tuple[Any, Tensor]]

# Batches of 128 as published; sizes from 8 to 4,096, as far as 8,000 images go.
_BATCH_SIZES = (8, 32, 128, 512, 1024, 4096)
_LOSS_SCALES = (1e-6, 1e6)
LIMITS = DiagnosticThresholds()


@dataclass(frozen=True)
class Case:
    """One network with what it is probed by.

    Attributes:
        name: unique.
        healthy: what it is known to be.
        family: the stage of training, or the cause of the failure.
        model: built when the case's turn comes.
        batches: likewise.
        batch_size: samples of a batch.
        dtype: of weights and inputs.
        loss_scale: factor of the mean cross-entropy.
        total: whether the loss sums over the batch.
        options: for ``diagnose``.
    """

    name: str
    healthy: bool
    family: str
    model: Callable[[], nn.Module]
    batches: Callable[[int], Batches]
    batch_size: int = 128
    dtype: torch.dtype = torch.float32
    loss_scale: float = 1.0
    total: bool = False
    options: dict[str, Any] = field(default_factory=dict)


# ---- networks


class LinearBranch(nn.Module):
    """Return ``rate · h``: with the skip a block that multiplies its state by 1 + rate."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(float(rate)))

    def forward(self, h: Tensor) -> Tensor:
        return self.rate * h


class ReluLayer(nn.Module):
    """Return ``relu(W h + b) − h``: with the skip a plain layer without one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.kaiming_normal_(self.linear.weight)

    def forward(self, h: Tensor) -> Tensor:
        return torch.relu(self.linear(h)) - h


class Chain(nn.Module):
    """A network of the residual contract with blocks of one's own."""

    def __init__(
        self, blocks: Sequence[nn.Module], width: int, inputs: int = 784, norm: bool = True
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(blocks)
        if norm:
            self.out_ln = nn.LayerNorm(width)
        self.out_head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        h = self.out_ln(h) if hasattr(self, "out_ln") else h
        return cast(Tensor, self.out_head(h))


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build from a seed, leaving torch's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def slow_explosion(depth: int, rate: float, norm: bool = True) -> nn.Module:
    """Return a network each of whose blocks multiplies its state by 1 + rate."""
    return seeded(lambda: Chain([LinearBranch(rate) for _ in range(depth)], 64, norm=norm))


def plain_relu(depth: int, dead: int | None = None) -> nn.Module:
    """Return a plain network of ReLU layers; ``dead`` has a bias that nothing gets over."""
    model = seeded(lambda: Chain([ReluLayer(64) for _ in range(depth)], 64, norm=False))
    if dead is not None:
        with torch.no_grad():
            model.get_parameter(f"blocks.{dead}.linear.bias").fill_(-1e4)
    return model


def grown(model: nn.Module, block: int, factor: float) -> nn.Module:
    """Return a copy in which one residual block's branch is larger by a factor."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        last = list(copied.get_submodule(f"blocks.{block}").parameters())[-2:]
        for parameter in last:
            parameter.mul_(factor)
    return copied


def same_everywhere(model: nn.Module, block: int, scale: float) -> nn.Module:
    """Return a copy whose block adds one huge vector to every sample's state."""
    copied = copy.deepcopy(model)
    bias = list(copied.get_submodule(f"blocks.{block}").parameters())[-1]
    with torch.no_grad():
        bias.copy_(torch.linspace(-scale, scale, bias.numel()))
    return copied


def poisoned(model: nn.Module, name: str, value: float) -> nn.Module:
    """Return a copy with one weight that is not finite."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.get_parameter(name).view(-1)[0] = value
    return copied


def faint_head(model: nn.Module, factor: float) -> nn.Module:
    """Return a copy whose head passes little back."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.get_parameter("out_head.weight").mul_(factor)
    return copied


# ---- training by backpropagation, with checkpoints on the way


def stages(
    model: nn.Module, images: Tensor, labels: Tensor, steps: Sequence[int], batch: int = 128
) -> Iterator[tuple[int, nn.Module]]:
    """Train by backpropagation and yield copies at the given steps, 0 first if it is among them.

    AdamW as the protocol trains, at a constant rate, so that one run serves all stages.
    """
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(max(steps) + 1):
        if step in steps:
            yield step, copy.deepcopy(model).eval()
        chosen = torch.randint(0, len(images), (batch,), generator=generator)
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()


# ---- cases


class _Data:
    """The shipped images, test images first: batches are cut from their start."""

    def __init__(self) -> None:
        self.set = load_dataset("fashion-mnist-mini")
        self.images = torch.cat([self.set.test_images, self.set.train_images])
        self.labels = torch.cat([self.set.test_labels, self.set.train_labels])

    def cut(self, images: Tensor, labels: Tensor, size: int) -> Batches:
        count = min(10, len(images) // size)
        if count == 0:
            size, count = len(images), 1
        pairs = zip(images[: size * count].split(size), labels.split(size), strict=False)
        return list(pairs)

    def flat(self, size: int) -> Batches:
        return self.cut(self.images.flatten(1), self.labels, size)

    def maps(self, size: int) -> Batches:
        return self.cut(self.images, self.labels, size)

    def one_class(self, size: int) -> Batches:
        return [(x, torch.zeros_like(y)) for x, y in self.flat(size)]


def _given(model: nn.Module) -> Callable[[], nn.Module]:
    return lambda: model


def _varied(case: Case, quick: bool, sizes: Sequence[int] = _BATCH_SIZES) -> Iterator[Case]:
    """Yield a case in several batch sizes, dtypes and loss scales: one such change at a time."""
    for size in (8, 128) if quick else sizes:
        yield replace(case, name=f"{case.name}, B={size}", batch_size=size)
    name = f"{case.name}, B=128"
    yield replace(case, name=f"{name}, bf16", dtype=torch.bfloat16)
    if not quick:
        yield replace(case, name=f"{name}, sum", total=True)
        for scale in _LOSS_SCALES:
            yield replace(case, name=f"{name}, loss ×{scale:g}", loss_scale=scale)


def _zoo(name: str, data: _Data, seed: int = 0, **options: Any) -> nn.Module:
    shape, classes = data.set.input_shape, data.set.num_classes
    return build_model(name, input_shape=shape, num_classes=classes, seed=seed, **options).eval()


def healthy_cases(data: _Data, quick: bool) -> Iterator[Case]:
    """Yield networks that nothing is wrong with."""
    flat = data.set.train_images.flatten(1)
    labels = data.set.train_labels

    # Every stage of training, two depths.
    for depth in (4,) if quick else (4, 16):
        model = _zoo("resmlp", data, d_hidden=64 if quick else 256, num_blocks=depth)
        when = (0, 20) if quick else (0, 10, 50, 200, 800)
        for step, stage in stages(model, flat, labels, when):
            name = f"BP, {depth} blocks, step {step}"
            yield from _varied(Case(name, True, "BP in training", _given(stage), data.flat), quick)

    # Far past zero training error, judged on the very images it has learned and on others; and
    # labels that cannot be learned but by heart.
    noisy = labels.clone()
    noisy[::2] = torch.randint(
        0, 10, (len(noisy[::2]),), generator=torch.Generator().manual_seed(1)
    )
    for family, given in (("BP past zero error", labels), ("BP on half noise", noisy)):
        count = 128 if quick else 512
        model = _zoo("resmlp", data, d_hidden=64 if quick else 256, num_blocks=4)
        when = (150,) if quick else (300, 1000, 3000)
        for step, stage in stages(model, flat[:count], given[:count], when):

            def seen(size: int, y: Tensor = given, count: int = count) -> Batches:
                return data.cut(flat[:count], y[:count], min(size, count // 8))

            for where, cut in (("its training images", seen), ("test images", data.flat)):
                name = f"{family}, step {step}, {where}"
                case = Case(name, True, family, _given(stage), cut)
                yield from _varied(case, quick, (8, 128, 1024))

    # Widths and depths: at random, and after some steps.
    widths = (64,) if quick else (64, 256, 1024, 2048)
    for width in widths:
        for depth in (2, 16) if quick else (2, 4, 16, 64):
            if width * depth > 32_768:
                continue
            model = _zoo("resmlp", data, d_hidden=width, num_blocks=depth)
            trained = width * depth <= 4096 and not quick
            for step, stage in stages(model, flat, labels, (0, 100) if trained else (0,)):
                case = Case(
                    f"BP, width {width}, {depth} blocks, step {step}",
                    True,
                    "widths and depths",
                    _given(stage),
                    data.flat,
                )
                yield replace(case, name=f"{case.name}, B=128")
                if width <= 256:
                    yield replace(case, name=f"{case.name}, bf16", dtype=torch.bfloat16)
                    yield replace(case, name=f"{case.name}, B=8", batch_size=8)

    # The zoo's other networks, at random and after some steps.
    others: list[tuple[str, dict[str, Any]]] = [
        ("student", {}),
        ("vit-mini", {"d_hidden": 32, "num_blocks": 2}),
        ("smallcnn", {"channels": (4, 8, 16)}),
    ]
    if not quick:
        others += [
            ("student", {"num_blocks": 16}),
            ("vit-mini", {"d_hidden": 64, "num_blocks": 8, "patch_size": 7}),
            ("smallcnn", {"channels": (16, 32, 64)}),
        ]
    for name, options in others:
        model = _zoo(name, data, **options)
        vectors = model_spec(name).flatten_input
        images = flat if vectors else data.set.train_images
        for step, stage in stages(model, images, labels, (0,) if quick else (0, 60)):
            cut = data.flat if vectors else data.maps
            shown = " ".join(f"{key}={value}" for key, value in options.items())
            case = Case(f"{name} {shown}, step {step}", True, "zoo", _given(stage), cut)
            if quick:
                yield replace(case, name=f"{case.name}, B=16", batch_size=16)
            else:
                yield from _varied(case, quick, (8, 128))
            if name == "vit-mini":
                yield replace(
                    case,
                    name=f"{case.name}, class token",
                    batch_size=32,
                    options={"reduction": "cls"},
                )
    if quick:
        return

    # Other people's networks at random weights.
    for network in architectures.ARCHITECTURES:
        if not network.name.startswith(("torchvision:", "timm:")):
            continue

        def drawn(size: int, network: architectures.Architecture = network) -> Batches:
            return architectures.batches(network, 8, size)

        def built(network: architectures.Architecture = network) -> nn.Module:
            return architectures.built(network).eval()

        yield Case(
            f"{network.name}, random weights",
            True,
            "random weights of others",
            built,
            drawn,
            batch_size=8,
            options=network.options,
        )


def broken_cases(data: _Data, quick: bool) -> Iterator[Case]:
    """Yield networks with a known fault."""
    flat = data.set.train_images.flatten(1)
    labels = data.set.train_labels
    width, steps = (64, 20) if quick else (256, 300)
    base = dict(stages(_zoo("resmlp", data, d_hidden=width), flat, labels, (steps,)))[steps]
    bf16, fp16 = torch.bfloat16, torch.float16

    def case(name: str, family: str, model: nn.Module, **changes: Any) -> Case:
        return Case(
            name, False, family, _given(model), changes.pop("batches", data.flat), **changes
        )

    # The stream inflated by one block, under the terminal norm.
    family = "residual growth"
    for block in (0,) if quick else (0, 1, 3):
        for factor in (1e4, 1e9) if quick else (1e3, 1e4, 1e6, 1e9, 1e12):
            model = grown(base, block, factor)
            name = f"branch {block} ×{factor:g}"
            yield case(name, family, model)
            if not quick:
                yield case(f"{name}, bf16", family, model, dtype=bf16)
                yield case(f"{name}, B=8", family, model, batch_size=8)
                yield case(f"{name}, B=1024, sum", family, model, batch_size=1024, total=True)
    # No block grows by 50, but all together do.
    for depth, rate in ((64, 0.3),) if quick else ((64, 0.3), (64, 0.2), (32, 1.0), (8, 4.0)):
        for norm in (True, False):
            what = "with" if norm else "without"
            name = f"{depth} blocks ×{1 + rate:g}, {what} terminal norm"
            yield case(name, "slow growth", slow_explosion(depth, rate, norm))

    # A dtype that cannot hold the gradients.
    for scale in (1e-6,) if quick else (1e-3, 1e-4, 1e-5, 1e-6, 1e-8):
        yield case(f"fp16, loss ×{scale:g}", "underflow", base, dtype=fp16, loss_scale=scale)
    for factor in (1e-5,) if quick else (1e-4, 1e-5, 1e-6):
        # A head of 1e-4 underflows only behind the mean over a large batch.
        large = (1024, 2048) if factor == 1e-4 else (128, 512, 1024)
        for size in (128,) if quick else large:
            model = faint_head(base, factor)
            name = f"fp16, head ×{factor:g}, B={size}"
            yield case(name, "underflow", model, dtype=fp16, batch_size=size)

    # A layer that passes nothing on.
    for depth in (4,) if quick else (4, 8, 16):
        for dead in sorted({0, depth // 2, depth - 1}):
            name = f"plain ReLU, {depth} layers, dead {dead}"
            yield case(name, "dead layer", plain_relu(depth, dead))
            if not quick:
                yield case(f"{name}, bf16", "dead layer", plain_relu(depth, dead), dtype=bf16)

    # Weights that are not finite.
    for name in ("embed.weight", "blocks.1.w1.weight", "blocks.3.w2.weight", "out_head.weight"):
        for value in (math.nan,) if quick else (math.nan, math.inf):
            model = poisoned(base, name, value)
            yield case(f"{name} {value}", "non-finite weights", model)
            if not quick:
                yield case(f"{name} {value}, bf16", "non-finite weights", model, dtype=bf16)

    # One vector for all samples: with labels of one class it drifts, with all classes it is noise.
    for block in (0,) if quick else (0, 1):
        for scale in (1e9,) if quick else (1e5, 1e7, 1e9, 1e11):
            model = same_everywhere(base, block, scale)
            yield case(f"drift, block {block}, {scale:g}", "drift", model, batches=data.one_class)
            yield case(f"noise, block {block}, {scale:g}", "noise", model)
    if quick:
        return

    # Direct feedback alignment with an embedding that stays as it was drawn.
    for width in (128, 256):
        for seed in (42, 123):
            network = train(
                "resmlp",
                "dfa",
                data.set,
                steps=1200,
                seed=seed,
                model_options={"d_hidden": width},
            )
            start = Case(
                f"DFA, width {width}, seed {seed}",
                False,
                "direct feedback alignment",
                _given(network.model.eval()),
                data.flat,
            )
            yield from _varied(start, quick)


# ---- judging


def judge(case: Case) -> DiagnosticReport:
    """Capture a case's figures; the report is the paper protocol's."""
    model = copy.deepcopy(case.model()).to(case.dtype)
    given = [
        (x.to(case.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, y)
        for x, y in case.batches(case.batch_size)
    ]

    def loss(output: Any, y: Tensor) -> Tensor:
        reduction = "sum" if case.total else "mean"
        return nn.functional.cross_entropy(output, y, reduction=reduction) * case.loss_scale

    changed = case.total or case.loss_scale != 1.0
    return diagnose(model, given, loss=loss if changed else None, **case.options)


def row_of(case: Case, index: int) -> rows.Row:
    """Return a case's figures and both verdicts as a row."""
    report = judge(case)
    figures = report.figures
    diagnostics = judge_figures(figures, LIMITS, "calibrated")
    verdict = verdict_of(diagnostics, "calibrated")
    fires = verdict.startswith("needs")
    ratios = [r for r in growth_ratios(figures.residual_norms) if not math.isnan(r)]
    scales = [s for s in state_scales(figures) if math.isfinite(s)]
    wrong = fires if case.healthy else verdict == "trustworthy"
    paper = report.verdict
    causes = find_causes(figures, diagnostics, LIMITS)
    return {
        "workload": case.name,
        "healthy": int(case.healthy),
        "family": case.family,
        "half": "AB"[index % 2],
        "batch_size": figures.batch_size,
        "batches": figures.num_batches,
        "dtype": str(case.dtype).removeprefix("torch."),
        "paper_growth": max(ratios, default=math.nan),
        "grad_norm": figures.bp_grad_norms[-1],
        "stability": report["c"].value,
        "paper_verdict": paper,
        "paper_wrong": int(paper.startswith("needs") if case.healthy else paper == "trustworthy"),
        "growth": diagnostics[0].value,
        "largest_scale": max(scales, default=math.nan),
        "gain": diagnostics[1].value,
        "output_error": figures.output_error,
        "verdict": verdict,
        "wrong": int(wrong),
        "cause": causes[0].split(":")[0] if causes else "",
    }


def cases(quick: bool) -> Iterator[Case]:
    """Yield all cases, healthy ones first."""
    data = _Data()
    yield from healthy_cases(data, quick)
    yield from broken_cases(data, quick)


def run(device: torch.device, results: Path, quick: bool, only: str = "") -> Path:
    """Judge all cases and write a row for each; ``quick`` takes a tenth of them."""
    found = []
    for index, case in enumerate(cases(quick)):
        if only in case.name or only in case.family:
            found.append(row_of(case, index))
    here = rows.environment(device)
    path = rows.results_path(results, "calibration", device, quick)
    return rows.write(path, [{**row, **here} for row in found])
