"""Put the samples and directions of all ranks together, with one collective for each step.

Ranks of data parallelism have samples of their own; the T ranks of tensor parallelism that hold one
copy of the model have parts of the same samples' states (:mod:`.tensor_parallel`). Both go through
the same all-reduce: every rank writes the norms of its parts into a place of its own, and whoever
reads them takes the root of the sum of squares over the T places of a sample. The squares
themselves, which the all-reduce could sum, would leave the range of float32, and float64 would
double the directions.
Parts of a direction are written beside each other, so that each rank has it whole and its cosines
need no collective more; the order of its numbers does not change them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._common.warn import user_level
from ..ops.reference import sample_norm
from .tensor_parallel import TensorRanks


class Merged(NamedTuple):
    """What all ranks saw in one step, the W ranks holding W / T copies of the model.

    Attributes:
        samples: ``[figures, W / T · capacity]``; NaN where a rank had fewer samples.
        counts: ``[W / T]``, samples of each copy.
        directions: sums over all ranks; None where their sizes differ.
    """

    samples: Tensor
    counts: Tensor
    directions: list[Tensor | None]


def default_group(group: Any) -> Any:
    """Return the process group to merge over; None where a process stands alone.

    ``group`` is the caller's: None takes all processes, False none but this one.
    """
    if group is False or not dist.is_available() or not dist.is_initialized():
        return None
    found = dist.group.WORLD if group is None else group
    return found if dist.get_world_size(found) > 1 else None


class Share:
    """Whose figures a rank's records are, and so which rank writes them into a file.

    Ranks that share figures have the same records. The first rank of the group writes them; where
    ranks hold different layers, as pipeline stages do, the first rank of each kind.

    Args:
        group: as the probe has it.
        judged: whether alarms judge the records and are written beside them.

    Attributes:
        leads: whether this rank is the first of those that hold the same layers.
    """

    def __init__(self, group: Any = None, judged: bool = False) -> None:
        self.judged = judged
        self._group = group
        self._rank: int | None = None  # None while torch.distributed is not initialised
        self._main = True
        self.leads = False

    def look(self) -> None:
        """Find out this process's place: the group may be gone when the last record is written."""
        if self._rank is None and dist.is_available() and dist.is_initialized():
            self._rank = dist.get_rank()
            group = None if self._group is False else self._group
            self._main = dist.get_rank(group) <= 0

    def file(self, path: Path, every_rank: bool = False) -> Path | None:
        """Return where this rank writes; None for nowhere."""
        self.look()
        if self._main:
            return path
        if self.leads or every_rank:
            return path.with_name(f"{path.stem}.rank{self._rank}{path.suffix}")
        return None


def _meet(group: Any, seconds: float) -> list[int]:
    """Return the ranks of a group, by their numbers in it, that do not come within some seconds.

    The k-th call in each process meets the k-th call in the others, through the store that the
    process group was made with and without a collective. All that come get the same answer: the
    first one to have it writes it down.
    """
    ranks = tuple(dist.get_process_group_ranks(group))
    number = _meetings[ranks] = _meetings.get(ranks, 0) + 1
    try:
        store = dist.distributed_c10d._get_default_store()
        place = f"fadiag_fast/{'-'.join(map(str, ranks))}/{number}"
        keys = [f"{place}/{index}" for index in range(len(ranks))]
        store.set(keys[dist.get_rank(group)], "here")
    except (RuntimeError, AttributeError, NotImplementedError):  # a backend without a store
        return []
    with contextlib.suppress(RuntimeError):  # the time is up
        store.wait(keys, timedelta(seconds=seconds))
    if store.add(f"{place}/answers", 1) == 1:
        absent = [index for index, key in enumerate(keys) if not store.check([key])]
        store.set(f"{place}/absent", json.dumps(absent))
    found: list[int] = json.loads(store.get(f"{place}/absent"))
    return found


_meetings: dict[tuple[int, ...], int] = {}


def all_present(group: Any, seconds: float) -> bool:
    """Return whether every rank of a group records the step at hand; warn where some do not.

    The first collective of a probe that only some ranks have would meet another one of the
    training's, and the job would hang.

    Args:
        group: of the ranks.
        seconds: to wait for the others, once.
    """
    absent = _meet(group, seconds)
    if absent:
        warnings.warn(
            f"StepProbe: rank {dist.get_rank(group)}: expected every rank of the group to record "
            f"the step, got none of rank {', '.join(map(str, absent))} within {seconds:g} s: the "
            f"figures are of this rank's samples only; build the probe and call step() on every "
            f"rank (one of them writes the file), or give group=False",
            RuntimeWarning,
            stacklevel=user_level(),
        )
    return not absent


