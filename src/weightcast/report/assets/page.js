"use strict";
// The page: draws its document, and a live one asks for the newest rounds again and again.
const PERIOD_MS = 1000, ANSWER_MS = 20000, SHOWN_ROUNDS = 40, SHOWN_SPANS = 40;
const page = JSON.parse(document.getElementById("document").textContent);
const main = document.querySelector("main"), tip = document.getElementById("tip");

function tell(text, x = 0, y = 0) {
  tip.hidden = text === null;
  if (text === null) return;
  tip.textContent = text;
  const box = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(x + 14, window.innerWidth - box.width - 8));
  tip.style.left = `${left}px`;
  tip.style.top = `${y + 16 + box.height < window.innerHeight ? y + 16 : Math.max(8, y - box.height - 10)}px`;
}

// A box that scrolls where its content is wider or taller; keys scroll it, too.
const scroller = (label, classes, ...children) =>
  node("div", { class: `scroll ${classes}`, tabindex: 0, role: "region", "aria-label": label, "data-key": `scroll ${label}` }, ...children);

function section(title, note, ...children) {
  return node("section", {}, node("h2", {}, title), note ? node("p", { class: "note" }, note) : null, ...children);
}

const drawCell = (tag, cell) => (typeof cell === "string" ? node(tag, {}, cell) : node(tag, { class: cell.state }, cell.text));

function drawTiles(facts) {
  return node("dl", { class: "tiles" }, ...Object.entries(facts).map(([name, value]) =>
    node("div", {}, node("dt", {}, name), drawCell("dd", value))));
}

function drawTable(columns, rows, classes = "") {
  return node("table", { class: classes },
    node("thead", {}, node("tr", {}, ...columns.map((column) => node("th", { scope: "col" }, column)))),
    node("tbody", {}, ...rows.map((row) => node("tr", {}, ...row.map((cell) => drawCell("td", cell))))));
}

// What a picture shows, in figures; made when somebody asks for it.
function figures(label, columns, rows) {
  const box = node("details", { "data-key": `details ${label}` }, node("summary", { "data-key": `summary ${label}` }, "In figures"));
  box.addEventListener("toggle", () => {
    if (box.open && box.children.length === 1) box.append(scroller(`${label}, in figures`, "tall", drawTable(columns, rows())));
  });
  return box;
}

function drawChartBox(chart, room) {
  const names = Object.keys(chart.series);
  const keys = names.length > 1 ? legend(names.map((name, i) => [name, { class: `fill s${i % NUM_SERIES}` }])) : null;
  const title = chart.unit && chart.kind === "lines" ? `${chart.title}, ${chart.unit}` : chart.title;
  const box = section(title, chart.note, keys,
    scroller(chart.title, "", drawChart(chart, Math.max(chart.wide ? 560 : 300, room))),
    figures(chart.title, [chart.x_label, ...names], () =>
      Array.from({ length: stepsOf(chart) }, (_, i) => [String(i + 1), ...names.map((name) => number(chart.series[name][i]))])));
  if (chart.wide) box.classList.add("wide");
  return box;
}

// How wide the content of a card is, of one that has a line for itself (0) or is one of so many; found by asking the style sheet.
function roomFor(count) {
  const probe = node("section", count ? {} : { class: "wide" }, node("div"));
  const grid = node("div", { class: "charts" }, probe, ...Array.from({ length: Math.max(0, count - 1) }, () => node("section")));
  main.append(grid);
  const room = probe.firstChild.clientWidth;
  grid.remove();
  return room;
}

// What an engine served when: a successful commit or roll-back begins a version, which lasts until the next one.
function spansOf(engine, now) {
  const begins = engine.rounds.filter((round) => round.error === null && round.at !== null && round.version);
  return begins.map((round, i) => ({
    version: round.version, from: round.at, to: i + 1 < begins.length ? begins[i + 1].at : Math.max(now, round.at),
  }));
}

