"""The README's examples run, and say what it says they say."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fadiag_fast import cli

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [shlex.split(line) for line in re.findall(r"^\$ fadiag (.*)$", README, re.MULTILINE)]


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run(program, capsys):
    names = {}
    exec(compile(program, "README.md", "exec"), names)
    if "report" in names:
        assert names["report"].verdict == "needs walk-back: (a)"
        assert "verdict: needs walk-back: (a)" in capsys.readouterr().out
    else:
        assert names["statistics"][0].hidden_norm.shape == (2, 128)
        assert names["statistics"][0].grad_mean[1].shape == (64, 8, 8)


def test_commands_run_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # `runs/*.pt` and `mypackage` stand for the reader's own files, as the README says.
    own = [command for command in COMMANDS if "mypackage" not in " ".join(command)]
    assert [command[0] for command in own] == ["train", "diagnose", "doctor"]
    expected = {"train": 0, "diagnose": 1, "doctor": 0}
    for command in own:
        result = CliRunner().invoke(cli.app, command)
        assert result.exit_code == expected[command[0]], result.output
    assert (tmp_path / "dfa.json").exists()


def test_tables_are_those_of_the_results():
    """Every figure in a README has a row in benchmarks/results."""
    from benchmarks import rows, tables

    assert tables.update(rows.RESULTS, check=True) == []
