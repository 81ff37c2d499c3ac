"""Steps that a GPU repeats: the same numbers as ordinary ones, or ordinary ones and the reason."""

import gc
import itertools
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from toys import Decaying  # noqa: F401 (found here by its name)

from fadiag_fast.study import StudyModel, Suite, run_study
from fadiag_fast.zoo import RULES, build_model, graphed_steps, make_rule, train
from fadiag_fast.zoo.graphed_steps import (
    WARMUP,
    HostReads,
    Stepper,
    _reason_against,
    host_state,
    recording_alone,
)
from fadiag_fast.zoo.rules import Backpropagation, DirectFeedbackAlignment
from fadiag_fast.zoo.rules.schedule import DeviceCosine

OPTIONS = {
    "resmlp": {"d_hidden": 16, "num_blocks": 3},
    "smallcnn": {"channels": (4, 4, 8), "d_hidden": 8},
    "student": {"d_hidden": 16, "num_blocks": 3},
    "vit-mini": {"d_hidden": 16, "num_blocks": 3, "num_heads": 2, "mlp_ratio": 2},
}


# Rules of one's own, as a user may write them.


class Waiting(Backpropagation):
    """Read the loss on the host in every step."""

    name = "waiting"

    def update(self, x, y):
        found = super().update(x, y)
        self.seen = found["loss"].item() > 0  # always, so that nothing else tells
        return found


class Synchronising(Backpropagation):
    """Wait for the device where no torch call shows it: a recording breaks off."""

    name = "synchronising"

    def update(self, x, y):
        if x.is_cuda:
            torch.cuda.synchronize()
        return super().update(x, y)


class Remembering(DirectFeedbackAlignment):
    """Keep the last error in an attribute: a recording would keep on reading an old one."""

    name = "remembering"

    def block_credit(self, states):
        last = getattr(self, "last", states.error)
        self.last = states.error
        return [
            self.anatomy.as_state((states.error + last) @ self.tensors[f"feedback.{l}"].T, like=h)
            for l, h in enumerate(states.hiddens[1:])
        ]


class Drawing(Backpropagation):
    """Draw noise on the CPU."""

    name = "drawing"

    def setup(self, generator):
        self.draws = generator

    def losses(self, x, y):
        noise = torch.randn(x.shape, generator=self.draws).to(x)
        return {"loss": F.cross_entropy(self.model(x + 0.1 * noise), y)}


class Halving(Backpropagation):
    """An update of one's own that changes after five steps, says so and counts where it should."""

    name = "halving"

    def setup(self, generator):
        self.tensors["made"] = torch.tensor(0)

    @property
    def phase(self):
        return int(self.tensors["made"]) < 5

    def count_step(self):
        self.tensors["made"] += 1

    def update(self, x, y):
        half = len(x) // 2 if self.phase else len(x)
        loss = F.cross_entropy(self.model(x[:half]), y[:half])
        self.descend(loss)
        self.count_step()
        return {"loss": loss.detach()}


class Refusing(Backpropagation):
    """Fail while it is recorded, after half of a step, and never else."""

    name = "refusing"

    def finish_step(self):
        if self.like.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not while you look\nand a second line")


# The host's side, on the CPU


@pytest.mark.parametrize(("total", "rate"), [(4, 0.1), (1, 1e-3), (46_800, 1e-3)])
def test_the_rate_on_a_device_follows_torchs_cosine(total, rate):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=rate)
    expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    ours = DeviceCosine(torch.tensor(rate), rate, total)
    for _ in range(2 * total + 3):
        # Torch multiplies its way along the cosine; both end at 0 but for rounding.
        assert float(ours.rate) == pytest.approx(optimizer.param_groups[0]["lr"], 1e-6, rate * 1e-9)
        assert ours.get_last_lr()[0] == ours.rate
        optimizer.step()
        expected.step()
        ours.step()


def stepper(images, rule_name, steps=12, **options):
    model = build_model("resmlp", input_shape=(1, 8, 8), num_classes=4, seed=1, **OPTIONS["resmlp"])
    rule = make_rule(rule_name, model, total_steps=steps, **options)
    batches = itertools.cycle(torch.arange(128).split(16))
    flat = images.train_images.flatten(1)
    return Stepper(
        rule, flat, images.train_labels, batches, batch_size=16, total=steps, record=True
    )


