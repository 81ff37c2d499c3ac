"""fadiag thresholds, as a user runs it."""

import json

import pytest

pytest.importorskip("pyarrow", reason="needs the extra 'scan'")

from studies import CONFIG, figures, record
from typer.testing import CliRunner

from fadiag_fast import cli
from fadiag_fast.scan import ScanWriter


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


def test_what_is_no_scan_is_an_error(tmp_path):
    for command in ("thresholds",):
        result = fadiag(command, tmp_path)
        assert result.exit_code == 3
        assert "expected a scan's folder" in result.output.replace("\n", " ")
