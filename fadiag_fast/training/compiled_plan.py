"""Decide through which gradient taps a compiled network is observed, and where they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from ..capture import Output, output_of, sample_rows
from ..capture.chains import is_sum
from ..capture.outputs import by_sample
from ..capture.points import TapError, Taps, sighting_at
from ..capture.tracing import Trace
from .compiled_taps import GradientTaps, Job
from .figures import StepFigures
from .forward_pass import Settings
from .tensor_parallel import like_whole


class LogitsPlace(NamedTuple):
    """Where logits count samples, and how many rows a sample has there."""

    dim: int = 0
    per_sample: int = 1


def plan_jobs(found: Taps, seen: Trace) -> tuple[dict[tuple[str, str], list[Job]], dict[int, str]]:
    """Return which hooks of a compiled network send which tensors through which gradient taps.

    A hook can replace what a module returns, for all that use it; replacing what one module
    RECEIVES would miss the other uses, the skip connection above all. The sum after a skip is
    therefore observed at its last summand, which has the same gradient.
    """
    jobs: dict[tuple[str, str], list[Job]] = {}
    refusals: dict[int, str] = {}
    calls = Counter(call.name for call in seen.calls)
    single = [call for call in seen.calls if calls[call.name] == 1]
    for l, point in enumerate(found.points):
        if calls[point.module] > 1:
            refusals[l] = (
                f"{point.where}: expected a module that a compiled forward calls once, got "
                f"{calls[point.module]} calls; name other taps"
            )
            continue
        if point.at == "output":
            jobs.setdefault((point.module, "output"), []).append(Job(l, True, True))
            continue
        state = sighting_at(seen, point)
        assert state is not None
        maker = next(
            (
                call
                for call in reversed(single)
                if call.output is not None
                and call.output_type == "Tensor"
                and call.output.tensor is state.tensor
                and call.output.version == state.version
            ),
            None,
        )
        if maker is not None:
            jobs.setdefault((maker.name, "output"), []).append(Job(l, True, True))
            continue
        at = next(call.begin for call in seen.calls if call.name == point.module)
        branch = next(
            (
                call
                for call in reversed(single)
                if call.end < at
                and call.input is not None
                and call.output is not None
                and is_sum(state.tensor, call.input.tensor, call.output.tensor)
            ),
            None,
        )
        if branch is None:
            refusals[l] = (
                f"{point.where}: expected a state that a module returns, or the sum of a "
                f"module's input and output, to observe it in a compiled network; name other "
                f"taps"
            )
            continue
        jobs.setdefault((branch.name, "output"), []).append(Job(l, False, True))
        jobs.setdefault((point.module, "input"), []).append(Job(l, True, False))
    return jobs, refusals


def logits_module(seen: Trace, output: Output | None) -> str:
    """Return the innermost module whose output is the logits tensor itself.

    A loss that the model computes in its own forward reads that tensor, not what it returns.
    """
    best = ""
    if callable(output):
        return best
    logits = output_of(seen.output, output)
    if logits is None:
        return best
    logits = seen.recorder.before_link(logits)
    calls = Counter(call.name for call in seen.calls)
    for call in seen.calls:
        same = call.output is not None and call.output.tensor is logits
        if same and calls[call.name] == 1 and call.output_type == "Tensor":
            best = call.name
    return best


def make_gradient_taps(
    found: Taps,
    seen: Trace,
    settings: Settings,
    refusals: Mapping[int, str],
    output: Output | None,
    max_samples: int | None,
    arrived: Callable[[StepFigures], None],
) -> tuple[GradientTaps, LogitsPlace | None]:
    """Make what a compiled pass is observed through.

    Returns:
        The gradient taps, and where the logits' samples are; None where logits are not observed.
    """
    reduction, batch_dim = settings.reduction, settings.batch_dim
    states = [sighting_at(seen, point) for point in found.points]
    tensors = [like_whole(state.tensor) for state in states if state is not None]
    rows = [by_sample(tensor, batch_dim) for tensor in tensors]
    batch = rows[0].shape[0]
    rows = [settings.observed(row) for row in rows]
    reduced = [reduction.of_grad(row) for row in rows]
    samples = max(len(r) for r in reduced)
    per_sample = max(1, samples // max(1, rows[0].shape[0]))
    capacity = max(samples, max_samples or 0)
    gradient_taps = GradientTaps(
        found.labels,
        capacity,
        capacity // per_sample,
        {l: reduced[l].shape[1:] for l in settings.direction_layers},
        reduction,
        batch_dim,
        next(state.tensor.device for state in states if state is not None),
        refusals,
        settings.samples,
        settings.gradients,
        arrived,
    )
    logits = output_of(seen.output, output)
    if logits is not None:
        try:
            sample_rows(logits, batch, batch_dim, settings.name)
        except TapError:
            logits = None
    return gradient_taps, None if logits is None else _place_of(logits.shape, batch, batch_dim)


def _place_of(shape: torch.Size, batch: int, batch_dim: int) -> LogitsPlace:
    """Return where logits count samples, as :func:`.sample_rows` sees it."""
    if (
        batch_dim < len(shape)
        and shape[batch_dim] == batch
        and (len(shape) > 2 or shape[0] != batch)
    ):
        return LogitsPlace(batch_dim, 1)
    if batch and shape[0] % batch == 0:
        return LogitsPlace(0, shape[0] // batch)
    return LogitsPlace()
