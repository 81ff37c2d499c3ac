"""The four diagnostics and the verdict, from plain figures.

Source: the diagnostic protocol of "Beyond Accuracy and Alignment" (arXiv 2606.21126). Everything
here is arithmetic on Python numbers: a scan, a training probe and ``diagnose`` share it.
"""

from __future__ import annotations

from .explanations import explain_disagreement, explain_shapes
from .figures import (
    NOT_ENOUGH_DATA,
    OUTPUT,
    TRUSTWORTHY,
    Diagnostic,
    Figures,
    Status,
    growth_ratios,
    middle_layer,
)
from .judging import PROTOCOLS, Protocol, check_protocol, verdict_of
from .paper import depth_utility, evaluate
from .rules import Criterion, DiagnosticProtocol, DiagnosticRule
from .thresholds import DiagnosticThresholds

__all__ = [
    "NOT_ENOUGH_DATA",
    "OUTPUT",
    "PROTOCOLS",
    "TRUSTWORTHY",
    "Criterion",
    "Diagnostic",
    "DiagnosticProtocol",
    "DiagnosticRule",
    "DiagnosticThresholds",
    "Figures",
    "Protocol",
    "Status",
    "check_protocol",
    "depth_utility",
    "evaluate",
    "explain_disagreement",
    "explain_shapes",
    "growth_ratios",
    "middle_layer",
    "verdict_of",
]
