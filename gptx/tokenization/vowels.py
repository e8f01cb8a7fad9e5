"""gpt-burn's simple vowel rule: pieces of a text that resemble syllables.

A piece ends before and after white space and ASCII punctuation, and before a vowel if it has more
than 3 bytes in UTF-8 (https://github.com/felix-andreas/gpt-burn, src/tokenizer.rs). Here a
piece without a token falls apart into its characters, and no character of a text is lost.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from gptx.errors import ParameterError, argument
from gptx.tokenization.byte_level import END_OF_TEXT
from gptx.tokenization.pipeline import PipelineTokenizer

UNKNOWN = "<?>"  # gpt-burn's last token; no piece of a text has its three characters
VOWELS = "aeiouäöü"

# Contents of character classes, the same in Python's `re` and in the `tokenizers` library. White
# space is that of Unicode; in Python, \s has the separators U+001C to U+001F too.
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_BREAK = _SPACE + r"!-/:-@\[-`{-~"
_1, _2, _3, _4 = r"\0-\x7f", "\x80-\u07ff", "\u0800-\uffff", "\U00010000-\U0010ffff"


def _pattern() -> str:
    """Return a regular expression that matches each piece of a text."""
    letter, consonants = f"[^{_BREAK}]", f"[^{_BREAK}{VOWELS}]*"
    a, b, c = (f"[^{_BREAK}{others}]" for others in (_2 + _3 + _4, _1 + _3 + _4, _1 + _2 + _4))
    # The most letters that have at most 3 bytes; after them comes a letter of any kind.
    first = f"(?:{a}{a}{a}|{a}{b}|{b}{a}|{a}{a}?|{b}|{c})"
    return f"[{_BREAK}]|(?:{first}{letter}?|[{_4}]){consonants}"


PATTERN = _pattern()
_PIECE = re.compile(PATTERN)


def count_vowel_pieces(text: str) -> Counter[str]:
    """Count the pieces of a text.

    The counts of the parts of a text add up to those of the text. For that, each part but the first
    begins with white space or punctuation.
    """
    return Counter(_PIECE.findall(text))


def vowel_tokenizer(
    pieces: Mapping[str, int],
    characters: Iterable[str],
    vocab_size: int,
    *,
    end_of_text: bool = False,
) -> PipelineTokenizer:
    """Make a tokenizer of the most frequent pieces of a text and of its characters.

    The ids are those of gpt-burn for the same pieces: the pieces, sorted; `<?>`, which no text
    gets; then the characters that are no pieces, sorted. A character without a token is a
    PromptError.

    Parameters
    ----------
    pieces
        Piece -> number of its occurrences, see `count_vowel_pieces`.
    characters
        Characters of the text.
    vocab_size
        Most tokens that the vocabulary has.
    end_of_text
        Also add `<|endoftext|>`, as the last token.

    Raises
    ------
    ParameterError
        The vocabulary is too small for the characters.
    """
    alphabet = {*characters, *(piece for piece in pieces if len(piece) == 1)}
    n_longer = vocab_size - len(alphabet) - 1 - end_of_text
    if n_longer < 0:
        raise ParameterError(
            f"{argument('vocab_size')} is {vocab_size}, expected at least "
            f"{vocab_size - n_longer}: the text has {len(alphabet)} characters"
        )
    frequent: list[str] = []
    for piece in sorted(pieces, key=lambda piece: (-pieces[piece], piece)):
        if len(piece) > 1:
            if n_longer == 0:
                break
            n_longer -= 1
        frequent.append(piece)
    rest = sorted(alphabet.difference(frequent))
    return PipelineTokenizer.of_pieces(
        [*sorted(frequent), UNKNOWN, *rest],
        split=PATTERN,
        special=[END_OF_TEXT] if end_of_text else [],
    )
