"""``fadiag watch`` and the report of a training run: what is drawn, and the exit codes."""

import json
import math
import os
import random
import re

import pytest
from records import healthy, record
from typer.testing import CliRunner

from fadiag_fast import cli
from fadiag_fast.training.alarms import Alarm, Alarms
from fadiag_fast.training.sinks import JsonLines, read_jsonlines
from fadiag_fast.training.watch import Tail, find_log, scan_result_of, sparkline, view

runner = CliRunner()


def fadiag(*arguments):
    return runner.invoke(cli.app, [str(a) for a in arguments])


def write(path, records, append=True):
    with JsonLines(path, append=append) as sink:
        for one in records:
            sink(one)
    return path


BROKEN = [record(150 + i, (8.0, 9.0, 90.0, 99.0)) for i in range(3)]


def test_a_healthy_run_is_drawn_and_exits_with_0(tmp_path):
    result = fadiag("watch", write(tmp_path / "steps.jsonl", healthy(150)), "--last", 40)
    assert result.exit_code == 0, result.output
    assert "steps 110 to 149, 150 recorded: all well" in result.output
    rows = [line for line in result.output.splitlines() if line.startswith(("embed", "blocks."))]
    assert [line.split()[0] for line in rows] == ["embed", "blocks.0", "blocks.1", "blocks.2"]
    last = healthy(150)[-1]
    columns = (rows, last.hidden_norms, last.grad_norms, last.credit_gains)
    for line, *figures in zip(*columns, strict=True):
        shown = [float(text) for text in re.findall(r"[▁▂▃▄▅▆▇█]{16}\s+(\S+)", line)]
        assert shown == pytest.approx(figures, rel=0.01)
    growth = rf"growth [▁▂▃▄▅▆▇█]{{16}} {last.growth:.3g} at {last.growth_layer}"
    assert re.search(growth, result.output)
    assert "\x1b" not in result.output


def test_an_alarm_that_stands_exits_with_1_and_one_that_ended_with_0(tmp_path):
    path = write(tmp_path / "steps.jsonl", [*healthy(150), *BROKEN])
    result = fadiag("watch", path)
    assert result.exit_code == 1, result.output
    assert "ALARM" in result.output
    assert "baseline: step 150, blocks.1" in result.output
    write(path, [*healthy(150), *BROKEN, *healthy(20, start=153)], append=False)
    result = fadiag("watch", tmp_path, "--once")
    assert result.exit_code == 0, result.output
    assert "All clear at step" in result.output


@pytest.mark.parametrize("own", [False, True])
def test_an_alarm_of_a_session_before_does_not_stand_for_ever(tmp_path, own):
    path = tmp_path / "steps.jsonl"

    def session(records):
        with JsonLines(path) as sink:
            alarms = Alarms(actions=(), on_event=sink.event)
            for one in records:
                sink(one)
                if own:
                    alarms(one)

    session([*healthy(150), *BROKEN])
    tail = Tail(path, last=500)
    tail.read()
    (alarm, *_), code = tail.standing, tail.exit_code
    assert (alarm.layer, code) == ("blocks.1", 1)
    # It goes on after the alarm: too few records at first, and the alarm is part of the past.
    session(healthy(30, start=153))
    tail.read()
    assert (tail.standing, tail.exit_code) == ([], 2)
    assert alarm in tail.events
    # From a checkpoint before it, the alarm has not happened.
    session(healthy(150, start=100))
    tail.read()
    assert (tail.events, tail.exit_code) == ([], 0)
    assert [one.step for one in tail.records] == list(range(250))


def test_alarms_of_the_run_itself_count_before_those_of_the_default_limits(tmp_path):
    path = tmp_path / "steps.jsonl"
    with JsonLines(path) as sink:
        alarms = Alarms(actions=(), on_event=sink.event)
        for one in [*healthy(150), *BROKEN]:
            sink(one)
            alarms(one)
    tail = Tail(path)
    tail.read()
    assert tail.own
    assert tail.events == alarms.events
    assert not any("default limits" in line.text for line in view(tail))


def test_too_few_records_exit_with_2_and_what_is_no_log_with_3(tmp_path):
    assert fadiag("watch", write(tmp_path / "few.jsonl", healthy(30))).exit_code == 2
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    result = fadiag("watch", empty)
    assert result.exit_code == 2
    assert "no step recorded yet" in result.output
    other = tmp_path / "other.jsonl"
    other.write_text('{"loss": 1.0}\n')
    result = fadiag("watch", other)
    assert result.exit_code == 3
    assert "expected JSON lines of step records" in result.output
    (tmp_path / "folder").mkdir()
    result = fadiag("watch", tmp_path / "folder")
    assert result.exit_code == 3
    assert "expected a file *.jsonl of step records" in result.output
    assert fadiag("watch", tmp_path / "absent").exit_code == 3


