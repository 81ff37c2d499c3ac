"""The credit rules, each against an independent statement of what it does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fadiag_fast.zoo import RULES, ResidualMLP, Rule, build_model, make_rule

# Small enough to be quick, and no two sizes alike, so that a transposed product cannot pass.
BATCH, INPUT, DIM, CLASSES, BLOCKS = 9, 7, 12, 5, 3


def make_problem(dtype=torch.float64, terminal_norm=True):
    """Make a model whose branches are as large as its stream, and one batch for it."""
    generator = torch.Generator().manual_seed(0)
    model = ResidualMLP(INPUT, DIM, CLASSES, BLOCKS, terminal_norm).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(draw * 0.3)
    x = torch.randn(BATCH, INPUT, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(CLASSES, (BATCH,), generator=generator)
    return model, x, y


def gradients_of_own_loss(model, x, y):
    """Compute ∂CE_b/∂h_l, l = 0 … L, one sample at a time."""
    rows = []
    for sample, label in zip(x, y, strict=True):
        hiddens = [model.embed(sample[None])]
        for block in model.blocks:
            hiddens.append(hiddens[-1] + block(hiddens[-1]))
        h = hiddens[-1]
        logits = model.out_head(model.out_ln(h) if hasattr(model, "out_ln") else h)
        rows.append(torch.autograd.grad(F.cross_entropy(logits, label[None]), hiddens))
    return [torch.cat(layer) for layer in zip(*rows, strict=True)]


def recorded_gradients(rule, x, y):
    """Make one update and return the gradient each parameter's optimiser step was given."""
    names = {parameter: name for name, parameter in rule.model.named_parameters()}
    seen = {}

    def record(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                seen[names[parameter]] = None if parameter.grad is None else parameter.grad.clone()

    handle = rule.optimizer.register_step_pre_hook(record)
    values = rule.update(x, y)
    handle.remove()
    return seen, values


def parameters(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def block_gradients(block, inputs, credit):
    """Compute the gradient of mean_b ⟨f(h_b), a_b⟩ in one block's w2, by hand."""
    inner = F.gelu(block.w1(block.ln(inputs)))
    return {
        "w2.weight": torch.einsum("bi,bj->ij", credit, inner) / inputs.shape[0],
        "w2.bias": credit.mean(dim=0),
    }


# Every rule


@pytest.mark.parametrize("name", ["bp", "dfa", "ep", "frozen"])
@pytest.mark.parametrize("terminal_norm", [True, False])
def test_update_lowers_the_loss_of_one_batch(name, terminal_norm):
    model, x, y = make_problem(terminal_norm=terminal_norm)
    rule = make_rule(name, model, total_steps=60, learning_rate=0.01)
    losses = [rule.update(x, y)["loss"] for _ in range(60)]
    assert losses[-1] < 0.85 * losses[0]
    # The first loss is the mean cross-entropy before any update.
    expected = F.cross_entropy(make_problem(terminal_norm=terminal_norm)[0](x), y)
    torch.testing.assert_close(losses[0], expected)
    assert not losses[0].requires_grad


@pytest.mark.parametrize("name", ["bp", "dfa", "ep", "frozen"])
def test_credit_changes_nothing_and_uses_no_global_randomness(name):
    model, x, y = make_problem()
    before, state = parameters(model), torch.get_rng_state()
    rule = make_rule(name, model, total_steps=3, seed=4)
    first, second = rule.credit(x, y), rule.credit(x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in parameters(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(first) == BLOCKS
    for a, b in zip(first, second, strict=True):
        if name == "frozen":
            assert a is None
        else:
            assert a.shape == (BATCH, DIM)
            assert not a.requires_grad
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["bp", "dfa", "ep"])
def test_credit_of_a_sample_does_not_depend_on_its_batch(name):
    model, x, y = make_problem()
    rule = make_rule(name, model, total_steps=1)
    whole, part = rule.credit(x, y), rule.credit(x[2:4], y[2:4])
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[2:4], b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["dfa", "ep"])
def test_head_and_norm_learn_from_cross_entropy_on_the_detached_state(name):
    model, x, y = make_problem()
    head = [*model.out_ln.parameters(), *model.out_head.parameters()]
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), head)
    seen, _ = recorded_gradients(make_rule(name, model, total_steps=1), x, y)
    for key, grad in zip(
        ("out_ln.weight", "out_ln.bias", "out_head.weight", "out_head.bias"), expected, strict=True
    ):
        torch.testing.assert_close(seen[key], grad)


