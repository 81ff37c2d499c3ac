"""A training that goes on from a state: the same bits as an undisturbed one, or a refusal."""

import copy
import importlib
import io
import sys
import types

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from toys import Decaying

from fadiag_fast.zoo import CannotResume, Rule, train
from fadiag_fast.zoo.rules import Backpropagation, DirectFeedbackAlignment
from fadiag_fast.zoo.rules.schedule import DeviceCosine

OPTIONS = {
    "resmlp": {"d_hidden": 16, "num_blocks": 3},
    "smallcnn": {"channels": (4, 4, 8), "d_hidden": 8},
    "vit-mini": {"d_hidden": 16, "num_blocks": 2, "num_heads": 2, "mlp_ratio": 2},
}
STEPS, MARKS = 14, (3, 9, 14)


class OnDevice(Backpropagation):
    """Descend as on a GPU: a rate and a schedule that are tensors, one kernel for all."""

    name = "on-device"

    def _descent(self, learning_rate, weight_decay):
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=torch.tensor(learning_rate),
            weight_decay=weight_decay,
            fused=True,
        )
        rate = optimizer.param_groups[0]["lr"]
        return optimizer, DeviceCosine(rate, learning_rate, self.total_steps)


class Drawing(Backpropagation):
    """Draw noise from a generator of one's own, on the CPU."""

    name = "drawing"

    def setup(self, generator):
        self.draws = {"noise": generator}

    def noise(self, shape):
        return torch.randn(shape, generator=self.draws["noise"])

    def losses(self, x, y):
        noise = self.noise(x.shape).to(x)
        return {"loss": F.cross_entropy(self.model(x + 0.1 * noise), y)}


class DrawingByNumpy(Drawing):
    name = "numpy"

    def setup(self, generator):
        self.draws = np.random.default_rng(3)

    def noise(self, shape):
        return torch.from_numpy(self.draws.standard_normal(shape, dtype=np.float32))


class Remembering(DirectFeedbackAlignment):
    """Keep a tensor in an attribute."""

    name = "remembering"

    def setup(self, generator):
        super().setup(generator)
        self.mean = torch.zeros(4)

    def block_credit(self, states):
        self.mean.lerp_(states.error.mean(0), 0.1)
        error = states.error - self.mean
        return [
            self.anatomy.as_state(error @ self.tensors[f"feedback.{l}"].T, like=h)
            for l, h in enumerate(states.hiddens[1:])
        ]


def run(images, rule, model="resmlp", **options):
    """Train, and return the network with its states and checkpoints, by step."""
    states, checkpoints = {}, {}

    def keep(step, network):
        states[step] = network.training_state()
        checkpoints[step] = network.checkpoint()

    arguments = {
        "steps": STEPS,
        "batch_size": 16,
        "learning_rate": 1e-2,
        "model_options": OPTIONS[model],
        "checkpoint_steps": MARKS,
        "on_checkpoint": keep,
        **options,
    }
    try:
        network = train(model, rule, images, **arguments)
    except KeyboardInterrupt:
        network = None
    return network, states, checkpoints


