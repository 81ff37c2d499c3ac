"""Audit many checkpoints of one architecture: read ahead, stack, compute, record."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from torch import nn

from .._common.arguments import check_count
from .._common.cuda_graphs import on_device
from .._common.process import prompt_switches
from ..capture import Loss, Output, untouched
from ..capture.arguments import (
    check_fits_forward,
    check_how,
    check_module,
    each_batch,
    named_failures,
)
from ..capture.batches import check_batch, device_of, sample_counts, to_device
from ..capture.points import Select, unwrap
from ..capture.reduction import Reduction, SampleReduction, reduction_of
from ..protocol import DiagnosticThresholds, Protocol, check_protocol
from ..protocol.thresholds import check_thresholds
from .auditor import Auditor
from .autotuner import LARGEST_STACK, Search
from .configuration import configuration
from .find import Checkpoints, find_entries
from .pipeline import MOST_AHEAD, Pipeline, Progress, most_rows
from .prefetch import Reader, Refuse
from .results import ScanCounts, ScanResult
from .writer import ScanWriter

# A reader reaches 1 to 2 GB/s of files in the page cache.
_MOST_WORKERS = 16


def scan(
    checkpoints: Checkpoints,
    model: nn.Module,
    eval_batches: Iterable[tuple[Any, Any]],
    out: str | os.PathLike[str],
    *,
    pattern: str | Sequence[str] | None = None,
    manifest: str | os.PathLike[str] | None = None,
    protocol: Protocol = "paper",
    thresholds: DiagnosticThresholds | None = None,
    loss: Loss | None = None,
    taps: Select | None = None,
    reduction: Reduction | SampleReduction = "flatten",
    output: Output | None = None,
    batch_dim: int = 0,
    stack: int | Literal["auto"] = "auto",
    workers: int | None = None,
    unsafe_pickle: bool = False,
    key: str | None = None,
    refuse: Refuse | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ScanResult:
    """Audit every checkpoint of a study and record what was found, as it is found.

    Args:
        checkpoints: paths, URLs, globs (``runs/**/*.pt``, ``s3://bucket/runs/*.pt``) or entries
            that already have run and step. A file that is named twice, once by an absolute path for
            example, counts once, by its first name.
        model: the architecture that they belong to, on the device that is to compute. Its own
            weights are not used, and it is left as it was.
        eval_batches: (x, y) pairs, as :func:`fadiag_fast.diagnose` takes them; all are kept on the
            device. (a) and (b) read the first, (c) all of them.
        out: the folder of results. A scan into a folder that has some takes over what is done:
            content and configuration decide, not names.
        pattern: how run and step are read from a path, such as ``{run}/step_{step}.pt``; see
            :func:`fadiag_fast.scanning.run_names`.
        manifest: a CSV, Parquet or TOML file with run, step and accuracies per path; see
            :func:`fadiag_fast.scanning.read_manifest`. ``checkpoints`` may then be empty.
        protocol: ``"paper"`` or ``"calibrated"``, see :func:`fadiag_fast.diagnose`. Rows that were
            judged by another are judged again, from their figures.
        thresholds: other limits than the published ones.
        loss, taps, reduction, output, batch_dim: see :func:`fadiag_fast.diagnose`.
        stack: checkpoints computed together; ``"auto"`` grows it while that is faster and memory
            allows. Figures differ between stack sizes by rounding only.
        workers: threads that read ahead; by default one a core, up to 16.
        unsafe_pickle: run code from files that need it to load.
        key: where in each file the weights are; see
            :func:`fadiag_fast.checkpoints.load_checkpoint`.
        refuse: given what stands beside a checkpoint's weights, as ``Checkpoint.extra``, says in a
            sentence why they are not of this model; None where they are. Weights of the same shapes
            may be of another network: more heads, another activation. Called by several threads.
        on_progress: called after every group of checkpoints.

    Returns:
        The folder's rows, of this scan and of earlier ones; they are read when first asked for. Its
        ``counts`` are of this scan.

    Raises:
        TapError: the model cannot be observed.
        ResultsError: the folder cannot be written, or another scan is at it.
        ValueError: there is nothing to scan, no glob matches, or no batch; an unknown
            protocol; no worker.

    Warns:
        UserWarning: of several paths and globs one glob matches nothing.

    What is wrong with one checkpoint stands in its row, with a kind of error as in
    :class:`~fadiag_fast.scanning.records.CheckpointRecord`, and stops nothing. After Ctrl-C, what
    is finished is on the disk.
    """
    check_module(model, "scan")
    given = each_batch(eval_batches, "scan")
    check_thresholds(thresholds, "scan")
    check_how(loss, batch_dim, "scan")
    check_protocol(protocol, "scan")
    check_count("workers", workers, "scan")
    entries = find_entries(checkpoints, pattern, manifest)
    model = unwrap(model)
    device = device_of(model)
    batches = []
    for index, batch in enumerate(given):
        x, y = check_batch(index, batch, batch_dim, "scan")
        check_fits_forward(index, model, x, "scan")
        if 0 not in sample_counts(x, batch_dim):
            batches.append(to_device((x, y), device))
    if not batches:
        raise ValueError("scan: expected at least one evaluation batch, got none")
    how = reduction_of(reduction)
    with (
        untouched(model),
        prompt_switches(),
        # Events, streams and graphs belong to the current device.
        on_device(device),
        ScanWriter(out, thresholds=thresholds, protocol=protocol) as writer,
    ):
        loss = None if loss is nn.functional.cross_entropy else loss
        options = {"select": taps, "loss": loss, "output": output, "batch_dim": batch_dim}
        with named_failures(model, "scan: evaluation batches"):
            auditor = Auditor(model, batches, options, how)
        where = [tap.where for tap in auditor.taps.points]
        config = writer.configure(
            configuration(
                model, batches, where, loss, how, output=output, batch_dim=batch_dim, key=key
            )
        )
        workers = workers or min(_MOST_WORKERS, os.cpu_count() or 1)
        reader = Reader(
            model, device, writer, config, unsafe_pickle, workers, key=key, refuse=refuse
        )
        try:
            most = most_rows(device, reader.row_bytes)
            search = Search(auditor, stack, most, len(entries))
            run = Pipeline(auditor, reader, search, writer, config, len(entries), on_progress)
            on_gpu = device.type == "cuda"
            fewest = min(max(2 * workers, LARGEST_STACK if on_gpu else 0), most)
            # A GPU's own memory is large, and reading goes on while its graphs are recorded.
            ahead = max(1, min(MOST_AHEAD, most // fewest - 1)) if on_gpu else 1
            run.run(entries, fewest, ahead)
        finally:
            reader.close()
    unmatched = [entry.path for entry in entries if not entry.matched]
    audited = run.done - run.reused - run.failed
    counts = ScanCounts(run.done, audited, run.reused, run.failed, unmatched, writer.rejudged)
    return ScanResult.of(out, counts)
