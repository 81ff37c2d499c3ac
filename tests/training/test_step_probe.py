"""The training probe against ordinary autograd and diagnose, and what might trip it."""

import copy
import dataclasses
import gc
import math
import os
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from networks import Branching, Stateful, branch_states
from torch import nn
from torch.utils.checkpoint import checkpoint

from fadiag_fast import DiagnosticThresholds, StepProbe, TapError, diagnose
from fadiag_fast.training.alarms import Alarms, AlarmWarning, TrainingStopped
from fadiag_fast.training.records import StepRecord
from fadiag_fast.training.sinks import SinkWarning, read_jsonlines
from fadiag_fast.zoo import ResidualMLP


def batch_of(samples=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 5, generator=generator)
    return x, torch.randint(0, 4, (samples,), generator=generator)


def network(seed=0, **options):
    torch.manual_seed(seed)
    return Branching(**options)


def backward(model, x, y, scale=1.0):
    loss = nn.functional.cross_entropy(model(x), y) * scale
    loss.backward()
    return loss


def records_of(model, batches, **options):
    records = []
    with StepProbe(model, sink=records.append, **options) as probe:
        for x, y in batches:
            model.zero_grad()
            backward(model, x, y)
            probe.step()
    model.zero_grad()
    return records


def by_hand(model, x, y):
    """Medians of norms and the batch-sum gradients, in float64, by ordinary autograd."""
    model = copy.deepcopy(model).double()
    hiddens, logits = branch_states(model, x.double())
    loss = nn.functional.cross_entropy(logits, y)
    *grads, error = torch.autograd.grad(loss, [*hiddens, logits])
    errors = error.norm(dim=1)
    return (
        [float(h.detach().norm(dim=1).nanmedian()) for h in hiddens],
        [float(g.norm(dim=1).nanmedian()) for g in grads],
        [float((g.norm(dim=1) / errors).nanmedian()) for g in grads],
        [g.sum(0) for g in grads],
    )


MODES = pytest.mark.parametrize("mode", ["together", "passing"])


def test_a_record_has_all_fields_of_its_class_and_is_one_of_it():
    (record,) = records_of(network(), [batch_of()])
    assert list(vars(record)) == [field.name for field in dataclasses.fields(StepRecord)]
    assert StepRecord(**vars(record)).to_json() == record.to_json()
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.step = 3
    assert pickle.loads(pickle.dumps(record)).to_json() == record.to_json()


@MODES
def test_figures_are_those_of_ordinary_autograd(mode):
    model, (x, y) = network(), batch_of()
    hidden, grad, gain, _ = by_hand(model, x, y)
    (record,) = records_of(model, [(x, y)], mode=mode)
    assert record.layers == ("embed", "blocks.0", "blocks.1", "blocks.2")
    assert record.hidden_norms == pytest.approx(hidden, rel=1e-6)
    assert record.grad_norms == pytest.approx(grad, rel=1e-6)
    assert record.credit_gains == pytest.approx(gain, rel=1e-6)
    assert record.rms_norms == pytest.approx([h / math.sqrt(6) for h in hidden], rel=1e-6)
    assert (record.num_samples, record.micro_batches, record.unreached) == (12, 1, ())


@MODES
@pytest.mark.parametrize("reduction", ["flatten", "mean", "token", "cls"])
def test_figures_are_those_of_diagnose(mode, reduction):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(5, 8)
            self.blocks = nn.ModuleList(copy.deepcopy(layer) for _ in range(3))
            self.out_head = nn.Linear(8, 4)

        def forward(self, x):
            h = self.embed(x)
            for block in self.blocks:
                h = block(h)
            return self.out_head(h[:, 0])

    model, x, y = Tokens(), torch.randn(10, 3, 5), torch.randint(0, 4, (10,))
    (record,) = records_of(model, [(x, y)], mode=mode, reduction=reduction)
    report = diagnose(
        model, [(x, y)], reduction=reduction, thresholds=DiagnosticThresholds(min_batches=2)
    )
    assert record.layers == tuple(report.figures.layers)
    assert record.hidden_norms == pytest.approx(report.figures.residual_norms, rel=1e-6)
    assert record.grad_norms == pytest.approx(report.figures.bp_grad_norms, rel=1e-6)
    assert record.credit_gains == pytest.approx(report.figures.credit_gains, rel=1e-6)
    assert record.output_grad_norm == pytest.approx(report.figures.output_grad_norm, rel=1e-6)


