"""Tensor parallelism: ranks that hold parts of one model against one that holds all of it.

What is refused is in test_limits_training.py.
"""

from contextlib import nullcontext
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
from ranks import BACKENDS, TWO_GPUS, assert_alike, make_without_waiting, needs_gloo, spawned
from torch import nn

from fadiag_fast import StepProbe

pytest.importorskip("torch.distributed.tensor.parallel")

BATCH, POSITIONS, WIDTH, CLASSES = 6, 4, 8, 4
# The sums are those of the whole network in another order: some hundred roundings of float64, and
# as many of float32, in which a step's figures are exchanged unless the network is in float64.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
BOTH = pytest.mark.parametrize("backend", BACKENDS)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, h):
        return h + self.down(torch.tanh(self.up(self.norm(h))))


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def build(width=WIDTH, dtype=torch.float64):
    torch.manual_seed(0)
    return Net(width).to(dtype)


def batch_of(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, POSITIONS, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, CLASSES, (BATCH, POSITIONS), generator=generator)


def loss_of(logits, y):
    return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def plan_of(kind):
    """How the modules are spread; what passes from block to block is the kind's name."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
    )

    if kind == "plain":
        return {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
    at, local = {
        "replicated": (Replicate(), False),
        "logits": (Replicate(), False),
        "features": (Shard(2), False),
        "positions": (Shard(1), False),
        "samples": (Shard(0), False),
        "local positions": (Shard(1), True),
    }[kind]
    whole = kind != "logits"
    return {
        "embed": ColwiseParallel(output_layouts=at, use_local_output=local),
        "blocks.*.norm": SequenceParallel(sequence_dim=1),
        "blocks.*.up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "blocks.*.down": RowwiseParallel(output_layouts=at, use_local_output=local),
        "head": ColwiseParallel(
            input_layouts=at,
            output_layouts=Replicate() if whole else Shard(-1),
            use_local_output=whole,
        ),
    }


def spread(model, kind, device, shape=None, data_parallel=False):
    """Return the mesh over which the model now is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = init_device_mesh(
        device.type, shape or (1, dist.get_world_size()), mesh_dim_names=("data", "tensor")
    )
    parallelize_module(model, mesh["tensor"], plan_of(kind))
    if data_parallel:
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    return mesh


def train(model, batches, device="cpu", around=nullcontext, **options):
    records = []
    options = {"directions": "all"} | options
    with StepProbe(model, sink=records.append, **options) as probe:
        for x, y in batches:
            with around():
                loss_of(model(x.to(device)), y.to(device)).backward()
            probe.step()
            model.zero_grad()
    return [asdict(record) for record in records]


def cases():
    """Name → (kind, what the network is, options)."""
    found = {}
    for kind in ("plain", "replicated", "features", "positions", "samples", "logits"):
        found[kind] = (kind, {}, {})
    for kind in ("plain", "replicated", "features", "logits"):
        found[f"{kind}, passing"] = (kind, {}, {"mode": "passing"})
    for kind in ("features", "positions"):
        for reduction in ("mean", "cls", "token"):
            found[f"{kind}, {reduction}"] = (kind, {}, {"reduction": reduction})
    parts = ("input of blocks.0", "blocks.*")
    found["local positions"] = ("local positions", {}, {"sharded": parts})
    # Of positions that do not go round torch itself makes no step: a view of its own fails.
    found["uneven features"] = ("features", {"width": 7}, {})
    found["uneven features, mean"] = ("features", {"width": 7}, {"reduction": "mean"})
    for kind in ("features", "positions"):
        found[f"{kind}, float32"] = (kind, {"dtype": torch.float32}, {})
    found["alone"] = ("features", {}, {"group": False})
    found["of taps inside"] = ("replicated", {}, {"taps": ["blocks.*.up", "blocks.*.norm"]})
    return found


