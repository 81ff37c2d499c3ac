"""The rule that docs/rules.md writes goes through the whole chain."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fadiag_fast import cli
from fadiag_fast.zoo import make_rule

DOCUMENT = (Path(__file__).parent.parent / "docs" / "rules.md").read_text(encoding="utf-8")
RULE, CHAIN = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
COMMANDS = [shlex.split(line) for line in re.findall(r"^\$ fadiag (.*)$", DOCUMENT, re.MULTILINE)]


@pytest.fixture(autouse=True)
def _my_rules(tmp_path, monkeypatch):
    """The folder that a reader works in."""
    (tmp_path / "my_rules.py").write_text(RULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    yield
    sys.modules.pop("my_rules", None)


def test_the_rule_is_short():
    lines = [line for line in RULE.splitlines() if line.strip() and not line.startswith('"""')]
    assert len(lines) <= 30


def test_a_rule_of_ones_own_is_trained_saved_and_diagnosed_from_python(capsys):
    names = {}
    exec(compile(CHAIN, "rules.md", "exec"), names)
    credit, rule, network = names["credit"], names["rule"], names["network"]
    assert set(names["saved"]["rule_state"]) == {f"feedback.{l}" for l in range(4)}
    assert rule is not network.rule
    x, y = names["batches"][0]
    for a, b in zip(rule.credit(x, y), network.rule.credit(x, y), strict=True):
        assert torch.equal(a, b)
    gradients = make_rule("bp", network.model, total_steps=1).credit(x, y)
    for gamma, a, g in zip(credit.gammas, rule.credit(x, y), gradients, strict=True):
        a, g = a.double(), g.double()
        expected = ((a * g).sum(1) / (a.norm(dim=1) * g.norm(dim=1))).mean()
        # The gradients are float32, from two different graphs.
        assert gamma == pytest.approx(float(expected), abs=1e-5)
    assert "Γ of fresh feedback" in capsys.readouterr().out


def fadiag(*arguments):
    """Run the installed command, which does not put the working directory on Python's path."""
    script = shutil.which("fadiag", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("needs the command fadiag beside this Python")
    return subprocess.run([script, *arguments], capture_output=True, encoding="utf-8")


def test_a_rule_of_ones_own_on_the_command_line():
    train, diagnose = COMMANDS
    result = fadiag(*train)
    assert result.returncode == 0, result.stderr
    result = fadiag(*diagnose, "--json", "credit.json")
    assert result.returncode in (0, 1), result.stderr
    assert "Γ of fresh feedback" in result.stdout
    (record,) = json.loads(Path("credit.json").read_text(encoding="utf-8"))
    assert len(record["credit"]["layers"]) == 4


def test_a_checkpoint_does_not_get_its_rule_imported():
    train, diagnose = COMMANDS
    result = CliRunner().invoke(cli.app, [*train, "--steps", "1"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(cli.app, [*diagnose[:-2], "--batches", "2"])
    assert "credit: N/A: the checkpoint's rule 'my_rules:SparseFeedback'" in result.output
