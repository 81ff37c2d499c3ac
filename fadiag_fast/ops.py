"""Load the native library and offer its operators as thin functions.

They call ``torch.ops.fadiag.*`` where a kernel for the tensors' device is loaded, and
:mod:`fadiag_fast.reference` elsewhere, after one warning with the cause.
``FADIAG_BACKEND=native|torch`` or the argument ``backend`` forces either.
"""

import contextlib
import ctypes
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
        without_mean: the layers whose mean was not asked for.
    """

    __slots__ = ("batch_dims", "packed", "shapes", "strides", "without_mean")

    def __init__(
        self,
        packed: Tensor,
        shapes: tuple[Sequence[int], ...],
        strides: tuple[Sequence[int], ...] | None,
        batch_dims: int,
        without_mean: tuple[int, ...] = (),
    ) -> None:
        self.packed = packed
        self.shapes = shapes
        self.strides = strides
        self.batch_dims = batch_dims
        self.without_mean = without_mean

    def _norms_width(self) -> int:
        words = 2 if self.packed.dtype == torch.float64 else 4
        return words * len(self.shapes) * self.shapes[0][self.batch_dims - 1]

    @property
    def norms(self) -> Tensor:
        """Norms of hidden states, then of gradients, ``[2, L, B]`` float64."""
        rows = self.shapes[0][self.batch_dims - 1]
        words = self.packed.narrow(-1, 0, self._norms_width())
        try:
            both = words.view(torch.float64)
        except RuntimeError:
            # Under vmap, before torch had a batching rule for this view.
            both = torch.ops.fadiag.reinterpret_as_double.default(words)
        # As unflatten does, at a third of its time.
        norms: Tensor = both.view(*both.shape[:-1], 2, len(self.shapes), rows)
        return norms

    @property
    def hidden_norm(self) -> Tensor:
        """L2 norm of each sample's hidden state, ``[L, B]`` float64."""
        return self.norms.select(-3, 0)

    @property
    def grad_norm(self) -> Tensor:
        """L2 norm of each sample's gradient, ``[L, B]`` float64."""
        return self.norms.select(-3, 1)

    def _mean_widths(self) -> list[int]:
        widths = [math.prod(shape[self.batch_dims :]) for shape in self.shapes]
        for layer in self.without_mean:
            widths[layer] = 0
        return widths

    @property
    def grad_mean(self) -> tuple[Tensor, ...]:
        """Per layer the batch mean of the gradients, shaped like one sample.

        Of a layer whose mean was not asked for an empty tensor, ``[0]``.
        """
        widths = self._mean_widths()
        packed_means = self.packed.narrow(-1, self._norms_width(), sum(widths))
        means: tuple[Tensor, ...] = packed_means.split(widths, dim=-1)
        if self.strides is None:
            return means
        return tuple(
            mean
            if layer in self.without_mean
            else _shape_mean(mean, tuple(shape[self.batch_dims :]), strides[self.batch_dims :])
            for layer, (mean, shape, strides) in enumerate(
                zip(means, self.shapes, self.strides, strict=True)
            )
        )

    def mean_of(self, layer: int) -> Tensor:
        """Return one element of ``grad_mean``, at the cost of one view."""
        if self.strides is not None:
            return self.grad_mean[layer]
        widths = self._mean_widths()
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
    lambda found: (
        [found.packed],
        (found.shapes, found.strides, found.batch_dims, found.without_mean),
    ),
    lambda packed, context: PackedStatistics(next(iter(packed)), *context),
    serialized_type_name="fadiag_fast.ops.PackedStatistics",
)


def _without_mean(means: Sequence[int] | None, layers: int) -> tuple[int, ...]:
    """Return the layers whose mean is not asked for."""
    if means is None:
        return ()
    wanted = set(means)
    unknown = [l for l in means if not 0 <= l < layers]
    if unknown:
        raise ValueError(
            f"layer_statistics: means: expected layers from 0 to {layers - 1}, got {unknown[0]}"
        )
    return tuple([l for l in range(layers) if l not in wanted])


