"""The probe as one program: traced, compiled, graphed, exported, against the eager capture."""

import subprocess
import sys

import pytest
import torch
from networks import Branching, audit_by_hand, branch_states
from torch import nn

from fadiag_fast import CompiledProbe, TapError, diagnose, load_probe
from fadiag_fast.checkpoints import UntrustedProgram


def convolutional():
    def stage():
        return nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        )

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), stage(), stage(), stage(), *head)
    model(torch.randn(16, 3, 6, 6))  # gives BatchNorm's running figures something to show
    return model.eval()


def by_hand(model, x, y):
    """Per-sample norms in float64, from ordinary autograd alone."""
    hiddens, grads, logit_grads = audit_by_hand(model, x, y, branch_states)
    norms = [
        torch.stack([t.flatten(1).norm(dim=1) for t in tensors]) for tensors in (hiddens, grads)
    ]
    return [*norms, logit_grads.norm(dim=1), [g.mean(0) for g in grads]]


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(12, 5), torch.randint(0, 4, (12,))


def assert_equals_hand(found, model, x, y, rtol):
    hidden_norm, grad_norm, output_grad_norm, means = by_hand(model, x, y)
    for got, expected in (
        (found.hidden_norm, hidden_norm),
        (found.grad_norm, grad_norm),
        (found.output_grad_norm, output_grad_norm),
        (found.credit_gain, grad_norm / output_grad_norm),
    ):
        torch.testing.assert_close(got.cpu(), expected, rtol=rtol, atol=0)
    for got, expected in zip(found.grad_mean, means, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(got.cpu().double(), expected, rtol=rtol, atol=rtol * scale)


# float32 runs the network itself in float32: about a hundred roundings of 6e-8.
FLOAT32_TOLERANCE = 2e-5


@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_equals_a_computation_by_hand(backend, batch, device):
    x, y = batch
    model = Branching()
    probe = CompiledProbe(model.to(device), backend=backend)
    found = probe(x.to(device), y.to(device))
    assert found.hidden_norm.device.type == torch.device(device).type
    assert probe.taps.labels == ("embed", "blocks.0", "blocks.1", "blocks.2")
    assert_equals_hand(found, model.cpu(), x, y, FLOAT32_TOLERANCE)


def test_float64_is_exact_to_rounding(batch):
    x, y = batch
    model = Branching().double()
    found = CompiledProbe(model, backend=None)(x.double(), y)
    assert_equals_hand(found, model, x, y, 1e-12)


def test_sees_the_weights_of_the_moment(batch):
    x, y = batch
    model = Branching()
    probe = CompiledProbe(model, backend="aot_eager")
    probe(x, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    found = probe(x, y)
    assert probe.num_programs == 1
    assert_equals_hand(found, model, x, y, FLOAT32_TOLERANCE)


def test_compiles_again_only_for_a_new_shape(batch):
    x, y = batch
    compiled = []

    def counting(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    probe = CompiledProbe(Branching(), backend=counting)
    for size in (12, 12, 5, 12, 5):
        probe(x[:size], y[:size])
    assert len(compiled) == probe.num_programs == 2


def test_leaves_the_model_as_it_was(batch):
    x, y = batch
    model = Branching().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    CompiledProbe(model, backend=None)(x, y)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_channels_last_batchnorm_and_in_place_activations():
    torch.manual_seed(0)
    model = convolutional().double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    y = torch.arange(4)
    found = CompiledProbe(model, backend="aot_eager")(x, y)
    h = model[0](x).detach().requires_grad_()
    states = [h]
    for stage in model[1:4]:
        states.append(stage(states[-1]))
    loss = nn.functional.cross_entropy(model[4:](states[-1]), y)
    grads = torch.autograd.grad(loss, states)
    for l, (state, grad) in enumerate(zip(states, grads, strict=True)):
        torch.testing.assert_close(found.hidden_norm[l], state.detach().flatten(1).norm(dim=1))
        torch.testing.assert_close(found.grad_norm[l], grad.flatten(1).norm(dim=1))
        torch.testing.assert_close(found.grad_mean[l], grad.mean(0))


def test_named_taps_reduction_and_loss(batch):
    x, _ = batch
    model = Branching().double()
    target = torch.randn(12, 4, dtype=torch.float64)
    probe = CompiledProbe(
        model,
        taps=["blocks.0:input", "out_ln"],
        loss=lambda z, t: nn.functional.mse_loss(z, t, reduction="sum"),
        backend=None,
    )
    found = probe(x.double(), target)
    logits = model(x.double()).detach()
    torch.testing.assert_close(found.output_grad_norm, (2 * (logits - target)).norm(dim=1))
    assert probe.taps.labels == ("blocks.0:input", "out_ln")


def test_a_compiled_module_is_unwrapped(batch):
    x, y = batch
    model = Branching()
    wrapped = torch.compile(model, backend="aot_eager")
    wrapped(x)
    found = CompiledProbe(wrapped, backend=None)(x, y)
    assert_equals_hand(found, model, x, y, FLOAT32_TOLERANCE)


def test_a_model_that_torch_func_refuses_is_named(batch):
    class Counting(Branching):
        def __init__(self):
            super().__init__()
            self.total = [0.0]

        def forward(self, x):
            self.total[0] += float(x.sum())  # reads a value: no graph can
            return super().forward(x) * self.total[0]

    class Old(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    model = Branching()
    model.blocks[0] = nn.Sequential()
    model.blocks[0].forward = Old.apply
    x, y = batch
    with pytest.raises(TapError, match=r"Branching: expected a model that torch\.func can run"):
        CompiledProbe(model, backend=None)(x, y)
    assert diagnose(model, [(x, y)]).provenance["capture"] == "autograd"


def test_a_graph_needs_a_gpu(batch):
    with pytest.raises(ValueError, match="graph=True: expected inputs on a GPU"):
        CompiledProbe(Branching(), backend=None, graph=True)(*batch)


@pytest.mark.cuda
@pytest.mark.parametrize("backend", [None, "inductor"])
def test_a_cuda_graph_replays_with_the_inputs_and_weights_of_the_moment(backend, batch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = Branching().cuda()
    probe = CompiledProbe(model, backend=backend, graph=True)
    x, y = (t.cuda() for t in batch)
    kept = probe(x, y)
    first = kept.hidden_norm.clone()
    with torch.no_grad():
        model.embed.weight.mul_(2)
    found = probe(2 * x, y.flip(0))
    assert torch.equal(kept.hidden_norm, first)  # a later call does not overwrite it
    assert probe.num_programs == 1
    fresh = CompiledProbe(model, backend=None)(2 * x, y.flip(0))
    # Other kernels of the same float32 network: its roundings, as above.
    for got, expected in zip(found[:4], fresh[:4], strict=True):
        torch.testing.assert_close(got, expected, rtol=FLOAT32_TOLERANCE, atol=0)


@pytest.mark.cuda
def test_a_replay_does_not_wait_for_the_gpu(batch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = Branching().cuda()
    probe = CompiledProbe(model, backend=None, graph=True)
    x, y = (t.cuda() for t in batch)
    probe(x, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        probe(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


LOADING = """
import sys, torch
from fadiag_fast import load_probe
assert "networks" not in sys.modules
x, y, expected = torch.load({data!r})
found = load_probe({path!r}, trust_code=True)(x, y)
torch.testing.assert_close(found.hidden_norm, expected, rtol=2e-5, atol=0)
print(load_probe({path!r}, trust_code=True).labels)
"""


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["graph", "machine code"]
)
def test_a_saved_probe_runs_without_the_models_source(compiled, batch, tmp_path):
    x, y = batch
    probe = CompiledProbe(Branching(), backend=None)
    path, data = tmp_path / "probe.pt2", tmp_path / "data.pt"
    torch.save((x, y, probe(x, y).hidden_norm), data)
    probe.save(path, x, y, compiled=compiled)
    code = LOADING.format(path=str(path), data=str(data))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "blocks.2" in done.stdout


def test_a_saved_probe_names_what_it_was_saved_for(batch, tmp_path):
    x, y = batch
    path = tmp_path / "probe.pt2"
    CompiledProbe(Branching(), backend=None).save(path, x, y)
    with pytest.raises(ValueError, match=r"expected inputs .*\[12, 5\].*got .*\[3, 5\]"):
        load_probe(path, trust_code=True)(x[:3], y[:3])


def test_a_saved_probe_is_a_program_and_needs_trust(batch, tmp_path, monkeypatch):
    path = tmp_path / "probe.pt2"
    CompiledProbe(Branching(), backend=None).save(path, *batch)
    monkeypatch.setattr(torch.export, "load", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(UntrustedProgram, match=r"load_probe: .*probe\.pt2.*trust_code=True"):
        load_probe(path)


def test_a_file_that_is_no_probe(tmp_path):
    path = tmp_path / "probe.pt2"
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"expected a file of CompiledProbe\.save, got no"):
        load_probe(path)
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match=r"expected a file of CompiledProbe\.save"):
        load_probe(path)
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),)), path)
    with pytest.raises(ValueError, match="got another program"):
        load_probe(path, trust_code=True)
    with pytest.raises(FileNotFoundError):
        load_probe(tmp_path / "none.pt2")
