/**
 * Byte-level BPE of a tokenizer.json, as gptx gives it: special tokens are plain text.
 *
 * The letters and numbers that split a text are those of the Unicode version of this JavaScript,
 * which can know scripts that are newer than the `tokenizers` library.
 */

const SPLIT = new RegExp(
  [
    "'(?:[sdmt]|ll|ve|re)",
    " ?\\p{L}+",
    " ?\\p{N}+",
    " ?[^\\p{White_Space}\\p{L}\\p{N}]+",
    "\\p{White_Space}+(?!\\P{White_Space})", // leaves the last space to the word after it
    "\\p{White_Space}+",
  ].join("|"),
  "gu",
);
const MAX_KNOWN_PIECES = 2 ** 14; // pieces of text whose ids are kept

/** Return the letter of each byte in the files, in the order of the bytes. */
function lettersOfBytes() {
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => {
    const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    return String.fromCodePoint(printable ? byte : next++);
  });
}

const LETTERS = lettersOfBytes();
const BYTES = new Map(LETTERS.map((letter, byte) => [letter, byte]));

export class Tokenizer {
  /** @param {object} definition A tokenizer.json. */
  constructor({ model, added_tokens: added }) {
    this.ids = new Map(Object.entries(model.vocab));
    this.ranks = new Map(model.merges.map((pair, rank) => [pairOf(pair), rank]));
    this.encoder = new TextEncoder();
    this.known = new Map(); // piece -> ids
    this.bytes = []; // id -> bytes of the token
    for (const [token, id] of this.ids) this.bytes[id] = bytesOf(token);
    for (const { id, content } of added) this.bytes[id] = this.encoder.encode(content);
  }

  /** Return the token ids of a text. */
  encode(text) {
    if (!text.isWellFormed()) throw new RangeError("The text has a half of a surrogate pair.");
    return (text.match(SPLIT) ?? []).flatMap((piece) => this.encodePiece(piece));
  }

  /** Return the bytes of token ids, joined; an unknown id has none. */
  join(ids) {
    return Uint8Array.from(ids.flatMap((id) => [...(this.bytes[id] ?? [])]));
  }

  /** Return the text of token ids; U+FFFD in the place of incomplete characters. */
  decode(ids) {
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(this.join(ids));
  }

  encodePiece(piece) {
    let ids = this.known.get(piece);
    if (ids === undefined) {
      const letters = Array.from(this.encoder.encode(piece), (byte) => LETTERS[byte]);
      ids = this.merge(letters).map((token) => this.ids.get(token));
      if (this.known.size === MAX_KNOWN_PIECES) this.known.clear();
      this.known.set(piece, ids);
    }
    return ids;
  }

  /** Merge tokens until no pair has a rank: the pair of the lowest rank first, from the left. */
  merge(tokens) {
    while (tokens.length > 1) {
      let best = Infinity;
      for (let i = 1; i < tokens.length; i++)
        best = Math.min(best, this.ranks.get(pairOf([tokens[i - 1], tokens[i]])) ?? Infinity);
      if (best === Infinity) break;
      const merged = [];
      for (const token of tokens) {
        const last = merged.at(-1);
        if (last !== undefined && this.ranks.get(pairOf([last, token])) === best)
          merged[merged.length - 1] = last + token;
        else merged.push(token);
      }
      tokens = merged;
    }
    return tokens;
  }
}

/** Return the key of a pair of tokens, which contain no space; the files have both forms. */
function pairOf(pair) {
  return typeof pair === "string" ? pair : `${pair[0]} ${pair[1]}`;
}

/** Return the bytes of a token in the letters of the files. */
function bytesOf(token) {
  const bytes = Array.from(token, (letter) => BYTES.get(letter));
  return bytes.includes(undefined) ? new TextEncoder().encode(token) : Uint8Array.from(bytes);
}
