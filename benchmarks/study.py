"""A made-up study: checkpoints whose figures look like a real scan's, without the networks.

Rules and their shapes are those of the protocol's reference figures: backpropagation stays healthy,
DFA explodes and loses the gradient within a few epochs, FA explodes and keeps it, EP stays bounded.
Equal arguments give equal figures.
"""

import random
from collections.abc import Iterator

from fadiag_fast.protocol import Figures
from fadiag_fast.scan import CheckpointRecord

# Per rule: growth, ‖g_L‖ and credit gain at the end, stability, accuracy.
RULES = {
    "bp": (1.3, 3e-4, 0.42, 0.10, 0.615),
    "ep": (6.0, 1e-4, 0.3, -0.03, 0.47),
    "dfa": (900.0, 4e-9, 3e-5, 0.25, 0.306),
    "fa": (280.0, 1e-6, 2e-3, 0.2, 0.401),
    "frozen": (1.05, 4e-4, 2.9, 0.08, 0.349),
}
FROZEN_ACCURACY = 0.349
FAILURES = (
    ("missing", "expected a torch.save or safetensors file, got no such file"),
    ("unreadable", "expected a torch.save or safetensors file, got a damaged one (truncated)"),
    ("wrong model", "blocks.2.weight: expected a model with 2 blocks, got weights of 4"),
    ("non-finite weights", "blocks.1.fc1.weight: 12 of 65,536 values are not finite"),
)
CONFIG = {"model": "resmlp", "data": "cifar10", "batches": [10, 128], "loss": "cross-entropy"}


def figures(rule: str, progress: float, noise: random.Random, layers: int = 5) -> Figures:
    """Return what an audit might find at a point of training, from 0 to 1."""
    growth, grad, gain, stability, accuracy = RULES[rule]
    part = progress**0.35
    shake = [noise.gauss(0, 0.04) for _ in range(4)]
    ratio = 1.02 * (growth / 1.02) ** part * 10 ** shake[0]
    start, peak = 8.7, max(1, layers // 4)
    norms = [start]
    for l in range(1, layers):
        norms.append(norms[-1] * (ratio if l == peak else ratio ** (0.3 / layers)))
    deepest = 8e-3 * (grad / 8e-3) ** part * 10 ** shake[1]
    grads = [deepest * (1 + 0.3 * (layers - 1 - l)) for l in range(layers)]
    gains = [0.9 * (gain / 0.9) ** part * 10 ** shake[2] * (1 + 0.1 * l) for l in range(layers)]
    cosine = 0.6 * (1 - min(1, progress * 6)) + stability * min(1, progress * 6) + shake[3] * 0.6
    return Figures(
        layers=("embed", *(f"blocks.{l}" for l in range(layers - 1))),
        residual_norms=tuple(norms),
        bp_grad_norms=tuple(grads),
        credit_gains=tuple(gains),
        output_grad_norm=5e-3,
        batch_size=128,
        stabilities=tuple(cosine + 0.02 * l for l in range(layers)),
        num_directions=(10,) * layers,
        num_batches=10,
        headline_acc=min(0.99, 0.1 + (accuracy - 0.1) * part + 0.01 * shake[0]),
        frozen_baseline_acc=None if rule == "frozen" else FROZEN_ACCURACY,
    )


def records(
    count: int, config_hash: str, *, per_run: int = 100, layers: int = 5, faulty: float = 0.01
) -> Iterator[CheckpointRecord]:
    """Yield the outcome of ``count`` checkpoints, ``per_run`` of each run."""
    names = list(RULES)
    for index in range(count):
        run, place = divmod(index, per_run)
        rule, seed = names[run % len(names)], 42 + run // len(names)
        noise = random.Random(index)
        name, step = f"{rule}_s{seed}", place * 250
        common = {
            "path": f"runs/{name}/step_{step}.pt",
            "run": name,
            "step": step,
            "config_hash": config_hash,
            "fields": {"rule": rule},
        }
        if noise.random() < faulty:
            kind, error = FAILURES[noise.randrange(len(FAILURES))]
            yield CheckpointRecord(**common, error_kind=kind, error=error)
            continue
        progress = place / max(per_run - 1, 1)
        yield CheckpointRecord(
            **common,
            content_hash=f"sha256:{noise.getrandbits(128):032x}",
            figures=figures(rule, progress, noise, layers),
            sample_shapes=[(256,)] * layers,
            bytes=5_300_000,
            device="cpu (AMD EPYC)",
            seconds=0.016,
        )
