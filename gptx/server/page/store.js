/** The state of the page: one object, replaced as a whole; views draw what has changed. */

/**
 * @typedef {object} Document A text of tokens.
 * @property {import("./engine.js").Place[]} places Its tokens.
 * @property {number} promptLength Number of tokens that the reader wrote or chose.
 * @property {[number, number][] | null} next Most probable tokens after it; null if unknown.
 * @property {boolean} ended True after an end token.
 *
 * @typedef {object} State
 * @property {import("./engine.js").Info | null} info
 * @property {Document} document
 * @property {number} selected Position that the detail shows; the length of the text is that of the
 *   next token.
 * @property {"" | "reading" | "writing"} busy
 * @property {string} tab
 * @property {object} settings Of the sampler: temperature, topK, topP, minP, maxTokens, seed.
 */

export const EMPTY = { places: [], promptLength: 0, next: null, ended: false };

export const DEFAULTS = { temperature: 1, topK: 0, topP: 1, minP: 0, maxTokens: 40, seed: null };

/** Return a store of a state: `state`, `set(changes)`, `subscribe(listener)`. */
export function createStore(state) {
  const listeners = [];
  return {
    get state() {
      return state;
    },
    set(changes) {
      const before = state;
      state = { ...state, ...changes };
      for (const listener of listeners) listener(state, before);
    },
    /** Call a function now and after each change, with the state and the one before. */
    subscribe(listener) {
      listeners.push(listener);
      listener(state, {});
    },
  };
}
