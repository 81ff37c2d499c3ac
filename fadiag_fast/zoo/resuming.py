"""Carry a training over from one process to another, so that it goes on as if nothing had been.

What is carried is what a :class:`~fadiag_fast.zoo.rules.Rule` knows of: the model's and the rule's
``state_dict``, those of its optimiser and schedule, and every generator it holds. That may not be
all: a rule of one's own may count in a Python number, keep a tensor in an attribute, or be another
by now, its file having been edited. So a state has a digest of everything that is found in the rule
and of its source, and it is refused where the digest of what was restored is another.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import secrets
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from .graphed_steps import host_state
from .rules import Rule

_PROCESS = secrets.token_hex(16)


class CannotResume(ValueError):
    """A training cannot go on from a state: it is damaged, of other arguments, or not complete."""


def training_state(rule: Rule, losses: Tensor, config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy what a training is made of, for ``torch.save``; tensors are on the CPU.

    Args:
        rule: as it is between two steps, with the model in eval mode.
        losses: ``[done]``, of the steps so far.
        config: the arguments of the training; only their digest is kept.
    """
    state = {
        "model": rule.model.state_dict(),
        "rule": rule.state_dict(),
        "optimizer": rule.optimizer.state_dict(),
        "scheduler": rule.scheduler.state_dict(),
        "generators": {where: one.get_state() for where, one in _generators(rule).items()},
        "losses": losses,
    }
    copied: dict[str, Any] = tree_map_only(Tensor, lambda t: t.detach().cpu().clone(), state)
    return {**copied, "digest": _digest(rule, losses, config)}


def load_training_state(rule: Rule, state: Mapping[str, Any], config: Mapping[str, Any]) -> Tensor:
    """Restore what :func:`training_state` returned, in a rule just made; return the losses.

    Raises CannotResume, which leaves model and rule as they happen to be, for a state that is
    damaged, of another configuration or of other code, and for a rule that keeps more from step to
    step than is carried.
    """
    try:
        rule.model.load_state_dict(state["model"])
        rule.load_state_dict(state["rule"])
        _load_optimizer(rule.optimizer, state["optimizer"])
        rule.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
        for where, generator in _generators(rule).items():
            generator.set_state(state["generators"][where])
        losses: Tensor = state["losses"]
        whole = _digest(rule, losses, config) == state["digest"]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a state of unknown origin makes of it
        raise CannotResume(f"train: resume: expected a whole training state: {error}") from error
    if not whole:
        raise CannotResume(
            "train: resume: expected the state of a training with the same arguments, rule and "
            "code, and a rule that keeps nothing else from step to step"
        )
    return losses


def _load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    rates = [group["lr"] for group in optimizer.param_groups]
    # A copy: torch goes on to write into the tensors it is given.
    optimizer.load_state_dict(copy.deepcopy(dict(state)))
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        # A rate on the device is the schedule's too, and stays the tensor that it writes into.
        if isinstance(rate, Tensor):
            group["lr"] = rate.copy_(group["lr"])


def _generators(rule: Rule) -> dict[str, torch.Generator]:
    found = host_state(rule)
    return {where: one for where, one in found.items() if isinstance(one, torch.Generator)}


def _digest(rule: Rule, losses: Tensor, config: Mapping[str, Any]) -> str:
    """Tell one state of a training from any other that would go on otherwise."""
    held = {
        where: value
        for where, value in host_state(rule).items()
        # Torch's own bookkeeping differs between a new optimiser and a used one, and how often a
        # tensor was written does not matter.
        if not where.startswith(("rule.optimizer.", "rule.scheduler."))
        and not where.endswith(" (written)")
    }
    descent = [rule.optimizer.state_dict(), rule.scheduler.state_dict()]
    leaves, structure = tree_flatten([dict(config), losses, descent, held, _source(type(rule))])
    digest = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, torch.Generator):
            leaf = leaf.get_state()
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {list(leaf.shape)}".encode())
            flat = leaf.detach().cpu().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


@functools.cache
def _source(rule: type[Rule]) -> list[str]:
    """Return the source of every module that a rule's class and its bases are from.

    As it is when first asked for: a file may be edited while what it was before still runs. A class
    without one, typed into an interpreter, is itself and no other.
    """
    names = {cls.__module__ for cls in rule.__mro__} - {"builtins"}
    try:
        return [inspect.getsource(sys.modules[name]) for name in sorted(names)]
    except (OSError, TypeError):
        return [f"{_PROCESS} {id(rule)}"]
