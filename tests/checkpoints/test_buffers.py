"""Reading into slabs: what load_checkpoint finds, bit for bit, from files alike and unlike."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_checkpoint_folders import (
    SHARDED,
    memory,  # noqa: F401  (a fixture)
    plain_tensors,
    save_distributed,
    upload,
    write_shards,
    write_weights,
)
from test_checkpoints import (
    CONTAINERS,
    MALICE,
    PREFIXES,
    WRITERS,
    assert_same,
    assorted_tensors,
    small_model,
    wrap,
    write_malice,
)
from torch import Tensor, nn

from fadiag_fast.checkpoints import (
    Checkpoint,
    CheckpointError,
    MissingCheckpoint,
    NoStateDict,
    SlabCheckpoint,
    SlabTooSmall,
    TensorPlace,
    UnreadableCheckpoint,
    UnsafeCheckpoint,
    load_checkpoint,
    read_into,
    state_signature,
)

SLAB = torch.zeros(1 << 18, dtype=torch.uint8)
SHARED_FOLDER = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def same_values(a: Any, b: Any) -> bool:
    """Compare extras: NaN equals itself, types count, tensors count by shape and dtype."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)
    if isinstance(a, dict):
        return (
            isinstance(b, dict) and list(a) == list(b) and all(same_values(a[k], b[k]) for k in a)
        )
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same_values, a, b))
    return type(a) is type(b) and (a == b or a != a)


def assert_agrees(got: SlabCheckpoint, wanted: Checkpoint, slab: Tensor = SLAB) -> None:
    assert_same(got.tensors(slab), wanted.state_dict)
    assert (got.path, got.format) == (wanted.path, wanted.format)
    assert (got.container, got.removed_prefix) == (wanted.container, wanted.removed_prefix)
    assert same_values(got.extra, wanted.extra)
    assert got.signature == state_signature(wanted.state_dict) == state_signature(got.layout)
    for place in got.layout.values():
        assert place.offset == 0 or got.start <= place.offset <= got.stop <= len(slab)


def read(path: Path | str, slab: Tensor = SLAB, **options: Any) -> SlabCheckpoint:
    """Read a file as one of a new kind and as one of a known kind, against load_checkpoint."""
    wanted = load_checkpoint(path)
    for _ in range(2):
        slab.fill_(0xAA)
        got = read_into(path, slab, **options)
        assert_agrees(got, wanted, slab)
    return got


# ------------------------------------------------------------------------------------------------
# What comes back


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_layout(tmp_path: Path, container: str, prefix: str, form: str) -> None:
    state = {prefix + name: value for name, value in assorted_tensors().items()}
    path = tmp_path / "weights.bin"
    torch.save(wrap(container, state), path, _use_new_zipfile_serialization=WRITERS[form])
    read(path)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_safetensors(tmp_path: Path, prefix: str) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    state = {prefix + name: value for name, value in plain_tensors().items()}
    save_file(state, tmp_path / "a.safetensors", {"epoch": "3"})
    got = read(tmp_path / "a.safetensors")
    # The header comes first in the file, and the first tensor on the slab's alignment.
    assert min(place.offset for place in got.layout.values() if 0 not in place.shape) % 64 == 0


def test_torch_saved_under_the_other_formats_name(tmp_path: Path) -> None:
    torch.save(assorted_tensors(), tmp_path / "a.safetensors")
    read(tmp_path / "a.safetensors")


def test_safetensors_under_the_other_formats_name(tmp_path: Path) -> None:
    write_weights("safetensors", plain_tensors(), tmp_path / "a.pt")
    got = read(tmp_path / "a.pt")
    assert min(place.offset for place in got.layout.values() if 0 not in place.shape) % 64 == 0


