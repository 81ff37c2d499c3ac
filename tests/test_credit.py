"""The credit metrics against hand-written ones, and the protocol's calibrations."""

import json
import math
from fractions import Fraction

import pytest
import torch
from networks import Branching, Handing
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from fadiag_fast import cli
from fadiag_fast.checkpoints import save_checkpoint
from fadiag_fast.credit import CreditReport, measure_credit, sample_cross_entropy
from fadiag_fast.ops.reference import NORM_FLOOR, credit_statistics
from fadiag_fast.zoo import ResidualMLP, build_model, make_rule, restore_rule, rule_credit

BATCH, INPUT, DIM, CLASSES, BLOCKS = 16, 5, 24, 4, 3


def make_problem(dtype=torch.float64, blocks=BLOCKS):
    generator = torch.Generator().manual_seed(0)
    model = ResidualMLP(INPUT, DIM, CLASSES, blocks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    x = torch.randn(BATCH, INPUT, generator=generator)
    y = torch.arange(BATCH) % CLASSES
    return model.to(dtype).eval(), x.to(dtype), y


def states_of(model, x):
    states = [model.embed(x)]
    for block in model.blocks:
        states.append(states[-1] + block(states[-1]))
    return states


def losses_from(model, l, h, y):
    """Run the network on from h_l, and return every sample's loss."""
    for block in list(model.blocks)[l:]:
        h = h + block(h)
    return F.cross_entropy(model.out_head(model.out_ln(h)), y, reduction="none")


def gradients(model, x, y):
    """Compute ∂CE_b/∂h_l, l = 1 … L."""
    states = states_of(model, x)
    loss = losses_from(model, BLOCKS, states[-1], y).sum()
    return [g.detach() for g in torch.autograd.grad(loss, states[1:])]


# The per-sample products


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_products_and_norms_are_those_of_exact_arithmetic(dtype):
    generator = torch.Generator().manual_seed(0)
    # 7 and 3·5 features: a layer of vectors and one of maps.
    credits = [torch.randn(4, *s, generator=generator).to(dtype) for s in ((7,), (3, 5))]
    grads = [torch.randn(4, *s, generator=generator).to(dtype) for s in ((7,), (3, 5))]
    found = credit_statistics(credits, grads)
    assert found.dot.shape == (2, 4)
    for l in range(2):
        for b in range(4):
            a = [Fraction(v) for v in credits[l][b].double().flatten().tolist()]
            g = [Fraction(v) for v in grads[l][b].double().flatten().tolist()]
            dot = sum(p * q for p, q in zip(a, g, strict=True))
            norms = [math.sqrt(sum(v * v for v in vector)) for vector in (a, g)]
            # Fifteen additions and a root in float64: 16 roundings of 1.1e-16, of terms as large
            # as the product of the norms.
            slack = 16 * 1.2e-16 * norms[0] * norms[1]
            assert float(found.dot[l, b]) == pytest.approx(float(dot), rel=0, abs=slack)
            assert float(found.credit_norm[l, b]) == pytest.approx(norms[0], rel=2e-15)
            assert float(found.grad_norm[l, b]) == pytest.approx(norms[1], rel=2e-15)
            expected = float(dot) / norms[0] / norms[1]
            assert float(found.cosine[l, b]) == pytest.approx(expected, rel=0, abs=4e-15)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e-9),  # where a clamp at 1e-8 says 0.08
        (torch.float32, 1e-25),
        (torch.float32, 1e38),
        (torch.float64, 1e-29),
        (torch.float64, 1e300),
        (torch.bfloat16, 1e38),
        (torch.float16, 2.0**-14),
    ],
)
def test_two_equal_vectors_have_cosine_one_at_any_scale(dtype, scale):
    vector = (torch.tensor([[1.0, -0.5, 0.25]], dtype=torch.float64) * scale).to(dtype)
    found = credit_statistics([vector], [vector])
    assert float(found.cosine) == pytest.approx(1, abs=1e-15)
    assert float(credit_statistics([vector], [-vector]).cosine) == pytest.approx(-1, abs=1e-15)
    assert math.isfinite(float(found.credit_norm))


