"""Training loops as strangers write them: the training goes on, and the figures are the network's.

The oracle is autograd by hand: states from the modules themselves, gradients from
``torch.autograd.grad``.
"""

import collections
import copy
import dataclasses
import gc
import io
import json
import math
import pickle
import subprocess
import sys
import warnings
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fadiag_fast import StepProbe
from fadiag_fast.capture.points import TapError
from fadiag_fast.training.alarms import Alarm, AlarmPolicy, Alarms, AllClear
from fadiag_fast.training.sinks import read_jsonlines
from fadiag_fast.training.watch import Tail

F = nn.functional


def chain(width=4, depth=4):
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])


def batch_of(samples=6, width=4):
    torch.manual_seed(1)
    return torch.randn(samples, width), torch.randint(0, width, (samples,))


def norms_by_hand(model, x, y, names):
    """Return the median norms of states and gradients at the outputs of modules."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.__setitem__(name, out)
        )
        for name in names
    ]
    loss = F.cross_entropy(model(x), y)
    for handle in handles:
        handle.remove()
    states = [seen[name] for name in names]
    grads = torch.autograd.grad(loss, states)
    return (
        [float(state.norm(dim=1).median()) for state in states],
        [float(one.norm(dim=1).median()) for one in grads],
    )


def probed(model, **options):
    records = []
    names = [f"{i}" for i in range(len(model) - 1)]
    probe = StepProbe(model, names, sink=records.append, alarms=False, **options)
    return probe, records, names


def check(records, model, x, y, names):
    hidden, gradients = norms_by_hand(model, x, y, names)
    probe_hidden, probe_gradients = records[-1].hidden_norms, records[-1].grad_norms
    assert probe_hidden == pytest.approx(hidden, rel=1e-5)
    assert probe_gradients == pytest.approx(gradients, rel=1e-5)
    assert records[-1].num_samples == len(x)


# ---- function transforms


def one_loss(model):
    return lambda weights, x, y: F.cross_entropy(
        functional_call(model, weights, (x[None],)), y[None]
    )


def per_sample_gradients(model, x, y):
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return vmap(grad(one_loss(model)), in_dims=(None, 0, 0))(weights, x, y)


def input_jacobian(model, x, y):
    return vmap(jacrev(model))(x)


def tangent(model, x, y):
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))


def batched_gradients(model, x, y):
    # An ordinary forward, its backward in a batch of directions.
    out = model(x)
    rows = torch.eye(4)[:, None].expand(4, 6, 4)
    return torch.autograd.grad(out, list(model.parameters()), rows, is_grads_batched=True)


@pytest.mark.parametrize(
    "transform", [per_sample_gradients, input_jacobian, tangent, batched_gradients]
)
@pytest.mark.parametrize("example", [True, False])
def test_function_transforms_over_a_probed_model(transform, example):
    model = chain()
    x, y = batch_of()
    expected = transform(copy.deepcopy(model), x, y)
    probe, records, names = probed(model, example=x if example else None)
    found = transform(model, x, y)
    same = torch.utils._pytree.tree_map(torch.equal, found, expected)
    assert all(torch.utils._pytree.tree_leaves(same))
    F.cross_entropy(model(x), y).backward()
    transform(model, x, y)
    probe.step()
    probe.remove()
    assert records[0].micro_batches == 1
    check(records, model, x, y, names)


class Mapped(nn.Sequential):
    def forward(self, x):
        return self[3](self[2](vmap(self[1])(self[0](x))))


def test_a_model_that_maps_a_module_over_its_samples():
    model = Mapped(*chain())
    x, y = batch_of()
    with pytest.raises(TapError, match=r"of 1: .*inside of vmap"):
        StepProbe(model, ["0", "1", "2"], example=x)
    records = []
    probe = StepProbe(model, ["0", "2"], example=x, sink=records.append, alarms=False)
    F.cross_entropy(model(x), y).backward()
    probe.step()
    probe.remove()
    check(records, model, x, y, ["0", "2"])


def test_a_loop_of_function_transforms_is_told_why_nothing_arrives():
    model = chain()
    x, y = batch_of()
    for example in (None, x):
        probe, _, _ = probed(model, example=example)
        weights = dict(model.named_parameters())
        grad(lambda w: F.cross_entropy(functional_call(model, w, (x,)), y))(weights)
        with pytest.raises(RuntimeError, match=r"torch\.func\.grad, vmap and others"):
            probe.step()
        probe.remove()


# ---- other passes through the model


def exported(model, x, y):
    program = torch.export.export(model, (x,))
    assert not program.constants
    assert {str(node.target) for node in program.graph.nodes if node.op == "call_function"} == {
        "aten.linear.default"
    }


def strictly_exported(model, x, y):
    program = torch.export.export(model, (x,), strict=True)
    assert not program.constants


def scripted(model, x, y):
    assert torch.equal(torch.jit.trace(model, (x,))(x), model(x).detach())


def made_into_a_graph(model, x, y):
    program = make_fx(model)(x)
    assert sum(node.op == "call_function" for node in program.graph.nodes) <= 2 * len(model)


def without_data(model, x, y):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        F.cross_entropy(model(mode.from_tensor(x)), mode.from_tensor(y)).backward()
    model.zero_grad()


def hessian_product(model, x, y):
    torch.autograd.functional.hvp(lambda a: F.cross_entropy(model(a), y), x, torch.ones_like(x))


def jacobians(model, x, y):
    torch.autograd.functional.jacobian(model, x, vectorize=True)
    torch.autograd.functional.jacobian(model, x, vectorize=True, strategy="forward-mode")


def interrupted(model, x, y):
    def stop(*_):
        raise KeyboardInterrupt

    handle = model[2].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()


def averaged(model, x, y):
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    F.cross_entropy(average(x), y).backward()


OTHERS = [exported, strictly_exported, scripted, made_into_a_graph, without_data]
OTHERS += [hessian_product, jacobians, interrupted, averaged]


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("other", OTHERS)
def test_a_pass_that_is_no_training(other, example):
    model = chain()
    x, y = batch_of()
    probe, records, names = probed(model, example=x if example else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other(model, x, y)
    probe.discard()  # two of them end with a backward pass of their own
    F.cross_entropy(model(x), y).backward()
    probe.step()
    probe.remove()
    assert records[0].micro_batches == 1
    check(records, model, x, y, names)


def test_closures_and_optimisers_of_two_passes_a_step():
    model = chain()
    x, y = batch_of()
    probe, records, names = probed(model)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    passes = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        passes.append(1)
        return loss

    optimizer.step(closure)
    probe.step()
    assert records[0].micro_batches == len(passes) > 1
    # Sharpness-aware: the second pass is at weights beside the step's own, and is left out.
    F.cross_entropy(model(x), y).backward()
    probe.step()
    check(records, model, x, y, names)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(p.grad, alpha=0.05)
    F.cross_entropy(model(x), y).backward()
    probe.discard()
    F.cross_entropy(model(x), y).backward(create_graph=True)
    probe.step()
    probe.remove()
    assert [record.micro_batches for record in records[1:]] == [1, 1]
    check(records, model, x, y, names)


def test_a_cell_that_is_run_again_probes_the_same_model_once_more():
    model = chain()
    x, y = batch_of()
    found = []
    for _ in range(2):
        probe, records, names = probed(model)
        found.append(records)
        for _ in range(2):
            F.cross_entropy(model(x), y).backward()
            probe.step()
    probe.remove()
    check(found[1], model, x, y, names)
    assert [len(records) for records in found] == [2, 2]


@pytest.mark.parametrize("together", [False, True])
def test_two_optimisers(together):
    """A critic that another network is trained through."""
    critic, actor = chain(), chain()
    x, y = batch_of()
    probe, records, names = probed(critic)
    for _ in range(2):
        F.cross_entropy(critic(actor(x)), y).backward()
        if together:
            probe.set_aside()  # the actor's optimiser steps, and then the critic's
        else:
            probe.set_aside()
            F.cross_entropy(critic(x), y).backward()
        probe.step()
    probe.remove()
    assert [record.micro_batches for record in records] == [1, 1]
    check(records, critic, actor(x).detach() if together else x, y, names)


def test_steps_that_are_skipped_are_counted():
    model = chain()
    x, y = batch_of()
    probe, records, _ = probed(model)
    for index in range(4):
        F.cross_entropy(model(x), y).backward()
        if index == 1:
            probe.skip()
        else:
            probe.step()
    probe.remove()
    assert [(record.step, record.micro_batches) for record in records] == [(0, 1), (2, 1), (3, 1)]


# ---- hooks of the user's


def hook_on_output(module, args, out):
    out.register_hook(lambda gradient: None)


def hook_on_node(module, args, out):
    out.grad_fn.register_hook(lambda *gradients: None)


def retain(module, args, out):
    out.retain_grad()


def insist(module, args, out):
    assert out.requires_grad


@pytest.mark.parametrize("hook", [hook_on_output, hook_on_node, retain, insist])
def test_forward_hooks_that_need_a_graph(hook):
    model = chain()
    x, y = batch_of()
    model[1].register_forward_hook(hook)
    probe, records, names = probed(model)
    F.cross_entropy(model(x), y).backward()
    probe.step()
    probe.remove()
    check(records, model, x, y, names)


def test_an_error_in_the_first_pass_is_the_models_own():
    model = chain()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        StepProbe(model, example=torch.randn(6, 5))


# ---- gradients and states that are written into


@pytest.mark.parametrize("mode", ["together", "passing"])
@pytest.mark.parametrize("write", ["mul_", "data"])
def test_a_hook_that_scales_a_gradient_in_place(mode, write):
    model = chain()
    x, y = batch_of()
    _hidden, gradients = norms_by_hand(model, x, y, ["0", "1", "2"])
    probe, records, _names = probed(model, example=x, mode=mode)

    def scale(gradient):
        (gradient if write == "mul_" else gradient.data).mul_(0.01)

    def scaled(module, args, out):
        if out.requires_grad:
            out.register_hook(scale)

    handle = model[2].register_forward_hook(scaled)
    for _ in range(3):
        F.cross_entropy(model(x), y).backward()
        probe.step()
    handle.remove()
    probe.remove()
    for record in records:
        # As autograd hands it to the state; what lies before has it scaled.
        assert record.grad_norms[2] == pytest.approx(gradients[2], rel=1e-5)
        assert record.grad_norms[1] == pytest.approx(0.01 * gradients[1], rel=1e-5)


def test_a_gradient_that_is_scaled_in_place_later_on_is_never_a_wrong_figure():
    model = chain()
    x, y = batch_of()
    probe, records, _names = probed(model, example=x)
    F.cross_entropy(model(x), y).backward()
    probe.step()
    model[2].register_forward_hook(
        lambda module, args, out: out.register_hook(lambda g: g.mul_(0.01)) and None
    )
    for _ in range(2):
        F.cross_entropy(model(x), y).backward()
        probe.step()
    probe.remove()
    first, second, third = (record.grad_norms[2] for record in records)
    assert second != second  # NaN: it was overwritten before it was read
    assert third == pytest.approx(first, rel=1e-6)


class Queries(nn.Module):
    """Learned queries, the first state, are a view of a parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.queries = nn.Embedding(6, 4)
        self.first, self.second, self.head = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.head(self.second(self.first(self.queries.weight.view(6, 4)) + x))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("mode", ["together", "passing"])
