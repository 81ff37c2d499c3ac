"""A scan end to end: figures against ``diagnose``, stacks, faults, resume, kills."""

import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from networks import Branching, Stateful
from torch import nn

from fadiag_fast import DiagnosticThresholds, diagnose
from fadiag_fast.capture import Probe
from fadiag_fast.scanning import Entry, ScanCounts, ScanResult, ScanWriter, scan

pytest.importorskip("pyarrow")

from fadiag_fast.scanning import driver, pipeline
from fadiag_fast.scanning.batching import BatchingPlan
from fadiag_fast.scanning.errors import UnwritableResults
from fadiag_fast.scanning.folder import Disk
from fadiag_fast.scanning.prefetch import Reader

pytestmark = pytest.mark.usefixtures("one_thread")


def batches_of(count=9, batch=6, dtype=torch.float32):
    torch.manual_seed(1)
    return [
        (torch.randn(batch, 5, dtype=dtype), torch.randint(0, 4, (batch,))) for _ in range(count)
    ]


def study(folder, steps, build=Branching, runs=("a", "b")):
    """Write checkpoints of two runs; return path → model."""
    models = {}
    for run in runs:
        (folder / run).mkdir(parents=True, exist_ok=True)
        for step in steps:
            torch.manual_seed(1000 * ord(run) + step)
            model = build()
            path = folder / run / f"step_{step}.pt"
            torch.save({"model_state": model.state_dict(), "step": step}, path)
            models[str(path)] = model
    return models


def figures_by_path(result):
    return {
        row["path"]: (row, figures)
        for row, figures in zip(result.rows, result.figures(), strict=True)
    }


def assert_like_diagnose(result, models, batches, rtol):
    found = figures_by_path(result)
    assert set(found) == set(models)
    for path, model in models.items():
        row, figures = found[path]
        report = diagnose(model, batches)
        assert row["verdict"] == report.verdict
        expected = report.figures
        for name in ("residual_norms", "bp_grad_norms", "credit_gains", "stabilities"):
            torch.testing.assert_close(
                torch.tensor(getattr(figures, name), dtype=torch.float64),
                torch.tensor(getattr(expected, name), dtype=torch.float64),
                rtol=rtol,
                atol=rtol,
                msg=f"{path}: {name}",
            )
        assert tuple(figures.layers) == tuple(expected.layers)
        assert row["measured_accuracy"] == pytest.approx(
            report.provenance["accuracy_on_batches"], abs=1e-6
        )


@pytest.mark.parametrize("stack", [1, 3, "auto"])
@pytest.mark.parametrize("build", [Branching, lambda: Branching(norm=False)], ids=["norm", "plain"])
def test_figures_are_those_of_diagnose_at_any_stack_size(stack, build, tmp_path):
    models = study(tmp_path / "runs", range(4), build)
    batches = batches_of()
    result = scan(str(tmp_path / "runs/**/*.pt"), build(), batches, tmp_path / "out", stack=stack)
    # float32 in another order of operations: about a hundred roundings of 6e-8.
    assert_like_diagnose(result, models, batches, 2e-5)
    assert result.runs().keys() == {"a", "b"}
    assert [row["step"] for row in result.runs()["a"]] == [0, 1, 2, 3]


def test_float64_agrees_to_rounding(tmp_path):
    models = study(tmp_path / "runs", range(2), lambda: Branching().double())
    batches = batches_of(dtype=torch.float64)
    result = scan(
        str(tmp_path / "runs/*/*.pt"), Branching().double(), batches, tmp_path / "out", stack=4
    )
    assert_like_diagnose(result, models, batches, 1e-11)


def test_a_model_that_cannot_be_stacked_takes_turns(tmp_path):
    """Its forward counts calls in a buffer, which torch.vmap refuses."""
    models = study(tmp_path / "runs", range(2), Stateful)
    batches = batches_of()
    result = scan(str(tmp_path / "runs/*/*.pt"), Stateful(), batches, tmp_path / "out", stack=4)
    for path in models:
        models[path].eval()
    assert_like_diagnose(result, models, batches, 2e-5)


def test_the_model_and_its_weights_are_left_alone(tmp_path):
    study(tmp_path / "runs", range(2))
    model = Branching().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scan(str(tmp_path / "runs/*/*.pt"), model, batches_of(), tmp_path / "out")
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(module.training for module in model.modules())


