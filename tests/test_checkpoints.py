"""Checkpoints: every layout comes back bit for bit, and nothing in a file runs unasked."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import stat
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fadiag_fast.checkpoints import (
    Checkpoint,
    CheckpointError,
    MissingCheckpoint,
    NoStateDict,
    StateDictMismatch,
    UnreadableCheckpoint,
    UnsafeCheckpoint,
    UnsavableCheckpoint,
    UnwritableCheckpoint,
    load_checkpoint,
    load_into,
    read_into,
    restricted_pickle,
    save_checkpoint,
)

CONTAINERS = ("bare", "state_dict", "model_state_dict", "model_state", "model")
PREFIXES = (
    "",
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "module.module.",
)
# torch.save's two formats, as the keyword that asks for each.
WRITERS = {"torch-zip": True, "torch-legacy": False}


def raw_bytes(tensor: Tensor) -> bytes:
    """Return a tensor's values as bytes, without the library's help and NaN-proof."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist())


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(got) == list(wanted)
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert raw_bytes(got[name]) == raw_bytes(tensor), name


def assorted_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42, 1e25])
    return {
        "float32": special,
        "float64": torch.randn(3, dtype=torch.float64) * 1e-310,  # subnormal
        "float16": torch.randn(2, 3).half(),
        "bfloat16": torch.randn(2, 3).bfloat16(),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "int8": torch.tensor([-128, 127], dtype=torch.int8),
        "bool": torch.tensor([True, False, True]),
        "complex64": torch.randn(2, dtype=torch.complex64),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 5),
        "transposed": base.t(),
        "strided": base[:, ::2],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "shared_a": base,
        "shared_b": base[1:],
    }


def wrap(container: str, state: Any) -> Any:
    if container == "bare":
        return state
    return {container: state, "config": {"width": 3, "name": "x"}, "rule_state": {"B": [1.5]}}


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def checkpoint_of(state: dict[str, Tensor]) -> Checkpoint:
    return Checkpoint(Path("made.pt"), state, "torch-zip", "bare", "", {})


# ------------------------------------------------------------------------------------------------
# What comes back


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_layout_comes_back_bit_for_bit(
    tmp_path: Path, container: str, prefix: str, form: str
) -> None:
    wanted = assorted_tensors()
    content = wrap(container, {prefix + name: value for name, value in wanted.items()})
    path = tmp_path / "weights.bin"
    torch.save(content, path, _use_new_zipfile_serialization=WRITERS[form])

    got = load_checkpoint(path)

    assert_same(got.state_dict, wanted)
    assert (got.path, got.format) == (path, form)
    assert (got.container, got.removed_prefix) == (container, prefix)
    rest = {} if container == "bare" else {"config": {"width": 3, "name": "x"}}
    assert got.extra == (rest and {**rest, "rule_state": {"B": [1.5]}})


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_safetensors(tmp_path: Path, prefix: str, name: str) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    # The format holds contiguous tensors that share nothing, sorted by itself.
    wanted = {key: value.clone().contiguous() for key, value in assorted_tensors().items()}
    path = tmp_path / name
    save_file({prefix + key: value for key, value in wanted.items()}, path, {"epoch": "3"})

    got = load_checkpoint(path)

    assert_same({key: got.state_dict[key] for key in wanted}, wanted)
    assert len(got.state_dict) == len(wanted)
    assert (got.format, got.container, got.removed_prefix) == ("safetensors", "bare", prefix)
    assert got.extra == {"epoch": "3"}


@pytest.mark.parametrize("form", WRITERS)
def test_content_decides_the_format_not_the_extension(tmp_path: Path, form: str) -> None:
    # torch.load itself would hand this name to the safetensors reader.
    path = tmp_path / "weights.safetensors"
    wanted = assorted_tensors()
    torch.save(wanted, path, _use_new_zipfile_serialization=WRITERS[form])
    got = load_checkpoint(path)
    assert got.format == form
    assert_same(got.state_dict, wanted)


def test_safetensors_are_read_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path = tmp_path / "a.bin"
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<f", 1.5))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert load_checkpoint(path).state_dict["a"].tolist() == [1.5]


def test_prefix_stays_unless_every_key_has_it(tmp_path: Path) -> None:
    state = {"module.a": torch.ones(1), "module.b": torch.ones(2), "c": torch.ones(3)}
    torch.save(state, tmp_path / "a.pt")
    got = load_checkpoint(tmp_path / "a.pt")
    assert list(got.state_dict) == list(state)
    assert got.removed_prefix == ""


def test_prefix_alone_is_a_name(tmp_path: Path) -> None:
    # Removing it would leave a tensor without a name.
    torch.save({"module.": torch.ones(1), "module.a": torch.ones(1)}, tmp_path / "a.pt")
    assert list(load_checkpoint(tmp_path / "a.pt").state_dict) == ["module.", "module.a"]


