"""The training probe inside torch.compile, and in CUDA graphs of the whole step."""

import copy
import math

import pytest
import torch
from networks import Branching
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config
from torch._inductor import metrics

from fadiag_fast import StepProbe
from fadiag_fast.training.compiled_taps import _GRAD_SCALE, _STATE_SCALE

# Sums of squares in float32 over a few hundred numbers, and a compiler's own order of operations.
FLOAT32_TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Stated(nn.Module):
    """Blocks return the next state."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3))
        self.out_head = nn.Linear(6, 4)

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.out_head(h)


def batch_of(samples=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 5, generator=generator)
    return x, torch.randint(0, 4, (samples,), generator=generator)


def build(kind, seed=0):
    torch.manual_seed(seed)
    return {"branch": Branching, "state": Stated}[kind]()


def train(model, call, batches, **options):
    """Records of steps that also change the weights; ``call`` is made with the probe in place."""
    records = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with StepProbe(model, sink=records.append, **options) as probe:
        run = call(model)
        for x, y in batches:
            nn.functional.cross_entropy(run(x), y).backward()
            probe.step()
            optimizer.step()
            optimizer.zero_grad()
    return records


def assert_alike(records, expected, tolerance=FLOAT32_TOLERANCE):
    assert [r.step for r in records] == [r.step for r in expected]
    for got, wanted in zip(records, expected, strict=True):
        for field in ("hidden_norms", "grad_norms", "credit_gains", "stabilities"):
            assert getattr(got, field) == pytest.approx(
                getattr(wanted, field),
                rel=tolerance,
                abs=tolerance if field == "stabilities" else 0,
                nan_ok=True,
            ), field
        assert got.output_grad_norm == pytest.approx(wanted.output_grad_norm, rel=tolerance)
        assert got.num_samples == wanted.num_samples
        assert got.unreached == wanted.unreached == ()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["branch", "state"])
def test_figures_are_those_of_the_eager_probe(kind, backend):
    batches = [batch_of(seed=s) for s in range(4)]
    counter = CompileCounterWithBackend(backend)
    expected = train(build(kind), lambda m: m, batches, directions="all")
    records = train(
        build(kind),
        lambda m: torch.compile(m, backend=counter, fullgraph=True),
        batches,
        directions="all",
        example=batches[0][0],
    )
    assert_alike(records, expected)
    assert counter.frame_count == 1  # compiled once, not again for each step


class Sequence(nn.Module):
    """Residual blocks behind normalisations, over positions: as a transformer has them."""

    def __init__(self, depth=3, width=32):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        h = x
        for block in self.blocks:
            h = h + block(h)
        return self.head(self.norm(h)).mean(1)


@pytest.mark.slow
def test_a_state_of_a_sequence_adds_three_kernels_at_most():
    """A launch takes as long as reading a small state; more would be felt in every step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 64, 32, generator=generator, requires_grad=True)
    y = torch.randint(0, 4, (6,), generator=generator)

    def kernels(**options):
        torch.manual_seed(0)
        torch.compiler.reset()
        metrics.reset()
        with inductor_config.patch(force_disable_caches=True):
            records = train(Sequence(), torch.compile, [(x, y)], **options)
        return metrics.generated_kernel_count, records

    probed, records = kernels(example=x, directions="none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepProbe, "_observes", lambda self: False)
        patch.setattr(StepProbe, "step", lambda self: None)
        bare, _ = kernels(example=x, directions="none")
    states = len(records[0].layers)
    assert 0 < probed - bare <= 3 * (states + 1)
    torch.manual_seed(0)
    assert_alike(records, train(Sequence(), lambda m: m, [(x, y)], directions="none"))


def test_a_compiled_module_needs_no_example():
    """Its wrapper is called eagerly: there the taps are found."""
    batches = [batch_of(seed=s) for s in range(2)]
    expected = train(build("branch"), lambda m: m, batches)
    model = torch.compile(build("branch"), backend="aot_eager", fullgraph=True)
    assert_alike(train(model, lambda m: m, batches), expected)


def test_smaller_batches_leave_their_other_places_empty():
    batches = [batch_of(12), batch_of(7, seed=2), batch_of(12, seed=3)]
    expected = train(build("branch"), lambda m: m, batches)
    records = train(
        build("branch"),
        lambda m: torch.compile(m, backend="aot_eager", fullgraph=True),
        batches,
        example=batches[0][0],
    )
    assert_alike(records, expected)
    assert [r.num_samples for r in records] == [12, 7, 12]


def test_the_first_samples_alone_are_observed_and_larger_batches_fit():
    batches = [batch_of(12), batch_of(16, seed=2), batch_of(3, seed=3)]
    options = {"samples": 5, "directions": "all"}
    expected = train(build("branch"), lambda m: m, batches, **options)
    records = train(
        build("branch"),
        lambda m: torch.compile(m, backend="aot_eager", fullgraph=True),
        batches,
        example=batches[0][0],
        **options,
    )
    assert_alike(records, expected)
    assert [r.num_samples for r in records] == [5, 5, 3]


def test_larger_batches_are_refused_with_the_option_to_give():
    model = build("branch")
    x, _ = batch_of(12)
    with (
        StepProbe(model, example=x[:4]),
        pytest.raises(RuntimeError, match=r"expected at most 4 samples .* got 12"),
    ):
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.compiler.reset()
    with StepProbe(model, example=x[:4], max_samples=12):
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)