def faulty(folder):
    """Write one checkpoint of every bad kind; return path → kind."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {}

    def add(name, kind):
        kinds[str(folder / name)] = kind
        return folder / name

    add("missing.pt", "missing")
    whole = add("truncated.pt", "unreadable")
    torch.save(Branching().state_dict(), whole)
    whole.write_bytes(whole.read_bytes()[:-400])
    torch.save(Branching(width=7).state_dict(), add("wrong.pt", "wrong model"))
    state = Branching().state_dict()
    state["embed.weight"][0, 0] = float("nan")
    torch.save(state, add("nan.pt", "non-finite weights"))
    torch.save({"model_state": state | {"x": torch.nn.ReLU}}, add("unsafe.pt", "unsafe"))
    torch.save({"loss": 1.0}, add("empty.pt", "no weights"))
    add("text.pt", "unreadable").write_text("not a checkpoint")
    add("nul\0.pt", "unreadable")
    return kinds


@pytest.mark.parametrize("stack", [1, 4])
def test_every_fault_is_explained_and_stops_nothing(stack, tmp_path):
    models = study(tmp_path / "runs", range(3))
    bad = faulty(tmp_path / "bad")
    paths = [p for pair in zip(models, [*bad, *bad], strict=False) for p in pair] + list(bad)
    batches = batches_of()
    result = scan(paths, Branching(), batches, tmp_path / "out", stack=stack)
    rows = {row["path"]: row for row in result.rows}
    for path, kind in bad.items():
        assert rows[path]["error_kind"] == kind, rows[path]["error"]
        assert rows[path]["error"]
    found = figures_by_path(ScanResult.load(tmp_path / "out"))
    for path, model in models.items():
        assert found[path][0]["verdict"] == diagnose(model, batches).verdict
    assert len(rows) == len(models) + len(bad)


def test_one_bad_file_does_not_hurt_those_read_by_the_same_task(tmp_path):
    """One reader takes four files at a time; figures and errors stay with their paths."""
    models = study(tmp_path / "runs", range(5))
    bad = faulty(tmp_path / "bad")
    paths = list(models)
    for place, path in enumerate(bad):
        paths.insert(2 * place + 1, path)
    batches = batches_of()
    entries = [Entry(path, "a", step) for step, path in enumerate(paths)]
    result = scan(entries, Branching(), batches, tmp_path / "out", stack=16, workers=1)
    rows = {row["path"]: row for row in result.rows}
    assert {path: rows[path]["error_kind"] for path in bad} == bad
    assert [row["path"] for row in sorted(result.rows, key=lambda row: row["record"])] == paths
    found = figures_by_path(result)
    for path, model in models.items():
        norms = torch.tensor(found[path][1].residual_norms)
        torch.testing.assert_close(
            norms, torch.tensor(diagnose(model, batches).figures.residual_norms), rtol=2e-5, atol=0
        )


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 64])
@pytest.mark.parametrize("workers", [1, 3, 16])
def test_a_group_has_what_became_of_each_file_in_order(count, workers, tmp_path):
    path = tmp_path / "a.pt"
    torch.save(Branching().state_dict(), path)
    entries = [Entry(str(path if i % 3 else tmp_path / f"{i}.pt"), "a", i) for i in range(count)]
    with ScanWriter(tmp_path / "out") as writer:
        reader = Reader(Branching(), torch.device("cpu"), writer, "c", False, workers)
        try:
            group = reader.begin(entries)
            reads = list(group.reads())
            tasks = len(group.pieces)
        finally:
            reader.close()
    assert [read.entry for read in reads] == entries
    assert [read.error_kind for read in reads] == [
        None if i % 3 else "missing" for i in range(count)
    ]
    assert min(count, workers) <= tasks


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    study(tmp_path / "runs", range(2))
    path = tmp_path / "runs/a/step_0.pt"
    path.chmod(0)
    result = scan(str(tmp_path / "runs/*/*.pt"), Branching(), batches_of(), tmp_path / "out")
    assert result.failures().keys() == {"permission"}


def test_a_second_scan_takes_over_what_is_done(tmp_path, monkeypatch):
    study(tmp_path / "runs", range(3))
    glob, out, batches = str(tmp_path / "runs/*/*.pt"), tmp_path / "out", batches_of()
    first = scan(glob, Branching(), batches, out)
    captured = []
    original = Probe.capture

    def counting(self, *args, **kwargs):
        captured.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Probe, "capture", counting)
    again = scan(glob, Branching(), batches, out)
    assert captured == []
    assert again.to_arrow().equals(first.to_arrow())
    # A file that changed is audited again; one that was renamed is not.
    torch.manual_seed(99)
    torch.save(Branching().state_dict(), tmp_path / "runs/a/step_0.pt")
    (tmp_path / "runs/b/step_1.pt").rename(tmp_path / "runs/b/step_7.pt")
    third = scan(glob, Branching(), batches, out, stack=1)
    assert len(captured) == len(batches)
    rows = {row["path"]: row for row in third.rows}
    assert rows[str(tmp_path / "runs/b/step_7.pt")]["status"] == "audited"
    # Another configuration audits all of them.
    scan(glob, Branching(), batches[:8], out, stack=1)
    assert len(captured) == len(batches) + 6 * 8


@pytest.mark.parametrize(
    ("where", "glob"), [(".", "runs/a/*.pt"), ("runs", "a/*.pt"), ("runs/a", "*.pt")]
)
def test_a_glob_in_one_folder_is_a_run_with_steps(where, glob, tmp_path, monkeypatch):
    study(tmp_path / "runs", range(2), runs=("a",))
    monkeypatch.chdir(tmp_path / where)
    result = scan(glob, Branching(), batches_of(2), tmp_path / "out")
    assert [(row["run"], row["step"]) for row in result.rows] == [("a", 0), ("a", 1)]


def test_a_name_with_brackets_is_that_file_and_no_pattern(tmp_path):
    for run in ("run [1]", "run 1"):
        study(tmp_path / run, [len(run)], runs=("a",))
    path = str(tmp_path / "run [1]/a/step_7.pt")
    (tmp_path / "run 1/a/step_5.pt").rename(tmp_path / "run 1/a/step_7.pt")
    result = scan([path], Branching(), batches_of(2), tmp_path / "out")
    assert [row["path"] for row in result.rows] == [path]


def test_a_run_that_ends_in_no_numbers_does_not_end_trustworthy(tmp_path):
    study(tmp_path / "runs", range(3), runs=("a",))
    model = Branching()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("nan")
    torch.save(model.state_dict(), tmp_path / "runs/a/step_9.pt")
    result = scan(str(tmp_path / "runs/*/*.pt"), Branching(), batches_of(2), tmp_path / "out")
    (line,) = [line for line in str(result).splitlines() if line.startswith("a ")]
    assert "non-finite weights" in line
    assert "trustworthy" not in line


class Scaled(Branching):
    def __init__(self, scale=1.0, squash=torch.tanh):
        super().__init__()
        self.scale, self.squash = scale, squash

    def forward(self, x):
        return super().forward(self.squash(self.scale * x))


@pytest.mark.parametrize("setting", [{"scale": 3.0}, {"squash": torch.sin}])
def test_another_setting_of_the_network_is_another_configuration(setting, tmp_path):
    """No weight tells of it, and every figure depends on it."""
    study(tmp_path / "runs", range(2), runs=("a",), build=Scaled)
    glob, batches, out = str(tmp_path / "runs/*/*.pt"), batches_of(2), tmp_path / "out"
    first = scan(glob, Scaled(), batches, tmp_path / "out1")
    scan(glob, Scaled(), batches, out)
    again = scan(glob, Scaled(), batches, out)
    assert again.configurations() == first.configurations()
    other = scan(glob, Scaled(**setting), batches, tmp_path / "out2")
    assert other.configurations().keys() != first.configurations().keys()
    assert len(scan(glob, Scaled(**setting), batches, out)) == len(first)
    norms = [
        [figures.residual_norms for figures in result.figures()]
        for result in (first, other, ScanResult.load(out))
    ]
    assert norms[2] == norms[1] != norms[0]


def test_a_scan_by_other_limits_says_that_it_judges_all_rows_anew(tmp_path):
    study(tmp_path / "runs", range(3))
    batches, out = batches_of(8), tmp_path / "out"
    first = scan(str(tmp_path / "runs/*/*.pt"), Branching(), batches, out)
    assert first.counts.rejudged == 0
    strict = DiagnosticThresholds(scale_growth=0.5)
    second = scan(str(tmp_path / "runs/a/step_0.pt"), Branching(), batches, out, thresholds=strict)
    assert second.counts.rejudged == 6
    assert "6 stored rows, judged otherwise before, are judged by this scan's" in str(second)
    assert {row["a_threshold"] for row in second.rows} == {0.5}
    third = scan(str(tmp_path / "runs/*/*.pt"), Branching(), batches, out, thresholds=strict)
    assert third.counts.rejudged == 0


def test_a_dot_in_front_of_a_path_makes_no_other_row(tmp_path, monkeypatch):
    study(tmp_path / "runs", range(2), runs=("a",))
    monkeypatch.chdir(tmp_path)
    batches = batches_of(2)
    scan(["./runs/a/step_0.pt", "runs//a/step_9.pt"], Branching(), batches, "out")
    scan("./runs/*/*.pt", Branching(), batches, "out")
    result = scan("runs/*/*.pt", Branching(), batches, "out")
    found = {row["path"]: (row["run"], row["step"]) for row in result.rows}
    assert found == {
        "runs/a/step_0.pt": ("a", 0),
        "runs/a/step_1.pt": ("a", 1),
        "runs/a/step_9.pt": ("a", 9),
    }


def test_a_run_whose_only_step_could_not_be_read_has_the_verdicts_of_the_others(tmp_path):
    folder = tmp_path / "runs/a"
    study(tmp_path / "runs", [7], runs=("a",))
    (folder / "step_7.pt").rename(folder / "last.pt")
    (folder / "step_5.pt").write_bytes(b"cut off")
    result = scan(str(folder / "*.pt"), Branching(), batches_of(8), tmp_path / "out")
    assert [row["status"] for row in result.rows] == ["failed", "audited"]
    verdict = result.verdicts()[str(folder / "last.pt")]
    (line,) = [line for line in str(result).splitlines() if line.startswith("a  ")]
    assert f"5-5    {verdict}" in line


def test_which_part_of_the_output_counts_is_part_of_the_configuration(tmp_path):
    """By its name, or as a function of the whole output."""

    def factor(by):
        return lambda result: by * result

    study(tmp_path / "runs", range(2), runs=("a",), build=Scaled)
    glob, batches, out = str(tmp_path / "runs/*/*.pt"), batches_of(2), tmp_path / "out"
    outputs = (None, factor(1.0), factor(1.0), factor(3.0))
    reused = [scan(glob, Scaled(), batches, out, output=o).counts.reused for o in outputs]
    assert reused == [0, 0, 2, 0]


def test_a_step_that_no_table_holds_is_no_step(tmp_path):
    study(tmp_path / "runs", [0], runs=("a",))
    name = tmp_path / f"runs/a/step_{'9' * 23}.pt"
    (tmp_path / "runs/a/step_0.pt").rename(name)
    (row,) = scan(str(tmp_path / "runs/*/*.pt"), Branching(), batches_of(2), tmp_path / "out").rows
    assert (row["status"], row["step"]) == ("audited", None)


def test_other_thresholds_judge_again_without_measuring(tmp_path):
    study(tmp_path / "runs", range(2))
    glob, out, batches = str(tmp_path / "runs/*/*.pt"), tmp_path / "out", batches_of()
    scan(glob, Branching(), batches, out)
    strict = DiagnosticThresholds(scale_growth=0.01)
    result = scan(glob, Branching(), batches, out, thresholds=strict)
    assert all("(a)" in verdict for verdict in result.verdicts().values())


def test_an_error_for_want_of_memory_shrinks_the_stack(tmp_path, monkeypatch):
    from fadiag_fast.scanning.auditor import Auditor

    models = study(tmp_path / "runs", range(4))
    sizes = []
    original = Auditor.measure

    def scarce(self, rows, fit, way):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, rows, fit, way)

    monkeypatch.setattr(Auditor, "measure", scarce)
    batches = batches_of()
    result = scan(str(tmp_path / "runs/*/*.pt"), Branching(), batches, tmp_path / "out", stack=8)
    assert_like_diagnose(result, models, batches, 2e-5)
    assert sizes[:3] == [8, 4, 2]


class Costs:
    """An auditor's outside: what ways there are, and what each would take."""

    device = torch.device("cpu")

    def __init__(self, cost, ways=(), wrong=(), layouts=False):
        self.cost, self.ways, self.wrong, self.layouts = cost, list(ways), set(wrong), layouts
        self.measured = []

    def candidates(self):
        return self.ways

    def with_other_layout(self, way):
        return replace(way, channels_last=True) if self.layouts else None

    def alike(self, columns, others):
        return columns == others

    def forget_graphs(self):
        pass

    def measure(self, rows, fit, way):
        self.measured.append((len(rows), way))
        finite = [True] * len(rows)
        return SimpleNamespace(
            columns=way in self.wrong, result=lambda: SimpleNamespace(finite=finite)
        )


