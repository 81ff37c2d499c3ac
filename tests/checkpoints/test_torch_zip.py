"""Zip files that two programs read in two ways, and pickles that claim what is not there."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing.files import repacked, with_members
from test_checkpoint_folders import metadata_of, rewrite, save_distributed, write_weights
from test_checkpoints import assert_same
from torch import Tensor

from fadiag_fast.checkpoints import (
    CheckpointError,
    NoStateDict,
    UnreadableCheckpoint,
    UnsafeCheckpoint,
    load_checkpoint,
    load_into,
    read_into,
)

SLAB = torch.zeros(1 << 23, dtype=torch.uint8)


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


WHOLE = saved({"big": torch.arange(8.0), "small": torch.full((2,), 7.0)})


def refusal(path: Path, data: bytes) -> str:
    """Return why a file is refused, by both readers in the same words."""
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as one:
        load_checkpoint(path)
    with pytest.raises(type(one.value)) as other:
        read_into(path, SLAB)
    assert str(one.value) == str(other.value)
    return str(one.value)


def state_of(path: Path, data: bytes) -> dict[str, Tensor]:
    """Return what both readers find in a file."""
    path.write_bytes(data)
    found = load_checkpoint(path).state_dict
    assert_same(read_into(path, SLAB).tensors(SLAB), found)
    return found


def renamed(old: str, new: str) -> bytes:
    return with_members(WHOLE, lambda name, data: (name.replace(old, new), data))


def added(name: str, data: bytes, whole: bytes = WHOLE) -> bytes:
    buffer = io.BytesIO(whole)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


def changed_entry(name: str, place: int, value: bytes, *, local: bool = False) -> bytes:
    """Write over bytes of a member's entry in the directory, or of its own header."""
    whole = bytearray(repacked(WHOLE))
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        header = archive.getinfo(name).header_offset
        directory = archive.start_dir
    at = header if local else whole.index(name.encode(), directory) - 46
    whole[at + place : at + place + len(value)] = value
    return bytes(whole)


