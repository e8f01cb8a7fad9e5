/** The actions of the reader: read a text, continue it, branch, go back. */

import { TOP } from "./engine.js";
import { EMPTY } from "./store.js";

const UNKNOWN = { logprob: null, top: [] };

/**
 * A text and its versions, on one engine.
 *
 * @property {Map<number, import("./engine.js").Token>} tokens Tokens by id, as far as known.
 */
export class Session {
  constructor(engine, store, onError) {
    this.engine = engine;
    this.store = store;
    this.onError = onError;
    this.running = null;
    this.reading = Promise.resolve();
    this.restart();
  }

  /** Forget all texts and tokens, for another model. */
  restart() {
    this.stop();
    this.tokens = new Map();
    this.versions = [];
    this.version = -1;
    this.store.set({ document: EMPTY, selected: 0 });
  }

  get ids() {
    return this.store.state.document.places.map(({ id }) => id);
  }

  get top() {
    return Math.min(TOP, this.store.state.info.maxTop);
  }

  get canGoBack() {
    return this.version > 0;
  }

  get canGoForward() {
    return this.version < this.versions.length - 1;
  }

  /** Read another text, in place of the one before. */
  read(text) {
    this.reading = this._read(text);
    return this.reading;
  }

  async _read(text) {
    await this._run("reading", async (signal) => {
      const ids = await this._idsOf(text);
      if (signal.aborted) return;
      if (ids.length === 0) return this._show(EMPTY);
      const { context, can } = this.store.state.info;
      if (ids.length > context)
        throw new Error(`The text has ${ids.length} tokens, the model reads at most ${context}.`);
      await this._describe(ids);
      if (signal.aborted) return;
      const plain = ids.map((id) => ({ id, ...UNKNOWN }));
      this._show({ ...EMPTY, places: plain, promptLength: ids.length });
      if (can.logprobs) {
        const { places, next } = await this.engine.logprobs(ids, { top: this.top, signal });
        await this._describeTop(next);
        this._show({ ...EMPTY, places, promptLength: ids.length, next });
      } else {
        await this._readNext(signal);
      }
    });
    this._keep();
  }

  /** Continue the text by at most `maxTokens` tokens. */
  async continue(maxTokens = this.store.state.settings.maxTokens) {
    await this.reading;
    await this._run("writing", (signal) => this._write(maxTokens, signal));
    await this._finish();
  }

  /** Put another token in the place of one, drop those after it, and continue from there. */
  async branch(position, id) {
    this.stop();
    const { document, info, settings } = this.store.state;
    const before = document.places[position];
    const top = before ? before.top : document.next;
    const logprob = top.find(([other]) => other === id)?.[1] ?? null;
    const places = [...document.places.slice(0, position), { id, logprob, top }];
    const ended = info.endIds.includes(id);
    this._show({ places, promptLength: places.length, next: null, ended });
    this._keep();
    await this._run("writing", async (signal) => {
      await this._describe([id]);
      if (!ended) await this._write(settings.maxTokens, signal);
    });
    await this._finish();
  }

  stop() {
    this.running?.abort();
  }

  back() {
    if (this.canGoBack) this._go(this.version - 1);
  }

  forward() {
    if (this.canGoForward) this._go(this.version + 1);
  }

  select(position) {
    if (position !== this.store.state.selected) this.store.set({ selected: position });
  }

  /** Return the text of all tokens; their ids for a model without a tokenizer. */
  async text() {
    return this.store.state.info.text ? this.engine.detokenize(this.ids) : this.ids.join(" ");
  }

  async _idsOf(text) {
    if (this.store.state.info.text) return text ? this.engine.tokenize(text) : [];
    const ids = text.split(/[\s,]+/).filter(Boolean).map(Number);
    const { vocabSize } = this.store.state.info;
    if (ids.every((id) => Number.isInteger(id) && id >= 0 && id < vocabSize)) return ids;
    throw new Error(`The model has no tokenizer: write token ids, numbers from 0 to ${vocabSize - 1}.`);
  }

  /** Read the tokens of alternatives that a view shows; draw again if there are new ones. */
  async describe(ids) {
    const missing = ids.filter((id) => !this.tokens.has(id));
    if (missing.length === 0) return;
    try {
      await this._describe(missing);
      this.store.set({});
    } catch (error) {
      this.onError(error);
    }
  }

  async _write(maxTokens, signal) {
    const { document, info, settings } = this.store.state;
    const room = info.context - document.places.length;
    if (document.places.length === 0 || document.ended) return;
    if (room <= 0) throw new Error(`The context of ${info.context} tokens is full.`);
    const options = { ...settings, maxTokens: Math.min(maxTokens, room), top: this.top, signal };
    for await (const { end, ...place } of this.engine.generate({ ids: this.ids, ...options })) {
      await this._describe([place.id]);
      await this._describeTop(place.top);
      if (signal.aborted) break;
      const { document: now, selected } = this.store.state;
      const places = [...now.places, place];
      const follows = selected >= now.places.length;
      this.store.set({
        document: { ...now, places, next: null, ended: end },
        selected: follows ? places.length : selected,
      });
    }
    await this._readNext(signal);
  }

  /** Read the distribution after the text: that of one more token, which is dropped. */
  async _readNext(signal) {
    const { document, info, settings } = this.store.state;
    const full = document.places.length >= info.context;
    if (signal.aborted || document.ended || full || document.places.length === 0) return;
    const options = { ...settings, temperature: 0, maxTokens: 1, top: this.top, signal };
    for await (const { top } of this.engine.generate({ ids: this.ids, ...options })) {
      await this._describeTop(top);
      if (!signal.aborted) this.store.set({ document: { ...this.store.state.document, next: top } });
    }
  }

  async _run(busy, work) {
    this.stop();
    const controller = new AbortController();
    this.running = controller;
    this.store.set({ busy });
    try {
      await work(controller.signal);
    } catch (error) {
      if (!controller.signal.aborted) this.onError(error);
    } finally {
      if (this.running === controller) {
        this.running = null;
        this.store.set({ busy: "" });
      }
    }
  }

  /** Show a text, with the token after it selected, or its end token. */
  _show(document) {
    this.store.set({ document, selected: document.places.length - (document.ended ? 1 : 0) });
  }

  /** Add the text to the versions, after the current one. */
  _keep() {
    const { document } = this.store.state;
    const current = this.versions[this.version];
    if (document.places.length === 0 || current === document) return;
    const same = current && sameIds(current.places, document.places);
    if (!same) this.version += 1;
    this.versions.splice(this.version, same ? 1 : Infinity, document);
    this.store.set({});
  }

  _go(version) {
    this.stop();
    this.version = version;
    const document = this.versions[version];
    this._show(document);
    this._finish();
  }

  /** Keep a text that was written; if the reader stopped it, read what comes next. */
  async _finish() {
    this._keep();
    if (this.running || this.store.state.document.next !== null) return;
    await this._run("reading", (signal) => this._readNext(signal));
    this._keep();
  }

  async _describe(ids) {
    for (const [id, token] of await this.engine.describe(ids)) this.tokens.set(id, token);
  }

  async _describeTop(top) {
    await this._describe(top.slice(0, 10).map(([id]) => id));
  }
}

function sameIds(a, b) {
  return a.length === b.length && a.every(({ id }, i) => id === b[i].id);
}
