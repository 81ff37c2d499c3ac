"""What commands share: options with their help, and what is made of their values."""

import ast
import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from .._common.terminal import say
from ..capture import Output
from ..capture.reduction import REDUCTIONS
from ..capture.selectors import SELECTOR_HELP
from ..checkpoints.errors import printable
from ..zoo import ImageDataset, build_model
from .common import short_sentence

DataOption = Annotated[
    str,
    typer.Option(
        help="fashion-mnist-mini (shipped), teacher (synthetic), fashion-mnist:FOLDER, "
        "cifar10:FOLDER, imagefolder:FOLDER or npz:FILE."
    ),
]
DataOptionsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data-option",
        help="NAME=VALUE, repeatable: size, limit, normalize of imagefolder; channels=3 repeats "
        "the channel of grey images.",
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        help="resmlp, smallcnn, student, vit-mini, torchvision:NAME, timm:NAME or "
        "package.module:function, from the working directory too; it is called with the values of "
        "--model-option, and with input_shape (C, H, W) and num_classes if it has parameters of "
        "these names."
    ),
]
OptionsOption = Annotated[
    list[str] | None,
    typer.Option("--model-option", help="NAME=VALUE for the model's builder; repeatable."),
]
ProtocolOption = Annotated[
    str,
    typer.Option(
        help="paper, as published, or calibrated: independent of batch size, loss scale, dtype and "
        "of how well the task is solved, with causes in words."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, … or auto.")]

TapsOption = Annotated[
    list[str] | None,
    typer.Option("--taps", help=f"Where to observe: {SELECTOR_HELP}. Repeatable."),
]
ReductionOption = Annotated[
    str,
    typer.Option(
        help=f"What one sample's state is where states have positions: {', '.join(REDUCTIONS)}."
    ),
]
BatchDimOption = Annotated[int, typer.Option(help="Dimension of the states that counts samples.")]
OutputOption = Annotated[
    str | None, typer.Option(help="Name or index of the logits in a structured output.")
]
BatchesOption = Annotated[int, typer.Option(help="Evaluation batches.")]
BatchSizeOption = Annotated[int, typer.Option(help="Samples per batch.")]
FlattenOption = Annotated[
    bool | None,
    typer.Option("--flatten/--no-flatten", help="Give images as vectors; default: the model's."),
]
MaxGrowthOption = Annotated[float, typer.Option(help="(a) fires above.")]
MinGradientOption = Annotated[float, typer.Option(help="(b) fires below, as published.")]
MinGainOption = Annotated[float, typer.Option(help="(b) fires below, calibrated.")]
MaxStabilityOption = Annotated[float, typer.Option(help="(c) fires above.")]
MinUtilityOption = Annotated[float, typer.Option(help="(d) fires below, in points.")]
UnsafePickleOption = Annotated[
    bool,
    typer.Option(
        "--unsafe-pickle",
        help="Unpickle checkpoints that hold more than tensors and plain values, which RUNS CODE "
        "from them. Opens no TorchScript or .pt2 file.",
    ),
]
TrustCodeOption = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        help="Open TorchScript and .pt2 files. They are programs: opening and calling one can RUN "
        "ANY CODE, with all your rights.",
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Where in the file the weights are, such as state_dict_ema or state.model; default: "
        "the first usual place.",
    ),
]


def chosen_device(name: str) -> torch.device:
    """Return the device of --device.

    Raises:
        ValueError: torch has none of this name here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # without CUDA an AssertionError
        why = (str(error) or repr(error)).partition("\n")[0]
        raise ValueError(
            f"--device: expected a device that torch has here, got {name!r}: {why}"
        ) from None
    return device


def check_output_file(
    option: str, path: Path | None, inputs: Iterable[object] = (), *, replaced: bool = False
) -> None:
    """Raise ValueError where a file cannot be written, before the work that it is to hold.

    Args:
        option: that names the file.
        path: the file; None is no file.
        inputs: files that are read, which it must not replace.
        replaced: whether a whole new file takes its place. Else it is written into, and may be a
            terminal or a pipe that somebody reads.
    """
    if path is None:
        return
    folder = path.parent
    if path.is_dir():
        raise ValueError(f"{option}: expected a file to write, got the folder {path}")
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(
            f"{option}: expected a file in a folder that exists, got {path}: {folder} {what}"
        )
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(
            f"{option}: expected a file that can be written, got {path}: no permission"
        )
    if path.exists() and not path.is_file():
        if replaced or path.is_socket():
            raise ValueError(f"{option}: expected a regular file, got {path}: it is another kind")
        if path.is_fifo():
            _check_reader(option, path)
    read = [Path(other) for other in inputs if isinstance(other, str | Path)]
    if path.exists() and any(other.exists() and path.samefile(other) for other in read):
        raise ValueError(f"{option}: expected another file than those that are read, got {path}")


def _check_reader(option: str, path: Path) -> None:
    """Raise ValueError where nobody reads a pipe: opening it to write would wait for ever."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        why = "nobody reads this pipe" if error.errno == errno.ENXIO else error.strerror
        raise ValueError(f"{option}: expected a file to write, got {path}: {why}") from None


