"""What is handed over by mistake is an error that says what to hand over, before the work."""

import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fadiag_fast
from fadiag_fast import LayerStatistics, StepProbe, diagnose, direction_cosines, layer_statistics
from fadiag_fast.scanning import scan


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.out_head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return self.out_head(h)


X, Y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
BATCHES = [(X, Y)]
SET = TensorDataset(X, Y)


def dicts():
    return DataLoader([{"image": x, "label": y} for x, y in zip(X, Y, strict=True)], 4)


def used_up():
    batches = iter(BATCHES)
    assert len(list(batches)) == 1
    return batches


@pytest.fixture
def observe(request, tmp_path):
    """``diagnose`` or ``scan`` of one network's weights, by the same arguments."""
    if request.param == "diagnose":
        return diagnose

    def one(model, batches, **options):
        torch.save(Net().state_dict(), tmp_path / "a.pt")
        return scan([tmp_path / "a.pt"], model, batches, tmp_path / "out", **options)

    return one


@pytest.mark.parametrize("observe", ["diagnose", "scan"], indirect=True)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet18", r"model: expected a torch.nn.Module, got str 'resnet18'; build the network"),
        (Net().state_dict(), "got OrderedDict; build the network and give it these weights"),
        (Net, r"got the class Net; call it: Net\(…\)"),
        (torch.relu, "call it, or wrap it in a Module"),
        (None, "expected a torch.nn.Module, got None"),
    ],
)
def test_what_is_no_network(observe, model, message):
    with pytest.raises(TypeError, match=message):
        observe(model, BATCHES)
    with pytest.raises(TypeError, match=r"StepProbe: model: expected a torch\.nn\.Module"):
        StepProbe(model)


def test_a_network_without_values():
    with torch.device("meta"):
        net = Net()
    with pytest.raises(
        ValueError, match=r"Net: embed.weight: expected a tensor with values, .*load"
    ):
        diagnose(net, BATCHES)


@pytest.mark.parametrize("observe", ["diagnose", "scan"], indirect=True)
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: None, TypeError, r"expected batches \(x, y\), such as .*, got None"),
        (lambda: 3, TypeError, "got int 3"),
        (lambda: "npz:eval.npz", TypeError, "got str 'npz:eval.npz'"),
        (lambda: X, TypeError, r"got a tensor, float32 \[4, 6\]; give \[\(x, y\)\]"),
        (
            lambda: (X, Y),
            TypeError,
            r"got one batch \(x, y\); give a list of batches: \[\(x, y\)\]",
        ),
        (lambda: [X, Y], TypeError, r"got one batch \(x, y\)"),
        (lambda: {"x": X}, TypeError, r"got one dict; give a list of batches: \[batch\]"),
        (
            lambda: SET,
            TypeError,
            r"got TensorDataset, .*; give DataLoader\(dataset, batch_size=128\)",
        ),
        (lambda: used_up, TypeError, "got a function; call it"),
        (used_up, ValueError, "got an iterator that has none left; it is used up by whoever reads"),
        (
            dicts,
            TypeError,
            r"batch 0: expected what Net.forward takes, x, got a dict with image, l",
        ),
        (lambda: [((X, X), Y)], TypeError, "Net.forward takes, x, got 2 arguments"),
        (
            lambda: [(X, Y, Y)],
            TypeError,
            r"batch 0: expected a pair \(x, y\), got tuple of 3; give",
        ),
        (lambda: [X], TypeError, r"expected a pair \(x, y\), got Tensor; give its labels too"),
        (lambda: [(X.numpy(), Y)], TypeError, r"got ndarray; make one by torch.as_tensor\(x\)"),
        (
            lambda: [(X, Y.float())],
            TypeError,
            r"labels: expected class indices, int64 \[4\], .*long",
        ),
        (lambda: [(X, Y.int())], TypeError, r"got int32 \[4\]; give y.long\(\)"),
        (lambda: [(X, Y == 0)], TypeError, r"got bool \[4\]; give y.long\(\)"),
        (lambda: [(X, Y[:, None])], ValueError, r"got int64 \[4, 1\]; give y.squeeze\(1\)"),
        (lambda: [(X, torch.eye(3).long()[Y])], ValueError, r"int64 \[4, 3\]; give y.argmax\(1\)"),
        (lambda: [(X, Y + 1)], ValueError, "batch 0: expected labels from 0 to 2, got .* 1 to 3"),
        (lambda: [(X, Y[:3])], ValueError, "batch 0: expected as many labels as samples, 4, got 3"),
    ],
)
def test_what_are_no_batches(observe, make, error, message):
    with pytest.raises(error, match=message):
        observe(Net(), make())


