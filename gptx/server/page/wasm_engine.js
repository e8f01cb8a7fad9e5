/** The model of a static site, in a worker of the browser. The interface is in engine.js. */

import { EngineError } from "./engine.js";

/**
 * @param {{onProgress?: (progress: {done: number, total: number, what: string}) => void}} options
 * @returns {import("./engine.js").Engine}
 */
export function createEngine({ onProgress } = {}) {
  const worker = new Worker(new URL("wasm_worker.js", import.meta.url), { type: "module" });
  const calls = new Map(); // number -> function that takes the worker's answers
  const tokens = new Map();
  let last = 0;

  worker.addEventListener("message", ({ data }) => {
    if (data.progress) onProgress?.(data.progress);
    else calls.get(data.call)?.(data);
  });
  worker.addEventListener("error", ({ message }) => {
    for (const take of calls.values())
      take({ error: { message: `The model stopped: ${message ?? "it could not be loaded"}.` } });
  });

  /** Call the worker; yield the items and the value that it answers, until it is done. */
  async function* stream(method, args, signal) {
    const call = ++last;
    const answers = [];
    let wake = () => {};
    calls.set(call, (data) => {
      answers.push(data);
      wake();
    });
    const abort = () => worker.postMessage({ call, abort: true });
    signal?.addEventListener("abort", abort);
    worker.postMessage({ call, method, args });
    if (signal?.aborted) abort();
    try {
      for (;;) {
        while (answers.length === 0) await new Promise((resolve) => (wake = resolve));
        const { item, value, error, done } = answers.shift();
        if (error?.name === "AbortError") throw new DOMException(error.message, "AbortError");
        if (error) throw new EngineError(error.message, error.request ? "request" : "gone");
        if (done) return;
        yield item ?? value;
      }
    } finally {
      calls.delete(call);
      signal?.removeEventListener("abort", abort);
      abort();
    }
  }

  async function ask(method, args, signal) {
    let found;
    for await (const value of stream(method, args, signal)) found = value;
    return found;
  }

  return {
    info: () => ask("info", []),
    tokenize: (text) => ask("tokenize", [text]),
    detokenize: (ids) => ask("detokenize", [ids]),

    async describe(wanted) {
      const ids = [...new Set(wanted)].filter((id) => !tokens.has(id));
      if (ids.length > 0)
        for (const token of await ask("describe", [ids])) tokens.set(token.id, token);
      return tokens;
    },

    generate: ({ signal, ...options }) => stream("generate", [options], signal),
    logprobs: (ids, { signal, ...options }) => ask("logprobs", [ids, options], signal),
    attention: (ids, layer, { signal } = {}) => ask("attention", [ids, layer], signal),
    lens: (ids, { signal, ...options }) => stream("lens", [ids, options], signal),
  };
}
