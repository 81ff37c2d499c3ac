"""fadiag thresholds and fadiag report, as a user runs them."""

import json
import sys

import pytest

pytest.importorskip("pyarrow", reason="needs the extra 'scan'")

from studies import CONFIG, figures, record
from typer.testing import CliRunner

from fadiag_fast import cli
from fadiag_fast.scan import ScanResult, ScanWriter
from fadiag_fast.scan.plots import write_plots


def fadiag(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture
def folder(tmp_path):
    with ScanWriter(tmp_path / "scan") as writer:
        config = writer.configure(CONFIG)
        for step, growth in enumerate((2.0, 11.0, 694.0)):
            one = figures(growth=growth)
            writer.add(record(config, step, one, run="a/$x_1$ <b>", step=step, path=f"{step}.pt"))
        writer.add(record(config, 9, error_kind="missing", error="gone", run="empty"))
    return tmp_path / "scan"


def test_thresholds(folder):
    result = fadiag("thresholds", folder)
    assert result.exit_code == 0, result.output
    assert "gap around the threshold: 11 to 694 (a factor of 63.1)" in result.output
    assert "credit gain (in no verdict)" in result.output
    last = fadiag("thresholds", folder, "--last")
    assert "(a) scale growth: fires above 50; 1 of 1 checkpoints do" in last.output


def test_thresholds_as_json(folder):
    result = fadiag("thresholds", folder, "--json")
    growth = json.loads(result.output)[0]
    assert growth["field"] == "scale_growth"
    assert [interval["fires"] for interval in growth["intervals"]] == [3, 2, 1, 0]
    assert growth["gap"]["low"] == 11.0


def test_report(folder, tmp_path):
    out = tmp_path / "r.html"
    result = fadiag("report", folder, "-o", out, "--title", "mine")
    assert result.exit_code == 0, result.output
    assert "4 checkpoints" in result.output
    assert "<title>mine" in out.read_text(encoding="utf-8")


def test_plots_are_pictures_with_names_for_files(folder, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra 'bench'")
    result = ScanResult.load(folder)
    written = write_plots(result, tmp_path / "plots", formats=("svg",))
    assert [path.name for path in written] == ["runs.svg", "run-a-x_1-b.svg", "run-empty.svg"]
    assert all(b"<svg" in path.read_bytes() for path in written)
    (picture,) = write_plots(result, tmp_path / "few", most_runs=0, formats=("png",))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_is_no_scan_is_an_error(tmp_path):
    for command in ("thresholds", "report"):
        result = fadiag(command, tmp_path)
        assert result.exit_code == 3
        assert "expected a scan's folder" in result.output.replace("\n", " ")


def test_the_extra_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = fadiag("report", folder, "-o", tmp_path / "r.html")
    assert result.exit_code == 3
    assert "pip install 'fadiag-fast[scan]'" in result.output.replace("\n", " ")
