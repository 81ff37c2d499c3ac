"""The calibrated protocol: what it must not depend on, what it must find, and what it says."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_protocol import figures as plain_figures
from torch import nn
from typer.testing import CliRunner

from benchmarks import calibration
from fadiag_fast import DiagnosticThresholds, cli, diagnose
from fadiag_fast.capture.directions import direction_figures
from fadiag_fast.capture.statistics import class_errors, equal_logits
from fadiag_fast.checkpoints import save_checkpoint
from fadiag_fast.protocol import Status, evaluate, verdict_of
from fadiag_fast.protocol.calibrated import STATE_FLOOR, largest_growth
from fadiag_fast.protocol.explanations import find_causes
from fadiag_fast.protocol.intervals import accuracy_difference, student_975, wilson
from fadiag_fast.protocol.judging import judge_figures
from fadiag_fast.zoo import build_model, load_dataset, train

LIMITS = DiagnosticThresholds()
WIDTH = 64


def figures(norms=(10.0, 11.0, 12.0, 13.0, 14.0), **changes):
    count = len(norms)
    values = {
        "sizes": [100] * count,
        "shapes": [(100,)] * count,
        "pooled_norms": list(norms),
        "pooled_gains": [0.4] * count,
        "num_samples": 1280,
        "num_measurable": 1280,
        "num_non_finite": 0,
        "equal_logits": False,
        "output_error": 0.6,
        "grad_dtype": "float32",
        "stability_errors": [0.05] * count,
        "stability_nulls": [0.08] * count,
    }
    return plain_figures(norms, **{**values, **changes})


def judged(given, limits=LIMITS):
    return {d.key: d for d in judge_figures(given, limits, "calibrated")}


def verdict(given):
    return verdict_of(judge_figures(given, LIMITS, "calibrated"), "calibrated")


def causes(given):
    return find_causes(given, judge_figures(given, LIMITS, "calibrated"), LIMITS)


# ---- (a)


def test_the_paper_protocol_is_the_default_and_untouched():
    given = figures()
    assert judge_figures(given) == evaluate(given)
    assert judge_figures(given, LIMITS, "paper") == evaluate(given, LIMITS)


def test_growth_is_per_feature_where_shapes_differ():
    """Norms of 1 and 100 over 1 and 10⁴ features are the same root mean square."""
    given = figures((1.0, 100.0), sizes=[1, 10_000])
    assert evaluate(given)[0].fired
    assert judged(given)["a"].value == pytest.approx(1.0)
    assert judged(given)["a"].status is Status.PASSED
    hidden = figures((100.0, 51.0), sizes=[10_000, 1])  # RMS 1 to 51 while the norm shrinks
    assert not evaluate(hidden)[0].fired
    assert judged(hidden)["a"].label == "EXPLODED"


def test_states_that_normalisation_cannot_tell_from_zero_do_not_count_as_small():
    """A class token that starts at 1e-6 and becomes as large as the others."""
    given = figures((1e-5, 1.0), sizes=[100, 100])
    assert evaluate(given)[0].value == pytest.approx(1e5)
    assert judged(given)["a"].value == pytest.approx(0.1 / STATE_FLOOR)
    assert judged(given)["a"].status is Status.PASSED


def test_growth_over_many_blocks_has_a_limit_of_its_own():
    """64 blocks of 1.3 are 2e7: no step is large, and the stream is lost all the same."""
    slow = figures([10 * 1.3**l for l in range(65)])
    assert not evaluate(slow)[0].fired
    growth = judged(slow)["a"]
    assert (growth.label, growth.layer) == ("EXPLODED", 64)
    assert growth.value == pytest.approx(1.3)
    assert "over 64 blocks, embed to blocks.63, it grows by 1.96e+07" in growth.evidence
    # Equilibrium propagation of the reference table: 8.7 to 8e3 over four blocks, none above 11.
    bounded = figures([8.7 * (8e3 / 8.7) ** (l / 4) for l in range(5)])
    assert judged(bounded)["a"].status is Status.PASSED
    limit = LIMITS.total_growth
    assert limit == pytest.approx(1 / 1.28e-5)
    steps = 8
    below, above = (
        figures([10 * (limit * part) ** (l / steps) for l in range(steps + 1)])
        for part in (0.999, 1.001)
    )
    assert (judged(below)["a"].fired, judged(above)["a"].fired) == (False, True)


def test_the_largest_growth_agrees_with_all_pairs():
    random = np.random.default_rng(0)
    for count in (2, 3, 7):
        scales = list(10 ** random.uniform(-8, 4, count))
        pairs = [
            scales[m] / max(scales[l], 1e-3) for l, m in itertools.combinations(range(count), 2)
        ]
        assert largest_growth(scales, 1e-3)[0] == pytest.approx(max(pairs))


def test_few_blocks_that_grow_and_shrink_again_are_still_caught():
    assert judged(figures((10.0, 1000.0, 10.0)))["a"].label == "EXPLODED"


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"pooled_norms": [1.0, 0.0, 1.0, 1.0, 1.0]}, "DEAD"),
        ({"pooled_norms": [1.0, 1.0, math.inf, math.nan, 1.0]}, "NON-FINITE"),
        ({"num_non_finite": 641}, "NON-FINITE"),
        ({"num_non_finite": 640}, "OK"),
    ],
)
def test_states_that_are_zero_or_not_finite(changes, label):
    assert judged(figures(**changes))["a"].label == label


# ---- (b)


def test_the_gain_has_its_floor_and_fires_beyond_it():
    at, below = (figures(pooled_gains=[0.4] * 4 + [gain]) for gain in (1.28e-5, 1.27e-5))
    assert (judged(at)["b"].fired, judged(below)["b"].fired) == (False, True)
    assert judged(below)["b"].label == "AT FLOOR"


def test_the_size_of_the_gradient_decides_nothing():
    tiny = figures(bp_grad_norms=[1e-30] * 5, output_grad_norm=2.5e-30)
    assert evaluate(tiny)[1].fired
    assert judged(tiny)["b"].status is Status.PASSED


def test_without_any_output_error_there_is_nothing_to_judge():
    given = figures(
        pooled_gains=[math.nan] * 5,
        bp_grad_norms=[0.0] * 5,
        num_measurable=0,
        output_grad_norm=0.0,
        output_error=1e-20,
    )
    floor = judged(given)["b"]
    assert floor.status is Status.NOT_ENOUGH_DATA
    assert floor.evidence == "the output error is zero in every sample"
    assert verdict(given) == "not enough data"
    assert causes(given)[0].startswith("Solved task: the output error is zero in every sample")


def test_a_gradient_that_ends_within_the_network_is_dead():
    given = figures(pooled_gains=[0.0, 0.0, 0.4, 0.4, 0.4])
    floor = judged(given)["b"]
    assert (floor.label, floor.layer, verdict(given)) == ("DEAD", 1, "needs walk-back: (b)")


def test_a_head_of_zeros_is_no_failure_of_the_stream():
    given = figures(pooled_gains=[0.0] * 5, equal_logits=True)
    assert verdict(given) == "not enough data"
    assert causes(given)[0].startswith("Zero head:")
    assert verdict(replace(given, equal_logits=False)) == "needs walk-back: (b)"


@pytest.mark.parametrize("changes", [{"bp_grad_norms": [1, 1, 1, 1, math.nan]}])
def test_gradients_that_are_not_finite(changes):
    given = figures(pooled_gains=[math.nan] * 5, **changes)
    assert judged(given)["b"].label == "NON-FINITE"
    assert causes(given)[0].startswith("Non-finite: ")


# ---- (c)


def test_student_agrees_with_the_table():
    for freedom, quantile in ((5, 2.5706), (7, 2.3646), (9, 2.2622), (30, 2.0423), (1000, 1.9623)):
        assert student_975(freedom) == pytest.approx(quantile, rel=1e-3)


def unit_directions(count, common, seed=0):
    random = np.random.default_rng(seed)
    drawn = random.standard_normal((count, 20)) + common
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@pytest.mark.parametrize("count", [3, 8, 10])
@pytest.mark.parametrize("common", [0.0, 1.0])
def test_interval_and_null_agree_with_brute_force(count, common):
    units = unit_directions(count, common)

    def statistic(given):
        pairs = itertools.combinations(given, 2)
        return float(np.mean([a @ b for a, b in pairs]))

    left_out = [statistic(np.delete(units, i, 0)) for i in range(count)]
    mean = np.mean(left_out)
    jackknife = math.sqrt((count - 1) / count * sum((v - mean) ** 2 for v in left_out))
    flips = [
        statistic(units * np.array(signs)[:, None])
        for signs in itertools.product((1, -1), repeat=count)
    ]
    cosines = torch.tensor(units @ units.T)
    cosines.diagonal().fill_(1.0)
    found = direction_figures(torch.stack([cosines, cosines]))
    assert found.error.tolist() == pytest.approx([jackknife] * 2, rel=1e-9)
    # Ties among the flips, all in pairs of opposite signs, leave the quantile where it is.
    assert found.null.tolist() == pytest.approx(
        [float(np.quantile(flips, 0.95, method="higher"))] * 2, rel=1e-9
    )


def test_many_batches_take_the_flips_exact_variance():
    units = unit_directions(13, 0.0)
    cosines = torch.tensor(units @ units.T)
    cosines.diagonal().fill_(1.0)
    random = np.random.default_rng(1)
    signs = random.choice([-1.0, 1.0], size=(20_000, 13))
    pairs = units @ units.T - np.eye(13)
    flips = ((signs @ pairs) * signs).sum(1) / (13 * 12)
    # The standard error of a standard deviation of 20,000 draws is 0.5%; 3 of them.
    expected = 1.6449 * flips.std()
    assert direction_figures(cosines[None]).null.item() == pytest.approx(expected, rel=0.02)


def test_batches_without_a_direction_are_left_out_of_the_interval():
    units = unit_directions(9, 0.5)
    cosines = torch.tensor(units @ units.T)
    cosines.diagonal().fill_(1.0)
    with_hole = torch.full((10, 10), math.nan, dtype=torch.float64)
    with_hole[1:, 1:] = cosines
    whole, holed = (direction_figures(c[None]) for c in (cosines, with_hole))
    # The same sums, in another order.
    torch.testing.assert_close(tuple(whole), tuple(holed), rtol=1e-13, atol=0.0)
    assert whole.num_directions.item() == 9
    few = direction_figures(cosines[None, :2, :2])
    assert few.error.isnan().all()
    assert few.null.isnan().all()


def test_a_common_direction_alone_is_no_failure():
    """Backpropagation has .59 at step 90."""
    early = figures(stabilities=[0.59] * 5)
    assert evaluate(early)[2].fired
    assert verdict(early) == "trustworthy"
    assert judged(early)["c"].label == "OK"
    assert "95% interval 0.48 to 0.70" in judged(early)["c"].evidence


@pytest.mark.parametrize(
    ("stability", "error", "null", "label", "cause"),
    [
        (0.9, 0.05, 0.1, "DRIFT", "Drift: "),
        (0.02, 0.05, 0.1, "NOISE", "Noise: "),
        (0.35, 0.05, 0.1, "undecided", None),
        (0.9, 0.05, 0.95, "undecided", None),
    ],
)
def test_beside_a_lost_gradient_it_names_the_mode(stability, error, null, label, cause):
    given = figures(
        pooled_gains=[1e-9] * 5,
        stabilities=[stability] * 5,
        stability_errors=[error] * 5,
        stability_nulls=[null] * 5,
    )
    assert judged(given)["c"].label == label
    # The verdict is the same: the mode depends on the batch size.
    assert verdict(given) == "needs walk-back: (b)"
    assert any(text.startswith(cause) for text in causes(given)) if cause else True


def test_few_batches_leave_the_verdict_to_the_others():
    given = figures(num_directions=[2] * 5, num_batches=2)
    assert judged(given)["c"].status is Status.NOT_EVALUATED
    assert verdict(given) == "trustworthy"


# ---- (d)


def test_intervals_agree_with_the_published_examples():
    """Newcombe 1998, Statistics in Medicine 17: 81 of 263, and 56 of 70 against 48 of 80."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    found = accuracy_difference(56 / 70, 70, 48 / 80, 80)
    assert found == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert accuracy_difference(1.0, 10, 0.0, 10) == pytest.approx((0.6075, 1.0), abs=5e-5)


