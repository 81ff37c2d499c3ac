"""The README's examples run, and say what it says they say."""

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fadiag_fast import cli
from fadiag_fast.study import load_suite
from fadiag_fast.training.sinks import read_jsonlines

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [shlex.split(line) for line in re.findall(r"^\$ fadiag (.*)$", README, re.MULTILINE)]


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run(program, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(program, "README.md", "exec"), names)
    if "report" in names:
        assert names["report"].verdict == "needs walk-back: (a)"
        assert "verdict: needs walk-back: (a)" in capsys.readouterr().out
    elif "found" in names:
        assert names["found"].grad_norm.shape == (5, 128)
    elif "teacher" in names:
        assert names["probe"].alarms.events == []
        assert len(read_jsonlines("steps.jsonl").records) == 100
    elif "audit" in names:
        assert names["audit"].figures.layers == ("embed", *(f"blocks.{l}" for l in range(4)))
    elif "chosen" in names:
        assert f"# {names['chosen'].provenance['taps']!r}" in program
        assert f"# {names['named'].provenance['taps']!r}" in program
    else:
        assert names["statistics"][0].hidden_norm.shape == (2, 128)
        assert names["statistics"][0].grad_mean[1].shape == (64, 8, 8)


def test_commands_run_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # `runs/*.pt`, `mypackage` and `photos` stand for the reader's own files, as the README says.
    own = [c for c in COMMANDS if not {"mypackage", "photos"} & {*re.split(r"\W", " ".join(c))}]
    assert [command[0] for command in own] == [
        "train",
        "diagnose",
        "doctor",
        "audit-cnn",
        "diagnose",
        "study",
        "scan",
        "thresholds",
        "report",
        "watch",
    ]
    (loop,) = [program for program in PROGRAMS if "steps.jsonl" in program]
    exec(compile(loop, "README.md", "exec"), {})
    own = [command for command in own if command[0] not in ("audit-cnn", "study")]
    expected = {
        "train": 0,
        "diagnose": 1,
        "doctor": 0,
        "scan": 1,
        "thresholds": 0,
        "report": 0,
        "watch": 0,
    }
    for command in own:
        result = CliRunner().invoke(cli.app, command)
        assert result.exit_code == expected[command[0]], result.output
    assert (tmp_path / "dfa.json").exists()


def test_the_cnn_audit_reads_what_its_loop_trains(tmp_path, monkeypatch):
    """One step of a narrower network: the loop itself takes minutes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cnn").mkdir()
    (loop,) = re.findall(r"^>   fadiag (train --model smallcnn .*)$", README, re.MULTILINE)
    for rule, seed in itertools.product(("bp", "dfa"), ("42", "123", "456")):
        text = loop.replace("$rule", rule).replace("${rule}", rule).replace("$seed", seed)
        # Of an option given twice the last one holds.
        faster = ["--steps", "1", "--model-option", "channels=(2,2,2)"]
        result = CliRunner().invoke(cli.app, [*shlex.split(text), *faster])
        assert result.exit_code == 0, result.output
    (audit,) = [command for command in COMMANDS if command[0] == "audit-cnn"]
    result = CliRunner().invoke(cli.app, audit)
    assert result.exit_code in (0, 1), result.output
    record = json.loads((tmp_path / "cnn" / "audit.json").read_text())
    assert [(row["method"], row["seed"]) for row in record["rows"]] == [
        (rule, seed) for seed in (42, 123, 456) for rule in ("bp", "dfa")
    ]
    assert result.output.count("SKIPPED") == len(record["skipped"]) == 9


def test_the_study_runs_at_a_reduced_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (study,) = [command for command in COMMANDS if command[0] == "study"]
    less = ["--models", "resmlp", "--rules", "bp,frozen", "--seeds", "42", "--steps", "2"]
    result = CliRunner().invoke(cli.app, [*study, *less])
    assert result.exit_code == 0, result.output
    assert {"report.md", "runs.csv", "steps.csv"} <= {p.name for p in Path("study").iterdir()}


def test_the_suite_in_toml_is_one(tmp_path):
    pytest.importorskip("tomllib", reason="needs Python 3.11")
    (text,) = re.findall(r"```toml\n(data = .*?)```", README, re.DOTALL)
    (tmp_path / "mine.toml").write_text(text)
    assert load_suite(str(tmp_path / "mine.toml")).models[0].options["num_blocks"] == 16


def test_tables_are_those_of_the_results():
    """Every figure in a README has a row in benchmarks/results."""
    from benchmarks import rows, tables

    assert tables.update(rows.RESULTS, check=True) == []