@MODES
def test_only_the_first_samples_are_observed_where_so_many_are_asked_for(mode):
    model, (x, y) = network(), batch_of(12)
    model64 = copy.deepcopy(model).double()
    hiddens, logits = branch_states(model64, x.double())
    # Of the loss over all twelve.
    loss = nn.functional.cross_entropy(logits, y)
    *grads, error = (
        g[:5] for g in torch.autograd.grad(loss, [*hiddens, logits], retain_graph=True)
    )
    first, second, few = records_of(
        model,
        [(x, y), batch_of(12, seed=2), batch_of(3, seed=3)],
        mode=mode,
        samples=5,
        directions="all",
    )
    norms = [float(h[:5].detach().norm(dim=1).median()) for h in hiddens]
    assert first.hidden_norms == pytest.approx(norms, rel=1e-6)
    assert first.grad_norms == pytest.approx(
        [float(g.norm(dim=1).median()) for g in grads], rel=1e-6
    )
    assert first.output_grad_norm == pytest.approx(float(error.norm(dim=1).median()), rel=1e-6)
    gains = [float((g.norm(dim=1) / error.norm(dim=1)).median()) for g in grads]
    assert first.credit_gains == pytest.approx(gains, rel=1e-6)
    x2, y2 = batch_of(12, seed=2)
    hiddens2, logits2 = branch_states(model64, x2.double())
    others = torch.autograd.grad(nn.functional.cross_entropy(logits2, y2), hiddens2)
    for l, (mine, other) in enumerate(zip(grads, others, strict=True)):
        cosine = torch.cosine_similarity(mine.sum(0), other[:5].sum(0), dim=0, eps=0)
        assert second.stabilities[l] == pytest.approx(float(cosine), abs=1e-6)
    assert [record.num_samples for record in (first, second, few)] == [5, 5, 3]


@MODES
@pytest.mark.parametrize("reduction", ["flatten", "token"])
def test_the_first_samples_of_sequences(mode, reduction):
    """States [T, B, D] with logits [T·B, C]: positions of a sample stay together."""

    class Sequences(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(5, 8)
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.out_head = nn.Linear(8, 4)

        def forward(self, x):
            h = self.embed(x)
            for block in self.blocks:
                h = h + block(h).tanh()
            return self.out_head(h).flatten(0, 1)

    torch.manual_seed(0)
    model, x, y = Sequences(), torch.randn(3, 8, 5), torch.randint(0, 4, (24,))
    options = {"mode": mode, "reduction": reduction, "batch_dim": 1}
    (some,) = records_of(model, [(x, y)], samples=3, **options)
    # Samples do not meet in this network: the first three alone are the same, but for the mean.
    part = y.view(3, 8)[:, :3].reshape(-1)
    (alone,) = records_of(model, [(x[:, :3], part)], **options)
    assert some.num_samples == alone.num_samples == (9 if reduction == "token" else 3)
    assert some.hidden_norms == pytest.approx(alone.hidden_norms, rel=1e-6)
    assert some.grad_norms == pytest.approx([g * 3 / 8 for g in alone.grad_norms], rel=1e-6)
    assert some.credit_gains == pytest.approx(alone.credit_gains, rel=1e-6)


@MODES
def test_stability_is_the_mean_cosine_with_the_last_steps(mode):
    model = network()
    batches = [batch_of(seed=s) for s in range(6)]
    directions = [by_hand(model, x, y)[3] for x, y in batches]
    records = records_of(model, batches, window=3, decay=0.5, directions="all", mode=mode)
    for l in range(4):
        average = torch.zeros(6, dtype=torch.float64)
        for step, record in enumerate(records):
            now = directions[step][l]
            past = [directions[s][l] for s in range(max(0, step - 3), step)]
            cosines = [float(torch.cosine_similarity(now, p, dim=0, eps=0)) for p in past]
            assert record.num_directions == len(past)
            if past:
                assert record.stabilities[l] == pytest.approx(sum(cosines) / len(past), abs=1e-6)
                expected = float(torch.cosine_similarity(now, average, dim=0, eps=0))
                assert record.average_cosines[l] == pytest.approx(expected, abs=1e-6)
            else:
                assert math.isnan(record.stabilities[l])
            average = 0.5 * average + 0.5 * now / 12
    middle = records_of(model, batches, window=3, decay=0.5, mode=mode)
    assert middle[-1].stabilities[1] == pytest.approx(records[-1].stabilities[1], rel=1e-9)
    assert [math.isnan(s) for s in middle[-1].stabilities] == [True, False, True, True]


def trained(dtype, probed, mode, steps=200):
    torch.manual_seed(0)
    model = Stateful().to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    records = []
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == "scaled")
    probe = None
    if probed:
        options = {"scaler": scaler} if dtype == "scaled" else {}
        probe = StepProbe(model, sink=records.append, mode=mode, alarms=False, **options)
    narrow = torch.float16 if dtype == "scaled" else torch.bfloat16
    for step in range(steps):
        x, y = batch_of(seed=step)
        x = x.to(next(model.parameters()).dtype)
        with torch.autocast("cpu", narrow, enabled=dtype in ("autocast", "scaled")):
            logits = model(x)
        scaler.scale(nn.functional.cross_entropy(logits.float(), y)).backward()
        if probe is not None:
            probe.step()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    if probe is not None:
        probe.flush()  # the hooks stay
    return model, records


