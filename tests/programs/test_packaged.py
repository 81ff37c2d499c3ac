"""Programs without their source: the same figures as hooks and autograd on the original network."""

import os
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from networks import Branching, Stateful
from torch import nn
from torch.export import Dim, export
from typer.testing import CliRunner

from fadiag_fast import CompiledProbe, cli, diagnose, load_packaged
from fadiag_fast.capture import Probe, untouched
from fadiag_fast.capture.points import TapError
from fadiag_fast.checkpoints import (
    CheckpointError,
    MissingCheckpoint,
    UnreadableCheckpoint,
    load_checkpoint,
)
from fadiag_fast.programs.exported import from_exported
from fadiag_fast.programs.loading import NoGraph, as_module, is_program
from fadiag_fast.programs.torchscript import from_torchscript
from fadiag_fast.zoo import ResidualMLP

FORMS = ("scripted", "traced", "exported")


class SmallCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(channels, 4, 3, padding=1),
                    nn.BatchNorm2d(4),
                    nn.ReLU(inplace=True),
                    nn.Dropout(0.5),
                )
                for channels in (3, 4, 4)
            )
        )
        self.fc = nn.Linear(4 * 16, 4)

    def forward(self, x):
        return self.fc(self.stages(x).flatten(1))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens):
        return self.head(self.encoder(self.table(tokens)).mean(1))


class Tied(nn.Module):
    """Three layers with one weight, and a module that is called twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        for layer in self.layers:
            layer.weight = self.layers[0].weight
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        h = self.embed(x)
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return self.head(self.twice(torch.tanh(self.twice(h))))


class Choosing(Branching):
    """What only a graph with control flow holds: a branch, a loop, a list that grows."""

    def forward(self, x, scale: float = 1.0):
        h = self.embed(x) * scale
        seen = [h]
        for block in self.blocks:
            if h.size(0) > 1:
                h = h + block(h)
            seen.append(h)
        total = torch.zeros_like(h)
        for index in range(len(seen)):
            total = total + seen[index] / float(len(seen))
        return self.out_head(self.out_ln(h + 0 * total)), {"mean": total.mean()}


def shifted(model):
    """Move BatchNorm's running figures away from where they start, where they would be no test."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def inputs_of(*names):
    return [(name, "input") for name in names]


def outputs_of(*names):
    return [(name, "output") for name in names]


# A network, its input, and where its states are on the original.
CASES = {
    "branch": (
        Branching,
        torch.randn(6, 5),
        inputs_of("blocks.0", "blocks.1", "blocks.2", "out_ln"),
    ),
    "state": (
        lambda: shifted(Stateful()),
        torch.randn(6, 5),
        inputs_of("blocks.0") + outputs_of("blocks.0", "blocks.1", "blocks.2"),
    ),
    "cnn": (
        lambda: shifted(SmallCNN()),
        torch.randn(6, 3, 4, 4),
        outputs_of("stages.0", "stages.1", "stages.2"),
    ),
    "encoder": (
        Encoder,
        torch.randint(0, 11, (6, 3)),
        inputs_of("encoder.layers.0") + outputs_of("encoder.layers.0", "encoder.layers.1"),
    ),
    "tied": (
        Tied,
        torch.randn(6, 5),
        inputs_of("layers.0")
        + outputs_of("layers.0", "layers.1", "layers.2")
        + inputs_of("twice")
        + outputs_of("twice", "twice"),
    ),
}
LABELS = torch.arange(6) % 4


def by_hooks(model, x, places):
    """States (copied: in-place layers follow) and gradients of the original network."""
    states = {place: [] for place in places}

    def keep(place):
        def hook(module, args, output=None):
            state = args[0] if place[1] == "input" else output
            if len(states[place]) < places.count(place):  # the first calls
                state.retain_grad()
                states[place].append((state, state.detach().clone()))

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(keep((name, at)))
        if at == "input"
        else model.get_submodule(name).register_forward_hook(keep((name, at)))
        for name, at in dict.fromkeys(places)
    ]
    loss = nn.functional.cross_entropy(model(x), LABELS)
    loss.backward()
    for handle in handles:
        handle.remove()
    calls = [places[:i].count(place) for i, place in enumerate(places)]
    kept = [states[place][call] for place, call in zip(places, calls, strict=True)]
    return [values for _, values in kept], [state.grad for state, _ in kept]


