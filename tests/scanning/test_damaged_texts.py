"""Manifests and step records that are damaged or of other types are told by name and line."""

import json
import os
import random

import pytest
from written import step_records

from fadiag_fast.scanning import ScanResult, ScanWriter, read_manifest
from fadiag_fast.scanning.errors import UnreadableResults
from fadiag_fast.scanning.run_names import SeriesError
from fadiag_fast.training.sinks import read_jsonlines
from fadiag_fast.training.watch import Tail, find_log, scan_result_of, view

TOML = '[[checkpoint]]\npath = "a.pt"\n'

MANIFESTS = {
    "run is a list": ("m.toml", TOML + 'run = ["a"]', "checkpoint 1: run"),
    "run is a table": ("m.toml", TOML + "run = {a = 1}", "checkpoint 1: run"),
    "run is a truth value": ("m.toml", TOML + "run = true", "checkpoint 1: run"),
    "run is a date": ("m.toml", TOML + "run = 1979-05-27", "checkpoint 1: run"),
    "runs is no table": ("m.toml", "runs = 3\n" + TOML, "runs: expected tables"),
    "a run is no table": (
        "m.toml",
        "runs = {a = 1}\n" + TOML + 'run = "a"',
        "runs: expected tables",
    ),
    "path is a number": ("m.toml", "[[checkpoint]]\npath = 3", "checkpoint 1: path"),
    "path is a list": ("m.toml", '[[checkpoint]]\npath = ["a"]', "checkpoint 1: path"),
    "path has a zero": ("m.toml", '[[checkpoint]]\npath = "a\\u0000"', "checkpoint 1: path"),
    "step is a truth value": ("m.toml", TOML + "step = true", "checkpoint 1: step"),
    "step is a list": ("m.toml", TOML + "step = [1]", "checkpoint 1: step"),
    "step is endless": ("m.csv", "path,step\na.pt," + "9" * 5000, "line 2: step"),
    "accuracy is a truth value": ("m.toml", TOML + "accuracy = true", "checkpoint 1: accuracy"),
    "accuracy is a date": ("m.toml", TOML + "accuracy = 1979-05-27", "checkpoint 1: accuracy"),
    "a field is a table": ("m.toml", TOML + "lr = {a = 1}", "checkpoint 1: lr"),
    "checkpoint is no list": ("m.toml", "checkpoint = 3", "expected .*checkpoint"),
    "checkpoints are no tables": ("m.toml", "checkpoint = [1]", "checkpoint 1: expected a table"),
    "deep brackets": ("m.toml", "a = " + "[" * 3000, "expected a TOML file"),
    "toml not in UTF-8": ("m.toml", b'[[checkpoint]]\npath = "a\xff"', "line 2: expected a TOML"),
    "csv not in UTF-8": ("m.csv", b"path,run\na,b\nc,\xff", "line 3: expected a CSV file"),
    "a csv cell without end": ("m.csv", 'path\n"' + "a" * 200_000, "line 2: expected CSV"),
    "a csv of zeros": ("m.csv", b"path\n\0\0\0", "line 2: path"),
    "an empty csv": ("m.csv", "", "expected a column 'path'"),
    "no parquet": ("m.parquet", b"PAR1" + b"x" * 40, "expected a Parquet file"),
    "an empty parquet": ("m.parquet", b"", "expected a Parquet file"),
}