def test_of_a_folder_the_file_written_last_is_taken(tmp_path):
    paths = [write(tmp_path / name / "steps.jsonl", healthy(3)) for name in "abc"]
    (tmp_path / "other.jsonl").write_text("{}\n")
    for age, path in enumerate((paths[1], paths[2], paths[0])):
        os.utime(path, (1e9 - age, 1e9 - age))
    assert find_log(tmp_path) == (paths[1], [paths[2], paths[0]])
    assert f"also here: {paths[2]}" in fadiag("watch", tmp_path).output


def test_a_growing_file_is_read_line_by_line_and_as_if_at_once(tmp_path):
    text = write(tmp_path / "all.jsonl", [*healthy(150), *BROKEN]).read_bytes()
    path = tmp_path / "growing.jsonl"
    tail, found = Tail(path, last=200), []
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(text), 777):
            file.write(text[start : start + 777])
            found += tail.read()
    assert [one.to_json() for one in found] == [one.to_json() for one in [*healthy(150), *BROKEN]]
    assert (tail.damaged, tail.exit_code) == (0, 1)
    # A session from a checkpoint takes the place of the steps after it.
    write(path, healthy(3, start=100))
    tail.read()
    assert [one.step for one in tail.records][-4:] == [99, 100, 101, 102]
    # And a file that was begun anew is read anew.
    write(path, healthy(2), append=False)
    tail.read()
    assert [one.step for one in tail.records] == [0, 1]
    assert tail.exit_code == 2


@pytest.mark.parametrize("seed", range(40))
def test_a_file_that_is_followed_and_one_that_is_read_at_once_say_the_same(seed, tmp_path):
    """Sessions from checkpoints, alarms of earlier steps than their record's, damage, cut reads."""
    chosen = random.Random(seed)
    lines, step = [], 0
    for _ in range(chosen.randint(1, 4)):
        lines.append(json.dumps({"fadiag_steps": 1, "layers": ["a"]}))
        for _ in range(chosen.randint(0, 8)):
            lines.append(record(step).to_json())
            if chosen.random() < 0.3:
                first = max(0, step - chosen.randint(0, 2))
                alarm = (first, step, "a", "baseline", "growth", 9.0, 1.0, 1.0, 1.0, None)
                lines.append(json.dumps(Alarm(*alarm, f"alarm {len(lines)}").to_dict()))
            if chosen.random() < 0.05:
                lines.append("garbage{")
            step += chosen.choice([1, 1, 2])
        step = max(0, step - chosen.randint(0, 8))
    text = "".join(f"{line}\n" for line in lines).encode()
    path = tmp_path / "steps.jsonl"
    path.touch()
    tail = Tail(path, last=1000)
    cuts = sorted(chosen.randrange(len(text)) for _ in range(4))
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        with open(path, "ab") as file:
            file.write(text[begin:end])
        tail.read()
    log = read_jsonlines(path)
    assert [r.to_json() for r in tail.records] == [r.to_json() for r in log.records]
    assert [r.step for r in log.records] == sorted({r.step for r in log.records})
    assert (tail.count, tail.superseded) == (len(log.records), log.superseded)
    assert tail.damaged == len(log.damaged)
    if tail.own:
        assert tail.events == list(log.events)


def test_sparklines():
    assert sparkline([1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, 5.01, 5.0]) == "▄▄▄"
    assert sparkline([1.0, math.nan, math.inf, 0.0, 1e3]) == "▁ ! █"
    long = sparkline([10.0**i for i in range(80)])
    assert len(long) == 16
    assert list(long) == sorted(long)
    assert sparkline([]) == ""


def test_the_report_shows_each_step_and_judges_by_the_gain(tmp_path):
    pytest.importorskip("pyarrow")
    pytest.importorskip("jinja2")
    # A task that gets solved: below the floor of ‖g_L‖, but not of the gain.
    solved = [record(s, grad_norms=(1e-9,) * 4, output_grad_norm=2e-9) for s in range(20, 30)]
    lost = [record(s, gains=(1e-7,) * 4) for s in range(30, 33)]
    skipped = [record(33, (math.inf,) * 4, skipped=True)]
    part = [record(34, (8.0, math.nan, 10.0, 11.0), unreached=("blocks.0",))]
    series = [*healthy(20), *solved, *lost, *skipped, *part]
    path = write(tmp_path / "steps.jsonl", series)
    result = scan_result_of([path])
    assert len(result) == 34
    verdicts = [row["verdict"] for row in result.rows]
    assert verdicts == ["trustworthy"] * 30 + ["needs walk-back: (b)"] * 3 + ["trustworthy"]
    assert [figures.residual_norms for figures in result.figures()][:20] == [
        tuple(one.hidden_norms) for one in healthy(20)
    ]
    out = tmp_path / "report.html"
    run = fadiag("report", path, "-o", out)
    assert run.exit_code == 0, run.output
    assert "34 steps" in run.output
    page = out.read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data["checkpoints"]["step"] == [one.step for one in series if not one.skipped]
    growth = [float(f"{one.growth:.4g}") for one in healthy(20)]
    assert data["checkpoints"]["growth"][:20] == growth
    assert fadiag("report", path, "-o", out, "--config", "x").exit_code == 3
