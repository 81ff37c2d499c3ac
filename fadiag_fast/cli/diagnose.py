"""The command ``fadiag diagnose``."""

import json
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from torch import nn

from .._common.terminal import EXIT_INTERRUPTED, say
from .._common.text import display_name, echo, json_bytes
from ..capture import choose_output, untouched
from ..capture.reduction import Reduction, SampleReduction
from ..checkpoints import load_checkpoint, load_into
from ..credit import CreditReport
from ..diagnosis import diagnose as run_diagnosis
from ..programs.loading import is_program, load_packaged
from ..protocol import (
    NOT_ENOUGH_DATA,
    TRUSTWORTHY,
    DiagnosticThresholds,
    check_protocol,
)
from ..report import DiagnosticReport, SummaryRow, summary_table
from ..zoo import (
    ImageDataset,
    accuracy,
    load_dataset,
    restore_rule,
    rule_credit,
)
from .common import (
    EXIT_ERROR,
    EXIT_NOT_ENOUGH_DATA,
    EXIT_TRUSTWORTHY,
    EXIT_WALK_BACK,
    name_of,
    reported_errors,
    sentence,
    shown_name,
)
from .networks import build_network
from .options import (
    BatchDimOption,
    BatchesOption,
    BatchSizeOption,
    DataOption,
    DataOptionsOption,
    DeviceOption,
    FlattenOption,
    KeyOption,
    MaxGrowthOption,
    MaxStabilityOption,
    MinGainOption,
    MinGradientOption,
    MinUtilityOption,
    ModelOption,
    OptionsOption,
    OutputOption,
    ProtocolOption,
    ReductionOption,
    TapsOption,
    TrustCodeOption,
    UnsafePickleOption,
    check_output_file,
    chosen_device,
    chosen_output,
    parse_options,
    tell_unused,
    write_output,
)


def exit_code(verdicts: list[str]) -> int:
    if any(verdict not in (TRUSTWORTHY, NOT_ENOUGH_DATA) for verdict in verdicts):
        return EXIT_WALK_BACK
    return EXIT_NOT_ENOUGH_DATA if NOT_ENOUGH_DATA in verdicts else EXIT_TRUSTWORTHY


