"""Several ranks against one that has the whole batch."""

import copy
import socket
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from networks import Branching
from ranks import BACKENDS, TWO_GPUS, assert_alike, make_without_waiting, needs_gloo, spawned
from test_step_probe import Overflowing
from torch import nn

from fadiag_fast import StepProbe
from fadiag_fast.training.exchange import Exchange
from fadiag_fast.training.sinks import JsonLines, read_jsonlines

# The exchange rounds each norm to float32 once, 6e-8; the networks sum in the same order.
FLOAT32_TOLERANCE = 1e-6
# On a GPU products of other batch sizes are summed in another order, over four layers.
GPU_TOLERANCE = 1e-5
BOTH = pytest.mark.parametrize("backend", BACKENDS)


def batch_of(samples, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 5, generator=generator)
    return x, torch.randint(0, 4, (samples,), generator=generator)


def build():
    torch.manual_seed(0)
    return Branching()


def wrap(model, how, device):
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "fully_shard":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def on_rank(rank, device, how, sizes, options):
    records = []
    model = wrap(build().to(device), how, device)
    probe = StepProbe(model, sink=records.append, **options)
    for step, of_rank in enumerate(sizes):
        x, y = (t.to(device) for t in batch_of(sum(of_rank), step))
        mine = slice(sum(of_rank[:rank]), sum(of_rank[: rank + 1]))
        nn.functional.cross_entropy(model(x[mine]), y[mine]).backward()
        probe.step()
        model.zero_grad()
    probe.remove()
    return [asdict(record) for record in records]


def without_waiting(rank, device, how, steps):
    """Steps after the first few must not wait for the device; return how many were recorded."""
    records = []
    model = wrap(build().to(device), how, device)
    probe = StepProbe(model, sink=records.append, directions="all", ring=steps)
    x, y = (t.to(device) for t in batch_of(8, rank))

    def step():
        nn.functional.cross_entropy(model(x), y).backward()
        probe.step()
        model.zero_grad()

    make_without_waiting(step, steps)
    probe.remove()
    return len(records)


def exchange_on_rank(rank, device):
    exchange = Exchange(dist.group.WORLD)
    found = []
    for sizes in ((4, 4), (4, 3), (4, None), (4, 4)):
        size = sizes[rank]
        direction = None if size is None else torch.ones(size)
        merged = exchange.start(torch.full((2, 3 + rank), float(rank)), [direction]).wait()
        found.append((merged.counts.tolist(), merged.samples.tolist(), merged.directions))
    return found


def run(how, sizes, backend="gloo", **options):
    """Every rank's records; ``sizes`` holds for each step each rank's number of samples."""
    return spawned(on_rank, len(sizes[0]), how, sizes, options, backend=backend)


def alone(sizes, weights=False, **options):
    """Records of one process; with ``weights`` each rank's loss is its own mean, as in DDP."""
    model, records = build(), []
    with StepProbe(model, sink=records.append, **options) as probe:
        for step, of_rank in enumerate(sizes):
            x, y = batch_of(sum(of_rank), step)
            each = nn.functional.cross_entropy(model(x), y, reduction="none")
            means = [part.mean() for part in each.split(list(of_rank))]
            (torch.stack(means).mean() if weights else each.mean()).backward()
            probe.step()
            model.zero_grad()
    return [asdict(record) for record in records]


def tolerance(backend):
    return FLOAT32_TOLERANCE if backend == "gloo" else GPU_TOLERANCE


@BOTH
@pytest.mark.parametrize("how", ["ddp", "fully_shard"])
def test_two_ranks_are_one_with_the_whole_batch(how, backend):
    sizes = [(6, 6)] * 4
    found = run(how, sizes, backend)
    assert_alike(found, alone(sizes), 2, tolerance(backend))
    assert found[0][-1]["num_directions"] == 3


@BOTH
def test_unequal_batches_are_weighted_as_they_are_trained(backend):
    sizes = [(8, 8), (8, 5), (3, 8)]
    found = run("ddp", sizes, backend, directions="all")
    expected = alone(sizes, weights=True, directions="all")
    assert_alike(found, expected, 2, tolerance(backend))
    # Each sample of the smaller batch pulls harder, and the record says so.
    plain = alone(sizes, directions="all")
    assert found[0][1]["grad_norms"] != pytest.approx(plain[1]["grad_norms"], rel=1e-3)


