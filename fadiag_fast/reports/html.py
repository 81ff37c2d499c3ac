"""Show a scan as one HTML file that needs no network, at ten checkpoints or ten thousand.

The page gets the rows as compact JSON and draws what is in view: the visible lines of a table, and
curves and heat maps on canvases. Everything that comes from a file or a path is put in as text, by
jinja's escaping or by ``textContent``; a content security policy allows the page's own script and
style by their hashes, and nothing from anywhere else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from .._common.extras import require
from .._common.files import whole_file
from .._common.jsonio import strict
from ..protocol import NOT_ENOUGH_DATA, TRUSTWORTHY
from ..scanning.records import AUDITED, Row, utc_now
from ..scanning.results import KEYS, FirstFired, ScanResult, in_time
from ..scanning.schema import SCHEMA_VERSION
from ..scanning.store import layers_by_record

# Five figures of a million states are some 40 MB of JSON, which take a browser a second; beyond,
# the heat maps show evenly chosen checkpoints of each run, and say so.
MOST_STATES = 400_000

_CHECKPOINT_FIGURES = ("growth", "grad_norm", "credit_gain", "stability", "accuracy")
_LAYER_FIGURES = ("hidden_norm", "growth", "grad_norm", "credit_gain", "stability")
_DIAGNOSTICS = {
    "a": ("scale growth", "largest ‖h<sub>l+1</sub>‖ / ‖h<sub>l</sub>‖"),
    "b": ("gradient floor", "‖g<sub>L</sub>‖, deepest state"),
    "c": ("direction stability", "cosine between batches"),
    "d": ("depth utility", "points over frozen blocks"),
}


def write_report(
    result: ScanResult, path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Write the report of a scan.

    Args:
        result: the rows.
        path: the HTML file; an existing one is replaced once the new one is whole.
        title: heading; by default the scan's folder.

    Raises:
        MissingExtra: jinja2 is not installed.
        OSError: the file cannot be written.
    """
    with whole_file(path) as partial:
        partial.write_text(render(result, title=title), encoding="utf-8")
    return Path(path)


def render(result: ScanResult, *, title: str | None = None, most_states: int = MOST_STATES) -> str:
    """Return the report of a scan as HTML; see :func:`write_report`."""
    jinja2 = require("jinja2", "the HTML report")
    templates = files("fadiag_fast.reports").joinpath("templates")
    style, script, page = (
        templates.joinpath(name).read_text(encoding="utf-8")
        for name in ("report.css", "report.js", "report.html.jinja")
    )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["count"] = lambda number: f"{number:,}"
    heading = title or (result.folder.resolve().name if result.folder else "scan")
    markup = require("markupsafe", "the HTML report").Markup
    context = {
        "title": heading,
        "summary": _summary(result),
        "provenance": provenance(result),
        "style": markup(style),
        "script": markup(script),
        "style_hash": _csp_hash(style),
        "script_hash": _csp_hash(script),
        "data": markup(_json(page_data(result, most_states))),
    }
    return str(environment.from_string(page).render(context))


