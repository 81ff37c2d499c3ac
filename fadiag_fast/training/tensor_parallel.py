"""States that the ranks of tensor parallelism hold together.

Under ``parallelize_module`` a tapped state is whole on every rank, or each rank has a part of it.
What can be summed up from parts is left where it is: a sample's sum of squares over features, and
over positions too where a sample is all of them. What cannot (partial sums, positions whose average
is taken, samples dealt out to the ranks) is first put together on every rank, by one collective for
each such state or gradient. So each rank has, for every state, a part or the whole; of the wholes,
one rank's counts. :class:`~fadiag_fast.training.exchange.Exchange` merges them.

A plain tensor does not say which of the two it is. The first pass compares it between the ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..capture.points import TapError
from ..capture.reduction import SampleReduction

# How many elements of a state are compared between ranks, and how often while all of them are zero.
_COMPARED = 1024
_TRIES = 8
# Ranks that compute the same may round differently; parts of a state have nothing in common.
_ALIKE = 0.05


class Part(NamedTuple):
    """What this rank has of a state.

    Attributes:
        tensor: plain, with every sample along the batch dimension.
        counts: False for a whole that another rank counts.
    """

    tensor: Tensor
    counts: bool


def is_dtensor(value: object) -> bool:
    """Return whether something is a DTensor, without importing what defines it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def waited(tensor: Tensor) -> Tensor:
    """Return the tensor behind a collective of torch's that may still run; the stream waits."""
    wait = getattr(tensor, "trigger_wait", None)
    return tensor if wait is None else wait()