def test_first_container_wins_and_the_other_is_kept(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "state_dict": {"b": torch.ones(2)}}, tmp_path / "a")
    got = load_checkpoint(tmp_path / "a")
    assert got.container == "state_dict"
    assert list(got.state_dict) == ["b"]
    assert list(got.extra["model"]) == ["a"]


def test_container_name_with_other_content_is_passed_over(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "state_dict": "none"}, tmp_path / "a")
    got = load_checkpoint(tmp_path / "a")
    assert (got.container, got.extra) == ("model", {"state_dict": "none"})


def test_parameters_become_plain_tensors(tmp_path: Path) -> None:
    torch.save({"w": nn.Parameter(torch.ones(2))}, tmp_path / "a")
    assert load_checkpoint(tmp_path / "a").state_dict["w"].requires_grad is False


@pytest.mark.parametrize("form", WRITERS)
def test_shared_storage_stays_shared(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.pt"
    torch.save(assorted_tensors(), path, _use_new_zipfile_serialization=WRITERS[form])
    state = load_checkpoint(path).state_dict
    state["shared_a"][1].fill_(5.0)
    assert state["shared_b"][0].tolist() == [5.0] * 6


def test_writing_to_loaded_tensors_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(1000)}, path)
    before = path.read_bytes()
    load_checkpoint(path).state_dict["w"].fill_(1.0)
    assert path.read_bytes() == before


def test_saving_over_a_file_leaves_loaded_tensors_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint({"w": torch.zeros(100_000)}, path)
    loaded = load_checkpoint(path).state_dict["w"]
    save_checkpoint({"w": torch.ones(3)}, path)
    assert torch.equal(loaded, torch.zeros(100_000))


def test_map_location(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "a")
    assert load_checkpoint(tmp_path / "a", map_location="meta").state_dict["w"].is_meta
    with pytest.raises(ValueError, match=r"map_location: expected a device .* got 'gpu'"):
        load_checkpoint(tmp_path / "a", map_location="gpu")


def test_repr_shows_where_from_and_no_weights(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.full((2,), 3.25)}}, tmp_path / "a.pt")
    text = repr(load_checkpoint(tmp_path / "a.pt"))
    assert "a.pt" in text
    assert "container='model'" in text
    assert "3.25" not in text


def test_what_happens_to_the_file_afterwards_does_not_matter(tmp_path: Path) -> None:
    # Mapped memory would end the process here.
    for form, zipped in WRITERS.items():
        path = tmp_path / form
        torch.save({"w": torch.arange(100_000)}, path, _use_new_zipfile_serialization=zipped)
        loaded = load_checkpoint(path).state_dict["w"]
        path.write_bytes(b"")
        assert torch.equal(loaded, torch.arange(100_000))


def test_tensors_beside_the_weights(tmp_path: Path) -> None:
    moments = {"state": {0: {"exp_avg": torch.ones(3)}}}
    feedback = {"rule_state": {"B": [torch.full((2,), 3.0)]}}
    content = {"model": {"w": torch.ones(2)}, "optimizer": moments, **feedback}
    for form, zipped in WRITERS.items():
        torch.save(content, tmp_path / form, _use_new_zipfile_serialization=zipped)
        extra = load_checkpoint(tmp_path / form).extra
        assert extra["rule_state"]["B"][0].tolist() == [3.0, 3.0]
        # An optimizer's state is twice the weights: known by its shapes and not read.
        left_out = extra["optimizer"]["state"][0]["exp_avg"]
        assert left_out.is_meta
        assert left_out.shape == (3,)


# ------------------------------------------------------------------------------------------------
# Nothing runs


class TouchesFile:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (os.fspath(self.path), "w"))


