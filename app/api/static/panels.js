// What the server sees, in numbers, words and lines.

import { byId, setText } from "./dom.js";
import { facts } from "./card.js";
import { histogram, intervals, lines, meter, regroup } from "./drawing.js";
import { duration, images, moment, number, odds, percent, rate } from "./format.js";
import { quantile } from "./prometheus.js";

const SPAN_S = 120;
const LATENCY_S = 30;
const THROUGHPUT_S = 10;
const STAGES = ["decode", "queue", "forward"];
const WINDOWS = { "5m": "5 min", "1h": "1 hour", "1d": "1 day" };
const SPOKEN = { "5m": "5 minutes", "1h": "hour", "1d": "day" };
// Fewer images than this, and finer bins would show mostly chance.
const BINS = [
  [60, 4],
  [500, 2],
];

/** The panels of the live section. */
export class Panels {
  #history = [];

  /** Show one look at the server. */
  show(seen) {
    this.#remember(seen);
    setText("live-text", `Everything that ${seen.model}, version ${seen.version}, scores, whoever asks`);
    if (seen.drift === null) showNoDrift();
    else showDrift(seen.drift);
    this.#showThroughput();
    this.#showLatency();
    this.#showQueue();
  }

  /** Forget what was seen: another version is looked at. */
  forget() {
    this.#history = [];
  }

  #remember({ samples, at, model, version }) {
    const stages = Object.fromEntries(
      ["total", ...STAGES].map((stage) => [stage, samples.buckets("normgate_stage_seconds", { stage })]),
    );
    const counted = { model, version: String(version) };
    const look = {
      at,
      images: samples.sum("normgate_images_total", counted),
      stages,
      queued: samples.sum("normgate_queue_depth"),
      inFlight: samples.sum("normgate_in_flight"),
    };
    const last = this.#history.at(-1);
    // Counters that fell are those of a server started anew.
    if (last && look.images < last.images) this.forget();
    const before = this.#since(at - LATENCY_S) ?? look;
    look.rate = last && this.#history.length ? (look.images - last.images) / (at - last.at) : null;
    look.p50 = quantile(0.5, before.stages.total, stages.total);
    look.p99 = quantile(0.99, before.stages.total, stages.total);
    this.#history = [...this.#history, look].filter((one) => one.at >= at - SPAN_S);
  }

  /** The first look that is no older. */
  #since(time) {
    return this.#history.find(({ at }) => at >= time);
  }

  #showThroughput() {
    const last = this.#history.at(-1);
    const before = this.#since(last.at - THROUGHPUT_S);
    const now = last.at > before.at ? (last.images - before.images) / (last.at - before.at) : 0;
    setText("throughput", rate(now));
    setText("throughput-text", `images a second; ${images(last.images)} since the server began`);
    this.#draw("throughput-line", { main: "rate" }, "Images a second over the last two minutes");
  }

  #showLatency() {
    const last = this.#history.at(-1);
    const before = this.#since(last.at - LATENCY_S);
    setText("latency", last.p50 === null ? "–" : duration(last.p50));
    if (last.p50 === null) {
      setText("latency-text", "no request in the last half minute");
    } else {
      const parts = STAGES.map((stage) => [stage, quantile(0.5, before.stages[stage], last.stages[stage])])
        .filter(([, seconds]) => seconds !== null)
        .map(([stage, seconds]) => `${stage} ${duration(seconds)}`);
      setText("latency-text", `median, solid; 99% within ${duration(last.p99)}, dashed. Medians: ${parts.join(", ")}`);
    }
    const label = "Median and 99th percentile of the latency over the last two minutes";
    this.#draw("latency-line", { main: "p50", second: "p99" }, label);
  }

  #showQueue() {
    const { queued, inFlight } = this.#history.at(-1);
    setText("queue", number(queued));
    const requests = inFlight === 1 ? "1 request is" : `${number(inFlight)} requests are`;
    setText("queue-text", `${queued === 1 ? "image waits" : "images wait"} for a device; ${requests} being answered`);
    this.#draw("queue-line", { main: "queued" }, "Images that waited over the last two minutes");
  }

  #draw(id, keys, label) {
    const series = Object.fromEntries(
      Object.entries(keys).map(([name, key]) => [name, this.#history.map((look) => look[key])]),
    );
    const times = this.#history.map(({ at }) => at);
    byId(id).replaceChildren(lines(times, series, { spanS: SPAN_S, label }));
  }
}

