"""One test for each row of the README's table of limits: what happens, and that it is said."""

import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from fadiag_fast import diagnose
from fadiag_fast.capture import Probe, constants_of, planning, untouched
from fadiag_fast.capture.points import TapError

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
ROWS = set()
WIDTH, BATCH = 6, 8


def row(context):
    """Say which row of the table a test is for."""
    ROWS.add(context)
    return lambda test: test


class Net(nn.Module):
    """A stem, blocks whose branches its forward adds, a head."""

    def __init__(self, block=None, depth=3):
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.layers = nn.ModuleList(
            block() if block else nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
            for _ in range(depth)
        )
        self.head = nn.Linear(WIDTH, 4)

    def step(self, layer, h):
        return h + layer(h)

    def forward(self, x):
        h = self.stem(x)
        for layer in self.layers:
            h = self.step(layer, h)
        return self.head(h)


class Tokens(Net):
    def __init__(self):
        super().__init__()
        self.stem = nn.Embedding(11, WIDTH)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch_of(size=BATCH):
    return torch.randn(size, 5), torch.randint(0, 4, (size,))


def batches_of(count=9):
    return [batch_of() for _ in range(count)]


def captured_of(model, x, y, **options):
    with untouched(model):
        probe = Probe(model, **options)
        return probe, probe.capture(x, y)


def same(a, b, rtol=1e-5, atol=1e-7):
    """Compare two captures."""
    for name in ("hiddens", "grads"):
        for got, expected in zip(getattr(a, name), getattr(b, name), strict=True):
            torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(a.logit_grads, b.logit_grads, rtol=rtol, atol=atol)


def figures(report):
    return [*report.residual_norms, *report.bp_grad_norms, *report.credit_gains]


def by_hand(model, x, y):
    """States before, between and after the blocks of a :class:`Net`, and their gradients."""
    states = [model.stem(x)]
    for layer in model.layers:
        states.append(states[-1] + layer(states[-1]))
    logits = model.head(states[-1])
    loss = nn.functional.cross_entropy(logits, y)
    return [s.detach() for s in states], list(torch.autograd.grad(loss, states))


def check_by_hand(captured, model, x, y, rtol=1e-5, atol=1e-7):
    hiddens, grads = by_hand(model.eval(), x, y)
    got = [*captured.hiddens, *captured.grads]
    for a, b in zip(got, [*hiddens, *grads], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ---- wrappers


def compiled_whole(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_submodule(model):
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    return model


def compiled_regions(model):
    for layer in model.layers:
        layer.compile(backend="eager")
    return model


def compiled_function(model):
    model.step = torch.compile(model.step, backend="eager")
    return model


@row("`torch.compile`: the model, a submodule, `.compile()` in place, a compiled function")
@pytest.mark.parametrize(
    "how",
    [
        compiled_whole,
        compiled_in_place,
        compiled_submodule,
        compiled_regions,
        compiled_function,
    ],
)
def test_compiled(how):
    model, batches = Net(), batches_of()
    expected = diagnose(model, batches)
    wrapped = how(model)
    wrapped(batches[0][0])  # compiled before the probe comes
    report = diagnose(wrapped, batches)
    assert figures(report) == pytest.approx(figures(expected), rel=1e-5)
    assert "asked for 3, saw 3, 4 states" in report.provenance["taps"]
    wrapped(batches[0][0])


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    rendezvous = tmp_path_factory.mktemp("gloo") / "file"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@row("`DataParallel`, `DistributedDataParallel`")
@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.parallel.DistributedDataParallel])
def test_data_parallel(wrap, process_group):
    model, batches = Net(), batches_of()
    expected = diagnose(model, batches)
    assert figures(diagnose(wrap(model), batches)) == figures(expected)


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@row("`fully_shard` (FSDP2)")
def test_sharded(process_group):
    for make, x in ((Net, batch_of()[0]), (Tokens, torch.randint(0, 11, (BATCH,)))):
        model, y = make(), batch_of()[1]
        _, expected = captured_of(model, x, y)
        probe, captured = captured_of(sharded(model), x, y)
        same(captured, expected)
        assert probe.path == "autograd"
    frozen = sharded(Tokens().requires_grad_(False))
    with pytest.raises(TapError, match="behind sharded parameters that are all frozen; unfreeze"):
        captured_of(frozen, torch.randint(0, 11, (BATCH,)), batch_of()[1])