def test_learning_rate_follows_a_cosine_to_zero():
    model, x, y = make_problem()
    rule = make_rule("bp", model, total_steps=4, learning_rate=0.1)
    rates = []
    for _ in range(4):
        rates.append(rule.optimizer.param_groups[0]["lr"])
        rule.update(x, y)
    rates.append(rule.optimizer.param_groups[0]["lr"])
    halfway = 0.1 * (1 + 0.5**0.5) / 2
    assert rates == pytest.approx([0.1, halfway, 0.05, 0.1 - halfway, 0], abs=1e-12)


# Backpropagation


def test_bp_is_a_plain_autograd_loop_bit_for_bit():
    model, x, y = make_problem(torch.float32)
    twin, _, _ = make_problem(torch.float32)
    rule = make_rule("bp", model, total_steps=20)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for _ in range(20):
        loss = F.cross_entropy(twin(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        assert torch.equal(rule.update(x, y)["loss"], loss.detach())
    expected = parameters(twin)
    assert all(torch.equal(value, expected[key]) for key, value in parameters(model).items())


def test_bp_credit_is_each_samples_own_gradient():
    model, x, y = make_problem()
    expected = gradients_of_own_loss(model, x, y)[1:]
    for a, g in zip(make_rule("bp", model, total_steps=1).credit(x, y), expected, strict=True):
        torch.testing.assert_close(a, g, rtol=1e-10, atol=1e-13)


# Frozen blocks


@pytest.mark.parametrize("train_embed", [True, False])
def test_frozen_blocks_never_move_and_the_rest_learns_by_backpropagation(train_embed):
    model, x, y = make_problem()
    before = parameters(model)
    expected = dict(
        zip(
            before,
            torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())),
            strict=True,
        )
    )
    rule = make_rule("frozen", model, total_steps=5, train_embed=train_embed)
    seen, _ = recorded_gradients(rule, x, y)
    for _ in range(4):
        rule.update(x, y)
    for key, value in parameters(model).items():
        if key.startswith("blocks.") or (key.startswith("embed.") and not train_embed):
            # Weight decay included: a block that shrinks is not frozen.
            assert torch.equal(value, before[key])
            assert key not in seen
        else:
            assert not torch.equal(value, before[key])
            torch.testing.assert_close(seen[key], expected[key])


# Direct feedback alignment


def test_dfa_credit_is_the_output_error_through_its_matrices():
    model, x, y = make_problem()
    rule = make_rule("dfa", model, total_steps=1, seed=3)
    error = torch.softmax(model(x), 1).detach()
    error[torch.arange(BATCH), y] -= 1
    for index, credit in enumerate(rule.credit(x, y)):
        matrix = rule.state_dict()[f"feedback.{index}"]
        assert matrix.shape == (DIM, CLASSES)
        torch.testing.assert_close(credit, torch.einsum("bc,dc->bd", error, matrix))


def test_dfa_block_update_equals_a_hand_written_einsum():
    model, x, y = make_problem()
    rule = make_rule("dfa", model, total_steps=1)
    credits = rule.credit(x, y)
    with torch.no_grad():
        h, expected = model.embed(x), {}
        for index, block in enumerate(model.blocks):
            branch = block(h)
            for key, grad in block_gradients(block, h, credits[index]).items():
                expected[f"blocks.{index}.{key}"] = grad
            # And one layer further in: through GELU's derivative into w1.
            normal = block.ln(h)
            inner = block.w1(normal)
            slope = 0.5 * (1 + torch.erf(inner / 2**0.5))
            slope = slope + inner * torch.exp(-(inner**2) / 2) / (2 * torch.pi) ** 0.5
            back = torch.einsum("bi,ij->bj", credits[index], block.w2.weight) * slope
            expected[f"blocks.{index}.w1.weight"] = torch.einsum("bi,bj->ij", back, normal) / BATCH
            h = h + branch
    seen, values = recorded_gradients(rule, x, y)
    for key, grad in expected.items():
        torch.testing.assert_close(seen[key], grad, rtol=1e-9, atol=1e-13)
    assert "embed.weight" not in seen
    assert set(values) == {"loss", "local_loss"}


