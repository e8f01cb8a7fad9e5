"""A model of text: Transformer and tokenizer; generate, stream, score."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self, Unpack, overload

import numpy as np

from gptx.backends import Backend
from gptx.config import GPT2Config
from gptx.errors import DataError, Interrupted, ParameterError, PromptError, argument, shown
from gptx.generation.checks import check_bool, check_count, is_int
from gptx.generation.engine import TokenGenerator
from gptx.generation.model_info import ModelInfo
from gptx.generation.options import (
    BATCH_SIZE,
    CheckedOptions,
    OneOptions,
    Options,
    check_options,
)
from gptx.generation.prompts import (
    Prompt,
    check_ids,
    check_not_empty,
    list_of_ids,
    single_prompt,
    split_prompts,
)
from gptx.generation.request import Request, check_top, encode_prompt, split_choices
from gptx.generation.results import Chunk, Result, Score, texts_of
from gptx.generation.scoring import MAX_BATCH_LOGITS, score_choices, score_texts
from gptx.generation.sequences import streams_of
from gptx.generation.streaming import Continuation
from gptx.kv_cache import KVCache
from gptx.logits import all_logits, next_token_logits
from gptx.model import Transformer
from gptx.model_files import ModelFiles
from gptx.tokenization.protocol import StreamingTokenizer
from gptx.weights import array_bytes

if TYPE_CHECKING:  # a model without hooks does not import them
    from gptx.hooks import Hook

Chunks = Generator[Chunk, None, None]


class Model:
    """A GPT-2 with its tokenizer, on one backend; `gptx.load` returns one.

    A `with` statement releases the weights at its end, as `close` does:

        with gptx.load("gpt2") as model:
            print(model.generate("To be"))

    Attributes
    ----------
    info
        Files and tokenizer.
    fingerprint
        Checksum of a sample of the weights; a saved cache holds that of its model.
    notes
        Assumptions about the files and differences between them, one sentence each; `gptx.load`
        warns of them.
    """

    def __init__(
        self,
        gpt2: Transformer,
        info: ModelInfo,
        fingerprint: str,
        notes: tuple[str, ...] = (),
    ) -> None:
        self._gpt2: Transformer | None = gpt2
        self._config, self._backend = gpt2.config, gpt2.backend
        self.info = info
        self.fingerprint = fingerprint
        self.notes = notes

    def __repr__(self) -> str:
        if self._gpt2 is None:
            return f"<gptx.Model {self.name}, closed>"
        config, backend = self.config, self.backend
        kind = f" as {config.quantization}" if config.quantization else ""
        return (
            f"<gptx.Model {self.name}: {config.n_parameters / 1e6:,.1f}M parameters{kind} in "
            f"{self.n_bytes / 1e6:,.1f} MB, context {config.n_positions}, "
            f"{backend.name} {backend.dtype}>"
        )

    def __enter__(self) -> Self:
        _ = self.gpt2  # raises the error of a closed model
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the weights. The model cannot compute after that; its tokenizer stays."""
        self._gpt2 = None

    @property
    def gpt2(self) -> Transformer:
        """Config, weights and backend, for `gptx.model.forward`.

        Raises
        ------
        ParameterError
            The model is closed.
        """
        if self._gpt2 is None:
            raise ParameterError(f"the model {self.name} is closed: load it again")
        return self._gpt2

    @property
    def n_bytes(self) -> int:
        """Size of the weights on the backend, in bytes."""
        return array_bytes(self.gpt2.weights)

    @property
    def name(self) -> str:
        """Embedded name, path or Hub id."""
        return self.info.name

    @property
    def files(self) -> ModelFiles:
        """Files that the model was read from."""
        return self.info.files

    @property
    def config(self) -> GPT2Config:
        """Config: sizes and settings of the model."""
        return self._config

    @property
    def backend(self) -> Backend:
        """Backend that holds the weights."""
        return self._backend

    @property
    def tokenizer(self) -> StreamingTokenizer:
        """Tokenizer of the model.

        Raises
        ------
        TokenizerError
            The model has none.
        """
        return self.info.tokenizer

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Return the token ids of a text; `<|endoftext|>` is plain text unless allowed."""
        check_bool("allow_special", allow_special)
        if not isinstance(text, str):
            raise PromptError(f"the text is {repr(text)[:60]}, expected a string")
        return self.tokenizer.encode(text, allow_special=allow_special)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; an id outside the vocabulary has no text."""
        return self.tokenizer.decode(list_of_ids(ids))

    @overload
    def generate(self, prompt: str | list[int], **options: Unpack[OneOptions]) -> Result: ...
    @overload
    def generate(
        self, prompt: list[str] | list[list[int]], **options: Unpack[Options]
    ) -> list[Result]: ...
    @overload
    def generate(
        self, prompt: str | list[int], *, n: int, **options: Unpack[OneOptions]
    ) -> list[Result]: ...
    def generate(
        self, prompt: Prompt | Sequence[Prompt], **options: Unpack[Options]
    ) -> Result | list[Result]:
        """Continue a prompt, or each of several.

        Parameters
        ----------
        prompt
            A text or a list of token ids; or a list of those.
        **options
            See `Options`.

        Returns
        -------
        Result or list of Result
            A result for a single prompt, a list for a list of prompts. With `n`, a list of n
            results for each prompt, in order.

        Raises
        ------
        Interrupted
            Ctrl-C; its `results` hold the output so far.
        PromptError, ParameterError, TokenizerError, NonFiniteError, DeviceOutOfMemory
        NotFoundError, ConfigError
            `generation_config` is True, and the model has no such file or an invalid one.
        """
        prompts, single = split_prompts(prompt)
        return generate_request(self, Request(prompts, check_options(options)), single=single)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Chunks:
        """Continue one prompt; yield a `Chunk` for each token, the last with the `result`.

        With `n`, the chunks of the copies alternate, and `Chunk.sequence` tells them apart.

        Raises the errors of `generate`: those of the arguments at the call, others while it is
        iterated over. `best_of` above `n` is an error: the best ones are known at the end. After
        the first chunk, `chunks.throw(KeyboardInterrupt())` raises an `Interrupted` with the output
        so far.
        """
        checked = check_streamed(check_options(options))
        return stream_request(self, Request([single_prompt(prompt, "stream")], checked))

    def prefill(self, prompt: Prompt, *, allow_special: bool = False) -> KVCache:
        """Read a prompt into a KV cache, for `generate(prompt + more, cache=...)`.

        The cache can be saved (`cache.save(path)`) and loaded on any backend (`load_cache`).
        """
        check_bool("allow_special", allow_special)
        ids = encode_prompt(self.info, single_prompt(prompt, "prefill"), allow_special)
        self._check_context(ids)
        cache = KVCache(self.config, self.backend, 1, len(ids))
        with self.backend.scope():
            # A lazy library computes on demand: reading a logit computes all keys and values.
            self.backend.to_numpy(next_token_logits(self.gpt2, [ids], cache)[:, :1])
        cache.tokens = [ids]
        cache.fingerprint = self.fingerprint
        return cache

    def load_cache(self, path: str | Path) -> KVCache:
        """Load a cache that `KVCache.save` wrote for this model on any backend.

        Raises
        ------
        NotFoundError, DataError
            The file does not exist, is damaged, or belongs to another model.
        """
        with self.backend.scope():
            cache = KVCache.load(path, self.config, self.backend)
        if cache.fingerprint != self.fingerprint:
            raise DataError(
                f"{path} belongs to other weights than those of {self.name}: "
                "give another file, or save a cache of this model"
            )
        return cache

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the logits of the token after each of n token ids, NumPy float32 [n, V].

        Logits that are not finite are returned unchanged.
        """
        checked = check_ids(ids, self.config.vocab_size)
        self._check_context(checked)
        with self.backend.scope():
            logits = all_logits(self.gpt2, checked)
            return self.backend.to_numpy(logits).astype(np.float32, copy=False)

    @property
    def hook_names(self) -> list[str]:
        """Names of all activations, see `gptx.hooks`, in order of computation."""
        from gptx.hooks import all_names

        return all_names(self.gpt2)

    def hooks(self, functions: Mapping[str, Hook]) -> AbstractContextManager[Self]:
        """Return a context manager; within it, the model calls functions with its activations.

            with model.hooks({"h.3.mlp.act": read, "h.*.resid_post": replace}):
                model.generate("To be")

        Parameters
        ----------
        functions
            Name or pattern -> function of an array, or of an array and its `gptx.hooks.Site`. It
            returns None to read, or an array of the same shape and dtype to replace. It never
            changes the array in place. `gptx.hooks` has all names and shapes.

        Notes
        -----
        Functions are called in every forward pass: `generate`, `stream`, `logits`, `score` and
        `prefill`, for prompts and for each decode step, and also in other threads that share this
        model. Positions that a KV cache has are not computed again. A stream that begins within the
        context keeps its hooks. Nested contexts add hooks; those outside are called first.

        Raises
        ------
        ParameterError
            A name is unknown, or a value is no such function. In a forward pass: a function
            returned an array of another shape, dtype or library.
        NonFiniteError
            In a forward pass: a function returned a NaN or an infinity.
        """
        from gptx.hooks import with_hooks

        return self._hooked(with_hooks(self.gpt2, functions))

    @contextmanager
    def _hooked(self, hooked: Transformer) -> Iterator[Self]:
        before, self._gpt2 = self.gpt2, hooked
        try:
            yield self
        finally:
            if self._gpt2 is not None:  # else it was closed
                self._gpt2 = before

    @overload
    def score(
        self,
        text: str | list[int],
        *,
        stride: int | None = None,
        allow_special: bool = False,
        top_logprobs: int = 0,
        batch_size: int = BATCH_SIZE,
    ) -> Score: ...
    @overload
    def score(
        self,
        text: list[str] | list[list[int]],
        *,
        stride: int | None = None,
        allow_special: bool = False,
        top_logprobs: int = 0,
        batch_size: int = BATCH_SIZE,
    ) -> list[Score]: ...
    def score(
        self,
        text: Prompt | Sequence[Prompt],
        *,
        stride: int | None = None,
        allow_special: bool = False,
        top_logprobs: int = 0,
        batch_size: int = BATCH_SIZE,
    ) -> Score | list[Score]:
        """Return the log-probability of each token of a text, or of token ids; or of several.

        The model reads a text longer than the context in windows of one context. Each window starts
        `stride` tokens after the one before; the default is one context, so that windows do not
        overlap. Every token but the first is scored once: in the first window with all tokens
        before it, or with a full context of them.

        Parameters
        ----------
        text
            A text or a list of token ids; or a list of those, which are read in batches.
        stride
            Tokens from the start of a window to the start of the next one, 1 to the context.
        allow_special
            Read `<|endoftext|>` in a text as that token.
        top_logprobs
            N: return the N most probable tokens in the place of each token, too.
        batch_size
            Number of windows in a batch.

        Raises
        ------
        PromptError, ParameterError, TokenizerError, NonFiniteError, DeviceOutOfMemory
        """
        check_bool("allow_special", allow_special)
        texts, single = split_prompts(text)
        check_not_empty(texts)
        ids = [encode_prompt(self.info, one, allow_special) for one in texts]
        n_positions = self.config.n_positions
        stride = n_positions if stride is None else stride
        if not is_int(stride) or not 1 <= stride <= n_positions:
            raise ParameterError(
                f"{argument('stride')} is {stride!r}, expected 1 to {n_positions} (the context)"
            )
        if min(map(len, ids)) < 2:
            raise PromptError(
                "the text has 1 token, expected at least 2: give a longer text, or start it with "
                f"'<|endoftext|>' and {argument('allow_special', True)}"
            )
        batch_size = check_count("batch_size", batch_size)
        self._check_top_logprobs(top_logprobs)
        with self.backend.scope():
            scores = score_texts(self.gpt2, ids, stride, top_logprobs, batch_size)
        scores = self._with_texts(scores)
        return scores[0] if single else scores

    def score_choices(
        self,
        context: Prompt,
        choices: Sequence[Prompt],
        *,
        allow_special: bool = False,
        top_logprobs: int = 0,
        batch_size: int = BATCH_SIZE,
    ) -> list[Score]:
        """Return the log-probabilities of each of several continuations of a context.

        The context is computed once. Texts are encoded together with the context: all choices are
        scored from the first token in which one of these texts differs from the context. So a token
        that joins the end of the context and the start of a choice belongs to the choice.

        Parameters
        ----------
        context, choices
            Texts; or lists of token ids, which are scored as they are.
        allow_special, top_logprobs, batch_size
            As in `score`; a batch has `batch_size` choices.

        Returns
        -------
        list of Score
            For each choice. `max(scores, key=lambda score: score.total)` has the most probable one,
            `min(scores, key=lambda score: score.loss)` the most probable one per token.

        Raises
        ------
        PromptError, ParameterError, TokenizerError, NonFiniteError, DeviceOutOfMemory
        """
        check_bool("allow_special", allow_special)
        context = single_prompt(context, "score_choices")
        if isinstance(choices, str) or not isinstance(choices, Sequence):
            raise PromptError(f"choices are {shown(choices)}, expected a list of texts")
        batch_size = check_count("batch_size", batch_size)
        self._check_top_logprobs(top_logprobs)
        shared, rest = split_choices(self.info, context, list(choices), allow_special)
        # The last token of a choice is no input.
        longest = max(len(ids) for ids in rest)
        if len(shared) + longest - 1 > self.config.n_positions:
            raise PromptError(
                f"context and choice have {len(shared) + longest} tokens, expected at most "
                f"{self.config.n_positions + 1}: shorten them"
            )
        with self.backend.scope():
            scores = score_choices(self.gpt2, shared, rest, top_logprobs, batch_size)
        return self._with_texts(scores)

    def _with_texts(self, scores: list[Score]) -> list[Score]:
        if not self.info.has_tokenizer:
            return scores
        return [
            replace(score, texts=texts_of(self.tokenizer, score.tokens, score.top_logprobs))
            for score in scores
        ]

    def _check_top_logprobs(self, n: int) -> None:
        check_count("top_logprobs", n, least=0)
        check_top("top_logprobs", n, self.config.vocab_size)

    def _check_context(self, ids: list[int]) -> None:
        if len(ids) > self.config.n_positions:
            raise PromptError(
                f"{len(ids)} tokens were given, the context holds {self.config.n_positions}: "
                "give fewer"
            )


def check_streamed(options: CheckedOptions) -> CheckedOptions:
    """Return the options of `stream`; raise ParameterError if some continuations are dropped."""
    if options.selects:
        raise ParameterError(
            f"{argument('best_of')} is {options.best_of}, above {argument('n')}: the best ones are "
            "known at the end, call generate in place of stream"
        )
    return options


def generate_request(model: Model, request: Request, *, single: bool) -> Result | list[Result]:
    """Continue the prompts of a request; see `Model.generate`."""
    results: dict[int, Result] = {}
    chunks = stream_request(model, request)
    options = request.options  # checked by now
    try:
        for chunk in chunks:
            if chunk.result is not None:
                results[chunk.sequence] = chunk.result
    except Interrupted as interrupt:
        raise Interrupted(_best(interrupt.results, options)) from None
    except KeyboardInterrupt as error:  # raised here, between two chunks
        try:
            chunks.throw(error)
        except Interrupted as interrupt:
            raise Interrupted(_best(interrupt.results, options)) from None
    best = _best([results[i] for i in range(len(results))], options)
    return best[0] if single and options.n is None else best


def _best(results: list[Result], options: CheckedOptions) -> list[Result]:
    """Return the n best of the results of each prompt, by mean log-probability, best first."""
    if not options.selects:
        return results
    best = []
    for first in range(0, len(results), options.best_of):
        made = results[first : first + options.best_of]
        made = sorted(made, key=lambda result: result.mean_logprob, reverse=True)
        best += made[: options.n or 1]
    if options.logprobs:
        return best
    return [replace(result, logprobs=None) for result in best]


def stream_request(
    model: Model, request: Request, keep_cache: Callable[[KVCache], None] | None = None
) -> Chunks:
    """Check a request, and return the chunks of all its continuations, batch by batch.

    At the end, also after an interrupt, `keep_cache` gets a KV cache of a single prompt and its
    output, unless the model has read none of them.
    """
    if request.options.cache is not None:
        _check_cache(model, request.options.cache, request.prompts)
    ids = request.check(model.info)
    prompts, options = request.prompts, request.options
    tokenizer = model.tokenizer if model.info.has_tokenizer else None
    copies = options.best_of
    runs: list[TokenGenerator] = []
    outputs: list[Continuation] = []
    streams = streams_of([one for one in ids for _ in range(copies)])
    step = max(1, options.batch_size // copies)  # prompts of a batch
    if options.prompt_logprobs is not None:  # which need the logits of all tokens
        n_logits = model.config.vocab_size * min(max(map(len, ids)), model.config.n_positions)
        step = max(1, min(step, MAX_BATCH_LOGITS // n_logits))
    for first in range(0, len(ids), step):
        batch = slice(first, first + step)
        run = TokenGenerator(
            model.gpt2,
            ids[batch],
            request.params,
            copies=copies,
            streams=streams[first * copies : (first + step) * copies],
            max_tokens=options.max_tokens,
            eos_ids=model.info.end_ids(
                ignore_eos=options.ignore_eos, stop_token_ids=options.stop_token_ids
            ),
            overflow=options.overflow,
            logprobs=options.logprobs or options.selects,
            top_logprobs=options.top_logprobs,
            prompt_logprobs=options.prompt_logprobs,
            cache=options.cache,
        )
        runs.append(run)
        given = [prompt for prompt in prompts[batch] for _ in range(copies)]
        outputs += [
            Continuation(
                first * copies + sequence.index,
                prompt,
                sequence,
                tokenizer,
                options.stop,
                model.backend,
            )
            for prompt, sequence in zip(given, run.sequences, strict=True)
        ]
    chunks = _chunks(runs, outputs)
    return chunks if keep_cache is None else _keeping_cache(model, chunks, runs[0], keep_cache)


def _keeping_cache(
    model: Model, chunks: Chunks, run: TokenGenerator, keep: Callable[[KVCache], None]
) -> Chunks:
    interrupt = None
    try:
        yield from chunks
    except Interrupted as error:
        interrupt = error
    cache = run.cache()
    if cache is not None:
        cache.fingerprint = model.fingerprint
        keep(cache)
    if interrupt is not None:
        raise interrupt


def _chunks(runs: list[TokenGenerator], outputs: list[Continuation]) -> Chunks:
    first = 0
    try:
        for run in runs:
            for step in run:
                for token in step:
                    chunk = outputs[first + token.sequence].add(token)
                    if chunk.finish_reason is not None:
                        run.finish(token.sequence)
                    yield chunk
            first += len(run.sequences)
    except KeyboardInterrupt:
        raise Interrupted([output.result("interrupted") for output in outputs]) from None


def _check_cache(model: Model, cache: KVCache, prompts: list[Prompt]) -> None:
    if len(prompts) > 1 or len(cache.lengths) > 1:
        raise ParameterError(
            f"prompts: {len(prompts)}, sequences of the cache: {len(cache.lengths)}, expected one "
            f"prompt and one sequence: omit {argument('cache')}"
        )
    if cache.fingerprint != model.fingerprint:
        raise ParameterError("the cache belongs to another model: prefill one with this model")
    if (cache.config, cache.backend) != (model.config, model.backend):
        raise ParameterError(
            "the cache belongs to another model or backend: save it, and load it for this one"
        )
