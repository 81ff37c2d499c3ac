"""Forward, backward and statistics of a model as one program.

The capture is a function of (parameters, inputs, targets), so one run of it can be traced into a
graph of plain torch operators: no hook, no autograd and no Python of the model's is left in it.
That graph is compiled as a whole, captured as one CUDA graph, or exported and run elsewhere.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from .._common.cuda_graphs import UNWRITTEN, mark_unwritten, record
from .._common.text import first_line
from ..checkpoints.lookalikes import PROBE_METADATA
from ..checkpoints.programs import program_kind, untrusted
from .captured import Captured
from .isolation import untouched
from .outputs import Loss, Output
from .points import Select, TapError, Taps, unwrap
from .prober import Probe
from .reduction import Reduction, SampleReduction, reduction_of
from .statistics import Reduced, reduce_captured
from .tracing import as_plain, signature

_SCALARS = 6  # tensors of Reduced besides grad_mean


class _Weights(nn.Module):
    """A tree of modules that holds tensors under their dotted names and computes nothing."""

    def forward(self) -> None:
        raise NotImplementedError("holds weights only")


class Program(nn.Module):
    """One traced graph with the model's own parameters and buffers, under their own names.

    ``forward`` takes the tensors among (x, y), in order, and returns those of
    :class:`~.Reduced`: six, then the batch-mean gradient of each state.
    """

    def __init__(self, graph: GraphModule, constants: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.graph = graph
        self.weights = _Weights()
        self.names = list(constants)
        for name, tensor in constants.items():
            *path, last = name.split(".")
            holder: nn.Module = self.weights
            for part in path:
                if part not in holder._modules:
                    holder.add_module(part, _Weights())
                holder = holder.get_submodule(part)
            if isinstance(tensor, nn.Parameter):
                holder.register_parameter(last, tensor)
            else:
                holder.register_buffer(last, tensor)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.graph(*self._constants(), *tensors)
        return found

    def _constants(self) -> list[Tensor]:
        constants = []
        for name in self.names:
            path, _, last = name.rpartition(".")
            constants.append(getattr(self.weights.get_submodule(path), last))
        return constants


def _unpacked(tensors: Sequence[Tensor]) -> Reduced:
    hidden_norm, grad_norm, output_grad_norm, credit_gain, logits, loss = tensors[:_SCALARS]
    means = tuple(tensors[_SCALARS:])
    return Reduced(hidden_norm, grad_norm, output_grad_norm, credit_gain, means, logits, loss)


def _tensors_of(x: Any, y: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten((x, y))[0] if isinstance(leaf, Tensor)]


def _alike(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Tell rounding, of sums in another order and of 16 bits, from other figures."""
    for one, other in zip(tensors, others, strict=True):
        if one.numel():
            scale = float(other.abs().nan_to_num(0.0, 0.0, 0.0).max())
            if not torch.allclose(one, other, rtol=1e-2, atol=1e-2 * scale, equal_nan=True):
                return False
    return True


# Runs before a recording: torch.compile compiles in the first.
_WARM_UP = 3


class _Graphed:
    """A CUDA graph of a program, with the buffers that it reads."""

    def __init__(self, run: Any, tensors: Sequence[Tensor], pointers: tuple[int, ...]) -> None:
        self.inputs = [tensor.clone() for tensor in tensors]
        self.pointers = pointers
        self.graph, self.outputs = record(
            lambda: run(*self.inputs), tensors[0].device, warm_up=_WARM_UP
        )
        self._check(run)

    def _check(self, run: Any) -> None:
        """Compare the first replay with runs of the program itself, once for each graph."""
        first, second = ([tensor.clone() for tensor in run(*self.inputs)] for _ in range(2))
        mark_unwritten(self.outputs)
        self.graph.replay()
        # A model that draws random numbers differs from itself; what it writes is there all the
        # same.
        right = _alike(self.outputs, first) if _alike(first, second) else not self._unwritten()
        if not right:
            raise RuntimeError(
                "CompiledProbe: graph=True: expected the figures of the program itself from its "
                "CUDA graph, got others; use graph=False"
            )

    def _unwritten(self) -> bool:
        return any(bool((t == UNWRITTEN).all()) for t in self.outputs if t.numel())

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)