def fingerprint(parameters: Iterable[Tensor]) -> str | None:
    """Return what tells models apart that are built alike but hold other weights; None unknown.

    Data-parallel ranks hold the same weights, bit for bit. Where they are dealt out to the ranks
    nothing follows from their bytes.
    """
    heads = []
    for parameter in parameters:
        sharded = any(
            hasattr(parameter, name) for name in ("_is_flat_param", "ds_id", "_fsdp_flattened")
        )
        if type(parameter.data) is not Tensor or sharded:
            return None
        head = parameter.detach().flatten()[:_HEAD].contiguous()
        heads.append(head.view(torch.uint8).cpu().numpy().tobytes() + str(parameter.shape).encode())
    return hashlib.sha256(b"".join(heads)).hexdigest()


_HEAD = 64  # elements of each parameter that are compared


class _OfRank(NamedTuple):
    """What a rank says of itself before the first exchange."""

    labels: tuple[str, ...]
    fingerprint: str | None
    samples: int
    first: int  # the first rank of its copy of the model
    part: int
    parts: int
    sizes: list[int]  # of its directions


class Exchange:
    """Sum one buffer over all ranks: each writes its samples into a place of its own.

    So the samples are gathered and the directions summed by the same all-reduce. It is started when
    a step ends and waited for when the next one does.

    Ranks whose states have other names hold other layers, as the stages of a pipeline do. Such
    kinds of ranks take part in the same all-reduce, but each is merged for itself.

    Args:
        group: of W ranks.
        capacity: samples that one rank may send in one step; None agrees on the largest of the
            ranks' first step, which waits for the device once. What a rank has beyond that is left
            out, with one warning: the other ranks could not know of it.
        wide: exchange in float64; else in float32.
        tensor_ranks: those that hold one copy of the model with this one; None for it alone.
        labels: of this rank's states.
        fingerprint: of its weights, see :func:`fingerprint`; None compares no weights.

    Attributes:
        world: ranks of this rank's kind; known from the first exchange on, as the next.
        leads: whether this rank is the first of its kind.
    """

    def __init__(
        self,
        group: Any,
        capacity: int | None = None,
        wide: bool = False,
        tensor_ranks: TensorRanks | None = None,
        labels: Sequence[str] = (),
        fingerprint: str | None = None,
    ) -> None:
        self.group = group
        self.world = self._everyone = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.capacity = capacity
        self.wide = wide
        self.leads = self.rank == 0
        self._labels, self._fingerprint = tuple(labels), fingerprint
        self._first = dist.get_rank() if tensor_ranks is None else tensor_ranks.ranks[0]
        self._part = 0 if tensor_ranks is None else tensor_ranks.index
        self._parts = 1 if tensor_ranks is None else tensor_ranks.size
        self._place = self._offset = 0  # of this rank, and of the first one of its kind
        self._sizes: list[list[int]] | None = None  # per direction, of each part
        self._before = self._behind = 0  # numbers in directions of other kinds
        self._figures = 0  # of the kind with the most
        self._warned = False

    def _agree(self, samples: int, figures: int, sizes: list[int], device: torch.device) -> None:
        """Settle, once and waiting for the device, how large everybody's buffer is."""
        own = _OfRank(
            self._labels, self._fingerprint, samples, self._first, self._part, self._parts, sizes
        )
        everyone: list[Any] = [None] * self._everyone
        on_gpu = device if device.type == "cuda" else -1
        with torch.cuda.device(on_gpu):  # objects travel by way of the current one
            dist.all_gather_object(everyone, (own, figures), group=self.group)
        self._figures = max(figures for _, figures in everyone)
        ranks: list[_OfRank] = [of_rank for of_rank, _ in everyone]
        if self.capacity is None:
            self.capacity = max(of_rank.samples for of_rank in ranks)
        kinds: dict[Any, list[int]] = {}
        for rank, of_rank in enumerate(ranks):
            kinds.setdefault((of_rank.labels, of_rank.fingerprint), []).append(rank)
        self._warn_of_kinds(list(kinds))
        offset = 0
        for members in kinds.values():
            mine = self.rank in members
            agreed = self._of_kind([ranks[rank] for rank in members], mine)
            numbers = sum(map(sum, agreed))
            if mine:
                self._sizes, self._offset, self.world = agreed, offset, len(members)
                self.leads = self.rank == members[0]
                copies = sorted({ranks[rank].first for rank in members})
                self._place = offset + copies.index(self._first) * self._parts + self._part
            elif self._sizes is None:
                self._before += numbers
            else:
                self._behind += numbers
            offset += len(members)

    def _warn_of_kinds(self, kinds: list[tuple[Any, Any]]) -> None:
        if len({labels for labels, _ in kinds}) < len(kinds):
            warnings.warn(
                "StepProbe: group: expected the same weights wherever states have the same names, "
                "got ranks with other ones, as of stages of a pipeline: only those with the same "
                "weights are merged; give group= if all of them share a batch",
                RuntimeWarning,
                stacklevel=user_level(),
            )

    def _of_kind(self, members: list[_OfRank], mine: bool) -> list[list[int]]:
        """Return the sizes of a kind's directions, of each part; none where ranks differ."""
        parts = members[0].parts
        first = [member.first for member in members]
        counts = [first.count(copy) for copy in sorted(set(first))]
        if mine and any(count != parts for count in counts):
            raise ValueError(
                f"StepProbe: group: expected all {parts} ranks of each copy of the model, got a "
                f"group of {len(members)} ranks with {counts} of them; give one that holds whole "
                f"copies"
            )
        agreed: list[list[int]] = []
        lowest, highest = [], []
        for l in range(len(members[0].sizes)):
            of_part = [{m.sizes[l] for m in members if m.part == part} for part in range(parts)]
            of_part = [sizes or {0} for sizes in of_part]
            lowest += [min(sizes) for sizes in of_part]
            highest += [max(sizes) for sizes in of_part]
            same = all(len(sizes) == 1 for sizes in of_part)
            agreed.append([max(sizes) for sizes in of_part] if same else [])
        if mine and not all(map(sum, agreed)):
            why = (
                f"expected directions of the same size on all ranks, got {lowest} to {highest}: "
                f"those that differ are left out; pad the batches to one length, or compare the "
                f"positions' averages with reduction='mean'"
                if lowest != highest
                else "expected a gradient for every direction in the first step, got none for "
                "some: those are left out"
            )
            warnings.warn(f"StepProbe: {why}", RuntimeWarning, stacklevel=user_level())
        return agreed

    def start(self, samples: Tensor, directions: Sequence[Tensor | None]) -> PendingMerge:
        """Begin to merge.

        Args:
            samples: ``[figures, N]`` of this rank: norms where it has parts, and zeros where
                another rank counts a state that both have whole.
            directions: sums over this rank's samples, empty where another rank counts them. One
                that is missing, or of another size than in the first step, enters as NaN: buffers
                of different sizes would never meet.

        Raises:
            ValueError: the group has a part of a copy of the model only.
        """
        figures, count = samples.shape
        sizes = [0 if d is None else d.numel() for d in directions]
        if self._sizes is None:
            self._agree(count, figures, sizes, samples.device)
        assert self._sizes is not None
        assert self.capacity is not None
        if count > self.capacity and not self._warned:
            self._warned = True
            warnings.warn(
                f"StepProbe: rank {self.rank}: expected at most {self.capacity} samples in a step, "
                f"as in the first one, got {count}: the others are left out; give max_samples=",
                RuntimeWarning,
                stacklevel=user_level(),
            )
        kept = min(count, self.capacity)
        wide = samples.dtype == torch.float64 and self.wide
        dtype = torch.float64 if wide else torch.float32
        everyone, own = self._everyone, self._figures * self.capacity
        summed = self._before + sum(map(sum, self._sizes)) + self._behind
        buffer = samples.new_zeros(everyone * (own + 1) + summed, dtype=dtype)
        places = buffer[: everyone * own].view(everyone, self._figures, self.capacity)
        mine = places[self._place, :figures]
        mine[:, :kept] = samples[:, :kept]
        mine[:, kept:] = torch.nan
        counts = buffer[everyone * own : everyone * (own + 1)]
        counts[self._place].fill_(float(count))
        at = everyone * (own + 1) + self._before
        of_kind = slice(self._offset, self._offset + self.world)
        shapes: list[torch.Size | None] = []
        for direction, parts in zip(directions, self._sizes, strict=True):
            size = parts[self._part] if parts else 0
            begin = at + sum(parts[: self._part])
            place = buffer[begin : begin + size]
            fits = direction is not None and direction.numel() == size
            if direction is not None and fits:
                place.copy_(direction.reshape(-1))
            else:
                place.fill_(torch.nan)
            total = sum(parts)
            whole = direction.shape if direction is not None and fits and size == total else None
            shapes.append((whole or torch.Size([total])) if total else None)
            at += total
        work = dist.all_reduce(buffer, group=self.group, async_op=True)
        sums = buffer[everyone * (own + 1) + self._before :]
        return PendingMerge(
            work, sums, places[of_kind, :figures], counts[of_kind], self._parts, shapes
        )


class PendingMerge:
    """A merge under way."""

    def __init__(
        self,
        work: Any,
        sums: Tensor,
        places: Tensor,
        counts: Tensor,
        parts: int,
        shapes: Sequence[torch.Size | None],
    ) -> None:
        self._work = work
        self._sums = sums
        self._places = places
        self._counts = counts
        self._parts = parts
        self._shapes = shapes

    def wait(self) -> Merged:
        """Return the result; on a GPU the stream waits for it, not the host."""
        self._work.wait()
        _, figures, capacity = self._places.shape
        counts = self._counts[:: self._parts]
        at = 0
        directions: list[Tensor | None] = []
        for shape in self._shapes:
            if shape is None:
                directions.append(None)
                continue
            directions.append(self._sums[at : at + shape.numel()].view(shape))
            at += shape.numel()
        samples = self._places.double()
        if self._parts > 1:
            of_copy = samples.reshape(-1, self._parts, figures * capacity)
            samples = sample_norm(of_copy.transpose(1, 2), batch_dims=2)
        samples = samples.reshape(-1, figures, capacity).transpose(0, 1).reshape(figures, -1)
        return Merged(samples, counts, directions)
