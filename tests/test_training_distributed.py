"""Several ranks against one that has the whole batch."""

import copy
import socket
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
from networks import Branching
from ranks import BACKENDS, TWO_GPUS, assert_alike, make_without_waiting, needs_gloo, spawned
from test_training_probe import Overflowing
from torch import nn

from fadiag_fast import StepProbe
from fadiag_fast.training.distributed import Exchange

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
