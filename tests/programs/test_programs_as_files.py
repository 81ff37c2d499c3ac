"""Files that are programs: nothing in them runs or is imported unless the file is trusted."""

import contextlib
import io
import json
import os
import re
import struct
import sys
import warnings
import zipfile

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from toys import noisy_patterns
from typer.testing import CliRunner

from fadiag_fast import cli, load_packaged, load_probe
from fadiag_fast.checkpoints import (
    CheckpointError,
    UnsafeCheckpoint,
    UntrustedProgram,
    load_checkpoint,
    read_into,
    save_checkpoint,
)
from fadiag_fast.programs.loading import NoGraph
from fadiag_fast.study import StudyModel, Suite, run_study
from fadiag_fast.zoo import build_model

NAMES = ("epoch_3.pt", "epoch_3.pt2", "model.safetensors", "pytorch_model.bin", "last.ckpt")


# ---- what a hostile author does to a file


def rewritten(data, change):
    """Copy a zip file with each member as `change` returns it: bytes, or names to bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            changed = change(name, old.read(name))
            for one, content in (changed if isinstance(changed, dict) else {name: changed}).items():
                new.writestr(one, content)
    return out.getvalue()


def in_model(edit):
    """Change the program's JSON and nothing else."""
    return lambda name, data: edit(data) if name.endswith("models/model.json") else data


def code_in_an_expression(good, mark, folder):
    say = "+".join(f"(chr)({ord(c)})" for c in f"open({mark!r}, 'w')")
    old, new = b'"expr_str": "S', b'"expr_str": "(eval)(%s)+S' % say.encode()
    return rewritten(good, in_model(lambda data: data.replace(old, new, 1)))


def code_in_a_name(good, mark, folder):
    name = f"input=__import__('os').makedirs('{mark}', exist_ok=True)".encode()

    def edit(data):
        data = re.sub(rb'("name": )"input"(?!, "arg")', rb'\1"' + name + b'"', data)
        return data.replace(b'"input": {', b'"' + name + b'": {')

    return rewritten(good, in_model(edit))


def a_second_program(good, mark, folder):
    """Add one whose name does not end as the first one's does."""
    call = b"\"expr_str\": \"__import__('os').mkdir('%s')+S" % mark.encode()

    def change(name, data):
        above, _, last = name.rpartition("/")
        if "model" not in last:
            return data
        other = f"{above}/{last.replace('model', 'other', 1)}"
        if last == "model.json":
            other = f"{above}/other.data"
        return {name: data, other: data.replace(b'"expr_str": "S', call, 1)}

    return rewritten(good, change)


def an_import_in_a_tree(good, mark, folder):
    (folder / "hostile_module.py").write_text(f"import os\nos.mkdir({mark!r})\nFactory = dict\n")

    def edit(data):
        model = json.loads(data)
        factory = {
            "default_factory_module": "hostile_module",
            "default_factory_name": "Factory",
            "dict_context": [],
        }
        spec = {"type": "collections.defaultdict", "context": factory}
        signature = model["graph_module"]["module_call_graph"][0]["signature"]
        signature["out_spec"] = json.dumps([1, {**spec, "children_spec": []}])
        return json.dumps(model).encode()

    return rewritten(good, in_model(edit))


def an_operator_that_makes_files(good, mark, folder):
    def edit(data):
        model = json.loads(data)
        node = model["graph_module"]["graph"]["nodes"][0]
        node["target"] = "torch.ops.aten.from_file.default"
        arguments = {
            "filename": {"as_string": mark},
            "shared": {"as_bool": True},
            "size": {"as_int": 12},
        }
        node["inputs"] = [{"name": n, "arg": a, "kind": 1} for n, a in arguments.items()]
        return json.dumps(model).encode()

    return rewritten(good, in_model(edit))


class _MakesAFolder:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def a_pickle_of_inputs(good, mark, folder):
    pickled = io.BytesIO()
    torch.save((_MakesAFolder(mark),), pickled)
    return rewritten(
        good,
        lambda name, data: pickled.getvalue() if name.endswith("sample_inputs/model.pt") else data,
    )


def two_directories(hostile, weights=None):
    """Show weights to Python's zipfile, which allows for bytes before the archive, and a program
    to torch's reader, which does not."""
    stream = io.BytesIO()
    torch.save({"weight": torch.zeros(2)} if weights is None else weights, stream)
    archives = hostile, stream.getvalue()
    hidden, shown = (zipfile.ZipFile(io.BytesIO(archive)).infolist() for archive in archives)
    starts = [_directory_start(archive) for archive in archives]
    # Equally many members in directories that are equally long.
    count = max(len(hidden), len(shown))
    hidden, shown = (infos + infos[-1:] * (count - len(infos)) for infos in (hidden, shown))
    width = max(sum(46 + len(info.filename) for info in infos) for infos in (hidden, shown))
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, width, sum(starts), 0)
    return b"".join(
        [
            *(archive[:start] for archive, start in zip(archives, starts, strict=True)),
            _directory(hidden, 0, width),
            _directory(shown, starts[0] - width, width),
            end,
        ]
    )