def test_micro_batches_are_kept_apart():
    (x, y) = batch_of(12)
    expected = train(build("branch"), lambda m: m, [(x, y)])
    records = []
    model = build("branch")
    with StepProbe(model, sink=records.append, example=x) as probe:
        run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
        for part in (slice(0, 4), slice(4, 12)):
            (nn.functional.cross_entropy(run(x[part]), y[part]) * len(x[part]) / 12).backward()
        probe.step()
    assert_alike(records, expected)
    assert records[0].micro_batches == 2


def test_evaluation_is_not_seen():
    batches = [batch_of(seed=s) for s in range(2)]
    expected = train(build("branch"), lambda m: m, batches)

    def call(model):
        run = torch.compile(model, backend="aot_eager", fullgraph=True)

        def both(x):
            with torch.no_grad():
                run(2 * x)
            model.eval()
            run(3 * x).sum().backward()
            model.zero_grad()
            model.train()
            return run(x)

        return both

    assert_alike(train(build("branch"), call, batches, example=batches[0][0]), expected)


def test_modules_compiled_on_their_own_are_seen_beside_others():
    batches = [batch_of(seed=s) for s in range(3)]
    expected = train(build("state"), lambda m: m, batches, directions="all")

    def call(model):
        for block in model.blocks[:2]:
            block.compile(backend="aot_eager", fullgraph=True)
        return model

    assert_alike(train(build("state"), call, batches, directions="all"), expected)


class Tokens(nn.Module):
    """States [B, T, D], or [T, B, D]; logits [B, C] of the first position, or of all."""

    def __init__(self, batch_dim=0, pooled=False):
        super().__init__()
        self.pooled = pooled
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in "ab")
        self.head = nn.Linear(5, 4)
        self.batch_dim = batch_dim

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        positions = 1 - self.batch_dim
        return self.head(x.mean(positions) if self.pooled else x.select(positions, 0))


# More room than the batch needs, also for a part of a sample's three positions.
@pytest.mark.parametrize("room", [None, 40])
@pytest.mark.parametrize("batch_dim", [0, 1])
@pytest.mark.parametrize("reduction", ["flatten", "mean", "token", "cls"])
def test_reductions_are_those_of_the_eager_probe(reduction, batch_dim, room):
    torch.manual_seed(0)
    model, y = Tokens(batch_dim), torch.randint(0, 4, (6,))
    x = torch.randn(6, 3, 5).movedim(0, batch_dim).contiguous()
    twin = copy.deepcopy(model)
    options = {"reduction": reduction, "batch_dim": batch_dim, "directions": "all"}
    expected = train(twin, lambda m: m, [(x, y)] * 2, **options)
    records = train(
        model,
        lambda m: torch.compile(m, backend="aot_eager", fullgraph=True),
        [(x, y)] * 2,
        example=x,
        max_samples=room,
        **options,
    )
    # Tokens without a gradient have no gain in either.
    assert_alike(records, expected)