def test_the_size_of_a_file(tmp_path: Path) -> None:
    torch.save(plain_tensors(), tmp_path / "a.pt")
    torch.save(plain_tensors(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    write_weights("safetensors", plain_tensors(), tmp_path / "a.safetensors")
    for name in ("a.pt", "old.pt", "a.safetensors"):
        assert read(tmp_path / name).nbytes == (tmp_path / name).stat().st_size
    # What else may belong to it is not known here.
    (tmp_path / "c").mkdir()
    write_shards(tmp_path / "c", "safetensors", plain_tensors())
    assert read(tmp_path / "c").nbytes is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_shard_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    index = write_shards(tmp_path, "safetensors", plain_tensors())
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(CheckpointError) as wanted:
        load_checkpoint(index)
    with pytest.raises(type(wanted.value)) as got:
        read_into(index, SLAB)
    assert str(got.value) == str(wanted.value)


def test_shared_storage_stays_shared(tmp_path: Path) -> None:
    for form, zipped in WRITERS.items():
        torch.save(assorted_tensors(), tmp_path / form, _use_new_zipfile_serialization=zipped)
        tensors = read_into(tmp_path / form, SLAB).tensors(SLAB)
        tensors["shared_a"][1].fill_(5.0)
        assert tensors["shared_b"][0].tolist() == [5.0] * 6


def test_tensors_of_a_copy(tmp_path: Path) -> None:
    # As on a device: only the part that holds tensors is copied.
    state = OrderedDict(a=torch.randn(3), b=torch.randn(2, 2, dtype=torch.complex128))
    torch.save({"other": torch.randn(100), "model": state}, tmp_path / "a.pt")
    for name in ("a.pt", "b.safetensors"):
        if name != "a.pt":
            write_weights("safetensors", {"a": state["a"]}, tmp_path / name)
        got = read_into(tmp_path / name, SLAB)
        copy = SLAB[got.start : got.stop].clone()
        assert_same(got.tensors(copy, got.start), got.tensors(SLAB))
    assert got.start > 0


def test_tensors_in_extra_have_no_data(tmp_path: Path) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(1.0)}}}
    torch.save({"model": {"w": torch.ones(2)}, "optimizer": optimizer}, tmp_path / "zip")
    torch.save(
        {"model": {"w": torch.ones(2)}, "optimizer": optimizer},
        tmp_path / "legacy",
        _use_new_zipfile_serialization=False,
    )
    for name in ("zip", "legacy"):
        moments = read_into(tmp_path / name, SLAB).extra["optimizer"]["state"][0]["exp_avg"]
        assert moments.is_meta
        assert moments.shape == (3,)


def rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = 0) -> Path:
    """Write a torch.save file anew with Python's zipfile, which aligns nothing."""
    new = path.with_name(f"rewritten_{path.name}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new, "w", compression) as archive:
        for name in old.namelist():
            archive.writestr(name, change(name, old.read(name)))
    return new


def test_misaligned_storages_are_moved(tmp_path: Path) -> None:
    torch.save({f"{i}": torch.randn(3, dtype=torch.float64) for i in range(9)}, tmp_path / "a.pt")
    path = rewritten(tmp_path / "a.pt", lambda _, content: content)
    with zipfile.ZipFile(path) as archive:
        starts = [i.header_offset + 30 + len(i.filename) for i in archive.infolist()]
    assert any(start % 8 for start in starts)
    got = read(path)
    assert got.stop > path.stat().st_size


def safetensors_file(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_misaligned_safetensors_are_moved(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        "c": {"dtype": "F64", "shape": [1], "data_offsets": [11, 19]},
    }
    data = struct.pack("<3B2fd", 1, 2, 3, 0.5, 1.5, 2.5)
    path = safetensors_file(tmp_path / "a", header, data)
    tensors = read_into(path, SLAB).tensors(SLAB)
    assert [tensors[name].tolist() for name in "abc"] == [[1, 2, 3], [0.5, 1.5], [2.5]]


def test_compressed_and_other_byte_order_are_left_to_torch(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.arange(50)}, "epoch": 3}, tmp_path / "a.pt")

    def foreign(name: str, content: bytes) -> bytes:
        if name.endswith("/byteorder"):
            return b"big"
        return content[::-1] if "/data/" in name else content

    path = rewritten(tmp_path / "a.pt", foreign)
    assert load_checkpoint(path).state_dict["w"].tolist() == list(range(50))[::-1]
    read(path)

    packed = rewritten(tmp_path / "a.pt", lambda _, content: content, zipfile.ZIP_DEFLATED)
    assert load_checkpoint(packed).state_dict["w"].tolist() == list(range(50))
    read(packed)


