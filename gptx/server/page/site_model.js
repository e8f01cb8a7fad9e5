/** The model of a static site: its files, made a `WasmModel` and a tokenizer. */

import { Tokenizer } from "./tokenizer.js";
import { WasmModel } from "./wasm_model.js";

/**
 * Load a model.
 *
 * @param {object} ort The module of onnxruntime-web, with its settings.
 * @param {object} manifest Contents of model.json.
 * @param {(pieces: object[]) => Promise<Uint8Array>} read Return the content of a file.
 * @returns {Promise<{model: WasmModel, tokenizer: Tokenizer | null}>}
 */
export async function loadModel(ort, { config, files }, read) {
  const start = async (graph, weights) => {
    const externalData = [];
    for (const path of weights) externalData.push({ path, data: await read(files[path]) });
    const options = { executionProviders: ["wasm"], externalData };
    return ort.InferenceSession.create(await read(files[graph]), options);
  };
  const tokenizer = files.tokenizer && new Tokenizer(parse(await read(files.tokenizer)));
  const step = await start("step", ["head", "body"]);
  const lens = () => start("lens", ["head"]);
  return { model: new WasmModel(ort, config, { step, lens }), tokenizer: tokenizer ?? null };
}

function parse(content) {
  return JSON.parse(new TextDecoder().decode(content));
}
