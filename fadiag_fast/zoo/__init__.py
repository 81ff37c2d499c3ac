"""Small networks, credit rules and data that show what the probe sees."""

from .credit import restore_rule, rule_credit
from .data import ImageDataset, load_dataset, teacher_dataset
from .models import (
    MODELS,
    ModelSpec,
    ResidualMLP,
    SmallCNN,
    StudentNet,
    ViTMini,
    build_model,
    model_spec,
)
from .resuming import CannotResume
from .rules import RULES, Rule, make_rule
from .training import TrainedNetwork, accuracy, train

__all__ = [
    "MODELS",
    "RULES",
    "CannotResume",
    "ImageDataset",
    "ModelSpec",
    "ResidualMLP",
    "Rule",
    "SmallCNN",
    "StudentNet",
    "TrainedNetwork",
    "ViTMini",
    "accuracy",
    "build_model",
    "load_dataset",
    "make_rule",
    "model_spec",
    "restore_rule",
    "rule_credit",
    "teacher_dataset",
    "train",
]