def two_directories() -> bytes:
    """Write a file of which the wide directory and the narrow one tell different things."""
    other = saved({"big": torch.zeros(8), "small": torch.zeros(2)})
    whole = bytearray(WHOLE)
    at = len(whole) - 98
    assert whole[at : at + 4] == b"PK\6\6"
    (begin,) = struct.unpack_from("<Q", whole, at + 48)
    struct.pack_into("<Q", whole, at + 48, begin - 46)
    assert len(other) == len(whole)
    return bytes(whole)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (added("archive/DATA/0", bytes(32)), "names that differ only in case"),
        (added("archive/Data.pkl", b"\x80\x02}."), "names that differ only in case"),
        (b"PK\3\4junk" + WHOLE, "two directories"),
        (WHOLE + bytes(22), "is not at its end"),
        (WHOLE[:-2] + b"\x05\0hello", "is not at its end"),
        (WHOLE + WHOLE, "two directories"),
        (b"PK\3\4junk" + repacked(WHOLE), "is not where it is said to be"),
        (two_directories(), "two directories"),
        (changed_entry("archive/data/0", 8, b"\1"), "encrypted"),
        (changed_entry("archive/data/0", 42, b"\0\0\0\0"), "another member in its directory"),
        (changed_entry("archive/data/0", 24, b"\1"), "two sizes"),
        (changed_entry("archive/data/0", 38, b"\x10"), "said to be a folder"),
        (changed_entry("archive/data/0", 18, b"\x10", local=True), "two sizes"),
        (changed_entry("archive/data/0", 8, b"\x08", local=True), "another member"),
        (changed_entry("archive/data/0", 28, b"\xff", local=True), "overlap"),
        (with_members(WHOLE, lambda n, d: None if n.endswith("version") else (n, d)), "version"),
        (with_members(WHOLE, lambda n, d: (n, b"big!" if "byteo" in n else d)), "byteorder"),
        (with_members(WHOLE, lambda n, d: (n, d + b"x" if "data/0" in n else d)), "33"),
        (with_members(WHOLE, lambda n, d: (n, d[:-4] if "data/0" in n else d)), "28"),
        (renamed("data/1", "data/01"), "no such member"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    text = refusal(tmp_path / "a.pt", data)
    assert said in text
    assert os.fspath(tmp_path / "a.pt") in text


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice(tmp_path: Path) -> None:
    assert "names twice" in refusal(tmp_path / "a.pt", added("archive/data/0", bytes(32)))


def test_members_that_claim_more_than_there_is(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(1 << 27))
    assert len(buffer.getvalue()) < 1 << 18
    assert "claim 134217732 bytes" in refusal(tmp_path / "a.pt", buffer.getvalue())


def test_a_storage_named_as_another(tmp_path: Path) -> None:
    data = bytearray(WHOLE)
    data[data.index(b"\x01\x00\x00\x000q") + 4] ^= 1
    assert "has 32 bytes, and there is a member of 8" in refusal(tmp_path / "a.pt", bytes(data))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"K\x08\x85", b"K\x09\x85", "reaches beyond its storage"),
        (b"K\x08\x85", b"M\x08\xff\x85", "reaches beyond its storage"),
        (b"K\x08\x85", b"J\xf8\xff\xff\xff\x85", "sizes or strides that are no counts"),
        (b"K\x01\x85", b"K\x02\x85", "reaches beyond its storage"),
        (b"K\x01\x85", b"J\xff\xff\xff\xff\x85", "sizes or strides that are no counts"),
        (b"QK\x00", b"QK\x01", "reaches beyond its storage"),
        (b"QK\x00", b"QJ\xff\xff\xff\xff", "do not fit together"),
        (b"FloatStorage", b"DoubleStorage", "has 64 bytes, and there is a member of 32"),
        (b"\x89c", b"\x88c", None),  # it requires a gradient
        (b"K\x08\x85", b"(K\x08(" * 20_000, "nested too deeply"),
        (b"K\x08\x85", b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R\x85", "bytearray"),
        (b"K\x08\x85", b"c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0zip\x86R\x85", "encoding"),
        (b"K\x08\x85", b"ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R\x85", "calls what is no"),
        (b"K\x08\x85", b"}" * 1_000_001 + b"K\x08\x85", "more than 1000000 objects"),
    ],
)
def test_pickles_that_claim_what_is_not_there(
    tmp_path: Path, old: bytes, new: bytes, said: str | None
) -> None:
    whole = saved({"w": torch.arange(8.0)})
    data = with_members(
        whole, lambda n, d: (n, d.replace(old, new, 1) if n.endswith("data.pkl") else d)
    )
    if said is None:
        assert state_of(tmp_path / "a.pt", data)["w"].tolist() == list(range(8))
    else:
        assert said in refusal(tmp_path / "a.pt", data)


def test_keys_are_looked_at_before_they_are_hashed(tmp_path: Path) -> None:
    # The hash of nested tuples takes the stack of the process.
    for key in (b")" + b"\x85" * 200_000, b"\x8a\x10" + b"\xff" * 15 + b"\x01"):
        pickle = b"\x80\x02}" + key + b"K\x01s."
        data = with_members(WHOLE, lambda n, d: (n, pickle if n.endswith("data.pkl") else d))  # noqa: B023
        assert "a key of a dict is a" in refusal(tmp_path / "a.pt", data)


def test_an_index_of_the_memo_takes_no_memory(tmp_path: Path) -> None:
    # C's unpickler makes room for as many objects as the index says.
    data = with_members(
        WHOLE,
        lambda n, d: (
            n,
            d[:2] + d[2:].replace(b"}", b"}r\xff\xff\xff\x7f", 1) if "pkl" in n else d,
        ),
    )
    assert list(state_of(tmp_path / "a.pt", data)) == ["big", "small"]


@pytest.mark.parametrize(
    "options",
    [{}, {"prefix": "epoch_3"}, {"repack": zipfile.ZIP_STORED}, {"repack": zipfile.ZIP_DEFLATED}],
    ids=["plain", "named", "zipfile", "packed"],
)
def test_archives_of_other_programs(tmp_path: Path, options: dict[str, Any]) -> None:
    data = WHOLE
    if "prefix" in options:
        data = with_members(WHOLE, lambda n, d: (n.replace("archive", options["prefix"]), d))
    if "repack" in options:
        data = repacked(WHOLE, options["repack"])
    found = state_of(tmp_path / "a.pt", data)
    assert found["big"].tolist() == list(range(8))