def test_dfa_can_train_the_embedding_with_a_matrix_of_its_own():
    model, x, y = make_problem()
    rule = make_rule("dfa", model, total_steps=1, train_embed=True)
    matrix = rule.state_dict()["embed_feedback"]
    error = torch.softmax(model(x), 1).detach() - F.one_hot(y, CLASSES)
    seen, _ = recorded_gradients(rule, x, y)
    expected = torch.einsum("bc,dc,bi->di", error, matrix, x) / BATCH
    torch.testing.assert_close(seen["embed.weight"], expected)


def test_dfa_matrices_have_the_documented_spread_and_follow_the_seed():
    model = build_model("resmlp", input_shape=(4,), num_classes=10, d_hidden=256, num_blocks=4)
    first = make_rule("dfa", model, total_steps=1, seed=1).state_dict()
    again = make_rule("dfa", model, total_steps=1, seed=1).state_dict()
    other = make_rule("dfa", model, total_steps=1, seed=2).state_dict()
    draws = torch.stack(list(first.values()))
    # 10,240 draws: the standard deviation is known to 0.7%, the mean to 1%.
    assert float(draws.std()) == pytest.approx(10**-0.5, rel=0.03)
    assert abs(float(draws.mean())) < 0.02
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["feedback.0"], other["feedback.0"])
    assert not torch.equal(first["feedback.0"], first["feedback.1"])


def test_dfa_state_restores_the_credit():
    model, x, y = make_problem()
    rule = make_rule("dfa", model, total_steps=1, seed=1)
    stranger = make_rule("dfa", model, total_steps=1, seed=2)
    assert not torch.equal(stranger.credit(x, y)[0], rule.credit(x, y)[0])
    stranger.load_state_dict(rule.state_dict())
    for a, b in zip(stranger.credit(x, y), rule.credit(x, y), strict=True):
        assert torch.equal(a, b)


def test_a_rule_state_that_does_not_fit_is_refused_whole():
    model, _, _ = make_problem()
    rule = make_rule("dfa", model, total_steps=1)
    good = {key: value.clone() for key, value in rule.state_dict().items()}
    with pytest.raises(ValueError, match=r"expected the rule state \['feedback.0', .*got \[\]"):
        rule.load_state_dict({})
    bad = {key: torch.zeros_like(value) for key, value in good.items()}
    bad["feedback.2"] = torch.zeros(CLASSES, DIM)
    with pytest.raises(ValueError, match=r"'feedback.2': expected shape \[12, 5\], got \[5, 12\]"):
        rule.load_state_dict(bad)
    assert all(torch.equal(value, good[key]) for key, value in rule.state_dict().items())


def test_dfa_inflates_the_residual_stream_and_bp_does_not():
    growth = {}
    for name in ("bp", "dfa"):
        model = build_model(
            "resmlp", input_shape=(INPUT,), num_classes=CLASSES, d_hidden=64, num_blocks=3, seed=0
        )
        generator = torch.Generator().manual_seed(1)
        # Labels that no network can explain: the output error never vanishes.
        x = torch.randn(512, INPUT, generator=generator)
        y = torch.randint(CLASSES, (512,), generator=generator)
        rule = make_rule(name, model, total_steps=150, learning_rate=3e-3)
        for step in range(150):
            at = 64 * (step % 8)
            rule.update(x[at : at + 64], y[at : at + 64])
        with torch.no_grad():
            h_0 = h = model.embed(x)
            for block in model.blocks:
                h = h + block(h)
        growth[name] = float(h.norm(dim=1).median() / h_0.norm(dim=1).median())
    assert growth["dfa"] > 3 * growth["bp"]


# Equilibrium propagation


def cosine(a, b):
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def test_ep_credit_tends_to_the_gradient_as_the_nudge_shrinks():
    model, x, y = make_problem()
    expected = gradients_of_own_loss(model, x, y)[1:]
    errors = []
    for beta in (0.1, 0.01, 0.001):
        rule = make_rule(
            "ep", model, total_steps=1, beta=beta, relaxation_steps=800, relaxation_rate=0.2
        )
        credits = rule.credit(x, y)
        errors.append(
            max(float((a - g).norm() / g.norm()) for a, g in zip(credits, expected, strict=True))
        )
    # First order in beta: a tenth of the nudge leaves a tenth of the error.
    assert errors[0] < 0.5
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.35)
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.35)


