"use strict";
(() => {
  const root = document.documentElement;
  window.addEventListener("error", (event) => { root.dataset.error = event.message; });

  const data = JSON.parse(document.getElementById("data").textContent);
  const rows = data.checkpoints;
  const total = rows.run.length;
  const runs = data.runs;
  const KINDS = ["trustworthy", "walk-back", "short", "failed"];
  const LABELS = ["trustworthy", "needs walk-back", "not enough data", "failed"];
  const COLOURS = ["--good", "--bad", "--short", "--failed"];
  const LETTERS = ["a", "b", "c", "d"];

  // Numbers that JSON has no word for come by name.
  const NAMED = { NaN: NaN, Infinity: Infinity, "-Infinity": -Infinity };
  const decode = (column) => column.map((value) => (typeof value === "string" ? NAMED[value] : value));
  for (const name of ["growth", "grad_norm", "credit_gain", "stability", "accuracy", "utility", "seconds"]) {
    rows[name] = decode(rows[name]);
  }
  const layers = data.layers;
  for (const name of ["hidden_norm", "growth", "grad_norm", "credit_gain", "stability"]) {
    layers[name] = decode(layers[name]);
  }
  const layerStart = [];
  const shownAt = new Map();
  {
    let start = 0;
    layers.kind.forEach((kind, index) => {
      layerStart.push(start);
      shownAt.set(layers.row[index], index);
      start += layers.names[kind].length;
    });
  }

  // The rows of a run stand together.
  const runStart = new Array(runs.length + 1).fill(total);
  for (let row = total - 1; row >= 0; row--) runStart[rows.run[row]] = row;
  for (let run = runs.length - 1; run >= 0; run--) runStart[run] = Math.min(runStart[run], runStart[run + 1]);
  const endRow = (run) => runStart[run] + data.end[run];
  const runHasSteps = runs.map((_, run) => {
    for (let row = runStart[run]; row < runStart[run + 1]; row++) if (rows.step[row] !== null) return true;
    return false;
  });
  // Where a run has no steps, the position stands for them; a row without one among others is left out.
  const stepOf = (row) => (rows.step[row] !== null ? rows.step[row] : runHasSteps[rows.run[row]] ? null : row - runStart[rows.run[row]]);

  const loneRuns = runs.length > 1 && runs.every((_, run) => runStart[run + 1] - runStart[run] === 1);

  const state = { run: -1, figure: "hidden_norm" };
  const byId = (id) => document.getElementById(id);
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") element.className = value;
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  };
  // g_L and h_{l+1} with their subscripts.
  const math = (text) => text.split(/_\{?([\w+]+)\}?/).map((piece, at) => (at % 2 ? make("sub", {}, piece) : piece));
  const whole = (number) => number.toLocaleString("en");
  const show = (value, digits = 3) => {
    if (value === null || value === undefined) return "–";
    if (Number.isNaN(value)) return "nan";
    if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-2 || size >= 1e5)) return value.toExponential(digits - 1).replace(/\.?0+e/, "e").replace("e+", "e").replaceAll("-", "−");
    if (size >= 1e4) return whole(Number(value.toPrecision(digits))).replace("-", "−");
    return String(Number(value.toPrecision(digits))).replace("-", "−");
  };
  const percent = (value) => (value === null ? "–" : Number.isNaN(value) ? "nan" : `${(100 * value).toFixed(1)} %`);
  const points = (value) => (value === null ? "–" : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(1)}`);
  const stepText = (row) => (rows.step[row] === null ? "–" : whole(rows.step[row]));
  const outcome = (row) => (rows.kind[row] === 3 ? `failed: ${data.words[rows.outcome[row]]}` : data.words[rows.outcome[row]]);
  const note = (row) => (typeof rows.text[row] === "number" ? data.words[rows.text[row]] : rows.text[row]) || "";
  const pill = (kind, text) => make("span", { class: `pill kind-${KINDS[kind]}` }, make("i", { "aria-hidden": "true" }), make("span", {}, text));

  // ---------------------------------------------------------------------------------------- theme
  const themes = ["auto", "light", "dark"];
  const themeButton = byId("theme");
  let theme = 0;
  const repaint = [];
  let colours = {};
  const readColours = () => {
    const style = getComputedStyle(root);
    colours = {};
    for (const name of ["--page", "--card", "--ink", "--soft", "--line", "--faint", "--good", "--bad", "--short", "--failed", "--bad-wash"]) {
      colours[name] = style.getPropertyValue(name).trim();
    }
  };
  const paintAll = () => { readColours(); for (const paint of repaint) paint(); };
  const setTheme = (next) => {
    theme = next;
    if (themes[theme] === "auto") delete root.dataset.theme;
    else root.dataset.theme = themes[theme];
    themeButton.textContent = `Theme: ${themes[theme]}`;
    paintAll();
  };
  themeButton.hidden = false;
  themeButton.addEventListener("click", () => setTheme((theme + 1) % themes.length));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paintAll);

  // An observer reports once at its start too, when everything has just been drawn.
  const onResize = (element, draw) => {
    let width = null;
    new ResizeObserver(() => {
      const changed = width !== null && width !== element.clientWidth;
      width = element.clientWidth;
      if (changed) draw();
    }).observe(element);
  };

  // --------------------------------------------------------------------------------------- tables
  const ROW_HEIGHT = 35;

  // A table of which only the lines in view exist, sorted by its headers and walked by the arrows.
  class Grid {
    constructor(host, columns, options) {
      Object.assign(this, { host, columns, options, rows: [], order: [], sorted: -1, down: false, active: 0, chosen: -1 });
      this.table = make("table", { role: "grid", "aria-label": options.label });
      const group = make("colgroup");
      const line = make("tr");
      columns.forEach((column, index) => {
        const width = make("col");
        width.style.width = column.width;
        group.append(width);
        const button = make("button", { type: "button", title: column.help || column.title }, ...math(column.title));
        button.addEventListener("click", () => this.sort(index, this.sorted === index ? !this.down : Boolean(column.downFirst)));
        const head = make("th", { scope: "col", class: column.number ? "number" : "", "aria-sort": "none" }, button);
        line.append(head);
      });
      this.heads = [...line.children];
      this.body = make("tbody");
      this.table.append(group, make("thead", {}, line), this.body);
      host.append(this.table);
      host.addEventListener("scroll", () => this.draw());
      onResize(host, () => this.draw());
      this.body.addEventListener("click", (event) => {
        const found = event.target.closest("tr[data-at]");
        if (found) this.open(Number(found.dataset.at), false);
      });
      this.body.addEventListener("keydown", (event) => this.key(event));
    }
    set(found) {
      this.rows = found;
      this.active = 0;
      this.host.scrollTop = 0;
      this.arrange();
    }
    sort(index, down) {
      this.sorted = index;
      this.down = down;
      this.heads.forEach((head, at) => head.setAttribute("aria-sort", at !== index ? "none" : down ? "descending" : "ascending"));
      this.arrange();
    }
    arrange() {
      this.order = this.rows.slice();
      if (this.sorted >= 0) {
        const value = this.columns[this.sorted].value;
        const keys = new Map(this.rows.map((row) => [row, value(row)]));
        const sign = this.down ? -1 : 1;
        const absent = (key) => key === null || key === undefined || Number.isNaN(key);
        const compare = typeof keys.get(this.rows[0]) === "string" || this.columns[this.sorted].text
          ? new Intl.Collator("en", { numeric: true }).compare
          : (a, b) => (a < b ? -1 : a > b ? 1 : 0);
        this.order.sort((a, b) => {
          const [x, y] = [keys.get(a), keys.get(b)];
          // What has no value stands last, whichever way the rest is sorted.
          if (absent(x) || absent(y)) return absent(x) - absent(y) || a - b;
          return sign * compare(x, y) || a - b;
        });
      }
      this.table.setAttribute("aria-rowcount", String(this.order.length + 1));
      const visible = Math.min(Math.max(this.order.length, 2), this.options.lines);
      this.host.style.height = `${visible * ROW_HEIGHT + 39}px`;
      this.drawn = "";
      this.draw();
    }
    draw() {
      const first = Math.max(0, Math.floor(this.host.scrollTop / ROW_HEIGHT) - 6);
      const last = Math.min(this.order.length, first + this.options.lines + 14);
      const key = `${first},${last},${this.chosen}`;
      if (key === this.drawn) return;
      this.drawn = key;
      const focused = this.body.contains(document.activeElement);
      const lines = [];
      const spacer = (count) => {
        const cell = make("td", { colspan: this.columns.length });
        cell.style.height = `${count * ROW_HEIGHT}px`;
        const line = make("tr", { class: "spacer", "aria-hidden": "true" }, cell);
        return line;
      };
      if (first > 0) lines.push(spacer(first));
      for (let at = first; at < last; at++) {
        const row = this.order[at];
        const line = make("tr", { "data-at": at, "aria-rowindex": at + 2, tabindex: at === this.active ? 0 : -1, "aria-selected": row === this.chosen });
        for (const column of this.columns) {
          const cell = make("td", column.number ? { class: "number" } : {});
          const content = column.cell(row, cell);
          if (typeof content === "string") { cell.textContent = content; cell.title = content; } else cell.append(content);
          line.append(cell);
        }
        lines.push(line);
      }
      if (last < this.order.length) lines.push(spacer(this.order.length - last));
      if (!this.order.length) lines.push(make("tr", { class: "empty" }, make("td", { colspan: this.columns.length }, "Nothing matches.")));
      this.body.replaceChildren(...lines);
      if (focused) this.focus();
      else if (!this.line(this.active) && last > first) lines.find((line) => line.dataset.at).tabIndex = 0;
    }
    line(at) { return this.body.querySelector(`tr[data-at="${at}"]`); }
    focus() { const line = this.line(this.active); if (line) line.focus({ preventScroll: true }); }
    go(at) {
      this.active = Math.min(Math.max(at, 0), this.order.length - 1);
      const top = this.active * ROW_HEIGHT;
      const inside = this.host.clientHeight - 39;
      if (top < this.host.scrollTop) this.host.scrollTop = top;
      else if (top + ROW_HEIGHT > this.host.scrollTop + inside) this.host.scrollTop = top + ROW_HEIGHT - inside;
      this.drawn = "";
      this.draw();
      for (const line of this.body.querySelectorAll("tr[data-at]")) line.tabIndex = Number(line.dataset.at) === this.active ? 0 : -1;
      this.focus();
    }
    key(event) {
      const line = event.target.closest("tr[data-at]");
      if (!line) return;
      const at = Number(line.dataset.at);
      const page = this.options.lines - 1;
      const moves = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: this.order.length - 1 };
      if (event.key in moves) { event.preventDefault(); this.go(moves[event.key]); }
      else if (event.key === "Enter" || event.key === " ") { event.preventDefault(); this.open(at, true); }
    }
    open(at, byKey) {
      this.active = at;
      this.options.open(this.order[at], byKey);
    }
    choose(row) {
      this.chosen = row;
      const at = this.order.indexOf(row);
      const top = at * ROW_HEIGHT;
      const inside = this.host.clientHeight - 39;
      if (at >= 0 && (top < this.host.scrollTop || top + ROW_HEIGHT > this.host.scrollTop + inside)) this.host.scrollTop = top;
      this.drawn = "";
      this.draw();
    }
  }

  const whenIdle = (action) => { let timer; return () => { clearTimeout(timer); timer = setTimeout(action, 80); }; };

  // Runs
  const firedCell = (index) => (run, cell) => {
    const [text, order, stayed] = data.first[run][index];
    if (stayed) cell.className = "fires";
    else if (order === null) cell.className = "none";
    return text;
  };
  const outcomeCell = (row, cell) => {
    cell.title = outcome(row);
    return pill(rows.kind[row], outcome(row).replace("needs walk-back: ", "walk-back "));
  };
  const stepsOf = (run) => rows.step.slice(runStart[run], runStart[run + 1]).filter((step) => step !== null);
  const lastStep = (run) => stepsOf(run).pop() ?? null;
  const stepsText = (run) => {
    const steps = stepsOf(run);
    return steps.length ? (steps.length > 1 ? `${whole(steps[0])}–${whole(steps[steps.length - 1])}` : whole(steps[0])) : "–";
  };
  const runGrid = new Grid(byId("runs-table"), [
    { title: "run", width: "13.5%", text: true, value: (run) => runs[run], cell: (run) => runs[run] },
    { title: "checkpoints", width: "9.5%", number: true, downFirst: true, value: (run) => runStart[run + 1] - runStart[run], cell: (run) => whole(runStart[run + 1] - runStart[run]) },
    { title: "steps", width: "11%", number: true, value: (run) => lastStep(run), cell: stepsText },
    { title: "at the end", width: "18%", text: true, value: (run) => outcome(endRow(run)), cell: (run, cell) => outcomeCell(endRow(run), cell) },
    ...LETTERS.map((letter, index) => ({ title: `(${letter}) fires`, width: "12%", help: `when (${letter}) fires`, value: (run) => data.first[run][index][1], cell: firedCell(index) })),
  ], { label: "Runs", lines: 10, open: (run) => choose(run) });
  const filterRuns = () => {
    const wanted = byId("runs-filter").value.trim().toLowerCase();
    const found = [];
    for (let run = 0; run < runs.length; run++) {
      if (!wanted || runs[run].toLowerCase().includes(wanted) || outcome(endRow(run)).toLowerCase().includes(wanted)) found.push(run);
    }
    runGrid.set(found);
    byId("runs-count").textContent = `${whole(found.length)} of ${whole(runs.length)}`;
  };
  byId("runs-filter").addEventListener("input", whenIdle(filterRuns));

  // Checkpoints
  const figureColumn = (title, name, bit, width, help) => ({
    title, width, help, number: true, downFirst: true,
    value: (row) => rows[name][row],
    cell: (row, cell) => {
      if (rows.fired[row] >> bit & 1) cell.className = "number fires";
      return name === "utility" ? points(rows[name][row]) : show(rows[name][row]);
    },
  });
  const grid = new Grid(byId("table"), [
    { title: "run", width: "13%", text: true, value: (row) => runs[rows.run[row]], cell: (row) => runs[rows.run[row]] },
    { title: "step", width: "7.5%", number: true, value: (row) => rows.step[row], cell: stepText },
    { title: "outcome", width: "20.5%", text: true, value: outcome, cell: outcomeCell },
    figureColumn("(a) growth", "growth", 0, "8.5%", "largest ‖h_{l+1}‖ / ‖h_l‖"),
    figureColumn("(b) ‖g_L‖", "grad_norm", 1, "8.5%", "median ‖g_L‖ at the deepest state"),
    figureColumn("gain", "credit_gain", 9, "7%", "median ‖g_L‖ / ‖∂loss/∂logits‖ at the deepest state"),
    figureColumn("(c) cosine", "stability", 2, "8.5%", "mean cosine between batches at layer L/2"),
    { title: "accuracy", width: "8%", number: true, downFirst: true, value: (row) => rows.accuracy[row], cell: (row) => percent(rows.accuracy[row]) },
    figureColumn("(d) points", "utility", 3, "8.5%", "accuracy minus that with frozen blocks, in points"),
    { title: "file", width: "16%", text: true, value: (row) => rows.path[row], cell: (row, cell) => { const name = rows.path[row].split("/").pop(); cell.title = rows.path[row]; return make("span", {}, name); } },
  ], { label: "Checkpoints", lines: 14, open: (row) => details(row) });
  const filterRows = () => {
    const wanted = byId("filter").value.trim().toLowerCase();
    const kind = byId("outcome").value;
    const only = byId("only-run").checked ? state.run : -1;
    const found = [];
    for (let row = 0; row < total; row++) {
      if (kind !== "" && rows.kind[row] !== Number(kind)) continue;
      if (only >= 0 && rows.run[row] !== only) continue;
      if (wanted && !rows.path[row].toLowerCase().includes(wanted) && !runs[rows.run[row]].toLowerCase().includes(wanted)
        && !outcome(row).toLowerCase().includes(wanted) && !(rows.kind[row] === 3 && note(row).toLowerCase().includes(wanted))) continue;
      found.push(row);
    }
    grid.set(found);
    byId("count").textContent = `${whole(found.length)} of ${whole(total)}`;
  };
  byId("filter").addEventListener("input", whenIdle(filterRows));
  byId("outcome").addEventListener("change", filterRows);
  byId("only-run").addEventListener("change", filterRows);

  // One checkpoint
  const dialog = byId("details");
  const size = (bytes) => {
    if (bytes === null) return "–";
    const units = ["B", "kB", "MB", "GB", "TB"];
    let at = 0;
    while (bytes >= 1000 && at < units.length - 1) { bytes /= 1000; at++; }
    return `${Number(bytes.toPrecision(3))} ${units[at]}`;
  };
  const details = (row) => {
    const close = make("button", { type: "button", class: "close" }, "Close");
    close.addEventListener("click", () => dialog.close());
    const facts = make("dl");
    const fact = (name, text) => { if (text !== "" && text !== "–") facts.append(make("dt", {}, ...math(name)), make("dd", {}, text)); };
    fact("file", rows.path[row]);
    fact("outcome", outcome(row));
    fact(rows.kind[row] === 3 ? "error" : "remarks", note(row));
    fact("step", stepText(row));
    fact("growth", show(rows.growth[row], 4));
    fact("‖g_L‖", show(rows.grad_norm[row], 4));
    fact("credit gain", show(rows.credit_gain[row], 4));
    fact("cosine", show(rows.stability[row], 4));
    fact("accuracy", percent(rows.accuracy[row]));
    fact("over frozen", rows.utility[row] === null ? "–" : `${points(rows.utility[row])} points`);
    fact("content", rows.hash[row]);
    fact("size", size(rows.bytes[row]));
    fact("device", rows.device[row] === null ? "–" : data.words[rows.device[row]]);
    fact("time", rows.seconds[row] === null ? "–" : `${show(rows.seconds[row])} s`);
    fact("finished", rows.finished[row] === null ? "–" : new Date(1000 * rows.finished[row]).toISOString().replace("T", " ").replace(".000Z", " UTC"));
    dialog.replaceChildren(close, make("h2", { id: "details-title" }, `${runs[rows.run[row]]}, step ${stepText(row)}`), facts);
    const at = shownAt.get(row);
    if (at !== undefined) {
      const table = make("table", { class: "plain" });
      const head = make("tr");
      for (const title of ["layer", "name"]) head.append(make("th", { scope: "col" }, title));
      for (const title of ["‖h‖", "growth", "‖g‖", "gain", "cosine"]) head.append(make("th", { scope: "col", class: "number" }, title));
      const body = make("tbody");
      layers.names[layers.kind[at]].forEach((name, l) => {
        const line = make("tr", {}, make("td", {}, ...math(`h_${l}`)), make("td", {}, name));
        for (const figure of ["hidden_norm", "growth", "grad_norm", "credit_gain", "stability"]) {
          line.append(make("td", { class: "number" }, show(layers[figure][layerStart[at] + l])));
        }
        body.append(line);
      });
      table.append(make("thead", {}, head), body);
      dialog.append(make("div", { class: "scroll" }, table));
    }
    dialog.showModal();
  };

  // --------------------------------------------------------------------------------------- canvas
  const fit = (canvas) => {
    const ratio = Math.min(window.devicePixelRatio || 1, 3);
    const { clientWidth: width, clientHeight: height } = canvas;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = "11.5px system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";
    return { pen, width, height };
  };
  const niceStep = (span, count) => {
    const raw = span / Math.max(count, 1);
    const power = 10 ** Math.floor(Math.log10(raw));
    const unit = raw / power;
    return power * (unit <= 1 ? 1 : unit <= 2 ? 2 : unit <= 5 ? 5 : 10);
  };
  const linearTicks = (low, high, count) => {
    const step = niceStep(high - low || 1, count);
    const ticks = [];
    for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) ticks.push(at * step);
    return ticks;
  };
  const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";
  const decade = (power) => {
    if (power >= -2 && power <= 4) return power < 0 ? String(Number((10 ** power).toFixed(2))) : whole(10 ** power);
    return `10${power < 0 ? "⁻" : ""}${[...String(Math.abs(power))].map((digit) => SUPERSCRIPTS[digit]).join("")}`;
  };
  const shortStep = (step) => (Math.abs(step) >= 1e6 ? `${Number((step / 1e6).toPrecision(4))}M` : Math.abs(step) >= 1e4 ? `${Number((step / 1e3).toPrecision(4))}k` : whole(Number(step.toPrecision(10))));

  // Dots over each other say the same; so a line draws at most the extremes of each pixel column.
  const thinned = (line) => {
    if (line.length < 300) return line;
    const found = [];
    let column = null;
    let low, high, first, last;
    const flush = () => {
      if (column === null) return;
      for (const point of [...new Set([first, low, high, last])].sort((a, b) => a.x - b.x || a.row - b.row)) found.push(point);
    };
    for (const point of line) {
      const at = Math.round(point.x);
      if (at !== column) { flush(); column = at; low = high = first = last = point; continue; }
      if (point.y < low.y) low = point;
      if (point.y > high.y) high = point;
      last = point;
    }
    flush();
    return found;
  };

  const CURVES = [
    { name: "growth", title: "(a) Growth", sub: "largest ‖h_{l+1}‖ / ‖h_l‖", log: true, above: true, bit: 0, word: "fires above" },
    { name: "grad_norm", title: "(b) ‖g_L‖", sub: "gradient at the deepest state", log: true, above: false, bit: 1, word: "fires below" },
    { name: "credit_gain", title: "Credit gain", sub: "‖g_L‖ / ‖∂loss/∂logits‖", log: true, above: false, bit: -1, word: "lost below" },
    { name: "stability", title: "(c) Direction stability", sub: "mean cosine between batches", log: false, above: true, bit: 2, word: "fires above" },
  ];
  const MARGIN = { left: 52, right: 12, top: 12, bottom: 26 };

  class Chart {
    constructor(host, curve) {
      this.curve = curve;
      this.canvas = make("canvas", { tabindex: 0, role: "img" });
      this.tip = make("div", { class: "tip", role: "status" });
      this.ring = make("div", { class: "ring", hidden: "" });
      const figure = make("figure", {}, make("figcaption", {}, make("b", {}, ...math(curve.title)), make("span", {}, ...math(curve.sub))), this.canvas, this.ring, this.tip);
      host.append(figure);
      this.dots = [];
      this.at = -1;
      this.canvas.addEventListener("pointermove", (event) => this.point(event.offsetX, event.offsetY));
      this.canvas.addEventListener("pointerleave", () => this.pick(-1));
      this.canvas.addEventListener("blur", () => this.pick(-1));
      this.canvas.addEventListener("click", () => { if (this.at >= 0) details(this.dots[this.at].row); });
      this.canvas.addEventListener("keydown", (event) => this.key(event));
      repaint.push(() => this.draw());
      onResize(this.canvas, () => this.draw());
    }
    extent(values, steps) {
      const { log, name } = this.curve;
      const limit = data.thresholds[name];
      let [low, high] = [Infinity, -Infinity];
      for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
      if (low > high) [low, high] = log ? [limit, limit] : [0, limit];
      if (log) {
        low = Math.log10(low);
        high = Math.log10(high);
        // A threshold within four decades is drawn; one further off would flatten the curves.
        const cut = limit > 0 ? Math.log10(limit) : NaN;
        if (cut > high && cut - high < 4) high = cut;
        if (cut < low && low - cut < 4) low = cut;
        const room = Math.max(0.08 * (high - low), 0.12);
        return [low - room, high + room];
      }
      low = Math.min(low, 0, limit);
      high = Math.max(high, limit);
      const room = 0.08 * (high - low || 1);
      return [low < 0 ? low - room : low, high + room];
    }
    draw() {
      const { curve } = this;
      const { pen, width, height } = fit(this.canvas);
      if (!width) return;
      this.pick(-1);
      const values = rows[curve.name];
      const chosen = state.run;
      const usable = (value) => value !== null && Number.isFinite(value) && (!curve.log || value > 0);
      // Runs of one checkpoint each have nothing to show over steps; they stand side by side.
      const beside = chosen < 0 && loneRuns;
      const placeOf = (row) => (beside ? rows.run[row] : stepOf(row));
      const extentRows = chosen < 0 ? [0, total] : [runStart[chosen], runStart[chosen + 1]];
      const inView = [];
      let [left, right] = [Infinity, -Infinity];
      for (let row = extentRows[0]; row < extentRows[1]; row++) {
        const step = placeOf(row);
        if (step === null) continue;
        if (step < left) left = step;
        if (step > right) right = step;
        if (usable(values[row])) inView.push(values[row]);
      }
      if (left > right) [left, right] = [0, 1];
      if (left === right) [left, right] = [left - 0.5, right + 0.5];
      const [low, high] = this.extent(inView);
      const inner = { x: MARGIN.left, y: MARGIN.top, w: width - MARGIN.left - MARGIN.right, h: height - MARGIN.top - MARGIN.bottom };
      const xOf = (step) => inner.x + 5 + (inner.w - 10) * (step - left) / (right - left);
      const yOf = (value) => inner.y + inner.h * (1 - ((curve.log ? Math.log10(value) : value) - low) / (high - low));
      const edge = (value) => (Number.isNaN(value) || value === Infinity ? inner.y + 5 : inner.y + inner.h - 5);

      // The region that fires, then the grid over it.
      const limit = data.thresholds[curve.name];
      const cut = curve.log && !(limit > 0) ? NaN : yOf(limit);
      if (Number.isFinite(cut)) {
        const bounded = Math.min(Math.max(cut, inner.y), inner.y + inner.h);
        pen.fillStyle = colours["--bad-wash"];
        if (curve.above) pen.fillRect(inner.x, inner.y, inner.w, bounded - inner.y);
        else pen.fillRect(inner.x, bounded, inner.w, inner.y + inner.h - bounded);
      }
      pen.strokeStyle = colours["--line"];
      pen.fillStyle = colours["--soft"];
      pen.lineWidth = 1;
      pen.textAlign = "right";
      pen.textBaseline = "middle";
      let ticks;
      if (curve.log) {
        const every = Math.max(1, Math.ceil((high - low) / 6));
        ticks = [];
        for (let power = Math.ceil(low); power <= high; power++) if (power % every === 0) ticks.push([10 ** power, decade(power)]);
        if (ticks.length < 2) ticks = linearTicks(10 ** low, 10 ** high, 4).filter((value) => value > 0).map((value) => [value, show(value)]);
      } else ticks = linearTicks(low, high, 5).map((value) => [value, show(value)]);
      for (const [value, text] of ticks) {
        const y = Math.round(yOf(value)) + 0.5;
        pen.beginPath();
        pen.moveTo(inner.x, y);
        pen.lineTo(inner.x + inner.w, y);
        pen.stroke();
        pen.fillText(text, inner.x - 7, y);
      }
      pen.textAlign = "center";
      pen.textBaseline = "top";
      const stepTicks = linearTicks(left, right, Math.max(2, Math.floor(inner.w / 90))).filter((step) => Number.isInteger(step));
      for (const step of stepTicks) pen.fillText(shortStep(step), xOf(step), inner.y + inner.h + 8);

      pen.save();
      pen.beginPath();
      pen.rect(inner.x, inner.y, inner.w, inner.h);
      pen.clip();
      this.dots = [];
      const lineOf = (run) => {
        const line = [];
        for (let row = runStart[run]; row < runStart[run + 1]; row++) {
          const [step, value] = [placeOf(row), values[row]];
          if (step === null || value === null || rows.kind[row] === 3) continue;
          const good = usable(value);
          line.push({ row, good, x: xOf(step), y: good ? yOf(value) : edge(value) });
        }
        return line;
      };
      const trace = (line) => {
        let open = false;
        for (const point of line) {
          if (!point.good) { open = false; continue; }
          if (open) pen.lineTo(point.x, point.y); else pen.moveTo(point.x, point.y);
          open = true;
        }
      };
      const alpha = Math.min(0.9, Math.max(0.35, 2.5 / Math.sqrt(runs.length)));
      // Runs by how they end, so that each colour is stroked once.
      const shownKinds = chosen < 0 ? [0, 2, 1] : [-1];
      for (const kind of shownKinds) {
        pen.globalAlpha = chosen < 0 ? alpha : Math.min(0.4, 1.2 / Math.sqrt(runs.length));
        pen.strokeStyle = pen.fillStyle = chosen < 0 ? colours[COLOURS[kind]] : colours["--soft"];
        pen.lineWidth = chosen < 0 ? 1.3 : 1;
        pen.beginPath();
        const lonely = [];
        for (let run = 0; run < runs.length; run++) {
          if (run === chosen || (chosen < 0 && rows.kind[endRow(run)] !== kind)) continue;
          const line = lineOf(run);
          if (chosen < 0) for (const point of line) this.dots.push(point);
          const thin = thinned(line);
          if (thin.length === 1) lonely.push(thin[0]); else trace(thin);
          for (const point of thin) if (!point.good) lonely.push(point);
        }
        pen.stroke();
        for (const point of lonely) pen.fillRect(point.x - 1.5, point.y - 1.5, 3, 3);
      }
      pen.globalAlpha = 1;
      if (chosen >= 0) {
        const line = lineOf(chosen);
        this.dots = line;
        pen.strokeStyle = colours["--ink"];
        pen.lineWidth = 1.6;
        pen.lineJoin = "round";
        pen.beginPath();
        trace(thinned(line));
        pen.stroke();
        const crowded = line.length > inner.w / 5;
        for (const point of line) {
          const fires = curve.bit >= 0 ? rows.fired[point.row] >> curve.bit & 1 : values[point.row] < limit;
          if (crowded && !fires && point.good) continue;
          pen.fillStyle = fires ? colours["--bad"] : colours["--ink"];
          pen.beginPath();
          if (!point.good) {
            pen.strokeStyle = colours["--bad"];
            pen.moveTo(point.x - 4, point.y - 4); pen.lineTo(point.x + 4, point.y + 4);
            pen.moveTo(point.x + 4, point.y - 4); pen.lineTo(point.x - 4, point.y + 4);
            pen.stroke();
          } else if (fires) {
            pen.rect(point.x - 3.2, point.y - 3.2, 6.4, 6.4);
            pen.fill();
          } else {
            pen.arc(point.x, point.y, crowded ? 1.5 : 3, 0, 7);
            pen.fill();
          }
        }
      }
      pen.restore();
      if (Number.isFinite(cut)) {
        const visible = cut >= inner.y && cut <= inner.y + inner.h;
        const text = `${curve.word} ${show(limit)}${visible ? "" : cut < inner.y ? " ↑" : " ↓"}`;
        const y = visible ? cut : cut < inner.y ? inner.y + 1 : inner.y + inner.h - 1;
        pen.strokeStyle = pen.fillStyle = colours["--bad"];
        pen.textAlign = "right";
        if (visible) {
          pen.lineWidth = 1;
          pen.setLineDash([5, 4]);
          pen.beginPath();
          pen.moveTo(inner.x, Math.round(y) + 0.5);
          pen.lineTo(inner.x + inner.w, Math.round(y) + 0.5);
          pen.stroke();
          pen.setLineDash([]);
        }
        const under = y < inner.y + 16;
        pen.textBaseline = under ? "top" : "bottom";
        const at = [inner.x + inner.w - 4, under ? y + 4 : y - 3];
        pen.lineWidth = 3;
        pen.strokeStyle = colours["--card"];
        pen.strokeText(text, ...at);
        pen.fillText(text, ...at);
      }
      if (!this.dots.length) {
        pen.fillStyle = colours["--soft"];
        pen.textAlign = "center";
        pen.textBaseline = "middle";
        pen.fillText("not measured", inner.x + inner.w / 2, inner.y + inner.h / 2);
      }
      this.canvas.setAttribute("aria-label", this.words(inView));
    }
    words(inView) {
      const { curve } = this;
      if (!inView.length) return `${curve.title}: not measured`;
      let [low, high] = [Infinity, -Infinity];
      for (const value of inView) { low = Math.min(low, value); high = Math.max(high, value); }
      const who = state.run < 0 ? `${runs.length} runs` : runs[state.run];
      return `${curve.title}, ${who}: ${inView.length} checkpoints from ${show(low)} to ${show(high)}; ${curve.word} ${show(data.thresholds[curve.name])}. Arrow keys walk along, Enter opens.`;
    }
    point(x, y) {
      let [best, least] = [-1, state.run < 0 ? 400 : Infinity];
      this.dots.forEach((dot, index) => {
        const far = (dot.x - x) ** 2 + (state.run < 0 ? (dot.y - y) ** 2 : 0);
        if (far < least) [best, least] = [index, far];
      });
      this.pick(best);
    }
    key(event) {
      const moves = { ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10 };
      if (event.key in moves && this.dots.length) {
        event.preventDefault();
        this.pick(Math.min(Math.max(this.at + moves[event.key], 0), this.dots.length - 1));
      } else if (event.key === "Enter" && this.at >= 0) details(this.dots[this.at].row);
      else if (event.key === "Escape") this.pick(-1);
    }
    pick(index) {
      if (index === this.at) return;
      this.at = index;
      this.ring.hidden = index < 0;
      if (index < 0) { this.tip.textContent = ""; return; }
      const { row, x, y } = this.dots[index];
      this.tip.textContent = `${runs[rows.run[row]]}, step ${stepText(row)}\n${show(rows[this.curve.name][row], 4)} · ${outcome(row)}`;
      const top = this.canvas.offsetTop + y;
      this.ring.style.left = `${x}px`;
      this.ring.style.top = `${top}px`;
      this.tip.style.left = `${Math.min(Math.max(0, x - this.tip.offsetWidth / 2), this.canvas.clientWidth - this.tip.offsetWidth)}px`;
      this.tip.style.top = `${y > 70 ? top - this.tip.offsetHeight - 12 : top + 14}px`;
    }
  }

  // ------------------------------------------------------------------------------------- heat map
  // Viridis at nine points: even to the eye, in grey as in colour.
  const VIRIDIS = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]];
  const shade = (part) => {
    const at = Math.min(Math.max(part, 0), 1) * (VIRIDIS.length - 1);
    const index = Math.min(Math.floor(at), VIRIDIS.length - 2);
    return VIRIDIS[index].map((value, channel) => Math.round(value + (at - index) * (VIRIDIS[index + 1][channel] - value)));
  };
  const HEATS = [
    { name: "hidden_norm", title: "‖h‖", log: true, most: true },
    { name: "growth", title: "growth", log: true, most: true },
    { name: "grad_norm", title: "‖g‖", log: true, most: false },
    { name: "credit_gain", title: "credit gain", log: true, most: false },
    { name: "stability", title: "cosine", log: false, most: true },
  ];
  const heat = { canvas: make("canvas", { tabindex: 0, role: "img" }), tip: make("div", { class: "tip", role: "status" }), ring: make("div", { class: "ring", hidden: "" }), cell: null };
  byId("heat").append(heat.canvas, heat.ring, heat.tip);
  const scaleCanvas = make("canvas", { "aria-hidden": "true" });
  const [scaleLow, scaleHigh] = [make("span"), make("span")];
  byId("scale").append(scaleLow, scaleCanvas, scaleHigh);
  const heatColumns = () => {
    if (state.run < 0) return layers.row.map((_, index) => index);
    const found = [];
    for (let row = runStart[state.run]; row < runStart[state.run + 1]; row++) if (shownAt.has(row)) found.push(shownAt.get(row));
    return found;
  };
  const drawHeat = () => {
    const figure = HEATS.find((one) => one.name === state.figure);
    const values = layers[figure.name];
    const columns = heatColumns();
    const depth = columns.reduce((most, index) => Math.max(most, layers.names[layers.kind[index]].length), 0);
    const cellHeight = Math.min(34, Math.max(depth > 60 ? 360 / depth : 12, 200 / Math.max(depth, 1)));
    heat.canvas.style.height = `${Math.round(Math.max(depth, 1) * cellHeight) + 30}px`;
    const { pen, width, height } = fit(heat.canvas);
    if (!width) return;
    const names = columns.length ? layers.names[layers.kind[columns[0]]] : [];
    const longest = Math.min(150, names.reduce((most, name) => Math.max(most, pen.measureText(name).width), 30));
    const inner = { x: Math.ceil(longest) + 14, y: 4, w: width - longest - 26, h: depth * cellHeight };
    Object.assign(heat, { inner, columns, depth, cellHeight });
    const usable = (value) => value !== null && Number.isFinite(value) && (!figure.log || value > 0);
    const scaled = (value) => (figure.log ? Math.log10(value) : value);
    let [low, high] = [Infinity, -Infinity];
    for (const index of columns) {
      const count = layers.names[layers.kind[index]].length;
      for (let at = layerStart[index]; at < layerStart[index] + count; at++) {
        if (!usable(values[at])) continue;
        const value = scaled(values[at]);
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
    const empty = low > high;
    if (empty) [low, high] = [0, 1];
    // More checkpoints than pixels share one, which shows the most telling of them.
    const pixels = Math.max(1, Math.min(columns.length, Math.floor(inner.w)));
    heat.bins = pixels;
    if (columns.length && depth) {
      const picture = new ImageData(pixels, depth);
      for (let bin = 0; bin < pixels; bin++) {
        const from = Math.floor(bin * columns.length / pixels);
        const to = Math.max(from + 1, Math.floor((bin + 1) * columns.length / pixels));
        for (let l = 0; l < depth; l++) {
          let [best, bad] = [null, false];
          for (let at = from; at < to; at++) {
            const index = columns[at];
            if (l >= layers.names[layers.kind[index]].length) continue;
            const value = values[layerStart[index] + l];
            if (value === null) continue;
            if (!usable(value)) { bad = true; continue; }
            if (best === null || (figure.most ? value > best : value < best)) best = value;
          }
          const place = 4 * (l * pixels + bin);
          if (bad || best !== null) {
            const colour = bad ? [220, 50, 47] : shade(high > low ? (scaled(best) - low) / (high - low) : 0.5);
            picture.data.set([...colour, 255], place);
          }
        }
      }
      const small = document.createElement("canvas");
      small.width = pixels;
      small.height = depth;
      small.getContext("2d").putImageData(picture, 0, 0);
      pen.fillStyle = colours["--faint"];
      pen.fillRect(inner.x, inner.y, inner.w, inner.h);
      pen.imageSmoothingEnabled = false;
      pen.drawImage(small, inner.x, inner.y, inner.w, inner.h);
    }
    pen.fillStyle = colours["--soft"];
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const every = Math.ceil(15 / cellHeight);
    for (let l = 0; l < depth; l += every) {
      let text = names[l] || `h_${l}`;
      while (text.length > 2 && pen.measureText(text).width > 150) text = `…${text.slice(2)}`;
      pen.fillText(text, inner.x - 8, inner.y + (l + 0.5) * cellHeight);
    }
    pen.textBaseline = "top";
    const bottom = inner.y + inner.h + 8;
    if (!columns.length) {
      pen.textAlign = "left";
      pen.fillText("not measured", inner.x, bottom);
    } else if (state.run >= 0) {
      pen.textAlign = "center";
      const gap = Math.max(1, Math.ceil(columns.length / Math.max(1, Math.floor(inner.w / 80))));
      for (let at = 0; at < columns.length; at += gap) {
        const row = layers.row[columns[at]];
        const text = rows.step[row] === null ? String(at) : shortStep(rows.step[row]);
        pen.fillText(text, inner.x + (at + 0.5) * inner.w / columns.length, bottom);
      }
    } else {
      // A line between runs and their names, where there is room.
      let from = 0;
      let free = 0;
      for (let at = 1; at <= columns.length; at++) {
        const ends = at === columns.length || rows.run[layers.row[columns[at]]] !== rows.run[layers.row[columns[from]]];
        if (!ends) continue;
        const [x, next] = [from, at].map((one) => inner.x + one * inner.w / columns.length);
        const name = runs[rows.run[layers.row[columns[from]]]];
        if (from > 0 && next - x > 30) {
          pen.fillStyle = colours["--card"];
          pen.fillRect(Math.round(x) - 1, inner.y, 2, inner.h);
        }
        pen.fillStyle = colours["--soft"];
        pen.textAlign = "left";
        const room = pen.measureText(name).width;
        if (x >= free && (room < next - x - 2 || (next - x < 90 && x + Math.min(room, 90) < inner.x + inner.w))) {
          let text = name;
          const most = Math.max(next - x - 4, 90);
          while (text.length > 2 && pen.measureText(text).width > most) text = `${text.slice(0, -2)}…`;
          pen.fillText(text, x, bottom);
          free = x + pen.measureText(text).width + 14;
        }
        from = at;
      }
    }
    const bar = fit(scaleCanvas);
    for (let x = 0; x < bar.width; x++) {
      bar.pen.fillStyle = `rgb(${shade(x / bar.width).join(",")})`;
      bar.pen.fillRect(x, 0, 1, bar.height);
    }
    scaleLow.textContent = empty ? "–" : show(figure.log ? 10 ** low : low);
    scaleHigh.textContent = empty ? "–" : show(figure.log ? 10 ** high : high);
    const who = state.run < 0 ? "all runs" : runs[state.run];
    heat.canvas.setAttribute("aria-label", `${figure.title} by layer and checkpoint, ${who}: ${columns.length} checkpoints, ${depth} states, ${scaleLow.textContent} to ${scaleHigh.textContent}. Arrow keys walk, Enter opens.`);
    byId("layers-text").textContent = (state.run < 0 ? `All runs side by side, checkpoints from left to right, layers from the top down.` : `${who}: steps from left to right, layers from the top down.`)
      + (columns.length > pixels ? ` A pixel stands for up to ${Math.ceil(columns.length / pixels)} checkpoints and shows the ${figure.most ? "largest" : "smallest"} value.` : "")
      + (data.everyNth > 1 ? ` Every ${data.everyNth}th checkpoint of a run is shown.` : "");
  };
  repaint.push(drawHeat);
  const pickHeat = (bin, l) => {
    const { inner, columns, depth, cellHeight, bins } = heat;
    if (bin === null || !columns || !columns.length || bin < 0 || bin >= bins || l < 0 || l >= depth) {
      heat.cell = null;
      heat.tip.textContent = "";
      heat.ring.hidden = true;
      return;
    }
    if (heat.cell && heat.cell.bin === bin && heat.cell.l === l) return;
    heat.cell = { bin, l };
    heat.ring.hidden = false;
    Object.assign(heat.ring.style, {
      left: `${inner.x + bin * inner.w / bins}px`,
      top: `${inner.y + l * cellHeight}px`,
      width: `${Math.max(4, inner.w / bins)}px`,
      height: `${cellHeight}px`,
    });
    const index = columns[Math.floor(bin * columns.length / bins)];
    const row = layers.row[index];
    const name = layers.names[layers.kind[index]][l];
    const value = name === undefined ? null : layers[state.figure][layerStart[index] + l];
    heat.tip.textContent = `${runs[rows.run[row]]}, step ${stepText(row)}\nh_${l} ${name || ""}: ${show(value, 4)}`;
    const x = inner.x + (bin + 0.5) * inner.w / bins;
    heat.tip.style.left = `${Math.min(Math.max(0, x - heat.tip.offsetWidth / 2), heat.canvas.clientWidth - heat.tip.offsetWidth)}px`;
    heat.tip.style.top = `${Math.max(-46, inner.y + l * cellHeight - heat.tip.offsetHeight - 8)}px`;
  };
  heat.canvas.addEventListener("pointermove", (event) => {
    const { inner, bins, cellHeight } = heat;
    pickHeat(Math.floor((event.offsetX - inner.x) / inner.w * bins), Math.floor((event.offsetY - inner.y) / cellHeight));
  });
  for (const name of ["pointerleave", "blur"]) heat.canvas.addEventListener(name, () => pickHeat(null, 0));
  const openHeat = () => { if (heat.cell) details(layers.row[heat.columns[Math.floor(heat.cell.bin * heat.columns.length / heat.bins)]]); };
  heat.canvas.addEventListener("click", openHeat);
  heat.canvas.addEventListener("keydown", (event) => {
    const cell = heat.cell || { bin: -1, l: 0 };
    const moves = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
    if (event.key in moves && heat.columns.length) {
      event.preventDefault();
      const [right, down] = moves[event.key];
      pickHeat(Math.min(Math.max(cell.bin + right, 0), heat.bins - 1), Math.min(Math.max(cell.l + down, 0), heat.depth - 1));
    } else if (event.key === "Enter") openHeat();
    else if (event.key === "Escape") pickHeat(null, 0);
  });
  onResize(byId("heat"), drawHeat);
  for (const one of HEATS) {
    const radio = make("input", { type: "radio", name: "figure", value: one.name });
    radio.checked = one.name === state.figure;
    radio.addEventListener("change", () => { state.figure = one.name; pickHeat(null, 0); drawHeat(); });
    byId("figures").append(make("label", {}, radio, one.title));
  }

  // --------------------------------------------------------------------------------------- choice
  for (const curve of CURVES) new Chart(byId("charts"), curve);
  const present = [0, 1, 2].filter((kind) => runs.some((_, run) => rows.kind[endRow(run)] === kind));
  const legend = () => {
    const items = state.run < 0
      ? present.map((kind) => make("li", { class: `kind-${KINDS[kind]}` }, make("i", { "aria-hidden": "true" }), `ends ${LABELS[kind]}`))
      : [make("li", {}, pill(rows.kind[endRow(state.run)], `ends: ${outcome(endRow(state.run))}`))];
    byId("legend").replaceChildren(...items);
  };
  const choose = (run, quiet) => {
    state.run = run;
    pickHeat(null, 0);
    runGrid.choose(run);
    byId("run-name").value = run < 0 ? "" : runs[run];
    byId("all-runs").setAttribute("aria-pressed", String(run < 0));
    byId("curves-text").textContent = run < 0
      ? `${whole(runs.length)} run${runs.length === 1 ? "" : "s"} ${loneRuns ? "of one checkpoint each, side by side" : "over their steps"}; the shaded side fires.`
      : `${runs[run]}: ${whole(runStart[run + 1] - runStart[run])} checkpoints; squares fire, crosses are not finite. The other runs stay in grey.`;
    byId("only-run").disabled = run < 0;
    if (run < 0) byId("only-run").checked = false;
    legend();
    paintAll();
    if (!quiet) filterRows();
  };
  byId("all-runs").addEventListener("click", () => choose(-1));
  const walk = (by) => { if (runs.length) choose(state.run < 0 ? (by > 0 ? 0 : runs.length - 1) : (state.run + by + runs.length) % runs.length); };
  byId("previous-run").addEventListener("click", () => walk(-1));
  byId("next-run").addEventListener("click", () => walk(1));
  const suggest = () => {
    const wanted = byId("run-name").value.trim().toLowerCase();
    const found = [];
    for (let run = 0; run < runs.length && found.length < 200; run++) if (runs[run].toLowerCase().includes(wanted)) found.push(make("option", { value: runs[run] }));
    byId("run-names").replaceChildren(...found);
  };
  byId("run-name").addEventListener("input", suggest);
  byId("run-name").addEventListener("change", (event) => {
    const wanted = event.target.value.trim();
    if (!wanted) { choose(-1); return; }
    const found = runs.indexOf(wanted);
    const close = found >= 0 ? found : runs.findIndex((name) => name.toLowerCase().includes(wanted.toLowerCase()));
    if (close >= 0) choose(close);
  });

  readColours();
  suggest();
  filterRuns();
  filterRows();
  const asked = new URLSearchParams(location.hash.slice(1)).get("run");
  choose(runs.length === 1 ? 0 : asked === null ? -1 : runs.indexOf(asked), true);
  root.dataset.rows = String(total);
  root.dataset.ready = String(Math.round(performance.now()));
})();
