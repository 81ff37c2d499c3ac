"""Diagnose one network: capture, reduce, judge, report."""

import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from . import ops
from ._common.arguments import check_count, check_fraction
from ._version import __version__
from .capture import Loss, Output, Probe, classification_loss, untouched
from .capture.arguments import (
    check_fits_forward,
    check_how,
    check_module,
    each_batch,
    named_failures,
)
from .capture.batches import check_batch, check_labels, device_of, sample_counts, to_device
from .capture.directions import direction_figures
from .capture.points import Select, unwrap
from .capture.reduction import Reduction, SampleReduction, reduction_of
from .capture.statistics import BatchStatistics, batch_statistics, medians
from .programs.loading import as_module
from .protocol import (
    OUTPUT,
    DiagnosticThresholds,
    Figures,
    Protocol,
    check_protocol,
    explain_disagreement,
    explain_shapes,
)
from .protocol.explanations import find_causes
from .protocol.judging import judge_figures
from .protocol.thresholds import check_thresholds
from .report import DiagnosticReport


def diagnose(
    model: nn.Module | ExportedProgram,
    eval_batches: Iterable[Any],
    headline_acc: float | None = None,
    frozen_baseline_acc: float | None = None,
    method_name: str = "network",
    notes: str = "",
    *,
    protocol: Protocol = "paper",
    thresholds: DiagnosticThresholds | None = None,
    test_size: int | None = None,
    frozen_test_size: int | None = None,
    loss: Loss | None = None,
    taps: Select | None = None,
    reduction: Reduction | SampleReduction = "flatten",
    output: Output | None = None,
    batch_dim: int = 0,
    backend: ops.Backend | None = None,
) -> DiagnosticReport:
    """Return whether a network's hidden states and gradients can be trusted, and why not.

    Args:
        model: any module, scripted and traced ones included, or an exported program; files of
            them are opened by :func:`fadiag_fast.load_packaged`, where they are trusted. Wrappers
            (``torch.compile``, DataParallel) are looked through, and compiled parts run eagerly
            while it is probed. It is probed in eval mode and left as it was: modes, gradients,
            buffers, hooks, random state.
        eval_batches: (x, y) pairs, moved to the model's device. x is a tensor, a tuple of arguments
            or a dict of keywords; y is what the loss takes. A dict in place of a pair is the
            model's whole input, labels included, and the loss is the one that the model returns.
            The protocol takes the first 10 unshuffled test batches of 128; (a) and (b) read the
            first, (c) all of them, and at least 8.
        headline_acc: accuracy to be judged, a fraction in [0, 1].
        frozen_baseline_acc: accuracy with frozen blocks; without it (d) is not evaluated.
        method_name: heading of the report.
        notes: a remark for the report.
        protocol: ``"paper"`` judges as published; ``"calibrated"`` by figures that depend neither
            on batch size, loss scale and dtype nor on how well the task is solved, with causes: see
            :mod:`fadiag_fast.protocol.calibrated`. Its medians are over the samples of all batches.
        thresholds: other limits than the published ones.
        test_size: images behind ``headline_acc``; the calibrated (d) asks for it.
        frozen_test_size: images behind ``frozen_baseline_acc``; by default as many.
        loss: (model output, y) → scalar; None is cross-entropy, per sample or per token.
            Gradients carry its reduction: the mean over B samples puts 1/B into every ‖g‖, and
            (b)'s floor belongs to B = 128.
        taps: where to observe: None chooses (the residual contract ``embed``, ``blocks``,
            ``out_ln``, ``out_head``; a forward with ``return_hidden=True``; the longest chain of
            repeated blocks), or names, globs, classes, modules: see
            :func:`fadiag_fast.capture.taps.find_taps`.
        reduction: what one sample's state is where states have positions: ``"flatten"``,
            ``"cls"``, ``"mean"``, ``"token"``, or a
            :class:`~fadiag_fast.capture.reduction.SampleReduction`.
        output: which part of a structured model output counts as logits: an attribute, key or
            index, or a function; by default ``logits`` or the first floating tensor.
        batch_dim: the dimension of the states that counts samples.
        backend: ``"native"`` or ``"torch"`` to force one.

    Returns:
        A printable :class:`~fadiag_fast.report.DiagnosticReport`. Empty input, a single batch,
        missing accuracies and non-finite states are outcomes that it names, not errors.

    Raises:
        TapError: the hidden states cannot be found, or the loss does not depend on one.
        ValueError: an unknown protocol, an accuracy outside [0, 1], a test size below 1, labels
            out of range, batches that do not fit, a loss that is no scalar, an iterator of batches
            that has none left.
        TypeError: an argument of another type; a batch is no (x, y) pair, or has other arguments
            than the model's forward; labels that are no class indices.

        An error inside the forward pass keeps its type, and names the batch and the layer.

    Source: "Beyond Accuracy and Alignment" (arXiv 2606.21126).
    """
    started = time.perf_counter()
    check_module(model, "diagnose")
    given = each_batch(eval_batches, "diagnose")
    check_fraction("headline_acc", headline_acc, "diagnose")
    check_fraction("frozen_baseline_acc", frozen_baseline_acc, "diagnose")
    check_count("test_size", test_size, "diagnose", " image")
    check_count("frozen_test_size", frozen_test_size, "diagnose", " image")
    check_thresholds(thresholds, "diagnose")
    check_how(loss, batch_dim, "diagnose")
    check_protocol(protocol, "diagnose")
    limits = thresholds or DiagnosticThresholds()
    how = reduction_of(reduction)
    model = unwrap(as_module(model))
    device = device_of(model)
    default_loss = loss is None or loss is nn.functional.cross_entropy
    probe = Probe(
        model,
        select=taps,
        loss=None if default_loss else loss,
        output=output,
        batch_dim=batch_dim,
        several=how.kind != "token",
    )

    batches: list[BatchStatistics] = []
    empty = 0
    with untouched(model):
        for index, batch in enumerate(given):
            x, y = check_batch(index, batch, batch_dim)
            check_fits_forward(index, model, x, "diagnose")
            x, y = to_device((x, y), device)
            if 0 in sample_counts(x, batch_dim):
                empty += 1
                continue
            if default_loss and y is not None:
                probe.loss = _checked_cross_entropy(index, probe)
            with named_failures(model, f"diagnose: batch {index}"):
                captured = probe.capture(x, y)
            batches.append(
                batch_statistics(
                    captured, y, reduction=how, backend=backend, has_output=probe.has_output
                )
            )
            del captured  # before the next batch's, not after
            _check_shapes(index, probe, batches)

    figures = replace(
        _figures(probe, batches, headline_acc, frozen_baseline_acc, backend),
        test_size=test_size,
        frozen_test_size=frozen_test_size,
    )
    diagnostics = judge_figures(figures, limits, protocol)
    remarks = _remarks(probe, batches, empty, figures)
    causes: tuple[str, ...] = ()
    if protocol == "calibrated":
        causes = find_causes(figures, diagnostics, limits)
    else:
        for sentence in (
            explain_disagreement(figures, diagnostics[1], limits),
            explain_shapes(figures, diagnostics[0]),
        ):
            if sentence is not None:
                remarks.append(sentence)
    provenance = _provenance(model, device, probe, batches, how, loss, backend)
    provenance["seconds"] = round(time.perf_counter() - started, 3)
    return DiagnosticReport(
        method_name=method_name,
        figures=figures,
        diagnostics=diagnostics,
        notes=notes,
        remarks=tuple(remarks),
        provenance=provenance,
        protocol=protocol,
        causes=causes,
    )