@pytest.mark.parametrize("dynamic", [None, True])
def test_tokens_of_another_number_than_in_the_example(dynamic):
    """The error of a sample goes with all of its own positions."""
    torch.manual_seed(0)
    model, options = Tokens(pooled=True), {"reduction": "token", "directions": "none"}
    batches = [
        (torch.randn(6, positions, 5), torch.randint(0, 4, (6,))) for positions in (4, 3, 2, 4)
    ]
    expected = train(copy.deepcopy(model), lambda m: m, batches, **options)
    records = train(
        model,
        lambda m: torch.compile(m, backend="aot_eager", dynamic=dynamic),
        batches,
        example=batches[0][0],
        **options,
    )
    assert_alike(records, expected)


@pytest.mark.parametrize("positions", [0, 3])
def test_a_backward_pass_that_makes_a_graph(positions):
    torch.manual_seed(0)
    model, x = Stated(), torch.randn(6, positions, 5)
    records = []
    with StepProbe(model, sink=records.append, example=x, directions="none") as probe:
        run = torch.compile(model, backend="aot_eager")
        run(x).square().sum().backward(create_graph=True)
        probe.step()
    expected = []
    with StepProbe(model, sink=expected.append, directions="none") as probe:
        model.zero_grad()
        model(x).square().sum().backward()
        probe.step()
    for name in ("hidden_norms", "grad_norms", "num_samples"):
        assert getattr(records[0], name) == pytest.approx(
            getattr(expected[0], name), rel=FLOAT32_TOLERANCE
        )


@pytest.mark.parametrize("shape", [(64, 32, 4), (8, 128, 32)])
def test_next_to_nothing_is_kept_of_narrow_states(shape):
    """Of a convolution's output [B, C, L], or of narrow tokens."""
    x = torch.randn(shape)

    def saved(probed):
        torch.compiler.reset()
        width, sizes, records = shape[-1], {}, []
        model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in "abc"))
        model.append(nn.Linear(width, 2))

        def note(tensor):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        taps = ["0.0", "1.0", "2.0"]  # what the training itself does not keep
        probe = StepProbe(model, taps, sink=records.append, example=x) if probed else None
        run = torch.compile(model, backend="aot_eager")
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = run(x)
        found = sum(sizes.values())
        out.square().sum().backward()
        if probe is not None:
            probe.step()
            probe.remove()
            assert len(records) == 1
        return found

    assert saved(True) <= 1.01 * saved(False)


def test_norms_hold_far_beyond_the_range_of_squares_in_float32():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 6)
            self.b = nn.Linear(6, 4)

        def forward(self, x):
            return self.b(self.a(x) * 1.0) * 1e-24

    torch.manual_seed(0)
    model, (x, y) = Scaled(), batch_of()
    with torch.no_grad():
        model.a.weight.mul_(1e24)
    twin = copy.deepcopy(model)
    expected = train(twin, lambda m: m, [(x, y)], taps=["a"], directions="none")
    assert expected[0].hidden_norms[0] ** 2 > torch.finfo(torch.float32).max
    assert expected[0].grad_norms[0] ** 2 < torch.finfo(torch.float32).tiny
    records = train(
        model,
        lambda m: torch.compile(m, backend="aot_eager", fullgraph=True),
        [(x, y)],
        taps=["a"],
        directions="none",
        example=x,
    )
    assert_alike(records, expected)
    assert math.log2(_STATE_SCALE) == -32  # a power of two: scaling rounds nothing
    assert math.log2(_GRAD_SCALE) == 32


def test_a_probe_that_comes_too_late_is_refused():
    model, (x, y) = build("branch"), batch_of()
    run = torch.compile(model, backend="aot_eager")
    nn.functional.cross_entropy(run(x), y).backward()
    with StepProbe(model, example=x) as probe:
        nn.functional.cross_entropy(run(x), y).backward()
        with pytest.raises(RuntimeError, match="built before its first compiled call"):
            probe.step()


def test_a_model_that_is_compiled_as_one_graph_before_its_taps_are_known_is_refused():
    model, (x, _) = build("branch"), batch_of()
    with StepProbe(model):
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="give example="):
                run(x)
        model.eval()
        assert run(x).shape == (len(x), 4)  # a pass that is not observed needs no taps


