/**
 * One setting of onnxruntime-web for `benchmarks.wasm`: graphs of a model, timed on request.
 *
 *     node wasm_runs.mjs MODULE SIMD THREADS PAGE CONFIG NAME=GRAPH ...
 *
 * Each line of standard input is {graph, prompt, steps, cached}; the answer is a line of JSON with
 * the time of the prompt and of each step, in milliseconds.
 */

import fs from "node:fs";
import { createRequire } from "node:module";
import readline from "node:readline";

const [module, simd, threads, page, configFile, ...graphs] = process.argv.slice(2);
const ort = module.endsWith(".mjs") ? await import(module) : createRequire(import.meta.url)(module);
ort.env.wasm.numThreads = Number(threads);
if (!module.endsWith(".mjs")) ort.env.wasm.simd = simd === "simd";

const { KvCache } = await import(`${page}/kv_cache.js`);
const { argmax } = await import(`${page}/filters.js`);
const { WasmModel } = await import(`${page}/wasm_model.js`);
const config = JSON.parse(fs.readFileSync(configFile));
const models = new Map();
for (const graph of graphs) {
  const [name, file] = graph.split("=");
  const options = { executionProviders: ["wasm"], logSeverityLevel: 3 };
  const step = await ort.InferenceSession.create(new Uint8Array(fs.readFileSync(file)), options);
  models.set(name, new WasmModel(ort, config, { step }));
}

const V = config.vocab_size;

async function run({ graph, prompt, steps, cached, budget }) {
  const model = models.get(graph);
  let cache = new KvCache(config);
  const ids = Array.from({ length: prompt }, (_, i) => (7 * i + 3) % V);
  const begin = performance.now();
  const times = [];
  const found = [];
  let next = ids;
  while (found.length <= steps && ids.length <= config.n_positions) {
    const start = performance.now();
    if (!cached) cache = new KvCache(config);
    const { logits } = await model.pass(cache, cached ? next : ids, ["logits"]);
    const id = argmax(logits.data.subarray(logits.data.length - V));
    const now = performance.now();
    if (budget && now - begin > budget) break;
    times.push(now - start);
    ids.push(id);
    next = [id];
    found.push(id);
  }
  return { times, ids: found };
}

console.log(JSON.stringify({ ready: true }));
for await (const line of readline.createInterface({ input: process.stdin }))
  console.log(JSON.stringify(await run(JSON.parse(line))));
