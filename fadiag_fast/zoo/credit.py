"""Measure the credit of a training rule, and of a checkpoint that one was saved with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..credit import CreditReport, measure_credit
from .rules import RULES, Rule, make_rule


def rule_credit(rule: Rule, batch: tuple[Tensor, Tensor], **options: Any) -> CreditReport:
    """Measure Γ, ρ, nudge and null of a rule on its model.

    Args:
        rule: gives the credit; its model is left as it was found.
        batch: (x, y), as the model takes it.
        options: of :func:`fadiag_fast.credit.measure_credit`. ``reduction`` is by default what the
            model's anatomy says: the class token in a transformer, all features elsewhere.

    Returns the report. The null is left out for a rule that draws nothing. Layer l is the output of
    block l, where the rule's credit a_l belongs.
    """
    options = {"reduction": rule.anatomy.credit_reduction, **options}
    if rule.state_dict():
        options = {"fresh": lambda seed: rule.redrawn(seed).credit, **options}
    return measure_credit(rule.model, rule.credit, batch, **options)


def restore_rule(
    model: nn.Module, saved: Mapping[str, Any], *, rule_name: str | None = None
) -> Rule:
    """Make the rule that a checkpoint was saved with, feedback and auxiliary networks included.

    Args:
        model: with the checkpoint's weights.
        saved: what the checkpoint holds beside them: ``config`` and ``rule_state``.
        rule_name: the rule's name; by default the one in ``config``, if it is one of ``RULES``. A
            class of one's own (``package.module:Class``) is imported only when named here: a file
            does not decide what code runs.

    Raises ValueError that says what is missing: the rule's name, or its state. Without its feedback
    a rule's credit cannot be computed again, and no other stands in for it.
    """
    config = saved.get("config")
    config = config if isinstance(config, Mapping) else {}
    name = rule_name or config.get("rule")
    if name is None:
        raise ValueError("the checkpoint does not say by which rule it was trained")
    if rule_name is None and name not in RULES:
        raise ValueError(f"the checkpoint's rule {name!r} is none of the package's; name it")
    state = saved.get("rule_state", {})
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(
            "the checkpoint's rule_state: expected tensors by name, got something else"
        )
    rule = make_rule(
        name,
        model,
        total_steps=max(1, int(config.get("steps", 1))),
        penalty=float(config.get("penalty", 0.0)),
        **dict(config.get("rule_options", {})),
    )
    if rule.state_dict() and not state:
        raise ValueError(f"the checkpoint holds no feedback of its rule {name!r} (rule_state)")
    rule.load_state_dict(state)
    return rule
