"""Time several callables in one run, interleaved: the only place where a clock is read.

Each round takes one sample of every variant, in a changing order, so that drifting clocks, heat and
other users of the machine fall on all variants alike. A sample is the mean of a few back-to-back
calls. Two modes on a GPU: ``eager``, the whole Python call; ``graphed``, the replay of a CUDA graph
of it. A CPU knows only the first.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Run = Callable[[], object]
Sampler = Callable[[], float]

# Below this a call is mostly host work: the host's clock sees what the caller waits for. Above it
# events leave out the wake-up of the synchronising thread.
_SHORT_CALL_S = 200e-6
# A driver queue holds about a thousand launches; a batch stays clear of it.
_MOST_CALLS = 200
_WARMUPS = 3
_FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        repetitions: rounds, each one sample of every variant.
        budget_s: stop earlier after this many seconds, with the rounds made so far recorded.
        sample_s: back-to-back calls of one sample add up to about this.
        graphs: whether to time graph replays too.
    """

    repetitions: int = 100
    budget_s: float = math.inf
    sample_s: float = 1e-3
    graphs: bool = True


@dataclass(frozen=True)
class Timing:
    """One variant in one mode; without samples (``repetitions`` 0) ``note`` says why."""

    variant: str
    mode: str
    median_us: float
    p10_us: float
    p90_us: float
    repetitions: int
    calls: int = 1
    cache: str = ""
    note: str = ""

    def columns(self) -> dict[str, object]:
        """Return the timing as columns of a row."""
        return {
            "variant": self.variant,
            "mode": self.mode,
            "median_us": round(self.median_us, 3),
            "p10_us": round(self.p10_us, 3),
            "p90_us": round(self.p90_us, 3),
            "repetitions": self.repetitions,
            "calls": self.calls,
            "cache": self.cache,
            "note": self.note,
        }


def failed(variant: str, mode: str, reason: object) -> Timing:
    """Return the row of a variant that gave no time, with the reason on one line."""
    line = " ".join(str(reason).split())[:200]
    return Timing(variant, mode, math.nan, math.nan, math.nan, 0, 0, "", line)


@dataclass(frozen=True)
class Cache:
    """What the last-level cache holds when a sample starts.

    Attributes:
        state: ``hot`` (the data fit and stay), ``cold`` (they exceed it four times over),
            ``flushed`` (emptied before each call).
        flush: the buffer to read for emptying it.
    """

    state: str
    flush: Tensor | None = None

    def empty(self) -> None:
        """Replace what the cache holds."""
        # Read, not written: written lines would be drained at the expense of the call under test.
        if self.flush is not None:
            self.flush.sum()


def cache_size(device: torch.device) -> int:
    """Return the bytes of a GPU's L2; of a CPU's last level an assumed 32 MiB."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return 32 << 20


def choose_cache(data_bytes: int, device: torch.device, flush: bool | None = None) -> Cache:
    """Decide whether to flush: by default where the data exceed the cache without dwarfing it.

    Data that fit are measured hot, as they are in use. Data of four times the cache push themselves
    out. In between a replay would find a part of them, so the cache is emptied.
    """
    size = cache_size(device)
    if flush is None:
        flush = device.type == "cuda" and size < data_bytes < 4 * size
    if flush:
        return Cache("flushed", torch.ones(size, device=device))  # float32: four times the cache
    return Cache("hot" if data_bytes <= size else "cold")


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def capture(run: Run) -> Run:
    """Return the replay of a CUDA graph of a call. Raises what the call raises under capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # The same stream warms up and is captured: nothing is compiled or autotuned under capture.
    with torch.cuda.stream(stream):
        for _ in range(_WARMUPS):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    torch.cuda.synchronize()
    return graph.replay


def host_sampler(run: Run, calls: int, device: torch.device) -> Sampler:
    """Return a sampler by the host's clock, with a synchronisation before and after all calls."""

    def sample() -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        return (time.perf_counter() - start) / calls

    return sample


def _event_sampler(run: Run, calls: int, cache: Cache) -> Sampler:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)

    def sample() -> float:
        # Something runs ahead of the first event, so that the GPU does not wait for a launch.
        if cache.flush is None:
            run()
        else:
            cache.empty()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls

    return sample