@row("`FullyShardedDataParallel`, its predecessor")
def test_fully_sharded_data_parallel(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
    with pytest.raises(TapError, match="expected torch's fully_shard, got its predecessor"):
        diagnose(model, batches_of())


# ---- what forward passes do


class WritesLater(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, h):
        return self.linear(h.clone()).sin().mul_(2)


@row("in-place operations: on a state after its tap or before it, `h += block(h)`, on the input")
@pytest.mark.parametrize("path", ["torch.func", "autograd", None])
def test_in_place(path):
    class InPlace(Net):
        def forward(self, x):
            x += 1
            h = self.stem(x)
            for layer in self.layers:
                h += layer(h)
            return self.head(h)

    x, y = batch_of()
    before = x.clone()
    model = InPlace(WritesLater)
    _, captured = captured_of(model, x, y, path=path)
    check_by_hand(captured, model, x + 1, y)
    assert torch.equal(x, before)

    class Assigning(Net):
        def step(self, layer, h):
            h = h + layer(h)
            h[:, 0] = 1
            return h

    model = Assigning().eval()
    _, captured = captured_of(model, x, y)
    h = model.stem(x).detach()
    for l, layer in enumerate(model.layers):
        torch.testing.assert_close(captured.hiddens[l], h)
        h = (h + layer(h)).detach()
        h[:, 0] = 1


@row("one module called several times, under several names, or by itself")
def test_reused_modules():
    block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    model = Net(lambda: block)
    x, y = batch_of()
    probe, captured = captured_of(model, x, y)
    assert probe.taps.labels[1:] == tuple(f"layers.0 (call {n})" for n in (1, 2, 3))
    check_by_hand(captured, model, x, y)


@row("tied weights, parametrised weights, frozen parameters, no parameters")
@pytest.mark.parametrize("path", ["torch.func", "autograd"])
def test_parameters(path):
    x, y = batch_of()
    model = Net()
    for layer in model.layers[1:]:
        layer[0].weight = model.layers[0][0].weight
    nn.utils.parametrizations.weight_norm(model.stem)
    model.head.requires_grad_(False)
    _, captured = captured_of(model, x, y, path=path)
    check_by_hand(captured, model, x, y)
    assert all(p.grad is None for p in model.parameters())
    bare = nn.Sequential(nn.Tanh(), nn.Softplus(), nn.Tanh())
    probe, captured = captured_of(bare, x, y, path=path, select=["0", "1"])
    assert probe.taps.labels == ("0", "1")
    torch.testing.assert_close(captured.hiddens[1], bare[1](x.tanh()))


@row("BatchNorm, dropout, a model in train mode")
def test_train_mode():
    def block():
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout())

    x, y = batch_of()
    model = Net(block).train()
    mean = model.layers[0][1].running_mean.clone()
    _, captured = captured_of(model, x, y)
    assert model.layers[0][1].training
    assert torch.equal(model.layers[0][1].running_mean, mean)
    check_by_hand(captured, model, x, y)


@row("BatchNorm without running statistics: samples of a batch depend on each other")
def test_batch_statistics():
    def block():
        norm = nn.BatchNorm1d(WIDTH, track_running_stats=False)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), norm)

    x, y = batch_of()
    model = Net(block)
    for path in ("torch.func", "autograd"):
        check_by_hand(captured_of(model, x, y, path=path)[1], model, x, y)


@row("buffers and attributes that a forward pass writes")
@pytest.mark.parametrize("path", [None, "autograd"])
def test_state_of_the_model(path):
    class Keeping(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()), persistent=False)
            self.register_buffer("total", torch.zeros(()))
            self.steps, self.kept = 0, None

        def forward(self, x):
            self.count = self.count + 1
            self.total += 1
            self.steps += 1
            self.kept = self.new = self.stem(x)
            return super().forward(x)

    model = Keeping()
    count, total = model.count, model.total
    probe, _ = captured_of(model, *batch_of(), path=path)
    assert probe.path == "autograd"  # torch.func refuses to write into a buffer
    assert model.count is count
    assert model.total is total
    assert (count.item(), total.item(), model.steps, model.kept) == (0, 0, 0, None)
    assert not hasattr(model, "new")


