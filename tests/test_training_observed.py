"""What the training probe observes, on networks and loops that change under it."""

import logging
import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fadiag_fast import DiagnosticThresholds, StepProbe, diagnose
from fadiag_fast.protocol import Figures
from fadiag_fast.scanning.records import CheckpointRecord, figures_of, row_of
from fadiag_fast.taps import find_taps
from fadiag_fast.training.alarms import Alarms, judge_series
from fadiag_fast.training.records import StepRecord
from fadiag_fast.training.watch import Tail, scan_result_of, view

functional = nn.functional


def layers(count=3, width=8):
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(count)))


class Tokens(nn.Module):
    """A language model whose head may be called in pieces while it is trained."""

    def __init__(self, pieces=None):
        super().__init__()
        self.embed, self.layers, self.head = nn.Embedding(9, 8), layers(), nn.Linear(8, 9)
        self.pieces = pieces

    def forward(self, ids, labels=None):
        h = self.layers(self.embed(ids))
        if labels is None:
            return self.head(h)
        losses = [
            functional.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum")
            for logits, y in self.pieces(self.head, h, labels)
        ]
        return sum(losses) / labels.numel()


def by_positions(head, h, y):
    return [(head(a), b) for a, b in zip(h.chunk(4, 1), y.chunk(4, 1), strict=True)]


def by_samples(head, h, y):
    return [(head(a), b) for a, b in zip(h.chunk(2, 0), y.chunk(2, 0), strict=True)]


def uneven(head, h, y):
    return [(head(a), b) for a, b in zip(h.split([3, 1]), y.split([3, 1]), strict=True)]


def checkpointed(head, h, y):
    return [
        (checkpoint(head, a, use_reentrant=False), b)
        for a, b in zip(h.chunk(4, 1), y.chunk(4, 1), strict=True)
    ]


def flattened(head, h, y):
    parts = zip(h.flatten(0, 1).chunk(4), y.flatten().chunk(4), strict=True)
    return [(head(a), b) for a, b in parts]


def ids_of(samples=4, length=8, seed=0):
    return torch.randint(0, 9, (samples, length), generator=torch.Generator().manual_seed(seed))


def median(values):
    return float(torch.nanmedian(values.double()))


def one_record(model, run, **options):
    records = []
    with StepProbe(model, sink=records.append, alarms=False, **options) as probe:
        run(model).backward()
        probe.step()
    model.zero_grad()
    (record,) = records
    return record


# ---- sizes


@pytest.mark.parametrize("mode", ["together", "passing"])
def test_root_mean_squares_are_of_the_steps_own_lengths(mode):
    torch.manual_seed(0)
    model, records = Tokens(), []
    with StepProbe(model, sink=records.append, mode=mode, directions="none") as probe:
        for lengths in ((3,), (12,), (3, 12)):
            for length in lengths:
                model(ids_of(length=length)).square().mean().backward()
            probe.step()
    for record, lengths in zip(records, ((3,), (12,), (3, 12)), strict=True):
        states = [model.layers(model.embed(ids_of(length=n))).double() for n in lengths]
        rms = torch.cat([s.flatten(1).norm(dim=1) / math.sqrt(s[0].numel()) for s in states])
        assert record.rms_norms[-1] == pytest.approx(median(rms.detach()), rel=1e-6)


def record(step, hidden=(8.0, 9.0, 10.0), rms=(0.8, 0.9, 1.0), **changes):
    values = {
        "step": step,
        "layers": ("a", "b", "c"),
        "hidden_norms": tuple(hidden),
        "rms_norms": tuple(rms),
        "grad_norms": (1e-3,) * 3,
        "credit_gains": (0.5,) * 3,
        "output_grad_norm": 2e-3,
        "stabilities": (math.nan,) * 3,
        "average_cosines": (math.nan,) * 3,
        "num_directions": 0,
        "num_samples": 8,
    }
    return StepRecord(**{**values, **changes})


def test_a_baseline_judges_features_and_not_their_number():
    """Sequences four times as long have norms twice as large, and are no alarm."""
    healthy = [record(s) for s in range(100)]
    longer = [record(100 + s, (16.0, 18.0, 20.0)) for s in range(5)]
    assert judge_series([*healthy, *longer]) == []
    grown = [record(100 + s, (16.0, 36.0, 40.0), (0.8, 1.8, 2.0)) for s in range(5)]
    (alarm,) = judge_series([*healthy, *grown])
    assert (alarm.layer, alarm.figure, alarm.value) == ("b", "hidden_norm", pytest.approx(36.0))
    # At the number of features that there are now.
    assert alarm.baseline_median == pytest.approx(18.0)


