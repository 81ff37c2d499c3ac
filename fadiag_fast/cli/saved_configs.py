"""What stands beside the weights of a study's checkpoints: of which network they say they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..checkpoints import Checkpoint, CheckpointError, load_checkpoint, load_into
from ..checkpoints.errors import printable
from ..scanning.configuration import network_hash
from ..scanning.run_names import Entry
from ..zoo import MODELS, ImageDataset
from .networks import build_network
from .options import ConfigError

# Checkpoints that are read to find one whose configuration is of its own weights.
_MOST_TRIED = 8

Say = Callable[[str], None]


class SavedNetwork:
    """Build a study's network by the first checkpoint that can be read; tell others from it.

    A configuration that builds nothing, or a network that its own weights do not fit, is passed
    over for the next checkpoint's.

    Args:
        entries: the study.
        name: of the network, in the zoo.
        dataset: gives the shape of the input and the number of classes.
        options: of the command line, which count before what is saved.
        say: is given sentences about files that were passed over.
        how: `unsafe_pickle` and `key`, as for `load_checkpoint`.

    Attributes:
        network, flat: as :func:`fadiag_fast.cli.networks.build_network` returns them.

    Raises:
        ValueError, TypeError: the options of the command line build no network.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        name: str,
        dataset: ImageDataset,
        options: dict[str, Any],
        say: Say,
        **how: Any,
    ) -> None:
        self._name, self._dataset, self._options = name, dataset, options
        self._answers: dict[str, str | None] = {}
        self._from = ""
        found = self._first_that_fits(entries, say, how)
        self.network, self.flat = found or build_network(name, dataset, options)
        self._hash = network_hash(self.network)

    def _first_that_fits(
        self, entries: Sequence[Entry], say: Say, how: dict[str, Any]
    ) -> tuple[nn.Module, bool] | None:
        first: tuple[str, tuple[nn.Module, bool]] | None = None
        tried = 0
        for entry in entries:
            try:
                checkpoint = load_checkpoint(entry.path, **how)
            except Exception:  # whatever it is, the checkpoint's row will say it
                continue
            config = checkpoint.extra.get("config")
            if not tried and (other := self._other_model(config)):
                say(
                    f"{entry.path}: expected a checkpoint of --model {self._name}, got one of "
                    f"{other}"
                )
            tried += 1
            try:
                built = self._build(checkpoint)
            except ConfigError as error:
                say(f"{entry.path}: {error}")
            else:
                first = first or (entry.path, built)
                if _fits(built[0], checkpoint):
                    self._from = entry.path
                    return built
            if tried == _MOST_TRIED:
                break
        if first is None:
            return None
        self._from = first[0]
        return first[1]

    def _build(self, checkpoint: Checkpoint) -> tuple[nn.Module, bool]:
        held = sum(tensor.numel() for tensor in checkpoint.state_dict.values())
        config = checkpoint.extra.get("config")
        return build_network(self._name, self._dataset, self._options, config, held)

    def _other_model(self, config: Any) -> str | None:
        """Return the network that a configuration names, if it is another one."""
        if not isinstance(config, dict) or "model" not in config:
            return None
        model = config["model"]
        return None if model == self._name else printable(str(model))

    def refuse(self, extra: Mapping[str, Any]) -> str | None:
        """Return why a checkpoint is of another network, by what stands beside its weights.

        None where nothing stands there, or the same network is built by it. Threads may ask.
        """
        config = extra.get("config")
        if not isinstance(config, dict) or not isinstance(config.get("model"), str):
            return None
        if config["model"] not in MODELS:  # of another program's networks
            return None
        key = repr((config["model"], config.get("model_options")))
        if key not in self._answers:
            self._answers[key] = self._why_not(config)
        return self._answers[key]

    def _why_not(self, config: dict[str, Any]) -> str | None:
        like = f" as in {self._from!r}" if self._from else ""
        if other := self._other_model(config):
            return f"expected weights of {self._name}{like}, got a file that says {other}"
        held = sum(parameter.numel() for parameter in self.network.parameters())
        try:
            network, _ = build_network(self._name, self._dataset, self._options, config, held)
        except Exception as error:
            return str(error)
        if network_hash(network) == self._hash:
            return None
        return (
            f"expected the network of this scan, built{like}, got a file whose config says "
            f"{printable(repr(config.get('model_options')))}; scan it by itself"
        )


def _fits(network: nn.Module, checkpoint: Checkpoint) -> bool:
    try:
        load_into(copy.deepcopy(network), checkpoint)
    except CheckpointError:
        return False
    return True
