"""Run the command line under pseudo-terminals, each in a process of its own.

A server process imports the package once and forks per command, so that a command costs what it
does and not the import of torch. The child's terminal is a real one: Ctrl-C is the character, which
the kernel turns into SIGINT for the whole process group.
"""

import fcntl
import importlib
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from dataclasses import dataclass

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_SECONDS = 120


@dataclass(frozen=True)
class Session:
    """What a terminal got to see: ``raw`` with escape sequences, and the exit code."""

    code: int
    raw: str

    @property
    def text(self) -> str:
        return _ESCAPES.sub("", self.raw).replace("\r\n", "\n")

    @property
    def colours(self) -> set[str]:
        """The escape sequences that set a foreground colour."""
        codes = re.findall(r"\x1b\[([0-9;]*)m", self.raw)
        return {c for code in codes for c in code.split(";") if re.fullmatch(r"3[0-8]|9[0-7]", c)}


class Terminals:
    """The server, as a test sees it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self,
        *arguments,
        folder,
        columns=80,
        environment=None,
        interrupt_at=None,
        stall=None,
    ) -> Session:
        """Run ``fadiag ARGUMENTS`` and return what its terminal showed.

        Args:
            folder: where it is run.
            columns: the terminal's width.
            environment: variables beside those of a plain xterm.
            interrupt_at: text after which Ctrl-C is typed.
            stall: ``module:function`` that prints "stalled" and waits instead of its work.
        """
        wanted = {
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder),
            "columns": columns,
            "environment": environment or {},
            "interrupt_at": interrupt_at,
            "stall": stall,
        }
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        return Session(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def _command(wanted: dict) -> None:
    """Be the command, in the forked child."""
    from fadiag_fast.__main__ import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE"):
        os.environ.pop(name, None)
    os.environ.update({"TERM": "xterm-256color", **wanted["environment"]})
    os.chdir(wanted["folder"])
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, wanted["columns"], 0, 0))
    if wanted["stall"]:
        module, name = wanted["stall"].split(":")

        def stalled(*_, **__):
            print("stalled", flush=True)
            for _ in range(10 * _SECONDS):
                time.sleep(0.1)

        setattr(importlib.import_module(module), name, stalled)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    sys.argv = ["fadiag", *wanted["arguments"]]
    sys.path[:] = [place for place in sys.path if place not in ("", os.getcwd())]
    main()


def _serve(wanted: dict) -> dict:
    child, terminal = pty.fork()
    if child == 0:
        code = 99
        try:
            _command(wanted)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    shown, interrupt_at = b"", (wanted["interrupt_at"] or "").encode()
    deadline = time.monotonic() + _SECONDS
    while True:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            break
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # the last process has closed it
            break
        if not piece:
            break
        shown += piece
        if interrupt_at and interrupt_at in shown:
            interrupt_at = b""
            os.write(terminal, b"\x03")
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    return {"code": os.waitstatus_to_exitcode(status), "raw": shown.decode(errors="replace")}


if __name__ == "__main__":
    with suppress(ImportError):
        import matplotlib.pyplot  # noqa: F401

    import fadiag_fast.cli  # noqa: F401  # for the children of this process

    for line in sys.stdin:
        print(json.dumps(_serve(json.loads(line))), flush=True)
