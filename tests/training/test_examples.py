"""The example of a plain loop, from the probe to the alarm and the view."""

import pytest

pytest.importorskip("fadiag_fast.training.probe", reason="needs StepProbe")

from examples import plain_loop
from fadiag_fast.training.alarms import Alarm, AlarmWarning
from fadiag_fast.training.sinks import read_jsonlines


def test_the_broken_block_is_named_and_the_training_stopped(tmp_path):
    path = tmp_path / "steps.jsonl"
    with pytest.warns(AlarmWarning, match=r"blocks\.2"):
        plain_loop.main(200, str(path), break_at=100)
    log = read_jsonlines(path)
    (alarm,) = [event for event in log.events if isinstance(event, Alarm)]
    assert (alarm.step, alarm.last_healthy_step) == (100, 99)
    assert log.records[-1].step < 199