@pytest.mark.parametrize(
    ("headline", "size", "label", "status"),
    [
        (0.80, 10_000, "UNDERCUT", Status.FIRED),
        (0.85, 10_000, "undecided", Status.NOT_ENOUGH_DATA),
        (0.85, 100, "undecided", Status.NOT_ENOUGH_DATA),
        (0.90, 10_000, "clears", Status.PASSED),
        (0.90, None, "undecided", Status.NOT_ENOUGH_DATA),
    ],
)
def test_depth_utility_is_judged_with_its_interval(headline, size, label, status):
    given = figures(headline_acc=headline, frozen_baseline_acc=0.84, test_size=size)
    utility = judged(given)["d"]
    assert (utility.label, utility.status) == (label, status)
    assert ("95% interval" in utility.evidence) == (size is not None)
    expected = {Status.FIRED: "needs walk-back: (d)", Status.PASSED: "trustworthy"}
    assert verdict(given) == expected.get(status, "not enough data")


def test_another_size_of_the_frozen_test_widens_the_interval():
    base = {"headline_acc": 0.80, "frozen_baseline_acc": 0.84, "test_size": 10_000}
    assert judged(figures(**base))["d"].fired
    assert judged(figures(**base, frozen_test_size=50))["d"].label == "undecided"


# ---- what is measured


