"""csrc/accumulate.h against extended precision, on whatever hypothesis can think of."""

import importlib.util
import math
import os
import shutil
import subprocess
import sysconfig
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX", "c++")


@pytest.fixture(scope="session")
def accumulate(tmp_path_factory):
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler {COMPILER}")
    pybind11 = pytest.importorskip("pybind11")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("no Python headers")
    target = tmp_path_factory.mktemp("csrc") / "accumulate_module.so"
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    command = [COMPILER, "-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", *includes]
    subprocess.run([*command, HERE / "accumulate_module.cpp", "-o", target], check=True)
    spec = importlib.util.spec_from_file_location("accumulate_module", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


finite = st.floats(allow_nan=False, allow_infinity=False, width=64)
vectors = st.lists(finite, min_size=1, max_size=40)
parts = st.integers(1, 5)


def exact_norm(values):
    """The norm from exact rational arithmetic, as a float; infinite where no float holds it."""
    total = sum(Fraction(v) ** 2 for v in values)
    if total == 0:
        return 0.0
    shift = 2 ** max(0, 200 - (total.numerator.bit_length() - total.denominator.bit_length()))
    root = Fraction(math.isqrt(total.numerator * shift**2 // total.denominator), shift)
    try:
        return float(root)
    except OverflowError:
        return math.inf


@settings(max_examples=300, deadline=None)
@given(vectors, parts)
def test_wide_norm_over_the_whole_range(accumulate, values, parts):
    got, expected = accumulate.wide_norm(np.array(values), parts), exact_norm(values)
    if math.isinf(expected):
        assert math.isinf(got)
    else:
        # Half a unit for each of at most 40 additions and a few roundings; subnormals are spaced
        # 5e-324 apart.
        assert abs(got - expected) <= 1e-14 * expected + 5e-324


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1), parts)
def test_narrow_norm_of_float32(accumulate, values, parts):
    expected = exact_norm(values)
    assert abs(accumulate.narrow_norm(np.array(values), parts) - expected) <= 1e-13 * expected


@settings(max_examples=300, deadline=None)
@given(vectors, parts)
def test_the_mean_of_finite_values_is_finite_and_right(accumulate, values, parts):
    got = accumulate.wide_mean(np.array(values), parts)
    expected = sum(map(Fraction, values)) / len(values)
    largest = max(map(abs, values))
    assert math.isfinite(got)
    # n roundings relative to the largest partial sum, n * largest, divided by n; subnormals are
    # spaced 5e-324 apart.
    bound = len(values) * Fraction(largest) / 2**52 + Fraction(5e-324)
    assert abs(Fraction(got) - expected) <= bound


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@given(values=vectors, parts=parts)
@settings(max_examples=50, deadline=None)
def test_non_finite_elements_show(accumulate, value, values, parts):
    array = np.array([*values, value])
    norm, mean = accumulate.wide_norm(array, parts), accumulate.wide_mean(array, parts)
    assert math.isnan(norm) if math.isnan(value) else norm == math.inf
    assert math.isnan(mean) if math.isnan(value) else mean == value


def test_infinity_beside_nan_is_nan(accumulate):
    assert math.isnan(accumulate.wide_norm(np.array([math.inf, math.nan, 1e-300]), 1))
    assert math.isnan(accumulate.wide_mean(np.array([math.inf, -math.inf]), 1))


def test_cosines(accumulate):
    assert accumulate.cosine(2.0, 4.0, 1.0) == 1.0
    assert accumulate.cosine(1.0 + 1e-15, 1.0, 1.0) == 1.0
    assert accumulate.cosine(1e-320, 1e-300, 1e-300) == pytest.approx(1e-20, rel=1e-3)
    assert math.isnan(accumulate.cosine(0.0, 0.0, 1.0))
    assert math.isnan(accumulate.self_cosine(0.0))
    assert math.isnan(accumulate.self_cosine(math.inf))
    assert accumulate.self_cosine(1e-300) == 1.0


def test_division_by_a_whole_number_is_rounded_correctly(accumulate):
    """The GPU's way, against the bits of an ordinary division, near midpoints too."""
    random = np.random.default_rng(0)
    counts = [1, 2, 3, 5, 7, 12, 49, 255, 256, 1000, 8191, 2**31 - 1, 2**40 + 1]
    for count in counts:
        quotients = random.random(4000) + 0.5
        sums = np.concatenate(
            [
                random.standard_normal(4000) * 10.0 ** random.integers(-40, 40, 4000),
                # Sums whose quotients lie beside numbers and beside the middle between two.
                quotients * count,
                np.nextafter(quotients * count, np.inf),
                [0.0, 2.0**-149, -3.4e38, np.inf, -np.inf, np.nan],
            ]
        )
        got = np.array([accumulate.divide(x, float(count)) for x in sums])
        np.testing.assert_array_equal(got, sums / count)