# ---- logits of one pass


@pytest.mark.parametrize("pieces", [by_positions, by_samples, checkpointed])
@pytest.mark.parametrize("mode", ["together", "passing"])
def test_a_head_that_is_called_in_pieces_makes_the_logits_of_all_of_them(pieces, mode):
    torch.manual_seed(0)
    model, ids = Tokens(pieces), ids_of()
    got = one_record(model, lambda m: m(ids, ids), example=ids, mode=mode)
    expected = one_record(
        model, lambda m: functional.cross_entropy(m(ids).flatten(0, 1), ids.flatten())
    )
    assert got.gain_reference == "output"
    assert got.output_grad_norm == pytest.approx(expected.output_grad_norm, rel=1e-5)
    assert got.credit_gains == pytest.approx(expected.credit_gains, rel=1e-5)


def test_pieces_of_which_no_sample_is_known_make_no_logits():
    torch.manual_seed(0)
    model, ids = Tokens(flattened), ids_of()
    with pytest.warns(RuntimeWarning, match="it cannot be told which sample a row belongs to"):
        got = one_record(model, lambda m: m(ids, ids), example=ids)
    assert got.gain_reference == "layers.2"
    assert got.credit_gains[-1] == 1.0


LINKS = {
    "log_softmax": (lambda z: z.log_softmax(1), functional.nll_loss),
    "log of softmax": (
        lambda z: torch.log(z.softmax(1) + 1e-12),
        functional.nll_loss,
    ),
    "module": (nn.LogSoftmax(1), functional.nll_loss),
    "sigmoid": (
        torch.sigmoid,
        lambda p, y: functional.binary_cross_entropy(p, functional.one_hot(y, 4).float()),
    ),
}


@pytest.mark.parametrize("kind", list(LINKS))
def test_the_error_is_taken_in_front_of_a_softmax(kind):
    link, loss = LINKS[kind]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.head, self.ends = layers(width=5), nn.Linear(5, 4), True

        def forward(self, x):
            z = self.head(self.layers(x))
            return link(z) if self.ends else z

    torch.manual_seed(0)
    model, x, y = Net(), torch.randn(6, 5), torch.randint(0, 4, (6,))
    got = one_record(model, lambda m: loss(m(x), y))
    report = diagnose(model, [(x, y)] * 2, loss=loss)
    model.ends = False
    expected = one_record(model, lambda m: loss(link(m(x)), y))
    assert got.output_grad_norm == pytest.approx(expected.output_grad_norm, rel=1e-5)
    assert got.credit_gains == pytest.approx(expected.credit_gains, rel=1e-5)
    assert report.figures.credit_gains == pytest.approx(expected.credit_gains, rel=1e-5)
    assert report.figures.output_grad_norm == pytest.approx(expected.output_grad_norm, rel=1e-5)


@pytest.mark.parametrize("given", [tuple, list, lambda pair: dict(zip("ab", pair, strict=True))])
def test_a_loss_beside_the_logits_is_not_taken_for_them(given):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.head = layers(), nn.Linear(8, 4)

        def forward(self, x, y):
            logits = self.head(self.layers(x))
            return given([functional.cross_entropy(logits, y), logits])

    torch.manual_seed(0)
    model, x, y = Net(), torch.randn(6, 8), torch.randint(0, 4, (6,))
    first = "a" if isinstance(model(x, y), dict) else 0
    got = one_record(model, lambda m: m(x, y)[first])
    logits = model.head(model.layers(x)).detach().requires_grad_()
    functional.cross_entropy(logits, y).backward()
    assert got.output_grad_norm == pytest.approx(median(logits.grad.norm(dim=1)), rel=1e-6)


class Readout(nn.Module):
    """States of nodes, logits of graphs; or nothing but the loss."""

    def __init__(self, loss_only=False):
        super().__init__()
        self.layers, self.head, self.loss_only = layers(), nn.Linear(8, 2), loss_only

    def forward(self, x, graph, y):
        h = self.layers(x)
        logits = self.head(torch.zeros(3, 8).index_add(0, graph, h))
        return functional.cross_entropy(logits, y) if self.loss_only else logits


GRAPHS = (torch.tensor([0] * 5 + [1] * 6 + [2] * 7), torch.tensor([0, 1, 0]))