def test_class_errors_agree_with_the_gradient_of_the_cross_entropy():
    torch.manual_seed(0)
    logits = (5 * torch.randn(7, 4, dtype=torch.float64)).requires_grad_()
    y = torch.randint(0, 4, (7,))
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(logits, y, reduction="sum"), logits)
    found = class_errors(logits, y)
    # Both are softmax − onehot in float64.
    torch.testing.assert_close(found, grad.norm(dim=1), rtol=1e-12, atol=1e-15)
    assert class_errors(logits, y.double()) is None
    assert class_errors(logits, {"y": y}) is None
    assert class_errors(logits, y.clone().index_fill_(0, torch.tensor(2), -100))[2].isnan()


def test_equal_logits_are_told():
    logits = torch.zeros(2, 5, 3)
    logits[1, 2, 1] = 1e-30
    assert equal_logits(logits).tolist() == [True, False]
    assert equal_logits(torch.zeros(1, 5, 1)).tolist() == [False]
    assert equal_logits(torch.zeros(2, 5)).tolist() == [False, False]


# ---- invariance


@pytest.fixture(scope="module")
def data():
    return load_dataset("fashion-mnist-mini")


@pytest.fixture(scope="module")
def networks(data):
    """A healthy network, one that DFA has broken, and one past zero error on 256 images."""
    flat, labels = data.train_images.flatten(1), data.train_labels
    model = build_model("resmlp", input_shape=(1, 28, 28), num_classes=10, seed=0, d_hidden=WIDTH)
    ((_, healthy),) = calibration.stages(model, flat, labels, (150,))
    model = build_model("resmlp", input_shape=(1, 28, 28), num_classes=10, seed=1, d_hidden=WIDTH)
    ((_, solved),) = calibration.stages(model, flat[:256], labels[:256], (500,))
    broken = train("resmlp", "dfa", data, steps=1000, model_options={"d_hidden": WIDTH}).model
    test = (data.test_images.flatten(1), data.test_labels)
    return {
        "healthy": (healthy, test, "trustworthy"),
        "broken": (broken.eval(), test, "needs walk-back: (a)"),
        "solved": (solved, (flat[:256], labels[:256]), "trustworthy"),
    }