@row("random numbers in eval mode")
def test_random_numbers():
    class Noisy(Net):
        def step(self, layer, h):
            return h + layer(h) + torch.randn_like(h)

    x, y = batch_of()
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    diagnose(Noisy(), [(x, y)] * 9, taps="layers.*:input")
    torch.manual_seed(1)
    assert torch.equal(torch.rand(2), expected)


@row("a random depth, or a tap that only some batches reach")
def test_a_tap_that_some_batches_do_not_reach():
    class Early(Net):
        def forward(self, x):
            h = self.stem(x)
            for layer in self.layers:
                if x[0, 0] > 0 or layer is not self.layers[1]:
                    h = self.step(layer, h)
            return self.head(h)

    batches = [(x.abs() if i != 4 else -x.abs(), y) for i, (x, y) in enumerate(batches_of())]
    message = r"input of layers\.1: expected a call as in the first batch, got none"
    with pytest.raises(TapError, match=message):
        diagnose(Early(), batches)


@row("control flow that depends on the data")
def test_control_flow():
    class Branching(Net):
        def forward(self, x):
            h = self.stem(x)
            h = h.relu() if x[0, 0] > 0 else h.exp().sin()
            order = self.layers if x[0, 0] > 0 else reversed(self.layers)
            for layer in order:
                h = self.step(layer, h)
            return self.head(h)

    model = Branching()
    batches = [(x.abs() if i % 2 else -x.abs(), y) for i, (x, y) in enumerate(batches_of())]
    report = diagnose(model, batches, taps=["layers.*:input"])
    assert report.provenance["capture"] == "autograd"
    assert report.figures.layers == tuple(f"layers.{l}:input" for l in (2, 1, 0))
    assert any("reaches the taps in another order" in remark for remark in report.remarks)
    # Each tap's figures are its own: the same by the path that traces nothing.
    for path in ("torch.func", "autograd"):
        with untouched(model):
            probe = Probe(model, select="layers.*:input", path=path)
            captures = [probe.capture(x, y) for x, y in batches[:3]]
        assert probe.reordered
        for (x, y), captured in zip(batches[:3], captures, strict=True):
            _, alone = captured_of(model, x, y, select="layers.*:input")
            expected = alone if x[0, 0] <= 0 else None
            if expected is not None:
                same(captured, expected)
            else:  # found in the other order
                reverse = [alone.grads[2 - l] for l in range(3)]
                for got, grad in zip(captured.grads, reverse, strict=True):
                    torch.testing.assert_close(got, grad)


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return h.tanh()

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        return grad * (1 - h.tanh() ** 2)


class CallsOldStyle(nn.Linear):
    def forward(self, h):
        return OldStyle.apply(super().forward(h))


class SavedElsewhere(nn.Linear):
    def forward(self, h):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
            return super().forward(h).tanh()


class ToNumpy(nn.Linear):
    def forward(self, h):
        return super().forward(h).tanh() * float(h.detach().numpy().shape[0] > 0)


class Checkpointed(nn.Linear):
    reentrant = False

    def forward(self, h):
        return checkpoint(lambda z: nn.Linear.forward(self, z).tanh(), h, use_reentrant=False)


@row("checkpointed blocks, saved-tensor hooks, old-style autograd functions, `.numpy()`")
@pytest.mark.parametrize("frozen", [False, True], ids=["free", "frozen"])
@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Checkpointed, "saved tensor hooks"),
        (SavedElsewhere, "saved tensor hooks"),
        (CallsOldStyle, "setup_context"),
        (ToNumpy, "data pointer"),
    ],
)
def test_what_torch_func_cannot_run(block, reason, frozen):
    x, y = batch_of()
    model = Net(lambda: block(WIDTH, WIDTH)).requires_grad_(not frozen)
    probe, captured = captured_of(model, x, y)
    assert probe.path == "autograd"
    with pytest.raises(RuntimeError, match=reason):
        captured_of(model, x, y, path="torch.func")
    check_by_hand(captured, model.requires_grad_(), x, y)


