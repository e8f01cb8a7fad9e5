/**
 * Temperature and filters of one row of logits, Float64Array [V], as in
 * gptx/generation/sampling.py (steps 7 to 10) and gptx/generation/filters.py.
 *
 * A filter returns the logits with -Infinity for the tokens to drop. The arguments are not changed.
 */

export const MIN_TEMPERATURE = 1e-30; // a smaller divisor can make a float32 logit overflow

/** Return probabilities of logits. */
export function softmax(x) {
  const largest = maximum(x);
  const exps = x.map((value) => Math.exp(value - largest));
  const sum = exps.reduce((total, value) => total + value, 0);
  return exps.map((value) => value / sum);
}

/** Return logits with all but the `k` largest, and those equal to the last, at -Infinity. */
export function keepTopK(x, k) {
  if (k === 0 || k >= x.length) return x;
  const least = x.toSorted()[x.length - k];
  return x.map((value) => (value >= least ? value : -Infinity));
}

/** Return logits with all outside the smallest set of probability `p` at -Infinity. */
export function keepTopP(x, p) {
  if (p >= 1) return x;
  const probs = softmax(x);
  const ranked = probs.toSorted().reverse();
  let least = ranked[0];
  let sum = 0;
  for (const prob of ranked) {
    if (sum < p) least = Math.min(least, prob);
    sum += prob;
  }
  return x.map((value, i) => (probs[i] >= least ? value : -Infinity));
}

/** Return logits with tokens less than `p` times as probable as the best one at -Infinity. */
export function keepMinP(x, p) {
  if (p <= 0) return x;
  const least = maximum(x) + Math.log(p);
  return x.map((value) => (value >= least ? value : -Infinity));
}

/** Return logits after temperature, top-k, top-p and min-p, in this order. */
export function filter(x, { temperature, topK, topP, minP }) {
  const divisor = Math.max(temperature, MIN_TEMPERATURE);
  const scaled = x.map((value) => value / divisor);
  return keepMinP(keepTopP(keepTopK(scaled, topK), topP), minP);
}

/** Return the index of the largest logit, the first of equal ones: the choice at temperature 0. */
export function argmax(x) {
  let best = 0;
  for (let i = 1; i < x.length; i++) if (x[i] > x[best]) best = i;
  return best;
}

function maximum(x) {
  return x.reduce((a, b) => Math.max(a, b), -Infinity);
}
