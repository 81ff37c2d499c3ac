"""Diagnose one network: capture, reduce, judge, report."""

import platform
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .capture import Loss, capture, constants_of, untouched
from .protocol import (
    DiagnosticThresholds,
    Figures,
    evaluate,
    explain_disagreement,
)
from .report import DiagnosticReport
from .statistics import BatchStatistics, batch_statistics, medians
from .taps import ContractError, Taps, find_taps, unwrap

Batch = tuple[Tensor, Tensor]


def diagnose(
    model: nn.Module,
    eval_batches: Iterable[Batch],
    headline_acc: float | None = None,
    frozen_baseline_acc: float | None = None,
    method_name: str = "network",
    notes: str = "",
    *,
    thresholds: DiagnosticThresholds | None = None,
    loss: Loss = nn.functional.cross_entropy,
    backend: ops.Backend | None = None,
) -> DiagnosticReport:
    """Say whether a network's hidden states and gradients can be trusted, and why not.

    Args:
        model: a network that follows the residual contract: ``embed``, ``blocks``, optionally
            ``out_ln``, ``out_head``; or whose forward offers ``return_hidden=True``. Wrappers
            (``torch.compile``, DataParallel) are looked through. It is probed in eval mode and left
            as it was: modes, gradients, buffers, hooks, random state.
        eval_batches: (x, y) pairs, moved to the model's device. The protocol takes the first 10
            unshuffled test batches of 128; (a) and (b) read the first, (c) all of them, and at
            least 8.
        headline_acc: accuracy to be judged, a fraction in [0, 1].
        frozen_baseline_acc: accuracy with frozen blocks; without it (d) is not evaluated.
        method_name: heading of the report.
        notes: a remark for the report.
        thresholds: other limits than the published ones.
        loss: (logits, y) → scalar. Gradients carry its reduction: the mean over B samples of the
            default puts 1/B into every ‖g‖, and (b)'s floor belongs to B = 128.
        backend: ``"native"`` or ``"torch"`` to force one.

    Returns:
        A printable :class:`~fadiag_fast.report.DiagnosticReport`. Empty input, a single batch,
        missing accuracies and non-finite states are outcomes that it names, not errors.

    Raises:
        ContractError: the hidden states cannot be found.
        ValueError: an accuracy outside [0, 1], labels out of range, batches that do not fit.
        TypeError: a batch is no (x, y) pair of tensors.

    Source: "Beyond Accuracy and Alignment" (arXiv 2606.21126).
    """
    started = time.perf_counter()
    for name, value in (
        ("headline_acc", headline_acc),
        ("frozen_baseline_acc", frozen_baseline_acc),
    ):
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"diagnose: {name}: expected a fraction from 0 to 1, got {value}")
    limits = thresholds or DiagnosticThresholds()
    model = unwrap(model)
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")

    taps: Taps | None = None
    batches: list[BatchStatistics] = []
    empty = 0
    with untouched(model):
        constants = constants_of(model)
        for index, batch in enumerate(eval_batches):
            x, y = _check_batch(index, batch)
            x, y = x.to(device), y.to(device)
            if len(x) == 0:
                empty += 1
                continue
            if taps is None:
                taps = find_taps(model, x)
            default_loss = loss is nn.functional.cross_entropy
            captured = capture(
                model,
                x,
                y,
                taps=taps,
                loss=_checked_cross_entropy(index) if default_loss else loss,
                constants=constants,
            )
            if batches and len(captured.hiddens) != batches[0].hidden_norm.shape[0]:
                raise ContractError(
                    f"diagnose: batch {index}: expected {batches[0].hidden_norm.shape[0]} hidden "
                    f"states like the first batch, got {len(captured.hiddens)}"
                )
            batches.append(batch_statistics(captured, y, backend=backend))

    figures = _figures(taps, batches, headline_acc, frozen_baseline_acc, backend)
    diagnostics = evaluate(figures, limits)
    remarks = _remarks(batches, empty, figures)
    if (sentence := explain_disagreement(figures, diagnostics[1], limits)) is not None:
        remarks.append(sentence)
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    provenance = _provenance(device, sorted(dtypes), taps, batches, loss, backend)
    provenance["seconds"] = round(time.perf_counter() - started, 3)
    return DiagnosticReport(
        method_name=method_name,
        figures=figures,
        diagnostics=diagnostics,
        notes=notes,
        remarks=tuple(remarks),
        provenance=provenance,
    )