class RunsCommand:
    """Unpickling this runs a shell command that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch '{self.path}'",))


MALICE = {
    "open": (TouchesFile, "io.open"),
    "system": (RunsCommand, f"{os.system.__module__}.system"),
}
PICKLE_PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def write_malice(path: Path, form: str, malice: Any, protocol: int = 2) -> None:
    content = {"state_dict": {"w": 1}, "payload": malice}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        torch.save(
            content,
            path,
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=WRITERS[form],
        )


def assert_way_out(error: UnsafeCheckpoint, path: Path) -> None:
    text = str(error)
    assert os.fspath(path) in text
    assert "unsafe_pickle=True" in text
    assert "--unsafe-pickle" in text
    assert "runs code from the file" in text


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", PICKLE_PROTOCOLS)
@pytest.mark.parametrize("kind", MALICE)
@pytest.mark.parametrize("form", ["torch-zip", "torch-legacy", "pickle"])
def test_malicious_file_is_refused_and_named(
    tmp_path: Path, form: str, kind: str, protocol: int
) -> None:
    if form == "torch-zip" and protocol == 0:
        pytest.skip("torch.save cannot write a zip file with pickle protocol 0")
    path, witness = tmp_path / "m.pt", tmp_path / "ran"
    make, name = MALICE[kind]
    write_malice(path, form, make(witness), protocol)

    with pytest.raises(UnsafeCheckpoint) as caught:
        load_checkpoint(path)

    assert not witness.exists()
    # 'open' goes by several names: of Python 2 in protocols before 3, and of 3.12's own module.
    aliases = {"__builtin__.open", f"{open.__module__}.open"}
    assert {name, *aliases} & set(caught.value.globals_needed)
    assert caught.value.globals_needed[0] in str(caught.value)
    assert_way_out(caught.value, path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", PICKLE_PROTOCOLS)
@pytest.mark.parametrize("form", WRITERS)
def test_every_protocol_of_torch_save_is_read(tmp_path: Path, form: str, protocol: int) -> None:
    state = {
        name: tensor
        for name, tensor in assorted_tensors().items()
        # In the older format torch has no class for the storages of newer dtypes.
        if form == "torch-zip"
        or hasattr(torch, torch.storage._dtype_to_storage_type_map()[tensor.dtype])
    }
    beside = {
        "epoch": 3,
        "numbers": [True, False, None, -1, 255, 70000, 2**31, -(2**70), 10**700, 0.1, 1e-310, 1j],
        "text": ["", "größe\n\\u0041", "x" * 300, "\ud800"],
        "raw": [b"\xff", b"x" * 300, bytearray(b"ab")],
        "nested": {"a": ({}, [], (), (1,), (1, 2, 3, 4)), 7: {1, 2}, (1, "b"): set()},
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
    }
    if protocol >= 4:  # before, it is a class by name
        beside["few"] = [frozenset(), frozenset({1, 2})]
    path = tmp_path / "m.pt"
    torch.save(
        {"model": state, **beside},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=WRITERS[form],
    )

    got = load_checkpoint(path)

    assert got.format == form
    assert got.notes == ()
    assert_same(got.state_dict, state)
    assert got.extra == beside
    assert repr(got.extra) == repr(beside)  # True is not 1


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", PICKLE_PROTOCOLS)
@pytest.mark.parametrize("form", WRITERS)
def test_what_only_torch_makes_is_left_out_beside_weights(
    tmp_path: Path, form: str, protocol: int
) -> None:
    state = {"w": torch.arange(3.0)}
    path = tmp_path / "m.pt"
    torch.save(
        {"model": state, "mask": torch.eye(2).to_sparse(), "epoch": 3},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=WRITERS[form],
    )

    got = load_checkpoint(path)

    assert_same(got.state_dict, state)
    assert got.extra["epoch"] == 3
    if protocol in (2, 3):  # which torch's weights-only reader follows
        assert torch.equal(got.extra["mask"].to_dense(), torch.eye(2))
    else:
        assert "_rebuild_sparse_tensor" in " ".join(got.notes)


@pytest.mark.parametrize("protocol", PICKLE_PROTOCOLS)
def test_a_long_pickle_of_the_older_format_is_read_to_its_end(
    tmp_path: Path, protocol: int
) -> None:
    # The first piece that is read ends in a line, and for one of these in a character.
    for shift in range(2):
        log = ["x" * shift, "ö" * 300_000]
        path = tmp_path / f"{shift}.pt"
        torch.save(
            {"model": {"w": torch.ones(2)}, "log": log},
            path,
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=False,
        )
        assert load_checkpoint(path).extra["log"] == log


@pytest.mark.parametrize(
    "code",
    [
        b"\x88\x94" + b"\x94" * 100,
        b"(l" * 100,
        b"(d" * 100,
        b"(\x91" * 100,
        b"\x96" + bytes(8),
    ],
    ids=["MEMOIZE", "LIST", "DICT", "FROZENSET", "BYTEARRAY8"],
)
def test_what_a_pickle_makes_is_counted(monkeypatch: pytest.MonkeyPatch, code: bytes) -> None:
    for bound in ("MOST_OBJECTS", "_MOST_REMEMBERED"):
        monkeypatch.setattr(restricted_pickle, bound, 50)
    with pytest.raises(restricted_pickle.PickleError, match="more than 50 objects"):
        restricted_pickle.read_pickle(b"\x80\x05" + code * (60 if len(code) < 10 else 1) + b".", {})


@pytest.mark.parametrize("kind", MALICE)
@pytest.mark.parametrize("form", ["torch-zip", "torch-legacy", "pickle"])
def test_code_runs_only_when_asked_for(tmp_path: Path, form: str, kind: str) -> None:
    path, witness = tmp_path / "m.pt", tmp_path / "ran"
    write_malice(path, form, MALICE[kind][0](witness))
    # It holds no state dict either, which shows only once it is unpickled.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the file that the payload opened
        with pytest.raises(NoStateDict):
            load_checkpoint(path, unsafe_pickle=True)
    assert witness.exists()


def test_environment_cannot_turn_the_full_unpickler_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, witness = tmp_path / "m.pt", tmp_path / "ran"
    write_malice(path, "torch-zip", RunsCommand(witness))
    with pytest.raises(UnsafeCheckpoint):
        load_checkpoint(path)
    assert not witness.exists()


def test_environment_that_forbids_the_full_unpickler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    torch.save(small_model(), tmp_path / "m.pt")
    with pytest.raises(UnsafeCheckpoint, match="TORCH_FORCE_WEIGHTS_ONLY_LOAD"):
        load_checkpoint(tmp_path / "m.pt", unsafe_pickle=True)


def test_text_pickle_is_seen_through(tmp_path: Path) -> None:
    # Protocol 0 looks like a text file.
    path, witness = tmp_path / "m.pt", tmp_path / "ran"
    path.write_bytes(f"cos\nsystem\n(S'touch {witness}'\ntR.".encode())
    with pytest.raises(UnsafeCheckpoint) as caught:
        load_checkpoint(path)
    assert caught.value.globals_needed == ("os.system",)
    assert not witness.exists()


def test_allowed_globals_are_not_listed(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": nn.Parameter(torch.ones(1)), "o": OrderedDict(), "x": nn.ReLU()}, path)
    with pytest.raises(UnsafeCheckpoint) as caught:
        load_checkpoint(path)
    assert caught.value.globals_needed == ("torch.nn.modules.activation.ReLU",)


def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(b"\x80\x04\x8c\x09os\x1b[31m\n\x07\x8c\x06system\x93.")
    with pytest.raises(UnsafeCheckpoint) as caught:
        load_checkpoint(path)
    assert "system" in str(caught.value)
    assert all(c.isprintable() for c in str(caught.value))


def test_memoised_names_are_found(tmp_path: Path) -> None:
    # STACK_GLOBAL takes its names from the stack, here both through the memo.
    path = tmp_path / "m.pt"
    path.write_bytes(b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93.")
    with pytest.raises(UnsafeCheckpoint) as caught:
        load_checkpoint(path)
    assert caught.value.globals_needed == ("os.system",)


def test_damaged_malicious_file_does_not_run_even_when_asked(tmp_path: Path) -> None:
    path, witness = tmp_path / "m.pt", tmp_path / "ran"
    write_malice(path, "pickle", RunsCommand(witness))
    path.write_bytes(path.read_bytes()[:-1])  # all but the final STOP: the call comes before it
    with pytest.raises(UnreadableCheckpoint, match="truncated"):
        load_checkpoint(path, unsafe_pickle=True)
    assert not witness.exists()


def test_the_flag_changes_nothing_for_a_safe_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One that our reader understands, and one that is left to torch's weights-only reader.
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"model": {"w": torch.ones(2)}, "x": torch.eye(2).to_sparse()}, tmp_path / "b.pt")
    real_load, asked = torch.load, []

    def load(*args: Any, **options: Any) -> Any:
        asked.append(options["weights_only"])
        return real_load(*args, **options)

    monkeypatch.setattr(torch, "load", load)
    for name in ("a.pt", "b.pt"):
        state = load_checkpoint(tmp_path / name, unsafe_pickle=True).state_dict
        assert state["w"].tolist() == [1.0, 1.0]
    assert asked == [True]


@pytest.mark.parametrize("container", [None, "model"])
@pytest.mark.parametrize("form", ["torch-zip", "torch-legacy", "pickle"])
def test_whole_module_needs_the_flag(tmp_path: Path, form: str, container: str | None) -> None:
    model = small_model()
    content = model if container is None else {container: model, "epoch": 3}
    path = tmp_path / "m.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=WRITERS[form])

    with pytest.raises(UnsafeCheckpoint, match=r"torch\.nn\.modules\.linear\.Linear") as caught:
        load_checkpoint(path)
    assert_way_out(caught.value, path)

    got = load_checkpoint(path, unsafe_pickle=True)
    assert_same(got.state_dict, model.state_dict())
    assert (got.format, got.container) == (form, container or "module")
    assert got.extra == ({"epoch": 3} if container else {})


class Vanishing:
    """Stands for a class that is not there when the file is read."""


def test_class_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pt"
    torch.save({"state_dict": {"w": torch.ones(1)}, "x": Vanishing()}, path)
    monkeypatch.delattr(sys.modules[__name__], "Vanishing")
    with pytest.raises(UnreadableCheckpoint, match=r"classes can be imported here.*Vanishing"):
        load_checkpoint(path, unsafe_pickle=True)


# ------------------------------------------------------------------------------------------------
# Files that are no checkpoint


def whole_files() -> dict[str, bytes]:
    state = {"a": torch.arange(300.0), "b": torch.ones(7, dtype=torch.bfloat16)}
    files = {}
    for form, zipped in WRITERS.items():
        buffer = io.BytesIO()
        torch.save({"model": state}, buffer, _use_new_zipfile_serialization=zipped)
        files[form] = buffer.getvalue()
    try:
        from safetensors.torch import save
    except ImportError:
        return files
    files["safetensors"] = save(state)
    return files


WHOLE_FILES = whole_files()


@pytest.mark.parametrize("form", WHOLE_FILES)
@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_truncated_anywhere(tmp_path: Path, form: str, data: st.DataObject) -> None:
    whole = WHOLE_FILES[form]
    path = tmp_path / "cut.pt"
    # A new file each time: a mapped file must not shrink.
    path.unlink(missing_ok=True)
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    for unsafe in (False, True):
        with pytest.raises(UnreadableCheckpoint) as caught:
            load_checkpoint(path, unsafe_pickle=unsafe)
        assert os.fspath(path) in str(caught.value)


@pytest.mark.parametrize("form", WHOLE_FILES)
@pytest.mark.parametrize("lost", [1, 2, 4, 8, 100])
def test_last_bytes_missing(tmp_path: Path, form: str, lost: int) -> None:
    path = tmp_path / "cut.pt"
    path.write_bytes(WHOLE_FILES[form][:-lost])
    with pytest.raises(UnreadableCheckpoint, match="truncated or damaged"):
        load_checkpoint(path)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_arbitrary_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "noise.pt"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert os.fspath(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (b"epoch,loss\n1,0.5\n", "a text file that starts with 'epoch,loss"),
        ("größe".encode() * 200, "a text file that starts with 'größe"),
        (b"\n <!DOCTYPE html>\n<html><body>404", "a web page"),
        (b"<html><head><title>Sign in", "a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', "a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
            "a Git LFS pointer.*git lfs pull",
        ),
        (b"\x1f\x8b\x08\x00rest", "a gzip-compressed"),
        (b"\x89HDF\r\n\x1a\nrest", "an HDF5"),
        (b"\x93NUMPY\x01\x00", "a NumPy array"),
        (b"\x7fELF\x02\x01\x01", "a shared library"),
        (b"\x30\0\0\0ET12" + bytes(40), "an ExecuTorch program"),
        (b"\x30\0\0\0PTMF" + bytes(40), "a TorchScript program for mobile"),
        (b"\x08\x08\x12\x07pytorch" + bytes(40), "an ONNX model"),
        (b"PK", "a truncated or damaged file of 2 bytes"),
        (bytes(range(200, 256)), r"a file of 56 bytes that starts with b'\\xc8"),
    ],
)
def test_lookalikes_are_recognised(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(UnreadableCheckpoint, match=f"expected a torch.save .* got {said}"):
        load_checkpoint(path)


def test_other_zip_archives(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(12):
            archive.writestr(f"word/{i}.xml", "x")
    with pytest.raises(UnreadableCheckpoint, match=r"zip archive that holds word/0.*\(\+2 more\)"):
        load_checkpoint(path)


def test_torchscript_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/constants.pkl", b"\x80\x02).")
    with pytest.raises(UnreadableCheckpoint, match="TorchScript archive"):
        load_checkpoint(path)


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(UnreadableCheckpoint, match="got a directory"):
        load_checkpoint(tmp_path)


def test_missing_file_is_also_a_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(MissingCheckpoint, match="no such file") as caught:
        load_checkpoint(tmp_path / "absent.pt")
    assert isinstance(caught.value, FileNotFoundError)
    assert isinstance(caught.value, UnreadableCheckpoint)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_named_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnreadableCheckpoint, match="expected a regular file or folder, got a FIFO"):
        load_checkpoint(tmp_path / "pipe")


def test_too_little_memory_is_not_called_damage(tmp_path: Path) -> None:
    # The allocator's own error, for more than any machine has.
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(1)}, path)
    real_empty = torch.empty

    def empty(*_: Any, **__: Any) -> Any:
        return real_empty(2**62, dtype=torch.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fadiag_fast.checkpoints.loading.usable_device", torch.device)
        patch.setattr(torch, "empty", empty)
        with pytest.raises(UnreadableCheckpoint, match="expected enough memory"):
            load_checkpoint(path)


def test_path_with_a_nul_byte() -> None:
    with pytest.raises(UnreadableCheckpoint, match="cannot be opened"):
        load_checkpoint("a\0b")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="root may read every file; Windows has no such permission bits",
)
def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(1)}, path)
    path.chmod(0)
    with pytest.raises(UnreadableCheckpoint, match=r"cannot be opened \(PermissionError"):
        load_checkpoint(path)


def test_file_that_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The same as above where the tests run as root.
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pt")

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UnreadableCheckpoint, match=r"cannot be opened \(PermissionError"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "an empty dict"),
        ([torch.ones(1)], "a list"),
        (torch.ones(1), "a Tensor"),
        ({"epoch": 3, "optimizer": {}}, "a dict with 'epoch': int, 'optimizer': dict"),
        ({"w": torch.ones(1), "epoch": 3}, "a dict with 'w': Tensor, 'epoch': int"),
        ({"state_dict": {}}, r"'state_dict': dict \(empty\)"),
        ({"model": {"w": torch.ones(1), "x": "y"}}, "'model': dict with 'x': str"),
        ({1: torch.ones(1)}, "a dict with 1: Tensor"),
        ({f"k{i}": i for i in range(13)}, r"'k9': int \(\+3 more\)"),
    ],
)
def test_no_state_dict_says_what_there_is(tmp_path: Path, content: Any, said: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(NoStateDict, match=f"expected a state dict .* got .*{said}$"):
        load_checkpoint(tmp_path / "a.pt")


# ------------------------------------------------------------------------------------------------
# Applying


@pytest.mark.parametrize("saved_as", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_load_into(tmp_path: Path, saved_as: str, wrapped: bool) -> None:
    source, target = small_model(), small_model()
    source[1].running_mean.fill_(2.5)
    wanted = {name: value.clone() for name, value in source.state_dict().items()}
    torch.save({saved_as + name: value for name, value in wanted.items()}, tmp_path / "a.pt")
    checkpoint = load_checkpoint(tmp_path / "a.pt")

    load_into(nn.DataParallel(target) if wrapped else target, checkpoint)

    assert_same(target.state_dict(), wanted)
    # A copy: training the model must not change the checkpoint.
    with torch.no_grad():
        target[0].weight.fill_(9.0)
    assert torch.equal(checkpoint.state_dict["0.weight"], wanted["0.weight"])


def test_load_into_converts_to_the_models_dtype() -> None:
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    values = torch.tensor([[1.0, 2.0], [3.0, 1 / 3]], dtype=torch.float64)
    load_into(model, checkpoint_of({"weight": values, "bias": torch.tensor([1.0, 2.0])}))
    assert model.weight.dtype == torch.bfloat16
    assert torch.equal(model.weight, values.to(torch.bfloat16))
    assert model.bias.tolist() == [1.0, 2.0]


def mismatch(model: nn.Module, state: dict[str, Tensor]) -> str:
    """Return the message of a mismatch, having checked that the model is as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(StateDictMismatch) as caught:
        load_into(model, checkpoint_of(state))
    assert_same(model.state_dict(), before)
    return str(caught.value)


