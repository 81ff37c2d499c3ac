"""Judge figures by a protocol, and draw the verdict."""

from collections.abc import Sequence
from typing import Literal, get_args

from .calibrated import CALIBRATED
from .figures import Diagnostic, Figures
from .paper import PAPER
from .rules import DiagnosticProtocol
from .thresholds import DiagnosticThresholds

# How figures are judged: as published, or calibrated (see fadiag_fast.protocol.calibrated).
Protocol = Literal["paper", "calibrated"]


PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

_BY_NAME: dict[Protocol, DiagnosticProtocol] = {"paper": PAPER, "calibrated": CALIBRATED}


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
    return _BY_NAME[protocol].verdict(diagnostics)


def judge_figures(
    figures: Figures,
    thresholds: DiagnosticThresholds | None = None,
    protocol: Protocol = "paper",
) -> tuple[Diagnostic, ...]:
    """Evaluate (a) to (d) by one of the protocols."""
    return _BY_NAME[protocol].evaluate(figures, thresholds)
