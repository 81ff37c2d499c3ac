"""Sinks: what arrives where, and that none of them harms a training."""

import json
import logging
import math
import os
import subprocess
import sys
import textwrap
import threading
import time
import types

import pytest

from fadiag_fast.training.alarms import Alarm, AllClear, TrainingStopped, judge_series
from fadiag_fast.training.records import StepRecord
from fadiag_fast.training.sinks import (
    JsonLines,
    LogSink,
    SinkWarning,
    WandbSink,
    as_sink,
    guard,
    read_jsonlines,
)
from fadiag_fast.training.watch import Tail


def record(step, **changes):
    return StepRecord(
        **{
            "step": step,
            "layers": ("embed", "blocks.0"),
            "hidden_norms": (1.0 + step, 2.5),
            "rms_norms": (0.5, 1.25),
            "grad_norms": (1e-3, 2e-3),
            "credit_gains": (0.25, 0.5),
            "output_grad_norm": 4e-3,
            "stabilities": (math.nan, 0.25),
            "average_cosines": (math.nan, 0.5),
            "num_directions": 3,
            "num_samples": 16,
            **changes,
        }
    )


def feed(sink, steps, *, flush=False, close=False):
    for step in steps:
        sink(record(step))
    if flush:
        assert not sink.flush()
        sink(record(max(steps) + 1))
    if close:
        sink.close()


FIGURES = {"fadiag/growth", "fadiag/output_grad_norm"} | {
    f"fadiag/{figure}/{layer}"
    for figure in ("hidden_norm", "grad_norm", "credit_gain")
    for layer in ("embed", "blocks.0")
}


# -- JSON lines


def test_json_lines_come_back_as_they_were(tmp_path):
    path = tmp_path / "runs" / "steps.jsonl"
    records = [record(i, hidden_norms=(math.inf, 1e-320), unreached=("embed",)) for i in range(3)]
    with JsonLines(path) as sink:
        for one in records:
            sink(one)
            # Each line is there at once, for whoever follows the file.
            assert read_jsonlines(path).records[-1].to_json() == one.to_json()
        sink.event(AllClear(2, 1, 1, False, "All clear."))
    log = read_jsonlines(path)
    assert [one.to_json() for one in log.records] == [one.to_json() for one in records]
    assert log.records[0].hidden_norms == (math.inf, 1e-320)
    assert log.events == (AllClear(2, 1, 1, False, "All clear."),)
    assert (log.cut, log.damaged, log.notes) == (False, (), [])
    header = json.loads(path.read_text().splitlines()[0])
    assert header["layers"] == ["embed", "blocks.0"]


@pytest.mark.parametrize("keep", [1, 20, 100])
def test_a_cut_last_line_is_reported_and_appending_goes_on_after_it(tmp_path, keep):
    path = tmp_path / "steps.jsonl"
    with JsonLines(path) as sink:
        for step in range(3):
            sink(record(step))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:keep])
    log = read_jsonlines(path)
    assert [one.step for one in log.records] == [0, 1]
    assert log.cut
    assert "cut off" in log.notes[0]
    with JsonLines(path) as sink:
        sink(record(2))
    log = read_jsonlines(path)
    assert [one.step for one in log.records] == [0, 1, 2]
    assert not log.cut
    assert log.damaged == (4,)  # header, two records, the cut one


def test_a_line_without_its_newline_is_whole_if_it_can_be_read(tmp_path):
    path = tmp_path / "steps.jsonl"
    with JsonLines(path) as sink:
        sink(record(0))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    log = read_jsonlines(path)
    assert (len(log.records), log.cut) == (1, False)


def test_a_session_that_goes_on_from_a_checkpoint_replaces_what_came_after_it(tmp_path):
    path = tmp_path / "steps.jsonl"
    for start, end in ((0, 8), (5, 7), (7, 9)):
        with JsonLines(path) as sink:
            for step in range(start, end):
                sink(record(step, num_samples=start))
    log = read_jsonlines(path)
    assert [one.step for one in log.records] == list(range(9))
    assert [one.num_samples for one in log.records] == [0] * 5 + [5] * 2 + [7] * 2
    assert (log.sessions, log.superseded) == (3, 3)
    with JsonLines(path, append=False) as sink:
        sink(record(4))
    assert [one.step for one in read_jsonlines(path).records] == [4]


def test_an_alarm_behind_a_replaced_record_does_not_keep_it(tmp_path):
    """It is of an earlier step than the record that made it fire."""
    path = tmp_path / "steps.jsonl"
    alarm = Alarm(103, 104, "a", "baseline", "growth", 9.0, 1.0, 1.0, 1.0, 102, "a rule was met")
    with JsonLines(path) as sink:
        for step in range(100, 105):
            sink(record(step))
        sink.event(alarm)
    with JsonLines(path) as sink:
        for step in range(104, 107):
            sink(record(step))
    log = read_jsonlines(path)
    assert [one.step for one in log.records] == [*range(100, 107)]
    assert (log.superseded, log.events) == (1, (alarm,))


