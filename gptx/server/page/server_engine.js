/** The model of a gptx server, by its public endpoints. The interface is in engine.js. */

import { EngineError } from "./engine.js";
import { fromFloat16 } from "./numbers.js";
import { bytesOf } from "./pieces.js";
import { eventsOf } from "./events.js";

const ID_PREFIX = "token_id:";
const MAX_DESCRIBED = 4096; // tokens of one request

/**
 * @param {{model?: string, key?: string}} options
 * @returns {import("./engine.js").Engine}
 */
export function createEngine({ model, key } = {}) {
  const tokens = new Map(); // id -> Token
  const asked = new Map(); // id -> promise of a request that will bring it

  async function request(path, body, signal) {
    let response;
    try {
      response = await fetch(path, {
        method: body ? "POST" : "GET",
        headers: {
          ...(body && { "Content-Type": "application/json" }),
          ...(key && { Authorization: `Bearer ${key}` }),
        },
        body: body && JSON.stringify({ ...(model && { model }), ...body }),
        signal,
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new EngineError("The server does not answer.", "gone");
    }
    if (!response.ok) throw await errorOf(response);
    return response;
  }

  const post = async (path, body, signal) => (await request(path, body, signal)).json();

  async function ask(ids) {
    const found = await post("inspect", { what: ["tokens"], tokens: ids });
    for (const { id, text, bytes } of found.tokens)
      tokens.set(id, { id, text, bytes: bytes === null ? null : bytesOf(bytes) });
  }

  async function describe(wanted) {
    const ids = [...new Set(wanted)].filter((id) => !tokens.has(id));
    const missing = ids.filter((id) => !asked.has(id));
    for (let first = 0; first < missing.length; first += MAX_DESCRIBED) {
      const part = missing.slice(first, first + MAX_DESCRIBED);
      const done = ask(part).finally(() => part.forEach((id) => asked.delete(id)));
      part.forEach((id) => asked.set(id, done));
    }
    await Promise.all(new Set(ids.map((id) => asked.get(id))));
    return tokens;
  }

  return {
    async info() {
      const { data } = await (await request("v1/models")).json();
      const models = data.map(({ id }) => id);
      model ??= models[0];
      const { model: found } = await post("inspect", { what: ["model"] });
      return {
        model,
        models,
        place: location.host,
        vocabSize: found.vocab_size,
        context: found.n_positions,
        layers: found.n_layer,
        heads: found.n_head,
        endIds: found.eos_token_ids,
        maxTop: found.max_top,
        text: found.has_tokenizer,
        can: { logprobs: true, attention: true, lens: true },
      };
    },

    async tokenize(text) {
      return (await post("tokenize", { prompt: text })).tokens;
    },

    async detokenize(ids) {
      return (await post("detokenize", { tokens: ids })).prompt;
    },

    describe,

    async *generate({ ids, maxTokens, temperature, topK, topP, minP, seed, top, signal }) {
      const body = {
        prompt: ids,
        max_tokens: maxTokens,
        temperature,
        top_k: topK,
        top_p: topP,
        min_p: minP,
        ...(seed !== null && { seed }),
        logprobs: top,
        return_tokens_as_token_ids: true,
        stream: true,
      };
      try {
        const response = await request("v1/completions", body, signal);
        for await (const event of eventsOf(response.body)) {
          if (event.error) throw new EngineError(event.error.message);
          const [choice] = event.choices;
          const logprobs = choice?.logprobs;
          if (!logprobs) continue;
          const ends = choice.finish_reason === "stop";
          for (const [i, token] of logprobs.tokens.entries()) {
            yield {
              id: idOf(token),
              logprob: logprobs.token_logprobs[i],
              top: pairsOf(logprobs.top_logprobs[i], top),
              end: ends && i === logprobs.tokens.length - 1,
            };
          }
        }
      } catch (error) {
        if (signal?.aborted) return;
        if (error instanceof EngineError) throw error;
        throw new EngineError("The connection to the server broke.", "gone");
      }
    },

    async logprobs(ids, { top, signal }) {
      const body = { what: ["logprobs"], tokens: ids, top };
      const { logprobs } = await post("inspect", body, signal);
      const places = ids.map((id, i) => ({
        id,
        logprob: logprobs.token_logprobs[i],
        top: logprobs.top_logprobs[i] ?? [],
      }));
      return { places, next: logprobs.next };
    },

    async attention(ids, layer, { signal } = {}) {
      const body = { what: ["attention"], tokens: ids, layers: [layer] };
      const { attention } = await post("inspect", body, signal);
      return fromFloat16(attention.data);
    },

    async *lens(ids, { top, first, last, signal }) {
      const body = { what: ["lens"], tokens: ids, top, positions: [first, last] };
      const { lens } = await post("inspect", body, signal);
      yield* lens.toReversed();
    },
  };
}

function idOf(token) {
  return Number(token.slice(ID_PREFIX.length));
}

/** Return the n best ids and log-probabilities of an object of OpenAI's form. */
function pairsOf(logprobs, n) {
  return Object.entries(logprobs ?? {})
    .map(([token, logprob]) => [idOf(token), logprob])
    .sort((a, b) => b[1] - a[1])
    .slice(0, n); // without the chosen token, if it is not among them
}

async function errorOf(response) {
  let message = `The server answers with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // A proxy's page: the status has to do.
  }
  const kind = { 401: "key", 429: "busy", 503: "busy" }[response.status] ?? "request";
  const seconds = Number(response.headers.get("Retry-After"));
  return new EngineError(message, kind, seconds || null);
}