def test_mismatch_lists_each_kind_and_changes_nothing() -> None:
    model = small_model()
    state = {key: value + 1 for key, value in model.state_dict().items()}
    del state["1.running_var"]
    state["head.bias"] = torch.ones(2)
    state["2.weight"] = torch.ones(3, 4)
    text = mismatch(model, state)
    assert "made.pt" in text
    assert "missing from the checkpoint (1): 1.running_var" in text
    assert "unexpected in the checkpoint (1): head.bias" in text
    assert "of another shape (1): 2.weight: expected [2, 4], got [3, 4]" in text


def test_mismatch_lists_ten_of_each_kind() -> None:
    model = nn.ParameterDict({f"p{i:02}": torch.zeros(2) for i in range(30)})
    state = {f"p{i:02}": torch.zeros(3) for i in range(12)}
    state |= {f"q{i:02}": torch.zeros(2) for i in range(14)}
    text = mismatch(model, state)
    assert "missing from the checkpoint (18): p12, " in text
    assert "p21 (+8 more)" in text
    assert "p22" not in text
    assert "unexpected in the checkpoint (14): q00, " in text
    assert "q09 (+4 more)" in text
    assert "of another shape (12): p00: expected [2], got [3], " in text
    assert "p09: expected [2], got [3] (+2 more)" in text


