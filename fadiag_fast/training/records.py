"""What the probe says of one training step, as plain numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .._common.jsonio import number, strict
from ..checkpoints.errors import printable
from ..protocol import OUTPUT, growth_ratios

# What every step has anew. The rest is mostly the same in all records of a run.
FIGURES = frozenset(
    {"step", "hidden_norms", "rms_norms", "grad_norms", "credit_gains", "output_grad_norm"}
    | {"stabilities", "average_cosines", "num_directions"}
)
_TEXTS = ("layers", "unreached", "autocast", "loss_reduction", "gain_reference", "observed")
_WHOLE = ("chain_starts",)
# A NaN there says that the state or its gradient is not finite, not that nothing was measured.
_NEVER_NAN = ("hidden_norm", "grad_norm")


@dataclass(frozen=True)
class StepRecord:
    """The figures of one optimiser step; n hidden states are observed.

    Attributes:
        step: optimiser steps finished before this one: the first is 0.
        layers: names of the hidden states, ``n``.
        hidden_norms: median ‖h_l‖ over the step's samples, ``n``.
        rms_norms: median ‖h_l‖ over the root of the number of features that the step's own states
            have, ``n``.
        grad_norms: median ‖g_l‖ over the step's samples, ``n``: of the loss as it was trained, with
            the factor 1/B of a mean; a gradient scaler's factor is removed.
        credit_gains: median ‖g_l‖ / ‖∂loss/∂logits‖ over the step's samples, ``n``; relative to
            what ``gain_reference`` says.
        output_grad_norm: median ‖∂loss/∂logits‖: of what ``gain_reference`` says. Where the model
            ends in a softmax, a log-softmax or a sigmoid, the logits are what goes into it.
        stabilities: per state the mean cosine of this step's batch-mean gradient with those of the
            last K recorded steps, ``n``; NaN where none is kept.
        average_cosines: the same with their exponential average, ``n``.
        num_directions: how many past directions ``stabilities`` is a mean over.
        num_samples: samples of the step, over all micro-batches and ranks.
        micro_batches: forward passes with a backward pass in this step.
        skipped: whether a gradient scaler skipped the step, for it met an infinity or a NaN.
        loss_scale: the factor that was removed; 1.0 without a scaler.
        autocast: the dtype of autocast in the forward pass, such as ``bfloat16``; None without.
        unreached: observed states that no forward or no gradient reached in this step; what did
            not arrive is NaN.
        loss_reduction: how the user says that the loss is reduced: it scales ``grad_norms``.
        world_size: ranks that the figures are over, those of tensor parallelism included.
        chain_starts: indices of the states with which a second or later chain of blocks begins;
            growth is compared inside a chain only.
        gain_reference: what credit gains are relative to: ``output``, or the name of the last
            observed state where the step has shown no logits with a row for each sample.
        observed: what is observed, in words; see :attr:`fadiag_fast.capture.points.Taps.observed`.
    """

    step: int
    layers: tuple[str, ...]
    hidden_norms: tuple[float, ...]
    rms_norms: tuple[float, ...]
    grad_norms: tuple[float, ...]
    credit_gains: tuple[float, ...]
    output_grad_norm: float
    stabilities: tuple[float, ...]
    average_cosines: tuple[float, ...]
    num_directions: int
    num_samples: int
    micro_batches: int = 1
    skipped: bool = False
    loss_scale: float = 1.0
    autocast: str | None = None
    unreached: tuple[str, ...] = ()
    loss_reduction: str = "mean"
    world_size: int = 1
    chain_starts: tuple[int, ...] = ()
    gain_reference: str = OUTPUT
    observed: str = ""

    def _check(self) -> None:
        """Check what a file may say otherwise: kinds of values, and one figure per layer.

        Raises:
            TypeError: a field holds a value of another kind.
            ValueError: a number for each layer is missing, or one is beyond 64 bits.
        """
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if not is_of_kind(kind, value):
                raise TypeError(
                    f"StepRecord: {field.name}: expected {kind}, got {printable(repr(value))}"
                )
            if kind == "tuple[float, ...]" and len(value) != len(self.layers):
                raise ValueError(
                    f"StepRecord: {field.name}: expected {len(self.layers)} numbers, one for each "
                    f"layer, got {len(value)}"
                )

    @classmethod
    def of(cls, **values: Any) -> StepRecord:
        """Return a record of all its fields, in a seventh of the constructor's time.

        That sets each field of a frozen dataclass by a call, which a small training step feels.
        """
        record = object.__new__(cls)
        record.__dict__.update(values)
        return record

    @property
    def growth(self) -> float:
        """Largest ‖h_{l+1}‖ / ‖h_l‖ of medians, as diagnostic (a) reads it; 1.0 for one state.

        A norm that is not finite stands for it: NaN or infinity, at the first such state.
        """
        return self._largest_growth()[0]

    @property
    def growth_layer(self) -> str:
        """The state that the largest growth leads to, or the first one that is not finite."""
        return self.layers[self._largest_growth()[1]]

    def _largest_growth(self) -> tuple[float, int]:
        for l, norm in enumerate(self.hidden_norms):
            # NaN is also the norm of a state that the forward pass has left out.
            if not math.isfinite(norm) and self._is_known(l):
                return norm, l
        ratios = growth_ratios(self.hidden_norms, self.chain_starts)
        known = [(ratio, l + 1) for l, ratio in enumerate(ratios) if not math.isnan(ratio)]
        return max(known, key=lambda pair: pair[0], default=(1.0, 0))

    def _is_known(self, l: int) -> bool:
        return self.layers[l] not in self.unreached

    def metrics(self, prefix: str = "fadiag/") -> dict[str, float]:
        """Return flat names and numbers for a logger: ``fadiag/grad_norm/blocks.3`` and so on."""
        found = {f"{prefix}growth": self.growth, f"{prefix}output_grad_norm": self.output_grad_norm}
        for title, values in (
            ("hidden_norm", self.hidden_norms),
            ("grad_norm", self.grad_norms),
            ("credit_gain", self.credit_gains),
            ("stability", self.stabilities),
            ("average_cosine", self.average_cosines),
        ):
            for layer, value in zip(self.layers, values, strict=True):
                if not math.isnan(value) or (title in _NEVER_NAN and layer not in self.unreached):
                    found[f"{prefix}{title}/{layer}"] = value
        return found

    def to_mapping(self) -> dict[str, Any]:
        """Return the fields for JSON; NaN and infinities stand as ``"NaN"``, ``"-Infinity"`` …"""
        found: dict[str, Any] = strict(asdict(self))
        return found

    def to_json(self) -> str:
        """Return one line of JSON; NaN and infinities stand as ``"NaN"``, ``"-Infinity"`` …"""
        return json.dumps(self.to_mapping())

    @classmethod
    def from_json(cls, line: str) -> StepRecord:
        """Return what :meth:`to_json` wrote; names that this version does not know are left out."""
        return cls.from_mapping(json.loads(line))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> StepRecord:
        """Return a record from the values of a JSON line.

        Raises:
            TypeError: a field is missing, or holds a value of another kind.
            ValueError: there is not one number for each layer.
        """
        known = {field.name: field for field in fields(cls)}
        record = cls(
            **{
                name: _whole(value) if name in _WHOLE else _from_json(value, text=name in _TEXTS)
                for name, value in values.items()
                if name in known
            }
        )
        record._check()
        return record


def is_of_kind(kind: str, value: Any) -> bool:
    """Return whether a value is of a kind, as annotations of the record's fields say it."""
    if kind.startswith("tuple["):
        item = kind[len("tuple[") :].partition(",")[0]
        return isinstance(value, tuple | list) and all(is_of_kind(item, one) for one in value)
    if kind.endswith(" | None"):
        return value is None or is_of_kind(kind.removesuffix(" | None"), value)
    if kind == "int":
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and -(2**63) <= value < 2**63
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, {"bool": bool, "str": str}.get(kind, object))


def _whole(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _from_json(value: Any, text: bool) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(item, text) for item in value)
    return value if text else number(value)
