"""Training rules by name: see :mod:`fadiag_fast.zoo.rules.base` for how to write another."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..._common.named import load_named
from .base import ForwardStates, Rule
from .bp import Backpropagation
from .credit_bridge import CreditBridge
from .dfa import DirectFeedbackAlignment
from .ep import EquilibriumPropagation
from .fa import FeedbackAlignment
from .frozen import FrozenBlocks
from .state_bridge import StateBridge

__all__ = [
    "RULES",
    "Backpropagation",
    "CreditBridge",
    "DirectFeedbackAlignment",
    "EquilibriumPropagation",
    "FeedbackAlignment",
    "ForwardStates",
    "FrozenBlocks",
    "Rule",
    "StateBridge",
    "make_rule",
    "rule_class",
]

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        Backpropagation,
        CreditBridge,
        DirectFeedbackAlignment,
        EquilibriumPropagation,
        FeedbackAlignment,
        FrozenBlocks,
        StateBridge,
    )
}


def rule_class(name: str) -> type[Rule]:
    """Look a training rule up: a key of ``RULES``, or ``package.module:Class`` of one's own.

    ``state_bridge`` is ``state-bridge``, as in the names of the CNN audit's files.
    The module is imported, from the working directory too, so a name with a colon must come from a
    trusted place. Raises ValueError that lists the names that exist, or says what was found in
    place of a rule.
    """
    if ":" not in name:
        known = RULES.get(name, RULES.get(name.replace("_", "-")))
        if known is None:
            names = ", ".join(sorted(RULES))
            raise ValueError(
                f"make_rule: expected one of {names}, or package.module:Class, got {name!r}"
            )
        return known
    try:
        found = load_named(name)
    # What a user's own code may raise has no bounds; a script that parses arguments exits.
    except (Exception, SystemExit) as error:
        what = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"make_rule: expected package.module:Class, got {name!r}: {what}"
        ) from None
    if not (isinstance(found, type) and issubclass(found, Rule)):
        raise ValueError(f"make_rule: expected {name} to be a subclass of Rule, got {found!r}")
    return found


def make_rule(
    name: str,
    model: nn.Module,
    *,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    total_steps: int,
    seed: int = 0,
    penalty: float = 0.0,
    **options: Any,
) -> Rule:
    """Make the training rule of one name for a model.

    Args:
        name: a key of ``RULES``: "bp", "credit-bridge", "dfa", "ep", "fa", "frozen" or
            "state-bridge"; or ``package.module:Class`` of one's own.
        model: see :class:`Rule`; it is trained in place.
        learning_rate: of AdamW, before the cosine schedule.
        weight_decay: of AdamW.
        total_steps: number of updates the schedule spans.
        seed: of the rule's own draws.
        penalty: λ of the residual penalty in every block's local loss; not with "frozen".
        options: what that rule adds: its own keyword arguments, and ``train_embed``.

    Raises ValueError for an unknown name (the message lists those that exist) and TypeError for
    an option the rule does not have or a model it cannot train. Source: 'Beyond Accuracy and
    Alignment' protocol, arXiv 2606.21126.
    """
    return rule_class(name)(
        model,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        total_steps=total_steps,
        seed=seed,
        penalty=penalty,
        **options,
    )
