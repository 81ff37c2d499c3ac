"""Find what a user names as ``package.module:name``: a network's builder, a training rule."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any


def load_named(text: str) -> Any:
    """Import ``package.module:name`` and return it.

    The module may lie in the working directory, which ``python -m`` puts on the path and an
    installed command does not. It is appended, so that no file there takes the place of an
    installed module, and only here, so that a command that names no code imports none from it.
    Python's safe path (``-P``, ``PYTHONSAFEPATH``) leaves it out.

    Raises:
        ImportError: there is no such module, or it has no such name; and whatever the module
            itself raises.
    """
    module_name, _, name = text.partition(":")
    if module_name.endswith(".py") or "/" in module_name:
        stem = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise ImportError(f"it names a file; write {stem}:{name}")
    safe = getattr(sys.flags, "safe_path", False)
    here = os.getcwd()
    if not safe and here not in sys.path and "" not in sys.path:
        sys.path.append(here)
        importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        without = " is left out by Python's safe path" if safe else " included"
        raise ImportError(
            f"{error}; modules are looked for on Python's path, the working directory {here}"
            f"{without}"
        ) from None
    if not hasattr(module, name):
        where = getattr(module, "__file__", None) or "a folder without __init__.py"
        near = difflib.get_close_matches(name, dir(module), n=1)
        hint = f"; did you mean {module_name}:{near[0]}?" if near else ""
        raise ImportError(f"{module_name} ({where}) has no {name!r}{hint}")
    return getattr(module, name)


def accepted(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of some keyword arguments that a function names among its parameters."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # not written in Python
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: value
        for name, value in offered.items()
        if name in parameters and parameters[name].kind in named
    }