def stop_after(count):
    asked = iter(range(count + 1))
    return lambda: next(asked) == count


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_equal(one, other, where=""):
    """Nested values are the same, tensors bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}.{index}")
    elif isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), where
        assert one.numpy().tobytes() == other.numpy().tobytes(), where
    else:
        assert one == other, where


@pytest.fixture
def updates(monkeypatch):
    made, update = [], Rule.update

    def counted(self, x, y):
        made.append(x)
        return update(self, x, y)

    monkeypatch.setattr(Rule, "update", counted)
    return made


@pytest.mark.parametrize(
    ("rule", "model", "mark", "options"),
    [
        ("bp", "resmlp", 3, {}),
        ("bp", "smallcnn", 9, {}),  # BatchNorm's statistics
        ("frozen", "vit-mini", 9, {}),  # parameters without a state of the optimiser
        ("dfa", "vit-mini", 3, {}),
        ("ep", "resmlp", 9, {"penalty": 0.1}),
        ("state-bridge", "resmlp", 9, {}),
        ("credit-bridge", "resmlp", 3, {"rule_options": {"dfa_fraction": 0.5}}),
        ("credit-bridge", "resmlp", 9, {"rule_options": {"dfa_fraction": 0.5}}),
        ("test_resuming:OnDevice", "resmlp", 9, {}),
        ("test_resuming:Drawing", "resmlp", 9, {}),
    ],
)
def test_a_training_that_was_stopped_goes_on_bit_for_bit(
    images, updates, rule, model, mark, options
):
    whole, states, checkpoints = run(images, rule, model, **options)
    del updates[:]
    stopped, found, _ = run(images, rule, model, **options, stop=stop_after(mark + 2))
    assert stopped is None
    assert len(updates) == mark + 2
    assert max(found) == mark
    assert_equal(found[mark], states[mark])
    del updates[:]
    again, later, their_checkpoints = run(
        images, rule, model, **options, resume=through_a_file(found[mark])
    )
    assert len(updates) == STEPS - mark
    assert list(later) == [step for step in MARKS if step > mark]
    for step in later:
        assert_equal(their_checkpoints[step], checkpoints[step])
        assert_equal(later[step], states[step])
    assert_equal(again.checkpoint(), whole.checkpoint())
    assert again.history == whole.history
    assert len(again.history) == STEPS


def test_credit_bridge_is_stopped_before_and_after_it_leaves_dfa(images):
    """What the marks are for above."""
    _, _, checkpoints = run(images, "credit-bridge", rule_options={"dfa_fraction": 0.5})
    left = [int(checkpoints[step]["rule_state"]["dfa_steps_left"]) for step in MARKS]
    assert left == [4, 0, 0]


def test_parts_of_the_history_need_not_begin_where_they_would_have(images, monkeypatch):
    monkeypatch.setattr("fadiag_fast.zoo.graphed_steps.CHUNK", 4)
    losses = {}
    whole, states, _ = run(images, "bp", progress=lambda *at: losses.update({at[0]: at[2]}))
    expected = dict(losses)
    for mark in MARKS:
        losses.clear()
        again, _, _ = run(
            images,
            "bp",
            resume=states[mark],
            progress=lambda *at: losses.update({at[0]: at[2]}),
        )
        assert again.history == whole.history
        assert losses == {step: expected[step] for step in range(mark + 1, STEPS + 1)}


def test_a_state_is_a_copy_and_is_left_as_it_is(images):
    _, states, _ = run(images, "credit-bridge")
    before = copy.deepcopy(states[3])
    first, _, _ = run(images, "credit-bridge", resume=states[3])
    assert_equal(states[3], before)
    second, _, _ = run(images, "credit-bridge", resume=states[3])
    assert_equal(first.checkpoint(), second.checkpoint())


# ---- refusals


@pytest.mark.parametrize("rule", [Decaying, Remembering, DrawingByNumpy])
def test_a_rule_that_keeps_more_than_is_carried_is_refused(images, updates, rule):
    name = f"{rule.__module__}:{rule.__name__}"
    _, states, _ = run(images, name)
    del updates[:]
    with pytest.raises(CannotResume, match="keeps nothing else from step to step"):
        run(images, name, resume=through_a_file(states[3]))
    assert updates == []


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 2e-2},
        {"weight_decay": 0.0},
        {"seed": 1},
        {"steps": 15},
        {"penalty": 0.1},
        {"rule_options": {"train_embed": True}},
        {"rule": "fa"},
        {"rule": "bp"},
        {"model_options": {"d_hidden": 16, "num_blocks": 2}},
    ],
)
def test_a_state_of_other_arguments_is_refused(images, changed):
    _, states, _ = run(images, "dfa")
    with pytest.raises(CannotResume, match="train: resume: expected"):
        run(images, **{"rule": "dfa", **changed, "resume": states[3]})


def flip(tensor):
    tensor.view(-1).view(torch.uint8)[0] ^= 1


DAMAGES = {
    "weight": lambda state: flip(state["model"]["out_head.weight"]),
    "feedback": lambda state: flip(state["rule"]["feedback.0"]),
    "average": lambda state: flip(state["rule"]["average.condition.bias"]),
    "moment": lambda state: flip(state["optimizer"]["state"][0]["exp_avg_sq"]),
    "count": lambda state: flip(state["optimizer"]["state"][0]["step"]),
    "rate": lambda state: state["optimizer"]["param_groups"][0].update(lr=0.01),
    "schedule": lambda state: state["scheduler"].update(last_epoch=4),
    "noise": lambda state: flip(state["generators"]["rule.noise"]),
    "losses": lambda state: flip(state["losses"]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_state_with_one_value_that_is_another_is_refused(images, damage):
    """Torch's reader does not look at the checksums in its files."""
    options = {"rule_options": {"width": 4}}
    _, states, _ = run(images, "credit-bridge", **options, steps=4, checkpoint_steps=[3])
    damage(states[3])
    with pytest.raises(CannotResume):
        run(images, "credit-bridge", **options, steps=4, checkpoint_steps=[3], resume=states[3])


