/**
 * The interface between the page and a model.
 *
 * `server_engine.js` implements it with the endpoints of `gptx serve`, `wasm_engine.js` with
 * onnxruntime-web. The page imports the module that `<meta name="engine">` of index.html names, and
 * calls its one export: `createEngine({ model, key, onProgress })`.
 *
 * The page speaks of token ids; it asks `describe` for their texts. So an engine never returns a
 * text that is split inside a character. Log-probabilities are those of the model in nats, before
 * temperature and filters.
 *
 * @typedef {object} Info
 * @property {string} model Name of the model.
 * @property {string[]} models Names of all models to choose from.
 * @property {string} place Where it computes, for the reader: "127.0.0.1:8000", "this browser".
 * @property {number} vocabSize V, number of tokens.
 * @property {number} context Maximum number of tokens, prompt and output together.
 * @property {number} layers L, number of layers.
 * @property {number} heads H, number of heads of a layer.
 * @property {number[]} endIds Ids of the tokens that end a text.
 * @property {number} maxTop Largest `top` that `generate` and `logprobs` take.
 * @property {boolean} text False for a model without a tokenizer: its tokens are numbers.
 * @property {{logprobs: boolean, attention: boolean, lens: boolean}} can Methods that work. The
 *   page says of a tab whose method is missing that it needs the server.
 *
 * @typedef {object} Token
 * @property {number} id
 * @property {string} text Text of the token alone; U+FFFD in the place of a part of a character.
 * @property {Uint8Array | null} bytes Its UTF-8 bytes; null if it has none of its own, as a token of
 *   WordPiece or of a model without a tokenizer.
 *
 * @typedef {object} Place A position in a text, and what the model expects there.
 * @property {number} id Token at this place.
 * @property {number | null} logprob Its log-probability; null for the first token of a text.
 * @property {[number, number][]} top Ids and log-probabilities of the most probable tokens, best
 *   first; empty for the first token of a text.
 *
 * @typedef {object} Options Of `generate`.
 * @property {number[]} ids Prompt, at least one token.
 * @property {number} maxTokens Limit of new tokens.
 * @property {number} temperature 0 chooses the most probable token.
 * @property {number} topK 0 is off.
 * @property {number} topP 1 is off.
 * @property {number} minP 0 is off.
 * @property {number | null} seed The same seed gives the same tokens; null is a random one.
 * @property {number} top Number of alternatives to return for each token.
 * @property {AbortSignal} signal Ends the generation; the iterator then returns, without an error.
 *
 * @typedef {object} LensRow A layer of the logit lens.
 * @property {string} name Name of the activation, such as "h.3.resid_post".
 * @property {[number, number][][]} top For each position of the range: ids and log-probabilities of
 *   the most probable next tokens, best first.
 *
 * @typedef {object} Engine
 * @property {() => Promise<Info>} info Load the model if necessary; describe it.
 * @property {(text: string) => Promise<number[]>} tokenize Token ids of a text.
 * @property {(ids: number[]) => Promise<string>} detokenize Text of token ids.
 * @property {(ids: Iterable<number>) => Promise<Map<number, Token>>} describe Tokens by id. An
 *   engine keeps what it has read.
 * @property {(options: Options) => AsyncGenerator<Place & {end: boolean}>} generate New tokens one
 *   by one. `end` is true for an end token, which is then the last one.
 * @property {(ids: number[], options: {top: number, signal?: AbortSignal}) =>
 *   Promise<{places: Place[], next: [number, number][]}>} logprobs A place for each token of a text,
 *   and the most probable tokens after it.
 * @property {(ids: number[], layer: number, options?: {signal?: AbortSignal}) =>
 *   Promise<Float32Array>} attention Patterns of one layer, [H, S, S], rows are attending tokens.
 * @property {(ids: number[], options: {top: number, first: number, last: number,
 *   signal?: AbortSignal}) => AsyncGenerator<LensRow>} lens Layers from the last one to the first,
 *   each for the positions from `first` to before `last`.
 */

/**
 * An error of an engine, with a message for the reader of the page.
 *
 * @property {"key" | "busy" | "gone" | "request"} kind "key": a key is missing or wrong; "busy": try
 *   again after `retryAfter` seconds; "gone": there is no answer; "request": any other error.
 */
export class EngineError extends Error {
  constructor(message, kind = "request", retryAfter = null) {
    super(message);
    this.name = "EngineError";
    this.kind = kind;
    this.retryAfter = retryAfter;
  }
}

/** Number of alternatives that the page asks for; sliders rank them again without a request. */
export const TOP = 50;
