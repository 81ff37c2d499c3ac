"""Claim: networks that no one here wrote are observed without help, with the right figures.

Random weights and small inputs. The oracle shares no code with the package: forward hooks on the
named modules, and ``torch.autograd.grad``, in float64. Both ways of capturing are compared with it,
the one taken by default and the one through ``torch.func``. The oracle in float32 is the ordinary
forward and backward pass that a capture's time is compared with.
"""

import copy
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fadiag_fast import DiagnosticReport, TapError, diagnose
from fadiag_fast.capture import Probe, untouched

from . import rows
from .timing import Plan, measure, pick
from .vision import import_torchvision

Batch = tuple[Any, Tensor]
Place = tuple[str, str, int]  # module, "input" or "output", which of its calls

CLASSES = 10
TOKENS = 101
# (c) asks for eight batches. The oracle's batch is small, since it is float64.
BATCHES, SAMPLES, ORACLE_SAMPLES = 8, 16, 4


@dataclass(frozen=True)
class Architecture:
    """One network to observe.

    Attributes:
        name: ``LIBRARY:NAME``.
        build: makes it, from torch's random state.
        batch: samples → (x, y), from torch's random state.
        input: what a batch holds, in words.
        options: for the probe and ``diagnose``, where the automatic choice is not enough.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    input: str
    options: dict[str, Any] = field(default_factory=dict)


# ---- what is built


def _images(size: int, samples: int) -> Batch:
    return torch.randn(samples, 3, size, size), torch.randint(0, CLASSES, (samples,))


def _text(length: int, per_token: bool, decoder: bool, samples: int) -> Batch:
    x = {"input_ids": torch.randint(2, TOKENS, (samples, length))}
    if decoder:
        x["decoder_input_ids"] = torch.randint(2, TOKENS, (samples, length))
    classes, shape = (TOKENS, (samples, length)) if per_token else (CLASSES, (samples,))
    return x, torch.randint(0, classes, shape)


def _sound(length: int, samples: int) -> Batch:
    return {"input_values": torch.randn(samples, length)}, torch.randint(0, CLASSES, (samples,))


def _torchvision(name: str, size: int = 64, **options: Any) -> Architecture:
    def build() -> nn.Module:
        models = import_torchvision().models
        if name == "maxvit_t":
            # Its own sizes, but windows that fit small images.
            return models.MaxVit(
                input_size=(size, size),
                stem_channels=64,
                partition_size=2,
                block_channels=[64, 128, 256, 512],
                block_layers=[2, 2, 5, 2],
                head_dim=32,
                stochastic_depth_prob=0.2,
                num_classes=CLASSES,
            )
        return models.get_model(name, weights=None, num_classes=CLASSES, **options)

    return Architecture(f"torchvision:{name}", build, partial(_images, size), f"3×{size}²")


def _timm(name: str, size: int = 64, **options: Any) -> Architecture:
    def build() -> nn.Module:
        import_torchvision()
        import timm

        return timm.create_model(name, num_classes=CLASSES, **options)

    return Architecture(f"timm:{name}", build, partial(_images, size), f"3×{size}²")


# Small, but with several heads, layers and, where there are any, experts.
_SIZES = {
    "vocab_size": TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "num_labels": CLASSES,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}


def _transformers(
    model: str,
    config: dict[str, Any],
    batch: Callable[[int], Batch] | None = None,
    what: str = "",
    **options: Any,
) -> Architecture:
    def build() -> nn.Module:
        import_torchvision()
        import transformers

        transformers.logging.set_verbosity_error()
        kind = getattr(transformers, model)
        return kind(kind.config_class(**config))

    causal = model.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration"))
    default = partial(_text, 16, causal or "Token" in model, "Conditional" in model)
    return Architecture(
        f"transformers:{model}", build, batch or default, what or "16 tokens", options
    )


ARCHITECTURES: tuple[Architecture, ...] = (
    _torchvision("resnet18"),
    _torchvision("resnet50"),
    _torchvision("convnext_tiny"),
    _torchvision("swin_t"),
    _torchvision("vit_b_16", image_size=64),
    _torchvision("efficientnet_b0"),
    _torchvision("efficientnet_v2_s"),
    _torchvision("densenet121"),
    _torchvision("mobilenet_v3_large"),
    _torchvision("mobilenet_v3_small"),
    _torchvision("maxvit_t"),
    _torchvision("googlenet", init_weights=True, aux_logits=False),
    _timm("mixer_s16_224", img_size=64),
    _timm("hiera_tiny_224", img_size=64),
    _timm("regnety_002"),
    _timm("eva02_tiny_patch14_224", 56, img_size=56),
    _timm("cait_xxs24_224", img_size=64),
    _timm("convmixer_768_32"),
    _timm("poolformer_s12"),
    _timm("levit_128s", img_size=64),
    _timm("coatnet_nano_rw_224", img_size=64),
    _timm("gmlp_ti16_224", img_size=64),
    _timm("resmlp_12_224", img_size=64),
    _timm("swinv2_cr_tiny_224", img_size=64, window_size=2),
    _timm("mobilevit_xxs"),
    _timm("edgenext_xx_small"),
    _timm("pvt_v2_b0"),
    _timm("xcit_nano_12_p16_224", img_size=64),
    _timm("davit_tiny"),
    _timm("efficientformer_l1", 224),
    _timm("mambaout_femto"),
    _timm("nf_resnet50"),
    _timm("sequencer2d_s", img_size=64),
    _timm("crossvit_tiny_240", 240),
    _transformers(
        "GPT2LMHeadModel",
        {
            "vocab_size": TOKENS,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    _transformers("BertForSequenceClassification", _SIZES),
    _transformers("LlamaForCausalLM", _GROUPED),
    _transformers(
        "MambaForCausalLM",
        {"vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 8},
    ),
    _transformers(
        "T5ForTokenClassification",
        {
            "vocab_size": TOKENS,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 4,
            "num_heads": 4,
            "num_labels": TOKENS,
        },
    ),
    # The grouped matrix product of the default experts has no float64.
    _transformers(
        "MixtralForCausalLM",
        {**_GROUPED, "num_local_experts": 4, "experts_implementation": "eager"},
    ),
    _transformers("AlbertForSequenceClassification", {**_SIZES, "embedding_size": 16}),
    _transformers(
        "BloomForCausalLM", {"vocab_size": TOKENS, "hidden_size": 32, "n_layer": 4, "n_head": 4}
    ),
    _transformers(
        "JambaForCausalLM",
        {
            **_GROUPED,
            "num_experts": 2,
            "mamba_d_state": 8,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "experts_implementation": "eager",
        },
    ),
    _transformers(
        "BartForConditionalGeneration",
        {
            "vocab_size": TOKENS,
            "d_model": 32,
            "encoder_layers": 4,
            "decoder_layers": 4,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 64,
        },
    ),
    _transformers(
        "XLNetForSequenceClassification",
        {
            "vocab_size": TOKENS,
            "d_model": 32,
            "n_layer": 4,
            "n_head": 4,
            "d_inner": 64,
            "num_labels": CLASSES,
        },
        batch_dim=1,
    ),
    _transformers(
        "Wav2Vec2ForSequenceClassification",
        {
            **_SIZES,
            "conv_dim": (16, 16, 16),
            "conv_stride": (5, 2, 2),
            "conv_kernel": (10, 3, 3),
            "num_feat_extract_layers": 3,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        partial(_sound, 2000),
        "2000 samples of sound",
    ),
)


def built(architecture: Architecture, seed: int = 0) -> nn.Module:
    """Return the network with random weights, in eval mode; the caller's random state is kept.

    Batch norms have the running figures of one batch: with those that they are made with, the
    signal would grow or fade as it never does in training.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture.build().eval()
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train()
            norm.momentum = None  # the plain average over batches, of one
        if norms:
            with torch.no_grad():
                model(architecture.batch(SAMPLES)[0])
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
    return model


