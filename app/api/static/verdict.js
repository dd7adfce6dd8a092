// The verdicts in words and signs; colour comes on top.

import { element, svg } from "./dom.js";

const WORDS = {
  id: "In-distribution",
  ood: "Out-of-distribution",
  uncertain: "Uncertain",
  error: "No verdict",
  waiting: "Waiting",
};

const SIGNS = {
  id: "M3 8.5 6.5 12 13 4.5",
  ood: "M8 2.5 14 13.5H2zM8 7v2.75M8 11.75v.01",
  uncertain: "M3 6.5q2.5-3 5 0t5 0M3 11q2.5-3 5 0t5 0",
  error: "M4 4l8 8M12 4l-8 8",
  waiting: "M8 4v4l2.5 2M8 2a6 6 0 1 0 .01 0",
};

/** The word for a verdict. */
export function wordOf(verdict) {
  return WORDS[verdict] ?? verdict;
}

/** A badge: sign and word. */
export function badge(verdict) {
  const path = svg("path", {
    d: SIGNS[verdict],
    fill: "none",
    stroke: "currentColor",
    "stroke-width": "1.8",
    "stroke-linecap": "round",
    "stroke-linejoin": "round",
  });
  const sign = svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, path);
  return element("span", { class: "verdict", "data-verdict": verdict }, sign, wordOf(verdict));
}

/** What the p-value says, in a sentence. */
export function explain(verdict, pValueText) {
  if (verdict === "id") return `${pValueText} of the calibration images score as low or lower.`;
  return `Only ${pValueText} of the calibration images score as low or lower.`;
}