def diagnose_command(
    context: typer.Context,
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Checkpoint files. TorchScript and .pt2 files need no --model, but --trust-code.",
            # Typer would end the command for one file; its own line says what is wrong with it.
            readable=False,
        ),
    ] = None,
    model: ModelOption = "resmlp",
    data: DataOption = "fashion-mnist-mini",
    data_option: DataOptionsOption = None,
    init: Annotated[
        list[int] | None,
        typer.Option(help="Audit freshly initialised weights of this seed; repeatable."),
    ] = None,
    taps: TapsOption = None,
    reduction: ReductionOption = "flatten",
    batch_dim: BatchDimOption = 0,
    output: OutputOption = None,
    frozen_acc: Annotated[
        float | None, typer.Option(help="Accuracy with frozen blocks, 0 to 1: evaluates (d).")
    ] = None,
    frozen_test_size: Annotated[
        int | None,
        typer.Option(help="Images behind --frozen-acc, for its interval; default: the test set's."),
    ] = None,
    protocol: ProtocolOption = "paper",
    batches: BatchesOption = 10,
    batch_size: BatchSizeOption = 128,
    flatten: FlattenOption = None,
    credit: Annotated[
        bool,
        typer.Option(
            "--credit", help="Also compare the rule's saved credit with the gradient: Γ and ρ."
        ),
    ] = False,
    rule: Annotated[
        str | None,
        typer.Option(help="Rule of --credit, package.module:Class too; default: the checkpoint's."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the reports here.")
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="Write the reports here.")
    ] = None,
    max_growth: MaxGrowthOption = 50.0,
    min_gradient: MinGradientOption = 1e-7,
    min_gain: MinGainOption = 1.28e-5,
    max_stability: MaxStabilityOption = 0.30,
    min_utility: MinUtilityOption = 2.0,
    model_option: OptionsOption = None,
    device: DeviceOption = "auto",
    unsafe_pickle: UnsafePickleOption = False,
    trust_code: TrustCodeOption = False,
    key: KeyOption = None,
) -> None:
    """Audit checkpoints and print a report for each; one bad file does not stop the others."""
    with reported_errors():
        if not checkpoints and not init:
            raise ValueError("expected checkpoint files, or --init SEED for untrained weights")
        check_output_file("--json", json_file, checkpoints or ())
        check_output_file("--markdown", markdown_file, [*(checkpoints or ()), json_file])
        if json_file is not None and json_file == markdown_file:
            raise ValueError(f"--json and --markdown: expected two files, got {json_file} twice")
        asks_frozen = frozen_acc is not None
        tell_unused(
            context,
            ("rule", credit, "without --credit"),
            ("frozen_test_size", asks_frozen, "without --frozen-acc"),
            ("min_utility", asks_frozen, "without --frozen-acc"),
            ("unsafe_pickle", bool(checkpoints), "without a checkpoint file"),
            ("credit", bool(checkpoints), "without a checkpoint file: fresh weights have no rule"),
        )
        dataset = load_dataset(data, **parse_options(data_option))
        options = parse_options(model_option)
        target = chosen_device(device)
        observe: dict[str, Any] = {
            "taps": taps or None,
            "reduction": SampleReduction(cast(Reduction, reduction)),
            "batch_dim": batch_dim,
            "output": chosen_output(output),
            "protocol": protocol,
            "frozen_test_size": frozen_test_size,
        }
        thresholds = DiagnosticThresholds(
            scale_growth=max_growth,
            gradient_floor=min_gradient,
            direction_stability=max_stability,
            depth_utility=min_utility,
            credit_gain_floor=min_gain,
        )
        check_protocol(protocol, "--protocol")
        rows: list[SummaryRow] = []
        records: list[dict[str, Any]] = []
        failed = 0
        interrupted = False
        subjects: list[Path | int] = [*(checkpoints or []), *(init or [])]
        for path in subjects:
            try:
                report, found = _diagnose_one(
                    path,
                    model_name=model,
                    dataset=dataset,
                    frozen_acc=frozen_acc,
                    shape=(batches, batch_size),
                    flatten=flatten,
                    thresholds=thresholds,
                    options=options,
                    device=target,
                    unsafe_pickle=unsafe_pickle,
                    trust_code=trust_code,
                    key=key,
                    observe=observe,
                    credit=credit,
                    rule=rule,
                )
            except KeyboardInterrupt:  # what is finished is worth its figures
                interrupted = True
                break
            except Exception as error:  # a model's forward may raise anything
                failed += 1
                what = sentence(error)
                records.append({"checkpoint": name_of(path), "error": what})
                say(f"fadiag: {shown_name(path)}: {what}", "red")
                continue
            echo(report, end="\n\n")
            rows.append(SummaryRow(report))
            record = {"checkpoint": name_of(path), **json.loads(report.to_json())}
            if found is not None:
                echo(found, end="\n\n")
                record["credit"] = found.to_dict()
            records.append(record)
        if len(rows) > 1:
            echo(summary_table(rows))
        if json_file is not None:
            text = json.dumps(records, indent=2, ensure_ascii=False) + "\n"
            write_output("--json", json_file, json_bytes(text))
        if markdown_file is not None:
            text = "\n".join(row.report.to_markdown() for row in rows)
            write_output("--markdown", markdown_file, text.encode("utf-8", "backslashreplace"))
        if interrupted:
            say(f"fadiag: interrupted after {len(records)} of {len(subjects)}")
            raise typer.Exit(EXIT_INTERRUPTED)
        if failed:
            say(f"fadiag: {failed} of {len(subjects)} checkpoints could not be audited")
            raise typer.Exit(EXIT_ERROR)
        raise typer.Exit(exit_code([row.report.verdict for row in rows]))