def cut(images, labels, size):
    return list(zip(images.split(size), labels.split(size), strict=True))


def scaled(factor, reduction="mean"):
    def loss(output, y):
        return factor * nn.functional.cross_entropy(output, y, reduction=reduction)

    return loss


@pytest.mark.parametrize("kind", ["healthy", "broken", "solved"])
def test_the_verdict_does_not_depend_on_how_it_is_asked(networks, kind):
    """The same samples in batches of 8 to 1,024, under other losses and dtypes."""
    model, (images, labels), expected = networks[kind]
    images, labels = images[:1024], labels[:1024]

    def report(size=128, dtype=torch.float32, **options):
        probed = type(model)(784, WIDTH, 10, 4)
        probed.load_state_dict(model.state_dict())
        batches = cut(images.to(dtype), labels, size)
        return diagnose(probed.to(dtype), batches, protocol="calibrated", **options)

    sizes = (8, 32, 128, len(images))
    found = {f"B={size}": report(size) for size in sizes}
    found["sum"] = report(loss=scaled(1.0, "sum"))
    found |= {f"×{f:g}": report(loss=scaled(f)) for f in (1e-6, 1e-3, 1e3, 1e6)}
    found["bf16"] = report(dtype=torch.bfloat16)
    found["bf16, B=8, ×1e-6"] = report(8, torch.bfloat16, loss=scaled(1e-6))
    assert {name: one.verdict for name, one in found.items()} == dict.fromkeys(found, expected)
    reference = found["B=128"]
    for name, one in found.items():
        # In float32 all figures are the same but for rounding: about a hundred roundings of 6e-8,
        # and as many more as the output error cancels in 1 − softmax, 1e-7 / error.
        if "bf16" not in name:
            error = one.figures.output_error
            tolerance = 1e-4 + 1e-6 / error
            assert one["a"].value == pytest.approx(reference["a"].value, rel=1e-4), name
            assert one["b"].value == pytest.approx(reference["b"].value, rel=tolerance), name


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["healthy", "broken", "solved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_verdict_on_a_gpu_is_that_of_the_cpu(networks, kind, dtype):
    model, (images, labels), expected = networks[kind]
    found = {}
    for device in ("cpu", "cuda"):
        probed = type(model)(784, WIDTH, 10, 4)
        probed.load_state_dict(model.state_dict())
        batches = cut(images[:1024].to(device, dtype), labels[:1024].to(device), 128)
        found[device] = diagnose(probed.to(device, dtype), batches, protocol="calibrated")
    cpu, cuda = found["cpu"], found["cuda"]
    assert cpu.verdict == cuda.verdict == expected
    if dtype == torch.float32:  # as between ways of asking
        tolerance = 1e-4 + 1e-6 / cpu.figures.output_error
        assert cuda["a"].value == pytest.approx(cpu["a"].value, rel=1e-4)
        assert cuda["b"].value == pytest.approx(cpu["b"].value, rel=tolerance)


def test_the_paper_protocol_depends_on_it(networks):
    model, (images, labels), _ = networks["healthy"]
    batches = cut(images[:1024], labels[:1024], 128)
    assert diagnose(model, batches, loss=scaled(1e-6))["b"].fired
    solved, given, _ = networks["solved"]
    report = diagnose(solved, cut(*given, 32), protocol="calibrated")
    assert diagnose(solved, cut(*given, 32))["b"].fired == (
        report.figures.bp_grad_norms[-1] < LIMITS.gradient_floor
    )


# ---- causes: a network that shows each


def calibrated(model, batches, **options):
    return diagnose(model, batches, protocol="calibrated", **options)


def cause_of(report, start):
    (found,) = [cause for cause in report.causes if cause.startswith(start)]
    assert f"cause: {found}" in str(report)
    assert found in report.to_markdown()
    assert found in json.loads(report.to_json())["causes"]
    return found


@pytest.fixture(scope="module")
def test_batches(data):
    return data.eval_batches(32, flatten=True)


def test_cause_residual_growth_under_a_terminal_norm(networks, test_batches):
    model = calibration.grown(networks["healthy"][0], 1, 1e9)
    report = calibrated(model, test_batches)
    assert report.verdict == "needs walk-back: (a)+(b)"
    text = cause_of(report, "Residual growth under a terminal norm: ")
    assert "the norm divides the gradient by the scale" in text


def test_cause_residual_growth_without_one(test_batches):
    report = calibrated(calibration.slow_explosion(64, 0.3, norm=False), test_batches)
    assert report.verdict == "needs walk-back: (a)"
    assert "no terminal norm hides it" in cause_of(report, "Residual growth: ")


def test_cause_solved_task(networks, test_batches):
    model = networks["healthy"][0]

    def sure(factor):
        """A network of larger logits, and batches that it classifies without an error."""
        certain = calibration.faint_head(model, factor)
        with torch.no_grad():
            return certain, [(x, certain(x).argmax(1)) for x, _ in test_batches]

    report = calibrated(*sure(30.0), loss=scaled(1e-3))
    assert report.verdict == "trustworthy"
    assert "the median output error is" in cause_of(report, "Solved task: ")
    report = calibrated(*sure(1e6))
    assert report.verdict == "not enough data"
    assert report["b"].evidence == "the output error is zero in every sample"
    assert "there is no gradient to judge" in cause_of(report, "Solved task: ")


@pytest.mark.parametrize("dead", [0, 2, 3])
def test_cause_dead_layer(test_batches, dead):
    report = calibrated(calibration.plain_relu(4, dead), test_batches)
    assert report.verdict == "needs walk-back: (a)+(b)"
    assert report["a"].label == report["b"].label == "DEAD"
    text = cause_of(report, "Dead layer: ")
    assert f"the hidden states at blocks.{dead} are exactly zero in most samples" in text
    assert calibrated(calibration.plain_relu(4), test_batches).verdict == "trustworthy"


def test_cause_underflow_of_the_gradient(networks, data):
    batches = data.eval_batches(1000, 2, flatten=True)
    model = calibration.faint_head(networks["healthy"][0], 1e-4).half()
    report = calibrated(model, [(x.half(), y) for x, y in batches])
    assert report.verdict == "needs walk-back: (b)"
    assert "is exactly zero in most samples" in cause_of(report, "Underflow of float16: ")
    # The same network holds its gradients in a dtype with more range.
    assert calibrated(model.float(), batches).verdict == "trustworthy"


def test_cause_underflow_of_the_output_error(networks, test_batches):
    half = [(x.half(), y) for x, y in test_batches]
    model = calibration.grown(networks["healthy"][0], 0, 1.0).half()
    report = calibrated(model, half, loss=scaled(1e-6))
    assert report.verdict == "not enough data"
    text = cause_of(report, "Underflow of float16: ")
    assert "has left the range of the loss's gradients" in text
    assert calibrated(model, half).verdict == "trustworthy"


def test_cause_drift_and_noise(networks, test_batches):
    """One vector for all samples: labels of one class pull one way, labels at random do not."""
    model = calibration.same_everywhere(networks["healthy"][0], 0, 1e9)
    drift = calibrated(model, [(x, torch.zeros_like(y)) for x, y in test_batches])
    assert (drift.verdict, drift["c"].label) == ("needs walk-back: (a)+(b)", "DRIFT")
    assert "point the same way" in cause_of(drift, "Drift: ")
    torch.manual_seed(0)
    # All logits alike but for the head's weights, and as many labels of each class in a batch.
    even = torch.arange(30) % 10
    with torch.no_grad():
        model.out_head.weight.mul_(1e-3)
        model.out_head.bias.zero_()
    inputs = torch.randn(10, 30, 784)
    draws = [(x, even[torch.randint(0, 30, (30,))]) for x in inputs]
    noise = calibrated(model, draws)
    assert (noise.verdict, noise["c"].label) == ("needs walk-back: (a)+(b)", "NOISE")
    assert "do not point the same way" in cause_of(noise, "Noise: ")


def test_cause_non_finite(networks, test_batches):
    for name in ("embed.weight", "blocks.2.w1.weight", "out_head.weight"):
        report = calibrated(
            calibration.poisoned(networks["healthy"][0], name, math.nan), test_batches
        )
        assert report.verdict == "needs walk-back: (a)+(b)"
        assert "not finite" in cause_of(report, "Non-finite: ")


def test_a_healthy_network_needs_no_cause(networks, test_batches):
    report = calibrated(networks["healthy"][0], test_batches)
    assert (report.verdict, report.causes) == ("trustworthy", ())


# ---- false alarms and misses


def test_no_false_alarm_and_no_miss_among_the_reduced_cases():
    """A tenth of what ``python -m benchmarks calibration`` judges."""
    found = [
        calibration.row_of(case, index) for index, case in enumerate(calibration.cases(quick=True))
    ]
    assert [row["workload"] for row in found if row["wrong"]] == []
    healthy = [row for row in found if row["healthy"]]
    assert len(healthy) >= 25
    assert len(found) - len(healthy) >= 15
    assert {row["verdict"] for row in healthy} == {"trustworthy"}
    # The paper protocol walks some of them back, or the calibrated one would be of no use.
    assert any(row["paper_wrong"] for row in healthy)


# ---- reports, bad input, command line


def test_a_paper_report_says_nothing_of_protocols(networks, test_batches):
    report = diagnose(networks["healthy"][0], test_batches)
    assert "protocol" not in str(report)
    assert "cause:" not in str(report)
    record = json.loads(report.to_json())
    assert (record["protocol"], record["causes"]) == ("paper", [])
    assert "pooled_gains" not in record


def test_bad_input_is_named(networks, test_batches):
    model = networks["healthy"][0]
    with pytest.raises(ValueError, match="protocol: expected paper or calibrated, got 'strict'"):
        diagnose(model, test_batches, protocol="strict")
    with pytest.raises(ValueError, match="test_size: expected at least 1 image, got 0"):
        diagnose(model, test_batches, test_size=0)


def test_on_the_command_line(networks, tmp_path):
    path = tmp_path / "bp.pt"
    save_checkpoint({"state_dict": networks["healthy"][0].state_dict()}, path)
    arguments = ["diagnose", str(path), "--model-option", f"d_hidden={WIDTH}"]
    arguments += ["--protocol", "calibrated", "--json", str(tmp_path / "report.json")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "judged by the calibrated protocol" in result.output
    (record,) = json.loads((tmp_path / "report.json").read_text())
    assert record["protocol"] == "calibrated"
    assert record["num_samples"] == record["num_measurable"] == 1280
    assert len(record["pooled_gains"]) == len(record["stability_nulls"]) == 5
    undecided = CliRunner().invoke(cli.app, [*arguments, "--frozen-acc", "0.80"])
    assert "over 2000 test images" in undecided.output
    wrong = CliRunner().invoke(cli.app, [*arguments, "--protocol", "strict"])
    assert wrong.exit_code == 3
    assert "expected paper or calibrated" in wrong.output