def _directory_start(archive):
    return zipfile.ZipFile(io.BytesIO(archive)).start_dir


def _directory(infos, shift, width):
    short = width - sum(46 + len(info.filename) for info in infos)
    entries = []
    for place, info in enumerate(infos):
        name = info.filename.encode()
        comment = b" " * (short if place == len(infos) - 1 else 0)
        entries.append(
            struct.pack(
                "<4s6H3L5H2L",
                b"PK\x01\x02",
                *(20, 20, info.flag_bits, 0, 0, 0),
                *(info.CRC, info.file_size, info.file_size),
                *(len(name), 0, len(comment), 0, 0),
                *(0, info.header_offset + shift),
            )
            + name
            + comment
        )
    return b"".join(entries)


class SavesWhenCalled(nn.Module):
    def __init__(self, mark: str):
        super().__init__()
        self.mark = mark
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 2)

    def forward(self, x):
        torch.save(x, self.mark)
        return self.b(self.a(x))


class SavesWhenLoaded(SavesWhenCalled):
    def forward(self, x):
        return self.b(self.a(x))

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.mark, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.mark, self.training = state[0], state[1]
        torch.save(torch.zeros(1), self.mark)


def scripted(build):
    def make(good, mark, folder):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            stream = io.BytesIO()
            torch.jit.save(torch.jit.script(build(mark).eval()), stream)
        return stream.getvalue()

    return make


RUN_WHEN_TRUSTED = {
    "expression": code_in_an_expression,
    "name of an input": code_in_a_name,
    "second program": a_second_program,
    "import in a tree": an_import_in_a_tree,
    "operator": an_operator_that_makes_files,
    "pickle": a_pickle_of_inputs,
    "TorchScript, called": scripted(SavesWhenCalled),
    "TorchScript, loaded": scripted(SavesWhenLoaded),
}


def weights_with_code(good, mark, folder):
    """Put a source file beside the data.pkl of a state dict."""
    stream = io.BytesIO()
    torch.save(nn.Linear(3, 2).state_dict(), stream)
    code = f"__import__('os').mkdir({mark!r})\n".encode()
    return rewritten(
        stream.getvalue(),
        lambda name, data: (
            {name: data, name.replace("data.pkl", "code/__torch__.py"): code}
            if name.endswith("data.pkl")
            else data
        ),
    )


def a_torch_package(good, mark, folder):
    from torch.package import PackageExporter

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stream = io.BytesIO()
        with PackageExporter(stream) as package:
            package.save_source_string("net", f"__import__('os').mkdir({mark!r})\nx = 1\n")
            package.extern("torch.**")
            package.save_pickle("model", "model.pkl", nn.Linear(3, 2))
    return stream.getvalue()


def machine_code(good, mark, folder):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("p/archive_format", "pt2")
        archive.writestr("p/data/aotinductor/model/model.wrapper.so", b"\x7fELF" + bytes(60))
    return stream.getvalue()


REFUSED_ALL_THE_SAME = {
    "two directories, TorchScript": lambda good, mark, folder: two_directories(
        scripted(SavesWhenLoaded)(good, mark, folder)
    ),
    # With --unsafe-pickle this is a file for the full unpickler, which would run TorchScript too.
    "two directories, TorchScript and a pickle": lambda good, mark, folder: two_directories(
        scripted(SavesWhenLoaded)(good, mark, folder), {"weight": _MakesAFolder(mark)}
    ),
    "two directories, exported": lambda good, mark, folder: two_directories(
        code_in_an_expression(good, mark, folder)
    ),
    "TorchScript, names in capitals": lambda good, mark, folder: rewritten(
        scripted(SavesWhenLoaded)(good, mark, folder), lambda name, data: {name.upper(): data}
    ),
    "TorchScript, behind other bytes": lambda good, mark, folder: (
        b"#!/bin/sh\n" + scripted(SavesWhenLoaded)(good, mark, folder)
    ),
    "weights with code": weights_with_code,
    "torch.package": a_torch_package,
    "machine code": machine_code,
    "shared library": lambda *_: b"\x7fELF" + bytes(600),
    "ExecuTorch": lambda *_: b"\x30\0\0\0ET12" + bytes(600),
    "mobile TorchScript": lambda *_: b"\x30\0\0\0PTMF" + bytes(600),
    "ONNX": lambda *_: b"\x08\x08\x12\x07pytorch" + bytes(600),
}
HOSTILE = {**RUN_WHEN_TRUSTED, **REFUSED_ALL_THE_SAME}