class CompiledProbe:
    """Probe a model again and again with one compiled program per input shape.

    Args:
        model: any module that :func:`fadiag_fast.diagnose` captures through ``torch.func``. A
            module that is already compiled is unwrapped. It is traced in eval mode; its
            parameters are read at every call, so that training between calls is seen.
        taps: see :func:`fadiag_fast.capture.taps.find_taps`; None chooses.
        loss: (model output, y) → scalar; None is cross-entropy.
        reduction, output, batch_dim: see :func:`fadiag_fast.diagnose`.
        backend: for ``torch.compile(fullgraph=True)``; None runs the traced graph as it is.
        mode: for ``torch.compile``.
        graph: replay one CUDA graph per shape: a call costs one launch. The model's device must
            be a GPU.

    Calling it with (x, y) returns :class:`~.Reduced`, on the device and
    without waiting for it. A new shape, dtype or device of x or y traces and compiles once more;
    ``num_programs`` counts.

    Raises:
        TapError: the model cannot be captured through ``torch.func``; the message says why.
        ValueError: ``graph`` for a model that is not on a GPU.

    >>> import torch
    >>> from fadiag_fast import CompiledProbe
    >>> from fadiag_fast.zoo import ResidualMLP
    >>> probe = CompiledProbe(ResidualMLP(20, 16, 10, 3), backend=None)
    >>> found = probe(torch.randn(8, 20), torch.arange(8))
    >>> found.hidden_norm.shape
    torch.Size([4, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Select | None = None,
        loss: Loss | None = None,
        *,
        reduction: Reduction | SampleReduction = "flatten",
        output: Output | None = None,
        batch_dim: int = 0,
        backend: str | None = "inductor",
        mode: str | None = None,
        graph: bool = False,
    ) -> None:
        self.model = unwrap(model)
        self.reduction = reduction_of(reduction)
        self.backend, self.mode, self.graph = backend, mode, graph
        self._probe = Probe(
            self.model,
            select=taps,
            loss=loss,
            output=output,
            batch_dim=batch_dim,
            path="torch.func",
            several=self.reduction.kind != "token",
        )
        self._programs: dict[tuple[Any, ...], Program] = {}
        self._runs: dict[tuple[Any, ...], Any] = {}

    @property
    def taps(self) -> Taps:
        """What is observed; known from the first call on."""
        return self._probe.taps

    @property
    def num_programs(self) -> int:
        """How many shapes have been compiled."""
        return len(self._programs)

    def __call__(self, x: Any, y: Any) -> Reduced:
        x = as_plain(x)
        key = signature((x, y))
        tensors = _tensors_of(x, y)
        run = self._runs.get(key)
        if run is None or (isinstance(run, _Graphed) and run.pointers != self._pointers()):
            run = self._runs[key] = self._compile(x, y, key)
        with torch.no_grad():
            return _unpacked(run(*tensors))

    def program(self, x: Any, y: Any) -> Program:
        """Return the traced program for inputs shaped like (x, y), as an ordinary module."""
        x = as_plain(x)
        key = signature((x, y))
        if key not in self._programs:
            self._programs[key] = self._trace(x, y)
        return self._programs[key]

    def _pointers(self) -> tuple[int, ...]:
        """Identify the memory of the weights: a CUDA graph holds addresses."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return tuple(tensor.data_ptr() for tensor in tensors)

    def _compile(self, x: Any, y: Any, key: tuple[Any, ...]) -> Any:
        program = self.program(x, y)
        run: Any = program
        if self.backend is not None:
            run = torch.compile(
                program, fullgraph=True, dynamic=False, backend=self.backend, mode=self.mode
            )
        if not self.graph:
            return run
        tensors = _tensors_of(x, y)
        if not tensors or tensors[0].device.type != "cuda":
            raise ValueError("CompiledProbe: graph=True: expected inputs on a GPU")
        with torch.no_grad():
            return _Graphed(run, tensors, self._pointers())

    def _trace(self, x: Any, y: Any) -> Program:
        leaves, layout = tree_flatten((x, y))
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        constants: dict[str, Tensor] = {
            **dict(self.model.named_parameters()),
            **dict(self.model.named_buffers()),
        }
        names = list(constants)

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = list(leaves)
            for i, tensor in zip(at, tensors[len(names) :], strict=True):
                given[i] = tensor
            x, y = tree_unflatten(given, layout)
            named = dict(zip(names, tensors[: len(names)], strict=True))
            captured = self._probe.capture(x, y, constants=named)
            found = reduce_captured(
                _without_grad(captured), self.reduction, has_output=self._probe.has_output
            )
            scalars = (
                found.hidden_norm,
                found.grad_norm,
                found.output_grad_norm,
                found.credit_gain,
                found.logits,
                found.loss,
            )
            return tuple(t.clone() for t in (*scalars, *found.grad_mean))

        with untouched(self.model):
            self._probe.prepare(x)
            try:
                graph = make_fx(run)(
                    *(tensor.detach() for tensor in constants.values()), *_tensors_of(x, y)
                )
            except (RuntimeError, NotImplementedError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise TapError(
                    f"{type(self.model).__name__}: expected a model that torch.func can run and "
                    f"make_fx can trace, got: {first_line(error)}"
                ) from error
        return Program(graph, constants)

    # ---- leaving the process

    def export(self, x: Any, y: Any) -> torch.export.ExportedProgram:
        """Export the program for inputs shaped like (x, y), weights included.

        It needs neither the model's source nor this class: ``import fadiag_fast`` loads the
        operator that it calls.
        """
        program = self.program(x, y).eval()
        with torch.no_grad():
            return torch.export.export(program, tuple(_tensors_of(x, y)))

    def save(self, path: str | os.PathLike[str], x: Any, y: Any, *, compiled: bool = False) -> None:
        """Write the exported program for :func:`load_probe`.

        Args:
            path: ends in ``.pt2``.
            x, y: a batch of the shape that the file will serve.
            compiled: write machine code for this kind of device (AOTInductor) in place of a graph.
        """
        exported, metadata = self.export(x, y), json.dumps(self._metadata(x, y))
        if not compiled:
            torch.export.save(exported, path, extra_files={PROBE_METADATA: metadata})
            return
        options = {"aot_inductor.metadata": {PROBE_METADATA: metadata}}
        torch._inductor.aoti_compile_and_package(
            exported, package_path=os.fspath(path), inductor_configs=options
        )

    def _metadata(self, x: Any, y: Any) -> dict[str, Any]:
        self.program(x, y)
        return {
            "labels": list(self.taps.labels),
            "taps": [tap.where for tap in self.taps.points],
            "reduction": self.reduction.kind,
            "inputs": [[str(t.dtype), list(t.shape)] for t in _tensors_of(x, y)],
        }


def _without_grad(captured: Captured) -> Captured:
    found: Captured = tree_map_only(Tensor, lambda tensor: tensor.detach(), captured)
    return found


class LoadedProbe:
    """A probe read from a file: call it with the tensors of (x, y) in the saved shapes.

    Attributes:
        labels: names of the hidden states.
        metadata: what :meth:`CompiledProbe.save` wrote beside the program.
    """

    def __init__(self, program: Any, metadata: Mapping[str, Any]) -> None:
        self.metadata = dict(metadata)
        self.labels: tuple[str, ...] = tuple(self.metadata.get("labels", ()))
        self._program = program

    def __call__(self, x: Any, y: Any) -> Reduced:
        tensors = _tensors_of(x, y)
        expected = self.metadata.get("inputs")
        got = [[str(t.dtype), list(t.shape)] for t in tensors]
        if expected is not None and got != expected:
            raise ValueError(f"LoadedProbe: expected inputs {expected}, got {got}")
        with torch.no_grad():
            return _unpacked(self._program(*tensors))


def load_probe(path: str | os.PathLike[str], *, trust_code: bool = False) -> LoadedProbe:
    """Read what :meth:`CompiledProbe.save` wrote, in either form.

    Args:
        path: the file; its content decides which form it is.
        trust_code: open it. A probe is a program, or machine code: opening and calling it CAN RUN
            ANY CODE FROM THE FILE, with all your rights.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file holds no probe.
        UntrustedProgram: ``trust_code`` is not given. Nothing was run.
    """
    wrong = f"load_probe: {path}: expected a file of CompiledProbe.save"
    kind = program_kind(path, "a file of CompiledProbe.save", "load_probe")
    if kind not in ("probe", "compiled"):
        raise ValueError(f"{wrong}, got {'no program' if kind is None else 'another program'}")
    if not trust_code:
        raise untrusted(path, kind, "load_probe")
    if kind == "compiled":
        package = torch._inductor.aoti_load_package(os.fspath(path))
        metadata = package.get_metadata().get(PROBE_METADATA, "")
        program: Any = package
    else:
        extra = {PROBE_METADATA: ""}
        try:
            exported = torch.export.load(path, extra_files=extra)
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise ValueError(f"{wrong}: {first_line(error)}") from None
        metadata, program = extra[PROBE_METADATA], exported.module()
    if not metadata:
        raise ValueError(f"{wrong}, got another program")
    return LoadedProbe(program, json.loads(metadata))
