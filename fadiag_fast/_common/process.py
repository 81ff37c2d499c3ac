"""Process-wide state (generators, warning filters, the compiler's stance), shared by threads.

An audit puts torch's default generators, Python's filters of warnings and the compiler's stance
back as it found them. Beside another audit it would find, and leave, what that one has set.
"""

import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

# Held by whoever draws from a default generator or puts one back: two at a time would draw each
# other's numbers.
DEFAULT_GENERATORS = threading.RLock()
_filters = threading.RLock()
# A thread that comes back from reading a file asks for the interpreter's lock. One that computes in
# Python keeps it for so long: by Python's own choice 5 ms, ten times what a small file takes.
_SWITCH_SECONDS = 1e-4


@contextmanager
def forked_generators(devices: Collection[torch.device]) -> Iterator[None]:
    """Put the default generators of the CPU and of CUDA devices back when done."""
    fork = torch.random.fork_rng(devices=sorted(devices, key=str), enabled=True)
    with DEFAULT_GENERATORS:
        fork.__enter__()
    try:
        yield
    finally:
        with DEFAULT_GENERATORS:
            fork.__exit__(None, None, None)


@contextmanager
def own_warnings() -> Iterator[None]:
    """Let filters of warnings be set, by one thread at a time, and put them back."""
    with _filters, warnings.catch_warnings():
        yield


class _Shared:
    """A setting that the first thread to come in makes for all, and the last to leave undoes."""

    def __init__(self, make: Callable[[ExitStack], None]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._inside = 0
        self._undo = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                with ExitStack() as undo:
                    self._make(undo)
                    self._undo = undo.pop_all()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._undo.close()


def _make_eager(undo: ExitStack) -> None:
    undo.callback(
        torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
    )
    torch.backends.mha.set_fastpath_enabled(False)
    # Nothing can be compiled where the compiler, which takes seconds to import, is not.
    if "torch._dynamo" in sys.modules:
        undo.enter_context(torch.compiler.set_stance("force_eager"))


def _make_prompt(undo: ExitStack) -> None:
    before = sys.getswitchinterval()
    undo.callback(sys.setswitchinterval, before)
    sys.setswitchinterval(min(before, _SWITCH_SECONDS))


_eager = _Shared(_make_eager)
_prompt = _Shared(_make_prompt)


def eager() -> AbstractContextManager[None]:
    """Run Python where torch would take a short cut around it.

    Compiled modules and regions don't call hooks that came after them, and the fused path of
    nn.TransformerEncoderLayer is taken without gradients only.
    """
    return _eager()


def prompt_switches() -> AbstractContextManager[None]:
    """Let threads that mostly wait, for files or a GPU, have the interpreter soon when they ask."""
    return _prompt()
