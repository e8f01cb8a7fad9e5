/** The page: an engine, a session on it, and the views. */

import { attentionView } from "./attention_view.js";
import { detailView } from "./detail.js";
import { byId, debounced, make } from "./dom.js";
import { EngineError } from "./engine.js";
import { lensView } from "./lens_view.js";
import { Session } from "./session.js";
import { DEFAULTS, EMPTY, createStore } from "./store.js";
import { tabs } from "./tabs.js";
import { textView } from "./text_view.js";
import { tokensView } from "./tokens_view.js";

const EXAMPLE = "To be, or not to be: that is the";
const KEY = "gptx-key"; // in sessionStorage
const TYPING_MS = 350; // from the last key to reading the text

const { createEngine } = await import(document.querySelector('meta[name="engine"]').content);

const store = createStore({
  info: null,
  document: EMPTY,
  selected: 0,
  busy: "reading",
  tab: "text",
  pointed: null,
  settings: DEFAULTS,
});

/** The engine of now, behind one object: a key or another model replaces it. */
let engine = null;
const current = new Proxy({}, { get: (_, name) => engine[name].bind(engine) });
const session = new Session(current, store, report);

function report(error) {
  if (error instanceof EngineError && error.kind === "key") return askForKey();
  if (!(error instanceof EngineError)) console.warn(error);
  const again = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  byId("notice-text").textContent = `${error.message}${again}`;
  byId("notice").hidden = false;
}

function onProgress({ done, total, what }) {
  const part = total ? ` ${Math.round((100 * done) / total)} %` : "";
  byId("where").textContent = `${what}${part}`;
}

let opened = 0; // number of calls of `open`: a later one ends the waiting of one before

async function open(model) {
  const own = ++opened;
  try {
    engine = createEngine({ model, key: sessionStorage.getItem(KEY) ?? undefined, onProgress });
    const info = await engine.info();
    session.restart();
    byId("where").textContent =
      `${info.layers} layers, ${info.heads} heads, ${info.context} tokens of context, ` +
      `at ${info.place}`;
    byId("model").replaceChildren(
      ...info.models.map((name) => make("option", { selected: name === info.model }, name)),
    );
    byId("model-choice").hidden = info.models.length === 0;
    byId("prompt-label").textContent = info.text ? "Your text" : "Your token ids";
    if (!info.text && prompt.value === EXAMPLE) prompt.value = "0";
    store.set({ info });
    await session.read(byId("prompt").value);
  } catch (error) {
    store.set({ busy: "" });
    if (error.kind === "busy") {
      byId("where").textContent = error.message;
      setTimeout(() => own === opened && open(model), 1000 * (error.retryAfter ?? 1));
    } else {
      report(error);
    }
  }
}

function askForKey() {
  byId("key").value = "";
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

byId("key-form").addEventListener("submit", () => {
  sessionStorage.setItem(KEY, byId("key").value);
  open(store.state.info?.model);
});
byId("model").addEventListener("change", ({ target }) => open(target.value));
byId("notice-close").addEventListener("click", () => (byId("notice").hidden = true));

const prompt = byId("prompt");
let unread = false; // the prompt has changed since it was read
const readLater = debounced(readPrompt, TYPING_MS);

async function readPrompt() {
  if (!unread) return;
  unread = false;
  await session.read(prompt.value);
}

async function write(maxTokens) {
  await readPrompt();
  await session.continue(maxTokens);
}

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

prompt.addEventListener("input", () => {
  fit();
  session.stop();
  unread = store.state.info !== null;
  readLater();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) write();
});
byId("continue").addEventListener("click", () => write());
byId("one").addEventListener("click", () => write(1));
byId("stop").addEventListener("click", () => session.stop());
byId("back").addEventListener("click", () => session.back());
byId("forward").addEventListener("click", () => session.forward());
byId("edit").addEventListener("click", async () => {
  try {
    prompt.value = await session.text();
    fit();
    prompt.focus();
    await session.read(prompt.value);
  } catch (error) {
    report(error);
  }
});

store.subscribe(({ document: text, busy, info }, before) => {
  const writing = busy === "writing";
  const ready = info !== null && text.places.length > 0 && !text.ended;
  const focused = document.activeElement;
  byId("continue").disabled = !ready;
  byId("one").disabled = !ready || writing;
  byId("continue").hidden = writing;
  byId("stop").hidden = !writing;
  if (writing && focused === byId("continue")) byId("stop").focus();
  if (!writing && focused === byId("stop")) byId("continue").focus();
  byId("back").disabled = writing || !session.canGoBack;
  byId("forward").disabled = writing || !session.canGoForward;
  byId("edit").disabled = writing || text.places.length === 0;
  document.body.classList.toggle("busy", busy !== "");
  if (before.busy === "writing" && !writing)
    byId("status").textContent = `The text has ${text.places.length} tokens now.`;
});

tabs(document.querySelector('[role="tablist"]'), store);
textView(byId("panel-text"), session);
tokensView(byId("panel-tokens"), session);
attentionView(byId("panel-attention"), session);
lensView(byId("panel-lens"), session);
detailView(byId("detail"), session);

prompt.value ||= EXAMPLE;
fit();
await open();
