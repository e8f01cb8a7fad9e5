/** Numbers: 16-bit floats, and how the page writes probabilities. */

/** Return the float32 numbers of little-endian 16-bit floats in base64. */
export function fromFloat16(base64) {
  const bytes = Uint8Array.from(atob(base64), (x) => x.charCodeAt(0));
  const bits = new Uint16Array(bytes.buffer);
  return Float32Array.from(bits, (half) => TABLE[half]);
}

/** Value of each 16-bit float. */
const TABLE = Float32Array.from({ length: 2 ** 16 }, (_, bits) => {
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1024 + fraction) * 2 ** (exponent - 25);
});

/** Return a probability as a percentage of two or three digits, such as "7.3 %". */
export function percent(p) {
  const value = 100 * p;
  if (value >= 99.95 && value < 100) return "> 99.9 %";
  if (value >= 10) return `${value.toFixed(value >= 99.95 ? 0 : 1)} %`;
  if (value >= 0.1) return `${value.toFixed(value < 1 ? 2 : 1)} %`;
  if (value === 0) return "0 %";
  return value < 0.001 ? "< 0.001 %" : `${value.toFixed(3)} %`;
}

/** Return the surprise at a log-probability in nats, in bits. */
export function bits(logprob) {
  return -logprob / Math.LN2;
}
