// Prometheus' text format, as far as counters, gauges and histograms need it.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };

/** The samples of one scrape. */
export class Samples {
  #byName = new Map();

  /** Read a scrape's text. */
  constructor(text) {
    for (const line of text.split("\n")) {
      const found = line.startsWith("#") ? null : LINE.exec(line);
      if (found === null) continue;
      const [, name, labels = "", value] = found;
      if (!this.#byName.has(name)) this.#byName.set(name, []);
      this.#byName.get(name).push({ labels: labelsOf(labels), value: valueOf(value) });
    }
  }

  /** Whether any sample has this name. */
  has(name) {
    return this.#byName.has(name);
  }

  /** The sum of the samples that have all these labels; 0 where there is none. */
  sum(name, labels = {}) {
    return this.#matching(name, labels).reduce((total, { value }) => total + value, 0);
  }

  /** A histogram's cumulative counts, as [upper bound, count], upwards. */
  buckets(name, labels = {}) {
    return this.#matching(`${name}_bucket`, labels)
      .map(({ labels: { le }, value }) => [valueOf(le), value])
      .sort(([a], [b]) => a - b);
  }

  #matching(name, wanted) {
    const pairs = Object.entries(wanted);
    return (this.#byName.get(name) ?? []).filter(({ labels }) =>
      pairs.every(([key, value]) => labels[key] === value),
    );
  }
}

/**
 * The quantile of what happened between two scrapes, in the histogram's unit; null where nothing
 * did. Within a bucket values are taken to be spread evenly, as Prometheus does.
 */
export function quantile(q, before, after) {
  const counts = after.map(([bound, value], i) => [bound, value - (before[i]?.[1] ?? 0)]);
  const total = counts.at(-1)?.[1] ?? 0;
  if (total <= 0) return null;
  const rank = q * total;
  const place = counts.findIndex(([, value]) => value >= rank);
  const [low, below] = place > 0 ? counts[place - 1] : [0, 0];
  const [high, here] = counts[place];
  if (high === Infinity) return low;
  return low + ((high - low) * (rank - below)) / (here - below);
}

function labelsOf(text) {
  const labels = {};
  for (const [, name, value] of text.matchAll(LABEL)) {
    labels[name] = value.replace(/\\[n"\\]/g, (escape) => ESCAPES[escape]);
  }
  return labels;
}

function valueOf(text) {
  return text === "+Inf" ? Infinity : text === "-Inf" ? -Infinity : Number(text);
}
