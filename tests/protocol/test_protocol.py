"""The diagnostics on constructed figures: every outcome, at its limit and on either side."""

import math

import pytest

from fadiag_fast.protocol import (
    DiagnosticThresholds,
    Figures,
    Status,
    evaluate,
    explain_disagreement,
    growth_ratios,
    middle_layer,
    verdict_of,
)

LIMITS = DiagnosticThresholds()


def figures(norms=(10.0, 11.0, 12.0, 13.0, 14.0), **changes):
    count = len(norms)
    values = {
        "layers": ["embed", *(f"blocks.{l}" for l in range(count - 1))][:count],
        "residual_norms": list(norms),
        "bp_grad_norms": [1e-4] * count,
        "credit_gains": [0.4] * count,
        "output_grad_norm": 5e-3,
        "batch_size": 128,
        "stabilities": [0.1] * count,
        "num_directions": [10] * count,
        "num_batches": 10,
    }
    return Figures(**{**values, **changes})


def outcome(key, given, limits=LIMITS):
    return {d.key: d for d in evaluate(given, limits)}[key]


def test_a_healthy_network_is_trustworthy():
    diagnostics = evaluate(figures())
    assert [d.label for d in diagnostics] == ["OK", "OK", "OK", "not evaluated"]
    assert verdict_of(diagnostics) == "trustworthy"


def test_the_papers_dfa_run_needs_walk_back():
    """DFA, seed 123, of the reference table: ‖h_L‖ 4e8, ‖g_L‖ 4e-9, (c) .436, .306 to .349."""
    given = figures(
        (8.7, 6e3, 1e6, 4e7, 4e8),
        bp_grad_norms=[2e-1, 3e-4, 2e-6, 5e-8, 4e-9],
        stabilities=[0.436] * 5,
        headline_acc=0.306,
        frozen_baseline_acc=0.349,
    )
    diagnostics = evaluate(given)
    assert verdict_of(diagnostics) == "needs walk-back: (a)+(b)+(c)+(d)"
    assert [d.label for d in diagnostics] == ["EXPLODED", "AT FLOOR", "DRIFT", "UNDERCUT"]
    assert diagnostics[0].value == pytest.approx(6e3 / 8.7)
    assert diagnostics[0].layer == 1
    assert "blocks.0 takes the median norm from 8.7 to 6e+03" in diagnostics[0].evidence
    assert "drift" in diagnostics[1].evidence


def test_growth_is_the_largest_step_and_its_denominator_is_floored():
    assert growth_ratios([1.0, 2.0, 8.0]) == [2.0, 4.0]
    assert growth_ratios([0.0, 1e-29]) == [pytest.approx(10.0)]
    shrinking = outcome("a", figures((100.0, 50.0, 1.0)))
    assert (shrinking.value, shrinking.label) == (0.5, "OK")


@pytest.mark.parametrize(
    ("key", "at", "beyond"),
    [
        ("a", figures((1.0, 50.0)), figures((1.0, 50.1))),
        (
            "b",
            figures((1.0, 1.0), bp_grad_norms=[1, 1e-7]),
            figures((1.0, 1.0), bp_grad_norms=[1, 9e-8]),
        ),
        ("c", figures(stabilities=[9, 9, 0.30, 9, 9]), figures(stabilities=[0, 0, 0.301, 0, 0])),
        (
            "d",
            figures(headline_acc=0.35, frozen_baseline_acc=0.33),
            figures(headline_acc=0.3499, frozen_baseline_acc=0.33),
        ),
    ],
)
def test_each_fires_beyond_its_threshold_and_not_at_it(key, at, beyond):
    assert outcome(key, at).status is Status.PASSED
    assert outcome(key, beyond).fired
    assert verdict_of(evaluate(beyond)) == f"needs walk-back: ({key})"


def test_the_middle_layer_is_half_the_number_of_blocks():
    assert [middle_layer(blocks + 1) for blocks in (0, 1, 2, 3, 4, 12)] == [0, 0, 1, 1, 2, 6]