def _estimate(run: Run, device: torch.device) -> float:
    """Return the seconds of one call, roughly, after a warm-up."""
    run()
    once = host_sampler(run, 1, device)()
    # Of a short call alone most is the synchronisation; a long one is not repeated for a guess.
    return once if once > 2e-3 else min(once, host_sampler(run, 10, device)())


def _sampler(run: Run, device: torch.device, plan: Plan, cache: Cache) -> tuple[Sampler, int]:
    """Return the sampler that suits a call's length, and the calls in one of its samples."""
    seconds = _estimate(run, device)
    calls = max(1, min(_MOST_CALLS, math.ceil(plan.sample_s / max(seconds, 1e-7))))
    if device.type != "cuda":
        return host_sampler(run, calls, device), calls
    if cache.flush is not None:
        return _event_sampler(run, 1, cache), 1
    if seconds < _SHORT_CALL_S:
        return host_sampler(run, calls, device), calls
    return _event_sampler(run, calls, cache), calls


def interleave(samplers: Sequence[Sampler], plan: Plan) -> list[list[float]]:
    """Return the samples of each, taken in rounds of one each; a first round is thrown away."""
    samples: list[list[float]] = [[] for _ in samplers]
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for sampler in samplers:
            sampler()
        begin = time.perf_counter()
        for round_ in range(plan.repetitions):
            first = round_ % max(1, len(samplers))
            order = [*range(first, len(samplers)), *range(first)]
            # Turned around every other round, so that no variant always follows the same one.
            for index in order if round_ % 2 == 0 else reversed(order):
                samples[index].append(samplers[index]())
            late = time.perf_counter() - begin > plan.budget_s
            if late and round_ + 1 >= _FEWEST_ROUNDS:
                break
    finally:
        if collecting:
            gc.enable()
    return samples


def measure(
    variants: Mapping[str, Run],
    device: torch.device,
    plan: Plan,
    cache: Cache | None = None,
) -> list[Timing]:
    """Time variants against each other.

    Args:
        variants: callables by name; each keeps its own inputs alive.
        device: where they run.
        plan: how long to measure.
        cache: what to do about the cache; None leaves it alone.

    Returns:
        One :class:`Timing` per variant and mode; those that raised have no samples and a note.
    """
    cache = cache or Cache("")
    timings: list[Timing] = []
    calls: list[tuple[str, str, Run]] = []
    graphed: list[tuple[str, str, Run]] = []
    for name, run in variants.items():
        try:
            for _ in range(_WARMUPS if device.type == "cuda" else 1):
                run()
            synchronize(device)
        except Exception as error:  # any failure of a competitor is a row, not an end
            timings.append(failed(name, "eager", f"{type(error).__name__}: {error}"))
            continue
        calls.append((name, "eager", run))
        if device.type == "cuda" and plan.graphs:
            try:
                graphed.append((name, "graphed", capture(run)))
            except Exception as error:
                torch.cuda.synchronize(device)
                reason = f"not capturable: {type(error).__name__}: {error}"
                timings.append(failed(name, "graphed", reason))
    # Captures empty the allocator's cache, so eager calls are estimated after the last of them.
    calls += graphed
    samplers = [_sampler(run, device, plan, cache) for _, _, run in calls]
    samples = interleave([sampler for sampler, _ in samplers], plan)
    for (name, mode, _), (_, count), seconds in zip(calls, samplers, samples, strict=True):
        p10, median, p90 = np.percentile(np.array(seconds) * 1e6, [10, 50, 90]).tolist()
        timings.append(Timing(name, mode, median, p10, p90, len(seconds), count, cache.state))
    return timings


def pick(timings: Sequence[Timing], variant: str, mode: str = "eager") -> Timing:
    """Return the timing of a variant, an empty one where it was not taken."""
    for timing in timings:
        if timing.variant == variant and timing.mode == mode:
            return timing
    return failed(variant, mode, "not measured")


def fastest(timings: Sequence[Timing], variants: Sequence[str], mode: str = "") -> Timing:
    """Return the quickest of some variants, in one mode or in any."""
    found = [
        timing
        for timing in timings
        if timing.variant in variants and timing.repetitions and mode in ("", timing.mode)
    ]
    return min(found, key=lambda timing: timing.median_us, default=failed("none", mode, "none ran"))
