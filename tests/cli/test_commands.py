"""The command line as a user runs it: output, files, exit codes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from fadiag_fast import __version__, cli
from fadiag_fast.checkpoints import save_checkpoint
from fadiag_fast.cli import audit_cnn, diagnose, train
from fadiag_fast.zoo import build_model

runner = CliRunner()


def fadiag(*arguments):
    return runner.invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A BP and a DFA network, trained on the command line; DFA passes growth 50 in 300 steps."""
    folder = tmp_path_factory.mktemp("trained")
    for rule in ("bp", "dfa"):
        result = fadiag(
            "train", "--rule", rule, "--steps", 300, "--out", folder / f"{rule}.pt", "--quiet"
        )
        assert result.exit_code == 0, result.output
        assert f"{rule}, seed 42, 300 steps, test accuracy 0." in result.output
    return folder


def test_train_saves_what_an_audit_needs(trained):
    saved = torch.load(trained / "dfa.pt", weights_only=True)
    assert set(saved) == {"state_dict", "rule_state", "config"}
    assert any("feedback" in key for key in saved["rule_state"])
    assert saved["config"]["rule"] == "dfa"


def test_train_makes_the_folder_of_its_checkpoint_before_it_trains(tmp_path, monkeypatch):
    out = tmp_path / "runs/a/step_1.pt"
    result = fadiag("train", "--steps", 1, "--batch-size", 8, "--out", out, "--quiet")
    assert result.exit_code == 0, result.output
    assert out.is_file()
    monkeypatch.setattr(train, "train", lambda *_, **__: pytest.fail("it trained"))
    result = fadiag("train", "--out", out / "below/a/file.pt", "--quiet")
    assert result.exit_code == 3, result.output
    assert "step_1.pt" in result.output


def test_diagnose_prints_reports_a_summary_and_files(trained, tmp_path):
    out, markdown = tmp_path / "reports.json", tmp_path / "reports.md"
    arguments = ["diagnose", trained / "bp.pt", trained / "dfa.pt", "--max-stability", 1]
    result = fadiag(*arguments, "--json", out, "--markdown", markdown)
    assert result.exit_code == 1, result.output
    assert "bp: trustworthy" in result.output
    assert "dfa: needs walk-back: (a)" in result.output
    assert "verdict by (a)-(c)" in result.output
    records = json.loads(out.read_text())
    assert [record["verdict"] for record in records] == ["trustworthy", "needs walk-back: (a)"]
    assert records[0]["checkpoint"].endswith("bp.pt")
    assert "### dfa: needs walk-back" in markdown.read_text()


def test_exit_codes(trained):
    bp, loose = trained / "bp.pt", ("--max-stability", 1)
    assert fadiag("diagnose", bp, *loose).exit_code == 0
    assert fadiag("diagnose", bp, *loose, "--batches", 2).exit_code == 2
    assert fadiag("diagnose", bp, *loose, "--frozen-acc", 0.99).exit_code == 1
    assert fadiag("diagnose", bp, "--frozen-acc", 99).exit_code == 3


def test_one_bad_file_does_not_stop_the_others(trained, tmp_path):
    (tmp_path / "broken.pt").write_bytes((trained / "bp.pt").read_bytes()[:5000])
    other = build_model("resmlp", input_shape=(1, 28, 28), num_classes=10, num_blocks=2)
    save_checkpoint({"state_dict": other.state_dict()}, tmp_path / "other.pt")
    out = tmp_path / "reports.json"
    files = [
        tmp_path / "missing.pt",
        tmp_path / "broken.pt",
        tmp_path / "other.pt",
        trained / "bp.pt",
    ]
    result = fadiag("diagnose", *files, "--json", out)
    assert result.exit_code == 3
    assert "bp:" in result.output
    assert "3 of 4 checkpoints could not be audited" in result.output
    records = json.loads(out.read_text())
    assert ["error" in record for record in records] == [True, True, True, False]
    assert "blocks.2" in records[2]["error"]


def test_a_malicious_file_is_refused_and_nothing_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    result = fadiag("diagnose", tmp_path / "evil.pt")
    assert result.exit_code == 3
    assert "mkdir" in result.output
    assert "--unsafe-pickle" in result.output
    assert not (tmp_path / "ran").exists()