def test_a_state_that_no_module_returns_is_refused_with_its_name():
    class Halved(Branching):
        def forward(self, x):
            h = self.embed(x)
            for block in self.blocks:
                h = 0.5 * h + 0.5 * block(h)
            return self.out_head(self.out_ln(h))

    torch.manual_seed(0)
    model, (x, _) = Halved(), batch_of()
    with (
        StepProbe(model, example=x, taps=["out_ln:input"]),
        pytest.raises(RuntimeError, match="input of out_ln: expected a state that a module"),
    ):
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)


def test_a_removed_probe_is_compiled_away():
    model, (x, y) = build("branch"), batch_of()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    run = torch.compile(model, backend=keep, fullgraph=True)
    with StepProbe(model, example=x):
        run(x)
    run(x)
    texts = [graph.print_readable(print_output=False) for graph in graphs]
    assert ["autograd_function_apply" in text for text in texts] == [True, False]
    assert y is not None


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("kind", ["branch", "state"])
def test_compiled_for_a_gpu(kind, mode):
    batches = [tuple(t.cuda() for t in batch_of(seed=s)) for s in range(5)]
    expected = train(build(kind).cuda(), lambda m: m, batches, directions="all")
    records = train(
        build(kind).cuda(),
        lambda m: torch.compile(m, fullgraph=True, mode=mode),
        batches,
        directions="all",
        example=batches[0][0],
    )
    assert_alike(records, expected, tolerance=1e-3)


def whole_step(run, probe, optimizer, x, y):
    """Return a training step as a CUDA graph can hold it: always over the same x and y."""

    def step():
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(run(x), y).backward()
        probe.step()
        optimizer.step()

    return step