def test_a_recording_that_breaks_off_makes_every_step_once(images, monkeypatch):
    """On the CPU, where a recording is made to break off."""
    made, plain = (stepper(images, "dfa", steps=9) for _ in range(2))

    def look(rule, step):
        step()
        return ""

    def break_off(graph, step, generators):
        raise RuntimeError("broken\noff")

    monkeypatch.setattr(graphed_steps, "_reason_against", look)
    monkeypatch.setattr(graphed_steps, "_capture", break_off)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    made.record = True
    for one in (made, plain):
        for _ in range(9):
            one.step()
    assert made.history() == plain.history()
    assert (made.graphed, made.note) == (0, "RuntimeError: broken")
    for a, b in zip(made.rule.parameters, plain.rule.parameters, strict=True):
        assert torch.equal(a, b)


def test_steps_on_the_cpu_are_plain_updates(images):
    made, plain = (stepper(images, "dfa", steps=9) for _ in range(2))
    losses = []
    for step in range(9):
        made.step()
        part = slice(16 * (step % 8), 16 * (step % 8) + 16)
        x, y = images.train_images.flatten(1)[part], images.train_labels[part]
        losses.append(float(plain.rule.update(x, y)["loss"]))
        assert made.last_loss() == losses[-1]
    assert made.history() == list(enumerate(losses, start=1))
    assert (made.graphed, made.note) == (0, "")
    for a, b in zip(made.rule.parameters, plain.rule.parameters, strict=True):
        assert torch.equal(a, b)


def test_a_long_history_goes_through_the_device_in_parts(images, monkeypatch):
    whole = stepper(images, "bp", steps=13)
    monkeypatch.setattr("fadiag_fast.zoo.graphed_steps.CHUNK", 5)
    parts = stepper(images, "bp", steps=13)
    assert len(parts._order) == 5
    for _ in range(13):
        whole.step()
        parts.step()
        assert parts.last_loss() == whole.last_loss()
        assert parts.history() == whole.history()
    assert len(parts.history()) == 13


def equality(y, n):
    """One-hot without a look at the labels, which torch's own takes on the CPU alone."""
    return (y[:, None] == torch.arange(n)).long()


def reason(rule_name, images, monkeypatch):
    """What would be said of a rule on a GPU, asked as if the CPU were one."""
    monkeypatch.setattr(F, "one_hot", equality)
    made = stepper(images, rule_name)
    # The CPU's own optimiser and schedule count on the host.
    made.rule.optimizer = torch.optim.SGD(made.rule.parameters, lr=0.1)
    made.rule.scheduler = SimpleNamespace(step=lambda: None)
    made._order[:] = torch.arange(16)
    for _ in range(WARMUP - 1):
        made._update()
    return _reason_against(made.rule, made._update, "cpu")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("Decaying", "rule.share changes on the host in every step"),
        ("Remembering", "rule.last changes on the host in every step"),
        ("Drawing", "rule.draws (state) changes on the host in every step"),
        ("Waiting", "aten._local_scalar_dense waits for the device"),
        ("Halving", ""),
    ],
)
def test_what_a_rule_does_on_the_host_speaks_against_recording_it(
    images, monkeypatch, rule, expected
):
    if rule == "Halving":  # its tensor of the host would count as one of the device here
        monkeypatch.setattr(Halving, "setup", lambda self, generator: None)
        monkeypatch.setattr(Halving, "phase", True)
        monkeypatch.setattr(Halving, "count_step", lambda self: setattr(self, "made", object()))
    assert reason(f"test_stepping:{rule}", images, monkeypatch) == expected


@pytest.mark.parametrize("rule", [name for name in RULES if name != "credit-bridge"])
def test_no_rule_of_the_package_is_refused(images, monkeypatch, rule):
    assert reason(rule, images, monkeypatch) == ""


