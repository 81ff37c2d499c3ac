"""Training steps a second of a study's networks: ordinary, graphed, and of several runs at once.

Published sizes on random images of Fashion-MNIST's shape, batches of 128. A row's steps are those
of all its runs together. On the CPU ordinary steps only.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fadiag_fast.zoo import build_model, make_rule, model_spec
from fadiag_fast.zoo.graphed_steps import Stepper, stream_of_thread

from . import rows

SHAPE, CLASSES, IMAGES, BATCH = (1, 28, 28), 10, 60_000, 128
WORKLOADS = (
    ("resmlp", "bp"),
    ("resmlp", "dfa"),
    ("resmlp", "ep"),
    ("smallcnn", "bp"),
    ("smallcnn", "ep"),
    ("vit-mini", "bp"),
    ("vit-mini", "ep"),
)
JOBS = (4, 8, 16)
# Steps before a measurement: enough for a recording and for a GPU's clocks to rise.
WARM = {"cuda": 20, "cpu": 1}


def _batches(seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(IMAGES, generator=generator)[: IMAGES - IMAGES % BATCH].split(
            BATCH
        )


def _stepper(model: str, rule: str, images: Tensor, labels: Tensor, graph: bool) -> Stepper:
    flat = model_spec(model).flatten_input
    network = build_model(model, input_shape=SHAPE, num_classes=CLASSES, seed=0).to(images.device)
    network.train()
    return Stepper(
        make_rule(rule, network, total_steps=100_000),
        images.flatten(1) if flat else images,
        labels,
        _batches(0),
        batch_size=BATCH,
        total=100_000,
        record=graph,
    )


def _together(
    model: str, rule: str, images: Tensor, labels: Tensor, graph: bool, jobs: int, count: int
) -> tuple[float, str]:
    """Make ``count`` steps in each of several runs; return all steps a second, and a note."""
    ready, done = threading.Barrier(jobs + 1), threading.Barrier(jobs + 1)
    notes: list[str] = []
    failures: list[Exception] = []

    def work() -> None:
        try:
            with _own_stream(images.device):
                steps = _stepper(model, rule, images, labels, graph)
                for _ in range(WARM[images.device.type]):
                    steps.step()
                _wait(images.device)
                ready.wait()
                for _ in range(count):
                    steps.step()
                _wait(images.device)
                done.wait()
                notes.append(steps.note)
                steps.close()
        except Exception as error:
            failures.append(error)
            ready.abort()
            done.abort()

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    try:
        ready.wait()
        began = time.perf_counter()
        done.wait()
        seconds = time.perf_counter() - began
    except threading.BrokenBarrierError:
        raise failures[0] from None
    finally:
        for thread in threads:
            thread.join()
        if images.is_cuda:
            # Of this measurement's threads and streams.
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
    return jobs * count / seconds, notes[0]


def _own_stream(device: torch.device) -> Any:
    return torch.cuda.stream(stream_of_thread(device)) if device.type == "cuda" else nullcontext()


def _wait(device: torch.device) -> None:
    # Of this thread's stream alone: waiting for all of the device would break recordings off.
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def run(device: torch.device, results: Path, quick: bool, only: str = "") -> Path:
    """Measure every workload; write steps per second, and the ratio to ordinary steps."""
    on_cuda = device.type == "cuda"
    seconds = 0.3 if quick else 1.0
    here = rows.environment(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((IMAGES if on_cuda else 1280, *SHAPE), generator=generator).to(device)
    images = images if on_cuda else images.repeat(IMAGES // 1280 + 1, 1, 1, 1)[:IMAGES]
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator).to(device)
    _wait(device)
    path = rows.results_path(results, "study-rate", device, quick)
    written: list[dict[str, Any]] = []
    # What the first steps of a process cost belongs to none of them.
    _together("resmlp", "bp", images, labels, on_cuda, 1, 1)
    for model, rule in WORKLOADS:
        if only not in f"{model} {rule}":
            continue
        rate, _ = _together(model, rule, images, labels, False, 1, 2)
        variants = [("ordinary", False, 1)]
        if on_cuda:
            variants += [("graphed", True, jobs) for jobs in (1, *JOBS)]
        ordinary = 0.0
        for variant, graph, jobs in variants:
            # As if runs at once gained nothing, so that a measurement is no longer than asked for.
            count = max(2, int(rate * seconds * (2 if jobs > 1 else 1) / jobs))
            if variant == "graphed" and jobs == 1:
                count *= 3
            found, note = _together(model, rule, images, labels, graph, jobs, count)
            if jobs == 1:
                rate = found
            ordinary = ordinary or found
            written.append(
                {
                    "model": model,
                    "rule": rule,
                    "variant": variant if not note else f"not graphed: {note}",
                    "jobs": jobs,
                    "steps_per_s": round(found, 1),
                    "ratio": round(found / ordinary, 2),
                    "steps": jobs * count,
                    **here,
                }
            )
        # After each: a run that is cut short leaves what it has.
        rows.write(path, written)
    return path