@pytest.mark.parametrize("missing", ["model", "rule", "optimizer", "scheduler", "losses", "digest"])
def test_a_state_with_a_part_missing_is_refused(images, missing):
    _, states, _ = run(images, "dfa")
    del states[3][missing]
    with pytest.raises(CannotResume, match=f"expected a whole training state: '{missing}'"):
        run(images, "dfa", resume=states[3])


def test_a_rule_whose_file_was_edited_is_refused(images, tmp_path, monkeypatch):
    source = (
        "import torch\n"
        "from fadiag_fast.zoo import Rule\n"
        "class Mine(Rule):\n"
        "    name = 'mine'\n"
        "    def block_credit(self, states):\n"
        "        return [SCALE * h for h in states.hiddens[1:]]\n"
    )
    file = tmp_path / "edited_rule.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file.write_text(f"SCALE = 0.1\n{source}")
    _, states, _ = run(images, "edited_rule:Mine")
    run(images, "edited_rule:Mine", resume=states[3])
    file.write_text(f"SCALE = 0.2\n{source}")
    importlib.reload(sys.modules["edited_rule"])
    with pytest.raises(CannotResume, match="the same arguments, rule and code"):
        run(images, "edited_rule:Mine", resume=states[3])


def test_a_rule_without_a_file_goes_on_until_it_is_typed_anew(images, monkeypatch):
    typed = types.ModuleType("typed_rule")
    monkeypatch.setitem(sys.modules, "typed_rule", typed)

    def type_in():
        code = "from fadiag_fast.zoo.rules.dfa import DirectFeedbackAlignment as Base\n"
        exec(f"{code}class Mine(Base):\n    name = 'mine'\n", typed.__dict__)

    type_in()
    expected, states, _ = run(images, "typed_rule:Mine")
    found, _, _ = run(images, "typed_rule:Mine", resume=states[3])
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], weight)
    type_in()
    with pytest.raises(CannotResume, match="expected the state of a training with the same"):
        run(images, "typed_rule:Mine", resume=states[3])


def test_a_trained_network_has_no_state(images):
    network, _, _ = run(images, "bp")
    with pytest.raises(ValueError, match="expected a network that trains on, got a trained one"):
        network.training_state()


# ---- on a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("mark", [3, 9])
@pytest.mark.parametrize("rule", ["bp", "dfa", "ep", "credit-bridge", "test_resuming:Drawing"])
@pytest.mark.filterwarnings("ignore:train. test_resuming.Drawing:RuntimeWarning")
def test_a_recorded_training_that_was_stopped_goes_on_bit_for_bit(images, rule, mark):
    options = {"rule_options": {"dfa_fraction": 0.5}} if rule == "credit-bridge" else {}
    whole, _, checkpoints = run(images, rule, **options, device="cuda")
    _, states, _ = run(images, rule, **options, device="cuda", stop=stop_after(mark + 1))
    again, _, later = run(
        images, rule, **options, device="cuda", resume=through_a_file(states[mark])
    )
    assert again.history == whole.history
    for step in later:
        assert_equal(later[step], checkpoints[step])
    assert_equal(again.checkpoint(), whole.checkpoint())
