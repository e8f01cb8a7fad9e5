/**
 * The worker of `wasm_engine.js`: it loads the model of the site and answers calls.
 *
 * A call is {call, method, args}; the answers are {call, item} for each item of a generator, then
 * {call, value} or {call, error}. {call, abort: true} ends a call.
 */

import { Downloads } from "./download.js";
import { loadModel } from "./site_model.js";
import { MAX_TOP } from "./wasm_model.js";

const SITE = new URL("..", import.meta.url);
const MAX_THREADS = 4; // more do not read the weights faster

const running = new Map(); // number of a call -> its AbortController
let loading = null;

async function load() {
  const ort = await import(new URL("ort/ort.wasm.min.mjs", SITE).href);
  ort.env.wasm.wasmPaths = new URL("ort/", SITE).href;
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated
    ? Math.min(MAX_THREADS, navigator.hardwareConcurrency)
    : 1;
  const base = new URL("model/", SITE);
  const response = await fetch(new URL("model.json", base), { cache: "no-cache" });
  if (!response.ok) throw new Error(`model.json: status ${response.status}`);
  const manifest = await response.json();
  const { files } = manifest;
  const first = [files.step, files.head, files.body, files.tokenizer ?? []].flat();
  const total = first.reduce((sum, { bytes }) => sum + bytes, 0);
  let done = 0;
  const downloads = new Downloads(base, (bytes) => {
    done += bytes;
    postMessage({ progress: { done: Math.min(done, total), total, what: "Loading the model" } });
  });
  const { model, tokenizer } = await loadModel(ort, manifest, (pieces) => downloads.read(pieces));
  downloads.onBytes = () => {}; // the lens reads pieces again
  await downloads.forgetOthers(Object.values(files));
  return { manifest, model, tokenizer, threads: ort.env.wasm.numThreads };
}

const methods = {
  async info({ manifest, tokenizer, threads }) {
    const { config } = manifest;
    const place = [location.host, "in this browser", threads > 1 ? `${threads} threads` : []];
    return {
      model: manifest.name,
      models: [],
      place: place.flat().join(", "),
      vocabSize: config.vocab_size,
      context: config.n_positions,
      layers: config.n_layer,
      heads: config.n_head,
      endIds: manifest.end_ids,
      maxTop: MAX_TOP,
      text: tokenizer !== null,
      can: { logprobs: true, attention: true, lens: true },
    };
  },

  async tokenize({ tokenizer }, text) {
    return tokenizer.encode(text);
  },

  async detokenize({ tokenizer }, ids) {
    return tokenizer.decode(ids);
  },

  async describe({ tokenizer }, ids) {
    return ids.map((id) => {
      if (tokenizer === null) return { id, text: String(id), bytes: null };
      return { id, text: tokenizer.decode([id]), bytes: tokenizer.join([id]) };
    });
  },

  generate({ model, manifest }, options, signal) {
    return model.generate({ ...options, endIds: manifest.end_ids, signal });
  },

  logprobs({ model }, ids, options, signal) {
    return model.logprobs(ids, { ...options, signal });
  },

  attention({ model }, ids, layer, signal) {
    return model.attention(ids, layer, { signal });
  },

  lens({ model }, ids, options, signal) {
    return model.lens(ids, { ...options, signal });
  },
};

async function answer({ call, method, args }) {
  const controller = new AbortController();
  running.set(call, controller);
  try {
    loading ??= load();
    const loaded = await loading.catch((error) => {
      loading = null; // the next call tries again
      throw error;
    });
    const result = methods[method](loaded, ...args, controller.signal);
    if (Symbol.asyncIterator in result)
      for await (const item of result) postMessage({ call, item });
    else postMessage({ call, value: await result });
    postMessage({ call, done: true });
  } catch (error) {
    const { name, message } = error;
    postMessage({ call, error: { name, message, request: error instanceof RangeError } });
  } finally {
    running.delete(call);
  }
}

addEventListener("message", ({ data }) => {
  if (data.abort) running.get(data.call)?.abort();
  else answer(data);
});