def test_hint_names_the_prefix() -> None:
    model = small_model()
    state = model.state_dict()
    # Not removed as load_into would: the prefix is not on every name.
    others = {f"backbone.{key}": value for key, value in state.items()}
    text = mismatch(model, {**others, "loss.weight": torch.ones(1)})
    assert "the checkpoint's names have 'backbone.' in front of the model's" in text

    inner = mismatch(nn.ModuleDict({"net": small_model()}), dict(state))
    assert "the model's names have 'net.' in front of the checkpoint's" in inner


@pytest.mark.parametrize("prefix", ["model.", "net.", "model.net."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_common_prefix_is_left_out_with_a_note(prefix: str, wrapped: bool) -> None:
    source, target = nn.Sequential(SeesVersion(2, 2)), nn.Sequential(SeesVersion(2, 2))
    source[0]._version = 5
    holder: nn.Module = source
    for part in reversed(prefix.split(".")[:-1]):
        holder = nn.ModuleDict({part: holder})
    notes = load_into(
        nn.DataParallel(target) if wrapped else target, checkpoint_of(holder.state_dict())
    )
    assert notes == (f"left out {prefix!r}, with which every name in the checkpoint starts",)
    assert_same(target.state_dict(), source.state_dict())
    assert target[0].seen == 5


def test_a_prefix_is_no_note_where_the_names_fit() -> None:
    model = nn.ModuleDict({"net": small_model()})
    assert load_into(model, checkpoint_of(dict(model.state_dict()))) == ()


def test_a_prefix_without_which_names_are_missing_stays() -> None:
    state = {f"net.{key}": value for key, value in small_model().state_dict().items()}
    del state["net.2.bias"]
    assert "unexpected in the checkpoint (8): net.0.weight" in mismatch(small_model(), state)


def test_tied_weights_under_a_prefix() -> None:
    model = Tied()
    assert load_into(model, checkpoint_of({"model.head.weight": torch.ones(3, 2)}))
    assert model.embed.weight.tolist() == [[1.0, 1.0]] * 3


def test_hint_names_a_close_spelling() -> None:
    text = mismatch(nn.Linear(2, 2), {"weigth": torch.ones(2, 2), "bias": torch.ones(2)})
    assert "'weight' is missing, and the checkpoint has 'weigth'" in text


def test_keys_cannot_write_to_the_terminal() -> None:
    text = mismatch(nn.Linear(2, 2), {"\x1b[2J": torch.ones(1)})
    assert "\x1b" not in text
    assert r"\x1b[2J" in text


def test_no_hint_where_nothing_is_alike() -> None:
    text = mismatch(nn.Linear(2, 2, bias=False), {"zzz": torch.ones(2, 2)})
    assert "hint" not in text


class WithMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("mask", torch.tensor([1.0, 0.0]), persistent=False)


def test_non_persistent_buffer_is_no_part_of_it() -> None:
    model = WithMask()
    load_into(model, checkpoint_of({"weight": torch.ones(2)}))
    assert model.weight.tolist() == [1.0, 1.0]
    assert model.mask.tolist() == [1.0, 0.0]
    text = mismatch(model, {"weight": torch.ones(2), "mask": torch.ones(2)})
    assert "mask (a non-persistent buffer of the model)" in text


class Tied(nn.Module):
    def __init__(self, by_data: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        if by_data:
            self.head.weight.data = self.embed.weight.data
        else:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("by_data", [False, True])
@pytest.mark.parametrize("names", [("embed",), ("head",), ("embed", "head")])
def test_tied_weights_under_any_of_their_names(names: tuple[str, ...], by_data: bool) -> None:
    model = Tied(by_data)
    values = torch.arange(6.0).reshape(3, 2)
    load_into(model, checkpoint_of({f"{name}.weight": values.clone() for name in names}))
    assert torch.equal(model.embed.weight, values)
    assert model.head.weight.data_ptr() == model.embed.weight.data_ptr()


def test_tied_weights_from_safetensors(tmp_path: Path) -> None:
    save_model = pytest.importorskip("safetensors.torch").save_model
    source, target = Tied(), Tied()
    save_model(source, os.fspath(tmp_path / "a.safetensors"))  # stores one of the two names
    load_into(target, load_checkpoint(tmp_path / "a.safetensors"))
    assert_same(target.state_dict(), source.state_dict())


def test_tied_weights_that_disagree() -> None:
    text = mismatch(Tied(), {"embed.weight": torch.ones(3, 2), "head.weight": torch.zeros(3, 2)})
    assert "tied in the model but different in the checkpoint (1): " in text
    assert "embed.weight and head.weight" in text


def test_tied_weights_may_hold_nan() -> None:
    values = torch.full((3, 2), float("nan"))
    model = Tied()
    load_into(model, checkpoint_of({"embed.weight": values, "head.weight": values.clone()}))
    assert bool(model.embed.weight.isnan().all())


def test_lazy_model_takes_the_checkpoints_shapes() -> None:
    model = nn.LazyLinear(2)
    load_into(model, checkpoint_of({"weight": torch.ones(2, 5), "bias": torch.ones(2)}))
    assert model.weight.shape == (2, 5)


def test_meta_tensors_are_refused() -> None:
    state = {"weight": torch.ones(2, 2, device="meta"), "bias": torch.ones(2)}
    assert "weight (in the checkpoint)" in mismatch(nn.Linear(2, 2), state)
    with pytest.raises(StateDictMismatch, match=r"bias \(in the model\)"):
        load_into(
            nn.Linear(2, 2, device="meta"),
            checkpoint_of({"weight": torch.ones(2, 2), "bias": torch.ones(2)}),
        )


class SeesVersion(nn.Linear):
    _version = 7
    seen: int | None = None

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        self.seen = metadata.get("version")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("saved_wrapped", [False, True])
@pytest.mark.parametrize("loaded_wrapped", [False, True])
def test_module_versions_survive(tmp_path: Path, saved_wrapped: bool, loaded_wrapped: bool) -> None:
    # Modules use them to convert the weights of their earlier versions.
    source, target = nn.Sequential(SeesVersion(2, 2)), nn.Sequential(SeesVersion(2, 2))
    source[0]._version = 5
    torch.save((nn.DataParallel(source) if saved_wrapped else source).state_dict(), tmp_path / "a")
    load_into(
        nn.DataParallel(target) if loaded_wrapped else target, load_checkpoint(tmp_path / "a")
    )
    assert target[0].seen == 5


def test_module_that_refuses(tmp_path: Path) -> None:
    class Refuses(nn.Linear):
        def _load_from_state_dict(self, *_: Any) -> None:
            raise RuntimeError("not today")

    with pytest.raises(StateDictMismatch, match="not today"):
        load_into(Refuses(1, 1), checkpoint_of({"weight": torch.ones(1, 1), "bias": torch.ones(1)}))


# ------------------------------------------------------------------------------------------------
# Saving


def test_save_and_load(tmp_path: Path) -> None:
    wanted = assorted_tensors()
    path = tmp_path / "a.pt"
    save_checkpoint({"model_state": wanted, "config": {"depth": 2}}, path)
    got = load_checkpoint(path)
    assert_same(got.state_dict, wanted)
    assert (got.container, got.extra) == ("model_state", {"config": {"depth": 2}})
    assert os.listdir(tmp_path) == ["a.pt"]


def test_save_with_an_unusual_object_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint({"w": torch.ones(1)}, path)
    before = path.read_bytes()
    for content, said in (
        ({"w": torch.ones(1), "path": Path("x")}, "pathlib"),
        ({"model": nn.ReLU()}, r"torch\.nn\.modules\.activation\.ReLU"),
        ({"f": lambda: None}, "cannot be pickled"),
    ):
        with pytest.raises(UnsavableCheckpoint, match=said):
            save_checkpoint(content, path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_save_that_fails_on_the_disk_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint({"w": torch.ones(1)}, path)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(UnwritableCheckpoint, match=r"a\.pt.*No space left"):
        save_checkpoint({"w": torch.zeros(1)}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pt"]


def test_interrupted_save_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint({"w": torch.ones(1)}, tmp_path / "a.pt")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_full_disk_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = Path.open

    def open_full(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if mode == "xb":
            real_open(self, mode).close()
            return open("/dev/full", "wb")
        return real_open(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(UnwritableCheckpoint, match="No space left"):
        save_checkpoint({"w": torch.ones(100_000)}, tmp_path / "a.pt")
    assert os.listdir(tmp_path) == []


def test_save_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UnwritableCheckpoint, match="No such file or directory"):
        save_checkpoint({"w": torch.ones(1)}, tmp_path / "absent" / "a.pt")
    with pytest.raises(UnwritableCheckpoint):
        save_checkpoint({"w": torch.ones(1)}, tmp_path)
    with pytest.raises(UnwritableCheckpoint):
        save_checkpoint({"w": torch.ones(1)}, "a\0b")
    assert os.listdir(tmp_path) == []


def test_save_refuses_other_content_and_names(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected a dict, got list"):
        save_checkpoint([torch.ones(1)], tmp_path / "a.pt")  # type: ignore[arg-type]
    with pytest.raises(UnsavableCheckpoint, match=r"'\.safetensors'"):
        save_checkpoint({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permission bits")
def test_save_keeps_permissions_and_links(tmp_path: Path) -> None:
    path, link = tmp_path / "a.pt", tmp_path / "latest.pt"
    link.symlink_to(path.name)
    umask = os.umask(0o027)
    try:
        save_checkpoint({"w": torch.ones(1)}, link)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    save_checkpoint({"w": torch.zeros(1)}, link)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert link.is_symlink()
    assert load_checkpoint(path).state_dict["w"].tolist() == [0.0]


def test_half_characters_in_the_header_of_safetensors_are_refused(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for header in (
        {"\ud800": tensor},
        {"w": tensor, "__metadata__": {"a": "\udfff"}},
        {"w": tensor, "__metadata__": {"\ud800": "a"}},
    ):
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + bytes(4)
        (tmp_path / "a.safetensors").write_bytes(data)
        with pytest.raises(Exception, match="invalid JSON"):
            safetensors.load(data)
        with pytest.raises(UnreadableCheckpoint, match="does not describe tensors"):
            load_checkpoint(tmp_path / "a.safetensors")


class Named:
    """What a file's author has and its reader has not."""


def test_classes_as_keys_beside_the_weights_are_named(tmp_path: Path) -> None:
    content = {"model": {"w": torch.ones(2)}, Named: 1, "counts": {Named: 2}}
    torch.save(content, tmp_path / "a.pt")
    name = f"<{__name__}.Named, not loaded>"
    found = load_checkpoint(tmp_path / "a.pt")
    again = read_into(tmp_path / "a.pt", torch.zeros(1 << 16, dtype=torch.uint8))
    for extra in (found.extra, again.extra):
        assert extra[name] == 1
        assert list(map(repr, extra["counts"])) == [name]


def test_deep_tuples_beside_the_weights_keep_no_one_from_them(tmp_path: Path) -> None:
    deep: tuple[Any, ...] = ()
    for _ in range(300):
        deep = (deep,)
    torch.save({"model": {"w": torch.ones(2)}, "deep": deep, "epoch": 3}, tmp_path / "a.pt")
    found = load_checkpoint(tmp_path / "a.pt")
    again = read_into(tmp_path / "a.pt", torch.zeros(1 << 16, dtype=torch.uint8))
    assert torch.equal(found.state_dict["w"], torch.ones(2))
    for extra in (found.extra, again.extra):
        assert extra["epoch"] == 3
        assert "a tuple nested too deeply, not loaded" in repr(extra["deep"])
