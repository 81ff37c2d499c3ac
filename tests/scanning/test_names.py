"""Names and configurations that files bring: none reaches the terminal raw, none ends a scan."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("pyarrow", reason="needs the extra 'scan'")

from fadiag_fast import cli
from fadiag_fast._common.text import display_name, for_terminal
from fadiag_fast.cli.watch import _text
from fadiag_fast.scanning import ScanResult
from fadiag_fast.training.watch import Line
from fadiag_fast.zoo import build_model

SMALL = {"d_hidden": 16, "num_blocks": 2}
OPTIONS = ["--model-option", "d_hidden=16", "--model-option", "num_blocks=2"]
BATCHES = ["--batches", "8", "--batch-size", "8", "--device", "cpu"]

posix = pytest.mark.skipif(os.name == "nt", reason="names that Windows does not have")
HOSTILE = [
    "\x1b]0;owned\x07\x1b[2Ja",
    "red\x1b[31m",
    "bell\x07",
    "back\x08\x08\x08",
    "return\rb",
    "csi\x9b2J",
    "turn\u202egnp",
    "line\u2028b",
    os.fsdecode(b"caf\xe9"),
    os.fsdecode(b"\x9b2J"),
    "two\nlines",
]


def fadiag(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def unfit(text):
    """Return what a terminal would obey, or cannot show."""
    return [c for c in text if c != "\n" and for_terminal(c) != c]


def network(seed=0, **options):
    return build_model(
        "resmlp", input_shape=(1, 28, 28), num_classes=10, seed=seed, **{**SMALL, **options}
    )


def save(content, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        torch.save(content, file)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_one_line_that_a_terminal_shows(name):
    shown = display_name(f"runs/{name}.pt")
    assert shown.isprintable()
    assert shown.startswith("runs/")
    assert display_name("é ‖ 模型.pt") == "é ‖ 模型.pt"
    assert display_name(os.fsdecode(b"caf\xe9.pt")) == "caf\\xe9.pt"


@posix
def test_diagnose_shows_names_that_are_fit_and_keeps_them_whole_in_json(tmp_path):
    paths = [tmp_path / f"{name}.pt" for name in HOSTILE]
    for path in paths:
        save(network().state_dict(), path)
    broken = tmp_path / "\x1b[2Jbroken\udce9.pt"
    broken.write_text("no checkpoint")
    out, text = tmp_path / "out.json", tmp_path / "out.md"
    told = ["--json", out, "--markdown", text]
    result = fadiag("diagnose", *paths, broken, *OPTIONS, *BATCHES, *told)
    assert result.exit_code == 3
    assert "1 of 12 checkpoints could not be audited" in result.stderr
    assert unfit(result.stdout + result.stderr) == []
    assert "caf\\xe9: " in result.stdout
    records = json.loads(out.read_text(encoding="utf-8"))
    assert [record["checkpoint"] for record in records] == list(map(str, [*paths, broken]))
    assert [path for path in records if "error" in path] == records[-1:]
    assert unfit(text.read_text(encoding="utf-8")) == []


@posix
def test_a_scan_shows_names_that_are_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step, name in enumerate(HOSTILE):
        save(network(step).state_dict(), tmp_path / "runs" / name / f"step_{step}.pt")
        (tmp_path / "runs" / name / f"step_{name}.pt").write_text("no checkpoint")
    out = "out\x1b[5m\udce9"
    scanned = ["scan", "runs/*/*.pt", "--out", out, *OPTIONS, *BATCHES]
    told = [
        fadiag(*scanned),
        fadiag("scan", "runs/\x1b[2Jnone*", *scanned[1:]),
        fadiag("thresholds", out),
        fadiag("thresholds", out, "--config", "\x1b[2J"),
        fadiag("report", out, "-o", "\x1b[2J\udce9.html"),
        fadiag("watch", "\x1b[2Jnothing"),
        fadiag("diagnose", "\x1b[2Jnothing", "--model", "\x1b[2J"),
        fadiag("audit-cnn", "--folder", "\x1b[2Jnothing"),
        fadiag("study", "--out", "\x1b[2J", "--suite", "\x1b[2Jnothing.toml"),
        fadiag("\x1b[2Jnothing"),
    ]
    for result in told:
        assert unfit(result.output) == []
    lines = fadiag(*scanned, "--json").stdout.splitlines()
    assert json.loads(lines[-1])["total"] == 2 * len(HOSTILE)
    assert all(line.isascii() for line in lines)
    assert len(ScanResult.load(out)) == 2 * len(HOSTILE)
    assert unfit(str(ScanResult.load(out))) == []


def test_watch_draws_layer_names_that_are_fit():
    drawn = _text([Line("\x1b[2Jblocks\n.0\u202e", "bold")])
    assert unfit(drawn.plain) == []
    assert drawn.plain.count("\n") == 1


@posix
def test_one_file_without_permission_does_not_stop_the_others(tmp_path):
    for name in ("closed.pt", "open.pt"):
        save(network().state_dict(), tmp_path / name)
    (tmp_path / "closed.pt").chmod(0)
    command = [sys.executable, "-m", "fadiag_fast", "diagnose"]
    command += [str(tmp_path / "closed.pt"), str(tmp_path / "open.pt"), *OPTIONS, *BATCHES]
    if os.geteuid() == 0:  # root may read everything
        caps = "--bounding-set=-dac_override,-dac_read_search"
        tried = ["setpriv", caps, "--inh-caps=-all"]
        try:
            subprocess.run([*tried, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no way to give up root's rights")
        command = [*tried, *command]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 3
    assert "open: " in run.stdout
    assert "closed.pt" in run.stderr
    assert "Permission denied" in run.stderr


# ---- configurations beside weights


def study(folder, *configs):
    """Write a checkpoint for each (options of its network, what it says these are)."""
    for step, (options, said) in enumerate(configs):
        config = {"model": "resmlp", "model_options": said}
        content = {"state_dict": network(step, **options).state_dict(), "config": config}
        save(content, folder / f"step_{step}.pt")
    return str(folder / "*.pt")


def outcome(result, out):
    return {row["step"]: row["error_kind"] for row in ScanResult.load(out).rows}


SAID = {
    "nothing": None,
    "a text": "d_hidden=16",
    "names that are none": {3: 4},
    "an option that there is not": {"depth": 3},
    "an option of the caller's": {"input_shape": [1, 2, 2]},
    "a text for a number": {"d_hidden": "x"},
    "a tensor": {"d_hidden": torch.ones(3)},
    "below all sizes": {"d_hidden": -1},
    "beyond all sizes": {"d_hidden": 10**12},
    "beyond its weights": {"d_hidden": 60_000},
    "of another width": {"d_hidden": 24, "num_blocks": 2},
    "nested": {"d_hidden": [[16]]},
}


@pytest.mark.parametrize("said", SAID.values(), ids=SAID)
def test_a_bad_configuration_in_one_file_does_not_end_the_scan(said, tmp_path):
    files = study(tmp_path, ({}, said), ({}, SMALL), ({}, SMALL))
    result = fadiag("scan", files, "--out", tmp_path / "out", *BATCHES)
    assert result.exit_code in (0, 1, 2), result.output
    assert outcome(result, tmp_path / "out") == {0: "wrong model", 1: None, 2: None}
    (row,) = ScanResult.load(tmp_path / "out").failures()["wrong model"]
    assert str(tmp_path / "step_0.pt") in row["error"]
    told = fadiag("diagnose", tmp_path / "step_0.pt", tmp_path / "step_1.pt", *BATCHES)
    assert told.exit_code == 3
    assert "step_1: " in told.stdout
    assert "step_0.pt" in told.stderr


def test_weights_of_the_same_shapes_but_another_network_are_refused(tmp_path):
    """One head or four: no weight tells, and every figure depends on it."""
    for step, heads in enumerate((2, 2, 1, None)):
        options = {"d_hidden": 16, "num_blocks": 2, "num_heads": heads or 2}
        model = build_model("vit-mini", input_shape=(1, 28, 28), num_classes=10, **options)
        config = {"model": "vit-mini", "model_options": options}
        content = {"state_dict": model.state_dict()} | ({"config": config} if heads else {})
        save(content, tmp_path / f"step_{step}.pt")
    arguments = ["scan", tmp_path / "*.pt", "--model", "vit-mini", *BATCHES]
    result = fadiag(*arguments, "--out", tmp_path / "a")
    assert outcome(result, tmp_path / "a") == {0: None, 1: None, 2: "wrong model", 3: None}
    (row,) = ScanResult.load(tmp_path / "a").failures()["wrong model"]
    for step in (0, 2):
        assert str(tmp_path / f"step_{step}.pt") in row["error"]
    # What is given goes before what is saved, for all of them alike.
    result = fadiag(*arguments, "--out", tmp_path / "b", "--model-option", "num_heads=4")
    assert set(outcome(result, tmp_path / "b").values()) == {None}


def test_options_that_build_the_same_network_are_the_same(tmp_path):
    written_out = {**SMALL, "terminal_norm": True}
    files = study(tmp_path, ({}, SMALL), ({}, written_out))
    result = fadiag("scan", files, "--out", tmp_path / "out", *BATCHES)
    assert set(outcome(result, tmp_path / "out").values()) == {None}