@pytest.mark.parametrize("labels", [[0, 1, 2, 0], "abcd"])
def test_labels_that_are_no_tensor(labels):
    with pytest.raises(TypeError, match=r"batch 0: labels: expected a tensor, got .*as_tensor"):
        diagnose(Net(), [(X, labels)])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.randn(4, 5),
            r"layer 'embed' \(Linear\): expected float32 \[..., 6\], got float32 \[4",
        ),
        (X.double(), r"layer 'embed' \(Linear\): expected float32 .*, got float64 \[4, 6\]"),
        (torch.ones(4, 6, dtype=torch.int64), r"layer 'embed' .*, got int64 \[4, 6\]"),
    ],
)
def test_an_error_of_the_forward_pass_names_batch_and_layer(x, message, tmp_path):
    with pytest.raises(RuntimeError, match=f"diagnose: batch 1: {message}"):
        diagnose(Net(), [(X, Y), (x, Y)])
    torch.save(Net().state_dict(), tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match=f"scan: evaluation batches: {message}"):
        scan([tmp_path / "a.pt"], Net(), [(x, Y)], tmp_path / "out")


def test_layers_of_other_kinds_are_named_too():
    def failing(first, x):
        net = nn.Sequential(first, nn.Flatten(), nn.LazyLinear(4), nn.Linear(4, 3))
        net[2] = nn.Linear(8, 4)
        with pytest.raises((RuntimeError, ValueError, IndexError)) as caught:
            diagnose(net, [(x, Y)], taps=["2", "3"])
        return str(caught.value)

    images = torch.randn(4, 1, 8, 8)
    assert "layer '0' (Conv2d): expected float32 [N, 3, …, …]" in failing(
        nn.Conv2d(3, 2, 3), images
    )
    assert "layer '0' (LayerNorm): expected float32 [..., 6]" in failing(nn.LayerNorm(6), images)
    assert "float32 with 3 channels" in failing(nn.BatchNorm2d(3), images)
    tokens = torch.full((4, 5), 7)
    assert "int64 indices from 0 to 4, got int64 [4, 5]" in failing(nn.Embedding(5, 2), tokens)


def test_an_error_with_a_type_of_its_own_stays_as_it_is():
    class Own(RuntimeError):
        pass

    class Raising(Net):
        def forward(self, x):
            raise Own("mine")

    with pytest.raises(Own, match=r"^mine$"):
        diagnose(Raising(), BATCHES)


@pytest.mark.parametrize("observe", ["diagnose", "scan"], indirect=True)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": {"scale_growth": 9}}, r"got dict: DiagnosticThresholds\(\*\*thresholds\)"),
        ({"thresholds": 50.0}, "expected fadiag_fast.DiagnosticThresholds, got float 50.0"),
        ({"loss": "mse"}, r"loss: expected a function of \(model output, y\), got str 'mse'"),
        ({"loss": nn.MSELoss}, "loss: expected a function, got the class MSELoss; call it"),
        ({"batch_dim": "0"}, "batch_dim: expected the number of a dimension, got str '0'"),
    ],
)
def test_options_of_another_type(observe, options, message):
    with pytest.raises(TypeError, match=message):
        observe(Net(), BATCHES, **options)


@pytest.mark.parametrize("value", ["0.9", True, torch.tensor(0.9)])
def test_an_accuracy_of_another_type(value):
    with pytest.raises(TypeError, match=r"headline_acc: expected a fraction from 0 to 1, got .+"):
        diagnose(Net(), BATCHES, value)
    with pytest.raises(TypeError, match="test_size: expected a whole number"):
        diagnose(Net(), BATCHES, test_size="100")


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize(
    ("hiddens", "message"),
    [
        (
            X,
            r"hiddens: expected a list of tensors, .*, got one tensor of shape \[4, 6\]; give",
        ),
        (iter([X]), r".*, got list_iterator; give list\(hiddens\)"),
        ({"a": X}, r".*, got dict; give list\(hiddens.values\(\)\)"),
        (None, ".*, got NoneType"),
        ("ab", ".*, got str"),
        ([X.numpy()], "layer 0: expected a tensor, got ndarray"),
        ([X, None], "layer 1: expected a tensor, got NoneType"),
        ([X.long()], "layer 0: expected float16, bfloat16, float32 or float64, got int64"),
    ],
)
def test_layers_that_are_no_list_of_tensors(hiddens, message, backend):
    other = hiddens if isinstance(hiddens, list) else [X]
    with pytest.raises(TypeError, match=f"layer_statistics: {message}"):
        layer_statistics(hiddens, other, backend=backend)
    if not isinstance(hiddens, list):
        with pytest.raises(TypeError, match="layer_statistics: grads: expected a list"):
            layer_statistics(other, hiddens, backend=backend)


