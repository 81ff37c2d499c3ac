"""The cosine schedule where the host takes no part in a step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class DeviceCosine:
    """Take a learning rate that lies on a device down a cosine, without the host.

    Formula: rate(t) = learning_rate·(1 + cos(π·t / total_steps)) / 2 after t steps, that of
    ``torch.optim.lr_scheduler.CosineAnnealingLR``, also in that it rises again after
    ``total_steps``. The rates are computed in float64 and rounded once to the rate's dtype.

    Args:
        rate: scalar tensor that an optimiser reads; written in place.
        learning_rate: the rate at step 0.
        total_steps: steps until the rate is 0, at least 1.
    """

    def __init__(self, rate: Tensor, learning_rate: float, total_steps: int) -> None:
        self.rate = rate
        angles = torch.arange(2 * total_steps, dtype=torch.float64) * (math.pi / total_steps)
        self.rates = (learning_rate * (1 + angles.cos()) / 2).to(rate)
        self.taken = torch.zeros(1, dtype=torch.int64, device=rate.device)

    def step(self) -> None:
        """Set the rate for the next step."""
        self.taken.add_(1).remainder_(len(self.rates))
        torch.index_select(self.rates, 0, self.taken, out=self.rate.view(1))

    def get_last_lr(self) -> list[Tensor]:
        """Return a copy of the rate, as torch's schedulers do."""
        return [self.rate.clone()]

    def state_dict(self) -> dict[str, Tensor]:
        """Return how many steps were taken; the rate itself is the optimiser's."""
        return {"taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.taken.copy_(state["taken"])
