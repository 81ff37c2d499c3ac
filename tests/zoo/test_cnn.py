"""SmallCNN: its published sizes, its forward pass, and what an audit sees of it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fadiag_fast import diagnose
from fadiag_fast.zoo import SmallCNN, build_model

# Odd sizes, so that pooling has a row and a column to leave out; no two sizes alike.
SHAPE, CLASSES, CHANNELS, HIDDEN = (2, 11, 9), 5, (3, 4, 6), 7


def make_cnn(seed=0, **options):
    """A narrow float64 network in which every parameter and statistic matters."""
    torch.manual_seed(seed)
    options = {"channels": CHANNELS, "d_hidden": HIDDEN, **options}
    model = SmallCNN(SHAPE, CLASSES, **options).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, mean=1, std=0.3)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def states_by_hand(model, x):
    """Compute the four states and the logits from the state dict alone."""
    p = model.state_dict()
    states = []
    h = x
    for index in range(3):
        weight, bias = p[f"blocks.{index}.0.weight"], p[f"blocks.{index}.0.bias"]
        height, width = h.shape[2:]
        padded = torch.zeros(*h.shape[:2], height + 2, width + 2, dtype=h.dtype)
        padded[:, :, 1:-1, 1:-1] = h
        out = bias.view(1, -1, 1, 1)
        for i in range(3):
            for j in range(3):
                moved = padded[:, :, i : i + height, j : j + width]
                out = out + torch.einsum("bchw,oc->bohw", moved, weight[:, :, i, j])
        mean, variance, scale, shift = (
            p[f"blocks.{index}.1.{name}"].view(1, -1, 1, 1)
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        h = ((out - mean) / torch.sqrt(variance + 1e-5) * scale + shift).clamp(min=0)
        if index:
            h = h[:, :, : height // 2 * 2, : width // 2 * 2]
            h = h.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax(dim=(3, 5))
        states.append(h)
    flat = h.reshape(h.shape[0], -1)
    states.append((flat @ p["blocks.3.0.weight"].T + p["blocks.3.0.bias"]).clamp(min=0))
    return states, states[-1] @ p["out_head.weight"].T + p["out_head.bias"]


def test_sizes_are_the_published_ones():
    model = SmallCNN((3, 32, 32), 10)
    expected = {
        "blocks.0.0": (32 * 3 * 9) + 32,
        "blocks.0.1": 2 * 32,
        "blocks.1.0": (64 * 32 * 9) + 64,
        "blocks.1.1": 2 * 64,
        "blocks.2.0": (128 * 64 * 9) + 128,
        "blocks.2.1": 2 * 128,
        "blocks.3.0": 8192 * 256 + 256,
        "out_head": 256 * 10 + 10,
    }
    counts = dict.fromkeys(expected, 0)
    for name, parameter in model.named_parameters():
        counts[name.rpartition(".")[0]] += parameter.numel()
    assert counts == expected
    assert len(model.blocks) == 4
    assert not hasattr(model, "embed")
    assert not hasattr(model, "out_ln")


def test_greyscale_images_of_28_pixels_fit():
    model = build_model("smallcnn", input_shape=(1, 28, 28), num_classes=10)
    assert model.blocks[3][0].in_features == 128 * 7 * 7
    logits, hiddens = model(torch.zeros(2, 1, 28, 28), return_hidden=True)
    assert logits.shape == (2, 10)
    shapes = [(32, 28, 28), (64, 14, 14), (128, 7, 7), (256,)]
    assert [tuple(h.shape[1:]) for h in hiddens] == shapes == list(model.state_shapes)


def test_forward_follows_the_formulas():
    model = make_cnn()
    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    expected, expected_logits = states_by_hand(model, x)
    logits, hiddens = model(x, return_hidden=True)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-11, atol=1e-12)
    for h, by_hand in zip(hiddens, expected, strict=True):
        torch.testing.assert_close(h, by_hand, rtol=1e-11, atol=1e-12)
    assert torch.equal(model(x), logits)


def test_the_fourth_block_takes_the_flattened_map():
    model = make_cnn()
    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    h = x
    for block in model.blocks[:3]:
        h = block(h)
    assert torch.equal(model.out_head(model.blocks[3](h.flatten(1))), model(x))


def test_training_mode_uses_and_follows_the_batch():
    model = make_cnn().train()
    x = torch.randn(16, *SHAPE, dtype=torch.float64)
    plain = nn.BatchNorm2d(CHANNELS[0]).double()
    plain.load_state_dict(model.blocks[0][1].state_dict())
    convolved = model.blocks[0][0](x)
    torch.testing.assert_close(model.blocks[0](x), F.relu(plain(convolved)))
    torch.testing.assert_close(model.blocks[0][1].running_var, plain.running_var)
    assert model.blocks[0][1].num_batches_tracked == 1


def test_diagnose_reads_the_outputs_of_the_four_blocks():
    model = make_cnn()
    x = torch.randn(8, *SHAPE, dtype=torch.float64)
    y = torch.arange(8) % CLASSES
    states, _ = states_by_hand(model, x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = diagnose(model, [(x, y)])
    norms = [float(h.flatten(1).norm(dim=1).median()) for h in states]
    assert report.residual_norms == pytest.approx(norms, rel=1e-10)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((784,), 10), r"an input_shape \(channels, height, width\), got \(784,\)"),
        (((3, 3, 8), 10), "height and width of at least 4, got 3 and 8"),
        (((0, 8, 8), 10), "channels of at least 1, got 0"),
        (((3, 8, 8), 0), "num_classes of at least 1, got 0"),
    ],
)
def test_shapes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=f"SmallCNN: expected {message}"):
        SmallCNN(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (3, 0, 4)}, r"channels\[1\] of at least 1, got 0"),
        ({"channels": (3, 4)}, r"three channels, got \(3, 4\)"),
        ({"d_hidden": 0}, "d_hidden of at least 1, got 0"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=f"SmallCNN: expected {message}"):
        SmallCNN(SHAPE, CLASSES, **options)


def test_an_input_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"of shape \[B, 2, 11, 9\], got \[4, 198\]"):
        make_cnn()(torch.zeros(4, 198, dtype=torch.float64))
