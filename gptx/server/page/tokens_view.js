/** The tokens of a text as a table: ids, bytes, probabilities. */

import { shade, surprise } from "./colors.js";
import { make, rove } from "./dom.js";
import { bits, percent } from "./numbers.js";
import { hex, label } from "./pieces.js";
import { selectByPointer } from "./text_view.js";

const COLUMNS = ["No.", "Token", "Id", "Bytes", "Probability", "Bits"];

/** Draw the table of a session into a panel. */
export function tokensView(panel, session) {
  const { store } = session;
  const body = make("tbody");
  const head = make("tr", {}, ...COLUMNS.map((name) => make("th", { scope: "col" }, name)));
  const table = make("table.tokens", {}, make("thead", {}, head), body);
  const empty = make("p.hint", {}, "Write something: its tokens appear here.");
  panel.append(empty, make("div.wide", {}, table));

  const buttons = () => [...body.querySelectorAll("button")];
  rove(body, "button", (from, key) => {
    const i = buttons().indexOf(from);
    const next = { ArrowUp: i - 1, ArrowDown: i + 1, Home: 0, End: body.rows.length - 1 }[key];
    return next === undefined ? undefined : (buttons()[next] ?? null);
  });
  selectByPointer(body, "tr", (row) => session.select(row.sectionRowIndex));

  let drawn = null;
  store.subscribe(({ document, selected, tab }) => {
    if (tab !== "tokens") return;
    const { places } = document;
    if (places.some(({ id }) => !session.tokens.has(id))) return;
    if (places !== drawn) {
      body.replaceChildren(...places.map((place, i) => rowOf(place, session.tokens.get(place.id), i)));
      drawn = places;
    }
    [...body.rows].forEach((row, i) => {
      row.classList.toggle("selected", i === selected);
      row.querySelector("button").tabIndex = i === Math.min(selected, places.length - 1) ? 0 : -1;
    });
    empty.hidden = places.length > 0;
    table.hidden = places.length === 0;
  });
}

function rowOf({ id, logprob }, token, i) {
  const name = make("button.token", { type: "button", "aria-label": `${label(token)}, token ${i + 1}` });
  name.textContent = label(token);
  shade(name, "surprise", surprise(logprob));
  return make(
    "tr",
    {},
    make("td.number", {}, String(i + 1)),
    make("td", {}, name),
    make("td.number", {}, String(id)),
    make("td.bytes", {}, token.bytes ? hex(token.bytes) : "–"),
    make("td.number", {}, logprob === null ? "–" : percent(Math.exp(logprob))),
    make("td.number", {}, logprob === null ? "–" : bits(logprob).toFixed(2)),
  );
}