function showNoDrift() {
  setText("rate", "–");
  setText("drift", "–");
  for (const id of ["rate-text", "drift-text", "scores"]) {
    setText(id, "This server does not measure drift");
  }
  for (const id of ["rate-windows", "drift-evidence", "drift-facts"]) byId(id).replaceChildren();
}

function showDrift(drift) {
  showRate(drift);
  showEvidence(drift);
  showScores(drift);
}

function showRate({ windows, alpha }) {
  const filled = windows.find(({ images: n }) => n > 0);
  setText("rate", filled === undefined ? "–" : percent(filled.rate));
  setText("rate-text", filled === undefined ? `No image in the last day; calibrated to ${percent(alpha)}` : inWords(filled, alpha));
  const rows = windows.map((one) => ({ ...one, name: WINDOWS[one.window] ?? one.window }));
  const label = windows.map((one) => inWords(one, alpha)).join(". ");
  byId("rate-windows").replaceChildren(intervals(rows, { expected: alpha, label }));
}

function inWords({ window, images: n, lower, upper }, alpha) {
  const spoken = SPOKEN[window] ?? window;
  if (n === 0) return `No image in the last ${spoken}`;
  return (
    `of ${images(n)} in the last ${spoken} (likely ${percent(lower)} to ${percent(upper)}); ` +
    `calibrated to ${percent(alpha)}`
  );
}

function showEvidence({ martingale, images: n, ks_distance: ks, psi }) {
  const { log10, max_log10: highest, alarm, alarmed_at: at, false_alarm_bound: bound } = martingale;
  const needed = -Math.log10(bound);
  const share = (alarm ? highest : log10) / needed;
  byId("drift").dataset.state = alarm ? "alarm" : share > 0.5 ? "gathering" : "calm";
  setText("drift", alarm ? "⚠ Drifted" : n === 0 ? "No image yet" : share > 0.5 ? "Evidence gathers" : "✓ No sign of drift");
  setText("drift-text", alarm ? alarmText(at, bound) : calmText(n, bound));
  const label = `Evidence of drift: ${percent(Math.max(share, 0))} of what an alarm needs`;
  byId("drift-evidence").replaceChildren(meter(share, { isFull: alarm, label }));
  // The alarm stays when the evidence has sunk again.
  const known = alarm ? { "evidence reached": odds(highest) } : { evidence: odds(log10) };
  known["alarm at"] = odds(needed);
  if (ks !== null) known["KS distance"] = number(ks);
  if (psi !== null) known.PSI = number(psi);
  byId("drift-facts").replaceChildren(...facts(known).children);
}

function alarmText(at, bound) {
  const since = at === null ? "" : ` since ${moment(at)}`;
  return `Images are not like the calibration images${since}; the alarm stands until it is reset. ${promise(bound)}`;
}

function calmText(n, bound) {
  return `${images(n)} tested against the calibration images. ${promise(bound)}`;
}

function promise(bound) {
  return `Chance of a false alarm, however long it runs: at most ${percent(bound)}.`;
}

function showScores({ histogram: { edges, calibration, live }, threshold }) {
  const n = live.reduce((total, one) => total + one, 0);
  const group = BINS.find(([fewer]) => n < fewer)?.[1] ?? 1;
  const shares = live.map((one) => (n === 0 ? 0 : one / n));
  const drawn = n === 0 ? { edges, calibration, live: null } : regroup({ edges, calibration, live: shares }, group);
  const below = sumBelow({ edges, live }, threshold);
  const label =
    `${images(n)} of the last hour against the calibration scores; ` +
    `about ${images(below)} below the threshold ${number(threshold)}.`;
  const legend = byId("scores-legend").content.cloneNode(true);
  legend.querySelector("[data-count]").textContent = n === 0 ? "live: no image yet" : `live, ${images(n)}`;
  byId("scores").replaceChildren(histogram({ ...drawn, threshold, label }), legend);
}

function sumBelow({ edges, live }, threshold) {
  return live.reduce((total, one, i) => total + (edges[i + 1] <= threshold ? one : 0), 0);
}