@pytest.mark.parametrize("loss_only", [False, True])
def test_without_logits_gains_are_relative_to_the_last_state(loss_only):
    torch.manual_seed(0)
    model, x, (graph, y) = Readout(loss_only), torch.randn(18, 8), GRAPHS

    def run(m):
        found = m(x, graph, y)
        return found if loss_only else functional.cross_entropy(found, y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = one_record(model, run)
    states = [x]
    for layer in model.layers:
        states.append(layer(states[-1]))
    logits = model.head(torch.zeros(3, 8).index_add(0, graph, states[-1]))
    grads = torch.autograd.grad(functional.cross_entropy(logits, y), states[1:])
    norms = [g.double().norm(dim=1) for g in grads]
    assert (got.gain_reference, got.num_samples) == ("layers.2", 18)
    assert got.output_grad_norm == pytest.approx(median(norms[-1]), rel=1e-5)
    assert got.credit_gains == pytest.approx([median(n / norms[-1]) for n in norms], rel=1e-5)
    assert StepRecord.from_json(got.to_json()).gain_reference == "layers.2"

    options = {"loss": lambda out, y: out if loss_only else functional.cross_entropy(out, y)}
    report = diagnose(model, [((x, graph, y), y)] * 2, **options)
    assert report.figures.credit_gains == pytest.approx(got.credit_gains, rel=1e-5)
    assert report.figures.gain_reference == "layers.2"
    assert any("relative to the gradient at the last observed state" in r for r in report.remarks)
    calibrated = diagnose(model, [((x, graph, y), y)] * 8, protocol="calibrated", **options)
    assert calibrated["b"].label == "not enough data"


def test_a_models_own_loss_alone_serves_diagnose():
    torch.manual_seed(0)
    model, x, (graph, y) = Readout(True), torch.randn(18, 8), GRAPHS
    report = diagnose(model, [{"x": x, "graph": graph, "y": y}] * 2)
    assert report.figures.credit_gains[-1] == 1.0


# ---- what is not finite, and where it broke


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_growth_shows_what_is_not_finite_and_where(value):
    broken = record(0, hidden=(8.0, value, value))
    shown = broken.growth
    assert math.isnan(shown) if math.isnan(value) else math.isinf(shown)
    assert broken.growth_layer == "b"
    metrics = broken.metrics("")
    assert not math.isfinite(metrics["growth"])
    assert not math.isfinite(metrics["hidden_norm/b"])
    skipped = record(0, hidden=(8.0, math.nan, 10.0), unreached=("b",))
    assert skipped.growth == 1.0
    assert "hidden_norm/b" not in skipped.metrics("")


@pytest.mark.parametrize("warm", [5, 60])
def test_gradients_spoiled_by_the_forward_pass_are_blamed_on_its_block(warm):
    healthy = [record(s) for s in range(warm)]
    hidden, grads = (8.0, 9.0, 1e13), (math.nan, math.nan, 1e-12)
    (alarm,) = judge_series([*healthy, record(warm, hidden, hidden, grad_norms=grads)])
    assert (alarm.rule, alarm.layer, alarm.figure) == ("non-finite", "c", "growth")
    assert "The median ‖g‖ at b is nan" in alarm.sentence
    (alarm,) = judge_series([*healthy, record(warm, grad_norms=grads)])
    assert (alarm.rule, alarm.layer, alarm.figure) == ("non-finite", "b", "grad_norm")
    assert "At c it is 1e-12: it breaks on the way back through that block" in alarm.sentence


def test_the_report_has_the_growth_behind_a_frozen_embedding(tmp_path):
    pytest.importorskip("pyarrow")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), *layers(), nn.Linear(8, 4))
    model[0].weight.requires_grad_(False).mul_(1e-3)
    rows = []
    sinks = [tmp_path / "steps.jsonl", rows.append]
    with StepProbe(model, ["0", "1", "2", "3"], sink=sinks, alarms=False) as probe:
        model(ids_of()).square().sum().backward()
        probe.step()
    assert rows[0].unreached == ("0",)
    table = scan_result_of([tmp_path / "steps.jsonl"]).to_pandas()
    assert table["growth"].iloc[0] == pytest.approx(rows[0].growth)
    assert "named, asked for 4, saw 4" in table["config"].iloc[0]


# ---- labels and chains


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class Scaled(nn.Module):
    """States are scaled between blocks and normed before the head, by functions."""

    def __init__(self):
        super().__init__()
        self.emb, self.h, self.head = nn.Linear(8, 8), layers(), nn.Linear(8, 4)

    def forward(self, x):
        x = self.emb(x)
        for block in self.h:
            x = block(0.9 * x)
        return self.head(functional.rms_norm(x, (8,)))


