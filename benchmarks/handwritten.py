"""What an expert would write in place of the operator: a Triton kernel, one launch a layer.

A program takes a block of columns over all rows, in float32, and leaves the rows' partial sums to
one ``torch.sum``. Block and warps are tuned on the workload itself. It has neither the operator's
range nor its exactness, and is checked like every other path.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_BLOCKS = (1024, 2048, 4096)
_WARPS = (4, 8)


def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def layer(h, g, partial, mean, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        total = tl.zeros([BLOCK], tl.float32)
        for row in range(ROWS):
            x = tl.load(h + row * width + columns, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(g + row * width + columns, mask=inside, other=0.0).to(tl.float32)
            at = partial + (tl.program_id(0) * ROWS + row) * 2
            tl.store(at, tl.sum(x * x, 0))
            tl.store(at + 1, tl.sum(y * y, 0))
            total += y
        tl.store(mean + columns, total / ROWS, mask=inside)

    return layer


def _path(
    kernel: Any, block: int, warps: int
) -> Callable[..., tuple[Tensor, Tensor, list[Tensor]]]:
    def run(
        hiddens: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        samples, width = hiddens[0].shape
        blocks = (width + block - 1) // block
        partial = hiddens[0].new_empty((len(hiddens), blocks, samples, 2), dtype=torch.float32)
        means = [g.new_empty(width, dtype=torch.float32) for g in grads]
        for l, (h, g) in enumerate(zip(hiddens, grads, strict=True)):
            kernel[(blocks,)](
                h, g, partial[l], means[l], width, ROWS=samples, BLOCK=block, num_warps=warps
            )
        norms = partial.sum(1).sqrt()
        return norms[..., 0], norms[..., 1], means

    return run


def tuned(
    hiddens: Sequence[Tensor], grads: Sequence[Tensor]
) -> Callable[..., tuple[Tensor, Tensor, list[Tensor]]] | None:
    """Return the fastest variant for a workload; None where it does not apply."""
    alike = len({h.shape for h in hiddens}) == 1
    if not alike or hiddens[0].dim() != 2 or not all(h.is_contiguous() for h in hiddens):
        return None
    try:
        kernel = _kernel()
    except ImportError:
        return None
    best: tuple[float, Any] | None = None
    for block in _BLOCKS:
        for warps in _WARPS:
            path = _path(kernel, block, warps)
            for _ in range(2):
                path(hiddens, grads)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(5):
                path(hiddens, grads)
            end.record()
            end.synchronize()
            time = start.elapsed_time(end)
            if best is None or time < best[0]:
                best = (time, path)
    return None if best is None else best[1]