@MODES
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "autocast", "scaled"])
def test_training_is_bitwise_the_same(dtype, mode):
    """With BatchNorm, in-place ReLU, dropout and a buffer that counts calls."""
    probed, records = trained(dtype, True, mode)
    plain, _ = trained(dtype, False, mode)
    for (name, a), b in zip(probed.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert len(records) == 200
    narrow = {"autocast": "bfloat16", "scaled": "float16"}
    assert records[3].autocast == narrow.get(dtype)
    assert all(
        math.isfinite(norm)
        for r in records
        if not r.skipped
        for norm in (*r.hidden_norms, *r.grad_norms)
    )
    assert sum(r.skipped for r in records) < 20


@MODES
def test_a_state_that_is_overwritten_after_the_tap_is_seen_before(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 4))
    x, y = batch_of()
    (record,) = records_of(model, [(x, y)], taps=["0"], mode=mode)
    hidden = model[0](x).detach().requires_grad_()
    nn.functional.cross_entropy(model[2](hidden.relu()), y).backward()
    assert record.hidden_norms[0] == pytest.approx(float(hidden.norm(dim=1).median()), rel=1e-6)
    assert record.grad_norms[0] == pytest.approx(float(hidden.grad.norm(dim=1).median()), rel=1e-6)


# ---- what a step is made of


@MODES
def test_micro_batches_are_one_batch(mode):
    model, (x, y) = network(), batch_of(12)
    (whole,) = records_of(model, [(x, y)], mode=mode)
    records = []
    with StepProbe(model, sink=records.append, mode=mode) as probe:
        for part in (slice(0, 4), slice(4, 12)):
            share = len(x[part]) / len(x)
            backward(model, x[part], y[part], scale=share)
        probe.step()
    assert (records[0].micro_batches, records[0].num_samples) == (2, 12)
    assert records[0].hidden_norms == pytest.approx(whole.hidden_norms, rel=1e-6)
    assert records[0].grad_norms == pytest.approx(whole.grad_norms, rel=1e-6)


@MODES
def test_directions_of_micro_batches_are_summed(mode):
    model, (x, y), other = network(), batch_of(12), batch_of(12, seed=2)
    whole = records_of(model, [other, (x, y)], mode=mode)
    records = []
    with StepProbe(model, sink=records.append, mode=mode) as probe:
        backward(model, *other)
        probe.step()
        backward(model, x[:4], y[:4], scale=4 / 12)
        backward(model, x[4:], y[4:], scale=8 / 12)
        probe.step()
    assert records[1].stabilities[1] == pytest.approx(whole[1].stabilities[1], abs=1e-6)


@MODES
def test_several_forwards_before_one_backward_count_each(mode):
    model, (x, y) = network(), batch_of(12)
    records = []
    with StepProbe(model, sink=records.append, mode=mode) as probe:
        lost = model(x)  # never differentiated
        first = nn.functional.cross_entropy(model(x[:6]), y[:6])
        second = nn.functional.cross_entropy(model(x[6:]), y[6:])
        ((first + second) / 2).backward()
        probe.step()
        assert lost.requires_grad
    (whole,) = records_of(model, [(x, y)], mode=mode)
    assert (records[0].micro_batches, records[0].num_samples) == (2, 12)
    assert records[0].grad_norms == pytest.approx(whole.grad_norms, rel=1e-6)


@MODES
def test_two_backwards_are_two_micro_batches(mode):
    model, (x, y) = network(), batch_of(12)
    (once,) = records_of(model, [(x, y)], mode=mode)
    records = []
    with StepProbe(model, sink=records.append, mode=mode) as probe:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        loss.backward()
        probe.step()
        backward(model, x, y)
        probe.step()
    assert (records[0].micro_batches, records[0].num_samples) == (2, 24)
    assert records[0].grad_norms == pytest.approx(once.grad_norms, rel=1e-6)
    assert (records[1].micro_batches, records[1].num_samples) == (1, 12)


@MODES
def test_evaluation_in_between_is_not_seen(mode):
    model, (x, y) = network(), batch_of()
    (plain,) = records_of(model, [(x, y)], mode=mode)
    records = []
    with StepProbe(model, sink=records.append, mode=mode) as probe:
        for _ in range(2):
            backward(model, x, y)
            with torch.no_grad():
                model(2 * x)
            with torch.inference_mode():
                model(3 * x)
            model.eval()
            model(4 * x).sum().backward()
            model.train()
            probe.step()
            model.zero_grad()
    for record in records:
        assert record.grad_norms == plain.grad_norms
        assert record.num_samples == 12


class Checkpointed(Branching):
    reentrant = False

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = h + checkpoint(block, h, use_reentrant=self.reentrant)
        return self.out_head(self.out_ln(h))


class CheckpointedStates(Stateful):
    """Blocks return the state, so that it is an output inside of the checkpoint."""

    reentrant = False

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=self.reentrant) if self.again else block(h)
        return self.out_head(h)

    again = True


