// The review page: see what was kept, label it by keyboard or pointer, undo.
// The admin token lives in a variable of this module and nowhere else.

const PAGE = 100;
const WORDS = { really_ood: "really ood", was_fine: "was fine", null: "no label" };

const $ = (id) => document.getElementById(id);
const state = { token: "", cards: [], active: 0, before: null, done: [], counts: null };

class Refused extends Error {}

async function ask(path, options = {}) {
  const headers = { ...options.headers, Authorization: `Bearer ${state.token}` };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  const detail = problem.detail ?? `the server answered ${response.status}`;
  throw [401, 403].includes(response.status) ? new Refused(detail) : new Error(detail);
}

// Whatever fails is told; without a valid token the page asks for it again.
async function telling(work) {
  try {
    $("failure").hidden = true;
    await work();
  } catch (error) {
    $("failure").textContent = `That did not work: ${error.message}.`;
    $("failure").hidden = false;
    if (error instanceof Refused) {
      state.token = "";
      clear();
      $("review").hidden = true;
      $("token-form").hidden = false;
      $("token").focus();
    }
  }
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const number = (value) => Number(value.toPrecision(4)).toString();

class Card {
  constructor(image) {
    this.image = image;
    this.url = null;
    const tiny = Math.max(image.width, image.height) < 128;
    this.picture = element("img", { alt: "", width: 256, height: 192, className: tiny ? "tiny" : "" });
    this.buttons = Object.keys(WORDS)
      .filter((label) => label !== "null")
      .map((label) => this.button(label));
    const remove = element("button", { type: "button", className: "button quiet small", textContent: "Remove" });
    remove.addEventListener("click", () => telling(() => erase(this)));
    this.tabbable = [...this.buttons, remove];
    const verdict = element("span", { className: "verdict", textContent: image.verdict });
    verdict.dataset.verdict = image.verdict;
    const found = image.prediction === null ? [] : [`taken for ${image.prediction}`];
    const origin = image.is_sampled ? ["of the sample"] : [];
    const facts = [
      `score ${number(image.score)}, threshold ${number(image.threshold)}`,
      [`p = ${number(image.p_value)}`, ...found].join(", "),
      [`${image.model} ${image.version}`, ...origin].join(", "),
      new Date(image.time).toLocaleString(),
    ];
    this.article = element(
      "article",
      { className: "card", tabIndex: -1 },
      this.picture,
      element("div", { className: "facts" }, verdict, remove),
      ...facts.map((text) => element("p", { className: "small", textContent: text })),
      element("div", { className: "answers" }, ...this.buttons),
    );
    this.article.dataset.id = image.id;
    this.article.addEventListener("focusin", () => activate(state.cards.indexOf(this), false));
    this.item = element("li", {}, this.article);
    this.description = facts[0];
    this.show();
    watcher.observe(this.item);
  }

  button(label) {
    const made = element("button", { type: "button", className: "button small", textContent: WORDS[label] });
    made.dataset.label = label;
    made.addEventListener("click", () => {
      const chosen = this.image.label === label ? null : label;
      telling(() => give(this, chosen));
    });
    return made;
  }

  show() {
    const { verdict, label } = this.image;
    this.article.setAttribute("aria-label", `${verdict}, ${this.description}, ${WORDS[label]}`);
    for (const button of this.buttons) {
      button.setAttribute("aria-pressed", String(button.dataset.label === label));
    }
  }

  // One card is reached by Tab, and from it its buttons; the keys move between cards.
  enter(isActive) {
    this.article.tabIndex = isActive ? 0 : -1;
    for (const button of this.tabbable) button.tabIndex = isActive ? 0 : -1;
  }

  async load() {
    const response = await ask(`v1/review/${this.image.id}/thumbnail`);
    this.url = URL.createObjectURL(await response.blob());
    this.picture.src = this.url;
  }

  drop() {
    watcher.unobserve(this.item);
    if (this.url !== null) URL.revokeObjectURL(this.url);
    this.item.remove();
  }
}

// Thumbnails are drawn one after another by the server: only those in sight are asked for.
const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries.filter((one) => one.isIntersecting)) {
      watcher.unobserve(entry.target);
      const card = state.cards.find((one) => one.item === entry.target);
      card?.load().catch(() => card.picture.classList.add("missing"));
    }
  },
  { rootMargin: "50%" },
);

function activate(index, moveFocus = true) {
  if (!state.cards.length) return;
  state.cards[state.active]?.enter(false);
  state.active = Math.min(Math.max(index, 0), state.cards.length - 1);
  const card = state.cards[state.active];
  card.enter(true);
  if (moveFocus) card.article.focus();
}