@pytest.fixture(scope="module")
def good():
    """An exported program of two layers, which does no harm."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).eval()
    stream = io.BytesIO()
    shapes = ({0: Dim.DYNAMIC},)
    torch.export.save(export(net, (torch.zeros(4, 3),), dynamic_shapes=shapes), stream)
    return stream.getvalue()


@pytest.fixture
def opened(monkeypatch):
    """What torch was asked to open as a program or with the full unpickler."""
    found = []
    load = torch.load

    def weights_only(*args, **kwargs):
        if kwargs.get("weights_only") is not True:
            found.append("torch.load")
        return load(*args, **kwargs)

    def forbidden(name):
        def call(*args, **kwargs):
            found.append(name)
            raise AssertionError(f"{name} was called")

        return call

    monkeypatch.setattr(torch, "load", weights_only)
    for owner, name in (
        (torch.jit, "load"),
        (torch._C, "import_ir_module"),
        (torch._C, "import_ir_module_from_buffer"),
        (torch.export, "load"),
        (torch._inductor, "aoti_load_package"),
        (torch.package, "PackageImporter"),
    ):
        monkeypatch.setattr(owner, name, forbidden(f"{owner.__name__}.{name}"))
    return found


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """A path that only code from a file would create."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "hostile_module", raising=False)
    yield tmp_path / "mark"
    sys.modules.pop("hostile_module", None)