def test_the_optimiser_of_the_cpu_counts_on_the_host(images):
    made = stepper(images, "bp")
    for _ in range(WARMUP):
        made.step()
    found = _reason_against(made.rule, made._update, "cuda")
    assert "changes on the host in every step" in found


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda t: t.sum().item(), "aten._local_scalar_dense waits for the device"),
        (lambda t: bool(t.sum() > 0), "aten._local_scalar_dense waits for the device"),
        (lambda t: t[t > 0], "aten.index.Tensor waits for the device"),
        (lambda t: t.index_put_((t > 0,), t.new_ones(3)), "aten.index_put_ waits for the device"),
        (lambda t: t.nonzero(), "aten.nonzero waits for the device"),
        (lambda t: t.masked_select(t > 0), "aten.masked_select waits for the device"),
        (lambda t: t[t.argsort()].index_select(0, t.argmax()), ""),
        (lambda t: torch.tensor([1.0]) + 1, "a tensor is made of Python values"),
        (lambda t: 2 * t.exp() + 1, ""),
    ],
)
def test_calls_that_wait_for_a_device_are_found(call, expected):
    with HostReads("cpu") as reads:
        call(torch.ones(3))
    assert expected in reads.found
    assert bool(reads.found) == bool(expected)
    with HostReads("cuda") as reads:
        call(torch.ones(3))
    assert reads.found == "", "of a device that takes no part"


def test_a_move_between_devices_is_found():
    with HostReads("meta") as reads:
        torch.ones(3).to("meta")
    assert reads.found == "aten._to_copy moves a tensor between host and device"
    with HostReads("meta") as reads:
        torch.ones(3, device="meta").to(torch.float64)
        torch.ones(3).to(torch.float64)
    assert reads.found == ""


def test_the_backward_pass_is_watched_as_well():
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * grad.sum().item()

    x = torch.ones(3, requires_grad=True)
    with HostReads("cpu") as reads:
        torch.autograd.grad(Reads.apply(x).sum(), x)
    assert reads.found == "aten._local_scalar_dense waits for the device"


def test_the_host_state_is_found_at_any_depth():
    class Thing:
        def __init__(self):
            self.numbers = {"a": [1, 2.5], "b": (None, "text")}
            self.kept = torch.zeros(2)
            self.me = self
            self.call = print

    thing = Thing()
    found = host_state(thing, "cuda")
    assert "rule.kept (written)" not in host_state(thing, "cpu")
    assert found["rule.numbers['a'][1]"] == 2.5
    assert found["rule.numbers['b'][0]"] is None
    assert found["rule.kept"] is thing.kept
    before = found["rule.kept (written)"]
    thing.kept.add_(1)
    assert host_state(thing)["rule.kept (written)"] > before
    assert not any("call" in where or "me" in where.split(".")[1:] for where in found)


def test_one_thread_records_while_no_step_is_repeated():
    first, second = threading.Lock(), threading.Lock()
    from fadiag_fast.zoo import graphed_steps

    with graphed_steps._registry:
        graphed_steps._replaying.add(first)
        graphed_steps._replaying.add(second)
    order = []

    def record():
        with recording_alone():
            order.append("recorded")

    with second:  # a replay
        thread = threading.Thread(target=record)
        thread.start()
        thread.join(0.1)
        assert order == []
        order.append("replayed")
    thread.join(5)
    assert order == ["replayed", "recorded"]
    assert first.acquire(blocking=False)
    assert second.acquire(blocking=False)


# On a GPU


def run(images, model, rule, *, steps=12, device="cuda", **options):
    return train(
        model,
        rule,
        images,
        steps=steps,
        batch_size=16,
        model_options=OPTIONS[model],
        device=device,
        learning_rate=1e-2,
        **options,
    )


@pytest.fixture
def repeatable():
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def assert_same_training(one, other):
    assert one.history == other.history
    assert one.accuracy == other.accuracy
    for name, expected in other.model.state_dict().items():
        assert torch.equal(one.model.state_dict()[name], expected), name
    for name, expected in other.rule.state_dict().items():
        assert torch.equal(one.rule.state_dict()[name], expected), name
    (mine,), (yours,) = (n.rule.optimizer.param_groups for n in (one, other))
    assert float(mine["lr"]) == float(yours["lr"])
    state = other.rule.optimizer.state
    for a, b in zip(one.rule.parameters, other.rule.parameters, strict=True):
        assert (a in one.rule.optimizer.state) == (b in state)
        for name, expected in state.get(b, {}).items():
            assert torch.equal(one.rule.optimizer.state[a][name], expected), name