def test_sparse_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "a.pt")
    with pytest.raises(UnreadableCheckpoint, match=r"expected dense tensors, got w: .*sparse"):
        read_into(tmp_path / "a.pt", SLAB)


# ------------------------------------------------------------------------------------------------
# The next file of the study


VALUES = st.one_of(
    st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.none(), st.just("0")
)


@SHARED_FOLDER
@given(
    values=st.lists(st.tuples(VALUES, VALUES, VALUES, st.integers(0, 300)), min_size=2, max_size=6)
)
def test_values_that_differ(tmp_path: Path, values: list[tuple[Any, ...]]) -> None:
    # '0' is also what the first storage is called, and one object in memory.
    state = {"0": torch.ones(2), "b": torch.zeros(2, dtype=torch.int64)}
    for a, b, c, step in values:
        content = {
            "epoch": step,
            "nested": [{"a": a, "pair": (b, 2)}, [c, c, a]],
            "model": state,
            "after": {"step": step, "a": a, "moments": torch.ones(3)},
        }
        torch.save(content, tmp_path / "a.pt")
        assert_agrees(read_into(tmp_path / "a.pt", SLAB), load_checkpoint(tmp_path / "a.pt"))


def test_torch_is_not_asked_to_read_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    paths = []
    for step in range(100, 120):
        with torch.no_grad():
            model[0].weight.fill_(step)
        # Other names in the archive too: it is called as the file is.
        paths.append(tmp_path / f"step_{step}.pt")
        extra = {"step": step, "loss": 1 / step, "best": step > 110, "name": f"run at {step}"}
        torch.save({"model": model.state_dict(), **extra}, paths[-1])
    wanted = [load_checkpoint(path) for path in paths]

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(torch, "load", load)
    layouts = set()
    for path, checkpoint in zip(paths, wanted, strict=True):
        got = read_into(path, SLAB)
        assert_agrees(got, checkpoint)
        layouts.add(id(got.layout))
    assert len(layouts) == 1


