// Asks the server every other second what it sees: less often when it is away, not at all while
// nobody looks.

import { AwayError } from "./api.js";
import { Samples } from "./prometheus.js";

const EVERY_S = 2;
const LONGEST_S = 15;
const MODELS_EVERY = 15; // polls

/**
 * Told by events: "seen" (detail: drift, samples, at), "away" (detail: message, seconds), and
 * "locked" when the server wants a key.
 */
export class Live extends EventTarget {
  #api;
  #choice;
  #timer = null;
  #failures = 0;
  #polls = 0;
  #round = 0;

  constructor(api, choice) {
    super();
    this.#api = api;
    this.#choice = choice;
    choice.addEventListener("change", () => this.now());
    document.addEventListener("visibilitychange", () => this.now());
  }

  /** Ask now, and go on asking; a question that is under way is forgotten. */
  now() {
    clearTimeout(this.#timer);
    this.#round += 1;
    if (!document.hidden) this.#poll(this.#round);
  }

  async #poll(round) {
    let delay = EVERY_S;
    try {
      const seen = await this.#ask();
      if (round !== this.#round) return;
      this.#failures = 0;
      this.#tell("seen", seen);
    } catch (error) {
      if (round !== this.#round) return;
      if (error.status === 401) {
        this.#tell("locked", {});
        return; // until there is a key
      }
      if (error.status === undefined && !(error instanceof AwayError)) throw error;
      this.#polls = 0;
      delay = Math.min(EVERY_S * 2 ** this.#failures, LONGEST_S);
      this.#failures += 1;
      this.#tell("away", { message: error.message, seconds: delay });
    }
    this.#timer = setTimeout(() => this.#poll(round), delay * 1000);
  }

  async #ask() {
    if (this.#polls % MODELS_EVERY === 0) this.#choice.offer(await this.#api.models());
    this.#polls += 1;
    const { model, version } = this.#choice;
    const [drift, text] = await Promise.all([
      this.#api.drift(model, version),
      this.#api.metrics(),
    ]);
    const active = this.#choice.summary.active_version;
    // Another version was activated, or the chosen one was let go: ask for the list next time.
    if (drift === null || (version === null && drift.version !== active)) this.#polls = 0;
    const at = performance.now() / 1000;
    return { drift, samples: new Samples(text), at, model, version: version ?? active };
  }

  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}
