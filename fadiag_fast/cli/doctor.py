"""The command ``fadiag doctor``."""

import platform

import torch
import typer

from .. import ops
from .._common.text import echo
from .._version import __version__
from ..zoo.libraries import install_line
from .common import reported_errors


def doctor_command() -> None:
    """Print versions, and which native libraries loaded, for what they were built, or why not."""
    with reported_errors():
        info = ops.build_info()
        built_with = info.get("torch_built_with")
        lines = [
            ("fadiag_fast", __version__),
            ("torch", f"{torch.__version__} (needs 2.10 or later)"),
            ("python", platform.python_version()),
            ("platform", platform.platform()),
            ("cuda in torch", torch.version.cuda or "no"),
        ]
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                major, minor = torch.cuda.get_device_capability(index)
                name = torch.cuda.get_device_name(index)
                lines.append((f"gpu {index}", f"{name}, compute capability {major}.{minor}"))
        else:
            lines.append(("gpu", "none available to torch"))
        for device, library in ops.LIBRARIES.items():
            built = {
                "cpu": f"variants {', '.join(info.get('cpu_variants', [])) or 'none'}",
                "cuda": f"architectures {', '.join(info.get('cuda_architectures', [])) or 'none'}"
                + (f", with nvcc {info['cuda']}" if info.get("cuda") else ""),
            }[device]
            state = "loaded" if library.loaded else f"not loaded: {library.reason}"
            lines.append((f"{device} library", f"{state}; built for {built}"))
        lines.append(("built with", f"torch {built_with}" if built_with else "nothing built"))
        lines.append(("for torchvision", install_line()))
        lines.append(("FADIAG_BACKEND", ops.default_backend() or "not set"))
        width = max(len(name) for name, _ in lines)
        for name, text in lines:
            echo(f"{name:<{width}}  {text}")


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("doctor")(doctor_command)