@pytest.fixture
def settled(monkeypatch):
    """Run a search whose measurements take what a function says; return the auditor and the way."""
    from fadiag_fast.scanning import autotuner

    def run(auditor, stack="auto", most=64, total=10_000):
        def seconds_of(call, device):
            pending = call()
            count, way = auditor.measured[-1]
            return pending, count * auditor.cost(way)

        monkeypatch.setattr(autotuner, "seconds_of", seconds_of)
        found = autotuner.Search(auditor, stack, most, total)
        for _ in range(20):
            found.measure(torch.zeros(found.way.stack, 1), None)
        return found.way

    return run


def test_the_search_grows_while_it_pays_and_turns_back(settled):
    assert settled(Costs(lambda way: 0.01 / way.stack)).stack == 64
    assert settled(Costs(lambda way: 0.01)).stack == 1
    assert settled(Costs(lambda way: 0.001 * (abs(way.stack - 8) + 1.0))).stack == 8
    assert settled(Costs(lambda way: 0.01 / way.stack), most=5).stack == 5
    assert settled(Costs(lambda way: 0.01 / way.stack), total=40).stack == 10
    # What takes long alone gains nothing from company on a CPU.
    assert settled(Costs(lambda way: 1 / way.stack)).stack == 1
    # What is twice as slow is not measured a second time.
    auditor = Costs(lambda way: 0.01 * way.stack)
    assert settled(auditor).stack == 1
    assert [count for count, _ in auditor.measured].count(8) == 1


