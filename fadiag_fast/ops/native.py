"""Load the native libraries, and choose a backend for a device."""

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

Backend = Literal["native", "torch"]


_FOLDER = Path(__file__).parents[1] / "_native"


OPERATORS = ("layer_statistics", "direction_cosines", "step_row")


@dataclass(frozen=True)
class NativeLibrary:
    """One native library: its file, and why it is not loaded if it is not."""

    device: str
    path: Path
    loaded: bool
    reason: str


def build_info() -> dict[str, Any]:
    """Return what setup.py recorded of the native build; empty where nothing was built."""
    try:
        info: dict[str, Any] = json.loads((_FOLDER / "build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return info


def _load(device: str) -> NativeLibrary:
    path = _FOLDER / f"libfadiag_{device}.so"
    if device == "cuda" and torch.version.cuda is None:
        return NativeLibrary(
            device, path, False, f"torch {torch.__version__} is built without CUDA"
        )
    if not path.exists():
        decision = build_info().get(
            "decision", "it was never built; pip install --no-build-isolation -e . builds it"
        )
        return NativeLibrary(device, path, False, f"{path.name} is missing: {decision}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        # torch's message names the file only; the loader's own reason is the cause.
        reason = error.__cause__ or error
        return NativeLibrary(device, path, False, f"{path.name} did not load: {reason}")
    return NativeLibrary(device, path, True, "")


def _load_all() -> dict[str, NativeLibrary]:
    cpu = _load("cpu")
    if cpu.loaded:
        return {"cpu": cpu, "cuda": _load("cuda")}
    # The schemas are in the CPU library; kernels alone are of no use.
    cuda_path = _FOLDER / "libfadiag_cuda.so"
    reason = f"it needs libfadiag_cpu.so, and {cpu.reason}"
    return {"cpu": cpu, "cuda": NativeLibrary("cuda", cuda_path, False, reason)}


LIBRARIES = _load_all()


NATIVE_DEVICES = frozenset(name for name, library in LIBRARIES.items() if library.loaded)


_warned: set[str] = set()


def default_backend() -> Backend | None:
    """Return what ``FADIAG_BACKEND`` asks for, None where it is unset.

    Raises:
        ValueError: it is neither ``native`` nor ``torch``.
    """
    value = os.environ.get("FADIAG_BACKEND", "")
    if value in ("", "native", "torch"):
        return value or None  # type: ignore[return-value]
    raise ValueError(f"FADIAG_BACKEND: expected 'native' or 'torch', got {value!r}")


_DEFAULT_BACKEND = default_backend()


def backend_for(device: torch.device, backend: Backend | None = None) -> Backend:
    """Return the backend that serves tensors on a device.

    Args:
        device: where the tensors are.
        backend: force one; None takes ``FADIAG_BACKEND`` as it was at import, else what is there.

    Raises:
        RuntimeError: ``native`` is forced and no kernel for the device is loaded.
        ValueError: ``backend`` is neither ``native`` nor ``torch``.
    """
    asked = backend or _DEFAULT_BACKEND
    if asked == "torch":
        return "torch"
    if asked not in (None, "native"):
        raise ValueError(f"backend: expected 'native' or 'torch', got {asked!r}")
    if device.type in NATIVE_DEVICES or (device.type == "meta" and "cpu" in NATIVE_DEVICES):
        return "native"
    library = LIBRARIES.get(device.type)
    reason = library.reason if library else f"there is no native kernel for {device.type}"
    if asked == "native":
        raise RuntimeError(f"fadiag_fast: native backend asked for on {device.type}: {reason}")
    if device.type not in _warned:
        _warned.add(device.type)
        warnings.warn(
            f"fadiag_fast: using the slower PyTorch path on {device.type}: {reason}", stacklevel=3
        )
    return "torch"


def is_native(device_type: str, backend: Backend | None) -> bool:
    # The common case, without a function call more: this runs in every training step.
    if backend is None and _DEFAULT_BACKEND is None and device_type in NATIVE_DEVICES:
        return True
    return backend_for(torch.device(device_type), backend) == "native"