def test_extra_of_one_file_is_not_that_of_another(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        torch.save({"model": {"w": torch.ones(1)}, "log": {"step": step}}, tmp_path / f"{step}")
    got = [read_into(tmp_path / f"{step}", SLAB) for step in (1, 2, 3, 1)]
    assert [one.extra["log"]["step"] for one in got] == [1, 2, 3, 1]


def lookalikes() -> dict[str, Any]:
    """Return contents whose files have one size and differ in what decides on the layout."""
    whole = torch.arange(12.0)
    return {
        "plain": {"a": whole.view(3, 4), "b": torch.zeros(3)},
        "shape": {"a": whole.view(4, 3), "b": torch.zeros(3)},
        "transposed": {"a": whole.view(4, 3).t(), "b": torch.zeros(3)},
        "names": {"b": whole.view(3, 4), "a": torch.zeros(3)},
        "other name": {"a": whole.view(3, 4), "c": torch.zeros(3)},
        "offset": {"a": torch.arange(16.0)[4:].view(3, 4), "b": torch.zeros(3)},
        "step": {"a": whole.view(3, 4), "b": torch.zeros(3), "epoch": 3},
    }


def test_lookalikes_are_told_apart(tmp_path: Path) -> None:
    for name, state in lookalikes().items():
        epoch = state.pop("epoch", 2)
        torch.save({"model": state, "epoch": epoch}, tmp_path / name.replace(" ", "_")[:5].ljust(5))
    paths = sorted(tmp_path.iterdir())
    sizes = [path.stat().st_size for path in paths]
    assert max(map(sizes.count, sizes)) >= 4
    for path in [*paths, *paths[::-1]]:
        assert_agrees(read_into(path, SLAB), load_checkpoint(path))


def test_a_value_that_is_also_a_dimension(tmp_path: Path) -> None:
    # By hand: the pickle keeps the number and uses it for the epoch and for the shape.
    torch.save({"epoch": 2, "model": {"w": torch.arange(8.0)[:2]}}, tmp_path / "a.pt")

    def remember(size: int) -> Callable[[str, bytes], bytes]:
        def change(name: str, content: bytes) -> bytes:
            if not name.endswith("data.pkl"):
                return content
            content = content.replace(b"K\x02", bytes([ord("K"), size]) + b"q\xf0", 1)
            return content.replace(b"K\x02\x85", b"h\xf0\x85", 1)

        return change

    for size in (2, 3, 4, 5):
        path = rewritten(tmp_path / "a.pt", remember(size))
        wanted = load_checkpoint(path)
        assert (wanted.extra["epoch"], wanted.state_dict["w"].shape) == (size, (size,))
        assert_agrees(read_into(path, SLAB), wanted)


def test_many_threads(tmp_path: Path) -> None:
    paths = []
    for i in range(40):
        state = {"w": torch.full((50,), float(i)), "b": torch.full((3,), i)}
        torch.save({"model": state, "step": i, "kind": i % 3 == 0}, tmp_path / f"{i:02}.pt")
        paths.append(tmp_path / f"{i:02}.pt")

    def check(start: int) -> None:
        slab = torch.empty(1 << 16, dtype=torch.uint8)
        for i in [*range(start, 40), *range(start)] * 5:
            hasher = hashlib.sha256()
            got = read_into(paths[i], slab, hasher=hasher)
            tensors = got.tensors(slab)
            assert tensors["w"].tolist() == [float(i)] * 50
            assert tensors["b"].tolist() == [i] * 3
            assert got.extra == {"step": i, "kind": i % 3 == 0}
            assert hasher.digest() == digests[i]

    digests = [hashlib.sha256(path.read_bytes()).digest() for path in paths]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, range(0, 40, 5)))


# ------------------------------------------------------------------------------------------------
# Damage and malice


def zip_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": {"a": torch.arange(30.0), "b": torch.ones(7).half()}, "e": 5}, buffer)
    return buffer.getvalue()


def structure(whole: bytes) -> list[int]:
    """Return where the bytes outside of the tensors' data lie."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        data = [archive.read(info) for info in archive.infolist() if "/data/" in info.filename]
    inside = {at for part in data for at in range(whole.index(part), whole.index(part) + len(part))}
    return sorted(set(range(len(whole))) - inside)


WHOLE = zip_file()
STRUCTURE = structure(WHOLE)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:TypedStorage")
@settings(SHARED_FOLDER, max_examples=150)
@given(data=st.data())
def test_damaged_structure(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(WHOLE)
    for position in data.draw(st.lists(st.sampled_from(STRUCTURE), min_size=1, max_size=3)):
        content[position] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.pt"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    wanted, got = outcome(load_checkpoint, path), outcome(read_into, path, SLAB)
    if isinstance(wanted, Checkpoint):
        assert isinstance(got, SlabCheckpoint)
        assert_agrees(got, wanted)
    else:
        assert got is wanted


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return a result, or the type of a CheckpointError."""
    try:
        return function(*arguments)
    except CheckpointError as error:
        return type(error)


@SHARED_FOLDER
@given(data=st.data())
@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_truncated_anywhere(tmp_path: Path, form: str, data: st.DataObject) -> None:
    whole = WHOLE
    if form == "safetensors":
        whole = pytest.importorskip("safetensors.torch").save({"a": torch.arange(30.0)})
    path = tmp_path / "cut.pt"
    path.unlink(missing_ok=True)
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(UnreadableCheckpoint):
        read_into(path, SLAB)


HEADER = {
    "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
    "b": {"dtype": "I64", "shape": [], "data_offsets": [8, 16]},
}