def test_a_large_credit_beside_a_tiny_gradient_keeps_its_product():
    a = torch.full((1, 2), 1e200, dtype=torch.float64)
    g = torch.full((1, 2), 1e-20, dtype=torch.float64)
    found = credit_statistics([a], [g])
    assert float(found.dot) == pytest.approx(2e180, rel=1e-14)
    assert float(found.cosine) == pytest.approx(1, abs=1e-15)


def test_norms_below_the_floor_fade_out_and_nothing_else_does():
    unit = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for factor, expected in ((2.0, 1.0), (0.25, 0.25), (0.0, 0.0)):
        found = credit_statistics([unit * NORM_FLOOR * factor], [unit])
        assert float(found.cosine) == pytest.approx(expected, rel=1e-14)
    # Subnormals of float64, of norm 1e-310: 1e-280 of the floor's square is left of the cosine.
    assert float(credit_statistics([unit * 1e-310], [unit]).cosine) < 1e-279


def test_a_sample_that_is_not_finite_stays_alone():
    a, g = torch.ones(4, 3), torch.ones(4, 3)
    a[1, 0], g[2, 1] = torch.nan, torch.inf
    cosine = credit_statistics([a], [g]).cosine[0]
    assert cosine.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_samples_and_no_features(shape):
    empty = torch.zeros(shape)
    found = credit_statistics([empty], [empty])
    assert found.cosine.shape == (1, shape[0])
    assert torch.equal(found.cosine, torch.zeros(1, shape[0], dtype=torch.float64))


# The measures against hand-written ones


def test_every_measure_is_that_of_its_formula():
    model, x, y = make_problem()
    rule = make_rule("dfa", model, total_steps=1, seed=3)
    options = {"num_directions": 4, "epsilon": 1e-2, "nudge_size": 0.05, "null_draws": 3}
    report = rule_credit(rule, (x, y), seed=7, **options)
    assert [layer.layer for layer in report.layers] == ["blocks.0", "blocks.1", "blocks.2"]
    grads, states = gradients(model, x, y), states_of(model, x)
    credits = rule.credit(x, y)
    stream = torch.Generator().manual_seed(7)
    fresh = [make_rule("dfa", model, total_steps=1, seed=7 + k).credit(x, y) for k in range(3)]

    def gamma(a, g):
        return float(((a * g).sum(1) / (a.norm(dim=1) * g.norm(dim=1))).mean())

    for l, layer in enumerate(report.layers):
        a, g, h = credits[l], grads[l], states[l + 1].detach()
        with torch.no_grad():
            still = losses_from(model, l + 1, h, y)
            predicted, seen = [], []
            for _ in range(4):
                v = torch.randn(a.shape, generator=stream, dtype=torch.float64)
                v = v / v.norm(dim=1, keepdim=True)
                predicted.append((a * 1e-2 * v).sum(1))
                seen.append(losses_from(model, l + 1, h + 1e-2 * v, y) - still)
            table = torch.stack([torch.cat(predicted), torch.cat(seen)])
            nudged = losses_from(model, l + 1, h - 0.05 * a, y) - still
        # Loss differences of 1e-4 from losses of 1, in float64: right to 1e-11.
        assert layer.perturbation == pytest.approx(float(torch.corrcoef(table)[0, 1]), abs=1e-9)
        assert layer.nudge == pytest.approx(float(nudged.mean()), rel=1e-9)
        assert layer.gamma == pytest.approx(gamma(a, g), rel=1e-9)
        nulls = [gamma(draw[l], g) for draw in fresh]
        assert layer.null_mean == pytest.approx(sum(nulls) / 3, rel=1e-9)
        assert layer.null_sd == pytest.approx(
            float(torch.tensor(nulls, dtype=torch.float64).std()), rel=1e-9
        )
        assert layer.credit_norm == float(a.norm(dim=1).median())
        assert layer.grad_norm == pytest.approx(float(g.norm(dim=1).median()), rel=1e-9)
    deep = [gamma(credits[l], grads[l]) for l in (1, 2)]
    assert report.deep_gamma == pytest.approx(sum(deep) / 2, rel=1e-9)
    by_draw = [sum(gamma(draw[l], grads[l]) for l in (1, 2)) / 2 for draw in fresh]
    assert report.deep_null_mean == pytest.approx(sum(by_draw) / 3, rel=1e-9)
    assert report.deep_null_sd == pytest.approx(
        float(torch.tensor(by_draw, dtype=torch.float64).std())
    )