def layer_statistics(
    hiddens: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    stacked: bool = False,
    means: Sequence[int] | None = None,
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
        means: numbers of the layers whose mean gradient is wanted; None for all. Of the others it
            is neither computed nor stored, which few samples of many features gain by.
        backend: ``"native"`` or ``"torch"`` to force one.

    Returns:
        :class:`LayerStatistics`: ``hidden_norm`` and ``grad_norm``, ``[L, B]`` float64, and
        ``grad_mean``, a tuple of one tensor per layer, shaped like a sample, or ``[0]`` where it
        was not wanted. None of them is differentiable.

    Raises:
        TypeError: no list of tensors, a tensor of no floating type, or a pair that differs in
            dtype.
        ValueError: the list is empty, layers differ in samples, shape or device, or ``means`` names
            a layer that is not there.
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
        without_mean = _without_mean(means, len(hiddens))
        with torch.no_grad():
            found = reference.layer_statistics(hiddens, grads, stacked=stacked)
        return found if means is None else _less(found, without_mean)
    if _is_plain():
        key = None if means is None else tuple(means)
        for prepared in _recent:
            if prepared.stacked == stacked and prepared.means == key:
                ready = prepared.offer(hiddens, grads)
                if ready is not None:
                    return ready
    return _layer_statistics(hiddens, grads, stacked, means, backend)


def _layer_statistics(
    hiddens: Sequence[Tensor],
    grads: Sequence[Tensor],
    stacked: bool,
    means: Sequence[int] | None,
    backend: Backend | None,
) -> LayerStatistics:
    """Call the operator; prepare for tensors like these where they came the second time."""
    without_mean = _without_mean(means, len(hiddens))
    try:
        packed = _statistics_op(hiddens, grads, stacked, without_mean)
    except (RuntimeError, TypeError, NotImplementedError):
        checks.check_statistics_input(hiddens, grads, stacked)
        if len({hidden.dtype == torch.float64 for hidden in hiddens}) == 2:
            return _statistics_by_width(hiddens, grads, stacked, means, backend)
        raise
    batch_dims = 2 if stacked else 1
    shapes = tuple([grad.shape for grad in grads])
    strides = None
    if set(map(len, shapes)) != {batch_dims + 1}:
        strides = tuple([grad.stride() for grad in grads])
    if _is_plain():
        _note(hiddens, grads, stacked, means)
    return PackedStatistics(packed, shapes, strides, batch_dims, without_mean)


def _less(found: LayerStatistics, without_mean: Sequence[int]) -> LayerStatistics:
    means = list(found.grad_mean)
    for layer in without_mean:
        means[layer] = means[layer].new_empty(0)
    return LayerStatistics(found.hidden_norm, found.grad_norm, tuple(means))


def _statistics_by_width(
    hiddens: Sequence[Tensor],
    grads: Sequence[Tensor],
    stacked: bool,
    means: Sequence[int] | None,
    backend: Backend | None,
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
            means=None if means is None else [layers.index(l) for l in means if l in layers],
            backend=backend,
        )
        for position, l in enumerate(layers):
            hidden_norm[l] = part.hidden_norm.select(layer_dim, position)
            grad_norm[l] = part.grad_norm.select(layer_dim, position)
            grad_mean[l] = part.grad_mean[position]
    return LayerStatistics(
        torch.stack(hidden_norm, layer_dim), torch.stack(grad_norm, layer_dim), tuple(grad_mean)
    )


# --- Calls without torch's dispatcher: see csrc/prepared.h ---

_DONE, _DIFFERS = 0, 1  # csrc/prepared.h, PreparedResult
_is_negated = Tensor.is_neg
# How many kinds of calls are remembered. A training has one or two.
_MOST_RECENT = 4


@dataclass(frozen=True)
class _EntryPoints:
    """The C functions of one native library."""

    prepare: Any
    run: Any
    release: Any
    last_error: Any
    exchange: int


def _entry_points(device: str) -> _EntryPoints | None:
    """Return a library's C functions; None where this torch offers no exchange of tensors."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or not LIBRARIES[device].loaded:
        return None
    try:
        pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
        pointer_of.restype = ctypes.c_void_p
        pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]
        exchange = pointer_of(capsule, b"dlpack_exchange_api")
        library = ctypes.PyDLL(str(LIBRARIES[device].path))
        prepare, run = library.fadiag_prepare, library.fadiag_run
        release, last_error = library.fadiag_release, library.fadiag_last_error
    except (ValueError, OSError, AttributeError):
        return None
    objects = [ctypes.py_object] * 3
    counts = ctypes.POINTER(ctypes.c_int64)
    prepare.restype = ctypes.c_void_p
    prepare.argtypes = [ctypes.c_void_p, *objects, ctypes.c_int, counts, ctypes.c_int64, counts]
    run.restype = ctypes.c_int
    run.argtypes = [ctypes.c_void_p, *objects]
    release.restype = None
    release.argtypes = [ctypes.c_void_p]
    last_error.restype = ctypes.c_char_p
    last_error.argtypes = []
    return _EntryPoints(prepare, run, release, last_error, exchange)


def _is_plain() -> bool:
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
        without_mean = _without_mean(means, len(hiddens))
        device = hiddens[0].device
        points = _POINTS.get(device.type)
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
        if result == _DONE:
            return PackedStatistics(
                packed, self._shapes, self._strides, self._batch_dims, self._without_mean
            )
        if result == _DIFFERS:
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
        if not _is_plain():
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


_recent: list[PreparedStatistics] = []
_last_seen: list[Any] = [None]


def _note(
    hiddens: Sequence[Tensor], grads: Sequence[Tensor], stacked: bool, means: Sequence[int] | None
) -> None:
    """Prepare for tensors that came twice in a row; one change of shape is not worth it."""
    if hiddens[0].device.type not in _POINTS:
        return
    seen = (stacked, means, [(x.shape, x.stride(), x.dtype) for x in (*hiddens, *grads)])
    if seen != _last_seen[0]:
        _last_seen[0] = seen
        return
    _last_seen[0] = None
    # Refused: what the operator copies, or tensors of a class of their own.
    with contextlib.suppress(ValueError):
        made = PreparedStatistics(hiddens, grads, stacked=stacked, means=means)
        _recent.insert(0, made)
        del _recent[_MOST_RECENT:]


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
    def _(
        hiddens: Sequence[Tensor],
        grads: Sequence[Tensor],
        stacked: bool = False,
        without_mean: Sequence[int] = (),
    ) -> Tensor:
        checks.check_statistics_input(hiddens, grads, stacked)
        batch_dims = 2 if stacked else 1
        *stack, rows = hiddens[0].shape[:batch_dims]
        wide = hiddens[0].dtype == torch.float64
        width = sum(
            math.prod(hidden.shape[batch_dims:])
            for layer, hidden in enumerate(hiddens)
            if layer not in without_mean
        )
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
        without_mean: Sequence[int] = (),
    ) -> tuple[Tensor, int]:
        hidden_dims, grad_dims = in_dims[:2]
        packed = _statistics_op(
            _stack(hiddens, hidden_dims, info.batch_size, stacked),
            _stack(grads, grad_dims, info.batch_size, stacked),
            True,
            without_mean,
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

_POINTS: dict[str, _EntryPoints] = {
    device: points
    for device in ("cpu", "cuda")
    if device in _NATIVE_DEVICES and (points := _entry_points(device)) is not None
}
