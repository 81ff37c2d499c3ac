"""Folders, shards and URLs: what other readers find in them, and nothing outside of them."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoints import MALICE, RunsCommand, assert_same, assorted_tensors
from torch import Tensor, nn

from fadiag_fast.checkpoints import (
    Checkpoint,
    CheckpointError,
    MissingCheckpoint,
    MissingFsspec,
    NoStateDict,
    UnreadableCheckpoint,
    UnsafeCheckpoint,
    load_checkpoint,
    state_signature,
)

SHARDED = {"safetensors": "model.safetensors", "torch": "pytorch_model.bin"}


def plain_tensors() -> dict[str, Tensor]:
    # The formats of shards hold contiguous tensors that share nothing.
    return {key: value.clone().contiguous() for key, value in assorted_tensors().items()}


def write_weights(form: str, state: dict[str, Tensor], path: Path) -> None:
    if form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)


def write_shards(folder: Path, form: str, state: dict[str, Tensor], count: int = 3) -> Path:
    """Write every count-th tensor into one shard, and the index; return the index."""
    stem, _, suffix = SHARDED[form].rpartition(".")
    weight_map = {}
    for i in range(count):
        name = f"{stem}-{i + 1:05}-of-{count:05}.{suffix}"
        part = dict(list(state.items())[i::count])
        write_weights(form, part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = folder / f"{SHARDED[form]}.index.json"
    in_order = {name: weight_map[name] for name in state}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": in_order}))
    return index


def change_index(index: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


# ------------------------------------------------------------------------------------------------
# Shards


@pytest.mark.parametrize("given", ["folder", "index"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("form", SHARDED)
def test_shards_come_back_in_the_indexs_order(
    tmp_path: Path, form: str, prefix: str, given: str
) -> None:
    wanted = plain_tensors()
    index = write_shards(tmp_path, form, {prefix + name: t for name, t in wanted.items()})
    path = tmp_path if given == "folder" else index

    got = load_checkpoint(path)

    assert_same(got.state_dict, wanted)
    assert (got.path, got.format, got.container) == (path, f"{form}-sharded", "bare")
    assert (got.removed_prefix, got.extra) == (prefix, {})


@pytest.mark.parametrize("form", SHARDED)
def test_missing_shard(tmp_path: Path, form: str) -> None:
    index = write_shards(tmp_path, form, plain_tensors())
    lost = sorted(tmp_path.glob("*00002-of*"))[0]
    lost.unlink()
    with pytest.raises(UnreadableCheckpoint, match=r"the shard .*00002-of-00003") as caught:
        load_checkpoint(tmp_path)
    # A checkpoint that is not whole is not a checkpoint that is not there.
    assert not isinstance(caught.value, MissingCheckpoint)
    assert os.fspath(index) in str(caught.value)


@pytest.mark.parametrize("form", SHARDED)
def test_truncated_shard(tmp_path: Path, form: str) -> None:
    write_shards(tmp_path, form, plain_tensors())
    shard = sorted(tmp_path.glob("*00002-of*"))[0]
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content[:-20])
    with pytest.raises(UnreadableCheckpoint, match=r"00002-of.*truncated or damaged"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("form", SHARDED)
def test_index_and_shards_that_disagree(tmp_path: Path, form: str) -> None:
    index = write_shards(tmp_path, form, plain_tensors())
    whole = index.read_text()
    first = json.loads(whole)["weight_map"]["float32"]
    change_index(index, lambda names: names.update(absent=first))
    with pytest.raises(UnreadableCheckpoint, match="to hold absent, got a shard without"):
        load_checkpoint(tmp_path)
    index.write_text(whole)
    change_index(index, lambda names: names.pop("float32"))
    with pytest.raises(UnreadableCheckpoint, match="a shard that also holds float32"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../secret.bin", "/etc/passwd", "a/b.bin", "..", ".", "", "a\\b", "C:x", "a\0b", 7],
)
def test_an_index_leads_nowhere_else(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"w": torch.ones(1)}, tmp_path / "secret.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UnreadableCheckpoint, match=r"same folder, got .* is not followed"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "truncated or damaged"),
        (b'{"weight_map": {"w": "a"', "truncated or damaged"),
        (b"\xff\xfe", "truncated or damaged"),
        (b"[" * 100_000, "truncated or damaged"),
        (b"[1]", "expected a JSON object, got a list"),
        (b"{}", "expected a 'weight_map'"),
        (b'{"weight_map": {}}', "expected a 'weight_map'"),
        (b'{"weight_map": ["w"]}', "expected a 'weight_map'"),
        (b'{"weight_map": {"w": ["a"]}}', "same folder"),
    ],
)
def test_damaged_index(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    with pytest.raises(UnreadableCheckpoint, match=said):
        load_checkpoint(tmp_path)


def test_missing_index(tmp_path: Path) -> None:
    with pytest.raises(MissingCheckpoint):
        load_checkpoint(tmp_path / "model.safetensors.index.json")


def test_malicious_shard(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    torch.save({"w": RunsCommand(witness)}, tmp_path / "a.bin")
    index = {"weight_map": {"w": "a.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsafeCheckpoint, match=r"a\.bin.*system"):
        load_checkpoint(tmp_path)
    assert not witness.exists()


def test_shard_that_is_no_state_dict(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "a.bin")
    index = {"weight_map": {"w": "a.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UnreadableCheckpoint, match="expected a shard that holds names and tensors"):
        load_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------
# Trainers' folders and files


@pytest.mark.parametrize("form", SHARDED)
def test_trainer_folder(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    wanted = plain_tensors()
    write_weights(form, wanted, folder / SHARDED[form])
    # Not read: it may hold anything.
    torch.save({"x": RunsCommand(tmp_path / "ran")}, folder / "training_args.bin")
    torch.save({"state": {}}, folder / "optimizer.pt")
    state = {"global_step": 500, "epoch": 1.25, "best_metric": None, "log_history": [{"loss": 1}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))

    got = load_checkpoint(folder)

    assert_same({name: got.state_dict[name] for name in wanted}, wanted)
    assert got.path == folder
    assert got.format == ("safetensors" if form == "safetensors" else "torch-zip")
    assert got.extra == {"global_step": 500, "epoch": 1.25}
    assert not (tmp_path / "ran").exists()


def test_trainer_state_that_was_cut_off(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 5')
    with pytest.raises(UnreadableCheckpoint, match=r"trainer_state\.json.*truncated or damaged"):
        load_checkpoint(tmp_path)


def test_the_safer_format_and_the_index_come_first(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    write_weights("safetensors", {"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert load_checkpoint(tmp_path).state_dict["w"].item() == 1
    write_shards(tmp_path, "safetensors", {"w": torch.full((1,), 2.0)}, count=1)
    assert load_checkpoint(tmp_path).state_dict["w"].item() == 2


def test_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "step\n1").mkdir()
    with pytest.raises(
        UnreadableCheckpoint, match=r"model\.safetensors.*got a directory"
    ) as caught:
        load_checkpoint(tmp_path)
    assert r"notes.txt, step\n1" in str(caught.value)


def test_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> Any:
        raise PermissionError("no")

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UnreadableCheckpoint, match=r"can be listed, got PermissionError"):
        load_checkpoint(tmp_path)


def test_lightning_file(tmp_path: Path) -> None:
    # As pytorch-lightning 2 writes it.
    model = nn.Linear(2, 2)
    saved = {
        "epoch": 3,
        "global_step": 1200,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"net.{name}": value for name, value in model.state_dict().items()},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "a.ckpt"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}],
        "lr_schedulers": [],
    }
    torch.save(saved, tmp_path / "epoch=3-step=1200.ckpt")
    got = load_checkpoint(tmp_path / "epoch=3-step=1200.ckpt")
    assert (got.container, got.extra["epoch"], got.extra["global_step"]) == ("state_dict", 3, 1200)
    assert list(got.state_dict) == ["net.weight", "net.bias"]


# ------------------------------------------------------------------------------------------------
def test_an_index_in_another_encoding_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_bytes(json.dumps({"weight_map": {"w": "a.bin"}}).encode("utf-16-le"))
    with pytest.raises(UnreadableCheckpoint, match="whole checkpoint"):
        load_checkpoint(index)


# torch.distributed.checkpoint


def save_distributed(folder: Path, content: dict[str, Any]) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it remarks on running without a process group
        dcp.save(content, checkpoint_id=folder, no_dist=True)


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


class App:
    """The layout of torch's own tutorial: one object with the model's and optimizer's state."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def state_dict(self) -> dict[str, Any]:
        return self.content

    def load_state_dict(self, _: Any) -> None: ...


