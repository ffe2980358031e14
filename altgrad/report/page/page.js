"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const number = v => typeof v === "string" ? ({ inf: Infinity, "-inf": -Infinity, nan: NaN })[v] : v;
for (const layer of data.layers) layer.scores = layer.scores.map(score => score.map(number));
const names = data.candidates.map(c => c.name);
const figures = v => number(v).toPrecision(5);
const mean = values => values.reduce((a, b) => a + b, 0) / values.length;
const percent = v => v === 0 ? "0" : v < 1e-4 ? "<0.01%" : (100 * v).toFixed(2) + "%";
const fixed = digits => v => Number.isNaN(v) ? "NaN" : v === Infinity ? "exact" : v.toFixed(digits);
// In the order of the scores: name, text of a value, whether more is better, what it is.
const METRICS = [
  ["SQNR, dB", fixed(1), true, "Signal-to-quantization-noise ratio: 10 log10 of the sum of squares over that of the errors. 6 dB more is a bit more. \"exact\": no error."],
  ["clipped", percent, false, "Share of the values beyond the largest value of the format."],
  ["flushed", percent, false, "Share of the values that are not zero and become zero."],
  ["used bits", fixed(2), true, "log2 of the number of codes in use: far below the width, the format has codes that this layer wastes."],
  ["scale spread", fixed(1), true, "log2 of the largest over the smallest scale: what scales of blocks or rows adapt to. A block of zeros has the smallest scale."],
  ["bits", fixed(2), false, "Bits of storage for an element, its share of the scales included."],
  ["sensitivity", v => v.toExponential(1), false, "Sum of squared gradient times squared error: twice the predicted loss, but for the number of samples."],
];
const hasSensitivity = data.layers.some(l => l.scores.some(s => s[6] !== null));

function element(tag, attributes = {}, ...children) {
  const result = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) result.setAttribute(key, value);
  result.append(...children);
  return result;
}

// A table that sorts by a click on a column's head. rows: {cells: [value], draw: () => [td]}.
function sortable(table, columns, rows, state = { column: null, down: false }) {
  const order = [...rows];
  if (state.column !== null) {
    const key = row => row.cells[state.column];
    const rank = v => v === null || Number.isNaN(v) ? 1 : 0; // last, whichever way
    order.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (rank(x) || rank(y)) return rank(x) - rank(y);
      const sign = x < y ? -1 : x > y ? 1 : 0;
      return state.down ? -sign : sign;
    });
  }
  const head = element("tr");
  columns.forEach((column, i) => {
    // A long name breaks behind its marks.
    const button = element("button", { type: "button" }, ...column.split(/(?<=[_@/])/).flatMap(word => [word, element("wbr")]));
    button.onclick = () => sortable(table, columns, rows, { column: i, down: state.column === i ? !state.down : i > 0 });
    const sorted = state.column === i ? (state.down ? "descending" : "ascending") : "none";
    head.append(element("th", { scope: "col", "aria-sort": sorted }, button));
  });
  const body = element("tbody");
  for (const row of order) body.append(row.draw());
  table.replaceChildren(element("thead", {}, head), body);
}

// Cividis, a map that people with color blindness read as others do; dark is low.
const STOPS = [[0, 34, 78], [66, 78, 108], [124, 123, 120], [187, 173, 108], [254, 232, 56]];
function color(share) {
  const place = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1), i = Math.min(Math.floor(place), STOPS.length - 2);
  return STOPS[i].map((from, k) => Math.round(from + (place - i) * (STOPS[i + 1][k] - from)));
}
// Black or white, whichever has more contrast.
const ink = ([r, g, b]) => 0.299 * r + 0.587 * g + 0.114 * b > 117 ? "#000" : "#fff";

function candidatesTable() {
  const layers = data.layers.filter(l => l.matrix).length ? data.layers.filter(l => l.matrix) : data.layers;
  const total = layers.reduce((sum, l) => sum + l.count, 0);
  const rows = names.map((name, i) => {
    const weighted = k => layers.reduce((sum, l) => sum + l.count * l.scores[i][k], 0) / total;
    const ratios = layers.map(l => l.scores[i][0]).filter(v => !Number.isNaN(v)).sort((a, b) => a - b);
    const middle = ratios.length ? mean([ratios[ratios.length - 1 >> 1], ratios[ratios.length >> 1]]) : NaN;
    const chosen = data.layers.filter(l => l.chosen === name).length;
    const cells = [name, weighted(5), middle, ratios.length ? ratios[0] : NaN, weighted(1), weighted(2), weighted(3), chosen];
    const texts = [name, fixed(2)(cells[1]), fixed(1)(middle), fixed(1)(cells[3]), percent(cells[4]), percent(cells[5]), fixed(2)(cells[6]), String(chosen)];
    return { cells, draw: () => element("tr", {}, ...texts.map((t, k) => element(k ? "td" : "th", k ? {} : { scope: "row" }, t))) };
  });
  sortable(document.getElementById("candidates"), ["candidate", "bits", "median dB", "lowest dB", "clipped", "flushed", "used bits", "recommended for"], rows);
}

