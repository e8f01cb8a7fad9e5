/** The detail beside the views: the alternatives of a token, or what a view points at. */

import { barList } from "./bars.js";
import { make, rove } from "./dom.js";
import { bits, percent } from "./numbers.js";
import { label } from "./pieces.js";
import { rank } from "./ranking.js";
import { samplingView } from "./sampling_view.js";

const FEW = 10; // alternatives that are shown at first
const ESTIMATE = "An estimate: only the most probable tokens came with their probabilities";

/**
 * Draw the detail into an aside. In the tabs "attention" and "lens" it shows `state.pointed`: an
 * object with `title`, `note` and `rows` as `barList` takes them.
 */
export function detailView(aside, session) {
  const { store } = session;
  const title = make("h2", { id: "detail-title" });
  const close = make("button.quiet.close", { type: "button", click: shut }, "Close");
  const note = make("p.note");
  const list = make("div");
  const more = make("button.quiet", { type: "button", click: toggle });
  const sampling = samplingView(store);
  aside.append(make("div.heading", {}, title, close), note, list, more, sampling);
  let count = FEW;

  rove(list, "button.row", (from, key) => {
    const buttons = [...list.querySelectorAll("button.row")];
    const i = buttons.indexOf(from);
    if (key === "Escape") {
      shut();
      return document.querySelector('[role="tabpanel"]:not([hidden]) [tabindex="0"]');
    }
    const next = { ArrowUp: i - 1, ArrowDown: i + 1, Home: 0, End: buttons.length - 1 }[key];
    return next === undefined ? undefined : (buttons[next] ?? null);
  });
  document.addEventListener("pick", ({ detail }) => {
    aside.classList.add("open");
    document.querySelector(".token.selected")?.scrollIntoView({ block: "nearest" });
    if (detail?.keyboard) list.querySelector("button.row")?.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") aside.classList.remove("open");
  });

  function shut() {
    aside.classList.remove("open");
  }

  function toggle() {
    count = count === FEW ? session.top : FEW;
    draw(store.state);
  }

  function draw(state) {
    const reads = state.tab === "text" || state.tab === "tokens";
    sampling.hidden = more.hidden = !reads;
    const shown = reads ? alternatives(state) : state.pointed;
    title.textContent = shown?.title ?? "";
    note.textContent = shown?.note ?? "";
    const index = [...list.querySelectorAll("button.row")].indexOf(document.activeElement);
    list.replaceChildren(...(shown?.rows.length ? [barList(shown.rows)] : []));
    const buttons = list.querySelectorAll("button.row");
    buttons.forEach((button, i) => (button.tabIndex = i === Math.max(index, 0) ? 0 : -1));
    if (index >= 0) buttons[Math.min(index, buttons.length - 1)]?.focus();
  }

  /** Return the position to show: while the end is not read yet, that of the newest token. */
  function positionOf({ document: text, selected, busy }) {
    const waits = busy !== "" && selected >= text.places.length && text.next === null;
    return waits ? Math.max(0, text.places.length - 1) : selected;
  }

  function alternatives(state) {
    const { document: text, info, settings } = state;
    const position = positionOf(state);
    const place = text.places[position];
    const top = place ? place.top : (text.next ?? []);
    const shown = top.slice(0, count);
    session.describe(shown.map(([id]) => id));
    more.hidden = top.length <= FEW;
    more.textContent = count === FEW ? `Show ${top.length}` : `Show ${FEW}`;
    const { probs, others, exact } = rank(top, info?.vocabSize ?? 0, settings);
    const scale = Math.max(Math.exp(top[0]?.[1] ?? 0), probs[0] ?? 0, 1e-9);
    const rows = shown.map(([id, logprob], i) => row(position, id, logprob, probs[i], scale));
    if (place && place.logprob !== null && !shown.some(([id]) => id === place.id)) {
      const index = top.findIndex(([id]) => id === place.id);
      const its = row(position, place.id, place.logprob, index < 0 ? 0 : probs[index], scale);
      if (index < 0) its.value = percent(Math.exp(place.logprob));
      rows.push({ ...its, note: index < 0 ? `> ${top.length}` : `${index + 1}.` });
    }
    if (top.length && info.vocabSize > count) {
      const rest = others + probs.slice(count).reduce((sum, prob) => sum + prob, 0);
      const value = `${exact ? "" : "≈ "}${percent(rest)}`;
      rows.push({ label: "all others", share: null, value, title: exact ? null : ESTIMATE });
    }
    return { title: titleOf(text, place), note: noteOf(state, place, position), rows };
  }

  function row(position, id, logprob, prob, scale) {
    const name = session.tokens.has(id) ? label(session.tokens.get(id)) : "…";
    return {
      label: name,
      share: prob / scale,
      ghost: Math.exp(logprob) / scale,
      value: percent(prob),
      marked: store.state.document.places[position]?.id === id,
      press: () => session.branch(position, id),
      title: `${percent(Math.exp(logprob))} before sampling. Continue from ${name}`,
    };
  }

  function titleOf(text, place) {
    if (text.places.length === 0 || !place) return "What comes next";
    const token = session.tokens.get(place.id);
    return `In place of ${token ? label(token) : "…"}`;
  }

  function noteOf({ document: text, busy }, place, position) {
    if (text.places.length === 0) return "Alternatives for each token appear here.";
    if (!place && text.next === null) return busy ? "Reading …" : "The text is at its end.";
    if (!place) return "Press one to continue with it.";
    if (place.logprob === null) return "The first token: the model gives it no probability.";
    const surprise = `${bits(place.logprob).toFixed(2)} bits`;
    return `Token ${position + 1}, id ${place.id}, ${surprise}. Press another to continue from there.`;
  }

  store.subscribe((state, before) => {
    draw(state);
    if (state.tab !== before.tab) shut();
  });
}

