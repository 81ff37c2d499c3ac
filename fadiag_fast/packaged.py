"""Load networks that come without their source: TorchScript files and exported programs.

What kind of file it is is decided from its bytes: a TorchScript file and a ``.pt2`` archive are zip
files with known members. Both become ordinary modules whose submodules have their original names,
so that taps, capture and diagnosis work on them as on any network.

A program is code. A TorchScript file holds TorchScript code, which torch runs in an interpreter of
its own; no pickle of Python objects is in it. A ``.pt2`` archive names the functions that it calls,
holds expressions that torch evaluates, and may hold pickles: an archive that asks for more than
torch's operators, arithmetic and tensors is refused unless the caller says so.
"""

import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, UnflattenedModule, unflatten
from torch.export.passes import move_to_device_pass
from torch.utils._pytree import tree_leaves

from .checkpoints import UnreadableCheckpoint, UnsafeCheckpoint
from .checkpoints.errors import at, brief, damaged, listed
from .checkpoints.files import FORCE_SAFE, read_head
from .compiled import PROBE_METADATA
from .taps import TapError
from .torchscript import TRAINING_ARGUMENTS, from_torchscript, is_numbered, named_class

Packaging = Literal["torchscript", "exported", "compiled", "probe"]

_EXPECTED = "a TorchScript file or an exported program"
_CALLER = "load_packaged"

# What a program may call without being trusted: torch's operators, and arithmetic on sizes.
_CALLABLE = re.compile(
    r"torch\.ops\.\w+\.\w+(\.\w+)?|torch\.(_sym_|sym_)\w+|math\.\w+|_operator\.(abs|add|and_|eq|floordiv|ge|"
    r"getitem|gt|index|invert|le|lshift|lt|mod|mul|ne|neg|not_|or_|pos|pow|rshift|sub|truediv|xor)"
)


class NoGraph(UnreadableCheckpoint):
    """Report a file whose program is finished: there is no network in it to be observed."""


def packaging_of(path: str | os.PathLike[str]) -> Packaging | None:
    """Say which kind of program a file holds, judged by its content.

    Returns:
        ``"torchscript"``, ``"exported"``, ``"compiled"`` for AOTInductor's output, ``"probe"`` for
        what :meth:`fadiag_fast.CompiledProbe.save` exports, or None for everything else: weights,
        and whatever cannot be read.
    """
    try:
        return _packaging(Path(path))
    except UnreadableCheckpoint:
        return None


def _packaging(path: Path) -> Packaging | None:
    head, _ = read_head(path, _EXPECTED, _CALLER)
    if head.startswith((b"\x7fELF", b"\xcf\xfa\xed\xfe")):  # a shared library of Linux, of macOS
        return "compiled"
    if not head.startswith(b"PK\x03\x04"):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:
        raise damaged(path, error, _CALLER) from error
    # All lies in one folder, named after the file or 'archive'.
    inside = {name.partition("/")[2] for name in names}
    if any(name.startswith("data/aotinductor/") for name in inside):
        return "compiled"
    if any(name.endswith(f"/{PROBE_METADATA}") for name in inside):
        return "probe"
    if any(re.fullmatch(r"models/[^/]+\.json", name) for name in inside):
        return "exported"
    if "serialized_exported_program.json" in names:  # torch up to 2.7
        return "exported"
    return "torchscript" if "constants.pkl" in inside else None


def load_packaged(
    path: str | os.PathLike[str],
    *,
    map_location: str | torch.device = "cpu",
    unsafe_pickle: bool = False,
) -> nn.Module:
    """Load a network from a file that holds the program itself, so that it can be diagnosed.

    Args:
        path: from ``torch.jit.save`` or ``torch.export.save``; its content decides, not its name.
        map_location: the device on which the network ends up.
        unsafe_pickle: load exported programs that hold pickled objects, or that name other
            functions than torch's operators. WHICH RUNS CODE FROM THE FILE.

    Returns:
        A module with the original's submodules under their names, to be given to
        :func:`~fadiag_fast.diagnose`. For exported programs see :func:`from_exported`, for
        TorchScript :func:`~fadiag_fast.torchscript.from_torchscript`; ``torch.jit.load`` reads the
        latter, and running the network runs the TorchScript code in the file.

    Raises:
        UnreadableCheckpoint: the file is missing, damaged, or holds no program.
        NoGraph: the file was compiled by AOTInductor, so that there is nothing to differentiate;
            or it holds a probe.
        UnsafeCheckpoint: the file asks for more than torch's operators and tensors.
        TapError: the program has no modules that could be observed.
    """
    path = Path(path)
    kind = _packaging(path)
    if kind == "compiled":
        raise NoGraph(
            at(
                path,
                "expected a program with a graph, got one compiled by AOTInductor, which computes "
                "outputs and no gradients; give the file of torch.export.save from which it was "
                "compiled, or compile the probe along with the network (CompiledProbe)",
                _CALLER,
            )
        )
    if kind == "probe":
        raise NoGraph(
            at(
                path,
                "expected a network, got a probe of CompiledProbe.save, which holds the audit of "
                "one already; run it with load_probe",
                _CALLER,
            )
        )
    if kind is None:
        raise UnreadableCheckpoint(
            at(
                path,
                f"expected {_EXPECTED}, got another file; for weights build the network and use "
                "load_checkpoint and load_into",
                _CALLER,
            )
        )
    device = torch.device(map_location)
    if kind == "torchscript":
        return from_torchscript(_load_torchscript(path, device))
    program = _load_exported(path, unsafe_pickle)
    if device.type != "cpu" or any(t.device != device for t in program.state_dict.values()):
        with _quiet():
            program = move_to_device_pass(program, device)
    return from_exported(program)