def made(network):
    dtype = network.get("dtype", torch.float64)
    model = build(network.get("width", WIDTH), dtype)
    return model, [batch_of(step, dtype) for step in range(3)]


def all_cases(rank, device, names):
    found = {}
    for name in names:
        kind, network, options = cases()[name]
        model, batches = made(network)
        model.to(device)
        mesh = spread(model, kind, device)
        around = nullcontext
        if kind == "logits":
            from torch.distributed.tensor.parallel import loss_parallel as around
        if options.get("group") is False:
            options = options | {"tensor_group": mesh["tensor"].get_group()}
        try:
            found[name] = train(model, batches, device, around, **options)
        except Exception as error:
            raise RuntimeError(name) from error
    return found


@BOTH
def test_parts_are_the_whole(backend):
    # NCCL with one process for each GPU; gloo cannot scatter, and gathers in its place.
    found = spawned(all_cases, 2, list(cases()), backend=backend)
    for name, (_, network, options) in cases().items():
        model, batches = made(network)
        own = {k: v for k, v in options.items() if k not in ("sharded", "group")}
        expected = train(model, batches, **own)
        dtype = network.get("dtype", torch.float64)
        of_case = {rank: records[name] for rank, records in found.items()}
        try:
            assert_alike(of_case, expected, 2, TOLERANCE[dtype])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def on_mesh(rank, device, shape):
    found = {}
    for kind in ("plain", "positions"):
        model = build().to(device)
        mesh = spread(model, kind, device, shape, data_parallel=True)
        mine = mesh["data"].get_local_rank()
        batches = []
        for step in range(3):
            x, y = batch_of(step)
            size = len(x) // shape[0]
            batches.append((x[mine * size :][:size], y[mine * size :][:size]))
        found[kind] = train(model, batches, device)
    if min(shape) > 1:
        with pytest.raises(ValueError, match="group: expected all 2 ranks of each copy"):
            train(model, batches, device, group=mesh["data"].get_group())
    return found


@BOTH
@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2)])
def test_beside_data_parallelism(shape, backend):
    world = shape[0] * shape[1]
    if backend == "nccl" and torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    found = spawned(on_mesh, world, shape, backend=backend)
    expected = train(build(), [batch_of(step) for step in range(3)])
    for kind in ("plain", "positions"):
        of_kind = {rank: records[kind] for rank, records in found.items()}
        assert_alike(of_kind, expected, world, TOLERANCE[torch.float64])


def untouched_on_rank(rank, device):
    """Weights after three steps of SGD, with and without a probe."""
    ends = []
    for probed in (False, True):
        model = build(dtype=torch.float32)
        spread(model, "features", device)
        probe = StepProbe(model) if probed else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            x, y = batch_of(step, torch.float32)
            loss_of(model(x), y).backward()
            if probe is not None:
                probe.step()
            optimizer.step()
            optimizer.zero_grad()
        if probe is not None:
            probe.remove()
        ends.append([p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@needs_gloo
def test_the_training_is_bitwise_the_same():
    assert spawned(untouched_on_rank, 2) == {0: True, 1: True}


def without_waiting(rank, device, kind, steps):
    """Steps after the first few must not wait for the device; return how many were recorded."""
    records = []
    model = build(dtype=torch.float32).to(device)
    spread(model, kind, device)
    probe = StepProbe(model, sink=records.append, directions="all", ring=steps)
    x, y = (t.to(device) for t in batch_of(0, torch.float32))

    def step():
        loss_of(model(x), y).backward()
        probe.step()
        model.zero_grad()

    make_without_waiting(step, steps)
    probe.remove()
    return len(records)


@pytest.mark.parametrize("backend", [pytest.param("nccl", marks=TWO_GPUS)])
@pytest.mark.parametrize("kind", ["plain", "replicated", "features", "positions"])
def test_no_rank_waits_for_its_gpu(kind, backend):
    assert spawned(without_waiting, 2, kind, 8, backend=backend) == {0: 8, 1: 8}
