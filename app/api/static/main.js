// The live page: images in, verdicts out, and what the server sees.

import { Api } from "./api.js";
import { Card } from "./card.js";
import { Choice } from "./choice.js";
import { byId, element, setText } from "./dom.js";
import { images, number, percent } from "./format.js";
import { listen } from "./intake.js";
import { Live } from "./live.js";
import { Panels } from "./panels.js";
import { patiently, Queue } from "./scoring.js";
import { copyOf, thumbnail } from "./thumbnail.js";
import { wordOf } from "./verdict.js";

const TOP_K = 3;
const MOST_CARDS = 60;
const MOST_RECENT = 24;
const ANNOUNCE_MS = 600;

const api = new Api();
const choice = new Choice();
const live = new Live(api, choice);
const panels = new Panels();
const queue = new Queue();
const calibrations = new Map();
const unsaid = [];
let tally = {};

function take(blob, name) {
  const asked = { model: choice.model, version: choice.version };
  queue.add(() => begin(blob, name, asked));
  showTally();
}

async function begin(blob, name, asked) {
  const card = new Card(name, await thumbnail(blob, name));
  byId("cards").prepend(card.element);
  byId("cards").children[MOST_CARDS]?.remove();
  await judge(blob, card, asked);
}

async function judge(blob, card, asked) {
  card.wait("Being judged");
  try {
    const busy = (seconds) => card.wait(`The server is busy; asking again in ${Math.ceil(seconds)} s`);
    const { answer, seconds } = await patiently(() => api.score(blob, { ...asked, topK: TOP_K }), busy);
    const [result] = answer.results;
    const calibration = await calibrationOf(answer.model, answer.version);
    card.succeed(result, { calibration, seconds, model: answer.model, version: answer.version });
    note(result.verdict, card, `${wordOf(result.verdict)}, score ${number(result.score)}, p-value ${number(result.p_value)}`);
    if (result.verdict === "ood") remember(card, result);
  } catch (error) {
    const mayPass = error.status === undefined || [401, 404, 429, 503, 504].includes(error.status);
    const again = () => queue.add(() => judge(blob, card, { model: choice.model, version: choice.version }));
    card.fail(error.message, mayPass ? again : null);
    note("error", card, `no verdict. ${error.message}`);
  }
}

/** The calibration's histogram of a version, asked for once; null where there is none to have. */
async function calibrationOf(model, version) {
  const key = `${model}/${version}`;
  if (!calibrations.has(key)) calibrations.set(key, api.drift(model, version));
  try {
    return (await calibrations.get(key))?.histogram ?? null;
  } catch {
    calibrations.delete(key);
    return null;
  }
}

function note(verdict, card, text) {
  tally[verdict] = (tally[verdict] ?? 0) + 1;
  showTally();
  unsaid.push({ verdict, text: `${card.name}: ${text}` });
  if (unsaid.length === 1) setTimeout(announce, ANNOUNCE_MS);
}

/** Say what has been judged since; of many images, how many got which verdict. */
function announce() {
  const said = unsaid.splice(0);
  const counts = Object.groupBy ? Object.groupBy(said, ({ verdict }) => verdict) : {};
  const summary = Object.entries(counts).map(([verdict, those]) => `${those.length} ${wordOf(verdict).toLowerCase()}`);
  setText("announce", said.length < 3 ? said.map(({ text }) => text).join(". ") : `${images(said.length)} judged: ${summary.join(", ")}`);
}

function showTally() {
  const parts = ["id", "uncertain", "ood", "error"]
    .filter((verdict) => tally[verdict])
    .map((verdict) => `${tally[verdict]} ${wordOf(verdict).toLowerCase()}`);
  if (queue.length > 0) parts.push(`${images(queue.length)} to come`);
  setText("tally", parts.join(" · "));
  byId("verdicts").hidden = false;
}

function remember(card, { score, predictions }) {
  const caption = element("figcaption", { class: "small" }, number(score));
  const said = predictions.length === 0 ? "" : `, would be ${predictions[0].label} (${percent(predictions[0].probability)})`;
  const figure = element("figure", { title: `${card.name}${said}` }, copyOf(card.picture), caption);
  byId("recent").prepend(element("li", {}, figure));
  byId("recent").children[MOST_RECENT]?.remove();
  byId("recent-text").hidden = true;
}

function clear() {
  queue.clear();
  tally = {};
  byId("cards").replaceChildren();
  byId("verdicts").hidden = true;
  byId("pick").focus();
}

function showState(state, text) {
  byId("state").dataset.state = state;
  setText("state-text", text);
}

live.addEventListener("seen", ({ detail }) => {
  byId("away").hidden = true;
  showState("ready", "Ready");
  panels.show(detail);
});
live.addEventListener("away", ({ detail: { message, seconds } }) => {
  showState("away", "Away");
  setText("away-text", `${message} Asking again in ${seconds} s.`);
  byId("away").hidden = false;
});
live.addEventListener("locked", () => showState("locked", "Locked"));
choice.addEventListener("change", () => panels.forget());

api.addEventListener("unauthorized", () => {
  const text = api.hasKey ? "The server does not accept this key" : "This server asks for an API key";
  setText("key-text", text);
  if (byId("key-form").hidden) {
    byId("key-form").hidden = false;
    byId("key").focus();
  }
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.useKey(byId("key").value);
  byId("key").value = "";
  byId("key-form").hidden = true;
  live.now();
});
byId("retry").addEventListener("click", () => live.now());
byId("clear").addEventListener("click", clear);

listen(take);
live.now();