def like_whole(tensor: Tensor) -> Tensor:
    """Return a tensor, or one without values of a DTensor's shape, which asks for no collective."""
    if is_dtensor(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return tensor.detach()


def _placed(
    tensor: Any, reduction: SampleReduction | None, batch_dim: int
) -> tuple[Tensor, tuple[Any, ...]]:
    """Return the local tensor of a DTensor, and how it is placed, fit to be reduced by itself.

    ``reduction`` None is for logits, whose samples may be rows of dimension 0.
    """
    from torch.distributed.tensor import Replicate, Shard

    def fits(dim: int) -> bool:
        dim %= tensor.dim()
        if dim == batch_dim % tensor.dim():
            return False
        if reduction is None:
            return dim != 0
        if reduction.kind == "flatten" or tensor.dim() < 3:
            return True
        by_sample = torch.empty(tensor.shape, device="meta").movedim(batch_dim, 0)
        order = [d for d in range(tensor.dim()) if d != batch_dim % tensor.dim()]
        return dim == order[reduction.feature_index(by_sample) - 1]

    mesh = tensor.device_mesh
    placements = tuple(
        placed
        if placed.is_replicate()
        or (type(placed) is Shard and fits(placed.dim))
        # A mesh dimension of one rank has the whole, however it is called.
        or (mesh.size(i) == 1 and not placed.is_partial())
        else Replicate()
        for i, placed in enumerate(tensor.placements)
    )
    if placements != tuple(tensor.placements):
        tensor = tensor.redistribute(placements=placements)
    return waited(tensor.to_local()), placements


class TensorRanks:
    """The T ranks that hold one copy of a model together.

    Args:
        ranks: global ranks.
        groups: process groups in which every two of them are connected: one for each dimension of
            their mesh.
        declared: patterns of names of states whose plain tensors are parts.

    Attributes:
        index: of this rank among them.
        shares: of declared states, by layer, how many times as many features all ranks have as
            this one; known from the first pass on.
    """

    def __init__(
        self, ranks: Sequence[int], groups: Sequence[Any], declared: Sequence[str]
    ) -> None:
        self.ranks = tuple(sorted(ranks))
        self.groups = tuple(groups)
        self.declared = tuple(declared)
        self.index = self.ranks.index(dist.get_rank())
        self.shares: dict[int, float] = {}
        self._known_meshes: dict[Any, tuple[int, ...]] = {}
        self._tries: dict[tuple[str, int], int] = {}
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    @property
    def size(self) -> int:
        return len(self.ranks)

    def part_of(
        self,
        l: int,
        label: str,
        tensor: Tensor,
        reduction: SampleReduction | None,
        batch_dim: int,
        grad: bool,
    ) -> Part:
        """Return what this rank has of a state or gradient.

        Args:
            l: which state.
            label: its name, for messages.
            tensor: as the network has it.
            reduction: what a sample is; None for logits.
            batch_dim: the dimension that counts samples.
            grad: whether it is a gradient.

        Raises:
            TapError: a plain tensor is no whole and was not declared a part, or the reverse; a
                DTensor is on other ranks.
        """
        if is_dtensor(tensor):
            coordinate = self._coordinate(tensor, label)
            local, placements = _placed(tensor, reduction, batch_dim)
            replicated = zip(placements, coordinate, strict=True)
            return Part(local, all(at == 0 for p, at in replicated if not p.is_shard()))
        local = waited(tensor)
        declared = any(fnmatch(label, pattern) for pattern in self.declared)
        self._check(l, label, local, declared, grad)
        return Part(local, declared or self.index == 0)

    def _coordinate(self, tensor: Any, label: str) -> tuple[int, ...]:
        mesh = tensor.device_mesh
        if mesh not in self._known_meshes:
            ranks = sorted(mesh.mesh.flatten().tolist())
            if ranks != list(self.ranks):
                raise TapError(
                    f"StepProbe: {label}: expected a DTensor on the ranks {list(self.ranks)} that "
                    f"hold one copy of the model, got one on {ranks}; give tensor_group="
                )
            self._known_meshes[mesh] = tuple(mesh.get_coordinate())
        return self._known_meshes[mesh]

    def _check(self, l: int, label: str, local: Tensor, declared: bool, grad: bool) -> None:
        """Compare a plain tensor between the ranks, in the first pass that has values in it."""
        if grad and declared:
            return
        key = ("gradient" if grad else "state", l)
        tries = self._tries.get(key, 0)
        if tries >= _TRIES:
            return
        self._tries[key] = tries + 1
        flat = local.detach()
        if flat.is_complex():
            flat = torch.view_as_real(flat)
        flat = flat.reshape(-1)
        sample = flat.new_zeros(_COMPARED + 1, dtype=torch.float64)
        some = flat[:: max(1, flat.numel() // _COMPARED)][:_COMPARED]
        sample[: len(some)] = some
        sample[-1] = flat.numel()
        alike, sizes = True, flat.numel()
        for group in self.groups:
            found = [torch.empty_like(sample) for _ in range(dist.get_world_size(group))]
            dist.all_gather(found, sample, group=group)
            rows = torch.stack(found).cpu()
            if not bool(torch.isfinite(rows).all()) or not bool(rows[:, :-1].any()):
                return  # nothing to tell them apart by, yet
            first = rows[0]
            close = (rows[:, :-1] - first[:-1]).norm(dim=1) <= _ALIKE * first[:-1].norm()
            alike = alike and bool((close & (rows[:, -1] == first[-1])).all())
            sizes = int(rows[:, -1].sum()) * sizes // flat.numel() if flat.numel() else sizes
        self._tries[key] = _TRIES
        kind = key[0]
        if declared and alike:
            raise TapError(
                f"StepProbe: {label}: expected a part of the {kind} on each of {self.size} ranks "
                f"of tensor parallelism, as sharded= says, got the same values on all of them"
            )
        if declared:
            self.shares[l] = sizes / max(1, flat.numel())
        elif not alike:
            raise TapError(
                f"StepProbe: {label}: expected a whole {kind} on each of {self.size} ranks of "
                f"tensor parallelism, or a DTensor, got a plain tensor of other values on each; "
                f"if they are parts of it, give use_local_output=False to the module's parallel "
                f"style or name it in sharded=; partial sums cannot be observed"
            )

    def masked(self, norms: Tensor, counting: Sequence[Sequence[bool]]) -> Tensor:
        """Return norms ``[2, n + 1, N]`` with zeros where another rank counts the whole."""
        key = (norms.device, *map(tuple, counting))
        if all(all(row) for row in counting):
            return norms
        if key not in self._masks:  # once: writing it to a device from here waits
            self._masks[key] = torch.tensor(counting, device=norms.device)[:, :, None]
        return torch.where(self._masks[key], norms, 0.0)


def plain_part(label: str, tensor: Tensor, batch_dim: int) -> Tensor:
    """Return a tensor as this rank's own, which has all of it.

    Raises:
        TapError: it is a DTensor of several ranks.
    """
    if is_dtensor(tensor):
        mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
        if mesh.size() > 1:
            raise TapError(
                f"StepProbe: {label}: expected a plain tensor, as no parameter says that the model "
                f"is spread over ranks, got a DTensor on {mesh}; give tensor_group="
            )
        return _placed(tensor, None, batch_dim)[0]
    return waited(tensor)


def find_tensor_ranks(
    model: nn.Module, group: Any, declared: Sequence[str] | None
) -> TensorRanks | None:
    """Return the ranks that hold one copy of the model together; None where each holds its own.

    Args:
        model: its parameters tell, where they are DTensors: by the dimensions of their meshes that
            are not those of ``fully_shard``.
        group: the caller's: a process group or DeviceMesh; None finds it, False is none.
        declared: see :class:`TensorRanks`.

    Raises:
        TapError: parameters are spread over different ranks.
        TypeError: ``group`` is something else.
    """
    declared = () if declared is None else declared
    if group is False or not dist.is_available() or not dist.is_initialized():
        return None
    if group is None:
        group = _mesh_of(model)
        if group is None:
            return None
    if hasattr(group, "get_all_groups"):
        ranks, groups = group.mesh.flatten().tolist(), group.get_all_groups()
    elif isinstance(group, dist.ProcessGroup):
        ranks, groups = dist.get_process_group_ranks(group), [group]
    else:
        raise TypeError(
            f"StepProbe: tensor_group: expected a process group, a DeviceMesh, None or False, got "
            f"{type(group).__name__}"
        )
    return TensorRanks(ranks, groups, declared) if len(ranks) > 1 else None


def _mesh_of(model: nn.Module) -> Any:
    """Return the mesh of tensor parallelism that a model's parameters are on, or None."""
    if "torch.distributed.tensor" not in sys.modules:
        return None
    fsdp = sys.modules.get("torch.distributed.fsdp")
    data_parallel = getattr(fsdp, "FSDPModule", ())
    copied: dict[int, bool] = {}  # of the parameters that it manages: only copied, never sharded
    for module in model.modules():
        if isinstance(module, data_parallel):
            copies = any(base.__name__ == "ReplicateModule" for base in type(module).__mro__)
            copied |= {id(parameter): copies for parameter in module.parameters()}
    found: dict[tuple[int, ...], tuple[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not is_dtensor(parameter):
            continue
        mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
        if id(parameter) in copied:
            placements: tuple[Any, ...] = parameter.placements  # type: ignore[attr-defined]
            # Its own dimensions come first: copies, if any, then one that is sharded.
            own = next((i + 1 for i, p in enumerate(placements) if not p.is_replicate()), mesh.ndim)
            own = 1 if copied[id(parameter)] else own
            if own >= mesh.ndim:
                continue
            mesh = mesh[mesh.mesh_dim_names[own:]]
        if mesh.size() > 1:
            found.setdefault(tuple(sorted(mesh.mesh.flatten().tolist())), (name, mesh))
    if len(found) > 1:
        places = ", ".join(f"{name} on {list(ranks)}" for ranks, (name, _) in found.items())
        raise TapError(
            f"{type(model).__name__}: expected parameters on the same ranks, got {places}; "
            f"give tensor_group="
        )
    return next((mesh for _, mesh in found.values()), None)