@pytest.mark.parametrize("layout", ["bare", "model", "state_dict", "app", "beside"])
def test_distributed(tmp_path: Path, layout: str) -> None:
    model, optimizer = trained()
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    content: dict[str, Any] = {
        "bare": wanted,
        "model": {"model": wanted, "optimizer": optimizer.state_dict(), "step": 7},
        "state_dict": {"state_dict": wanted, "optim": optimizer.state_dict()},
        "app": {"app": App({"model": wanted, "optim": optimizer.state_dict()})},
        "beside": {**wanted, "optimizer": optimizer.state_dict()},
    }[layout]
    save_distributed(tmp_path / "c", content)

    got = load_checkpoint(tmp_path / "c")

    assert_same(got.state_dict, wanted)
    assert got.format == "distributed"
    assert got.container == {"app": "model", "beside": "bare"}.get(layout, layout)
    assert got.extra == {}


def test_distributed_agrees_with_torchs_own_reader(tmp_path: Path) -> None:
    wanted = plain_tensors()
    save_distributed(tmp_path / "c", {"model": wanted})
    oracle: dict[str, Any] = {"model": {name: torch.zeros_like(t) for name, t in wanted.items()}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.checkpoint.load(oracle, checkpoint_id=tmp_path / "c", no_dist=True)
    assert_same(load_checkpoint(tmp_path / "c").state_dict, oracle["model"])


def metadata_of(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def rewrite(folder: Path, metadata: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_a_frame_that_is_longer_than_the_metadata_is_refused_as_by_torch(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    save_distributed(tmp_path, {"w": torch.ones(2, 3)})
    path = tmp_path / ".metadata"
    content = path.read_bytes()
    assert content[2:3] == b"\x95"  # FRAME, behind the protocol
    length = int.from_bytes(content[3:11], "little")
    for wrong, fits in ((length, True), (length + 1, False), (2**62, False)):
        path.write_bytes(content[:3] + wrong.to_bytes(8, "little") + content[11:])
        if fits:
            assert list(load_checkpoint(tmp_path).state_dict) == ["w"]
            continue
        with pytest.raises((pickle.UnpicklingError, MemoryError, OverflowError)):
            dcp.FileSystemReader(tmp_path).read_metadata()
        with pytest.raises(UnreadableCheckpoint, match=r"\.metadata"):
            load_checkpoint(tmp_path)


def test_a_tensors_place_in_the_saved_dict_is_made_of_names_and_numbers(tmp_path):
    save_distributed(tmp_path, {"w": torch.ones(2, 3)})
    metadata = metadata_of(tmp_path)
    metadata.planner_data = {"w": (metadata.state_dict_metadata["w"].size, "w")}
    rewrite(tmp_path, metadata)
    with pytest.raises(UnreadableCheckpoint, match="place of w in the saved dict is not made of"):
        load_checkpoint(tmp_path)
    metadata.planner_data = {"w": ("layers", 0, "w")}
    rewrite(tmp_path, metadata)
    assert list(load_checkpoint(tmp_path).state_dict) == ["layers.0.w"]


@pytest.mark.parametrize(
    "instructions",
    [b"K\x01K\x02s", b"(K\x01K\x02u", b"K\x01a", b"(K\x01e"],
    ids=["SETITEM", "SETITEMS", "APPEND", "APPENDS"],
)
def test_items_put_into_the_metadata_object_are_refused_as_by_torch(tmp_path, instructions):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    save_distributed(tmp_path, {"w": torch.ones(2, 3)})
    path = tmp_path / ".metadata"
    content = path.read_bytes()
    assert content.endswith(b".")
    path.write_bytes(content[:-1] + instructions + b".")
    with pytest.raises((TypeError, AttributeError)):
        dcp.FileSystemReader(tmp_path).read_metadata()
    with pytest.raises(UnreadableCheckpoint, match="items are put into a Metadata"):
        load_checkpoint(tmp_path)


def split_in_two(folder: Path, overlap: int = 0) -> Tensor:
    """Write one tensor of 6 × 4 as two ranks would: rows 0–3 and 4–5, in a file each."""
    whole = torch.arange(24.0).reshape(6, 4)
    save_distributed(folder, {"w": whole})
    metadata = metadata_of(folder)
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    metadata.storage_data.clear()
    chunks = metadata.state_dict_metadata["w"].chunks
    chunks.clear()
    for rank, (start, stop) in enumerate([(0, 4), (4 - overlap, 6 - overlap)]):
        buffer = io.BytesIO()
        torch.save(whole[start:stop].clone(), buffer)
        (folder / f"__{rank}_0.distcp").write_bytes(b"other" + buffer.getvalue())
        offset = torch.Size([start, 0])
        chunks.append(ChunkStorageMetadata(offset, torch.Size([stop - start, 4])))
        info = _StorageInfo(f"__{rank}_0.distcp", 5, len(buffer.getvalue()))
        metadata.storage_data[MetadataIndex("w", offset)] = info
    rewrite(folder, metadata)
    return whole


def test_distributed_pieces_of_several_ranks(tmp_path: Path) -> None:
    whole = split_in_two(tmp_path / "c")
    assert_same(load_checkpoint(tmp_path / "c").state_dict, {"w": whole})


def test_distributed_pieces_that_overlap(tmp_path: Path) -> None:
    split_in_two(tmp_path / "c", overlap=1)
    with pytest.raises(UnreadableCheckpoint, match="24 elements of w, got chunks of 24 that overl"):
        load_checkpoint(tmp_path / "c")


def test_distributed_missing_and_truncated_file(tmp_path: Path) -> None:
    save_distributed(tmp_path / "c", {"w": torch.ones(1000)})
    data = tmp_path / "c" / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[:-1000])
    with pytest.raises(UnreadableCheckpoint, match=r"__0_0\.distcp.*1000 bytes too early"):
        load_checkpoint(tmp_path / "c")
    data.unlink()
    with pytest.raises(UnreadableCheckpoint, match=r"expected the file '__0_0\.distcp', got no"):
        load_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("kind", MALICE)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_malicious_metadata(tmp_path: Path, kind: str, protocol: int) -> None:
    make, _ = MALICE[kind]
    witness = tmp_path / "ran"
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": make(witness)}, protocol=protocol))
    with pytest.raises(UnsafeCheckpoint, match=r"asks for .*Nothing was run") as caught:
        load_checkpoint(tmp_path, unsafe_pickle=True)
    assert caught.value.globals_needed
    # The full unpickler is no way out here.
    assert "unsafe_pickle" not in str(caught.value)
    assert not witness.exists()


def test_malicious_piece(tmp_path: Path) -> None:
    save_distributed(tmp_path / "c", {"w": torch.ones(3)})
    buffer = io.BytesIO()
    torch.save(RunsCommand(tmp_path / "ran"), buffer)
    metadata = metadata_of(tmp_path / "c")
    (info,) = metadata.storage_data.values()
    info.length = len(buffer.getvalue())
    (tmp_path / "c" / info.relative_path).write_bytes(buffer.getvalue())
    rewrite(tmp_path / "c", metadata)
    with pytest.raises(UnsafeCheckpoint, match="Nothing was run"):
        load_checkpoint(tmp_path / "c")
    assert not (tmp_path / "ran").exists()


def test_metadata_cannot_change_our_classes(tmp_path: Path) -> None:
    # BUILD with a pair of states sets attributes, here on the class itself.
    name = b"\x8c\x26torch.distributed.checkpoint.metadata\x8c\x08Metadata\x93"
    stream = b"\x80\x04" + name + b"N}\x8c\x05extraK\x01s\x86b."
    (tmp_path / ".metadata").write_bytes(stream)
    with pytest.raises(UnreadableCheckpoint):
        load_checkpoint(tmp_path)
    from torch.distributed.checkpoint.metadata import Metadata

    assert not hasattr(Metadata, "extra")


def set_place(metadata: Any, **values: Any) -> None:
    for info in metadata.storage_data.values():
        vars(info).update(values)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: set_place(m, relative_path="../x"), "'../x' is no file of the same folder"),
        (lambda m: set_place(m, relative_path="/etc/passwd"), "no file of the same folder"),
        (lambda m: set_place(m, offset=-1), "-1 stands for a count"),
        (lambda m: set_place(m, length="x"), "'x' stands for a count"),
        (lambda m: set_place(m, transform_descriptors=["zstd"]), "stored compressed"),
        (lambda m: m.storage_data.clear(), "no place is given for a chunk of w"),
        (lambda m: vars(m).update(storage_data=None), "storage_data is a NoneType"),
        (lambda m: vars(m).update(state_dict_metadata=[]), "state_dict_metadata is a list"),
        (lambda m: m.state_dict_metadata["w"].chunks.clear(), "got chunks of 0 that leave gaps"),
        (
            lambda m: vars(m.state_dict_metadata["w"]).update(size=torch.Size([2])),
            "lies outside the tensor",
        ),
        (
            lambda m: vars(m.state_dict_metadata["w"].properties).update(dtype=torch.int8),
            r"and torch\.int8, got \[3\] and torch\.float32",
        ),
    ],
)
def test_wrong_metadata(tmp_path: Path, change: Callable[[Any], Any], said: str) -> None:
    save_distributed(tmp_path / "c", {"w": torch.ones(3)})
    metadata = metadata_of(tmp_path / "c")
    change(metadata)
    rewrite(tmp_path / "c", metadata)
    with pytest.raises(UnreadableCheckpoint, match=said):
        load_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("content", [b"", b"noise", pickle.dumps({"a": 1}), b"\x80\x04]."])
