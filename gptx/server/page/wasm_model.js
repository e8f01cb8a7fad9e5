/** GPT-2 on onnxruntime-web: what a page asks of a model, computed from its two graphs. */

import { KvCache } from "./kv_cache.js";
import { freshSeed, sample } from "./sampler.js";
import { topTokens } from "./top_tokens.js";

export const MAX_TOP = 50; // alternatives that are kept for each token
const CHUNK_TOKENS = 64; // of one pass; a signal ends a call between two passes
const MAX_LENS_NUMBERS = 2 ** 24; // logits of one pass of the lens

/**
 * A model, and the last sequence that it read. Its keys and values, and the most probable tokens at
 * each position, are kept: a call computes what its sequence adds to the longest common prefix.
 */
export class WasmModel {
  /**
   * @param {object} ort The module of onnxruntime-web.
   * @param {object} config Names and values of a config.json.
   * @param {{step: object, lens: () => Promise<object>}} sessions Session of step.onnx, and a
   *   function that loads the one of lens.onnx.
   */
  constructor(ort, config, sessions) {
    this.ort = ort;
    this.config = config;
    this.step = sessions.step;
    this.loadLens = sessions.lens;
    this.turn = Promise.resolve(); // of the pass that is running
    this.forget();
  }

  /** New tokens one by one, as `Engine.generate` describes them; `endIds` end the text. */
  async *generate({ ids, maxTokens, top, signal, endIds, ...settings }) {
    const seed = settings.seed ?? freshSeed();
    const last = Math.min(maxTokens, this.config.n_positions - ids.length);
    let text = ids;
    for (let step = 0; step < last; step++) {
      const ahead = await this.exclusively(() => this.read(text, signal));
      if (signal?.aborted) return;
      const { logits, total } = ahead;
      const id = sample(logits, { ...settings, seed }, step);
      const end = endIds.includes(id);
      yield { id, logprob: logits[id] - total, top: topTokens(logits, top, total), end };
      if (end) return;
      text = [...text, id];
    }
  }

  /** Log-probabilities of the tokens of a text, as `Engine.logprobs` describes them. */
  async logprobs(ids, { top, signal }) {
    return this.exclusively(async () => {
      await this.read(ids, signal);
      signal?.throwIfAborted();
      const topAfter = this.topAfter.map((pairs) => pairs.slice(0, top));
      const places = ids.map((id, i) =>
        i === 0
          ? { id, logprob: null, top: [] }
          : { id, logprob: this.logprobOf[i], top: topAfter[i - 1] },
      );
      return { places, next: topAfter[ids.length - 1] };
    });
  }

  /** Attention patterns of a layer, Float32Array [H, S, S]. */
  async attention(ids, layer, { signal } = {}) {
    const name = `h.${layer}.attn.pattern`;
    const S = ids.length;
    const H = this.config.n_head;
    const pattern = new Float32Array(H * S * S);
    await this.observe(ids, [name], signal, (results, first, n, capacity) => {
      const rows = results[name].data; // [1, H, n, capacity + n]
      for (let row = 0; row < H * n; row++) {
        const [head, i] = [Math.floor(row / n), row % n];
        const from = row * (capacity + n);
        const to = (head * S + first + i) * S;
        pattern.set(rows.subarray(from, from + first), to);
        pattern.set(rows.subarray(from + capacity, from + capacity + n), to + first);
      }
    });
    return pattern;
  }

  /** Rows of the logit lens, from the last layer to the first, as `Engine.lens` describes them. */
  async *lens(ids, { top, first, last, signal }) {
    const { n_layer: L, n_embd: C, vocab_size: V } = this.config;
    const names = ["h.0.resid_pre", ...Array.from({ length: L }, (_, i) => `h.${i}.resid_post`)];
    const streams = names.map(() => new Float32Array((last - first) * C));
    await this.observe(ids.slice(0, last), names, signal, (results, begin, n) => {
      const skipped = Math.max(0, first - begin);
      if (skipped >= n) return;
      names.forEach((name, i) =>
        streams[i].set(results[name].data.subarray(skipped * C), (begin + skipped - first) * C),
      );
    });
    this.lensSession ??= await this.loadLens();
    const rows = Math.max(1, Math.floor(MAX_LENS_NUMBERS / V));
    for (let i = names.length - 1; i >= 0; i--) {
      const found = [];
      for (let begin = 0; begin < last - first; begin += rows) {
        await otherEvents();
        signal?.throwIfAborted();
        const n = Math.min(rows, last - first - begin);
        const part = streams[i].slice(begin * C, (begin + n) * C);
        const x = new this.ort.Tensor("float32", part, [1, n, C]);
        const { logits, total } = await this.exclusively(() =>
          this.lensSession.run({ resid_post: x }),
        );
        for (let row = 0; row < n; row++) {
          const one = logits.data.subarray(row * V, (row + 1) * V);
          found.push(topTokens(one, top, total.data[row]));
        }
      }
      yield { name: names[i], top: found };
    }
  }