def _check_shapes(index: int, probe: Probe, batches: Sequence[BatchStatistics]) -> None:
    """Raise ValueError where a batch's gradients cannot be compared with the first one's."""
    pairs = zip(probe.taps.labels, batches[0].grad_mean, batches[-1].grad_mean, strict=True)
    for label, expected, got in pairs:
        if expected.shape != got.shape:
            raise ValueError(
                f"diagnose: batch {index}: {label}: expected states of shape "
                f"{list(expected.shape)} per sample like the first batch's, got "
                f"{list(got.shape)}; pad the batches to one length, or compare the positions' "
                f"averages with reduction='mean'"
            )


def _checked_cross_entropy(index: int, probe: Probe) -> Loss:
    """Return the cross-entropy that looks at the labels first.

    On a GPU a label out of range would abort the process's CUDA context instead of raising.
    """

    def loss(output: Any, y: Tensor) -> Tensor:
        logits = probe.logits_of(output)
        check_labels(index, y, logits.shape)
        return classification_loss(logits, y)

    return loss


def _figures(
    probe: Probe,
    batches: Sequence[BatchStatistics],
    headline_acc: float | None,
    frozen_baseline_acc: float | None,
    backend: ops.Backend | None,
) -> Figures:
    if not batches:
        return Figures(
            (), (), (), (), float("nan"), 0, (), (), 0, headline_acc, frozen_baseline_acc
        )
    first = batches[0]
    cosines = ops.direction_cosines([batch.grad_mean for batch in batches], backend=backend)
    directions = direction_figures(cosines)
    measurable = torch.cat([batch.measurable for batch in batches])
    gains = torch.cat([batch.credit_gain for batch in batches], dim=1)
    hidden = torch.cat([batch.hidden_norm for batch in batches], dim=1)
    grad = torch.cat([batch.grad_norm for batch in batches], dim=1)
    class_errors = [batch.class_error for batch in batches if batch.class_error is not None]
    return Figures(
        layers=probe.taps.labels,
        residual_norms=medians(first.hidden_norm),
        bp_grad_norms=medians(first.grad_norm),
        credit_gains=medians(first.credit_gain),
        output_grad_norm=medians(first.output_grad_norm[None])[0],
        batch_size=first.batch_size,
        stabilities=directions.stability.tolist(),
        num_directions=directions.num_directions.tolist(),
        num_batches=len(batches),
        shapes=first.shapes,
        sizes=first.sizes,
        pooled_norms=medians(hidden),
        pooled_gains=medians(torch.where(measurable, gains, torch.nan)),
        num_samples=len(measurable),
        num_measurable=int(measurable.sum()),
        num_non_finite=int((~(hidden.isfinite() & grad.isfinite()).all(0)).sum()),
        equal_logits=all(batch.equal_logits for batch in batches),
        output_error=medians(torch.cat(class_errors)[None])[0]
        if len(class_errors) == len(batches)
        else None,
        grad_dtype=str(first.grad_dtype).removeprefix("torch."),
        stability_errors=directions.error.tolist(),
        stability_nulls=directions.null.tolist(),
        chain_starts=probe.taps.chain_starts,
        gain_reference=OUTPUT if probe.has_output else probe.taps.labels[-1],
        headline_acc=headline_acc,
        frozen_baseline_acc=frozen_baseline_acc,
        num_rows=len(first.output_grad_norm),
    )


