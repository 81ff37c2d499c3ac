"""``diagnose`` end to end: figures against a float64 computation by hand, and every odd input."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from networks import KINDS, Branching, audit_by_hand, example

import fadiag_fast
from fadiag_fast import DiagnosticThresholds, diagnose


def batches_of(kind, count=9, batch=12):
    model, x, y, states = example(kind, batch * count)
    return model, list(zip(x.split(batch), y.split(batch), strict=True)), states


def figures_by_hand(model, batches, states):
    """The protocol's figures in float64, from autograd and numpy alone."""
    audits = [audit_by_hand(copy.deepcopy(model), x, y, states) for x, y in batches]
    hiddens, grads, logit_grads = audits[0]

    def norms(tensors):
        return [np.linalg.norm(t.flatten(1).numpy(), axis=1) for t in tensors]

    def median(values):
        return float(np.sort(values)[(len(values) - 1) // 2])

    error = norms([logit_grads])[0]
    middle = (len(hiddens) - 1) // 2
    means = [g[middle].mean(0).flatten().numpy() for _, g, _ in audits]
    units = [m / np.linalg.norm(m) for m in means]
    pairs = [units[i] @ units[j] for i in range(len(units)) for j in range(i)]
    return {
        "residual_norms": [median(n) for n in norms(hiddens)],
        "bp_grad_norms": [median(n) for n in norms(grads)],
        "credit_gains": [median(n / error) for n in norms(grads)],
        "stability": float(np.mean(pairs)),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_figures_agree_with_a_computation_by_hand(kind, dtype, device):
    model, batches, states = batches_of(kind)
    expected = figures_by_hand(model, batches, states)
    batches = [(x.to(dtype) if x.is_floating_point() else x, y) for x, y in batches]
    report = diagnose(model.to(dtype).to(device), batches)
    # float32 runs the network itself in float32: about a hundred roundings of 6e-8.
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    np.testing.assert_allclose(report.residual_norms, expected["residual_norms"], rtol=tolerance)
    np.testing.assert_allclose(report.bp_grad_norms, expected["bp_grad_norms"], rtol=tolerance)
    np.testing.assert_allclose(report.credit_gains, expected["credit_gains"], rtol=tolerance)
    # The batch means are stored in float32 unless the states are float64.
    assert report.cross_batch_direction_stability == pytest.approx(expected["stability"], abs=2e-5)
    assert report.verdict in ("trustworthy", "needs walk-back: (c)")


@pytest.mark.parametrize("kind", KINDS)
def test_backends_agree(kind):
    model, batches, _ = batches_of(kind)
    native, torch_path = (diagnose(model, batches, backend=b) for b in (None, "torch"))
    np.testing.assert_allclose(native.residual_norms, torch_path.residual_norms, rtol=1e-12)
    np.testing.assert_allclose(native.bp_grad_norms, torch_path.bp_grad_norms, rtol=1e-12)
    assert torch_path.provenance["backend"] == "torch"
    assert native.verdict == torch_path.verdict


def test_an_exploding_block_is_named():
    model, batches, _ = batches_of("branching")
    with torch.no_grad():
        model.blocks[1][1].weight.mul_(1e6)
    report = diagnose(model, batches)
    assert report["a"].label == "EXPLODED"
    assert report["a"].layer == 2
    assert "blocks.1 takes the median norm" in report["a"].evidence
    assert "(a)" in report.verdict


def test_a_vanished_gradient_is_told_from_a_solved_task():
    """Both have ‖g_L‖ under the floor; only one has lost its gradient on the way."""
    model, batches, _ = batches_of("branching")
    with torch.no_grad():
        for block in model.blocks:
            block[1].bias.copy_(torch.linspace(1e11, 1e12, 6))
    lost = diagnose(model.double(), [(x.double(), y) for x, y in batches])
    assert lost["b"].label == "AT FLOOR"
    assert lost.credit_gains[-1] < 1e-5
    assert not any("(b) fires, but" in remark for remark in lost.remarks)

    model, batches, _ = batches_of("branching")
    with torch.no_grad():
        model.out_head.bias.copy_(torch.tensor([60.0, 0.0, 0.0, 0.0]))
    solved = diagnose(model.double(), [(x.double(), torch.zeros_like(y)) for x, y in batches])
    assert solved["b"].label == "AT FLOOR"
    assert any("(b) fires, but" in r and "a solved task" in r for r in solved.remarks)


def test_gains_do_not_depend_on_the_loss_reduction():
    model, batches, _ = batches_of("branching")
    mean = diagnose(model, batches)
    total = diagnose(
        model, batches, loss=lambda z, y: torch.nn.functional.cross_entropy(z, y, reduction="sum")
    )
    np.testing.assert_allclose(mean.credit_gains, total.credit_gains, rtol=1e-5)
    np.testing.assert_allclose(np.multiply(mean.bp_grad_norms, 12), total.bp_grad_norms, rtol=1e-5)
    assert total.provenance["loss_reduction"] == "as the loss defines it"


def test_depth_utility_is_only_judged_with_both_accuracies():
    model, batches, _ = batches_of("branching")
    thresholds = DiagnosticThresholds(direction_stability=1.0)
    assert diagnose(model, batches, 0.6, thresholds=thresholds)["d"].label == "not evaluated"
    assert diagnose(model, batches, 0.6, 0.5, thresholds=thresholds)["d"].label == "clears"
    report = diagnose(model, batches, 0.6, 0.59, thresholds=thresholds)
    assert (report["d"].label, report.verdict) == ("UNDERCUT", "needs walk-back: (d)")


def test_no_batches():
    model, _, _ = batches_of("branching")
    report = diagnose(model, [])
    assert report.verdict == "not enough data"
    assert report.residual_norms == []
    assert "no batch with a sample" in str(report)
    assert json.loads(report.to_json())["verdict"] == "not enough data"


def test_empty_batches_are_left_out_and_counted():
    model, batches, _ = batches_of("branching")
    x, y = batches[0]
    report = diagnose(model, [(x[:0], y[:0]), *batches, (x[:0], y[:0])])
    assert report.residual_norms == diagnose(model, batches).residual_norms
    assert "2 batches without samples were left out." in report.remarks


def test_one_batch_is_not_enough():
    model, batches, _ = batches_of("branching")
    report = diagnose(model, batches[:1])
    assert report.verdict == "not enough data"
    assert report["c"].label == "not enough data"
    assert report["c"].value is None
    assert report["a"].label == "OK"


def test_batches_of_one_sample():
    model, batches, _ = batches_of("branching", count=9, batch=1)
    report = diagnose(model, batches)
    assert report["c"].value is not None
    assert any("holds one sample" in remark for remark in report.remarks)


def test_a_network_without_blocks():
    model = Branching(depth=0)
    batches = [(torch.randn(4, 5), torch.zeros(4, dtype=torch.long)) for _ in range(9)]
    report = diagnose(model, batches)
    assert report["a"].value == 1.0
    assert "fewer than two hidden states" in report["a"].evidence


def test_one_poisoned_sample_does_not_poison_the_others():
    model, batches, _ = batches_of("branching")
    clean = diagnose(model, batches)
    batches[0][0][3, 0] = float("nan")
    report = diagnose(model, batches)
    assert report["a"].label == "OK"
    assert not math.isnan(report["a"].value)
    assert any("1 of 12 samples have non-finite hidden states" in r for r in report.remarks)
    assert "1 more have no direction" in report["c"].evidence
    assert abs(report["c"].value - clean["c"].value) < 0.5


def test_weights_that_are_not_finite():
    model, batches, _ = batches_of("branching")
    with torch.no_grad():
        model.blocks[1][1].weight[0, 0] = float("nan")
    report = diagnose(model, batches)
    assert report["a"].label == "NON-FINITE"
    assert report["a"].layer == 2
    assert report["b"].label == "NON-FINITE"
    assert report.verdict == "needs walk-back: (a)+(b)"
    text = str(report)
    assert "blocks.1 are not finite" in text
    assert json.loads(report.to_json())["residual_norms"][2] == "NaN"


def test_the_batch_size_is_reported_where_it_decides():
    """The same network in one batch of 4096 and of 8: ‖g_L‖ moves with 1/B, the gain does not."""
    model, x, y, _ = example("branching", 4096)
    limit = 1e-3
    thresholds = DiagnosticThresholds(gradient_floor=limit)
    large = diagnose(model, [(x, y)], thresholds=thresholds)
    small = diagnose(model, [(x[:8], y[:8])], thresholds=thresholds)
    assert large.bp_grad_norms[-1] < limit < small.bp_grad_norms[-1]
    assert any("divides by 4096 samples" in remark for remark in large.remarks)
    assert large.credit_gains[-1] == pytest.approx(small.credit_gains[-1], rel=0.3)


BAD_INPUT = {
    "acc": (
        {"headline_acc": 61.5},
        ValueError,
        "headline_acc: expected a fraction from 0 to 1, got 61",
    ),
    "frozen": (
        {"frozen_baseline_acc": -0.1},
        ValueError,
        "frozen_baseline_acc: expected a fraction",
    ),
    "labels_high": (
        {"eval_batches": [(torch.randn(3, 5), torch.tensor([0, 4, 1]))]},
        ValueError,
        "batch 0: expected labels from 0 to 3, got labels from 0 to 4",
    ),
    "labels_low": (
        {"eval_batches": [(torch.randn(2, 5), torch.tensor([0, -1]))]},
        ValueError,
        "batch 0: expected labels from 0 to 3, got labels from -1 to 0",
    ),
    "count": (
        {"eval_batches": [(torch.randn(3, 5), torch.tensor([0, 1]))]},
        ValueError,
        "batch 0: expected as many labels as samples, 3, got 2",
    ),
    "no_pair": (
        {"eval_batches": [torch.randn(3, 5)]},
        TypeError,
        r"batch 0: expected a pair \(x, y\)",
    ),
    "no_tensor": (
        {"eval_batches": [([1.0], [0])]},
        TypeError,
        "batch 0: expected x to be a tensor",
    ),
    "scalar": (
        {"eval_batches": [(torch.tensor(1.0), torch.tensor(0))]},
        ValueError,
        "batch 0: expected x with a batch dimension",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, device):
    arguments, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        diagnose(Branching().to(device), **{"eval_batches": [], **arguments})


def test_a_report_can_be_printed_parsed_and_pasted():
    model, batches, _ = batches_of("branching")
    report = diagnose(model, batches, 0.5, 0.4, "A|B", "a note")
    text = str(report)
    for expected in ("A|B: ", "a note", "embed", "blocks.2", "(c) direction stability", "verdict:"):
        assert expected in text
    record = json.loads(report.to_json())
    assert record["residual_norms"] == report.residual_norms
    assert record["bp_grad_norms"] == report.bp_grad_norms
    assert record["cross_batch_stability"] == report.cross_batch_direction_stability
    assert record["diagnostics"]["d"]["value"] == pytest.approx(10.0)
    assert record["provenance"]["batches"] == "9 of 12"
    assert record["provenance"]["loss_reduction"] == "mean"
    assert record["provenance"]["taps"] == "residual contract: asked for 3, saw 3, 4 states"
    assert record["provenance"]["fadiag_fast"] == fadiag_fast.__version__
    markdown = report.to_markdown()
    assert markdown.startswith("### A\\|B: ")
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    columns = {line.replace("\\|", "").count("|") for line in tables}
    assert columns == {8, 6}, "every row has its header's columns"
    with pytest.raises(KeyError, match="expected one of a, b, c, d"):
        report["e"]
