"""The folder of a scan survives kills, full disks, two writers, and versions."""

import errno
import os
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="needs the extra 'scan'")

import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st
from studies import CONFIG, any_figures, bits, figures, lasting, record

from fadiag_fast.protocol import DiagnosticThresholds, evaluate, verdict_of
from fadiag_fast.scanning import (
    SCHEMA_VERSION,
    Entry,
    LockedResults,
    MissingExtra,
    NewerResults,
    ScanResult,
    ScanWriter,
    UnreadableResults,
    UnwritableResults,
    config_hash,
    schema,
)
from fadiag_fast.scanning.folder import Disk

HASH = config_hash(CONFIG)


class Killed(BaseException):
    """Stands for SIGKILL: nothing that handles errors sees it."""


class MortalDisk(Disk):
    """A disk whose process dies before its n-th operation, or half-way through it."""

    def __init__(self, operations=10**9, torn=False):
        self.left = operations
        self.torn = torn

    def spend(self, *, tear=None):
        self.left -= 1
        if self.left < 0:
            if self.torn and tear is not None:
                tear()
            raise Killed

    def write(self, path, data):
        self.spend(tear=lambda: path.write_bytes(bytes(data)[: len(data) // 2]))
        path.write_bytes(data)

    def rename(self, source, target):
        self.spend()
        os.replace(source, target)

    def sync_folder(self, folder):
        self.spend()

    def remove(self, path):
        self.spend()
        path.unlink(missing_ok=True)


def write_all(folder, count, batch, disk=None):
    """Audit what is not done, in batches; return how many were audited."""
    audited = 0
    writer = ScanWriter(folder, disk=disk)
    try:
        writer.configure(CONFIG)
        for index in range(count):
            if writer.done(f"sha256:{index:032x}", HASH):
                continue
            failed = {"error_kind": "missing", "error": "no such file"} if index % 7 == 5 else {}
            writer.add(record(HASH, index, **failed))
            audited += 1
            if audited % batch == 0:
                writer.flush()
        writer.close()
    finally:
        if writer._files.is_held:
            writer._files._lock.release()  # as the system does for a dead process
    return audited


def read_or_nothing(folder):
    """A scan's rows; None before there is so much as its lock."""
    return ScanResult.load(folder) if (folder / "scan.lock").exists() else None


@given(
    st.integers(1, 8),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=4),
)
@settings(max_examples=10, deadline=None)
def test_killed_anywhere_and_run_again_it_gives_the_same_table(count, batch, kills):
    few = pytest.MonkeyPatch()
    few.setattr("fadiag_fast.scanning.writer._FAN_IN", 2)  # so that parts are joined as well
    with few.context(), tempfile.TemporaryDirectory() as folder:
        undisturbed, disturbed = Path(folder, "a"), Path(folder, "b")
        write_all(undisturbed, count, batch)
        seen = 0
        for operations, torn in kills:
            with suppress(Killed):
                write_all(disturbed, count, batch, MortalDisk(operations, torn))
            found = read_or_nothing(disturbed)
            # Whatever was once readable stays so.
            assert seen <= (0 if found is None else len(found))
            seen = 0 if found is None else len(found)
        write_all(disturbed, count, batch)
        assert lasting(ScanResult.load(disturbed)) == lasting(ScanResult.load(undisturbed))
        left = {p.name for p in disturbed.rglob("*") if p.is_file()}
        assert left == {"checkpoints.parquet", "layers.parquet", "scan.lock"}
    few.undo()


@pytest.mark.parametrize("torn", [False, True])
def test_every_single_kill_point_keeps_what_was_flushed(tmp_path, monkeypatch, torn):
    """Not sampled: the process dies before each operation of a scan in turn."""
    monkeypatch.setattr("fadiag_fast.scanning.writer._FAN_IN", 2)
    for operations in range(200):
        folder = tmp_path / str(operations)
        disk = MortalDisk(operations, torn)
        flushed, writer = 0, None
        try:
            writer = ScanWriter(folder, disk=disk)
            writer.configure(CONFIG)
            for index in range(5):
                writer.add(record(HASH, index))
                writer.flush()
                flushed = index + 1
            writer.close()
            break
        except Killed:
            found = read_or_nothing(folder)
            paths = set() if found is None else set(found.verdicts())
            assert {f"runs/r{i % 3}/step_{i}.pt" for i in range(flushed)} <= paths
        finally:
            if writer is not None and writer._files.is_held:
                writer._files._lock.release()
    else:
        raise AssertionError("the scan never got through")
    assert operations > 30


KILLED_SCAN = """
import os, random, signal, sys, time
from studies import CONFIG, record
from fadiag_fast.scanning import ScanWriter, config_hash, writer
writer._FAN_IN = 3
folder, kills = sys.argv[1], int(sys.argv[2])
def scan():
    with ScanWriter(folder) as writer:
        config = writer.configure(CONFIG)
        for index in range(40):
            if not writer.done(f"sha256:{index:032x}", config):
                writer.add(record(config, index))
                writer.flush()
rng = random.Random(7)
for kill in range(kills + 1):
    child = os.fork()
    if child == 0:
        scan()
        os._exit(0)
    if kill < kills:
        time.sleep(rng.uniform(0.02, 0.12))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
assert status == 0, status
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_ten_sigkills_and_a_rerun_give_the_same_table(tmp_path):
    here = Path(__file__).parent.parent
    command = [sys.executable, "-c", KILLED_SCAN, str(tmp_path / "b"), "10"]
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with ScanWriter(tmp_path / "a") as writer:
        config = writer.configure(CONFIG)
        writer.add(*(record(config, index) for index in range(40)))
    assert lasting(ScanResult.load(tmp_path / "b")) == lasting(ScanResult.load(tmp_path / "a"))


class FullDisk(Disk):
    """A disk that has no room for its n-th file, and then has again."""

    def __init__(self, at):
        self.at = at

    def write(self, path, data):
        self.at -= 1
        if self.at == -1:
            path.write_bytes(bytes(data)[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.write_bytes(data)


def test_a_full_disk_is_named_and_loses_nothing(tmp_path):
    """At every file in turn: the owner's note, each part, both tables."""
    for at in range(20):
        folder = tmp_path / str(at)
        refused = []
        try:
            with ScanWriter(folder, disk=FullDisk(at)) as writer:
                config = writer.configure(CONFIG)
                for index in range(4):
                    writer.add(record(config, index))
                    try:
                        writer.flush()
                    except UnwritableResults as error:
                        refused.append(str(error))
                        # The rows before are readable, and this one goes along with the next.
                        assert len(ScanResult.load(folder)) == index
        except UnwritableResults as error:
            refused.append(str(error))
        for message in refused:
            assert re.search("the disk is full(; 1 rows wait)?", message)
            assert "started again, goes on from there" in message
        assert not list(folder.rglob(".*"))
        with ScanWriter(folder) as writer:
            config = writer.configure(CONFIG)
            missing = [i for i in range(4) if not writer.done(f"sha256:{i:032x}", config)]
            # Only a scan that could not even begin has rows to repeat.
            assert missing == ([0, 1, 2, 3] if at == 0 else [])
        if not refused:
            break
    assert at == 7  # a note, four parts, two tables


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UnwritableResults, match="cannot be written"):
        ScanWriter(tmp_path / "file")


def test_a_second_writer_is_told_who_holds_the_folder(tmp_path):
    with ScanWriter(tmp_path) as first:
        with pytest.raises(LockedResults, match=f"process {os.getpid()} on .*, since 20"):
            ScanWriter(tmp_path)
        first.configure(CONFIG)
        first.add(record(HASH))
    # The one that was refused has taken nothing away.
    with ScanWriter(tmp_path) as second:
        assert second.done(f"sha256:{0:032x}", HASH)
    assert not (tmp_path / "scan.owner.json").exists()


def test_an_interrupted_scan_keeps_its_rows_and_its_error(tmp_path):
    def interrupted():
        with ScanWriter(tmp_path) as writer:
            writer.add(record(writer.configure(CONFIG)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(ScanResult.load(tmp_path)) == 1


def test_a_reader_needs_no_lock(tmp_path):
    with ScanWriter(tmp_path) as writer:
        writer.add(record(writer.configure(CONFIG)))
        writer.flush()
        assert len(ScanResult.load(tmp_path)) == 1


@given(st.lists(any_figures(), max_size=6))
@settings(max_examples=14, deadline=None)
def test_figures_come_back_to_the_last_bit(given_figures):
    with tempfile.TemporaryDirectory() as folder:
        with ScanWriter(folder) as writer:
            config = writer.configure(CONFIG)
            for index, one in enumerate(given_figures):
                writer.add(record(config, index, one, run="r", path=f"{index}"))
            writer.flush()
            before = list(ScanResult.load(folder).figures())
        result = ScanResult.load(folder)
        assert [bits(f) for f in result.figures()] == [bits(f) for f in given_figures]
        assert [bits(f) for f in before] == [bits(f) for f in given_figures]
        for row, one in zip(result.rows, given_figures, strict=True):
            assert row["verdict"] == verdict_of(evaluate(one))
        assert result.to_arrow("checkpoints").schema.equals(schema.checkpoint_schema())
        assert result.to_arrow("layers").schema.equals(schema.layer_schema())


def test_content_and_configuration_are_the_key_and_names_are_not(tmp_path):
    with ScanWriter(tmp_path) as writer:
        config = writer.configure(CONFIG)
        writer.add(record(config, 1), record(config, 5, error_kind="missing", error="gone"))
        assert writer.done(f"sha256:{1:032x}", config)
        assert not writer.done(f"sha256:{2:032x}", config)
        assert not writer.done(f"sha256:{1:032x}", writer.configure({**CONFIG, "model": "vit"}))
    with ScanWriter(tmp_path) as writer:
        config = writer.configure(CONFIG)
        assert writer.done(f"sha256:{1:032x}", config)
        # The file was replaced: its new row stands, and the old content is forgotten with it.
        writer.add(record(config, 1, figures(growth=99), content_hash="sha256:new"))
    (row,) = [row for row in ScanResult.load(tmp_path).rows if row["step"] == 1]
    assert (row["content_hash"], row["verdict"]) == ("sha256:new", "needs walk-back: (a)")
    with ScanWriter(tmp_path) as writer:
        assert not writer.done(f"sha256:{1:032x}", HASH)


def test_reuse_gives_equal_files_their_own_rows(tmp_path):
    first = Entry("runs/bp/step_0.pt", "bp", 0)
    twin = Entry("runs/dfa/step_0.pt", "dfa", 0, frozen_accuracy=0.5)
    content = f"sha256:{0:032x}"
    with ScanWriter(tmp_path) as writer:
        config = writer.configure(CONFIG)
        assert not writer.reuse(first, content, config)
        given_figures = figures(accuracy=0.4)
        writer.add(
            record(config, 0, given_figures, path=first.path, run="bp", measured_accuracy=0.4)
        )
        assert writer.reuse(twin, content, config)  # from memory
    with ScanWriter(tmp_path) as writer:
        writer.configure(CONFIG)
        assert writer.reuse(twin, content, HASH)  # nothing new: no row
        assert not writer._waiting
        moved = Entry("elsewhere/step_0.pt", "moved", 7, accuracy=0.9, frozen_accuracy=0.5)
        assert writer.reuse(moved, content, HASH)  # from the folder
    result = ScanResult.load(tmp_path)
    rows = {row["run"]: row for row in result.rows}
    assert [row["d_label"] for row in result.rows] == ["not evaluated", "UNDERCUT", "clears"]
    assert [rows[run]["accuracy"] for run in ("bp", "dfa", "moved")] == [0.4, 0.4, 0.9]
    assert (rows["moved"]["step"], rows["dfa"]["seconds"]) == (7, 0.0)
    norms = {f.residual_norms for f in result.figures()}
    assert norms == {given_figures.residual_norms}


def test_taking_up_a_scan_reads_its_rows_once(tmp_path, monkeypatch):
    with ScanWriter(tmp_path) as writer:
        config = writer.configure(CONFIG)
        writer.add(*(record(config, index) for index in range(5)))
    with ScanWriter(tmp_path) as writer:
        writer.configure(CONFIG)
        # Nothing has changed, so that no row is looked up, let alone written.
        monkeypatch.setattr(writer, "_stored", None)
        for index in range(5):
            entry = Entry(f"runs/r{index % 3}/step_{index}.pt", f"r{index % 3}", index)
            assert writer.reuse(entry, f"sha256:{index:032x}", HASH)
        assert not writer._waiting


def test_other_thresholds_judge_all_rows_again_without_an_audit(tmp_path):
    with ScanWriter(tmp_path) as writer:
        writer.add(record(writer.configure(CONFIG), 0, figures(growth=20)))
    with ScanWriter(tmp_path, thresholds=DiagnosticThresholds(scale_growth=10)) as writer:
        assert writer.done(f"sha256:{0:032x}", HASH)
    result = ScanResult.load(tmp_path)
    assert result.rows[0]["verdict"] == "needs walk-back: (a)"
    assert result.thresholds.scale_growth == 10
    assert result.judged(DiagnosticThresholds()).rows[0]["verdict"] == "trustworthy"


def test_a_row_needs_a_known_configuration(tmp_path):
    unknown = record("sha256:unknown")
    with ScanWriter(tmp_path) as writer, pytest.raises(ValueError, match="from configure"):
        writer.add(unknown)
    assert len(ScanResult.load(tmp_path)) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"error_kind": "missing", "figures": figures()}, "got both"),
        ({"figures": None}, "got neither"),
        ({"content_hash": None}, "expected a content_hash"),
        ({"sample_shapes": [(3,)]}, "each of 3 hidden states, got 1"),
    ],
)
def test_a_record_is_an_audit_or_a_failure(changes, message):
    values = {"content_hash": "sha256:0", "figures": figures()}
    if "error_kind" in changes:
        values = {}
    with pytest.raises(ValueError, match=message):
        record(HASH, **{"error_kind": None, **values, **changes})


