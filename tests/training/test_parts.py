"""The probe's ring and directions on their own."""

import math
import warnings

import numpy as np
import pytest
import torch
from conftest import oracle_norm, wide

from fadiag_fast import ops
from fadiag_fast.training.directions import CountSketch, Directions
from fadiag_fast.training.figures import sample_norms
from fadiag_fast.training.ring import Ring

CPU = torch.device("cpu")


class LateRing(Ring):
    """Rows arrive when ``arrived`` says so, as they would on a GPU."""

    def __init__(self, rows):
        super().__init__(rows, 2, CPU)
        self.sent = self.arrived = 0
        self.waited = []

    def _new_event(self):
        return Late(self)


class Late:
    """An event that has passed once its number is below what has arrived."""

    def __init__(self, ring):
        self.ring = ring

    def record(self):
        self.number = self.ring.sent
        self.ring.sent += 1

    def query(self):
        return self.number < self.ring.arrived

    def synchronize(self):
        if not self.query():
            self.ring.waited.append(self.number)
        self.ring.arrived = max(self.ring.arrived, self.number + 1)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 33])
def test_norms_of_samples_in_any_layout(device, count):
    drawn = torch.randn(count, 6, 5, 4, generator=torch.Generator().manual_seed(0)).to(device)
    for samples in (
        drawn,
        drawn.to(memory_format=torch.channels_last),
        drawn.flatten(1),
        drawn.flatten(2),
        drawn[:, 0, 0, 0],
        drawn.bfloat16(),
        drawn.double() * 1e200,
    ):
        expected = oracle_norm(samples) if count else np.empty(0)
        np.testing.assert_allclose(wide(sample_norms(samples)), expected, rtol=1e-12)


def row_of(number):
    return torch.tensor([float(number), -float(number)], dtype=torch.float64)


def write(ring, number):
    """Do what a step does on the device."""
    norms = row_of(number)[:, None, None].contiguous()
    ops.step_row(norms, [], [], ring.device_rows, ring.places, decay=0.9)


def compare(directions, means):
    """Return the cosines of a step, [layers, K + 1]; None where there is nothing to compare."""
    taken = directions.take(means)
    if taken is None:
        return None
    rows = torch.zeros(1, 2 + len(taken) * directions.width, dtype=torch.float64)
    if not hasattr(directions, "test_places"):
        directions.test_places = torch.zeros(3, dtype=torch.int64)
    directions.test_places[0] = 0
    norms = torch.ones(2, 1, 1, dtype=torch.float64)
    ops.step_row(norms, taken, directions.kept, rows, directions.test_places, decay=0.5)
    return rows[0, 2:].view(len(taken), -1)


def test_rows_come_out_in_order_once_they_have_arrived():
    ring = LateRing(4)
    for number in range(3):
        write(ring, number)
        assert ring.written(number) == []
    assert ring.ready() == []
    ring.arrived = 2
    assert ring.ready() == [(0, [0.0, -0.0]), (1, [1.0, -1.0])]
    assert len(ring) == 1


def test_a_full_ring_waits_for_the_oldest_loses_nothing_and_warns_once():
    ring = LateRing(2)
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(5):
            write(ring, number)
            found += ring.written(number)
    assert [meta for meta, _ in found] == [0, 1, 2]
    assert ring.waited == [0, 1, 2]
    assert len([w for w in caught if "2 recorded steps behind" in str(w.message)]) == 1
    ring.arrived = 5
    assert [meta for meta, _ in found + ring.drain()] == [0, 1, 2, 3, 4]
    assert [row[0] for _, row in found] == [0.0, 1.0, 2.0]


def test_rows_of_replayed_graphs_keep_their_steps():
    ring = Ring(8, 2, CPU)
    found = []
    for number in range(21):
        write(ring, number)
        found += ring.written(number if number % 5 else None, at_once=False)
        found += ring.ready()
    found += ring.drain()
    wanted = [number for number in range(21) if number % 5]
    assert [meta for meta, _ in found] == wanted
    assert [row for _, row in found] == [row_of(number).tolist() for number in wanted]


def test_an_interrupt_while_it_waits_loses_no_step():
    ring = LateRing(2)
    for number in range(2):
        write(ring, number)
        ring.written(number)
    write(ring, 2)
    oldest = ring._under_way[0][0]
    oldest.synchronize = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    ring._warned = True
    with pytest.raises(KeyboardInterrupt):
        ring.written(2)
    ring.arrived = 2
    found = ring.send()
    write(ring, 3)
    found += ring.written(3)
    ring.arrived = 9
    found += ring.drain()
    assert [(meta, row[0]) for meta, row in found] == [(n, float(n)) for n in range(4)]


