"""What a gradient scaler did to a step: its factor, and whether it skipped the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .figures import StepFigures


class ScalerState:
    """What a gradient scaler does in one step, on the device.

    Args:
        scaler: of torch's kind.
        overflowed: whether a gradient that was seen is not finite.
        unscaled: flags of what the scaler has met so far: none before ``unscale_`` or ``step``.

    Attributes:
        scale: the factor of this step, float64.
        skipped: whether the step is skipped, as far as is known.
        known: whether the scaler has said so since; until then what was seen must do.
    """

    def __init__(self, scaler: Any, overflowed: Tensor, unscaled: Sequence[Tensor]) -> None:
        self._scaler = scaler
        device = overflowed.device
        self.skipped, self.known = overflowed, torch.zeros_like(overflowed)
        for flag in unscaled:
            found = (flag.to(device, non_blocking=True) != 0).reshape(())
            self.skipped = self.skipped | found
        self._before = self._state(device)
        self.scale = torch.ones((), dtype=torch.float64, device=device)
        if self._before is not None:
            self.scale = self._before[0]
        else:  # a scaler that is disabled skips nothing
            self.skipped, self.known = torch.zeros_like(overflowed), torch.ones_like(overflowed)

    def _state(self, device: torch.device) -> Tensor | None:
        """Return the scaler's factor and for how many steps it has not changed, ``[2]``."""
        scale = getattr(self._scaler, "_scale", None)
        if scale is None:
            return None
        streak = getattr(self._scaler, "_growth_tracker", None)
        both = [scale, torch.full_like(scale, -1) if streak is None else streak]
        return torch.stack([t.detach().reshape(()).double() for t in both]).to(
            device, non_blocking=True
        )

    def resolve(self) -> None:
        """Read from the scaler, after its ``update``, what it did.

        Its factor then is smaller and the streak 0 if it met something that is not finite in any
        gradient of a parameter; else the streak is longer, or it was rewarded with a larger factor.
        """
        now = None if self._before is None else self._state(self.skipped.device)
        if now is None or self._before is None:
            return
        before, self._before = self._before, None
        new = now[1] == 0
        skipped = new & (now[0] < before[0])
        self.known = skipped | (new & (now[0] > before[0])) | (now[1] == before[1] + 1)
        self.skipped = torch.where(self.known, skipped, self.skipped)

    def overflowed(self, more: Tensor) -> None:
        """Note what other ranks have seen: what one of them met, all of them skip."""
        self.skipped = torch.where(self.known, self.skipped, self.skipped | more)

    def figures(self) -> Tensor:
        """Return factor and whether the step is skipped, ``[2]`` float64."""
        return torch.stack([self.scale, self.skipped.double()])


def scaler_state(scaler: Any, figures: StepFigures) -> ScalerState | None:
    """Return what is known of a gradient scaler so far; None without one."""
    if scaler is None:
        return None
    states = getattr(scaler, "_per_optimizer_states", {}).values()
    flags = [flag for state in states for flag in state.get("found_inf_per_device", {}).values()]
    return ScalerState(scaler, overflowed(figures), flags)


def overflowed(figures: StepFigures) -> Tensor:
    """Return on the device whether a gradient that arrived is not finite."""
    norms = figures.norms
    n = norms.shape[1] - 1
    if not figures.missing and figures.samples is not None:
        return ~torch.isfinite(norms[1, :n]).all()
    there = [l for l in range(n) if l not in figures.missing]
    hidden, grad = (torch.stack([norms[i, l] for l in there]) for i in (0, 1))
    # A place without a sample holds NaN in both.
    return (torch.isinf(grad) | (torch.isnan(grad) & ~torch.isnan(hidden))).any()