def _csp_hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """Return JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _figure(value: float | None) -> float | str | None:
    """Return a number as the page reads it: four digits, non-finite ones by name."""
    if value is None:
        return None
    rounded: float | str = strict(float(f"{value:.4g}"))
    return rounded


def _figures(values: Iterable[float | None]) -> list[float | str | None]:
    return [_figure(value) for value in values]


def _summary(result: ScanResult) -> dict[str, Any]:
    """Return what the page says without its script."""
    audited = [row for row in result.rows if row["status"] == AUDITED]
    total = len(result)
    counts = {
        "trustworthy": sum(row["verdict"] == TRUSTWORTHY for row in audited),
        "short": sum(row["verdict"] == NOT_ENOUGH_DATA for row in audited),
        "failed": total - len(audited),
    }
    counts["walk-back"] = len(audited) - counts["trustworthy"] - counts["short"]
    bars, start = [], 0.0
    for kind, label in (
        ("trustworthy", "trustworthy"),
        ("walk-back", "need walk-back"),
        ("short", "not enough data"),
        ("failed", "failed"),
    ):
        share = 100.0 * counts[kind] / total if total else 0.0
        bars.append(
            {
                "kind": kind,
                "label": label,
                "count": counts[kind],
                "share": round(share, 1),
                "start": round(start, 3),
                "width": round(share, 3),
            }
        )
        start += share
    diagnostics = []
    for key in KEYS:
        judged = [row for row in audited if row[f"{key}_status"] in ("passed", "fired")]
        fired = sum(row[f"{key}_status"] == "fired" for row in judged)
        name, figure = _DIAGNOSTICS[key]
        diagnostics.append(
            {
                "key": key,
                "name": name,
                "figure": figure,
                "fired": fired,
                "judged": len(judged),
                "width": round(100.0 * fired / len(judged), 3) if judged else 0,
            }
        )
    return {
        "total": total,
        "audited": len(audited),
        "runs": len(result.runs()),
        "bars": bars,
        "diagnostics": diagnostics,
        "verdicts": list(result.verdict_counts().items()),
        "failures": [
            {"kind": kind, "count": len(rows), "path": rows[0]["path"], "error": rows[0]["error"]}
            for kind, rows in result.failures().items()
        ],
    }


def provenance(result: ScanResult) -> dict[str, Any]:
    """Return what made the rows and what that cost, as a report says it."""
    rows = result.rows
    audited = [row for row in rows if row["status"] == AUDITED]

    def counted(column: str) -> list[tuple[str, int]]:
        return Counter(str(row[column]) for row in rows if row[column]).most_common()

    spans: dict[datetime, datetime] = {}
    for row in rows:
        start, end = row["session_started_at"], row["finished_at"]
        if start is not None and end is not None:
            spans[start] = max(end, spans.get(start, end))
    wall = sum((max(end - start, timedelta()) for start, end in spans.items()), timedelta())
    seconds, size = wall.total_seconds(), sum(row["bytes"] or 0 for row in rows)
    limits = result.thresholds
    texts = {row["config_hash"]: row["config"] for row in rows}
    facts = [
        ("folder", str(result.folder) if result.folder else "–"),
        ("first started", _time(min(spans, default=None))),
        ("last finished", _time(max(spans.values(), default=None))),
        ("sessions", f"{len(spans):,}"),
        ("wall time", _duration(seconds)),
        ("time of the audits", _duration(sum(row["seconds"] or 0.0 for row in rows))),
        ("read", _bytes(size)),
        ("rate", f"{len(rows) / seconds:,.1f} checkpoints/s, {_bytes(size / seconds)}/s")
        if seconds > 0
        else ("rate", "–"),
        ("per checkpoint", _duration(seconds / len(rows)) if rows else "–"),
        *([("protocol", result.protocol)] if result.protocol != "paper" else []),
        ("thresholds", _limits_text(limits)),
        ("schema", f"version {SCHEMA_VERSION}"),
        ("report written", _time(utc_now())),
    ]
    return {
        "facts": facts,
        "counted": [
            (name, counted(column))
            for name, column in (
                ("fadiag_fast", "fadiag_fast"),
                ("torch", "torch"),
                ("device", "device"),
            )
        ],
        "configurations": [
            {"hash": digest, "count": count, "text": _pretty(texts[digest])}
            for digest, count in result.configurations().items()
        ],
        "audited": len(audited),
    }


def _limits_text(limits: Any) -> str:
    return (
        f"(a) > {limits.scale_growth:g}, (b) < {limits.gradient_floor:g}, "
        f"(c) > {limits.direction_stability:g} over at least {limits.min_batches} batches, "
        f"(d) < {limits.depth_utility:g} points; credit gain < {limits.credit_gain_floor:g}"
    )


def _pretty(text: str | None) -> str:
    try:
        return json.dumps(json.loads(text or "{}"), indent=2, ensure_ascii=False)
    except ValueError:
        return text or ""


def _time(moment: datetime | None) -> str:
    return "–" if moment is None else moment.strftime("%Y-%m-%d %H:%M:%S UTC")


def _duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


class _Words:
    """Texts that repeat, each stored once."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self._places: dict[str, int] = {}

    def place(self, text: str | None) -> int | None:
        if text is None:
            return None
        if text not in self._places:
            self._places[text] = len(self.words)
            self.words.append(text)
        return self._places[text]


