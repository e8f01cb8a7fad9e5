/** Files in pieces that are named after their SHA-256: fetched once, and kept by the browser. */

const CACHE = "gptx-pieces";
const RETRIES = 4;
const RETRY_MS = 500; // before the first repetition; each later one waits twice as long

/** @typedef {{name: string, bytes: number}} Piece */

export class Downloads {
  /**
   * @param {URL} base Folder of the pieces.
   * @param {(bytes: number) => void} onBytes Called with the number of bytes that have come.
   */
  constructor(base, onBytes) {
    this.base = base;
    this.onBytes = onBytes;
  }

  /** Return the content of a file. A call after a failure fetches its missing pieces only. */
  async read(pieces) {
    const content = new Uint8Array(pieces.reduce((sum, { bytes }) => sum + bytes, 0));
    let begin = 0;
    for (const piece of pieces) {
      await this.readPiece(piece, content.subarray(begin, begin + piece.bytes));
      begin += piece.bytes;
    }
    return content;
  }

  /** Drop the pieces of this folder that no file has. */
  async forgetOthers(files) {
    const cache = await openCache();
    const known = new Set(files.flat().map(({ name }) => this.urlOf(name)));
    for (const { url } of (await cache?.keys()) ?? [])
      if (url.startsWith(this.base.href) && !known.has(url)) await cache.delete(url);
  }

  urlOf(name) {
    return new URL(name, this.base).href;
  }

  async readPiece(piece, target) {
    const url = this.urlOf(piece.name);
    const cache = await openCache();
    const kept = await cache?.match(url);
    if (kept) {
      const content = new Uint8Array(await kept.arrayBuffer());
      if (content.length === piece.bytes) {
        target.set(content);
        this.onBytes(piece.bytes);
        return;
      }
    }
    for (let retry = 0; ; retry++) {
      try {
        await this.fetchPiece(url, piece, target);
        break;
      } catch (error) {
        if (retry === RETRIES) throw error;
        await new Promise((resolve) => setTimeout(resolve, RETRY_MS * 2 ** retry));
      }
    }
    // Without room for it, the page works, and fetches the piece again the next time.
    await cache?.put(url, new Response(target)).catch(() => {});
  }

  async fetchPiece(url, piece, target) {
    const response = await fetch(url);
    if (!response.ok) throw new Error(`${url}: status ${response.status}`);
    let length = 0;
    try {
      for (const reader = response.body.getReader(); ; ) {
        const { done, value } = await reader.read();
        if (done) break;
        if (length + value.length > piece.bytes) throw new Error(`${url} is too long`);
        target.set(value, length);
        length += value.length;
        this.onBytes(value.length);
      }
      if (length < piece.bytes) throw new Error(`${url} is incomplete`);
      if (!(await isIntact(piece.name, target))) throw new Error(`${url} is damaged`);
    } catch (error) {
      this.onBytes(-length);
      throw error;
    }
  }
}

/** Return the cache of the browser; undefined where a page has none, as over plain HTTP. */
async function openCache() {
  return globalThis.caches?.open(CACHE).catch(() => undefined);
}

/** Test that a name begins the SHA-256 of a content; true where a page cannot compute it. */
async function isIntact(name, content) {
  if (!globalThis.crypto?.subtle) return true;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  const digits = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return digits.startsWith(name.replace(/\.bin$/, ""));
}