def test_other_files_and_later_versions_are_refused(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text('{"loss": 1.0}\nnot json\n')
    with pytest.raises(ValueError, match="expected JSON lines of step records, got none"):
        read_jsonlines(path)
    path.write_text('{"fadiag_steps": 3}\n')
    with pytest.raises(ValueError, match="version 2 or earlier, got version 3"):
        read_jsonlines(path)
    path.write_text("")
    assert read_jsonlines(path).records == ()
    sink = JsonLines(path)
    sink.close()
    with pytest.raises(ValueError, match="expected an open file, got a closed one"):
        sink(record(0))


LONG = tuple(f"model.decoder.layers.{l}.self_attention_block" for l in range(40))


def wide(step, **changes):
    figures = {
        name: tuple(float(step + l) for l in range(len(LONG)))
        for name in ("hidden_norms", "rms_norms", "grad_norms", "credit_gains")
    }
    return record(step, layers=LONG, **figures, **changes)


def test_what_the_records_of_a_session_share_is_written_once(tmp_path):
    path = tmp_path / "steps.jsonl"
    none = (math.nan,) * len(LONG)
    records = [wide(i, stabilities=none, average_cosines=none) for i in range(5)]
    records += [
        wide(5, stabilities=none, average_cosines=none, unreached=LONG[:1], num_samples=3),
        record(6),  # of other layers
    ]
    with JsonLines(path) as sink:
        for one in records:
            sink(one)
    text = path.read_text()
    assert text.count(LONG[7]) == 1
    assert text.count(LONG[0]) == 2  # in the header, and where it was not reached
    assert [one.to_json() for one in read_jsonlines(path).records] == [
        one.to_json() for one in records
    ]


def test_files_of_version_1_are_read(tmp_path):
    path = tmp_path / "steps.jsonl"
    first = [record(step, hidden_norms=(math.inf, math.nan)) for step in range(3)]
    alarm = Alarm(1, 2, "a", "non-finite", "growth", math.inf, 1.0, math.nan, 1.0, None, "…")
    old = {**alarm.to_dict(), "value": "inf", "baseline_median": "nan"}
    lines = [json.dumps({"fadiag_steps": 1, "layers": ["embed", "blocks.0"]})]
    # As versions before wrote what is not finite.
    earlier = [
        one.to_json().replace('"NaN"', "null").replace('"Infinity"', '"inf"') for one in first
    ]
    assert all('["inf", null]' in line for line in earlier)
    lines += [*earlier, json.dumps(old)]
    path.write_text("\n".join(lines) + "\n")
    with JsonLines(path) as sink:
        sink(record(3))
    log = read_jsonlines(path)
    assert [one.to_json() for one in log.records] == [one.to_json() for one in [*first, record(3)]]
    assert repr(log.events) == repr((alarm,))
    assert (log.sessions, log.damaged) == (2, ())


def test_two_that_write_into_one_file_at_a_time_are_told_apart(tmp_path):
    """As the probes of a notebook whose cell is run again."""
    path = tmp_path / "steps.jsonl"
    first, second = JsonLines(path), JsonLines(path)
    for step in range(4):
        first(record(step, num_samples=1))
        if step:
            second(record(step - 1, layers=("a", "b"), num_samples=2))
    log = read_jsonlines(path)
    assert [(one.step, one.layers[0], one.num_samples) for one in log.records] == [
        (0, "a", 2),
        (1, "a", 2),
        (2, "a", 2),
    ]
    assert log.superseded == 4
    tail = Tail(path)
    tail.read()
    assert [one.to_json() for one in tail.records] == [one.to_json() for one in log.records]
    assert tail.superseded == log.superseded


def test_a_file_has_one_way_to_write_what_is_not_finite(tmp_path):
    path = tmp_path / "steps.jsonl"
    alarm = Alarm(0, 0, "a", "x", "growth", math.inf, -math.inf, math.nan, 1.0, None, "…")
    with JsonLines(path) as sink:
        sink(record(0, hidden_norms=(math.inf, math.nan), output_grad_norm=-math.inf))
        sink.event(alarm)
        sink.event(alarm)  # as by a function of the user's and by the probe
    lines = path.read_text().splitlines()
    _, line, event = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert (line["hidden_norms"], line["output_grad_norm"]) == (["Infinity", "NaN"], "-Infinity")
    assert (event["value"], event["threshold"], event["baseline_median"]) == (
        "Infinity",
        "-Infinity",
        "NaN",
    )
    assert repr(read_jsonlines(path).events) == repr((alarm,))


# -- adapters


def test_a_function_of_metrics_and_step():
    got = []
    for log in (
        lambda metrics, step: got.append((metrics, step)),
        lambda metrics, *, step: got.append((metrics, step)),
        lambda metrics, global_step: got.append((metrics, global_step)),
        lambda metrics, step=None, commit=True: got.append((metrics, step)),
    ):
        as_sink(log)(record(7))
    assert len(got) == 4
    for metrics, step in got:
        assert step == 7
        assert set(metrics) >= FIGURES
        assert metrics["fadiag/hidden_norm/embed"] == 8.0
        # What is not known is left out, not logged as NaN.
        assert "fadiag/stability/embed" not in metrics
        assert metrics["fadiag/stability/blocks.0"] == 0.25


def test_a_function_of_a_record_and_a_list_of_sinks():
    one, two = [], []
    sink = as_sink([one.append, lambda record: two.append(record.step), print])
    sink(record(3))
    assert one[0].step == 3
    assert two == [3]
    with pytest.raises(ValueError, match=r"at least one in a list, got none.*records\.append"):
        as_sink([])


@pytest.mark.parametrize("wrong", [None, 3, object(), dict, JsonLines, {"log": 1}])
def test_what_is_no_sink_is_refused(wrong):
    with pytest.raises(TypeError, match="sink: expected a path, a SummaryWriter"):
        as_sink(wrong)


def test_paths_and_loggers(tmp_path, caplog):
    with as_sink(tmp_path / "steps.jsonl") as sink:
        sink(record(0))
    assert len(read_jsonlines(tmp_path / "steps.jsonl").records) == 1
    with caplog.at_level(logging.INFO):
        as_sink(logging.getLogger("mine"))(record(5))
    assert caplog.messages == ["step 5: ‖h_L‖ 2.5, growth 0.417, ‖g_L‖ 0.002, credit gain 0.5"]


def test_tensorboard_has_the_scalars(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is absent")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = tensorboard.SummaryWriter(tmp_path)
    sink = as_sink(writer)
    for step in (0, 10):
        sink(record(step))
    sink.flush()
    writer.close()
    found = events.EventAccumulator(str(tmp_path))
    found.Reload()
    assert set(found.Tags()["scalars"]) >= FIGURES
    scalars = found.Scalars("fadiag/hidden_norm/embed")
    assert [(one.step, one.value) for one in scalars] == [(0, 1.0), (10, 11.0)]


def test_mlflow_has_the_metrics(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is absent")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    try:
        mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
        mlflow.set_experiment("sinks")
        started = mlflow.start_run()
    except Exception as error:
        pytest.skip(f"this mlflow starts no run on files: {error}")
    with started as run:
        sink = as_sink(mlflow)
        for step in (0, 10):
            sink(record(step, layers=("embed", "blocks[0]")))
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "fadiag/hidden_norm/embed")
    assert [(one.step, one.value) for one in history] == [(0, 1.0), (10, 11.0)]
    with pytest.raises(TypeError, match="expected the module mlflow"):
        as_sink(mlflow.MlflowClient())


class Run:
    """A W&B run as far as rows go: a row is ended by a commit; late steps are dropped."""

    def __init__(self):
        self.step, self.rows, self.row, self.axes = 0, [], {}, {}

    def define_metric(self, name, step_metric=None, hidden=None):
        self.axes[name] = step_metric

    def log(self, data, step=None, commit=None):
        if step is not None:
            if step < self.step:
                return
            if step > self.step:
                self.end()
                self.step = step
        self.row.update(data)
        if commit or (commit is None and step is None):
            self.end()
            self.step += 1

    def end(self):
        if self.row:
            self.rows.append(self.row)
        self.row = {}


Run.__module__ = "wandb.sdk.wandb_run"


@pytest.mark.parametrize("every", [1, 5, 1000])
@pytest.mark.parametrize("explicit", [True, False])
def test_wandb_keeps_every_record_and_every_row_of_the_user(every, explicit):
    run = Run()
    sink = as_sink(run)
    assert isinstance(sink, WandbSink)
    assert isinstance(as_sink(run.log), WandbSink)
    assert run.axes == {"fadiag/step": None, "fadiag/*": "fadiag/step"}
    for step in range(60):
        if step % every == 0:
            run.log({"loss": step}, step=step if explicit else None)
        if step >= 8:  # records come late
            sink(record(step - 8))
    run.end()
    losses = [row["loss"] for row in run.rows if "loss" in row]
    assert losses == list(range(0, 60, every))
    assert [r["fadiag/step"] for r in run.rows if "fadiag/step" in r] == list(range(52))


def test_modules_and_runs_with_log_get_the_step_by_name():
    trackio = types.ModuleType("trackio")
    got = []
    trackio.log = lambda metrics, step=None: got.append((step, metrics["fadiag/growth"]))
    as_sink(trackio)(record(0))

    class Accelerator:
        def log(self, values, step=None, log_kwargs=None):
            got.append((step, values["fadiag/growth"]))

    as_sink(Accelerator())(record(1))

    class LightningLogger:
        def log_metrics(self, metrics, step=None):
            got.append((step, metrics["fadiag/growth"]))

    as_sink(LightningLogger())(record(4))
    assert got == [(0, 2.5), (1, 1.25), (4, 0.5)]


# -- the guard


def test_a_sink_that_raises_is_switched_off_after_one_warning(caplog):
    taken = []

    def sink(one):
        taken.append(one.step)
        if one.step == 2:
            raise OSError("no space left")

    guarded = guard(sink, threaded=False)
    with pytest.warns(SinkWarning, match="raised at step 2 .* training goes on: OSError") as seen:
        feed(guarded, range(6), close=True)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert taken == [0, 1, 2]
    assert guarded.missed == 4
    assert "4 since it was switched off" in caplog.text


def test_the_same_on_a_thread(caplog):
    def sink(one):
        if one.step >= 2:
            raise OSError("no space left")

    guarded = guard(sink)
    with pytest.warns(SinkWarning, match="raised at step 2") as seen:
        feed(guarded, range(50), flush=True, close=True)
    guarded(record(51))
    assert len(seen) == 1
    assert guarded.missed == 50  # 2 to 51


def test_a_sink_that_blocks_does_not_hold_the_training_up(caplog):
    free, taken = threading.Event(), []

    def sink(one):
        free.wait(20)
        taken.append(one.step)

    guarded = guard(sink, queue_size=10, timeout=0.2)
    start = time.perf_counter()
    with pytest.warns(SinkWarning, match="slower than the training.*oldest are dropped") as seen:
        feed(guarded, range(100))
    assert not guarded.flush()
    # A hundred records in a sink that blocks for 20 s, and a flush that waits 0.2 s.
    assert time.perf_counter() - start < 5
    assert len(seen) == 1
    free.set()
    assert guarded.flush(timeout=20)
    guarded.close()
    assert taken[-10:] == list(range(90, 100))
    assert guarded.dropped + len(taken) == 100
    assert f"{guarded.dropped} because it was slow" in caplog.text


def test_records_keep_their_order_and_none_is_lost(tmp_path):
    with guard(tmp_path / "steps.jsonl", queue_size=5000) as guarded:
        for step in range(2000):
            guarded(record(step))
            if step == 1000:
                guarded.event(AllClear(1000, 1, 1, False, "All clear."))
        assert guarded.flush()
        assert len(read_jsonlines(tmp_path / "steps.jsonl").records) == 2000
    lines = (tmp_path / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line).get("step") for line in lines[1001:1004]] == [1000, 1000, 1001]
    assert "event" in json.loads(lines[1002])


def test_a_clean_exit_loses_nothing(tmp_path):
    path = tmp_path / "steps.jsonl"
    code = f"""
        import sys, time
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_sinks import record
        from fadiag_fast.training.sinks import JsonLines, guard

        class Slow(JsonLines):
            def __call__(self, one):
                time.sleep(0.01)
                super().__call__(one)

        guarded = guard(Slow({str(path)!r}))
        for step in range(50):
            guarded(record(step))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)
    assert [one.step for one in read_jsonlines(path).records] == list(range(50))


@pytest.mark.parametrize("threaded", [False, True])
def test_a_stop_comes_through_the_guard(threaded):
    (alarm,) = judge_series([record(0, hidden_norms=(1.0, math.nan))])

    def sink(one):
        if one.step == 1:
            raise TrainingStopped(alarm)

    guarded = guard(sink, threaded=threaded)
    guarded(record(0))
    if threaded:
        # A thread can only tell with the next record.
        guarded(record(1))
        guarded.flush()
    with pytest.raises(TrainingStopped, match="Training is stopped") as stop:
        guarded(record(2 if threaded else 1))
    assert stop.value.alarm is alarm
    guarded(record(3))
    assert guarded.flush()


def test_the_guard_flushes_and_closes_what_it_guards():
    calls = []

    class Own(LogSink):
        def flush(self):
            calls.append("flush")

        def close(self):
            calls.append("close")

    guarded = guard(Own(lambda metrics, step: calls.append(step)))
    assert guard(guarded) is guarded
    guarded(record(0))
    guarded.close()
    guarded.close()
    assert calls == [0, "flush", "close"]
    with pytest.raises(ValueError, match="queue_size: expected at least 1, got 0"):
        guard(print, queue_size=0)