def page_data(result: ScanResult, most_states: int = MOST_STATES) -> dict[str, Any]:
    """Return what the page's script reads: columns, each figure to four digits.

    Numbers that JSON has no word for are ``"nan"``, ``"inf"`` and ``"-inf"``; null is "none".
    """
    rows = result.rows
    runs = result.runs()
    run_place = {run: index for index, run in enumerate(runs)}
    words = _Words()
    checkpoints: dict[str, list[Any]] = {
        "run": [run_place[row["run"]] for row in rows],
        "step": [row["step"] for row in rows],
        "path": [row["path"] for row in rows],
        "outcome": [
            words.place(row["verdict"] if row["status"] == AUDITED else row["error_kind"])
            for row in rows
        ],
        "kind": [_kind(row) for row in rows],
        "fired": [
            sum(1 << bit for bit, key in enumerate(KEYS) if row[f"{key}_status"] == "fired")
            for row in rows
        ],
        "text": [
            words.place("\n".join(row["remarks"] or [])) if not row["error"] else row["error"]
            for row in rows
        ],
        "hash": [(row["content_hash"] or "").partition(":")[2] for row in rows],
        "device": [words.place(row["device"]) for row in rows],
        "seconds": _figures(row["seconds"] for row in rows),
        "bytes": [row["bytes"] for row in rows],
        "finished": [
            int(row["finished_at"].timestamp()) if row["finished_at"] else None for row in rows
        ],
        "utility": _figures(row["depth_utility"] for row in rows),
    }
    for name in _CHECKPOINT_FIGURES:
        checkpoints[name] = _figures(row[name] for row in rows)
    layers, every = _layer_data(result, most_states)
    limits = result.thresholds
    fired = result.first_fired()
    return {
        "words": words.words,
        "runs": list(runs),
        "first": [[_fired_text(fired[run][key]) for key in KEYS] for run in runs],
        "end": [_end(run_rows) for run_rows in runs.values()],
        "checkpoints": checkpoints,
        "layers": layers,
        "everyNth": every,
        "thresholds": {
            "growth": limits.scale_growth,
            "grad_norm": limits.gradient_floor,
            "credit_gain": limits.credit_gain_floor,
            "stability": limits.direction_stability,
        },
    }


def _kind(row: Row) -> int:
    """Return 0 for trustworthy, 1 for walk-back, 2 for not enough data, 3 for a failure."""
    if row["status"] != AUDITED:
        return 3
    return {TRUSTWORTHY: 0, NOT_ENOUGH_DATA: 2}.get(row["verdict"], 1)


def _end(rows: Sequence[Row]) -> int | None:
    """Return the place of the row that says how a run ended: its last audited one."""
    audited = [row for row in in_time(rows) if row["status"] == AUDITED]
    last = (audited or list(rows))[-1]
    return next(index for index, row in enumerate(rows) if row is last)


def _fired_text(fired: FirstFired) -> list[Any]:
    """Return the text of a cell and the number it is sorted by."""
    order: float | None = None
    if fired.first is not None:
        order = fired.first.step if fired.first.step is not None else 0
    return [str(fired), order, fired.stayed is not None]


def _layer_data(result: ScanResult, most_states: int) -> tuple[dict[str, Any], int]:
    """Return the layers' figures of every n-th checkpoint of a run, and that n."""
    table = result.to_arrow("layers")
    where = layers_by_record(table)
    rows = result.rows
    names = _Words()
    columns = {name: table[name].to_numpy() for name in _LAYER_FIGURES}
    missing = {name: np.asarray(table[name].is_null()) for name in _LAYER_FIGURES}
    layer_names = table["name"].to_pylist()
    stride = max(1, math.ceil(table.num_rows / most_states))
    places: list[int] = []
    kinds: list[int] = []
    taken: list[int] = []
    in_run, last_run = 0, None
    for index, row in enumerate(rows):
        in_run = in_run + 1 if row["run"] == last_run else 0
        last_run = row["run"]
        span = where.get(row["record"])
        if span is None or in_run % stride:
            continue
        start, count = span
        key = json.dumps(layer_names[start : start + count])
        kind = names.place(key)
        assert kind is not None
        places.append(index)
        kinds.append(kind)
        taken.extend(range(start, start + count))
    data: dict[str, Any] = {
        "names": [json.loads(key) for key in names.words],
        "row": places,
        "kind": kinds,
    }
    for name in _LAYER_FIGURES:
        values, absent = columns[name], missing[name]
        data[name] = [None if absent[i] else _figure(float(values[i])) for i in taken]
    return data, stride