  /** Forget the last sequence. */
  forget() {
    this.ids = [];
    this.cache = new KvCache(this.config);
    this.topAfter = []; // the most probable tokens after each position
    this.logprobOf = []; // of the token at each position, from 1
    this.ahead = null; // logits after the last position, and the logarithm of their sum
  }

  /** Read a sequence, until a signal ends it; return what `ahead` is. */
  async read(ids, signal) {
    this.check(ids);
    for (let known = this.keepPrefix(ids); known < ids.length; known += CHUNK_TOKENS) {
      await otherEvents();
      if (signal?.aborted) return null;
      await this.readChunk(ids, known);
    }
    return this.ahead;
  }

  /** Keep what a sequence has in common with the last one; return the number of its tokens. */
  keepPrefix(ids) {
    let n = 0;
    while (n < ids.length && ids[n] === this.ids[n]) n += 1;
    if (n === this.ids.length) return n;
    // The logits after the prefix are gone: its last token is read again, whose own probability
    // is known.
    n = Math.max(0, n - 1);
    this.ids.length = this.topAfter.length = n;
    this.logprobOf.length = Math.min(this.logprobOf.length, n + 1);
    this.cache.truncate(n);
    this.ahead = null;
    return n;
  }

  async readChunk(ids, begin) {
    const chunk = ids.slice(begin, begin + CHUNK_TOKENS);
    const results = await this.pass(this.cache, chunk, ["logits", "total"]);
    const V = this.config.vocab_size;
    if (this.ahead) this.logprobOf[begin] = this.ahead.logits[chunk[0]] - this.ahead.total;
    chunk.forEach((id, i) => {
      const logits = results.logits.data.subarray(i * V, (i + 1) * V);
      const total = results.total.data[i];
      if (!Number.isFinite(total)) {
        this.forget();
        throw new RangeError("The model computed a number that is not finite.");
      }
      this.topAfter.push(topTokens(logits, MAX_TOP, total));
      if (i + 1 < chunk.length) this.logprobOf[begin + i + 1] = logits[chunk[i + 1]] - total;
      this.ahead = { logits, total };
    });
    this.ids.push(...chunk);
  }

  /** Read a sequence from its beginning; call a function with outputs of each chunk. */
  async observe(ids, names, signal, take) {
    this.check(ids);
    const cache = new KvCache(this.config);
    for (let begin = 0; begin < ids.length; begin += CHUNK_TOKENS) {
      await otherEvents();
      signal?.throwIfAborted();
      const chunk = ids.slice(begin, begin + CHUNK_TOKENS);
      const { capacity } = cache;
      const results = await this.exclusively(() => this.pass(cache, chunk, names));
      take(results, begin, chunk.length, capacity);
    }
  }

  /** Run the graph on new tokens, and append their keys and values to a cache. */
  async pass(cache, ids, names) {
    const n = ids.length;
    const tensor = new this.ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, n]);
    const fetches = [...names, ...cache.names.map((name) => `new.${name}`)];
    const feeds = { input_ids: tensor, ...cache.feeds(this.ort, n) };
    const results = await this.step.run(feeds, fetches);
    cache.append(results, n);
    return results;
  }

  /** Run a function after those that were given before: the sessions run one pass at a time. */
  exclusively(work) {
    const result = this.turn.then(work);
    this.turn = result.catch(() => {});
    return result;
  }

  check(ids) {
    const { n_positions: context, vocab_size: V } = this.config;
    if (ids.length === 0) throw new RangeError("The text is empty.");
    if (ids.length > context)
      throw new RangeError(`The text has ${ids.length} tokens, the context holds ${context}.`);
    const wrong = ids.find((id) => !(Number.isInteger(id) && id >= 0 && id < V));
    if (wrong !== undefined)
      throw new RangeError(`Token ${wrong} is not in the vocabulary of ${V}.`);
  }
}

/** Let the events run that wait for the end of a pass, such as the end of a signal. */
function otherEvents() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel(); // a timer waits for 4 ms
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}
