"""Make the Markdown tables from the CSVs, and put them between markers in the README files.

``<!-- begin:NAME -->`` and ``<!-- end:NAME -->`` enclose a table; NAME is one of :data:`TABLES`.
Every device that has rows gets its own table, and losing rows are shown like the others.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from . import rows, sweep
from .operator import OPERATOR, STATISTICS
from .rows import number

Rows = list[dict[str, str]]

FILES = (
    rows.ROOT / "README.md",
    rows.ROOT / "docs" / "architectures.md",
    rows.ROOT / "docs" / "calibration.md",
    rows.ROOT / "benchmarks" / "README.md",
    rows.ROOT / "benchmarks" / "NOTES.md",
)
_MARKED = re.compile(r"<!-- begin:([\w-]+) -->\n(.*?)<!-- end:\1 -->", re.DOTALL)
_BEGIN = re.compile(r"<!-- begin:([\w-]+) -->")


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, numbers right-aligned: all columns but the first."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ruler, *lines))


def _show(value: float, digits: int = 3, unit: str = "") -> str:
    """Return a number with a few significant digits; a dash for one that was not measured."""
    if math.isnan(value):
        return "–"
    if value and abs(value) >= 10**digits:
        return f"{value:.0f}{unit}"
    return f"{value:.{digits}g}{unit}"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"


def _operator(found: Rows) -> str:
    lines = []
    for row in found:
        if row["variant"] != OPERATOR or row["mode"] != "eager" or not row.get("best_pure"):
            continue
        plain = number(row, "ratio_without_stacking")
        lines.append(
            [
                row["workload"],
                _show(number(row, "median_us"), 4),
                _show(number(row, "graphed_us"), 4),
                _show(number(row, "tb_per_s")),
                _percent(number(row, "share_of_read")),
                f"{row['best_pure']}: {_show(number(row, 'best_pure_us'), 4)}",
                _show(number(row, "ratio"), unit="×"),
                _show(number(row, "ratio_eager"), unit="×"),
                _show(number(row, "ratio_graphed"), unit="×"),
                _show(plain, unit="×"),
                row["verdict"],
            ]
        )
    header = [
        "workload",
        "whole call, µs",
        "graphed, µs",
        "TB/s",
        "of a plain read",
        "best pure path, µs",
        "ratio",
        "eager : eager",
        "graphed : graphed",
        "ratio without stacking",
        "targets",
    ]
    return markdown(header, lines)


def _variants(found: Rows) -> str:
    """Every path's time, one line per workload: whole call / graphed."""
    shown = [
        row
        for row in found
        if row["workload"] != "ceilings" and not row["variant"].startswith("read:")
    ]
    names = list(dict.fromkeys(row["variant"] for row in shown if row["variant"] != STATISTICS))
    lines = []
    for workload in dict.fromkeys(row["workload"] for row in shown):
        cells = []
        for name in names:
            mine = [r for r in shown if r["workload"] == workload and r["variant"] == name]
            times = {r["mode"]: _show(number(r, "median_us"), 4) for r in mine}
            cells.append(" / ".join([times.get("eager", "–"), times.get("graphed", "–")]))
        lines.append([workload, *cells])
    table = markdown(["whole call / graphed, µs", *names], lines)
    notes = dict.fromkeys(
        f"- {row['workload']}, {row['variant']} {row['mode']}: {row['note']}\n"
        for row in shown
        if row["note"]
    )
    return table + ("\n" + "".join(notes) if notes else "")


def _cosines(found: Rows) -> str:
    lines = [
        [
            row["workload"],
            f"{row['variant']}, {row['mode']}",
            _show(number(row, "median_us"), 4),
            _percent(number(row, "added")),
            row["verdict"],
        ]
        for row in found
        if row.get("added")
    ]
    return markdown(
        ["workload", "path", "µs", "added to ten times the statistics", "target"], lines
    )


def _ceilings(found: Rows) -> str:
    lines = [
        [
            row["variant"],
            row["mode"],
            _show(number(row, "median_us"), 4),
            _show(number(row, "tb_per_s")),
        ]
        for row in found
        if row["workload"] == "ceilings"
    ]
    return markdown(["1 GiB of", "mode", "µs", "TB/s"], lines)


