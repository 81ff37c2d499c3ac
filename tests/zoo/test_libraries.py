"""Networks and images by name: torchvision, timm, folders of images; errors that say what to do."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fadiag_fast import cli
from fadiag_fast.checkpoints import save_checkpoint
from fadiag_fast.zoo import image_folders as folders
from fadiag_fast.zoo import load_dataset
from fadiag_fast.zoo.image_folders import IMAGENET_MEAN, IMAGENET_STD
from fadiag_fast.zoo.libraries import build_from

# At the end: an installed fadiag_fast stays the one under test.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.vision import import_torchvision

runner = CliRunner()
SMALL = ("--batches", "8", "--batch-size", "2", "--max-stability", "1")


def fadiag(*arguments):
    return runner.invoke(cli.app, [str(a) for a in arguments])


def text_of(result):
    """A result's output as one line."""
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def torchvision():
    if find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    return import_torchvision()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes, of which one has fewer images than the others; grey, colour and wide ones."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 7)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count if name != "bee" else 2):
                shape = (40, 32, 3) if index else (48, 64)
                pixels = generator.integers(0, 256, shape, dtype=np.uint8)
                pixels[:4] = 60 * label
                image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    (folder / "val" / "ant" / "list.txt").write_text("no image")
    return folder


# --- data ---


def test_folders_are_read_class_by_class_in_turn(pictures):
    data = load_dataset(f"imagefolder:{pictures}", size=32)
    assert data.test_labels.tolist() == [0, 1, 2, 0, 1, 2, *[0, 2] * 5]
    assert data.test_images.shape == (16, 3, 32, 32)
    assert data.train_images.shape == (6, 3, 32, 32)
    assert data.num_classes == 3
    few = load_dataset(f"imagefolder:{pictures}", size=32, limit=4)
    assert few.test_labels.tolist() == [0, 1, 2, 0]


def test_pixels_are_normalised_unless_told_not_to(pictures):
    raw = load_dataset(f"imagefolder:{pictures}", size=32, normalize=False).test_images
    assert 0 <= raw.min() < raw.max() <= 1
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    normal = load_dataset(f"imagefolder:{pictures}", size=32).test_images
    torch.testing.assert_close(normal, (raw - mean) / std)
    # The first of each class is grey: its channels are equal.
    assert torch.equal(raw[0, 0], raw[0, 1])
    assert load_dataset(f"imagefolder:{pictures}", size=32, channels=1).input_shape == (1, 32, 32)