@pytest.mark.parametrize("kind", [Plain, Scaled, Tokens])
def test_a_label_is_of_the_tensor_that_the_taps_of_that_name_see(kind):
    torch.manual_seed(0)
    model = kind()
    x = ids_of() if kind is Tokens else torch.randn(6, 8)
    chosen = one_record(model, lambda m: m(x).square().sum())
    names = [name for name in chosen.layers if "input of" not in name]
    named = one_record(model, lambda m: m(x).square().sum(), taps=names)
    found = dict(zip(chosen.layers, chosen.hidden_norms, strict=True))
    assert len(names) >= 2
    for name, norm in zip(named.layers, named.hidden_norms, strict=True):
        assert found[name] == norm


class Conv(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1, self.layer2 = (nn.Sequential(Conv(), Conv()) for _ in range(2))

    def forward(self, x):
        return self.layer2(self.layer1(self.stem(x))).mean((2, 3))


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Trunk()
        self.fc = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 8), nn.Linear(8, 2))

    def forward(self, a, b):
        return self.fc(torch.cat([self.net(a), self.net(b)], 1))


class Interleaved(nn.Module):
    """Both inputs go through each block in turn, and the caller adds the skip."""

    def __init__(self):
        super().__init__()
        self.emb, self.blocks, self.out = nn.Linear(8, 8), layers(), nn.Linear(8, 2)

    def forward(self, a, b):
        a, b = self.emb(a), self.emb(b)
        for block in self.blocks:
            a, b = a + block(a), b + block(b)
        return self.out(a - b)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.item = layers(), layers(2)

    def forward(self, a, b):
        return (self.user(a) * self.item(b)).sum(1, keepdim=True)


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.down, self.up = (nn.ModuleList(Conv() for _ in range(2)) for _ in range(2))

    def forward(self, x):
        x, kept = self.stem(x), []
        for block in self.down:
            kept.append(block(x))
            x = functional.avg_pool2d(kept[-1], 2)
        for block in self.up:
            x = block(functional.interpolate(x, scale_factor=2) + kept.pop())
        return self.out(x)


class Adversaries(nn.Module):
    def __init__(self):
        super().__init__()
        linear = [nn.Linear(8, 8) for _ in range(5)]
        self.g = nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2])
        self.d = nn.Sequential(linear[3], nn.ReLU(), linear[4], nn.ReLU(), nn.Linear(8, 1))

    def forward(self, z):
        return torch.sigmoid(self.d(self.g(z)))


