"""Run the benchmarks: ``python -m benchmarks [WHAT …]``, all that fit the machine by default."""

import argparse
import sys
from pathlib import Path

import torch

from . import (
    architectures,
    calibration,
    capture,
    cpu,
    demo,
    operator,
    plots,
    reading,
    registers,
    rows,
    scan_rate,
    scan_report,
    special,
    steps,
    study_rate,
    sweep,
    tables,
)


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    found = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    found.add_argument(
        "what",
        nargs="*",
        help="operator, cpu, sweep, special, capture, architectures, calibration, demo, registers, "
        "scan-rate, scan-report, reading, steps, study-rate, tables, plots; by default what fits "
        "the machine: on CUDA operator, sweep and special, else cpu and special; then tables and "
        "plots",
    )
    found.add_argument("--device", help="cuda or cpu; by default CUDA where there is one")
    found.add_argument(
        "--quick", action="store_true", help="few repetitions, into files ending in _quick"
    )
    found.add_argument("--results", type=Path, default=rows.RESULTS, help="the folder of the CSVs")
    found.add_argument(
        "--only",
        default="",
        help="operator, architectures, calibration, scan-rate, steps, study-rate: those whose name "
        "has this; steps: soak for a long run that watches memory",
    )
    found.add_argument(
        "--no-compile", action="store_true", help="operator and capture: without torch.compile"
    )
    found.add_argument(
        "--minutes", type=float, default=0.0, help="steps --only soak: so long instead of by steps"
    )
    found.add_argument("--autotune", action="store_true", help="operator: max-autotune mode too")
    found.add_argument("--check", action="store_true", help="tables: fail if a README is stale")
    return found


def _tables(results: Path, check: bool) -> int:
    stale = tables.update(results, check)
    for file in stale:
        state = "stale: run python -m benchmarks tables" if check else "updated"
        print(f"tables: {file.relative_to(rows.ROOT)} {state}")
    return 1 if check and stale else 0


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code."""
    asked = parser().parse_args(arguments)
    device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    fitting = ["operator", "sweep", "special"] if device.type == "cuda" else ["cpu", "special"]
    what = asked.what or fitting
    known = {
        "operator",
        "cpu",
        "sweep",
        "special",
        "capture",
        "architectures",
        "calibration",
        "demo",
        "registers",
        "scan-report",
        "scan-rate",
        "reading",
        "steps",
        "study-rate",
        "tables",
        "plots",
    }
    unknown = set(what) - known
    if unknown:
        parser().error(f"unknown benchmark: {', '.join(sorted(unknown))}")

    written: list[Path] = []
    if "operator" in what:
        compiled = not asked.no_compile
        written.append(
            operator.run(device, asked.results, asked.quick, asked.only, compiled, asked.autotune)
        )
    if "cpu" in what:
        written += cpu.run(torch.device("cpu"), asked.results, asked.quick)
    if "sweep" in what:
        written.append(sweep.run(device, asked.results, asked.quick))
    if "special" in what:
        written.append(special.run(device, asked.results, asked.quick))
    if "scan-rate" in what:
        written.append(scan_rate.run(device, asked.results, asked.quick, asked.only))
    if "capture" in what:
        written.append(capture.run(device, asked.results, asked.quick, not asked.no_compile))
    if "architectures" in what:
        written.append(architectures.run(device, asked.results, asked.quick, asked.only))
    if "calibration" in what:
        written.append(calibration.run(torch.device("cpu"), asked.results, asked.quick, asked.only))
    if "demo" in what:
        written.append(demo.run(device, asked.results, asked.quick))
    if "registers" in what:
        written.append(registers.run(device, asked.results, asked.quick))
    if "scan-report" in what:
        written.append(scan_report.run(torch.device("cpu"), asked.results, asked.quick))
    if "study-rate" in what:
        written.append(study_rate.run(device, asked.results, asked.quick, asked.only))
    if "reading" in what:
        written.append(reading.run(device, asked.results, asked.quick))
    if "steps" in what and asked.only == steps.SOAK:
        written.append(steps.soak(device, asked.results, asked.quick, asked.minutes))
    elif "steps" in what:
        written.append(steps.run(device, asked.results, asked.quick, asked.only))

    code = 0
    if "plots" in what:
        plots.draw(asked.results)
    elif written:
        try:
            plots.draw(asked.results, written)
        except RuntimeError as error:
            print(f"plots: left out: {error}")
    if "tables" in what or (not asked.what and asked.results == rows.RESULTS and not asked.quick):
        code = _tables(asked.results, asked.check)
    for path in written:
        print(f"\n{path.name}\n\n{tables.tables_of(path)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
