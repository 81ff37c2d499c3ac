"""The row of a training step against extended-precision numpy, on every device."""

import numpy as np
import pytest
import torch
from conftest import oracle_cosine, wide

from fadiag_fast import ops


class Run:
    """Steps on a device, and beside them what they should leave, in numpy."""

    def __init__(self, device, backend, sizes, window, dtype=torch.float32, ring=3, decay=0.9):
        self.device, self.backend, self.decay, self.window = device, backend, decay, window
        self.kept = [torch.zeros(window + 1, d, dtype=dtype, device=device) for d in sizes]
        self.ring = ring
        self.rows = None
        self.places = torch.zeros(3, dtype=torch.int64, device=device)
        self.steps = 0

    def step(self, norms, directions=(), extras=()):
        """Make a step; return the row that was written, and the one expected."""
        width = 3 * norms.shape[1] - 1 + len(self.kept) * (self.window + 1)
        width += sum(len(extra) for extra in extras)
        if self.rows is None:
            # Part of wider rows, which must stay as they are.
            self.all_rows = torch.full(
                (self.ring, width + 2), -7.0, dtype=torch.float64, device=self.device
            )
            self.rows = self.all_rows[:, :width]
        before = [kept.cpu().clone() for kept in self.kept]
        ops.step_row(
            norms.to(self.device),
            [d.to(self.device) for d in directions],
            self.kept,
            self.rows,
            self.places,
            decay=self.decay,
            extras=[extra.to(self.device) for extra in extras],
            backend=self.backend,
        )
        at = self.steps % self.ring
        self.steps += 1
        place = (self.steps - 1) % self.window if self.kept else 0
        assert self.places.tolist() == [
            self.steps % self.ring,
            self.steps % self.window if self.kept else 0,
            0,
        ]
        assert bool((self.all_rows[:, width:] == -7.0).all())
        expected = [lower_median(values) for values in median_rows(norms)]
        for direction, kept, old in zip(directions, self.kept, before, strict=True):
            expected += [oracle_cosine(direction, one) for one in old]
            self.check_kept(kept, wide(old), wide(direction), place)
        expected += [float(x) for extra in extras for x in extra]
        return self.rows[at].tolist(), expected

    def check_kept(self, kept, old, direction, place):
        has_direction = np.isfinite(direction).all() and (direction != 0).any()
        average = old[-1] + (1 - self.decay) * (direction - old[-1]) if has_direction else old[-1]
        np.testing.assert_array_equal(wide(kept[place]), direction)
        others = [k for k in range(self.window) if k != place]
        np.testing.assert_array_equal(wide(kept)[others], old[others])
        # torch's lerp rounds the difference, its product and the sum.
        size = np.abs(old[-1]) + (np.abs(direction) if has_direction else 0)
        bound = 3 * torch.finfo(kept.dtype).eps * size + torch.finfo(kept.dtype).tiny
        assert (np.abs(wide(kept[-1]) - average) <= bound).all()


def median_rows(norms):
    hidden, grad = norms.numpy()
    with np.errstate(all="ignore"):
        return [*hidden, *grad, *(grad[:-1] / grad[-1])]


