"""Import what only a scan needs, or say which extra has it."""

import importlib
from typing import Any


class MissingExtra(ImportError):
    """Report a package that an extra of fadiag-fast would have installed."""


def require(module: str, job: str, extra: str = "scan") -> Any:
    """Import and return a module.

    Args:
        module: dotted name, such as ``pyarrow.parquet``.
        job: what it is needed for, for the message.
        extra: the extra of fadiag-fast that installs it; empty for packages that no extra has.

    Raises:
        MissingExtra: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        what = f"'fadiag-fast[{extra}]'" if extra else package
        raise MissingExtra(
            f"{job} needs {package}, which is not installed: pip install {what}"
        ) from None


def arrow() -> Any:
    """Return pyarrow."""
    return require("pyarrow", "a scan's tables")


def compute() -> Any:
    """Return pyarrow.compute."""
    return require("pyarrow.compute", "a scan's tables")


def parquet() -> Any:
    """Return pyarrow.parquet."""
    return require("pyarrow.parquet", "a scan's tables")