class _Chosen(nn.Module):
    """Return the logits of a model whose output has more than those."""

    def __init__(self, model: nn.Module, output: str | int) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return choose_output(self.model(x), self.output)


def _diagnose_one(
    subject: Path | int,
    *,
    model_name: str,
    dataset: ImageDataset,
    frozen_acc: float | None,
    shape: tuple[int, int],
    flatten: bool | None,
    thresholds: DiagnosticThresholds,
    options: dict[str, Any],
    device: torch.device,
    unsafe_pickle: bool,
    trust_code: bool,
    key: str | None,
    observe: dict[str, Any],
    credit: bool,
    rule: str | None,
) -> tuple[DiagnosticReport, CreditReport | None]:
    """Audit a file, or the weights that a seed draws, and its credit where asked for."""
    num_batches, batch_size = shape
    images, labels = dataset.test_images, dataset.test_labels
    # Samples per pass for the accuracy, on which it does not depend.
    scored = max(batch_size, 128)
    what = model_name
    beside: dict[str, Any] | None = None
    if isinstance(subject, int):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(subject)
            model, flat = build_network(model_name, dataset, options)
        model = model.to(device)
    elif not is_program(subject):
        checkpoint = load_checkpoint(subject, unsafe_pickle=unsafe_pickle, key=key)
        beside = checkpoint.extra
        held = sum(tensor.numel() for tensor in checkpoint.state_dict.values())
        model, flat = build_network(model_name, dataset, options, beside.get("config"), held)
        for note in load_into(model, checkpoint):
            say(f"fadiag: {shown_name(subject)}: {note}")
        model = model.to(device)
    else:
        model = load_packaged(subject, map_location=device, trust_code=trust_code)
        what = type(model).__name__
        fixed = getattr(model, "batch_size", None)
        flat = _takes_vectors(model, images[: fixed or batch_size].to(device))
        if fixed is not None:
            # A program of one size has no use for the last, smaller batch.
            scored = batch_size
            images, labels = (t[: len(t) // scored * scored] for t in (images, labels))
    flat = flat if flatten is None else flatten
    output = observe["output"]
    scorer = model if output is None else _Chosen(model, output)
    report = run_diagnosis(
        model,
        dataset.eval_batches(batch_size, num_batches, flatten=flat, device=device),
        accuracy(scorer, images, labels, batch_size=scored, flatten=flat),
        frozen_acc,
        method_name=display_name(subject.stem)
        if isinstance(subject, Path)
        else shown_name(subject),
        notes=f"{what} from {shown_name(subject)} on {dataset.name}",
        thresholds=thresholds,
        test_size=len(labels),
        **observe,
    )
    if not credit:
        return report, None
    if beside is None:
        return report, CreditReport(reason="there is no checkpoint of a rule")
    (batch,) = dataset.eval_batches(batch_size, 1, flatten=flat, device=device)
    return report, _credit_of(model, beside, batch, rule)


def _credit_of(
    model: nn.Module, beside: dict[str, Any], batch: Any, rule_name: str | None
) -> CreditReport:
    """Measure the credit of the rule in a checkpoint, or say why it cannot be."""
    try:
        restored = restore_rule(model, beside, rule_name=rule_name)
    except (ValueError, TypeError) as error:
        return CreditReport(reason=str(error))
    return rule_credit(restored, batch)


def _takes_vectors(model: nn.Module, images: torch.Tensor) -> bool:
    """Return whether a program without its source takes images only as vectors."""
    with torch.no_grad(), untouched(model):
        for vectors in (False, True):
            try:
                model(images.flatten(1) if vectors else images)
            except Exception:  # whatever the program raises for another shape
                continue
            return vectors
    return False


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("diagnose")(diagnose_command)