def _cpu(found: Rows) -> str:
    lines = [
        [
            row["workload"],
            row["variant"],
            _show(number(row, "median_us") / 1000),
            f"{_show(number(row, 'p10_us') / 1000)}–{_show(number(row, 'p90_us') / 1000)}",
            _show(number(row, "tb_per_s") * 1000),
            _percent(number(row, "share_of_read")),
            _show(number(row, "ratio"), unit="×"),
            row["verdict"],
        ]
        for row in found
    ]
    header = ["workload", "path", "ms", "p10–p90", "GB/s", "of a plain read", "ratio", "targets"]
    return markdown(header, lines)


def _grid(found: Rows, column: str) -> str:
    """N down, D across, one table per dtype and L."""
    parts = []
    for dtype, layers in dict.fromkeys((row["dtype"], row["layers"]) for row in found):
        mine = [row for row in found if (row["dtype"], row["layers"]) == (dtype, layers)]
        across = sorted({int(row["width"]) for row in mine})
        values = {(int(row["samples"]), int(row["width"])): number(row, column) for row in mine}
        lines = [
            [f"N{samples}", *(_show(values.get((samples, w), math.nan)) for w in across)]
            for samples in sorted({int(row["samples"]) for row in mine})
        ]
        parts.append(markdown([f"{dtype}, L{layers}", *(f"D{w}" for w in across)], lines))
    return "\n".join(parts)


def _cpu_sweep(found: Rows) -> str:
    slower = [row for row in found if not number(row, "ratio") >= 1]
    text = f"Time of eager over the operator's; {len(slower)} of {len(found)} cells slower.\n\n"
    return text + _grid(found, "ratio")


def _sweep(found: Rows) -> str:
    slower = [row for row in found if not number(row, "ratio") >= 1]
    cliffs = [row for row in found if row["cliff"]]
    text = (
        f"{len(found)} cells: {len(slower)} slower than the best of eager and foreach in either "
        f"mode, {len(cliffs)} under {sweep.LEAST_SHARE} of what a neighbour leads one to expect. "
        "The weakest of them, and every such cell:\n\n"
    )
    weakest = sorted(found, key=lambda row: number(row, "ratio"))[:5]
    shown = [row for row in found if row in slower or row in cliffs or row in weakest]
    lines = [
        [
            row["workload"],
            _show(number(row, "eager_us"), 4),
            _show(number(row, "graphed_us"), 4),
            _percent(number(row, "share_of_read")),
            _show(number(row, "ratio_eager"), unit="×"),
            _show(number(row, "ratio_graphed"), unit="×"),
            row["verdict"],
            row["cliff"] or "–",
        ]
        for row in shown
    ]
    header = [
        "cell",
        "whole call, µs",
        "graphed, µs",
        "of a plain read",
        "eager : eager",
        "graphed : graphed",
        "no slower",
        "cliff",
    ]
    return text + markdown(header, lines)


def _special(found: Rows) -> str:
    lines = [
        [
            row["workload"],
            ", ".join(word for word in (row["variant"], row["mode"]) if word),
            _show(number(row, "median_us"), 4),
            _show(number(row, "tb_per_s")),
            row["value"] or "–",
            row["verdict"] or row["note"] or "–",
        ]
        for row in found
    ]
    return markdown(["claim", "case", "µs", "TB/s", "value", "target"], lines)


def _demo(found: Rows) -> str:
    lines = [
        [
            f"{row['rule']}, seed {row['seed']}",
            f"{number(row, 'accuracy'):.3f}",
            _show(number(row, "growth")),
            f"{number(row, 'grad_norm'):.1e}",
            _show(number(row, "credit_gain")),
            _show(number(row, "stability"), 2),
            row["verdict"],
            f"{number(row, 'points_over_frozen'):+.1f}" if row["rule"] != "frozen" else "–",
        ]
        for row in found
    ]
    header = ["network", "accuracy", "(a) growth", "(b) ‖g_L‖", "credit gain", "(c) cosine"]
    return markdown([*header, "verdict by (a)–(c)", "(d) points over frozen"], lines)