@pytest.mark.parametrize("rows", [8, 32])
def test_an_ample_ring_waits_in_silence(rows):
    """A loop that never waits for its device runs ahead of it: nothing is wrong with that."""
    ring = LateRing(rows)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(3 * rows):
            write(ring, number)
            found += ring.written(number, at_once=number % 2 == 0)
    ring.arrived = 3 * rows
    assert [meta for meta, _ in found + ring.drain()] == list(range(3 * rows))


@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.95])
def test_a_sketchs_cosine_has_the_error_that_is_stated(cosine):
    """Over many pairs: no bias beyond its own error, and a spread of √((1 + c²) / width)."""
    size, width, pairs = 5000, 256, 400
    generator = torch.Generator().manual_seed(0)
    sketch = CountSketch(size, width, CPU)
    a = torch.nn.functional.normalize(
        torch.randn(pairs, size, generator=generator, dtype=torch.float64)
    )
    b = torch.randn(pairs, size, generator=generator, dtype=torch.float64)
    b = torch.nn.functional.normalize(b - (a * b).sum(1, keepdim=True) * a)
    b = cosine * a + math.sqrt(1 - cosine**2) * b
    inner = torch.stack([sketch(x) @ sketch(y) for x, y in zip(a, b, strict=True)])
    error = inner - cosine
    stated = math.sqrt((1 + cosine**2) / width)
    # The permutation and signs are the same for all pairs, the vectors are not: 400 independent
    # draws. Four standard errors of a mean, and of a spread.
    assert abs(float(error.mean())) < 4 * stated / math.sqrt(pairs)
    assert float(error.square().mean().sqrt()) < stated * (1 + 4 / math.sqrt(2 * pairs))
    assert float(error.square().mean().sqrt()) > stated * 0.8


def test_a_sketch_is_linear_and_the_same_on_every_run():
    x, y = torch.randn(2, 1000, dtype=torch.float64)
    one, two = CountSketch(1000, 64, CPU), CountSketch(1000, 64, CPU)
    torch.testing.assert_close(one(x + 3 * y), one(x) + 3 * two(y), rtol=1e-12, atol=1e-12)
    assert torch.equal(one(x), two(x))


def test_a_sketch_bounds_the_memory():
    whole, sketched = (Directions(1, 8, sketch) for sketch in (None, 128))
    for directions in (whole, sketched):
        compare(directions, [torch.randn(100_000)])
    assert sum(k.nbytes for k in whole.kept) == 9 * 100_000 * 4
    assert sum(k.nbytes for k in sketched.kept) == 9 * 128 * 4
    short = Directions(1, 8, 128)
    first = torch.randn(100)
    compare(short, [first])
    cosines = compare(short, [2 * first])
    assert float(cosines[0].nan_to_num(-1).amax()) == pytest.approx(1.0, abs=1e-6)


def test_a_direction_that_is_not_finite_spoils_nothing_after_it():
    directions = Directions(1, 3, None)
    steps = [torch.tensor([1.0, 0.0]), torch.tensor([math.nan, 1.0]), None, torch.tensor([1.0, 1])]
    found = [compare(directions, [step]) for step in steps]
    assert bool(found[1].isnan().all())
    assert found[2] is None
    known = found[3][0][:3][~found[3][0][:3].isnan()]
    assert known.tolist() == pytest.approx([math.sqrt(0.5)])
    assert float(found[3][0, 3]) == pytest.approx(math.sqrt(0.5))


def test_tiny_directions_have_cosines():
    directions = Directions(1, 2, None)
    compare(directions, [torch.tensor([1e-30, 0.0])])
    found = compare(directions, [torch.tensor([1e-30, 1e-30])])
    assert found[0].nan_to_num(0).amax().item() == pytest.approx(math.sqrt(0.5))


def test_states_of_another_size_begin_anew():
    directions = Directions(1, 2, None)
    compare(directions, [torch.ones(4)])
    assert bool(compare(directions, [torch.ones(5)]).isnan().all())
    assert float(compare(directions, [torch.ones(5)]).nan_to_num(-1).amax()) == 1.0