@pytest.mark.parametrize("backend", [pytest.param("nccl", marks=TWO_GPUS)])
@pytest.mark.parametrize("how", ["ddp", "fully_shard"])
def test_no_rank_waits_for_its_gpu(how, backend):
    assert spawned(without_waiting, 2, how, 8, backend=backend) == {0: 8, 1: 8}


@needs_gloo
def test_directions_that_do_not_fit_enter_as_nan_and_hang_nobody():
    found = spawned(exchange_on_rank, 2)
    for rank in (0, 1):
        for counts, samples, directions in found[rank]:
            assert counts == [3.0, 4.0]
            assert samples[0][:3] + samples[0][4:] == [0.0] * 3 + [1.0] * 4
            assert samples[0][3] != samples[0][3]  # the place that rank 0 does not fill
            assert len(directions[0]) == 4
        sums = [directions[0].tolist() for *_, directions in found[rank]]
        assert sums[0] == sums[3] == [2.0] * 4
        assert all(value != value for value in sums[1] + sums[2])


def scaled_on_rank(rank, device):
    torch.manual_seed(0)
    model = Overflowing()
    wrapped = nn.parallel.DistributedDataParallel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    records = []
    probe = StepProbe(wrapped, sink=records.append, scaler=scaler)
    for step in range(3):
        x, y = batch_of(4, step)
        model.overflows = step == 1 and rank == 1
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(wrapped(x), y)).backward()
        probe.step()
        scaler.step(optimizer)
        scaler.update()
    probe.remove()
    return [record.skipped for record in records], scaler.get_scale()


@needs_gloo
def test_what_one_rank_overflows_all_of_them_skip():
    assert spawned(scaled_on_rank, 2) == {rank: ([False, True, False], 512.0) for rank in (0, 1)}


@needs_gloo
def test_one_rank_that_is_told_to_stay_alone():
    found = run("plain", [(4, 8)], group=False)
    assert [found[rank][0]["num_samples"] for rank in (0, 1)] == [4, 8]
    assert found[0][0]["world_size"] == 1


class Stage(nn.Module):
    """Some layers of a pipeline, under names of their own or as every rank has them."""

    def __init__(self, name, depth, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.add_module(name, nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)]))
        self.layers = [self.get_submodule(name)]

    def forward(self, x):
        return self.layers[0](x)


def stage_by_hand(stage, x):
    """Return the median norms of all outputs, and of their gradients under the sum as a loss."""
    states = []
    for layer in stage.layers[0]:
        x = layer(x)
        states.append(x)
    gradients = torch.autograd.grad(x.sum(), states)
    return [
        [float(state.detach().norm(dim=1).median()) for state in of_kind]
        for of_kind in (states, gradients)
    ]


