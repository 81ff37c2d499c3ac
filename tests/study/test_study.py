"""A study at a reduced size: what it keeps, what it explains, and that its figures are right."""

import _thread
import csv
import json
import math
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import fadiag_fast
from fadiag_fast import cli, diagnose
from fadiag_fast.checkpoints import load_checkpoint, load_into
from fadiag_fast.credit import CreditReport, LayerCredit
from fadiag_fast.protocol import Figures
from fadiag_fast.study import (
    SUITES,
    AuditedStep,
    RunRecord,
    StudyModel,
    Suite,
    decision_table,
    first_fired,
    load_suite,
    run_study,
    running,
    threshold_gaps,
    write_tables,
)
from fadiag_fast.study.suites import log_spaced
from fadiag_fast.study.tables import geometric, mean_table, spread
from fadiag_fast.zoo import (
    RULES,
    Rule,
    build_model,
    load_dataset,
    restore_rule,
    rule_credit,
    teacher_dataset,
    train,
)

SMALL = Suite(
    name="small",
    models=(
        StudyModel("mlp", "resmlp", {"d_hidden": 16, "num_blocks": 3}),
        StudyModel("vit", "vit-mini", {"d_hidden": 8, "num_blocks": 2, "num_heads": 2}, 4),
    ),
    rules=("bp", "frozen", "dfa"),
    seeds=(42, 7),
    steps=12,
    checkpoint_steps=(3, 6),
    batch_size=16,
    eval_batches=8,
    eval_batch_size=8,
)


class Refusing(Rule):
    """Fail at the third update, as a rule under development does."""

    name = "refusing"

    def block_credit(self, states):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3:
            raise RuntimeError("no credit today\nand a second line")
        return [torch.zeros_like(h) for h in states.hiddens[1:]]


@pytest.fixture(scope="module")
def study(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return run_study(SMALL, images, out), out


def stamps(folder: Path) -> dict[str, int]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(path): path.stat().st_mtime_ns for path in paths}


def test_every_run_has_its_checkpoints_and_figures(study):
    result, out = study
    assert result.trained == len(result.runs) == 2 * 3 * 2
    assert result.failed == []
    for run in result.runs:
        expected = (3, 6, 12) if run.model == "mlp" else (3, 4)
        assert tuple(step.step for step in run.steps) == expected
        folder = out / run.model / run.rule / f"seed_{run.seed}"
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            ["audit.json", "run.json", *(f"step_{step}.pt" for step in expected)]
        )


@pytest.mark.parametrize(("model", "rule"), [("mlp", "dfa"), ("vit", "bp")])
def test_figures_are_those_of_diagnose_on_the_saved_checkpoints(study, images, model, rule):
    result, out = study
    (run,) = [r for r in result.runs if (r.model, r.rule, r.seed) == (model, rule, 7)]
    (frozen,) = [r for r in result.runs if (r.model, r.rule, r.seed) == (model, "frozen", 7)]
    spec = next(one for one in SMALL.models if one.label == model)
    flat = model == "mlp"
    batches = images.eval_batches(8, 8, flatten=flat)
    for step, baseline in zip(run.steps, frozen.steps, strict=True):
        saved = load_checkpoint(out / model / rule / "seed_7" / f"step_{step.step}.pt")
        network = build_model(spec.model, input_shape=(1, 8, 8), num_classes=4, **spec.options)
        load_into(network, saved)
        for protocol in ("paper", "calibrated"):
            report = diagnose(
                network,
                batches,
                saved.extra["config"]["accuracy"],
                baseline.accuracy,
                protocol=protocol,
                test_size=96,
                reduction="flatten" if flat else "cls",
            )
            assert step.diagnostics(protocol) == report.diagnostics
            assert step.verdict(protocol) == report.verdict
        assert step.hidden_norm == report.residual_norms[-1]
        assert step.grad_norm == report.bp_grad_norms[-1]
        assert step.credit_gain == report.credit_gains[-1]
        assert step.credit is None or step is run.last
    credit = rule_credit(restore_rule(network.eval(), saved.extra), batches[0], fresh=None)
    assert run.last.deep_gamma == credit.deep_gamma
    assert run.last.deep_rho == credit.deep_perturbation


def test_the_baseline_is_the_frozen_run_of_the_same_model_seed_and_step(study):
    result, _ = study
    frozen = {
        (run.model, run.seed, step.step): step.accuracy
        for run in result.runs
        if run.rule == "frozen"
        for step in run.steps
    }
    assert len(set(frozen.values())) > 3, "the runs must differ, or any of them would do"
    for run in result.runs:
        for step in run.steps:
            expected = None if run.rule == "frozen" else frozen[run.model, run.seed, step.step]
            assert step.figures.frozen_baseline_acc == expected


def test_a_checkpoint_on_the_way_is_the_network_after_that_step(images):
    """Asking for checkpoints changes nothing: BatchNorm would show a network left in eval mode."""
    kept = {}
    options = {"model_options": {"channels": (2, 2, 2), "d_hidden": 4}, "batch_size": 16}
    whole = train(
        "smallcnn",
        "bp",
        images,
        steps=6,
        checkpoint_steps=(2, 6),
        on_checkpoint=lambda step, network: kept.update({step: network.checkpoint()}),
        **options,
    )
    plain = train("smallcnn", "bp", images, steps=6, **options)
    assert list(kept) == [2, 6]
    assert [kept[step]["config"]["step"] for step in kept] == [2, 6]
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name])
        assert torch.equal(tensor, kept[6]["state_dict"][name])
    assert kept[6]["config"]["accuracy"] == plain.accuracy
    assert int(kept[2]["state_dict"]["blocks.0.1.num_batches_tracked"]) == 2
    with pytest.raises(ValueError, match=r"checkpoint_steps from 1 to 6, got \[7\]"):
        train("smallcnn", "bp", images, steps=6, checkpoint_steps=[7], **options)


