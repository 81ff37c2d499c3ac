"""Train a small network with one credit rule, repeatably, and keep what an audit needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .data import ImageDataset
from .graphed_steps import Stepper, recording_stream
from .models import build_model, model_spec
from .resuming import load_training_state, training_state
from .rules import Rule, make_rule

# How often, at most, a progress callback is called during one training run. Each call reads the
# loss, which on an accelerator waits for the step to finish.
PROGRESS_CALLS = 100


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """Hold a trained model with what is needed to audit it and to make it again.

    Attributes:
        model: the module, in eval mode, on the device it was trained on.
        rule: the rule that trained it; ``rule.credit(x, y)`` gives its credit vectors.
        accuracy: fraction of the test set classified correctly, in [0, 1].
        history: (step, loss) of every step; steps count from 1, the loss is the mean
            cross-entropy of that step's batch before the update.
        config: every argument of the run, as plain Python values.
        graphed_steps: updates that repeated a recorded one, as a CUDA graph; 0 on the CPU. Those
            before the state that a training went on from are not counted.
        graph_note: why updates could not be recorded, "" where they were or need not be.
    """

    model: nn.Module
    rule: Rule
    accuracy: float
    history: list[tuple[int, float]]
    config: dict[str, Any]
    graphed_steps: int = 0
    graph_note: str = ""
    _steps: Stepper | None = field(default=None, repr=False)

    def checkpoint(self) -> dict[str, Any]:
        """Copy the run into a dictionary that ``torch.load(weights_only=True)`` can read back.

        Returns ``state_dict`` (the model's), ``rule_state`` (the rule's tensors, such as feedback
        matrices, without which its credit cannot be computed again) and ``config`` (plain Python
        values, the accuracy among them). All tensors are copies on the CPU.
        """
        return {
            "state_dict": _copy_to_cpu(self.model.state_dict()),
            "rule_state": _copy_to_cpu(self.rule.state_dict()),
            "config": {**self.config, "accuracy": self.accuracy},
        }

    def training_state(self) -> dict[str, Any]:
        """Copy what :func:`train` needs to go on from here, its argument ``resume``.

        Within ``on_checkpoint`` only; ValueError elsewhere. Model, rule (tensors, networks,
        optimiser, schedule and generators) and losses: some three times a checkpoint's size, all
        tensors on the CPU, and readable by ``torch.load(weights_only=True)``.
        """
        if self._steps is None:
            raise ValueError("training_state: expected a network that trains on, got a trained one")
        config = {name: value for name, value in self.config.items() if name != "step"}
        return training_state(self.rule, self._steps.losses(), config)


def train(
    model_name: str,
    rule_name: str,
    dataset: ImageDataset,
    *,
    steps: int = 1200,
    batch_size: int = 128,
    seed: int = 42,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    penalty: float = 0.0,
    model_options: Mapping[str, Any] | None = None,
    rule_options: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
    checkpoint_steps: Collection[int] = (),
    on_checkpoint: Callable[[int, TrainedNetwork], None] | None = None,
    graph: bool = True,
    stop: Callable[[], bool] | None = None,
    resume: Mapping[str, Any] | None = None,
) -> TrainedNetwork:
    """Train a model of the registry with one rule on one image set.

    Args:
        model_name: a key of ``MODELS``: "resmlp", "smallcnn", "student" or "vit-mini".
        rule_name: a key of ``RULES``, or ``package.module:Class``; see :func:`make_rule`.
        dataset: see :func:`load_dataset`.
        steps: number of updates; the cosine schedule spans all of them.
        batch_size: samples in a batch. Every epoch is shuffled anew and its incomplete last batch
            is left out.
        seed: of the initial weights, the shuffling and the rule's own draws, which come from three
            independent streams; non-negative.
        learning_rate: of AdamW, before the cosine schedule.
        weight_decay: of AdamW.
        penalty: λ of the residual penalty in every block's local loss.
        model_options: options of the model (see :func:`build_model`).
        rule_options: options of the rule (see :func:`make_rule`).
        device: where to train. Initial weights, order of samples and feedback matrices do not
            depend on it.
        progress: called as ``progress(done, total, loss)``, with the loss as text, about a hundred
            times and after the last step.
        checkpoint_steps: after which updates, from 1 to ``steps``, to call ``on_checkpoint``.
        on_checkpoint: called as ``on_checkpoint(step, network)`` with the network as it is then,
            its accuracy on the test set included; ``config`` has the ``step``, ``history`` is
            empty. The network is in eval mode and trains on afterwards: keep a copy
            (``network.checkpoint()``), not the object.
        graph: on CUDA, record one update as a CUDA graph and repeat it, which gives the same bits
            several times as fast. A rule that cannot be recorded, because it reads from the device
            or counts on the host (see :meth:`Rule.count_step`), trains with ordinary updates and a
            RuntimeWarning.
        stop: asked before every update; True raises KeyboardInterrupt.
        resume: what :meth:`TrainedNetwork.training_state` returned in an earlier call with the same
            arguments. Only the updates after it are made, and the outcome is that of a training
            that was never interrupted, bit for bit on the same machine. Checkpoints before it are
            not handed out again.

    Returns the trained network. The same arguments on the same machine, with the same number of
    threads, give the same bits; convolutions on CUDA do so only under
    ``torch.use_deterministic_algorithms``. Torch's global random state is neither used nor
    changed. Raises ValueError for an unknown model or rule and for sizes that do not fit, TypeError
    for a rule that cannot train the model, and :class:`CannotResume`, a ValueError, before any
    update where ``resume`` is damaged, of other arguments or of another version of the rule's code,
    or where the rule keeps something from step to step that is not carried (see :class:`Rule`).
    Source: 'Beyond Accuracy and Alignment' protocol, arXiv 2606.21126 (training rules, AdamW 1e-3,
    weight decay 0.01, batches of 128, cosine schedule).
    """
    train_count = dataset.train_images.shape[0]
    if steps < 1:
        raise ValueError(f"train: expected steps of at least 1, got {steps}")
    if not 1 <= batch_size <= train_count:
        raise ValueError(
            f"train: expected a batch_size from 1 to {train_count}, the number of training "
            f"images, got {batch_size}"
        )
    if seed < 0:
        raise ValueError(f"train: expected a non-negative seed, got {seed}")
    marks = frozenset(checkpoint_steps)
    if marks and not 1 <= min(marks) <= max(marks) <= steps:
        raise ValueError(f"train: expected checkpoint_steps from 1 to {steps}, got {sorted(marks)}")
    config = {
        "model": model_name,
        "model_options": dict(model_options or {}),
        "rule": rule_name,
        "rule_options": dict(rule_options or {}),
        "dataset": dataset.name,
        "input_shape": list(dataset.input_shape),
        "num_classes": dataset.num_classes,
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "penalty": penalty,
    }
    # Related seeds give unrelated streams: seed 42's shuffling is not seed 43's initial weights.
    init_seed, shuffle_seed, rule_seed = (
        int(word) for word in np.random.SeedSequence(seed).generate_state(3)
    )
    flatten = model_spec(model_name).flatten_input
    model = build_model(
        model_name,
        input_shape=dataset.input_shape,
        num_classes=dataset.num_classes,
        seed=init_seed,
        **dict(model_options or {}),
    )
    report_every = max(1, steps // PROGRESS_CALLS)
    with recording_stream(torch.device(device)):
        model = model.to(device)
        rule = make_rule(
            rule_name,
            model,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            total_steps=steps,
            seed=rule_seed,
            penalty=penalty,
            **dict(rule_options or {}),
        )
        images = dataset.train_images.flatten(1) if flatten else dataset.train_images

        def network(history: list[tuple[int, float]], **at: int) -> TrainedNetwork:
            reached = accuracy(model, dataset.test_images, dataset.test_labels, flatten=flatten)
            return TrainedNetwork(
                model,
                rule,
                reached,
                history,
                {**config, **at},
                steps_of.graphed,
                steps_of.note,
                steps_of if at else None,
            )

        batches = _shuffled_batches(
            train_count, batch_size, torch.Generator().manual_seed(shuffle_seed)
        )
        losses = None
        if resume is not None:
            model.eval()  # as it was when its state was taken
            losses = load_training_state(rule, resume, config)
            batches = islice(batches, len(losses), None)
        model.train()
        steps_of = Stepper(
            rule,
            images.to(device),
            dataset.train_labels.to(device),
            batches,
            batch_size=batch_size,
            total=steps,
            record=graph,
            losses=losses,
        )
        try:
            for step in range(steps_of.done + 1, steps + 1):
                if stop is not None and stop():
                    raise KeyboardInterrupt
                steps_of.step()
                if progress is not None and (step % report_every == 0 or step == steps):
                    progress(step, steps, f"{steps_of.last_loss():.4f}")
                if on_checkpoint is not None and step in marks:
                    model.eval()
                    on_checkpoint(step, network([], step=step))
                    model.train()
        finally:
            steps_of.close()
        model.eval()
        if steps_of.note:
            warnings.warn(
                f"train: {rule_name}: ordinary updates, not a CUDA graph: {steps_of.note}",
                RuntimeWarning,
                stacklevel=2,
            )
        return network(steps_of.history())


@torch.no_grad()
def accuracy(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int = 1024,
    flatten: bool,
) -> float:
    """Compute the fraction of images a model classifies correctly.

    Args:
        model: returns logits ``[B, C]``; evaluated in eval mode and put back in its own mode.
        images: ``[N, C, H, W]``, moved to the model's device batch by batch.
        labels: ``[N]`` int64.
        batch_size: samples per forward pass; does not change the result's meaning.
        flatten: pass images as ``[B, C·H·W]``.

    Returns a fraction in [0, 1]. Raises ValueError for no images, another number of labels, or a
    batch_size below 1.
    """
    count = images.shape[0]
    if count == 0:
        raise ValueError("accuracy: expected at least one image, got none")
    if tuple(labels.shape) != (count,):
        raise ValueError(
            f"accuracy: expected {count} labels for {count} images, "
            f"got labels of shape {list(labels.shape)}"
        )
    if batch_size < 1:
        raise ValueError(f"accuracy: expected a batch_size of at least 1, got {batch_size}")
    first = next(model.parameters(), None)
    device = images.device if first is None else first.device
    # A module's mode is its children's too, and they may differ (a frozen BatchNorm).
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        correct = torch.zeros((), dtype=torch.int64, device=device)
        for start in range(0, count, batch_size):
            batch = images[start : start + batch_size].to(device)
            expected = labels[start : start + batch_size].to(device)
            logits = model(batch.flatten(1) if flatten else batch)
            correct += (logits.argmax(dim=1) == expected).sum()
    finally:
        for module, training in modes:
            module.training = training
    return int(correct) / count


def _shuffled_batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        order = torch.randperm(count, generator=generator)
        # An epoch's incomplete last batch is left out.
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def _copy_to_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
