"""Seeded training runs and what they hand on."""

import pytest
import torch
from torch import nn
from toys import noisy_patterns

from fadiag_fast.zoo import ImageDataset, accuracy, build_model, load_dataset, make_rule, train

TINY = {"d_hidden": 16, "num_blocks": 2}


@pytest.fixture(scope="module")
def tiny() -> ImageDataset:
    """Four classes of noisy 1x3x3 patterns, easy to tell apart."""
    return noisy_patterns("tiny", (1, 3, 3), train=200, test=80, noise=0.3)


def run(dataset, rule="bp", **options):
    return train(
        "resmlp", rule, dataset, **{"steps": 40, "batch_size": 32, "model_options": TINY, **options}
    )


@pytest.mark.parametrize("rule", ["bp", "dfa", "ep", "frozen"])
def test_training_repeats_bit_for_bit_and_leaves_the_global_generator_alone(tiny, rule):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run(tiny, rule)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = run(tiny, rule)
    assert first.history == again.history
    weights = again.model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in first.model.state_dict().items())
    other = run(tiny, rule, seed=43)
    assert other.history[0] != first.history[0]


@pytest.mark.parametrize("rule", ["bp", "dfa", "ep", "frozen"])
def test_every_rule_learns_an_easy_set(tiny, rule):
    network = run(tiny, rule, steps=150, learning_rate=1e-2)
    assert network.accuracy > 0.9
    losses = [loss for _, loss in network.history]
    assert [step for step, _ in network.history] == list(range(1, 151))
    assert losses[-1] < 0.3 * losses[0]


def test_shipped_subset_trains():
    dataset = load_dataset("fashion-mnist-mini")
    network = train(
        "resmlp", "bp", dataset, steps=60, model_options={"d_hidden": 64, "num_blocks": 2}
    )
    # Ten classes: chance is .10; sixty steps of a healthy rule reach about .78.
    assert network.accuracy > 0.7


def test_an_epoch_sees_every_sample_once(tiny):
    seen = []

    network = run(tiny, steps=1)
    update = type(network.rule).update

    def record(self, x, y):
        seen.append(x)
        return update(self, x, y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(network.rule), "update", record)
        run(tiny, steps=10, batch_size=40)
    flat = tiny.train_images.flatten(1)
    for epoch in (seen[:5], seen[5:]):
        rows = {tuple(row.tolist()) for row in torch.cat(epoch)}
        assert rows == {tuple(row.tolist()) for row in flat}
    assert not torch.equal(torch.cat(seen[:5]), torch.cat(seen[5:]))
    assert not torch.equal(torch.cat(seen[:5]), flat)


def test_checkpoint_survives_a_weights_only_load_and_restores_model_and_credit(tiny, tmp_path):
    network = run(tiny, "dfa", rule_options={"train_embed": True})
    torch.save(network.checkpoint(), tmp_path / "run.pt")
    loaded = torch.load(tmp_path / "run.pt", weights_only=True)
    config = loaded["config"]
    assert config["rule"] == "dfa"
    assert config["seed"] == 42
    assert config["accuracy"] == network.accuracy
    model = build_model(
        config["model"],
        input_shape=tuple(config["input_shape"]),
        num_classes=config["num_classes"],
        **config["model_options"],
    )
    model.load_state_dict(loaded["state_dict"])
    rule = make_rule("dfa", model, total_steps=1, seed=999, **config["rule_options"])
    rule.load_state_dict(loaded["rule_state"])
    ((x, y),) = tiny.eval_batches(16, 1, flatten=True)
    assert torch.equal(model(x), network.model(x))
    for a, b in zip(rule.credit(x, y), network.rule.credit(x, y), strict=True):
        assert torch.equal(a, b)


def test_checkpoint_is_a_copy(tiny):
    network = run(tiny, "dfa")
    checkpoint = network.checkpoint()
    kept = checkpoint["state_dict"]["embed.weight"].clone()
    with torch.no_grad():
        for parameter in network.model.parameters():
            parameter.zero_()
    network.rule.tensors["feedback.0"].zero_()
    assert torch.equal(checkpoint["state_dict"]["embed.weight"], kept)
    assert checkpoint["rule_state"]["feedback.0"].abs().sum() > 0


def test_progress_reports_to_the_last_step_without_changing_the_run(tiny):
    calls = []
    silent = run(tiny, steps=7)
    loud = run(tiny, steps=7, progress=lambda *call: calls.append(call))
    assert [(done, total) for done, total, _ in calls] == [(done, 7) for done in range(1, 8)]
    assert calls[-1][2] == f"{loud.history[-1][1]:.4f}"
    assert loud.history == silent.history
    calls.clear()
    run(tiny, steps=250, rule="frozen", progress=lambda *call: calls.append(call))
    assert 100 <= len(calls) <= 126
    assert calls[-1][0] == 250


def test_trained_model_is_in_eval_mode(tiny):
    assert not any(module.training for module in run(tiny, steps=1).model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "train: expected steps of at least 1, got 0"),
        ({"batch_size": 0}, "train: expected a batch_size from 1 to 200, .*got 0"),
        ({"batch_size": 201}, "train: expected a batch_size from 1 to 200, .*got 201"),
        ({"seed": -1}, "train: expected a non-negative seed, got -1"),
        ({"rule": "hebb"}, "make_rule: expected one of bp, credit-bridge, .*got 'hebb'"),
    ],
)
def test_arguments_that_do_not_fit(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        run(tiny, **options)


def test_unknown_model(tiny):
    with pytest.raises(ValueError, match=r"expected one of resmlp, .*got 'vgg'"):
        train("vgg", "bp", tiny)


# Accuracy


class FirstPixels(nn.Module):
    """Takes the first four features of its input as logits; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.9)
        self.sizes: list[int] = []

    def forward(self, x):
        self.sizes.append(x.shape[0])
        return self.drop(x.flatten(1)[:, :4])


@pytest.mark.parametrize("flatten", [True, False])
def test_accuracy_is_the_fraction_right(flatten):
    images = torch.zeros(10, 1, 2, 2)
    answers = torch.arange(10) % 4
    images.view(10, 4)[torch.arange(10), answers] = 1
    labels = answers.clone()
    labels[:3] = (labels[:3] + 1) % 4
    model = FirstPixels()
    # In training mode the dropout would make this random.
    assert accuracy(model, images, labels, batch_size=4, flatten=flatten) == 0.7
    assert model.sizes == [4, 4, 2]


def test_accuracy_puts_every_module_back_in_its_mode():
    model = nn.Sequential(FirstPixels(), nn.Dropout())
    model.train()
    model[1].eval()
    accuracy(model, torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), flatten=False)
    assert model.training
    assert model[0].drop.training
    assert not model[1].training


def test_accuracy_puts_the_mode_back_after_a_failure():
    model = nn.Linear(3, 2)
    with pytest.raises(RuntimeError):
        accuracy(model, torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), flatten=False)
    assert model.training


@pytest.mark.parametrize(
    ("count", "labels", "batch_size", "message"),
    [
        (0, 0, 4, "expected at least one image, got none"),
        (3, 2, 4, r"expected 3 labels for 3 images, got labels of shape \[2\]"),
        (3, 3, 0, "expected a batch_size of at least 1, got 0"),
    ],
)
def test_accuracy_refuses(count, labels, batch_size, message):
    with pytest.raises(ValueError, match=f"accuracy: {message}"):
        accuracy(
            FirstPixels(),
            torch.zeros(count, 4),
            torch.zeros(labels, dtype=torch.int64),
            batch_size=batch_size,
            flatten=True,
        )
