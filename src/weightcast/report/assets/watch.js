"use strict";
const SVG = "http://www.w3.org/2000/svg";
const PERIOD_MS = 1000, SHOWN_ROUNDS = 30, SPAN_S = 600, WIDTH = 960, MAX_PHASES = 64;
const phaseColours = new Map();

function node(tag, attributes = {}, text = "", space = null) {
  const made = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== "") made.textContent = text;
  return made;
}
const svg = (tag, attributes, text = "") => node(tag, attributes, text, SVG);

function colourOf(phase) {
  if (!phaseColours.has(phase) && phaseColours.size >= MAX_PHASES) return 7;
  if (!phaseColours.has(phase)) {
    const number = phaseColours.size % 8;
    phaseColours.set(phase, number);
    const entry = node("li");
    entry.append(node("i", { class: `b${number}` }), phase);
    document.getElementById("legend").append(entry);
  }
  return phaseColours.get(phase);
}

function hueOf(version) {
  let hash = 0;
  for (const letter of version) hash = (hash * 31 + letter.charCodeAt(0)) % 360;
  return `hsl(${(hash * 137) % 360} 55% 42%)`;
}

// What an engine served when: a successful commit or roll-back begins a version, which lasts until the next one.
function spansOf(engine, now) {
  const begins = engine.rounds.filter((round) => round.error === null && round.at !== null && round.version);
  return begins.map((round, i) => ({
    version: round.version, from: round.at, to: i + 1 < begins.length ? begins[i + 1].at : now,
  }));
}

function drawLanes(engines, now) {
  const row = 26, left = 190, height = row * Math.max(1, engines.length) + 24;
  const chart = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, class: "chart", role: "img" });
  const first = Math.max(now - SPAN_S, Math.min(now - 10, ...engines.flatMap((e) => spansOf(e, now).map((s) => s.from))));
  const x = (at) => left + ((WIDTH - left - 8) * (Math.max(at, first) - first)) / (now - first);
  engines.forEach((engine, i) => {
    chart.append(svg("text", { class: "lane-name", x: 0, y: row * i + 17 }, engine.name.slice(-28)));
    for (const span of spansOf(engine, now)) {
      if (span.to < first) continue;
      const width = Math.max(1, x(span.to) - x(span.from) - 1);
      const box = svg("rect", {
        class: "version", x: x(span.from), y: row * i + 4, width, height: row - 8, fill: hueOf(span.version),
      });
      box.append(svg("title", {}, `${span.version}, since ${new Date(span.from * 1000).toLocaleTimeString()}`));
      chart.append(box);
      if (width > 24) {
        const label = span.version.split("-")[0];
        chart.append(svg("text", { class: "version-text", x: x(span.from) + 5, y: row * i + 17 }, label));
      }
    }
  });
  chart.append(svg("text", { class: "tick", x: left, y: height - 6 }, `${Math.round(now - first)} s ago`));
  chart.append(svg("text", { class: "tick end", x: WIDTH - 8, y: height - 6 }, "now"));
  document.getElementById("lanes").replaceChildren(chart);
}

function badgeOf(status) {
  if (!status) return node("span", { class: "badge bad" }, "not reached");
  if (status.dirty) return node("span", { class: "badge bad" }, "dirty");
  if (!status.ready) return node("span", { class: "badge wait" }, status.reason || "not ready");
  return node("span", { class: status.paused ? "badge wait" : "badge" }, status.paused ? "paused" : "ready");
}

function barOf(round, longest) {
  const bar = svg("svg", { viewBox: "0 0 1000 14", preserveAspectRatio: "none" });
  let start = 0;
  for (const [phase, seconds] of Object.entries(round.phases)) {
    const width = Math.max(1, (1000 * seconds) / longest);
    const segment = svg("rect", { class: `phase c${colourOf(phase)}`, "data-phase": phase, x: start, y: 1, width, height: 12 });
    segment.append(svg("title", {}, `${phase}: ${(seconds * 1e3).toFixed(2)} ms`));
    bar.append(segment);
    start += width;
  }
  return bar;
}

function drawEngine(engine) {
  const box = node("div", { class: "engine", "data-engine": engine.name });
  const head = node("h3", {}, engine.name);
  head.append(badgeOf(engine.status));
  if (engine.status) head.append(node("code", { class: "serves" }, engine.status.weight_version));
  const table = node("table", { class: "rounds" });
  const latest = engine.rounds.slice(-SHOWN_ROUNDS).reverse();
  const longest = Math.max(1e-6, ...latest.map((round) => round.seconds));
  for (const round of latest) {
    const row = node("tr", round.error ? { class: "failed" } : {});
    row.append(node("td", {}, `${round.epoch}.${round.round}`), node("td", {}, round.action));
    row.append(node("td", { class: "round-version" }, round.error ? `✗ ${round.error}` : round.version));
    const cell = node("td", { class: "bar" });
    cell.append(barOf(round, longest));
    row.append(cell, node("td", { class: "num" }, `${(round.seconds * 1e3).toFixed(1)} ms`));
    table.append(row);
  }
  box.append(head, latest.length ? table : node("p", { class: "note" }, "no round yet"));
  return box;
}

async function refresh() {
  const state = document.getElementById("state");
  try {
    const answer = await fetch("weightcast/rounds", { cache: "no-store" });
    if (!answer.ok) throw new Error(`answered ${answer.status}`);
    const { engines } = await answer.json();
    const fleet = engines.filter((engine) => engine.name !== "trainer");
    drawLanes(fleet, Date.now() / 1000);
    document.getElementById("engines").replaceChildren(...engines.map(drawEngine));
    const versions = new Set(fleet.map((e) => (e.status ? e.status.weight_version : "?")));
    state.textContent = `${fleet.length} engine${fleet.length === 1 ? "" : "s"}, serving ${[...versions].join(", ")}`;
    state.className = "";
  } catch (error) {
    state.textContent = `no answer: ${error.message}`;
    state.className = "bad";
  }
  setTimeout(refresh, PERIOD_MS);
}
refresh();