function drawLanes(engines, now, room) {
  const every = engines.map((engine) => spansOf(engine, now).slice(-SHOWN_SPANS));
  if (!every.flat().length) return node("p", { class: "note" }, "no version was published yet");
  const width = Math.max(560, room), end = Math.max(now, ...every.flat().map((span) => span.to));
  const pace = median(every.flatMap((spans) => spans.slice(0, -1).map((span) => span.to - span.from)));
  const axis = busyAxis([...every.flat().map((span) => span.from), end], pace, width);
  const lanes = engines.flatMap((engine, i) => {
    const boxes = every[i].flatMap((span) => {
      const x = axis.x(span.from), length = Math.max(1, axis.x(span.to) - x - 1), label = span.version.split("-")[0];
      const since = `${span.version}, since ${new Date(span.from * 1000).toLocaleTimeString()}`;
      return [
        svg("rect", { class: "version", "data-version": span.version, "data-tip": `${engine.name}\n${since}`, x, y: 1, width: length, height: 18, rx: 3, fill: versionColour(span.version) }),
        length > 12 + LETTER * label.length ? svg("text", { class: "version-text", x: x + 5, y: 14, "pointer-events": "none" }, label) : null,
      ];
    });
    const gaps = axis.gaps.flatMap((gap) => {
      const from = axis.x(gap.from), to = axis.x(gap.to), third = (to - from) / 3;
      return [svg("rect", { class: "gap", x: from + third, y: 0, width: third, height: 20 }),
        svg("line", { class: "gap-edge", x1: from + third, x2: from + third, y1: 0, y2: 20 }),
        svg("line", { class: "gap-edge", x1: to - third, x2: to - third, y1: 0, y2: 20 })];
    });
    const said = every[i].slice(-5).map((span) => span.version).join(", ");
    const why = engine.status ? null : node("span", { class: "bad" }, ` not reached: ${engine.error || "no status"}`);
    return [node("div", { class: "lane-name" }, engine.name, why), picture(width, 20, `${engine.name} served ${said || "nothing new"}`, ...boxes, ...gaps)];
  });
  const box = node("div", {}, ...lanes, drawMoments(axis, every.flat(), end, width));
  box.style.width = `${width}px`; // names stay in sight up to the end of what they stick to
  return scroller("Versions over time", "", box);
}

// Labels under the lanes: the clock at the start and after each gap, how long the gaps were, and now. None overlaps another.
function drawMoments(axis, spans, end, width) {
  const clock = (moment) => new Date(moment * 1000).toLocaleTimeString();
  const wanted = [[width, "end", "now"], [0, "", clock(Math.min(...spans.map((span) => span.from)))]];
  for (const gap of axis.gaps) wanted.push([(axis.x(gap.from) + axis.x(gap.to)) / 2, "mid", `${duration(gap.to - gap.from)} idle`]);
  for (const gap of axis.gaps) wanted.push([axis.x(gap.to), "", gap.to < end ? clock(gap.to) : ""]);
  const taken = [], texts = [];
  for (const [x, anchor, text] of wanted) {
    const length = LETTER * text.length + 10, from = anchor === "end" ? x - length : anchor === "mid" ? x - length / 2 : x;
    if (!text || from < 0 || from + length > width + 10 || taken.some(([a, b]) => from < b && a < from + length)) continue;
    taken.push([from, from + length]);
    texts.push(svg("text", { class: `tick ${anchor}`, x, y: 15 }, text));
  }
  return picture(width, 20, axis.gaps.length ? "time, without the gaps in which nothing happened" : "time", ...texts);
}

function badgeOf(engine) {
  const { status } = engine;
  const [state, text] = !status ? ["bad", "not reached"] : status.dirty ? ["bad", "dirty"]
    : !status.ready ? ["waiting", status.reason || "not ready"] : status.paused ? ["waiting", "paused"] : ["good", "ready"];
  return node("span", { class: `badge ${state}` }, text);
}

const COLUMNS = [
  ["round", "", (round) => `${round.epoch}.${round.round}`],
  ["at", "", (round) => (round.at ? new Date(round.at * 1000).toLocaleTimeString() : null)],
  ["order", "", (round) => (round.action === "publish" ? null : round.action)],
  ["version", "round-version", (round) => round.version],
  ["proven", "proven", (round) => (typeof round.proven === "boolean" ? (round.proven ? "✓" : "✗") : null)],
  ["phases", "bar", null],
  ["time", "num", (round) => milliseconds(round.seconds)],
  ["mode", "", (round) => round.mode],
  ["bytes", "num", (round) => (round.nbytes ? bytes(round.nbytes) : null)],
  ["rate", "num", (round) => (round.nbytes && round.seconds ? `${(round.nbytes / round.seconds / 1e9).toFixed(2)} GB/s` : null)],
  ["engines well", "num", (round) => round.engines],
];