def test_a_second_call_trains_and_writes_nothing(study, images):
    result, out = study
    before = stamps(out)
    seen = []
    again = run_study(SMALL, images, out, progress=seen.append)
    assert again.trained == 0
    assert again.runs == result.runs
    assert stamps(out) == before
    assert {at.state for at in seen} == {"kept"}
    assert [at.done for at in seen] == list(range(1, 13))


def test_what_is_missing_is_made_again_and_nothing_else(images, tmp_path):
    suite = replace(SMALL, models=SMALL.models[:1], seeds=(42,))
    first = run_study(suite, images, tmp_path)
    (tmp_path / "mlp/dfa/seed_42/step_6.pt").unlink()
    (tmp_path / "mlp/bp/seed_42/audit.json").write_text('{"key": ')  # as an older tool would
    kept = stamps(tmp_path / "mlp/frozen")
    trained_bp = (tmp_path / "mlp/bp/seed_42/step_12.pt").stat().st_mtime_ns
    again = run_study(suite, images, tmp_path)
    assert again.trained == 1
    assert [run.steps for run in again.runs] == [run.steps for run in first.runs]
    assert stamps(tmp_path / "mlp/frozen") == kept
    assert (tmp_path / "mlp/bp/seed_42/step_12.pt").stat().st_mtime_ns == trained_bp
    more = run_study(replace(suite, seeds=(42, 3)), images, tmp_path)
    assert more.trained == 3


