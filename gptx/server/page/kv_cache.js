/** The KV cache of one sequence, for a graph that returns keys and values of new tokens only. */

const PADDING = 64; // rows by which the buffers grow; the graph copies padding too

/**
 * Keys and values of each layer, buffers [1, H, capacity, D]. Rows from `length` on are padding.
 */
export class KvCache {
  /** @param {{n_layer: number, n_head: number, n_embd: number, n_positions: number}} config */
  constructor(config) {
    this.heads = config.n_head;
    this.width = config.n_embd / config.n_head;
    this.context = config.n_positions;
    const layers = Array.from({ length: config.n_layer }, (_, i) => i);
    this.names = layers.flatMap((i) => [`${i}.keys`, `${i}.values`]);
    this.length = 0;
    this.capacity = 0;
    this.buffers = this.names.map(() => new Float32Array(0));
  }

  /** Drop the tokens from `length` on. */
  truncate(length) {
    this.length = Math.min(this.length, length);
  }

  /** Return the inputs of the graph for `n` new tokens. */
  feeds(ort, n) {
    const mask = new BigInt64Array(this.capacity + n).fill(1n);
    mask.fill(0n, this.length, this.capacity);
    const shape = [1, this.heads, this.capacity, this.width];
    const found = { attention_mask: new ort.Tensor("int64", mask, [1, mask.length]) };
    this.names.forEach((name, i) => {
      found[`past.${name}`] = new ort.Tensor("float32", this.buffers[i], shape);
    });
    return found;
  }

  /** Append the keys and values that the graph returned for `n` new tokens. */
  append(results, n) {
    this.reserve(this.length + n);
    const { heads, width, capacity, length } = this;
    this.names.forEach((name, i) => {
      const rows = results[`new.${name}`].data; // [1, H, n, D]
      for (let head = 0; head < heads; head++) {
        const part = rows.subarray(head * n * width, (head + 1) * n * width);
        this.buffers[i].set(part, (head * capacity + length) * width);
      }
    });
    this.length += n;
  }

  /** Make room for `length` tokens. */
  reserve(length) {
    if (length <= this.capacity) return;
    const capacity = Math.min(Math.ceil(length / PADDING) * PADDING, this.context);
    const { heads, width } = this;
    this.buffers = this.buffers.map((old) => {
      const buffer = new Float32Array(heads * capacity * width);
      for (let head = 0; head < heads; head++) {
        const begin = head * this.capacity * width;
        buffer.set(old.subarray(begin, begin + this.length * width), head * capacity * width);
      }
      return buffer;
    });
    this.capacity = capacity;
  }
}
