"""The CNN audit: its figures against float64, its table against hand formatting, skipped files."""

import json
import statistics

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from fadiag_fast import cli
from fadiag_fast.checkpoints import save_checkpoint
from fadiag_fast.zoo import build_model, load_dataset, train
from fadiag_fast.zoo.audit_cnn import audit_cnn

# 150 test images: one evaluation batch of 128, and an accuracy over more than that.
SHAPE, CLASSES = (3, 8, 8), 4
OPTIONS = {"channels": (4, 6, 8), "d_hidden": 16}
ROW_KEYS = ["method", "seed", "acc", "h_norms", "g_norms", "max_per_block", "verdict"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    draw = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 64), ("test", 150)):
        arrays[f"{split}_labels"] = np.arange(count) % CLASSES
        arrays[f"{split}_images"] = draw.normal(size=(count, *SHAPE)).astype(np.float32)
    np.savez(path, **arrays)
    return f"npz:{path}"


def network(seed):
    model = build_model("smallcnn", input_shape=SHAPE, num_classes=CLASSES, seed=seed, **OPTIONS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running_mean" in name:
                buffer.normal_(std=0.1, generator=generator)
            elif "running_var" in name:
                buffer.uniform_(0.2, 0.6, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """BP for three seeds in three containers, one exploding and one exploding and dead DFA."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed, container in ((42, "model_state"), (123, "state_dict"), (456, "model")):
        save_checkpoint({container: network(seed).state_dict()}, folder / f"bp_s{seed}.pt")
    for seed, gain in ((42, 1), (123, 1e-9)):
        model = network(seed)
        with torch.no_grad():
            model.blocks[3][0].weight.mul_(1e4)
            model.out_head.weight.mul_(gain)
        save_checkpoint({"state_dict": model.state_dict()}, folder / f"dfa_s{seed}.pt")
    return folder


def by_hand(path, dataset):
    """Compute a row's figures in float64, step by step as the protocol's script does."""
    content = torch.load(path, weights_only=True)
    (state,) = content.values()
    model = build_model("smallcnn", input_shape=SHAPE, num_classes=CLASSES, **OPTIONS)
    model.load_state_dict(state)
    model.double().eval()
    x, y = dataset.test_images[:128].double(), dataset.test_labels[:128]
    h0 = model.blocks[0](x)
    h1 = model.blocks[1](h0)
    h2 = model.blocks[2](h1)
    h3 = model.blocks[3](h2.flatten(1))
    hiddens = [h0, h1, h2, h3]
    grads = torch.autograd.grad(F.cross_entropy(model.out_head(h3), y), hiddens)
    h_norms = [h.detach().flatten(1).norm(dim=1).median().item() for h in hiddens]
    g_norms = [g.flatten(1).norm(dim=1).median().item() for g in grads]
    with torch.no_grad():
        right = model(dataset.test_images.double()).argmax(1) == dataset.test_labels
    growth = max(h_norms[i + 1] / h_norms[i] for i in range(3))
    return float(right.double().mean()), h_norms, g_norms, growth


def run(*arguments):
    return CliRunner().invoke(cli.app, ["audit-cnn", *map(str, arguments)])


MODEL = [
    "--model-option",
    f"channels={OPTIONS['channels']}",
    "--model-option",
    f"d_hidden={OPTIONS['d_hidden']}",
]


def test_table_means_and_json_are_those_of_a_hand_computation(folder, data, tmp_path):
    result = run("--folder", folder, "--data", data, "--out", tmp_path / "audit.json", *MODEL)
    assert result.exit_code == 1, result.output
    record = json.loads((tmp_path / "audit.json").read_text())
    assert set(record) == {"rows", "skipped"}
    dataset = load_dataset(data)
    lines = result.output.splitlines()
    verdicts = {
        ("bp", 42): "trustworthy",
        ("dfa", 42): "walk-back: (a)",
        ("bp", 123): "trustworthy",
        ("dfa", 123): "walk-back: (a)+(b)",
        ("bp", 456): "trustworthy",
    }
    # Seed by seed, the methods in their order.
    assert [(row["method"], row["seed"]) for row in record["rows"]] == list(verdicts)
    figures = {}
    for row in record["rows"]:
        assert list(row) == ROW_KEYS
        method, seed = row["method"], row["seed"]
        acc, h_norms, g_norms, growth = by_hand(folder / f"{method}_s{seed}.pt", dataset)
        figures.setdefault(method, []).append((acc, h_norms, g_norms, growth))
        assert row["acc"] == pytest.approx(acc, abs=1e-12)
        assert row["h_norms"] == pytest.approx(h_norms, rel=1e-5)
        assert row["g_norms"] == pytest.approx(g_norms, rel=1e-4)
        assert row["max_per_block"] == pytest.approx(growth, rel=1e-5)
        assert row["verdict"] == verdicts[method, seed]
        # The same figures in the table: rounded to three digits, they may differ in the last.
        (line,) = [line for line in lines if line.split()[:2] == [method, str(seed)]]
        cells = line.split(maxsplit=6)
        expected = (acc, max(h_norms) / min(h_norms), growth, g_norms[-1])
        assert [float(cell) for cell in cells[2:6]] == pytest.approx(expected, rel=6e-3)
        assert cells[6] == verdicts[method, seed]
    for method, seeds in (("BP", 3), ("DFA", 2)):
        rows = figures[method.lower()]
        accs = [acc for acc, *_ in rows]
        (line,) = [line for line in lines if line.startswith(f"{method} ({seeds} seeds): ")]
        assert f"acc={statistics.fmean(accs):.4f}±{statistics.pstdev(accs):.4f}, " in line
        for name, at in (("h_means", 1), ("g_means", 2)):
            values = [statistics.fmean(row[at][layer] for row in rows) for layer in range(4)]
            printed = line.partition(f"{name}=[")[2].partition("]")[0].split(", ")
            assert [float(value) for value in printed] == pytest.approx(values, rel=6e-3)
        growth = statistics.fmean(r[3] for r in rows)
        assert float(line.rpartition("=")[2]) == pytest.approx(growth, rel=6e-3)


def test_missing_checkpoints_are_listed_in_their_place(folder, data, tmp_path):
    result = run("--folder", folder, "--data", data, "--out", tmp_path / "audit.json", *MODEL)
    record = json.loads((tmp_path / "audit.json").read_text())
    assert len(record["rows"]) + len(record["skipped"]) == 15
    assert record["skipped"][-1] == {
        "method": "ep",
        "seed": 456,
        "reason": f"no such file: {folder / 'ep_s456.pt'}",
    }
    lines = result.output.splitlines()
    names = [line.split()[:2] for line in lines if len(line.split()) > 2]
    at = names.index(["state_bridge", "42"])
    assert names[at - 1] == ["dfa", "42"]
    assert names[at + 1] == ["credit_bridge", "42"]
    assert f"credit_bridge      123  SKIPPED (no such file: {folder}" in result.output


def test_unusable_files_are_skipped_with_the_reason(data, tmp_path):
    (tmp_path / "bp_s1.pt").write_bytes(b"no checkpoint")
    other = build_model("student", input_shape=SHAPE, num_classes=CLASSES)
    save_checkpoint({"state_dict": other.state_dict()}, tmp_path / "dfa_s1.pt")
    save_checkpoint({"state_dict": network(1).state_dict()}, tmp_path / "ep_s1.pt")
    audit = audit_cnn(tmp_path, load_dataset(data), seeds=(1,), model_options=OPTIONS)
    reasons = {row.method: row for row in audit.skipped}
    assert "expected a torch.save or safetensors file" in reasons["bp"].reason
    assert "embed.weight" in reasons["dfa"].reason
    assert [row.method for row in audit.skipped if row.missing] == ["state_bridge", "credit_bridge"]
    assert [row.method for row in audit.rows] == ["ep"]
    result = run("--folder", tmp_path, "--data", data, "--seed", 1, *MODEL)
    assert result.exit_code == 3
    assert "2 checkpoints could not be audited" in result.output


def test_exit_codes(folder, data, tmp_path):
    found = ("--folder", folder, "--data", data, *MODEL)
    assert run(*found, "--method", "bp").exit_code == 0
    assert run(*found, "--method", "dfa", "--seed", 42).exit_code == 1
    empty = run("--folder", tmp_path, "--data", data, *MODEL)
    assert empty.exit_code == 2
    assert "no checkpoint was audited" in empty.output


def test_options_that_a_run_was_trained_with_come_from_its_file(data, tmp_path):
    dataset = load_dataset(data)
    run = train("smallcnn", "dfa", dataset, steps=1, batch_size=32, model_options=OPTIONS)
    save_checkpoint(run.checkpoint(), tmp_path / "dfa_s42.pt")
    audit = audit_cnn(tmp_path, dataset, methods=("dfa",), seeds=(42,))
    assert [row.acc for row in audit.rows] == [run.accuracy]


def test_a_wrong_call_is_no_matter_of_the_files(folder, data):
    for arguments, message in (
        (("--model-option", "depth=3"), "depth"),
        (("--data", "teacher"), "expected height and width of at least 4"),
    ):
        result = run("--folder", folder, "--data", data, *arguments)
        assert result.exit_code == 3
        assert message in result.output
        assert "SKIPPED" not in result.output


def test_non_finite_figures_are_strings_in_the_json(data, tmp_path):
    model = network(1)
    with torch.no_grad():
        model.blocks[1][0].weight.fill_(float("nan"))
    save_checkpoint({"state_dict": model.state_dict()}, tmp_path / "bp_s1.pt")
    audit = audit_cnn(
        tmp_path, load_dataset(data), methods=("bp",), seeds=(1,), model_options=OPTIONS
    )
    (row,) = json.loads(audit.to_json())["rows"]
    assert row["h_norms"][1] == "NaN"
    assert row["verdict"].startswith("walk-back: ")
    assert "nan" in str(audit)
