"""The command ``fadiag audit-cnn``."""

from pathlib import Path
from typing import Annotated

import typer

from .._common.terminal import say
from .._common.text import echo, json_bytes
from ..zoo import load_dataset
from ..zoo.audit_cnn import METHODS, SEEDS, audit_cnn
from .common import EXIT_ERROR, EXIT_NOT_ENOUGH_DATA, reported_errors
from .diagnose import exit_code
from .options import (
    DataOption,
    DeviceOption,
    OptionsOption,
    UnsafePickleOption,
    check_output_file,
    chosen_device,
    parse_options,
    write_output,
)


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
    with reported_errors():
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
        raise typer.Exit(exit_code([row.verdict for row in audit.rows]))


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("audit-cnn")(audit_cnn_command)