@MODES
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", [Checkpointed, CheckpointedStates])
def test_recomputed_forwards_are_not_counted(kind, reentrant, mode):
    torch.manual_seed(0)
    model, (x, y) = kind(), batch_of()
    model.reentrant = reentrant
    plain = copy.deepcopy(model)
    if kind is Checkpointed:
        plain.__class__ = Branching
    plain.again = False
    records = records_of(model, [(x, y)] * 2, mode=mode)
    expected = records_of(plain, [(x, y)] * 2, mode=mode)
    for got, wanted in zip(records, expected, strict=True):
        assert got.unreached == ()
        assert (got.micro_batches, got.num_samples) == (1, 12)
        assert got.hidden_norms == pytest.approx(wanted.hidden_norms, rel=1e-6)
        assert got.grad_norms == pytest.approx(wanted.grad_norms, rel=1e-6)
        assert got.credit_gains == pytest.approx(wanted.credit_gains, rel=1e-6)


@MODES
def test_a_scalers_factor_is_divided_out_and_overflow_marked(mode):
    model, (x, y) = network(), batch_of()
    (plain,) = records_of(model, [(x, y)], mode=mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    records = []
    with StepProbe(model, sink=records.append, scaler=scaler, mode=mode) as probe:
        for factor in (1.0, math.inf):
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), y) * factor).backward()
            probe.step()
            scaler.step(optimizer)
            scaler.update()
    assert [record.loss_scale for record in records] == [1024.0, 1024.0]
    assert [record.skipped for record in records] == [False, True]
    assert scaler.get_scale() == 512.0  # torch skipped the same step
    assert records[0].grad_norms == pytest.approx(plain.grad_norms, rel=1e-6)
    assert records[0].output_grad_norm == pytest.approx(plain.output_grad_norm, rel=1e-6)


class _Overflows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, math.inf)


class Overflowing(Branching):
    """The gradient of a weight may be infinite, and that of no state."""

    overflows = False

    def forward(self, x):
        weight = self.out_head.weight
        weight = _Overflows.apply(weight) if self.overflows else weight
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return nn.functional.linear(self.out_ln(h), weight, self.out_head.bias)


@pytest.mark.parametrize("schedule", ["every", 2])
@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("interval", [1, 2, 1000])
def test_steps_are_marked_skipped_exactly_when_the_scaler_skips_them(interval, unscaled, schedule):
    torch.manual_seed(0)
    model, (x, y) = Overflowing(), batch_of()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=interval)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    records, skipped = [], []
    probe = StepProbe(model, sink=records.append, scaler=scaler, schedule=schedule)
    for overflows in (False, True, True, False, True, False, False):
        model.overflows = overflows
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        probe.step()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped.append(scaler.get_scale() < before)
    probe.remove()
    assert skipped == [False, True, True, False, True, False, False]
    assert [record.skipped for record in records] == [skipped[r.step] for r in records]
    assert len(records) == (7 if schedule == "every" else 4)


def test_a_flush_before_the_scaler_is_updated_says_what_was_seen():
    torch.manual_seed(0)
    model, (x, y) = Overflowing(), batch_of()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    records = []
    with StepProbe(model, sink=records.append, scaler=scaler) as probe:
        for factor in (1.0, math.inf):
            scaler.scale(nn.functional.cross_entropy(model(x), y) * factor).backward()
            probe.step()
            probe.flush()
    assert [record.skipped for record in records] == [False, True]


def test_a_disabled_scaler_skips_nothing():
    model, (x, y) = network(), batch_of()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    records = []
    with StepProbe(model, sink=records.append, scaler=scaler, alarms=False) as probe:
        scaler.scale(nn.functional.cross_entropy(model(x), y) * math.inf).backward()
        probe.step()
    assert [(record.skipped, record.loss_scale) for record in records] == [(False, 1.0)]


def test_samples_without_output_error_have_no_gain():
    model, (x, y) = network(), batch_of()
    records = []
    with StepProbe(model, sink=records.append) as probe:
        y[:8] = -100
        nn.functional.cross_entropy(model(x), y).backward()
        probe.step()
    *_, gains, _ = by_hand(model, x[8:], y[8:])
    assert records[0].credit_gains == pytest.approx(gains, rel=1e-6)


def test_only_scheduled_steps_are_recorded():
    model = network()
    records = records_of(model, [batch_of(seed=s) for s in range(7)], schedule=3)
    assert [record.step for record in records] == [0, 3, 6]

    class Powers:
        def __init__(self):
            self.noted = []

        def wants(self, step):
            return step in (1, 2, 4)

        def note(self, step, probe_seconds, step_seconds):
            self.noted.append((step, 0 < probe_seconds < step_seconds))

    powers = Powers()
    records = records_of(model, [batch_of(seed=s) for s in range(7)], schedule=powers)
    assert [record.step for record in records] == [1, 2, 4]
    assert powers.noted == [(1, True), (2, True), (4, True)]