def test_thresholds_can_be_moved_and_are_checked():
    strict = DiagnosticThresholds(scale_growth=1.05, min_batches=2)
    assert outcome("a", figures(), strict).fired
    for bad in ({"scale_growth": -1.0}, {"gradient_floor": math.nan}, {"min_batches": 1}):
        (name,) = bad
        with pytest.raises(ValueError, match=f"DiagnosticThresholds: {name}: expected a finite"):
            DiagnosticThresholds(**bad)


@pytest.mark.parametrize("directions", [0, 1, 7])
def test_too_few_batches_are_never_a_pass(directions):
    value = math.nan if directions < 2 else 0.1
    given = figures(
        num_directions=[directions] * 5, num_batches=directions, stabilities=[value] * 5
    )
    stability = outcome("c", given)
    assert stability.status is Status.NOT_ENOUGH_DATA
    assert stability.label == "not enough data"
    assert f"over all pairs of {directions} batches" in stability.evidence
    assert verdict_of(evaluate(given)) == "not enough data"


def test_what_fired_decides_even_where_data_are_short():
    given = figures((1.0, 99.0), num_directions=[1, 1], num_batches=1, stabilities=[math.nan] * 2)
    assert verdict_of(evaluate(given)) == "needs walk-back: (a)"


def test_batches_without_a_direction_are_counted():
    given = figures(num_directions=[9] * 5)
    assert "1 more have no direction" in outcome("c", given).evidence
    assert outcome("c", given).status is Status.PASSED


def test_nothing_measured():
    empty = Figures((), (), (), (), math.nan, 0, (), (), 0)
    assert [d.status for d in evaluate(empty)[:3]] == [Status.NOT_ENOUGH_DATA] * 3
    assert verdict_of(evaluate(empty)) == "not enough data"


def test_one_hidden_state():
    growth = outcome("a", figures((5.0,)))
    assert (growth.value, growth.label) == (1.0, "OK")
    assert "fewer than two hidden states" in growth.evidence


@pytest.mark.parametrize(
    ("norms", "label", "layer"),
    [
        ((1.0, math.nan, math.nan), "NON-FINITE", 1),
        ((math.nan, math.nan, math.nan), "NON-FINITE", 0),
        ((math.inf, math.inf, math.inf), "NON-FINITE", 0),
        ((1.0, math.inf, math.nan), "EXPLODED", 1),
        ((1.0, 2.0, math.inf), "EXPLODED", 2),
    ],
)
def test_non_finite_states_fire(norms, label, layer):
    growth = outcome("a", figures(norms))
    assert (growth.fired, growth.label, growth.layer) == (True, label, layer)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_gradient_fires(value):
    floor = outcome("b", figures(bp_grad_norms=[1, 1, 1, 1, value]))
    assert (floor.fired, floor.label) == (True, "NON-FINITE")


def test_an_accuracy_that_is_missing_is_named():
    assert "no frozen-blocks accuracy" in outcome("d", figures(headline_acc=0.5)).evidence
    assert "no headline accuracy" in outcome("d", figures(frozen_baseline_acc=0.5)).evidence


def explanation(**changes):
    given = figures(**changes)
    return explain_disagreement(given, outcome("b", given), LIMITS)


def test_b_and_the_gain_agree_in_silence():
    assert explanation() is None
    assert explanation(bp_grad_norms=[1e-9] * 5, credit_gains=[1e-8] * 5) is None


def test_a_solved_task_is_told_from_a_dead_gradient():
    text = explanation(bp_grad_norms=[2e-8] * 5, output_grad_norm=5e-8)
    assert "(b) fires, but the credit gain" in text
    assert "a solved task" in text
    assert "divides by" not in text


def test_a_large_batch_is_told_from_a_dead_gradient():
    text = explanation(bp_grad_norms=[9e-8] * 5, output_grad_norm=2.2e-4, batch_size=4096)
    assert "divides by 4096 samples" in text
    assert "solved" not in text


def test_a_small_batch_does_not_hide_a_dead_gradient():
    text = explanation(
        bp_grad_norms=[5e-7] * 5, credit_gains=[1e-6] * 5, batch_size=2, output_grad_norm=0.5
    )
    assert "(b) passes, but the credit gain" in text
    assert "divides by 2 samples only" in text


def test_no_output_error_at_all():
    assert "solved to the last bit" in explanation(
        credit_gains=[math.nan] * 5, bp_grad_norms=[0.0] * 5
    )
