"""What the alarms allow: thresholds, patience and sensitivity."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ...protocol import DiagnosticThresholds

# The last healthy records that a jump is measured from. Odd, so that the median is one of them.
RECENT = 9


@dataclass(frozen=True)
class AlarmPolicy:
    """The limits of :class:`Alarms`; a record is one recorded step, whatever the schedule.

    Attributes:
        warmup: records at the start that only the non-finite rule judges.
        window: healthy records that the baseline is made of.
        min_window: the baseline judges nothing with fewer.
        deviations: a baseline figure deviates beyond so many robust standard deviations (1.4826
            MADs), and …
        jump: … a hidden norm or growth has moved by this factor since the last healthy records, …
        gain_jump: … a credit gain by this one, …
        far: … or a hidden norm or growth has moved by this factor from its median, however slowly.
        min_mad: lower bound of the MAD of a logarithm: 0.01 is one percent.
        fires: met in so many records …
        among: … of the last so many, a rule fires.
        clears: an episode ends after so many records in a row in which no rule is met, nor nearly.
        clear_level: nearly: (a) and deviations count down to this share of their limits, (b) up to
            the inverse.
        settles: an episode of the baseline rule alone ends after so many records, and the baseline
            begins anew; None for never.
        floor: ``credit_gain``, or ``paper`` for ‖g_L‖ below the published floor.
        thresholds: the published limits, or others.

    Raises:
        ValueError: a limit is out of its range.
    """

    warmup: int = 20
    window: int = 200
    min_window: int = 50
    deviations: float = 8.0
    jump: float = 1.3
    gain_jump: float = 10.0
    far: float = 20.0
    min_mad: float = 0.01
    fires: int = 2
    among: int = 3
    clears: int = 10
    clear_level: float = 0.5
    settles: int | None = 1000
    floor: Literal["credit_gain", "paper"] = "credit_gain"
    thresholds: DiagnosticThresholds = field(default_factory=DiagnosticThresholds)

    def __post_init__(self) -> None:
        def check(name: str, fits: bool, expected: str) -> None:
            if not fits:
                raise ValueError(
                    f"AlarmPolicy: {name}: expected {expected}, got {getattr(self, name)!r}"
                )

        check("warmup", self.warmup >= 0, "at least 0")
        check("min_window", self.min_window >= RECENT, f"at least {RECENT}")
        check("window", self.window >= self.min_window, f"at least min_window, {self.min_window}")
        check("deviations", 0 < self.deviations < math.inf, "a positive number")
        check("min_mad", 0 <= self.min_mad < math.inf, "at least 0")
        for name in ("jump", "gain_jump", "far"):
            check(name, 1 < getattr(self, name) < math.inf, "a factor above 1")
        check("among", self.among >= 1, "at least 1")
        check("fires", 1 <= self.fires <= self.among, f"1 to among, {self.among}")
        check("clears", self.clears >= 1, "at least 1")
        check("clear_level", 0 < self.clear_level <= 1, "a share in (0, 1]")
        check("settles", self.settles is None or self.settles >= self.clears, "at least clears")
        check("floor", self.floor in ("credit_gain", "paper"), "credit_gain or paper")