def test_shapes_and_root_mean_squares(tmp_path):
    with ScanWriter(tmp_path) as writer:
        shapes = [(4,), (2, 8), ()]
        writer.add(record(writer.configure(CONFIG), 0, figures(1.0), sample_shapes=shapes))
    layers = ScanResult.load(tmp_path).to_arrow("layers").to_pylist()
    assert [row["sample_shape"] for row in layers] == [[4], [2, 8], []]
    assert [row["rms"] for row in layers] == [5.0, 2.5, 10.0]


def test_names_that_are_no_text(tmp_path):
    """A file name on Linux is bytes; what is no UTF-8 reaches Python as surrogates."""
    with ScanWriter(tmp_path) as writer:
        config = writer.configure(CONFIG)
        writer.add(record(config, 0, path="runs/\udcff.pt", run="r\udcfe"))
        entry = Entry("runs/\udcff.pt", "r\udcfe", 0)
        assert writer.reuse(entry, f"sha256:{0:032x}", config)
    (row,) = ScanResult.load(tmp_path).rows
    assert row["path"] == "runs/\\udcff.pt"


def rewrite(path, change):
    table = pq.ParquetFile(path).read()
    pq.write_table(change(table), path)


def test_a_newer_version_is_refused_and_left_alone(tmp_path):
    with ScanWriter(tmp_path) as writer:
        writer.add(record(writer.configure(CONFIG)))
    newer = {schema.VERSION_KEY: str(SCHEMA_VERSION + 1).encode()}
    rewrite(tmp_path / "checkpoints.parquet", lambda t: t.replace_schema_metadata(newer))
    before = (tmp_path / "checkpoints.parquet").read_bytes()
    for use in (ScanResult.load, ScanWriter):
        with pytest.raises(NewerResults, match="expected schema version 2 or older, got 3"):
            use(tmp_path)
    assert (tmp_path / "checkpoints.parquet").read_bytes() == before
    # The refused writer has let go of the folder.
    with pytest.raises(NewerResults):
        ScanWriter(tmp_path)


