"""The command ``fadiag train``."""

from pathlib import Path
from typing import Annotated

import typer

from .._common.text import echo
from ..checkpoints import save_checkpoint
from ..zoo import RULES, load_dataset, train
from .common import reported_errors, shown_progress
from .options import (
    DataOption,
    DataOptionsOption,
    DeviceOption,
    ModelOption,
    OptionsOption,
    check_output_file,
    check_output_folder,
    chosen_device,
    parse_options,
)


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
    with reported_errors():
        # Before the work that it is to hold.
        check_output_folder("--out", out.parent)
        out.parent.mkdir(parents=True, exist_ok=True)
        check_output_file("--out", out, replaced=True)
        dataset = load_dataset(data, **parse_options(data_option))
        with shown_progress(quiet) as progress:
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


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("train")(train_command)