def test_ep_defaults_point_along_the_gradient_in_a_fresh_network():
    model = build_model(
        "resmlp", input_shape=(INPUT,), num_classes=CLASSES, d_hidden=64, num_blocks=4, seed=0
    )
    x = torch.randn(BATCH, INPUT, generator=torch.Generator().manual_seed(0))
    y = torch.arange(BATCH) % CLASSES
    gradients = gradients_of_own_loss(model, x, y)[1:]
    for a, g in zip(make_rule("ep", model, total_steps=1).credit(x, y), gradients, strict=True):
        assert cosine(a, g).median() > 0.97
        assert cosine(a, g).min() > 0.85
        assert 0.5 < float((a.norm(dim=1) / g.norm(dim=1)).median()) < 1.5


def test_ep_relaxation_is_plain_gradient_descent_on_the_energy():
    model, x, y = make_problem()
    beta, rate, steps = 0.7, 0.1, 6
    rule = make_rule(
        "ep", model, total_steps=1, beta=beta, relaxation_steps=steps, relaxation_rate=rate
    )
    with torch.no_grad():
        free = [model.embed(x)]
        for block in model.blocks:
            free.append(free[-1] + block(free[-1]))
    h = [state.clone() for state in free]
    for _ in range(steps):
        leaves = [h[0], *(state.detach().requires_grad_() for state in h[1:])]
        energy = sum(
            0.5 * ((leaves[i + 1] - leaves[i] - model.blocks[i](leaves[i])) ** 2).sum()
            for i in range(BLOCKS)
        )
        nudge = F.cross_entropy(model.out_head(model.out_ln(leaves[-1])), y, reduction="sum")
        grads = torch.autograd.grad(energy + beta * nudge, leaves[1:])
        h[1:] = [a.detach() - rate * g for a, g in zip(leaves[1:], grads, strict=True)]
    with torch.no_grad():
        expected = [-(h[i + 1] - h[i] - model.blocks[i](h[i])) / beta for i in range(BLOCKS)]
    for a, b in zip(rule.credit(x, y), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for index, a in enumerate(rule.displacement(x, y)):
        torch.testing.assert_close(a, (free[index + 1] - h[index + 1]) / beta)


def nudged_energies(rule, states):
    """Energy and β·CE of every sample at the nudged states, and β·CE before the nudge."""
    model, nudged = rule.model, rule.nudged_hiddens(states)
    with torch.no_grad():
        energy = sum(
            (nudged[i + 1] - nudged[i] - block(nudged[i])).square().sum(1) / 2
            for i, block in enumerate(model.blocks)
        )
        logits = model.out_head(model.out_ln(nudged[-1]))
        after = rule.beta * F.cross_entropy(logits, states.labels, reduction="none")
    before = rule.beta * F.cross_entropy(states.logits.detach(), states.labels, reduction="none")
    return energy, after, before


@pytest.mark.parametrize("stretch", [1.0, 3.0, 30.0])
def test_ep_relaxation_never_raises_a_samples_energy(stretch):
    model, x, y = make_problem()
    with torch.no_grad():
        for block in model.blocks:
            for weight in block.parameters():
                weight.mul_(stretch)
    rule = make_rule("ep", model, total_steps=1)
    energy, after, before = nudged_energies(rule, rule.forward_states(x, y))
    # Twenty steps of 0.5 end at 11, at 3e4 and at 2e10; before them it is 1.1.
    assert (energy + after < before).all()


def test_ep_samples_have_step_sizes_of_their_own():
    model, x, y = make_problem()
    rule = make_rule("ep", model, total_steps=1, relaxation_rate=3.0)
    together = rule.credit(x, y)
    for sample in range(3):
        alone = rule.credit(x[sample : sample + 1], y[sample : sample + 1])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[sample], b[0], rtol=1e-9, atol=1e-12)


def test_ep_finds_no_way_down_from_a_state_that_is_not_finite():
    model, x, y = make_problem()
    x[1] = float("inf")
    rule = make_rule("ep", model, total_steps=1)
    healthy = [index for index in range(len(x)) if index != 1]
    expected = make_rule("ep", model, total_steps=1).credit(x[healthy], y[healthy])
    for a, b in zip(rule.credit(x, y), expected, strict=True):
        assert not a[1].isfinite().any()
        torch.testing.assert_close(a[healthy], b)