def test_unscheduled_steps_keep_nothing_and_do_not_complain():
    model = network()
    with StepProbe(model, schedule=2, example=batch_of()[0]) as probe:
        backward(model, *batch_of())
        probe.step()
        probe.step()  # nothing ran, nothing was asked for
        backward(model, *batch_of())
        probe.step()


# ---- bad input


def test_a_step_without_a_backward_says_so_and_the_next_is_right():
    model, (x, y) = network(), batch_of()
    (plain,) = records_of(model, [(x, y)])
    records = []
    with StepProbe(model, sink=records.append) as probe:
        with pytest.raises(RuntimeError, match="step 0: expected a backward pass"):
            probe.step()
        model(x)
        with pytest.raises(RuntimeError, match="step 1: expected a backward pass"):
            probe.step()
        backward(model, x, y)
        probe.step()
    assert [record.step for record in records] == [2]
    assert records[0].grad_norms == plain.grad_norms


@MODES
def test_a_state_that_is_not_reached_is_named(mode):
    class Skipping(Branching):
        skip = False

        def forward(self, x):
            h = self.embed(x)
            for index, block in enumerate(self.blocks):
                if not (self.skip and index == 1):
                    h = h + block(h)
            return self.out_head(self.out_ln(h))

    torch.manual_seed(0)
    model, (x, y) = Skipping(), batch_of()
    records = []
    probe = StepProbe(model, taps=["blocks.*"], sink=records.append, mode=mode, directions="all")
    for skip in (False, True, False):
        model.skip = skip
        backward(model, x, y)
        probe.step()
    probe.remove()
    assert [record.unreached for record in records] == [(), ("blocks.1",), ()]
    assert [math.isnan(norm) for norm in records[1].hidden_norms] == [False, True, False]
    assert [math.isnan(norm) for norm in records[1].grad_norms] == [False, True, False]
    assert records[2].hidden_norms == records[0].hidden_norms
    assert math.isnan(records[1].stabilities[1])
    assert not math.isnan(records[1].stabilities[2])


def test_a_frozen_part_has_norms_and_no_gradients():
    model, (x, y) = network(), batch_of()
    model.embed.requires_grad_(False)
    (record,) = records_of(model, [(x, y)])
    assert record.unreached == ("embed",)
    assert record.hidden_norms[0] > 0
    assert math.isnan(record.grad_norms[0])
    assert all(norm > 0 for norm in record.grad_norms[1:])


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise KeyboardInterrupt


@MODES
@pytest.mark.parametrize("where", ["forward", "backward", "after the backward"])
def test_recovers_from_an_exception_in_the_middle_of_a_step(where, mode):
    class Failing(Branching):
        fail = False

        def forward(self, x):
            h = self.embed(x)
            for index, block in enumerate(self.blocks):
                if self.fail and index == 1 and where == "forward":
                    raise KeyboardInterrupt
                if self.fail and index == 1 and where == "backward":
                    h = _Fails.apply(h)
                h = h + block(h)
            return self.out_head(self.out_ln(h))

    torch.manual_seed(0)
    model, (x, y) = Failing(), batch_of()
    (plain,) = records_of(model, [(x, y)], mode=mode)
    records = []
    probe = StepProbe(model, sink=records.append, mode=mode)
    for fail in (False, True, False):
        model.fail = fail
        try:
            backward(model, x, y)
            if fail:
                raise KeyboardInterrupt
            probe.step()
        except KeyboardInterrupt:
            if where == "after the backward":
                probe.discard()
        model.zero_grad()
    probe.remove()
    assert [record.step for record in records] == [0, 1]
    for record in records:
        assert record.grad_norms == plain.grad_norms
        assert (record.micro_batches, record.num_samples) == (1, 12)


def test_a_model_moved_to_another_dtype_goes_on():
    model, (x, y) = network(), batch_of()
    records = []
    probe = StepProbe(model, sink=records.append)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model.to(dtype)
        nn.functional.cross_entropy(model(x.to(dtype)).float(), y).backward()
        probe.step()
        model.zero_grad()
    probe.remove()
    for record in records[1:]:
        assert record.hidden_norms == pytest.approx(records[0].hidden_norms, rel=2e-2)
        assert record.grad_norms == pytest.approx(records[0].grad_norms, rel=6e-2)


@pytest.mark.parametrize("first", [True, False])
def test_a_state_has_hooks_of_others_too(first):
    """They run once each, may be taken away, and what they return goes on."""
    model, (x, y) = network(), batch_of()
    (plain,) = records_of(model, [(x, y)], taps=["embed"])
    seen, records = [], []

    def forward_hook(module, args, state):
        if module.training:
            state.register_hook(lambda grad: seen.append("gone")).remove()
            state.register_hook(lambda grad: seen.append("kept") or 0 * grad)

    if not first:
        model.embed.register_forward_hook(forward_hook)
    with StepProbe(model, ["embed"], sink=records.append, example=x) as probe:
        if first:
            model.embed.register_forward_hook(forward_hook)
        backward(model, x, y)
        probe.step()
    assert seen == ["kept"]
    assert not model.embed.weight.grad.any()
    assert [record.grad_norms for record in records] == [plain.grad_norms if first else (0.0,)]


