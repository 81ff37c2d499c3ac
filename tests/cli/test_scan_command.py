"""fadiag thresholds and fadiag report, as a user runs them."""

import json
import sys

import pytest

pytest.importorskip("pyarrow", reason="needs the extra 'scan'")

import numpy as np
import torch
from studies import CONFIG, figures, record
from typer.testing import CliRunner

from fadiag_fast import cli
from fadiag_fast.reports.scan_plots import write_plots
from fadiag_fast.scanning import ScanResult, ScanWriter


def fadiag(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture
def folder(tmp_path):
    with ScanWriter(tmp_path / "scan") as writer:
        config = writer.configure(CONFIG)
        for step, growth in enumerate((2.0, 11.0, 694.0)):
            one = figures(growth=growth)
            writer.add(record(config, step, one, run="a/$x_1$ <b>", step=step, path=f"{step}.pt"))
        writer.add(record(config, 9, error_kind="missing", error="gone", run="empty"))
    return tmp_path / "scan"


def test_thresholds(folder):
    result = fadiag("thresholds", folder)
    assert result.exit_code == 0, result.output
    assert "gap around the threshold: 11 to 694 (a factor of 63.1)" in result.output
    assert "credit gain (in no verdict)" in result.output
    last = fadiag("thresholds", folder, "--last")
    assert "(a) scale growth: fires above 50; 1 of 1 checkpoints do" in last.output


def test_thresholds_as_json(folder):
    result = fadiag("thresholds", folder, "--json")
    growth = json.loads(result.output)[0]
    assert growth["field"] == "scale_growth"
    assert [interval["fires"] for interval in growth["intervals"]] == [3, 2, 1, 0]
    assert growth["gap"]["low"] == 11.0


def test_report(folder, tmp_path):
    out = tmp_path / "r.html"
    result = fadiag("report", folder, "-o", out, "--title", "mine")
    assert result.exit_code == 0, result.output
    assert "4 checkpoints" in result.output
    assert "<title>mine" in out.read_text(encoding="utf-8")


def test_plots_are_pictures_with_names_for_files(folder, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra 'bench'")
    result = ScanResult.load(folder)
    written = write_plots(result, tmp_path / "plots", formats=("svg",))
    assert [path.name for path in written] == ["runs.svg", "run-a-x_1-b.svg", "run-empty.svg"]
    assert all(b"<svg" in path.read_bytes() for path in written)
    (picture,) = write_plots(result, tmp_path / "few", most_runs=0, formats=("png",))
    assert picture.read_bytes().startswith(b"\x89PNG")


NETWORK = """
import torch
from torch import nn

class Network(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.embed = nn.Linear(inputs, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head, self.other = nn.Linear(8, 10), nn.Linear(8, 10)

    def states(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h).relu()
        return h

class Two(Network):
    def forward(self, x):
        h = self.states(x)
        return {"aux": self.other(h), "logits": self.head(h)}

class Sequence(Network):
    def forward(self, x):
        h = self.states(torch.stack([x, -x]))  # [2, B, 8]
        return self.head(h.mean(0))

def two(inputs=784): return Two(inputs)
def sequence(): return Sequence(784)
def colours():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.Flatten(), nn.Linear(196, 8), nn.Linear(8, 10))
"""


@pytest.fixture
def networks(tmp_path, monkeypatch):
    (tmp_path / "networks_of_mine.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "networks_of_mine", raising=False)
    import networks_of_mine

    return networks_of_mine


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("two", ("--flatten", "--output", "logits")),
        ("two", ("--flatten", "--output", "aux", "--model-option", "inputs=784")),
        ("sequence", ("--flatten", "--batch-dim", 1, "--reduction", "mean")),
        ("colours", ("--data-option", "channels=3", "--taps", "2", "--taps", "3:input")),
    ],
)
def test_a_scan_takes_the_options_of_diagnose(networks, tmp_path, name, options):
    torch.save(getattr(networks, name)().state_dict(), tmp_path / "x.pt")
    common = ("--model", f"networks_of_mine:{name}", *options, "--batches", 4, "--batch-size", 16)
    fadiag("diagnose", tmp_path / "x.pt", *common, "--json", tmp_path / "x.json")
    (told,) = json.loads((tmp_path / "x.json").read_text())
    result = fadiag("scan", tmp_path / "x.pt", "--out", tmp_path / "s", *common, "--quiet")
    assert result.exit_code in (0, 1, 2), result.output
    (found,) = ScanResult.load(tmp_path / "s").figures()
    assert list(found.layers) == told["layers"]
    assert found.residual_norms == pytest.approx(told["residual_norms"], rel=1e-4)
    assert found.bp_grad_norms == pytest.approx(told["bp_grad_norms"], rel=1e-4)


def trained(path, blocks=2, width=8):
    options = ("--model-option", f"num_blocks={blocks}", "--model-option", f"d_hidden={width}")
    result = fadiag("train", "--steps", 1, "--out", path, *options, "--quiet")
    assert result.exit_code == 0, result.output


def test_a_scan_builds_the_network_that_the_checkpoints_are_of(tmp_path):
    (tmp_path / "step_0.pt").write_text("no checkpoint")
    for step in (1, 2):
        trained(tmp_path / f"step_{step}.pt")
    trained(tmp_path / "step_3.pt", blocks=3)
    arguments = ["scan", tmp_path / "*.pt", "--batches", 4, "--batch-size", 16, "--quiet"]
    assert fadiag(*arguments, "--out", tmp_path / "a").exit_code in (0, 1, 2)
    result = ScanResult.load(tmp_path / "a")
    assert {row["step"]: row["error_kind"] for row in result.rows} == {
        0: "unreadable",
        1: None,
        2: None,
        3: "wrong model",
    }
    assert "unexpected in the checkpoint (6): blocks.2." in str(result)
    # An option that is given goes before the one that was saved.
    fadiag(*arguments, "--out", tmp_path / "b", "--model-option", "num_blocks=3")
    kinds = {row["step"]: row["error_kind"] for row in ScanResult.load(tmp_path / "b").rows}
    assert kinds == {0: "unreadable", 1: "wrong model", 2: "wrong model", 3: None}


@pytest.mark.parametrize("command", ["diagnose", "scan"])
def test_a_network_of_ones_own_gets_the_vectors_of_an_archive_as_they_are(
    tmp_path, monkeypatch, command
):
    (tmp_path / "mynets.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(),\n"
        "                         nn.Linear(6, 4))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    chosen = np.random.default_rng(0)
    images = chosen.standard_normal((80, 8)).astype(np.float32)
    labels = chosen.integers(0, 4, 80)
    names = ("train_images", "train_labels", "test_images", "test_labels")
    np.savez(tmp_path / "eval.npz", **dict(zip(names, (images, labels) * 2, strict=True)))
    import mynets

    torch.save(mynets.build().state_dict(), tmp_path / "step_1.pt")
    options = ["--model", "mynets:build", "--data", f"npz:{tmp_path / 'eval.npz'}"]
    options += ["--batches", 10, "--batch-size", 8, "--taps", "0", "--taps", "2"]
    out = ["--out", tmp_path / "out"] if command == "scan" else []
    result = fadiag(command, tmp_path / "step_1.pt", *options, *out)
    assert result.exit_code in (0, 1), result.output
    sys.modules.pop("mynets")


def test_a_scan_says_that_checkpoints_are_of_another_model(tmp_path):
    trained(tmp_path / "x.pt")
    result = fadiag("scan", tmp_path / "x.pt", "--out", tmp_path / "s", "--model", "smallcnn")
    assert result.exit_code == 3
    assert "expected a checkpoint of --model smallcnn, got one of resmlp" in result.stderr


def test_figures_of_another_output_are_not_taken_over(networks, tmp_path):
    torch.save(networks.two().state_dict(), tmp_path / "x.pt")
    arguments = ["scan", tmp_path / "x.pt", "--out", tmp_path / "s", "--batches", 4]
    arguments += ["--model", "networks_of_mine:two", "--flatten", "--json"]
    for output in ("logits", "aux"):
        last = fadiag(*arguments, "--output", output).stdout.splitlines()[-1]
        assert json.loads(last)["audited"] == 1
    assert json.loads(fadiag(*arguments, "--output", "aux").stdout.splitlines()[-1])["reused"] == 1


def test_what_is_no_scan_is_an_error(tmp_path):
    for command in ("thresholds", "report"):
        result = fadiag(command, tmp_path)
        assert result.exit_code == 3
        assert "expected a scan's folder" in result.output.replace("\n", " ")


def test_the_extra_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = fadiag("report", folder, "-o", tmp_path / "r.html")
    assert result.exit_code == 3
    assert "pip install 'fadiag-fast[scan]'" in result.output.replace("\n", " ")