def test_the_model_is_left_as_it_was_found():
    model, x, y = make_problem()
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    rule_credit(make_rule("fa", model, total_steps=1), (x, y), num_directions=2, null_draws=2)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_transformer_is_compared_at_its_class_token():
    model = build_model(
        "vit-mini",
        input_shape=(1, 8, 8),
        num_classes=CLASSES,
        seed=0,
        d_hidden=16,
        num_blocks=2,
        num_heads=2,
    ).eval()
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6) % CLASSES
    rule = make_rule("dfa", model, total_steps=1)
    report = rule_credit(rule, (x, y), num_directions=2, null_draws=2)
    (gradient, _) = make_rule("bp", model, total_steps=1).credit(x, y)
    a, g = rule.credit(x, y)[0][:, 0].double(), gradient[:, 0].double()
    expected = ((a * g).sum(1) / (a.norm(dim=1) * g.norm(dim=1))).mean()
    # Gradients in float32, through two graphs of some hundred operations of 6e-8 each.
    assert report.layers[0].gamma == pytest.approx(float(expected), abs=1e-5)
    whole = rule_credit(rule, (x, y), num_directions=2, null_draws=2, reduction="flatten")
    # The gradient at the other tokens has no counterpart in the credit.
    assert abs(whole.layers[0].gamma) < abs(report.layers[0].gamma)


# Calibrations


def audit_network(seed=0):
    """A ResidualMLP of the protocol's width on a batch of 128, as it is drawn."""
    model = build_model(
        "resmlp", input_shape=(1, 28, 28), num_classes=10, seed=seed, d_hidden=256, num_blocks=4
    ).eval()
    x = torch.randn(128, 784, generator=torch.Generator().manual_seed(seed))
    return model, x, torch.arange(128) % 10


def test_the_gradient_as_credit_has_alignment_one_and_correlation_near_one():
    model, x, y = audit_network()
    report = rule_credit(make_rule("bp", model, total_steps=1), (x, y))
    for layer in report.layers:
        assert layer.gamma == pytest.approx(1, abs=1e-6)
        # The protocol saw .9965 on a trained network; a fresh one is closer to linear.
        assert layer.perturbation > 0.99
        assert layer.nudge < 0
        assert layer.null_mean is None
    assert report.deep_gamma == pytest.approx(1, abs=1e-6)


def test_a_random_vector_as_credit_has_neither():
    model, x, y = audit_network()
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(128, 256, generator=generator) for _ in range(4)]
    report = measure_credit(model, lambda x, y: draws, (x, y))
    # Γ: the mean of B cosines of unrelated directions in d dimensions, each of variance 1/d.
    gamma_sd = 1 / math.sqrt(128 * 256)
    # ρ: of M·B pairs. Given a and g of a sample the pairs share their cosine, which adds the
    # variance of Γ to that of M·B independent pairs, 1/(M·B).
    rho_sd = math.sqrt(1 / (32 * 128) + gamma_sd**2)
    for layer in report.layers:
        # Five standard deviations: one run in two million fails by chance, and seeds are fixed.
        assert abs(layer.gamma) < 5 * gamma_sd
        assert abs(layer.perturbation) < 5 * rho_sd


def test_fresh_feedback_is_unrelated_to_the_gradient():
    model, x, y = audit_network()
    report = rule_credit(make_rule("dfa", model, total_steps=1), (x, y), num_directions=1)
    for layer in report.layers:
        # Within a draw the samples share one matrix of rank C = 10: in the worst case all B agree,
        # and Γ of a draw has the variance 1/d. Twenty draws: a mean of sd at most 1/√(20·d).
        assert layer.null_sd < 2 / math.sqrt(256)
        assert abs(layer.null_mean) < 5 / math.sqrt(20 * 256)


