"""The operators against extended-precision numpy, on every device, type, shape and layout."""

import warnings
import weakref

import numpy as np
import pytest
import torch
from conftest import oracle_cosine, oracle_mean, oracle_norm, wide

import fadiag_fast
from fadiag_fast import direction_cosines, layer_statistics, ops
from fadiag_fast.ops import native

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Every accumulation is in float64 over at most 1e5 terms; see test_norm_error_is_float64s.
NORM_TOLERANCE = 1e-12

native_only = pytest.mark.skipif(
    not ops.LIBRARIES["cpu"].loaded, reason=f"native library: {ops.LIBRARIES['cpu'].reason}"
)


def random_states(shape, dtype, device, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (
        (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)
    )


def mean_tolerance(grads):
    """Rounding of the stored mean plus that of a float64 sum of B terms, per column."""
    stored = torch.float64 if grads.dtype == torch.float64 else torch.float32
    info = torch.finfo(stored)
    magnitude = np.abs(wide(grads)).max(axis=0, initial=0)
    mean = np.abs(oracle_mean(grads))
    sum_error = grads.shape[0] * magnitude * 2.0**-52
    return mean * info.eps + sum_error + info.smallest_normal * info.eps


def assert_statistics(statistics, hiddens, grads):
    for layer, (hidden, grad) in enumerate(zip(hiddens, grads, strict=True)):
        for got, states in ((statistics.hidden_norm, hidden), (statistics.grad_norm, grad)):
            expected = oracle_norm(states)
            np.testing.assert_allclose(
                wide(got[layer]), expected, rtol=NORM_TOLERANCE, atol=0, err_msg=f"layer {layer}"
            )
        mean = statistics.grad_mean[layer]
        assert mean.shape == grad.shape[1:]
        assert mean.dtype == (torch.float64 if grad.dtype == torch.float64 else torch.float32)
        if grad.shape[0] > 0:
            error = np.abs(wide(mean) - oracle_mean(grad))
            assert (error <= mean_tolerance(grad)).all(), f"layer {layer}"


# One row; fewer columns than a lane holds; a warp's width and its neighbours; the CPU's lanes (8),
# tile (2048) and row group (4) and theirs; enough rows to split; enough columns for many tiles.
SHAPES = [
    (1, 1),
    (1, 5),
    (3, 7),
    (4, 8),
    (5, 64),
    (16, 129),
    (17, 257),
    (31, 255),
    (64, 2047),
    (65, 2049),
    (128, 256),
    (1000, 33),
    (8192, 16),
    (2, 40_000),
    (12, 3, 8, 8),
    (6, 5, 32),
    (9,),
    (4, 0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_oracle(shape, dtype, device, backend):
    hidden = random_states(shape, dtype, device, seed=1, scale=30.0)
    grad = random_states(shape, dtype, device, seed=2, scale=1e-3)
    assert_statistics(layer_statistics([hidden], [grad], backend=backend), [hidden], [grad])


def test_layers_of_different_width_and_type_in_one_call(device, backend):
    shapes = [(32, 10), (32, 3, 4, 4), (32, 5000), (32, 1), (32, 0), (32, 77)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float32]
    dtypes.append(torch.bfloat16)
    hiddens = [
        random_states(s, d, device, i) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    grads = [random_states(h.shape, h.dtype, device, 50 + i) for i, h in enumerate(hiddens)]
    assert_statistics(layer_statistics(hiddens, grads, backend=backend), hiddens, grads)


def test_more_layers_than_one_kernel_table_holds(device):
    hiddens = [random_states((4, 1 + l % 9), torch.float32, device, l) for l in range(700)]
    assert_statistics(layer_statistics(hiddens, hiddens), hiddens, hiddens)


def test_no_samples(device, backend):
    empty = torch.zeros(0, 6, device=device)
    statistics = layer_statistics([empty, empty], [empty, empty], backend=backend)
    assert statistics.hidden_norm.shape == (2, 0)
    assert statistics.grad_mean[1].isnan().all()


def test_promised_range(device, backend):
    """1e-30 to 1e30 in float32 and bfloat16, subnormals included; all of float16 and float64."""
    cases = {
        torch.float32: [1e-45, 1e-40, 1e-38, 1e-30, 1.0, 1e19, 1e30, 3e38],
        torch.bfloat16: [1e-40, 1e-38, 1e-30, 1.0, 1e19, 1e30, 3e38],
        torch.float16: [6e-8, 1e-6, 1.0, 6e4],
        torch.float64: [5e-324, 1e-310, 1e-200, 1e-155, 1.0, 1e154, 1e200, 1e307],
    }
    for dtype, scales in cases.items():
        for scale in scales:
            states = (
                torch.rand(8, 100, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
                * 0.5
                + 0.5
            ) * scale
            states = states.to(dtype).to(device)
            assert_statistics(
                layer_statistics([states], [states], backend=backend), [states], [states]
            )


def test_elements_of_very_different_size_in_one_sample(device, backend):
    exponents = torch.linspace(-300, 300, 601, dtype=torch.float64)
    wide_range = torch.stack([10**exponents, 10 ** exponents.flip(0)]).to(device)
    narrow = torch.stack(
        [10 ** (exponents / 10).float(), -(10 ** (exponents.flip(0) / 10)).float()]
    )
    for states in (wide_range, narrow.to(device)):
        assert_statistics(layer_statistics([states], [states], backend=backend), [states], [states])


def test_mean_of_finite_values_is_finite(device, backend):
    for dtype in DTYPES:
        largest = torch.finfo(dtype).max
        grad = torch.full((3, 4), largest, dtype=dtype, device=device)
        grad[:, 1] = -largest
        grad[0, 2] = -largest
        statistics = layer_statistics([grad], [grad], backend=backend)
        mean = statistics.grad_mean[0]
        assert mean.isfinite().all()
        np.testing.assert_allclose(wide(mean), oracle_mean(grad), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_element_stays_in_its_sample_and_column(poison, dtype, device, backend):
    hidden = random_states((9, 300), dtype, device, 1)
    grad = random_states((9, 300), dtype, device, 2)
    clean = layer_statistics([hidden], [grad], backend=backend)
    hidden[4, 17] = poison
    grad[5, 290] = poison
    statistics = layer_statistics([hidden], [grad], backend=backend)
    for norm, clean_norm, row in (
        (statistics.hidden_norm[0], clean.hidden_norm[0], 4),
        (statistics.grad_norm[0], clean.grad_norm[0], 5),
    ):
        assert torch.equal(norm[row].isnan(), torch.tensor(poison != poison, device=device))
        assert not norm[row].isfinite()
        norm[row] = clean_norm[row]
        assert torch.equal(norm, clean_norm)
    mean = statistics.grad_mean[0]
    assert not mean[290].isfinite()
    mean[290] = clean.grad_mean[0][290]
    assert torch.equal(mean, clean.grad_mean[0])


LAYOUTS = {
    "row_stride": lambda t: t.repeat(1, 2)[:, : t.shape[1]],
    "every_other_row": lambda t: t.repeat_interleave(2, 0)[::2],
    "every_other_column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda t: t.t().contiguous().t(),
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "misaligned_rows": lambda t: torch.cat([t, t.new_zeros(t.shape[0], 1)], 1)[:, : t.shape[1]],
    "expanded_batch": lambda t: t[:1].expand_as(t),
    "expanded_columns": lambda t: t[:, :1].expand_as(t),
    "reversed_storage": lambda t: t.flip(0)[:],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, device):
    hidden = LAYOUTS[layout](random_states((21, 272), dtype, device, 1))
    grad = LAYOUTS[layout](random_states((21, 272), dtype, device, 2))
    statistics = layer_statistics([hidden], [grad])
    assert_statistics(statistics, [hidden], [grad])
    plain = layer_statistics([hidden.contiguous()], [grad.contiguous()])
    assert torch.equal(statistics.hidden_norm, plain.hidden_norm), "bits depend on the layout"
    assert torch.equal(statistics.grad_mean[0], plain.grad_mean[0])


@pytest.mark.parametrize("permutation", [(0, 2, 3, 1), (0, 3, 1, 2), (0, 2, 1, 3)])
def test_dense_permutations_keep_shape_and_meaning(permutation, device, backend):
    base = random_states((7, 4, 5, 6), torch.float32, device)
    inverse = [permutation.index(d) for d in range(4)]
    hidden = base.permute(permutation).contiguous().permute(inverse)
    grad = -2 * hidden
    statistics = layer_statistics([hidden], [grad], backend=backend)
    assert_statistics(statistics, [hidden], [grad])
    mixed = layer_statistics([base], [grad], backend=backend)
    assert torch.equal(mixed.grad_mean[0], statistics.grad_mean[0])


def test_bits_do_not_depend_on_company_order_threads_or_repetition(device):
    hiddens = [random_states((100, d), torch.float32, device, d) for d in (7, 300, 5000)]
    grads = [random_states((100, d), torch.float32, device, d + 1) for d in (7, 300, 5000)]
    together = layer_statistics(hiddens, grads)
    backwards = layer_statistics(hiddens[::-1], grads[::-1])
    assert torch.equal(together.hidden_norm, backwards.hidden_norm.flip(0))
    for l, (hidden, grad) in enumerate(zip(hiddens, grads, strict=True)):
        alone = layer_statistics([hidden], [grad])
        assert torch.equal(alone.grad_norm[0], together.grad_norm[l])
        assert torch.equal(alone.grad_mean[0], together.grad_mean[l])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = layer_statistics(hiddens, grads)
            assert torch.equal(again.hidden_norm, together.hidden_norm)
            assert all(map(torch.equal, again.grad_mean, together.grad_mean))
    finally:
        torch.set_num_threads(threads)
    reference = direction_cosines([together.grad_mean, grads_of(grads)])
    for _ in range(50):
        repeated = layer_statistics(hiddens, grads)
        assert torch.equal(repeated.grad_norm, together.grad_norm)
        assert all(map(torch.equal, repeated.grad_mean, together.grad_mean))
        assert torch.equal(direction_cosines([repeated.grad_mean, grads_of(grads)]), reference)


def grads_of(grads):
    return [grad[0].float() for grad in grads]


def test_scaling_by_a_power_of_two_and_permuting_samples(device, backend):
    hidden = random_states((40, 123), torch.float32, device)
    base = layer_statistics([hidden], [hidden], backend=backend)
    scaled = layer_statistics([hidden * 2.0**40], [hidden * 2.0**-40], backend=backend)
    assert torch.equal(scaled.hidden_norm, base.hidden_norm * 2.0**40)
    assert torch.equal(scaled.grad_mean[0], base.grad_mean[0] * 2.0**-40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).to(device)
    permuted = layer_statistics([hidden[order]], [hidden[order]], backend=backend)
    assert torch.equal(permuted.hidden_norm[0], base.hidden_norm[0][order])


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 10, 16, 17, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cosines_match_the_oracle(count, dtype, device, backend):
    widths = [1, 6, 300, 9001]
    common = [random_states((w,), torch.float64, device, 99 + w) for w in widths]
    batches = [
        [
            (random_states((w,), torch.float64, device, 10 * k + w) + shared).to(dtype)
            for w, shared in zip(widths, common, strict=True)
        ]
        for k in range(count)
    ]
    cosines = direction_cosines(batches, backend=backend).cpu()
    assert cosines.shape == (len(widths), count, count)
    for layer in range(len(widths)):
        assert torch.equal(cosines[layer], cosines[layer].t())
        assert (cosines[layer].diagonal() == 1).all()
        pairs = [(i, j) for i in range(count) for j in range(i)]
        for i, j in pairs[:: max(1, len(pairs) // 20)]:
            expected = oracle_cosine(batches[i][layer], batches[j][layer])
            assert abs(cosines[layer, i, j].item() - expected) < 1e-12


def test_cosines_over_the_promised_range(device, backend):
    base = random_states((2, 500), torch.float64, device, 5)
    expected = oracle_cosine(base[0].float(), base[1].float())
    for scale in (1e-38, 1e-30, 1e-9, 1e30):
        rows = (base * scale).float()
        want = oracle_cosine(rows[0], rows[1])
        got = direction_cosines([[rows[0]], [rows[1]]], backend=backend)[0, 0, 1].item()
        assert abs(got - want) < 1e-12
        assert abs(got - expected) < 1e-5, "the direction does not depend on the scale"
    for first, second in ((1e300, 1e300), (1e-310, 1e-310), (1e300, 1e-300)):
        rows = base[0] * first, base[1] * second
        want = oracle_cosine(*rows)
        got = direction_cosines([[rows[0]], [rows[1]]], backend=backend)[0, 0, 1].item()
        assert abs(got - want) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_and_non_finite_directions_have_no_cosine(dtype, device, backend):
    rows = list(random_states((5, 40), dtype, device))
    rows[1] = torch.zeros_like(rows[1])
    rows[2] = rows[2].clone()
    rows[2][3] = float("nan")
    rows[3] = rows[3].clone()
    rows[3][39] = float("inf")
    cosines = direction_cosines([[row] for row in rows], backend=backend)[0].cpu()
    undefined = torch.zeros(5, 5, dtype=torch.bool)
    undefined[1:4, :] = undefined[:, 1:4] = True
    assert torch.equal(cosines.isnan(), undefined)
    assert cosines[0, 0] == cosines[4, 4] == 1


def test_cosines_of_channels_last_and_strided_directions(device, backend):
    rows = [random_states((4, 6, 5), torch.float32, device, k) for k in range(3)]
    expected = direction_cosines([[row] for row in rows], backend=backend)
    permuted = [row.permute(1, 2, 0).contiguous().permute(2, 0, 1) for row in rows]
    torch.testing.assert_close(
        direction_cosines([[row] for row in permuted], backend=backend), expected
    )
    mixed = [rows[0], permuted[1], rows[2].repeat_interleave(2, -1)[..., ::2]]
    torch.testing.assert_close(
        direction_cosines([[row] for row in mixed], backend=backend), expected
    )


def test_stacked_networks_equal_single_ones(device, backend):
    hiddens = [random_states((3, 20, w), torch.bfloat16, device, w) for w in (33, 700)]
    grads = [random_states((3, 20, w), torch.bfloat16, device, w + 1) for w in (33, 700)]
    stack = layer_statistics(hiddens, grads, stacked=True, backend=backend)
    cosines = direction_cosines([stack.grad_mean, stack.grad_mean], stacked=True, backend=backend)
    assert cosines.shape == (3, 2, 2, 2)
    for c in range(3):
        one = layer_statistics([h[c] for h in hiddens], [g[c] for g in grads], backend=backend)
        assert torch.equal(stack.hidden_norm[c], one.hidden_norm)
        assert torch.equal(stack.grad_norm[c], one.grad_norm)
        for mean, expected in zip(stack.grad_mean, one.grad_mean, strict=True):
            assert torch.equal(mean[c], expected)


@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_vmap_equals_a_loop(in_dim, device, backend):
    hidden = random_states((4, 6, 10), torch.float32, device)
    fixed = random_states(
        [s for d, s in enumerate((4, 6, 10)) if d != in_dim], torch.float32, device, 9
    )

    def probe(state, grad):
        return layer_statistics([state, grad], [grad, state], backend=backend)

    batched = torch.vmap(probe, in_dims=(in_dim, None))(hidden, fixed)
    for c in range(hidden.shape[in_dim]):
        one = probe(hidden.select(in_dim, c), fixed)
        torch.testing.assert_close(batched.hidden_norm[c], one.hidden_norm, rtol=1e-14, atol=0)
        torch.testing.assert_close(batched.grad_mean[0][c], one.grad_mean[0])

    nested = torch.vmap(
        torch.vmap(lambda s: layer_statistics([s], [s], backend=backend).hidden_norm)
    )
    stack = random_states((2, 3, 5, 7), torch.float32, device)
    expected = torch.linalg.vector_norm(stack.double(), dim=-1).unsqueeze(2)
    torch.testing.assert_close(nested(stack), expected, rtol=1e-12, atol=0)


def test_vmap_of_cosines_equals_a_loop(device, backend):
    rows = random_states((3, 4, 50), torch.float32, device)

    def cosines(matrix):
        return direction_cosines([[row] for row in matrix.unbind(0)], backend=backend)

    batched = torch.vmap(cosines)(rows)
    for c in range(3):
        torch.testing.assert_close(batched[c], cosines(rows[c]), rtol=1e-12, atol=1e-14)


def test_vmap_keeps_channels_last_means(device, backend):
    stack = random_states((3, 8, 4, 5, 6), torch.float32, device)
    stack = stack.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    means = torch.vmap(lambda s: layer_statistics([s], [s], backend=backend).grad_mean[0])(stack)
    torch.testing.assert_close(means, stack.double().mean(1).float())


@native_only
def test_figures_are_views_of_one_tensor_and_keep_no_gradient_alive(device):
    grads = [
        random_states((4, 3), torch.float32, device),
        random_states((4, 2, 5), torch.float32, device),
    ]
    statistics = layer_statistics(grads, grads)
    views = [statistics.hidden_norm, statistics.grad_norm, *statistics.grad_mean]
    storages = {view.untyped_storage().data_ptr() for view in views}
    assert storages == {statistics.packed.untyped_storage().data_ptr()}
    assert [tuple(mean.shape) for mean in statistics.grad_mean] == [(3,), (2, 5)]
    hidden_norm, grad_norm, means = statistics
    assert torch.equal(hidden_norm, grad_norm)
    assert len(means) == 2
    assert "hidden_norm=tensor" in repr(statistics)
    alive = weakref.ref(grads[1])
    del grads
    assert alive() is None


def test_never_differentiable(device, backend):
    states = random_states((6, 5), torch.float32, device).requires_grad_()
    statistics = layer_statistics([states * 2], [states * 3], backend=backend)
    assert not statistics.hidden_norm.requires_grad
    assert not statistics.grad_mean[0].requires_grad
    cosines = direction_cosines([[states[0]], [states[1]]], backend=backend)
    assert not cosines.requires_grad

    def loss(x):
        norms = layer_statistics([x], [x], backend=backend).hidden_norm
        return x.sum() + norms.sum().float()

    assert torch.equal(torch.func.grad(loss)(states.detach()), torch.ones_like(states))


@native_only
def test_jit_script(device):
    @torch.jit.script
    def probe(h: torch.Tensor, g: torch.Tensor):
        packed = torch.ops.fadiag.layer_statistics([h], [g])
        mean = packed[20:]  # behind twice five norms of two float32 words each
        return packed, mean, torch.ops.fadiag.direction_cosines([mean, mean * 2.0], 2)

    states = random_states((5, 9), torch.float32, device)
    packed, mean, cosines = probe(states, states)
    expected = layer_statistics([states], [states])
    assert torch.equal(packed[:10].view(torch.float64), expected.hidden_norm[0])
    assert torch.equal(mean, expected.grad_mean[0])
    assert (cosines == 1).all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic, device, backend):
    def probe(h, g):
        statistics = layer_statistics([h * 2, h], [g, g * 3], backend=backend)
        cosines = direction_cosines([statistics.grad_mean, statistics.grad_mean], backend=backend)
        return statistics.hidden_norm, statistics.grad_mean[1], cosines

    torch._dynamo.reset()  # every parameter compiles the same function anew
    compiled = torch.compile(probe, fullgraph=True, dynamic=dynamic)
    for rows in (8, 11):
        h = random_states((rows, 5, 3, 3), torch.float32, device)
        h = h.to(memory_format=torch.channels_last)
        g = random_states((rows, 5, 3, 3), torch.float32, device, 1)
        for got, expected in zip(compiled(h, g), probe(h, g), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def test_statistics_leave_a_compiled_function_whole(device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda h: layer_statistics([h, h + 1], [h, h]), fullgraph=True)
    states = random_states((4, 6), torch.float32, device)
    statistics = compiled(states)
    assert len(statistics.grad_mean) == 2
    torch.testing.assert_close(statistics.grad_mean[1], states.mean(0))


def test_export(device, backend):
    class Probe(torch.nn.Module):
        def forward(self, h, g):
            statistics = layer_statistics([h], [g], backend=backend)
            return statistics.hidden_norm, statistics.grad_mean[0]

    h, g = (random_states((6, 7), torch.float32, device, s) for s in (0, 1))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Probe(), (h, g), dynamic_shapes=({0: batch}, {0: batch}))
    h, g = (random_states((9, 7), torch.float32, device, s) for s in (2, 3))
    for got, expected in zip(program.module()(h, g), Probe()(h, g), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@native_only
@pytest.mark.parametrize("stacked", [False, True])
def test_opcheck(stacked, device):
    shape = (2, 5, 8) if stacked else (5, 8)
    states = [random_states(shape, torch.float32, device, s) for s in range(2)]
    torch.library.opcheck(torch.ops.fadiag.layer_statistics, (states, states, stacked))
    torch.library.opcheck(torch.ops.fadiag.direction_cosines, (states, 2, stacked))


@pytest.mark.cuda
def test_cuda_graph_replays_on_new_data():
    hiddens = [random_states((64, w), torch.float32, "cuda", w) for w in (30, 5000)]
    grads = [random_states((64, w), torch.float32, "cuda", w + 1) for w in (30, 5000)]

    def probe():
        first = layer_statistics(hiddens, grads)
        second = layer_statistics(grads, hiddens)
        return first, direction_cosines([first.grad_mean, second.grad_mean])

    probe()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, captured_cosines = probe()
    for seed in range(3):
        for tensor in (*hiddens, *grads):
            tensor.copy_(random_states(tensor.shape, torch.float32, "cuda", 100 * seed))
        graph.replay()
        statistics, cosines = probe()
        assert torch.equal(captured.hidden_norm, statistics.hidden_norm)
        assert torch.equal(captured_cosines, cosines)
        assert_statistics(captured, hiddens, grads)


@pytest.mark.cuda
def test_runs_on_the_current_stream_without_waiting_for_the_host():
    states = random_states((256, 4096), torch.float32, "cuda")
    expected = layer_statistics([states], [states])
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            doubled = states * 2
            statistics = layer_statistics([doubled], [doubled])
            direction_cosines([statistics.grad_mean, statistics.grad_mean])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(statistics.hidden_norm, expected.hidden_norm * 2)


@pytest.mark.cuda
def test_more_batches_than_a_table_holds_are_refused():
    direction = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="expected at most 3072 batches on CUDA, got 3073"):
        direction_cosines([[direction]] * 3073)
    assert direction_cosines([[direction]] * 100).shape == (1, 100, 100)


@pytest.mark.cuda
def test_cpu_and_cuda_agree():
    for dtype in DTYPES:
        states = random_states((77, 1234), dtype, "cpu")
        cpu = layer_statistics([states], [states])
        gpu = layer_statistics([states.cuda()], [states.cuda()])
        torch.testing.assert_close(gpu.hidden_norm.cpu(), cpu.hidden_norm, rtol=1e-14, atol=0)
        torch.testing.assert_close(gpu.grad_mean[0].cpu(), cpu.grad_mean[0], rtol=1e-6, atol=1e-12)


def ones(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype)


BAD_STATISTICS = {
    "empty": (([], []), ValueError, "layer_statistics: expected at least one layer, got an empty"),
    "lengths": (([ones(2, 3)], []), ValueError, "1 hiddens and 0 grads"),
    "batch": (
        ([ones(2, 3), ones(4, 3)],) * 2,
        ValueError,
        r"layer_statistics: layer 1: expected 2 samples like layer 0, got 4",
    ),
    "shape": (
        ([ones(2, 3)], [ones(2, 4)]),
        ValueError,
        r"layer 0: expected a grad of the hidden's shape \[2, 3\], got \[2, 4\]",
    ),
    "dtype": (
        ([ones(2, 3)], [ones(2, 3).double()]),
        TypeError,
        "layer 0: expected a grad of the hidden's dtype float32, got float64",
    ),
    "integer": (
        ([ones(2, 3).int()],) * 2,
        TypeError,
        "layer 0: expected float16, bfloat16, float32 or float64, got int32",
    ),
    "complex": (
        ([ones(2, 3), ones(2, 3).to(torch.complex64)],) * 2,
        TypeError,
        "layer 1: .*complex64",
    ),
    "scalar": (([torch.tensor(1.0)],) * 2, ValueError, r"layer 0: expected a batch dimension"),
    "not_a_tensor": (([[1.0]], [[1.0]]), TypeError, "layer 0: expected a tensor, got list"),
    "device": (
        ([ones(2, 3)], [torch.ones(2, 3, device="meta")]),
        ValueError,
        "layer 0: expected the grad on cpu like layer 0, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD_STATISTICS)
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_bad_statistics_input(case, backend):
    if backend == "native" and not ops.LIBRARIES["cpu"].loaded:
        pytest.skip(ops.LIBRARIES["cpu"].reason)
    (hiddens, grads), error, message = BAD_STATISTICS[case]
    with pytest.raises(error, match=message):
        layer_statistics(hiddens, grads, backend=backend)


@native_only
@pytest.mark.parametrize("case", sorted(set(BAD_STATISTICS) - {"not_a_tensor"}))
def test_the_operator_itself_refuses_bad_input(case):
    """A scripted or C++ caller has no Python checks in front of the kernel."""
    (hiddens, grads), _, _ = BAD_STATISTICS[case]
    with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        torch.ops.fadiag.layer_statistics(hiddens, grads)


BAD_COSINES = {
    "empty": ([], ValueError, "direction_cosines: expected at least one direction"),
    "no_layers": ([[]], ValueError, "expected at least one direction"),
    "layers": (
        [[ones(3)], [ones(3), ones(3)]],
        ValueError,
        "batch 1: expected 1 layers like batch 0, got 2",
    ),
    "shape": ([[ones(3)], [ones(4)]], ValueError, r"batch 1, layer 0: expected shape \[3\]"),
    "dtype": (
        [[ones(3)], [ones(3).double()]],
        TypeError,
        "batch 1, layer 0: expected dtype float32",
    ),
    "integer": ([[ones(3).int()]], TypeError, "batch 0, layer 0: expected float16"),
}


@pytest.mark.parametrize("case", BAD_COSINES)
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_bad_cosines_input(case, backend):
    if backend == "native" and not ops.LIBRARIES["cpu"].loaded:
        pytest.skip(ops.LIBRARIES["cpu"].reason)
    grad_means, error, message = BAD_COSINES[case]
    with pytest.raises(error, match=message):
        direction_cosines(grad_means, backend=backend)


def test_falls_back_with_one_warning_that_names_the_cause(monkeypatch):
    library = ops.NativeLibrary("cpu", ops.LIBRARIES["cpu"].path, False, "the test took it away")
    monkeypatch.setitem(ops.LIBRARIES, "cpu", library)
    monkeypatch.setattr(native, "NATIVE_DEVICES", frozenset())
    monkeypatch.setattr(native, "_warned", set())
    monkeypatch.setattr(native, "_DEFAULT_BACKEND", None)
    states = ones(2, 3)
    with pytest.warns(UserWarning, match="PyTorch path on cpu: the test took it away"):
        statistics = layer_statistics([states], [states])
    assert_statistics(statistics, [states], [states])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer_statistics([states], [states])
    with pytest.raises(
        RuntimeError, match="native backend asked for on cpu: the test took it away"
    ):
        layer_statistics([states], [states], backend="native")


def test_backend_choice(monkeypatch):
    monkeypatch.setenv("FADIAG_BACKEND", "fast")
    with pytest.raises(
        ValueError, match="FADIAG_BACKEND: expected 'native' or 'torch', got 'fast'"
    ):
        ops.default_backend()
    with pytest.raises(ValueError, match="backend: expected 'native' or 'torch', got 'cuda'"):
        ops.backend_for(torch.device("cpu"), "cuda")
    monkeypatch.setattr(native, "_DEFAULT_BACKEND", "torch")
    assert ops.backend_for(torch.device("cpu")) == "torch"


def test_public_names():
    assert fadiag_fast.layer_statistics is layer_statistics
    assert fadiag_fast.direction_cosines is direction_cosines