def train_stage(stage, x, **options):
    """Return what two steps of a stage record, and the warnings."""
    records = []
    name = next(name for name, _ in stage.named_children())
    taps = [f"{name}.{i}" for i in range(len(stage.layers[0]))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probe = StepProbe(stage, taps, sink=records.append, directions="all", **options)
        for _ in range(2):
            stage(x).sum().backward()
            probe.step()
        probe.remove()
    return records, [str(one.message) for one in caught if "StepProbe" in str(one.message)]


def stages_on_rank(rank, device, folder):
    """Ranks 0 and 2 hold the first stage, rank 1 the second one; what each finds wrong."""
    kind = rank % 2
    depth, width, samples = (3, 8, 4) if kind == 0 else (5, 6, 3)
    x = torch.ones(samples, width)
    found = {}
    named = Stage(f"stage{kind}", depth, width, seed=kind)
    records, said = train_stage(named, x)
    found["named"] = (*figures_against(records[1], named, x, 2 - kind), said)
    # Every rank calls its layers 0, 1, 2.
    unnamed = Stage("layers_here", 3, 8, seed=kind)
    x = torch.ones(4, 8)
    records, said = train_stage(unnamed, x)
    found["unnamed"] = (*figures_against(records[1], unnamed, x, 2 - kind), said)
    # A group that was named shares a batch, whatever its ranks hold.
    records, said = train_stage(unnamed, x, group=dist.group.WORLD)
    found["told"] = (records[1].world_size, records[1].num_samples, said)
    # Who writes.
    path = Path(folder) / "stages.jsonl"
    probe = StepProbe(named, example=torch.ones(samples, width), sink=path, alarms=False)
    named(torch.ones(samples, width)).sum().backward()
    probe.step()
    probe.remove()
    found["lone"] = lone_probe(rank)
    return found


def figures_against(record, stage, x, copies):
    hidden, gradients = stage_by_hand(stage, x)
    right = record.hidden_norms == pytest.approx(hidden, rel=1e-6)
    # Each rank has the average of its copies' gradients.
    right &= record.grad_norms == pytest.approx([g / copies for g in gradients], rel=1e-6)
    right &= record.stabilities == pytest.approx([1.0] * len(hidden), abs=1e-6)
    return right, record.world_size, record.num_samples


def lone_probe(rank):
    """Only rank 0 records its steps, as people have it with a logger; all ranks train on."""
    found, records = [], []
    for has_probe in (rank == 0, True):  # the others build none, or build one and do not step
        torch.manual_seed(rank)
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
        model = nn.parallel.DistributedDataParallel(model)
        probe = StepProbe(model, sink=records.append, alarms=False) if has_probe else None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                model(torch.randn(6, 4)).sum().backward()
                if rank == 0:
                    probe.step()
            if probe is not None:
                probe.remove()
        said = [str(one.message) for one in caught]
        found.append(sum("got none of rank 1, 2 within" in text for text in said))
    return found, [record.num_samples for record in records]


@needs_gloo
def test_ranks_that_hold_other_layers_and_ranks_without_a_probe(tmp_path):
    found = spawned(stages_on_rank, 3, str(tmp_path))
    for rank in range(3):
        copies, samples = (2, 8) if rank % 2 == 0 else (1, 3)
        assert found[rank]["named"] == (True, copies, samples, [])
        right, world, samples, said = found[rank]["unnamed"]
        assert (right, world, samples) == (True, copies, 4 * copies)
        assert sum("only those with the same weights are merged" in text for text in said) == 1
        assert found[rank]["told"] == (3, 12, [])
        assert found[rank]["lone"] == (([1, 1], [6] * 6) if rank == 0 else ([0, 0], []))
    # The first rank of each stage writes.
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "stages.jsonl",
        "stages.rank1.jsonl",
    ]
    layers = [
        read_jsonlines(tmp_path / name).records[0].layers
        for name in ("stages.jsonl", "stages.rank1.jsonl")
    ]
    assert [names[0].partition(".")[0] for names in layers] == ["stage0", "stage1"]


def write_on_rank(rank, device, folder):
    model = wrap(build(), "ddp", device)
    path = Path(folder) / "steps.jsonl"
    asked = JsonLines(Path(folder) / "asked.jsonl", every_rank=True)
    probe = StepProbe(model, sink=[path, asked, [str(path.with_name("list.jsonl"))]])
    own = StepProbe(model, sink=path.with_name("own.jsonl"), group=False)
    for step in range(3):
        x, y = batch_of(4, step)
        nn.functional.cross_entropy(model(x), y).backward()
        probe.step()
        own.step()
    probe.remove()
    own.remove()
    asked.close()


@needs_gloo
def test_one_rank_writes_a_file_unless_all_are_asked_to(tmp_path):
    spawned(write_on_rank, 2, str(tmp_path))
    steps = {
        file.name: [record.step for record in read_jsonlines(file).records]
        for file in tmp_path.iterdir()
    }
    names = ("steps.jsonl", "asked.jsonl", "asked.rank1.jsonl", "list.jsonl", "own.jsonl")
    assert steps == {name: [0, 1, 2] for name in names}


@needs_gloo
def test_a_sharded_model_on_one_rank():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        x, y = batch_of(12, 0)
        model, records = build(), []
        plain = copy.deepcopy(model)
        model = wrap(model, "fully_shard", torch.device("cpu"))
        with StepProbe(model, sink=records.append) as probe:
            nn.functional.cross_entropy(model(x), y).backward()
            probe.step()
        with StepProbe(plain, sink=records.append) as probe:
            nn.functional.cross_entropy(plain(x), y).backward()
            probe.step()
    finally:
        dist.destroy_process_group()
    assert records[0].grad_norms == pytest.approx(records[1].grad_norms, rel=1e-6)
    assert records[0].hidden_norms == pytest.approx(records[1].hidden_norms, rel=1e-6)