def batches(architecture: Architecture, count: int, samples: int, seed: int = 1) -> list[Batch]:
    """Return random batches; the caller's random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [architecture.batch(samples) for _ in range(count)]


# ---- the oracle


def _first_floating(values: Sequence[Any]) -> Tensor:
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        if isinstance(value, tuple | list):
            return _first_floating(value)
    raise ValueError("expected a floating tensor, got none")


def plain_loss(output: Any, y: Tensor) -> Tensor:
    """Return the mean cross-entropy over samples or tokens."""
    logits = output if isinstance(output, Tensor) else output.logits
    return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))


def by_hooks(
    model: nn.Module, x: Any, y: Tensor, places: Sequence[Place]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the states at named places and the loss's gradients at them, by ordinary autograd."""
    found: dict[Place, Tensor] = {}
    versions: dict[Place, int] = {}
    counts: dict[str, int] = {}

    def keep(name: str, at: str, state: Tensor) -> None:
        place = (name, at, counts[name])
        if place in places:
            found[place], versions[place] = state, state._version

    def before(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counts[name] = counts.get(name, -1) + 1
        keep(name, "input", _first_floating([*args, kwargs.get("hidden_states"), *kwargs.values()]))

    def after(name: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        values = output if isinstance(output, tuple | list) else [output]
        keep(name, "output", _first_floating(values))

    handles = []
    for name in dict.fromkeys(name for name, _, _ in places):
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(after, name)))
    try:
        loss = plain_loss(model(**x) if isinstance(x, dict) else model(x), y)
    finally:
        for handle in handles:
            handle.remove()
    if any(found[place]._version != versions[place] for place in places):
        raise RuntimeError("a state was overwritten in place: the hooks cannot see it")
    states = [found[place] for place in places]
    return [h.detach() for h in states], list(torch.autograd.grad(loss, states))


