"""The Lightning callback under the real Trainer."""

import logging
import warnings

import pytest
import torch
from integrations import TAPS, Breaking, first_norms, task
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is absent")

from fadiag_fast.integrations.lightning import FadiagCallback  # noqa: E402
from fadiag_fast.training.alarms import Alarms, AlarmWarning  # noqa: E402
from fadiag_fast.training.sinks import read_jsonlines  # noqa: E402


class Module(lightning.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch, index):
        self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def fit(callback, module, tmp_path, samples=128, batch=16, **options):
    x, y = task(samples)
    loader = DataLoader(TensorDataset(x, y), batch_size=batch)
    trainer = lightning.Trainer(
        **{
            "max_epochs": 1,
            "accelerator": "cpu",
            "callbacks": [callback],
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            **options,
        }
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning|torch")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(module, loader, loader)
    return trainer


@pytest.mark.parametrize(("accumulate", "samples"), [(1, [16] * 8), (3, [48, 48, 32])])
def test_a_record_per_optimiser_step_over_all_its_micro_batches(tmp_path, accumulate, samples):
    net, path = Breaking(), tmp_path / "steps.jsonl"
    expected = first_norms(net, task(128)[0][: samples[0]])
    callback = FadiagCallback(TAPS, sinks=path)
    trainer = fit(callback, Module(net), tmp_path, accumulate_grad_batches=accumulate)
    records = read_jsonlines(path).records
    assert [one.step for one in records] == list(range(trainer.global_step))
    assert [one.num_samples for one in records] == samples
    assert records[0].hidden_norms == pytest.approx(expected, rel=1e-5)
    assert callback.session is None
    assert not net._forward_pre_hooks


def test_the_trainers_loggers_get_the_figures(tmp_path):
    class Logger(lightning.loggers.logger.DummyLogger):
        def __init__(self):
            super().__init__()
            self.got = []

        def log_metrics(self, metrics, step=None):
            if "fadiag/growth" in metrics:
                self.got.append((step, metrics["fadiag/hidden_norm/blocks.1"]))

    logger, path = Logger(), tmp_path / "steps.jsonl"
    fit(FadiagCallback(TAPS, sinks=path), Module(Breaking()), tmp_path, logger=logger)
    records = read_jsonlines(path).records
    assert logger.got == [(one.step, one.hidden_norms[2]) for one in records]
    assert len(logger.got) == 8


def test_an_alarm_stops_the_trainer_and_leaves_a_checkpoint(tmp_path):
    alarms = Alarms(actions=["warn", "stop"])
    callback = FadiagCallback(TAPS, alarms=alarms, save_on_alarm=True, ring=1)
    module = Module(Breaking(break_at=90))
    with pytest.warns(AlarmWarning, match=r"step 90, blocks\.1"):
        trainer = fit(callback, module, tmp_path, samples=16 * 200)
    assert 91 <= trainer.global_step < 110
    assert alarms.events[0].last_healthy_step == 89
    assert (tmp_path / "fadiag_alarm_step=90.ckpt").exists()


def test_a_second_fit_goes_on_counting_and_an_exception_leaves_no_hooks(tmp_path):
    net = Breaking()
    module = Module(net)
    x, y = task(64)
    seen = []
    callback = FadiagCallback(TAPS, sinks=[lambda record: seen.append(record.step)])
    trainer = fit(callback, module, tmp_path, samples=64)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=16))
    assert seen == list(range(8))

    class Failing(Module):
        def training_step(self, batch, index):
            if index == 2:
                raise ArithmeticError("mine")
            return super().training_step(batch, index)

    with pytest.raises(ArithmeticError, match="mine"):
        fit(callback, Failing(net), tmp_path)
    assert callback.session is None
    assert not net._forward_pre_hooks


def test_a_module_that_cannot_be_told_is_named(tmp_path):
    class Two(Module):
        def __init__(self):
            super().__init__(Breaking())
            self.other = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"one submodule with parameters, got net, other"):
        fit(FadiagCallback(TAPS), Two(), tmp_path)
    fit(FadiagCallback(TAPS, model="net"), Two(), tmp_path)


def test_the_example_runs(tmp_path):
    from examples import lightning_callback

    lightning_callback.main(6, str(tmp_path / "steps.jsonl"))
    records = read_jsonlines(tmp_path / "steps.jsonl").records
    assert [(one.step, one.num_samples) for one in records] == [(i, 64) for i in range(6)]
