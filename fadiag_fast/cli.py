"""The command line: demo, train, diagnose, scan, audit-cnn, study, watch, doctor.

Exit codes: 0 trustworthy, 1 needs walk-back, 2 not enough data, 3 an error, 130 after Ctrl-C.
"""

import json
import platform
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from torch import nn
from typer.core import TyperGroup

from . import __version__, ops
from .capture import choose_output, untouched
from .checkpoints import load_checkpoint, load_into, save_checkpoint
from .credit import CreditReport
from .diagnosis import diagnose as run_diagnosis
from .libraries import install_line
from .options import (
    EXPECTED_ERRORS,
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
    build_network,
    check_output_file,
    check_output_folder,
    chosen_device,
    chosen_output,
    parse_options,
    sentence,
    tell_unused,
    write_output,
)
from .packaged import is_program, load_packaged
from .protocol import (
    NOT_ENOUGH_DATA,
    TRUSTWORTHY,
    Diagnostic,
    DiagnosticThresholds,
    check_protocol,
    depth_utility,
)
from .report import DiagnosticReport, SummaryRow, summary_table
from .scanning.cli import register as register_scan_commands
from .statistics import Reduction, SampleReduction
from .study.cli import register as register_study
from .terminal import EXIT_INTERRUPTED, draws_bars, progress_bars, say
from .text import display_name, echo, for_terminal, json_bytes
from .training.cli import register as register_watch
from .zoo import (
    RULES,
    ImageDataset,
    TrainedNetwork,
    accuracy,
    load_dataset,
    restore_rule,
    rule_credit,
    train,
)
from .zoo.audit_cnn import METHODS, SEEDS, audit_cnn

EXIT_TRUSTWORTHY, EXIT_WALK_BACK, EXIT_NOT_ENOUGH_DATA, EXIT_ERROR = 0, 1, 2, 3


class _Commands(TyperGroup):
    """Commands whose wrong usage is an error as others are: click's own code for it is 2."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _usage_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _usage_errors():
            return super().invoke(ctx)


@contextmanager
def _usage_errors() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        error.exit_code = EXIT_ERROR
        error.message = for_terminal(error.message)
        raise
    except SystemExit as error:  # rich's, where nobody reads the help any more; 1 is a verdict
        if error.code != 1:
            raise
        raise typer.Exit(EXIT_ERROR) from None


# Typer has it from click, or of its own, by its version.
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="fadiag",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fadiag_fast {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Find out whether a network's hidden states and gradients can be trusted.

    Exit codes: 0 trustworthy, 1 needs walk-back, 2 not enough data, 3 an error, 130 after Ctrl-C.
    """


@contextmanager
def _reported_errors() -> Iterator[None]:
    """Turn an expected failure into one line on stderr and exit code 3, and Ctrl-C into 130.

    Any other has that code too, for 1 is a verdict, and shows where it came from. Warnings, which
    may name files, are fit for a terminal meanwhile.
    """
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *args, **options: for_terminal(plain(*args, **options))
    try:
        yield
    except (typer.Exit, _UsageError):  # to Python a RuntimeError, to typer the normal way out
        raise
    except KeyboardInterrupt:  # typer's own code for it is 1, a verdict
        say("fadiag: interrupted")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:  # nobody reads stdout any more, as after | head
        raise typer.Exit(EXIT_ERROR) from None
    except Exception as error:
        if not isinstance(error, EXPECTED_ERRORS):
            say(traceback.format_exc())
        say(f"fadiag: {sentence(error)}", "red")
        raise typer.Exit(EXIT_ERROR) from None
    finally:
        warnings.formatwarning = plain


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], Callable[[int, int, str], None]]]:
    """Offer progress bars on a terminal, one line per finished task elsewhere."""
    if quiet:
        yield lambda name: lambda done, total, loss: None
    elif draws_bars():
        with progress_bars() as bars:

            def bar(name: str) -> Callable[[int, int, str], None]:
                update = bars(f"{name:<8}")
                return lambda done, total, loss: update(
                    done, total, f"{done}/{total} steps, loss {loss}"
                )

            yield bar
    else:

        def line(name: str) -> Callable[[int, int, str], None]:
            def update(done: int, total: int, loss: str) -> None:
                if done == total:
                    say(f"trained {name}: {total} steps, last loss {loss}")

            return update

        yield line