def in_float64(model: nn.Module, x: Any) -> tuple[nn.Module, Any]:
    """Return a copy of a model and a batch, both in float64."""
    wide = copy.deepcopy(model).double()
    values = x.items() if isinstance(x, dict) else [("x", x)]
    found = {name: v.double() if v.is_floating_point() else v for name, v in values}
    return wide, found if isinstance(x, dict) else found["x"]


def without_in_place(model: nn.Module) -> nn.Module:
    """Return a copy whose activations write into no state that a hook holds."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False
    return model


def relative_difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of any element over its tensor's largest element."""
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        scale = float(b.abs().max())
        difference = float((a - b).abs().max()) / scale if scale else float((a - b).abs().max())
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst


# ---- rows


@dataclass(frozen=True)
class Observation:
    """What a capture of one float64 batch came to.

    Attributes:
        probe: as the package sets it up by default.
        places: where it looked.
        difference: of its figures to the oracle's.
        func_difference: of the figures through torch.func; NaN where it refuses, and
            ``func_reason`` says why.
    """

    probe: Probe
    places: list[Place]
    difference: float
    func_difference: float
    func_reason: str


def observe(architecture: Architecture) -> Observation:
    """Capture one batch, both ways, and compare it with the oracle."""
    model = built(architecture)
    ((x, y),) = batches(architecture, 1, ORACLE_SAMPLES)
    model, x = in_float64(model, x)
    dim = architecture.options.get("batch_dim", 0)
    reason = ""
    with untouched(model):
        probe = Probe(model, **architecture.options)
        found = [probe.capture(x, y)]
        try:
            found.append(Probe(model, path="torch.func", **architecture.options).capture(x, y))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
    places = [(tap.module, tap.at, tap.call) for tap in probe.taps.points]
    hiddens, grads = by_hooks(without_in_place(model), x, y, places)
    expected = [tensor.movedim(dim, 0) for tensor in (*hiddens, *grads)]
    differences = [relative_difference([*f.hiddens, *f.grads], expected) for f in found]
    return Observation(probe, places, differences[0], (*differences, math.nan)[1], reason)


