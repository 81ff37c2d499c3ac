"""Every command as it is used: on a terminal, with bars and colours, and Ctrl-C."""

import json
import re

import numpy as np
import pytest
import torch
from records import healthy
from terminals import Terminals

from fadiag_fast import cli
from fadiag_fast.checkpoints import save_checkpoint
from fadiag_fast.scanning import ScanResult
from fadiag_fast.training.sinks import JsonLines
from fadiag_fast.zoo import build_model

DATA = ("--data", "npz:tiny.npz")
# A network of the user's own that waits where its weights say so, as a long job would.
SLOW = """
import sys, time, torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.embed = nn.Linear(16, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.out_head = nn.Linear(8, num_classes)
        self.register_buffer("waits", torch.zeros(()))

    def forward(self, x):
        if float(self.waits) > 0:
            print("stalled", file=sys.stderr, flush=True)
            for _ in range(600):
                time.sleep(0.1)
        h = self.embed(x.flatten(1))
        for block in self.blocks:
            h = h + block(h)
        return self.out_head(h)
"""


@pytest.fixture(scope="module")
def terminals():
    server = Terminals()
    yield server
    server.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of 4x4 images, a checkpoint, a scan's folder and a file of step records."""
    place = tmp_path_factory.mktemp("terminal")
    draw = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 128), ("test", 1280)):
        arrays[f"{part}_images"] = draw.random((count, 4, 4), dtype=np.float32)
        arrays[f"{part}_labels"] = np.arange(count) % 4
    np.savez(place / "tiny.npz", **arrays)
    shape = {"input_shape": (1, 4, 4), "num_classes": 4}
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = build_model("resmlp", **shape, d_hidden=8, num_blocks=2)
        save_checkpoint({"state_dict": model.state_dict()}, place / f"step_{seed}.pt")
    with JsonLines(place / "steps.jsonl") as sink:
        for one in healthy(60):
            sink(one)
    (place / "slow.py").write_text(SLOW)
    return place


SMALL = ("--model-option", "d_hidden=8", "--model-option", "num_blocks=2")
SCAN = ("step_1.pt", "step_2.pt", *DATA, *SMALL, "--batch-size", 8)
# Command, exit code and what its terminal shows.
COMMANDS = {
    "train": (("train", *DATA, *SMALL, "--steps", 3, "--out", "new.pt"), 0, "3/3 steps, loss"),
    "diagnose": (
        ("diagnose", "step_1.pt", *DATA, *SMALL, "--batch-size", 8, "--batches", 2),
        2,
        "not enough data",
    ),
    "scan": (("scan", *SCAN, "--batches", 2, "--out", "scanned"), 2, "2/2, "),
    "thresholds": (("thresholds", "scanned"), 0, "(a)"),
    "report": (("report", "scanned", "-o", "report.html"), 0, "2 checkpoints"),
    "study": (
        (
            *("study", *DATA, "--models", "resmlp", "--rules", "bp", "--seeds", 1),
            *("--steps", 2, "--checkpoints", 1, "--out", "studied"),
        ),
        0,
        "1/1, ",
    ),
    # Two steps do not show what the demo is to show: it says so, with 3.
    "demo": (("demo", *DATA, "--steps", 2, "--out", "demoed"), 3, "2/2 steps, loss"),
    "audit-cnn": (("audit-cnn", "--folder", ".", *DATA), 2, "SKIPPED"),
    "watch": (("watch", "steps.jsonl", "--once"), 2, "60 recorded"),
    "doctor": (("doctor",), 0, "cpu library"),
}
WITH_BARS = ("train", "scan", "study", "demo")


def test_every_command_is_here():
    names = {command.name for command in cli.app.registered_commands}
    assert names == set(COMMANDS)


@pytest.fixture(scope="module")
def scanned(terminals, folder):
    terminals.run(*SCAN, "--batches", 2, "--out", "scanned", folder=folder)
    return folder


def fresh(arguments, tmp_path):
    """The command with its results in a folder of its own."""
    names = ("new.pt", "scanned", "studied", "demoed", "report.html")
    reads = arguments[0] in ("thresholds", "report")
    return [tmp_path / a if a in names and not (reads and a == "scanned") else a for a in arguments]


@pytest.fixture(scope="module", autouse=True)
def _a_scan(terminals, folder):
    arguments, code, _ = COMMANDS["scan"]
    assert terminals.run(*arguments, folder=folder).code == code


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_a_terminal(terminals, folder, tmp_path, name):
    arguments, code, expected = COMMANDS[name]
    session = terminals.run(*fresh(arguments, tmp_path), folder=folder)
    assert session.code == code, session.text
    assert expected in session.text
    assert "Traceback" not in session.text
    assert "None" not in session.text.replace("None of", "")
    assert bool("\x1b[2K" in session.raw) == (name in WITH_BARS)