def test_the_search_takes_the_quickest_way_whose_figures_are_right(settled):
    together, small = BatchingPlan(samples=1280), BatchingPlan(samples=32)
    seconds = {
        BatchingPlan(): 0.4,
        together: 0.1,
        small: 0.2,
        replace(small, channels_last=True): 0.15,
    }

    def cost(way):
        return seconds[way]

    auditor = Costs(cost, [small, together], layouts=True)
    assert settled(auditor, stack=1) == replace(small, channels_last=True)
    assert (1, together) not in auditor.measured  # smaller passes are quicker already
    assert settled(Costs(cost, [small, together], wrong=[small]), stack=1) == together
    assert (
        settled(Costs(cost, [small, together], wrong=[small, together]), stack=1) == BatchingPlan()
    )
    # Few checkpoints are not worth a trial.
    assert settled(Costs(cost, [together, small]), stack=1, total=8) == BatchingPlan()


@pytest.mark.parametrize("samples", [0, 3, 6, 18, 54])
@pytest.mark.parametrize("stack", [1, 3])
def test_passes_may_be_shared_without_changing_figures(samples, stack, tmp_path):
    from fadiag_fast.capture.reduction import SampleReduction
    from fadiag_fast.scanning.auditor import Auditor
    from fadiag_fast.scanning.weight_layout import Fitter

    models = [Branching().double() for _ in range(stack)]
    fitter = Fitter(models[0])
    rows = torch.zeros(stack, fitter.canonical.stop, dtype=torch.uint8)
    for row, model in zip(rows, models, strict=True):
        for name, view in fitter.canonical.views(row).items():
            view.copy_(model.state_dict()[name])
    batches = batches_of(dtype=torch.float64)
    options = {"select": None, "loss": None, "output": None, "batch_dim": 0}
    auditor = Auditor(models[0].eval(), batches, options, SampleReduction())
    found = auditor.measure(rows, fitter.canonical, BatchingPlan(stack, samples)).result()
    for index, (model, accuracy) in enumerate(zip(models, found.accuracies, strict=True)):
        figures, report = found.figures(index), diagnose(model, batches)
        for name in ("residual_norms", "bp_grad_norms", "credit_gains", "stabilities"):
            assert getattr(figures, name) == pytest.approx(getattr(report.figures, name), rel=1e-10)
        assert accuracy == pytest.approx(report.provenance["accuracy_on_batches"], abs=1e-6)


def test_files_that_all_differ_in_layout_are_told_apart_and_not_all_remembered():
    from fadiag_fast.checkpoints import SlabCheckpoint
    from fadiag_fast.scanning.weight_layout import Fitter

    model = Branching()
    fitter = Fitter(model)
    for i in [*range(200), *range(200)]:
        places = {
            name: place._replace(offset=place.offset + 64 * i)
            for name, place in fitter.canonical.places.items()
        }
        found = SlabCheckpoint("x", places, "", 64 * i, 64 * i + 9999, "", "", "", {})
        assert fitter.fit(found) is fitter.fit(found)
        assert fitter.fit(found).start == 64 * i
        assert fitter.fit(found).places == fitter.canonical.places
    assert len(fitter._fits) <= 64
    assert len(fitter._known) <= 64


def test_samples_that_see_each_other_do_not_share_passes(tmp_path):
    class Centred(Branching):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    models = study(tmp_path / "runs", range(12), Centred)
    batches = batches_of()
    result = scan(str(tmp_path / "runs/*/*.pt"), Centred(), batches, tmp_path / "out")
    assert_like_diagnose(result, models, batches, 2e-5)


LOSSES = """
from functools import partial
import torch
from torch import nn

def scaled(by, weights=None):
    return lambda logits, y: by * nn.functional.cross_entropy(logits, y, weight=weights)

def smoothed(logits, y, by, *, kind="mean"):
    return nn.functional.cross_entropy(logits, y, label_smoothing=by, reduction=kind)

class Scaled:
    def __init__(self, by):
        self.by = by
    def __call__(self, logits, y):
        return self.by * nn.functional.cross_entropy(logits, y)
    def loss(self, logits, y):
        return self(logits, y) if "a" in {"a", "b", "c", "d"} else None

class Twice(Scaled):
    def __call__(self, logits, y):
        return 2 * super().__call__(logits, y)

def unbound():
    def loss(logits, y):
        return later(logits, y)
    return loss
    later = None

losses = [
    scaled(1.0), scaled(2.0), scaled(1.0, torch.ones(3)), scaled(1.0, torch.tensor([1.0, 1, 2])),
    lambda a, b: a.sum(), lambda a, b: a.mean(),
    partial(smoothed, by=0.1), partial(smoothed, by=0.2), partial(smoothed, by=0.2, kind="sum"),
    nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1),
    nn.CrossEntropyLoss(weight=torch.ones(3)), nn.CrossEntropyLoss(weight=torch.zeros(3)),
    Scaled(1.0), Scaled(2.0), Twice(1.0), Scaled(1.0).loss, Scaled(2.0).loss, unbound(),
    nn.functional.mse_loss, torch.add,
]
"""


