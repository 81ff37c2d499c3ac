"""What a diagnostic is made of: a statistic, a threshold, and the side of it on which it fires."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from .figures import NOT_ENOUGH_DATA, TRUSTWORTHY, Diagnostic, Figures, Status
from .thresholds import DiagnosticThresholds

# A number that is compared with a threshold, and the index of the hidden state it was taken at;
# None for one of the whole network. (A plain tuple: a scan makes several for each checkpoint.)
Statistic = tuple[float, int | None]


class Reading(NamedTuple):
    """What a rule reads off the figures before its threshold decides.

    Attributes:
        critical: see :meth:`DiagnosticRule.critical_value`.
        describe: returns the diagnostic, given whether the rule fires.
    """

    critical: float | None
    describe: Callable[[bool], Diagnostic]


class Criterion(ABC):
    """A statistic of the figures, compared with one threshold.

    Attributes:
        name: what is compared.
        threshold: the field of :class:`DiagnosticThresholds` that it is compared with.
        comparison: ``>`` or ``<``: the criterion is met where ``value comparison threshold``.
        logarithmic: whether the statistic spreads over powers of ten.
    """

    name: ClassVar[str]
    threshold: ClassVar[str]
    comparison: ClassVar[Literal[">", "<"]]
    logarithmic: ClassVar[bool] = False

    @abstractmethod
    def statistics(self, figures: Figures) -> list[Statistic]:
        """Return what is compared, in the order of depth; empty where nothing was measured.

        A NaN is left out where it takes part in no comparison.
        """

    def threshold_in(self, thresholds: DiagnosticThresholds) -> float:
        """Return the threshold's present value."""
        value: float = getattr(thresholds, self.threshold)
        return value

    def is_beyond(self, value: float, thresholds: DiagnosticThresholds, level: float = 1.0) -> bool:
        """Return whether a value lies on the threshold's far side; at the threshold it does not.

        Args:
            value: of the statistic; NaN is on neither side.
            thresholds: the thresholds.
            level: moves the threshold by this factor away from the healthy side: below 1 it is
                met earlier.
        """
        threshold: float = getattr(thresholds, self.threshold)
        return value > threshold * level if self.comparison == ">" else value < threshold / level


class DiagnosticRule(Criterion):
    """One diagnostic of a protocol.

    Attributes:
        key: its letter, ``a`` … ``d``.
        decisive: whether it takes part in the verdict.
        requirement: the data that it needs; the requirement's criterion is met where they are too
            few. None where any will do.
    """

    key: ClassVar[str]
    decisive: ClassVar[bool] = True
    requirement: Criterion | None = None

    @property
    def always(self) -> float:
        """The critical value of figures at which the rule fires whatever the threshold."""
        return math.inf if self.comparison == ">" else -math.inf

    @property
    def never(self) -> float:
        """The critical value of figures at which the rule fires at no threshold."""
        return -self.always

    @abstractmethod
    def read(
        self, figures: Figures, thresholds: DiagnosticThresholds, earlier: Sequence[Diagnostic] = ()
    ) -> Reading:
        """Read off the figures where the rule changes sides, and how to put it into words.

        Args:
            figures: as recorded.
            thresholds: those beside the rule's own may move the critical value; its own does not.
            earlier: diagnostics of the same figures and thresholds, of the rules before this one.
        """

    def critical_value(self, figures: Figures, thresholds: DiagnosticThresholds) -> float | None:
        """Return the value of the threshold at which the rule changes sides, enough data given.

        It fires where ``critical_value comparison threshold``, so not at the value itself. It is
        infinite where the rule fires at every threshold (:attr:`always`) or at none
        (:attr:`never`), and None where there is nothing to compare.
        """
        return self.read(figures, thresholds).critical

    def has_data(self, figures: Figures, thresholds: DiagnosticThresholds) -> bool:
        """Return whether the rule's requirement is fulfilled."""
        required = self.requirement
        if required is not None:
            for value, _ in required.statistics(figures):
                if required.is_beyond(value, thresholds):
                    return False
        return True

    def evaluate(
        self,
        figures: Figures,
        thresholds: DiagnosticThresholds | None = None,
        earlier: Sequence[Diagnostic] = (),
    ) -> Diagnostic:
        """Evaluate the diagnostic; for the arguments see :meth:`read`."""
        thresholds = thresholds or DiagnosticThresholds()
        critical, describe = self.read(figures, thresholds, earlier)
        return describe(
            critical is not None
            and self.is_beyond(critical, thresholds)
            and self.has_data(figures, thresholds)
        )

    def diagnostic(
        self,
        thresholds: DiagnosticThresholds,
        status: Status,
        label: str,
        value: float | None,
        layer: int | None,
        evidence: str,
    ) -> Diagnostic:
        """Return an outcome of this rule."""
        return Diagnostic(
            self.key,
            self.name,
            value,
            getattr(thresholds, self.threshold),
            self.comparison,
            status,
            label,
            layer,
            evidence,
        )

    def not_enough_data(self, thresholds: DiagnosticThresholds, evidence: str) -> Reading:
        """Return the reading of figures that there is nothing to compare in."""
        return Reading(
            None,
            lambda _: self.diagnostic(
                thresholds, Status.NOT_ENOUGH_DATA, NOT_ENOUGH_DATA, None, None, evidence
            ),
        )


@dataclass(frozen=True)
class DiagnosticProtocol:
    """A set of diagnostics that together give a verdict.

    Attributes:
        name: the protocol's name.
        rules: the diagnostics, each after those that it depends on.
        remarks: criteria that a report mentions, but that take no part in the verdict.
    """

    name: str
    rules: tuple[DiagnosticRule, ...]
    remarks: tuple[Criterion, ...] = ()

    def evaluate(
        self, figures: Figures, thresholds: DiagnosticThresholds | None = None
    ) -> tuple[Diagnostic, ...]:
        """Evaluate all diagnostics."""
        thresholds = thresholds or DiagnosticThresholds()
        diagnostics: list[Diagnostic] = []
        for rule in self.rules:
            diagnostics.append(rule.evaluate(figures, thresholds, diagnostics))
        return tuple(diagnostics)

    def verdict(self, diagnostics: Sequence[Diagnostic]) -> str:
        """Return the verdict of diagnostics that this protocol evaluated."""
        others = {rule.key for rule in self.rules if not rule.decisive}
        decisive = [diagnostic for diagnostic in diagnostics if diagnostic.key not in others]
        return verdict_from(
            [diagnostic.key for diagnostic in decisive if diagnostic.fired],
            any(diagnostic.status is Status.NOT_ENOUGH_DATA for diagnostic in decisive),
        )


def verdict_from(fired: Sequence[str], lacks_data: bool) -> str:
    """Return ``trustworthy``, ``needs walk-back: (a)+(b)`` or ``not enough data``.

    Args:
        fired: keys of the decisive diagnostics that fired.
        lacks_data: whether one of the decisive diagnostics does not have enough data: it keeps the
            verdict open where nothing fired.
    """
    if fired:
        return f"needs walk-back: {'+'.join(f'({key})' for key in fired)}"
    return NOT_ENOUGH_DATA if lacks_data else TRUSTWORTHY
