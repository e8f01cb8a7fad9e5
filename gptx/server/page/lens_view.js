/** The logit lens: the most probable next token of each layer, at each position. */

import { shade } from "./colors.js";
import { make, rove } from "./dom.js";
import { percent } from "./numbers.js";
import { label } from "./pieces.js";
import { selectByPointer } from "./text_view.js";

const TOP = 10;
const WINDOW = 40; // positions of one table

/** Draw the lens of a session into a panel. */
export function lensView(panel, session) {
  const { store, engine } = session;
  const about = make(
    "p.hint",
    {},
    "Each row reads the model as if it ended after that layer: the token it would put next. " +
      "The stronger the blue, the more probable. A dot marks the token that the text has there.",
  );
  const earlier = make("button.quiet", { type: "button", click: () => move(-WINDOW) }, "Earlier");
  const later = make("button.quiet", { type: "button", click: () => move(WINDOW) }, "Later");
  const range = make("span");
  const pages = make("div.actions", {}, earlier, range, later);
  const head = make("tr");
  const body = make("tbody");
  const table = make("table.lens", {}, make("thead", {}, head), body);
  const wide = make("div.wide", {}, table);
  const lack = make("p.hint", {}, "The logit lens needs the server: gptx serve.");
  panel.append(about, pages, wide, lack);

  let shown = null; // places, first and last position of the table
  let controller = null;
  let first = 0;

  const cells = (row) => [...row.querySelectorAll("td")];
  rove(body, "td", (from, key) => {
    const row = from.parentElement;
    const column = cells(row).indexOf(from);
    const beside = { ArrowLeft: -1, ArrowRight: 1 }[key];
    if (beside) return cells(row)[column + beside] ?? null;
    if (key === "Home" || key === "End") return cells(row).at(key === "Home" ? 0 : -1);
    const above = { ArrowUp: "previousElementSibling", ArrowDown: "nextElementSibling" }[key];
    return above ? row[above] && cells(row[above])[column] : undefined;
  });
  selectByPointer(body, "td", (cell) => {
    body.querySelector("td.selected")?.classList.remove("selected");
    cell.classList.add("selected");
    cell.point();
  });

  function move(by) {
    const { length } = store.state.document.places;
    first = Math.max(0, Math.min(first + by, length - 1));
    update(store.state);
  }

  async function update({ document, info, tab, busy }) {
    if (tab !== "lens" || !info) return;
    const { places } = document;
    lack.hidden = info.can.lens;
    about.hidden = !info.can.lens;
    if (!info.can.lens || busy === "writing") return;
    if (places.some(({ id }) => !session.tokens.has(id))) return;
    if (shown?.places !== places) first = Math.max(0, places.length - WINDOW);
    if (shown?.places === places && shown.first === first) return;
    shown = { places, first };
    controller?.abort();
    controller = new AbortController();
    const { signal } = controller;
    const last = Math.min(first + WINDOW, places.length);
    pages.hidden = places.length <= WINDOW;
    range.textContent = `Tokens ${first + 1} to ${last} of ${places.length}`;
    earlier.disabled = first === 0;
    later.disabled = last === places.length;
    wide.hidden = places.length === 0;
    if (places.length === 0) return;
    wide.setAttribute("aria-busy", "true");
    store.set({ pointed: { title: "Logit lens", note: "Reading …", rows: [] } });
    try {
      const rows = [];
      const ids = places.map(({ id }) => id);
      for await (const row of engine.lens(ids, { top: TOP, first, last, signal })) {
        await session.describe(row.top.flatMap((top) => top.map(([id]) => id)));
        if (signal.aborted || store.state.document.places !== places) return;
        rows.push(row);
      }
      draw(places, rows, last);
    } catch (error) {
      if (!signal.aborted) session.onError(error);
    } finally {
      if (!signal.aborted) wide.removeAttribute("aria-busy");
    }
  }

  function draw(places, rows, last) {
    const names = places.slice(first, last).map(({ id }) => label(session.tokens.get(id)));
    head.replaceChildren(
      make("th", { scope: "col" }, "after"),
      ...names.map((name) => make("th", { scope: "col" }, name)),
    );
    body.replaceChildren(
      ...rows.map(({ name, top }) =>
        make(
          "tr",
          {},
          make("th", { scope: "row", title: name }, layerName(name)),
          ...top.map((best, i) => cellOf(name, best, places, first + i)),
        ),
      ),
    );
    const selected = body.rows[0]?.querySelector("td:last-child");
    if (!selected) return;
    wide.scrollLeft = wide.scrollWidth;
    selected.tabIndex = 0;
    selected.classList.add("selected");
    selected.point();
  }

  function cellOf(name, top, places, position) {
    const [id, logprob] = top[0];
    const target = places[position + 1]?.id;
    const cell = make("td", { tabindex: -1 }, label(session.tokens.get(id)));
    shade(cell, "weight", Math.exp(logprob));
    cell.classList.toggle("hit", id === target);
    cell.point = () => {
      const after = label(session.tokens.get(places[position].id));
      store.set({
        pointed: {
          title: `${layerName(name)}, after ${after}`,
          note: noteOf(top, target),
          rows: top.map(([other, value]) => ({
            label: label(session.tokens.get(other)),
            share: Math.exp(value - logprob),
            value: percent(Math.exp(value)),
            marked: other === target,
          })),
        },
      });
    };
    return cell;
  }

  function noteOf(top, target) {
    if (target === undefined) return "The next token is not written yet.";
    const index = top.findIndex(([id]) => id === target);
    const next = label(session.tokens.get(target));
    if (index < 0) return `The text goes on with ${next}, which is not among the first ${TOP}.`;
    return `The text goes on with ${next}, number ${index + 1} here.`;
  }

  store.subscribe(update);
}

/** Return the name of an activation for a reader: "Layer 3", or "Embedding" before the first. */
function layerName(name) {
  const [, layer, kind] = name.match(/^h\.(\d+)\.(\w+)/);
  return kind === "resid_pre" ? "Embedding" : `Layer ${layer}`;
}