def test_a_model_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from fadiag_fast.zoo import ResidualMLP\n"
        "def net(blocks=2):\n    return ResidualMLP(784, 16, 10, blocks)\n"
        "def wrong():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from mine import net

    save_checkpoint({"model": net(3).state_dict()}, tmp_path / "mine.pt")
    good = ("--model", "mine:net", "--model-option", "blocks=3", "--flatten")
    result = fadiag("diagnose", tmp_path / "mine.pt", *good)
    assert result.exit_code in (0, 1), result.output
    assert "blocks.2" in result.output
    for name, message in (
        ("mine:none", "expected package.module:function, got 'mine:none'"),
        ("nowhere:net", "expected package.module:function"),
        ("mine:wrong", "expected mine:wrong to return a module, got int"),
        ("nothing", "expected one of resmlp"),
    ):
        result = fadiag("diagnose", tmp_path / "mine.pt", "--model", name)
        assert result.exit_code == 3
        assert message in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("diagnose", "x.pt", "--data", "mnist"), "expected one of fashion-mnist-mini"),
        (("diagnose", "x.pt", "--data", "cifar10:/nowhere"), "expected a folder /nowhere"),
        (("train", "--rule", "magic", "--out", "x.pt"), "magic"),
        (("train", "--model-option", "d_hidden", "--out", "x.pt"), "expected NAME=VALUE"),
        (("diagnose", "x.pt", "--max-growth", "-1"), "scale_growth: expected a finite number"),
    ],
)
def test_bad_arguments(arguments, message):
    result = fadiag(*arguments)
    assert result.exit_code == 3
    assert message in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    "command",
    [
        ("diagnose", "x.pt"),
        ("scan", "x.pt", "--out", "s"),
        ("study", "--out", "s"),
        ("train", "--out", "x.pt"),
        ("demo", "--out", "s"),
        ("audit-cnn", "--folder", "."),
    ],
)
@pytest.mark.parametrize("device", ["cuda:99", "tin"])
def test_a_device_that_is_not_there(tmp_path, monkeypatch, command, device):
    monkeypatch.chdir(tmp_path)
    result = fadiag(*command, "--device", device)
    assert result.exit_code == 3
    assert "Traceback" not in result.output
    (line,) = result.stderr.splitlines()
    assert f"--device: expected a device that torch has here, got '{device}': " in line


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def net(): raise KeyError('depth')", "to return a module, got KeyError: 'depth' ("),
        ("def net(): assert False", "to return a module, got AssertionError ("),
        ("def net(): raise SystemExit(1)", "to return a module, got SystemExit: 1 ("),
        ("def net(depth): pass", "missing 1 required positional argument: 'depth'"),
        ("import sys; sys.exit(2)", "expected package.module:function, got 'broken:net': System"),
        ("def net(:", "expected package.module:function, got 'broken:net': SyntaxError"),
        ("{}['depth']", "expected package.module:function, got 'broken:net': KeyError: 'depth'"),
    ],
)
def test_a_model_that_cannot_be_built_is_an_error_and_no_verdict(
    tmp_path, monkeypatch, body, message
):
    (tmp_path / "broken.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    save_checkpoint({"w": torch.zeros(1)}, tmp_path / "x.pt")
    for command in (("diagnose",), ("scan", "--out", tmp_path / "s")):
        sys.modules.pop("broken", None)
        result = fadiag(*command, tmp_path / "x.pt", "--model", "broken:net")
        assert result.exit_code == 3
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_a_network_that_raises_is_an_error_and_no_verdict(tmp_path, monkeypatch):
    (tmp_path / "raising.py").write_text(
        "import torch\nclass net(torch.nn.Linear):\n"
        "    def __init__(self): super().__init__(1, 1)\n"
        "    def forward(self, x): raise KeyError('mask')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from raising import net

    save_checkpoint({"state_dict": net().state_dict()}, tmp_path / "x.pt")
    for command in (("diagnose",), ("scan", "--out", tmp_path / "s")):
        result = fadiag(*command, tmp_path / "x.pt", "--model", "raising:net")
        assert result.exit_code == 3, result.output
        assert "KeyError: 'mask'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("scan", "x.pt", "--out", "s", "--stack", "many"), "--stack: expected auto or a whole"),
        (("scan", "x.pt", "--out", "s", "--stack", "0"), "at least 1, got '0'"),
        (("scan", "x.pt", "--out", "s", "--workers", "0"), "workers: expected at least 1, got 0"),
        (("scan", "x.pt"), "--out"),
        (("diagnose", "x.pt", "--batches", "ten"), "--batches"),
        (("scam",), "scan"),
    ],
)
def test_wrong_usage_is_an_error_and_no_verdict(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = fadiag(*arguments)
    assert result.exit_code == 3
    assert message in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("diagnose", "x.pt", "--json", "no/a.json"),
            "--json: expected a file in a folder that ex",
        ),
        (("diagnose", "x.pt", "--json", "."), "--json: expected a file to write, got the folder ."),
        (("diagnose", "x.pt", "--markdown", "x.pt/a"), "--markdown: expected a file in a folder"),
        (
            ("diagnose", "x.pt", "--json", "x.pt"),
            "--json: expected another file than those that are",
        ),
        (("diagnose", "x.pt", "--json", "a", "--markdown", "a"), "expected two files, got a twice"),
        (("scan", "x.pt", "--out", "x.pt"), "--out: expected a folder, got x.pt: x.pt is a file"),
        (("scan", "x.pt", "--out", "x.pt/s"), "--out: expected a folder, got x.pt/s"),
        (("study", "--out", "x.pt/s"), "--out: expected a folder, got x.pt/s"),
        (("demo", "--out", "x.pt"), "--out: expected a folder, got x.pt"),
        (("train", "--out", "."), "--out: expected a file to write, got the folder ."),
        (
            ("audit-cnn", "--folder", ".", "--out", "no/a.json"),
            "--out: expected a file in a folder",
        ),
        (("report", "s", "--out", "no/r.html"), "--out: expected a file in a folder that exists"),
        (("report", "s", "--plots", "x.pt"), "--plots: expected a folder, got x.pt"),
        (("scan", "x.pt", "--out", "s", "--pattern", "{run}/{steps}.pt"), "{step}, got {steps}"),
        (("scan", ".", "--out", "s"), "got a folder that holds checkpoints; give './*.pt'"),
    ],
)
def test_outputs_and_inputs_are_checked_before_the_work(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    save_checkpoint({"w": torch.zeros(1)}, tmp_path / "x.pt")
    for command, work in ((train, "train"), (diagnose, "run_diagnosis"), (audit_cnn, "audit_cnn")):
        monkeypatch.setattr(command, work, lambda *_, **__: pytest.fail("it worked"))
    before = (tmp_path / "x.pt").read_bytes()
    result = fadiag(*arguments)
    assert result.exit_code == 3, result.output
    assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
    assert (tmp_path / "x.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("diagnose", "x.pt", "--rule", "dfa"), "--rule has no effect without --credit"),
        (
            ("diagnose", "x.pt", "--frozen-test-size", 5),
            "-test-size has no effect without --frozen-",
        ),
        (
            ("diagnose", "x.pt", "--min-utility", 1),
            "--min-utility has no effect without --frozen-acc",
        ),
        (
            ("scan", "x.pt", "--out", "s", "--quiet", "--json"),
            "--quiet has no effect beside --json",
        ),
        (("report", "s", "--most-plots", 3), "--most-plots has no effect without --plots"),
        (
            ("scan", "x.pt", "--out", "s", "--pattern", "{run}_{lr}.pt"),
            "{lr} only label a checkpoint",
        ),
    ],
)
def test_options_without_effect_are_told(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = fadiag(*arguments)
    assert message in result.stderr
    assert "has no effect" not in fadiag("diagnose", "x.pt").stderr


@pytest.mark.parametrize("command", [(), *((c.name,) for c in cli.app.registered_commands)])
def test_help_and_version(command):
    for flag in ("-h", "--help"):
        result = fadiag(*command, flag)
        assert result.exit_code == 0, result.output
        assert "Usage: " in result.output
    assert fadiag("--version").output == f"fadiag_fast {__version__}\n"


def test_demo_runs_the_whole_chain(tmp_path):
    """Two steps show the plumbing; the full demo is `make demo`. Too short for its verdicts."""
    result = fadiag("demo", "--steps", 2, "--out", tmp_path, "--quiet")
    assert result.exit_code == 3
    assert "unexpected: seed 42: DFA: expected needs walk-back with (a)" in result.output
    assert "(d) against frozen" in result.output
    for rule in ("bp", "dfa", "ep", "frozen"):
        record = json.loads((tmp_path / f"{rule}_s42.json").read_text())
        assert len(record["residual_norms"]) == 5
        assert (tmp_path / f"{rule}_s42.pt").exists()


@pytest.mark.slow
def test_demo_verdicts_on_three_seeds(tmp_path):
    seeds = [option for seed in (42, 123, 456) for option in ("--seed", seed)]
    result = fadiag("demo", *seeds, "--out", tmp_path, "--quiet")
    assert result.exit_code == 0, result.output


def test_doctor():
    result = fadiag("doctor")
    assert result.exit_code == 0
    for expected in ("cpu library", "cuda library", "architectures", torch.__version__):
        assert expected in result.output


def test_doctor_gives_the_loaders_own_reason(tmp_path):
    """A library that is no library: the reason is the dynamic loader's."""
    program = (
        "import pathlib, fadiag_fast.ops.native as native\n"
        f"native._FOLDER = pathlib.Path({str(tmp_path)!r})\n"
        "(native._FOLDER / 'libfadiag_cpu.so').write_bytes(b'not a library')\n"
        "print(native._load('cpu').reason)\n"
        "(native._FOLDER / 'libfadiag_cpu.so').unlink()\n"
        "print(native._load('cpu').reason)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    first, second = result.stdout.splitlines()
    assert "libfadiag_cpu.so did not load" in first
    assert "file too short" in first or "invalid" in first
    assert "libfadiag_cpu.so is missing" in second


def test_without_typer_the_extra_is_named():
    program = (
        "import sys; sys.modules['typer'] = None\nfrom fadiag_fast.__main__ import main\nmain()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 3
    assert "pip install 'fadiag-fast[cli]'" in result.stderr
