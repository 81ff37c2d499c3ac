"""Step records as of a healthy training."""

import math
import random

from fadiag_fast.training import StepRecord

LAYERS = ("embed", "blocks.0", "blocks.1", "blocks.2")


def record(step, hidden=(8.0, 9.0, 10.0, 11.0), gains=(0.5, 0.5, 0.4, 0.4), **changes):
    return StepRecord(
        **{
            "step": step,
            "layers": LAYERS,
            "hidden_norms": tuple(hidden),
            "rms_norms": tuple(hidden),
            "grad_norms": tuple(gain * 1e-2 for gain in gains),
            "credit_gains": tuple(gains),
            "output_grad_norm": 1e-2,
            "stabilities": (math.nan,) * 4,
            "average_cosines": (math.nan,) * 4,
            "num_directions": 0,
            "num_samples": 128,
            **changes,
        }
    )


def noisy(step, chance, hidden=(8.0, 9.0, 10.0, 11.0), gains=(0.5, 0.5, 0.4, 0.4), **changes):
    return record(
        step,
        [h * math.exp(chance.gauss(0, 0.02)) for h in hidden],
        [g * math.exp(chance.gauss(0, 0.2)) for g in gains],
        **changes,
    )


def healthy(count, seed=0, start=0):
    chance = random.Random(seed)
    return [noisy(start + i, chance) for i in range(count)]