function bytes(count) {
  const power = Math.min(4, Math.floor(Math.log10(Math.max(1, count)) / 3));
  return `${Number((count / 1000 ** power).toPrecision(3))} ${["B", "kB", "MB", "GB", "TB"][power]}`;
}

function drawRound(round, columns, marks, width) {
  const cells = columns.map(([name, classes, textOf]) => {
    if (textOf === null) return node("td", { class: "bar" }, drawPhases(round, marks, width));
    const cell = node("td", { class: classes }, textOf(round) ?? "");
    if (name === "proven") fill(cell, { class: `proven ${round.proven ? "good" : "bad"}`, "data-tip": `digest ${round.digest}` }, []);
    return cell;
  });
  const row = node("tr", round.error ? { class: "failed" } : {}, ...cells);
  return round.error ? [row, node("tr", { class: "why" }, node("td", { colspan: columns.length }, node("div", {}, `✗ ${round.error}`)))] : [row];
}

function drawRounds(engine, room) {
  const rounds = [...engine.rounds].reverse(), latest = page.live ? rounds.slice(0, SHOWN_ROUNDS) : rounds;
  if (!latest.length) return [node("p", { class: "note" }, "no round yet")];
  const columns = COLUMNS.filter(([, , textOf]) => textOf === null || latest.some((round) => textOf(round)));
  const marks = phaseAxis(latest), width = Math.max(260, Math.min(900, room - 80 * columns.length));
  const head = columns.map(([name, classes, textOf]) =>
    node("th", { scope: "col", class: classes }, textOf === null ? drawPhaseAxis(marks, width) : name));
  const label = `Rounds of ${engine.name}`, names = phasesOf([{ rounds: latest }]);
  return [
    scroller(label, "tall", node("table", { class: "rounds" }, node("thead", {}, node("tr", {}, ...head)),
      node("tbody", {}, ...latest.flatMap((round) => drawRound(round, columns, marks, width))))),
    figures(label, ["round", "version", ...names.map((name) => `${name}, ms`)], () => latest.map((round) =>
      [`${round.epoch}.${round.round}`, round.version, ...names.map((name) => sumOf(round, name))])),
  ];
}
const phasesOf = (engines) => [...new Set(engines.flatMap((engine) => engine.rounds.flatMap((round) => round.phases.map((phase) => phase.name))))];

function sumOf(round, name) {
  const found = round.phases.filter((phase) => phase.name === name);
  return found.length ? (found.reduce((sum, phase) => sum + phase.seconds, 0) * 1e3).toFixed(2) : "–";
}

function adaptersOf(engine) {
  const adapters = Object.entries((engine.status && engine.status.adapters) || {});
  return adapters.map(([name, adapter]) => node("code", { class: "adapter" }, `${name}@${adapter.weight_version}`));
}

function drawEngine(engine, room) {
  const served = engine.status ? node("code", { class: "serves" }, engine.status.weight_version) : null;
  return node("div", { class: "engine", "data-engine": engine.name },
    node("h3", {}, engine.name, engine.role === "trainer" ? null : badgeOf(engine), served, ...adaptersOf(engine)),
    engine.error ? node("p", { class: "bad error" }, engine.error) : null,
    engine.note ? node("p", { class: "note" }, engine.note) : null,
    ...drawRounds(engine, room));
}

function drawEngines(engines, room) {
  const names = phasesOf(engines), trainerOnly = engines.every((engine) => engine.role === "trainer");
  const note = `Newest first.${trainerOnly ? " ✓: every engine's live weights have the published digest." : ""} Red is what failed.`;
  return section("Rounds, phase by phase", note,
    legend(names.map((name) => [name, { fill: phaseColour(name), "data-phase": name }])), ...engines.map((engine) => drawEngine(engine, room)));
}