@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_a_cuda_graph_of_the_whole_step(compiled):
    batches = [tuple(t.cuda() for t in batch_of(seed=s)) for s in range(14)]
    expected = train(build("branch").cuda(), lambda m: m, batches, ring=8)

    model = build("branch").cuda()
    x, y = (t.clone() for t in batches[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    records = []
    probe = StepProbe(model, sink=records.append, ring=8, example=x)
    run = torch.compile(model, fullgraph=True) if compiled else model

    step = whole_step(run, probe, optimizer, x, y)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for a, b in batches[:3]:
            x.copy_(a)
            y.copy_(b)
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for a, b in batches[3:]:
        x.copy_(a)
        y.copy_(b)
        graph.replay()
        probe.step()
    probe.remove()
    assert_alike(records, expected, tolerance=1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("parts", [1, 2])
def test_a_cuda_graph_of_micro_batches_has_the_figures_of_ordinary_steps(parts):

    def run(graphed):
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(512, 512), nn.ReLU()) for _ in range(4)]
        model = nn.Sequential(*layers, nn.Linear(512, 10)).cuda()
        x, y = torch.randn(64 * parts, 512, device="cuda"), torch.arange(64 * parts) % 10
        y = y.cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        records = []
        probe = StepProbe(model, ["0", "1", "2", "3"], sink=records.append, directions="all")

        def step():
            optimizer.zero_grad(set_to_none=True)
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                nn.functional.cross_entropy(model(a), b).backward()
            probe.step()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if graphed:
            with torch.cuda.graph(graph):
                step()
        for _ in range(20):
            if graphed:
                graph.replay()
                probe.step()
            else:
                step()
        probe.remove()
        return records

    records, expected = run(True), run(False)
    assert len(records) == 23
    assert_alike(records, expected, tolerance=1e-5)
    assert [r.micro_batches for r in records] == [parts] * 23


@pytest.mark.cuda
def test_a_captured_backward_pass_without_a_step_can_be_replayed():
    model = build("branch").cuda()
    x, y = (t.cuda() for t in batch_of())
    with StepProbe(model, example=x) as probe:
        nn.functional.cross_entropy(model(x), y).backward()
        probe.step()
        graph = torch.cuda.CUDAGraph()
        model.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            nn.functional.cross_entropy(model(x), y).backward()
        graph.replay()
        captured = [p.grad.clone() for p in model.parameters()]
        probe.discard()
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    for gradient, parameter in zip(captured, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.cuda
@pytest.mark.parametrize("every", [1, 3])
def test_ordinary_steps_between_replays_of_the_whole_step(every):
    batches = [tuple(t.cuda() for t in batch_of(seed=s)) for s in range(25)]

    def train_with(graphed):
        model = build("branch").cuda()
        x, y = (t.clone() for t in batches[0])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        records = []
        probe = StepProbe(model, sink=records.append, ring=8, example=x, schedule=every)

        step = whole_step(model, probe, optimizer, x, y)
        graph = torch.cuda.CUDAGraph()
        for i, (a, b) in enumerate(batches):
            x.copy_(a)
            y.copy_(b)
            if graphed and i == 7:
                with torch.cuda.graph(graph):
                    step()
            if graphed and i >= 7 and i % 4:
                graph.replay()
                probe.step()
            else:
                step()
        probe.remove()
        return records

    expected, records = train_with(False), train_with(True)
    assert [r.step for r in records] == list(range(0, 25, every))
    for record, other in zip(records, expected, strict=True):
        assert record.hidden_norms == pytest.approx(other.hidden_norms, rel=1e-3)
        assert record.grad_norms == pytest.approx(other.grad_norms, rel=1e-3)


@pytest.mark.cuda
def test_small_steps_are_reduced_by_a_graph_and_others_among_them_are_not():
    """Of one size, then a smaller batch, then two micro-batches, then the first size again."""
    sizes = [[12]] * 9 + [[7]] + [[12]] * 3 + [[12, 12]] + [[12]] * 9
    model, twin = build("branch").cuda(), build("branch").cuda()
    records, expected = [], []
    with (
        StepProbe(model, sink=records.append, directions="all") as probe,
        StepProbe(twin, sink=expected.append, directions="all") as plain,
    ):
        for seed, parts in enumerate(sizes):
            if seed:  # the first pass has shown the taps
                plain._recorder._graphed.refused = True
            for net, its in ((model, probe), (twin, plain)):
                for part, samples in enumerate(parts):
                    x, y = (t.cuda() for t in batch_of(samples, seed=100 * seed + part))
                    nn.functional.cross_entropy(net(x), y).backward()
                its.step()
        assert probe._recorder._graphed.replay is not None
        assert plain._recorder._graphed.replay is None
    assert len(records) == len(sizes)
    assert_alike(records, expected, tolerance=1e-6)


@pytest.mark.cuda
def test_a_graph_is_not_replayed_over_directions_that_have_moved():
    """Sequences of another length begin their directions anew, in other memory."""
    torch.manual_seed(0)

    def build_sequence():
        return nn.Sequential(
            nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
        )

    model = build_sequence().cuda()
    records = []
    taps = ["0", "2"]
    with StepProbe(model, taps, sink=records.append, directions="all") as probe:
        for step in range(24):
            length = 3 if 8 <= step < 16 else 5
            x = torch.randn(6, length, 4, device="cuda")
            model(x).square().mean().backward()
            probe.step()
    assert [r.num_directions for r in records] == [
        min(i % 8, 8) if i < 24 else 8 for i in range(24)
    ]
    assert all(abs(c) <= 1 + 1e-6 for r in records for c in r.stabilities if c == c)


@pytest.mark.cuda
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("mode", ["together", "passing"])
def test_no_step_waits_for_the_gpu(mode, scaled):
    model = build("branch").cuda()
    records = []
    scaler = torch.amp.GradScaler("cuda", enabled=scaled)
    options = {"scaler": scaler} if scaled else {}
    probe = StepProbe(model, sink=records.append, mode=mode, directions="all", **options)
    batches = [tuple(t.cuda() for t in batch_of(seed=s)) for s in range(9)]

    def step(x, y):
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        probe.step()

    step(*batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in batches[1:]:
            step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    probe.remove()
    assert [record.step for record in records] == list(range(9))


@pytest.mark.cuda
def test_large_states_are_not_kept():
    """The peak of a step is the same, but for the figures: what training frees stays freed."""
    torch.manual_seed(0)
    width, samples = 4096, 4096
    model = nn.Sequential(
        *(m for _ in range(6) for m in (nn.Linear(width, width), nn.ReLU(inplace=True)))
    ).cuda()
    x = torch.randn(samples, width, device="cuda")

    def peak(probe):
        torch.cuda.reset_peak_memory_stats()
        model.zero_grad()
        model(x).square().mean().backward()
        if probe is not None:
            probe.step()
        return torch.cuda.max_memory_allocated()

    peak(None)
    plain = peak(None)
    with StepProbe(model, taps="class:Linear", directions="none", example=x[:8]) as probe:
        peak(probe)
        probed = peak(probe)
    assert probed <= plain * 1.005
