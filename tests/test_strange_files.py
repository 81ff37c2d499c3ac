"""Files and places that are not what their names promise, for every command that opens them."""

import errno
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fadiag_fast
from fadiag_fast.checkpoints import (
    UnreadableCheckpoint,
    UnwritableCheckpoint,
    load_checkpoint,
    read_into,
    save_checkpoint,
)
from fadiag_fast.checkpoints.restricted_pickle import PickleError, check_key
from fadiag_fast.options import check_output_file, write_output
from fadiag_fast.scanning import ScanResult, UnreadableResults
from fadiag_fast.scanning.html import write_report
from fadiag_fast.scanning.series import SeriesError, read_manifest


@pytest.mark.parametrize(
    "index",
    [
        '{"weight_map": {"w": "a", "w": "b"}}',
        '{"weight_map": {"w": "a"}, "weight_map": {"w": "b"}}',
    ],
    ids=["tensor", "map"],
)
def test_an_index_that_can_be_read_in_two_ways(tmp_path: Path, index: str) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_file({"w": torch.full((2,), value)}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    slab = torch.empty(1 << 16, dtype=torch.uint8)
    for read in (load_checkpoint, lambda path: read_into(path, slab)):
        with pytest.raises(UnreadableCheckpoint, match="a name twice"):
            read(tmp_path)


def test_a_key_of_nested_tuples_costs_what_the_file_has() -> None:
    key: object = 1
    for _ in range(4):
        key = (key,) * 64  # 260 items in memory, 16 million parts to hash
    with pytest.raises(PickleError, match="a key of a dict is a tuple"):
        check_key(key)
    check_key((("a", 1), ("b", (2, 3.0, None))))


def test_another_zip_file_is_not_called_damaged(tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", w=np.ones(3))
    with pytest.raises(UnreadableCheckpoint, match=r"got an archive of NumPy arrays \(.npz\)"):
        load_checkpoint(tmp_path / "weights.npz")
    with zipfile.ZipFile(tmp_path / "notes.zip", "w") as archive:
        archive.writestr("notes.txt", "hello")
        archive.comment = b"mine"
    with pytest.raises(UnreadableCheckpoint, match=r"zip archive that begins with 'notes\.txt'"):
        load_checkpoint(tmp_path / "notes.zip")


def test_nothing_takes_the_place_of_a_pipe_or_device(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UnwritableCheckpoint, match="device or pipe"):
        save_checkpoint({"w": torch.ones(1)}, pipe)
    with pytest.raises(OSError, match="device or pipe"):
        write_report(None, pipe)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--out: expected a regular file"):
        check_output_file("--out", pipe, replaced=True)
    assert pipe.is_fifo()
    with pytest.raises(ValueError, match="nobody reads this pipe"):
        check_output_file("--json", pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_output_file("--json", pipe)
    os.close(reader)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_named_with_option_and_file() -> None:
    full = os.strerror(errno.ENOSPC)
    with pytest.raises(ValueError, match=f"--json: .*got /dev/full: {full}"):
        write_output("--json", Path("/dev/full"), b"x")
    command = [sys.executable, "-m", "fadiag_fast", "--version"]
    with open("/dev/full", "w") as stdout:
        run = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 3
    assert full in run.stderr
    assert "Traceback" not in run.stderr


def test_nothing_is_said_of_a_reader_that_has_seen_enough() -> None:
    source, sink = os.pipe()
    os.close(source)
    command = [sys.executable, "-m", "fadiag_fast", "doctor"]
    run = subprocess.run(command, stdout=sink, stderr=subprocess.PIPE, text=True)
    os.close(sink)
    assert run.returncode == 3
    assert run.stderr == ""


@pytest.mark.parametrize("words", [["-h"], ["scan", "--help"], ["doctor"]])
def test_nothing_is_said_of_a_reader_that_wants_no_help(words: list[str]) -> None:
    source, sink = os.pipe()
    os.close(source)
    command = [sys.executable, "-m", "fadiag_fast", *words]
    run = subprocess.run(command, stdout=sink, stderr=subprocess.PIPE, text=True)
    os.close(sink)
    assert run.returncode == 3  # 1 would be a verdict
    assert run.stderr == ""


# What the console script of an installed package does.
SCRIPT = "import sys\nfrom fadiag_fast.__main__ import main\nsys.exit(main())\n"


@pytest.mark.parametrize("slow", ["torch", "typer"])
@pytest.mark.parametrize("started", ["module", "script", "library"])
def test_an_interrupted_import_ends_as_an_interrupted_command(
    tmp_path: Path, slow: str, started: str
) -> None:
    (tmp_path / f"{slow}.py").write_text("raise KeyboardInterrupt\n")
    name = "fadiag" if started == "script" else "training.py"
    (tmp_path / name).write_text(SCRIPT if started == "script" else "import fadiag_fast, typer\n")
    command = ["-m", "fadiag_fast"] if started == "module" else [str(tmp_path / name)]
    path = os.pathsep.join([str(tmp_path), str(Path(fadiag_fast.__file__).parents[1])])
    run = subprocess.run(
        [sys.executable, *command, "doctor"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode in (130, -signal.SIGINT)
    if started == "library":  # whose own Ctrl-C this is
        assert "KeyboardInterrupt" in run.stderr
    else:
        assert run.returncode == 130
        assert run.stderr == "fadiag: interrupted\n"


def test_a_manifest_of_many_columns_takes_its_length(tmp_path: Path) -> None:
    count = 50_000
    manifest = tmp_path / "m.csv"
    manifest.write_text(
        "path," + ",".join(f"c{i}" for i in range(count)) + "\na.pt" + ",1" * count + "\n"
    )
    (entry,) = read_manifest(manifest)
    assert len(entry.fields) == count


@pytest.mark.parametrize("name", ["m.csv", "m.toml", "m.parquet"])
def test_a_manifest_that_is_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(SeriesError, match=f"{name}: expected a regular file"):
        read_manifest(tmp_path / name)


def test_a_table_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "checkpoints.parquet")
    with pytest.raises(UnreadableResults, match="expected a regular file"):
        ScanResult.load(tmp_path)