def test_an_interrupted_study_goes_on(images, tmp_path, monkeypatch):
    suite = replace(SMALL, models=SMALL.models[:1], seeds=(42,))
    real, calls = running.train, []

    def interrupted(model, rule, *arguments, **options):
        calls.append(rule)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, rule, *arguments, **options)

    monkeypatch.setattr(running, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(suite, images, tmp_path)
    stray = tmp_path / "mlp/frozen/seed_42/step_5.pt"
    stray.write_bytes(b"of a run that was stopped")
    assert run_study(suite, images, tmp_path).trained == 2
    assert not stray.exists()
    assert calls == ["bp", "frozen", "frozen", "dfa"]


# ---- a run that was stopped half-way: 12 steps, checkpoints at 3, 6 and 12


@pytest.fixture
def updates(monkeypatch):
    made, update = [], Rule.update

    def counted(self, x, y):
        made.append(self.name)
        return update(self, x, y)

    monkeypatch.setattr(Rule, "update", counted)
    return made


def one_run(rule, **changes):
    return replace(SMALL, models=SMALL.models[:1], rules=(rule,), seeds=(42,), **changes)


def stop_at(step):
    def interrupt(at):
        if at.step == step:
            raise KeyboardInterrupt

    return interrupt


def interrupted(suite, images, out, step=8):
    with pytest.raises(KeyboardInterrupt):
        run_study(suite, images, out, progress=stop_at(step))
    return out / "mlp" / suite.rules[0].replace(":", "-") / "seed_42"


def assert_same_run(one: Path, other: Path):
    """Every file but the times is the same, and there are no others."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        if name.endswith(".pt"):
            mine, yours = (torch.load(at / name, weights_only=True) for at in (one, other))
            assert mine["config"] == yours["config"]
            for part in ("state_dict", "rule_state"):
                assert list(mine[part]) == list(yours[part])
                for key, tensor in mine[part].items():
                    assert torch.equal(tensor, yours[part][key]), (name, key)
        else:
            mine, yours = (json.loads((at / name).read_text()) for at in (one, other))
            mine.pop("seconds", None), yours.pop("seconds", None)
            assert mine == yours


@pytest.mark.parametrize(
    ("rule", "options"), [("dfa", {}), ("credit-bridge", {"dfa_fraction": 0.6})]
)
def test_a_run_that_was_stopped_goes_on_from_its_last_checkpoint(
    images, tmp_path, updates, rule, options
):
    suite = one_run(rule, rule_options={rule: options})
    whole = run_study(suite, images, tmp_path / "whole")
    folder = interrupted(suite, images, tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {"step_3.pt", "step_6.pt", "resume.pt"}
    kept = (folder / "step_6.pt").stat().st_mtime_ns
    (folder / "step_5.pt").write_bytes(b"of another run")
    del updates[:]
    seen = []
    again = run_study(suite, images, tmp_path / "out", progress=seen.append)
    assert updates == [rule] * 6
    assert [at.step for at in seen if at.state == "training"] == list(range(7, 13))
    assert (folder / "step_6.pt").stat().st_mtime_ns == kept
    assert again.trained == 1
    assert without_times(again) == without_times(whole)
    assert_same_run(folder, tmp_path / "whole/mlp" / rule / "seed_42")


def test_a_run_may_be_stopped_again_and_again(study, images, tmp_path, updates):
    _, whole = study
    suite = one_run("bp")
    for step, made in ((2, 2), (4, 4), (5, 2), (12, 9)):
        del updates[:]
        folder = interrupted(suite, images, tmp_path, step)
        assert len(updates) == made
    run_study(suite, images, tmp_path)
    assert_same_run(folder, whole / "mlp/bp/seed_42")


def shorten(folder):
    content = (folder / "resume.pt").read_bytes()
    (folder / "resume.pt").write_bytes(content[: len(content) // 2])


def rewrite(folder, **changes):
    saved = torch.load(folder / "resume.pt", weights_only=True)
    torch.save({**saved, **changes}, folder / "resume.pt")


def flip_a_bit(folder):
    saved = torch.load(folder / "resume.pt", weights_only=True)
    content = bytearray((folder / "resume.pt").read_bytes())
    moment = saved["training"]["optimizer"]["state"][0]["exp_avg"].numpy().tobytes()
    content[content.index(moment)] ^= 1
    (folder / "resume.pt").write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        shorten,
        flip_a_bit,
        lambda folder: torch.save([1, 2], folder / "resume.pt"),
        lambda folder: rewrite(folder, training={"losses": torch.zeros(5)}),
        lambda folder: rewrite(folder, environment="another device"),
        lambda folder: rewrite(folder, seconds=math.nan),
        lambda folder: (folder / "step_3.pt").unlink(),
        lambda folder: (folder / "run.json").write_text('{"status": "failed", "reason": "?"}'),
    ],
    ids=["short", "bit", "list", "parts", "device", "seconds", "checkpoint", "failed"],
)
def test_what_does_not_fit_makes_a_run_start_at_its_first_step(
    study, images, tmp_path, updates, harm
):
    _, whole = study
    folder = interrupted(one_run("dfa"), images, tmp_path)
    harm(folder)
    del updates[:]
    result = run_study(one_run("dfa"), images, tmp_path)
    assert result.failed == []
    assert len(updates) == 12
    assert_same_run(folder, whole / "mlp/dfa/seed_42")


def assert_starts_anew(suite, folder, images, tmp_path, updates):
    """A run stopped in ``folder``, below tmp_path/out, is made whole from its first step."""
    run_study(suite, images, tmp_path / "whole")
    del updates[:]
    run_study(suite, images, tmp_path / "out")
    assert len(updates) == 12
    assert_same_run(folder, tmp_path / "whole" / folder.relative_to(tmp_path / "out"))


def test_a_stopped_run_of_another_configuration_is_none_of_this_one(images, tmp_path, updates):
    folder = interrupted(one_run("dfa"), images, tmp_path / "out")
    suite = one_run("dfa", checkpoint_steps=(3, 9))
    assert_starts_anew(suite, folder, images, tmp_path, updates)


def test_a_rule_that_keeps_more_than_is_carried_starts_at_its_first_step(images, tmp_path, updates):
    suite = one_run("toys:Decaying")
    folder = interrupted(suite, images, tmp_path / "out")
    assert (folder / "resume.pt").exists()
    assert_starts_anew(suite, folder, images, tmp_path, updates)


class Stepping(Rule):
    """Have a schedule of one's own that cannot be saved."""

    name = "stepping"

    def _descent(self, learning_rate, weight_decay):
        optimizer, _ = super()._descent(learning_rate, weight_decay)
        return optimizer, SimpleNamespace(step=lambda: None)

    def block_credit(self, states):
        return [torch.zeros_like(h) for h in states.hiddens[1:]]


def test_a_rule_whose_state_cannot_be_saved_trains_all_the_same(images, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_study(one_run("test_study:Stepping"), images, tmp_path, progress=stop_at(8))
    assert not list(tmp_path.rglob("resume.pt"))
    result = run_study(one_run("test_study:Stepping"), images, tmp_path)
    assert result.failed == []


def test_a_run_that_failed_leaves_nothing_to_go_on_from(images, tmp_path, updates):
    suite = one_run("test_study:Refusing", checkpoint_steps=(1, 2))
    for _ in range(2):
        del updates[:]
        assert run_study(suite, images, tmp_path).failed
        assert len(updates) == 3
        assert not list(tmp_path.rglob("resume.pt"))


def test_what_a_killed_call_left_of_a_finished_run_is_removed(images, tmp_path):
    suite = one_run("bp")
    run_study(suite, images, tmp_path)
    (tmp_path / "mlp/bp/seed_42/resume.pt").write_bytes(b"of a call that was killed")
    assert run_study(suite, images, tmp_path).trained == 0
    assert not list(tmp_path.rglob("resume.pt"))


def test_the_time_of_a_run_goes_on_too(images, tmp_path, monkeypatch):
    now, update = [0.0], Rule.update
    monkeypatch.setattr(running.time, "perf_counter", lambda: now[0])

    def in_a_second(self, x, y):
        now[0] += 1.0
        return update(self, x, y)

    monkeypatch.setattr(Rule, "update", in_a_second)
    interrupted(one_run("bp"), images, tmp_path)
    seen = []
    (run,) = run_study(one_run("bp"), images, tmp_path, progress=seen.append).runs
    # 6 seconds until the checkpoint, and 6 since.
    assert (now[0], run.seconds) == (14.0, 12.0)
    assert [(at.step, at.rate, at.seconds_left) for at in seen[:-1]] == [
        (step, 1.0, 12.0 - step) for step in range(7, 13)
    ]
    assert seen[-1].rate == 1.0


# ---- several runs at once


def without_times(result):
    return [replace(run, seconds=0.0) for run in result.runs]


def test_figures_do_not_depend_on_the_number_of_jobs(study, images, tmp_path):
    alone, folder = study
    together = run_study(SMALL, images, tmp_path, jobs=3)
    assert without_times(together) == without_times(alone)
    assert together.trained == alone.trained == 12
    for run in alone.runs:
        place = Path(run.model, run.rule, f"seed_{run.seed}", f"step_{run.steps[-1].step}.pt")
        one, other = (load_checkpoint(out / place).state_dict for out in (folder, tmp_path))
        assert all(torch.equal(one[name], other[name]) for name in one), place


def test_the_record_says_that_nothing_was_graphed_on_the_cpu(study):
    _, out = study
    record = json.loads((out / "mlp/bp/seed_7/run.json").read_text())
    assert (record["graphed_steps"], record["graph_note"]) == (0, "")


def test_a_failing_run_among_others_is_explained_and_the_others_go_on(images, tmp_path):
    rules = ("test_study:Refusing", "bp", "no_such_module:Rule", "frozen", "dfa")
    suite = replace(SMALL, models=SMALL.models[:1], rules=rules, seeds=(42,))
    result = run_study(suite, images, tmp_path, jobs=3)
    assert [run.rule for run in result.failed] == ["test_study:Refusing", "no_such_module:Rule"]
    assert result.failed[0].reason == "RuntimeError: no credit today"
    assert result.trained == 3
    assert result.runs[1].last.figures.frozen_baseline_acc == result.runs[3].last.accuracy


def test_a_run_without_memory_beside_others_is_made_alone(images, tmp_path, monkeypatch):
    real, threads = running.train, []

    def greedy(model, rule, *arguments, **options):
        if rule == "frozen":
            threads.append(threading.current_thread())
            if threads[-1] is not threading.main_thread():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(model, rule, *arguments, **options)

    monkeypatch.setattr(running, "train", greedy)
    suite = replace(SMALL, models=SMALL.models[:1], seeds=(42,))
    seen = []
    result = run_study(suite, images, tmp_path, jobs=2, progress=seen.append)
    assert len(threads) == 2
    assert result.failed == []
    assert [at.done for at in seen if at.state == "audited"] == [1, 2, 3]
    # Alone it is the run's own failure.
    monkeypatch.setattr(threading, "main_thread", lambda: None)
    result = run_study(replace(suite, seeds=(43,)), images, tmp_path, jobs=2)
    assert [run.reason.split(".")[0] for run in result.failed] == [
        "OutOfMemoryError: CUDA out of memory"
    ]


@pytest.fixture
def ctrl_c():
    """Heard, also where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_stops_all_runs_between_steps_and_keeps_those_that_are_finished(images, tmp_path):
    """Raised in the main thread by a worker's progress, while another has steps for hours."""
    endless = StudyModel("endless", "resmlp", {"d_hidden": 16, "num_blocks": 3}, 10**7)
    suite = replace(
        SMALL, models=(SMALL.models[0], endless), rules=("bp",), seeds=(42,), checkpoint_steps=()
    )
    began = []

    def interrupt(at):
        if at.run.startswith("mlp") and at.state == "audited":
            began.append(time.perf_counter())
            _thread.interrupt_main()

    with pytest.raises(KeyboardInterrupt):
        run_study(suite, images, tmp_path, jobs=2, progress=interrupt)
    assert time.perf_counter() - began[0] < 5
    assert (tmp_path / "mlp/bp/seed_42/audit.json").is_file()
    assert not (tmp_path / "endless/bp/seed_42/run.json").exists()
    seen = []
    done = replace(suite, models=suite.models[:1])
    assert run_study(done, images, tmp_path, jobs=2, progress=seen.append).trained == 0
    assert [at.state for at in seen] == ["kept"]


def test_an_interrupt_in_a_worker_stops_the_study(images, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(SMALL, images, tmp_path, jobs=2)
    assert not list(tmp_path.rglob("run.json"))


def test_progress_is_told_by_one_thread_at_a_time_and_knows_of_all_runs(images, tmp_path):
    inside = threading.Lock()
    seen = []

    def look(at):
        assert inside.acquire(blocking=False), "two threads at once"
        time.sleep(0.0005)
        seen.append(at)
        inside.release()

    suite = replace(SMALL, models=SMALL.models[:1])
    run_study(suite, images, tmp_path, jobs=4, progress=look)
    assert [at.done for at in seen] == sorted(at.done for at in seen)
    assert seen[-1].done == seen[-1].total == 6
    assert {at.run for at in seen if at.state == "training"} == {
        f"mlp/{rule}/seed_{seed}" for rule in suite.rules for seed in suite.seeds
    }
    assert all(at.rate > 0 for at in seen)
    assert seen[-1].seconds_left == 0


def test_the_time_left_knows_how_many_runs_go_on_at_once(images, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(running.time, "perf_counter", lambda: now[0])
    suite = replace(SMALL, models=SMALL.models[:1], rules=("bp", "dfa"), seeds=(1, 2, 3))
    plans = running._plans(suite, images, tmp_path)  # bp 1 2 3, dfa 1 2 3; 12 steps each
    seen = []
    clock = running._Clock(plans, seen.append, 2)
    clock.start(plans[0])
    clock.start(plans[3])
    now[0] = 6.0
    clock.training(plans[0], 6)
    # 12 seconds of two runs bought 6 steps known of; 66 are missing, two at a time.
    assert (seen[-1].rate, seen[-1].seconds_left) == (1.0, 66 * 2 / 2)
    clock.training(plans[3], 12)
    assert seen[-1].rate == 3.0
    assert clock.stop(plans[3], trained=True) == 6.0
    clock.finished(plans[3], "audited")
    now[0] = 12.0
    clock.training(plans[0], 12)
    assert clock.stop(plans[0], trained=True) == 12.0
    clock.finished(plans[0], "audited")
    # bp takes 1 s a step, dfa half of that: 24 + 12 s, two at a time; 24 steps in 12 s.
    assert (seen[-1].rate, seen[-1].seconds_left) == (2.0, 18.0)
    now[0] = 100.0  # audits and pauses are no training
    clock.start(plans[1])
    clock.training(plans[1], 0)
    assert seen[-1].rate == 2.0
    # The last run is not shared out.
    for plan in (plans[1], plans[2], plans[4]):
        del clock.left[plan.name]
    clock.training(plans[1], 0)
    assert seen[-1].seconds_left == 6.0


@pytest.mark.parametrize("jobs", [0, -1])
def test_jobs_below_one_are_refused(images, tmp_path, jobs):
    with pytest.raises(ValueError, match=rf"run_study: expected jobs from 1 upwards, got {jobs}"):
        run_study(SMALL, images, tmp_path / "out", jobs=jobs)
    assert not (tmp_path / "out").exists()


def test_another_configuration_is_refused_before_anything_is_trained(study, images):
    _, out = study
    before = stamps(out)
    with pytest.raises(
        ValueError, match=r"mlp/bp/seed_42: holds a run.*batch_size: expected 32, got 16"
    ):
        run_study(replace(SMALL, batch_size=32), images, out)
    other = teacher_dataset(input_dim=9, train_count=200, test_count=100)
    with pytest.raises(ValueError, match="data: expected"):
        run_study(replace(SMALL, models=SMALL.models[:1]), other, out)
    assert stamps(out) == before


def test_a_run_of_an_earlier_version_of_its_rule_is_refused(images, tmp_path, monkeypatch):
    suite = replace(SMALL, models=SMALL.models[:1], rules=("bp", "frozen"), seeds=(42,))
    run_study(suite, images, tmp_path)
    monkeypatch.setattr(RULES["bp"], "version", 2)
    with pytest.raises(ValueError, match=r"mlp/bp/seed_42: .*\(rule_version: expected 2, got None"):
        run_study(suite, images, tmp_path)
    monkeypatch.undo()
    assert run_study(suite, images, tmp_path).trained == 0


def test_a_failing_rule_is_explained_and_the_others_go_on(images, tmp_path):
    rules = ("test_study:Refusing", "bp", "no_such_module:Rule", "frozen")
    suite = replace(SMALL, models=SMALL.models[:1], rules=rules, seeds=(42,))
    result = run_study(suite, images, tmp_path)
    reasons = {run.rule: run.reason for run in result.runs}
    assert reasons["test_study:Refusing"] == "RuntimeError: no credit today"
    assert "No module named 'no_such_module'" in reasons["no_such_module:Rule"]
    assert reasons["bp"] == reasons["frozen"] == ""
    assert result.trained == 2
    names = [path.name for path in write_tables(result, tmp_path)]
    assert names[-3:] == ["runs.csv", "steps.csv", "report.md"]
    report = (tmp_path / "report.md").read_text()
    assert "failed: RuntimeError: no credit today" in report
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert [row["status"] for row in rows] == ["failed", "audited", "failed", "audited"]
    assert run_study(suite, images, tmp_path).trained == 0  # tried again, in vain


def test_a_rule_of_ones_own_is_audited_with_its_credit(images, tmp_path):
    suite = replace(
        SMALL, models=SMALL.models[:1], rules=("test_study:Silent",), seeds=(42,), steps=2
    )
    (run,) = run_study(suite, images, tmp_path).runs
    assert run.last.deep_gamma == 0.0
    assert (tmp_path / "mlp/test_study-Silent/seed_42/step_2.pt").is_file()


class Silent(Rule):
    """Give zeros as credit: its Γ is 0 by definition."""

    name = "silent"

    def block_credit(self, states):
        return [torch.zeros_like(h) for h in states.hiddens[1:]]


def test_penalties_have_runs_of_their_own_but_for_frozen_blocks(images, tmp_path):
    suite = replace(SMALL, models=SMALL.models[:1], seeds=(42,), penalties=(0.0, 0.1))
    result = run_study(suite, images, tmp_path)
    assert [run.label for run in result.runs] == ["bp", "bp λ=0.1", "frozen", "dfa", "dfa λ=0.1"]
    plain, penalised = result.runs[3:]
    assert plain.last.hidden_norm != penalised.last.hidden_norm
    assert penalised.last.figures.frozen_baseline_acc == result.runs[2].last.accuracy
    saved = load_checkpoint(tmp_path / "mlp/dfa+penalty_0.1/seed_42/step_12.pt")
    assert saved.extra["config"]["penalty"] == 0.1


# ---- decisions, on rows made by hand


def step(
    number=100,
    *,
    accuracy=0.8,
    frozen=0.6,
    norms=(1.0, 2.0, 4.0),
    grad=1e-4,
    gain=0.5,
    stability=0.0,
    gammas=None,
) -> AuditedStep:
    figures = Figures(
        layers=("h0", "h1", "h2"),
        residual_norms=norms,
        bp_grad_norms=(1e-4, 1e-4, grad),
        credit_gains=(0.5, 0.5, gain),
        output_grad_norm=1e-3,
        batch_size=128,
        stabilities=(stability,) * 3,
        num_directions=(10,) * 3,
        num_batches=10,
        headline_acc=accuracy,
        frozen_baseline_acc=frozen,
        sizes=(4, 4, 4),
        test_size=10_000,
        frozen_test_size=10_000,
    )
    layers = tuple(LayerCredit(f"h{l}", gamma) for l, gamma in enumerate(gammas or ()))
    return AuditedStep(number, figures, CreditReport(layers) if gammas else None)


def run(rule, seed, *steps, reason="") -> RunRecord:
    return RunRecord("mlp", "resmlp", rule, 0.0, seed, reason, steps)


HAND_MADE = [
    run("bp", 1, step(gammas=(1.0, 1.0))),
    run("bp", 2, step(stability=0.5, gammas=(1.0, 1.0))),  # (c) alone, as early in training
    run("frozen", 1, step(accuracy=0.6, frozen=None)),
    # An exploded stream: (a), (b), (d); the first layer keeps the mean Γ above 0.
    run(
        "dfa", 1, step(accuracy=0.5, norms=(1, 1e3, 1e8), grad=1e-9, gain=1e-8, gammas=(0.4, -0.1))
    ),
    run(
        "dfa", 2, step(accuracy=0.5, norms=(1, 1e3, 1e8), grad=1e-9, gain=1e-8, gammas=(0.1, -0.2))
    ),
    run("dfa", 3, reason="RuntimeError: lost"),
    # A solved task: the gradient is at the floor, the gain is not.
    run("ep", 1, step(grad=1e-9, gammas=(0.2, 0.2))),
    # At chance: 0.105 of 10,000 images is 0.099 to 0.111.
    run("fa", 1, step(accuracy=0.105, frozen=0.0)),
]


def test_the_decision_table_says_what_each_strategy_walks_back():
    table = {row.strategy: row for row in decision_table(HAND_MADE, num_classes=10)}
    expected = {
        #                    bp      frozen  dfa     ep      fa
        "accuracy only": ((0, 2), (0, 1), (0, 2), (0, 1), (1, 1)),
        "accuracy + Γ": ((0, 2), (0, 1), (1, 2), (0, 1), (1, 1)),
        "(a) alone": ((0, 2), (0, 1), (2, 2), (0, 1), (0, 1)),
        "(b) alone": ((0, 2), (0, 1), (2, 2), (1, 1), (0, 1)),
        "(c) alone": ((1, 2), (0, 1), (0, 2), (0, 1), (0, 1)),
        "(d) alone": ((0, 2), (0, 0), (2, 2), (0, 1), (0, 1)),
        "full, paper": ((1, 2), (0, 1), (2, 2), (1, 1), (0, 1)),
        "full, calibrated": ((0, 2), (0, 1), (2, 2), (0, 1), (0, 1)),
        "without (d), paper": ((1, 2), (0, 1), (2, 2), (1, 1), (0, 1)),
        "without (d), calibrated": ((0, 2), (0, 1), (2, 2), (0, 1), (0, 1)),
    }
    assert list(table) == list(expected)
    for strategy, counts in expected.items():
        assert tuple(table[strategy].walked.values()) == counts, strategy
        assert list(table[strategy].walked) == ["bp", "frozen", "dfa", "ep", "fa"]
    # More than half: one of two is not enough.
    assert table["accuracy + Γ"].rules == ["fa"]
    assert table["full, paper"].rules == ["dfa", "ep"]
    assert table["full, calibrated"].rules == ["dfa"]
    assert table["(d) alone"].judged == ["bp", "dfa", "ep", "fa"]


def test_an_interval_that_decides_nothing_is_not_judged():
    """2.5 points over frozen blocks, of 10,000 images each: 2 lies within the interval."""
    undecided = run("bp", 1, step(accuracy=0.625, frozen=0.6))
    table = {row.strategy: row.walked["bp"] for row in decision_table([undecided], 10)}
    assert table["full, calibrated"] == (0, 0)
    assert table["full, paper"] == table["without (d), calibrated"] == (0, 1)


def test_the_first_firing_of_each_diagnostic():
    made = run(
        "dfa",
        1,
        step(10, stability=0.9),
        step(20, grad=1e-9),
        step(30, norms=(1, 100, 200), grad=1e-9),
        step(40, norms=(1, 100, 200), stability=0.9),
    )
    assert first_fired(made) == {"a": 30, "b": 20, "c": 10, "d": None}
    # The gain stays at 0.5, and (c) does not fire by itself.
    calibrated = first_fired(made, "calibrated")
    assert (calibrated["a"], calibrated["b"], calibrated["d"]) == (30, None, None)


def test_how_far_a_threshold_may_move():
    nan = run("ep", 3, step(norms=(1.0, math.nan, math.nan)))  # fires (a), bounds nothing
    gaps = {gap.key: gap for gap in threshold_gaps([*HAND_MADE, nan])}
    assert (gaps["a"].low, gaps["a"].limit, gaps["a"].high) == (2.0, 50.0, 1e5)
    assert (gaps["a"].fired, gaps["a"].judged) == (3, 8)
    assert (gaps["b"].low, gaps["b"].limit, gaps["b"].high) == (1e-9, 1e-7, 1e-4)
    assert (gaps["c"].low, gaps["c"].high) == (0.0, 0.5)
    # Points over frozen blocks: -10 for DFA, 10.5 at chance with nothing beside it, else 20.
    assert gaps["d"].low == pytest.approx(-10)
    assert gaps["d"].high == pytest.approx(10.5)
    (alone,) = [gap for gap in threshold_gaps(HAND_MADE[:1]) if gap.key == "a"]
    assert (alone.low, alone.high) == (2.0, math.inf)


def test_means_over_seeds():
    assert spread([0.2, 0.4]) == "0.300 ± 0.100"
    assert spread([0.25]) == "0.250"
    assert spread([None]) == spread([]) == "N/A"
    assert geometric([1.0, 100.0]) == "10"
    assert geometric([1.0, math.inf]) == "inf"
    assert geometric([1.0, 0.0]) == "0"


# ---- suites


def test_random_targets_teach_nothing(images, tmp_path):
    suite = Suite(
        name="targets",
        models=(
            StudyModel("taught", "resmlp", {"d_hidden": 16, "num_blocks": 2}),
            StudyModel(
                "untaught", "resmlp", {"d_hidden": 16, "num_blocks": 2}, random_targets=True
            ),
        ),
        rules=("bp", "dfa"),
        seeds=(1, 2),
        steps=60,
        checkpoints=1,
        batch_size=16,
        eval_batches=8,
        eval_batch_size=8,
        learning_rate=1e-2,
    )
    result = run_study(suite, images, tmp_path)
    assert result.failed == []
    for run in result.runs:
        assert run.variant == ("resmlp" if run.model == "taught" else "resmlp on random targets")
        # Of 96 test images of four classes; chance's standard deviation is 4%.
        if run.model == "taught":
            assert run.last.accuracy > 0.6
        else:
            assert run.last.accuracy < 0.25 + 4 * 0.044
    record = json.loads((tmp_path / "untaught/bp/seed_1/run.json").read_text())
    assert record["config"]["random_targets"] is True
    # Studies that were made before there were random targets go on.
    assert (
        "random_targets"
        not in json.loads((tmp_path / "taught/bp/seed_1/run.json").read_text())["config"]
    )


def test_random_targets_are_drawn_from_a_seed(images):
    one, again, other = (images.with_random_targets(seed) for seed in (1, 1, 2))
    assert torch.equal(one.train_labels, again.train_labels)
    assert not torch.equal(one.train_labels, other.train_labels)
    assert torch.equal(one.test_labels, images.test_labels)
    counts = torch.bincount(one.train_labels, minlength=4)
    # 128 draws of four: 32 each, with a standard deviation of 4.9.
    assert (counts - 32).abs().max() < 5 * 4.9
    # Of the old labels a fourth are hit.
    assert abs(int((one.train_labels == images.train_labels).sum()) - 32) < 5 * 4.9


def test_log_spaced_steps():
    assert log_spaced(1000, 3) == (10, 100, 1000)
    assert log_spaced(11, 8) == (10, 11)
    assert log_spaced(4, 8) == log_spaced(4, 1) == (4,)
    assert len(log_spaced(46_800, 16)) == 16


def test_the_paper_suite_has_the_published_sizes():
    paper = SUITES["paper"]
    assert [model.label for model in paper.models] == ["resmlp", "smallcnn", "vit-mini"]
    assert paper.models[0].options == {"d_hidden": 256, "num_blocks": 4}
    assert paper.seeds == (42, 123, 456)
    assert paper.steps_of(paper.models[0], 50_000) == 100 * 390
    assert SUITES["penalty"].steps_of(paper.models[0], 50_000) == 30 * 390
    assert [model.variant for model in SUITES["terminal-norm"].models] == [
        "resmlp",
        "resmlp without out_ln",
    ]


def test_the_teacher_suite_needs_no_data_of_its_own(tmp_path):
    suite = SUITES["teacher"]
    data = load_dataset(suite.data)
    assert suite.steps_of(suite.models[0], len(data.train_labels)) == 30 * 78
    short = replace(suite, rules=("bp", "dfa"), seeds=(42,), steps=2, epochs=None)
    result = run_study(short, data, tmp_path)
    assert [(run.variant, run.rule, run.reason) for run in result.runs] == [
        ("student", "bp", ""),
        ("student", "dfa", ""),
    ]


needs_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="needs Python 3.11")

TOML = """
data = "teacher"
rules = ["bp", "frozen", "dfa"]
seeds = [42]
steps = 2
batch_size = 16
eval_batch_size = 16
checkpoints = 1

[models.net]
model = "student"
options = { d_hidden = 8, num_blocks = 2 }

[rule_options.dfa]
train_embed = true
"""


@needs_toml
def test_a_suite_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(TOML)
    suite = load_suite(str(path))
    assert suite == Suite(
        name="mine",
        models=(StudyModel("net", "student", {"d_hidden": 8, "num_blocks": 2}),),
        rules=("bp", "frozen", "dfa"),
        seeds=(42,),
        data="teacher",
        steps=2,
        batch_size=16,
        eval_batch_size=16,
        checkpoints=1,
        rule_options={"dfa": {"train_embed": True}},
    )


@needs_toml
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("steps = 2", "step = 2", "suite: expected keys among .*, got step"),
        ("steps = 2", "", "suite: expected steps or epochs for net, got neither"),
        ("steps = 2", "steps = 2\nepochs = 1", "steps or epochs, got both: 2 and 1"),
        ("steps = 2", "steps = 0", "suite: steps: expected a whole number of at least 1, got 0"),
        ('"dfa"]', '"dpa"]', "suite: rules: .*expected one of bp, .*got 'dpa'"),
        ("seeds = [42]", "seeds = 42", "suite: seeds: expected a list, got 42"),
        ("seeds = [42]", "seeds = [42, 42]", r"suite: seeds: expected each once, got \[42, 42\]"),
        ("seeds = [42]", "seeds = [-1]", "suite: seeds: expected non-negative integers, got -1"),
        ('"student"', '"resnet"', "suite: models.net.model: expected one of .*got 'resnet'"),
        ("options = ", "option = ", "suite: models.net: expected keys among .*, got option"),
        ("[models.net]", '[models."a/b"]', "expected a label of letters.*got 'a/b'"),
        ("rule_options.dfa", "rule_options.ep", "suite: rule_options: expected rules .*got ep"),
        ("steps = 2", "penalties = [-1.0]", "suite: penalties: .*got -1.0"),
        ("steps = 2", "steps = ", "mine.toml: expected TOML, got"),
    ],
)
def test_errors_in_a_suite_say_where(tmp_path, before, after, message):
    path = tmp_path / "mine.toml"
    assert before in TOML
    path.write_text(TOML.replace(before, after))
    with pytest.raises(ValueError, match=message) as caught:
        load_suite(str(path))
    assert str(path) in str(caught.value)


@needs_toml
def test_a_suite_that_is_not_there(tmp_path):
    with pytest.raises(
        ValueError, match=r"--suite: expected quick, paper, .* or a file.*got 'fast'"
    ):
        load_suite("fast")
    with pytest.raises(FileNotFoundError, match=r"expected a file .*none\.toml, got none"):
        load_suite(str(tmp_path / "none.toml"))


# ---- the command


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["study", "--device", "cpu", *map(str, arguments)])