def _registers(found: Rows) -> str:
    columns = ["registers", "spill_stores", "spill_loads", "stack", "static_shared"]
    lines = [[f"`{row['kernel']}`", *(row[column] for column in columns)] for row in found]
    header = ["kernel", "registers", "spill stores, B", "spill loads, B", "stack, B", "shared, B"]
    return markdown(header, lines)


def _architectures(found: Rows) -> str:
    lines = []
    for row in sorted(found, key=lambda row: row["library"]):
        name = f"{row['workload']}, {row['input']}"
        if row["error"]:
            lines.append([name, row["error"], *["–"] * 9])
            continue
        lines.append(
            [
                name,
                row["chosen"] + (f" ({row['options']})" if row["options"] else ""),
                f"{row['asked']} / {row['saw']}",
                row["states"],
                f"{number(row, 'difference'):.0e}",
                f"{number(row, 'func_difference'):.0e}" if not row["func_reason"] else "refused",
                _show(number(row, "growth")),
                f"{number(row, 'grad_norm'):.1e}",
                _show(number(row, "stability"), 2),
                row["verdict"] + (f": {row['why']}" if row["why"] else ""),
                f"{_show(number(row, 'ratio'), unit='×')} of {_milliseconds(row, 'plain_us')}",
            ]
        )
    header = ["network, one sample", "taps", "asked / saw", "states", "difference", "by torch.func"]
    header += ["(a) growth", "(b) ‖g_L‖", "(c) cosine", "verdict", "time"]
    return markdown(header, lines)


def _milliseconds(row: dict[str, str], column: str) -> str:
    return _show(number(row, column) / 1000, unit=" ms")


def _architectures_in_short(found: Rows) -> str:
    good = [row for row in found if not row["error"]]
    alone = [row for row in good if not row["options"]]
    by_func = [row for row in good if not row["func_reason"]]
    worst = max(number(row, c) for row in by_func for c in ("difference", "func_difference"))
    verdicts = Counter(row["verdict"] for row in good)
    said = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    return (
        f"{len(found)} networks: {len(alone)} observed without any option, "
        f"{len(good) - len(alone)} with one, {len(found) - len(good)} refused. Largest relative "
        f"difference to the hooks {worst:.0e}, captured either way; torch.func refuses "
        f"{len(good) - len(by_func)}. At initialisation: {said}. Median time of a "
        f"capture {_show(median(number(row, 'ratio') for row in good), unit='×')} of the forward "
        f"and backward pass.\n"
    )


def _scan_report(found: Rows) -> str:
    lines = [
        [
            f"{row['case']}: {row['workload']}",
            _show(number(row, "median_s")),
            _show(number(row, "bytes") / 1e6),
            _show(number(row, "gb_per_s")),
            row.get("note") or (row["verdict"] and f"≤ {row['target_s']} s {row['verdict']}"),
        ]
        for row in found
    ]
    return markdown(["what", "s", "MB", "GB/s", "target"], lines)


def _study_rate(found: Rows) -> str:
    lines = [
        [
            f"{row['model']} {row['rule']}",
            row["variant"],
            row["jobs"],
            _show(number(row, "steps_per_s")),
            _show(number(row, "ratio"), unit="×"),
        ]
        for row in found
    ]
    return markdown(["network and rule", "steps", "runs at once", "steps/s", "of ordinary"], lines)


def _scan_rate(found: Rows) -> str:
    lines = []
    for row in found:
        target, ratio = number(row, "target"), number(row, "ratio")
        verdict = "" if math.isnan(target) else "met" if ratio >= target else "missed"
        lines.append(
            [
                f"{row['study']}: {row['variant']}",
                row["checkpoints"],
                _show(number(row, "ms_each")),
                _show(ratio, unit="×"),
                verdict and f"≥ {target:g}× {verdict}",
                row["stack"],
                _percent(number(row, "device_busy")),
            ]
        )
    header = [
        "study",
        "checkpoints",
        "ms each",
        "rate of the loop's",
        "target",
        "stack",
        "GPU busy",
    ]
    return markdown(header, lines)


