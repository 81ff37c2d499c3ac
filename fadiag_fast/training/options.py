"""What a step probe is asked for, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..capture import Output
from ..capture.arguments import check_how
from ..capture.points import Select
from ..capture.reduction import SampleReduction

Mode = Literal["auto", "passing", "together"]
DirectionLayers = Literal["middle", "all", "none"]


@dataclass(frozen=True)
class DirectionOptions:
    """Whose gradient directions are kept, and how many of each.

    Attributes:
        layers: of the ``"middle"`` state, which the protocol's (c) reads, of ``"all"``, or of
            ``"none"``.
        window: K, with how many earlier recorded steps a direction is compared; on CUDA at most
            2,814.
        decay: of the exponential average of directions, in [0, 1).
        sketch: numbers kept of each direction instead of all D: a count sketch, with which a
            cosine c has the standard error √((1 + c²) / sketch). None keeps directions whole.

    Kept are K + 1 vectors of D (or ``sketch``) float32 for each layer.

    Raises:
        ValueError: an option is out of its range.
    """

    layers: DirectionLayers = "middle"
    window: int = 8
    decay: float = 0.9
    sketch: int | None = None

    def __post_init__(self) -> None:
        _check_count("window", self.window)
        _check_count("sketch", self.sketch)
        if not isinstance(self.decay, int | float) or not 0.0 <= self.decay < 1.0:
            raise ValueError(f"StepProbe: decay: expected a number in [0, 1), got {self.decay!r}")
        if self.layers not in ("middle", "all", "none"):
            raise ValueError(
                f"StepProbe: directions: expected 'middle', 'all' or 'none', got {self.layers!r}"
            )


@dataclass(frozen=True)
class ProbeOptions:
    """The options of a :class:`.StepProbe`; see there for what each means.

    Raises:
        ValueError: an option is out of its range.
    """

    select: Select | None
    output: Output | None
    batch_dim: int
    reduction: SampleReduction
    directions: DirectionOptions
    mode: Mode
    samples: int | None
    max_samples: int | None
    ring: int
    scaler: Any
    loss_reduction: str
    group: Any
    tensor_group: Any
    sharded: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("ring", "samples", "max_samples"):
            _check_count(name, getattr(self, name))
        check_how(None, self.batch_dim, "StepProbe")
        if self.mode not in ("auto", "passing", "together"):
            raise ValueError(
                f"StepProbe: mode: expected 'auto', 'passing' or 'together', got {self.mode!r}"
            )
        if self.sharded and self.reduction.kind != "flatten":
            raise ValueError(
                f"StepProbe: sharded: expected the reduction flatten, got {self.reduction.kind}: "
                f"plain tensors do not say whether they are parts along features or positions"
            )


def names_of(sharded: str | Sequence[str]) -> tuple[str, ...]:
    """Return one name or several as a tuple."""
    return (sharded,) if isinstance(sharded, str) else tuple(sharded)


def check_first_step(first_step: object) -> None:
    """Raise ValueError unless it counts steps."""
    if isinstance(first_step, bool) or not isinstance(first_step, int) or first_step < 0:
        raise ValueError(
            f"StepProbe: first_step: expected a whole number from 0, got {first_step!r}"
        )


def _check_count(name: str, value: object) -> None:
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"StepProbe: {name}: expected a whole number from 1, got {value}")
