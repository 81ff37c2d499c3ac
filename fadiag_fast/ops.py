"""Load the native library and offer its operators as thin functions.

They call ``torch.ops.fadiag.*`` where a kernel for the tensors' device is loaded, and
:mod:`fadiag_fast.reference` elsewhere, after one warning with the cause.
``FADIAG_BACKEND=native|torch`` or the argument ``backend`` forces either.
"""

import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from . import checks, reference
from .reference import LayerStatistics

Backend = Literal["native", "torch"]

_FOLDER = Path(__file__).parent / "_native"
_OPS = ("layer_statistics", "direction_cosines", "step_row")


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
_NATIVE_DEVICES = frozenset(name for name, library in LIBRARIES.items() if library.loaded)
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
    if device.type in _NATIVE_DEVICES or (device.type == "meta" and "cpu" in _NATIVE_DEVICES):
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


def _is_native(device_type: str, backend: Backend | None) -> bool:
    # The common case, without a function call more: this runs in every training step.
    if backend is None and _DEFAULT_BACKEND is None and device_type in _NATIVE_DEVICES:
        return True
    return backend_for(torch.device(device_type), backend) == "native"


def _memory_order(sizes: Sequence[int], strides: Sequence[int]) -> list[int] | None:
    """Return a dense sample's dimensions from slowest to fastest, None if it has gaps."""
    # The same search as in csrc/checks.h; comparisons only, so that symbolic sizes can be traced.
    left = list(range(len(sizes) - 1, -1, -1))
    order: list[int] = []
    expected = 1
    while left:
        found = next((d for d in left if sizes[d] == 1 or strides[d] == expected), None)
        if found is None:
            return None
        left.remove(found)
        order.insert(0, found)
        expected *= sizes[found]
    return order


class PackedStatistics(LayerStatistics):
    """``LayerStatistics`` as the operator returns them: cut up when they are read.

    A training loop that only keeps them for later pays for no view, and keeps no gradient alive.

    Attributes:
        packed: what ``torch.ops.fadiag.layer_statistics`` returned, with any leading dimensions.
        shapes: of the grads, ``batch_dims`` leading dimensions included.
        strides: of the grads; None where every sample has one dimension.
        batch_dims: leading dimensions of the grads that number samples.
    """

    __slots__ = ("batch_dims", "packed", "shapes", "strides")

    def __init__(
        self,
        packed: Tensor,
        shapes: tuple[Sequence[int], ...],
        strides: tuple[Sequence[int], ...] | None,
        batch_dims: int,
    ) -> None:
        self.packed = packed
        self.shapes = shapes
        self.strides = strides
        self.batch_dims = batch_dims

    def _norms_width(self) -> int:
        words = 2 if self.packed.dtype == torch.float64 else 4
        return words * len(self.shapes) * self.shapes[0][self.batch_dims - 1]

    @property
    def norms(self) -> Tensor:
        """Norms of hidden states, then of gradients, ``[2, L, B]`` float64."""
        rows = self.shapes[0][self.batch_dims - 1]
        words = self.packed[..., : self._norms_width()]
        try:
            both = words.view(torch.float64)
        except RuntimeError:
            # Under vmap, before torch had a batching rule for this view.
            both = torch.ops.fadiag.reinterpret_as_double.default(words)
        norms: Tensor = both.unflatten(-1, (2, len(self.shapes), rows))
        return norms

    @property
    def hidden_norm(self) -> Tensor:
        """L2 norm of each sample's hidden state, ``[L, B]`` float64."""
        return self.norms.select(-3, 0)

    @property
    def grad_norm(self) -> Tensor:
        """L2 norm of each sample's gradient, ``[L, B]`` float64."""
        return self.norms.select(-3, 1)

    @property
    def grad_mean(self) -> tuple[Tensor, ...]:
        """Per layer the batch mean of the gradients, shaped like one sample."""
        samples = [tuple(shape[self.batch_dims :]) for shape in self.shapes]
        widths = [math.prod(sizes) for sizes in samples]
        packed_means = self.packed.narrow(-1, self._norms_width(), sum(widths))
        means: tuple[Tensor, ...] = packed_means.split(widths, dim=-1)
        if self.strides is None:
            return means
        return tuple(
            _shape_mean(mean, sizes, strides[self.batch_dims :])
            for mean, sizes, strides in zip(means, samples, self.strides, strict=True)
        )

    def mean_of(self, layer: int) -> Tensor:
        """Return one element of ``grad_mean``, at the cost of one view."""
        if self.strides is not None:
            return self.grad_mean[layer]
        widths = [shape[self.batch_dims] for shape in self.shapes]
        start = self._norms_width() + sum(widths[:layer])
        return self.packed.narrow(-1, start, widths[layer])