def _reading(found: Rows) -> str:
    lines = [
        [
            row["case"],
            row["threads"],
            _show(number(row, "files_per_s")),
            _show(number(row, "gb_per_s")),
            _percent(number(row, "of_cat")),
            _show(number(row, "cpu_us")),
            row["verdict"] and f"{row['target']} {row['verdict']}",
        ]
        for row in found
    ]
    header = ["what", "threads", "files/s", "GB/s", "of one cat", "µs of a CPU", "target"]
    return markdown(header, lines)


def _steps(found: Rows) -> str:
    lines = []
    for row in found:
        percent, low, high = (
            number(row, name)
            for name in ("added_percent", "added_percent_p10", "added_percent_p90")
        )
        bare = row["variant"] == "bare step"
        spread = "" if math.isnan(low) else f" ({low:+.1f} to {high:+.1f})"
        memory = number(row, "added_peak_memory_percent")
        micro = number(row, "added_us")
        lines.append(
            [
                f"{row['workload']}: {row['variant']}",
                _show(number(row, "step_ms"), 4),
                "–" if bare or math.isnan(percent) else f"{percent:+.2f}%{spread}",
                "–" if bare or math.isnan(micro) else f"{micro:+.1f}",
                "–" if bare or math.isnan(memory) else f"{memory:+.2f}%",
                f"{row['target']}: {row['met']}" if row["target"] else "",
                row["note"],
            ]
        )
    header = ["training step", "ms", "added (p10 to p90)", "added, µs", "added peak memory"]
    return markdown([*header, "target", "note"], lines)


def _soak(found: Rows) -> str:
    lines = [
        [
            row["workload"],
            row["steps"],
            row["minutes"],
            f"{row['rss_start_mb']} → {row['rss_end_mb']}",
            row["rss_growth_bytes_per_step"],
            f"{row['device_start_mb']} → {row['device_end_mb']}",
            f"{row['target']}: {row['met']}",
        ]
        for row in found
    ]
    header = ["training", "steps", "minutes", "process, MB", "bytes a step", "device, MB", "target"]
    return markdown(header, lines)


def _calibration_counts(found: Rows, healthy: str) -> list[list[str]]:
    """Return a line per family, per half and for all: cases, wrong ones, the extreme figures."""
    chosen = [row for row in found if row["healthy"] == healthy]
    families = dict.fromkeys(row["family"] for row in chosen)
    groups = [(name, [row for row in chosen if row["family"] == name]) for name in families]
    groups += [(f"half {half}", [row for row in chosen if row["half"] == half]) for half in "AB"]
    groups.append(("all", chosen))
    lines = []
    for name, group in groups:
        growth = [v for row in group if math.isfinite(v := number(row, "growth"))]
        gain = [v for row in group if math.isfinite(v := number(row, "gain"))]
        extremes = (max, min) if healthy == "1" else (min, max)
        short = sum(row["verdict"] == "not enough data" for row in group)
        lines.append(
            [
                name,
                str(len(group)),
                str(sum(row["paper_wrong"] == "1" for row in group)),
                str(sum(row["wrong"] == "1" for row in group)),
                str(short),
                *(
                    _show(extreme(values)) if values else "–"
                    for extreme, values in zip(extremes, (growth, gain), strict=True)
                ),
            ]
        )
    return lines


def _calibration_in_short(found: Rows) -> str:
    parts = []
    for healthy, what, ends in (
        ("1", "false alarms", ("largest growth", "smallest gain")),
        ("0", "misses", ("smallest growth", "largest gain")),
    ):
        header = ["healthy" if healthy == "1" else "broken", "cases", f"{what}, paper"]
        header += [f"{what}, calibrated", "not enough data, calibrated", *ends]
        parts.append(markdown(header, _calibration_counts(found, healthy)))
    return "\n".join(parts)


def _calibration_list(found: Rows, healthy: str) -> str:
    lines = [
        [
            row["workload"],
            row["dtype"],
            _show(number(row, "paper_growth")),
            f"{number(row, 'grad_norm'):.1e}",
            _show(number(row, "stability"), 2),
            row["paper_verdict"],
            _show(number(row, "growth")),
            f"{number(row, 'gain'):.1e}",
            f"**{row['verdict']}**" if row["wrong"] == "1" else row["verdict"],
            row["cause"] or "–",
        ]
        for row in found
        if row["healthy"] == healthy
    ]
    header = ["case", "dtype", "growth", "‖g_L‖", "(c)", "paper", "RMS growth", "gain"]
    return markdown([*header, "calibrated", "cause"], lines)