def lower_median(values):
    known = np.sort(values[~np.isnan(values)])
    return float(known[(len(known) - 1) // 2]) if len(known) else float("nan")


def random_norms(states, samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(2, states, samples, generator=generator, dtype=torch.float64)
    return (3 * spread).exp()


def assert_row(found):
    got, expected = found
    # Cosines are sums in float64; medians and extras are values that were given, or one division.
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


# One value; an even and an odd number; the most of which all are counted at once and its
# neighbours; several a thread.
@pytest.mark.parametrize("samples", [0, 1, 2, 7, 31, 128, 255, 256, 257, 1000, 20_001])
def test_medians_leave_nan_out_and_take_the_lower_of_two(device, backend, samples):
    for seed in range(3):
        norms = random_norms(4, samples, seed)
        if samples > 2:
            norms[0, 1, :2] = float("nan")
            norms[1, 2, ::2] = float("inf")
            norms[1, 0] = float("nan")  # and with it that gain
            norms[0, 3] = 0.25  # all alike
            norms[1, 3, -1] = 0.0  # gains that are infinite
            norms[0, 2, : samples // 2] = 0.0
        assert_row(Run(device, backend, [], 1).step(norms))


@pytest.mark.parametrize("count", [101, 301])
def test_medians_tell_neighbouring_numbers_apart(device, backend, count):
    """The last digits decide, in each of the eight bytes, beside subnormal and negative numbers."""
    for byte in range(8):
        numbers = torch.arange(count, dtype=torch.int64) % (101 if byte == 7 else count)
        steps = numbers << (8 * byte)
        start = 0x3FF0000000000000 if byte < 6 else 0x0010000000000000
        values = (start + steps).view(torch.float64)
        values = values[torch.randperm(count, generator=torch.Generator().manual_seed(byte))]
        tiny = torch.arange(count).double() * 5e-324
        norms = torch.stack([values, -values, tiny, values.flip(0)]).view(2, 2, count)
        got, expected = Run(device, backend, [], 1).step(norms)
        assert got == expected


# One column; a chunk and its neighbours; rows that are aligned and that are not; many chunks.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [[1], [256], [4096], [4097, 3, 8192], [1023, 50_000]])
def test_cosines_and_what_is_kept(device, backend, sizes, dtype):
    run = Run(device, backend, sizes, window=3, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        directions = [torch.randn(d, generator=generator).to(dtype) for d in sizes]
        assert_row(run.step(random_norms(3, 5), directions))


@pytest.mark.parametrize("window", [1, 8, 15, 40])
def test_windows_of_any_length(device, backend, window):
    run = Run(device, backend, [300, 5000], window)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2 * window + 1):
        directions = [torch.randn(d, generator=generator) for d in (300, 5000)]
        assert_row(run.step(random_norms(2, 9), directions))


def test_directions_of_more_layers_than_one_launch_takes(device, backend):
    sizes = [17 + l for l in range(70)] + [5000]
    run = Run(device, backend, sizes, window=2)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        directions = [torch.randn(d, generator=generator) for d in sizes]
        extras = [torch.arange(2.0, dtype=torch.float64), torch.ones(1, dtype=torch.float64)]
        assert_row(run.step(random_norms(72, 6), directions, extras))


@pytest.mark.parametrize("size", [40, 9000])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e-38),
        (torch.float32, 1e38),
        (torch.float64, 1e-300),
        (torch.float64, 1e300),
    ],
)
def test_directions_over_the_whole_range_of_their_type(device, backend, size, dtype, scale):
    run = Run(device, backend, [size], window=2, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        drawn = torch.rand(size, generator=generator, dtype=torch.float64) - 0.3
        assert_row(run.step(random_norms(2, 4), [(drawn * scale).to(dtype)]))


@pytest.mark.parametrize("size", [40, 9000])
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_what_is_no_direction_has_no_cosine_and_spoils_no_average(device, backend, size, bad):
    run = Run(device, backend, [size], window=2)
    for step, good in enumerate((True, False, True, True, True)):
        direction = torch.ones(size)
        direction[step] = 2.0
        if not good:
            direction = torch.zeros(size)
            direction[-1] = bad
        (*_, average), expected = run.step(random_norms(2, 3), [direction])
        assert_row(([*_, average], expected))
        assert np.isnan(average) == (not good or step == 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norms": torch.ones(2, 3, 4)}, "norms: expected float64, got float32"),
        ({"norms": torch.ones(3, 3, 4, dtype=torch.float64)}, r"norms: expected \[2, states, sam"),
        ({"directions": []}, "got 0 directions and 1 kept"),
        ({"directions": [torch.ones(5).half()]}, "direction 0: expected float32 or float64"),
        ({"kept": [torch.zeros(3, 6)]}, r"kept of direction 0: expected \[K \+ 1, 5\]"),
        ({"rows": torch.zeros(2, 10, dtype=torch.float64)}, "at least 12 numbers, got .2, 10."),
        ({"places": torch.zeros(2, dtype=torch.int64)}, r"places: expected \[3\], got \[2\]"),
        ({"extras": [torch.ones(1)]}, "extras: expected float64, got float32"),
    ],
)
def test_a_bad_call_says_what_is_wrong_and_writes_nothing(device, change, message):
    if not ops.LIBRARIES[device.type].loaded:
        pytest.skip(f"native library: {ops.LIBRARIES[device.type].reason}")

    def moved(value):
        return [v.to(device) for v in value] if isinstance(value, list) else value.to(device)

    call = {
        "norms": torch.ones(2, 3, 4, dtype=torch.float64),
        "directions": [torch.ones(5)],
        "kept": [torch.zeros(4, 5)],
        "rows": torch.zeros(2, 20, dtype=torch.float64),
        "places": torch.zeros(3, dtype=torch.int64),
        "extras": [],
        **change,
    }
    call = {name: moved(value) for name, value in call.items()}
    with pytest.raises(RuntimeError, match=message):
        ops.step_row(**call, decay=0.9, backend="native")
    assert not any(bool(t.any()) for t in (call["rows"], call["places"], *call["kept"]))


@pytest.mark.cuda
def test_the_longest_window_of_a_gpu():
    for window in (2814, 2815):
        run = Run(torch.device("cuda"), "native", [40], window)
        if window == 2814:
            for _ in range(2):
                assert_row(run.step(random_norms(2, 3), [torch.randn(40)]))
        else:
            with pytest.raises(RuntimeError, match="at most 2814 kept directions on CUDA, got"):
                run.step(random_norms(2, 3), [torch.randn(40)])


@pytest.mark.cuda
def test_a_graph_of_it_counts_on_with_every_replay():
    run = Run(torch.device("cuda"), "native", [300, 9000], window=3)
    given = torch.Generator().manual_seed(4)
    norms = random_norms(3, 50).cuda()
    directions = [torch.randn(d, generator=given).cuda() for d in (300, 9000)]
    run.step(norms.cpu(), [d.cpu() for d in directions])
    plain = Run(torch.device("cuda"), "native", [300, 9000], window=3)
    plain.step(norms.cpu(), [d.cpu() for d in directions])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.step_row(norms, directions, run.kept, run.rows, run.places, decay=0.9)
    for seed in range(7):
        norms.copy_(random_norms(3, 50, seed))
        for direction in directions:
            direction.copy_(torch.randn(len(direction), generator=given))
        graph.replay()
        plain.step(norms.cpu(), [d.cpu() for d in directions])
    assert torch.equal(run.all_rows.nan_to_num(9.0), plain.all_rows.nan_to_num(9.0))
    assert run.places.tolist() == plain.places.tolist()
    for one, other in zip(run.kept, plain.kept, strict=True):
        assert torch.equal(one, other)


@pytest.mark.cuda
@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("sizes", [[256], [256, 9000]])
def test_a_launch_that_gets_ready_early_waits_for_what_it_reads(graphed, sizes):
    """The states of every step are others, and nothing lies between statistics and row."""
    steps, samples, factor = 60, 128, 1.25
    given = torch.Generator().manual_seed(3)
    start = [torch.randn(samples, 256, generator=given) for _ in range(6)]
    states = [h.cuda() for h in start]
    directions = [torch.randn(d, generator=given).cuda() for d in sizes]
    kept = [torch.zeros(9, d, device="cuda") for d in sizes]
    rows = torch.zeros(steps, 17 + 9 * len(sizes), dtype=torch.float64, device="cuda")
    places = torch.zeros(3, dtype=torch.int64, device="cuda")

    def step():
        for tensor in (*states, *directions):
            tensor.mul_(factor)
        norms = ops.layer_statistics(states, states).norms
        ops.step_row(norms, directions, kept, rows, places, decay=0.9, backend="native")

    run = step
    if graphed:
        step()
        for tensor, first in zip((*states, rows, places), (*start, 0, 0), strict=True):
            tensor.copy_(torch.as_tensor(first))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    for _ in range(steps):
        run()
    medians = [h.double().norm(dim=1).sort().values[(samples - 1) // 2] for h in start]
    factors = factor ** torch.arange(1, steps + 1, dtype=torch.float64)
    # Sixty products that each round a float32.
    torch.testing.assert_close(
        rows[:, :6].cpu(), factors[:, None] * torch.stack(medians), rtol=60 * 2**-24, atol=0.0
    )
    cosines = rows[-1, 17:].view(len(sizes), 9).cpu()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0.0, atol=1e-6)
    assert places.tolist() == [0, steps % 8, 0]
