"""`SamplingParams`: the parameters of the sampler, and their checks."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gptx.errors import ParameterError, argument, shown
from gptx.generation.checks import check_count, is_int, is_real

MAX_PARAMETER = 1e6  # a larger parameter can make a float32 logit overflow
# Smallest and largest value of each parameter.
RANGES = {
    "temperature": (0, MAX_PARAMETER),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "repetition_penalty": (1 / MAX_PARAMETER, MAX_PARAMETER),
    "presence_penalty": (-MAX_PARAMETER, MAX_PARAMETER),
    "frequency_penalty": (-MAX_PARAMETER, MAX_PARAMETER),
    "dry_multiplier": (0, MAX_PARAMETER),
    "dry_base": (1, MAX_PARAMETER),
}
# Smallest value of each count.
COUNTS = {
    "no_repeat_ngram_size": 0,
    "dry_allowed_length": 1,
    "dry_range": 0,
    "min_tokens": 0,
}
# llama.cpp's strings that end a repetition.
DRY_BREAKERS = ("\n", ":", '"', "*")

Tokens = str | Sequence[int]  # text, or token ids
LogitsProcessor = Callable[[list[int], Any], Any]


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of sampling. The defaults are greedy, with every other step off.

    `gptx.generation.sampling` has the order of the steps, and their sources.

    Attributes
    ----------
    temperature
        Divisor of the logits, at least 0; 0 takes the token with the largest logit.
    top_k
        Number of most probable tokens to keep; those as probable as the last one are kept too. 0,
        or a number above the vocabulary, keeps all.
    top_p
        Sum of probabilities, 0 to 1: the fewest most probable tokens that reach it are kept. 1
        keeps all, 0 the most probable one.
    min_p
        Least probability of a token to keep, as a factor of the largest probability, 0 to 1; 0
        keeps all.
    typical_p
        Sum of probabilities, 0 to 1: the fewest most typical tokens that reach it are kept. The
        -log(probability) of a typical token is close to the entropy. 1 keeps all, 0 the most
        typical one.
    repetition_penalty
        Divisor of the positive logits, and factor of the negative ones, of tokens in the prompt or
        the output; above 0, 1 is off (https://arxiv.org/abs/1909.05858).
    presence_penalty, frequency_penalty
        Numbers to subtract from the logits of tokens in the output: the first once, the second for
        each occurrence; 0 is off.
    logit_bias
        Token id -> number to add to its logit; -inf bans the token.
    seed
        Whole number, 0 to 2^64 - 1; None takes a random one below 2^53.
    sequence_bias
        Text or tuple of token ids -> number to add to the logit of its last token, where the tokens
        before it are the newest ones; -inf bans the sequence.
    ban
        Texts, or lists of token ids, that are never completed. A text is encoded as it is, and with
        a space before it; it can still appear as other tokens, such as parts of longer words.
    no_repeat_ngram_size
        n: no n-gram of prompt and output appears twice; 0 is off.
    dry_multiplier
        Factor of the DRY penalty, which grows with the length of a repetition; 0 is off.
    dry_base
        Factor by which each more token of a repetition increases the penalty, at least 1.
    dry_allowed_length
        Length in tokens from which a repetition has a penalty, at least 1.
    dry_range
        Number of newest tokens in which DRY looks for repetitions; 0 takes all.
    dry_sequence_breakers
        Texts and token ids: a repetition ends at a token that is one of them or has one in its
        text. None takes those of `DRY_BREAKERS` if there is a tokenizer.
    min_tokens
        Number of new tokens before which a token that ends the sequence is banned; 0 is off.
    logits_processor
        Function of the token ids of one sequence, prompt and output, and its logits [V] after the
        steps before; it returns logits [V]. The array is that of the backend, on its device, and
        the function's own: it may write to it.

    Raises
    ------
    ParameterError
        A parameter is outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    typical_p: float = 1.0
    sequence_bias: dict[Any, float] = field(default_factory=dict)
    ban: tuple[Any, ...] = ()
    no_repeat_ngram_size: int = 0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_range: int = 0
    dry_sequence_breakers: tuple[Any, ...] | None = None
    min_tokens: int = 0
    logits_processor: LogitsProcessor | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not is_real(value) or not low <= value <= high:
                raise ParameterError(
                    f"{argument(name)} is {shown(value)}, "
                    f"expected a number from {low:g} to {high:g}"
                )
            # A NumPy scalar turns float32 arrays into float64.
            self._set(name, float(value))
        if not is_int(self.top_k) or self.top_k < 0:
            raise ParameterError(
                f"{argument('top_k')} is {shown(self.top_k)}, "
                "expected a whole number of at least 0 (0 keeps all)"
            )
        if self.seed is not None and not (is_int(self.seed) and 0 <= self.seed < 2**64):
            raise ParameterError(
                f"{argument('seed')} is {shown(self.seed)}, "
                "expected a whole number from 0 to 2^64 - 1"
            )
        self._set("top_k", int(self.top_k))
        self._set("seed", None if self.seed is None else int(self.seed))
        for name, least in COUNTS.items():
            self._set(name, check_count(name, getattr(self, name), least))
        self._set("logit_bias", _checked_bias("logit_bias", self.logit_bias, _checked_id))
        self._set("sequence_bias", _checked_bias("sequence_bias", self.sequence_bias, _sequence))
        self._set("ban", _checked_ban(self.ban))
        self._set("dry_sequence_breakers", _checked_breakers(self.dry_sequence_breakers))
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise ParameterError(
                f"{argument('logits_processor')} is {shown(self.logits_processor)}, expected a "
                "function f(ids, logits) that returns logits"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """True if each step takes the token with the largest logit."""
        return self.temperature == 0

    @property
    def uses_history(self) -> bool:
        """True if a step depends on the tokens so far, and the host takes part in it."""
        return bool(
            self.sequence_bias
            or self.ban
            or self.no_repeat_ngram_size
            or self.dry_multiplier
            or self.min_tokens
            or self.logits_processor
        )

    @property
    def has_texts(self) -> bool:
        """True if a text is to be encoded before the parameters are used, see `with_ids`."""
        given = (*self.sequence_bias, *self.ban, *(self.dry_sequence_breakers or ()))
        return any(isinstance(one, str) for one in given)

    def with_ids(
        self, encode: Callable[[str], list[int]], tokens_with: Callable[[str], list[int]]
    ) -> SamplingParams:
        """Return the same parameters with token ids in the place of texts.

        Parameters
        ----------
        encode
            Function that returns the token ids of a text.
        tokens_with
            Function that returns the tokens whose text contains a string.

        Raises
        ------
        ParameterError
            No token contains a breaker of DRY, or two keys of `sequence_bias` are the same tokens.
        """
        biases: dict[tuple[int, ...], float] = {}
        for key, bias in self.sequence_bias.items():
            ids = tuple(encode(key)) if isinstance(key, str) else key
            if ids in biases:
                raise ParameterError(
                    f"{argument('sequence_bias')} has {shown(key)} and other tokens of the same "
                    "ids: give them once"
                )
            biases[ids] = bias
        ban: dict[tuple[int, ...], None] = {}
        for one in self.ban:
            texts = (one, f" {one}") if isinstance(one, str) and one[0] != " " else (one,)
            for text in texts:
                ban[tuple(encode(text)) if isinstance(text, str) else text] = None
        return replace(
            self,
            sequence_bias=biases,
            ban=tuple(ban),
            dry_sequence_breakers=self._breaker_ids(tokens_with) if self.dry_multiplier else (),
        )

    def _breaker_ids(self, tokens_with: Callable[[str], list[int]]) -> tuple[int, ...]:
        ids: dict[int, None] = {}
        given = self.dry_sequence_breakers
        for breaker in DRY_BREAKERS if given is None else given:
            found = tokens_with(breaker) if isinstance(breaker, str) else [breaker]
            if not found and given is not None:
                raise ParameterError(
                    f"{argument('dry_sequence_breakers')} has {shown(breaker)}, expected a string "
                    "that is in the text of one token: give a shorter one"
                )
            ids.update(dict.fromkeys(found))
        return tuple(ids)

    def check_bias(self, vocab_size: int) -> None:
        """Raise ParameterError unless all token ids fit a vocabulary of V tokens."""
        ids = {
            "logit_bias": self.logit_bias,
            "sequence_bias": _all_ids(self.sequence_bias),
            "ban": _all_ids(self.ban),
            "dry_sequence_breakers": self.dry_sequence_breakers or (),
        }
        for name, given in ids.items():
            check_vocabulary(name, given, vocab_size)
        banned = {token for token, bias in self.logit_bias.items() if bias == -math.inf}
        if len(banned) == vocab_size:
            raise ParameterError(f"{argument('logit_bias')} bans every token: leave at least one")
        banned |= {ids[0] for ids in self.ban if len(ids) == 1}
        if len(banned) == vocab_size:
            raise ParameterError(f"{argument('ban')} bans every token: leave at least one")


def check_vocabulary(name: str, ids: Iterable[Any], vocab_size: int) -> None:
    """Raise ParameterError for the first token id of an option that is not below V."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ParameterError(
                f"{argument(name)} has token {token}, expected 0 to {vocab_size - 1}"
            )


