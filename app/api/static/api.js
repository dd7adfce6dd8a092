// The server's answers, and the ways in which it can fail to give one.

const TIMEOUT_MS = 70_000; // a little more than the longest deadline that a server grants by default
const POLL_TIMEOUT_MS = 10_000;

/** The server answered with an error. */
export class ProblemError extends Error {
  constructor(status, detail, retryAfterS) {
    super(detail);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

/** The server did not answer. */
export class AwayError extends Error {
  constructor() {
    super("The server does not answer.");
  }
}

/** Asks the server; holds the API key, in memory alone. */
export class Api extends EventTarget {
  #key = null;

  /** Use this key from now on. */
  useKey(key) {
    this.#key = key;
  }

  /** Whether a key was given. */
  get hasKey() {
    return this.#key !== null;
  }

  /** The loaded models. */
  async models() {
    return this.#ask("v1/models", json, { timeoutMs: POLL_TIMEOUT_MS });
  }

  /** The drift of a version (null: the active one); null where the server measures none. */
  async drift(model, version) {
    const query = version === null ? "" : `?version=${version}`;
    try {
      const path = `v1/models/${encodeURIComponent(model)}/drift${query}`;
      return await this.#ask(path, json, { timeoutMs: POLL_TIMEOUT_MS });
    } catch (error) {
      if (error.status === 404) return null;
      throw error;
    }
  }

  /** The metrics in Prometheus' text format. */
  async metrics() {
    return this.#ask("metrics", (response) => response.text(), { timeoutMs: POLL_TIMEOUT_MS });
  }

  /** The answer about one image, a Blob. */
  async score(blob, { model, version, topK }) {
    const query = new URLSearchParams({ top_k: topK });
    if (model !== null) query.set("model", model);
    if (version !== null) query.set("version", version);
    // The server tells formats by content; it only wants to hear that this is no form.
    const type = blob.type.startsWith("image/") ? blob.type : "application/octet-stream";
    const options = { method: "POST", body: blob, headers: { "Content-Type": type } };
    return this.#ask(`v1/score?${query}`, json, options);
  }

  async #ask(path, read, { timeoutMs = TIMEOUT_MS, headers = {}, ...options } = {}) {
    const sent = this.#key === null ? headers : { ...headers, "X-API-Key": this.#key };
    let response;
    try {
      response = await fetch(path, {
        ...options,
        headers: sent,
        cache: "no-store",
        signal: AbortSignal.timeout(timeoutMs),
      });
      // Here too the connection may break, or the body be a proxy's own page.
      if (response.ok) return await read(response);
    } catch {
      throw new AwayError();
    }
    if (response.status === 401) this.dispatchEvent(new Event("unauthorized"));
    throw await problemOf(response);
  }
}

function json(response) {
  return response.json();
}

async function problemOf(response) {
  const retryAfter = Number.parseFloat(response.headers.get("Retry-After"));
  let detail = `The server answered ${response.status}.`;
  try {
    detail = (await response.json()).detail ?? detail;
  } catch {
    // a proxy on the way, perhaps; its page is of no use here
  }
  return new ProblemError(response.status, detail, Number.isFinite(retryAfter) ? retryAfter : null);
}