@pytest.mark.cuda
def test_a_model_moved_to_another_device_goes_on():
    model, (x, y) = network(), batch_of()
    records = []
    probe = StepProbe(model, sink=records.append)
    for device in ("cpu", "cuda", "cpu"):
        model.to(device)
        backward(model, x.to(device), y.to(device))
        probe.step()
        model.zero_grad()
    probe.remove()
    assert [record.step for record in records] == [0, 1, 2]
    for record in records[1:]:
        assert record.grad_norms == pytest.approx(records[0].grad_norms, rel=1e-3)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_probed_model_leave_the_probe_behind(how):
    model, (x, y) = network(), batch_of()
    records = []
    with StepProbe(model, sink=records.append, example=x) as probe:
        backward(model, x, y)
        twin = how(model)
        backward(twin, 2 * x, y)
        probe.step()
    assert [record.num_samples for record in records] == [12]
    assert torch.equal(twin(x), model(x))


def test_removing_the_probe_leaves_the_model_as_it_was():
    model, (x, y) = network(), batch_of()

    def traces():
        return [
            (
                name,
                sorted(module.__dict__),
                [
                    (key, dict(value))
                    for key, value in sorted(module.__dict__.items())
                    if "hooks" in key and value is not None
                ],
            )
            for name, module in model.named_modules()
        ]

    before, weights = traces(), copy.deepcopy(model.state_dict())
    with StepProbe(model, example=x) as probe:
        assert traces() != before
        backward(model, x, y)
        probe.step()
    assert traces() == before
    assert all(torch.equal(a, weights[name]) for name, a in model.state_dict().items())
    unused = StepProbe(model)
    assert traces() != before
    unused.remove()
    assert traces() == before


def test_a_sink_that_raises_is_warned_of_once_and_others_go_on():
    model, records = network(), []

    def broken(record):
        raise OSError("disk full")

    def train():
        with StepProbe(model, sink=[broken, records.append]) as probe:
            for seed in range(3):
                backward(model, *batch_of(seed=seed))
                probe.step()

    with pytest.warns(SinkWarning, match=r"broken.*step 0.*OSError: disk full") as caught:
        train()
    assert len([w for w in caught if "disk full" in str(w.message)]) == 1
    assert [record.step for record in records] == [0, 1, 2]


def test_a_path_is_a_sink_that_is_closed_with_the_probe(tmp_path):
    model = network()
    with StepProbe(model, sink=tmp_path / "steps.jsonl") as probe:
        for seed in range(3):
            backward(model, *batch_of(seed=seed))
            probe.step()
    assert [record.step for record in read_jsonlines(tmp_path / "steps.jsonl").records] == [0, 1, 2]


def test_a_resumed_run_counts_on_and_keeps_the_records_before_its_checkpoint(tmp_path):
    path = tmp_path / "steps.jsonl"

    def train(steps, **options):
        model = network()
        with StepProbe(model, sink=path, **options) as probe:
            for seed in range(steps):
                backward(model, *batch_of(seed=seed))
                probe.step()

    train(5)
    train(4, first_step=3)  # the last checkpoint was that of three steps
    log = read_jsonlines(path)
    assert [record.step for record in log.records] == [0, 1, 2, 3, 4, 5, 6]
    assert (log.sessions, log.superseded) == (2, 2)
    train(6, first_step=7, schedule=5)
    assert [record.step for record in read_jsonlines(path).records][7:] == [10]
    for wrong in (-1, 1.0, True):
        with pytest.raises(ValueError, match=f"first_step: expected a whole number.*got {wrong}"):
            StepProbe(network(), first_step=wrong)


def test_a_budget_knows_what_a_step_has_cost_before_it_chooses_the_next():
    class AtMostEveryOther:
        """Wants a step unless it was told of the one before."""

        noted = -2

        def wants(self, step):
            return step > self.noted + 1

        def note(self, step, probe_seconds, step_seconds):
            self.noted = step

    records, model = [], network()
    with StepProbe(model, sink=records.append, schedule=AtMostEveryOther()) as probe:
        for seed in range(6):
            backward(model, *batch_of(seed=seed))
            probe.step()
    assert [record.step for record in records] == [0, 2, 4]


