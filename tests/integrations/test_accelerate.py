"""The helper for accelerate, in a loop with the real Accelerator."""

import pytest
import torch
from callbacks import TAPS, Breaking, first_norms, task
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate", reason="accelerate is absent")

from fadiag_fast.integrations.accelerate import prepare_probe  # noqa: E402
from fadiag_fast.training.alarms import Alarms, TrainingStopped  # noqa: E402
from fadiag_fast.training.sinks import read_jsonlines  # noqa: E402


def run(net, samples=128, accumulate=1, log_with=None, **options):
    x, y = task(samples)
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, log_with=log_with
    )
    if log_with is not None:
        accelerator.init_trackers("test")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    steps = 0
    with prepare_probe(accelerator, model, TAPS, **options) as probe:
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
                probe.step()
                optimizer.step()
                optimizer.zero_grad()
                steps += accelerator.sync_gradients
    return steps


@pytest.mark.parametrize(("accumulate", "samples"), [(1, [16] * 8), (3, [48, 48, 32])])
def test_a_record_per_optimiser_step_over_all_its_micro_batches(tmp_path, accumulate, samples):
    net, path = Breaking(), tmp_path / "steps.jsonl"
    expected = first_norms(net, task(128)[0][: samples[0]])
    steps = run(net, accumulate=accumulate, sinks=path)
    records = read_jsonlines(path).records
    assert [one.step for one in records] == list(range(steps))
    assert [one.num_samples for one in records] == samples
    assert records[0].hidden_norms == pytest.approx(expected, rel=1e-5)
    assert not net._forward_pre_hooks


def test_trackers_get_the_figures(tmp_path):
    class Tracker(accelerate.tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "mine", False, None

        def __init__(self):
            super().__init__()
            self.got = []

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **kwargs):
            self.got.append((step, values["fadiag/hidden_norm/blocks.1"]))

    tracker, path = Tracker(), tmp_path / "steps.jsonl"
    run(Breaking(), sinks=path, log_with=tracker)
    assert tracker.got == [(one.step, one.hidden_norms[2]) for one in read_jsonlines(path).records]
    assert len(tracker.got) == 8


def test_an_alarm_stops_the_loop():
    alarms, net = Alarms(actions=["stop"]), Breaking(break_at=90)
    with pytest.raises(TrainingStopped, match=r"step 90, blocks\.1") as stopped:
        run(net, samples=16 * 150, alarms=alarms, ring=1)
    assert stopped.value.alarm.last_healthy_step == 89
    assert not net._forward_pre_hooks


def test_what_is_no_accelerator_is_refused():
    with pytest.raises(TypeError, match=r"expected an accelerate\.Accelerator, got Breaking"):
        prepare_probe(Breaking(), Breaking())


def test_the_examples_run(tmp_path):
    from examples import accelerate_loop

    accelerate_loop.main(6, str(tmp_path / "steps.jsonl"))
    records = read_jsonlines(tmp_path / "steps.jsonl").records
    assert [(one.step, one.num_samples) for one in records] == [(i, 64) for i in range(6)]
