"""What is read from a scan's rows, against oracles that go through them one by one."""

import dataclasses
import math

import pytest

pytest.importorskip("pyarrow", reason="needs the extra 'scan'")

from hypothesis import given, settings
from hypothesis import strategies as st
from studies import CONFIG, figures, record

from fadiag_fast.scanning import FirstFired, Moment, ScanResult, ScanWriter, UnreadableResults
from fadiag_fast.scanning.results import _first_fired, in_time


@pytest.fixture
def scan(tmp_path):
    """Make a scan of the given records: a list of (run, step, figures or error)."""

    def make(rows, **more):
        with ScanWriter(tmp_path) as writer:
            config = writer.configure(CONFIG)
            for index, (run, step, given_figures) in enumerate(rows):
                place = {"run": run, "step": step, "path": f"runs/{run}/{step}_{index}.pt"}
                if isinstance(given_figures, str):
                    failed = {"error_kind": given_figures, "error": "a sentence"}
                    writer.add(record(config, index, **place, **failed))
                else:
                    writer.add(record(config, index, given_figures, **place, **more))
        return ScanResult.load(tmp_path)

    return make


def test_rows_are_in_natural_order(scan):
    rows = [("r10", 5, figures()), ("r9", 100, figures()), ("r9", 9, figures())]
    found = scan([*rows, ("r9", None, figures())])
    assert [(row["run"], row["step"]) for row in found.rows] == [
        ("r9", 9),
        ("r9", 100),
        ("r9", None),
        ("r10", 5),
    ]
    layers = found.to_arrow("layers").to_pylist()
    assert [(row["step"], row["layer"]) for row in layers[:4]] == [(9, 0), (9, 1), (9, 2), (100, 0)]
    assert found.to_arrow("layers").num_rows == 12


def test_judging_again_compares_growth_inside_chains_only(scan):
    two_chains = dataclasses.replace(figures(growth=100.0), chain_starts=(1,))
    found = scan([("r", 1, two_chains), ("r", 2, figures(growth=100.0))])
    expected = ["trustworthy", "needs walk-back: (a)"]
    assert [row["verdict"] for row in found.rows] == expected
    assert [row["verdict"] for row in found.judged().rows] == expected


def test_verdicts_counts_and_failures(scan):
    found = scan(
        [
            ("r", 1, figures()),
            ("r", 2, figures(growth=99)),
            ("r", 3, figures(growth=99, grad=1e-9)),
            ("r", 4, figures(directions=3)),
            ("r", 5, "missing"),
            ("r", 6, "unreadable"),
            ("r", 7, "unreadable"),
        ]
    )
    assert list(found.verdicts().values()) == [
        "trustworthy",
        "needs walk-back: (a)",
        "needs walk-back: (a)+(b)",
        "not enough data",
        "failed: missing",
        "failed: unreadable",
        "failed: unreadable",
    ]
    counts = found.verdict_counts()
    assert list(counts) == [
        "trustworthy",
        "needs walk-back: (a)",
        "needs walk-back: (a)+(b)",
        "not enough data",
    ]
    assert {kind: len(rows) for kind, rows in found.failures().items()} == {
        "unreadable": 2,
        "missing": 1,
    }
    assert list(found.figures())[4] is None
    assert found.rows[1]["a_layer"] == "blocks.0"


def oracle_first_fired(statuses):
    """By the words of the definition, one checkpoint at a time."""
    first = last = stayed = None
    judged = 0
    for at, status in enumerate(statuses):
        if status == "fired":
            first = at if first is None else first
            last = at
        if status in ("fired", "passed"):
            judged += 1
            rest = [s for s in statuses[at:] if s in ("fired", "passed")]
            if stayed is None and all(s == "fired" for s in rest):
                stayed = at
    return first, last, stayed, judged


STATUSES = st.lists(
    st.sampled_from(["fired", "passed", "not enough data", "not evaluated", None]), max_size=9
)


