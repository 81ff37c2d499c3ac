"""What a study trains: models, rules and seeds as plain data, by name or from a TOML file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .._common.extras import require
from ..zoo import MODELS
from ..zoo.rules import rule_class

RULES = ("bp", "frozen", "fa", "dfa", "state-bridge", "credit-bridge", "ep")
SEEDS = (42, 123, 456)


def _check_keys(where: str, table: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise ValueError(
            f"{where}: expected keys among {', '.join(sorted(known))}, got {', '.join(unknown)}"
        )


def _check_count(where: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{where}: expected a whole number of at least 1, got {value!r}")


@dataclass(frozen=True)
class StudyModel:
    """One network of a study.

    Attributes:
        label: its name in tables and folders.
        model: a key of ``zoo.MODELS``.
        options: of its builder.
        steps: updates of its runs; None takes the suite's.
        random_targets: train on labels drawn at random, anew for every seed.

    Raises ValueError for an unknown model, a label that is no folder's name, or steps below 1.
    """

    label: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    random_targets: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.label):
            raise ValueError(
                f"suite: models: expected a label of letters, digits, '.', '_' and '-', "
                f"got {self.label!r}"
            )
        where = f"suite: models.{self.label}"
        if self.model not in MODELS:
            raise ValueError(
                f"{where}.model: expected one of {', '.join(sorted(MODELS))}, got {self.model!r}"
            )
        if not isinstance(self.options, Mapping):
            raise ValueError(f"{where}.options: expected a table, got {self.options!r}")
        if self.steps is not None:
            _check_count(f"{where}.steps", self.steps)
        if not isinstance(self.random_targets, bool):
            raise ValueError(
                f"{where}.random_targets: expected true or false, got {self.random_targets!r}"
            )

    @property
    def variant(self) -> str:
        """The name under which published figures of such a network are found."""
        removed = self.options.get("terminal_norm", True) is False
        name = f"{self.model} without out_ln" if removed else self.model
        return f"{name} on random targets" if self.random_targets else name


@dataclass(frozen=True)
class Suite:
    """A study as data: every model is trained by every rule, with every penalty and seed.

    Attributes:
        name: for the report.
        models: see :class:`StudyModel`.
        rules: keys of ``zoo.RULES`` or ``package.module:Class``. "frozen" is the baseline of (d).
        seeds: non-negative.
        data: see :func:`fadiag_fast.zoo.load_dataset`; empty where it has to be said.
        steps: updates of a run, or None where ``epochs`` say it.
        epochs: passes over the training images, each without its incomplete last batch.
        checkpoints: number of checkpoints a run keeps, at log-spaced steps, the last among them.
        checkpoint_steps: these steps in place of log-spaced ones; the last is always added.
        penalties: λ of the residual penalty; "frozen" runs without one.
        batch_size: samples per update.
        learning_rate: of AdamW, before the cosine schedule.
        weight_decay: of AdamW.
        rule_options: options by rule.
        eval_batches: evaluation batches of an audit.
        eval_batch_size: samples in each; the published floor of (b) belongs to 128.

    Raises ValueError that names the field, what was expected and what was there.
    """

    name: str
    models: tuple[StudyModel, ...]
    rules: tuple[str, ...] = RULES
    seeds: tuple[int, ...] = SEEDS
    data: str = ""
    steps: int | None = None
    epochs: int | None = None
    checkpoints: int = 8
    checkpoint_steps: tuple[int, ...] = ()
    penalties: tuple[float, ...] = (0.0,)
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    rule_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    eval_batches: int = 10
    eval_batch_size: int = 128

    def __post_init__(self) -> None:
        labels = [model.label for model in self.models]
        for name, values in (
            ("models", labels),
            ("rules", self.rules),
            ("seeds", self.seeds),
            ("penalties", self.penalties),
        ):
            if not values:
                raise ValueError(f"suite: {name}: expected at least one, got none")
            if len(set(values)) < len(values):
                raise ValueError(f"suite: {name}: expected each once, got {list(values)}")
        for name in self.rules:
            # A class of one's own is imported when it runs: it may fail there, as a row.
            if not isinstance(name, str) or ":" not in name:
                try:
                    rule_class(str(name))
                except ValueError as error:
                    raise ValueError(f"suite: rules: {error}") from None
        for seed in self.seeds:
            if type(seed) is not int or seed < 0:
                raise ValueError(f"suite: seeds: expected non-negative integers, got {seed!r}")
        for penalty in self.penalties:
            if not isinstance(penalty, int | float) or not 0 <= penalty < math.inf:
                raise ValueError(
                    f"suite: penalties: expected finite numbers of at least 0, got {penalty!r}"
                )
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(
                    f"suite: {name}: expected a finite number of at least 0, got {value!r}"
                )
        for name in ("checkpoints", "batch_size", "eval_batches", "eval_batch_size"):
            _check_count(f"suite: {name}", getattr(self, name))
        for name in ("steps", "epochs"):
            if getattr(self, name) is not None:
                _check_count(f"suite: {name}", getattr(self, name))
        for step in self.checkpoint_steps:
            _check_count("suite: checkpoint_steps", step)
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"suite: expected steps or epochs, got both: {self.steps} and {self.epochs}"
            )
        if self.steps is None and self.epochs is None:
            missing = [model.label for model in self.models if model.steps is None]
            if missing:
                raise ValueError(
                    f"suite: expected steps or epochs for {', '.join(missing)}, got neither"
                )
        unknown = sorted(set(self.rule_options) - set(self.rules))
        if unknown:
            raise ValueError(
                f"suite: rule_options: expected rules of this suite ({', '.join(self.rules)}), "
                f"got {', '.join(unknown)}"
            )

    def steps_of(self, model: StudyModel, train_count: int) -> int:
        """Return the updates of one model's runs, for a number of training images."""
        if model.steps is not None:
            return model.steps
        if self.steps is not None:
            return self.steps
        return int(self.epochs or 0) * max(1, train_count // self.batch_size)

    def marks_of(self, steps: int) -> tuple[int, ...]:
        """Return the steps at which a run of so many updates keeps a checkpoint, ascending."""
        if self.checkpoint_steps:
            return tuple(sorted({step for step in self.checkpoint_steps if step < steps} | {steps}))
        return log_spaced(steps, self.checkpoints)


def log_spaced(steps: int, count: int) -> tuple[int, ...]:
    """Return at most ``count`` different steps from about 10 to ``steps``, in equal ratios.

    Steps before the tenth say little: the first checkpoint is at the tenth, or at the last if
    there are fewer. ``log_spaced(1000, 3)`` is (10, 100, 1000).
    """
    if count == 1 or steps <= 10:
        return (steps,)
    ratio = math.log(steps / 10) / (count - 1)
    return tuple(sorted({round(10 * math.exp(ratio * k)) for k in range(count - 1)} | {steps}))


# Narrow networks and short runs: two CPU cores finish in less than ten minutes.
QUICK = Suite(
    name="quick",
    models=(
        StudyModel("resmlp", "resmlp", {"d_hidden": 128, "num_blocks": 4}, 300),
        StudyModel("smallcnn-narrow", "smallcnn", {"channels": [2, 4, 8], "d_hidden": 32}, 60),
        StudyModel(
            "vit-mini-narrow",
            "vit-mini",
            {"d_hidden": 32, "num_blocks": 4, "num_heads": 2, "mlp_ratio": 2, "patch_size": 7},
            100,
        ),
    ),
    seeds=(42, 123),
    data="fashion-mnist-mini",
    checkpoints=5,
)

# The published sizes; the data is the user's: cifar10:FOLDER as published, or another set.
PAPER = Suite(
    name="paper",
    models=(
        StudyModel("resmlp", "resmlp", {"d_hidden": 256, "num_blocks": 4}),
        StudyModel("smallcnn", "smallcnn"),
        StudyModel("vit-mini", "vit-mini"),
    ),
    epochs=100,
    checkpoints=16,
)

# The residual penalty from 1e-4 to 1e-1, in the published penalty runs' 30 epochs.
PENALTY = Suite(
    name="penalty",
    models=PAPER.models[:1],
    epochs=30,
    penalties=(0.0, 1e-4, 1e-3, 1e-2, 1e-1),
    checkpoints=12,
)

# The same network with and without the norm that divides the gradient by the stream's scale.
TERMINAL_NORM = Suite(
    name="terminal-norm",
    models=(
        StudyModel("resmlp", "resmlp", {"d_hidden": 256, "num_blocks": 4}),
        StudyModel(
            "resmlp-no-norm",
            "resmlp",
            {"d_hidden": 256, "num_blocks": 4, "terminal_norm": False},
        ),
    ),
    rules=("bp", "frozen", "dfa"),
    epochs=100,
    checkpoints=16,
)

# Labels that say nothing: what still grows or vanishes is the rule's doing and not the task's.
RANDOM_TARGETS = Suite(
    name="random-targets",
    models=(
        *PAPER.models[:1],
        StudyModel(
            "resmlp-random-targets",
            "resmlp",
            {"d_hidden": 256, "num_blocks": 4},
            random_targets=True,
        ),
    ),
    epochs=30,
    checkpoints=12,
)

# A residual network without a terminal norm, on labels that another network gave.
TEACHER = Suite(
    name="teacher",
    models=(StudyModel("student", "student"),),
    data="teacher",
    epochs=30,
    checkpoints=12,
)

SUITES = {
    suite.name: suite for suite in (QUICK, PAPER, PENALTY, TERMINAL_NORM, RANDOM_TARGETS, TEACHER)
}


def load_suite(name: str) -> Suite:
    """Return a suite by its name, or read one from a TOML file.

    Args:
        name: a key of ``SUITES``, or a path that ends in ``.toml``. The file's keys are the fields
            of :class:`Suite`; each network is a table ``[models.LABEL]`` with the keys ``model``
            (by default the label), ``options``, ``steps`` and ``random_targets``, and
            ``[rule_options.RULE]`` has the options of a rule.

    Raises ValueError for another name or a file that does not fit, FileNotFoundError for one that
    is not there, and MissingExtra where Python has no TOML reader (before 3.11).
    """
    if not name.endswith(".toml"):
        if name not in SUITES:
            raise ValueError(
                f"--suite: expected {', '.join(SUITES)} or a file that ends in .toml, got {name!r}"
            )
        return SUITES[name]
    path = Path(name)
    toml = require("tomllib", "a suite in TOML", extra="")
    try:
        content = toml.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"--suite: expected a file {path}, got none") from None
    except (toml.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"--suite: {path}: expected TOML, got {error}") from None
    try:
        return suite_from(content, default_name=path.stem)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None