@needs_toml
def test_the_command_prints_tables_and_writes_them(tmp_path):
    (tmp_path / "mine.toml").write_text(TOML)
    out = tmp_path / "out"
    result = invoke("--suite", tmp_path / "mine.toml", "--out", out, "--seeds", "42 7")
    assert result.exit_code == 0, result.output
    assert "6 of 6 runs: net/dfa/seed_7 audited" in result.output
    assert "net: runs that a strategy walks back" in result.output
    assert "accuracy + Γ" in result.output
    report = (out / "report.md").read_text()
    assert (
        f"trained with fadiag_fast {fadiag_fast.__version__}, torch {torch.__version__}" in report
    )
    for heading in ("# Study `mine` on teacher", "## Decisions", "## First firings", "## Runs"):
        assert heading in report
    rows = list(csv.DictReader((out / "runs.csv").open()))
    assert [(row["rule"], row["seed"]) for row in rows] == [
        (rule, seed) for rule in ("bp", "frozen", "dfa") for seed in ("42", "7")
    ]
    assert float(rows[0]["deep_gamma"]) == pytest.approx(1.0, abs=1e-6)
    assert rows[2]["deep_gamma"] == "" == rows[2]["frozen_accuracy"]
    steps = list(csv.DictReader((out / "steps.csv").open()))
    assert len(steps) == 6
    assert {row["a_paper"] for row in steps} <= {"passed", "fired"}


