"""What counts as one sample's state, against the same written by hand in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from fadiag_fast import diagnose
from fadiag_fast.capture import Captured, Probe
from fadiag_fast.capture.reduction import REDUCTIONS, SampleReduction
from fadiag_fast.capture.statistics import batch_statistics


def states(shape, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def captured_of(hidden, grad, classes=4):
    logits = torch.randn(len(hidden), classes)
    return Captured([hidden], [grad], logits, torch.randn_like(logits), torch.tensor(1.0))


def norms(tensor):
    return torch.linalg.vector_norm(tensor.flatten(1), dim=1)


BY_HAND = {
    ("flatten", (5, 3, 4)): lambda t, grad: t.reshape(5, 12),
    ("cls", (5, 3, 4)): lambda t, grad: t[:, 0, :],
    ("mean", (5, 3, 4)): lambda t, grad: t.sum(1) / (1 if grad else 3),
    ("token", (5, 3, 4)): lambda t, grad: torch.cat([t[b] for b in range(5)]),
    ("flatten", (5, 4, 2, 3)): lambda t, grad: t.reshape(5, 24),
    ("mean", (5, 4, 2, 3)): lambda t, grad: t.sum((2, 3)) / (1 if grad else 6),
    ("token", (5, 4, 2, 3)): lambda t, grad: torch.stack(
        [t[b, :, i, j] for b in range(5) for i in range(2) for j in range(3)]
    ),
    **{(kind, (5, 4)): lambda t, grad: t for kind in REDUCTIONS},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize(("kind", "shape"), BY_HAND)
def test_reductions(kind, shape, dtype):
    hidden, grad = states(shape, dtype)
    statistics = batch_statistics(captured_of(hidden, grad), None, reduction=SampleReduction(kind))
    by_hand = BY_HAND[kind, shape]
    torch.testing.assert_close(statistics.hidden_norm[0], norms(by_hand(hidden, False)))
    torch.testing.assert_close(statistics.grad_norm[0], norms(by_hand(grad, True)))
    mean = by_hand(grad, True).mean(0)
    mean = torch.view_as_real(mean) if dtype.is_complex else mean
    torch.testing.assert_close(statistics.grad_mean[0].double().reshape(mean.shape), mean)
    assert statistics.shapes == (shape[1:],)
    assert statistics.sizes == (mean.numel(),)
    assert statistics.batch_size == 5


def test_features_last():
    hidden, grad = states((5, 2, 3, 4))
    for kind, by_hand in (
        ("mean", lambda t: t.mean((1, 2))),
        ("token", lambda t: t.reshape(30, 4)),
    ):
        reduced, _ = SampleReduction(kind, feature_dim=-1).apply(hidden, grad)
        torch.testing.assert_close(reduced, by_hand(hidden))


def test_the_gradient_of_a_mean_is_the_slope_along_a_shift_of_all_positions():
    """The documented meaning: what the loss does when the same vector is added everywhere."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def loss(h):
        return (h.sin() * torch.arange(4)).pow(2).sum()

    (grad,) = torch.autograd.grad(loss(hidden), hidden)
    _, reduced = SampleReduction("mean").apply(hidden, grad)
    shift = torch.zeros(2, 1, 4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(hidden.detach() + shift), shift)
    torch.testing.assert_close(reduced, slope[:, 0])


def test_means_of_half_precision_are_wider():
    """3000 terms of 30: beyond float16's range, and far beyond its precision before."""
    hidden = torch.full((2, 3000, 4), 30.0, dtype=torch.float16)
    mean, total = SampleReduction("mean").apply(hidden, hidden)
    assert mean.dtype == total.dtype == torch.float32
    assert (mean == 30).all()
    assert (total == 90000).all()


