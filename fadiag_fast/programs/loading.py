"""Load networks that come without their source: TorchScript files and exported programs.

A program is code, and opening it can run code: only what the caller trusts is opened, by torch's
own loaders. Both kinds become ordinary modules whose submodules have their original names, so that
taps, capture and diagnosis work on them as on any network.
"""

import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from ..capture.points import TapError
from ..checkpoints import UnreadableCheckpoint
from ..checkpoints.errors import at, damaged
from ..checkpoints.lookalikes import PROGRAMS
from ..checkpoints.programs import program_kind, untrusted
from .exported import CALLER, from_exported, load_exported, quietly
from .torchscript import from_torchscript

_EXPECTED = "a TorchScript file or an exported program"

# Programs in which there is no network to be observed, trusted or not, and what to do instead.
_NO_NETWORK = {
    "compiled": "which computes outputs and no gradients; give the file of torch.export.save from "
    "which it was compiled, or compile the probe along with the network (CompiledProbe)",
    "probe": "which holds the audit of one network already; run it with load_probe",
    "package": "which is not opened; save the network with torch.export.save, or its state_dict()",
}


class NoGraph(UnreadableCheckpoint):
    """Report a file whose program is finished: there is no network in it to be observed."""


def is_program(path: str | os.PathLike[str]) -> bool:
    """Return whether a file holds a program, by its first bytes and the names in it.

    What cannot be read is none: whoever reads weights will say what is wrong with it.
    """
    try:
        return program_kind(path) is not None
    except UnreadableCheckpoint:
        return False


def load_packaged(
    path: str | os.PathLike[str],
    *,
    map_location: str | torch.device = "cpu",
    trust_code: bool = False,
) -> nn.Module:
    """Load a network from a file that holds the program itself, so that it can be diagnosed.

    Args:
        path: from ``torch.jit.save`` or ``torch.export.save``; its content decides, not its name.
        map_location: the device on which the network ends up.
        trust_code: open it. Such a file is a program: opening and calling it CAN RUN ANY CODE FROM
            THE FILE, with all your rights. Without this, torch reads nothing of it.

    Returns:
        A module with the original's submodules under their names, to be given to
        :func:`~fadiag_fast.diagnose`. For exported programs see :func:`from_exported`, for
        TorchScript :func:`~fadiag_fast.programs.torchscript.from_torchscript`.

    Raises:
        UntrustedProgram: the file holds a program, and ``trust_code`` is not given.
        UnreadableCheckpoint: the file is missing, damaged, or holds no program.
        NoGraph: the file was compiled by AOTInductor, so that there is nothing to differentiate;
            or it holds a probe, or a torch.package.
        TapError: the program has no modules that could be observed.
    """
    path = Path(path)
    kind = program_kind(path, _EXPECTED, CALLER)
    if kind is None:
        raise UnreadableCheckpoint(
            at(
                path,
                f"expected {_EXPECTED}, got another file; for weights build the network and use "
                "load_checkpoint and load_into",
                CALLER,
            )
        )
    if kind in _NO_NETWORK:
        raise NoGraph(
            at(path, f"expected {_EXPECTED}, got {PROGRAMS[kind]}, {_NO_NETWORK[kind]}", CALLER)
        )
    if not trust_code:
        raise untrusted(path, kind, CALLER)
    device = torch.device(map_location)
    if kind == "torchscript":
        return from_torchscript(_load_torchscript(path, device))
    program = load_exported(path)
    if device.type != "cpu" or any(t.device != device for t in program.state_dict.values()):
        with quietly():
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
        raise _unknown_operator(path, error) or damaged(path, error, CALLER) from error


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
            CALLER,
        )
    )


# ---- exported programs