def _shape_mean(mean: Tensor, sizes: tuple[int, ...], strides: Sequence[int]) -> Tensor:
    """Give a mean, which lies in the memory order of the grad's samples, their shape."""
    lead = mean.shape[:-1]
    order = _memory_order(sizes, strides)
    if order is None or order == sorted(order):
        return mean.reshape((*lead, *sizes))
    inverse = [order.index(d) + len(lead) for d in range(len(order))]
    shaped = mean.reshape((*lead, *(sizes[d] for d in order)))
    return shaped.permute((*range(len(lead)), *inverse))


# vmap, torch.compile and torch.export look into containers that they know.
register_pytree_node(
    PackedStatistics,
    lambda found: ([found.packed], (found.shapes, found.strides, found.batch_dims)),
    lambda packed, context: PackedStatistics(next(iter(packed)), *context),
    serialized_type_name="fadiag_fast.ops.PackedStatistics",
)


def layer_statistics(
    hiddens: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    stacked: bool = False,
    backend: Backend | None = None,
) -> LayerStatistics:
    """Compute per-sample norms and batch-mean gradients of all layers in one pass.

    Args:
        hiddens: L tensors ``[B, ...]``, one per layer, of any width; float16, bfloat16, float32 or
            float64; any strides. With ``stacked=True``: ``[C, B, ...]``, C networks at once.
        grads: the gradients of the loss with respect to ``hiddens``, of equal shape, dtype and
            device in pairs. Under a mean-reduced loss they carry the factor 1/B, and so do the
            figures made from them.
        stacked: whether a stack dimension stands before the batch.
        backend: ``"native"`` or ``"torch"`` to force one.

    Returns:
        :class:`LayerStatistics`: ``hidden_norm`` and ``grad_norm``, ``[L, B]`` float64, and
        ``grad_mean``, a tuple of one tensor per layer, shaped like a sample. None of them is
        differentiable.

    Raises:
        TypeError: no list of tensors, a tensor of no floating type, or a pair that differs in
            dtype.
        ValueError: the list is empty, or layers differ in samples, shape or device.
        RuntimeError: ``backend="native"`` and there is no kernel for the device.

    Source: protocol of arXiv 2606.21126, diagnostics (a), (b) and (c).

    >>> import torch
    >>> h = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    >>> g = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> statistics = layer_statistics([h], [g])
    >>> statistics.hidden_norm
    tensor([[5., 2.]], dtype=torch.float64)
    >>> statistics.grad_mean[0]
    tensor([0.5000, 0.5000])
    """
    if type(hiddens) is not list or type(grads) is not list:
        checks.check_lists("layer_statistics", hiddens=hiddens, grads=grads)
    if (
        len(hiddens) == 0
        or not isinstance(hiddens[0], Tensor)
        or not _is_native(hiddens[0].device.type, backend)
    ):
        checks.check_statistics_input(hiddens, grads, stacked)
        with torch.no_grad():
            return reference.layer_statistics(hiddens, grads, stacked=stacked)
    try:
        packed = _statistics_op(hiddens, grads, stacked)
    except (RuntimeError, TypeError, NotImplementedError):
        checks.check_statistics_input(hiddens, grads, stacked)
        if len({hidden.dtype == torch.float64 for hidden in hiddens}) == 2:
            return _statistics_by_width(hiddens, grads, stacked, backend)
        raise
    batch_dims = 2 if stacked else 1
    shapes = tuple([grad.shape for grad in grads])
    strides = None
    if set(map(len, shapes)) != {batch_dims + 1}:
        strides = tuple([grad.stride() for grad in grads])
    return PackedStatistics(packed, shapes, strides, batch_dims)