def test_metadata_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UnreadableCheckpoint):
        load_checkpoint(tmp_path)


def test_truncated_metadata(tmp_path: Path) -> None:
    save_distributed(tmp_path / "c", {"w": torch.ones(3)})
    path = tmp_path / "c" / ".metadata"
    content = path.read_bytes()
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(UnreadableCheckpoint):
            load_checkpoint(tmp_path / "c")


def test_distributed_with_an_optimizer_only(tmp_path: Path) -> None:
    _, optimizer = trained()
    save_distributed(tmp_path / "c", {"optimizer": optimizer.state_dict()})
    with pytest.raises(NoStateDict, match="tensors only under optimizer"):
        load_checkpoint(tmp_path / "c")
    save_distributed(tmp_path / "d", {"step": 3})
    with pytest.raises(NoStateDict, match="no tensor at all"):
        load_checkpoint(tmp_path / "d")


# ------------------------------------------------------------------------------------------------
# URLs


@pytest.fixture
def memory() -> Any:
    filesystem = pytest.importorskip("fsspec").filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def upload(filesystem: Any, source: Path, target: str) -> None:
    filesystem.put(os.fspath(source), target, recursive=True)


def test_url_of_a_file(tmp_path: Path, memory: Any) -> None:
    wanted = assorted_tensors()
    torch.save({"model": wanted, "epoch": 3}, tmp_path / "a.pt")
    upload(memory, tmp_path / "a.pt", "/study/a.pt")
    got = load_checkpoint("memory://study/a.pt")
    assert_same(got.state_dict, wanted)
    assert (got.path, got.extra) == ("memory://study/a.pt", {"epoch": 3})