def test_a_state_too_large_to_move_has_no_correlation():
    """h + εv = h in float32 once ‖h‖ is 1e6 times larger: nothing is measured, and it says 0."""
    model, x, y = audit_network()
    with torch.no_grad():
        model.embed.weight.mul_(1e8)
    report = rule_credit(make_rule("bp", model, total_steps=1), (x, y), num_directions=2)
    assert report.perturbations == [0.0] * 4
    assert report.gammas == pytest.approx([1] * 4, abs=1e-5)


# Any network


@pytest.mark.parametrize("kind", ["branching", "handing", "encoder"])
def test_gradients_by_hooks_are_the_gradient_on_any_network(kind):
    """Γ = 1 and ρ near 1 only if the same states are differentiated, moved and compared."""
    torch.manual_seed(0)
    options = {}
    if kind == "branching":
        model, x = Branching().double(), torch.randn(8, 5, dtype=torch.float64)
    elif kind == "handing":
        model, x = Handing().double(), torch.randint(11, (8, 3))
    else:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        model = nn.Sequential(nn.Linear(5, 8), encoder, nn.Flatten(), nn.Linear(4 * 8, 4)).double()
        x, options = torch.randn(8, 4, 5, dtype=torch.float64), {"taps": "1.layers.*"}
    model.eval()
    y = torch.arange(8) % 4
    if kind == "handing":
        logits, states = model(x, return_hidden=True)
    else:
        states = []
        if kind == "branching":
            h = model.embed(x)
            states.append(h)
            for block in model.blocks:
                states.append(states[-1] + block(states[-1]))
            logits = model.out_head(model.out_ln(states[-1]))
        else:
            states, h = [], model[0](x)
            for block in model[1].layers:
                h = block(h)
                states.append(h)
            logits = model[3](model[2](h))
    grads = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), states)
    report = measure_credit(model, lambda x, y: grads, (x, y), num_directions=8, **options)
    assert len(report.layers) == len(states)
    for layer in report.layers:
        assert layer.gamma == pytest.approx(1, abs=1e-9)
        # ε = 1e-3 leaves the curvature, of order ε relative to the slope.
        assert layer.perturbation > 0.99
        assert layer.nudge < 0