@app.command("train")
def train_command(
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")],
    model: ModelOption = "resmlp",
    rule: Annotated[
        str, typer.Option(help=f"{', '.join(RULES)}, or package.module:Class of your own.")
    ] = "bp",
    data: DataOption = "fashion-mnist-mini",
    data_option: DataOptionsOption = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1200,
    batch_size: Annotated[int, typer.Option(help="Samples per step.")] = 128,
    seed: Annotated[int, typer.Option(help="Of weights, order and feedback.")] = 42,
    model_option: OptionsOption = None,
    rule_option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the rule; repeatable.")
    ] = None,
    penalty: Annotated[
        float, typer.Option(help="λ of the residual penalty λ‖f_l(h_l)‖² in each local loss.")
    ] = 0.0,
    device: DeviceOption = "auto",
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Train a zoo network with a credit rule and save it, feedback matrices included."""
    with _reported_errors():
        # Before the work that it is to hold.
        check_output_folder("--out", out.parent)
        out.parent.mkdir(parents=True, exist_ok=True)
        check_output_file("--out", out, replaced=True)
        dataset = load_dataset(data, **parse_options(data_option))
        with _progress(quiet) as progress:
            network = train(
                model,
                rule,
                dataset,
                steps=steps,
                batch_size=batch_size,
                seed=seed,
                penalty=penalty,
                model_options=parse_options(model_option),
                rule_options=parse_options(rule_option),
                device=chosen_device(device),
                progress=progress(rule),
            )
        save_checkpoint(network.checkpoint(), out)
        echo(f"{out}: {rule}, seed {seed}, {steps} steps, test accuracy {network.accuracy:.4f}")


def _exit_code(verdicts: list[str]) -> int:
    if any(verdict not in (TRUSTWORTHY, NOT_ENOUGH_DATA) for verdict in verdicts):
        return EXIT_WALK_BACK
    return EXIT_NOT_ENOUGH_DATA if NOT_ENOUGH_DATA in verdicts else EXIT_TRUSTWORTHY


@app.command("diagnose")
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
    with _reported_errors():
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
                records.append({"checkpoint": _name_of(path), "error": what})
                say(f"fadiag: {_shown(path)}: {what}", "red")
                continue
            echo(report, end="\n\n")
            rows.append(SummaryRow(report))
            record = {"checkpoint": _name_of(path), **json.loads(report.to_json())}
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
        raise typer.Exit(_exit_code([row.report.verdict for row in rows]))


def _name_of(subject: Path | int) -> str:
    return f"seed {subject}" if isinstance(subject, int) else str(subject)


def _shown(subject: Path | int) -> str:
    return display_name(_name_of(subject))


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
            say(f"fadiag: {_shown(subject)}: {note}")
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
        method_name=display_name(subject.stem) if isinstance(subject, Path) else _shown(subject),
        notes=f"{what} from {_shown(subject)} on {dataset.name}",
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
    """Say whether a program without its source takes images only as vectors."""
    with torch.no_grad(), untouched(model):
        for vectors in (False, True):
            try:
                model(images.flatten(1) if vectors else images)
            except Exception:  # whatever the program raises for another shape
                continue
            return vectors
    return False


@app.command("audit-cnn")
def audit_cnn_command(
    folder: Annotated[Path, typer.Option(help="Where the {method}_s{seed}.pt files are.")],
    out: Annotated[Path | None, typer.Option(help="Write the figures here, as JSON.")] = None,
    data: DataOption = "fashion-mnist-mini",
    method: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable; default {', '.join(METHODS)}.")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help=f"Repeatable; default {', '.join(map(str, SEEDS))}.")
    ] = None,
    model_option: OptionsOption = None,
    device: DeviceOption = "auto",
    unsafe_pickle: UnsafePickleOption = False,
) -> None:
    """Audit SmallCNN checkpoints of several rules and seeds; a missing file is only skipped."""
    with _reported_errors():
        check_output_file("--out", out)
        audit = audit_cnn(
            folder,
            load_dataset(data),
            methods=method or METHODS,
            seeds=seed or SEEDS,
            model_options=parse_options(model_option),
            device=chosen_device(device),
            unsafe_pickle=unsafe_pickle,
        )
        echo(audit)
        if out is not None:
            write_output("--out", out, json_bytes(audit.to_json() + "\n"))
        broken = [row for row in audit.skipped if not row.missing]
        if broken:
            say(f"fadiag: {len(broken)} checkpoints could not be audited")
            raise typer.Exit(EXIT_ERROR)
        if not audit.rows:
            raise typer.Exit(EXIT_NOT_ENOUGH_DATA)
        raise typer.Exit(_exit_code([row.verdict for row in audit.rows]))


# What the demo is expected to show; see the README.
DEMO_RULES = ("bp", "dfa", "ep", "frozen")
_DEMO_NOTES = {
    "bp": "Backpropagation: the healthy reference.",
    "dfa": "Direct feedback alignment: nothing bounds the residual stream.",
    "ep": "Equilibrium propagation: a local rule whose residual stream stays bounded.",
    "frozen": "Blocks fixed at their initial values: the baseline of (d).",
}


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and reports.")] = Path(
        "fadiag-demo"
    ),
    data: DataOption = "fashion-mnist-mini",
    seed: Annotated[list[int] | None, typer.Option(help="Repeatable; default 42.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps per network.")] = 1200,
    device: DeviceOption = "auto",
    quiet: Annotated[bool, typer.Option(help="No progress bars, summary only.")] = False,
) -> None:
    """Train four small networks on real images and audit each."""
    with _reported_errors():
        check_output_folder("--out", out)
        dataset = load_dataset(data)
        out.mkdir(parents=True, exist_ok=True)
        surprises: list[str] = []
        for one_seed in seed or [42]:
            rows = _demo_seed(dataset, one_seed, steps, out, chosen_device(device), quiet)
            echo(f"\nseed {one_seed}, {steps} steps on {dataset.name}")
            echo(summary_table(rows))
            surprises += [f"seed {one_seed}: {text}" for text in _unexpected(rows)]
        echo(f"\ncheckpoints and reports: {out}")
        print("(d) is judged beside the verdict: it needs the frozen-blocks accuracy.")
        if surprises:
            for text in surprises:
                say(f"fadiag: unexpected: {text}", "red")
            raise typer.Exit(EXIT_ERROR)


def _demo_seed(
    dataset: ImageDataset, seed: int, steps: int, out: Path, device: torch.device, quiet: bool
) -> list[SummaryRow]:
    networks: dict[str, TrainedNetwork] = {}
    with _progress(quiet) as progress:
        for rule in DEMO_RULES:
            networks[rule] = train(
                "resmlp",
                rule,
                dataset,
                steps=steps,
                seed=seed,
                device=device,
                progress=progress(rule),
            )
            save_checkpoint(networks[rule].checkpoint(), out / f"{rule}_s{seed}.pt")
    frozen_acc = networks["frozen"].accuracy
    rows = []
    for rule, network in networks.items():
        report = run_diagnosis(
            network.model,
            dataset.eval_batches(flatten=True, device=device),
            network.accuracy,
            method_name=rule.upper() if rule != "frozen" else rule,
            notes=f"{_DEMO_NOTES[rule]} resmlp on {dataset.name}, seed {seed}, {steps} steps.",
        )
        stem = out / f"{rule}_s{seed}"
        stem.with_suffix(".json").write_text(report.to_json() + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(report.to_markdown(), encoding="utf-8")
        if not quiet:
            echo(report, end="\n\n")
        rows.append(SummaryRow(report, _beside_frozen(report, rule, frozen_acc)))
    return rows


def _beside_frozen(report: DiagnosticReport, rule: str, frozen_acc: float) -> Diagnostic | None:
    if rule == "frozen":
        return None
    return depth_utility(report.figures, DiagnosticThresholds(), frozen_acc)


def _unexpected(rows: list[SummaryRow]) -> list[str]:
    verdicts = {row.report.method_name: row.report.verdict for row in rows}
    texts = [
        f"{name}: expected {TRUSTWORTHY}, got {verdicts[name]}"
        for name in ("BP", "EP")
        if verdicts[name] != TRUSTWORTHY
    ]
    if "(a)" not in verdicts["DFA"]:
        texts.append(f"DFA: expected needs walk-back with (a), got {verdicts['DFA']}")
    return texts


@app.command("doctor")
def doctor_command() -> None:
    """Print versions, and which native libraries loaded, for what they were built, or why not."""
    with _reported_errors():
        info = ops.build_info()
        built_with = info.get("torch_built_with")
        lines = [
            ("fadiag_fast", __version__),
            ("torch", f"{torch.__version__} (needs 2.10 or later)"),
            ("python", platform.python_version()),
            ("platform", platform.platform()),
            ("cuda in torch", torch.version.cuda or "no"),
        ]
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                major, minor = torch.cuda.get_device_capability(index)
                name = torch.cuda.get_device_name(index)
                lines.append((f"gpu {index}", f"{name}, compute capability {major}.{minor}"))
        else:
            lines.append(("gpu", "none available to torch"))
        for device, library in ops.LIBRARIES.items():
            built = {
                "cpu": f"variants {', '.join(info.get('cpu_variants', [])) or 'none'}",
                "cuda": f"architectures {', '.join(info.get('cuda_architectures', [])) or 'none'}"
                + (f", with nvcc {info['cuda']}" if info.get("cuda") else ""),
            }[device]
            state = "loaded" if library.loaded else f"not loaded: {library.reason}"
            lines.append((f"{device} library", f"{state}; built for {built}"))
        lines.append(("built with", f"torch {built_with}" if built_with else "nothing built"))
        lines.append(("for torchvision", install_line()))
        lines.append(("FADIAG_BACKEND", ops.default_backend() or "not set"))
        width = max(len(name) for name, _ in lines)
        for name, text in lines:
            echo(f"{name:<{width}}  {text}")


register_scan_commands(app, _reported_errors)
register_watch(app, _reported_errors)
register_study(app, _reported_errors)