@pytest.mark.parametrize("train_embed", [True, False])
def test_ep_update_descends_the_nudged_energy(train_embed):
    model, x, y = make_problem()
    rule = make_rule("ep", model, total_steps=1, train_embed=train_embed)
    credits = rule.credit(x, y)
    with torch.no_grad():
        nudged = rule.nudged_hiddens(rule.forward_states(x, y))
    expected = {}
    for index, block in enumerate(model.blocks):
        for key, grad in block_gradients(block, nudged[index], credits[index]).items():
            expected[f"blocks.{index}.{key}"] = grad.detach()
    seen, values = recorded_gradients(rule, x, y)
    for key, grad in expected.items():
        torch.testing.assert_close(seen[key], grad, rtol=1e-8, atol=1e-12)
    energy = sum((rule.beta * a).square().sum(1).mean() / 2 for a in credits)
    torch.testing.assert_close(values["local_loss"], energy / rule.beta)
    assert ("embed.weight" in seen) == train_embed


def test_ep_embedding_learns_the_gradient_as_the_nudge_shrinks():
    model, x, y = make_problem()
    (expected,) = torch.autograd.grad(F.cross_entropy(model(x), y), [model.embed.weight])
    rule = make_rule(
        "ep", model, total_steps=1, beta=1e-4, relaxation_steps=800, relaxation_rate=0.2
    )
    seen, _ = recorded_gradients(rule, x, y)
    assert float((seen["embed.weight"] - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "expected a finite beta other than 0, got 0"),
        ({"beta": float("nan")}, "expected a finite beta other than 0, got nan"),
        ({"beta": float("inf")}, "expected a finite beta other than 0, got inf"),
        ({"relaxation_steps": 0}, "expected relaxation_steps of at least 1, got 0"),
        ({"relaxation_rate": 0.0}, "expected a finite relaxation_rate above 0, got 0.0"),
        ({"relaxation_rate": float("nan")}, "expected a finite relaxation_rate above 0, got nan"),
    ],
)
def test_ep_refuses_a_nudge_that_cannot_be_divided_out(options, message):
    with pytest.raises(ValueError, match=message):
        make_rule("ep", make_problem()[0], total_steps=1, **options)


# Names, errors and new rules


def test_the_registry_has_the_protocols_rules():
    expected = {"bp", "credit-bridge", "dfa", "ep", "fa", "frozen", "state-bridge"}
    assert set(RULES) == expected
    assert all(rule.name == name for name, rule in RULES.items())


def test_underscores_name_the_same_rule():
    assert make_rule("state_bridge", make_problem()[0], total_steps=1).name == "state-bridge"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all:Rule", "expected package.module:Class, got 'nowhere.at_all:Rule': No"),
        ("torch:nothing", "expected package.module:Class, got 'torch:nothing'"),
        ("torch.nn:Linear", "expected torch.nn:Linear to be a subclass of Rule"),
    ],
)
def test_what_is_no_rule_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        make_rule(name, make_problem()[0], total_steps=1)


def test_an_unknown_rule_lists_those_that_exist():
    with pytest.raises(
        ValueError, match=r"expected one of bp, credit-bridge, dfa, ep, fa, frozen, .*'hebb'"
    ):
        make_rule("hebb", make_problem()[0], total_steps=1)


def test_an_option_of_another_rule_is_refused():
    with pytest.raises(TypeError, match="beta"):
        make_rule("dfa", make_problem()[0], total_steps=1, beta=0.5)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(TypeError, match="got Linear without embed, blocks, out_head"):
        make_rule("bp", nn.Linear(2, 2), total_steps=1)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="expected total_steps of at least 1, got 0"):
        make_rule("bp", make_problem()[0], total_steps=0)


def test_a_new_rule_needs_only_its_credit():
    class SharedHeadFeedback(Rule):
        name = "shared-head"

        def block_credit(self, states):
            return [states.error @ self.model.out_head.weight for _ in self.blocks]

    model, x, y = make_problem()
    before = parameters(model)
    (expected,) = torch.autograd.grad(F.cross_entropy(model(x), y), [model.out_head.weight])
    seen, _ = recorded_gradients(SharedHeadFeedback(model, total_steps=1), x, y)
    # The credit is made from the head's weight, and yet does not train it.
    torch.testing.assert_close(seen["out_head.weight"], expected)
    rule = SharedHeadFeedback(model, total_steps=40, learning_rate=0.01)
    losses = [rule.update(x, y)["loss"] for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]
    for key, value in parameters(model).items():
        # No local loss is defined for the embedding, so it stays.
        assert torch.equal(value, before[key]) == key.startswith("embed.")
    assert rule.state_dict() == {}