@pytest.mark.cuda
@pytest.mark.parametrize("model", ["resmlp", "smallcnn", "vit-mini"])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_repeated_steps_are_ordinary_ones_bit_for_bit(images, repeatable, model, rule):
    """BatchNorm's running statistics and its count of batches among them."""
    ordinary = run(images, model, rule, graph=False)
    graphed = run(images, model, rule)
    assert ordinary.graphed_steps == 0
    # Credit Bridge changes its step after two of twelve: three real ones, then three anew.
    assert graphed.graphed_steps == (12 - WARMUP - 2 if rule == "credit-bridge" else 12 - WARMUP)
    assert graphed.graph_note == ""
    assert_same_training(graphed, ordinary)
    assert not any(parameter.grad is not None for parameter in graphed.rule.parameters)
    if model == "smallcnn":
        assert int(graphed.model.state_dict()["blocks.0.1.num_batches_tracked"]) == 12


@pytest.mark.cuda
@pytest.mark.parametrize("rule", ["bp", "dfa", "ep"])
def test_a_gpu_starts_where_the_cpu_starts_and_goes_the_same_way(images, rule):
    """Weights and order are the same, and the fused optimiser has the same formula."""
    here = run(images, "resmlp", rule, device="cpu")
    there = run(images, "resmlp", rule)
    assert there.history[0][1] == pytest.approx(here.history[0][1], rel=1e-5)
    for (_, ours), (_, theirs) in zip(here.history, there.history, strict=True):
        # AdamW's first steps are nearly the gradient's sign: a rounding of a small component moves
        # a weight by up to two rates, a few of thousands of them.
        assert theirs == pytest.approx(ours, rel=2e-2)
    assert float(there.rule.optimizer.param_groups[0]["lr"]) == pytest.approx(
        here.rule.optimizer.param_groups[0]["lr"], abs=1e-9
    )


@pytest.mark.cuda
@pytest.mark.parametrize("rule", sorted(RULES))
def test_draws_do_not_depend_on_the_device(rule):
    states = []
    for device in ("cpu", "cuda"):
        model = build_model("resmlp", input_shape=(1, 8, 8), num_classes=4, seed=1)
        states.append(make_rule(rule, model.to(device), total_steps=5, seed=3).state_dict())
    assert states[0].keys() == states[1].keys()
    for name, expected in states[0].items():
        assert torch.equal(states[1][name].cpu(), expected), name


@pytest.mark.cuda
@pytest.mark.parametrize("graph", [True, False])
def test_the_schedule_ends_where_torchs_does(images, graph):
    network = run(images, "resmlp", "bp", steps=10, graph=graph)
    assert float(network.rule.optimizer.param_groups[0]["lr"]) == pytest.approx(0, abs=1e-9)
    assert int(network.rule.scheduler.taken) == 10


@pytest.mark.cuda
def test_a_step_is_recorded_anew_when_its_phase_changes(images):
    options = {"rule_options": {"dfa_fraction": 0.25, "width": 16}, "steps": 24}
    ordinary = run(images, "resmlp", "credit-bridge", graph=False, **options)
    graphed = run(images, "resmlp", "credit-bridge", **options)
    # 6 steps by DFA and 18 without, each begun by real ones.
    assert graphed.graphed_steps == 24 - 2 * WARMUP
    assert int(graphed.rule.tensors["dfa_steps_left"]) == 0
    assert_same_training(graphed, ordinary)


@pytest.mark.cuda
def test_a_rule_of_ones_own_with_its_own_update_and_phase(images):
    ordinary = run(images, "resmlp", "test_stepping:Halving", graph=False)
    graphed = run(images, "resmlp", "test_stepping:Halving")
    assert graphed.graphed_steps == 12 - 2 * WARMUP
    assert int(graphed.rule.tensors["made"]) == 12
    assert_same_training(graphed, ordinary)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("Waiting", "aten._local_scalar_dense waits for the device"),
        ("Decaying", "rule.share changes on the host in every step"),
        ("Remembering", "rule.last changes on the host in every step"),
        ("Drawing", "aten._to_copy moves a tensor between host and device"),
        ("Refusing", "RuntimeError: not while you look"),
        ("Synchronising", ""),  # CUDA says it in its own words
    ],
)
def test_a_rule_that_cannot_be_recorded_trains_with_ordinary_steps_and_says_so(
    images, rule, expected
):
    name = f"test_stepping:{rule}"
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        ordinary = run(images, "resmlp", name, graph=False)
    with pytest.warns(RuntimeWarning, match=rf"train: {name}: ordinary updates, not a CUDA graph"):
        graphed = run(images, "resmlp", name)
    assert graphed.graphed_steps == 0
    assert graphed.graph_note
    assert expected in graphed.graph_note
    assert "\n" not in graphed.graph_note
    assert_same_training(graphed, ordinary)
    # What broke off has left nothing behind: neither for the next training, nor for noise.
    again = run(images, "resmlp", "credit-bridge")
    assert again.graphed_steps > 0
    torch.randn(3, device="cuda")
    torch.cuda.empty_cache()