@pytest.mark.parametrize("backend", ["torch", None])
def test_directions_that_are_no_lists_of_tensors(backend):
    statistics = layer_statistics([X], [X], backend=backend)
    for directions, message in (
        (X[None], r"grad_means: expected a list of tensors, .*, got one tensor"),
        ([X, X], r"grad_means\[0\]: expected a list of tensors, .*, got one tensor"),
        ([statistics] * 2, "batch 0: expected its mean gradients, .*; give its .grad_mean"),
        (None, "grad_means: expected a list"),
        ([[X], None], r"grad_means\[1\]: expected a list .*, got NoneType"),
    ):
        with pytest.raises(TypeError, match=f"direction_cosines: {message}"):
            direction_cosines(directions, backend=backend)
    assert direction_cosines([statistics.grad_mean] * 2, backend=backend).shape == (1, 2, 2)


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float64, torch.float32]])
def test_what_layer_statistics_returns_is_one(backend, dtypes):
    layers = [X.to(dtype) for dtype in dtypes]
    statistics = layer_statistics(layers, layers, backend=backend)
    assert isinstance(statistics, LayerStatistics)
    hidden_norm, grad_norm, grad_mean = statistics
    assert torch.equal(hidden_norm, statistics.hidden_norm)
    assert torch.equal(grad_norm, statistics.grad_norm)
    torch.testing.assert_close(grad_mean[0], layers[0].mean(0))
    assert repr(statistics).startswith("LayerStatistics(hidden_norm=tensor(")


USER = """
import torch
from torch import Tensor, nn
from fadiag_fast import DiagnosticReport, LayerStatistics, StepProbe, StepRecord, diagnose
from fadiag_fast import direction_cosines, layer_statistics

def norms(hiddens: list[Tensor]) -> LayerStatistics:
    statistics: LayerStatistics = layer_statistics(hiddens, hiddens)
    hidden: Tensor = statistics.hidden_norm
    mean: tuple[Tensor, ...] = statistics.grad_mean
    cosines: Tensor = direction_cosines([mean, mean])
    return statistics

def report(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> DiagnosticReport:
    return diagnose(model, batches, thresholds=None)

def show(record: StepRecord) -> None:
    print(record.growth)

probe = StepProbe(nn.Linear(1, 1), sink=show)
wrong: int = layer_statistics([], [])
"""


def test_a_users_file_passes_mypy(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER)
    place = str(next(iter(fadiag_fast.__path__)).rpartition("/")[0])
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "user.py"],
        cwd=tmp_path,
        env={"MYPYPATH": place, "PATH": ""},
        capture_output=True,
        text=True,
    )
    # The one error is the one that was put there: nothing else, and not by way of Any.
    (error, summary) = result.stdout.splitlines()
    assert "user.py:21: error: Incompatible types in assignment" in error, result.stdout
    assert re.search('expression has type "LayerStatistics"', error)
    assert "Found 1 error" in summary


def test_a_folder_in_place_of_a_glob(tmp_path):
    runs = tmp_path / "runs"
    (runs / "a").mkdir(parents=True)
    torch.save(Net().state_dict(), runs / "a" / "step_1.ckpt")
    for folder, glob in ((runs / "a", "*.ckpt"), (runs, "**/*.ckpt")):
        with pytest.raises(ValueError, match=re.escape(f"give '{folder}/{glob}'")):
            scan(folder, Net(), BATCHES, tmp_path / "out")
    (runs / "b").mkdir()
    torch.save(Net().state_dict(), runs / "b" / "pytorch_model.bin")
    assert len(scan(runs / "b", Net(), BATCHES, tmp_path / "out")) == 1