def _statistics_by_width(
    hiddens: Sequence[Tensor], grads: Sequence[Tensor], stacked: bool, backend: Backend | None
) -> LayerStatistics:
    """Serve float64 layers beside narrower ones: their packed means differ in type."""
    layer_dim = 1 if stacked else 0
    hidden_norm: list[Tensor] = [hiddens[0]] * len(hiddens)
    grad_norm = list(hidden_norm)
    grad_mean = list(hidden_norm)
    for wide in (False, True):
        layers = [l for l, hidden in enumerate(hiddens) if (hidden.dtype == torch.float64) == wide]
        part = layer_statistics(
            [hiddens[l] for l in layers],
            [grads[l] for l in layers],
            stacked=stacked,
            backend=backend,
        )
        for position, l in enumerate(layers):
            hidden_norm[l] = part.hidden_norm.select(layer_dim, position)
            grad_norm[l] = part.grad_norm.select(layer_dim, position)
            grad_mean[l] = part.grad_mean[position]
    return LayerStatistics(
        torch.stack(hidden_norm, layer_dim), torch.stack(grad_norm, layer_dim), tuple(grad_mean)
    )


def direction_cosines(
    grad_means: Sequence[Sequence[Tensor]],
    *,
    stacked: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Compute the cosines between the batch-mean gradients of K batches, layer by layer.

    Args:
        grad_means: K batches, each a sequence of L tensors, as ``layer_statistics(...).grad_mean``
            gives them; one floating type and one device. With ``stacked=True`` each has a leading
            ``[C]``.
        stacked: whether a stack dimension stands first.
        backend: ``"native"`` or ``"torch"`` to force one.

    Returns:
        ``[L, K, K]`` float64 (stacked: ``[C, L, K, K]``) in [-1, 1], not differentiable. The cosine
        with a zero or non-finite direction is NaN, that of a direction with itself exactly 1.

    Raises:
        TypeError, ValueError: batches differ in layers, shape, dtype or device.
        RuntimeError: ``backend="native"`` and there is no kernel for the device.

    Source: protocol of arXiv 2606.21126, diagnostic (c).

    >>> import torch
    >>> x, y = torch.tensor([1.0, 0.0]), torch.tensor([1e-30, 1e-30])
    >>> direction_cosines([[x], [y]])[0, 0, 1]
    tensor(0.7071, dtype=torch.float64)
    """
    checks.check_directions(grad_means)
    if (
        len(grad_means) == 0
        or len(grad_means[0]) == 0
        or not isinstance(grad_means[0][0], Tensor)
        or not _is_native(grad_means[0][0].device.type, backend)
    ):
        checks.check_cosines_input(grad_means, stacked)
        with torch.no_grad():
            return reference.direction_cosines(grad_means, stacked=stacked)
    flat = [direction for batch in grad_means for direction in batch]
    try:
        cosines: Tensor = _cosines_op(flat, len(grad_means), stacked)
    except (RuntimeError, TypeError, NotImplementedError):
        checks.check_cosines_input(grad_means, stacked)
        raise
    return cosines


def step_row(
    norms: Tensor,
    directions: Sequence[Tensor],
    kept: Sequence[Tensor],
    rows: Tensor,
    places: Tensor,
    *,
    decay: float,
    extras: Sequence[Tensor] = (),
    backend: Backend | None = None,
) -> None:
    """Write all that one training step says into a row of a ring, and keep its directions.

    One call in place of some twenty, which reads its places on the device, so that a CUDA graph can
    replay it.

    Args:
        norms: ``[2, S, N]`` float64, contiguous: of S states, then of their gradients; the last
            gradient is that of the logits.
        directions: batch-mean gradients, ``[D]`` each, float32 or float64, the same in all.
        kept: per direction ``[K + 1, D]`` in its type: K earlier ones, zero where there is none
            yet, and their exponential average. Written to: the direction takes the place of the
            oldest, and enters the average unless it is zero or not finite.
        rows: the ring, ``[R, W]`` float64. Written to at ``places[0]``: 3 S - 1 medians (of the
            rows of ``norms``, NaN left out and the lower of two middle values, then of each
            gradient's norm over the logits'), K + 1 cosines per direction with what was kept
            before, the extras.
        places: ``[3]`` int64: the next row, the next kept direction, and a zero that the kernels
            count with. Both places count on.
        decay: a direction enters the average with the weight 1 - decay.
        extras: ``[E]`` float64 each, that go behind the rest; on CUDA four at most.
        backend: ``"native"`` or ``"torch"`` to force one.

    Raises:
        RuntimeError: a shape, type or device is not as above; the native kernels then have written
            nothing.

    >>> import torch
    >>> norms = torch.tensor([[[3.0, 1.0, 2.0]], [[4.0, 6.0, 5.0]]], dtype=torch.float64)
    >>> kept = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    >>> rows, places = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    >>> step_row(norms, [torch.tensor([1.0, 1.0])], [kept], rows, places, decay=0.5)
    >>> rows[0]
    tensor([2.0000, 5.0000, 0.7071,    nan], dtype=torch.float64)
    >>> kept
    tensor([[1.0000, 1.0000],
            [0.5000, 0.5000]])
    """
    if _is_native(norms.device.type, backend):
        _step_row_op(norms, directions, kept, rows, places, decay, extras)
    else:
        with torch.no_grad():
            reference.step_row(norms, directions, kept, rows, places, decay=decay, extras=extras)


def _register_rules() -> None:
    """Teach torch the operators' shapes and batching rules, and that none has a gradient."""
    library = torch.library.Library("fadiag", "IMPL")
    for name in _OPS:
        # Without this the outputs would claim to be differentiable and yield no gradient.
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    _register_rules.library = library  # type: ignore[attr-defined]  # a Library ends with its object

    @torch.library.register_fake("fadiag::layer_statistics")
    def _(hiddens: Sequence[Tensor], grads: Sequence[Tensor], stacked: bool = False) -> Tensor:
        checks.check_statistics_input(hiddens, grads, stacked)
        batch_dims = 2 if stacked else 1
        *stack, rows = hiddens[0].shape[:batch_dims]
        wide = hiddens[0].dtype == torch.float64
        width = sum(math.prod(hidden.shape[batch_dims:]) for hidden in hiddens)
        width = width + (2 if wide else 4) * len(hiddens) * rows
        if stacked and not wide:
            width = width + width % 2
        dtype = torch.float64 if wide else torch.float32
        return grads[0].new_empty((*stack, width), dtype=dtype)

    @torch.library.register_fake("fadiag::direction_cosines")
    def _(grad_means: Sequence[Tensor], num_batches: int, stacked: bool = False) -> Tensor:
        stack = grad_means[0].shape[:1] if stacked else ()
        layers = len(grad_means) // num_batches
        return grad_means[0].new_empty(
            (*stack, layers, num_batches, num_batches), dtype=torch.float64
        )

    @torch.library.register_fake("fadiag::step_row")
    def _(*_: Any) -> None:
        return None

    @torch.library.custom_op("fadiag::reinterpret_as_double", mutates_args=())
    def reinterpret(words: Tensor) -> Tensor:
        return words.view(torch.float64).clone()

    @reinterpret.register_fake
    def _(words: Tensor) -> Tensor:
        return words.new_empty((*words.shape[:-1], words.shape[-1] // 2), dtype=torch.float64)

    @torch.library.register_vmap("fadiag::reinterpret_as_double")
    def _(info: Any, in_dims: Any, words: Tensor) -> tuple[Tensor, int]:
        return reinterpret(words.movedim(in_dims[0], 0)), 0

    @torch.library.register_vmap("fadiag::layer_statistics")
    def _(
        info: Any,
        in_dims: Any,
        hiddens: Sequence[Tensor],
        grads: Sequence[Tensor],
        stacked: bool = False,
    ) -> tuple[Tensor, int]:
        hidden_dims, grad_dims = in_dims[:2]
        packed = _statistics_op(
            _stack(hiddens, hidden_dims, info.batch_size, stacked),
            _stack(grads, grad_dims, info.batch_size, stacked),
            True,
        )
        return (packed.unflatten(0, (info.batch_size, -1)) if stacked else packed), 0

    @torch.library.register_vmap("fadiag::direction_cosines")
    def _(
        info: Any,
        in_dims: Any,
        grad_means: Sequence[Tensor],
        num_batches: int,
        stacked: bool = False,
    ) -> tuple[Tensor, int]:
        cosines = _cosines_op(
            _stack(grad_means, in_dims[0], info.batch_size, stacked), num_batches, True
        )
        return (cosines.unflatten(0, (info.batch_size, -1)) if stacked else cosines), 0


def _stack(
    tensors: Sequence[Tensor], dims: Sequence[int | None], size: int, stacked: bool
) -> list[Tensor]:
    """Bring vmap's dimension to the front, without a copy; merge it with a stack that is there."""
    moved = [
        tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, dims, strict=True)
    ]
    return [tensor.flatten(0, 1) for tensor in moved] if stacked else moved


if "cpu" in _NATIVE_DEVICES:
    _register_rules()
    # Bound once: looking an overload up costs as much as a small kernel.
    _statistics_op = torch.ops.fadiag.layer_statistics.default
    _cosines_op = torch.ops.fadiag.direction_cosines.default
    _step_row_op = torch.ops.fadiag.step_row.default