def scripted(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(model)


def traced(model, x):
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operator without a derivative
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.trace(model, x, check_trace=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def exported(model, x):
    return export(model, (x,), dynamic_shapes=({0: Dim.DYNAMIC},))


def saved(program, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if isinstance(program, torch.jit.ScriptModule):
            torch.jit.save(program, path)
        else:
            torch.export.save(program, path)
    return path


MAKERS = {"scripted": scripted, "traced": traced, "exported": exported}

# Runs where the networks' classes cannot be imported, on every file at once.
AUDIT = """
import importlib.util, sys, warnings
warnings.simplefilter("error", DeprecationWarning)
warnings.simplefilter("error", FutureWarning)
import torch
from fadiag_fast import load_packaged
from fadiag_fast.capture import Probe, untouched

torch.set_num_threads(1)
assert importlib.util.find_spec("test_packaged") is None
assert importlib.util.find_spec("networks") is None
cases = torch.load("cases.pt")
found = {}
for name, (x, y) in cases.items():
    for form in ("scripted", "traced", "exported"):
        model = load_packaged(f"{name}-{form}", trust_code=True)
        for path in ("torch.func", "autograd"):
            with untouched(model):
                # The counter in its forward pass keeps torch.func out, in the original too.
                probe = Probe(model, path="autograd" if name == "state" else path)
                captured = probe.capture(x, y)
            found[name, form, path] = {
                "class": type(model).__name__,
                "path": probe.path,
                "places": [(tap.module, tap.at) for tap in probe.taps.points],
                "chosen": probe.taps.chosen,
                "hiddens": captured.hiddens,
                "grads": captured.grads,
            }
torch.save(found, "found.pt")
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For six samples of six numbers, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def audits(tmp_path_factory):
    """Every network in every form, saved, and audited by a process that has no source."""
    folder = tmp_path_factory.mktemp("packaged")
    torch.manual_seed(0)
    originals, cases = {}, {}
    for name, (build, x, _) in CASES.items():
        model = build().double().eval()
        x = x.double() if x.is_floating_point() else x
        originals[name], cases[name] = model, (x, LABELS)
        for form, make in MAKERS.items():
            saved(make(model, x), folder / "program.pt2")
            # The name says nothing about the content.
            (folder / "program.pt2").rename(folder / f"{name}-{form}")
    torch.save(cases, folder / "cases.pt")
    (folder / "audit.py").write_text(AUDIT)
    package = str(Path(cli.__file__).parent.parent)
    result = subprocess.run(
        [sys.executable, "audit.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": package},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return originals, cases, torch.load(folder / "found.pt"), folder


@pytest.mark.parametrize("path", ["torch.func", "autograd"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_original(audits, name, form, path):
    originals, cases, found, _ = audits
    hiddens, grads = by_hooks(originals[name], cases[name][0], CASES[name][2])
    got = found[name, form, path]
    assert got["path"] == path or name == "state"
    assert got["places"] == CASES[name][2]
    assert got["class"] == type(originals[name]).__name__
    for a, b in zip([*got["hiddens"], *got["grads"]], [*hiddens, *grads], strict=True):
        assert a.dtype == torch.float64
        # The same operators in the same order, but for attention's choice of a kernel.
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_chains_are_named_by_the_original_classes(audits):
    _, _, found, _ = audits
    for form in FORMS:
        chosen = {name: found[name, form, "torch.func"]["chosen"] for name in CASES}
        assert chosen["branch"] == chosen["state"] == "residual contract"
        assert chosen["cnn"] == "chain of 3 Sequential in stages.*"
        assert chosen["encoder"] == "chain of 2 TransformerEncoderLayer in encoder.layers.*"
        assert chosen["tied"] == ("chain of 3 Linear in layers.* and chain of 2 Linear in twice")


@pytest.mark.parametrize("form", FORMS)
def test_taps_by_name_class_and_call(audits, form):
    _, cases, _, folder = audits
    x, _ = cases["tied"]
    model = load_packaged(folder / f"tied-{form}", trust_code=True).eval()
    # Tracing hands the shared weight to the later layers as an argument; it is no state.
    probe = Probe(model, select=["layers.*:input", "twice", "class:Linear"])
    probe.prepare(x)
    assert [tap.label for tap in probe.taps.points if tap.module != "layers.0"] == [
        "embed",
        "layers.1:input",
        "layers.1",
        "layers.2:input",
        "layers.2",
        "twice (call 1)",
        "twice (call 2)",
        "head",
    ]
    assert {tuple(spot.shape) for spot in probe.prepare(x).spots} == {(6, 6), (6, 4)}


@pytest.mark.parametrize("form", FORMS)
def test_tied_weights_stay_tied_and_batches_may_differ(audits, form):
    _, cases, _, folder = audits
    x, y = cases["tied"]
    model = load_packaged(folder / f"tied-{form}", trust_code=True)
    weights = [getattr(model.layers, str(index)).weight for index in range(3)]
    assert weights[0] is weights[1] is weights[2]
    with untouched(model):
        probe = Probe(model)
        whole = probe.capture(x, y)
        part = probe.capture(x[:3], y[:3])
    torch.testing.assert_close(part.hiddens[-1], whole.hiddens[-1][:3])


def test_a_program_given_as_an_object_is_left_as_it_was():
    torch.manual_seed(0)
    model = shifted(Stateful()).train()
    x = torch.randn(6, 5)
    batches = [(x, LABELS), (x.flip(0), LABELS)]
    expected = diagnose(model, batches)
    for form, make in MAKERS.items():
        program = make(model.train() if form == "scripted" else model.eval(), x)
        state = program.state_dict if form == "exported" else program.state_dict()
        before = {name: tensor.clone() for name, tensor in state.items()}
        hooks = len(model._forward_hooks)
        report = diagnose(program, batches)
        assert report.residual_norms == pytest.approx(expected.residual_norms, rel=1e-6)
        assert report.bp_grad_norms == pytest.approx(expected.bp_grad_norms, rel=1e-5)
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
        assert len(model._forward_hooks) == hooks
        if form == "scripted":
            assert program.training
        deprecated = [remark for remark in report.remarks if "deprecated" in remark]
        assert len(deprecated) == (form != "exported")


def test_control_flow_arguments_and_structured_outputs():
    torch.manual_seed(0)
    model = Choosing().double().eval()
    x = torch.randn(6, 5, dtype=torch.float64)
    program = from_torchscript(scripted(model, x))
    for arguments, options in (((x,), {}), ((x, 2.0), {}), ((), {"scale": 0.5, "x": x})):
        torch.testing.assert_close(program(*arguments, **options), model(*arguments, **options))
    torch.testing.assert_close(program(x[:1]), model(x[:1]))
    for arguments, options in (((), {}), ((x, 1.0, 2.0), {}), ((x,), {"y": 1})):
        with pytest.raises(TypeError, match="Choosing: expected the argument"):
            program(*arguments, **options)
    places = inputs_of("blocks.0", "blocks.1", "blocks.2", "out_ln")
    model_of_logits = lambda x: model(x)[0]  # noqa: E731
    model_of_logits.get_submodule = model.get_submodule
    _, grads = by_hooks(model_of_logits, x, places)
    captured = Probe(program, loss=lambda output, y: nn.functional.cross_entropy(output[0], y))
    for a, b in zip(captured.capture(x, LABELS).grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_the_program_moves_and_changes_its_type():
    torch.manual_seed(0)
    model = shifted(SmallCNN()).eval()
    x = torch.randn(6, 3, 4, 4)
    program = from_torchscript(scripted(model, x)).double()
    model = model.double()
    torch.testing.assert_close(program(x.double()), model(x.double()))
    assert {t.dtype for t in program.state_dict().values()} == {torch.float64, torch.int64}


def test_programs_fixed_in_training_mode_say_so():
    torch.manual_seed(0)
    x = torch.randn(6, 5)
    batches = [(x, LABELS)] * 2
    for make, word in ((traced, "traced"), (exported, "exported")):
        program = make(Stateful().train(), x)
        report = diagnose(program, batches)
        (remark,) = [r for r in report.remarks if "training mode" in r]
        assert f"was {word} in training mode: batch_norm, dropout behave" in remark
        assert not any(
            "training" in r for r in diagnose(make(Stateful().eval(), x), batches).remarks
        )
    decomposed = exported(Stateful().train(), x).run_decompositions()
    assert "training mode" in from_exported(decomposed).packaging_remarks[0]


def test_decomposed_programs_keep_their_modules(audits):
    originals, cases, _, _ = audits
    x, y = cases["cnn"]
    program = from_exported(exported(originals["cnn"], x).run_decompositions())
    hiddens, grads = by_hooks(originals["cnn"], x, CASES["cnn"][2])
    captured = Probe(program).capture(x, y)
    for a, b in zip([*captured.hiddens, *captured.grads], [*hiddens, *grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_a_program_for_one_batch_size():
    x = torch.randn(6, 5)
    program = from_exported(export(Branching().eval(), (x,)))
    assert program.batch_size == 6
    assert program(x=x).shape == (6, 4)
    with pytest.raises(TapError, match=r"'x'.*got \[3, 5\]; it was exported for batches of 6 "):
        diagnose(program, [(x[:3], LABELS[:3])])
    with pytest.raises(TapError, match=r"expected shape \[6, 5\], got \[6, 7\]$"):
        program(torch.randn(6, 7))
    with pytest.raises(TapError, match="expected the inputs that it was exported with, x, got z"):
        program(z=x)
    with pytest.raises(TapError, match="x, got 2 arguments"):
        program(x, x)


# ---- what cannot be audited


class Forking(Branching):
    def forward(self, x):
        future = torch.jit.fork(self.embed, x)
        return self.out_head(self.blocks[0](torch.jit.wait(future)))


def test_what_cannot_be_run_from_python_is_named():
    program = scripted(Forking().eval(), None)
    with pytest.raises(TapError, match=r"the program: .* got prim::fork; save it with "):
        diagnose(program, [(torch.randn(6, 5), LABELS)])


def test_a_frozen_program_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        frozen = torch.jit.freeze(torch.jit.script(Branching().eval()))
    with pytest.raises(TapError, match=r"Branching: .* torch\.jit\.freeze and optimize_"):
        diagnose(frozen, [(torch.randn(6, 5), LABELS)])


def test_a_difference_from_torchscript_is_shown(monkeypatch):
    from fadiag_fast.programs import torchscript

    program = from_torchscript(scripted(Choosing().eval(), None))
    monkeypatch.setitem(torchscript._OF_CONTAINERS, "aten::len", lambda items: len(items) - 1)
    with pytest.raises(TapError, match=r"output \d: expected what TorchScript computes.*tolerance"):
        program(torch.randn(6, 5))


def test_the_flat_module_of_a_program_is_refused():
    program = export(Branching().eval(), (torch.randn(6, 5),))
    with pytest.raises(TapError, match="give the ExportedProgram itself"):
        diagnose(program.module(), [(torch.randn(6, 5), LABELS)])


def test_a_program_without_module_paths_is_refused():
    program = export(Branching().eval(), (torch.randn(6, 5),))
    for node in program.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    with pytest.raises(TapError, match="ExportedProgram: expected a graph"):
        as_module(program)


def truncated(path, folder):
    data = path.read_bytes()
    (folder / "cut").write_bytes(data[: len(data) // 2])
    return folder / "cut"


def rewritten(path, folder, changes):
    """Copy an archive with some members' bytes changed; torch wants them uncompressed."""
    out = folder / "rewritten.pt2"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            for ending, change in changes.items():
                data = change(data) if name.endswith(ending) else data
            new.writestr(name, data)
    return out


@pytest.mark.parametrize("form", FORMS)
def test_damaged_files(audits, form, tmp_path):
    *_, folder = audits
    path = folder / f"branch-{form}"
    with pytest.raises(UnreadableCheckpoint, match=r"load_packaged: .*truncated or damaged"):
        load_packaged(truncated(path, tmp_path), trust_code=True)
    ending = "data.pkl" if form != "exported" else "model.json"
    broken = rewritten(path, tmp_path, {ending: lambda data: data[: len(data) // 2]})
    with pytest.raises(UnreadableCheckpoint, match=r"load_packaged: .*truncated or damaged"):
        load_packaged(broken, trust_code=True)


def test_files_that_hold_no_program(audits, tmp_path):
    *_, folder = audits
    with pytest.raises(MissingCheckpoint, match="expected a TorchScript file or an exported"):
        load_packaged(tmp_path / "nowhere.pt")
    with pytest.raises(UnreadableCheckpoint, match="got a directory"):
        load_packaged(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(UnreadableCheckpoint, match="got an empty file"):
        load_packaged(tmp_path / "empty")
    torch.save(Branching().state_dict(), tmp_path / "weights.pt")
    (tmp_path / "text").write_text("weights")
    for name in ("weights.pt", "text"):
        assert not is_program(tmp_path / name)
        with pytest.raises(UnreadableCheckpoint, match="for weights build the network and use"):
            load_packaged(tmp_path / name)
    assert all(is_program(folder / f"cnn-{form}") for form in FORMS)
    with pytest.raises(UnreadableCheckpoint, match=r"a TorchScript archive, which is a program"):
        load_checkpoint(folder / "cnn-traced")


def test_compiled_packages_have_no_graph(tmp_path):
    with zipfile.ZipFile(tmp_path / "compiled.pt2", "w") as archive:
        archive.writestr("compiled/archive_format", "pt2")
        archive.writestr("compiled/data/aotinductor/model/model.wrapper.so", b"\x7fELF")
    (tmp_path / "library.so").write_bytes(b"\x7fELF" + bytes(60))
    for name in ("compiled.pt2", "library.so"):
        with pytest.raises(NoGraph, match=r"compiled by AOTInductor.*CompiledProbe"):
            load_packaged(tmp_path / name)


@pytest.mark.parametrize("make", [scripted, exported])
def test_programs_are_probed_as_one_graph_and_probes_are_no_networks(make, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(6, 5)
    program = make(Branching().eval(), x)
    probe = CompiledProbe(as_module(program), backend=None)
    norms = probe(x, LABELS).hidden_norm.sort(dim=1).values[:, 2]
    report = diagnose(program, [(x, LABELS)])
    assert norms.tolist() == pytest.approx(report.residual_norms, rel=1e-6)
    if make is exported:
        probe.save(tmp_path / "probe.pt2", x, LABELS)
        with pytest.raises(NoGraph, match="run it with load_probe"):
            load_packaged(tmp_path / "probe.pt2")


def test_an_operator_that_is_not_registered_is_named(audits, tmp_path):
    *_, folder = audits
    path = rewritten(
        folder / "branch-scripted",
        tmp_path,
        {".py": lambda data: data.replace(b"torch.gelu(", b"ops.nowhere.gelu(")},
    )
    with pytest.raises(CheckpointError, match="that are registered here, got nowhere::gelu"):
        load_packaged(path, trust_code=True)


# ---- the command line


def test_the_command_line_needs_no_model(tmp_path):
    torch.manual_seed(0)
    vectors, images = ResidualMLP(784, 8, 10, 2).eval(), nn.Sequential(nn.Flatten()).eval()
    images.extend([nn.Linear(784, 8), nn.Linear(8, 8), nn.Linear(8, 10)])
    x = torch.rand(32, 1, 28, 28)
    files = [
        saved(traced(vectors, x.flatten(1)), tmp_path / "vectors.pt"),
        saved(scripted(images, x), tmp_path / "images.pt"),
        saved(export(vectors, (x.flatten(1),)), tmp_path / "fixed.pt2"),
    ]
    small = ["--batch-size", "32", "--batches", "8"]
    result = CliRunner().invoke(cli.app, ["diagnose", *map(str, files), "--trust-code", *small])
    assert result.exit_code in (0, 1), result.output
    text = result.output.replace("\n", " ")
    assert "ResidualMLP from" in text
    assert "3 of 3" not in text
    assert re.search(r"residual contract: asked for 2, saw 2, 3 states", text)
    trusted = ["diagnose", "--trust-code", str(files[2]), "--batches", "8"]
    other = CliRunner().invoke(cli.app, trusted)
    assert other.exit_code == 3
    assert "exported for batches of 32" in other.output.replace("\n", " ")