class Halves(nn.Module):
    """An encoder that returns a mean and a spread, as parts of one tensor."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)])
        self.head = nn.Linear(5, 8)

    def forward(self, x):
        return self.head(self.layers(x)).chunk(2, 1)


@pytest.mark.parametrize("mode", ["auto", "passing", "together"])
def test_logits_of_which_the_loss_uses_another_part_are_not_reached(mode):
    torch.manual_seed(0)
    records, model, x = [], Halves(), batch_of()[0]
    with StepProbe(model, sink=records.append, mode=mode) as probe:
        for _ in range(3):
            model(x)[1].square().mean().backward()  # the first part's gradient is None
            probe.step()
        model(x)[0].square().mean().backward()
        probe.step()
    assert [r.output_grad_norm > 0 for r in records] == [False] * 3 + [True]
    assert all(math.isnan(r.output_grad_norm) for r in records[:3])
    assert all(norm > 0 for r in records for norm in r.grad_norms)


@pytest.mark.parametrize("mode", ["auto", "passing", "together"])
def test_a_part_of_a_state_that_nobody_uses_is_not_reached(mode):
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(5, 12)

        def forward(self, x):
            return self.project(x).chunk(3, 1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.attention, self.head = nn.Linear(5, 5), Queries(), nn.Linear(4, 4)

        def forward(self, x):
            _, k, v = self.attention(self.stem(x))
            return self.head(k * v)

    records, model, (x, y) = [], Net(), batch_of()
    taps = ["stem", "attention"]
    with StepProbe(model, taps, sink=records.append, mode=mode) as probe:
        backward(model, x, y)
        probe.step()
    assert records[0].unreached == ("attention",)
    assert math.isnan(records[0].grad_norms[1])
    assert records[0].grad_norms[0] > 0


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("example", [True, False])
def test_a_probe_and_its_model_are_let_go_of(example, removed):
    def train():
        model, (x, y) = network(), batch_of()
        probe = StepProbe(model, example=x if example else None)
        backward(model, x, y)
        probe.step()
        if removed:
            probe.remove()
        return weakref.ref(probe), weakref.ref(model)

    probe, model = train()
    gc.collect()
    assert probe() is None
    assert model() is None


def test_a_micro_batch_without_samples_leaves_the_direction_as_it_is():
    batches = [batch_of(seed=seed) for seed in range(3)]
    plain = records_of(network(), batches, directions="all")
    records, model = [], network()
    with StepProbe(model, sink=records.append, directions="all") as probe:
        for x, y in batches:
            backward(model, x, y)
            (0.0 * model(x[:0]).sum()).backward()
            probe.step()
    assert [r.micro_batches for r in records] == [2] * 3
    for record, other in zip(records, plain, strict=True):
        assert record.grad_norms == other.grad_norms
        assert record.stabilities == pytest.approx(other.stabilities, rel=1e-6, nan_ok=True)


def test_a_probe_that_is_built_on_another_model_meanwhile_is_no_part_of_a_pass():
    building, done = threading.Event(), threading.Event()

    class Slow(Branching):
        def forward(self, x):
            building.set()
            done.wait(60)
            return super().forward(x)

    (x, y), records, model = batch_of(), [], network()
    other = threading.Thread(target=lambda: StepProbe(Slow(), example=x))

    def begin(*_):
        other.start()
        building.wait(60)

    with StepProbe(model, sink=records.append, example=x) as probe:
        handle = model.blocks[0].register_forward_pre_hook(begin)
        backward(model, x, y)
        handle.remove()
        done.set()
        other.join()
        probe.step()
    assert records[0].unreached == ()
    assert records[0].hidden_norms == records_of(network(), [(x, y)])[0].hidden_norms


@pytest.mark.parametrize("examples", [(False, False), (True, False), (False, True)])
def test_two_probes_on_one_model_see_the_same(examples):
    batches = [batch_of(seed=seed) for seed in range(3)]
    expected = records_of(network(), batches)
    model, found = network(), ([], [])
    probes = [
        StepProbe(model, sink=records.append, example=batches[0][0] if given else None)
        for records, given in zip(found, examples, strict=True)
    ]
    for x, y in batches:
        backward(model, x, y)
        for probe in probes:
            probe.step()
    for probe in probes:
        probe.remove()
    first, second, alone = ([r.to_json() for r in records] for records in (*found, expected))
    assert first == second == alone


def test_a_broken_step_is_told_and_stops_the_training_if_asked():
    """The weights of block 1 become NaN after step 1: its own state is the first that shows it."""

    def train(**options):
        model = network()
        with StepProbe(model, **options) as probe:
            for seed in range(6):
                if seed == 2:
                    with torch.no_grad():
                        next(model.blocks[1].parameters()).fill_(torch.nan)
                backward(model, *batch_of(seed=seed))
                probe.step()
        return probe

    with pytest.warns(AlarmWarning, match=r"step 2, blocks\.1: .* is nan") as caught:
        probe = train()
    assert [warning.filename for warning in caught] == [__file__]
    assert probe.alarms.last_healthy_step == 1
    with pytest.raises(TrainingStopped, match=r"step 2, blocks\.1"):
        train(alarms=Alarms(actions="stop"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(alarms=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window: expected a whole number from 1, got 0"),
        ({"schedule": 0}, "expected at least 1, got 0"),
        ({"ring": -1}, "ring: expected"),
        ({"sketch": 0}, "sketch: expected"),
        ({"decay": 1.0}, r"decay: expected a number in \[0, 1\), got 1.0"),
        ({"directions": "last"}, "directions: expected 'middle', 'all' or 'none', got 'last'"),
        ({"mode": "fast"}, "mode: expected"),
        ({"reduction": "max"}, "reduction: expected"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StepProbe(network(), **options)


def test_sinks_and_taps_that_cannot_be():
    with pytest.raises(TypeError, match=r"sink: expected a path, .* got 3"):
        StepProbe(network(), sink=[3])
    with pytest.raises(TapError, match="matches no module"):
        StepProbe(network(), taps="blokcs", example=batch_of()[0])


@pytest.mark.parametrize("forked", [False, True])
def test_a_probe_that_is_not_removed_is_flushed_at_exit(forked, tmp_path):
    """Once: a child process that ends before has no part in it."""
    import subprocess
    import sys

    code = f"""