def write_output(option: str, path: Path, data: bytes) -> None:
    """Write the file of an option, and name both where that fails.

    Raises:
        ValueError: it cannot be written, or its disk is full.
    """
    try:
        path.write_bytes(data)
    except BrokenPipeError:
        pass  # who reads it has seen enough
    except OSError as error:
        raise ValueError(
            f"{option}: expected a file that can be written, got {path}: {error.strerror}"
        ) from error


def check_output_folder(option: str, path: Path | None) -> None:
    """Raise ValueError where a folder cannot be made or written to, before the work."""
    if path is None:
        return
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise ValueError(f"{option}: expected a folder, got {path}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(
            f"{option}: expected a folder that can be written, got {path}: no permission"
        )


def tell_unused(context: typer.Context, *cases: tuple[str, bool, str]) -> None:
    """Say which of the options that were given change nothing.

    Args:
        context: of the command.
        cases: the name of the command's parameter, whether it has an effect, and why not.
    """
    for name, effective, why in cases:
        source = context.get_parameter_source(name)
        if not effective and source is not None and source.name != "DEFAULT":
            flag = next(p.opts[0] for p in context.command.params if p.name == name)
            say(f"fadiag: {flag} has no effect {why}", "yellow")


def parse_options(pairs: list[str] | None) -> dict[str, Any]:
    """Return the values of NAME=VALUE by name: numbers, tuples and the like, else text.

    Raises:
        ValueError: one is not of this form.
    """
    options: dict[str, Any] = {}
    for pair in pairs or []:
        name, sign, text = pair.partition("=")
        if not sign or not name:
            raise ValueError(f"option: expected NAME=VALUE, got {pair!r}")
        try:
            options[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[name] = text
    return options


def chosen_output(text: str | None) -> Output | None:
    """Return the value of --output: a whole number is an index, all else a name."""
    return int(text) if text and text.isdecimal() else text


# Of a whole number among saved options: no network that anybody trained here is larger.
_MOST_OF_AN_OPTION = 1 << 16


class ConfigError(ValueError):
    """Report that what stands beside a checkpoint's weights does not build a network."""


def saved_options(name: str, config: Any) -> dict[str, Any]:
    """Return the options of a network of the zoo that stand beside a checkpoint's weights.

    Nothing where there is no configuration, or that of another network.

    Raises:
        ConfigError: they are no names with plain values, or beyond all sizes.
    """
    if not isinstance(config, dict) or config.get("model") != name:
        return {}
    saved = config.get("model_options", {})
    if not isinstance(saved, dict) or not all(isinstance(key, str) for key in saved):
        raise ConfigError(
            f"config beside the weights: model_options: expected names with values, got "
            f"{printable(repr(saved))}"
        )
    for key, value in saved.items():
        many = value if isinstance(value, list | tuple) else [value]
        if not all(item is None or isinstance(item, int | float | str | bool) for item in many):
            raise ConfigError(
                f"config beside the weights: model_options: {printable(key)}: expected a number, a "
                f"text or a list of these, got {printable(repr(value))}"
            )
        if any(isinstance(item, int) and item > _MOST_OF_AN_OPTION for item in many):
            raise ConfigError(
                f"config beside the weights: model_options: {printable(key)}: expected at most "
                f"{_MOST_OF_AN_OPTION:,}, got {printable(repr(value))}"
            )
    return saved


def build_saved(
    name: str, dataset: ImageDataset, options: dict[str, Any], saved: dict[str, Any], held: int
) -> nn.Module:
    """Build a network by what a file says, once it is known to be of the size of its weights."""
    every: dict[str, Any] = {**saved, **options}
    sizes: dict[str, Any] = {"input_shape": dataset.input_shape, "num_classes": dataset.num_classes}
    try:
        with torch.device("meta"):
            drawn = build_model(name, **sizes, **every)
        needed = sum(parameter.numel() for parameter in drawn.parameters())
        # Buffers may be saved or not; a network of another size says so when it is loaded.
        if not options and needed > 2 * held + (1 << 20):
            raise ValueError(f"it has {needed:,} parameters, the file {held:,} numbers")
        return build_model(name, **sizes, **every)
    except Exception as error:  # whatever a builder makes of values of unknown origin
        raise ConfigError(
            f"config beside the weights: model_options: expected what builds {name}, got "
            f"{printable(repr(saved))}: {printable(short_sentence(error))}"
        ) from error