function clear() {
  for (const card of state.cards) card.drop();
  Object.assign(state, { cards: [], active: 0, before: null, done: [] });
  $("undo").disabled = true;
}

function count() {
  const { total, unlabelled } = state.counts;
  $("counts").textContent = `${total} images, ${unlabelled} without a label`;
  $("nothing").hidden = state.cards.length > 0;
}

// Pages until there is one more screenful to see, or the end of the list.
async function more() {
  const first = state.cards.length;
  do {
    const query = new URLSearchParams({ limit: PAGE });
    if (state.before !== null) query.set("before", state.before);
    const page = await (await ask(`v1/review?${query}`)).json();
    state.counts = page;
    state.before = page.images.length === PAGE ? page.images.at(-1).time : null;
    const wanted = page.images.filter((one) => !$("unlabelled").checked || one.label === null);
    for (const image of wanted) {
      const card = new Card(image);
      state.cards.push(card);
      $("images").append(card.item);
    }
  } while (state.before !== null && state.cards.length - first < PAGE);
  $("more").hidden = state.before === null;
  count();
  return first;
}

async function reload() {
  clear();
  await more();
  $("token-form").hidden = true;
  $("review").hidden = false;
  activate(0);
}

async function put(card, label) {
  const before = card.image.label;
  if (before === label) return before;
  card.image.label = label;
  card.show();
  try {
    await ask(`v1/review/${card.image.id}/label`, {
      method: "PUT",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ label }),
    });
  } catch (error) {
    card.image.label = before;
    card.show();
    throw error;
  }
  state.counts.unlabelled += (label === null) - (before === null);
  count();
  return before;
}

async function give(card, label) {
  const before = card.image.label;
  const stored = put(card, label);
  // At once: who undoes before it is stored means this one, and not the one before it.
  const step = { card, before, stored };
  if (before !== label) state.done.push(step);
  $("undo").disabled = !state.done.length;
  if (label !== null) activate(state.cards.indexOf(card) + 1);
  try {
    await stored;
  } catch (error) {
    state.done = state.done.filter((one) => one !== step);
    $("undo").disabled = !state.done.length;
    throw error;
  }
  $("said").textContent = `${WORDS[label]}; ${state.counts.unlabelled} left`;
}

async function undo() {
  const last = state.done.pop();
  $("undo").disabled = !state.done.length;
  if (!last) return;
  try {
    await last.stored;
  } catch {
    return; // there is nothing to undo, and that has been told
  }
  const stored = put(last.card, last.before);
  activate(state.cards.indexOf(last.card));
  await stored;
  $("said").textContent = `Undone: ${WORDS[last.before]}; ${state.counts.unlabelled} left`;
}

async function erase(card) {
  if (!confirm("Remove this image, its scores and its label for good?")) return;
  await ask(`v1/review/${card.image.id}`, { method: "DELETE" });
  const index = state.cards.indexOf(card);
  card.drop();
  state.cards.splice(index, 1);
  state.done = state.done.filter((one) => one.card !== card);
  $("undo").disabled = !state.done.length;
  state.counts.total -= 1;
  state.counts.unlabelled -= card.image.label === null;
  state.active = -1;
  activate(index);
  count();
  $("said").textContent = "Removed";
}

async function download() {
  const url = URL.createObjectURL(await (await ask("v1/review/labels.csv")).blob());
  element("a", { href: url, download: "labels.csv" }).click();
  URL.revokeObjectURL(url);
}

const columns = () =>
  getComputedStyle($("images")).gridTemplateColumns.split(" ").length;

const KEYS = {
  j: () => activate(state.active + 1),
  k: () => activate(state.active - 1),
  ArrowRight: () => activate(state.active + 1),
  ArrowLeft: () => activate(state.active - 1),
  ArrowDown: () => activate(state.active + columns()),
  ArrowUp: () => activate(state.active - columns()),
  Home: () => activate(0),
  End: () => activate(state.cards.length - 1),
  o: () => telling(() => give(state.cards[state.active], "really_ood")),
  f: () => telling(() => give(state.cards[state.active], "was_fine")),
  u: () => telling(undo),
};

$("images").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
});

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.token = $("token").value;
  $("token").value = "";
  telling(reload);
});

$("undo").addEventListener("click", () => telling(undo));
$("reload").addEventListener("click", () => telling(reload));
$("unlabelled").addEventListener("change", () => telling(reload));
$("csv").addEventListener("click", () => telling(download));
$("more").addEventListener("click", () => telling(async () => activate(await more())));
