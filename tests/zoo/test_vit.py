"""ViTMini: its forward pass against torch's own attention, and the residual contract."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fadiag_fast import diagnose
from fadiag_fast.zoo import ViTMini, build_model

# Two by three patches, and no two sizes alike.
SHAPE, CLASSES = (3, 4, 6), 5
SMALL = {"d_hidden": 8, "num_blocks": 2, "num_heads": 4, "mlp_ratio": 3, "patch_size": 2}


def make_vit():
    """A small float64 network whose branches are as large as its stream."""
    torch.manual_seed(0)
    model = ViTMini(SHAPE, CLASSES, **SMALL).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


def logits_by_torch(model, x):
    """Compute the logits with a strided convolution and nn.MultiheadAttention."""
    p = dict(model.named_parameters())
    dim, patch = SMALL["d_hidden"], SMALL["patch_size"]
    kernel = p["embed.projection.weight"].view(dim, SHAPE[0], patch, patch)
    patches = F.conv2d(x, kernel, p["embed.projection.bias"], stride=patch)
    tokens = patches.flatten(2).transpose(1, 2)
    first = p["embed.class_token"].expand(len(x), 1, dim)
    h = torch.cat([first, tokens], dim=1) + p["embed.positions"]

    def norm(name, value):
        return F.layer_norm(value, (dim,), p[f"{name}.weight"], p[f"{name}.bias"])

    for index in range(SMALL["num_blocks"]):
        at = f"blocks.{index}"
        attention = nn.MultiheadAttention(dim, SMALL["num_heads"], batch_first=True).double()
        attention.load_state_dict(
            {
                "in_proj_weight": p[f"{at}.attention.qkv.weight"],
                "in_proj_bias": p[f"{at}.attention.qkv.bias"],
                "out_proj.weight": p[f"{at}.attention.out.weight"],
                "out_proj.bias": p[f"{at}.attention.out.bias"],
            }
        )
        normal = norm(f"{at}.ln1", h)
        h = h + attention(normal, normal, normal, need_weights=False)[0]
        inner = norm(f"{at}.ln2", h) @ p[f"{at}.w1.weight"].T + p[f"{at}.w1.bias"]
        gelu = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        h = h + gelu @ p[f"{at}.w2.weight"].T + p[f"{at}.w2.bias"]
    return norm("out_ln", h[:, 0]) @ p["out_head.weight"].T + p["out_head.bias"]


def test_forward_follows_the_formulas():
    model = make_vit()
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(model(x), logits_by_torch(model, x), rtol=1e-10, atol=1e-11)


def test_sizes_are_the_documented_ones():
    model = build_model("vit-mini", input_shape=(3, 32, 32), num_classes=10)
    assert len(model.blocks) == 4
    h = model.embed(torch.randn(2, 3, 32, 32)).detach()
    assert h.shape == (2, 1 + 8 * 8, 128)
    # 12·d² weights and 13·d biases and norms a block, as in every transformer of this ratio.
    counts = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    assert counts == [12 * 128**2 + 13 * 128] * 4
    # The class token starts tiny: the reason why growth is no ratio to ‖h_0‖.
    assert 0.1 < float(h[0, 0].norm()) < 0.6
    assert float(h[0, 1:].norm(dim=1).median()) > 2


def test_it_follows_the_residual_contract():
    model = make_vit()
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    h = model.embed(x)
    for block in model.blocks:
        h = h + block(h)
    assert torch.equal(model.out_head(model.out_ln(h)), model(x))
    report = diagnose(model, [(x, torch.arange(3))])
    assert len(report.residual_norms) == SMALL["num_blocks"] + 1


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((784,), {}, r"an input_shape \(channels, height, width\), got \(784,\)"),
        (SHAPE, {"patch_size": 4}, "a patch_size that divides height and width, 4 and 6, got 4"),
        (SHAPE, {"num_heads": 3}, "a num_heads that divides d_hidden 8, got 3"),
        (SHAPE, {"num_blocks": 0}, "num_blocks of at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit(shape, options, message):
    with pytest.raises(ValueError, match=f"ViTMini: expected {message}"):
        ViTMini(shape, CLASSES, **{**SMALL, **options})


def test_an_input_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"of shape \[B, 3, 4, 6\], got \[2, 3, 6, 4\]"):
        make_vit()(torch.zeros(2, 3, 6, 4, dtype=torch.float64))