let selected = null;
const layerState = { column: null, down: false };
function layersTable() {
  const metric = Number(document.getElementById("metric").value);
  const [title, text, moreIsBetter, note] = METRICS[metric];
  document.getElementById("metric-note").textContent = note;
  const filter = document.getElementById("filter").value.toLowerCase();
  const vectors = document.getElementById("vectors").checked;
  const layers = data.layers.filter(l => (l.matrix || vectors) && l.name.toLowerCase().includes(filter));
  const place = v => metric === 6 ? Math.log10(v || Number.MIN_VALUE) : v;
  const values = layers.flatMap(l => l.scores.map(s => s[metric])).filter(v => v !== null && Number.isFinite(v) && (metric !== 6 || v > 0)).map(place);
  let low = Infinity, high = -Infinity;
  for (const v of values) { low = Math.min(low, v); high = Math.max(high, v); }
  const share = v => high > low ? (moreIsBetter ? place(v) - low : high - place(v)) / (high - low) : 1;
  const several = new Set(data.layers.map(l => l.operand)).size > 1;
  const rows = layers.map(layer => {
    const label = layer.name + (several ? " · " + layer.operand : "");
    const cells = [label, layer.shape, ...layer.scores.map(s => s[metric])];
    const draw = () => {
      const button = element("button", { type: "button" }, label);
      button.onclick = () => select(layer);
      const name = element("th", { scope: "row" }, button);
      if (layer.nan || layer.infinite) name.append(element("span", { class: "problem" }, ` ${layer.nan} NaN, ${layer.infinite} inf`));
      const row = element("tr", {}, name, element("td", { class: "text" }, layer.shape));
      layer.scores.forEach((score, i) => {
        const value = score[metric];
        const cell = element("td", { class: "cell" }, value === null ? "-" : text(value));
        if (value !== null && !Number.isNaN(value)) {
          const background = color(share(value));
          cell.style.background = `rgb(${background})`;
          cell.style.color = ink(background);
        }
        if (layer.chosen === names[i]) { cell.classList.add("chosen"); cell.title = "recommended"; }
        row.append(cell);
      });
      if (layer === selected) row.className = "selected";
      row.dataset.layer = label;
      return row;
    };
    return { cells, draw };
  });
  sortable(document.getElementById("layers"), [several ? "layer · operand" : "layer", "shape", ...names], rows, layerState);
  const ends = [low, high].map(v => metric === 6 ? (10 ** v).toExponential(1) : text(v));
  if (!moreIsBetter) ends.reverse();
  const legend = document.getElementById("legend");
  const ramp = element("span", { class: "ramp" });
  ramp.style.background = `linear-gradient(to right, ${STOPS.map(s => `rgb(${s})`)})`;
  legend.replaceChildren(ends[0], ramp, ends[1], element("span", { class: "mark" }, "recommended"));
  legend.setAttribute("aria-label", `Colors of ${title} from ${ends[0]}, dark, to ${ends[1]}, light; a frame marks what is recommended`);
}

const NS = "http://www.w3.org/2000/svg";
function svg(tag, attributes, text) {
  const result = document.createElementNS(NS, tag);
  for (const [key, value] of Object.entries(attributes)) result.setAttribute(key, value);
  if (text !== undefined) result.textContent = text;
  return result;
}