@pytest.mark.parametrize(
    ("name", "columns"),
    [(name, columns) for name in ("train", "scan", "watch") for columns in (20, 40, 200)]
    + [("study", 40)],
)
def test_what_is_redrawn_fits_the_width(terminals, folder, tmp_path, name, columns):
    arguments, code, _ = COMMANDS[name]
    session = terminals.run(*fresh(arguments, tmp_path), folder=folder, columns=columns)
    assert session.code == code, session.text
    drawn = session.text.split("\n") if name == "watch" else redrawn(session)
    assert drawn
    assert max(map(len, drawn)) <= columns
    assert columns < 200 or COMMANDS[name][2] in "\n".join(drawn)


def redrawn(session):
    """The lines of a bar, each drawn over the one before."""
    lines = [line for line in re.split(r"[\r\n]+", session.text) if re.search("[━╸╺]", line)]
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        (name, environment)
        for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"})
        for name in ("train", "scan", "watch", "diagnose")
    ]
    + [("study", {"TERM": "dumb"})],
)
def test_without_colours(terminals, folder, tmp_path, name, environment):
    arguments, code, _ = COMMANDS[name]
    session = terminals.run(*fresh(arguments, tmp_path), folder=folder, environment=environment)
    assert session.code == code, session.text
    assert not session.colours
    if "TERM" in environment:
        assert "\x1b" not in session.raw
        progress = {"train": "trained bp: 3 steps", "scan": "2 of 2 checkpoints", "study": "1 of 1"}
        assert progress.get(name, "") in session.text


def test_an_error_is_one_line(terminals, folder):
    session = terminals.run("scan", "[red].pt", "--out", "step_1.pt", folder=folder, columns=30)
    assert session.code == 3
    (line,) = session.text.splitlines()
    assert line == "fadiag: --out: expected a folder, got step_1.pt: step_1.pt is a file"


# What Ctrl-C meets, and a folder or file that holds what was finished before.
STALLED = {
    "train": "fadiag_fast.cli.train:train",
    "thresholds": "fadiag_fast.cli.scan:sweep_thresholds",
    "report": "fadiag_fast.cli.scan:write_report",
    "study": "fadiag_fast.cli.study:run_study",
    "demo": "fadiag_fast.cli.demo:run_diagnosis",
    "audit-cnn": "fadiag_fast.cli.audit_cnn:audit_cnn",
    "doctor": "fadiag_fast.ops:build_info",
    "scan": "fadiag_fast.cli.scan:load_dataset",
    "diagnose": "fadiag_fast.cli.diagnose:load_dataset",
}


@pytest.mark.parametrize("name", STALLED)
def test_ctrl_c_is_a_line_and_no_verdict(terminals, folder, tmp_path, name):
    arguments, _, _ = COMMANDS[name]
    session = terminals.run(
        *fresh(arguments, tmp_path), folder=folder, stall=STALLED[name], interrupt_at="stalled"
    )
    assert session.code == 130, session.text
    assert "fadiag: interrupted" in session.text
    assert "Traceback" not in session.text
    assert session.raw.rfind("\x1b[?25h") >= session.raw.rfind("\x1b[?25l")  # the cursor is back
    if name == "demo":
        assert (tmp_path / "demoed" / "ep_s42.pt").is_file()


@pytest.fixture
def waiting(folder):
    """Three checkpoints, of which the last one never comes to an end."""
    import sys

    sys.path.insert(0, str(folder))
    try:
        from slow import Net
    finally:
        sys.path.remove(str(folder))
    names = []
    for step in range(3):
        torch.manual_seed(step)
        model = Net(4)
        model.waits.fill_(step == 2)
        save_checkpoint({"state_dict": model.state_dict()}, folder / f"wait_step_{step}.pt")
        names.append(f"wait_step_{step}.pt")
    return names


def test_a_diagnosis_that_is_stopped_keeps_its_reports(terminals, folder, tmp_path, waiting):
    session = terminals.run(
        *("diagnose", *waiting, "--model", "slow:Net", *DATA, "--batch-size", 8, "--batches", 2),
        *("--json", tmp_path / "a.json", "--markdown", tmp_path / "a.md"),
        folder=folder,
        interrupt_at="stalled",
    )
    assert session.code == 130, session.text
    assert "fadiag: interrupted after 2 of 3" in session.text
    kept = [record["checkpoint"] for record in json.loads((tmp_path / "a.json").read_text())]
    assert kept == waiting[:2]
    assert (tmp_path / "a.md").read_text().count("### ") == 2


def test_a_scan_that_is_stopped_goes_on_where_it_was(terminals, folder, tmp_path, waiting):
    arguments = (
        *("scan", *waiting, "--model", "slow:Net", *DATA, "--batch-size", 8, "--batches", 2),
        *("--stack", 1, "--workers", 1, "--out", tmp_path / "kept"),
    )
    session = terminals.run(*arguments, folder=folder, interrupt_at="stalled")
    assert session.code == 130, session.text
    assert "fadiag: interrupted; what is finished is in" in session.text
    assert "Traceback" not in session.text
    assert len(ScanResult.load(tmp_path / "kept")) == 2


def test_ctrl_c_is_how_one_leaves_watch(terminals, folder):
    """Its exit code is what the file says, as without --follow."""
    session = terminals.run("watch", "steps.jsonl", folder=folder, interrupt_at="60 recorded")
    assert session.code == COMMANDS["watch"][1]
    assert "Traceback" not in session.text
