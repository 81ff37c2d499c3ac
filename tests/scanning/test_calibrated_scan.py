"""A scan judged by the calibrated protocol: stored figures suffice, old rows stay readable."""

import json
import math

import pytest
import torch
from networks import Branching
from test_driver import batches_of, figures_by_path, study
from typer.testing import CliRunner

pytest.importorskip("pyarrow", reason="needs the extra 'scan'")

import pyarrow.parquet as pq

from fadiag_fast import cli, diagnose
from fadiag_fast.scanning import ScanResult, schema, sweep_thresholds
from fadiag_fast.scanning.driver import scan

NEW = {
    "checkpoints": (
        *("protocol", "causes", "gradient_floor", "test_size", "frozen_test_size", "num_samples"),
        *("num_measurable", "num_non_finite", "equal_logits", "output_error", "grad_dtype"),
    ),
    "layers": ("pooled_norm", "pooled_gain", "stability_error", "stability_null"),
}


def broken_study(folder, steps=range(3)):
    """Two runs, in one of which a block has exploded."""
    models = study(folder, steps)
    for path, model in models.items():
        if "/a/" in path:
            with torch.no_grad():
                model.blocks[1][1].weight.mul_(1e9)
            torch.save({"model_state": model.state_dict(), "step": 0}, path)
    return models


def scanned(tmp_path, **options):
    models = broken_study(tmp_path / "runs")
    batches = batches_of()
    files = str(tmp_path / "runs/*/*.pt")
    return models, batches, scan(files, Branching(), batches, tmp_path / "out", **options)


@pytest.mark.parametrize("stack", [1, 3])
def test_verdicts_and_figures_are_those_of_diagnose(tmp_path, stack):
    models, batches, result = scanned(tmp_path, protocol="calibrated", stack=stack)
    assert result.protocol == "calibrated"
    assert "judged by the calibrated protocol" in str(result)
    found = figures_by_path(result)
    assert any(row["verdict"] != "trustworthy" for row, _ in found.values())
    for path, model in models.items():
        row, figures = found[path]
        report = diagnose(model, batches, protocol="calibrated")
        assert row["verdict"] == report.verdict
        assert len(row["causes"]) == len(report.causes)
        for name in ("pooled_norms", "pooled_gains", "stability_errors", "stability_nulls"):
            # float32 in another order of operations: about a hundred roundings of 6e-8.
            torch.testing.assert_close(
                torch.tensor(getattr(figures, name), dtype=torch.float64),
                torch.tensor(getattr(report.figures, name), dtype=torch.float64),
                rtol=2e-5,
                atol=2e-5,
            )
        for name in ("num_samples", "num_measurable", "num_non_finite", "equal_logits"):
            assert getattr(figures, name) == getattr(report.figures, name)
        assert figures.output_error == pytest.approx(report.figures.output_error, rel=2e-5)
        assert figures.grad_dtype == report.figures.grad_dtype == "float32"
        # The accuracy was measured, so the number of images is known.
        assert figures.test_size == 54


def test_a_paper_scan_is_judged_anew_from_its_rows(tmp_path):
    _, batches, paper = scanned(tmp_path)
    assert paper.protocol == "paper"
    assert all(row["causes"] is None for row in paper.rows)
    direct = scan(
        str(tmp_path / "runs/*/*.pt"),
        Branching(),
        batches,
        tmp_path / "other",
        protocol="calibrated",
        stack=1,
    )
    assert paper.judged(protocol="calibrated").verdicts() == direct.verdicts()
    assert direct.judged(protocol="paper").verdicts() == paper.verdicts()
    assert direct.thresholds == paper.thresholds
    # The paper's thresholds are swept whichever protocol judged.
    assert [str(s) for s in sweep_thresholds(direct)] == [str(s) for s in sweep_thresholds(paper)]
    # A scan into the folder judges what is there by its own protocol.
    files = str(tmp_path / "runs/*/*.pt")
    again = scan(files, Branching(), batches, tmp_path / "out", protocol="calibrated")
    assert again.protocol == "calibrated"
    assert again.verdicts() == direct.verdicts()


def as_version_1(folder):
    """Take away what version 2 added."""
    for name, columns in NEW.items():
        path = folder / f"{name}.parquet"
        table = pq.ParquetFile(path).read().drop_columns(list(columns))
        pq.write_table(table.replace_schema_metadata({schema.VERSION_KEY: b"1"}), path)


def test_rows_of_version_1_mean_what_they_meant(tmp_path):
    _, batches, written = scanned(tmp_path)
    before = written.verdicts()
    as_version_1(tmp_path / "out")
    old = ScanResult.load(tmp_path / "out")
    assert old.verdicts() == before
    assert old.protocol == "paper"
    for row, figures in zip(old.rows, old.figures(), strict=True):
        assert [row[name] for name in NEW["checkpoints"]] == [None] * len(NEW["checkpoints"])
        assert (figures.pooled_gains, figures.output_error, figures.test_size) == ((), None, None)
    # By the calibrated protocol they are judged by their first batch.
    verdicts = old.judged(protocol="calibrated").verdicts()
    assert verdicts == written.judged(protocol="calibrated").verdicts()
    # A scan goes on in the folder without auditing anything again.
    files = str(tmp_path / "runs/*/*.pt")
    after = scan(files, Branching(), batches, tmp_path / "out")
    assert after.verdicts() == before
    assert all(row["num_samples"] is None for row in after.rows)


def test_test_sizes_come_from_the_manifest(tmp_path):
    models = broken_study(tmp_path / "runs", range(1))
    good = next(path for path in models if "/b/" in path)
    lines = ["path,accuracy,frozen_accuracy,test_size,frozen_test_size", f"{good},.8,.84,10000,"]
    manifest = tmp_path / "study.csv"
    manifest.write_text("\n".join(lines) + "\n")

    def outcome(sizes):
        manifest.write_text("\n".join([lines[0], f"{good},.8,.84,{sizes}"]) + "\n")
        result = scan(
            [],
            Branching(),
            batches_of(),
            tmp_path / "out",
            manifest=manifest,
            protocol="calibrated",
        )
        return result.rows[0]

    assert outcome("10000,")["d_label"] == "UNDERCUT"
    assert outcome("10000,")["test_size"] == 10_000
    assert outcome("10000,50")["d_label"] == "undecided"
    assert outcome(",")["d_label"] == "undecided"
    with pytest.raises(ValueError, match="test_size: expected a whole number of at least 1"):
        outcome("0,")


def test_an_unknown_protocol_is_named(tmp_path):
    with pytest.raises(ValueError, match="expected paper or calibrated, got 'strict'"):
        scanned(tmp_path, protocol="strict")


def test_on_the_command_line(tmp_path):
    model = {"d_hidden": 16, "num_blocks": 2}
    from fadiag_fast.zoo import build_model

    network = build_model("resmlp", input_shape=(1, 28, 28), num_classes=10, seed=0, **model)
    torch.save(network.state_dict(), tmp_path / "step_0.pt")
    arguments = ["scan", str(tmp_path / "step_0.pt"), "--out", str(tmp_path / "out"), "--quiet"]
    arguments += [f"--model-option={name}={value}" for name, value in model.items()]
    arguments += ["--protocol", "calibrated", "--json"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output.splitlines()[-1])["verdicts"] == {"trustworthy": 1}
    (row,) = ScanResult.load(tmp_path / "out").rows
    assert (row["protocol"], row["b_threshold"], row["gradient_floor"]) == (
        "calibrated",
        1.28e-5,
        1e-7,
    )
    assert not math.isnan(row["output_error"])
