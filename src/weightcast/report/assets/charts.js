"use strict";
// Drawing: charts, bars of phases, and the axis that leaves out idle time. Everything is drawn at its size on the screen, so that letters
// are never scaled: what is wider than its box scrolls. Texts become text nodes or attributes, never markup.
const SVG = "http://www.w3.org/2000/svg";
const NUM_SERIES = 8, LETTER = 6.8;

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}
const node = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const picture = (width, height, label, ...children) =>
  svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ...children);

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e4) return Math.round(value).toLocaleString("en");
  return size !== 0 && size < 1e-3 ? Number(value.toPrecision(3)).toExponential() : String(Number(value.toPrecision(4)));
}
const milliseconds = (seconds) => `${(seconds * 1e3).toFixed(seconds < 0.01 ? 2 : 1)} ms`;

function duration(seconds) {
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (seconds >= 2 * length) return `${Math.round(seconds / length)} ${unit}`;
  }
  return `${Math.round(seconds)} s`;
}

// About `count` round numbers that cover [low, high]: the first is at most `low`, the last at least `high`.
function ticks(low, high, count) {
  if (!(high > low)) high = low + (Math.abs(low) || 1);
  const base = 10 ** Math.floor(Math.log10((high - low) / count));
  const step = base * ([1, 2, 2.5, 5, 10].find((factor) => (high - low) / (base * factor) <= count) ?? 10);
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

function median(values) {
  const ordered = [...values].sort((a, b) => a - b);
  return ordered.length ? ordered[Math.floor(ordered.length / 2)] : 0;
}

// The same phase has the same colour on every page; the table of names comes with the document.
function phaseColour(name) {
  const { colours } = page;
  if (Object.hasOwn(colours, name)) return colours[name];
  const others = [...new Set(Object.values(colours))];
  return others[[...name].reduce((sum, sign) => sum + sign.codePointAt(0), 0) % others.length];
}

const swatch = (attributes) => svg("svg", { viewBox: "0 0 12 12", "aria-hidden": "true" },
  svg("rect", { width: 12, height: 12, rx: 3, ...attributes }));
const legend = (entries) => node("ul", { class: "legend" },
  ...entries.map(([name, attributes]) => node("li", {}, swatch(attributes), name)));

// A chart over steps: `axes` draws what both kinds have in common and says where a step and a value lie.
function axes(chart, width, height, marks, unit) {
  const count = stepsOf(chart), labels = marks.map((mark) => number(Number(mark.toPrecision(12))) + unit);
  const left = 12 + LETTER * Math.max(...labels.map((label) => label.length)), right = 14, top = 10, bottom = 32;
  const span = marks.at(-1) - marks[0];
  const y = (value) => top + ((height - top - bottom) * (marks.at(-1) - value)) / span;
  const inset = chart.kind === "shares" ? (width - left - right) / (2 * count) : 0;
  const x = (step) => left + inset + ((width - left - right - 2 * inset) * step) / Math.max(1, count - 1);
  const lines = marks.flatMap((mark, i) => [
    svg("line", { class: "grid", x1: left, x2: width - right, y1: y(mark), y2: y(mark) }),
    svg("text", { class: "tick end", x: left - 8, y: y(mark) + 4 }, labels[i]),
  ]);
  const places = [...new Set([1, ...ticks(1, count, Math.max(2, width / 110))])];
  for (const step of places.filter((mark) => Number.isInteger(mark) && mark >= 1 && mark <= count && !(mark > 1 && mark < count / 20))) {
    lines.push(svg("text", { class: "tick mid", x: x(step - 1), y: height - 16 }, String(step)));
  }
  lines.push(svg("text", { class: "tick end", x: width - right, y: height - 2 }, chart.x_label));
  return { lines, x, y, top, bottom: height - bottom, width: (width - left - right) / Math.max(1, count) };
}
const stepsOf = (chart) => Math.max(...Object.values(chart.series).map((values) => values.length));

function lineChart(chart, width, height) {
  const every = Object.values(chart.series).flat().filter((value) => value !== null);
  const low = every.reduce((a, b) => Math.min(a, b), every[0]), high = every.reduce((a, b) => Math.max(a, b), every[0]);
  const marks = ticks(low, high, 5);
  const frame = axes(chart, width, height, marks, "");
  const lines = Object.values(chart.series).map((values, i) => {
    // A value that is missing interrupts the line; a value between two that are missing is drawn as a dot.
    let path = "", drawing = false;
    values.forEach((value, step) => {
      if (value !== null) path += `${drawing ? "L" : "M"}${frame.x(step).toFixed(1)} ${frame.y(value).toFixed(1)}${drawing ? "" : "h0"}`;
      drawing = value !== null;
    });
    return svg("path", { class: `line s${i % NUM_SERIES}${i === 0 ? " main" : ""}`, d: path });
  });
  return [frame, lines.reverse()];
}

function shareChart(chart, width, height) {
  const frame = axes(chart, width, height, [0, 25, 50, 75, 100], " %");
  const bars = [];
  for (let step = 0; step < stepsOf(chart); step++) {
    let passed = 0;
    sharesAt(chart, step).forEach((share, i) => {
      const x = frame.x(step) - frame.width * 0.42, y = frame.y(100 * (passed + share));
      bars.push(svg("rect", { class: `fill s${i % NUM_SERIES}`, x, y, width: frame.width * 0.84, height: frame.y(100 * passed) - y }));
      passed += share;
    });
  }
  return [frame, bars];
}

function sharesAt(chart, step) {
  const values = Object.values(chart.series).map((series) => series[step] ?? 0);
  const sum = values.reduce((a, b) => a + b, 0);
  return values.map((value) => (sum ? value / sum : 0));
}

function textAt(chart, step) {
  const unit = chart.unit ? ` ${chart.unit}` : "";
  const shares = chart.kind === "shares" ? sharesAt(chart, step) : null;
  const lines = Object.entries(chart.series).map(([name, values], i) => {
    const share = shares ? ` (${(100 * shares[i]).toFixed(1)} %)` : "";
    return `${name}: ${number(values[step])}${unit}${share}`;
  });
  return [`${chart.x_label} ${step + 1}`, ...lines].join("\n");
}

// The chart as a picture that says its values at the pointer, and at the arrow keys.
function drawChart(chart, width) {
  const height = chart.wide ? 280 : 200;
  const [frame, marks] = (chart.kind === "shares" ? shareChart : lineChart)(chart, width, height);
  const count = stepsOf(chart);
  const cursor = svg("line", { class: "cursor", y1: frame.top, y2: frame.bottom, visibility: "hidden" });
  const made = picture(width, height, `${chart.title}, ${count} steps; the arrow keys read out the values`, ...frame.lines, ...marks, cursor);
  fill(made, { tabindex: 0, class: "chart", "data-key": `chart ${chart.title}` }, []);
  let step = count;
  const show = (next) => {
    step = Math.max(0, Math.min(count - 1, next));
    fill(cursor, { x1: frame.x(step), x2: frame.x(step), visibility: "visible" }, []);
    const box = made.getBoundingClientRect();
    tell(textAt(chart, step), box.left + frame.x(step), box.top + frame.top);
  };
  const hide = () => { cursor.setAttribute("visibility", "hidden"); tell(null); };
  made.addEventListener("pointermove", (event) => {
    const at = event.clientX - made.getBoundingClientRect().left, pace = count > 1 ? frame.x(1) - frame.x(0) : 1;
    show(Math.round((at - frame.x(0)) / pace));
  });
  made.addEventListener("keydown", (event) => {
    const next = { ArrowLeft: step - 1, ArrowRight: step >= count ? 0 : step + 1, Home: 0, End: count - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    show(next);
  });
  made.addEventListener("pointerleave", hide);
  made.addEventListener("blur", hide);
  return made;
}

// Bars of phases share one axis. A few rounds that dwarf the rest (the first connects and compiles) run past its end.
function phaseAxis(rounds) {
  const ends = rounds.map(lengthOf).sort((a, b) => a - b);
  const most = ends[Math.floor((ends.length - 1) * 0.9)] * 1.25;
  return ticks(0, Math.max(ends.length >= 10 ? Math.min(most, ends.at(-1)) : ends.at(-1), 1e-6) * 1e3, 6);
}
const lengthOf = (round) => Math.max(round.seconds, ...round.phases.map((phase) => phase.start_s + phase.seconds));

function drawPhaseAxis(marks, width) {
  const texts = marks.map((mark, i) => {
    const place = i === 0 ? "tick" : i === marks.length - 1 ? "tick end" : "tick mid";
    const unit = i === marks.length - 1 ? " ms" : "";
    return svg("text", { class: place, x: (width * mark) / marks.at(-1), y: 13 }, `${number(Number(mark.toPrecision(12)))}${unit}`);
  });
  return picture(width, 18, `0 to ${marks.at(-1)} milliseconds`, ...texts);
}

function drawPhases(round, marks, width) {
  const scale = (width * 1e3) / marks.at(-1);
  const bars = round.phases.filter((phase) => phase.start_s * scale < width).map((phase) => {
    // One pixel of each segment's end stays free, so that neighbours can be told apart without their colours.
    const x = phase.start_s * scale, length = Math.max(0.75, Math.min(phase.seconds * scale, width - x) - 1);
    const tip = `${round.version}\n${phase.name}: ${milliseconds(phase.seconds)}, from ${milliseconds(phase.start_s)}\n${milliseconds(round.seconds)} in all`;
    return svg("rect", {
      class: "phase", "data-phase": phase.name, "data-tip": tip, x, y: 2, width: length, height: 12, rx: 1.5, fill: phaseColour(phase.name),
    });
  });
  const grid = marks.slice(1, -1).map((mark) => svg("line", { class: "grid", x1: (width * mark) / marks.at(-1), x2: (width * mark) / marks.at(-1), y1: 0, y2: 16 }));
  const said = round.phases.map((phase) => `${phase.name} ${milliseconds(phase.seconds)}`).join(", ");
  return picture(width, 16, said || "no phases", ...grid, ...bars);
}

// An axis of moments on which time in which nothing happened takes little room: `x` of a moment, and the gaps that were cut.
function busyAxis(moments, pace, width) {
  const times = [...new Set(moments)].sort((a, b) => a - b);
  const limit = Math.max(1, 4 * pace), places = [0], gaps = [];
  for (let i = 1; i < times.length; i++) {
    const length = times[i] - times[i - 1];
    places.push(places[i - 1] + Math.min(length, limit));
    if (length > limit) gaps.push({ from: times[i - 1], to: times[i] });
  }
  const scale = width / (places.at(-1) || 1);
  const x = (moment) => {
    const after = times.findIndex((time) => time >= moment);
    if (after <= 0) return after === 0 ? 0 : width;
    const share = (moment - times[after - 1]) / (times[after] - times[after - 1]);
    return scale * (places[after - 1] + share * (places[after] - places[after - 1]));
  };
  return { x, gaps };
}

// One hue for one version; none is near red, which means failure.
function versionColour(version) {
  let hash = 0;
  for (const sign of version) hash = (hash * 31 + sign.codePointAt(0)) % 1000003;
  return `hsl(${50 + ((hash * 137) % 251)} 50% 38%)`;
}
