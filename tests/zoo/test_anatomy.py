"""The anatomies, and the credit rules on the networks that are no residual MLP."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import noisy_patterns

from fadiag_fast.zoo import RULES, ImageDataset, build_model, make_rule, train
from fadiag_fast.zoo.residual_contract import Anatomy, anatomy_of

# Small enough to be quick; the CNN's states have three shapes, the ViT's have tokens.
SHAPE, CLASSES, BATCH = (2, 8, 8), 5, 6
OPTIONS = {
    "resmlp": {"d_hidden": 12, "num_blocks": 3},
    "smallcnn": {"channels": (3, 4, 5), "d_hidden": 7},
    "student": {"d_hidden": 12, "num_blocks": 3},
    "vit-mini": {"d_hidden": 8, "num_blocks": 3, "num_heads": 2, "mlp_ratio": 2},
}
FLAT = ("resmlp", "student")
MODELS = list(OPTIONS)


def make_problem(name, dtype=torch.float64):
    """A network whose blocks all matter, and one batch for it."""
    generator = torch.Generator().manual_seed(0)
    model = build_model(name, input_shape=SHAPE, num_classes=CLASSES, **OPTIONS[name]).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(draw * 0.3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.add_(1)
    x = torch.randn(BATCH, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.arange(BATCH) % CLASSES
    return model, x.flatten(1) if name in FLAT else x, y


def states_by_hand(name, model, x):
    """Compute h_0 … h_L and the logits without an anatomy."""
    if name == "smallcnn":
        states = [x]
        for index, block in enumerate(model.blocks):
            states.append(block(states[-1].flatten(1) if index == 3 else states[-1]))
        return states, model.out_head(states[-1])
    states = [model.embed(x)]
    for block in model.blocks:
        states.append(states[-1] + block(states[-1]))
    last = model.out_ln(states[-1]) if hasattr(model, "out_ln") else states[-1]
    return states, model.out_head(last)


def recorded_gradients(rule, x, y):
    """Make one update and return the gradient each parameter's optimiser step was given."""
    names = {parameter: name for name, parameter in rule.model.named_parameters()}
    seen = {}

    def record(optimizer, args, kwargs):
        for parameter in optimizer.param_groups[0]["params"]:
            seen[names[parameter]] = None if parameter.grad is None else parameter.grad.clone()

    handle = rule.optimizer.register_step_pre_hook(record)
    rule.update(x, y)
    handle.remove()
    return seen


# Anatomies


@pytest.mark.parametrize("name", MODELS)
def test_an_anatomy_walks_through_its_network(name):
    model, x, _ = make_problem(name)
    model.eval()
    expected, logits = states_by_hand(name, model, x)
    anatomy = anatomy_of(model)
    states = [anatomy.embed(x)]
    for index in range(len(anatomy.blocks)):
        states.append(anatomy.advance(states[-1], anatomy.branch(index, states[-1])))
    for h, by_hand in zip(states, expected, strict=True):
        assert torch.equal(h, by_hand)
    assert torch.equal(anatomy.logits(states[-1]), logits)
    assert torch.equal(logits, model(x))
    assert anatomy.num_classes == CLASSES
    counts = [anatomy.features(h).shape[1] for h in states]
    assert anatomy.feature_counts == counts


@pytest.mark.parametrize("name", MODELS)
def test_as_state_is_the_adjoint_of_features(name):
    model, x, _ = make_problem(name)
    anatomy = anatomy_of(model)
    for h, count in zip(states_by_hand(name, model, x)[0], anatomy.feature_counts, strict=True):
        credit = torch.randn(BATCH, count, dtype=torch.float64)
        state = anatomy.as_state(credit, like=h)
        assert state.shape == h.shape
        torch.testing.assert_close((h * state).sum(), (anatomy.features(h) * credit).sum())


def test_a_module_without_an_anatomy_is_read_by_the_residual_contract():
    model, _, _ = make_problem("resmlp")
    assert type(anatomy_of(model)) is Anatomy
    # An attribute of that name which is something else is not taken for one.
    type(model).anatomy = "knees"
    try:
        assert type(anatomy_of(model)) is Anatomy
    finally:
        del type(model).anatomy


# Backpropagation and frozen blocks


