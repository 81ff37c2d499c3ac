"""FA, the bridges, the penalty, and every rule on every network: each against its formula."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fadiag_fast.zoo import (
    RULES,
    ImageDataset,
    build_model,
    make_rule,
    restore_rule,
    rule_credit,
    train,
)

# Small enough to be quick; the CNN's states have three shapes, the ViT's have tokens.
SHAPE, CLASSES, BATCH, DIM, BLOCKS = (2, 8, 8), 5, 6, 12, 3
OPTIONS = {
    "resmlp": {"d_hidden": DIM, "num_blocks": BLOCKS},
    "smallcnn": {"channels": (3, 4, 5), "d_hidden": 7},
    "student": {"d_hidden": DIM, "num_blocks": BLOCKS},
    "vit-mini": {"d_hidden": 8, "num_blocks": BLOCKS, "num_heads": 2, "mlp_ratio": 2},
}
LOCAL = ["credit-bridge", "dfa", "ep", "fa", "state-bridge"]
BRIDGES = {"credit-bridge": {"width": 9, "dfa_fraction": 0}, "state-bridge": {"width": 9}}


def make_problem(name="resmlp"):
    """A float64 network whose blocks all matter, and one batch for it."""
    generator = torch.Generator().manual_seed(0)
    model = build_model(name, input_shape=SHAPE, num_classes=CLASSES, **OPTIONS[name]).double()
    with torch.no_grad():
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(draw * 0.3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.add_(1)
    x = torch.randn(BATCH, *SHAPE, generator=generator, dtype=torch.float64)
    y = torch.arange(BATCH) % CLASSES
    # Eval mode: with BatchNorm in training mode the samples of a batch are not independent.
    return model.eval(), x.flatten(1) if name in ("resmlp", "student") else x, y


def walk(name, model, x):
    """Compute h_0 … h_L, the branches and the logits without an anatomy, all detached."""
    with torch.no_grad():
        if name == "smallcnn":
            states = [x]
            for index, block in enumerate(model.blocks):
                states.append(block(states[-1].flatten(1) if index == 3 else states[-1]))
            return states, states[1:], model.out_head(states[-1])
        states, branches = [model.embed(x)], []
        for block in model.blocks:
            branches.append(block(states[-1]))
            states.append(states[-1] + branches[-1])
        return states, branches, head(model, states[-1])


def head(model, h):
    return model.out_head(model.out_ln(h) if hasattr(model, "out_ln") else h)


def error_of(logits, y):
    error = logits.softmax(1)
    error[torch.arange(len(y)), y] -= 1
    return error


def gradients_of_step(rule, x, y):
    """Make one update and return the gradients of the optimiser step, by parameter."""
    seen = {}

    def record(optimizer, args, kwargs):
        for parameter in optimizer.param_groups[0]["params"]:
            seen[parameter] = None if parameter.grad is None else parameter.grad.clone()

    handle = rule.optimizer.register_step_pre_hook(record)
    values = rule.update(x, y)
    handle.remove()
    return seen, values


def perceptron(network, h, time, error):
    """Evaluate a bridge network on one sample after another, from its weights alone."""
    weights = {key: value.detach() for key, value in network.state_dict().items()}
    depth = len(network.layers)
    rows = []
    for one, e in zip(h, error, strict=True):
        joined = torch.cat([torch.tensor([time], dtype=one.dtype), e])
        z = weights["readers.0.weight"] @ one + weights["readers.0.bias"]
        z = z + weights["condition.weight"] @ joined + weights["condition.bias"]
        for k in range(depth):
            z = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
            z = weights[f"layers.{k}.weight"] @ z + weights[f"layers.{k}.bias"]
        rows.append(z)
    return torch.stack(rows)


# Feedback alignment


def test_fa_sends_the_error_down_matrix_by_matrix():
    model, x, y = make_problem()
    rule = make_rule("fa", model, total_steps=1, seed=3)
    _, _, logits = walk("resmlp", model, x)
    state = rule.state_dict()
    assert [state[f"feedback.{l}"].shape for l in range(BLOCKS)] == [
        (DIM, DIM),
        (DIM, DIM),
        (DIM, CLASSES),
    ]
    expected = error_of(logits, y)
    for index in (2, 1, 0):
        expected = torch.einsum("bi,ji->bj", expected, state[f"feedback.{index}"])
        torch.testing.assert_close(rule.credit(x, y)[index], expected, rtol=1e-10, atol=1e-13)


def test_fa_between_maps_is_a_random_convolution_and_an_enlargement():
    model, x, y = make_problem("smallcnn")
    rule = make_rule("fa", model, total_steps=1, seed=3)
    _, _, logits = walk("smallcnn", model, x)
    state, credits = rule.state_dict(), rule.credit(x, y)
    assert [tuple(state[f"feedback.{l}"].shape) for l in range(4)] == [
        (3, 4, 3, 3),
        (4, 5, 3, 3),
        (20, 7),
        (7, CLASSES),
    ]
    top = error_of(logits, y) @ state["feedback.3"].T
    torch.testing.assert_close(credits[3], top)
    torch.testing.assert_close(credits[2], (top @ state["feedback.2"].T).reshape(-1, 5, 2, 2))
    for index, side in ((1, 2), (0, 4)):
        above, kernel = credits[index + 1], state[f"feedback.{index}"]
        padded = F.pad(above, (1, 1, 1, 1))
        sent = torch.zeros(BATCH, len(kernel), side, side, dtype=torch.float64)
        for row in range(3):
            for column in range(3):
                seen = padded[:, :, row : row + side, column : column + side]
                sent += torch.einsum("bcij,kc->bkij", seen, kernel[:, :, row, column])
        # Every position of the smaller map serves four of the larger one; 1/√4 keeps the norm.
        expected = sent.repeat_interleave(2, 2).repeat_interleave(2, 3) / 2
        torch.testing.assert_close(credits[index], expected, rtol=1e-10, atol=1e-13)


def test_fa_draws_have_the_documented_spread():
    model = build_model("smallcnn", input_shape=(1, 28, 28), num_classes=10)
    state = make_rule("fa", model, total_steps=1).state_dict()
    # The largest is 12.8 MB; a matrix between the first two maps would have 1.26 GB.
    assert sum(tensor.numel() for tensor in state.values()) < 2e6
    for tensor in state.values():
        # At least 2,560 draws: the standard deviation is known to 1.4%.
        scale = math.prod(tensor.shape[1:]) ** -0.5
        assert float(tensor.std()) == pytest.approx(scale, rel=0.05)


def test_fa_can_train_the_embedding_through_one_matrix_more():
    model, x, y = make_problem()
    rule = make_rule("fa", model, total_steps=1, train_embed=True)
    credit = rule.credit(x, y)[0] @ rule.state_dict()["embed_feedback"].T
    seen, _ = gradients_of_step(rule, x, y)
    torch.testing.assert_close(
        seen[model.embed.weight], torch.einsum("bd,bi->di", credit, x) / BATCH
    )


# State Bridge


@pytest.mark.parametrize(("place", "offset"), [(None, 0), ("input", 0), ("output", 1)])
def test_state_bridge_credit_is_the_gradient_through_the_predicted_last_state(place, offset):
    model, x, y = make_problem()
    options = {"width": 9, "num_layers": 4, "credit_at": place}
    rule = make_rule("state-bridge", model, total_steps=1, **options)
    states, _, logits = walk("resmlp", model, x)
    error = error_of(logits, y)
    for index, credit in enumerate(rule.credit(x, y), start=offset):
        h = states[index].clone().requires_grad_()
        predicted = perceptron(rule.predictor, h, index / BLOCKS, error)
        losses = F.cross_entropy(head(model, predicted), y, reduction="sum")
        (expected,) = torch.autograd.grad(losses, [h])
        torch.testing.assert_close(credit, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("place", "read"), [("input", (0, 1, 2)), ("output", (1, 2, 3))])
def test_state_bridge_learns_to_predict_and_leaves_the_model_out_of_it(place, read):
    model, x, y = make_problem()
    rule = make_rule("state-bridge", model, total_steps=1, width=9, credit_at=place)
    states, _, logits = walk("resmlp", model, x)
    error = error_of(logits, y)
    errors = [
        (perceptron(rule.predictor, states[l], l / BLOCKS, error) - states[-1]).square().mean()
        for l in read
    ]
    predicted = torch.stack(
        [perceptron(rule.predictor, states[l], l / BLOCKS, error) for l in read]
    )
    # The output layer's bias enters every prediction with the factor 1.
    expected = 2 * (predicted - states[-1]).mean((0, 1)) / DIM
    weights = [*model.out_head.parameters()]
    without = torch.autograd.grad(F.cross_entropy(head(model, states[-1]), y), weights)
    parameter = rule.predictor.layers[-1].bias
    seen, values = gradients_of_step(rule, x, y)
    torch.testing.assert_close(values["auxiliary_loss"], torch.stack(errors).mean())
    torch.testing.assert_close(seen[parameter], expected)
    for weight, grad in zip(weights, without, strict=True):
        torch.testing.assert_close(seen[weight], grad)


# Credit Bridge


@pytest.mark.parametrize(("place", "offset"), [(None, 0), ("input", 0), ("output", 1)])
def test_credit_bridge_credit_is_the_gradient_of_its_value(place, offset):
    model, x, y = make_problem()
    options = {**BRIDGES["credit-bridge"], "credit_at": place}
    rule = make_rule("credit-bridge", model, total_steps=1, **options)
    states, _, logits = walk("resmlp", model, x)
    for index, credit in enumerate(rule.credit(x, y), start=offset):
        h = states[index].clone().requires_grad_()
        value = perceptron(rule.value, h, index / BLOCKS, error_of(logits, y))
        (expected,) = torch.autograd.grad(value.sum(), [h])
        torch.testing.assert_close(credit, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("place", "read"), [("input", (0, 1, 2)), ("output", (1, 2))])
def test_credit_bridge_descends_consistency_and_the_terminal_gradient(place, read):
    model, x, y = make_problem()
    options = {"width": 9, "num_noises": 3, "temperature": 0.2, "noise_scale": 0.5}
    options["credit_at"] = place
    rule = make_rule("credit-bridge", model, total_steps=1, terminal_weight=0.7, **options)
    with torch.no_grad():
        for parameter in rule.average.parameters():
            parameter.mul_(1.3)  # so that a copy that is not used would be noticed
    states, _, logits = walk("resmlp", model, x)
    error = error_of(logits, y)
    # The rule's own noise, drawn in the same order from the same place in its stream.
    stream = torch.Generator()
    stream.set_state(rule.noise.get_state())
    consistency = 0.0
    for l in read:
        noise = torch.randn(3, BATCH, DIM, generator=stream).double() * 0.5
        samples = [
            perceptron(rule.average, states[l + 1] + one, (l + 1) / BLOCKS, error)[:, 0]
            for one in noise
        ]
        target = -0.2 * torch.log(sum(torch.exp(-value / 0.2) for value in samples) / 3)
        own = perceptron(rule.value, states[l], l / BLOCKS, error)[:, 0]
        consistency += float((own - target).square().mean()) / len(read)
    h = states[-1].clone().requires_grad_()
    (reached,) = torch.autograd.grad(perceptron(rule.value, h, 1.0, error).sum(), [h])
    (wanted,) = torch.autograd.grad(F.cross_entropy(head(model, h), y, reduction="sum"), [h])
    terminal = float((reached - wanted).square().sum(1).mean())
    value = rule.losses(x, y)["auxiliary_loss"].detach()
    assert float(value) == pytest.approx(consistency + 0.7 * terminal, rel=1e-9)


def test_credit_bridge_matches_the_terminal_gradient_after_training():
    """The term without which the value says nothing about the loss does what it is for."""
    model, x, y = make_problem()
    rule = make_rule(
        "credit-bridge", model, total_steps=400, learning_rate=1e-2, dfa_fraction=1, width=64
    )
    frozen = {key: value.clone() for key, value in model.state_dict().items()}
    mismatch = []
    for _ in range(400):
        states = rule.forward_states(x, y)
        loss = rule.auxiliary_loss(states)
        mismatch.append(float(loss.detach()))
        rule.descend(loss)
        rule.finish_step()
    assert mismatch[-1] < 0.1 * mismatch[0]
    assert all(torch.equal(value, frozen[key]) for key, value in model.state_dict().items())


def test_credit_bridge_is_carried_by_dfa_for_its_first_steps():
    model, x, y = make_problem()
    rule = make_rule("credit-bridge", model, total_steps=10, seed=4, width=9)
    dfa = make_rule("dfa", model, total_steps=10, seed=4)
    for step in range(4):
        same = [torch.equal(a, b) for a, b in zip(rule.credit(x, y), dfa.credit(x, y), strict=True)]
        # Two of ten steps: 20%.
        assert all(same) if step < 2 else not any(same)
        rule.update(x, y)


def test_the_average_follows_its_value_network():
    model, x, y = make_problem()
    rule = make_rule("credit-bridge", model, total_steps=5, average_decay=0.9, width=9)
    before = [parameter.clone() for parameter in rule.average.parameters()]
    rule.update(x, y)
    for old, new, value in zip(
        before, rule.average.parameters(), rule.value.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * value)
        assert not new.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "expected a temperature above 0, got 0"),
        ({"num_noises": 0}, "expected num_noises of at least 1, got 0"),
        ({"dfa_fraction": 1.5}, "expected a dfa_fraction from 0 to 1, got 1.5"),
        ({"average_decay": float("nan")}, "expected an average_decay from 0 to 1, got nan"),
        ({"num_layers": 1}, "num_layers of at least 2, got 256 and 1"),
    ],
)
def test_credit_bridge_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        make_rule("credit-bridge", make_problem()[0], total_steps=1, **options)


@pytest.mark.parametrize("name", BRIDGES)
def test_where_a_bridge_is_read_has_to_exist(name):
    with pytest.raises(ValueError, match="credit_at: expected output for a model without skips"):
        make_rule(name, make_problem("smallcnn")[0], total_steps=1, credit_at="input")
    with pytest.raises(ValueError, match="credit_at: expected input or output, got 'above'"):
        make_rule(name, make_problem()[0], total_steps=1, credit_at="above")


# Equilibrium propagation without skips


def test_ep_without_skips_is_plain_gradient_descent_on_its_energy():
    model, x, y = make_problem("smallcnn")
    beta, rate, steps = 0.7, 0.05, 5
    rule = make_rule(
        "ep", model, total_steps=1, beta=beta, relaxation_steps=steps, relaxation_rate=rate
    )
    h = walk("smallcnn", model, x)[0]

    def residuals(states):
        inputs = [*states[:3], states[3].flatten(1)]
        return [states[l + 1] - block(inputs[l]) for l, block in enumerate(model.blocks)]

    for _ in range(steps):
        leaves = [h[0], *(state.detach().requires_grad_() for state in h[1:])]
        energy = sum(r.square().sum() / 2 for r in residuals(leaves))
        total = energy + beta * F.cross_entropy(model.out_head(leaves[-1]), y, reduction="sum")
        grads = torch.autograd.grad(total, leaves[1:])
        h[1:] = [a.detach() - rate * g for a, g in zip(leaves[1:], grads, strict=True)]
    with torch.no_grad():
        expected = [-r / beta for r in residuals(h)]
    for a, b in zip(rule.credit(x, y), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_ep_where_samples_meet_lowers_the_energy_of_the_batch():
    model, x, y = make_problem("smallcnn")
    model.train()
    with torch.no_grad():
        for block in model.blocks:
            for weight in block.parameters():
                weight.mul_(5)
    rule = make_rule("ep", model, total_steps=1, relaxation_rate=5.0)
    states = rule.forward_states(x, y)
    nudged = rule.nudged_hiddens(states)
    with torch.no_grad():
        inputs = [*nudged[:3], nudged[3].flatten(1)]
        energy = sum(
            (nudged[l + 1] - block(inputs[l])).square().sum() / 2
            for l, block in enumerate(model.blocks)
        )
        after = F.cross_entropy(model.out_head(nudged[-1]), y, reduction="sum")
        before = F.cross_entropy(states.logits, y, reduction="sum")
    assert energy + rule.beta * after < rule.beta * before


def test_ep_counts_only_its_forward_pass_towards_running_statistics():
    (model, x, y), (twin, _, _) = make_problem("smallcnn"), make_problem("smallcnn")
    model.train()
    make_rule("ep", model, total_steps=1).update(x, y)
    twin.train()(x)
    expected = dict(twin.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, expected[name])


# The residual penalty


@pytest.mark.parametrize("architecture", ["resmlp", "smallcnn"])
@pytest.mark.parametrize("name", ["dfa", "fa", "state-bridge", "credit-bridge"])
def test_the_penalty_adds_its_gradient_to_every_block(name, architecture):
    strength = 0.3
    model, x, y = make_problem(architecture)
    rule = make_rule(name, model, total_steps=1, penalty=strength)
    states, expected = walk(architecture, model, x)[0], {}
    for index, block in enumerate(model.blocks):
        h = states[index]
        branch = block(h.flatten(1) if architecture == "smallcnn" and index == 3 else h)
        # λ times the mean over the batch of each sample's square norm.
        loss = strength * sum((one**2).sum() for one in branch) / BATCH
        weights = list(block.parameters())
        expected.update(zip(weights, torch.autograd.grad(loss, weights), strict=True))
    seen, _ = gradients_of_step(rule, x, y)
    other = make_problem(architecture)[0]
    plain, _ = gradients_of_step(make_rule(name, other, total_steps=1), x, y)
    for (weight, grad), without in zip(seen.items(), plain.values(), strict=True):
        if weight in expected:
            torch.testing.assert_close(grad - without, expected[weight], rtol=1e-9, atol=1e-12)
        else:
            # Head, norm and auxiliary networks have no penalty.
            # (The input layer of the image's shape learns only where an embedding would.)
            assert (grad is None and without is None) or torch.equal(grad, without)


def test_the_penalty_of_bp_runs_through_the_whole_network():
    model, x, y = make_problem()
    h, penalty = model.embed(x), 0.0
    for block in model.blocks:
        branch = block(h)
        penalty = penalty + 0.3 * branch.square().sum(1).mean()
        h = h + branch
    loss = F.cross_entropy(head(model, h), y)
    weights = list(model.parameters())
    expected = torch.autograd.grad(loss + penalty, weights)
    seen, values = gradients_of_step(make_rule("bp", model, total_steps=1, penalty=0.3), x, y)
    torch.testing.assert_close(values["local_loss"], penalty.detach())
    for weight, grad in zip(weights, expected, strict=True):
        torch.testing.assert_close(seen[weight], grad)


def test_the_penalty_of_ep_is_taken_at_the_nudged_states():
    model, x, y = make_problem()
    rule = make_rule("ep", model, total_steps=1, penalty=0.3)
    with torch.no_grad():
        nudged = rule.nudged_hiddens(rule.forward_states(x, y))
        penalty = sum(
            0.3 * block(h).square().sum(1).mean()
            for block, h in zip(model.blocks, nudged, strict=False)
        )
    with_penalty = rule.losses(x, y)["local_loss"]
    without = make_rule("ep", model, total_steps=1).losses(x, y)["local_loss"]
    torch.testing.assert_close((with_penalty - without).detach(), penalty)


@pytest.mark.parametrize("penalty", [-1.0, float("nan"), float("inf")])
def test_a_penalty_that_is_none_is_refused(penalty):
    with pytest.raises(ValueError, match="expected a finite penalty of at least 0"):
        make_rule("dfa", make_problem()[0], total_steps=1, penalty=penalty)


def test_frozen_blocks_have_no_penalty():
    with pytest.raises(ValueError, match=r"FrozenBlocks: expected no penalty.*got 0\.1"):
        make_rule("frozen", make_problem()[0], total_steps=1, penalty=0.1)


def test_a_penalty_bounds_what_dfa_inflates():
    norms = {}
    for penalty in (0.0, 0.1):
        model, x, y = make_problem()
        rule = make_rule("dfa", model, total_steps=150, learning_rate=1e-2, penalty=penalty)
        for _ in range(150):
            rule.update(x, y)
        norms[penalty] = float(walk("resmlp", model, x)[0][-1].norm(dim=1).median())
    assert norms[0.1] < 0.3 * norms[0.0]


# Every rule on every network


@pytest.fixture(scope="module")
def tiny() -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, *SHAPE, generator=generator)
    labels = torch.arange(24) % CLASSES
    return ImageDataset("tiny", images, labels, images, labels, CLASSES, SHAPE)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_three_steps_saved_and_loaded_give_the_same_credit(name, rule, tiny, tmp_path):
    penalty = 0.0 if rule == "frozen" else 0.01
    options = {"model_options": OPTIONS[name], "rule_options": BRIDGES.get(rule, {})}
    network = train(name, rule, tiny, steps=3, batch_size=8, penalty=penalty, **options)
    assert all(math.isfinite(loss) for _, loss in network.history)
    torch.save(network.checkpoint(), tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert saved["config"]["penalty"] == penalty
    model = build_model(name, input_shape=SHAPE, num_classes=CLASSES, **OPTIONS[name])
    model.load_state_dict(saved["state_dict"])
    restored = restore_rule(model.eval(), saved)
    assert restored.penalty == penalty
    ((x, y),) = tiny.eval_batches(8, 1, flatten=name in ("resmlp", "student"))
    for a, b in zip(restored.credit(x, y), network.rule.credit(x, y), strict=True):
        assert (a is None and b is None and rule == "frozen") or torch.equal(a, b)
    report = rule_credit(restored, (x, y), num_directions=2, null_draws=2)
    assert len(report.layers) == len(model.blocks)
    for layer in report.layers:
        if rule == "frozen":
            assert layer.gamma is None
            continue
        assert -1 <= layer.gamma <= 1
        if rule == "bp":
            # Not to the last bit: the credit is made in float32, the gradient on float64 logits.
            assert layer.gamma == pytest.approx(1, abs=1e-6)
        # What is drawn can be drawn anew; "bp" and "ep" draw nothing.
        assert (layer.null_mean is None) == (rule in ("bp", "ep"))


@pytest.mark.parametrize("rule", [rule for rule in LOCAL if rule != "ep"])
def test_redrawn_rules_share_the_model_and_nothing_drawn(rule):
    model, x, y = make_problem()
    first = make_rule(rule, model, total_steps=1, seed=1, **BRIDGES.get(rule, {}))
    kept = {key: value.clone() for key, value in first.state_dict().items()}
    other = first.redrawn(2)
    same = make_rule(rule, model, total_steps=1, seed=2, **BRIDGES.get(rule, {}))
    for a, b, c in zip(first.credit(x, y), other.credit(x, y), same.credit(x, y), strict=True):
        assert not torch.allclose(a, b)
        assert torch.equal(b, c)
    assert other.model is first.model
    assert all(torch.equal(value, kept[key]) for key, value in first.state_dict().items())
