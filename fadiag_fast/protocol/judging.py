"""Judge figures by a protocol, and draw the verdict."""

from collections.abc import Sequence
from typing import Literal, get_args

from . import calibrated
from .figures import NOT_ENOUGH_DATA, TRUSTWORTHY, Diagnostic, Figures, Status
from .paper import evaluate
from .thresholds import DiagnosticThresholds

# How figures are judged: as published, or calibrated (see fadiag_fast.protocol.calibrated).
Protocol = Literal["paper", "calibrated"]


PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


def check_protocol(name: str, caller: str) -> None:
    """Raise ValueError where a protocol is not one of :data:`PROTOCOLS`."""
    if name not in PROTOCOLS:
        raise ValueError(f"{caller}: protocol: expected {' or '.join(PROTOCOLS)}, got {name!r}")


def verdict_of(diagnostics: Sequence[Diagnostic], protocol: Protocol = "paper") -> str:
    """Return ``trustworthy``, ``needs walk-back: (a)+(b)`` or ``not enough data``.

    What fired decides. Where nothing did, a diagnostic without enough data keeps the verdict open;
    (d) without a frozen accuracy does not. In the calibrated protocol (c) names a mode of what (a)
    or (b) found, and is not part of the verdict.
    """
    if protocol == "calibrated":
        diagnostics = [diagnostic for diagnostic in diagnostics if diagnostic.key != "c"]
    fired = [f"({diagnostic.key})" for diagnostic in diagnostics if diagnostic.fired]
    if fired:
        return f"needs walk-back: {'+'.join(fired)}"
    if any(diagnostic.status is Status.NOT_ENOUGH_DATA for diagnostic in diagnostics):
        return NOT_ENOUGH_DATA
    return TRUSTWORTHY


def judge_figures(
    figures: Figures,
    thresholds: DiagnosticThresholds | None = None,
    protocol: Protocol = "paper",
) -> tuple[Diagnostic, ...]:
    """Evaluate (a) to (d) by one of the protocols."""
    limits = thresholds or DiagnosticThresholds()
    if protocol == "paper":
        return evaluate(figures, limits)
    growth = calibrated.scale_growth(figures, limits)
    floor = calibrated.credit_gain(figures, limits)
    stability = calibrated.direction_mode(figures, limits, growth.fired or floor.fired)
    return growth, floor, stability, calibrated.depth_utility(figures, limits)