@SHARED_FOLDER
@given(data=st.data())
def test_safetensors_headers_are_judged_as_by_the_package(
    tmp_path: Path, data: st.DataObject
) -> None:
    pytest.importorskip("safetensors")
    header: dict[str, Any] = json.loads(json.dumps(HEADER))
    odd = st.one_of(st.integers(-1, 17), st.none(), st.just("x"), st.just(2**70), st.just(1.0))
    where = data.draw(st.sampled_from(["offsets", "shape", "dtype", "extra", "none", "metadata"]))
    if where == "offsets":
        header["a"]["data_offsets"][data.draw(st.integers(0, 1))] = data.draw(odd)
    elif where == "shape":
        header["b"]["shape"] = data.draw(st.lists(odd, max_size=2))
    elif where == "dtype":
        header["a"]["dtype"] = data.draw(st.sampled_from(["F16", "U32", "F4", "nonsense", 3]))
    elif where == "extra":
        header["c"] = data.draw(st.sampled_from([header["a"], {}, None, 3]))
    elif where == "metadata":
        header["__metadata__"] = data.draw(st.sampled_from([{"a": "b"}, {"a": 1}, [], None, {}]))
    tail = b"x" if data.draw(st.integers(0, 9)) == 0 else b""
    path = safetensors_file(tmp_path / "a", header, bytes(range(16)) + tail)
    try:
        wanted = load_checkpoint(path)
    except CheckpointError as error:
        with pytest.raises(type(error)):
            read_into(path, SLAB)
    else:
        assert_agrees(read_into(path, SLAB), wanted)


@pytest.mark.parametrize("kind", MALICE)
@pytest.mark.parametrize("form", ["torch-zip", "torch-legacy", "pickle"])
def test_malicious_file(tmp_path: Path, form: str, kind: str) -> None:
    path, witness = tmp_path / "m.pt", tmp_path / "ran"
    write_malice(path, form, MALICE[kind][0](witness))
    with pytest.raises(UnsafeCheckpoint):
        read_into(path, SLAB)
    assert not witness.exists()


def test_malice_in_the_place_of_a_known_pickle(tmp_path: Path) -> None:
    # The same size and tables; the pickle alone is another.
    witness = tmp_path / "ran"
    text = "x" * 300
    torch.save({"model": {"w": torch.ones(2)}, "note": text}, tmp_path / "a.pt")
    torch.save({"model": {"w": torch.ones(2)}, "note": "y" * 300}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        assert read_into(tmp_path / name, SLAB).extra["note"] in (text, "y" * 300)
    content = (tmp_path / "a.pt").read_bytes()
    start = content.index(b"X\x2c\x01\x00\x00")
    command = f"touch {witness}".encode().ljust(286)
    malice = b"cos\nsystem\n(X" + struct.pack("<L", len(command)) + command + b"tR"
    assert len(malice) == 305
    (tmp_path / "m.pt").write_bytes(content[:start] + malice + content[start + 305 :])
    got = read_into(tmp_path / "m.pt", SLAB)
    assert repr(got.extra["note"]) == "<os.system, not loaded>"
    assert got.notes == ("not loaded beside the weights: os.system",)
    assert got.tensors(SLAB)["w"].tolist() == [1.0, 1.0]
    assert not witness.exists()


def test_whole_module_needs_the_flag(tmp_path: Path) -> None:
    model = small_model()
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(UnsafeCheckpoint):
        read_into(tmp_path / "m.pt", SLAB)
    got = read_into(tmp_path / "m.pt", SLAB, unsafe_pickle=True)
    assert_same(got.tensors(SLAB), model.state_dict())


def test_errors_are_those_of_load_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "page").write_bytes(b"<html>")
    torch.save({"epoch": 3}, tmp_path / "epoch")
    safetensors_file(tmp_path / "none", {}, b"")
    paths: list[Any] = [tmp_path / name for name in ("empty", "page", "epoch", "none", "absent")]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        paths.append(tmp_path / "pipe")
    index = tmp_path / "model.safetensors.index.json"
    for path in [*paths, tmp_path, "a\0b", os.fspath(tmp_path / "absent"), index]:
        with pytest.raises(CheckpointError) as wanted:
            load_checkpoint(path)
        with pytest.raises(type(wanted.value)) as got:
            read_into(path, SLAB)
        assert str(got.value) == str(wanted.value)
    with pytest.raises(MissingCheckpoint):
        read_into(tmp_path / "absent", SLAB)
    with pytest.raises(NoStateDict):
        read_into(tmp_path / "epoch", SLAB)