def as_module(model: Any) -> Any:
    """Return a module that can be observed for a TorchScript or exported program.

    Everything else is returned as it is. The program itself is not changed.

    Raises:
        TapError: the program has no modules, or comes as what ``ExportedProgram.module()`` returns.
    """
    if isinstance(model, torch.jit.ScriptModule):
        return from_torchscript(model)
    if isinstance(model, ExportedProgram):
        return from_exported(model)
    if isinstance(model, torch.fx.GraphModule) and "eval" in vars(model):
        raise TapError(
            "diagnose: expected a module that calls its submodules, got what "
            "ExportedProgram.module() returns, one flat graph; give the ExportedProgram itself"
        )
    return model


def _load_torchscript(path: Path, device: torch.device) -> torch.jit.ScriptModule:
    try:
        with warnings.catch_warnings():
            # The report says once that TorchScript is deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            script: torch.jit.ScriptModule = torch.jit.load(os.fspath(path), map_location=device)
            return script
    except Exception as error:
        raise _unknown_operator(path, error) or damaged(path, error, _CALLER) from error


def _unknown_operator(path: Path, error: Exception) -> UnreadableCheckpoint | None:
    unknown = r"Unknown builtin op: ([\w:.]+)|__torch__\.torch\.classes\.([\w.]+)"
    found = re.search(unknown, str(error))
    if found is None:
        return None
    return UnreadableCheckpoint(
        at(
            path,
            f"expected operators that are registered here, got {found[1] or found[2]}; import the "
            "package that brings it (torchvision, for example)",
            _CALLER,
        )
    )


# ---- exported programs


def _load_exported(path: Path, unsafe_pickle: bool) -> ExportedProgram:
    if not unsafe_pickle:
        try:
            asked = sorted(set(_asked_for(path)))
        except Exception as error:
            raise damaged(path, error, _CALLER) from error
        if asked:
            raise _unsafe(path, f"asks for {listed(asked)}")
    try:
        # By the open file: torch warns about any name that does not end in .pt2.
        with _only_weights(not unsafe_pickle), path.open("rb") as file, _quiet():
            return torch.export.load(file)
    except Exception as error:
        if not unsafe_pickle and "weights_only" in f"{error} {error.__cause__}".lower():
            raise _unsafe(path, "holds pickled objects") from error
        raise damaged(path, error, _CALLER) from error


def _unsafe(path: Path, what: str) -> UnsafeCheckpoint:
    return UnsafeCheckpoint(
        at(
            path,
            f"expected a program of torch's operators and tensors, got one that {what}. Nothing "
            "was run. If you trust where it came from, pass unsafe_pickle=True (command line: "
            "--unsafe-pickle). Warning: that runs code from the file, with all your rights.",
            _CALLER,
        )
    )


def _asked_for(path: Path) -> Iterator[str]:
    """List what a program names beyond torch's operators, arithmetic and tensors."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name, inside = member.filename, member.filename.partition("/")[2]
            if re.search(r"(^|/)(opaque|custom)_obj_[^/]*$", name):
                yield f"the pickled object {inside}"
            if not name.endswith(".json"):
                continue
            stored = json.loads(archive.read(member))
            for key, text in _texts(stored):
                if key == "target" and ("__" in text or not _CALLABLE.fullmatch(text)):
                    yield text
                if key == "expr_str" and not _is_plain(text):
                    yield f"the expression {text!r}"
                if key == "path_name" and text.startswith(("opaque_obj_", "custom_obj_")):
                    yield f"the pickled object {text}"


def _texts(stored: Any) -> Iterator[tuple[str, str]]:
    """Walk through JSON and yield every key whose value is a string."""
    if isinstance(stored, Mapping):
        for key, value in stored.items():
            if isinstance(value, str):
                yield key, value
            else:
                yield from _texts(value)
    elif isinstance(stored, list):
        for value in stored:
            yield from _texts(value)


def _is_plain(expression: str) -> bool:
    """Say whether an expression for a size calls sympy's classes and does nothing else.

    It has no attribute, and no text but numbers and the names of symbols.
    """
    rest = re.sub(r"'[\w.+-]*'|\d+\.\d+", "", expression)
    if "__" in expression or re.search(r"[^\w\s(),=+*/<>-]", rest):
        return False
    return all(name[0].isupper() for name in re.findall(r"(\w+)\s*\(", rest))


@contextmanager
def _only_weights(forced: bool) -> Iterator[None]:
    """Make every torch.load refuse pickles; torch.export.load leaves no other way to say so."""
    before = os.environ.get(FORCE_SAFE)
    if forced:
        os.environ[FORCE_SAFE] = "1"
    try:
        yield
    finally:
        if forced:
            os.environ.pop(FORCE_SAFE)
            if before is not None:
                os.environ[FORCE_SAFE] = before


@contextmanager
def _quiet() -> Iterator[None]:
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
        with _quiet():
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
