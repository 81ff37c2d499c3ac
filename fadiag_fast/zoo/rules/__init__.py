"""Training rules by name: see :mod:`fadiag_fast.zoo.rules.base` for how to write another."""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import ForwardStates, Rule
from .bp import Backpropagation
from .dfa import DirectFeedbackAlignment
from .ep import EquilibriumPropagation
from .frozen import FrozenBlocks

__all__ = [
    "RULES",
    "Backpropagation",
    "DirectFeedbackAlignment",
    "EquilibriumPropagation",
    "ForwardStates",
    "FrozenBlocks",
    "Rule",
    "make_rule",
]

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (Backpropagation, DirectFeedbackAlignment, EquilibriumPropagation, FrozenBlocks)
}


def make_rule(
    name: str,
    model: nn.Module,
    *,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    total_steps: int,
    seed: int = 0,
    **options: Any,
) -> Rule:
    """Make the training rule of one name for a model.

    Args:
        name: a key of ``RULES``: "bp", "dfa", "ep" or "frozen".
        model: see :class:`Rule`; it is trained in place.
        learning_rate: of AdamW, before the cosine schedule.
        weight_decay: of AdamW.
        total_steps: number of updates the schedule spans.
        seed: of the rule's own draws.
        options: what that rule adds ("dfa": train_embed; "ep": beta, relaxation_steps,
            relaxation_rate, train_embed; "frozen": train_embed).

    Raises ValueError for an unknown name (the message lists those that exist) and TypeError for
    an option the rule does not have or a model it cannot train. Source: 'Beyond Accuracy and
    Alignment' protocol, arXiv 2606.21126.
    """
    try:
        rule = RULES[name]
    except KeyError:
        known = ", ".join(sorted(RULES))
        raise ValueError(f"make_rule: expected one of {known}, got {name!r}") from None
    return rule(
        model,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        total_steps=total_steps,
        seed=seed,
        **options,
    )