def test_records_that_torch_lets_one_leave_out(tmp_path: Path) -> None:
    # Versions before 2.1 wrote no byteorder, before 2.7 no alignment.
    for absent in ("byteorder", ".format_version", ".storage_alignment", "serialization_id"):
        data = with_members(WHOLE, lambda n, d: None if absent in n else (n, d))  # noqa: B023
        assert state_of(tmp_path / "a.pt", data)["small"].tolist() == [7.0, 7.0]


def test_checksums_that_are_switched_off(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        data = saved({"w": torch.arange(8.0)})
    finally:
        torch.serialization.set_crc32_options(before)
    assert state_of(tmp_path / "a.pt", data)["w"].tolist() == list(range(8))


@pytest.mark.parametrize(
    "odd",
    [torch.eye(2).to_sparse(), torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)],
    ids=["sparse", "quantized"],
)
def test_weights_that_are_not_dense_are_refused(tmp_path: Path, odd: Tensor) -> None:
    for zipped in (True, False):
        data = saved({"w": odd}, _use_new_zipfile_serialization=zipped)
        assert "expected dense tensors, got w" in refusal(tmp_path / "a.pt", data)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_only_torch_can_rebuild(tmp_path: Path) -> None:
    conjugate = torch.randn(3, dtype=torch.complex64).conj()
    found = state_of(tmp_path / "a.pt", saved({"w": conjugate, "v": torch.ones(2)}))
    assert torch.equal(found["w"], conjugate.resolve_conj())
    assert "meta" in refusal(tmp_path / "b.pt", saved({"w": torch.ones(2, device="meta")}))
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert "nested tensor" in refusal(tmp_path / "c.pt", saved({"w": nested}))


# ------------------------------------------------------------------------------------------------
# What lies beside the weights


def test_nested_containers_are_the_graph_they_are(tmp_path: Path) -> None:
    # As a tree this has 2^60 leaves.
    note: Any = [torch.ones(1)]
    for _ in range(60):
        note = [note, note]
    note.append(note)
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pt"
        content = {"model": {"w": torch.ones(4)}, "note": note, "pair": ((1, note), [])}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        for extra in (load_checkpoint(path).extra, read_into(path, SLAB).extra):
            assert extra["note"][0] is extra["note"][1]
            assert extra["note"][2] is extra["note"]
            assert extra["pair"][0][1] is extra["note"]


def test_a_text_is_cut_before_it_is_made_printable(tmp_path: Path) -> None:
    long = "\0" * 3_000_000
    with pytest.raises(NoStateDict) as caught:
        state_of(tmp_path / "a.pt", saved({long: 1, "model": {long: "x"}}))
    assert len(str(caught.value)) < 3000
    pickle = b"\x80\x02c" + b"\1" * 3_000_000 + b"\nx\n."
    data = with_members(WHOLE, lambda n, d: (n, pickle if n.endswith("data.pkl") else d))
    assert len(refusal(tmp_path / "b.pt", data)) < 3000