def test_losses_are_told_apart_by_what_they_do_and_alike_in_every_process():
    code = LOSSES + (
        "from fadiag_fast.scanning.configuration import described\n"
        "print(*map(described, losses), sep='\\n')"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for seed in "12"
    ]
    assert found[0] == found[1]
    assert len(set(found[0])) == len(found[0]) == 21


def test_one_row_that_fails_alone_does_not_fail_its_stack(tmp_path):
    class Fragile(Branching):
        def forward(self, x):
            if not torch._C._functorch.is_batchedtensor(self.embed.bias):
                assert float(self.embed.bias[0]) < 100, "a bad weight"
            return super().forward(x)

    study(tmp_path / "runs", range(2), Fragile)
    state = Fragile().state_dict()
    state["embed.bias"][0] = 1000.0
    torch.save(state, tmp_path / "runs/a/step_9.pt")

    result = scan(str(tmp_path / "runs/*/*.pt"), Fragile(), batches_of(), tmp_path / "out", stack=1)
    statuses = {row["path"].rsplit("/", 1)[1]: row["status"] for row in result.rows}
    assert statuses["step_9.pt"] == "failed"
    assert sum(status == "audited" for status in statuses.values()) == 2


def test_progress_counts_everything(tmp_path):
    study(tmp_path / "runs", range(3))
    bad = faulty(tmp_path / "bad")
    seen = []
    scan(
        [*(str(p) for p in (tmp_path / "runs").rglob("*.pt")), *bad],
        Branching(),
        batches_of(),
        tmp_path / "out",
        on_progress=seen.append,
    )
    last = seen[-1]
    assert (last.done, last.total, last.failed, last.reused) == (
        6 + len(bad),
        6 + len(bad),
        len(bad),
        0,
    )
    assert last.bytes > 0


@pytest.fixture
def far_ahead(monkeypatch):
    """Let a scan on the CPU take groups of two files and be four groups ahead, as on a GPU."""
    original = pipeline.Pipeline.run
    monkeypatch.setattr(
        pipeline.Pipeline, "run", lambda self, entries, fewest, ahead: original(self, entries, 2, 4)
    )


def test_groups_that_wait_to_be_written_down_stay_in_order(tmp_path, monkeypatch, far_ahead):
    models = study(tmp_path / "runs", range(12), runs=("a",))
    launched, released, told, waited = [], threading.Event(), [], []
    launch, finish = pipeline.Pipeline._launch, pipeline.Pipeline._finish

    def launching(self, group):
        launched.append(group)
        if len(launched) == 5:
            assert told == []  # with nothing written down, later groups were computed
            released.set()
        return launch(self, group)

    def finishing(self, group):
        waited.append(released.wait(60))
        return finish(self, group)

    def telling(progress):
        told.append((progress.done, threading.current_thread()))

    monkeypatch.setattr(pipeline.Pipeline, "_launch", launching)
    monkeypatch.setattr(pipeline.Pipeline, "_finish", finishing)
    glob, out = str(tmp_path / "runs/*/*.pt"), tmp_path / "out"
    result = scan(glob, Branching(), batches_of(), out, stack=1, on_progress=telling)
    assert waited == [True] * 6
    assert told == [(done, threading.main_thread()) for done in range(2, 13, 2)]
    assert [(row["record"], row["step"]) for row in result.rows] == [(i, i) for i in range(12)]
    assert_like_diagnose(result, models, batches_of(), 2e-5)


def test_what_the_disk_refuses_ends_the_scan_though_groups_wait(tmp_path, monkeypatch, far_ahead):
    study(tmp_path / "runs", range(12), runs=("a",))
    write, finish = Disk.write, pipeline.Pipeline._finish
    full, finished, told = threading.Event(), [], []

    def writing(self, path, data):
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, path, data)

    def finishing(self, group):
        finished.append(group)
        if len(finished) == 3:
            full.set()
        return finish(self, group)

    monkeypatch.setattr(Disk, "write", writing)
    monkeypatch.setattr(pipeline.Pipeline, "_finish", finishing)
    monkeypatch.setattr(driver, "ScanWriter", partial(ScanWriter, flush_rows=1))
    glob, out = str(tmp_path / "runs/*/*.pt"), tmp_path / "out"
    with pytest.raises(UnwritableResults, match="the disk is full"):
        scan(glob, Branching(), batches_of(), out, stack=1, on_progress=told.append)
    assert len(finished) == 3  # what waited behind it was not tried
    assert [progress.done for progress in told] == [2, 4]
    full.clear()
    assert [row["step"] for row in ScanResult.load(out).rows] == [0, 1, 2, 3]
    again = scan(glob, Branching(), batches_of(), out, stack=1)
    assert [row["step"] for row in again.rows] == list(range(12))


def test_checkpoints_behind_a_url_with_more_than_weights(tmp_path):
    """How large a file is turns out too late for the row: it is read beside it."""
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    models = study(tmp_path / "runs", range(3))
    urls = {}
    for path, model in models.items():
        url = f"memory://larger/{path.split('/runs/')[1]}"
        with memory.open(url, "wb") as file:
            moments = {"optimizer": torch.ones(50_000), "model": model.state_dict()}
            torch.save({**moments, "more": torch.ones(50_000)}, file)
        urls[url] = model
    try:
        result = scan(list(urls), Branching(), batches_of(), tmp_path / "out")
    finally:
        memory.rm("/larger", recursive=True)
    assert_like_diagnose(result, urls, batches_of(), 2e-5)


def test_checkpoints_behind_a_url(tmp_path):
    """fsspec's memory file system: what is no local file, with a glob and one that is missing."""
    fsspec = pytest.importorskip("fsspec")
    models = study(tmp_path / "runs", range(3))
    memory = fsspec.filesystem("memory")
    urls = {}
    for path, model in models.items():
        url = f"memory://study/{path.split('/runs/')[1]}"
        with memory.open(url, "wb") as file, open(path, "rb") as local:
            file.write(local.read())
        urls[url] = model
    batches = batches_of()
    try:
        glob = "memory://study/*/*.pt"
        result = scan([glob, "memory://study/a/none.pt"], Branching(), batches, tmp_path / "out")
        alone = scan(glob, Branching(), batches, tmp_path / "alone")
        local = scan(str(tmp_path / "runs/*/*.pt"), Branching(), batches, tmp_path / "local")
    finally:
        memory.rm("/study", recursive=True)
    assert result.failures().keys() == {"missing"}
    assert {row["verdict"] for row in alone.rows} <= {r["verdict"] for r in local.rows}
    assert [(r["run"], r["step"], r["content_hash"], r["bytes"]) for r in alone.rows] == [
        (r["run"], r["step"], r["content_hash"], r["bytes"]) for r in local.rows
    ]


