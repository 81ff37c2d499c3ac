"""The benchmark harness: fair rounds, right competitors, rows and tables that agree."""

import contextlib
import dataclasses
import math
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import fadiag_fast

# At the end: an installed fadiag_fast stays the one under test.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import __main__ as main
from benchmarks import (
    ceilings,
    cpu,
    operator,
    plots,
    pure,
    rows,
    scan_rate,
    special,
    steps,
    sweep,
    tables,
    timing,
)

CPU = torch.device("cpu")
TINY = timing.Plan(repetitions=3, sample_s=1e-5)


def layers(count, samples, shape, dtype=torch.float32, channels_last=False):
    work = operator.Workload("test", count, samples, shape, dtype, channels_last=channels_last)
    return work.make(CPU)


# --- timing ---


def test_interleaving_samples_each_variant_equally_often():
    calls = []
    samplers = [lambda name=name: calls.append(name) or 1.0 for name in "abc"]
    samples = timing.interleave(samplers, timing.Plan(repetitions=10))
    assert [len(taken) for taken in samples] == [10, 10, 10]
    # One more each: the round that is thrown away.
    assert Counter(calls) == {"a": 11, "b": 11, "c": 11}
    rounds = [calls[i : i + 3] for i in range(3, 33, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert {one[0] for one in rounds} == {"a", "b", "c"}


def test_budget_ends_a_measurement_and_is_recorded():
    plan = timing.Plan(repetitions=10_000, budget_s=0.0)
    (taken,) = timing.measure({"a": lambda: None}, CPU, plan)
    assert taken.repetitions == 5


def test_variant_that_raises_is_a_row_with_its_reason():
    def broken():
        raise RuntimeError("no\nkernel")

    timings = timing.measure({"good": lambda: None, "bad": broken}, CPU, TINY)
    assert timing.pick(timings, "bad").note == "RuntimeError: no kernel"
    assert timing.pick(timings, "bad").repetitions == 0
    assert timing.fastest(timings, ["good", "bad"]).variant == "good"


def test_percentiles_are_in_order():
    (taken,) = timing.measure({"a": lambda: sum(range(100))}, CPU, timing.Plan(20))
    assert 0 < taken.p10_us <= taken.median_us <= taken.p90_us


class FakeGraph:
    """Stands for a CUDA graph: keeps what ran under capture and runs it again."""

    current = None

    def __init__(self):
        self.recorded = []

    def replay(self):
        for run in self.recorded:
            run()


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda's events, streams and graphs with the host's clock, to walk the GPU's code."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = time.perf_counter()

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return (end.time - self.time) * 1e3

    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def graph(graph, stream):
        FakeGraph.current = graph
        try:
            yield
        finally:
            FakeGraph.current = None

    fakes = {
        "Event": Event,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": FakeGraph,
        "graph": graph,
        "synchronize": lambda device=None: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return torch.device("cuda")


@pytest.mark.parametrize("flushed", [False, True])
def test_gpu_modes_and_a_variant_that_cannot_be_captured(fake_cuda, flushed):
    ran = Counter()

    def good():
        ran["good"] += 1
        if FakeGraph.current:
            FakeGraph.current.recorded.append(good)

    def long():
        time.sleep(3e-4)  # long enough for events

    def synchronizing():
        if FakeGraph.current:
            raise RuntimeError("operation not permitted when stream is capturing")

    cache = timing.Cache("flushed", torch.ones(8)) if flushed else timing.Cache("hot")
    variants = {"good": good, "long": long, "synchronizing": synchronizing}
    timings = timing.measure(variants, fake_cuda, TINY, cache)
    found = {(taken.variant, taken.mode): taken for taken in timings}
    assert set(found) == {(name, mode) for name in variants for mode in ("eager", "graphed")}
    assert found["synchronizing", "graphed"].repetitions == 0
    assert "not capturable" in found["synchronizing", "graphed"].note
    assert found["synchronizing", "eager"].repetitions == 3
    assert found["good", "graphed"].repetitions == 3
    assert found["long", "eager"].median_us >= 300
    assert found["long", "eager"].cache == cache.state
    assert not flushed or found["good", "eager"].calls == 1


# --- pure paths ---


# Odd sizes: one sample, a tail in every vector width, one feature; channels_last with odd sides.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("count", "samples", "shape", "channels_last"),
    [
        (3, 7, (33,), False),
        (1, 1, (1,), False),
        (2, 5, (3, 7, 5), True),
        (2, 4, (1021,), False),
    ],
)
def test_pure_paths_agree_with_the_operator(count, samples, shape, channels_last, dtype):
    hiddens, grads = layers(count, samples, shape, dtype, channels_last)
    expected = fadiag_fast.layer_statistics(hiddens, grads)
    found, _ = pure.paths(hiddens, grads, compiled=False)
    assert set(found) == {"eager", "foreach", "stack"}
    runs, rejected = pure.checked(found, hiddens, grads, expected)
    assert set(runs) == set(found), rejected


def test_channels_last_path_makes_no_copy():
    (hidden,), _ = layers(1, 4, (3, 8, 8), channels_last=True)
    assert not hidden.is_contiguous()
    assert pure.rows(hidden).data_ptr() == hidden.data_ptr()


def test_wrong_path_is_rejected():
    hiddens, grads = layers(2, 8, (64,), torch.bfloat16)
    expected = fadiag_fast.layer_statistics(hiddens, grads)

    def narrow(h, g):  # accumulates and returns bfloat16: faster on paper
        norms = [torch.stack([torch.linalg.vector_norm(x, dim=1) for x in xs]) for xs in (h, g)]
        return norms[0], norms[1], [x.mean(0) for x in g]

    def one_wrong(h, g):
        hidden_norm, grad_norm, means = pure.eager(h, g)
        hidden_norm[1, 3] *= 1.001
        return hidden_norm, grad_norm, means

    def nan(h, g):
        hidden_norm, grad_norm, means = pure.eager(h, g)
        means[0][0] = math.nan
        return hidden_norm, grad_norm, means

    paths = {"narrow": narrow, "one wrong": one_wrong, "nan": nan}
    runs, rejected = pure.checked(paths, hiddens, grads, expected)
    assert not runs
    assert all(row.note.startswith("wrong") for row in rejected)


def test_pure_cosines_agree_with_the_operator():
    batches = [[torch.randn(37), torch.randn(37)] for _ in range(4)]
    expected = fadiag_fast.direction_cosines(batches)
    for path in (pure.cosines, pure.stacked_cosines):
        torch.testing.assert_close(path(batches).double(), expected, rtol=0, atol=1e-6)


# --- measures ---


def test_measures_of_constructed_timings():
    def taken(variant, mode, us):
        return timing.Timing(variant, mode, us, us, us, 100)

    timings = [
        taken(operator.OPERATOR, "eager", 10.0),
        taken(operator.OPERATOR, "graphed", 5.0),
        taken("eager", "eager", 300.0),
        taken("eager", "graphed", 40.0),
        taken("stack", "eager", 60.0),
        taken("stack", "graphed", 20.0),
        taken("read: sum", "eager", 100.0),
    ]
    read = ceilings.ReadLoop("read: sum", lambda: None, 1000)
    measures = operator.compare(timings, read, 90)
    assert measures["share"] == pytest.approx(0.9)
    assert measures["ratio"] == pytest.approx(2.0)
    assert measures["ratio_without_stacking"] == pytest.approx(4.0)
    assert measures["ratio_eager"] == pytest.approx(6.0)
    assert measures["ratio_graphed"] == pytest.approx(4.0)
    assert operator.verdict(0.9, 0.8, False) == "met"
    assert operator.verdict(0.6, 0.8, False) == "missed by 25.0%"
    assert operator.verdict(25.0, 20.0, True) == "missed by 20.0%"
    assert operator.verdict(math.nan, 20.0, True) == "not measured"


def test_bytes_of_a_workload_are_counted_once():
    work = operator.Workload("test", 2, 3, (5,), torch.bfloat16)
    assert work.nbytes == 2 * 2 * 3 * 5 * 2 + 2 * 2 * 3 * 8 + 2 * 5 * 4


def grid(overrides=()):
    """A grid whose time is a launch plus the bytes over the bandwidth."""
    cells = [("bf16", l, n, d) for l in (1, 8) for n in (1, 8, 64) for d in (16, 256, 4096, 65536)]
    nbytes = {cell: 4.0 * cell[1] * cell[2] * cell[3] for cell in cells}
    times = {cell: 5.0 + nbytes[cell] / 1e6 for cell in cells}
    times.update(overrides)
    return times, nbytes


def test_smooth_grid_has_no_cliff():
    assert sweep.find_cliffs(*grid()) == {}


def test_cliffs_are_found_small_and_large():
    slow = {("bf16", 8, 64, 4096): 30.0, ("bf16", 1, 8, 16): 8.5}
    found = sweep.find_cliffs(*grid(slow))
    assert set(found) == set(slow)


def test_neighbours_are_one_step_along_one_axis():
    times, _ = grid()
    found = sweep.neighbours(("bf16", 1, 8, 16), list(times))
    expected = {("bf16", 8, 8, 16), ("bf16", 1, 1, 16), ("bf16", 1, 64, 16), ("bf16", 1, 8, 256)}
    assert set(found) == expected


# --- special ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_subnormal_has_half_subnormals(dtype):
    mixed = special.half_subnormal(torch.ones(4, 10, dtype=dtype))
    tiny = torch.finfo(dtype).tiny
    # In float64: comparing subnormals in their own type may flush them.
    assert ((mixed.double() > 0) & (mixed.double() < tiny)).sum() == 20


def test_layouts_hold_the_same_values():
    x = torch.randn(6, 10)
    for name, view in special.layouts(x).items():
        assert torch.equal(view, x), name


def test_digest_tells_one_bit():
    statistics = fadiag_fast.layer_statistics([torch.ones(2, 3)], [torch.ones(2, 3)])
    moved = statistics.hidden_norm.nextafter(torch.tensor(9.0))
    changed = fadiag_fast.LayerStatistics(moved, statistics.grad_norm, statistics.grad_mean)
    assert special.digest(statistics) == special.digest(statistics)
    assert special.digest(statistics) != special.digest(changed)


# --- steps ---


def test_what_is_added_is_paired_by_rounds():
    # The machine slows down threefold; every round says ten percent.
    found = steps.added([1.1, 2.2, 3.3], [1.0, 2.0, 3.0])
    assert found["added_percent"] == pytest.approx(10)
    assert found["step_ms"] == pytest.approx(2200)
    assert found["added_us"] == pytest.approx(200_000)
    assert math.isnan(steps.added([math.nan], [1.0])["added_percent"])


def test_verdict_of_steps_names_what_is_missed():
    work = steps.workloads(CPU)[0]
    assert work.target == "≤ 1%, memory ≤ 0.5%"
    assert steps.verdict(work, 0.9, 1e9, 0.4) == "yes"
    assert steps.verdict(work, 0.9, 0.0, math.nan) == "yes"
    assert steps.verdict(work, 1.2, 0.0, 0.6) == "no: time 1.2%, memory 0.6%"
    assert steps.verdict(work, math.nan, 0.0, 0.0) == "not measured"


def tiny_step(**changes):
    """A step small enough for a test."""

    def build():
        return fadiag_fast.zoo.ResidualMLP(5, 8, 3, 3)

    def batch():
        return torch.randn(6, 5), torch.randint(0, 3, (6,))

    return steps.Workload("tiny", build, batch, "out_head", percent=1e9, **changes)


@pytest.mark.parametrize("compiled", [False, True])
def test_tiny_step_end_to_end(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "workloads", lambda device: [tiny_step(compile=compiled, samples=2)])
    # The frameworks take seconds to import.
    for name in ("_grad_norm", "_watch"):
        monkeypatch.setattr(steps.Study, name, lambda *_: 1 / 0)
    path = steps.run(CPU, tmp_path, quick=True)
    found = {row["variant"]: row for row in rows.read(path)}
    hooks = [steps.HOOKS, steps.COMPILED_HOOKS]
    without_alarms = [] if compiled else [steps.QUIET_PROBE]
    others = [*without_alarms, steps.FEW_PROBE, *hooks, steps.GRAD_NORM, steps.WATCH]
    assert list(found) == [steps.BARE, steps.PROBE, *others]
    probe = found[steps.PROBE]
    assert (probe["states"], probe["met"], probe["note"]) == ("4", "yes", "")
    assert float(found[steps.HOOKS]["step_ms"]) > 0
    assert "ZeroDivisionError" in found[steps.WATCH]["note"]
    assert "| tiny: StepProbe |" in tables.render("steps", list(found.values()))


@pytest.mark.slow
def test_wandb_watches_a_tiny_step():
    pytest.importorskip("wandb")
    study = steps.Study(tiny_step(), CPU)
    bare, training = study._bare()
    with study.open:
        variant = study._watch(bare, training)
        with variant.around():
            variant.step()
            assert any(p._backward_hooks for p in training.model.parameters())
        assert not any(p._backward_hooks for p in training.model.parameters())


def test_copies_of_a_variant_take_turns_block_by_block():
    """Whatever one capture of a graph has by luck, it has in some of the blocks only."""
    ran = []
    copies = [
        steps.Variant("v", lambda i=i: ran.append(i), records=lambda i=i: 10 * i, taken=i)
        for i in (1, 2, 3)
    ]
    merged = steps._in_turns(copies)
    for _ in range(4):
        with merged.around():
            merged.step()
            merged.step()
    assert ran == [1, 1, 2, 2, 3, 3, 1, 1]
    assert (merged.taken, merged.records()) == (1 + 2 + 3 + 8, 60)


def test_plain_hooks_say_what_the_probe_says():
    study = steps.Study(tiny_step(), CPU)
    records = []
    training = study.training()
    probe = fadiag_fast.StepProbe(training.model, sink=records.append, example=study.example())
    study.places = [(point.module, point.at == "input") for point in probe.taps.points]
    hooks = steps.PlainHooks(training.model, study.places, "out_head", hide=False)
    for _ in range(10):
        training.step()
        probe.step()
        hooks.step()
    probe.flush()
    row, record = hooks.rows[-1].tolist(), records[-1]
    n = len(record.layers)
    assert row[:n] == pytest.approx(record.hidden_norms, rel=1e-5)
    assert row[n : 2 * n] == pytest.approx(record.grad_norms, rel=1e-5)
    assert row[2 * n : 3 * n] == pytest.approx(record.credit_gains, rel=1e-5)
    assert row[3 * n] == pytest.approx(record.output_grad_norm, rel=1e-5)
    middle = fadiag_fast.protocol.middle_layer(n)
    cosines = row[3 * n + 1 : -1]
    assert len(cosines) == record.num_directions == 8
    assert sum(cosines) / 8 == pytest.approx(record.stabilities[middle], abs=1e-5)
    assert row[-1] == pytest.approx(record.average_cosines[middle], abs=1e-5)


def test_step_that_cannot_be_built_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "workloads", lambda device: [tiny_step(graphed=True)])
    (row,) = rows.read(steps.run(CPU, tmp_path, quick=True))
    assert row["note"] == "RuntimeError: a CUDA graph needs CUDA"
    with pytest.raises(ValueError, match="no workload has 'nothing'"):
        steps.run(CPU, tmp_path / "other", quick=True, only="nothing")


def test_short_soak_has_every_record(tmp_path, monkeypatch):
    named = dataclasses.replace(tiny_step(), name="MLP, eager")
    monkeypatch.setattr(steps, "workloads", lambda device: [named])
    path = steps.soak(CPU, tmp_path, quick=True, steps=40)
    (row,) = rows.read(path)
    assert (row["steps"], row["records"]) == ("40", "50")
    assert "MLP, eager" in tables.render("steps-soak", [row])


# --- rows and tables ---


def test_rows_survive_a_csv(tmp_path):
    path = tmp_path / "x.csv"
    rows.write(path, [{"workload": "a, b", "median_us": 1.5}, {"workload": "c", "note": 'say "x"'}])
    assert rows.read(path) == [
        {"workload": "a, b", "median_us": "1.5", "note": ""},
        {"workload": "c", "median_us": "", "note": 'say "x"'},
    ]
    assert math.isnan(rows.number(rows.read(path)[1], "median_us"))


def test_partial_run_keeps_the_other_workloads(tmp_path):
    path = tmp_path / "x.csv"
    rows.write(path, [{"workload": "a", "us": 1}, {"workload": "b", "us": 2}])
    rows.write(path, [{"workload": "b", "us": 3}], replace="workload")
    assert {row["workload"]: row["us"] for row in rows.read(path)} == {"a": "1", "b": "3"}


def test_the_rate_of_one_study_leaves_the_other_s_rows(tmp_path):
    path = rows.results_path(tmp_path, "scan-rate", CPU, True)
    rows.write(path, [{"study": "another", "variant": "scan", "ms_each": 1}])
    scan_rate.run(CPU, tmp_path, quick=True, only="residual")
    other, loop, scan = rows.read(path)
    assert other["study"] == "another"
    assert loop["study"] == scan["study"] == "ResidualMLP d256 L4, 10×128"
    assert rows.number(scan, "ratio") == pytest.approx(
        rows.number(loop, "ms_each") / rows.number(scan, "ms_each"), abs=0.006
    )
    with pytest.raises(ValueError, match="no study has 'gpt' in its name"):
        scan_rate.run(CPU, tmp_path, quick=True, only="gpt")


def test_command_does_not_record_the_results_folder(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "cpu", "--results", "/somewhere/else", "--quick"])
    assert rows._command() == "python -m benchmarks cpu --quick"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A CSV of one tiny workload, measured end to end on the CPU."""
    results = tmp_path_factory.mktemp("results")
    work = operator.Workload("tiny", 2, 8, (64,), torch.float32, {"share": 0.5, "ratio_graphed": 2})
    read, found = ceilings.find_ceilings(CPU, TINY, 1 << 20)
    found += operator.statistics_rows(work, CPU, TINY, read, compiled=False)
    found += operator.cosine_rows(work, CPU, TINY, compiled=False)
    where = rows.environment(CPU)
    rows.write(rows.results_path(results, "operator", CPU, False), [{**r, **where} for r in found])
    return results


def test_tiny_workload_end_to_end(measured):
    (path,) = tables.csvs(measured, "operator")
    found = rows.read(path)
    assert {row["variant"] for row in found if row["workload"] == "tiny"} > {
        operator.OPERATOR,
        "eager",
        "foreach",
        "stack",
    }
    for column in ("device", "torch", "python", "fadiag_fast", "commit", "date", "command"):
        assert all(row[column] for row in found)
    (mine,) = [row for row in found if row["variant"] == operator.OPERATOR and row["best_pure"]]
    assert "share" in mine["verdict"]
    assert "ratio_graphed nan ≥ 2 not measured" in mine["verdict"]
    assert "| tiny |" in tables.tables_of(path)


def test_readme_is_filled_then_fresh_then_stale(measured, tmp_path):
    readme = tmp_path / "README.md"
    text = "# x\n<!-- begin:operator -->\nto go\n<!-- end:operator -->\nkept\n"
    readme.write_text(text + "<!-- begin:sweep -->\n<!-- end:sweep -->\n")
    assert tables.update(measured, check=True, files=[readme]) == [readme]
    assert "to go" in readme.read_text()
    assert tables.update(measured, files=[readme]) == [readme]
    filled = readme.read_text()
    assert "| tiny |" in filled
    assert "to go" not in filled
    assert "kept" in filled
    assert "Not measured yet." in filled
    assert tables.update(measured, check=True, files=[readme]) == []
    readme.write_text(filled.replace("| tiny |", "| tiny! |"))
    assert tables.update(measured, check=True, files=[readme]) == [readme]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- begin:nothing -->\n<!-- end:nothing -->", "no table 'nothing'"),
        ("<!-- begin:cpu -->\n", "has no <!-- end:cpu -->"),
    ],
)
def test_bad_markers_are_named(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tables.fill(text, tmp_path)


def test_cpu_sweep_tables_are_rendered(tmp_path):
    cells = cpu.sweep_rows(CPU, TINY, most_elements=1 << 8)
    where = rows.environment(CPU)
    path = tmp_path / "cpu-sweep_x.csv"
    rows.write(path, [{**row, **where} for row in cells])
    assert "| fp32, L2 |" in tables.tables_of(path)


def test_plots_are_drawn_from_csvs(measured):
    pytest.importorskip("matplotlib")
    (picture,) = plots.draw(measured)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_rate_of_a_study_is_that_of_ordinary_steps_on_the_cpu(tmp_path, monkeypatch):
    from benchmarks import study_rate

    monkeypatch.setattr(study_rate, "IMAGES", 1280)
    path = study_rate.run(CPU, tmp_path, quick=True, only="resmlp bp")
    (row,) = rows.read(path)
    assert (row["model"], row["rule"], row["variant"], row["jobs"]) == (
        "resmlp",
        "bp",
        "ordinary",
        "1",
    )
    assert float(row["steps_per_s"]) > 0
    assert float(row["ratio"]) == 1
    assert "| resmlp bp | ordinary | 1 |" in tables.tables_of(path)


def test_a_failure_in_a_studys_thread_is_passed_on(monkeypatch):
    from benchmarks import study_rate

    def failing(*arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr(study_rate, "_stepper", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        study_rate._together("resmlp", "bp", torch.zeros(1), torch.zeros(1), False, 3, 2)


def test_unknown_benchmark_is_refused(capsys):
    with pytest.raises(SystemExit):
        main.main(["speed"])
    assert "unknown benchmark: speed" in capsys.readouterr().err