function factsOf(engines) {
  const fleet = engines.filter((engine) => engine.role !== "trainer"), reached = fleet.filter((engine) => engine.status);
  const commits = fleet.flatMap((engine) => engine.rounds.filter((round) => round.error === null));
  const failed = engines.flatMap((engine) => engine.rounds).filter((round) => round.error !== null).length;
  return {
    "Engines reached": { text: `${reached.length} of ${fleet.length}`, state: reached.length < fleet.length ? "bad" : "" },
    "Serving": [...new Set(reached.map((engine) => engine.status.weight_version))].join(", ") || "–",
    "Commit, median": commits.length ? milliseconds(median(commits.map((round) => round.seconds))) : "–",
    "Rounds that failed": { text: String(failed), state: failed ? "bad" : "" },
  };
}

function summaryOf(engines) {
  const fleet = engines.filter((engine) => engine.role !== "trainer");
  const versions = new Set(fleet.filter((engine) => engine.status).map((engine) => engine.status.weight_version));
  return `${fleet.length} engine${fleet.length === 1 ? "" : "s"}, ${versions.size ? `serving ${[...versions].join(", ")}` : "none of them reached"}`;
}

function draw() {
  const { charts, engines } = page;
  const card = roomFor(0), small = roomFor(charts.filter((chart) => !chart.wide).length || 1);
  const shown = [
    node("header", {}, node("h1", {}, page.title), node("p", { id: "state", class: page.lost ? "bad" : "" }, page.lost || page.summary)),
    drawTiles(page.live && engines.length ? factsOf(engines) : page.facts),
    charts.length ? node("div", { class: "charts" }, ...charts.map((chart) => drawChartBox(chart, chart.wide ? card : small))) : null,
    ...page.tables.map(drawTableBox),
    page.live ? section("Versions over time", "Time in which nothing was published is left out.", node("div", { id: "lanes" })) : null,
    engines.length ? drawEngines(engines, card) : null,
    ...page.details.map(drawTableBox),
  ];
  keeping(() => main.replaceChildren(...shown.filter((part) => part !== null)));
  drawNow();
}

function drawTableBox(table) {
  return section(table.title, table.note, scroller(table.title, "", drawTable(table.columns, table.rows, "wrap")));
}

function drawNow() {
  const lanes = document.getElementById("lanes");
  const fleet = page.engines.filter((engine) => engine.role !== "trainer");
  if (lanes && page.engines.length) keeping(() => lanes.replaceChildren(drawLanes(fleet, Date.now() / 1000, lanes.clientWidth)));
}

// What is drawn anew keeps its focus, where it was scrolled to, and what was opened.
function keeping(redraw) {
  const before = new Map([...document.querySelectorAll("[data-key]")].map((element) =>
    [element.dataset.key, { left: element.scrollLeft, top: element.scrollTop, open: element.open }]));
  const focus = document.activeElement instanceof Element ? document.activeElement.dataset.key : undefined;
  redraw();
  for (const element of document.querySelectorAll("[data-key]")) {
    const kept = before.get(element.dataset.key);
    if (kept?.open) element.open = true;
    if (kept) { element.scrollLeft = kept.left; element.scrollTop = kept.top; }
    else if (element.dataset.key === "scroll Versions over time") element.scrollLeft = element.scrollWidth;
    if (focus !== undefined && element.dataset.key === focus && element !== document.activeElement) element.focus({ preventScroll: true });
  }
}

async function refresh() {
  const before = JSON.stringify([page.engines, page.lost]);
  try {
    const answer = await fetch(page.live, { cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) });
    if (!answer.ok) throw new Error(`answered ${answer.status}`);
    page.engines = (await answer.json()).engines;
    page.summary = summaryOf(page.engines);
    page.lost = "";
  } catch (error) {
    page.lost = `no answer: ${error.message}`;
  }
  if (JSON.stringify([page.engines, page.lost]) === before) drawNow();
  else draw();
  setTimeout(refresh, PERIOD_MS);
}

document.addEventListener("pointermove", (event) => {
  const target = event.target instanceof Element ? event.target : null;
  if (target?.closest(".chart")) return;
  tell(target?.closest("[data-tip]")?.getAttribute("data-tip") ?? null, event.clientX, event.clientY);
});
document.addEventListener("pointerleave", () => tell(null));
let drawnFor = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth === drawnFor) return;
  drawnFor = window.innerWidth;
  requestAnimationFrame(draw);
});
draw();
if (page.live) refresh();
