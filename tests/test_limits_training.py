"""One test for each row of the README's table of training steps: what happens, and it is said."""

import copy
import math
import pickle
import re
import threading
import warnings
from pathlib import Path

import pytest
import test_training_distributed as distributed
import test_training_loops as loops
import test_training_observed as observed
import test_training_tensor_parallel as tensor_parallel
import torch
from ranks import needs_gloo, spawned
from torch import nn
from torch.utils.checkpoint import checkpoint

from fadiag_fast import StepProbe
from fadiag_fast.training.alarms import Alarms
from fadiag_fast.training.passes import MOST_PARTS
from fadiag_fast.training.ring import Ring
from fadiag_fast.training.sinks import SinkWarning, guard

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
ROWS = set()
BATCH = 8


def row(context):
    """Say which row of the table a test is for."""
    ROWS.add(context)
    return lambda test: test


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, h):
        return h + torch.tanh(self.layer(h))


class Net(nn.Module):
    """A stem, blocks that return the next state, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(6, 4)
        self.depth = 3
        self.recompute = False

    def forward(self, x):
        h = self.stem(x)
        for block in self.blocks[: self.depth]:
            h = checkpoint(block, h, use_reentrant=False) if self.recompute else block(h)
        return self.head(h)


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batch_of(size=BATCH):
    return torch.randn(size, 5), torch.randint(0, 4, (size,))


def loss_of(call, batch=None, factor=1.0):
    x, y = batch or batch_of()
    return factor * nn.functional.cross_entropy(call(x), y)


def probed(model=None, **options):
    model = Net() if model is None else model
    records = []
    return model, StepProbe(model, sink=records.append, **options), records


def plain_record(model, batch):
    """The record of one ordinary step."""
    records = []
    with StepProbe(model, sink=records.append) as probe:
        loss_of(model, batch).backward()
        probe.step()
    model.zero_grad()
    return records[0]


def assert_same(record, expected):
    for name in ("hidden_norms", "grad_norms", "credit_gains"):
        assert getattr(record, name) == pytest.approx(getattr(expected, name), rel=1e-5), name


@row("`step()` without a backward pass")
def test_no_backward():
    model, probe, records = probed()
    with pytest.raises(RuntimeError, match="expected a backward pass through the model"):
        probe.step()
    loss_of(model.eval()).backward()
    with pytest.raises(RuntimeError, match=r"the model is in eval mode.* call model.train\(\)$"):
        probe.step()
    model.train()
    batch = batch_of()
    loss_of(model, batch).backward()
    probe.step()
    probe.flush()
    (record,) = records
    assert_same(record, plain_record(model, batch))


@row("gradient accumulation, several forwards, several backwards through one graph")
def test_micro_batches():
    model, probe, records = probed()
    first, second = loss_of(model), loss_of(model)
    first.backward(retain_graph=True)
    second.backward()
    first.backward()
    probe.step()
    probe.flush()
    assert (records[0].micro_batches, records[0].num_samples) == (3, 3 * BATCH)


@row(
    "`torch.autograd.grad` within a step: a saliency map, an attack, a gradient penalty, an inner "
    "loop, a product with the Hessian"
)
def test_inner_gradients():
    model, probe, records = probed()
    x, y = batch_of()
    seen = x.clone().requires_grad_()
    torch.autograd.grad(model(seen).sum(), seen)  # a saliency map
    loss_of(model, (x, y)).backward()
    probe.step()
    probe.flush()
    assert records[0].micro_batches == 1
    assert_same(records[0], plain_record(model, (x, y)))


@row("a forward pass that is differentiated with `create_graph=True`, and the loss after it")
def test_second_order():
    model, probe, records = probed()
    x, y = batch_of()
    seen = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(seen).square().sum(), seen, create_graph=True)
    (loss_of(model, (x, y)) + slope.square().sum()).backward()
    probe.step()
    probe.flush()
    assert records[0].micro_batches == 1
    assert_same(records[0], plain_record(model, (x, y)))


@row("a backward pass whose gradients are cleared before an optimiser uses them")
def test_cleared_gradients():
    model, probe, records = probed()
    batch = batch_of()
    loss_of(model).backward()
    model.zero_grad()
    loss_of(model, batch).backward()
    probe.step()
    probe.flush()
    assert records[0].micro_batches == 1
    assert_same(records[0], plain_record(model, batch))


@row("another network's loss through this one, and no `zero_grad()` after it")
@pytest.mark.parametrize("discard", [True, False])
def test_another_networks_loss(discard):
    model, probe, records = probed()
    batch = batch_of()
    loss_of(model).backward()
    if discard:
        probe.discard()
    loss_of(model, batch).backward()
    probe.step()
    probe.flush()
    assert records[0].micro_batches == (1 if discard else 2)


@row("backward passes, but never a `step()`")
def test_never_a_step(monkeypatch):
    monkeypatch.setattr("fadiag_fast.training.passes.MOST_PARTS", 10)
    assert f"after {MOST_PARTS:,} one warning" in README
    model, probe, records = probed()

    def train():
        for _ in range(45):
            loss_of(model).backward()
            assert len(probe._parts) <= 10

    with pytest.warns(RuntimeWarning, match=r"expected step\(\) after each.* got 10 ba") as caught:
        train()
    assert len(caught) == 1
    probe.step()
    probe.flush()
    assert records[0].micro_batches <= 11


@row("a sample that is NaN")
def test_a_sample_of_nan():
    alarms = Alarms(actions=())
    model, probe, records = probed(alarms=alarms)
    for step in range(4):
        x, y = batch_of()
        if step == 2:
            x[2] = float("nan")
        loss_of(model, (x, y)).backward()
        probe.step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        model.zero_grad()
    probe.flush()
    assert all(norm == norm for norm in records[2].grad_norms)
    assert [event.step for event in alarms.events] == [3]


@row("several probes on one model")
def test_several_probes():
    model, probe, records = probed()
    _, second, others = probed(model, window=2)
    batch = batch_of()
    loss_of(model, batch).backward()
    for one in (probe, second):
        one.step()
        one.remove()
    assert_same(records[0], plain_record(model, batch))
    assert_same(others[0], records[0])


@row("a forward in eval mode, without gradients or never differentiated")
def test_other_forwards():
    model, probe, records = probed()
    batch = batch_of()
    loss_of(model, batch).backward()
    loss_of(model)
    with torch.no_grad():
        loss_of(model)
    model.eval()
    loss_of(model).backward()
    model.train()
    probe.step()
    probe.flush()
    assert records[0].num_samples == BATCH
    assert_same(records[0], plain_record(model, batch))


@row("a state that a step does not reach")
def test_unreached():
    model, probe, records = probed()
    for depth in (3, 2):
        model.depth = depth
        loss_of(model).backward()
        probe.step()
    probe.flush()
    whole, short = records
    assert whole.unreached == ()
    assert short.unreached == whole.layers[-1:]
    assert short.hidden_norms[-1] != short.hidden_norms[-1]
    assert short.grad_norms[:-1] == pytest.approx(whole.grad_norms[:-1], rel=10)


@row("an exception between forward and `step()`")
def test_exception():
    model, probe, records = probed()
    batch = batch_of()

    def broken(grad):
        raise RuntimeError("in the backward pass")

    loss = loss_of(model)
    handle = model.blocks[0].layer.weight.register_hook(broken)
    with pytest.raises(RuntimeError, match="in the backward pass"):
        loss.backward()
    handle.remove()
    model.zero_grad()
    loss_of(model).backward()
    probe.discard()
    loss_of(model, batch).backward()
    probe.step()
    probe.flush()
    assert records[0].micro_batches == 1
    assert_same(records[0], plain_record(model, batch))


@row("activation checkpointing")
def test_checkpointing():
    model, probe, records = probed()
    batch = batch_of()
    model.recompute = True
    loss_of(model, batch).backward()
    probe.step()
    probe.flush()
    model.recompute = False
    assert records[0].micro_batches == 1
    assert_same(records[0], plain_record(model, batch))


@row("a `GradScaler`")
def test_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, probe, records = probed(scaler=scaler)
    batch = batch_of()
    for factor in (1.0, float("inf")):
        model.zero_grad()
        scaler.scale(loss_of(model, batch, factor)).backward()
        probe.step()
    probe.flush()
    assert [record.skipped for record in records] == [False, True]
    assert records[0].loss_scale == 1024
    assert_same(records[0], plain_record(model, batch))


@row("a model moved to another dtype or device")
def test_moved():
    model, probe, records = probed()
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        x, y = batch_of()
        loss_of(model, (x.to(dtype), y)).backward()
        probe.step()
    probe.flush()
    assert [record.num_directions for record in records] == [0, 0]
    assert all(norm > 0 for norm in records[1].grad_norms)


@row("a model copied or pickled")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    model, probe, records = probed()
    loss_of(model).backward()
    loss_of(copied(model)).backward()
    probe.step()
    probe.flush()
    assert records[0].micro_batches == 1
    assert b"fadiag_fast" not in pickle.dumps(model)
    assert not any("__reduce_ex__" in vars(m._forward_hooks) for m in copied(model).modules())
    probe.remove()
    assert not any("__reduce_ex__" in vars(m._forward_hooks) for m in model.modules())


@row("a sink that raises or blocks")
def test_broken_sinks():
    released = threading.Event()

    def broken(record):
        raise OSError("disk full")

    def blocked(record):
        released.wait(60)

    model, records = Net(), []
    slow = guard(blocked, queue_size=1, timeout=0.01)
    probe = StepProbe(model, sink=[broken, slow, records.append])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            loss_of(model).backward()
            probe.step()
        probe.flush()
    said = [str(one.message) for one in caught if issubclass(one.category, SinkWarning)]
    assert len(records) == 5
    assert sum("disk full" in text for text in said) == 1
    assert sum("blocked" in text for text in said) >= 1
    released.set()


@row("more recorded steps on their way than `ring`")
def test_ring(monkeypatch):
    class Late:  # of a device that never hurries
        sent = arrived = 0

        def record(self):
            self.number, Late.sent = Late.sent, Late.sent + 1

        def query(self):
            return self.number < Late.arrived

        def synchronize(self):
            Late.arrived = max(Late.arrived, self.number + 1)

    monkeypatch.setattr(Ring, "_new_event", lambda self: Late())
    model, probe, records = probed(ring=2)

    def train():
        for _ in range(7):
            loss_of(model).backward()
            probe.step()

    with pytest.warns(RuntimeWarning, match="give a larger ring=") as caught:
        train()
    assert len(caught) == 1
    assert len(records) == 5
    probe.flush()
    assert [record.step for record in records] == list(range(7))


@row("a probe built after the first compiled call")
def test_too_late():
    model = Net()
    compiled = torch.compile(model, backend="aot_eager")
    loss_of(compiled).backward()
    probe = StepProbe(model, example=batch_of()[0])
    loss_of(compiled).backward()
    with pytest.raises(RuntimeError, match="built before its first compiled call"):
        probe.step()


@row("another network of the same class, compiled before without a probe")
def test_compiled_before():
    loss_of(torch.compile(Net(), backend="aot_eager")).backward()
    model, probe, records = probed(example=batch_of()[0])
    compiled = torch.compile(model, backend="aot_eager")
    loss_of(compiled).backward()
    with pytest.raises(RuntimeError, match="built before its first compiled call"):
        probe.step()
    torch.compiler.reset()
    loss_of(compiled).backward()
    probe.step()
    probe.flush()
    assert records[0].unreached == ()


@row("a network compiled as one graph before its taps are known")
def test_unknown_taps():
    model, _probe, _ = probed()
    # The compiler's own error, which has the probe's words in it.
    with pytest.raises(Exception, match="give example="):
        torch.compile(model, backend="aot_eager", fullgraph=True)(batch_of()[0])
    torch.compiler.reset()
    compiled = torch.compile(Net(), backend="aot_eager")
    _, probe, records = probed(compiled)
    loss_of(compiled).backward()
    probe.step()
    probe.flush()
    assert records[0].unreached == ()


@row("compiled: a batch with more samples than the first one")
def test_larger_batch():
    large = batch_of(BATCH + 1)
    refused_or_unseen(Net(), large, "give max_samples=")
    model, probe, records = probed(example=batch_of()[0], max_samples=BATCH + 1)
    loss_of(torch.compile(model, backend="aot_eager"), large).backward()
    probe.step()
    probe.flush()
    assert records[0].num_samples == BATCH + 1


@row("compiled: a state that no module returns")
def test_nameless_state():
    class Scaled(Net):
        def forward(self, x):
            h = self.stem(x)
            for block in self.blocks:
                h = 0.5 * h + 0.5 * block(h)
            return self.head(h)

    message = "input of head: expected a state that a module returns"
    refused_or_unseen(Scaled(), batch_of(), message, taps="head:input")


@row("compiled: several forward passes before one backward pass")
def test_two_passes_before_a_backward_pass():
    x, y = batch_of()

    def both(run):
        nn.functional.cross_entropy(run(x) + run(x + 0.1), y).backward()

    model, probe, _ = probed(example=x)
    both(torch.compile(model, backend="aot_eager"))
    with pytest.raises(RuntimeError, match="one forward pass of the compiled model"):
        probe.step()
    probe.remove()
    torch.compiler.reset()
    model, probe, records = probed(example=x, alarms=False)
    compiled = torch.compile(model, backend="aot_eager")

    def three_steps():
        for go in (loss_backward, both, loss_backward):
            go(compiled)
            probe.step()
        probe.flush()

    with pytest.warns(RuntimeWarning, match="figures of such steps are NaN"):
        three_steps()
    known = [[math.isfinite(v) for v in (*r.hidden_norms, *r.grad_norms)] for r in records]
    assert [set(k) for k in known] == [{True}, {False}, {True}]


def loss_backward(run):
    loss_of(run).backward()


@row("compiled: a head that is called for some of the samples each")
@pytest.mark.parametrize("pieces", [observed.by_samples, observed.uneven])
def test_a_head_that_is_called_for_some_of_the_samples(pieces):
    ids = observed.ids_of()
    model, probe, records = probed(observed.Tokens(pieces), example=ids)
    loss = torch.compile(model, backend="aot_eager")(ids, ids)
    loss.backward()
    with pytest.warns(RuntimeWarning, match="calls for some of the samples each"):
        probe.step()
    probe.remove()
    assert records[0].gain_reference == probe.taps.labels[-1]
    assert records[0].credit_gains[-1] == 1.0
    _, again, eager = probed(model, example=ids)
    model(ids, ids).backward()
    again.step()
    again.remove()
    assert records[0].grad_norms == pytest.approx(eager[0].grad_norms, rel=1e-4)


def refused_or_unseen(model, batch, message, **options):
    """Say that an error names the cause in one graph, and that step() raises without."""
    for fullgraph, error in ((True, message), (False, "expected a backward pass through")):
        torch.compiler.reset()
        _, probe, _ = probed(model, example=batch_of()[0], **options)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)

        def step(compiled=compiled, probe=probe):
            loss_of(compiled, batch).backward()
            probe.step()

        with pytest.raises(RuntimeError, match=error):
            step()
        probe.remove()
    torch.compiler.reset()


def refusals(rank, device):
    batches = [tensor_parallel.batch_of(0)]
    found = {}

    def attempt(name, kind, options, compiled=False):
        model = tensor_parallel.build()
        mesh = tensor_parallel.spread(model, kind, device)
        options = {k: v(mesh) if callable(v) else v for k, v in options.items()}
        if compiled:
            for block in model.blocks:
                block.compile(backend="eager")
        try:
            tensor_parallel.train(model, batches, device, **options)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    attempt("local part", "plain", {"taps": ["blocks.*.up"]})
    attempt("local positions", "local positions", {})
    attempt("no part", "plain", {"sharded": "blocks.*"})
    attempt("unknown", "plain", {"sharded": "layers.*"})
    attempt("reduction", "local positions", {"sharded": "blocks.*", "reduction": "mean"})
    attempt("told that it is whole", "features", {"tensor_group": False})
    attempt("no group", "features", {"tensor_group": 2})
    attempt("compiled", "plain", {}, compiled=True)
    return found


@row("tensor parallelism: a plain tensor that is a part of a state, or a partial sum")
@row("compiled: tapped modules under tensor parallelism")
@needs_gloo
def test_parts_of_states():
    for found in spawned(refusals, 2).values():
        assert "TapError: StepProbe: blocks.0.up: expected a whole state" in found["local part"]
        assert "sharded=" in found["local positions"]
        assert "got the same values on all of them" in found["no part"]
        assert "expected names of observed states" in found["unknown"]
        assert "ValueError: StepProbe: sharded: expected the reduction" in found["reduction"]
        assert "got a DTensor on" in found["told that it is whole"]
        assert "TypeError: StepProbe: tensor_group" in found["no group"]
        assert "to run eagerly" in found["compiled"]


@row("`remove()`")
def test_removed():
    model, probe, records = probed()
    loss_of(model).backward()
    probe.step()
    probe.remove()
    assert len(records) == 1
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model).backward()
    assert len(records) == 1


# Those of whole loops, and of several ranks, stand with their kind.
ELSEWHERE = {
    "several optimisers, each with a backward pass of its own": loops.test_two_optimisers,
    "an optimiser step that is left out": loops.test_steps_that_are_skipped_are_counted,
    "`torch.func` transforms; export, tracing and fake tensors": (
        loops.test_a_pass_that_is_no_training
    ),
    "a gradient that a hook of yours writes into": (
        loops.test_a_hook_that_scales_a_gradient_in_place
    ),
    "DataParallel": loops.test_replicas_of_data_parallel_are_refused,
    "pipeline stages": distributed.test_ranks_that_hold_other_layers_and_ranks_without_a_probe,
    "a probe, or its `step()`, on some ranks of a group only": (
        distributed.test_ranks_that_hold_other_layers_and_ranks_without_a_probe
    ),
}
for context, test in ELSEWHERE.items():
    row(context)(test)


def test_every_row_has_its_test():
    section = README.partition("\n## Limits\n")[2].partition("\n## ")[0]
    table = section.partition("| training step |")[2].partition("\n\n")[0]
    contexts = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
    assert set(contexts) - {"---"} == ROWS
