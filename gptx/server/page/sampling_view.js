/** The sliders of the sampler. */

import { make } from "./dom.js";
import { DEFAULTS } from "./store.js";

const SLIDERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, off: null },
  { name: "topK", label: "Top-k", min: 0, max: 50, step: 1, off: 0 },
  { name: "topP", label: "Top-p", min: 0, max: 1, step: 0.01, off: 1 },
  { name: "minP", label: "Min-p", min: 0, max: 0.5, step: 0.01, off: 0 },
];

/** Return the sliders, and the length and seed of what is written. */
export function samplingView(store) {
  const outputs = {};
  const inputs = {};
  const rows = SLIDERS.map(({ name, label, min, max, step }) => {
    const id = `setting-${name}`;
    const change = (event) => set(name, event.target.valueAsNumber);
    inputs[name] = make("input", { type: "range", id, min, max, step, input: change });
    outputs[name] = make("output", { for: id });
    return make("div.slider", {}, make("label", { for: id }, label), inputs[name], outputs[name]);
  });
  const numbers = make(
    "div.numbers",
    {},
    number("maxTokens", "Tokens to write", { min: 1, max: 1024 }),
    number("seed", "Seed", { min: 0, max: Number.MAX_SAFE_INTEGER, placeholder: "random" }),
  );
  const reset = make("button.quiet", { type: "button", click: restore }, "Reset");

  function number(name, label, limits) {
    const id = `setting-${name}`;
    const change = ({ target }) => {
      if (target.validity.valid) set(name, target.value === "" ? DEFAULTS[name] : Number(target.value));
    };
    inputs[name] = make("input", { type: "number", id, step: 1, ...limits, input: change });
    return make("div.number", {}, make("label", { for: id }, label), inputs[name]);
  }

  function set(name, value) {
    store.set({ settings: { ...store.state.settings, [name]: value } });
  }

  function restore() {
    const { maxTokens, seed } = store.state.settings;
    store.set({ settings: { ...DEFAULTS, maxTokens, seed } });
  }

  store.subscribe(({ settings }, before) => {
    if (settings === before.settings) return;
    for (const { name, step, off } of SLIDERS) {
      const value = settings[name];
      inputs[name].value = value;
      const text = value === off ? "off" : step === 1 ? String(value) : value.toFixed(2);
      outputs[name].textContent = name === "temperature" && value === 0 ? "greedy" : text;
      inputs[name].setAttribute("aria-valuetext", outputs[name].textContent);
    }
    if (document.activeElement !== inputs.maxTokens) inputs.maxTokens.value = settings.maxTokens;
    if (document.activeElement !== inputs.seed) inputs.seed.value = settings.seed ?? "";
    reset.disabled = SLIDERS.every(({ name }) => settings[name] === DEFAULTS[name]);
  });

  const heading = make("div.heading", {}, make("h3", {}, "Sampling"), reset);
  return make("section.sampling", { "aria-label": "Sampling" }, heading, ...rows, numbers);
}