def fadiag(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def refused(call):
    """Return what a call says, which must be an error that the user is meant to read."""
    with pytest.raises((CheckpointError, ValueError)) as caught:
        call()
    return str(caught.value)


# ---- refused


@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_of_a_program_runs_without_trust(kind, good, mark, tmp_path, opened, monkeypatch):
    data = HOSTILE[kind](good, str(mark), tmp_path)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    folder.mkdir()
    said = []
    for name in NAMES:
        path = folder / name
        path.write_bytes(data)
        said.append(refused(lambda path=path: load_packaged(path)))
        refused(lambda path=path: load_probe(path))
        refused(lambda path=path: load_checkpoint(path))
        refused(lambda path=path: load_checkpoint(path, unsafe_pickle=True))
        slab = torch.empty(1 << 20, dtype=torch.uint8)
        refused(lambda path=path, slab=slab: read_into(path, slab))
    # In a folder, as a shard, and behind a URL.
    refused(lambda: load_checkpoint(folder))
    index = {"weight_map": {"weight": "pytorch_model.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(lambda: load_checkpoint(folder / "pytorch_model.bin.index.json"))
    for arguments in ((), ("--model", "resmlp"), ("--unsafe-pickle",)):
        result = fadiag("diagnose", *folder.glob("*.pt*"), folder, *arguments)
        assert result.exit_code == 3, result.output
        assert "Traceback" not in result.output
    assert opened == []
    assert not mark.exists()
    assert "hostile_module" not in sys.modules
    assert len({text.replace(name, "") for text, name in zip(said, NAMES, strict=True)}) == 1


@pytest.mark.parametrize("kind", RUN_WHEN_TRUSTED)
def test_the_same_files_run_their_code_once_they_are_trusted(kind, good, mark, tmp_path):
    """Else the refusals above would prove nothing."""
    path = tmp_path / "a.pt2"
    path.write_bytes(HOSTILE[kind](good, str(mark), tmp_path))
    assert not mark.exists()
    # What the program does afterwards is up to it.
    with contextlib.suppress(Exception):
        load_packaged(path, trust_code=True)(torch.zeros(4, 3))
    assert mark.exists()


def test_a_scan_has_a_row_for_every_program_and_goes_on(good, mark, tmp_path, opened):
    pytest.importorskip("pyarrow", reason="needs the extra 'scan'")
    from fadiag_fast.scanning import ScanResult

    folder = tmp_path / "runs"
    folder.mkdir()
    model = build_model("resmlp", input_shape=(1, 28, 28), num_classes=10)
    save_checkpoint(model.state_dict(), folder / "good.pt")
    for index, make in enumerate(HOSTILE.values()):
        (folder / f"{index}.pt").write_bytes(make(good, str(mark), tmp_path))
    # One behind a manifest, in a folder of its own.
    (tmp_path / "hub").mkdir()
    (folder / "0.pt").rename(tmp_path / "hub" / "pytorch_model.bin")
    (tmp_path / "all.csv").write_text(f"path,run,step\n{tmp_path / 'hub'},hub,1\n")
    small = ["--batches", 8, "--batch-size", 4, "--quiet", "--out", tmp_path / "out"]
    for source in ([folder / "*.pt"], ["--manifest", tmp_path / "all.csv"]):
        result = fadiag("scan", *source, *small)
        assert "Traceback" not in result.output
    rows = ScanResult.load(tmp_path / "out").to_arrow("checkpoints").to_pylist()
    assert len(rows) == len(HOSTILE) + 1
    assert [row["path"] for row in rows if not row["error"]] == [str(folder / "good.pt")]
    (hub,) = [row for row in rows if row["run"] == "hub"]
    assert "an exported program" in hub["error"]
    assert "torch.save(module.state_dict(), 'weights.pt')" in hub["error"]
    assert opened == []
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["pickle", "TorchScript, loaded", "two directories, exported"])
def test_a_program_behind_a_url(kind, good, mark, tmp_path, opened):
    fsspec = pytest.importorskip("fsspec", reason="needs the extra 'scan'")
    data = HOSTILE[kind](good, str(mark), tmp_path)
    slab = torch.empty(1 << 20, dtype=torch.uint8)
    local = tmp_path / "epoch_1.pt"
    local.write_bytes(data)
    with fsspec.open("memory://programs/epoch_1.pt", "wb") as file:
        file.write(data)
    for url in ("memory://programs/epoch_1.pt", f"file://{local}"):
        refused(lambda url=url: load_checkpoint(url))
        refused(lambda url=url: read_into(url, slab))
    assert opened == []
    assert not mark.exists()


def test_a_program_among_the_files_of_an_audit(good, mark, tmp_path, opened):
    (tmp_path / "bp_s42.pt").write_bytes(HOSTILE["TorchScript, loaded"](good, str(mark), tmp_path))
    result = fadiag("audit-cnn", "--folder", tmp_path, "--method", "bp", "--seed", 42)
    assert result.exit_code == 3
    assert "a TorchScript archive" in result.output.replace("\n", " ")
    assert opened == []
    assert not mark.exists()


def test_programs_in_the_place_of_a_studys_files(good, mark, tmp_path, opened):
    images = noisy_patterns("patterns", (1, 4, 4), train=64, test=64, noise=0.5)
    suite = Suite(
        name="tiny",
        models=(StudyModel("mlp", "resmlp", {"d_hidden": 8, "num_blocks": 2}),),
        rules=("bp",),
        seeds=(1,),
        steps=2,
        batch_size=8,
        eval_batches=8,
        eval_batch_size=8,
    )
    run_study(suite, images, tmp_path / "study")
    run = tmp_path / "study/mlp/bp/seed_1"
    program = HOSTILE["TorchScript, loaded"](good, str(mark), tmp_path)
    (run / "step_2.pt").write_bytes(program)
    (run / "audit.json").unlink()
    (failed,) = run_study(suite, images, tmp_path / "study").failed
    assert "a TorchScript archive" in failed.reason
    # A run that was stopped goes on from this one.
    (run / "resume.pt").write_bytes(program)
    (run / "run.json").unlink()
    assert run_study(suite, images, tmp_path / "study").failed == []
    assert opened == []
    assert not mark.exists()


# ---- in words


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("expression", r"an exported program \(torch\.export\.save\)"),
        ("TorchScript, called", "a TorchScript archive"),
        ("weights with code", "a TorchScript archive"),
    ],
)
def test_the_refusal_names_file_kind_and_option(kind, said, good, mark, tmp_path):
    path = tmp_path / "epoch_3.pt"
    path.write_bytes(HOSTILE[kind](good, str(mark), tmp_path))
    with pytest.raises(UntrustedProgram, match=f"load_packaged: .*epoch_3.*got {said}") as caught:
        load_packaged(path)
    assert isinstance(caught.value, UnsafeCheckpoint)
    for part in ("trust_code=True", "--trust-code", "torch.save(module.state_dict(), "):
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match=f"load_checkpoint: .*epoch_3.*got {said}") as caught:
        load_checkpoint(path)
    assert "torch.save(module.state_dict(), " in str(caught.value)
    for option in ((), ("--unsafe-pickle",)):
        result = fadiag("diagnose", path, "--model", "resmlp", *option)
        assert result.exit_code == 3
        assert "--trust-code" in result.output


@pytest.mark.parametrize("kind", ["torch.package", "machine code", "shared library"])
def test_trust_opens_no_file_without_a_network(kind, good, mark, tmp_path, opened):
    path = tmp_path / "epoch_3.pt"
    path.write_bytes(HOSTILE[kind](good, str(mark), tmp_path))
    with pytest.raises(NoGraph, match="expected a TorchScript file or an exported program, got a"):
        load_packaged(path, trust_code=True)
    assert opened == []
    assert not mark.exists()


def test_weights_may_be_named_as_programs_are(tmp_path):
    weights = nn.Linear(3, 2).state_dict()
    for name in ("code.pt", "models.pt", "model.pt2", "constants.pkl", "archive_format"):
        torch.save(weights, tmp_path / name)
        found = load_checkpoint(tmp_path / name).state_dict
        assert all(torch.equal(found[key], value) for key, value in weights.items())
