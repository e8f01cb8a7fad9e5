/** Log-probabilities of a row of logits. */

/** Return the logarithm of the sum of exponentials: the log-probability of a logit is their difference. */
export function logSumExp(logits) {
  let largest = -Infinity;
  for (const x of logits) if (x > largest) largest = x;
  let sum = 0;
  for (const x of logits) sum += Math.exp(x - largest);
  return largest + Math.log(sum);
}

/**
 * Return ids and log-probabilities of the `n` most probable tokens, best first; of equal ones, the
 * lower id first.
 *
 * @param {Float32Array} logits
 * @param {number} n
 * @param {number} total `logSumExp(logits)`
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
