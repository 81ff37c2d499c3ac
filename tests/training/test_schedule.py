"""Schedules against counts by hand, and a budget against a simulated clock."""

import math
import random

import pytest

from fadiag_fast.training.schedule import Budget, EveryN, EveryStep, Logarithmic, as_schedule


def wanted(schedule, steps):
    return [step for step in range(steps) if schedule.wants(step)]


def test_every_step_and_every_nth():
    assert wanted(EveryStep(), 5) == [0, 1, 2, 3, 4]
    assert wanted(EveryN(3), 10) == [0, 3, 6, 9]


@pytest.mark.parametrize("per_decade", [1, 3, 10, 20, 50])
def test_logarithmic_probes_the_rounded_powers_and_no_others(per_decade):
    powers = {round(10 ** (i / per_decade)) for i in range(5 * per_decade)}
    found = wanted(Logarithmic(per_decade), 20_000)
    assert found == sorted({0, *(p for p in powers if p < 20_000)})


@pytest.mark.parametrize(
    ("probe", "share"), [(1e-3, 0.01), (5e-5, 0.01), (2e-2, 0.05), (1e-3, 0.5)]
)
def test_a_budget_keeps_its_share_and_uses_it(probe, share):
    chance = random.Random(0)
    budget, spent, total, probed = Budget(share), 0.0, 0.0, 0
    for step in range(20_000):
        cost = probe * chance.uniform(0.8, 1.2) if budget.wants(step) else 0.0
        seconds = 1e-2 * chance.uniform(0.9, 1.1) + cost
        budget.note(step, cost, seconds)
        spent, total, probed = spent + cost, total + seconds, probed + (cost > 0)
    assert spent <= share * total * 1.02
    # As many as fit, within a tenth: every step where the probe costs less than its share.
    fitting = min(20_000, share * total / probe)
    assert probed > 0.9 * fitting
    assert budget.overhead == pytest.approx(spent / total, rel=1e-6)


def test_a_budget_adapts_when_the_probe_becomes_dear_and_pays_a_slow_start_back():
    budget = Budget(0.01, at_most=None)
    spent = total = 0.0
    gaps, last = {"cheap": [], "dear": []}, None
    for step in range(30_000):
        kind = "cheap" if step < 15_000 else "dear"
        cost = 0.0
        if budget.wants(step):
            cost = 0.5 if step == 0 else 1e-4 if kind == "cheap" else 1e-2
            if last is not None:
                gaps[kind].append(step - last)
            last = step
        budget.note(step, cost, 1e-2 + cost)
        spent, total = spent + cost, total + 1e-2 + cost
    assert spent <= 0.0101 * total
    # The compilation of half a second needs 50 s of training before the next probe.
    assert gaps["cheap"][0] >= 4_900
    assert gaps["cheap"][-1] == 1
    assert gaps["dear"][-1] >= 50


def test_a_budget_probes_at_least_every_so_many_steps():
    budget = Budget(1e-6, at_most=70)
    probed = []
    for step in range(300):
        cost = 1.0 if budget.wants(step) else 0.0
        if cost:
            probed.append(step)
        budget.note(step, cost, 1.0 + cost)
    assert probed == [0, 70, 140, 210, 280]


def test_a_budget_that_hears_of_probed_steps_only_counts_the_steps_between():
    budget, probed = Budget(0.01, at_most=None), 0
    for step in range(10_000):
        if budget.wants(step):
            probed += 1
            budget.note(step, 1e-3, 1e-2 + 1e-3)
    assert probed == pytest.approx(10_000 * 0.01 * 1e-2 / 1e-3, rel=0.05)


def test_short_forms():
    assert isinstance(as_schedule("every"), EveryStep)
    assert isinstance(as_schedule(None), EveryStep)
    assert isinstance(as_schedule("log"), Logarithmic)
    assert as_schedule(7).n == 7
    assert as_schedule(0.02).max_overhead == 0.02
    own = Budget()
    assert as_schedule(own) is own


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("sometimes", ValueError),
        (0, ValueError),
        (-2, ValueError),
        (1.5, ValueError),
        (math.nan, ValueError),
        (True, TypeError),
        ([1], TypeError),
        (EveryStep, TypeError),
    ],
)
def test_what_is_no_schedule_is_refused(value, error):
    with pytest.raises(error, match=r"expected .*got"):
        as_schedule(value)


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"max_overhead: expected a share in \(0, 1\], got 0"):
        Budget(0)
    with pytest.raises(ValueError, match="at_most: expected at least 1, got 0"):
        Budget(at_most=0)
    with pytest.raises(TypeError, match=r"per_decade: expected a whole number, got 2\.5"):
        Logarithmic(2.5)
