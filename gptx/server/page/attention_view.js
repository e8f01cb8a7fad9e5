/** Attention: the pattern of each head as a small picture, and one of them over the text. */

import { WEIGHT, shade } from "./colors.js";
import { make, rove } from "./dom.js";
import { percent } from "./numbers.js";
import { label, piecesOf, visible } from "./pieces.js";
import { selectByPointer } from "./text_view.js";

const THUMB_PIXELS = 48; // of a small picture; a longer text shows the largest weight of each part
const MAX_LOADED_NUMBERS = 2 ** 23; // of all layers together; of a longer text, one layer at a time
const ROWS = 10;
const MEAN = -1; // in the place of a head: the mean of all heads of a layer

/** Draw the attention of a session into a panel. */
export function attentionView(panel, session) {
  const { store, engine } = session;
  const lack = make("p.hint", {}, "Attention needs the server: gptx serve.");
  const about = make(
    "p.hint",
    {},
    "A picture for each layer (down) and head (across): rows are tokens, from the first at the " +
      "top, and blue is where a token looks. Choose a head, then a token. Of a long text, an " +
      "empty row is read when you press it.",
  );
  const grid = make("div.heads", { role: "group", "aria-label": "Heads by layer" });
  const way = make("select", { id: "attention-way", change: show });
  way.append(make("option", { value: "to" }, "where the token looks"));
  way.append(make("option", { value: "from" }, "which tokens look at it"));
  const name = make("h2");
  const bar = make("div.heading", {}, name, make("label", { for: "attention-way" }, "Show ", way));
  const text = make("p.text", { role: "group", "aria-label": "The text, with attention" });
  const map = make("canvas.map", { role: "img" });
  const content = make("div", {}, make("div.pictures", {}, grid, map), bar, text);
  panel.append(about, lack, content);

  let shown = null; // places of the pictures
  let layers = new Map(); // layer -> weights [H, S, S]
  let controller = new AbortController();
  let head = { layer: 0, index: 0 };
  let token = 0;

  rove(grid, "button", (from, key) => {
    const buttons = [...grid.querySelectorAll("button")];
    const columns = store.state.info.heads + 1;
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key];
    return by === undefined ? undefined : (buttons[buttons.indexOf(from) + by] ?? null);
  });
  rove(text, ".token", (from, key) => {
    const by = { ArrowLeft: "previousElementSibling", ArrowRight: "nextElementSibling" }[key];
    if (by) return from[by];
    return { Home: text.firstElementChild, End: text.lastElementChild }[key];
  });
  selectByPointer(text, ".token", (span) => {
    token = [...text.children].indexOf(span);
    show();
  });
  map.addEventListener("pointermove", (event) => {
    const box = map.getBoundingClientRect();
    const row = Math.floor(((event.clientY - box.top) / box.height) * shown.length);
    if (row === token || row < 0 || row >= shown.length) return;
    token = row;
    show();
  });

  async function update({ document, info, tab, busy }) {
    if (tab !== "attention" || !info) return;
    lack.hidden = info.can.attention;
    about.hidden = content.hidden = !info.can.attention || document.places.length === 0;
    if (content.hidden || busy === "writing" || shown === document.places) return;
    if (document.places.some(({ id }) => !session.tokens.has(id))) return;
    shown = document.places;
    token = Math.max(0, Math.min(store.state.selected, shown.length - 1));
    layers = new Map();
    controller.abort();
    controller = new AbortController();
    layOut(info);
    const size = info.layers * info.heads * shown.length ** 2;
    const others = [...Array(info.layers).keys()].filter((layer) => layer !== head.layer);
    await load([head.layer, ...(size <= MAX_LOADED_NUMBERS ? others : [])]);
  }

  async function load(wanted) {
    const { signal } = controller;
    const ids = shown.map(({ id }) => id);
    try {
      for (const layer of wanted) {
        if (layers.has(layer)) continue;
        const weights = await engine.attention(ids, layer, { signal });
        if (signal.aborted || store.state.document.places !== shown) return;
        layers.set(layer, weights);
        drawThumbs(layer);
        if (layer === head.layer) show();
      }
    } catch (error) {
      if (!signal.aborted) session.onError(error);
    }
  }

  function layOut({ layers: L, heads: H }) {
    if (grid.childElementCount !== L) {
      grid.replaceChildren(...[...Array(L).keys()].map((layer) => rowOf(layer, H)));
      grid.querySelector("button").tabIndex = 0;
    }
    for (const canvas of grid.querySelectorAll("canvas"))
      canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
    const tokens = shown.map(({ id }) => session.tokens.get(id));
    text.replaceChildren(
      ...piecesOf(tokens).map((piece, i) => {
        const span = make("span.token", { role: "button", tabindex: i === token ? 0 : -1 });
        span.textContent = piece.text.includes("\n") ? `${visible(piece.text)}\n` : visible(piece.text);
        span.classList.toggle("fragment", piece.fragment);
        span.setAttribute("aria-label", `${label(tokens[i])}, token ${i + 1}`);
        return span;
      }),
    );
    show();
  }

  function rowOf(layer, H) {
    const heads = [...Array(H).keys()].map((index) =>
      headButton(layer, index, make("canvas", { "aria-hidden": "true" })),
    );
    return make("div.layer", {}, headButton(layer, MEAN, String(layer)), ...heads);
  }

  function headButton(layer, index, content) {
    const button = make("button", { type: "button", tabindex: -1, "aria-pressed": "false" }, content);
    button.setAttribute("aria-label", nameOf({ layer, index }));
    button.title = nameOf({ layer, index });
    button.addEventListener("click", () => {
      head = { layer, index };
      show();
      load([layer]);
    });
    return button;
  }

  function drawThumbs(layer) {
    const { heads } = store.state.info;
    const canvases = grid.children[layer].querySelectorAll("canvas");
    for (let index = 0; index < heads; index++)
      paint(canvases[index], weightsOf(layers.get(layer), index, heads, shown.length), THUMB_PIXELS);
  }

  /** Draw the chosen head: its map, and the row of the chosen token over the text. */
  function show() {
    for (const button of grid.querySelectorAll("button"))
      button.setAttribute("aria-pressed", String(button.title === nameOf(head)));
    name.textContent = nameOf(head);
    map.setAttribute("aria-label", `Pattern of ${nameOf(head)}`);
    const all = layers.get(head.layer);
    const S = shown.length;
    const spans = [...text.children];
    spans.forEach((span, i) => {
      span.classList.toggle("selected", i === token);
      span.tabIndex = i === token ? 0 : -1;
    });
    if (!all) {
      spans.forEach((span) => shade(span, "weight", 0));
      map.getContext("2d").clearRect(0, 0, map.width, map.height);
      store.set({ pointed: { title: nameOf(head), note: "Reading …", rows: [] } });
      return;
    }
    const weights = weightsOf(all, head.index, store.state.info.heads, S);
    const to = way.value === "to";
    const values = Array.from({ length: S }, (_, i) => weights[to ? token * S + i : i * S + token]);
    spans.forEach((span, i) => shade(span, "weight", Math.sqrt(values[i])));
    paint(map, weights, S, token);
    store.set({ pointed: pointed(values, to) });
  }

  function pointed(values, to) {
    const its = (i) => label(session.tokens.get(shown[i].id));
    const order = [...values.keys()].sort((a, b) => values[b] - values[a]).slice(0, ROWS);
    const largest = Math.max(...values);
    return {
      title: to ? `${its(token)} looks at` : `Tokens that look at ${its(token)}`,
      note: `${nameOf(head)}. Token ${token + 1} of ${shown.length}; numbers are those of tokens.`,
      rows: order
        .filter((i) => values[i] > 0)
        .map((i) => ({
          label: its(i),
          note: String(i + 1),
          share: values[i] / largest,
          value: percent(values[i]),
          marked: i === token,
          press: () => text.children[i].focus(),
        })),
    };
  }

  store.subscribe(update);
}