def test_file_that_fails_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    monkeypatch.setattr(os, "readv", fail, raising=False)
    monkeypatch.setattr(os, "read", fail)
    with pytest.raises(UnreadableCheckpoint, match=r"can be read, got OSError.*Input"):
        read_into(tmp_path / "a.pt", SLAB)


# ------------------------------------------------------------------------------------------------
# Folders and URLs


@pytest.mark.parametrize("given", ["folder", "index"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("form", SHARDED)
def test_shards(tmp_path: Path, form: str, prefix: str, given: str) -> None:
    state = {prefix + name: value for name, value in plain_tensors().items()}
    index = write_shards(tmp_path, form, state)
    read(tmp_path if given == "folder" else index)


def test_misaligned_shards(tmp_path: Path) -> None:
    weight_map = {}
    for i in range(3):
        header = {
            f"a{i}": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            f"b{i}": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        }
        data = struct.pack("<3B2f", i, i, i, i, i)
        safetensors_file(tmp_path / f"{i}.safetensors", header, data)
        weight_map |= dict.fromkeys(header, f"{i}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    tensors = read_into(tmp_path, SLAB).tensors(SLAB)
    for i in range(3):
        assert (tensors[f"a{i}"].tolist(), tensors[f"b{i}"].tolist()) == ([i] * 3, [i] * 2)


@pytest.mark.parametrize("form", SHARDED)
def test_trainer_folder(tmp_path: Path, form: str) -> None:
    write_weights(form, plain_tensors(), tmp_path / SHARDED[form])
    (tmp_path / "trainer_state.json").write_text('{"global_step": 500, "epoch": 1.5}')
    assert read(tmp_path).extra == {"global_step": 500, "epoch": 1.5}


def test_distributed(tmp_path: Path) -> None:
    save_distributed(tmp_path / "c", {"model": plain_tensors(), "step": 3})
    read(tmp_path / "c")


def test_urls(tmp_path: Path, memory: Any) -> None:  # noqa: F811
    torch.save({"model": assorted_tensors(), "epoch": 3}, tmp_path / "a.pt")
    torch.save(assorted_tensors(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    folder = tmp_path / "c"
    folder.mkdir()
    write_shards(folder, "torch", plain_tensors())
    for name in ("a.pt", "old.pt", "c"):
        upload(memory, tmp_path / name, f"/study/{name}")
        read(f"memory://study/{name}")
        read(f"file://{tmp_path}/{name}")
    read("memory://study/c/pytorch_model.bin.index.json")
    for url in ("memory://study/none", "nonsense://a"):
        with pytest.raises(CheckpointError) as wanted:
            load_checkpoint(url)
        with pytest.raises(type(wanted.value)) as got:
            read_into(url, SLAB)
        assert str(got.value) == str(wanted.value)


# ------------------------------------------------------------------------------------------------
# Hashes


@pytest.mark.parametrize("form", WRITERS)
def test_hash_is_that_of_the_file(tmp_path: Path, form: str) -> None:
    torch.save(assorted_tensors(), tmp_path / "a", _use_new_zipfile_serialization=WRITERS[form])
    hasher = hashlib.sha256()
    read_into(tmp_path / "a", SLAB, hasher=hasher)
    assert hasher.digest() == hashlib.sha256((tmp_path / "a").read_bytes()).digest()


@pytest.mark.parametrize("form", ["single", *SHARDED, "distributed"])
def test_hash_of_a_folder(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "c"
    if form == "distributed":
        save_distributed(folder, {"w": torch.ones(3)})
    else:
        folder.mkdir()
    if form == "single":
        torch.save({"w": torch.ones(3)}, folder / "pytorch_model.bin")
    elif form in SHARDED:
        write_shards(folder, form, plain_tensors())
    if form != "distributed":
        (folder / "trainer_state.json").write_text('{"global_step": 5}')

    def digest() -> bytes:
        hasher = hashlib.sha256()
        read_into(folder, SLAB, hasher=hasher)
        return hasher.digest()

    wanted = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        wanted.update(f"{len(path.name)} {path.stat().st_size} {path.name}".encode())
        wanted.update(path.read_bytes())
    assert digest() == wanted.digest()
    if form != "distributed":
        # What is not read does not count.
        (folder / "optimizer.pt").write_bytes(b"x")
        assert digest() == wanted.digest()


def test_hash_of_a_folder_is_the_scans(tmp_path: Path) -> None:
    hashing = pytest.importorskip("fadiag_fast.scanning.hashing")
    write_shards(tmp_path, "torch", plain_tensors())
    hasher = hashing.ContentHasher()
    read_into(tmp_path, SLAB, hasher=hasher)
    assert hasher.result() == hashing.content_hash(tmp_path)


# ------------------------------------------------------------------------------------------------
# Slabs


@pytest.mark.parametrize("kind", ["zip", "misaligned", "legacy", "safetensors", "shards", "index"])
def test_slab_that_is_too_small(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    if kind in ("zip", "legacy"):
        torch.save(assorted_tensors(), path, _use_new_zipfile_serialization=kind == "zip")
    elif kind == "misaligned":
        torch.save({f"{i}": torch.randn(3, dtype=torch.float64) for i in range(9)}, path)
        path = rewritten(path, lambda _, content: content)
    elif kind == "safetensors":
        write_weights("safetensors", plain_tensors(), path)
    else:
        path.mkdir()
        index = write_shards(path, "safetensors", plain_tensors())
        path = index if kind == "index" else path
    slab = torch.zeros(0, dtype=torch.uint8)
    for _ in range(3):
        with pytest.raises(
            SlabTooSmall, match=r"read_into: .*expected a slab of at least"
        ) as error:
            read_into(path, slab)
        assert error.value.needed > len(slab)
        slab = torch.zeros(error.value.needed, dtype=torch.uint8)
        try:
            got = read_into(path, slab)
        except SlabTooSmall:
            continue
        break
    assert_agrees(got, load_checkpoint(path), slab)


def test_other_slabs_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    for slab, said in (
        (torch.zeros(9), r"uint8 on the CPU, got \[9\] of torch\.float32"),
        (torch.zeros(3, 3, dtype=torch.uint8), r"one dimension .* got \[3, 3\]"),
        (torch.zeros(9, dtype=torch.uint8, device="meta"), "on meta"),
        (SLAB[1:], "an address of 1 beyond"),
        (SLAB[::2], "stride 2"),
    ):
        with pytest.raises(ValueError, match=said):
            read_into(tmp_path / "a.pt", slab)
    with pytest.raises(TypeError, match="expected a tensor, got bytearray"):
        read_into(tmp_path / "a.pt", bytearray(9))  # type: ignore[arg-type]
    got = read_into(tmp_path / "a.pt", SLAB[64:])
    assert got.tensors(SLAB[64:])["w"].tolist() == [1, 1]


def test_place() -> None:
    place = TensorPlace(4, torch.float32, (2,), (2,))
    buffer = torch.arange(1.0, 7.0).view(torch.uint8)
    assert place.view(buffer).tolist() == [2, 4]
    assert place.view(buffer[:19]).tolist() == [2, 4]
    assert place.view(buffer[4:], base=4).tolist() == [2, 4]


def test_what_a_module_makes_of_it(tmp_path: Path) -> None:
    # Parameters as views, without load_state_dict.
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    torch.save({"model": model.state_dict()}, tmp_path / "a.pt")
    got = read_into(tmp_path / "a.pt", SLAB)
    x = torch.randn(4, 8)
    result = torch.func.functional_call(model, got.tensors(SLAB), (x,))
    assert torch.equal(result, model(x))
