"""Run a test's function on several ranks, each a process of its own."""

import pickle
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"
)
TWO_GPUS = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs for NCCL"),
]
BACKENDS = [pytest.param("gloo", marks=needs_gloo), pytest.param("nccl", marks=TWO_GPUS)]


def spawned(function, world, *args, backend="gloo"):
    """Return what ``function(rank, device, *args)`` returned on each of ``world`` ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(
        _on_rank, (world, port, backend, function, args, queue), nprocs=world, join=False
    )
    found = {}
    while len(found) < world:
        if queue.empty():
            context.join(timeout=0.05)  # raises what a rank raised
        else:
            rank, result = queue.get()
            found[rank] = pickle.loads(result)
    context.join(timeout=60)
    return found


def _on_rank(rank, world, port, backend, function, args, queue):
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    # Pickled here: a tensor sent as such is read from its process, which may have ended.
    queue.put((rank, pickle.dumps(function(rank, device, *args))))
    dist.barrier()
    dist.destroy_process_group()


def make_without_waiting(step, steps):
    """Make steps that, but for the first few, must not wait for the device."""
    for index in range(steps):
        # The first ones agree on sizes, and torch arranges its buckets and streams.
        torch.cuda.set_sync_debug_mode("error" if index >= 4 else "default")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def assert_alike(found, expected, ranks, rel, cosines=1e-5):
    """Compare each rank's records with those of one rank that has everything."""
    assert sorted(found) == list(range(ranks))
    for records in found.values():
        assert [r["step"] for r in records] == [r["step"] for r in expected]
        for got, wanted in zip(records, expected, strict=True):
            assert got["layers"] == wanted["layers"]
            assert got["num_samples"] == wanted["num_samples"]
            assert got["world_size"] == ranks
            for field in ("hidden_norms", "rms_norms", "grad_norms"):
                assert got[field] == pytest.approx(wanted[field], rel=rel), field
            for field in ("credit_gains", "output_grad_norm"):
                assert got[field] == pytest.approx(wanted[field], rel=2 * rel), field
            for field in ("stabilities", "average_cosines"):
                assert got[field] == pytest.approx(wanted[field], abs=cosines, nan_ok=True), field