function nameOf({ layer, index }) {
  return index === MEAN ? `Layer ${layer}, mean of its heads` : `Layer ${layer}, head ${index}`;
}

/** Return the weights [S, S] of a head, or the mean of all heads. */
function weightsOf(all, index, heads, S) {
  if (index !== MEAN) return all.subarray(index * S * S, (index + 1) * S * S);
  const mean = new Float32Array(S * S);
  for (let i = 0; i < all.length; i++) mean[i % mean.length] += all[i] / heads;
  return mean;
}

/** Paint weights [S, S] on a canvas of at most `pixels` a side, with a line at a chosen row. */
function paint(canvas, weights, pixels, chosen = null) {
  const S = Math.sqrt(weights.length);
  const size = Math.min(S, pixels);
  canvas.width = canvas.height = size;
  const image = new ImageData(size, size);
  for (let row = 0; row < S; row++) {
    for (let column = 0; column <= row; column++) {
      const at = 4 * (Math.floor((row * size) / S) * size + Math.floor((column * size) / S));
      const opacity = 255 * Math.sqrt(weights[row * S + column]);
      if (opacity > image.data[at + 3]) image.data.set([...WEIGHT, opacity], at);
    }
  }
  if (chosen !== null)
    for (let column = 0; column < size; column++) {
      const at = 4 * (chosen * size + column);
      if (image.data[at + 3] < 40) image.data.set([128, 128, 128, 40], at);
    }
  canvas.getContext("2d").putImageData(image, 0, 0);
}
