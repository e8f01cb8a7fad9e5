/** Colors behind letters: orange for what surprised the model, blue for what it gives weight to. */

export const WEIGHT = [66, 133, 244]; // red, green, blue; readable on light and on dark pages
const DARKEST_LOGPROB = Math.log(1e-4); // from which a token has the strongest color

/** Return the strength of the color of a token, 0 to 1: the less probable, the stronger. */
export function surprise(logprob) {
  return logprob === null ? 0 : Math.min(1, Math.max(0, logprob / DARKEST_LOGPROB));
}

/** Color an element: `kind` is "surprise" or "weight", the strength is from 0 to 1. */
export function shade(element, kind, strength) {
  element.classList.add(kind);
  element.style.setProperty("--strength", strength.toFixed(3));
}