def test_optimisers_that_step_inside_of_the_backward_pass(optimizer, mode):
    def train(model, probe=None):
        optimizers = {p: optimizer([p], 0.1) for p in model.parameters()}

        def update(p):
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(update)
        for _ in range(3):
            norms.append(float(model.queries.weight.norm(dim=1).median()))
            F.cross_entropy(model(x), y).backward()
            if probe is not None:
                probe.step()
        return [p.detach().clone() for p in model.parameters()]

    x, y = batch_of()
    norms = []
    expected = train(Queries())
    model, records = Queries(), []
    probe = StepProbe(
        model,
        ["first:input", "second"],
        example=x,
        sink=records.append,
        alarms=False,
        mode=mode,
    )
    norms.clear()
    found = train(model, probe)
    probe.remove()
    assert all(map(torch.equal, found, expected))
    assert [record.hidden_norms[0] for record in records] == pytest.approx(norms, rel=1e-6)


# ---- copies, files and configurations


ALLOWED = [nn.Sequential, nn.Linear, nn.Tanh]


def weights_only(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    with torch.serialization.safe_globals(ALLOWED):
        return torch.load(file, weights_only=True)


def test_a_probed_model_is_saved_without_its_probe():
    model = chain()
    x, y = batch_of()
    calls = []
    model[1].register_forward_hook(print_shape)
    own = model[2].register_forward_pre_hook(lambda *_: calls.append(1))
    own.remove()
    probe, _records, _ = probed(model, example=x)
    F.cross_entropy(model(x), y).backward()
    probe.step()
    with torch.serialization.safe_globals([print_shape]):
        loaded = weights_only(model)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded] == [0, 1, 0, 0]
    tables = ("_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
    assert not any(getattr(m, table) for m in loaded.modules() for table in tables)
    assert torch.equal(loaded(x), model(x))
    probe.remove()


def print_shape(module, args, out):
    """A hook of the user's, which a file keeps."""


def test_hooks_of_the_user_are_copied_as_ever():
    model, calls = chain(), []
    model[1].register_forward_hook(lambda *_: calls.append("output"))
    probe, _, _ = probed(model, example=batch_of()[0])
    late = model[2].register_forward_pre_hook(lambda *_: calls.append("input"))
    copy.deepcopy(model)(batch_of()[0])
    assert calls[-2:] == ["output", "input"]
    late.remove()
    probe.remove()
    assert len(model[1]._forward_hooks) == 1
    assert not model[2]._forward_pre_hooks


@dataclasses.dataclass
class Config:
    lr: float
    probe: object


def test_a_probe_in_a_configuration_or_a_model_does_not_stand_in_the_way():
    model = chain()
    x, y = batch_of()
    probe, records, _ = probed(model, example=x)
    config = Config(0.1, probe)
    assert dataclasses.asdict(config) == {"lr": 0.1, "probe": probe}
    assert copy.deepcopy(config).probe is probe
    assert copy.copy(probe) is probe
    assert pickle.loads(pickle.dumps(config)).probe == OrderedDict()
    assert json.loads(json.dumps(dataclasses.asdict(config), default=str))["lr"] == 0.1
    assert weights_only({"args": vars(SimpleNamespace(probe=probe))}) == {
        "args": {"probe": OrderedDict()}
    }
    model.probe = probe
    twin = copy.deepcopy(model)
    assert b"fadiag_fast" not in pickle.dumps(model)
    F.cross_entropy(twin(x), y).backward()  # a teacher: no part of the step
    F.cross_entropy(model(x), y).backward()
    model.probe.step()
    probe.remove()
    assert [record.micro_batches for record in records] == [1]


def test_replicas_of_data_parallel_are_refused():
    model = chain()
    x, _ = batch_of()
    probe, _, _ = probed(model, example=x)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        replica(x)
    probe.remove()


# ---- the file of a run


def test_alarms_and_their_ends_are_in_the_file(tmp_path):
    path = tmp_path / "steps.jsonl"
    model = chain()
    x, y = batch_of()
    alarms = Alarms(AlarmPolicy(warmup=0, clears=2, among=1, fires=1), actions=())
    probe = StepProbe(model, ["0", "1", "2"], sink=path, alarms=alarms, example=x)
    for step in range(6):
        with torch.no_grad():
            model[1].weight.mul_({2: 1e4, 3: 1e-4}.get(step, 1.0))
        F.cross_entropy(model(x), y).backward()
        probe.step()
    probe.remove()
    log = read_jsonlines(path)
    assert [type(event) for event in alarms.events] == [Alarm, AllClear]
    assert log.events == tuple(alarms.events)
    assert len(log.records) == 6
    tail = Tail(path)
    tail.read()
    # What the run says counts: a watcher with other limits does not judge it again.
    assert tail.own
    assert tail.events == alarms.events


def test_the_file_of_a_run_that_is_not_judged_is_judged_by_who_watches_it(tmp_path):
    path = tmp_path / "steps.jsonl"
    model = chain()
    x, y = batch_of()
    with StepProbe(model, ["0", "1", "2"], sink=path, alarms=False, example=x) as probe:
        F.cross_entropy(model(x) * math.inf, y).backward()
        probe.step()
    tail = Tail(path)
    tail.read()
    assert not tail.own
    assert tail.standing


def train_without_step():
    """Train a model that is gone, with its probe, when the function returns."""
    model = chain()
    x, y = batch_of()
    StepProbe(model, ["0", "1", "2"], alarms=False)
    for _ in range(3):
        F.cross_entropy(model(x), y).backward()
    del model
    gc.collect()


def test_a_run_that_never_calls_step_is_told_so():
    with pytest.warns(RuntimeWarning, match=r"step\(\) was never called, and .* of 3 backward"):
        train_without_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = chain()
        x, y = batch_of()
        probe, _, _ = probed(model)
        F.cross_entropy(model(x), y).backward()
        probe.step()
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(model(x), y).backward()
        probe.remove()
        StepProbe(chain(), alarms=False).remove()


def test_it_is_told_at_the_exit_of_the_process():
    code = (
        "import torch; from fadiag_fast import StepProbe; torch.manual_seed(0)\n"
        "m = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])\n"
        "p = StepProbe(m)\n"
        "for _ in range(2): m(torch.randn(6, 4)).sum().backward()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "step() was never called" in done.stderr
    assert "2 backward passes" in done.stderr


def test_the_compiler_is_named_only_where_something_is_compiled(monkeypatch):
    model = chain()
    probe, _, _ = probed(model, example=batch_of()[0])
    import torch._dynamo.utils as dynamo

    monkeypatch.setattr(dynamo, "counters", collections.defaultdict(collections.Counter))
    with pytest.raises(RuntimeError, match=r"got none$"):
        probe.step()
    dynamo.counters["frames"]["total"] += 1
    with pytest.raises(RuntimeError, match="if the model is compiled"):
        probe.step()
    probe.remove()


# ---- the compiler


def test_a_model_that_is_compiled_before_its_taps_are_known():
    """As a framework does it, of a model that was given its probe before."""
    eager, compiled = chain(), chain()
    x, y = batch_of()
    torch.compiler.reset()
    first, expected, _ = probed(eager)
    second, found, _ = probed(compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run = torch.compile(compiled, backend="aot_eager")
        for _ in range(2):
            F.cross_entropy(eager(x), y).backward()
            first.step()
            F.cross_entropy(run(x), y).backward()
            second.step()
    first.remove()
    second.remove()
    for one, other in zip(found, expected, strict=True):
        assert one.hidden_norms == pytest.approx(other.hidden_norms, rel=1e-6)
        assert one.grad_norms == pytest.approx(other.grad_norms, rel=1e-6)
        assert one.micro_batches == 1
    torch.compiler.reset()