def _check_batch(index: int, batch: object) -> Batch:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TypeError(
            f"diagnose: batch {index}: expected a pair (x, y), got {type(batch).__name__}"
            + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
        )
    x, y = batch
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"diagnose: batch {index}: expected {name} to be a tensor, "
                f"got {type(value).__name__}"
            )
        if value.dim() == 0:
            raise ValueError(f"diagnose: batch {index}: expected {name} with a batch dimension")
    if len(x) != len(y):
        raise ValueError(
            f"diagnose: batch {index}: expected as many labels as samples, {len(x)}, got {len(y)}"
        )
    return x, y


def _checked_cross_entropy(index: int) -> Loss:
    """Return the cross-entropy that looks at the labels first.

    On a GPU a label out of range would abort the process's CUDA context instead of raising.
    """

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        if y.dim() == 1 and not y.is_floating_point() and logits.dim() == 2:
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= logits.shape[1]:
                raise ValueError(
                    f"diagnose: batch {index}: expected labels from 0 to {logits.shape[1] - 1}, "
                    f"got labels from {low} to {high}"
                )
        return nn.functional.cross_entropy(logits, y)

    return loss


def _figures(
    taps: Taps | None,
    batches: Sequence[BatchStatistics],
    headline_acc: float | None,
    frozen_baseline_acc: float | None,
    backend: ops.Backend | None,
) -> Figures:
    if taps is None or not batches:
        return Figures(
            (), (), (), (), float("nan"), 0, (), (), 0, headline_acc, frozen_baseline_acc
        )
    first = batches[0]
    cosines = ops.direction_cosines([batch.grad_mean for batch in batches], backend=backend)
    has_direction = cosines.diagonal(dim1=1, dim2=2) == 1
    rows, columns = torch.triu_indices(len(batches), len(batches), offset=1)
    pairs = cosines[:, rows, columns]
    return Figures(
        layers=taps.names,
        residual_norms=medians(first.hidden_norm),
        bp_grad_norms=medians(first.grad_norm),
        credit_gains=medians(first.credit_gain),
        output_grad_norm=medians(first.output_grad_norm[None])[0],
        batch_size=first.batch_size,
        stabilities=pairs.nanmean(dim=1).tolist(),
        num_directions=has_direction.sum(dim=1).tolist(),
        num_batches=len(batches),
        headline_acc=headline_acc,
        frozen_baseline_acc=frozen_baseline_acc,
    )


def _remarks(batches: Sequence[BatchStatistics], empty: int, figures: Figures) -> list[str]:
    """Name everything that was left out of a figure, or that a reader may stumble on."""
    remarks = []
    if empty:
        remarks.append(f"{empty} batches without samples were left out.")
    if not batches:
        remarks.append("There was no batch with a sample: nothing could be measured.")
        return remarks
    first = batches[0]
    for name, norms in (("hidden states", first.hidden_norm), ("gradients", first.grad_norm)):
        bad = (~norms.isfinite()).sum(dim=1).tolist()
        for l, count in enumerate(bad):
            if count:
                remarks.append(
                    f"{count} of {first.batch_size} samples have non-finite {name} at "
                    f"{figures.layers[l]}; medians are over those that are not NaN."
                )
                break
    without_error = int((first.output_grad_norm == 0).sum())
    if without_error:
        remarks.append(
            f"{without_error} of {first.batch_size} samples have no output error at all; they have "
            f"no credit gain."
        )
    if first.batch_size == 1:
        remarks.append("The first batch holds one sample: its medians are that sample's figures.")
    return remarks


def _provenance(
    device: torch.device,
    dtypes: Sequence[str],
    taps: Taps | None,
    batches: Sequence[BatchStatistics],
    loss: Any,
    backend: ops.Backend | None,
) -> dict[str, Any]:
    from . import __version__

    sizes = [batch.batch_size for batch in batches]
    same = f"{len(sizes)} of {sizes[0]}" if sizes and len(set(sizes)) == 1 else str(sizes)
    device_name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    default_loss = loss is nn.functional.cross_entropy
    record: dict[str, Any] = {
        "fadiag_fast": __version__,
        "torch": str(torch.__version__),
        "device": f"{device} ({device_name})",
        "dtype": ", ".join(dtypes) or "no parameters",
        "backend": ops.backend_for(device, backend),
        "batches": same,
        "loss": "cross-entropy" if default_loss else getattr(loss, "__name__", repr(loss)),
        "loss_reduction": "mean" if default_loss else "as the loss defines it",
        "taps": "none" if taps is None else f"{len(taps.names)} states, read as {taps.style}",
        "sample_reduction": "flatten",
    }
    if batches and all(batch.correct is not None for batch in batches):
        correct = sum(batch.correct or 0 for batch in batches)
        record["accuracy_on_batches"] = round(correct / sum(sizes), 6)
    return record