def test_files_that_are_laid_out_otherwise_are_measured_beside_the_others(tmp_path):
    """Another dtype, tied names in one place, a prefix, an optimizer in front: loaded or fitted."""
    from safetensors.torch import save_file

    models = study(tmp_path / "runs", range(2))
    torch.manual_seed(3)
    for name, change in (
        ("double", lambda state: {k: v.double() for k, v in state.items()}),
        ("prefix", lambda state: {f"net.{k}": v for k, v in state.items()}),
        ("reversed", lambda state: dict(reversed(state.items()))),
        ("optimizer", lambda state: {"optimizer": torch.zeros(9999), "model": state}),
    ):
        model = Branching()
        path = tmp_path / f"runs/{name}.pt"
        torch.save(change(model.state_dict()), path)
        models[str(path)] = model
    legacy = Branching()
    torch.save(
        legacy.state_dict(), tmp_path / "runs/legacy.pt", _use_new_zipfile_serialization=False
    )
    models[str(tmp_path / "runs/legacy.pt")] = legacy
    safe = Branching()
    save_file(safe.state_dict(), tmp_path / "runs/safe.safetensors")
    models[str(tmp_path / "runs/safe.safetensors")] = safe
    for stack in (1, 4):
        out = tmp_path / f"out{stack}"
        result = scan(list(models), Branching(), batches := batches_of(), out, stack=stack)
        assert_like_diagnose(result, models, batches, 2e-5)


def test_nothing_to_scan(tmp_path):
    with pytest.raises(ValueError, match="expected at least one checkpoint"):
        scan([], Branching(), batches_of(), tmp_path / "out")
    with pytest.raises(ValueError, match="expected at least one evaluation batch"):
        scan(["x.pt"], Branching(), [], tmp_path / "out")
    with pytest.raises(ValueError, match="stack: expected 'auto' or at least 1, got 0"):
        scan(["x.pt"], Branching(), batches_of(), tmp_path / "out", stack=0)


def test_a_file_of_several_names_is_one_row_by_its_first(tmp_path, monkeypatch):
    study(tmp_path / "runs", range(2), runs=("a",))
    monkeypatch.chdir(tmp_path)
    names = ["runs/a/step_0.pt", str(tmp_path / "runs/a/*.pt"), "runs/*/*.pt", "./runs/a/step_1.pt"]
    result = scan(names, Branching(), batches_of(2), tmp_path / "out")
    first, second = "runs/a/step_0.pt", str(tmp_path / "runs/a/step_1.pt")
    assert [(r["path"], r["step"]) for r in result.rows] == [(first, 0), (second, 1)]
    assert list(result.runs()) == ["a"]
    entries = [Entry(first, "x", 1), Entry(str(tmp_path / first), "y", 2)]
    result = scan(entries, Branching(), batches_of(2), tmp_path / "other")
    assert [(r["path"], r["run"]) for r in result.rows] == [(first, "x")]


def test_a_rescan_says_how_many_results_it_took_over(tmp_path):
    study(tmp_path / "runs", range(3))
    glob, out, batches = str(tmp_path / "runs/*/*.pt"), tmp_path / "out", batches_of(2)
    first = scan(glob, Branching(), batches, out)
    assert first.counts == ScanCounts(6, 6, 0, 0, [])
    assert "taken over" not in str(first)
    study(tmp_path / "runs", range(3, 4))
    (tmp_path / "runs/a/step_9.pt").write_text("text")
    again = scan(glob, Branching(), batches, out)
    assert again.counts == ScanCounts(9, 2, 6, 1, [])
    line = "this scan: 6 of 9 checkpoints taken over from before, 2 audited, 1 failed"
    assert line in str(again).splitlines()
    part = scan(str(tmp_path / "runs/a/step_0.pt"), Branching(), batches, out)
    assert "8 of 9 checkpoints audited" in str(part)
    assert "this scan: 1 of 1 checkpoints taken over from before, 0 audited" in str(part)
    assert "this scan" not in str(ScanResult.load(out))


def test_checkpoints_without_a_step_are_counted_and_one_is_named(tmp_path):
    study(tmp_path / "runs", range(2), runs=("a",))
    for name in ("best.pt", "last.pt"):
        (tmp_path / "runs/a/step_0.pt").with_name(name).write_bytes(
            (tmp_path / "runs/a/step_1.pt").read_bytes()
        )
    result = scan(str(tmp_path / "runs/*/*.pt"), Branching(), batches_of(2), tmp_path / "out")
    (note,) = [line for line in str(result).splitlines() if line.startswith("note: ")]
    assert note.startswith("note: 2 checkpoints without a step: no pattern matches ")
    assert "runs/a/best.pt" in note
    assert "--pattern" in note
    (tmp_path / "m.csv").write_text("path\nruns/a/best.pt\n")
    listed = scan([], Branching(), batches_of(2), tmp_path / "out", manifest=tmp_path / "m.csv")
    assert "without a step" not in str(listed)


