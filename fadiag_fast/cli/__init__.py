"""The command line: each command in a module of its own."""

from .main import app

__all__ = ["app"]