def random_seed() -> int:
    """Return a seed of 53 random bits: readers of JSON that use floats hold it exactly."""
    return int.from_bytes(os.urandom(8), "little") >> 11


def _all_ids(sequences: Iterable[Sequence[int]]) -> list[int]:
    return [id for sequence in sequences for id in sequence]


def _checked_bias(name: str, given: Any, key_of: Callable[[Any], Any]) -> dict[Any, float]:
    """Check the keys and the numbers of a bias; None is no bias."""
    if not isinstance(given, Mapping | None):
        kind = "token id" if name == "logit_bias" else "text or tuple of token ids"
        raise ParameterError(
            f"{argument(name)} is {shown(given)}, expected a dict of {kind}: number"
        )
    checked: dict[Any, float] = {}
    for key, bias in (given or {}).items():
        found = key_of(key)
        if found is None or not is_real(bias):
            kind = "id" if name == "logit_bias" else "text or tuple of ids"
            raise ParameterError(
                f"{argument(name)} has {shown(key)}: {shown(bias)}, expected {kind}: number"
            )
        if not (abs(bias) <= MAX_PARAMETER or bias == -math.inf):
            what = "token " if name == "logit_bias" else ""
            raise ParameterError(
                f"{argument(name)} of {what}{shown(key)} is {bias}, "
                f"expected -inf, or a number from {-MAX_PARAMETER:g} to {MAX_PARAMETER:g}"
            )
        checked[found] = float(bias)
    return checked


