/** The most probable tokens of a row of logits. */

/**
 * Return ids and log-probabilities of the `n` most probable tokens, best first; of equal ones, the
 * lower id first.
 *
 * @param {Float32Array} logits
 * @param {number} n
 * @param {number} total Logarithm of the sum of exponentials of all logits.
 * @returns {[number, number][]}
 */
export function topTokens(logits, n, total) {
  const ids = [];
  for (let id = 0; id < logits.length; id++) {
    if (ids.length === n && !(logits[id] > logits[ids[n - 1]])) continue;
    let place = ids.length;
    while (place > 0 && logits[ids[place - 1]] < logits[id]) place -= 1;
    ids.splice(place, 0, id);
    if (ids.length > n) ids.pop();
  }
  return ids.map((id) => [id, logits[id] - total]);
}