def times(architecture: Architecture, places: Sequence[Place], plan: Plan) -> rows.Row:
    """Time a capture against an ordinary forward and backward pass to the same states."""
    model = built(architecture)
    ((x, y),) = batches(architecture, 1, SAMPLES)
    with untouched(model):
        probe = Probe(model, **architecture.options)
        probe.capture(x, y)
        found = measure(
            {
                "capture": lambda: probe.capture(x, y),
                "plain": lambda: by_hooks(model, x, y, places),
            },
            torch.device("cpu"),
            plan,
        )
    mine, plain = pick(found, "capture"), pick(found, "plain")
    return {
        "capture_us": round(mine.median_us, 1),
        "plain_us": round(plain.median_us, 1),
        "plain_p10_us": round(plain.p10_us, 1),
        "plain_p90_us": round(plain.p90_us, 1),
        "repetitions": mine.repetitions,
        "ratio": round(mine.median_us / plain.median_us, 3),
        "time_note": mine.note or plain.note,
    }


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else output.logits
    return logits.reshape(-1, logits.shape[-1])


def explanation(
    model: nn.Module, given: Sequence[Batch], report: DiagnosticReport, options: dict[str, Any]
) -> str:
    """Say why a network that was never trained is not trustworthy, by trying it."""
    heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if report["b"].fired and heads and not heads[-1].weight.any():
        return "its head starts at zero, so that no gradient passes"
    if report["c"].fired:
        with torch.no_grad():
            outputs = [model(**x) if isinstance(x, dict) else model(x) for x, _ in given]
        mean = torch.cat([_logits(output) for output in outputs]).mean(0)

        def stability(change: Callable[[Tensor], Tensor]) -> float:
            def loss(output: Any, y: Tensor) -> Tensor:
                return nn.functional.cross_entropy(change(_logits(output)), y.reshape(-1))

            return diagnose(model, given, loss=loss, **options)["c"].value or 0.0

        return (
            f"the cosine is {stability(lambda z: z - mean):.2f} without the logits' mean over the "
            f"inputs, {stability(lambda z: 0.1 * z):.2f} with logits of a tenth"
        )
    return report["a"].evidence if report["a"].fired else ""


def row_of(architecture: Architecture, plan: Plan) -> rows.Row:
    """Observe, judge and time one network; a failure is a row with its error."""
    library, _, _ = architecture.name.partition(":")
    row: rows.Row = {
        "workload": architecture.name,
        "library": f"{library} {importlib.metadata.version(library)}",
        "input": architecture.input,
        "options": ", ".join(f"{key}={value}" for key, value in architecture.options.items()),
        "error": "",
    }
    try:
        seen = observe(architecture)
    except TapError as error:
        return {**row, "error": " ".join(str(error).split())[:300]}
    probe, taps = seen.probe, seen.probe.taps
    model, given = built(architecture), batches(architecture, BATCHES, SAMPLES, 2)
    report = diagnose(model, given, **architecture.options)
    return {
        **row,
        "parameters": sum(p.numel() for p in probe.model.parameters()),
        "chosen": taps.chosen,
        "asked": taps.asked,
        "saw": taps.asked - len(taps.unseen),
        "states": len(taps.points),
        "path": probe.path,
        "path_reason": probe.path_reason,
        "difference": seen.difference,
        "func_difference": seen.func_difference,
        "func_reason": seen.func_reason,
        "growth": report["a"].value,
        "grad_norm": report["b"].value,
        "credit_gain": report.credit_gains[-1],
        "stability": report["c"].value,
        "verdict": report.verdict,
        "why": explanation(model, given, report, architecture.options),
        **times(architecture, seen.places, plan),
    }


def run(device: torch.device, results: Path, quick: bool = False, only: str = "") -> Path:
    """Measure all architectures, or those whose name contains ``only``, on the CPU."""
    cpu = torch.device("cpu")
    plan = Plan(3, 2.0) if quick else Plan(30, 5.0)
    chosen = [architecture for architecture in ARCHITECTURES if only in architecture.name]
    path = rows.results_path(results, "architectures", cpu, quick)
    where = rows.environment(cpu)
    for architecture in chosen:
        row = {**row_of(architecture, plan), **where}
        rows.write(path, [row], replace="workload")
        said = row["error"] or f"{row['chosen']}, {row['difference']:.1e}, {row['verdict']}"
        print(f"{architecture.name}: {said}, ratio {row.get('ratio', '–')}", flush=True)
    return path
