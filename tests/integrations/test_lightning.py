"""The Lightning callback under the real Trainer."""

import logging
import sys
import warnings

import pytest
import torch
from callbacks import TAPS, Breaking, first_norms, task
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is absent")

from fadiag_fast.integrations import lightning as integration  # noqa: E402
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


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_that_training_step_leaves_out(tmp_path, accumulate):
    class Choosy(Module):
        def training_step(self, batch, index):
            return None if index in (0, 2, 3) else super().training_step(batch, index)

    seen = []
    callback = FadiagCallback(TAPS, sinks=seen.append)
    trainer = fit(
        callback, Choosy(Breaking()), tmp_path, samples=96, accumulate_grad_batches=accumulate
    )
    steps = {1: [(1, 1), (4, 1), (5, 1)], 2: [(0, 1), (2, 2)]}[accumulate]
    assert [(one.step, one.micro_batches) for one in seen] == steps
    assert trainer.global_step == 6 // accumulate


def two_nets(inputs, outputs):
    return nn.Sequential(*[nn.Linear(inputs, inputs) for _ in range(3)], nn.Linear(inputs, outputs))


class Adversaries(lightning.LightningModule):
    """Two networks of which one is trained through the other; each has its optimiser."""

    def __init__(self, together):
        super().__init__()
        torch.manual_seed(0)
        self.gen, self.disc = two_nets(20, 20), two_nets(20, 1)
        self.together, self.automatic_optimization = together, False
        self.norms = {"gen": [], "disc": []}

    def forwards(self, module, x):
        """Note the norms of a module's first state and of its gradient, of each forward."""

        def note(_, args, out):
            found = [out.detach().norm(dim=1)]
            out.register_hook(lambda gradient: found.append(gradient.norm(dim=1)))
            self.norms[module].append(found)

        net = getattr(self, module)
        handle = net[0].register_forward_hook(note)
        out = net(x)
        handle.remove()
        return out

    def training_step(self, batch, index):
        softplus, (g, d), x = nn.functional.softplus, self.optimizers(), batch[0]
        fake = self.forwards("gen", x)
        of_d = softplus(-self.forwards("disc", x)).mean()
        of_d = of_d + softplus(self.forwards("disc", fake.detach())).mean()
        if self.together:
            self.manual_backward(of_d + softplus(-self.forwards("disc", fake)).mean())
            d.step()
            g.step()
        else:
            d.zero_grad()
            self.manual_backward(of_d)
            d.step()
            g.zero_grad()
            self.manual_backward(softplus(-self.forwards("disc", fake)).mean())
            g.step()
        g.zero_grad()
        d.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), 0.01) for net in (self.gen, self.disc)]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("which", ["gen", "disc"])
def test_the_steps_of_the_probed_networks_own_optimiser(tmp_path, which, together):
    module, seen = Adversaries(together), []
    callback = FadiagCallback(model=which, sinks=seen.append, loggers=False, alarms=False)
    fit(callback, module, tmp_path, samples=64, limit_val_batches=0)
    # The discriminator's states, of real and of fake samples; those in which the generator learns
    # through it belong to the generator's step, if that has a backward pass of its own.
    per_step = 1 if which == "gen" else 3
    own = 2 if which == "disc" and not together else per_step
    assert [(one.step, one.micro_batches) for one in seen] == [(i, own) for i in range(4)]
    # Without the probe's own look at the network.
    norms = [of_pass for of_pass in module.norms[which] if len(of_pass) == 2]
    for step, record in enumerate(seen):
        parts = norms[step * per_step :][:own]
        hidden, gradients = (torch.cat(norms) for norms in zip(*parts, strict=True))
        assert record.hidden_norms[0] == pytest.approx(float(hidden.median()), rel=1e-5)
        assert record.grad_norms[0] == pytest.approx(float(gradients.median()), rel=1e-5)


def test_two_optimisers_of_one_network_make_one_step(tmp_path):
    class Both(Module):
        def __init__(self, net):
            super().__init__(net)
            self.automatic_optimization = False

        def training_step(self, batch, index):
            self.manual_backward(super().training_step(batch, index))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            matrices = [p for p in self.parameters() if p.dim() > 1]
            vectors = [p for p in self.parameters() if p.dim() < 2]
            return [torch.optim.SGD(matrices, 0.01), torch.optim.Adam(vectors)]

    seen = []
    fit(FadiagCallback(TAPS, sinks=seen.append), Both(Breaking()), tmp_path, samples=64)
    assert [(one.step, one.micro_batches) for one in seen] == [(i, 1) for i in range(4)]


def test_closures_that_are_called_several_times(tmp_path):
    class Newton(Module):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), max_iter=3)

    seen = []
    fit(FadiagCallback(TAPS, sinks=seen.append), Newton(Breaking()), tmp_path, samples=32)
    assert len(seen) >= 2
    assert {(one.micro_batches, one.num_samples) for one in seen} == {(1, 16)}


def test_the_library_under_its_other_name(tmp_path):
    """``lightning.pytorch`` has classes of its own beside those of ``pytorch_lightning``."""
    other = pytest.importorskip("lightning.pytorch", reason="lightning is absent")

    class Other(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Breaking()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    seen = []
    x, y = task(64)
    trainer = other.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[FadiagCallback(TAPS, sinks=seen.append)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Other(), DataLoader(TensorDataset(x, y), batch_size=16))
    assert [one.step for one in seen] == list(range(4))


def test_the_callback_is_of_the_package_that_the_caller_has_imported(monkeypatch):
    for imported, other in (integration._PACKAGES, integration._PACKAGES[::-1]):
        monkeypatch.setitem(sys.modules, imported, object())
        monkeypatch.delitem(sys.modules, other, raising=False)
        assert integration._package() == imported


def test_the_example_runs(tmp_path):
    from examples import lightning_callback

    lightning_callback.main(6, str(tmp_path / "steps.jsonl"))
    records = read_jsonlines(tmp_path / "steps.jsonl").records
    assert [(one.step, one.num_samples) for one in records] == [(i, 64) for i in range(6)]
