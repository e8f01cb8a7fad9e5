/**
 * The next token of a row of logits, as in gptx/generation/sampling.py: a seed gives the tokens of
 * gptx, except where sums in float32 and in float64 differ at the border of two tokens.
 */

import { argmax, filter, softmax } from "./filters.js";

const WORD = (1n << 64n) - 1n;
const ROUNDS = 10;
const MULTIPLIERS = [0xd2e7470ee14c6c93n, 0xca5a826395121157n];
const KEY_INCREMENTS = [0x9e3779b97f4a7c15n, 0xbb67ae8584caa73bn];
const RANDOM_BITS = 24;

/** Return a seed below 2^53, from the random numbers of the system. */
export function freshSeed() {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return (high % 2 ** 21) * 2 ** 32 + low;
}

/** Return random number `step` of a stream of a seed: 0 <= u < 1, by Philox 4x64. */
export function uniform(seed, stream, step) {
  let key = [BigInt(seed) & WORD, BigInt(stream)];
  let counter = [BigInt(step) + 1n, 0n, 0n, 0n]; // NumPy counts up before a block
  for (let round = 0; round < ROUNDS; round++) {
    const first = MULTIPLIERS[0] * counter[0];
    const second = MULTIPLIERS[1] * counter[2];
    counter = [
      (second >> 64n) ^ counter[1] ^ key[0],
      second & WORD,
      (first >> 64n) ^ counter[3] ^ key[1],
      first & WORD,
    ];
    key = key.map((word, i) => (word + KEY_INCREMENTS[i]) & WORD);
  }
  return Number(counter[0] >> BigInt(64 - RANDOM_BITS)) / 2 ** RANDOM_BITS;
}

/** Return the token at which the cumulative distribution of logits passes `u`. */
export function draw(logits, u) {
  const cumulative = softmax(logits);
  for (let i = 1; i < cumulative.length; i++) cumulative[i] += cumulative[i - 1];
  const passed = u * cumulative.at(-1);
  return cumulative.findIndex((value) => value > passed);
}

/**
 * Return the next token.
 *
 * @param {Float32Array} logits
 * @param {{temperature: number, topK: number, topP: number, minP: number, seed: number}} settings
 * @param {number} step Number of tokens that were drawn before.
 */
export function sample(logits, settings, step) {
  if (settings.temperature === 0) return argmax(logits);
  return draw(filter(Float64Array.from(logits), settings), uniform(settings.seed, 0, step));
}