def test_states_may_count_samples_in_another_dimension():
    """Credit has the samples first, as the captured gradients have; the network has not."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = encoder, nn.Linear(8, 4).double()

        def forward(self, x):
            return self.head(self.encoder(x)[0])

    model, x, y = First(), torch.randn(3, 8, 8, dtype=torch.float64), torch.arange(8) % 4
    states = [x.clone().requires_grad_()]
    for block in encoder.layers:
        states.append(block(states[-1]))
    loss = F.cross_entropy(model.head(states[-1][0]), y, reduction="sum")
    grads = [g.transpose(0, 1) for g in torch.autograd.grad(loss, states[1:])]
    report = measure_credit(
        model, lambda x, y: grads, (x, y), taps="encoder.layers.*", batch_dim=1, num_directions=8
    )
    for layer in report.layers:
        assert layer.gamma == pytest.approx(1, abs=1e-9)
        assert layer.perturbation > 0.99


def test_a_loss_of_ones_own():
    model, x, y = make_problem()

    def squared(logits, y):
        return (logits - F.one_hot(y, CLASSES)).square().sum(1)

    states = states_of(model, x)
    logits = model.out_head(model.out_ln(states[-1]))
    grads = torch.autograd.grad(squared(logits, y).sum(), states)
    report = measure_credit(model, lambda x, y: grads, (x, y), loss=squared, num_directions=4)
    assert report.gammas == pytest.approx([1] * (BLOCKS + 1), abs=1e-9)
    # All states, the embedding's output too: one credit vector for each.
    assert report.layers[0].layer == "embed"


def test_cross_entropy_by_sample_averages_over_tokens():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4, generator=generator)
    y = torch.randint(4, (3, 5), generator=generator)
    expected = [F.cross_entropy(one, labels) for one, labels in zip(logits, y, strict=True)]
    torch.testing.assert_close(sample_cross_entropy(logits, y), torch.stack(expected))
    one_each = sample_cross_entropy(logits[:, 0], y[:, 0])
    torch.testing.assert_close(one_each, F.cross_entropy(logits[:, 0], y[:, 0], reduction="none"))


# Nothing to measure


def test_a_network_of_one_block_has_no_deep_layers():
    model, x, y = make_problem(blocks=1)
    rule = make_rule("dfa", model, total_steps=1)
    report = rule_credit(rule, (x, y), num_directions=1, null_draws=2)
    assert report.deep_gamma is None
    assert report.deep_null_mean is None


def test_frozen_blocks_have_no_credit():
    model, x, y = make_problem()
    report = rule_credit(make_rule("frozen", model, total_steps=1), (x, y))
    assert report.gammas == [None] * BLOCKS
    assert report.deep_gamma is None
    assert "N/A: the rule gives its blocks no credit" in str(report)


def test_a_report_without_layers_says_why():
    assert str(CreditReport(reason="the file is empty")) == "credit: N/A: the file is empty"


@pytest.mark.parametrize("rule", ["fa", "dfa", "state-bridge", "credit-bridge"])
def test_without_its_feedback_a_checkpoint_has_no_alignment(rule, tmp_path):
    model = build_model("resmlp", input_shape=(1, 28, 28), num_classes=10, d_hidden=8, num_blocks=2)
    made = make_rule(rule, model, total_steps=1)
    config = {"rule": rule, "model": "resmlp", "steps": 1}
    config["model_options"] = {"d_hidden": 8, "num_blocks": 2}
    content = {"state_dict": model.state_dict(), "config": config}
    state = {key: value.clone() for key, value in made.state_dict().items()}
    save_checkpoint({**content, "rule_state": state}, tmp_path / "whole.pt")
    save_checkpoint(content, tmp_path / "bare.pt")
    files = [str(tmp_path / "whole.pt"), str(tmp_path / "bare.pt")]
    out = tmp_path / "out.json"
    result = CliRunner().invoke(cli.app, ["diagnose", *files, "--credit", "--json", str(out)])
    assert result.exit_code in (0, 1), result.output
    whole, bare = (record["credit"] for record in json.loads(out.read_text()))
    assert len(whole["layers"]) == 2
    assert whole["deep_gamma"] < 0.9  # drawn at random: nowhere near the gradient
    assert bare["layers"] == []
    assert bare["deep_gamma"] is None
    assert f"no feedback of its rule '{rule}'" in bare["reason"]
    assert "credit: N/A: the checkpoint holds no feedback" in result.output


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({}, "does not say by which rule"),
        ({"config": {"rule": "dfa"}, "rule_state": [1]}, "rule_state: expected tensors by name"),
        ({"config": {"rule": "os:system"}}, "'os:system' is none of the package's"),
        (
            {"config": {"rule": "dfa"}, "rule_state": {"x": torch.ones(1)}},
            "expected the rule state",
        ),
    ],
)
def test_a_checkpoint_whose_rule_cannot_be_made_says_why(saved, message):
    with pytest.raises(ValueError, match=message):
        restore_rule(make_problem()[0], saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"null_draws": 1}, "null_draws: expected at least 2, got 1"),
        ({"num_directions": 0}, "num_directions: expected at least 1, got 0"),
        ({"epsilon": 0}, "epsilon: expected a finite number above 0, got 0"),
        ({"reduction": "mean"}, "reduction: expected flatten or cls, got mean"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    model, x, y = make_problem()
    with pytest.raises(ValueError, match=f"measure_credit: {message}"):
        rule_credit(make_rule("dfa", model, total_steps=1), (x, y), **options)


@pytest.mark.parametrize(
    ("credit", "message"),
    [
        ([torch.zeros(BATCH, DIM)], "expected 4 credit vectors, .* or one fewer, got 1"),
        (
            [torch.zeros(BATCH, DIM), torch.zeros(BATCH, 3), torch.zeros(BATCH, DIM)],
            r"blocks.1: expected credit of shape \[16, 24\], that of the state, got \[16, 3\]",
        ),
    ],
)
def test_credit_that_does_not_fit_its_states_is_refused(credit, message):
    model, x, y = make_problem()
    with pytest.raises(ValueError, match=message):
        measure_credit(model, lambda x, y: credit, (x, y))