def test_a_glob_without_a_match_is_no_row(tmp_path):
    study(tmp_path / "runs", range(2), runs=("a",))
    good, bad = str(tmp_path / "runs/*/*.pt"), str(tmp_path / "rums/*.pt")
    with pytest.raises(ValueError, match=r"expected files that match .*rums/\*\.pt, got none"):
        scan(bad, Branching(), batches_of(2), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    named = str(tmp_path / "runs/a/step_9.pt")
    with pytest.warns(UserWarning, match=r"scan: .*rums/\*\.pt: no file matches"):
        result = scan([bad, good, named], Branching(), batches_of(2), tmp_path / "out")
    assert len(result) == 3
    assert [row["path"] for row in result.failures()["missing"]] == [named]


def special_files(folder):
    """A FIFO, a socket, a device and a folder with a FIFO in it; path → what each is."""
    folder.mkdir()
    os.mkfifo(folder / "fifo.pt")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(folder / "s.pt"))
    server.close()
    (folder / "tree").mkdir()
    os.mkfifo(folder / "tree/model.safetensors")
    (folder / "link.pt").symlink_to(folder / "fifo.pt")
    return {
        str(folder / "fifo.pt"): "a FIFO",
        str(folder / "s.pt"): "a socket",
        "/dev/zero": "a device",
        str(folder / "tree"): "a FIFO",
        str(folder / "link.pt"): "a FIFO",
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_file_has_a_row_and_does_not_hang_the_scan(tmp_path):
    models, special = study(tmp_path / "runs", range(2)), special_files(tmp_path / "special")
    results = []
    scanning = threading.Thread(
        target=lambda: results.append(
            scan([*special, *models], Branching(), batches_of(2), tmp_path / "out")
        ),
        daemon=True,  # what hangs is not waited for
    )
    scanning.start()
    scanning.join(60)
    assert results, "the scan hangs"
    assert results[0].verdict_counts() == {"not enough data": 4}
    errors = {row["path"]: row["error"] for row in results[0].failures()["unreadable"]}
    assert set(errors) == set(special)
    for path, what in special.items():
        assert f"expected a regular file or folder, got {what}" in errors[path]


def test_convolutions_and_batchnorm_in_a_stack(tmp_path):
    def build():
        def stage():
            return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), stage(), stage(), *head)
        model(torch.randn(8, 1, 6, 6))  # running figures of its own
        return model.eval()

    models = study(tmp_path / "runs", range(2), build)
    torch.manual_seed(2)
    batches = [(torch.randn(6, 1, 6, 6), torch.randint(0, 5, (6,))) for _ in range(8)]
    result = scan(str(tmp_path / "runs/*/*.pt"), build(), batches, tmp_path / "out", stack=4)
    assert_like_diagnose(result, models, batches, 2e-5)


KILLED = textwrap.dedent(
    """
    import sys, torch
    sys.path[:0] = {path!r}
    from networks import Branching
    from test_driver import batches_of
    from fadiag_fast.scanning import scan
    torch.set_num_threads(1)
    scan({glob!r}, Branching(), batches_of(), {out!r}, stack=2)
    """
)


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_the_same_table(tmp_path):
    study(tmp_path / "runs", range(200))
    glob = str(tmp_path / "runs/*/*.pt")
    undisturbed = scan(glob, Branching(), batches_of(), tmp_path / "calm", stack=2)
    code = KILLED.format(path=sys.path, glob=glob, out=str(tmp_path / "out"))
    moments = random.Random(5)
    for _ in range(10):
        child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(2.0, 5.0))
        child.send_signal(signal.SIGKILL)
        child.wait()
    result = scan(glob, Branching(), batches_of(), tmp_path / "out", stack=2)
    assert len(result) == len(undisturbed) == 400
    expected = figures_by_path(undisturbed)
    for path, (row, figures) in figures_by_path(result).items():
        assert row["verdict"] == expected[path][0]["verdict"]
        assert figures.residual_norms == pytest.approx(expected[path][1].residual_norms, rel=1e-6)


@pytest.mark.slow
def test_a_thousand_checkpoints_of_which_fifty_are_faulty(tmp_path):
    """950 are audited, 50 explained, each in the words of its fault."""
    models = study(tmp_path / "runs", range(475))
    kinds = {}
    for number in range(8):
        kinds |= faulty(tmp_path / f"bad{number}")
    kinds = dict(list(kinds.items())[:50])
    paths = list(models)
    for place, path in enumerate(kinds):
        paths.insert(20 * place, path)
    batches = batches_of()
    result = scan(paths, Branching(), batches, tmp_path / "out")
    assert len(result) == 1000
    rows = {row["path"]: row for row in result.rows}
    assert {path: rows[path]["error_kind"] for path in kinds} == kinds
    audited = [row for row in result.rows if row["status"] == "audited"]
    assert {row["path"] for row in audited} == set(models)
    for path in list(models)[::95]:
        assert rows[path]["verdict"] == diagnose(models[path], batches).verdict