def _calibration_healthy(found: Rows) -> str:
    return _calibration_list(found, "1")


def _calibration_broken(found: Rows) -> str:
    return _calibration_list(found, "0")


# Name between the markers: the CSVs' name, and what makes the table of one of them.
TABLES: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "operator": ("operator", _operator),
    "variants": ("operator", _variants),
    "cosines": ("operator", _cosines),
    "ceilings": ("operator", _ceilings),
    "cpu": ("cpu", _cpu),
    "cpu-sweep": ("cpu-sweep", _cpu_sweep),
    "sweep": ("sweep", _sweep),
    "special": ("special", _special),
    "demo": ("demo", _demo),
    "registers": ("registers", _registers),
    "architectures": ("architectures", _architectures),
    "architectures-in-short": ("architectures", _architectures_in_short),
    "calibration-in-short": ("calibration", _calibration_in_short),
    "calibration-healthy": ("calibration", _calibration_healthy),
    "calibration-broken": ("calibration", _calibration_broken),
    "scan-report": ("scan-report", _scan_report),
    "scan-rate": ("scan-rate", _scan_rate),
    "study-rate": ("study-rate", _study_rate),
    "reading": ("reading", _reading),
    "steps": ("steps", _steps),
    "steps-soak": ("steps-soak", _soak),
}


def _origin(found: Rows) -> str:
    """Return one line on where rows come from; of rows of several runs, each run's."""
    machines: dict[tuple[str, ...], dict[tuple[str, ...], None]] = {}
    for row in found:
        machine = (row["device"], f"torch {row['torch']}", f"Python {row['python']}")
        run = (
            f"commit {row['commit']}",
            row["date"][:10],
            f"`{row['command']}`",
            f"load per core {row['load']}",
        )
        machines.setdefault(machine, {})[run] = None
    return (
        "; ".join(
            ", ".join((*machine, "; ".join(", ".join(run) for run in runs)))
            for machine, runs in machines.items()
        )
        + "\n"
    )


def render(name: str, found: Rows) -> str:
    """Return a table of one device's rows, with their origin above."""
    return f"{_origin(found)}\n{TABLES[name][1](found)}"


def tables_of(path: Path) -> str:
    """Return all tables that are made of one CSV."""
    stem = path.stem.split("_")[0]
    found = rows.read(path)
    return "\n".join(render(name, found) for name, (csv, _) in TABLES.items() if csv == stem)


def csvs(results: Path, stem: str) -> list[Path]:
    """Return the CSVs of a name, one per device, without those of quick runs."""
    paths = sorted(results.glob(f"{stem}_*.csv"))
    return [path for path in paths if not path.stem.endswith("_quick")]


def fill(text: str, results: Path) -> str:
    """Return a file's text with every marked table made anew.

    Raises:
        ValueError: a marker names no table, or its end is missing.
    """
    complete = {match.group(1) for match in _MARKED.finditer(text)}
    for name in _BEGIN.findall(text):
        if name not in TABLES:
            raise ValueError(f"tables: no table {name!r}; there are {', '.join(TABLES)}")
        if name not in complete:
            raise ValueError(f"tables: <!-- begin:{name} --> has no <!-- end:{name} -->")

    def replacement(match: re.Match[str]) -> str:
        name = match.group(1)
        parts = [render(name, rows.read(path)) for path in csvs(results, TABLES[name][0])]
        body = "\n".join(parts) or "Not measured yet.\n"
        return f"<!-- begin:{name} -->\n{body}<!-- end:{name} -->"

    return _MARKED.sub(replacement, text)


def update(results: Path, check: bool = False, files: Sequence[Path] = FILES) -> list[Path]:
    """Fill the marked tables of README files; return those that were stale.

    Args:
        results: the folder of the CSVs.
        check: leave the files as they are.
        files: the files to look at; one that is absent is skipped.
    """
    stale = []
    for file in files:
        if not file.exists():
            continue
        text = file.read_text(encoding="utf-8")
        filled = fill(text, results)
        if filled != text:
            stale.append(file)
            if not check:
                file.write_text(filled, encoding="utf-8")
    return stale