@pytest.mark.parametrize("form", [*SHARDED, "distributed"])
def test_url_of_a_folder(tmp_path: Path, memory: Any, form: str) -> None:
    wanted = plain_tensors()
    folder = tmp_path / "c"
    folder.mkdir()
    if form == "distributed":
        save_distributed(folder, wanted)
    else:
        write_shards(folder, form, wanted)
    upload(memory, folder, "/study/c")
    for url in ("memory://study/c", "memory://study/c/"):
        assert_same(load_checkpoint(url).state_dict, wanted)


@pytest.mark.parametrize("form", [*SHARDED, "distributed"])
def test_only_what_is_needed_is_fetched(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    wanted = plain_tensors()
    folder = tmp_path / "c"
    folder.mkdir()
    if form == "distributed":
        save_distributed(folder, wanted)
    else:
        index = write_shards(folder, form, wanted)
    needed = {path.name for path in folder.iterdir()}
    (folder / "optimizer.pt").write_bytes(bytes(1000))
    (folder / "global_step500").mkdir()
    (folder / "global_step500" / "states.pt").write_bytes(bytes(1000))
    upload(memory, folder, "/study/c")
    opened = set()
    real = type(memory).open

    def open_(self: Any, path: str, *args: Any, **options: Any) -> Any:
        opened.add(path.rpartition("/")[2])
        return real(self, path, *args, **options)

    monkeypatch.setattr(type(memory), "open", open_)
    urls = ["memory://study/c"]
    if form != "distributed":
        urls.append(f"memory://study/c/{index.name}")
    for url in urls:
        opened.clear()
        assert_same(load_checkpoint(url).state_dict, wanted)
        assert opened == needed


def test_an_index_of_any_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = write_shards(tmp_path, "torch", plain_tensors())
    monkeypatch.setattr("fadiag_fast.checkpoints.folders.MOST_JSON", index.stat().st_size - 1)
    with pytest.raises(UnreadableCheckpoint, match="a JSON file of at most"):
        load_checkpoint(index)


def test_url_of_this_machine_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fsspec")
    from fadiag_fast.checkpoints import remote

    monkeypatch.setattr(remote, "TemporaryDirectory", None)
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    got = load_checkpoint(f"file://{tmp_path}/a.pt")
    assert got.state_dict["w"].tolist() == [1, 1]
    assert got.path == f"file://{tmp_path}/a.pt"


def test_errors_name_the_url(tmp_path: Path, memory: Any) -> None:
    with pytest.raises(MissingCheckpoint, match=r"'memory://study/none'.*no such file"):
        load_checkpoint("memory://study/none")
    memory.pipe("/study/cut.pt", b"PK\x03\x04")
    with pytest.raises(UnreadableCheckpoint, match=r"'memory://study/cut\.pt'") as caught:
        load_checkpoint("memory://study/cut.pt")
    assert "fadiag-" not in str(caught.value)


def test_malicious_file_behind_a_url(tmp_path: Path, memory: Any) -> None:
    torch.save({"w": RunsCommand(tmp_path / "ran")}, tmp_path / "m.pt")
    upload(memory, tmp_path / "m.pt", "/m.pt")
    with pytest.raises(UnsafeCheckpoint, match=r"'memory://m\.pt'") as caught:
        load_checkpoint("memory://m.pt")
    assert any("system" in name for name in caught.value.globals_needed)
    assert not (tmp_path / "ran").exists()


def test_fsspec_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "fsspec"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(MissingFsspec, match=r"pip install 'fadiag-fast\[scan\]'") as caught:
        load_checkpoint("s3://bucket/a.pt")
    assert isinstance(caught.value, ImportError)


def test_protocol_that_needs_more_and_one_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fsspec")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingFsspec, match="s3fs"):
        load_checkpoint("s3://bucket/a.pt")
    with pytest.raises(UnreadableCheckpoint, match="nonsense"):
        load_checkpoint("nonsense://bucket/a.pt")


def test_a_path_is_no_url(tmp_path: Path) -> None:
    for path in (Path("s3://bucket/a.pt"), "C://a.pt"):
        with pytest.raises(MissingCheckpoint):
            load_checkpoint(path)


# ------------------------------------------------------------------------------------------------
# Signatures


def test_signature_tells_architectures_apart_and_nothing_else() -> None:
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int64)}
    same = {"b": torch.ones(4, dtype=torch.int64), "a": torch.ones(3, 2).t()}
    assert state_signature(state) == state_signature(same)
    others = [
        {"a": state["a"]},
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"].half(), "b": state["b"]},
        {"a": torch.zeros(3, 2), "b": state["b"]},
        {"a": torch.zeros(6), "b": state["b"]},
        {},
    ]
    assert len({state_signature(other) for other in [state, *others]}) == 1 + len(others)


def test_signature_is_the_same_in_every_process() -> None:
    assert state_signature({"w": torch.zeros(1)}) == "6631e6edd3a56cd73a4c19b0d3247aab"


def test_checkpoint_is_what_it_was() -> None:
    # Built by position elsewhere.
    made = Checkpoint(Path("a"), {}, "torch-zip", "bare", "", {})
    assert (made.path, made.format, made.extra) == (Path("a"), "torch-zip", {})
    assert issubclass(MissingFsspec, CheckpointError)
