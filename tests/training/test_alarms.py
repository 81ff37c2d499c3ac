"""Alarms: what fires and what must not, on series by hand and on real tiny trainings."""

import dataclasses
import json
import logging
import math
import random
import warnings

import numpy as np
import pytest
import torch
from recorder import healthy_settings, training
from records import LAYERS, healthy, noisy, record

from fadiag_fast.protocol import DiagnosticThresholds
from fadiag_fast.training.alarms import (
    Alarm,
    AlarmPolicy,
    Alarms,
    AlarmWarning,
    AllClear,
    TrainingStopped,
    event_from_dict,
    judge_series,
)
from fadiag_fast.training.alarms.baseline import Baseline


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Nets this small are many times slower on several threads of a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quiet(**policy):
    return Alarms(AlarmPolicy(**policy), actions=())


def fed(alarms, records):
    return [event for one in records if (event := alarms(one)) is not None]


def test_a_gain_that_is_always_zero_is_judged_in_silence():
    """Of a block above whose output a head of zeros lets no gradient pass."""
    alarms = quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one in healthy(400):
            gains = (0.0, *one.credit_gains[1:])
            assert alarms(dataclasses.replace(one, credit_gains=gains)) is None


# -- real trainings


def explosion(seed):
    """A training, the step before which a block breaks, and the block's name."""
    chance = random.Random(1000 + seed)
    model = ("mlp", "transformer", "transformer-post")[seed % 3]
    at, broken = chance.randrange(80, 250), chance.randrange(3)
    factor = (10, 100, 1000, 30)[seed % 4]

    def spoil(step, network):
        if step == at:
            with torch.no_grad():
                for parameter in network.blocks[broken].parameters():
                    parameter.mul_(factor)

    records = training(
        seed,
        model=model,
        optimiser=("adamw", "sgd", "momentum", "adam", "rmsprop")[seed % 5],
        schedule=("constant", "warm-up and cosine", "steps")[(seed // 2) % 3],
        lr=(1e-3, 3e-4, 3e-3)[(seed // 3) % 3],
        pool=(None, 256)[seed % 2],
        steps=at + 4,
        spoil=spoil,
    )
    return records, at, f"blocks.{broken}"


def check_explosion(seed):
    records, at, layer = explosion(seed)
    alarms = quiet()
    fired = next(event for one in records if (event := alarms(one)) is not None)
    assert isinstance(fired, Alarm)
    assert (fired.layer, fired.step, fired.last_healthy_step) == (layer, at, at - 1)
    assert at <= fired.reported_at < at + 3


@pytest.mark.parametrize("seed", range(4))
def test_an_explosion_is_reported_with_its_layer_within_three_steps(seed):
    check_explosion(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 24))
def test_explosions_of_twenty_more_seeds(seed):
    check_explosion(seed)


@pytest.mark.parametrize("setting", healthy_settings(3, 300), ids=lambda s: s["model"])
def test_a_healthy_training_raises_no_alarm(setting):
    assert judge_series(training(**{**setting, "steps": 400})) == []


@pytest.mark.slow
@pytest.mark.parametrize("setting", healthy_settings(20, 500), ids=lambda s: str(s["seed"]))
def test_twenty_healthy_trainings_of_2000_steps_raise_no_alarm(setting):
    assert judge_series(training(**setting)) == []


# -- the baseline


@pytest.mark.parametrize("layer", range(4))
def test_a_jump_is_dated_and_placed_with_its_evidence(layer):
    past = healthy(150)
    chance = random.Random(1)
    hidden = [h * (1 if l < layer else 5) for l, h in enumerate((8.0, 9.0, 10.0, 11.0))]
    broken = [noisy(150 + i, chance, hidden) for i in range(3)]
    alarms = quiet()
    events = fed(alarms, [*past, *broken])
    (alarm,) = events
    assert (alarm.layer, alarm.rule, alarm.figure) == (LAYERS[layer], "baseline", "hidden_norm")
    assert (alarm.step, alarm.reported_at, alarm.last_healthy_step) == (150, 151, 149)
    assert alarm.value == pytest.approx(broken[0].hidden_norms[layer])
    # The baseline by numpy, of the past after the warm-up; it is computed anew every 10 records.
    logs = np.log([one.hidden_norms[layer] for one in past[20:150]])
    assert alarm.baseline_median == pytest.approx(np.exp(np.median(logs)), rel=0.01)
    mad = np.median(np.abs(logs - np.median(logs)))
    assert alarm.baseline_mad == pytest.approx(mad, rel=0.1)
    limit = max(8 * 1.4826 * alarm.baseline_mad, math.log(1.3))
    assert alarm.threshold == pytest.approx(alarm.baseline_median * math.exp(limit))
    assert f"step 150, {LAYERS[layer]}" in alarm.sentence
    assert "the last step at which all was well is 149" in alarm.sentence
    assert alarms.active == (alarm,)


def test_a_credit_gain_that_breaks_down_is_reported_where_the_gradient_was_lost():
    chance = random.Random(1)
    # A gradient flows from the head down: what is lost at blocks.1 is lost below it too.
    gains = (5e-4, 5e-4, 4e-4, 0.4)
    events = judge_series([*healthy(150), *(noisy(150 + i, chance, gains=gains) for i in range(3))])
    assert [(e.layer, e.figure, e.step) for e in events] == [("blocks.1", "credit_gain", 150)]


def test_one_wild_record_is_no_alarm_and_stays_out_of_the_baseline():
    chance = random.Random(1)
    alarms = quiet()
    fed(alarms, healthy(150))
    for start in range(150, 750, 10):
        wild = record(start, [800.0, 900.0, 1000.0, 1100.0])
        rest = [noisy(start + i, chance) for i in range(1, 10)]
        assert fed(alarms, [wild, *rest]) == []
    # 60 of 600 were wild: had they been taken in, a factor of 2 would hide among them.
    double = [noisy(750 + i, chance, (8.0, 9.0, 20.0, 22.0)) for i in range(2)]
    assert [event.layer for event in fed(alarms, double)] == ["blocks.1"]


@pytest.mark.parametrize(
    "course",
    [
        lambda s: math.exp(s / 300),  # e-fold every 300 steps
        lambda s: math.exp(-s / 300),
        lambda s: 1 + s / 50,
        lambda s: math.exp(2 * math.sin(s / 100)),
        lambda s: 1.0 if s < 600 else math.exp((s - 600) / 400),  # flat, then it sets off
        lambda s: math.exp(min(s, 600) / 200),  # rises, then stays
        lambda s: 1.0 if s < 600 else 1.1,
    ],
)
def test_slow_courses_and_small_steps_are_healthy(course):
    chance = random.Random(3)
    series = [
        noisy(s, chance, [h * course(s) for h in (8, 9, 10, 11)], [g / course(s) for g in (1,) * 4])
        for s in range(2000)
    ]
    assert judge_series(series) == []


def test_a_task_that_gets_solved_is_healthy_by_gain_and_at_the_floor_of_the_paper():
    series = [
        record(s, grad_norms=(1e-4 * 0.98**s,) * 4, output_grad_norm=2e-4 * 0.98**s)
        for s in range(600)
    ]
    assert judge_series(series) == []
    (alarm,) = judge_series(series, AlarmPolicy(floor="paper"))
    assert (alarm.rule, alarm.figure) == ("gradient floor", "grad_norm")
    # 1e-4 · 0.98^s < 1e-7 from s = ln(1000) / -ln(0.98) on.
    assert alarm.step == math.ceil(math.log(1000) / -math.log(0.98))
    assert alarm.threshold == 1e-7


# -- the protocol's limits


def test_growth_beyond_its_limit_is_reported_at_the_layer_it_leads_to():
    series = [record(s, (1.0, 1.0 + s, 2.0 + s, 2.0 + s)) for s in range(100)]
    events = judge_series(series, AlarmPolicy(jump=1e3, far=1e6))
    (alarm,) = [event for event in events if event.rule == "scale growth"]
    # 1 + s > 50 from 50 on.
    assert (alarm.step, alarm.reported_at, alarm.layer) == (50, 51, "blocks.0")
    assert (alarm.value, alarm.threshold) == (51.0, 50.0)
    loose = AlarmPolicy(jump=1e3, far=1e6, thresholds=DiagnosticThresholds(scale_growth=1e3))
    assert judge_series(series, loose) == []


@pytest.mark.parametrize(
    ("stability", "word"), [(0.9, "drift"), (-0.01, "noise"), (math.nan, None)]
)
def test_the_floor_says_whether_what_is_left_drifts_or_is_noise(stability, word):
    gains = (1e-6, 1e-6, 1e-6, 1.2e-5)
    series = [record(s, gains=gains, stabilities=(stability,) * 4) for s in range(40)]
    (alarm,) = judge_series(series)
    assert (alarm.rule, alarm.layer, alarm.threshold) == ("gradient floor", "blocks.2", 1.28e-5)
    assert [w for w in ("drift", "noise") if w in alarm.sentence] == ([word] if word else [])
    # High stability alone is no alarm.
    assert judge_series([record(s, stabilities=(0.99,) * 4) for s in range(40)]) == []


def test_the_warm_up_is_not_judged_but_for_infinities():
    wild = [record(s, (1.0, 100.0 * (s + 1), 1e6, 1e6)) for s in range(20)]
    assert judge_series([*wild, *healthy(300, start=20)]) == []
    (alarm,) = judge_series([record(0, (1.0, math.inf, math.nan, math.nan))])
    assert (alarm.rule, alarm.layer, alarm.step) == ("non-finite", "blocks.0", 0)
    assert alarm.last_healthy_step is None
    assert "no step before was judged healthy" in alarm.sentence


def test_a_gradient_that_is_not_finite_is_named_where_the_backward_pass_met_it_first():
    grads = (math.nan, math.nan, math.inf, 1e-3)
    (alarm,) = judge_series([*healthy(30), record(30, grad_norms=grads)])
    assert (alarm.layer, alarm.figure, alarm.last_healthy_step) == ("blocks.1", "grad_norm", 29)


def test_skipped_steps_and_unreached_states_are_not_judged():
    chance = random.Random(1)
    bad = {"hidden_norms": (math.inf,) * 4, "grad_norms": (math.nan,) * 4}
    series = healthy(100)
    for step in range(100, 400):
        if step % 3 == 0:
            series.append(record(step, skipped=True, **bad))
        elif step % 3 == 1:
            missing = noisy(step, chance, (8.0, 9.0, math.nan, 11.0), (0.5, 0.5, math.nan, 0.4))
            series.append(
                record(
                    step,
                    missing.hidden_norms,
                    missing.credit_gains,
                    unreached=("blocks.1",),
                )
            )
        else:
            series.append(noisy(step, chance))
    alarms = quiet()
    assert fed(alarms, series) == []
    assert alarms.last_healthy_step == 398
    # And the layers that were reached are still judged.
    broken = [
        record(400 + i, (8.0, 90.0, math.nan, 110.0), unreached=("blocks.1",)) for i in range(2)
    ]
    assert [event.layer for event in fed(alarms, broken)] == ["blocks.0"]


@pytest.mark.parametrize("seed", range(6))
def test_records_that_wait_change_nothing(seed, monkeypatch):
    """What all of a quiet run is compared with is no looser than what each record would be."""
    chance = random.Random(seed)
    drift, records = 0.0, []
    for step in range(400):
        drift += chance.gauss(0, 0.03)
        jump = chance.choice((0.3, 0.6, -1.0)) if chance.random() < 0.02 else 0.0
        hidden = [h * math.exp(drift + jump) for h in (8.0, 9.0, 10.0, 11.0)]
        records.append(noisy(step, chance, hidden))

    def judged():
        alarms = Alarms(AlarmPolicy(fires=1, among=2, deviations=3.0), actions=())
        return [(alarms(one), alarms.last_healthy_step) for one in records], alarms.events

    waiting, events = judged()
    monkeypatch.setattr(Baseline, "_bound_lasting", lambda _: None)
    assert (waiting, events) == judged()
    assert events


def test_a_solved_batch_has_no_gain_to_judge():
    solved = {"gains": (math.nan,) * 4, "grad_norms": (0.0,) * 4, "output_grad_norm": 0.0}
    assert judge_series([*healthy(100), *(record(100 + i, **solved) for i in range(5))]) == []


# -- episodes


def test_a_cause_is_told_before_the_gradient_floor_that_follows_from_it():
    broken = [record(150 + i, (8.0, 9.0, 180.0, 190.0), (1e-6, 1e-6, 1e-6, 1e-6)) for i in range(2)]
    events = judge_series([*healthy(150), *broken])
    assert [(event.rule, event.layer) for event in events] == [
        ("baseline", "blocks.1"),
        ("gradient floor", "blocks.2"),
    ]
    # Beyond growth 50 the baseline adds nothing.
    broken = [record(150 + i, (8.0, 9.0, 900.0, 950.0)) for i in range(2)]
    assert [e.rule for e in judge_series([*healthy(150), *broken])] == ["scale growth"]


def test_an_episode_has_one_alarm_per_rule_and_ends_with_an_all_clear():
    chance = random.Random(1)
    broken = [noisy(150 + i, chance, (8.0, 9.0, 90.0, 99.0)) for i in range(40)]
    worse = [noisy(190 + i, chance, (8.0, 9.0, 900.0, 990.0)) for i in range(10)]
    alarms = quiet(clears=10)
    events = fed(alarms, [*healthy(150), *broken, *worse, *healthy(30, 5, start=200)])
    kinds = [event.rule if isinstance(event, Alarm) else "all clear" for event in events]
    assert kinds == ["baseline", "scale growth", "all clear"]
    clear = events[-1]
    assert (clear.step, clear.since, clear.alarms, clear.settled) == (209, 150, 2, False)
    assert alarms.active == ()
    # Both tell the same last healthy step; and a second episode is told anew.
    assert {event.last_healthy_step for event in events[:2]} == {149}
    again = fed(alarms, [noisy(230 + i, chance, (8.0, 90.0, 99.0, 99.0)) for i in range(3)])
    assert [(one.layer, one.step) for one in again] == [("blocks.0", 230)]


def test_an_episode_does_not_end_between_the_two_levels():
    chance = random.Random(1)
    # Beyond half the limit of 8 deviations (and of the jump), but not beyond the limit.
    alarms = quiet(clears=5, min_mad=0.05)
    fed(alarms, healthy(150))
    assert len(fed(alarms, [noisy(150 + i, chance, (80.0, 90.0, 100.0, 110.0)) for i in range(5)]))
    middling = [record(155 + i, [h * 1.6 for h in (8.0, 9.0, 10.0, 11.0)]) for i in range(50)]
    assert fed(alarms, middling) == []
    assert alarms.active
    assert [type(e) for e in fed(alarms, healthy(10, 3, start=205))] == [AllClear]


def test_a_level_that_stays_is_judged_anew():
    chance = random.Random(1)
    alarms = quiet(settles=100)
    fed(alarms, healthy(150))
    new = [noisy(150 + i, chance, (8.0, 9.0, 30.0, 33.0)) for i in range(300)]
    alarm, clear = fed(alarms, new)
    assert (alarm.step, clear.settled, alarms.active) == (150, True, ())
    assert alarms.last_healthy_step == 449
    back = fed(alarms, [noisy(450 + i, chance) for i in range(2)])
    assert [event.layer for event in back] == ["blocks.1"]


def test_other_hidden_states_begin_a_new_baseline():
    alarms = quiet()
    fed(alarms, healthy(150))
    other = [record(150 + i, (8e3,) * 4, layers=("a", "b", "c", "d")) for i in range(100)]
    assert fed(alarms, other) == []


def test_events_survive_json():
    alarms = quiet(clears=3)
    chance = random.Random(1)
    broken = [noisy(150 + i, chance, (8.0, math.inf, math.nan, 1.0)) for i in range(2)]
    events = fed(alarms, [*healthy(150), *broken, *healthy(9, start=152)])
    assert [type(event) for event in events] == [Alarm, AllClear]
    for event in events:
        back = event_from_dict(json.loads(json.dumps(event.to_dict(), allow_nan=False)))
        assert repr(back) == repr(event)
    with pytest.raises(ValueError, match="expected an alarm or an all clear, got 'siren'"):
        event_from_dict({"event": "siren"})
    with pytest.raises(ValueError, match="expected since, alarms"):
        event_from_dict({"event": "all clear", "step": 1, "settled": False, "sentence": ""})


# -- actions


def broken_run(start=0):
    return [*healthy(150, start=start), *(record(start + 150 + i, (80.0,) * 4) for i in range(9))]


def feed(alarms, records):
    for one in records:
        alarms(one)


def test_a_warning_comes_once_in_an_episode():
    with pytest.warns(AlarmWarning, match="baseline: step 150, embed") as seen:
        feed(Alarms(), broken_run())
    assert len(seen) == 1
    assert seen[0].filename == __file__


def test_the_log_has_alarm_and_all_clear(caplog):
    with caplog.at_level(logging.INFO, "fadiag_fast.training"):
        feed(Alarms(actions="log"), [*broken_run(), *healthy(30, start=159)])
    assert [one.levelname for one in caplog.records] == ["WARNING", "INFO"]
    assert "All clear at step" in caplog.messages[1]


def test_functions_and_checkpoints_are_called_before_the_training_stops():
    calls = []
    alarms = Alarms(
        actions=["stop", lambda alarm: calls.append(("mine", alarm.step)), "save"],
        save=lambda alarm: calls.append(("save", alarm.step)),
        on_event=lambda event: calls.append(("event", event.step)),
    )
    with pytest.raises(TrainingStopped, match=r"step 150, embed.*Training is stopped") as stopped:
        feed(alarms, broken_run())
    assert calls == [("event", 150), ("mine", 150), ("save", 150)]
    assert alarms.stop_requested
    assert stopped.value.alarm.reported_at == 151


def test_a_function_that_raises_is_left_out_after_one_warning():
    calls = []

    def broken(alarm):
        calls.append(alarm)
        raise OSError("no space left")

    alarms = Alarms(actions=[broken])
    with pytest.warns(AlarmWarning, match="no space left. It is not called again") as seen:
        feed(alarms, [*broken_run(), *healthy(30, start=159), *broken_run(start=189)])
    assert len([event for event in alarms.events if isinstance(event, Alarm)]) == 2
    assert (len(calls), len(seen)) == (1, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("warmup", -1),
        ("window", 49),
        ("min_window", 3),
        ("deviations", 0),
        ("deviations", math.nan),
        ("jump", 1.0),
        ("fires", 4),
        ("among", 0),
        ("clear_level", 0),
        ("settles", 3),
        ("floor", "gain"),
    ],
)
def test_limits_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"AlarmPolicy: {name}: expected .*, got"):
        AlarmPolicy(**{name: value})


def test_unknown_actions_are_refused():
    with pytest.raises(ValueError, match="expected the actions warn, log, stop, save or a fun"):
        Alarms(actions=["panic"])
    with pytest.raises(ValueError, match="expected save, a function, got None"):
        Alarms(actions=["save"])


def test_no_warning_of_numpy_escapes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        series = healthy(100)
        zeros = [record(100 + i, (0.0,) * 4, (0.0,) * 4) for i in range(60)]
        lost = [record(160 + i, (math.nan,) * 4, unreached=LAYERS) for i in range(60)]
        judge_series([*series, *zeros, *lost, record(220, (), (), layers=())])
