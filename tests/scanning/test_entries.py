"""Among a scan's entries may be anything: it costs its own row, and no other's figures."""

import os
from contextlib import nullcontext

import pytest
import torch
from networks import Branching
from torch import nn

from fadiag_fast import diagnose
from fadiag_fast.capture.reduction import SampleReduction
from fadiag_fast.scanning import memory, scan
from fadiag_fast.scanning import prefetch as reading

pytest.importorskip("pyarrow")

from fadiag_fast.scanning import auditor as passes
from fadiag_fast.scanning.auditor import Auditor
from fadiag_fast.scanning.batching import BatchingPlan
from fadiag_fast.scanning.weight_layout import canonical

pytestmark = pytest.mark.usefixtures("one_thread")

FIGURES = ("residual_norms", "bp_grad_norms", "credit_gains", "stabilities", "pooled_norms")


def batches_of(count=4, dtype=torch.float32):
    torch.manual_seed(1)
    return [(torch.randn(6, 5, dtype=dtype), torch.randint(0, 4, (6,))) for _ in range(count)]


def checkpoints(folder, count, build=Branching):
    folder.mkdir(parents=True, exist_ok=True)
    models = {}
    for step in range(count):
        torch.manual_seed(step)
        models[str(folder / f"step_{step}.pt")] = model = build()
        torch.save(model.state_dict(), folder / f"step_{step}.pt")
    return models


def figures_of(result):
    return {
        row["path"]: figures
        for row, figures in zip(result.rows, result.figures(), strict=True)
        if figures is not None
    }


def assert_like_diagnose(result, models, batches):
    found = figures_of(result)
    assert found.keys() == models.keys()
    for path, model in models.items():
        expected = diagnose(model, batches).figures
        for name in FIGURES[:4]:
            assert getattr(found[path], name) == pytest.approx(
                getattr(expected, name), rel=2e-5, abs=2e-5, nan_ok=True
            ), (path, name)


# ---- sizes

ENORMOUS = 1 << 42  # more than any machine that runs this has


def a_data_set(folder):
    (folder / "images").mkdir(parents=True)
    sparse(folder / "images/images.bin", b"")


def sparse(path, head):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(ENORMOUS)