@needs_toml
def test_the_command_gives_json_lines(tmp_path):
    (tmp_path / "mine.toml").write_text(TOML)
    result = invoke(
        *("--suite", tmp_path / "mine.toml", "--out", tmp_path / "out", "--rules", "bp,frozen"),
        *("--penalties", "0,0.1", "--json"),
    )
    assert result.exit_code == 0, result.output
    *progress, last = [json.loads(line) for line in result.output.splitlines()]
    assert progress[-1]["done"] == progress[-1]["total"] == 3
    assert progress[-1]["seconds_left"] == 0
    assert [(row["rule"], row["penalty"]) for row in last["runs"]] == [
        ("bp", 0.0),
        ("bp", 0.1),
        ("frozen", 0.0),
    ]
    assert last["decisions"][0]["walked"].keys() == {"bp", "bp λ=0.1", "frozen"}


@needs_toml
def test_a_failed_run_shows_in_the_exit_code(tmp_path):
    (tmp_path / "mine.toml").write_text(TOML)
    where = ("--suite", tmp_path / "mine.toml", "--out", tmp_path / "out")
    result = invoke(*where, "--rules", "bp,no_such_module:Rule")
    assert result.exit_code == 3
    assert "fadiag: net/no_such_module:Rule/seed_42: ValueError" in result.output
    assert "net/bp/seed_42 audited" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "paper"), "--data: the suite 'paper' needs images"),
        (("--models", "vgg"), "--models: expected some of resmlp, .*got 'vgg'"),
        (("--seeds", "x"), "--seeds: expected whole numbers, got 'x'"),
        (("--steps", "1", "--epochs", "1"), "--steps or --epochs, got both"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(tmp_path, arguments, message):
    result = invoke("--out", tmp_path / "out", *arguments)
    assert result.exit_code == 3
    assert re.search(message, result.output)
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_there_are_tables_but_no_curves(study, tmp_path, monkeypatch):
    from fadiag_fast._common.extras import MissingExtra
    from fadiag_fast.study import plots

    result, _ = study

    def missing(*arguments, **options):
        raise MissingExtra("matplotlib is not installed")

    monkeypatch.setattr(plots, "require", missing)
    names = {path.name for path in write_tables(result, tmp_path)}
    assert names == {"runs.csv", "steps.csv", "report.md"}


def test_curves_are_drawn_for_every_model(study, tmp_path):
    pytest.importorskip("matplotlib")
    result, _ = study
    names = {path.name for path in write_tables(result, tmp_path)}
    assert {"curves-mlp.png", "curves-vit.png"} <= names
    assert "![curves-vit.png](curves-vit.png)" in (tmp_path / "report.md").read_text()


def test_published_figures_stand_beside_those_of_the_same_network_and_rule(study):
    result, _ = study
    rows = {(row[0], row[1]): row for row in mean_table(result, beside=True)}
    assert rows["mlp", "dfa"][-6:-3] == [".306 ± .008", "4e8", "≥ 694"]
    assert rows["vit", "bp"][-6:] == ["–"] * 6