@pytest.mark.parametrize("name", ["smallcnn", "vit-mini"])
def test_bp_is_a_plain_autograd_loop_bit_for_bit(name):
    (model, x, y), (twin, _, _) = make_problem(name), make_problem(name)
    rule = make_rule("bp", model, total_steps=5)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for _ in range(5):
        loss = F.cross_entropy(twin(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        assert torch.equal(rule.update(x, y)["loss"], loss.detach())
    expected = twin.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["smallcnn", "vit-mini"])
def test_bp_credit_is_each_samples_own_gradient(name):
    model, x, y = make_problem(name)
    model.eval()
    credits = make_rule("bp", model, total_steps=1).credit(x, y)
    for b in range(BATCH):
        states, logits = states_by_hand(name, model, x[b : b + 1])
        loss = F.cross_entropy(logits, y[b : b + 1])
        for a, g in zip(credits, torch.autograd.grad(loss, states[1:]), strict=True):
            torch.testing.assert_close(a[b : b + 1], g, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", ["smallcnn", "vit-mini"])
def test_frozen_blocks_keep_their_weights(name):
    model, x, y = make_problem(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rule = make_rule("frozen", model, total_steps=3)
    assert rule.credit(x, y) == [None] * len(model.blocks)
    for _ in range(3):
        rule.update(x, y)
    for key, value in model.state_dict().items():
        # Statistics are measured rather than learned: evaluation has to match training.
        measured = "running" in key or "num_batches" in key
        assert torch.equal(value, before[key]) == (key.startswith("blocks.") and not measured), key


# Direct feedback alignment


@pytest.mark.parametrize("name", ["smallcnn", "vit-mini"])
def test_dfa_credit_is_the_output_error_through_a_matrix_per_state(name):
    model, x, y = make_problem(name)
    model.eval()
    rule = make_rule("dfa", model, total_steps=1, seed=3)
    states, logits = states_by_hand(name, model, x)
    error = logits.detach().softmax(1)
    error[torch.arange(BATCH), y] -= 1
    for index, (credit, h) in enumerate(zip(rule.credit(x, y), states[1:], strict=True)):
        assert credit.shape == h.shape
        matrix = rule.state_dict()[f"feedback.{index}"]
        expected = torch.einsum("bc,dc->bd", error, matrix)
        if name == "vit-mini":
            assert torch.count_nonzero(credit[:, 1:]) == 0
            credit = credit[:, 0]
        assert matrix.shape == (credit[0].numel(), CLASSES)
        torch.testing.assert_close(credit.flatten(1), expected)


def test_dfa_matrices_of_a_cnn_have_the_documented_spread():
    model = build_model("smallcnn", input_shape=(1, 28, 28), num_classes=10)
    feedback = make_rule("dfa", model, total_steps=1).state_dict()
    assert [len(matrix) for matrix in feedback.values()] == [25088, 12544, 6272, 256]
    for matrix in feedback.values():
        # At least 2,560 draws: the standard deviation is known to 1.4%.
        assert float(matrix.std()) == pytest.approx(10**-0.5, rel=0.05)


@pytest.mark.parametrize("name", ["smallcnn", "vit-mini"])
def test_dfa_update_descends_each_blocks_own_inner_product(name):
    """The gradients given to the optimiser, against central differences of ⟨f_l(h_l), a_l⟩."""
    model, x, y = make_problem(name)
    rule = make_rule("dfa", model, total_steps=1)
    with torch.no_grad():
        states, _ = states_by_hand(name, model, x)
    credits = rule.credit(x, y)
    names = {parameter: key for key, parameter in model.named_parameters()}

    def local_loss(index):
        h = states[index]
        flat = name == "smallcnn" and index == 3
        return float((model.blocks[index](h.flatten(1) if flat else h) * credits[index]).sum())

    expected = {}
    with torch.no_grad():
        for index, block in enumerate(model.blocks):
            for parameter in block.parameters():
                flat, at = parameter.view(-1), parameter.numel() // 2
                kept, step = float(flat[at]), 1e-5
                flat[at] = kept + step
                above = local_loss(index)
                flat[at] = kept - step
                below = local_loss(index)
                flat[at] = kept
                expected[names[parameter], at] = (above - below) / (2 * step) / BATCH
    seen = recorded_gradients(rule, x, y)
    assert any(abs(value) > 1e-3 for value in expected.values())
    for (key, at), value in expected.items():
        assert float(seen[key].view(-1)[at]) == pytest.approx(value, rel=1e-5, abs=1e-8), key
    assert not any(key.startswith("embed.") for key in seen)


@pytest.mark.parametrize("name", ["smallcnn", "vit-mini"])
def test_dfa_head_learns_from_cross_entropy_on_the_detached_state(name):
    model, x, y = make_problem(name)
    head = {key: p for key, p in model.named_parameters() if key.startswith("out_")}
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(head.values()))
    seen = recorded_gradients(make_rule("dfa", model, total_steps=1), x, y)
    for key, grad in zip(head, expected, strict=True):
        torch.testing.assert_close(seen[key], grad)


def test_dfa_can_train_a_transformers_embedding():
    model, x, y = make_problem("vit-mini")
    rule = make_rule("dfa", model, total_steps=1, train_embed=True)
    error = model(x).softmax(1) - F.one_hot(y, CLASSES)
    credit = error.detach() @ rule.state_dict()["embed_feedback"].T
    seen = recorded_gradients(rule, x, y)
    # The class token and its position are the only parameters of token 0.
    torch.testing.assert_close(seen["embed.class_token"][0, 0], credit.mean(0))
    assert torch.count_nonzero(seen["embed.projection.weight"]) == 0


def test_a_network_without_an_embedding_has_no_such_option():
    model, _, _ = make_problem("smallcnn")
    for rule in ("bp", "dfa", "frozen"):
        with pytest.raises(ValueError, match="expected a model with an embedding, got SmallCNN"):
            make_rule(rule, model, total_steps=1, train_embed=True)


# Equilibrium propagation


def test_ep_on_tokens_is_plain_gradient_descent_on_the_energy():
    model, x, y = make_problem("vit-mini")
    beta, rate, steps = 0.7, 0.05, 4
    rule = make_rule(
        "ep", model, total_steps=1, beta=beta, relaxation_steps=steps, relaxation_rate=rate
    )
    h = [state.detach() for state in states_by_hand("vit-mini", model, x)[0]]

    def residuals(states):
        return [
            states[i + 1] - states[i] - block(states[i]) for i, block in enumerate(model.blocks)
        ]

    for _ in range(steps):
        leaves = [h[0], *(state.clone().requires_grad_() for state in h[1:])]
        energy = sum(r.square().sum() / 2 for r in residuals(leaves))
        logits = model.out_head(model.out_ln(leaves[-1]))
        total = energy + beta * F.cross_entropy(logits, y, reduction="sum")
        grads = torch.autograd.grad(total, leaves[1:])
        h[1:] = [a.detach() - rate * g for a, g in zip(leaves[1:], grads, strict=True)]
    with torch.no_grad():
        expected = [-r / beta for r in residuals(h)]
    for a, b in zip(rule.credit(x, y), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    energy = sum((beta * a).square().sum() / (2 * BATCH) for a in expected)
    torch.testing.assert_close(rule.update(x, y)["local_loss"], energy / beta)


# Whole runs


@pytest.fixture(scope="module")
def tiny() -> ImageDataset:
    """Four classes of noisy 2x8x8 patterns, easy to tell apart."""
    return noisy_patterns("tiny", SHAPE, train=200, test=80, noise=0.3)


# Wide enough that also a local rule separates four patterns in fifty steps.
WIDE = {
    "smallcnn": {"channels": (8, 16, 32), "d_hidden": 32},
    "student": {"d_hidden": 16, "num_blocks": 2},
    "vit-mini": {"d_hidden": 16, "num_blocks": 2, "num_heads": 2, "mlp_ratio": 2},
}
RUNS = [(name, rule) for name in WIDE for rule in RULES]


@pytest.mark.parametrize(("name", "rule"), RUNS)
def test_every_network_learns_an_easy_set_and_its_run_repeats(name, rule, tiny):
    def run():
        return train(
            name,
            rule,
            tiny,
            steps=50,
            batch_size=32,
            learning_rate=1e-2,
            model_options=WIDE[name],
        )

    first, again = run(), run()
    # A bridge still learns what it predicts in its first fifty steps; chance is .25.
    assert first.accuracy > (0.6 if rule.endswith("bridge") else 0.8)
    assert first.history == again.history
    weights = again.model.state_dict()
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, weights[key])


@pytest.mark.parametrize("name", ["smallcnn", "vit-mini"])
def test_a_checkpoint_restores_network_and_credit(name, tiny, tmp_path):
    network = train(name, "dfa", tiny, steps=3, batch_size=32, model_options=OPTIONS[name])
    torch.save(network.checkpoint(), tmp_path / "run.pt")
    loaded = torch.load(tmp_path / "run.pt", weights_only=True)
    config = loaded["config"]
    model = build_model(
        name, input_shape=tuple(config["input_shape"]), num_classes=4, **config["model_options"]
    )
    model.load_state_dict(loaded["state_dict"])
    rule = make_rule("dfa", model.eval(), total_steps=1, seed=999)
    rule.load_state_dict(loaded["rule_state"])
    ((x, y),) = tiny.eval_batches(16, 1)
    assert torch.equal(model(x), network.model(x))
    for a, b in zip(rule.credit(x, y), network.rule.credit(x, y), strict=True):
        assert torch.equal(a, b)
