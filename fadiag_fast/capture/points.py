"""Taps: the places at which a network is observed, and the error where there is none."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from .tracing import Sighting, Trace, trace

Select = str | type[nn.Module] | nn.Module | Sequence["Select"]


CountsSamples = Callable[[Tensor], bool]


_MOST_LISTED = 12


class TapError(ValueError):
    """Report a network whose hidden states cannot be found where they were asked for."""


@dataclass(frozen=True)
class Tap:
    """One place at which a hidden state is seen.

    Attributes:
        module: qualified name of a module; "" is the model itself.
        at: whether the module's input or output, or the state number ``call`` that the model
            hands out under ``return_hidden=True``.
        call: which of the module's calls, from 0.
        label: the state's name in reports.
    """

    module: str
    at: Literal["input", "output", "hidden"]
    call: int
    label: str

    @property
    def where(self) -> str:
        """The place in words, for messages."""
        if self.at == "hidden":
            return f"hidden {self.call}"
        again = f" (call {self.call + 1})" if self.call else ""
        return f"{self.at} of {self.module or 'the model'}{again}"


@dataclass(frozen=True)
class Taps:
    """Where the hidden states of a network are.

    Attributes:
        points: one per hidden state, in the order in which they are passed.
        chosen: how they were found, in words.
        asked: how many modules were asked for.
        unseen: names among them that were never called.
        remarks: sentences that a reader of the figures should know.
        chain_starts: indices of the states with which a second or later chain of blocks begins.
        passed_over: other chains that might have been observed, in words.
    """

    points: tuple[Tap, ...]
    chosen: str
    asked: int
    unseen: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    chain_starts: tuple[int, ...] = ()
    passed_over: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(tap.label for tap in self.points)

    @property
    def hands_out(self) -> bool:
        """Whether the model must be called with ``return_hidden=True``."""
        return bool(self.points) and self.points[0].at == "hidden"

    @property
    def coverage(self) -> str:
        """What was asked for and what was seen."""
        seen = self.asked - len(self.unseen)
        return f"{self.chosen}: asked for {self.asked}, saw {seen}, {len(self.points)} states"

    @property
    def observed(self) -> str:
        """What is observed and what is not, in one line."""
        seen = self.asked - len(self.unseen)
        line = f"observed: {self.chosen}, asked for {self.asked}, saw {seen}"
        if self.unseen:
            line += f" (not called: {listed(self.unseen)})"
        line += f"; {len(self.points)} states, {self.points[0].label} to {self.points[-1].label}"
        if self.passed_over:
            line += f"; passed over: {', '.join(self.passed_over)}"
        return line


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile`` and (Distributed)DataParallel wrappers."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def sighting_at(seen: Trace, tap: Tap) -> Sighting | None:
    """Return what a trace saw at a tap; None if the module was not called that often."""
    if tap.at == "hidden":
        _, hiddens = split_hidden(seen.output, "the model")
        return seen.recorder.sighting(hiddens[tap.call]) if tap.call < len(hiddens) else None
    for call in seen.calls:
        if call.name == tap.module and call.call == tap.call:
            return call.input if tap.at == "input" else call.output
    return None


def offers_hidden(model: nn.Module) -> bool:
    return "return_hidden" in inspect.signature(model.forward).parameters


def handed(model: nn.Module, x: Any) -> tuple[Taps, Trace]:
    seen = trace(model, x, return_hidden=True)
    _, hiddens = split_hidden(seen.output, type(model).__name__)
    points = tuple(Tap("", "hidden", i, f"hidden {i}") for i in range(len(hiddens)))
    return Taps(points, "return_hidden=True", len(points)), seen


def split_hidden(output: object, where: str) -> tuple[Tensor, list[Tensor]]:
    """Split what ``model(x, return_hidden=True)`` returned into logits and hidden states."""
    if not isinstance(output, tuple | list) or len(output) != 2:
        raise TapError(
            f"{where}: expected (logits, hiddens) from return_hidden=True, "
            f"got {type(output).__name__}"
        )
    logits, hiddens = output
    if not isinstance(hiddens, tuple | list) or len(hiddens) == 0:
        raise TapError(
            f"{where}: expected a non-empty list of hidden states from return_hidden=True, "
            f"got {type(hiddens).__name__}"
            + (" of length 0" if isinstance(hiddens, tuple | list) else "")
        )
    for name, value in (("logits", logits), *((f"hidden {i}", h) for i, h in enumerate(hiddens))):
        if not isinstance(value, Tensor):
            raise TapError(f"{where}: {name}: expected one tensor, got {type(value).__name__}")
    return logits, list(hiddens)


def listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_LISTED])
    return shown + (f", … ({len(names)} in all)" if len(names) > _MOST_LISTED else "")
