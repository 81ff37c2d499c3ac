"""The checksum in a scan's files: no bit may flip without a word."""

import random
import warnings

import pytest
from written import checkpoint_record, finished_scan, stopped_scan

from fadiag_fast.scanning import ScanWriter, seals, store
from fadiag_fast.scanning.errors import UnreadableResults
from fadiag_fast.scanning.store import read_tables

pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def parts(tmp_path):
    """A folder that has parts, and no tables yet."""
    return stopped_scan(tmp_path / "parts")


def files_of(folder):
    return [*folder.glob("*.parquet"), *folder.glob("parts/*.arrow")]


def flipped(data, place, bit):
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return changed


def test_every_flipped_bit_is_noticed(tmp_path, parts):
    """Also of the footer, and of the checksum itself."""
    draw = random.Random(1)
    files = [*files_of(finished_scan(tmp_path / "tables")), *files_of(parts)]
    assert {path.suffix for path in files} == {".parquet", ".arrow"}
    for path in files:
        data = path.read_bytes()
        assert seals.check(data)
        places = {*range(0, len(data), 23), *range(len(data) - 1200, len(data), 3)}
        places |= {i + 1 for i in range(len(data)) if data.startswith(b"fadiag-seal:", i)}
        for place in places:
            with pytest.raises(seals.BrokenSeal):
                seals.check(flipped(data, place, draw.randrange(8)))


@pytest.mark.parametrize("kind", ["parts", "tables"])
def test_reading_names_the_file_with_a_flipped_bit(kind, tmp_path, parts):
    folder = parts if kind == "parts" else finished_scan(tmp_path / "tables")
    right = read_tables(folder)
    draw = random.Random(2)
    for path in files_of(folder):
        data = path.read_bytes()
        for place in (*draw.choices(range(len(data)), k=6), 0, len(data) - 1):
            path.write_bytes(flipped(data, place, draw.randrange(8)))
            with pytest.raises(UnreadableResults, match=path.name):
                read_tables(folder)
            with pytest.raises(UnreadableResults, match=path.name):
                ScanWriter(folder)
        path.write_bytes(data)
    assert read_tables(folder).layers.equals(right.layers)


@pytest.mark.parametrize(
    "change", [lambda d: d[:-1], lambda d: d + b"\0", lambda d: d[:-9] + d[-8:]]
)
def test_bytes_that_are_missing_or_too_many_are_noticed(change, tmp_path):
    for path in files_of(finished_scan(tmp_path)):
        data = path.read_bytes()
        path.write_bytes(change(data))
        with pytest.raises(UnreadableResults, match=path.name):
            read_tables(tmp_path)
        path.write_bytes(data)


def test_a_text_like_a_seal_is_only_a_text(tmp_path):
    """Of a run's name, which stands in the footer's statistics too."""
    (blank,) = {*seals.unsealed().values()}
    run = blank.decode()
    tables = read_tables(finished_scan(tmp_path, run=run))
    assert set(tables.checkpoints["run"].to_pylist()) == {run}


def test_other_readers_read_sealed_tables(tmp_path):
    finished_scan(tmp_path)
    right = read_tables(tmp_path)
    for name, table in (("checkpoints", right.checkpoints), ("layers", right.layers)):
        assert pq.read_table(tmp_path / f"{name}.parquet").equals(table)


def test_tables_without_a_checksum_are_read_and_that_is_told_once(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_told", set())
    right = read_tables(finished_scan(tmp_path))
    for name, table in (("checkpoints", right.checkpoints), ("layers", right.layers)):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.warns(UserWarning, match="without checksums") as told:
        again = read_tables(tmp_path)
    assert str(tmp_path) in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_tables(tmp_path)
    assert again.layers.equals(right.layers)
    with ScanWriter(tmp_path, flush_rows=4) as writer:
        writer.add(checkpoint_record(9, writer.configure({"batches": 8})))
    monkeypatch.setattr(store, "_told", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_tables(tmp_path).checkpoints) == 9