def test_a_token_has_its_samples_output_error():
    hidden, grad = states((5, 3, 4))
    captured = captured_of(hidden, grad)
    statistics = batch_statistics(captured, None, reduction=SampleReduction("token"))
    error = norms(captured.logit_grads.double()).repeat_interleave(3)
    torch.testing.assert_close(statistics.output_grad_norm, error)
    torch.testing.assert_close(statistics.credit_gain[0], norms(grad.reshape(15, 4)) / error)


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (lambda: SampleReduction("max"), (5, 4), "expected one of flatten, cls, mean, token, got"),
        (lambda: SampleReduction("cls"), (5, 4, 2, 3), r"reduction cls: .*\[B, T, D\], got \[5, 4"),
        (lambda: SampleReduction("mean", 0), (5, 3, 4), "beside the samples' dimension 0 .*got 0"),
        (lambda: SampleReduction("token", 3), (5, 3, 4), r"shape \[5, 3, 4\], got 3"),
        (lambda: SampleReduction("mean", -3), (5, 3, 4), "got -3"),
    ],
)
def test_what_cannot_be_reduced(make, shape, message):
    with pytest.raises(ValueError, match=message):
        make().apply(*states(shape))


def test_tokens_of_different_numbers():
    captured = captured_of(*states((5, 3, 4)))
    more = states((5, 2, 4))
    captured = captured._replace(
        hiddens=[*captured.hiddens, more[0]], grads=[*captured.grads, more[1]]
    )
    with pytest.raises(ValueError, match=r"reduction token: .*same number of positions .*5, 2, 4"):
        batch_statistics(captured, None, reduction=SampleReduction("token"))


# ---- in a report


class Pyramid(nn.Module):
    """Four stages of convolutions, half as wide and twice as deep each."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4 * 2**i, 8 * 2**i, 3, padding=1, stride=2), nn.ReLU())
            for i in range(3)
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def images(count=9):
    torch.manual_seed(0)
    return [(torch.randn(6, 3, 8, 8), torch.randint(0, 5, (6,))) for _ in range(count)]


def test_a_report_of_states_with_different_shapes():
    torch.manual_seed(0)
    model, batches = Pyramid(), images()
    report = diagnose(model, batches)
    header, rows = report.layer_header(), report.layer_rows()
    assert header[2] == "shape"
    assert "RMS growth" in header
    assert [row[2] for row in rows] == ["4×8×8", "8×4×4", "16×2×2", "32×1×1"]
    sizes = [256, 128, 64, 32]
    rms = [norm / np.sqrt(size) for norm, size in zip(report.residual_norms, sizes, strict=True)]
    np.testing.assert_allclose(report.to_dict()["rms_norms"], rms)
    growth = [float(row[header.index("RMS growth")]) for row in rows[1:]]
    np.testing.assert_allclose(growth, np.divide(rms[1:], rms[:-1]), rtol=5e-3)
    remark = next(r for r in report.remarks if "differ in size" in r)
    assert f"the largest growth is {max(np.divide(rms[1:], rms[:-1])):.3g}" in remark
    assert report.provenance["sample_reduction"] == "flatten"
    for text in (str(report), report.to_markdown()):
        assert "RMS growth" in text
        assert "4×8×8" in text


def test_a_report_of_states_with_one_shape_has_no_such_columns():
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
    report = diagnose(model, [(torch.randn(6, 5), torch.randint(0, 5, (6,))) for _ in range(9)])
    assert "shape" not in report.layer_header()
    assert "RMS growth" not in report.layer_header()
    assert not any("differ in size" in remark for remark in report.remarks)


def test_the_reduction_is_recorded():
    report = diagnose(Pyramid(), images(), reduction=SampleReduction("mean", 1))
    assert report.provenance["sample_reduction"] == "mean, features in dimension 1"
    assert report.figures.sizes == (4, 8, 16, 32)
    assert next(row[2] for row in report.layer_rows()) == "4×8×8"


# ---- other tasks


class Tagger(nn.Module):
    """Tokens in, logits per token out; with labels, a bundle that carries the loss."""

    def __init__(self, sequence_first=False):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(6, 2, 8, batch_first=not sequence_first) for _ in range(2)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids, labels=None):
        h = self.table(input_ids)
        for layer in self.layers:
            h = layer(h)
        logits = self.head(h)
        if labels is None:
            return logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits, "states": h}


def tokens(count=9, batch=4, length=5):
    torch.manual_seed(0)
    return [
        (torch.randint(0, 11, (batch, length)), torch.randint(0, 3, (batch, length)))
        for _ in range(count)
    ]


def figures(report):
    return [*report.residual_norms, *report.bp_grad_norms, *report.credit_gains]


def test_labels_per_token():
    """The same from pairs, from flat labels and logits, and from the model's own loss."""
    model, batches = Tagger(), tokens()
    report = diagnose(model, batches)
    dicts = diagnose(model, [{"input_ids": x, "labels": y} for x, y in batches])
    np.testing.assert_allclose(figures(report), figures(dicts), rtol=1e-6)

    class Flat(Tagger):
        def forward(self, input_ids):
            return super().forward(input_ids).flatten(0, 1)

    flat = Flat()
    flat.load_state_dict(model.state_dict())
    flat_report = diagnose(flat, [(x, y.flatten()) for x, y in batches])
    np.testing.assert_allclose(figures(report), figures(flat_report), rtol=1e-6)
    assert dicts.figures.batch_size == flat_report.figures.batch_size == 4