def test_an_image_of_the_right_size_is_not_touched(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    (tmp_path / "only").mkdir()
    image.fromarray(pixels).save(tmp_path / "only" / "a.png")
    data = load_dataset(f"imagefolder:{tmp_path}", normalize=False)
    assert torch.equal(data.test_images[0] * 255, torch.from_numpy(pixels).permute(2, 0, 1).float())
    assert torch.equal(data.train_images, data.test_images)


def test_grey_images_repeat_their_channel():
    grey, three = load_dataset("fashion-mnist-mini"), load_dataset("fashion-mnist-mini", channels=3)
    assert three.input_shape == (3, 28, 28)
    assert torch.equal(three.test_images[:, 2], grey.test_images[:, 0])


@pytest.mark.parametrize(
    ("spec", "options", "error", "message"),
    [
        ("imagefolder", {}, ValueError, "expected imagefolder:FOLDER"),
        ("imagefolder:/nowhere", {}, FileNotFoundError, "expected a folder /nowhere, got nothing"),
        ("imagefolder:PICTURES", {}, ValueError, "images of one size, .* size=PIXELS scales"),
        ("imagefolder:PICTURES", {"size": 0}, ValueError, "size: expected at least 1, got 0"),
        ("imagefolder:PICTURES", {"channels": 2}, ValueError, "channels: expected 1 or 3, got 2"),
        ("imagefolder:PICTURES", {"colour": 2}, ValueError, "expected an option among size, limit"),
        ("imagefolder:PICTURES/val/ant", {}, ValueError, "one folder a class in .*, got none"),
        ("fashion-mnist-mini", {"size": 32}, ValueError, "an option among channels, got size"),
        ("fashion-mnist-mini", {"channels": 4}, ValueError, "channels: expected 1 or 3, got 4"),
    ],
)
def test_bad_data(pictures, spec, options, error, message):
    with pytest.raises(error, match=message):
        load_dataset(spec.replace("PICTURES", str(pictures)), **options)


def test_a_broken_image_and_a_strange_class_are_named(tmp_path):
    pytest.importorskip("PIL.Image")
    for name in ("train/a", "val/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"expected an image in .*broken\.png"):
        load_dataset(f"imagefolder:{tmp_path}")
    with pytest.raises(ValueError, match="expected only classes of the training split"):
        folders._read_split(tmp_path / "val", ["a"], None, 0, 3, True)


# --- networks ---


def test_networks_are_built_for_the_data(torchvision):
    model = build_from("torchvision", "resnet18", input_shape=(3, 32, 32), num_classes=7)
    assert model.fc.out_features == 7
    timm = pytest.importorskip("timm")
    model = build_from("timm", "resnet10t", input_shape=(1, 32, 32), num_classes=7, stem_width=8)
    assert isinstance(model, timm.models.ResNet)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("library", "name", "shape", "message"),
    [
        (
            "torchvision",
            "resnet19",
            (3, 8, 8),
            "a network of torchvision, got 'resnet19'; see .*18",
        ),
        ("timm", "zzz", (3, 8, 8), r"got 'zzz'; see timm\.list_models\(\)"),
        ("torchvision", "resnet18", (1, 8, 8), "3 channels, the data have 1; --data-option chan"),
        ("torchvision", "resnet18", (4, 8, 8), "takes images of 3 channels, the data have 4$"),
    ],
)
def test_networks_that_cannot_be_built(torchvision, library, name, shape, message):
    pytest.importorskip(library)
    with pytest.raises(ValueError, match=message):
        build_from(library, name, input_shape=shape, num_classes=3)


def test_a_missing_library_and_one_for_another_torch_are_told_apart(monkeypatch):
    arguments = {"input_shape": (3, 8, 8), "num_classes": 3}
    monkeypatch.setitem(sys.modules, "torchvision", None)
    torch_here = torch.__version__.partition("+")[0]
    line = rf"needs torchvision, .* pip install torch=={re.escape(torch_here)} torchvision timm"
    with pytest.raises(ImportError, match=line):
        build_from("timm", "resnet10t", **arguments)

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("fadiag_fast.zoo.libraries.importlib.import_module", broken)
    with pytest.raises(ImportError, match=r"built for torch .*nms does not exist\)\. Inst"):
        build_from("torchvision", "resnet18", **arguments)


# --- on the command line ---


def test_untrained_networks_of_torchvision_and_timm(torchvision, pictures):
    data = ("--data", f"imagefolder:{pictures}", "--data-option", "size=32")
    result = fadiag("diagnose", "--init", 0, "--model", "torchvision:resnet18", *data, *SMALL)
    assert result.exit_code in (0, 1), result.output
    assert "seed 0: " in text_of(result)
    assert "chain of 8 BasicBlock in layer*.*: asked for 8, saw 8, 9 states" in text_of(result)
    pytest.importorskip("timm")
    model = ("--model", "timm:resnet10t", "--model-option", "stem_width=8")
    result = fadiag("diagnose", "--init", 0, "--init", 1, *model, *data, *SMALL)
    assert result.exit_code in (0, 1), result.output
    assert "seed 1: " in text_of(result)


def test_a_checkpoint_with_named_taps(torchvision, pictures, tmp_path):
    model = build_from("torchvision", "resnet18", input_shape=(3, 32, 32), num_classes=3)
    save_checkpoint({"state_dict": model.state_dict()}, tmp_path / "r.pt")
    common = ("diagnose", tmp_path / "r.pt", "--model", "torchvision:resnet18", *SMALL)
    result = fadiag(*common)
    assert result.exit_code == 3
    assert "--data-option channels=3 repeats the grey one" in text_of(result)
    common += ("--data", f"imagefolder:{pictures}", "--data-option", "size=32")
    result = fadiag(*common, "--taps", "layer?.0", "--taps", "fc:input", "--reduction", "mean")
    assert result.exit_code in (0, 1), result.output
    assert "named: asked for 5, saw 5, 5 states" in text_of(result)
    assert "fc:input" in text_of(result)
    assert "sample reduction: mean" in text_of(result)
    result = fadiag(*common, "--taps", "layr1")
    assert result.exit_code == 3
    assert "'layr1' matches no module; the nearest names are layer1" in text_of(result)


class TimeFirst(nn.Module):
    """States [T, B, D], and a structured output."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(28, 28) for _ in range(3))
        self.head = nn.Linear(28, 10)

    def forward(self, x):
        h = x.flatten(1, 2).movedim(1, 0) + 0
        for layer in self.layers:
            h = layer(h)
        return {"states": h, "scores": self.head(h.mean(0))}


def test_batch_dimension_and_output(monkeypatch, tmp_path):
    (tmp_path / "timefirst.py").write_text("from test_libraries import TimeFirst\n")
    monkeypatch.syspath_prepend(tmp_path)
    common = ("diagnose", "--init", 0, "--model", "timefirst:TimeFirst", *SMALL)
    result = fadiag(*common, "--batch-dim", 1, "--output", "scores")
    assert result.exit_code in (0, 1), result.output
    assert "chain of 3 Linear in layers.*" in text_of(result)
    result = fadiag(*common, "--output", "scores")
    assert result.exit_code == 3
    assert "batch_dim" in text_of(result)


def test_neither_a_checkpoint_nor_a_seed():
    result = fadiag("diagnose")
    assert result.exit_code == 3
    assert "expected checkpoint files, or --init SEED" in text_of(result)
    result = fadiag("diagnose", "--init", 0, "--reduction", "sum")
    assert result.exit_code == 3
    assert "reduction: expected one of flatten, cls, mean, token, got sum" in text_of(result)