def suite_from(content: Mapping[str, Any], *, default_name: str) -> Suite:
    """Make a suite of plain values, as TOML gives them; see :func:`load_suite`."""
    known = {one.name for one in fields(Suite)}
    _check_keys("suite", content, known)
    values: dict[str, Any] = {"name": default_name, **content}
    tables = values.get("models", {})
    if not isinstance(tables, Mapping):
        raise ValueError(f"suite: models: expected tables [models.LABEL], got {tables!r}")
    models = []
    known_of_model = {one.name for one in fields(StudyModel)} - {"label"}
    for label, table in tables.items():
        if not isinstance(table, Mapping):
            raise ValueError(f"suite: models.{label}: expected a table, got {table!r}")
        _check_keys(f"suite: models.{label}", table, known_of_model)
        models.append(StudyModel(label, **{"model": label, **table}))
    values["models"] = tuple(models)
    for name in ("rules", "seeds", "penalties", "checkpoint_steps"):
        if name in values:
            if not isinstance(values[name], list):
                raise ValueError(f"suite: {name}: expected a list, got {values[name]!r}")
            values[name] = tuple(values[name])
    for name in ("name", "data"):
        if not isinstance(values.get(name, ""), str):
            raise ValueError(f"suite: {name}: expected text, got {values[name]!r}")
    options = values.get("rule_options", {})
    if not isinstance(options, Mapping) or not all(
        isinstance(o, Mapping) for o in options.values()
    ):
        raise ValueError(f"suite: rule_options: expected tables by rule, got {options!r}")
    return Suite(**values)
