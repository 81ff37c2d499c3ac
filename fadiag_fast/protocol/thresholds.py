"""The thresholds of the diagnostics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from .._common.arguments import describe


@dataclass(frozen=True)
class DiagnosticThresholds:
    """The limits beyond which a diagnostic fires; the defaults are the published ones.

    Attributes:
        scale_growth: (a) fires above this ratio of consecutive median norms.
        gradient_floor: (b) fires below this median ‖g_L‖. It belongs to batches of 128 and a
            mean-reduced loss.
        direction_stability: (c) fires above this mean cosine.
        depth_utility: (d) fires below this gain over frozen blocks, in percentage points.
        min_batches: (c) needs at least this many batches with a direction.
        credit_gain_floor: below this median ‖g_L‖ / ‖∂loss/∂logits‖ the report says that the
            gradient is lost on its way, whatever (b) says: 1e-7 · 128, at unit output error.

    Raises:
        ValueError: a threshold is negative or not finite, or ``min_batches`` is below 2.
    """

    scale_growth: float = 50.0
    gradient_floor: float = 1e-7
    direction_stability: float = 0.30
    depth_utility: float = 2.0
    min_batches: int = 8
    credit_gain_floor: float = 1.28e-5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            lowest = 2 if field.name == "min_batches" else 0
            # A stability or utility threshold may be negative: both figures can be.
            free = field.name in ("direction_stability", "depth_utility")
            if not math.isfinite(value) or (value < lowest and not free):
                raise ValueError(
                    f"DiagnosticThresholds: {field.name}: expected a finite number"
                    f"{'' if free else f' of at least {lowest}'}, got {value}"
                )

    @property
    def total_growth(self) -> float:
        """The limit of the calibrated (a) on growth over several blocks: the inverse gain floor.

        A terminal norm divides the gradient by the stream's scale, so that this growth takes a
        gain of 1 to its floor. With the defaults it is 7.8e4: above the largest of the published
        healthy runs (equilibrium propagation, about 9e2 over four blocks), below the smallest of
        the published exploded ones (direct feedback alignment, 4.6e7).
        """
        return 1.0 / self.credit_gain_floor if self.credit_gain_floor else math.inf


def check_thresholds(thresholds: object, caller: str) -> None:
    """Raise TypeError for what are no thresholds."""
    if thresholds is None or isinstance(thresholds, DiagnosticThresholds):
        return
    hint = ": DiagnosticThresholds(**thresholds)" if isinstance(thresholds, Mapping) else ""
    raise TypeError(
        f"{caller}: thresholds: expected fadiag_fast.DiagnosticThresholds, got "
        f"{describe(thresholds)}{hint}"
    )
