"""Threshold sweeps against judging every checkpoint anew at every threshold."""

import dataclasses
import json
import math
import tempfile
from itertools import pairwise

import pytest

pytest.importorskip("pyarrow", reason="needs the extra 'scan'")

from hypothesis import given, settings
from hypothesis import strategies as st
from studies import CONFIG, any_figures, figures, record

from fadiag_fast.protocol import DiagnosticThresholds, evaluate, verdict_of
from fadiag_fast.scan import ScanResult, ScanWriter, sweep_thresholds

LIMITS = DiagnosticThresholds()
KEYS = {
    "scale_growth": "a",
    "gradient_floor": "b",
    "direction_stability": "c",
    "depth_utility": "d",
}


def scanned(given_figures, **more):
    with tempfile.TemporaryDirectory() as folder:
        with ScanWriter(folder) as writer:
            config = writer.configure(CONFIG)
            for index, one in enumerate(given_figures):
                writer.add(record(config, index, one, path=str(index), **more))
        return ScanResult.load(folder)


def around(sweep):
    """Every value at which something may change, what lies between, and what lies outside."""
    values = [i.high for i in sweep.intervals if i.high is not None]
    between = [(a + b) / 2 for a, b in pairwise(values)]
    nearby = [math.nextafter(v, s * math.inf) for v in values for s in (1, -1)]
    wide = [0.0, 1e-300, 0.5, 2.0, 50.0, 1e300, sweep.current]
    found = [*values, *between, *nearby, *wide]
    if sweep.field in ("direction_stability", "depth_utility"):
        found += [-1e300, -1.0]
    else:
        found = [t for t in found if t >= 0]
    return [t for t in found if math.isfinite(t)]


def brute_force(given_figures, limits, now, key):
    """Judge everything: how many fire, whose verdict changes, and the verdicts."""
    fires = changes = 0
    verdicts = []
    for one, before in zip(given_figures, now, strict=True):
        diagnostics = evaluate(one, limits)
        if key is not None:
            fires += {d.key: d for d in diagnostics}[key].fired
        verdicts.append(verdict_of(diagnostics))
        changes += verdicts[-1] != before
    trust, short = verdicts.count("trustworthy"), verdicts.count("not enough data")
    return fires, changes, trust, len(verdicts) - trust - short, short


@given(st.lists(any_figures(), max_size=6))
@settings(max_examples=14, deadline=None)
def test_every_threshold_counts_what_judging_anew_counts(given_figures):
    result = scanned(given_figures)
    now = [verdict_of(evaluate(one)) for one in given_figures]
    for sweep in sweep_thresholds(result)[:4]:
        for threshold in around(sweep):
            limits = dataclasses.replace(LIMITS, **{sweep.field: threshold})
            found = sweep.at(threshold)
            counted = (found.fires, found.changes, found.trustworthy, found.walk_back)
            assert (*counted, found.not_enough_data) == brute_force(
                given_figures, limits, now, KEYS[sweep.field]
            ), (sweep.field, threshold)
    batches = sweep_thresholds(result)[4]
    for threshold in range(2, 14):
        limits = dataclasses.replace(LIMITS, min_batches=threshold)
        found = batches.at(threshold)
        counted = (found.changes, found.trustworthy, found.walk_back, found.not_enough_data)
        assert counted == brute_force(given_figures, limits, now, None)[1:]


def test_the_papers_gap():
    """Healthy growth up to 11.0, degenerate from 694 on; ‖g_L‖ from 1.02e-4, up to 4.2e-9."""
    result = scanned(
        [
            *(figures(growth=g, grad=b) for g, b in ((1.3, 3e-4), (11.0, 1.02e-4))),
            *(figures(growth=g, grad=b) for g, b in ((694, 4.2e-9), (7788, 1e-9))),
        ]
    )
    growth, floor = sweep_thresholds(result)[:2]
    assert (growth.gap.low, growth.gap.high) == (11.0, pytest.approx(694))
    assert growth.gap.width == pytest.approx(694 / 11)
    assert (growth.evaluated, growth.fires, growth.always) == (4, 2, 0)
    assert growth.widest == growth.gap
    assert (floor.gap.low, floor.gap.high) == (4.2e-9, 1.02e-4)
    assert "gap around the threshold: 11 to 694 (a factor of 63.1)" in str(growth)
    assert growth.at(300).changes == 0
    assert growth.at(1000).changes == 1


def test_non_finite_states_fire_at_any_threshold():
    result = scanned([figures(growth=math.nan), figures(growth=2)])
    growth = sweep_thresholds(result)[0]
    assert (growth.always, growth.at(1e300).fires) == (1, 1)
    assert "1 of them at any threshold (not finite)" in str(growth)
    json.dumps(growth.to_dict(), allow_nan=False)


def test_one_side_empty_or_nothing_at_all():
    assert sweep_thresholds(scanned([figures(growth=2)]))[0].gap is None
    assert "no gap" in str(sweep_thresholds(scanned([figures(growth=2)]))[0])
    empty = sweep_thresholds(scanned([]))
    assert all(sweep.evaluated == 0 for sweep in empty)
    assert "0 of 0 checkpoints do" in str(empty[0])


def test_only_the_last_checkpoint_of_each_run():
    result = scanned([figures(stability=0.9), figures(stability=0.1)], run="r")
    assert sweep_thresholds(result)[2].fires == 1
    assert sweep_thresholds(result, last=True)[2].evaluated == 1
    assert sweep_thresholds(result, last=True)[2].fires == 0


def test_the_credit_gain_is_in_no_verdict():
    gain = sweep_thresholds(scanned([figures(grad=1e-9), figures()]))[5]
    assert (gain.fires, gain.evaluated) == (1, 2)
    assert all(interval.changes == 0 for interval in gain.intervals)
