"""Rules: where each of them changes sides, and what no threshold changes."""

import dataclasses
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_calibrated import figures

from fadiag_fast.protocol import DiagnosticThresholds, Status
from fadiag_fast.protocol.calibrated import CALIBRATED
from fadiag_fast.protocol.judging import PROTOCOLS, judge_figures, verdict_of
from fadiag_fast.protocol.paper import PAPER

RULES = [(protocol, rule) for protocol in (PAPER, CALIBRATED) for rule in protocol.rules]
ODD = st.sampled_from([0.0, 1e-30, 1.0, math.inf, math.nan])
SCALES = st.floats(1e-3, 1e4) | ODD


@st.composite
def any_figures(draw):
    """Mostly ordinary figures, with an accuracy or without, and now and then what breaks a rule."""
    states = draw(st.integers(0, 4))

    def several(element):
        return draw(st.lists(element, min_size=states, max_size=states))

    scales = draw(st.sampled_from([st.floats(0.1, 100), SCALES]))
    gains = draw(st.sampled_from([st.floats(1e-9, 2), SCALES]))
    accuracy = st.none() | st.floats(0, 1)
    found = figures(
        several(scales),
        bp_grad_norms=several(gains),
        credit_gains=several(gains),
        pooled_gains=several(gains),
        stabilities=several(st.floats(-1, 1) | st.just(math.nan)),
        num_directions=several(st.integers(6, 10)),
        headline_acc=draw(accuracy),
        frozen_baseline_acc=draw(accuracy),
        test_size=draw(st.sampled_from([None, 100, 10_000])),
        num_non_finite=draw(st.sampled_from([0, 0, 0, 900])),
    )
    return dataclasses.replace(
        found,
        sizes=draw(st.sampled_from([(), found.sizes])),
        stability_errors=draw(st.sampled_from([(), found.stability_errors])),
        pooled_norms=draw(st.sampled_from([(), found.pooled_norms])),
    )


def fires(protocol, rule, given_figures, threshold):
    """Whether the whole protocol says so at one threshold."""
    thresholds = dataclasses.replace(
        DiagnosticThresholds(min_batches=2), **{rule.threshold: threshold}
    )
    diagnostics = judge_figures(given_figures, thresholds, protocol.name)
    return {d.key: d for d in diagnostics}[rule.key].fired


@pytest.mark.parametrize(("protocol", "rule"), RULES, ids=lambda one: getattr(one, "name", None))
@given(given_figures=any_figures())
def test_a_rule_fires_just_beyond_its_critical_value_and_not_at_it(protocol, rule, given_figures):
    thresholds = DiagnosticThresholds(min_batches=2)
    critical = rule.critical_value(given_figures, thresholds)
    healthy = 1 if rule.comparison == ">" else -1  # the direction in which a threshold is laxer
    free = rule.threshold in ("direction_stability", "depth_utility")
    extremes = [0.0, 1e-12, 1.0, 1e12] + ([-1e12] if free else [])
    if critical is None:
        assert not any(fires(protocol, rule, given_figures, t) for t in extremes)
    elif math.isinf(critical):
        always = critical == rule.always
        assert {fires(protocol, rule, given_figures, t) for t in extremes} == {always}
    else:
        stricter = math.nextafter(critical, -healthy * math.inf)
        laxer = math.nextafter(critical, healthy * math.inf)
        assume(free or min(critical, stricter, laxer) >= 0)
        assert not fires(protocol, rule, given_figures, critical)
        assert not fires(protocol, rule, given_figures, laxer)
        assert fires(protocol, rule, given_figures, stricter)


@given(any_figures())
def test_the_verdict_names_the_decisive_diagnostics_that_fired(given_figures):
    for name in PROTOCOLS:
        diagnostics = judge_figures(given_figures, None, name)
        counted = [d for d in diagnostics if name == "paper" or d.key != "c"]
        fired = [f"({d.key})" for d in counted if d.status is Status.FIRED]
        if fired:
            expected = "needs walk-back: " + "+".join(fired)
        elif Status.NOT_ENOUGH_DATA in [d.status for d in counted]:
            expected = "not enough data"
        else:
            expected = "trustworthy"
        assert verdict_of(diagnostics, name) == expected