@pytest.mark.cuda
def test_checkpoints_on_the_way_change_nothing(images, repeatable):
    kept = {}
    graphed = run(
        images,
        "smallcnn",
        "ep",
        checkpoint_steps=(2, 5, 12),
        on_checkpoint=lambda step, network: kept.update({step: network.checkpoint()}),
    )
    plain = run(images, "smallcnn", "ep", graph=False)
    assert_same_training(graphed, plain)
    half = run(
        images,
        "smallcnn",
        "ep",
        graph=False,
        checkpoint_steps=(5,),
        on_checkpoint=lambda step, network: kept.update({"plain": network.checkpoint()}),
    )
    assert half.history == plain.history
    for name, expected in kept["plain"]["state_dict"].items():
        assert torch.equal(kept[5]["state_dict"][name], expected), name
    assert kept[5]["config"]["accuracy"] == kept["plain"]["config"]["accuracy"]


@pytest.mark.cuda
def test_training_stops_between_steps(images):
    asked = []

    def stop():
        asked.append(None)
        return len(asked) > 8

    with pytest.raises(KeyboardInterrupt):
        run(images, "resmlp", "bp", stop=stop)
    assert len(asked) == 9


@pytest.mark.cuda
def test_the_global_generators_are_left_alone(images):
    torch.manual_seed(3)
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    run(images, "resmlp", "credit-bridge")
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.cuda
def test_memory_of_recordings_is_given_back(images):
    def train_once():
        run(images, "resmlp", "ep")
        torch.cuda.synchronize()
        gc.collect()  # of earlier tests too
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    first = train_once()
    assert [train_once() for _ in range(4)] == [first] * 4


@pytest.mark.cuda
def test_figures_on_a_gpu_do_not_depend_on_the_number_of_jobs(images, tmp_path):
    suite = Suite(
        name="small",
        models=tuple(StudyModel(name, name, OPTIONS[name]) for name in ("resmlp", "smallcnn")),
        seeds=(1, 2),
        steps=60,
        checkpoint_steps=(5, 20),
        batch_size=16,
        eval_batches=8,
        eval_batch_size=8,
    )
    found = {}
    for jobs in (1, 4):
        result = run_study(suite, images, tmp_path / str(jobs), device="cuda", jobs=jobs)
        assert result.failed == []
        found[jobs] = [(run.model, run.rule, run.seed, run.steps) for run in result.runs]
    assert found[1] == found[4]
    record = (tmp_path / "4/resmlp/bp/seed_1/run.json").read_text()
    assert f'"graphed_steps": {60 - WARMUP}' in record


@pytest.mark.cuda
def test_rules_that_cannot_be_recorded_do_not_disturb_those_beside_them(images, tmp_path):
    suite = Suite(
        name="mixed",
        models=(StudyModel("resmlp", "resmlp", OPTIONS["resmlp"]),),
        rules=("test_stepping:Waiting", "test_stepping:Drawing", "credit-bridge", "bp", "dfa"),
        seeds=(1, 2, 3),
        steps=60,
        checkpoints=1,
        batch_size=16,
        eval_batches=8,
        eval_batch_size=8,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result = run_study(suite, images, tmp_path, device="cuda", jobs=5)
    assert result.failed == []
    assert result.trained == 15


@pytest.mark.cuda
def test_too_many_jobs_for_a_gpu_are_refused(images, tmp_path):
    suite = Suite(name="s", models=(StudyModel("resmlp", "resmlp"),), steps=1)
    with pytest.raises(ValueError, match="expected jobs from 1 to 32, got 33"):
        run_study(suite, images, tmp_path, device="cuda", jobs=33)
