"""Exported programs (``.pt2``) as ordinary modules."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, UnflattenedModule, unflatten
from torch.utils._pytree import tree_leaves

from ..capture.points import TapError
from ..checkpoints.errors import brief, damaged
from .torchscript import TRAINING_ARGUMENTS, is_numbered, named_class

CALLER = "load_packaged"


def load_exported(path: Path) -> ExportedProgram:
    try:
        # By the open file: torch warns about any name that does not end in .pt2.
        with path.open("rb") as file, quietly():
            return torch.export.load(file)
    except Exception as error:
        raise damaged(path, error, CALLER) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Keep torch from logging what is raised as well, and from warning about its own code."""
    logger = torch.export.log
    was = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of copying its own tree specs
            yield
    finally:
        logger.disabled = was


class ExportedRoot(UnflattenedModule):
    """A whole exported program; see :func:`from_exported`.

    Attributes:
        packaging_remarks: what a reader of the figures should know about the program.
        batch_size: the number of samples that it was exported for; None where any will do.
    """

    packaging_remarks: tuple[str, ...] = ()

    @property
    def batch_size(self) -> int | None:
        for node in self.input_placeholders:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.dim():
                return value.shape[0] if isinstance(value.shape[0], int) else None
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program with arguments by position or by name.

        Raises:
            TapError: the arguments are not those, or not of the shapes, it was exported with.
        """
        args, kwargs = self._arranged(args, kwargs)
        self._check_shapes(tree_leaves((args, kwargs)))
        return super().forward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _arranged(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        signature = self.module_call_graph[0].signature
        positional, by_name = signature.in_spec.children()
        names = list(signature.forward_arg_names or ())
        count = positional.num_children
        if len(names) != count + by_name.num_children:
            names = [f"argument {index}" for index in range(count)] + list(by_name.context)
        given = dict(zip(names, args, strict=False)) | kwargs
        if len(given) != len(args) + len(kwargs) or set(given) != set(names):
            got = ", ".join(kwargs) if kwargs else f"{len(args)} arguments"
            raise TapError(
                f"{type(self).__name__}: expected the inputs that it was exported with, "
                f"{', '.join(names)}, got {got}"
            )
        return tuple(given[n] for n in names[:count]), {n: given[n] for n in names[count:]}

    def _check_shapes(self, leaves: list[Any]) -> None:
        name = type(self).__name__
        for node, leaf in zip(self.input_placeholders, leaves, strict=False):
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or not isinstance(leaf, Tensor):
                continue
            exported: list[Any] = [s if isinstance(s, int) else "any" for s in value.shape]
            fits = len(exported) == leaf.dim() and all(
                size in ("any", got) for size, got in zip(exported, leaf.shape, strict=True)
            )
            if fits:
                continue
            hint = ""
            if exported[1:] == list(leaf.shape[1:]) or "any" in exported[1:]:
                hint = (
                    f"; it was exported for batches of {exported[0]} samples: give batches of "
                    f"{exported[0]}, or export it with dynamic_shapes={{{node.name!r}: "
                    f"{{0: torch.export.Dim.DYNAMIC}}}}"
                )
            raise TapError(
                f"{name}: input {node.name!r}: expected shape {exported}, "
                f"got {list(leaf.shape)}{hint}"
            )


def from_exported(program: ExportedProgram) -> nn.Module:
    """Return an ordinary module that runs an exported program and can be observed.

    ``torch.export.unflatten`` restores the modules from the path that each node of the graph has
    kept; each gets a class with its original's name. What export fixed stays fixed: eval or
    training mode, sizes that were not marked as dynamic, branches that were not taken.

    Args:
        program: from ``torch.export.export`` or ``load``, decomposed or not. It is copied.

    Raises:
        TapError: no module path is left in the graph, or unflatten cannot restore the modules.
    """
    try:
        with quietly():
            module = unflatten(program)
    except Exception as error:
        raise TapError(
            f"ExportedProgram: expected a graph whose modules can be restored, got one that "
            f"torch.export.unflatten refuses ({brief(error)}); build the network from its source "
            f"and load its state_dict"
        ) from error
    parts = [part for name, part in module.named_modules() if name and hasattr(part, "type_name")]
    if not parts:
        raise TapError(
            "ExportedProgram: expected a graph whose nodes know their modules, got one without; "
            "export the network again from its source"
        )
    for part in [*parts, module]:
        base = ExportedRoot if part is module else type(part)
        name = (part.type_name() or "Module").rpartition(".")[2]
        children = [child for child, _ in part.named_children()]
        part.__class__ = named_class(name, base, is_numbered(children))
    fixed = sorted(set(_fixed_in_training(module)))
    if fixed:
        module.__dict__["packaging_remarks"] = (
            f"The program was exported in training mode: {', '.join(fixed)} behave as in training, "
            f"and the figures with them; export it after model.eval().",
        )
    return module


def _fixed_in_training(module: nn.Module) -> Iterator[str]:
    """Name the operators that are told to behave as in training."""
    for part in module.modules():
        graph = getattr(part, "graph", None)
        for node in graph.nodes if isinstance(graph, torch.fx.Graph) else ():
            if not isinstance(node.target, torch._ops.OpOverload):
                continue
            place = TRAINING_ARGUMENTS.get(node.target._schema.name)
            if place is None or len(node.args) <= place or node.args[place] is not True:
                continue
            if place == 2 and node.args[1] == 0:
                continue  # dropout of nothing
            yield node.target._schema.name.removeprefix("aten::")