def _remarks(
    probe: Probe, batches: Sequence[BatchStatistics], empty: int, figures: Figures
) -> list[str]:
    """Name everything that was left out of a figure, or that a reader may stumble on."""
    remarks: list[str] = []
    if empty:
        remarks.append(f"{empty} batches without samples were left out.")
    if not batches:
        remarks.append("There was no batch with a sample: nothing could be measured.")
        return remarks
    remarks += getattr(probe.model, "packaging_remarks", ())
    remarks += probe.taps.remarks
    if probe.reordered:
        remarks.append(
            "The forward pass reaches the taps in another order in some batches: the table, and "
            "(a) with it, is in the order of the first one."
        )
    if probe.taps.unseen:
        lost = ", ".join(probe.taps.unseen)
        remarks.append(f"Bypassed: the forward pass does not call {lost}.")
    first = batches[0]
    for name, norms in (("hidden states", first.hidden_norm), ("gradients", first.grad_norm)):
        bad = (~norms.isfinite()).sum(dim=1).tolist()
        for l, count in enumerate(bad):
            if count:
                remarks.append(
                    f"{count} of {figures.rows} have non-finite {name} at "
                    f"{figures.layers[l]}; medians are over those that are not NaN."
                )
                break
    without_error = int((first.output_grad_norm == 0).sum())
    if without_error:
        remarks.append(
            f"{without_error} of {figures.rows} have no output error at all; they have "
            f"no credit gain."
        )
    if not probe.has_output:
        remarks.append(
            f"The network has no output with a row for each sample: credit gains are relative to "
            f"the gradient at the last observed state, {probe.taps.labels[-1]}, where they are 1."
        )
    if first.batch_size == 1:
        remarks.append("The first batch holds one sample: its medians are that sample's figures.")
    return remarks


def _provenance(
    model: nn.Module,
    device: torch.device,
    probe: Probe,
    batches: Sequence[BatchStatistics],
    reduction: SampleReduction,
    loss: Any,
    backend: ops.Backend | None,
) -> dict[str, Any]:

    sizes = [batch.batch_size for batch in batches]
    same = f"{len(sizes)} of {sizes[0]}" if sizes and len(set(sizes)) == 1 else str(sizes)
    device_name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    default_loss = loss is None or loss is nn.functional.cross_entropy
    record: dict[str, Any] = {
        "fadiag_fast": __version__,
        "torch": str(torch.__version__),
        "device": f"{device} ({device_name})",
        "dtype": ", ".join(dtypes) or "no parameters",
        "backend": ops.backend_for(device, backend),
        "batches": same,
        "loss": "cross-entropy" if default_loss else getattr(loss, "__name__", repr(loss)),
        "loss_reduction": "mean" if default_loss else "as the loss defines it",
        "taps": probe.taps.coverage if batches else "none",
        "sample_reduction": reduction.kind
        + (f", features in dimension {reduction.feature_dim}" if reduction.feature_dim else ""),
        "capture": (probe.path or "none")
        + (f" ({probe.path_reason})" if probe.path_reason else ""),
    }
    if batches and all(batch.correct is not None for batch in batches):
        correct = sum(batch.correct or 0 for batch in batches)
        record["accuracy_on_batches"] = round(correct / sum(sizes), 6)
    return record
