/** The distribution that a draw takes its token from, of the N most probable tokens alone. */

import { filter, softmax } from "./filters.js";

/**
 * Return the probabilities of the N most probable tokens after temperature and filters.
 *
 * The V - N others share the rest of the probability. Their own probabilities did not come with the
 * N; they count as equal, so that some settings give an estimate.
 *
 * @param {[number, number][]} top Ids and log-probabilities, best first.
 * @param {number} vocabSize V.
 * @param {{temperature: number, topK: number, topP: number, minP: number}} settings
 * @returns {{probs: Float64Array, others: number, exact: boolean}} Probability of each of the N, of
 *   all others together, and false for an estimate.
 */
export function rank(top, vocabSize, settings) {
  const n = top.length;
  if (n === 0) return { probs: new Float64Array(0), others: 0, exact: true };
  if (settings.temperature === 0) {
    const probs = new Float64Array(n);
    probs[0] = 1;
    return { probs, others: 0, exact: true };
  }
  const x = new Float64Array(Math.max(n, vocabSize));
  top.forEach(([, logprob], i) => (x[i] = logprob));
  const known = top.reduce((sum, [, logprob]) => sum + Math.exp(logprob), 0);
  const share = Math.log(Math.max(0, 1 - known) / (x.length - n)); // NaN if there are no others
  x.fill(Math.min(share, x[n - 1]), n);
  const kept = filter(x, settings);
  const all = softmax(kept);
  const others = all.subarray(n).reduce((sum, prob) => sum + prob, 0);
  return { probs: all.slice(0, n), others, exact: isExact(kept, n, settings) };
}

/** Test for a result that does not depend on how the others share their probability. */
function isExact(kept, n, { temperature, topK, topP, minP }) {
  if (n === kept.length || kept[n] === -Infinity) {
    if (n === kept.length || (topK > 0 && topK <= n)) return true;
    // Their sum is known at temperature 1: enough for top-p, and for min-p if it also drops one
    // of the N, since none of the others is more probable.
    return temperature === 1 && (minP <= 0 || kept[n - 1] === -Infinity);
  }
  return temperature === 1 && topK === 0 && topP >= 1 && minP <= 0;
}
