/** The text: each token on a color, in a row of buttons that arrow keys walk through. */

import { shade, surprise } from "./colors.js";
import { make, rove, stepInRow } from "./dom.js";
import { bits, percent } from "./numbers.js";
import { piecesOf, visible } from "./pieces.js";

const LEGEND = [1, 0.5, 0.1, 0.01, 0.0001];
const HOVER_MS = 90; // a pointer that crosses tokens on its way selects none of them

/** Draw the text of a session into a panel. */
export function textView(panel, session) {
  const { store } = session;
  const text = make("p.text", { role: "group", "aria-label": "The text, token by token" });
  const next = make("span.token.next", {
    role: "button",
    tabindex: 0,
    "aria-label": "The next token: see what may follow",
  });
  const summary = make("p.summary");
  const empty = make("p.hint", {}, "Write something: each token appears here on a color.");
  const scale = legend();
  panel.append(empty, text, scale, summary);
  text.append(next);

  const spans = () => [...text.children];
  rove(text, ".token", (from, key) => stepInRow(spans(), from, key));
  selectByPointer(text, ".token", (span) => session.select(spans().indexOf(span)));

  let drawn = [];
  store.subscribe(({ document, info, selected, tab, busy }) => {
    if (tab !== "text") return;
    const tokens = document.places.map(({ id }) => session.tokens.get(id));
    if (tokens.includes(undefined)) return; // until they are described
    const pieces = piecesOf(tokens);
    while (text.children.length > pieces.length + 1) text.children[pieces.length].remove();
    drawn.length = Math.min(drawn.length, pieces.length);
    const before = spans();
    pieces.forEach((piece, i) => {
      const place = document.places[i];
      const key = `${piece.text} ${piece.fragment} ${place.logprob} ${i < document.promptLength}`;
      if (drawn[i] === key) return;
      const span = drawn[i] === undefined ? make("span.token", { role: "button" }) : before[i];
      if (drawn[i] === undefined) text.insertBefore(span, next);
      draw(span, piece, place, i, document.promptLength);
      drawn[i] = key;
    });
    next.hidden = document.ended || pieces.length === 0;
    next.classList.toggle("writing", busy === "writing");
    spans().forEach((span, i) => {
      span.classList.toggle("selected", i === selected);
      span.tabIndex = i === selected ? 0 : -1;
    });
    text.classList.toggle("ids", info?.text === false);
    empty.hidden = pieces.length > 0;
    scale.hidden = summary.hidden = pieces.length === 0;
    summary.textContent = summaryOf(document, info);
  });
}

function draw(span, piece, place, i, promptLength) {
  span.textContent = piece.text.includes("\n") ? lines(piece.text) : visible(piece.text);
  span.className = "token";
  span.classList.toggle("fragment", piece.fragment);
  span.classList.toggle("generated", i >= promptLength);
  shade(span, "surprise", surprise(place.logprob));
  const chance = place.logprob === null ? "" : `, ${percent(Math.exp(place.logprob))}`;
  span.setAttribute("aria-label", `${visible(piece.text).trim() || "space"}${chance}, token ${i + 1}`);
}

/** Return a text with a mark before each line end. */
function lines(text) {
  return text
    .split("\n")
    .map((line) => visible(line))
    .join("↵\n");
}

/** Call `select` with the element that a pointer rests on, that is pressed, or that has the focus. */
export function selectByPointer(parent, selector, select) {
  let timer = 0;
  const find = (event) => event.target.closest?.(selector);
  parent.addEventListener("pointerover", (event) => {
    clearTimeout(timer);
    const element = event.pointerType === "mouse" && find(event);
    if (element) timer = setTimeout(() => select(element), HOVER_MS);
  });
  parent.addEventListener("pointerleave", () => clearTimeout(timer));
  parent.addEventListener("click", (event) => {
    const element = find(event);
    if (!element) return;
    select(element);
    element.focus({ preventScroll: true });
    parent.dispatchEvent(new CustomEvent("pick", { bubbles: true }));
  });
  parent.addEventListener("focusin", (event) => {
    if (find(event)) select(find(event));
  });
  parent.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    if (!find(event)) return;
    event.preventDefault();
    parent.dispatchEvent(new CustomEvent("pick", { bubbles: true, detail: { keyboard: true } }));
  });
}

function legend() {
  const chips = LEGEND.map((p) => {
    const chip = make("span.chip", {}, `${100 * p} %`);
    shade(chip, "surprise", surprise(Math.log(p)));
    return chip;
  });
  return make("p.legend", {}, "Probability that the model gave each token ", ...chips);
}

function summaryOf({ places }, info) {
  const known = places.filter(({ logprob }) => logprob !== null);
  const counts = `${places.length} of ${info?.context ?? "…"} tokens`;
  if (known.length === 0) return counts;
  const mean = known.reduce((sum, { logprob }) => sum + logprob, 0) / known.length;
  const perplexity = Math.exp(-mean);
  return `${counts} · ${bits(mean).toFixed(2)} bits per token · perplexity ${perplexity.toPrecision(3)}`;
}
