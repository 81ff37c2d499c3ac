"""The command ``fadiag demo``."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from .._common.terminal import say
from .._common.text import echo
from ..checkpoints import save_checkpoint
from ..diagnosis import diagnose as run_diagnosis
from ..protocol import TRUSTWORTHY, Diagnostic, DiagnosticThresholds, depth_utility
from ..report import DiagnosticReport, SummaryRow, summary_table
from ..zoo import ImageDataset, TrainedNetwork, load_dataset, train
from .common import EXIT_ERROR, reported_errors, shown_progress
from .options import DataOption, DeviceOption, check_output_folder, chosen_device

# What the demo is expected to show; see the README.
DEMO_RULES = ("bp", "dfa", "ep", "frozen")


_DEMO_NOTES = {
    "bp": "Backpropagation: the healthy reference.",
    "dfa": "Direct feedback alignment: nothing bounds the residual stream.",
    "ep": "Equilibrium propagation: a local rule whose residual stream stays bounded.",
    "frozen": "Blocks fixed at their initial values: the baseline of (d).",
}


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
    with reported_errors():
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
    with shown_progress(quiet) as progress:
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


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("demo")(demo_command)
