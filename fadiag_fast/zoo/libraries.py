"""Build networks of torchvision and timm by name, for the data that they are to see."""

import difflib
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import nn

LIBRARIES = ("torchvision", "timm")


def build_from(
    library: str, name: str, *, input_shape: tuple[int, ...], num_classes: int, **options: Any
) -> nn.Module:
    """Build a network with random weights.

    Args:
        library: one of :data:`LIBRARIES`.
        name: the network's name there.
        input_shape: (C, H, W) of one image. timm builds for its channels; torchvision's networks
            take three.
        num_classes: number of logits.
        options: for the library's builder; they go before what follows from the data.

    Raises:
        ImportError: the library is absent, or was made for another build of torch.
        ValueError: an unknown name (with the nearest ones), or a network for another number of
            channels.
        TypeError: an option that the builder does not have.
    """
    module = _imported(library)
    arguments: dict[str, Any] = {"num_classes": num_classes}
    if library == "torchvision":
        known = module.models.list_models()
        builder = module.models.get_model
    else:
        known = module.list_models()
        builder = module.create_model
        arguments["in_chans"] = input_shape[0]
    if name not in known and name.partition(".")[0] not in known:  # timm: NAME.WEIGHTS
        near = ", ".join(difflib.get_close_matches(name, known)) or f"{library}.list_models()"
        raise ValueError(f"--model: expected a network of {library}, got {name!r}; see {near}")
    model: nn.Module = builder(name, **{**arguments, **options})
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels != input_shape[0]:
        raise ValueError(
            f"--model: {library}:{name} takes images of {first.in_channels} channels, the data "
            f"have {input_shape[0]}"
            + (
                "; --data-option channels=3 repeats the grey one"
                if (input_shape[0], first.in_channels) == (1, 3)
                else ""
            )
        )
    return model


def install_line() -> str:
    """Return the command that installs torchvision and timm beside the torch that is here.

    Each torchvision demands one torch: without its version in the same command pip would install
    the newest of both.
    """
    return f"pip install torch=={torch.__version__.partition('+')[0]} torchvision timm pillow"


def _imported(library: str) -> ModuleType:
    try:
        # timm needs torchvision, and says less about why it cannot be imported.
        torchvision = importlib.import_module("torchvision")
        return torchvision if library == "torchvision" else importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"--model {library}:NAME needs {error.name}, which is not installed: {install_line()}"
        ) from error
    except (RuntimeError, OSError) as error:
        # Its operators are compiled against one version and one build (CPU, CUDA) of torch.
        raise ImportError(
            f"--model {library}:NAME needs a torchvision that was built for torch "
            f"{torch.__version__}; the installed one cannot be imported ({error}). Install it from "
            f"the index that torch came from: {install_line()} --index-url "
            f"https://download.pytorch.org/whl/cpu for instance"
        ) from error