class Digits(nn.Module):
    """A convnet whose two classes of layers are about as many."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = torch.relu(self.conv2(torch.relu(self.conv1(x)))).flatten(1)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(h)))))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 2), layers(4)

    def forward(self, x):
        gate = self.gate(x).softmax(-1)
        return x + sum(gate[:, i % 2, None] * e(x) for i, e in enumerate(self.experts))


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRUCell(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.zeros(len(x), 6)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.out(h)


IMAGES, ROWS = torch.randn(2, 3, 8, 8), torch.randn(4, 8)
CHAINS = {
    "siamese": (
        Siamese(),
        (IMAGES, IMAGES + 1),
        "2 chains of together 8 Conv in net.layer*.*",
        10,
        (5,),
    ),
    "interleaved": (
        Interleaved(),
        (ROWS, ROWS + 1),
        "2 chains of together 6 Sequential in blocks.*",
        7,
        (3,),
    ),
    "towers": (
        Towers(),
        (ROWS, ROWS + 1),
        "chain of 3 Sequential in user.* and chain of 2 Sequential in item.*",
        5,
        (3,),
    ),
    "u-net": (UNet(), (IMAGES,), "chain of 2 Conv in down.* and chain of 2 Conv in up.*", 6, (3,)),
    # What the generator hands on is what the discriminator takes: one way through both.
    "adversaries": (
        Adversaries(),
        (ROWS,),
        "chain of 3 Linear in g.* and chain of 3 Linear in d.*",
        5,
        (),
    ),
    "digits": (Digits(), (IMAGES,), "chain of 5 Conv2d, Linear in conv*, fc*", 4, ()),
    "experts": (
        nn.Sequential(nn.Linear(8, 8), Experts(), Experts(), Experts(), nn.Linear(8, 2)),
        (ROWS,),
        "chain of 3 Experts in *",
        4,
        (),
    ),
    "recurrent cell": (Cell(), (torch.randn(2, 5, 8),), "chain of 5 GRUCell in cell", 5, ()),
}


@pytest.mark.parametrize("kind", list(CHAINS))
def test_every_chain_of_a_network_is_observed(kind):
    model, x, chosen, states, starts = CHAINS[kind]
    taps, _ = find_taps(model.eval(), x, batch_dim=0)
    assert taps.chosen == chosen
    assert (len(taps.points), taps.chain_starts) == (states, starts)
    assert len(set(taps.labels)) == states
    record = one_record(model.train(), lambda m: m(*x).square().sum(), directions="none")
    assert record.layers == taps.labels
    assert record.unreached == ()
    assert record.observed.startswith(f"observed: {chosen}, asked for")


def test_what_is_passed_over_is_told():
    taps, _ = find_taps(Siamese().eval(), (IMAGES, IMAGES + 1), batch_dim=0)
    assert taps.passed_over == ("3 Linear in fc.*",)
    assert taps.observed == (
        "observed: 2 chains of together 8 Conv in net.layer*.*, asked for 4, saw 4; 10 states, "
        "input of net.layer1.0 (call 1) to net.layer2.1 (call 2); passed over: 3 Linear in fc.*"
    )


def test_named_taps_of_two_chains_are_compared_inside_each():
    model, x = Towers(), (ROWS, ROWS + 1)
    taps, _ = find_taps(model.eval(), x, ["user.*", "item.*"])
    assert taps.chain_starts == (3,)
    grown = record(0, hidden=(1.0, 1.0, 100.0), chain_starts=(2,))
    assert grown.growth == 1.0
    assert judge_series([record(s, (1.0, 1.0, 100.0), chain_starts=(2,)) for s in range(90)]) == []


def test_a_scans_rows_keep_where_chains_begin_and_what_gains_are_relative_to():
    figures = Figures(
        layers=("a", "b", "c"),
        residual_norms=(1.0, 2.0, 900.0),
        bp_grad_norms=(1e-3, 2e-3, 4e-3),
        credit_gains=(0.25, 0.5, 1.0),
        output_grad_norm=4e-3,
        batch_size=4,
        stabilities=(0.1,) * 3,
        num_directions=(8,) * 3,
        num_batches=8,
        chain_starts=(2,),
        gain_reference="c",
    )
    row = row_of(
        CheckpointRecord(
            path="a.pt", run="a", step=0, config_hash="", content_hash="", figures=figures
        ),
        DiagnosticThresholds(),
    )
    assert row["growth"] == 2.0
    again = figures_of(row, row["layers"])
    assert (again.chain_starts, again.gain_reference) == ((2,), "c")


def test_a_chain_through_broken_weights_has_the_labels_of_healthy_ones():
    model = Interleaved()
    healthy, _ = find_taps(model.eval(), (ROWS, ROWS + 1))
    with torch.no_grad():
        model.blocks[1][0].weight.fill_(math.nan)
    broken, _ = find_taps(model.eval(), (ROWS, ROWS + 1))
    assert broken.labels == healthy.labels


# ---- what the probe says of itself


def test_the_choice_is_logged_and_stands_in_records_and_files(tmp_path, caplog):
    torch.manual_seed(0)
    model, ids = Tokens(), ids_of()
    path = tmp_path / "steps.jsonl"
    with caplog.at_level(logging.INFO, "fadiag_fast"), StepProbe(model, sink=path) as probe:
        assert "nothing observed yet" in repr(probe)
        model(ids).square().sum().backward()
        probe.step()
    line = "observed: chain of 3 Sequential in layers.*, asked for 3, saw 3; 4 states"
    for text in (caplog.text, probe.describe(), repr(probe)):
        assert line in text
    assert line in path.read_text(encoding="utf-8").replace("\\u2026", "…")
    tail = Tail(path)
    tail.read()
    assert any(line in shown.text for shown in view(tail))


def test_a_replaced_head_is_looked_for():
    torch.manual_seed(0)
    ids, records = ids_of(), []
    model = Tokens(by_positions)
    probe = StepProbe(model, sink=records.append, alarms=False, example=ids)
    for step in range(3):
        if step == 1:
            model.head = nn.Linear(8, 9)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(ids, ids).backward()
            probe.step()
        assert ["head replaced" in str(w.message) for w in caught] == ([True] if step == 1 else [])
    probe.remove()
    assert [r.gain_reference for r in records] == ["output", "layers.2", "output"]
    # What the model returns is looked at in any case.
    plain = Tokens()
    with StepProbe(plain, sink=records.append, alarms=False, example=ids) as probe:
        plain.head = nn.Linear(8, 5)
        plain(ids).square().sum().backward()
        probe.step()
    assert records[-1].gain_reference == "output"
    assert all(gain > 0 for gain in records[-1].credit_gains)


def test_a_cell_that_is_called_more_often_shows_all_calls():
    torch.manual_seed(0)
    model, records = Cell(), []
    with StepProbe(model, sink=records.append, alarms=False) as probe:
        for length in (2, 4, 3, 4):
            model(torch.randn(3, length, 8)).square().sum().backward()
            probe.step()
    assert [len(r.layers) for r in records] == [2, 2, 4, 4]
    assert [r.unreached for r in records] == [(), (), ("cell (call 4)",), ()]


def test_calls_that_training_alone_makes_are_told():
    class Twice(Tokens):
        def forward(self, ids):
            h = self.layers(self.embed(ids))
            return self.head(self.layers(h) if self.training else h)

    model, ids = Twice(), ids_of()
    with StepProbe(model, alarms=False) as probe:
        model(ids).square().sum().backward()
        probe.step()
        with pytest.warns(RuntimeWarning, match="layers.0, layers.1, layers.2: expected as many"):
            model(ids).square().sum().backward()
        probe.step()


def test_hooks_that_hook_what_they_see_do_not_disturb_the_probe():
    torch.manual_seed(0)
    model, x, y = Plain(), torch.randn(6, 8), torch.randint(0, 8, (6,))
    plain = one_record(model, lambda m: functional.cross_entropy(m(x), y))
    report = diagnose(model, [(x, y)] * 2)
    model.fc1.register_forward_hook(lambda m, a, out: out.register_hook(lambda g: None) and None)
    hooked = one_record(model, lambda m: functional.cross_entropy(m(x), y))
    assert hooked.grad_norms == plain.grad_norms
    again = diagnose(model, [(x, y)] * 2)
    assert again.bp_grad_norms == pytest.approx(report.bp_grad_norms, rel=1e-6)


def test_positions_are_not_called_samples():
    model, ids = Tokens(), ids_of()
    with torch.no_grad():
        model.embed.weight[int(ids[0, 0])] = math.nan
    report = diagnose(model, [(ids, ids)] * 2, reduction="token")
    assert any(" of 32 positions have non-finite hidden states" in r for r in report.remarks)


@pytest.mark.parametrize("protocol", ["paper", "calibrated"])
def test_evidence_counts_what_its_median_is_over(protocol):
    model, ids = Tokens(), ids_of()
    samples, positions = ids.shape
    for reduction, per_batch, what in (
        ("flatten", samples, "samples"),
        ("token", samples * positions, "positions"),
    ):
        report = diagnose(model, [(ids, ids)] * 2, reduction=reduction, protocol=protocol)
        count = f"{per_batch} {what}" if protocol == "paper" else f"{2 * per_batch} {what}"
        assert count in report["b"].evidence


# ---- compiled


def test_a_compiled_pass_shows_the_same_sizes_pieces_and_autocast():
    torch.compiler.reset()
    found = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model, records = Tokens(by_positions), []
        with StepProbe(model, sink=records.append, example=ids_of(), alarms=False) as probe:
            run = torch.compile(model, backend="aot_eager") if compiled else model
            for length in (8, 12):
                ids = ids_of(length=length)
                with torch.autocast("cpu", enabled=length == 12):
                    loss = run(ids, ids)
                loss.backward()
                probe.step()
        found[compiled] = records
    torch.compiler.reset()
    for eager, compiled in zip(found[False], found[True], strict=True):
        for name in ("rms_norms", "credit_gains", "output_grad_norm"):
            assert getattr(compiled, name) == pytest.approx(getattr(eager, name), rel=1e-4)
        assert (compiled.autocast, compiled.gain_reference) == (eager.autocast, "output")
    assert [r.autocast for r in found[True]] == [None, "bfloat16"]


def test_alarms_do_not_judge_gains_of_another_reference():
    alarms = Alarms(actions=())
    for step in range(120):
        other = step >= 100 and step % 2
        gains = (50.0, 50.0, 1.0) if other else (0.5,) * 3
        reference = "c" if other else "output"
        alarms(record(step, credit_gains=gains, gain_reference=reference))
    assert alarms.events == []
