"""Calls of the operator whose arguments were checked once."""

import contextlib
import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import validation as checks
from .entry_points import DIFFERS, DONE, ENTRY_POINTS
from .packed import PackedStatistics, without_mean_sums

_is_negated = Tensor.is_neg


# How many kinds of calls are remembered. A training has one or two.
_MOST_RECENT = 4


def is_plain() -> bool:
    """Whether nothing watches or transforms calls of operators now."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack()
    )


class PreparedStatistics:
    """``layer_statistics`` for tensors of the shapes, strides, types and device of those given.

    A call compares the metadata of its tensors with those prepared for and starts the kernels on
    the current stream, without torch's dispatcher: in a third of the time of a first call. Holds
    neither tensors nor memory between calls, may be called by any thread and captured in a CUDA
    graph. Not for ``torch.compile``, ``torch.func`` or ``torch.export``: call ``layer_statistics``.

    Attributes:
        stacked: whether a stack dimension stands before the batch.
        means: the layers whose mean is wanted; None for all.
    """

    def __init__(
        self,
        hiddens: Sequence[Tensor],
        grads: Sequence[Tensor],
        *,
        stacked: bool = False,
        means: Sequence[int] | None = None,
    ) -> None:
        self._handle: int | None = None
        self.stacked = stacked
        self.means = None if means is None else tuple(means)
        checks.check_lists("prepare_statistics", hiddens=hiddens, grads=grads)
        checks.check_statistics_input(hiddens, grads, stacked)
        without_mean = without_mean_sums(means, len(hiddens))
        device = hiddens[0].device
        points = ENTRY_POINTS.get(device.type)
        if points is None:
            raise RuntimeError(f"prepare_statistics: expected native kernels for {device.type}")
        width = ctypes.c_int64()
        numbers = (ctypes.c_int64 * len(without_mean))(*without_mean)
        self._handle = points.prepare(
            points.exchange,
            Tensor,
            list(hiddens),
            list(grads),
            int(stacked),
            numbers,
            len(without_mean),
            ctypes.byref(width),
        )
        if self._handle is None:
            raise ValueError(points.last_error().decode())
        self._points = points
        self._run = points.run
        dtype = torch.float64 if hiddens[0].dtype == torch.float64 else torch.float32
        size = (hiddens[0].shape[0], width.value) if stacked else (width.value,)
        self._size = torch.Size(size)
        self._like = torch.empty(0, dtype=dtype, device=device)
        batch_dims = 2 if stacked else 1
        self._shapes = tuple([grad.shape for grad in grads])
        self._strides: tuple[Sequence[int], ...] | None = None
        if set(map(len, self._shapes)) != {batch_dims + 1}:
            self._strides = tuple([grad.stride() for grad in grads])
        self._batch_dims = batch_dims
        self._without_mean = without_mean
        self._kinds = [
            [(h.shape, h.stride(), h.dtype, h.device) for h in tensors]
            for tensors in (hiddens, grads)
        ]

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self._points.release(self._handle)

    def offer(self, hiddens: Sequence[Tensor], grads: Sequence[Tensor]) -> PackedStatistics | None:
        """Return the figures of tensors like those prepared for, None of any others."""
        if type(hiddens) is not list:
            hiddens = list(hiddens)
        if type(grads) is not list:
            grads = list(grads)
        try:
            # The exchange tells of the memory, which holds the opposite of such a tensor's values:
            # that changes no norm.
            if self.means != () and any(map(_is_negated, grads)):
                return None
            packed = self._like.new_empty(self._size)
            result = self._run(self._handle, hiddens, grads, packed)
        except Exception:
            # What the exchange says of a tensor without memory of its own.
            return None
        if result == DONE:
            return PackedStatistics(
                packed, self._shapes, self._strides, self._batch_dims, self._without_mean
            )
        if result == DIFFERS:
            return None
        raise RuntimeError(self._points.last_error().decode())

    def __call__(self, hiddens: Sequence[Tensor], grads: Sequence[Tensor]) -> PackedStatistics:
        """Compute the figures of tensors like those prepared for.

        Args:
            hiddens: L tensors, as many as prepared for.
            grads: their gradients.

        Raises:
            ValueError: a tensor differs from the one prepared for.
            RuntimeError: under ``torch.compile``, ``torch.func`` or a dispatch mode.
        """
        if not is_plain():
            raise RuntimeError(
                "prepared statistics: expected a plain call, got one under torch.compile, "
                "torch.func or a dispatch mode; call layer_statistics"
            )
        found = self.offer(hiddens, grads)
        if found is None:
            raise ValueError(self._difference(hiddens, grads))
        return found

    def _difference(self, hiddens: Sequence[Tensor], grads: Sequence[Tensor]) -> str:
        where = "prepared statistics: "
        for name, tensors, kinds in (
            ("hidden", hiddens, self._kinds[0]),
            ("grad", grads, self._kinds[1]),
        ):
            if len(tensors) != len(kinds):
                return f"{where}expected {len(kinds)} {name}s, got {len(tensors)}"
            for layer, (tensor, kind) in enumerate(zip(tensors, kinds, strict=True)):
                if type(tensor) is not Tensor:
                    got = type(tensor).__name__
                    return f"{where}layer {layer}, {name}: expected a torch.Tensor, got {got}"
                own = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
                for what, expected, value in zip(
                    ("shape", "strides", "dtype", "device"), kind, own, strict=True
                ):
                    if value != expected:
                        given = [
                            list(x) if isinstance(x, tuple) else str(x).removeprefix("torch.")
                            for x in (expected, value)
                        ]
                        return (
                            f"{where}layer {layer}, {name}: expected {what} {given[0]}, "
                            f"got {given[1]}; prepare for these tensors or call layer_statistics"
                        )
        return f"{where}expected tensors with memory of their own, and none negated lazily"


def prepare_statistics(
    like_hiddens: Sequence[Tensor],
    like_grads: Sequence[Tensor],
    *,
    stacked: bool = False,
    means: Sequence[int] | None = None,
) -> PreparedStatistics:
    """Prepare calls of ``layer_statistics`` on tensors like the given ones, which are not kept.

    Args:
        like_hiddens: tensors as the calls will bring them.
        like_grads: their gradients.
        stacked: as in ``layer_statistics``.
        means: as in ``layer_statistics``.

    Returns:
        A callable of ``(hiddens, grads)`` that gives what ``layer_statistics`` does.

    Raises:
        TypeError, ValueError: as ``layer_statistics``, and for samples with gaps in memory or none.
        RuntimeError: there is no native kernel for the device.

    >>> import torch
    >>> h, g = torch.ones(2, 3), torch.ones(2, 3)
    >>> prepared = prepare_statistics([h], [g])
    >>> prepared([h * 2], [g]).hidden_norm
    tensor([[3.4641, 3.4641]], dtype=torch.float64)
    """
    return PreparedStatistics(like_hiddens, like_grads, stacked=stacked, means=means)


recent: list[PreparedStatistics] = []


_last_seen: list[Any] = [None]


def note_call(
    hiddens: Sequence[Tensor], grads: Sequence[Tensor], stacked: bool, means: Sequence[int] | None
) -> None:
    """Prepare for tensors that came twice in a row; one change of shape is not worth it."""
    if hiddens[0].device.type not in ENTRY_POINTS:
        return
    seen = (stacked, means, [(x.shape, x.stride(), x.dtype) for x in (*hiddens, *grads)])
    if seen != _last_seen[0]:
        _last_seen[0] = seen
        return
    _last_seen[0] = None
    # Refused: what the operator copies, or tensors of a class of their own.
    with contextlib.suppress(ValueError):
        made = PreparedStatistics(hiddens, grads, stacked=stacked, means=means)
        recent.insert(0, made)
        del recent[_MOST_RECENT:]
