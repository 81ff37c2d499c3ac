"""The callback under transformers' real Trainer, which needs accelerate."""

import copy

import pytest
import torch
from callbacks import TAPS, Breaking, first_norms, task
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is absent")
pytest.importorskip("accelerate", reason="accelerate is absent")

from fadiag_fast import StepProbe  # noqa: E402
from fadiag_fast.integrations.huggingface import FadiagTrainerCallback  # noqa: E402
from fadiag_fast.training.alarms import Alarms, AlarmWarning  # noqa: E402
from fadiag_fast.training.sinks import read_jsonlines  # noqa: E402


class Classifier(nn.Module):
    """What Trainer expects of a model: keywords in, a loss and logits out."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer_of(net, tmp_path, samples=128, callbacks=None, evaluates=False, **options):
    x, y = task(samples)
    data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "trainer"),
        **{
            "num_train_epochs": 1,
            "per_device_train_batch_size": 16,
            "train_sampling_strategy": "sequential",
            "logging_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )
    return transformers.Trainer(
        Classifier(net),
        arguments,
        train_dataset=data,
        eval_dataset=data if evaluates else None,
        callbacks=callbacks,
    )


NAMES = [f"net.{name}" for name in TAPS]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_record_per_optimiser_step_over_all_its_micro_batches(tmp_path, accumulate):
    net, path = Breaking(), tmp_path / "steps.jsonl"
    expected = first_norms(net, task(128)[0][: 16 * accumulate])
    trainer = trainer_of(net, tmp_path, gradient_accumulation_steps=accumulate)
    FadiagTrainerCallback(NAMES, sinks=path).attach(trainer)
    trainer.train()
    records = read_jsonlines(path).records
    assert [one.step for one in records] == list(range(8 // accumulate))
    assert {one.num_samples for one in records} == {16 * accumulate}
    assert records[0].hidden_norms == pytest.approx(expected, rel=1e-5)
    assert not net._forward_pre_hooks


def test_figures_join_what_the_trainer_reports(tmp_path):
    reported = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    path = tmp_path / "steps.jsonl"
    trainer = trainer_of(Breaking(), tmp_path, callbacks=[Reporter()])
    FadiagTrainerCallback(NAMES, sinks=path, ring=1).attach(trainer)
    trainer.train()
    by_step = {one.step: one for one in read_jsonlines(path).records}
    found = [logs for logs in reported if "fadiag/step" in logs]
    assert len(found) >= 3
    for logs in found:
        record = by_step[logs["fadiag/step"]]
        assert logs["fadiag/grad_norm/net.blocks.1"] == record.grad_norms[2]
    kept = [logs["fadiag/step"] for logs in trainer.state.log_history if "fadiag/step" in logs]
    assert kept == [logs["fadiag/step"] for logs in found]


def test_an_alarm_stops_the_trainer_and_has_it_save(tmp_path):
    alarms = Alarms(actions=["warn", "stop"])
    trainer = trainer_of(Breaking(break_at=90), tmp_path, samples=16 * 150)
    FadiagTrainerCallback(NAMES, alarms=alarms, save_on_alarm=True, ring=1).attach(trainer)
    with pytest.warns(AlarmWarning, match=r"step 90, net\.blocks\.1"):
        trainer.train()
    assert 91 <= trainer.state.global_step < 110
    assert alarms.events[0].last_healthy_step == 89
    assert list((tmp_path / "trainer").glob("checkpoint-*"))


@pytest.mark.parametrize("attached", [True, False])
def test_a_model_that_the_trainer_compiles(tmp_path, attached):
    torch.compiler.reset()
    net, path = Breaking(), tmp_path / "steps.jsonl"
    expected = first_norms(net, task(32)[0][:16])
    callback = FadiagTrainerCallback(NAMES, sinks=path)
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "samples": 32}
    given = None if attached else [callback]
    trainer = trainer_of(net, tmp_path, callbacks=given, **options)
    if attached:
        callback.attach(trainer)
    trainer.train()
    records = read_jsonlines(path).records
    assert [(one.step, one.micro_batches, one.num_samples) for one in records] == [
        (0, 1, 16),
        (1, 1, 16),
    ]
    assert records[0].hidden_norms == pytest.approx(expected, rel=1e-5)
    torch.compiler.reset()


def test_evaluations_in_between_and_a_probe_in_the_arguments(tmp_path):
    net, seen = Breaking(), []
    trainer = trainer_of(
        net,
        tmp_path,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=2,
        evaluates=True,
    )
    callback = FadiagTrainerCallback(NAMES, sinks=seen.append).attach(trainer)
    trainer.args.probe = StepProbe(net, alarms=False)
    trainer.args.callback = callback
    trainer.train()
    trainer.args.probe.remove()
    assert [(one.step, one.num_samples) for one in seen] == [(step, 32) for step in range(4)]
    assert '"num_train_epochs": 1' in trainer.args.to_json_string()
    assert copy.deepcopy(trainer.args).probe is trainer.args.probe
    saved = torch.load(
        tmp_path / "trainer" / "checkpoint-2" / "training_args.bin", weights_only=False
    )
    assert not saved.probe
    assert saved.callback.session is None


def test_a_training_that_an_exception_ends_can_begin_again(tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    net, seen = Breaking(), []
    callback = FadiagTrainerCallback(NAMES, sinks=seen.append)
    trainer = trainer_of(net, tmp_path, callbacks=[callback, Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Stop)
    trainer.train()
    assert [one.step for one in seen] == [0, 1, *range(8)]
    assert {one.micro_batches for one in seen} == {1}
    assert not net._forward_pre_hooks


def test_the_example_runs(tmp_path):
    from examples import huggingface_trainer

    torch.manual_seed(0)
    trainer = huggingface_trainer.main(6, str(tmp_path / "steps.jsonl"))
    records = read_jsonlines(tmp_path / "steps.jsonl").records
    assert [one.step for one in records] == list(range(6))
    assert trainer.state.global_step == 6