def test_the_versions_of_modules_reach_a_scan(tmp_path: Path) -> None:
    seen = []

    class Versioned(torch.nn.Linear):
        _version = 3

        def _load_from_state_dict(self, state: Any, prefix: str, meta: Any, *rest: Any) -> None:
            seen.append(meta.get("version"))
            super()._load_from_state_dict(state, prefix, meta, *rest)

    torch.save({"model": Versioned(2, 2).state_dict()}, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt")
    load_into(Versioned(2, 2), loaded)
    read = read_into(tmp_path / "a.pt", SLAB)
    load_into(
        Versioned(2, 2),
        type(loaded)(read.path, read.tensors(SLAB), read.format, read.container, "", {}),
    )
    assert seen == [3, 3]


# ------------------------------------------------------------------------------------------------
# Files that are none, and files that change

pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


@pipes
@pytest.mark.parametrize("by_link", [False, True])
@pytest.mark.parametrize(
    "name", ["model.safetensors.index.json", ".metadata", "trainer_state.json"]
)
def test_a_pipe_beside_weights_is_not_waited_for(tmp_path: Path, name: str, by_link: bool) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    write_weights("safetensors", {"w": torch.ones(3)}, folder / "model.safetensors")
    os.mkfifo(tmp_path / "pipe" if by_link else folder / name)
    if by_link:
        (folder / name).symlink_to(tmp_path / "pipe")
    for read in (load_checkpoint, lambda path: read_into(path, SLAB)):
        with pytest.raises(UnreadableCheckpoint, match="regular file or folder, got a FIFO"):
            read(folder)


@pipes
def test_a_pipe_in_place_of_a_piece(tmp_path: Path) -> None:
    save_distributed(tmp_path / "c", {"w": torch.ones(3)})
    piece = tmp_path / "c" / "__0_0.distcp"
    piece.unlink()
    os.mkfifo(piece)
    with pytest.raises(UnreadableCheckpoint, match="got a FIFO"):
        load_checkpoint(tmp_path / "c")


def on_second_save(path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[[], object]) -> None:
    """Save again while the first half of the next reading is done."""
    for name in ("readv", "pread"):
        real = getattr(os, name)

        def half(number: int, what: Any, *rest: Any, real: Any = real, name: str = name) -> Any:
            if name == "readv":
                done = real(number, [what[0][: len(what[0]) // 2]])
            else:
                done = real(number, what, *rest)
            monkeypatch.undo()
            save()
            return done

        monkeypatch.setattr(os, name, half)


@pytest.mark.skipif(not hasattr(os, "readv"), reason="this system reads by another call")
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_saved_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, replaced: bool
) -> None:
    states = [{f"w{i}": torch.full((100,), float(k)) for i in range(40)} for k in (1, 2)]
    path = tmp_path / "last.pt"

    def save(state: dict[str, Tensor], target: Path) -> None:
        if form == "safetensors":
            write_weights(form, state, target)
        else:
            torch.save(state, target, _use_new_zipfile_serialization=form == "zip")

    def again() -> None:
        save(states[1], tmp_path / "new" if replaced else path)
        if replaced:
            os.replace(tmp_path / "new", path)

    for read in (
        lambda: load_checkpoint(path).state_dict,
        lambda: read_into(path, SLAB).tensors(SLAB),
    ):
        save(states[0], path)
        on_second_save(path, monkeypatch, again)
        assert torch.cat(list(read().values())).unique().tolist() == [2.0]


def test_a_file_that_never_rests_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    torch.save({"w": torch.ones(3)}, path)
    real = os.stat
    seen = iter(range(100))

    def stat(target: Any, *args: Any, **options: Any) -> Any:
        if os.fspath(target) == os.fspath(path):
            os.utime(path, (1, next(seen)))
        return real(target, *args, **options)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(UnreadableCheckpoint, match="nobody is writing, got some that changed"):
        load_checkpoint(path)


# ------------------------------------------------------------------------------------------------
# Distributed checkpoints


def test_sizes_are_checked_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(metadata: Any, size: int, *, chunks: bool) -> None:
        entry = metadata.state_dict_metadata["w"]
        entry.size = torch.Size([size])
        if chunks:
            entry.chunks[0].sizes = entry.size

    real = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        made = real(*size, device="meta", **{k: v for k, v in options.items() if k != "device"})
        assert made.nbytes < 1 << 20
        return real(*size, **options)

    monkeypatch.setattr(torch, "empty", empty)
    for number, chunks in enumerate((False, True)):
        folder = tmp_path / f"{number}"
        save_distributed(folder, {"w": torch.ones(4)})
        metadata = metadata_of(folder)
        change(metadata, 2**31, chunks=chunks)
        rewrite(folder, metadata)
        with pytest.raises(UnreadableCheckpoint, match=r"leave gaps|bytes of a chunk of w"):
            load_checkpoint(folder)


def test_chunks_that_share_bytes_are_refused(tmp_path: Path) -> None:
    save_distributed(tmp_path / "c", {"w": torch.ones(4), "v": torch.zeros(4)})
    metadata = metadata_of(tmp_path / "c")
    first, second = metadata.storage_data.values()
    second.offset, second.length = first.offset, first.length
    rewrite(tmp_path / "c", metadata)
    with pytest.raises(UnreadableCheckpoint, match="chunks apart from each other"):
        load_checkpoint(tmp_path / "c")


def test_the_memo_of_metadata_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"\x80\x02K\x01r\0\0\0\x0a.")
    with pytest.raises(UnreadableCheckpoint, match="no Metadata"):
        load_checkpoint(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"\x80\x04\x8c\x02os\x8c\x06system\x93.")
    with pytest.raises(UnsafeCheckpoint, match=r"os\.system"):
        load_checkpoint(tmp_path)