PEAK = textwrap.dedent(
    """
    import resource, sys, torch
    sys.path[:0] = {path!r}
    from networks import Branching
    from test_driver import batches_of
    from fadiag_fast.scanning import scan
    torch.set_num_threads(1)
    scan({glob!r}, Branching(), batches_of(), {out!r})
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    peaks = {}
    for count in (100, 10_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        state = Branching().state_dict()
        for step in range(count):
            state["embed.bias"] = state["embed.bias"] + 1e-6
            torch.save(state, folder / f"step_{step}.pt")
        code = PEAK.format(path=sys.path, glob=f"{folder}/*.pt", out=f"{folder}-out")
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        peaks[count] = int(done.stdout)
    assert peaks[10_000] < 1.1 * peaks[100], peaks


def test_two_scans_into_one_folder(tmp_path):
    from fadiag_fast.scanning import LockedResults

    study(tmp_path / "runs", range(1))
    with ScanWriter(tmp_path / "out"), pytest.raises(LockedResults, match="another scan"):
        scan(str(tmp_path / "runs/*/*.pt"), Branching(), batches_of(), tmp_path / "out")


@pytest.fixture
def command(tmp_path):
    """A study of small networks on the shipped images, and the command that scans it."""
    from fadiag_fast.zoo import build_model

    options = {"d_hidden": 8, "num_blocks": 2}
    for step in range(3):
        model = build_model("resmlp", input_shape=(1, 28, 28), num_classes=10, seed=step, **options)
        path = tmp_path / f"runs/bp/step_{step}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    arguments = ["scan", str(tmp_path / "runs/**/*.pt"), "--out", str(tmp_path / "out")]
    arguments += ["--model-option", "d_hidden=8", "--model-option", "num_blocks=2"]
    return [*arguments, "--batches", "8", "--batch-size", "16", "--device", "cpu"]


def test_the_command_scans_and_says_what_it_found(command, tmp_path):
    from typer.testing import CliRunner

    from fadiag_fast.cli import app

    done = CliRunner().invoke(app, [*command, "--max-stability", "1"])
    assert done.exit_code == 0, done.output
    assert "3 of 3 checkpoints audited" in done.output
    torch.save({"loss": 1.0}, tmp_path / "runs/bp/step_9.pt")
    again = CliRunner().invoke(app, [*command, "--json", "--max-stability", "-1"])
    assert again.exit_code == 1, again.output
    lines = [json.loads(line) for line in again.stdout.splitlines()]
    assert lines[-2]["done"] == 4
    assert lines[-2]["reused"] == 3
    assert lines[-2]["failed"] == 1
    assert lines[-1]["verdicts"] == {"needs walk-back: (c)": 3}
    counts = {"total": 4, "audited": 0, "reused": 3, "failed": 1, "unmatched": 0}
    assert counts.items() <= lines[-1].items()


def test_the_command_fails_only_if_nothing_could_be_audited(command, tmp_path):
    from typer.testing import CliRunner

    from fadiag_fast.cli import app

    (tmp_path / "bad.pt").write_text("text")
    command[1] = str(tmp_path / "bad.pt")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 3, done.output
    assert "unreadable" in done.output


def test_the_command_names_a_glob_without_a_match(command, tmp_path):
    from typer.testing import CliRunner

    from fadiag_fast.cli import app

    lost = str(tmp_path / "rums/*.pt")
    done = CliRunner().invoke(app, [*command, lost, "--quiet", "--max-stability", "1"])
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines() == [f"fadiag: scan: {lost}: no file matches"]
    assert len(ScanResult.load(tmp_path / "out")) == 3
    alone = CliRunner().invoke(app, ["scan", lost, "--out", str(tmp_path / "other")])
    assert alone.exit_code == 3
    assert alone.stderr.splitlines() == [
        f"fadiag: scan: expected files that match {lost}, got none"
    ]


def test_batches_are_checked_as_diagnose_checks_them(tmp_path):
    study(tmp_path / "runs", range(2))
    glob, batches = str(tmp_path / "runs/*/*.pt"), batches_of()
    x, y = batches[0]
    with pytest.raises(ValueError, match=r"scan: batch 0: expected labels from 0 to 3, got .* 9"):
        scan(glob, Branching(), [(x, y + 9 - y.max())], tmp_path / "labels")
    with pytest.raises(TypeError, match="scan: batch 1: expected a pair"):
        scan(glob, Branching(), [(x, y), x], tmp_path / "pairs")
    result = scan(glob, Branching(), [(x[:0], y[:0]), *batches], tmp_path / "empty")
    assert result.rows[0]["num_batches"] == len(batches)


def test_the_batch_size_of_sequence_first_states(tmp_path):
    class SequenceFirst(Branching):
        def forward(self, x):  # [T, B, 5]
            h = self.embed(x)
            for block in self.blocks:
                h = h + block(h)
            return self.out_head(self.out_ln(h).mean(0))

    models = study(tmp_path / "runs", range(1), SequenceFirst)
    batches = [(x.expand(3, *x.shape).contiguous(), y) for x, y in batches_of()]
    for stack in (1, 2):
        result = scan(
            str(tmp_path / "runs/*/*.pt"),
            SequenceFirst(),
            batches,
            tmp_path / f"out{stack}",
            batch_dim=1,
            stack=stack,
        )
        for path, (row, figures) in figures_by_path(result).items():
            expected = diagnose(models[path], batches, batch_dim=1).figures
            assert row["batch_size"] == expected.batch_size == 6
            assert figures.residual_norms == pytest.approx(expected.residual_norms, rel=2e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("stack", [1, 4, "auto"])
@pytest.mark.parametrize("build", [Branching, Stateful], ids=["graphed", "without a graph"])
def test_a_scan_on_a_gpu(stack, build, tmp_path):
    """Stateful counts its calls on the host, which no graph does; its figures do not depend on it.

    The GPU's figures are held to those of the CPU: float64 leaves rounding of some 1e-12.
    """
    models = study(tmp_path / "runs", range(20), lambda: build().double())
    bad = faulty(tmp_path / "bad") if build is Branching else {}
    batches = batches_of(dtype=torch.float64)
    model = build().double().cuda()
    paths = [*models, *bad]
    result = scan(paths, model, batches, tmp_path / "out", stack=stack)
    rows = {row["path"]: row for row in result.rows}
    assert {path: rows[path]["error_kind"] for path in bad} == bad
    found = figures_by_path(result)
    for path, reference in models.items():
        report = diagnose(reference, batches)
        assert found[path][0]["verdict"] == report.verdict
        for name in ("residual_norms", "bp_grad_norms", "credit_gains", "stabilities"):
            expected = getattr(report.figures, name)
            assert getattr(found[path][1], name) == pytest.approx(expected, rel=1e-9)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_scan_on_another_gpu_than_the_current_one(tmp_path):
    models = study(tmp_path / "runs", range(20), lambda: Branching().double())
    batches = batches_of(dtype=torch.float64)
    model = Branching().double().to("cuda:1")
    result = scan(list(models), model, batches, tmp_path / "out", stack=4)
    assert_like_diagnose(result, models, batches, 1e-9)


@pytest.mark.cuda
def test_a_scan_of_images_on_a_gpu(tmp_path):
    def build():
        def stage():
            return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), stage(), stage(), *head)
        return model.double().eval()

    models = study(tmp_path / "runs", range(20), build)
    torch.manual_seed(2)
    batches = [
        (torch.randn(6, 1, 6, 6, dtype=torch.float64), torch.randint(0, 5, (6,))) for _ in range(8)
    ]
    result = scan(str(tmp_path / "runs/*/*.pt"), build().cuda(), batches, tmp_path / "out")
    assert_like_diagnose(result, models, batches, 1e-9)
