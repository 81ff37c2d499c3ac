"""What probing every step adds to a training step: its time, and the peak of device memory.

Every variant trains its own copy of the network, built from the same seed, on one fixed batch.
Blocks of steps of all variants alternate; a variant's figure is the median over the rounds of its
block against the bare step's block of the same round. The device is synchronised at the borders of
a block only. Peak memory is that of a variant alone: what was allocated before its copy was built
is subtracted.

The yardsticks: the same figures from plain PyTorch hooks, Lightning's ``grad_norm`` and W&B's
``watch``. The last two say less (norms or histograms of parameters' gradients), and are run on the
bare step's own copy.
"""

import contextlib
import functools
import gc
import itertools
import math
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fadiag_fast import StepProbe
from fadiag_fast.protocol import middle_layer
from fadiag_fast.zoo import build_model

from . import rows
from .timing import Plan, failed, host_sampler, interleave, synchronize
from .vision import import_torchvision

BARE = "bare step"
PROBE = "StepProbe"
QUIET_PROBE = "StepProbe, alarms=False"
FEW_PROBE = "StepProbe, samples=batch/4"
HOOKS = "plain hooks"
COMPILED_HOOKS = "plain hooks, compiled"
GRAD_NORM = "Lightning grad_norm"
WATCH = "W&B watch"

SOAK = "soak"

# Directions that a step is compared with, and the decay of their average: StepProbe's defaults.
_WINDOW, _DECAY = 8, 0.9
# Past the first steps: compiled, autotuned, and with a full window of directions.
_WARMUPS = 12
# Replays take little, and the alarms have their baseline after so many records.
_GRAPH_WARMUPS = 100
# A block of so many seconds hides the synchronisation at its borders.
_BLOCK_S = 0.3
_MOST_STEPS = 2000
_ROUNDS = 21
# One and the same step, captured again, takes up to 5% more or less: many captures, short blocks.
_GRAPH_BLOCK_S = 0.1
_GRAPH_ROUNDS = 63
# Blocks in a round of what has a target, and of the bare step: it is a percent of what varies by
# several from block to block.
_PAIRS = 3
_BUDGET_S = 90.0
# Less than the smallest object that a step could leave behind.
_GROWTH_PER_STEP = 32


