"""Which steps of a training run are probed."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Protocol, runtime_checkable

# A probe's next cost is taken to be the median of this many: the first ones hold a compilation.
_COSTS = 5


@runtime_checkable
class Schedule(Protocol):
    """Choose steps; a class of your own needs these two methods only."""

    def wants(self, step: int) -> bool:
        """Return whether to probe a step, counted from 0; asking twice changes nothing."""
        ...

    def note(self, step: int, probe_seconds: float, step_seconds: float) -> None:
        """Take what a step has cost.

        Args:
            step: the step that is over.
            probe_seconds: the probe's share; 0 for a step that was not probed.
            step_seconds: the whole step with the probe's share.
        """
        ...


class EveryStep:
    """Probe every step."""

    def wants(self, step: int) -> bool:
        return True

    def note(self, step: int, probe_seconds: float, step_seconds: float) -> None:
        pass

    def __repr__(self) -> str:
        return "EveryStep()"


class EveryN(EveryStep):
    """Probe steps 0, n, 2n, …

    Raises:
        ValueError: ``n`` is below 1.
        TypeError: it is not a whole number.
    """

    def __init__(self, n: int) -> None:
        self.n = _positive("EveryN: n", n)

    def wants(self, step: int) -> bool:
        return step % self.n == 0

    def __repr__(self) -> str:
        return f"EveryN({self.n})"


class Logarithmic(EveryStep):
    """Probe step 0 and ``per_decade`` steps in every power of ten, each rounded to a whole step.

    Raises:
        ValueError: ``per_decade`` is below 1.
        TypeError: it is not a whole number.
    """

    def __init__(self, per_decade: int = 20) -> None:
        self.per_decade = _positive("Logarithmic: per_decade", per_decade)

    def wants(self, step: int) -> bool:
        if step < 2:
            return step >= 0
        near = round(math.log10(step) * self.per_decade)
        # Rounding a step moves its logarithm by less than one place only for late steps.
        first = math.floor(math.log10(step - 0.5) * self.per_decade)
        last = math.ceil(math.log10(step + 0.5) * self.per_decade)
        places = {near, *range(first, last + 1)}
        return any(round(10 ** (place / self.per_decade)) == step for place in places)

    def __repr__(self) -> str:
        return f"Logarithmic(per_decade={self.per_decade})"


class Budget:
    """Space the probed steps so that the probe's time stays a share of the run's time.

    A step is probed where the time spent so far and the cost of one more fit
    ``max_overhead`` of the run's time so far; the cost is the median of the last five. The first
    step is always probed, for a first measurement, and what that has cost, a compilation say, is
    paid back by probing later. Steps that nobody noted count with the mean of the noted ones.

    Ranks of a distributed run measure different times: let one rank choose for all.

    Args:
        max_overhead: the share, in (0, 1].
        at_most: probe at least every ``at_most`` steps, even beyond the share; None for never.

    Attributes:
        overhead: the probe's share of the run's time so far; 0.0 before a note.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, max_overhead: float = 0.01, at_most: int | None = 1000) -> None:
        if not 0 < max_overhead <= 1:
            raise ValueError(
                f"Budget: max_overhead: expected a share in (0, 1], got {max_overhead}"
            )
        self.max_overhead = float(max_overhead)
        self.at_most = None if at_most is None else _positive("Budget: at_most", at_most)
        self._costs: deque[float] = deque(maxlen=_COSTS)
        self._probe_seconds = 0.0
        self._plain_seconds = 0.0  # of the noted steps, without the probe's share
        self._noted = 0
        self._last_noted: int | None = None
        self._first: int | None = None
        self._last_probed: int | None = None

    def wants(self, step: int) -> bool:
        if self._last_probed is None:
            return True
        if self.at_most is not None and step - self._last_probed >= self.at_most:
            return True
        cost = statistics.median(self._costs)
        run_seconds = self._run_seconds(step) + cost
        return self._probe_seconds + cost <= self.max_overhead * run_seconds

    def note(self, step: int, probe_seconds: float, step_seconds: float) -> None:
        self._noted += 1
        self._plain_seconds += max(0.0, step_seconds - probe_seconds)
        self._first = step if self._first is None else min(self._first, step)
        self._last_noted = step if self._last_noted is None else max(self._last_noted, step)
        if probe_seconds > 0:
            self._probe_seconds += probe_seconds
            self._costs.append(probe_seconds)
            self._last_probed = step

    @property
    def overhead(self) -> float:
        if self._last_noted is None:
            return 0.0
        total = self._run_seconds(self._last_noted + 1)
        return self._probe_seconds / total if total > 0 else 0.0

    def _run_seconds(self, step: int) -> float:
        """Return the time from the first noted step to the start of ``step``."""
        if self._first is None:
            return 0.0
        steps = max(step - self._first, self._noted)
        return self._plain_seconds / self._noted * steps + self._probe_seconds

    def __repr__(self) -> str:
        return f"Budget(max_overhead={self.max_overhead:g}, at_most={self.at_most})"


def as_schedule(value: str | int | float | Schedule | None) -> Schedule:
    """Return the schedule that a short form stands for.

    Args:
        value: ``"every"`` or None, every step; ``"log"``, a logarithmic spacing; a whole number n,
            every n-th step; a share below 1, such as 0.01, a budget; or a schedule.

    Raises:
        ValueError: a word or a number that stands for none.
        TypeError: anything else.
    """
    if value is None or value == "every":
        return EveryStep()
    if value == "log":
        return Logarithmic()
    if isinstance(value, bool):
        raise TypeError(_expected(value))
    if isinstance(value, int):
        return EveryN(value)
    if isinstance(value, float):
        if 0 < value < 1:
            return Budget(value)
        raise ValueError(_expected(value))
    if isinstance(value, str):
        raise ValueError(_expected(value))
    if isinstance(value, Schedule) and not isinstance(value, type):
        return value
    raise TypeError(_expected(value))


def _expected(value: object) -> str:
    return (
        f"schedule: expected 'every', 'log', a whole number of steps, a share of the time below 1 "
        f"or an object with wants() and note(), got {value!r}"
    )


def _positive(what: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what}: expected a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{what}: expected at least 1, got {value}")
    return value
