"""Prepared calls, and calls that are prepared by themselves: the operator's bits, or an error."""

import gc
import threading
import weakref

import pytest
import torch
from test_ops import native_only, random_states
from torch.utils.flop_counter import FlopCounterMode

from fadiag_fast import layer_statistics, prepare_statistics
from fadiag_fast.ops import entry_points, prepared

pytestmark = [
    native_only,
    pytest.mark.skipif(
        not entry_points.ENTRY_POINTS, reason="this torch offers no exchange of tensors"
    ),
]


def pairs(device, shapes=((6, 5), (6, 3, 4, 2), (6, 700)), dtype=torch.float32, seed=0):
    hiddens = [random_states(s, dtype, device, seed + i) for i, s in enumerate(shapes)]
    grads = [random_states(s, dtype, device, seed + 50 + i) for i, s in enumerate(shapes)]
    return hiddens, grads


def same_bits(a, b):
    """Norms lie in pairs of float32 words, some of which are NaN."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def by_operator(hiddens, grads, stacked=False, without_mean=()):
    return torch.ops.fadiag.layer_statistics(hiddens, grads, stacked, list(without_mean))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gives_the_operators_bits_on_new_data(dtype, device):
    prepared = prepare_statistics(*pairs(device, dtype=dtype))
    for seed in range(3):
        hiddens, grads = pairs(device, dtype=dtype, seed=100 * seed)
        found = prepared(hiddens, grads)
        assert same_bits(found.packed, by_operator(hiddens, grads))
        assert [m.shape for m in found.grad_mean] == [g.shape[1:] for g in grads]


def test_stacked_strided_and_channels_last(device):
    stack = [random_states((3, 5, 8), torch.float32, device, s) for s in range(2)]
    found = prepare_statistics(stack, stack, stacked=True)(stack, stack)
    assert same_bits(found.packed, by_operator(stack, stack, True))

    wide = random_states((6, 40), torch.float32, device)[:, :13]
    image = random_states((6, 3, 4, 5), torch.float32, device).to(memory_format=torch.channels_last)
    found = prepare_statistics([wide, image], [wide, image])([wide, image], [wide, image])
    assert same_bits(found.packed, by_operator([wide, image], [wide, image]))
    torch.testing.assert_close(found.grad_mean[1], image.mean(0))


def test_tuples_and_single_layers_of_one_dimension(device):
    states = (random_states((9,), torch.float32, device),)
    assert torch.equal(
        prepare_statistics(states, states)(states, states).hidden_norm[0], states[0].abs().double()
    )


def test_refuses_tensors_that_differ(device):
    hiddens, grads = pairs(device)
    prepared = prepare_statistics(hiddens, grads)

    def refused(message, change, which=0):
        both = [list(hiddens), list(grads)]
        both[which] = change(both[which])
        with pytest.raises(ValueError, match=message):
            prepared(*both)

    refused("expected 3 hiddens, got 2", lambda t: t[:2])
    refused("expected 3 grads, got 4", lambda t: [*t, t[0]], 1)
    refused(
        r"layer 0, hidden: expected shape \[6, 5\], got \[6, 6\]",
        lambda t: [torch.zeros(6, 6, device=device), *t[1:]],
    )
    refused(r"layer 0, hidden: expected shape \[6, 5\], got \[5, 5\]", lambda t: [t[0][:5], *t[1:]])
    refused(
        "layer 2, grad: expected dtype float32, got float16", lambda t: [*t[:2], t[2].half()], 1
    )
    refused(
        r"layer 1, grad: expected strides \[24, 8, 2, 1\]",
        lambda t: [t[0], t[1].to(memory_format=torch.channels_last), t[2]],
        1,
    )
    refused(
        "layer 1, hidden: expected a torch.Tensor, got Parameter",
        lambda t: [t[0], torch.nn.Parameter(t[1]), t[2]],
    )
    refused("layer 0, hidden: expected a torch.Tensor, got NoneType", lambda t: [None, *t[1:]])
    # The refusals have left the prepared call as it was.
    assert same_bits(prepared(hiddens, grads).packed, by_operator(hiddens, grads))


@pytest.mark.cuda
def test_refuses_another_device():
    hiddens, grads = pairs("cuda")
    prepared = prepare_statistics(hiddens, grads)
    with pytest.raises(ValueError, match="layer 0, hidden: expected device cuda:0, got cpu"):
        prepared([h.cpu() for h in hiddens], grads)


def test_refuses_what_cannot_be_prepared(device):
    hiddens, grads = pairs(device)
    batches = [torch.ones(2, 3), torch.ones(4, 3)]
    with pytest.raises(ValueError, match="expected 2 samples like layer 0, got 4"):
        prepare_statistics(batches, batches)
    gaps = hiddens[2][:, ::2]
    with pytest.raises(ValueError, match="without gaps"):
        prepare_statistics([gaps], [gaps])
    with pytest.raises(ValueError, match="at least one sample"):
        prepare_statistics([hiddens[0][:0]], [grads[0][:0]])
    with pytest.raises(ValueError, match=r"means: expected layers from 0 to 2, got 3"):
        prepare_statistics(hiddens, grads, means=[3])
    with pytest.raises(RuntimeError, match="expected native kernels for meta"):
        prepare_statistics([torch.ones(2, 3, device="meta")], [torch.ones(2, 3, device="meta")])


def test_refuses_transforms(device):
    hiddens, grads = pairs(device)
    prepared = prepare_statistics([hiddens[0]], [grads[0]])
    stack = torch.stack([hiddens[0]] * 2)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.vmap(lambda h: prepared([h], [grads[0]]).hidden_norm)(stack)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda h: prepared([h], [grads[0]]).hidden_norm.sum())(hiddens[0])
    with FlopCounterMode(display=False), pytest.raises(RuntimeError, match="dispatch mode"):
        prepared([hiddens[0]], [grads[0]])


def test_a_tensor_that_requires_grad_gives_figures_without(device):
    states = random_states((6, 5), torch.float32, device).requires_grad_()
    found = prepare_statistics([states], [states])([states], [states])
    assert not found.hidden_norm.requires_grad
    assert same_bits(found.packed, by_operator([states], [states]))


def test_a_negated_view_counts_with_its_sign(device):
    """The imaginary part of a conjugate stores the opposite of what it is."""
    states = torch.randn(6, 5, dtype=torch.complex64, device=device).conj().imag
    assert states.is_neg()
    dense = states.contiguous()
    for _ in range(4):
        found = layer_statistics([dense], [torch._neg_view(-dense)])
        torch.testing.assert_close(found.grad_mean[0], dense.mean(0))


def test_holds_no_tensor(device):
    hiddens, grads = pairs(device)
    prepared = prepare_statistics(hiddens, grads)
    prepared(hiddens, grads)
    alive = [weakref.ref(t) for t in (*hiddens, *grads)]
    del hiddens, grads
    gc.collect()
    assert all(ref() is None for ref in alive)


def test_threads_share_a_prepared_call(device):
    hiddens, grads = pairs(device)
    prepared = prepare_statistics(hiddens, grads)
    expected = by_operator(hiddens, grads)
    wrong = []

    def work():
        for _ in range(50):
            if not same_bits(prepared(hiddens, grads).packed, expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_calls_prepare_themselves_and_shapes_may_change(device, monkeypatch):
    monkeypatch.setattr(prepared, "recent", [])
    kinds = [pairs(device, ((b, 5), (b, 7))) for b in (3, 4, 3, 8)]
    for _ in range(3):
        for hiddens, grads in kinds:
            for _ in range(3):
                found = layer_statistics(hiddens, grads)
                assert same_bits(found.packed, by_operator(hiddens, grads))
    assert 1 <= len(prepared.recent) <= prepared._MOST_RECENT
    hiddens, grads = kinds[0]
    with pytest.raises(ValueError, match="expected a grad of the hidden's shape"):
        layer_statistics(hiddens, grads[::-1])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 40])
def test_means_of_some_layers(count, device, backend):
    shapes = ((count, 33), (count, 3, 4, 2), (count, 2500))
    for dtype in (torch.bfloat16, torch.float64):
        hiddens, grads = pairs(device, shapes, dtype)
        full = layer_statistics(hiddens, grads, backend=backend)
        for wanted in ([], [1], [2, 0]):
            for _ in range(3):
                some = layer_statistics(hiddens, grads, means=wanted, backend=backend)
                assert torch.equal(some.hidden_norm, full.hidden_norm)
                assert torch.equal(some.grad_norm, full.grad_norm)
                for layer, (got, mean) in enumerate(
                    zip(some.grad_mean, full.grad_mean, strict=True)
                ):
                    assert torch.equal(got, mean) if layer in wanted else got.shape == (0,)


def test_means_under_vmap_compile_and_mixed_types(device, backend):
    hiddens, grads = pairs(device, ((4, 6), (4, 9)))
    stack = [torch.stack([t, t + 1]) for t in (*hiddens, *grads)]

    def probe(*tensors):
        return layer_statistics(tensors[:2], tensors[2:], means=[1], backend=backend).grad_mean[1]

    torch.testing.assert_close(torch.vmap(probe)(*stack), stack[3].mean(1))
    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(probe, fullgraph=True)(*hiddens, *grads), grads[1].mean(0)
    )
    mixed = layer_statistics(
        [hiddens[0], hiddens[1].double()],
        [grads[0], grads[1].double()],
        means=[1],
        backend=backend,
    )
    assert mixed.grad_mean[0].shape == (0,)
    torch.testing.assert_close(mixed.grad_mean[1], grads[1].double().mean(0))


def test_means_of_a_layer_that_is_not_there(device, backend):
    hiddens, grads = pairs(device)
    for means in ([3], [-1]):
        with pytest.raises(ValueError, match="means: expected layers from 0 to 2, got"):
            layer_statistics(hiddens, grads, means=means, backend=backend)


@pytest.mark.cuda
def test_a_prepared_call_is_captured_and_uses_the_current_stream():
    shapes = ((64, 30), (64, 5000), (64, 3, 100))
    hiddens, grads = pairs("cuda", shapes)
    prepared = prepare_statistics(hiddens, grads, means=[1])
    prepared(hiddens, grads)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = prepared(hiddens, grads)
    for seed in range(3):
        fresh, fresh_grads = pairs("cuda", shapes, seed=seed)
        for old, new in zip((*hiddens, *grads), (*fresh, *fresh_grads), strict=True):
            old.copy_(new)
        graph.replay()
        assert same_bits(captured.packed, by_operator(hiddens, grads, False, [0, 2]))
    expected = captured.packed.clone()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            doubled = [t * 2 for t in (*hiddens, *grads)]
            found = prepared(doubled[:3], doubled[3:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(found.hidden_norm, captured.hidden_norm * 2)
    assert same_bits(captured.packed, expected)
