// Drawings. The shapes are SVG stretched to the place there is; words lie over them as HTML, so
// that they keep their size.

import { element, svg } from "./dom.js";
import { number, percent } from "./format.js";

const WIDTH = 100;
const HEIGHT = 100;
const HEADROOM = 0.94;

/**
 * Scores as a histogram: the calibration's filled, the live ones as a line over it.
 *
 * @param {object} of
 * @param {number[]} of.edges one more than there are bins
 * @param {number[]} of.calibration the share of each bin
 * @param {?number[]} of.live shares too
 * @param {number} of.threshold scores below are OOD
 * @param {?{score: number, verdict: string}} of.mark one image's score
 * @param {string} of.label says the same to those who do not see it
 */
export function histogram({ edges, calibration, live = null, threshold, mark = null, label }) {
  const low = edges[0];
  const width = edges.at(-1) - low;
  const place = (score) => clamp(((score - low) / width) * WIDTH, 0, WIDTH);
  const highest = Math.max(...calibration, ...(live ?? []), Number.MIN_VALUE);
  const height = (share) => (share / highest) * HEIGHT * HEADROOM;
  const shapes = [
    rectangle("side-ood", 0, 0, place(threshold), HEIGHT),
    ...calibration.map((share, i) =>
      bar("bar-calibration", place(edges[i]), place(edges[i + 1]), height(share)),
    ),
  ];
  if (live !== null) shapes.push(...steps(edges.map(place), live.map(height)));
  shapes.push(upright("line-threshold", place(threshold)));
  if (mark !== null) shapes.push(upright(`line-mark ${mark.verdict}`, place(mark.score)));
  const words = [word("above", place(threshold), `threshold ${number(threshold)}`)];
  if (mark !== null) words.push(word(`below ${mark.verdict}`, place(mark.score), number(mark.score)));
  else words.push(...ticks(low, width));
  return plot(`histogram ${mark === null ? "" : "marked"}`, shapes, words, label);
}

/** Bins joined by `group`, where there are too few images for fine ones. */
export function regroup({ edges, calibration, live }, group) {
  const join = (values) =>
    values.flatMap((_, i) => (i % group ? [] : [sum(values.slice(i, i + group))]));
  return {
    edges: edges.filter((_, i) => i % group === 0 || i === edges.length - 1),
    calibration: join(calibration),
    live: join(live),
  };
}

/**
 * Lines of values over time, the newest at the right edge.
 *
 * @param {number[]} times in seconds
 * @param {Record<string, (number|null)[]>} series by class name; null leaves a gap
 */
export function lines(times, series, { spanS, label }) {
  const newest = times.at(-1) ?? 0;
  const highest = Math.max(...Object.values(series).flat().filter(Number.isFinite), 1e-9);
  const x = (time) => WIDTH - ((newest - time) / spanS) * WIDTH;
  const y = (value) => HEIGHT - (value / highest) * HEIGHT * HEADROOM;
  const shapes = Object.entries(series).map(([name, values]) => {
    const points = values.map((value, i) => (value === null ? null : `${x(times[i])} ${y(value)}`));
    return svg("path", { class: `line ${name}`, d: path(points) });
  });
  return plot("lines", shapes, [], label);
}

/** Rates with their intervals on one scale, with a line at the calibrated rate. */
export function intervals(rows, { expected, label }) {
  const highest = Math.min(1, Math.max(2 * expected, ...rows.map((row) => row.upper ?? 0)) * 1.08);
  const place = (rate) => (rate / highest) * WIDTH;
  const list = rows.map((row) => {
    const shapes = [upright("line-threshold", place(expected))];
    if (row.rate !== null) {
      const [low, high] = [place(row.lower), place(row.upper)];
      shapes.push(
        rectangle("whisker", low, 30, Math.max(high - low, 0.5), 40),
        upright("dot", place(row.rate)),
      );
    }
    return element(
      "div",
      { class: "interval" },
      element("span", { class: "interval-name" }, row.name),
      plot("interval-plot", shapes, [], null),
      element("span", { class: "interval-value" }, row.rate === null ? "no image" : percent(row.rate)),
    );
  });
  return element("div", { class: "intervals", role: "img", "aria-label": label }, ...list);
}

/** How far evidence has come towards its bound. */
export function meter(share, { isFull, label }) {
  const shapes = [
    rectangle("meter-ground", 0, 0, WIDTH, HEIGHT),
    rectangle(isFull ? "meter-full" : "meter-part", 0, 0, clamp(share, 0, 1) * WIDTH, HEIGHT),
  ];
  return plot("meter", shapes, [], label);
}

function plot(name, shapes, words, label) {
  const drawing = svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    ...shapes,
  );
  const said = label === null ? {} : { role: "img", "aria-label": label };
  return element("div", { class: `plot ${name}`, ...said }, drawing, ...words);
}

function bar(name, left, right, height) {
  // A hair of space between bars.
  return rectangle(name, left, HEIGHT - height, Math.max((right - left) * 0.9, 0.1), height);
}

function rectangle(name, x, y, width, height) {
  return svg("rect", { class: name, x, y, width, height });
}

function upright(name, x) {
  return svg("path", { class: name, d: `M${x} 0V${HEIGHT}` });
}

function steps(places, heights) {
  const corners = heights.map((height, i) => `L${places[i]} ${HEIGHT - height}H${places[i + 1]}`);
  const outline = `M${places[0]} ${HEIGHT}${corners.join("")}L${places.at(-1)} ${HEIGHT}`;
  return [
    svg("path", { class: "area-live", d: `${outline}Z` }),
    svg("path", { class: "line live", d: outline }),
  ];
}

function path(points) {
  return points
    .map((point, i) => (point === null ? "" : `${points[i - 1] ? "L" : "M"}${point}`))
    .join("");
}

function ticks(low, width) {
  return [0, 25, 50, 75, 100].map((place) =>
    word("below tick", place, round(low + (width * place) / WIDTH, width)),
  );
}

function round(value, width) {
  return value.toFixed(Math.max(0, 2 - Math.floor(Math.log10(width))));
}

function word(name, place, text) {
  const label = element("span", { class: `word ${name}` }, text);
  label.style.setProperty("--place", `${place}%`);
  // Near an edge the word leans inwards.
  label.style.setProperty("--lean", `${-clamp(place, 8, 92)}%`);
  return label;
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}