@dataclass(frozen=True)
class Workload:
    """A training step.

    Attributes:
        name: of the row.
        build: the network, on the CPU, in float32.
        batch: returns inputs and targets, on the CPU.
        logits: name of the module that returns the logits.
        compile: whether the network goes through ``torch.compile``.
        autocast: to bfloat16.
        channels_last: the layout of the network and of its inputs.
        graphed: whether the whole step is one CUDA graph.
        samples: a fourth of the batch, where another probe observes only so many; 0 for none.
        percent, microseconds, memory_percent: what the probe may add at most.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Any, Tensor]]
    logits: str
    compile: bool = False
    autocast: bool = False
    channels_last: bool = False
    graphed: bool = False
    samples: int = 0
    percent: float = math.inf
    microseconds: float = math.inf
    memory_percent: float = math.inf

    @property
    def target(self) -> str:
        """The limits in words."""
        said = {
            f"≤ {self.percent:g}%": self.percent,
            f"≤ {self.microseconds:g} µs": self.microseconds,
            f"memory ≤ {self.memory_percent:g}%": self.memory_percent,
        }
        return ", ".join(text for text, limit in said.items() if math.isfinite(limit))


def _images(count: int, pixels: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, pixels, pixels), torch.randint(0, 1000, (count,))


def _vectors() -> tuple[Tensor, Tensor]:
    return torch.randn(128, 3 * 32 * 32), torch.randint(0, 10, (128,))


def _vit(large: bool) -> nn.Module:
    import_torchvision()
    import timm

    small: dict[str, Any] = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2}
    options = {} if large else small
    model: nn.Module = timm.create_model("vit_small_patch16_224", num_classes=1000, **options)
    return model


def _gpt(large: bool) -> nn.Module:
    import_torchvision()
    from transformers import GPT2Config, GPT2LMHeadModel

    small: dict[str, Any] = {
        "n_layer": 2,
        "n_embd": 32,
        "n_head": 2,
        "vocab_size": 128,
        "n_positions": 16,
    }
    # As GPT-2 is pretrained today: without dropout.
    config = GPT2Config(
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
        **({} if large else small),
    )
    model = GPT2LMHeadModel(config)
    # Unset for this class; the loss then logs a warning, at which the compiler breaks the graph.
    model.loss_type = "ForCausalLM"
    return model


def _tokens(large: bool) -> tuple[Any, Tensor]:
    tokens = torch.randint(0, 50257, (16, 1024)) if large else torch.randint(0, 128, (2, 16))
    # The loss of the next token is the network's own, a part of the compiled forward.
    return {"input_ids": tokens, "labels": tokens}, tokens


def _resnet(large: bool) -> nn.Module:
    models = import_torchvision().models
    model: nn.Module = (models.resnet50 if large else models.resnet18)(num_classes=1000)
    return model


def _residual_mlp() -> nn.Module:
    return build_model("resmlp", input_shape=(3, 32, 32), num_classes=10)


def workloads(device: torch.device) -> list[Workload]:
    """Return what is measured on a device; on a CPU small copies that only try the code."""
    large = device.type == "cuda"
    pixels, count = (224, 256) if large else (32, 4)
    images = functools.partial(_images, count, pixels)
    size = f"batch {count}" if large else "tiny"
    tokens = "16×1024 tokens" if large else "tiny"
    mlp = "ResidualMLP d256 L4, batch 128, float32"
    return [
        Workload(
            f"ViT-S/16, {size}, bf16 autocast, torch.compile",
            functools.partial(_vit, large),
            images,
            "head",
            compile=True,
            autocast=True,
            percent=1.0,
            memory_percent=0.5,
        ),
        Workload(
            f"GPT-2 124M, {tokens}, bf16 autocast, torch.compile",
            functools.partial(_gpt, large),
            functools.partial(_tokens, large),
            "lm_head",
            compile=True,
            autocast=True,
            percent=1.0,
            memory_percent=0.5,
        ),
        Workload(
            f"ResNet-50, {size}, channels_last, bf16 autocast, eager",
            functools.partial(_resnet, large),
            images,
            "fc",
            autocast=True,
            channels_last=True,
            samples=count // 4,
            percent=1.5,
            memory_percent=0.5,
        ),
        Workload(f"{mlp}, eager", _residual_mlp, _vectors, "out_head", percent=5.0),
        Workload(
            f"{mlp}, whole step in a CUDA graph",
            _residual_mlp,
            _vectors,
            "out_head",
            graphed=True,
            microseconds=10.0,
        ),
    ]


# --- the same figures in plain PyTorch ---


def _norms(samples: Tensor) -> Tensor:
    """Return the norm of each sample without a wider copy: the quickest that torch has."""
    dims = list(range(1, samples.dim()))
    norms: Tensor = torch.linalg.vector_norm(samples, dim=dims, dtype=torch.float32)
    return norms


def _mean(samples: Tensor) -> Tensor:
    return samples.mean(0, dtype=torch.float32).flatten()


class PlainHooks:
    """Hooks on modules and tensors, as one would write them by hand, without a wait for the device.

    Args:
        model: what is observed, before it is compiled.
        places: per state the module's name and whether its input is the state.
        logits: name of the module that returns the logits.
        hide: keep the hooks out of compiled graphs: the compiler breaks the graph at each.
        reduce: compiles the reductions, or leaves them as they are.

    Attributes:
        rows: the last figures, on the device: medians of norms of states, of gradients and of
            credit gains, of the output error, and the cosines.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Sequence[tuple[str, bool]],
        logits: str,
        hide: bool,
        reduce: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]] = lambda f: f,
    ) -> None:
        self.norms, self.mean = reduce(_norms), reduce(_mean)
        self.middle = middle_layer(len(places))
        self.hidden: dict[int, Tensor] = {}
        self.grads: dict[int, Tensor] = {}
        self.direction: Tensor | None = None
        self.past: Tensor | None = None
        self.average: Tensor | None = None
        self.rows: deque[Tensor] = deque(maxlen=32)
        self.n = len(places)
        kept_out: Callable[[Any], Any] = torch.compiler.disable if hide else lambda hook: hook
        for l, (name, is_input) in enumerate([*places, (logits, False)]):
            module = model.get_submodule(name)
            if is_input:
                module.register_forward_pre_hook(kept_out(functools.partial(self._input, l)))
            else:
                module.register_forward_hook(kept_out(functools.partial(self._output, l)))

    def _input(self, l: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._see(l, args[0])

    def _output(self, l: int, _: nn.Module, args: Any, result: Any) -> None:
        self._see(l, result if isinstance(result, Tensor) else result[0])

    def _see(self, l: int, state: Tensor) -> None:
        if not state.requires_grad:
            return
        if l < self.n:
            with torch.no_grad():
                self.hidden[l] = self.norms(state.detach())
        state.register_hook(functools.partial(self._arrived, l))

    def _arrived(self, l: int, grad: Tensor) -> None:
        with torch.no_grad():
            self.grads[l] = self.norms(grad)
            if l == self.middle:
                self.direction = self.mean(grad)

    @torch.no_grad()
    def step(self) -> None:
        """Put the figures of the step into one row."""
        if self.direction is None:
            raise RuntimeError("no gradient arrived at the middle state")
        hidden = torch.stack([self.hidden[l] for l in range(self.n)])
        grads = torch.stack([self.grads[l] for l in range(self.n)])
        error = self.grads[self.n]
        norms = torch.cat([hidden, grads, grads / error, error[None]])
        unit = self.direction / self.direction.norm()
        if self.past is None or self.average is None:
            self.past = unit.expand(_WINDOW, -1).clone()
            self.average = torch.zeros_like(self.direction)
        cosines = self.past @ unit
        average = (self.average @ unit / self.average.norm())[None]
        self.rows.append(torch.cat([norms.median(1).values, cosines, average]))
        # In place: inside of a CUDA graph every replay goes on from where the last one ended.
        self.past.copy_(torch.cat([unit[None], self.past[:-1]]))
        self.average.mul_(_DECAY).add_(self.direction, alpha=1 - _DECAY)
        self.hidden, self.grads, self.direction = {}, {}, None


# --- one training run ---


def _backend(device: torch.device) -> str:
    """Return the compiler's backend; on a CPU one that only traces, for the speed of the tests."""
    return "inductor" if device.type == "cuda" else "aot_eager"


@dataclass
class Training:
    """A copy of a network with its optimiser.

    Attributes:
        after: is called after the backward pass, before the optimiser's step.
    """

    workload: Workload
    model: nn.Module
    x: Any
    y: Tensor
    after: Callable[[], Any] | None = None
    call: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        device = self.y.device
        self.call = self.model
        options: dict[str, Any] = {"capturable": True} if self.workload.graphed else {}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, fused=device.type == "cuda", **options
        )

    def compile(self, fullgraph: bool = False) -> None:
        """Send the network through the compiler."""
        backend = torch._dynamo.lookup_backend(_backend(self.y.device))

        # A backend of its own: compiled code is kept by the forward's code and not by the network,
        # and guards do not look at hooks: copies would run what the first one compiled.
        def own(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            return backend(graph, inputs)

        self.call = torch.compile(self.model, backend=own, fullgraph=fullgraph)

    def forward_backward(self) -> None:
        with torch.autocast(self.y.device.type, torch.bfloat16, enabled=self.workload.autocast):
            if isinstance(self.x, Mapping):
                loss = self.call(**self.x).loss
            else:
                loss = F.cross_entropy(self.call(self.x), self.y)
        loss.backward()

    def step(self) -> None:
        self.forward_backward()
        if self.after is not None:
            self.after()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def graph(self) -> Callable[[], None]:
        """Return the replay of the whole step."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUPS):
                self.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.forward_backward()
            if self.after is not None:
                self.after()
            self.optimizer.step()
        torch.cuda.synchronize()

        def replay() -> None:
            assert self.optimizer is not None  # the graph reads weights that this holds
            graph.replay()

        return replay


class Arrived(deque[Any]):
    """A sink that counts: appended to on the training's thread, it costs next to nothing."""

    count = 0

    def append(self, record: Any) -> None:
        self.count += 1
        super().append(record)


@dataclass
class Variant:
    """A way of training that is timed.

    Attributes:
        run: one step.
        around: what holds during a block of steps.
        peak: bytes of device memory at its height; NaN where that cannot be read.
        note: what it does not do.
        records: how many records have come; None where there are none to come.
        taken: steps so far.
    """

    name: str
    run: Callable[[], Any]
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    peak: float = math.nan
    note: str = ""
    records: Callable[[], int] | None = None
    taken: int = 0

    def step(self) -> None:
        self.run()
        self.taken += 1


def _in_turns(copies: Sequence[Variant]) -> Variant:
    """Return a variant that is another one of its copies in every block."""
    first, turns = copies[0], itertools.cycle(copies)
    current = [first]

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        current[0] = next(turns)
        with current[0].around():
            yield

    def records() -> int:
        return sum(copy.records() for copy in copies if copy.records is not None)

    return Variant(
        first.name,
        lambda: current[0].run(),
        around,
        note=first.note,
        records=None if first.records is None else records,
        taken=sum(copy.taken for copy in copies),
    )


def _move(value: Any, device: torch.device, channels_last: bool) -> Any:
    if isinstance(value, Mapping):
        return {name: _move(item, device, channels_last) for name, item in value.items()}
    moved = value.to(device)
    return moved.to(memory_format=torch.channels_last) if channels_last else moved


class Study:
    """The variants of one workload, built one after another; failures are kept with a reason.

    Args:
        workload, device: what, and where.
        graphs: captures of each variant where the whole step is one graph. The same step, captured
            again, takes up to 5% more or less, for its tensors lie elsewhere: with one for each
            round, that chance is in the figures' spread and not in their median.
        seed: of weights and data.
    """

    def __init__(
        self, workload: Workload, device: torch.device, graphs: int = 1, seed: int = 0
    ) -> None:
        self.workload, self.device, self.seed = workload, device, seed
        self.copies = graphs if workload.graphed else 1
        torch.manual_seed(seed)
        x, self.y = workload.batch()
        self.x = _move(x, device, workload.channels_last)
        self.y = self.y.to(device)
        self.states = 0
        self.places: list[tuple[str, bool]] = []
        self.variants: list[Variant] = []
        self.failures: dict[str, str] = {}
        self.open = contextlib.ExitStack()

    def training(self) -> Training:
        torch.manual_seed(self.seed)
        model = self.workload.build().to(self.device).train()
        if self.workload.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Training(self.workload, model, self.x, self.y)

    def example(self) -> Any:
        return self.x if isinstance(self.x, Mapping) else (self.x,)

    def build(self) -> None:
        """Build, warm up and weigh all variants."""
        before = self._allocated()
        try:
            bares = [self._bare() for _ in range(self.copies)]
            self._add(_in_turns([bare for bare, _ in bares]), before)
        except Exception as error:
            self._failed(BARE, error)
            return
        for name, make in ((GRAD_NORM, self._grad_norm), (WATCH, self._watch)):
            self._try(name, lambda make=make: _in_turns([make(*bare) for bare in bares]), before)
        self._try(PROBE, self._several(self._probe, PROBE, {}))
        if not self.workload.compile:  # there it takes another minute, for the same graph
            self._try(QUIET_PROBE, self._several(self._probe, QUIET_PROBE, {"alarms": False}))
        if few := self.workload.samples:
            self._try(FEW_PROBE, self._several(self._probe, FEW_PROBE, {"samples": few}))
        self._try(HOOKS, self._several(self._hooks, HOOKS, False))
        self._try(COMPILED_HOOKS, self._several(self._hooks, COMPILED_HOOKS, True))

    def _several(self, make: Callable[..., Variant], *args: Any) -> Callable[[], Variant]:
        """Return what makes a variant, of several copies where each is a graph of its own."""
        return lambda: _in_turns([make(*args) for _ in range(self.copies)])

    def _try(self, name: str, make: Callable[[], Variant], before: float | None = None) -> None:
        try:
            before = self._allocated() if before is None else before
            self._add(make(), before)
        except Exception as error:  # any failure of a competitor is a row, not an end
            self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        self.failures[name] = failed(name, "", f"{type(error).__name__}: {error}").note
        error.__traceback__ = None  # it holds the copy of the network
        gc.collect()
        with contextlib.suppress(Exception):
            synchronize(self.device)

    def _allocated(self) -> float:
        if self.device.type != "cuda":
            return math.nan
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def _add(self, variant: Variant, before: float) -> None:
        """Warm up, every copy, read the peak of a few steps, keep."""
        for _ in range(self.copies - 1):
            with variant.around():
                for _ in range(_GRAPH_WARMUPS):
                    variant.step()
        with variant.around():
            for _ in range(_GRAPH_WARMUPS if self.workload.graphed else _WARMUPS):
                variant.step()
            synchronize(self.device)
            # A graph's replay asks the allocator for nothing, so that there is no peak to read.
            if self.device.type == "cuda" and not self.workload.graphed:
                torch.cuda.reset_peak_memory_stats()
                for _ in range(3):
                    variant.step()
                torch.cuda.synchronize()
                variant.peak = torch.cuda.max_memory_allocated() - before
        self.variants.append(variant)

    def _runner(self, training: Training, after_replay: Callable[[], Any] | None = None) -> Any:
        """Return what makes one step, compiled or graphed where the workload is."""
        if self.workload.graphed:
            if self.device.type != "cuda":
                raise RuntimeError("a CUDA graph needs CUDA")
            replay = training.graph()

            def run() -> None:
                replay()
                if after_replay is not None:
                    after_replay()

            return run
        if self.workload.compile:
            training.compile()
        return training.step

    # --- variants

    def _bare(self) -> tuple[Variant, Training]:
        training = self.training()
        return Variant(BARE, self._runner(training)), training

    def _probe(self, name: str, options: Mapping[str, Any]) -> Variant:
        training = self.training()
        arrived = Arrived(maxlen=1)
        probe = StepProbe(training.model, sink=arrived.append, example=self.example(), **options)
        points = probe.taps.points
        self.states = len(points)
        self.places = [(point.module, point.at == "input") for point in points]
        training.after = probe.step
        run = self._runner(training, probe.step)

        def records() -> int:
            probe.flush()
            return arrived.count

        @contextlib.contextmanager
        def around() -> Iterator[None]:
            # What a block's end has left in the ring: thirty records at once would hold up the next
            # block's first replays, as nothing does in a run that never stands still.
            probe.flush()
            yield

        # A graph is warmed up by steps of its own.
        taken = _WARMUPS if self.workload.graphed else 0
        return Variant(name, run, around, records=records, taken=taken)

    def _hooks(self, name: str, compiled: bool) -> Variant:
        if not self.places:
            raise RuntimeError("the places to observe are StepProbe's, which did not run")
        training = self.training()
        reduce: Any = (
            functools.partial(torch.compile, backend=_backend(self.device), dynamic=False)
            if compiled and not self.workload.compile
            else lambda function: function
        )
        hide = self.workload.compile and not compiled
        hooks = PlainHooks(training.model, self.places, self.workload.logits, hide, reduce)
        training.after = hooks.step
        if self.workload.compile and compiled:
            training.compile(fullgraph=True)
            return Variant(name, training.step, note="hooks traced, one graph")
        note = "a graph break at every hook" if hide else "compiled reductions" if compiled else ""
        return Variant(name, self._runner(training), note=note)

    def _grad_norm(self, variant: Variant, bare: Training) -> Variant:
        import_torchvision()
        from pytorch_lightning.utilities import grad_norm

        measure = functools.partial(grad_norm, bare.model, 2)
        note = "norms of parameters' gradients only"
        if self.workload.graphed:

            def replay() -> None:
                variant.run()
                measure()

            return Variant(GRAD_NORM, replay, note=f"{note}, after the replay")
        return Variant(GRAD_NORM, variant.run, self._after(bare, measure), note=note)

    @staticmethod
    def _after(
        bare: Training, call: Callable[[], Any]
    ) -> Callable[[], contextlib.AbstractContextManager[Any]]:
        @contextlib.contextmanager
        def around() -> Iterator[None]:
            bare.after = call
            try:
                yield
            finally:
                bare.after = None

        return around

    def _watch(self, variant: Variant, bare: Training) -> Variant:
        import wandb

        if self.workload.graphed:
            raise RuntimeError("hooks of parameters do not run when a CUDA graph is replayed")
        folder = self.open.enter_context(tempfile.TemporaryDirectory())
        session = wandb.init(mode="offline", dir=folder, settings=wandb.Settings(silent=True))
        self.open.callback(session.finish)

        @contextlib.contextmanager
        def around() -> Iterator[None]:
            session.watch(bare.model, log="gradients", log_freq=1)
            bare.after = lambda: session.log({"step": 0})
            try:
                yield
            finally:
                bare.after = None
                session.unwatch(bare.model)

        return Variant(
            WATCH, variant.run, around, note="histograms of parameters' gradients only, offline"
        )


def _sampler(variant: Variant, device: torch.device, block_s: float) -> tuple[Any, int]:
    """Return what times one block, and the steps in it."""
    with variant.around():
        estimate = host_sampler(variant.step, 3, device)()
    steps = max(3, min(_MOST_STEPS, math.ceil(block_s / max(estimate, 1e-7))))
    inner = host_sampler(variant.step, steps, device)

    def sample() -> float:
        try:
            with variant.around():
                return inner()
        except Exception as error:  # the others go on
            variant.note = failed(variant.name, "", f"{type(error).__name__}: {error}").note
            return math.nan

    return sample, steps


def _percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[round((len(ordered) - 1) * percent / 100)]


def added(seconds: Sequence[float], bare: Sequence[float]) -> dict[str, float]:
    """Return what a variant adds to the bare step, from the blocks of the same rounds."""
    pairs = [(s, b) for s, b in zip(seconds, bare, strict=True) if s == s and b == b]
    if not pairs:
        return {"step_ms": math.nan, "added_percent": math.nan, "added_us": math.nan}
    percents = [100 * (s / b - 1) for s, b in pairs]
    return {
        "step_ms": round(1e3 * statistics.median(s for s, _ in pairs), 4),
        "added_percent": round(statistics.median(percents), 3),
        "added_percent_p10": round(_percentile(percents, 10), 3),
        "added_percent_p90": round(_percentile(percents, 90), 3),
        "added_us": round(1e6 * statistics.median(s - b for s, b in pairs), 2),
    }


def verdict(workload: Workload, percent: float, us: float, memory: float) -> str:
    """Return ``yes``, or which of the limits is missed and by what.

    Memory that could not be read, as on a CPU, is left out.
    """
    missed = [
        f"{name} {value:.3g}{unit}"
        for name, value, unit, limit in (
            ("time", percent, "%", workload.percent),
            ("time", us, " µs", workload.microseconds),
            ("memory", memory, "%", workload.memory_percent),
        )
        if value > limit
    ]
    if math.isnan(percent):
        return "not measured"
    return f"no: {', '.join(missed)}" if missed else "yes"


def measure(workload: Workload, device: torch.device, quick: bool) -> list[rows.Row]:
    """Build and time all variants of a workload; return a row for each."""
    rounds = _GRAPH_ROUNDS if workload.graphed else _ROUNDS
    plan = Plan(repetitions=3 if quick else rounds, budget_s=_BUDGET_S)
    study = Study(workload, device, plan.repetitions)
    with study.open:
        study.build()
        return _measure(study, plan)


def _measure(study: Study, plan: Plan) -> list[rows.Row]:
    workload, device = study.workload, study.device
    block_s = _GRAPH_BLOCK_S if workload.graphed else _BLOCK_S
    if device.type != "cuda":
        block_s = 0.02
    blocks = [_sampler(variant, device, block_s) for variant in study.variants]
    judged = [0, *(i for i, variant in enumerate(study.variants) if variant.name == PROBE)]
    order = [*range(len(blocks)), *([] if workload.graphed else judged * (_PAIRS - 1))]
    taken: dict[int, list[float]] = {}
    for index, some in zip(order, interleave([blocks[i][0] for i in order], plan), strict=True):
        taken.setdefault(index, []).extend(some)
    found: list[rows.Row] = []
    for index, (variant, (_, steps)) in enumerate(zip(study.variants, blocks, strict=True)):
        bare, seconds = study.variants[0], taken[index]
        # Those of the same rounds come first.
        times = added(seconds, taken[0][: len(seconds)])
        memory = 100 * (variant.peak / bare.peak - 1)
        mine = variant.name == PROBE
        note = variant.note
        if variant.records is not None and (count := variant.records()) != variant.taken:
            note = f"{count} records of {variant.taken} steps"
        found.append(
            {
                "workload": workload.name,
                "variant": variant.name,
                "step_ms": times["step_ms"],
                "added_percent": times["added_percent"],
                "added_percent_p10": times.get("added_percent_p10", math.nan),
                "added_percent_p90": times.get("added_percent_p90", math.nan),
                "added_us": times["added_us"],
                "added_peak_memory_percent": round(memory, 3),
                "peak_mb": round(variant.peak / 1e6, 1),
                "target": workload.target if mine else "",
                "met": verdict(workload, times["added_percent"], times["added_us"], memory)
                if mine
                else "",
                "rounds": len(seconds),
                "steps_per_round": steps,
                "states": study.states if mine else "",
                "note": note,
            }
        )
    for name, reason in study.failures.items():
        mine = name == PROBE
        found.append(
            {
                "workload": workload.name,
                "variant": name,
                "target": workload.target if mine else "",
                "met": "not measured" if mine else "",
                "rounds": 0,
                "note": reason,
            }
        )
    order = (BARE, PROBE, QUIET_PROBE, FEW_PROBE, HOOKS, COMPILED_HOOKS, GRAD_NORM, WATCH)
    return sorted(found, key=lambda row: order.index(row["variant"]))


def _known(row: rows.Row) -> rows.Row:
    """Return a row with nothing in the place of what is not a number."""
    return {name: "" if value != value else value for name, value in row.items()}


def _warm_libraries(device: torch.device) -> None:
    """Let cuBLAS take its workspaces, lest they count as the memory of the first variant."""
    if device.type != "cuda":
        return
    for dtype in (torch.float32, torch.bfloat16):
        layer = nn.Linear(256, 256, device=device, dtype=dtype)
        x = torch.randn(256, 256, device=device, dtype=dtype, requires_grad=True)
        layer(x).sum().backward()
    torch.cuda.synchronize()


def run(device: torch.device, results: Path, quick: bool, only: str = "") -> Path:
    """Measure all workloads, or those whose name has ``only``; write a row per variant."""
    path = rows.results_path(results, "steps", device, quick)
    here = rows.environment(device)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    try:
        _warm_libraries(device)
        for workload in workloads(device):
            if only.lower() not in workload.name.lower():
                continue
            torch.compiler.reset()
            began = time.perf_counter()
            try:
                # One compiled reduction for each shape of a state.
                with torch._dynamo.config.patch(recompile_limit=64):
                    found = measure(workload, device, quick)
            except Exception as error:
                reason = failed(BARE, "", f"{type(error).__name__}: {error}").note
                found = [{"workload": workload.name, "variant": BARE, "rounds": 0, "note": reason}]
            print(f"steps: {workload.name}: {time.perf_counter() - began:.0f} s", flush=True)
            # After every workload: a run that is cut off keeps what it has.
            rows.write(path, [{**_known(row), **here} for row in found], replace="workload")
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = False
    if not path.exists():
        raise ValueError(f"steps: no workload has {only!r} in its name")
    return path


# --- growth of memory over a long run ---


def _resident() -> int:
    """Return the bytes of the process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def soak(
    device: torch.device, results: Path, quick: bool, minutes: float = 0.0, steps: int = 0
) -> Path:
    """Train with the probe for long, and write how process and device memory have grown.

    Args:
        device, results, quick: as of :func:`run`.
        minutes: how long; 0 for a number of steps.
        steps: how many; 0 for 20,000, on a CPU or a quick run fewer.
    """
    here = rows.environment(device)
    workload = next(w for w in workloads(device) if w.name.endswith("eager") and "MLP" in w.name)
    steps = steps or (20_000 if device.type == "cuda" else 400 if quick else 4_000)
    study = Study(workload, device)
    training = study.training()
    arrived = Arrived(maxlen=1)
    probe = StepProbe(training.model, sink=arrived.append)
    training.after = probe.step

    def levels() -> tuple[int, int]:
        probe.flush()
        gc.collect()
        synchronize(device)
        used = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        return _resident(), used

    warmups = min(2_000, steps // 4)
    for _ in range(warmups):
        training.step()
    first = levels()
    began = time.perf_counter()
    taken = 0
    while time.perf_counter() - began < 60 * minutes if minutes else taken < steps:
        training.step()
        taken += 1
    last = levels()
    seconds = time.perf_counter() - began
    host, used = last[0] - first[0], last[1] - first[1]
    complete = arrived.count == warmups + taken
    well = used <= 0 and host <= _GROWTH_PER_STEP * taken and complete
    row = {
        "workload": workload.name,
        "steps": taken,
        "warmups": warmups,
        "minutes": round(seconds / 60, 2),
        "rss_start_mb": round(first[0] / 1e6, 3),
        "rss_end_mb": round(last[0] / 1e6, 3),
        "rss_growth_bytes_per_step": round(host / taken, 2),
        "device_start_mb": round(first[1] / 1e6, 3),
        "device_end_mb": round(last[1] / 1e6, 3),
        "device_growth_bytes": used,
        "records": arrived.count,
        "target": f"device ≤ 0, process ≤ {_GROWTH_PER_STEP} B a step, every record",
        "met": "yes" if well else "no",
        **here,
    }
    probe.remove()
    return rows.write(rows.results_path(results, "steps-soak", device, quick), [row])
