/** Tokens as the page writes them: marks for what has no glyph, bytes for parts of characters. */

const LINE_END = "↵";
const UTF8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** Return a text with a mark in the place of each control character; `space` is that of a space. */
export function visible(text, space = " ") {
  return Array.from(text, (x) => {
    if (x === "\n") return LINE_END;
    if (x === " ") return space;
    const code = x.codePointAt(0);
    if (code < 32) return String.fromCodePoint(0x2400 + code);
    return code === 127 ? "␡" : x;
  }).join("");
}

/** Return bytes in hexadecimal digits, such as "e2 82". */
export function hex(bytes) {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join(" ");
}

/** Return bytes of hexadecimal digits, such as "e282". */
export function bytesOf(digits) {
  return Uint8Array.from(digits.match(/../g) ?? [], (pair) => Number.parseInt(pair, 16));
}

/** Return the text of bytes, or null if they are no complete characters. */
export function decoded(bytes) {
  try {
    return UTF8.decode(bytes);
  } catch {
    return null;
  }
}

/** Test for a token that is a part of a character. */
export function isFragment(token) {
  return token.bytes !== null && decoded(token.bytes) === null;
}

/** Return a token in one line, for a list or a table: spaces as "␣", parts of characters as bytes. */
export function label(token) {
  if (isFragment(token)) return `‹${hex(token.bytes)}›`;
  return visible(token.text, "␣") || "∅";
}

/**
 * Return the text to show for each token of a text.
 *
 * The last token of a character that several tokens share shows the character; those before it show
 * their bytes. So the pieces can be read as a text.
 *
 * @param {Token[]} tokens
 * @returns {{text: string, fragment: boolean}[]}
 */
export function piecesOf(tokens) {
  const pieces = tokens.map((token) => ({ text: token.text, fragment: false }));
  for (let first = 0; first < tokens.length; first++) {
    if (!isFragment(tokens[first])) continue;
    const last = endOfCharacter(tokens, first);
    for (let i = first; i < last; i++) pieces[i] = bytesPiece(tokens[i]);
    const text = decoded(joined(tokens.slice(first, last + 1)));
    pieces[last] = text === null ? bytesPiece(tokens[last]) : { text, fragment: false };
    first = last;
  }
  return pieces;
}

function bytesPiece(token) {
  return { text: `‹${hex(token.bytes)}›`, fragment: true };
}

/** Return the index of the token that completes the characters that begin at `first`. */
function endOfCharacter(tokens, first) {
  for (let last = first + 1; last < Math.min(first + 4, tokens.length); last++) {
    if (tokens[last].bytes === null) break;
    if (decoded(joined(tokens.slice(first, last + 1))) !== null) return last;
  }
  return first;
}

function joined(tokens) {
  return Uint8Array.from(tokens.flatMap((token) => [...token.bytes]));
}
