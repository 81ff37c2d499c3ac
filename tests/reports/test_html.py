"""The report: one offline file, in which names from outside are text, and which works."""

import base64
import hashlib
import html
import json
import math
import re
import shutil
import subprocess

import pytest

pytest.importorskip("pyarrow", reason="needs the extra 'scan'")
pytest.importorskip("jinja2", reason="needs the extra 'scan'")

from studies import CONFIG, figures, record

from benchmarks import study
from benchmarks.scan_report import CHROMIUM_OPTIONS
from fadiag_fast.reports.html import page_data, render, write_report
from fadiag_fast.scanning import ScanResult, ScanWriter

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
OPTIONS = (
    *CHROMIUM_OPTIONS,
    "--enable-logging=stderr",
    "--window-size=1280,1400",
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")

HOSTILE = (
    "</script><script>document.documentElement.dataset.hacked=1</script>"
    "<img src=x onerror='document.documentElement.dataset.hacked=2'>\"'&{{ 7*7 }}\u2028<!--"
)


def scan_of(folder, count, **options):
    with ScanWriter(folder) as writer:
        writer.add(*study.records(count, writer.configure(study.CONFIG), **options))
    return ScanResult.load(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return scan_of(tmp_path_factory.mktemp("small"), 40, per_run=10, faulty=0.1)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Every text that comes from outside is an attack."""
    folder = tmp_path_factory.mktemp("hostile")
    with ScanWriter(folder) as writer:
        config = writer.configure({**CONFIG, HOSTILE: HOSTILE})
        attack = {"run": HOSTILE, "path": f"runs/{HOSTILE}/1.pt", "device": HOSTILE}
        given = figures(growth=math.inf, grad=math.nan)
        given = type(given)(**{**vars(given), "layers": (HOSTILE,) * 3})
        writer.add(record(config, 0, given, **attack, remarks=[HOSTILE]))
        attack["path"] += "x"
        writer.add(record(config, 1, **attack, error_kind=HOSTILE, error=HOSTILE))
    return ScanResult.load(folder)


def embedded(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(text)


def test_the_page_loads_nothing(small):
    page = render(small)
    assert not re.findall(r"https?:|//cdn|@import|url\(|\bsrc=|fetch\(|XMLHttp|WebSocket", page)
    assert re.findall(r"<link[^>]*>", page) == ['<link rel="icon" href="data:,">']


def test_the_security_policy_names_the_pages_own_script_and_style(small):
    page = render(small)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'")
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policy


def test_hostile_names_are_text(hostile):
    page = render(hostile, title=HOSTILE)
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page
    assert "<!--" not in page
    assert "{{ 7*7 }}" in html.unescape(page)
    data = embedded(page)
    assert data["runs"] == [HOSTILE]
    assert data["layers"]["names"] == [[HOSTILE] * 3]


def test_the_summary_needs_no_script(small):
    page = render(small, title="my study")
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page.split("<noscript>")[0])).split())
    failed = sum(len(rows) for rows in small.failures().values())
    assert failed > 0
    assert f"{40 - failed} of 40 checkpoints audited in 4 runs" in text
    assert "my study" in text
    for kind in small.failures():
        assert kind in text
    tail = html.unescape(page)
    for expected in ("time of the audits", "torch", '"model": "resmlp"', "(a) > 50"):
        assert expected in tail


def test_the_page_has_every_row_and_figure(small):
    data = embedded(render(small))
    assert data["checkpoints"]["path"] == [row["path"] for row in small.rows]
    for name in ("growth", "grad_norm", "stability", "accuracy"):
        for given, row in zip(data["checkpoints"][name], small.rows, strict=True):
            assert given == (None if row[name] is None else pytest.approx(row[name], rel=1e-3))
    audited = sum(row["status"] == "audited" for row in small.rows)
    assert len(data["layers"]["row"]) == audited
    assert len(data["layers"]["hidden_norm"]) == 5 * audited
    assert len(data["first"]) == len(data["end"]) == len(data["runs"]) == 4


def test_figures_without_a_number_are_named(hostile):
    data = page_data(hostile)
    assert data["checkpoints"]["growth"] == ["Infinity", None]
    assert data["checkpoints"]["grad_norm"] == ["NaN", None]
    json.dumps(data, allow_nan=False)


def test_too_many_states_are_thinned_per_run(small):
    data = page_data(small, most_states=60)
    assert data["everyNth"] == 4
    runs = [data["checkpoints"]["run"][row] for row in data["layers"]["row"]]
    assert {runs.count(run) for run in range(4)} <= {2, 3}


def test_an_empty_scan_and_one_of_failures_alone(tmp_path):
    with ScanWriter(tmp_path) as writer:
        assert "0 of 0 checkpoints" in render(ScanResult.load(tmp_path))
        config = writer.configure(CONFIG)
        writer.add(record(config, 0, error_kind="missing", error="gone"))
    assert "0 of 1 checkpoints audited in 1 run," in render(ScanResult.load(tmp_path))


def test_ten_thousand_checkpoints_stay_a_small_file(tmp_path):
    page = write_report(scan_of(tmp_path / "scan", 10_000), tmp_path / "r.html")
    assert page.stat().st_size < 6e6
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ""] == ["r.html"]
    if CHROMIUM is not None:
        tag, _ = opened(page, tmp_path)
        assert 'data-rows="10000"' in tag
        assert "data-ready=" in tag


def opened(page, folder):
    """Open a page; return its <html …> and what the browser complained of."""
    done = subprocess.run(
        [CHROMIUM, *OPTIONS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    tag = re.search(r"<html[^>]*>", done.stdout)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return (tag.group(0) if tag else ""), complaints


@needs_chromium
def test_hostile_names_do_nothing_in_a_browser(hostile, tmp_path):
    page = write_report(hostile, tmp_path / "r.html", title=HOSTILE)
    tag, complaints = opened(page, tmp_path)
    assert "data-ready=" in tag
    assert "data-error" not in tag
    assert "data-hacked" not in tag
    assert complaints == []


STEPS = """
const all = (selector) => [...document.querySelectorAll(selector)];
const lines = (table) => all(`#${table} tbody tr[data-at]`);
const cell = (table, line, column) => lines(table)[line].children[column].textContent;
const press = (target, key) =>
  target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const result = {};
const step = all("#table th")[1];
step.querySelector("button").click();
step.querySelector("button").click();
result.sorted = [step.getAttribute("aria-sort"), cell("table", 0, 1)];
const filter = document.getElementById("outcome");
filter.value = "3";
filter.dispatchEvent(new Event("change"));
result.failed = document.getElementById("count").textContent;
filter.value = "";
filter.dispatchEvent(new Event("change"));
const first = lines("table")[0];
first.focus();
press(first, "ArrowDown");
result.focused = document.activeElement.dataset.at;
press(document.activeElement, "End");
result.last = document.activeElement.dataset.at;
press(document.activeElement, "Enter");
const dialog = document.getElementById("details");
result.dialog = [dialog.open, dialog.querySelectorAll("tbody tr").length > 0];
dialog.close();
lines("runs-table")[1].click();
result.run = [document.getElementById("run-name").value, lines("runs-table")[1].ariaSelected];
const chart = all("#charts canvas")[0];
press(chart, "ArrowRight");
press(chart, "ArrowRight");
result.tip = chart.parentElement.querySelector(".tip").textContent;
result.label = chart.getAttribute("aria-label");
const only = document.getElementById("only-run");
only.click();
result.only = document.getElementById("count").textContent;
document.querySelector("#figures input[value=grad_norm]").click();
const heat = document.querySelector("#heat canvas");
press(heat, "ArrowRight");
press(heat, "ArrowDown");
result.heat = document.querySelector("#heat .tip").textContent;
const theme = document.getElementById("theme");
theme.click();
theme.click();
result.theme = document.documentElement.dataset.theme;
result.unlabelled = all("input, select, button, canvas").filter((element) =>
  !(element.labels?.length || element.textContent.trim() || element.ariaLabel || element.ariaHidden)
).length;
document.documentElement.dataset.result = JSON.stringify(result);
"""


@needs_chromium
def test_the_page_works_by_keyboard_and_mouse(small, tmp_path):
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render(small))
    file = tmp_path / "r.html"
    file.write_text(page.replace("</body>", f"<script>{STEPS}</script></body>"), encoding="utf-8")
    tag, complaints = opened(file, tmp_path)
    assert complaints == []
    assert "data-error" not in tag
    (text,) = re.findall(r'data-result="([^"]*)"', tag)
    result = json.loads(html.unescape(text))
    failed = sum(len(rows) for rows in small.failures().values())
    steps = [row["step"] for row in small.rows]
    runs = list(small.runs())
    assert result["sorted"] == ["descending", f"{max(steps):,}"]
    assert result["failed"] == f"{failed} of 40"
    assert (result["focused"], result["last"]) == ("1", "39")
    assert result["dialog"] == [True, small.rows[0]["status"] == "audited"]
    assert result["run"] == [runs[1], "true"]
    assert result["tip"].startswith(f"{runs[1]}, step 250\n")
    assert f"Growth, {runs[1]}:" in result["label"]
    assert result["only"] == "10 of 40"
    assert result["heat"].startswith(f"{runs[1]}, step 0\nh_1 blocks.0: ")
    assert result["theme"] == "dark"
    assert result["unlabelled"] == 0
