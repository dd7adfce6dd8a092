// One image: what it looks like, what was found, or why nothing was.

import { element } from "./dom.js";
import { histogram } from "./drawing.js";
import { duration, number, percent } from "./format.js";
import { badge, explain, wordOf } from "./verdict.js";

/** A card in the list of verdicts. */
export class Card {
  #badge = element("span", { class: "badge" });
  #body = element("div", { class: "card-body" });

  constructor(name, picture) {
    this.name = name;
    this.picture = picture;
    this.element = element(
      "li",
      { class: "panel card" },
      element(
        "div",
        { class: "card-head" },
        element("div", { class: "frame" }, picture),
        element("div", { class: "card-title" }, element("h3", { title: name }, name), this.#badge),
      ),
      this.#body,
    );
    this.wait("Being judged");
  }

  /** Say what is being waited for. */
  wait(text) {
    this.#show("waiting", element("p", { class: "small muted" }, text));
  }

  /** Show an error, and a button where another attempt may go better. */
  fail(text, retry) {
    const again = element("button", { class: "button", type: "button" }, "Try again");
    again.addEventListener("click", retry);
    this.#show("error", element("p", { class: "error" }, text), retry === null ? null : again);
  }

  /**
   * Show a verdict.
   *
   * @param {object} result as /v1/score gave it
   * @param {{calibration: ?object, seconds: number, model: string, version: number}} with_
   */
  succeed(result, { calibration, seconds, model, version }) {
    this.#show(
      result.verdict,
      calibration === null ? null : drawingOf(result, calibration),
      element("p", { class: "small" }, explain(result.verdict, percent(result.p_value))),
      facts({
        score: number(result.score),
        threshold: number(result.threshold),
        "p-value": number(result.p_value),
        "round trip": duration(seconds),
      }),
      predictions(result),
      element("p", { class: "small muted source" }, `${model}, version ${version}`),
    );
  }

  #show(verdict, ...content) {
    this.element.dataset.verdict = verdict;
    this.#badge.replaceChildren(badge(verdict));
    this.#body.replaceChildren(...content.filter((one) => one !== null));
  }
}

/** Terms and their values. */
export function facts(values) {
  const pairs = Object.entries(values).map(([term, value]) =>
    element("div", {}, element("dt", {}, term), element("dd", {}, value)),
  );
  return element("dl", { class: "facts small" }, ...pairs);
}

function drawingOf({ score, threshold, verdict }, { edges, calibration }) {
  const side = score < threshold ? "below" : "at or above";
  return histogram({
    edges,
    calibration,
    threshold,
    mark: { score, verdict },
    label:
      `Histogram of the calibration scores. This image's score ${number(score)} is ${side} ` +
      `the threshold ${number(threshold)}: ${wordOf(verdict).toLowerCase()}.`,
  });
}

function predictions({ verdict, predictions: found }) {
  if (found.length === 0) return null;
  const title = verdict === "ood" ? "What the classifier would have said" : "Prediction";
  const rows = found.map(({ label, probability }) => {
    const bar = element("span", { class: "share", "aria-hidden": "true" });
    bar.style.setProperty("--share", probability);
    return element(
      "li",
      {},
      element("span", { class: "label", title: label }, label),
      bar,
      element("span", { class: "value" }, percent(probability)),
    );
  });
  return element(
    "div",
    { class: "predictions small" },
    element("h4", {}, title),
    element("ol", {}, ...rows),
  );
}