// Counts by octave on a logarithmic axis; below, from the largest value of the layer down, what each format reaches:
// dark with one scale, light what smaller scales of blocks add.
function histogram(layer) {
  const octaves = layer.octaves;
  if (!octaves.length) return element("p", {}, "No finite values but zero.");
  const top = octaves[octaves.length - 1][0];
  const first = Math.max(Math.min(octaves[0][0], top - 20), top - 60);
  const columns = top - first + 1, width = 900, left = 130, step = (width - left - 10) / columns, height = 180, line = 15;
  const total = height + 40 + line * names.length;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${total}`, width, height: total, role: "img" });
  const most = Math.max(...octaves.map(o => o[1]));
  const words = octaves.slice(-12).reverse().map(([k, n]) => `2^${k}: ${n}`).join(", ");
  picture.append(svg("title", {}, `Values of ${layer.name} by octave, ${layer.count} in all, ${layer.zeros} zeros; the largest octaves: ${words}`));
  for (const [k, n] of octaves) {
    if (k < first) continue;
    const tall = (Math.log10(n) + 0.3) / (Math.log10(most) + 0.3) * (height - 20);
    const bar = svg("rect", { x: left + (k - first) * step + 1, y: height - tall, width: Math.max(step - 2, 1), height: tall, fill: "#0072b2" });
    bar.append(svg("title", {}, `2^${k} to 2^${k + 1}: ${n}`));
    picture.append(bar);
  }
  for (let e = 0; 10 ** e <= most; e += Math.max(1, Math.ceil(Math.log10(most) / 5))) {
    const y = height - (e + 0.3) / (Math.log10(most) + 0.3) * (height - 20);
    picture.append(svg("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, (10 ** e).toLocaleString("en")));
  }
  const every = Math.max(1, Math.ceil(columns / 20));
  for (let k = top; k >= first; k -= every)
    picture.append(svg("text", { x: left + (k - first + 0.5) * step, y: height + 14, "text-anchor": "middle" }, `2^${k}`));
  data.candidates.forEach((c, i) => {
    const y = height + 26 + i * line, end = left + columns * step, spread = layer.scores[i][4] || 0;
    const one = Math.max(left, end - (c.octaves + 1) * step), more = Math.max(left, one - spread * step);
    picture.append(svg("text", { x: left - 6, y: y + 9, "text-anchor": "end" }, c.name));
    picture.append(svg("rect", { x: more, y, width: Math.max(one - more, 0), height: line - 5, fill: "#f0c27b" }));
    const reach = svg("rect", { x: one, y, width: end - one, height: line - 5, fill: layer.chosen === c.name ? "#d55e00" : "#8a8a8a" });
    reach.append(svg("title", {}, `${c.name}: ${c.octaves.toFixed(1)} octaves, scales spread over ${spread.toFixed(1)}`));
    picture.append(reach);
  });
  return picture;
}

function select(layer) {
  selected = layer;
  layersTable();
  document.getElementById("detail-title").textContent = layer.name;
  const also = layer.also.length ? `, tied to ${layer.also.join(", ")}` : "";
  document.getElementById("detail-note").textContent =
    `${layer.operand}, ${layer.shape}, ${layer.dtype}, ${layer.count} values, ${layer.zeros} zeros, ${layer.nan} NaN, ${layer.infinite} infinite${also}. ` +
    "Bars: how many values lie in each octave. Below: what a format reaches from the largest value down with one scale (gray, orange if recommended), and what smaller scales of blocks or rows add (light).";
  document.getElementById("histogram").replaceChildren(histogram(layer));
  const used = METRICS.slice(0, hasSensitivity ? 7 : 6);
  const rows = names.map((name, i) => {
    const cells = [name, ...layer.scores[i].slice(0, used.length)];
    const texts = cells.map((v, k) => k ? (v === null ? "-" : used[k - 1][1](v)) : v + (layer.chosen === name ? " (recommended)" : ""));
    return { cells, draw: () => element("tr", {}, ...texts.map((t, k) => element(k ? "td" : "th", k ? {} : { scope: "row" }, t))) };
  });
  sortable(document.getElementById("scores"), ["candidate", ...used.map(m => m[0])], rows);
  document.getElementById("detail").focus();
}

document.title = `Formats report: ${data.source}`;
document.getElementById("source").textContent = data.source;
const matrices = data.layers.filter(l => l.matrix).length;
const hurt = data.layers.filter(l => l.nan || l.infinite).length;
const sentences = [`${data.layers.length} tensors, ${matrices} of them matrices, under ${names.length} candidates.`];
if (data.budget) sentences.push(`Recommended within the budget: ${Object.entries(data.budget.bits).map(([kind, bits]) => `${bits.toFixed(3)} bits for ${kind} on average`).join(", ")}.`);
if (data.loss !== null) sentences.push(`Loss ${figures(data.loss)}` + (data.budget && data.budget.predicted !== null ? `, predicted ${figures(data.budget.predicted)}` : "") + (data.budget && data.budget.loss !== null ? `, with the recommended recipes ${figures(data.budget.loss)}.` : "."));
if (hurt) sentences.push(`${hurt} have NaN or infinities.`);
document.getElementById("summary").textContent = sentences.join(" ");
const choose = document.getElementById("metric");
METRICS.slice(0, hasSensitivity ? 7 : 6).forEach((m, i) => choose.append(element("option", { value: i }, m[0])));
for (const id of ["metric", "vectors", "filter"]) document.getElementById(id).oninput = layersTable;
if (!matrices) document.getElementById("vectors").checked = true;
candidatesTable();
layersTable();
if (data.left_out.length)
  sortable(document.getElementById("left-out"), ["tensor", "reason"], data.left_out.map(cells => ({ cells, draw: () => element("tr", {}, ...cells.map(c => element("td", { class: "text" }, c))) })));
else document.getElementById("left").hidden = true;
