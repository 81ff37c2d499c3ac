"""The zoo's networks: structure, initial values, and building by name."""

import pytest
import torch
from torch.nn import functional as F

from fadiag_fast.zoo import ResidualMLP, StudentNet, build_model


def forward_by_hand(model: ResidualMLP, x: torch.Tensor) -> torch.Tensor:
    """Compute the logits from the parameters alone, following the protocol's formulas."""
    p = dict(model.named_parameters())
    h = x @ p["embed.weight"].T + p["embed.bias"]
    for index in range(len(model.blocks)):
        at = f"blocks.{index}."
        mean = h.mean(dim=1, keepdim=True)
        variance = h.var(dim=1, keepdim=True, unbiased=False)
        normal = (h - mean) / torch.sqrt(variance + 1e-5)
        normal = normal * p[at + "ln.weight"] + p[at + "ln.bias"]
        inner = normal @ p[at + "w1.weight"].T + p[at + "w1.bias"]
        gelu = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        h = h + gelu @ p[at + "w2.weight"].T + p[at + "w2.bias"]
    if "out_ln.weight" in p:
        mean = h.mean(dim=1, keepdim=True)
        variance = h.var(dim=1, keepdim=True, unbiased=False)
        h = (h - mean) / torch.sqrt(variance + 1e-5) * p["out_ln.weight"] + p["out_ln.bias"]
    return h @ p["out_head.weight"].T + p["out_head.bias"]


@pytest.mark.parametrize("terminal_norm", [True, False])
def test_forward_follows_the_formulas(terminal_norm):
    torch.manual_seed(0)
    model = ResidualMLP(7, 12, 5, 3, terminal_norm).double()
    with torch.no_grad():
        # Fresh branches and norms are near trivial; make every parameter matter.
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    x = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(model(x), forward_by_hand(model, x), rtol=1e-12, atol=1e-12)


def test_a_block_returns_the_branch_without_the_skip():
    torch.manual_seed(0)
    model = ResidualMLP(784, 256, 10, 4)
    h = torch.randn(64, 256)
    with torch.no_grad():
        branch = model.blocks[0](h)
    # With W2 ~ N(0, 0.01²) and a zero bias a branch is about 5% of its input; with the skip
    # included the ratio would be about 1.
    assert branch.norm() / h.norm() < 0.15
    assert branch.norm() > 0


def test_initial_values_are_the_protocols():
    torch.manual_seed(0)
    model = ResidualMLP(3072, 256, 10, 4)
    for block in model.blocks:
        weight = block.w2.weight.detach()
        # 65,536 draws: the standard deviation is known to about 0.3%.
        assert float(weight.std()) == pytest.approx(0.01, rel=0.02)
        assert abs(float(weight.mean())) < 2e-4
        assert torch.count_nonzero(block.w2.bias) == 0
        assert torch.count_nonzero(block.w1.bias) > 0
    x = torch.randn(128, 3072)
    with torch.no_grad():
        h = h_0 = model.embed(x)
        for block in model.blocks:
            h = h + block(h)
    # The protocol's figures for random init: norms near 8.7 and a stream that barely turns.
    assert 7 < float(h.norm(dim=1).median()) < 12
    assert float(F.cosine_similarity(h, h_0).mean()) == pytest.approx(0.98, abs=0.02)


def test_parameter_names_are_those_of_the_protocols_checkpoints():
    names = set(ResidualMLP(6, 4, 3, 1).state_dict())
    assert names == {
        f"{module}.{kind}"
        for module in (
            "embed",
            "blocks.0.ln",
            "blocks.0.w1",
            "blocks.0.w2",
            "out_ln",
            "out_head",
        )
        for kind in ("weight", "bias")
    }


def test_without_terminal_norm_the_attribute_is_absent():
    model = ResidualMLP(6, 4, 3, 1, terminal_norm=False)
    assert not hasattr(model, "out_ln")
    assert model(torch.zeros(2, 6)).shape == (2, 3)


@pytest.mark.parametrize("name", ["input_dim", "d_hidden", "num_classes", "num_blocks"])
def test_a_size_below_one_is_refused(name):
    sizes = {"input_dim": 6, "d_hidden": 4, "num_classes": 3, "num_blocks": 1, name: 0}
    with pytest.raises(ValueError, match=f"ResidualMLP: expected {name} of at least 1, got 0"):
        ResidualMLP(**sizes)


def test_an_unflattened_input_is_refused():
    with pytest.raises(
        ValueError, match=r"expected an input of shape \[B, 6\], got \[2, 1, 2, 3\]"
    ):
        ResidualMLP(6, 4, 3, 1)(torch.zeros(2, 1, 2, 3))


def test_the_student_is_a_residual_mlp_without_a_terminal_norm():
    torch.manual_seed(0)
    student = StudentNet(16)
    per_block = 2 * 128 + 2 * (128 * 128 + 128)
    assert sum(p.numel() for p in student.parameters()) == (
        (16 * 128 + 128) + 4 * per_block + (128 * 10 + 10)
    )
    assert not any(name.startswith("out_ln") for name in student.state_dict())
    student.double()
    x = torch.randn(5, 16, dtype=torch.float64)
    torch.testing.assert_close(student(x), forward_by_hand(student, x), rtol=1e-12, atol=1e-12)
    torch.manual_seed(0)
    twin = build_model("student", input_shape=(1, 1, 16), num_classes=10)
    assert isinstance(twin, StudentNet)
    for name, weight in twin.state_dict().items():
        assert torch.equal(weight.double(), student.state_dict()[name])


def test_a_student_is_named_in_its_errors():
    with pytest.raises(ValueError, match="StudentNet: expected d_hidden of at least 1, got 0"):
        StudentNet(16, d_hidden=0)


def test_build_model_by_name():
    model = build_model(
        "resmlp", input_shape=(1, 28, 28), num_classes=10, d_hidden=32, num_blocks=2
    )
    assert isinstance(model, ResidualMLP)
    assert len(model.blocks) == 2
    assert model(torch.zeros(3, 784)).shape == (3, 10)


def test_build_model_names_what_exists():
    with pytest.raises(
        ValueError, match=r"expected one of resmlp, smallcnn, student, vit-mini, got 'resnet9000'"
    ):
        build_model("resnet9000", input_shape=(3,), num_classes=2)


def test_build_model_refuses_an_unknown_option():
    with pytest.raises(TypeError, match="depth"):
        build_model("resmlp", input_shape=(3,), num_classes=2, depth=4)


def test_a_seed_fixes_the_weights_and_leaves_the_global_generator_alone():
    shape = {"input_shape": (5,), "num_classes": 3, "d_hidden": 8, "num_blocks": 1}
    torch.manual_seed(7)
    expected_next = torch.rand(3)
    torch.manual_seed(7)
    first = build_model("resmlp", seed=1, **shape)
    assert torch.equal(torch.rand(3), expected_next)
    again = build_model("resmlp", seed=1, **shape)
    other = build_model("resmlp", seed=2, **shape)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert not torch.equal(first.embed.weight, other.embed.weight)


def test_the_global_generator_is_put_back_when_building_fails():
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="num_blocks"):
        build_model("resmlp", input_shape=(5,), num_classes=3, num_blocks=0, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
