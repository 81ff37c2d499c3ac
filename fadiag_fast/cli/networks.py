"""Build the network that a command line names."""

import traceback
from typing import Any

from torch import nn

from .._common.named import accepted, load_named
from ..zoo import ImageDataset, build_model, model_spec
from ..zoo.libraries import LIBRARIES, build_from
from .common import short_sentence
from .options import build_saved, saved_options


def build_network(
    name: str,
    dataset: ImageDataset,
    options: dict[str, Any],
    config: Any = None,
    held: int = 1 << 40,
) -> tuple[nn.Module, bool]:
    """Build the network that a checkpoint is for; return it and whether it takes flat input.

    Args:
        name: the value of --model.
        dataset: gives the shape of the input and the number of classes.
        options: for the builder. A function of the user's is also given `input_shape` and
            `num_classes` where it has parameters of these names, and `options` go before them.
        config: what `fadiag train` saved beside the weights, if anything: for a network of the zoo
            its options count where `options` has none.
        held: numbers that the checkpoint holds: a configuration of a much larger network is refused
            before memory is taken for it.

    Raises:
        ConfigError: the configuration builds no such network.
        ValueError: an unknown name, or the builder raises.
        TypeError: an option that a builder of the zoo or of a library does not have.
        ImportError: the library is not installed.
    """
    if ":" not in name:
        flat = model_spec(name).flatten_input
        if saved := saved_options(name, config):
            return build_saved(name, dataset, options, saved, held), flat
        shape, classes = dataset.input_shape, dataset.num_classes
        return build_model(name, input_shape=shape, num_classes=classes, **options), flat
    module_name, _, function_name = name.partition(":")
    if module_name in LIBRARIES:
        shape, classes = dataset.input_shape, dataset.num_classes
        built = build_from(
            module_name, function_name, **{"input_shape": shape, "num_classes": classes, **options}
        )
        return built, False
    # What a user's own code may raise has no bounds; a script that parses arguments exits.
    try:
        function = load_named(name)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"--model: expected package.module:function, got {name!r}: {short_sentence(error)}"
        ) from None
    offered = {"input_shape": dataset.input_shape, "num_classes": dataset.num_classes}
    try:
        model = function(**{**accepted(function, offered), **options})
    except (Exception, SystemExit) as error:
        # The first frame is this one: options that the function does not take.
        inner = traceback.extract_tb(error.__traceback__)[1:]
        where = f" ({inner[-1].filename}:{inner[-1].lineno})" if inner else ""
        raise ValueError(
            f"--model: expected {name} to return a module, got {short_sentence(error)}{where}"
        ) from None
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model: expected {name} to return a module, got {type(model).__name__}")
    # Vectors of a dataset are images of one row; a network of one's own takes them as they were.
    return model, tuple(dataset.input_shape[:2]) == (1, 1)