@pytest.mark.parametrize("length", [5, 4], ids=["longer", "as_long_as_the_batch"])
def test_sequence_first(length):
    """The same network with the batch in the other dimension has the same figures."""
    model, batches = Tagger(), tokens(length=length)
    other = Tagger(sequence_first=True)
    other.load_state_dict(model.state_dict())
    expected = diagnose(model, batches)
    report = diagnose(other, [(x.T, y.T) for x, y in batches], batch_dim=1)
    np.testing.assert_allclose(figures(report), figures(expected), rtol=1e-4)
    # (c) compares the same entries, in another layout.
    assert report["c"].value == pytest.approx(expected["c"].value, abs=1e-5)


def test_sequence_first_with_one_label_per_sample():
    class Classifier(Tagger):
        def forward(self, input_ids):
            return super().forward(input_ids).mean(0)

    batches = [(x.T, y[:, 0]) for x, y in tokens()]
    report = diagnose(Classifier(sequence_first=True), batches, batch_dim=1)
    assert report.figures.batch_size == 4
    assert report.figures.shapes[0] == (5, 6)
    assert "accuracy_on_batches" in report.provenance


def test_regression():
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
    batches = [(torch.randn(6, 5), torch.randn(6, 5)) for _ in range(9)]
    report = diagnose(model, batches, loss=nn.functional.mse_loss)
    assert report.provenance["loss"] == "mse_loss"
    assert report.provenance["loss_reduction"] == "as the loss defines it"
    x, y = batches[0]
    hidden = model[0](x)
    error = nn.functional.mse_loss(model[2](model[1](hidden)), y)
    (grad,) = torch.autograd.grad(error, hidden)
    expected = norms(grad).sort().values[2]
    assert report.bp_grad_norms[0] == pytest.approx(float(expected), rel=1e-5)


def test_another_part_of_the_output():
    """Two heads: the labels belong to one of them."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
            self.heads = nn.ModuleList([nn.Linear(5, 2), nn.Linear(5, 4)])

        def forward(self, x):
            h = self.layers(x)
            return {"coarse": self.heads[0](h), "fine": self.heads[1](h)}

    torch.manual_seed(0)
    model = Two()
    x, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 2, 1])
    assert diagnose(model, [(x, y)] * 9, output="fine").provenance["accuracy_on_batches"] >= 0
    picked = diagnose(model, [(x, y)] * 9, output=lambda out: out["fine"])
    assert figures(picked) == figures(diagnose(model, [(x, y)] * 9, output="fine"))
    with pytest.raises(ValueError, match="expected labels from 0 to 1, got labels from 0 to 3"):
        diagnose(model, [(x, y)] * 9)
    with pytest.raises(ValueError, match="at output='rough', got dict with coarse, fine"):
        diagnose(model, [(x, y)] * 9, output="rough")


def test_logits_without_a_row_per_sample():
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
    pooled = Pooled(model)
    x, y = torch.randn(6, 5), torch.zeros(6, dtype=torch.long)
    probe = Probe(pooled.eval(), loss=lambda logits, _: logits.sum())
    captured = probe.capture(x, y)
    assert not probe.has_output  # so that gains are relative to the last state
    with torch.no_grad():
        before = model(x)
    torch.testing.assert_close(captured.hiddens[-1], before)
    assert torch.equal(captured.grads[-1], torch.ones_like(before))


class Pooled(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).sum(0)