def test_an_older_version_is_read_and_written_on(tmp_path):
    with ScanWriter(tmp_path) as writer:
        writer.add(record(writer.configure(CONFIG)))
    old = {schema.VERSION_KEY: b"0"}
    for name, column in (("checkpoints", "frozen_run"), ("layers", "rms")):
        rewrite(
            tmp_path / f"{name}.parquet",
            lambda t, c=column: t.drop_columns([c]).replace_schema_metadata(old),
        )
    assert ScanResult.load(tmp_path).rows[0]["frozen_run"] is None
    with ScanWriter(tmp_path) as writer:
        writer.add(record(writer.configure(CONFIG), 1))
    assert len(ScanResult.load(tmp_path)) == 2


def test_damaged_files_are_named(tmp_path):
    with ScanWriter(tmp_path) as writer:
        writer.add(record(writer.configure(CONFIG)))
    whole = (tmp_path / "layers.parquet").read_bytes()
    (tmp_path / "layers.parquet").write_bytes(whole[:100])
    with pytest.raises(UnreadableResults, match=r"layers\.parquet: expected a readable table"):
        ScanResult.load(tmp_path)
    (tmp_path / "layers.parquet").unlink()
    with pytest.raises(UnreadableResults, match="do not belong together"):
        ScanResult.load(tmp_path)
    (tmp_path / "layers.parquet").write_bytes(whole)
    rewrite(tmp_path / "layers.parquet", lambda t: t.replace_schema_metadata(None))
    with pytest.raises(UnreadableResults, match="expected a table of a scan"):
        ScanResult.load(tmp_path)
    with pytest.raises(UnreadableResults, match="got no folder"):
        ScanResult.load(tmp_path / "nowhere")