@pytest.mark.parametrize(("name", "content", "where"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_damaged_manifest_is_told_with_its_name(name, content, where, tmp_path):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    if name.endswith(".toml"):
        pytest.importorskip("tomllib")
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SeriesError, match=where) as error:
        read_manifest(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 500 + len(str(path))


def test_parquet_manifests_of_other_types_and_with_flipped_bits(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "m.parquet"
    for column, values in {
        "path": [b"a.pt"],
        "run": [["a"]],
        "step": [{"a": 1}],
        "accuracy": [True],
    }.items():
        pq.write_table(pa.table({"path": ["a.pt"]} | {column: values}), path)
        with pytest.raises(SeriesError, match=f"row 1: {column}") as error:
            read_manifest(path)
        assert str(path) in str(error.value)
    table = pa.table({"path": [f"{i}.pt" for i in range(9)], "step": list(range(9))})
    pq.write_table(table, path, write_page_checksum=True)
    right, data, draw = read_manifest(path), path.read_bytes(), random.Random(3)
    messages = []
    for _ in range(100):
        changed = bytearray(data)
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            assert len(read_manifest(path)) <= len(right)
        except SeriesError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all(str(path) in message for message in messages)


@pytest.fixture
def steps(tmp_path):
    """Return a file of step records, and the place of its records' lines."""
    path = step_records(tmp_path / "steps.jsonl")
    lines = path.read_text().splitlines()
    (third,) = [i for i, line in enumerate(lines) if json.loads(line).get("step") == 2]
    return path, lines, third


FIELDS = {
    "hidden_norms is a number": {"hidden_norms": 3},
    "hidden_norms is a text": {"hidden_norms": "3"},
    "hidden_norms is short": {"hidden_norms": [1.0]},
    "hidden_norms holds lists": {"hidden_norms": [[1.0], [1.0], [1.0]]},
    "gains hold truth values": {"credit_gains": [True, True, True]},
    "step is a text": {"step": "2"},
    "step is a fraction": {"step": 2.5},
    "step is endless": {"step": 10**30},
    "step is nothing": {"step": None},
    "layers is a text": {"layers": "abc"},
    "skipped is a number": {"skipped": 3},
    "autocast is a number": {"autocast": 16},
    "output_grad_norm is a list": {"output_grad_norm": [1.0]},
    "no record": None,
    "brackets": "[" * 100_000,
    "an alarm of other types": {"event": "alarm", "sentence": 3},
}


@pytest.mark.parametrize("change", FIELDS.values(), ids=FIELDS)
def test_a_step_record_of_other_types_is_a_line_that_cannot_be_read(change, steps):
    path, lines, third = steps
    if isinstance(change, dict):
        alarm = {"reported_at": 2, "layer": "a", "rule": "a", "figure": "a", "value": 1.0}
        alarm |= {"threshold": 1.0, "baseline_median": 1.0, "baseline_mad": 1.0}
        rest = {**alarm, "last_healthy_step": 1} if "event" in change else {}
        lines[third] = json.dumps({**json.loads(lines[third]), **rest, **change})
    else:
        lines[third] = change or "null"
    path.write_text("\n".join(lines) + "\n")
    log = read_jsonlines(path)
    assert log.damaged == (third + 1,)
    assert [record.step for record in log.records] == [0, 1, 3]
    tail = Tail(path)
    tail.read()
    assert (tail.damaged, tail.count) == (1, 3)
    assert "1 lines could not be read" in "".join(line.text for line in view(tail))
    pytest.importorskip("pyarrow")
    with pytest.warns(UserWarning, match=f"could not be read: line {third + 1}") as told:
        result = scan_result_of([path])
    assert str(path) in str(told[0].message)
    assert [row["step"] for row in result.rows] == [0, 1, 3]


def test_a_file_of_damaged_records_alone_is_named_with_its_lines(steps):
    pytest.importorskip("pyarrow")
    path, lines, third = steps
    lines[third - 2 :] = ["{}"] * 4
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(
        ValueError, match=r"expected step records.*could not be read: line"
    ) as error:
        scan_result_of([path])
    assert str(path) in str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_nobody_waits_for_a_fifo_in_a_file_s_place(tmp_path):
    """It would be for ever: nobody writes to it."""
    pytest.importorskip("pyarrow")
    for name in ("m.csv", "m.toml", "m.parquet", "steps.jsonl"):
        os.mkfifo(tmp_path / name)
    for name in ("m.csv", "m.toml", "m.parquet"):
        if name.endswith("toml"):
            pytest.importorskip("tomllib")
        with pytest.raises(SeriesError, match=f"{name}: expected a regular file, got a FIFO"):
            read_manifest(tmp_path / name)
    with pytest.raises(ValueError, match=r"steps.jsonl: expected a regular file, got a FIFO"):
        read_jsonlines(tmp_path / "steps.jsonl")
    with pytest.raises(ValueError, match=r"steps.jsonl: expected a regular file, got a FIFO"):
        Tail(tmp_path / "steps.jsonl").read()
    with pytest.raises(FileNotFoundError, match="none in the folder"):
        find_log(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("name", ["checkpoints.parquet", "layers.parquet", "parts/part-0-1.arrow"])
def test_nobody_waits_for_a_fifo_among_a_scan_s_tables(name, tmp_path):
    pytest.importorskip("pyarrow")
    with ScanWriter(tmp_path) as writer:
        writer.configure({"batches": 8})
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(UnreadableResults, match="expected a regular file, got a FIFO") as error:
        ScanResult.load(tmp_path)
    assert str(path) in str(error.value)
