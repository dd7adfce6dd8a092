// The queue of images: a few at a time are sent, and a busy server is given the time it asks for.

const AT_ONCE = 4;
const ATTEMPTS = 6;
const LONGEST_WAIT_S = 30;
const BUSY = new Set([429, 503]);

/** Takes tasks in and runs a few of them at once. */
export class Queue {
  #waiting = [];
  #running = 0;

  /** How many have not begun. */
  get length() {
    return this.#waiting.length;
  }

  /** Add a task, an async function that does not reject. */
  add(task) {
    this.#waiting.push(task);
    this.#next();
  }

  /** Forget the tasks that have not begun. */
  clear() {
    this.#waiting = [];
  }

  async #next() {
    if (this.#running >= AT_ONCE || this.#waiting.length === 0) return;
    this.#running += 1;
    try {
      await this.#waiting.shift()();
    } finally {
      this.#running -= 1;
      this.#next();
    }
  }
}

/**
 * The answer about an image and the seconds its last attempt took.
 *
 * @param {() => Promise<object>} ask
 * @param {(seconds: number) => void} onBusy told before each wait
 */
export async function patiently(ask, onBusy) {
  for (let attempt = 1; ; attempt += 1) {
    const started = performance.now();
    try {
      const answer = await ask();
      return { answer, seconds: (performance.now() - started) / 1000 };
    } catch (error) {
      if (!BUSY.has(error.status) || attempt === ATTEMPTS) throw error;
      const seconds = Math.min(error.retryAfterS ?? 2 ** (attempt - 1), LONGEST_WAIT_S);
      onBusy(seconds);
      // Not all at the same moment again.
      await sleep(seconds * (1 + Math.random() / 4));
    }
  }
}

function sleep(seconds) {
  return new Promise((resolve) => setTimeout(resolve, seconds * 1000));
}