@given(STATUSES)
@settings(max_examples=300)
def test_first_fired_against_an_oracle(statuses):
    rows = [
        {"step": 10 * at, "path": str(at), "a_status": status} for at, status in enumerate(statuses)
    ]
    found = _first_fired(rows, "a")
    places = [None if m is None else m.step // 10 for m in (found.first, found.last, found.stayed)]
    assert (*places, found.judged) == oracle_first_fired(statuses)


def test_checkpoints_without_a_step_are_no_moment_in_a_run_with_steps():
    rows = [{"step": step, "status": "audited"} for step in (1, 2, None)]
    failed = {"step": 3, "status": "failed", "error_kind": "unreadable"}
    assert in_time(rows) == rows[:2]
    assert in_time(rows[2:]) == rows[2:]
    assert in_time([*rows, failed]) == [*rows[:2], failed]
    assert in_time([failed, rows[2]]) == [failed, rows[2]]


@pytest.mark.parametrize(
    ("first", "last", "stayed", "judged", "text"),
    [
        (None, None, None, 0, "-"),
        (None, None, None, 3, "never"),
        (4, 4, None, 3, "at 4"),
        (4, 9, None, 3, "4 to 9"),
        (4, 9, 4, 3, "from 4"),
        (4, 9, 7, 3, "at 4, from 7"),
    ],
)
def test_first_fired_in_words(first, last, stayed, judged, text):
    moments = [None if step is None else Moment(step, "x") for step in (first, last, stayed)]
    assert str(FirstFired(*moments, judged)) == text
    assert str(Moment(None, "runs/a/last.pt")) == "last.pt"


def test_trends(scan):
    found = scan([("r", 1000 * k, figures(growth=10.0**k, stability=0.1 * k)) for k in range(4)])
    growth, stability = (found.trends()["r"][name] for name in ("growth", "stability"))
    assert growth.slope == pytest.approx(1.0)  # tenfold per 1,000 steps
    assert (growth.first, growth.last, growth.count) == (1.0, 1000.0, 4)
    assert stability.slope == pytest.approx(0.1)
    assert (stability.lowest, stability.highest) == (0.0, pytest.approx(0.3))
    assert math.isnan(found.trends()["r"]["accuracy"].slope)


def test_trends_leave_out_what_is_not_finite(scan):
    rows = [("r", 0, figures(growth=math.inf)), ("r", 1000, figures(growth=2.0))]
    trend = scan([*rows, ("r", 2000, "missing")]).trends()["r"]["growth"]
    assert (trend.count, trend.first) == (1, 2.0)
    assert math.isnan(trend.slope)


def test_against_a_frozen_accuracy_or_the_frozen_run(tmp_path):
    with ScanWriter(tmp_path) as writer:
        config = writer.configure(CONFIG)
        for step, accuracy in ((0, 0.1), (10, 0.3), (20, 0.35)):
            writer.add(record(config, step, figures(accuracy=accuracy), run="frozen", step=step))
        for step, accuracy in ((10, 0.5), (15, 0.31), (5, 0.4)):
            changes = {"run": "bp", "step": step, "frozen_run": "frozen"}
            writer.add(record(config, 100 + step, figures(accuracy=accuracy), **changes))
        writer.add(record(config, 99, figures(accuracy=0.5, frozen=0.2), run="given", step=1))
        writer.add(record(config, 98, figures(accuracy=0.5), run="none", frozen_run="nowhere"))
    found = {(c.run, c.step): c for c in ScanResult.load(tmp_path).against_frozen()}
    assert set(found) == {("bp", 5), ("bp", 10), ("bp", 15), ("given", 1)}
    assert (found["bp", 10].frozen_accuracy, found["bp", 10].utility) == (0.3, 20.0)
    assert found["bp", 15].undercut  # .31 against .30 at step 10, the last before
    assert found["bp", 5].frozen_accuracy == 0.1
    assert (found["given", 1].baseline, found["bp", 5].baseline) == ("given", "frozen")


def test_the_summary_says_what_matters(scan):
    found = scan(
        [
            ("dfa", 0, figures()),
            ("dfa", 100, figures(growth=60)),
            ("dfa", 200, figures(growth=600, grad=1e-9)),
            ("dfa", 300, "missing"),
            ("bp", 0, figures(stability=0.5)),
            ("bp", 100, figures()),
        ]
    )
    text = str(found)
    assert "5 of 6 checkpoints audited, 1 failed, in 2 runs" in text
    assert "missing  1" in text
    assert "a sentence" in text
    (dfa,) = [line for line in text.splitlines() if line.startswith("dfa")]
    assert "needs walk-back: (a)+(b)  from 100   from 200   never" in dfa
    (bp,) = [line for line in text.splitlines() if line.startswith("bp")]
    assert "trustworthy" in bp
    assert "at 0" in bp
    assert repr(found).startswith("ScanResult(6 checkpoints")


def test_failures_are_told_in_full_and_of_many_the_first_few(tmp_path):
    long = f"expected {'a long story, ' * 20}got another\nand more of it"
    with ScanWriter(tmp_path) as writer:
        config = writer.configure(CONFIG)
        for step in range(5):
            error = f"'{step}.pt': {long}" if step else long
            change = {"error_kind": "wrong model", "error": error, "path": f"{step}.pt", "run": "r"}
            writer.add(record(config, step, step=step, **change))
        writer.add(record(config, 9, error_kind="missing", error="gone", path="x.pt"))
    lines = str(ScanResult.load(tmp_path)).splitlines()
    whole = long.partition("\n")[0]
    first = lines.index("wrong model:")
    assert lines[first + 1 : first + 6] == [
        f"  0.pt: {whole}",
        "  and more of it",
        f"  '1.pt': {whole}",
        f"  '2.pt': {whole}",
        "  … and 2 more",
    ]
    assert "wrong model  5" in lines
    assert lines[lines.index("missing:") + 1] == "  x.pt: gone"


def test_many_runs_are_cut(scan):
    text = str(scan([(f"a/long/name/{'x' * 60}/{r}", 0, figures()) for r in range(45)]))
    assert "… and 5 more runs" in text
    assert max(len(line) for line in text.splitlines() if "xxx" in line) < 140


def test_configurations_are_kept_apart(tmp_path):
    with ScanWriter(tmp_path) as writer:
        one, other = writer.configure(CONFIG), writer.configure({"model": "vit"})
        writer.add(record(one, 0), record(one, 1), record(other, 0, figures(growth=99)))
    latest = ScanResult.load(tmp_path)
    # Checkpoint 0 was scanned twice; its later row stands.
    assert [row["config_hash"] for row in latest.rows] == [other, one]
    assert latest.configurations() == {other: 1, one: 1}
    assert "2 probe configurations" in str(latest)
    assert latest.to_arrow("layers").num_rows == 6
    start = one.partition(":")[2][:6]
    assert len(ScanResult.load(tmp_path, config_hash=start)) == 2
    assert len(ScanResult.load(tmp_path, config_hash=other)) == 1
    for wrong in ("0123456", ""):
        with pytest.raises(UnreadableResults, match="expected one configuration"):
            ScanResult.load(tmp_path, config_hash=wrong)


def test_an_empty_scan(tmp_path):
    with ScanWriter(tmp_path):
        assert len(ScanResult.load(tmp_path)) == 0  # one that has just begun
    found = ScanResult.load(tmp_path)
    assert (len(found), found.first_fired(), found.verdicts()) == (0, {}, {})
    assert "0 of 0 checkpoints audited" in str(found)


def test_tables_for_pandas(scan):
    pytest.importorskip("pandas", reason="needs pandas")
    found = scan([("r", 1, figures()), ("r", 2, "missing")])
    frame = found.to_pandas()
    assert list(frame["verdict"].fillna("-")) == ["trustworthy", "-"]
    assert len(found.to_pandas("layers")) == 3


def test_tables_for_polars(scan):
    pytest.importorskip("polars", reason="needs polars")
    found = scan([("r", 1, figures()), ("r", None, figures(stability=math.nan))])
    frame = found.to_polars()
    assert frame["step"].to_list() == [1, None]
    assert frame["stability"].is_nan().to_list() == [False, True]


def test_other_tables_are_refused(scan):
    with pytest.raises(ValueError, match="expected checkpoints or layers, got 'runs'"):
        scan([]).to_arrow("runs")