def _checked_id(key: Any) -> Any:
    return key if is_int(key) else None


def _sequence(key: Any) -> str | tuple[int, ...] | None:
    """Return a text, or token ids as a tuple; None for another value or an empty one."""
    if isinstance(key, str):
        return key or None
    if hasattr(key, "tolist"):  # an array
        key = key.tolist()
    if not isinstance(key, Sequence) or not key or not all(map(is_int, key)):
        return None
    return tuple(int(id) for id in key)


def _checked_ban(given: Any) -> tuple[str | tuple[int, ...], ...]:
    items = _items("ban", given, "a text, or a list of texts and lists of token ids")
    for one in items:
        if _sequence(one) is None:
            raise ParameterError(
                f"{argument('ban')} has {shown(one)}, "
                "expected a text of at least one character, or a list of token ids"
            )
    return tuple(sequence for one in items if (sequence := _sequence(one)) is not None)


def _checked_breakers(given: Any) -> tuple[str | int, ...] | None:
    if given is None:
        return None
    items = _items("dry_sequence_breakers", given, "a list of texts and token ids")
    for one in items:
        if not (is_int(one) or isinstance(one, str)) or one == "":
            raise ParameterError(
                f"{argument('dry_sequence_breakers')} has {shown(one)}, "
                "expected texts of at least one character, or token ids"
            )
    return tuple(one if isinstance(one, str) else int(one) for one in items)


def _items(name: str, given: Any, expected: str) -> list[Any]:
    if isinstance(given, str):
        return [given]
    if given is not None and (
        not isinstance(given, Sequence) or isinstance(given, bytes | bytearray)
    ):
        raise ParameterError(f"{argument(name)} is {shown(given)}, expected {expected}")
    return list(given or ())
