"""What belongs to the whole process, and how threads take turns with it.

An audit puts torch's default generators, Python's filters of warnings and the compiler's stance
back as it found them. Beside another audit it would find, and leave, what that one has set.
"""

import sys
import threading
import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch

# Held by whoever draws from a default generator or puts one back: two at a time would draw each
# other's numbers.
DEFAULT_GENERATORS = threading.RLock()
_filters = threading.RLock()
_eager = threading.Lock()
_eager_count = 0
_eager_undo = ExitStack()


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


@contextmanager
def eager() -> Iterator[None]:
    """Run Python where torch would take a short cut around it.

    Compiled modules and regions don't call hooks that came after them, and the fused path of
    nn.TransformerEncoderLayer is taken without gradients only. The first thread to come in sets
    both for all, the last one to leave puts them back.
    """
    global _eager_count, _eager_undo
    with _eager:
        if _eager_count == 0:
            with ExitStack() as undo:
                undo.callback(
                    torch.backends.mha.set_fastpath_enabled,
                    torch.backends.mha.get_fastpath_enabled(),
                )
                torch.backends.mha.set_fastpath_enabled(False)
                # Nothing can be compiled where the compiler, which takes seconds to import, is not.
                if "torch._dynamo" in sys.modules:
                    undo.enter_context(torch.compiler.set_stance("force_eager"))
                _eager_undo = undo.pop_all()
        _eager_count += 1
    try:
        yield
    finally:
        with _eager:
            _eager_count -= 1
            if _eager_count == 0:
                _eager_undo.close()