LARGE = {
    "a data set": a_data_set,
    "no checkpoint": lambda folder: sparse(folder / "a.bin", b""),
    "as if from torch": lambda folder: sparse(folder / "a.pt", b"PK\x03\x04"),
    "as if safetensors": lambda folder: sparse(
        folder / "a.safetensors", (20).to_bytes(8, "little") + b'{"__metadata__":{}} '
    ),
    "in a folder": lambda folder: sparse(folder / "model/pytorch_model.bin", b"PK\x03\x04"),
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_one_large_entry_is_one_failed_row(make, tmp_path):
    models = checkpoints(tmp_path / "good", 3)
    make(tmp_path / "large")
    batches = batches_of()
    entries = [str(tmp_path / "good/*"), str(tmp_path / "large/*")]
    result = scan(entries, Branching(), batches, tmp_path / "out")
    assert (result.counts.audited, result.counts.failed) == (3, 1)
    (row,) = [row for row in result.rows if row["status"] == "failed"]
    assert row["error"]
    assert_like_diagnose(result, models, batches)


def test_a_file_with_much_beside_its_weights_is_measured(tmp_path):
    """An optimiser's state of several sizes: in a thread's buffer, then in one of its own."""
    models = checkpoints(tmp_path, 6)
    sizes = (0, 1_000, 20_000, 40_000, 300_000, 1_000)
    for size, (path, model) in zip(sizes, models.items(), strict=True):
        beside = torch.randn(size)
        torch.save({"optimizer": beside, "state_dict": model.state_dict()}, path)
    batches = batches_of()
    for stack in (1, 3):
        result = scan(list(models), Branching(), batches, tmp_path / f"out{stack}", stack=stack)
        assert result.failures() == {}
        assert_like_diagnose(result, models, batches)


def test_a_file_that_does_not_fit_into_memory_is_one_failed_row(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "free_host_bytes", lambda: 1_000_000)
    models = checkpoints(tmp_path, 4)
    large = tmp_path / "step_1.pt"
    torch.save(
        {"a": torch.zeros(300_000), "state_dict": models.pop(str(large)).state_dict()}, large
    )
    batches = batches_of()
    result = scan(str(tmp_path / "*.pt"), Branching(), batches, tmp_path / "out")
    (row,) = result.failures()["out of memory"]
    assert row["path"] == str(large)
    assert str(large) in row["error"]
    assert "1,000,000 are free" in row["error"]
    assert_like_diagnose(result, models, batches)


@pytest.mark.parametrize(
    "error", [MemoryError("no"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate")]
)
def test_a_lack_of_memory_fails_one_file_alone(error, tmp_path, monkeypatch):
    models = checkpoints(tmp_path, 3)
    bad = str(tmp_path / "step_1.pt")
    del models[bad]
    read_into = reading.read_into

    def lacking(path, *args, **options):
        if path == bad:
            raise error
        return read_into(path, *args, **options)

    monkeypatch.setattr(reading, "read_into", lacking)
    batches = batches_of()
    result = scan(str(tmp_path / "*.pt"), Branching(), batches, tmp_path / "out")
    assert [row["path"] for row in result.failures()["out of memory"]] == [bad]
    assert_like_diagnose(result, models, batches)


def test_a_container_that_has_less_memory_than_its_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    assert memory.free_host_bytes() > 0
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\ninactive_file 300000\n")
    assert memory.free_host_bytes() == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_host_bytes() > 1_000_000


# ---- memory that tensors share


class Counting(nn.Module):
    """Write into a buffer in every forward pass, and read it."""

    def __init__(self, reads=False):
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 4)
        self.reads = reads
        self.register_buffer("seen", torch.zeros(6))
        self.register_buffer("other", torch.zeros(6))

    def forward(self, x):
        self.seen.add_(1.0)
        self.other.sub_(0.5)
        x = self.embed(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x + 0.01 * self.seen if self.reads else x)


def views_of_one(state):
    """Neighbours that overlap by half."""
    whole = torch.randn(9)
    state["seen"], state["blocks.1.bias"] = whole[:6], whole[3:]


SHARING = {
    "a buffer and a weight": lambda s: s.update({"seen": s["blocks.0.bias"]}),
    "a buffer and a row": lambda s: s.update({"seen": s["blocks.0.weight"][2]}),
    "two buffers": lambda s: s.update({"seen": s["other"]}),
    "two weights": lambda s: s.update({"blocks.1.weight": s["blocks.0.weight"]}),
    "parts": views_of_one,
    "an expanded buffer": lambda s: s.update({"seen": torch.ones(1).expand(6)}),
    "an expanded weight": lambda s: s.update({"blocks.0.weight": torch.ones(6, 1).expand(6, 6)}),
    "strides that overlap": lambda s: s.update(
        {"blocks.0.weight": torch.randn(11).as_strided((6, 6), (1, 1))}
    ),
    "a transposed weight": lambda s: s.update({"blocks.0.weight": s["blocks.0.weight"].T}),
}


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("change", SHARING.values(), ids=SHARING)
def test_tensors_that_share_memory_in_a_file_do_not_change_each_other(change, stack, tmp_path):
    models = {}
    for step in range(3):
        torch.manual_seed(step)
        model = Counting()
        state = dict(model.state_dict())
        change(state)
        path = tmp_path / f"{step}.pt"
        torch.save(state, path)
        model.load_state_dict(torch.load(path))
        models[str(path)] = model
    batches = batches_of()
    result = scan(str(tmp_path / "*.pt"), Counting(), batches, tmp_path / "out", stack=stack)
    assert_like_diagnose(result, models, batches)


class Clipping(Counting):
    """Write into a weight, as critics do that are clipped."""

    def forward(self, x):
        with torch.no_grad():
            self.blocks[0].weight.clamp_(-0.05, 0.05)
        return super().forward(x)


def test_a_weight_that_forward_writes_is_no_other_weight(tmp_path):
    torch.manual_seed(0)
    model = Clipping()
    state = model.state_dict()
    state["blocks.1.weight"] = state["blocks.0.weight"]
    torch.save(state, tmp_path / "a.pt")
    model.load_state_dict(torch.load(tmp_path / "a.pt"))
    batches = batches_of()
    result = scan(str(tmp_path / "a.pt"), Clipping(), batches, tmp_path / "out")
    assert_like_diagnose(result, {str(tmp_path / "a.pt"): model}, batches)


class Remembering(Counting):
    """As before, in a buffer that no checkpoint holds, and in an attribute."""

    def __init__(self):
        super().__init__(reads=True)
        self.register_buffer("seen", torch.zeros(6), persistent=False)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.kept = x
        return super().forward(x) * (1 + 0.1 * self.calls)


@pytest.mark.parametrize("build", [lambda: Counting(reads=True), Remembering])
def test_each_checkpoint_starts_from_its_own_buffers(build, tmp_path):
    """As many as are measured in several ways, one after another."""
    models = checkpoints(tmp_path, 20, build)
    batches = batches_of()
    whole = figures_of(scan(list(models), build(), batches, tmp_path / "out"))
    for path in list(models)[::6]:
        alone = figures_of(scan([path], build(), batches, tmp_path / "alone"))[path]
        for name in FIGURES:
            assert getattr(whole[path], name) == pytest.approx(
                getattr(alone, name), rel=2e-5, abs=2e-5, nan_ok=True
            )


# ---- what a bad entry leaves behind


class Touchy(Remembering):
    """Leave traces, then object to some weights."""

    def forward(self, x):
        if self.head.bias[0] > 1e3:
            self.calls, self.left = 100, True
            self.seen.fill_(50.0)
            raise RuntimeError("these weights are not for me")
        return super().forward(x) * (3.0 if hasattr(self, "left") else 1.0)


def refused(state):
    state["head.bias"][0] = 1e4
    return state


BAD = {
    "raises": refused,
    "not a number": lambda s: {**s, "embed.weight": torch.full((6, 5), torch.nan)},
    "too small": lambda s: {**s, "blocks.0.weight": torch.zeros(5, 5)},
    "lacks a name": lambda s: {k: v for k, v in s.items() if k != "blocks.1.bias"},
    "no weights": lambda s: {"loss": 1.0},
    "of double precision": lambda s: {k: v.double() for k, v in s.items()},
    "with an optimiser": lambda s: {"state_dict": s, "a": torch.zeros(90_000)},
}


@pytest.mark.parametrize("stack", [1, 4, "auto"])
def test_figures_do_not_depend_on_what_lies_between(stack, tmp_path):
    models = checkpoints(tmp_path, 18, Touchy)
    bad = []
    for i, make in enumerate([*BAD.values(), *BAD.values()]):
        path = tmp_path / f"step_{i}_bad.pt"
        torch.manual_seed(99 + i)
        torch.save(make(Touchy().state_dict()), path)
        bad.append(str(path))
    (tmp_path / "step_3_cut.pt").write_bytes((tmp_path / "step_3.pt").read_bytes()[:-300])
    bad.append(str(tmp_path / "step_3_cut.pt"))
    batches = batches_of()
    options = {"stack": stack, "pattern": "step_{step}*.pt"}
    expected = figures_of(scan(list(models), Touchy(), batches, tmp_path / "good", **options))
    assert expected.keys() == models.keys()
    mixed = [path for pair in zip(models, bad, strict=False) for path in pair]
    found = figures_of(
        scan([*mixed, *list(models)[len(bad) :]], Touchy(), batches, tmp_path / "all", **options)
    )
    for path in models:
        for name in FIGURES:
            assert getattr(found[path], name) == pytest.approx(
                getattr(expected[path], name), rel=2e-5, abs=2e-5, nan_ok=True
            ), (path, name)


# ---- CUDA graphs, as a recording that goes wrong makes them


class Recording:
    """Stand for a CUDA graph; ``right`` is whether a replay runs what was recorded."""

    def __init__(self, run, right):
        self.run, self.right, self.written = run, right, run().clone()

    def replay(self):
        if self.right:
            self.written.copy_(self.run())


@pytest.mark.parametrize("right", [True, False])
def test_a_graph_whose_replay_gives_other_figures_is_not_believed(right, tmp_path, monkeypatch):
    """Recorded on another device than the model's, it is empty: a replay leaves old memory."""
    recorded = []

    def record(run, device, **options):
        recorded.append(Recording(run, right))
        return recorded[-1], recorded[-1].written

    monkeypatch.setattr(passes, "record", record)
    monkeypatch.setattr(passes, "on_device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    options = {"select": None, "loss": None, "output": None, "batch_dim": 0}
    auditor = Auditor(Branching().eval(), batches_of(), options, SampleReduction("flatten"))
    fit = canonical(auditor.model)
    rows = torch.zeros((4, fit.stop), dtype=torch.uint8)
    for row, seed in zip(rows, range(4), strict=True):
        torch.manual_seed(seed)
        state = Branching().state_dict()
        for name, view in fit.views(row).items():
            view.copy_(state[name])
    expected = auditor.measure(rows, fit, BatchingPlan(stack=2), graph=False).columns
    auditor.device = torch.device("cuda")
    for at in (0, 2):
        found = auditor.measure(rows[at : at + 2], fit, BatchingPlan(stack=2)).columns
        torch.testing.assert_close(
            found, expected[at : at + 2], rtol=2e-5, atol=1e-6, equal_nan=True
        )
    assert len(recorded) == 1
    assert len(auditor._graphs) == right


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("stack", [1, 4, "auto"])
def test_scans_on_one_gpu_after_another(stack, tmp_path):
    """Each records graphs; those of the second are of the second GPU."""
    models = checkpoints(tmp_path / "runs", 20, lambda: Branching().double())
    batches = batches_of(9, torch.float64)
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        assert torch.cuda.current_device() == 0
        model = Branching().double().to(device)
        out = tmp_path / f"out{device[-1]}"
        assert_like_diagnose(scan(list(models), model, batches, out, stack=stack), models, batches)


if os.name == "nt":  # which has no sparse files by default
    del test_one_large_entry_is_one_failed_row