def test_a_path_that_changed_its_place_has_its_last_row_alone(tmp_path):
    """Also where its rows come in natural order, as a scan's do."""
    with ScanWriter(tmp_path) as writer:
        config = writer.configure(CONFIG)
        for index, run in enumerate(("a", "b", "c")):
            writer.add(record(config, index, run=run, path="moved.pt" if run != "b" else "b.pt"))
            writer.flush()
    # In the files themselves: a reader of ours would pass over the other row.
    pq = pytest.importorskip("pyarrow.parquet")
    found = pq.read_table(tmp_path / "checkpoints.parquet")
    assert found.select(["run", "path"]).to_pylist() == [
        {"run": "b", "path": "b.pt"},
        {"run": "c", "path": "moved.pt"},
    ]
    layers = pq.read_table(tmp_path / "layers.parquet")
    assert set(layers["record"].to_pylist()) == set(found["record"].to_pylist())


def test_many_parts_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr("fadiag_fast.scanning.writer._FAN_IN", 4)
    with ScanWriter(tmp_path) as writer:
        config = writer.configure(CONFIG)
        for index in range(40):
            writer.add(record(config, index))
            writer.flush()
            assert len(list((tmp_path / "parts").iterdir())) <= 9
        assert len(ScanResult.load(tmp_path)) == 40
    assert not list((tmp_path / "parts").iterdir())


@pytest.mark.parametrize("package", ["pyarrow", "filelock"])
def test_the_extra_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"pip install 'fadiag-fast\[scan\]'"):
        ScanWriter(tmp_path)


def test_the_documented_schema_is_the_schema():
    text = (Path(__file__).parents[2] / "docs" / "scan.md").read_text(encoding="utf-8")
    assert f"Schema version {SCHEMA_VERSION}" in text
    for columns in (schema.CHECKPOINT_COLUMNS, schema.LAYER_COLUMNS):
        assert schema.markdown(columns) in text