import torch
from torch import nn
from fadiag_fast import StepProbe
model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
probe = StepProbe(model, taps="0", sink=lambda r: open({str(tmp_path / "log")!r}, "a").write("x"))
model(torch.randn(4, 3)).sum().backward()
from fadiag_fast.training import ring
ready, ring.Ring.ready = ring.Ring.ready, lambda self: []  # nothing has arrived at the step's end
probe.step()
ring.Ring.ready = ready
"""
    if forked:
        if not hasattr(os, "fork"):
            pytest.skip("needs fork")
        code += """
import os
child = os.fork()
if child:
    os.waitpid(child, 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert (tmp_path / "log").read_text() == "x"


def test_the_state_is_not_kept_alive():
    """What training frees is freed: no tensor outlives the step."""
    import gc

    model, (x, y) = network(), batch_of()
    probe = StepProbe(model, mode="passing", example=x)
    gc.collect()
    gc.disable()
    try:
        seen = []
        handle = model.blocks[0].register_forward_hook(
            lambda m, a, r: seen.append(torch.utils.weak.WeakTensorKeyDictionary({r: 1}))
        )
        backward(model, x, y)
        assert [len(alive) for alive in seen] == [0]
        probe.step()
        handle.remove()
        lost = model(x)
        assert probe._observer.observations == []
        del lost
    finally:
        gc.enable()
    probe.remove()


def test_nothing_warns_in_ordinary_training():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        model = ResidualMLP(5, 8, 4, 2)
        assert len(records_of(model, [batch_of(seed=s) for s in range(3)])) == 3


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@MODES
def test_a_model_on_another_gpu_than_the_current_one(mode):
    batches = [batch_of(seed=s) for s in range(40)]
    expected = records_of(network(), batches, mode=mode)
    moved = [(x.to("cuda:1"), y.to("cuda:1")) for x, y in batches]
    records = records_of(network().to("cuda:1"), moved, mode=mode, ring=4)
    for record, other in zip(records, expected, strict=True):
        assert record.hidden_norms == pytest.approx(other.hidden_norms, rel=1e-4)
        assert record.grad_norms == pytest.approx(other.grad_norms, rel=1e-4)


class Returning(nn.Module):
    """Its head returns the logits, and it puts them into something."""

    def __init__(self, kind):
        super().__init__()
        self.inner = Branching()
        self.kind = kind

    def forward(self, x):
        logits = self.inner(x)
        return {"dict": {"aux": x, "scores": logits}, "tuple": (x.sum(), logits)}[self.kind]


@pytest.mark.parametrize(("kind", "at"), [("dict", "scores"), ("tuple", 1)])
def test_output_names_a_part_of_what_the_model_returns(kind, at):
    """Also where a module inside returned that very tensor before."""
    torch.manual_seed(0)
    model, (x, y) = Returning(kind), batch_of()
    records = []
    with StepProbe(model, sink=records.append, output=at, example=x) as probe:
        nn.functional.cross_entropy(model(x)[at], y).backward()
        probe.step()
    expected = records_of(model.inner, [(x, y)])
    assert records[0].output_grad_norm == expected[0].output_grad_norm
    assert records[0].credit_gains == expected[0].credit_gains


def test_a_first_pass_that_raises_is_not_the_first_pass():
    model, (x, y) = network(), batch_of()
    records = []
    probe = StepProbe(model, sink=records.append)
    with pytest.raises(RuntimeError):
        model(x[:, :2])
    backward(model, x, y)
    probe.step()
    probe.remove()
    (expected,) = records_of(model, [(x, y)])
    assert [record.to_json() for record in records] == [expected.to_json()]


def test_steps_after_the_probe_was_removed_do_nothing():
    model, (x, y) = network(), batch_of()
    records = []
    probe = StepProbe(model, sink=records.append)
    for _ in range(3):
        backward(model, x, y)
        probe.step()
        probe.remove()
    assert len(records) == 1


@pytest.mark.parametrize("alarms", ["stop", True, print])
def test_alarms_that_are_none_are_refused(alarms):
    with pytest.raises(TypeError, match="alarms: expected Alarms, None or False, got"):
        StepProbe(network(), alarms=alarms)