@row("`torch.utils.checkpoint` with `use_reentrant=True`")
def test_reentrant_checkpoints():
    class Reentrant(nn.Linear):
        def forward(self, h):
            return checkpoint(lambda z: nn.Linear.forward(self, z), h, use_reentrant=True)

    with pytest.raises(TapError, match="use_reentrant=False, or none in eval mode, got"):
        diagnose(Net(lambda: Reentrant(WIDTH, WIDTH)), batches_of())


@row("a model that differentiates in its own forward")
@pytest.mark.parametrize("path", ["torch.func", "autograd"])
def test_differentiates_itself(path):
    class Forces(Net):
        def forward(self, x):
            h = self.stem(x)
            for layer in self.layers:
                h = self.step(layer, h)
            energy = self.head(h).pow(2).sum()
            return self.head(h - torch.autograd.grad(energy, h, create_graph=True)[0])

    x, y = batch_of()
    model = Forces()
    _, captured = captured_of(model, x, y, path=path)
    states = [model.stem(x)]
    for layer in model.layers:
        states.append(states[-1] + layer(states[-1]))
    force = 2 * model.head(states[-1]) @ model.head.weight
    loss = nn.functional.cross_entropy(model.head(states[-1] - force), y)
    for got, grad in zip(captured.grads, torch.autograd.grad(loss, states), strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-7)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Linear(5, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        h = self.encoder(self.table(x))
        return self.head(h + self.attention(h, h, h)[0]).mean(1)


@row("`nn.TransformerEncoder`, `nn.MultiheadAttention`")
def test_fused_attention():
    x, y = torch.randn(BATCH, 3, 5), batch_of()[1]
    model = Attention()
    fast = torch.backends.mha.get_fastpath_enabled()
    probe, captured = captured_of(model, x, y)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert probe.taps.labels[1:] == ("encoder.layers.0", "encoder.layers.1")
    model.eval()
    states = [model.table(x)]
    for layer in model.encoder.layers:
        states.append(layer(states[-1]))
    attended = states[-1] + model.attention(*[states[-1]] * 3)[0]
    loss = nn.functional.cross_entropy(model.head(attended).mean(1), y)
    for got, grad in zip(captured.grads, torch.autograd.grad(loss, states), strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-7)


@row("attention in a stack of checkpoints (`torch.vmap`)")
def test_attention_under_vmap():
    class SelfAttention(nn.Linear):
        def forward(self, h):
            z = super().forward(h)[:, None]
            return nn.functional.scaled_dot_product_attention(z, z, z)[:, 0]

    x, y = torch.randn(BATCH, 3, 5), torch.randint(0, 4, (BATCH, 3))
    model = Net(lambda: SelfAttention(WIDTH, WIDTH)).eval()
    probe = Probe(model)
    probe.prepare(x)
    stack = {name: torch.stack([t, t * 0.5]) for name, t in constants_of(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it loops
        grads = torch.vmap(lambda constants: probe.capture(x, y, constants=constants).grads)(stack)
    for c in range(2):
        one = probe.capture(x, y, constants={name: t[c] for name, t in stack.items()})
        for got, grad in zip(grads, one.grads, strict=True):
            torch.testing.assert_close(got[c], grad, rtol=1e-4, atol=1e-7)


# ---- what states are made of


@row("quantised layers, and whatever else has no gradient")
def test_quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear})
    for path in ("torch.func", "autograd", None):
        with pytest.raises(
            TapError, match="that have a gradient, got quantized::linear_dynamic, t"
        ):
            captured_of(model, *batch_of(), path=path, select="layers.*:input")


@row("sparse states")
def test_sparse():
    class Sparse(nn.Linear):
        def forward(self, h):
            return super().forward(h.to_dense()).to_sparse()

    class Through(Net):
        def forward(self, x):
            h = self.stem(x).to_sparse()
            for layer in self.layers:
                h = layer(h)
            return self.head(h.to_dense())

    with pytest.raises(TapError, match=r"expected a dense state, got torch\.sparse_coo"):
        diagnose(Through(lambda: Sparse(WIDTH, WIDTH)), batches_of())


@row("complex states")
def test_complex():
    class Rotating(Net):
        def forward(self, x):
            h = torch.complex(self.stem(x), self.stem(-x))
            for layer in self.layers:
                h = self.step(layer, h)
            return self.head(h.abs())

    x, y = batch_of()
    model = Rotating(lambda: nn.Linear(WIDTH, WIDTH, dtype=torch.complex64))
    h = torch.complex(model.stem(x), model.stem(-x))
    report = diagnose(model, [(x, y)] * 9)
    norms = torch.linalg.vector_norm(torch.cat([h.real, h.imag], 1).detach(), dim=1).sort().values
    assert report.residual_norms[0] == pytest.approx(float(norms[BATCH // 2 - 1]), rel=1e-5)


@row("half precision, autocast")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    x, y = batch_of()
    model = Net().to(dtype)
    for path in ("torch.func", "autograd"):
        _, captured = captured_of(model, x.to(dtype), y, path=path)
        assert {t.dtype for t in (*captured.hiddens, *captured.grads)} == {dtype}
    # Two roundings of 2⁻⁹ a layer in bfloat16.
    check_by_hand(captured, model, x.to(dtype), y, rtol=0.05, atol=0.01)
    model = Net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = (captured_of(model, x, y, path=path)[1] for path in ("torch.func", "autograd"))
        same(a, b)
        report = diagnose(model, [(x, y)] * 9)
    assert a.hiddens[0].dtype == torch.bfloat16
    assert report.residual_norms == pytest.approx(
        diagnose(model, [(x, y)] * 9).residual_norms, 0.05
    )


@row("TorchScript submodules in an eager model")
def test_scripted_submodules():
    x, y = batch_of()
    model = Net()
    expected = by_hand(model, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.head = torch.jit.script(model.head)
    probe, captured = captured_of(model, x, y)
    for got, state in zip(captured.hiddens, expected[0][:3], strict=True):
        torch.testing.assert_close(got, state)
    remarks = " ".join(probe.taps.remarks)
    assert "TorchScript takes no hooks and was not looked into: head." in remarks
    assert "The state after layers.2 is no module's input: it was not seen." in remarks


@row("hooks of your own")
def test_hooks():
    x, y = batch_of()
    model, seen = Net(), []
    model.layers[0].register_forward_pre_hook(lambda _, args: (2 * args[0],))
    model.layers[1].register_forward_hook(lambda _, args, out: out / 2)
    model.layers[2].register_forward_hook(lambda _, args, out: seen.append(out))
    for path in ("torch.func", "autograd"):
        _, captured = captured_of(model, x, y, path=path)
        check_by_hand(captured, model, x, y)  # the stream, not what the first block makes of it
        _, outputs = captured_of(model, x, y, path=path, select="layers.1")
        torch.testing.assert_close(
            outputs.hiddens[0], model.layers[1](captured.hiddens[1]).detach()
        )
    assert len(seen) > 4  # they run in every pass, the tracing one included
    assert len(model.layers[2]._forward_hooks) == 1


# ---- modes and places


@row("`torch.inference_mode`, `torch.no_grad`, default dtypes and devices around the call")
def test_modes():
    model, batches = Net(), batches_of()
    expected = figures(diagnose(model, batches))
    value = diagnose(model, batches)["c"].value
    with torch.no_grad():
        assert figures(diagnose(model, batches)) == expected
    with torch.inference_mode():
        assert figures(diagnose(model, [(x + 0, y + 0) for x, y in batches])) == expected
        assert torch.is_inference_mode_enabled()
    with torch.device("meta"):
        report = diagnose(model, batches)
        assert figures(report) == expected
        assert report["c"].value == value
    torch.set_default_dtype(torch.float64)
    try:
        assert figures(diagnose(model, batches)) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def built_under_inference_mode():
    with torch.inference_mode():
        return Net()


def on_two_devices():
    model = Net()
    model.head.to("meta")
    return model


def lazy():
    model = Net()
    model.stem = nn.LazyLinear(WIDTH)
    return model


@row("a model built under `torch.inference_mode`, on two devices, on `meta`, or lazy")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (built_under_inference_mode, r"stem\.weight: expected an ordinary tensor, got one made un"),
        (on_two_devices, "a model on one device, got stem.weight on cpu, head.weight on meta"),
        (
            lambda: Net().to("meta"),
            r"stem\.weight: expected a tensor with values, got one on the m",
        ),
        (lazy, r"stem\.weight: expected a tensor with values, got a lazy module's before its"),
    ],
)
def test_models_that_cannot_be_probed(make, message):
    with pytest.raises(TapError, match=f"Net: .*{message}|Net: {message}"):
        diagnose(make(), batches_of())


@row("states on two devices")
def test_states_on_two_devices(monkeypatch):
    x, y = batch_of()
    model = Net().eval()
    found = planning.sighting_at

    def elsewhere(seen, tap):
        """Stand in for a second GPU."""
        sighting = found(seen, tap)
        if tap.module == "head":
            sighting.tensor = sighting.tensor.to("meta")
        return sighting

    monkeypatch.setattr(planning, "sighting_at", elsewhere)
    message = r"all states on one device, got input of layers\.0 on cpu, input of head on meta"
    with pytest.raises(TapError, match=message):
        Probe(model).capture(x, y)


@row("a batch dimension that is not the first")
def test_batch_dimension():
    class Sequence(Net):
        def forward(self, x):
            return super().forward(x.transpose(0, 1)).mean(0)

    x, y = torch.randn(BATCH, 3, 5), batch_of()[1]
    with pytest.raises(TapError, match=r"layers\.0: expected .* 8 samples .*; batch_dim=1 would"):
        captured_of(Sequence(), x, y, select="layers.*")
    report = diagnose(Sequence(), [(x, y)] * 9, batch_dim=1)
    assert report.figures.shapes[0] == (3, WIDTH)
    with pytest.raises(TapError, match="expected a state with 8 samples along dimension 0, got"):
        captured_of(Mixing(), *batch_of(), select="mix")


class Mixing(Net):
    def __init__(self):
        super().__init__()
        self.mix = nn.Identity()

    def forward(self, x):
        return super().forward(x) + self.mix(x.sum(0)).mean()


@row("empty batches, a batch of one, batches of other lengths")
def test_odd_batches():
    model, batches = Net(), batches_of()
    x, y = batches[0]
    report = diagnose(model, [(x[:0], y[:0]), *batches])
    assert "1 batches without samples were left out." in report.remarks
    assert figures(diagnose(model, (pair for pair in batches))) == figures(report)
    assert diagnose(model, [(x[:0], y[:0])]).verdict == "not enough data"
    report = diagnose(model, [(x[:1], y[:1])] * 9)
    assert any("holds one sample" in remark for remark in report.remarks)
    lengths = [
        (torch.randint(0, 11, (BATCH, n)), torch.randint(0, 4, (BATCH, n)))
        for n in (3, 3, 4, 3, 3, 3, 3, 3, 3)
    ]
    message = r"batch 2: .* of shape \[3, 6\] per sample .*got \[4, 6\]; .*reduction='mean'"
    with pytest.raises(ValueError, match=message):
        diagnose(Tokens(), lengths)
    assert diagnose(Tokens(), lengths, reduction="mean")["c"].value is not None


@row("losses and outputs that are none")
def test_losses():
    x, y = batch_of()
    for loss, message in (
        (lambda z, t: z.sum(1), r"loss: expected a scalar, got shape \[8\]"),
        (lambda z, t: 1.5, "loss: expected a scalar tensor, got float"),
    ):
        with pytest.raises(ValueError, match=message):
            diagnose(Net(), [(x, y)] * 9, loss=loss)

    class Detached(Net):
        def forward(self, x):
            return super().forward(x).detach()

    class Silent(Net):
        def forward(self, x):
            super().forward(x)
            return "text"

    with pytest.raises(TapError, match=r"input of head: expected a state that the loss depends on"):
        diagnose(Detached(), [(x, y)] * 9)
    with pytest.raises(TapError, match="expected the model to return a tensor or something with l"):
        diagnose(Silent(), [(x, y)] * 9)
    with pytest.raises(TapError, match="a model that returns its loss, got Tensor without one"):
        diagnose(Net(), [{"x": x}] * 9)


def test_every_row_has_its_test():
    section = README.partition("\n## Limits\n")[2].partition("\n## ")[0]
    networks = section.partition("| network |")[2].partition("\n\n")[0]
    contexts = re.findall(r"^\| (.*?) \|", networks, re.MULTILINE)
    assert set(contexts) - {"---"} == ROWS
