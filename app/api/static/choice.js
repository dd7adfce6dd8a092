// Which model and version is asked: the switch at the top.

import { byId, element } from "./dom.js";

const ACTIVE = "active";

/** The reader's choice; "change" is told of every other one. */
export class Choice extends EventTarget {
  #models = [];
  #shown = "";

  constructor() {
    super();
    byId("model").addEventListener("change", () => {
      this.#showVersions();
      this.dispatchEvent(new Event("change"));
    });
    byId("version").addEventListener("change", () => this.dispatchEvent(new Event("change")));
  }

  /** The model's name; null until the server has told of one. */
  get model() {
    return this.#models.length === 0 ? null : byId("model").value;
  }

  /** The version's number; null for the one that is active. */
  get version() {
    const value = byId("version").value;
    return this.#models.length === 0 || value === ACTIVE ? null : Number(value);
  }

  /** What the server said of the chosen model. */
  get summary() {
    return this.#models.find(({ name }) => name === this.model) ?? null;
  }

  /** Offer what the server has loaded; what was chosen stays where it still exists. */
  offer({ default: preferred, models }) {
    const shown = JSON.stringify([preferred, models]);
    if (shown === this.#shown) return;
    this.#shown = shown;
    const before = [this.model, this.version];
    const [model] = before;
    this.#models = models;
    const names = models.map(({ name }) => name);
    show("model", names.map((name) => [name, name]), names.includes(model) ? model : preferred);
    this.#showVersions(before[1]);
    if (before[0] !== this.model || before[1] !== this.version) {
      this.dispatchEvent(new Event("change"));
    }
  }

  #showVersions(version = null) {
    const { active_version: active, versions } = this.summary;
    const options = [[ACTIVE, `${active} (active)`]];
    const others = versions.filter((number) => number !== active);
    options.push(...others.map((number) => [String(number), String(number)]));
    show("version", options, others.includes(version) ? String(version) : ACTIVE);
  }
}

function show(id, options, value) {
  const select = byId(id);
  select.replaceChildren(...options.map(([key, text]) => element("option", { value: key }, text)));
  select.value = value;
  select.disabled = false;
}
