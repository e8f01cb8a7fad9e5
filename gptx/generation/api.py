"""Text in, text out: load a model, generate, stream, score."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack, cast, overload

import numpy as np

from gptx.backends import Backend, get_backend
from gptx.config import GPT2Config
from gptx.errors import DataError, Interrupted, ParameterError, PromptError, TokenizerError
from gptx.generation.engine import MAX_TOKENS, TokenGenerator, check_ids, prefill, streams_of
from gptx.generation.options import (
    BATCH_SIZE,
    ENGINE_OPTIONS,
    AllOptions,
    LoadOptions,
    Options,
    Prompt,
    check_options,
    is_ids,
)
from gptx.generation.results import Chunk, Result, Score
from gptx.generation.sampling import is_int
from gptx.generation.scoring import all_logits, score
from gptx.generation.streaming import Output
from gptx.hub.resolve import ModelFiles, locate
from gptx.kv_cache import KVCache
from gptx.model import Transformer
from gptx.quantization import GROUP_SIZE, Quantization
from gptx.stored_weights import read_weights
from gptx.tokenization.bpe import BytePairTokenizer
from gptx.tokenization.protocol import Tokenizer
from gptx.weights import fingerprint, quantize_weights, to_backend

Chunks = Generator[Chunk, None, None]

WORTH_COMPILING = 100 * 124_000_000  # tokens times weights; with fewer, Numba's import costs more


class Model:
    """A GPT-2 with its tokenizer, on one backend; made by `load`.

    Attributes
    ----------
    gpt2
        Config, weights and backend, for `gptx.model.forward`.
    files
        Where it was read from.
    fingerprint
        A checksum of a sample of the weights, by which a saved cache knows its model.
    """

    def __init__(self, gpt2: Transformer, files: ModelFiles, fingerprint: str) -> None:
        self.gpt2 = gpt2
        self.files = files
        self.fingerprint = fingerprint

    def __repr__(self) -> str:
        return f"<gptx.Model {self.name} on {self.backend!r}>"

    @property
    def name(self) -> str:
        """Embedded name, folder or Hub id."""
        return self.files.name

    @property
    def config(self) -> GPT2Config:
        """The model's shape."""
        return self.gpt2.config

    @property
    def backend(self) -> Backend:
        """The library that computes."""
        return self.gpt2.backend

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text <-> token ids.

        Raises
        ------
        TokenizerError
            The model came without one.
        """
        if not self.files.tokenizer:
            raise TokenizerError(
                f"{self.name} has no tokenizer: give token ids instead of text, or put "
                f"tokenizer.json (or vocab.json and merges.txt) into {self.files.folder}"
            )
        return BytePairTokenizer(self.files.tokenizer)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of a text; `<|endoftext|>` in it is ordinary text unless allowed."""
        if not isinstance(text, str):
            raise PromptError(f"the text is {text!r}, expected a string")
        return self.tokenizer.encode(text, allow_special=allow_special)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; one that is not in the vocabulary has none."""
        if not isinstance(ids, Sequence | np.ndarray) or not all(map(is_int, ids)):
            raise PromptError(f"token ids are {ids!r}, expected a list of whole numbers")
        return self.tokenizer.decode([int(i) for i in ids])

    @overload
    def generate(self, prompt: str | list[int], **options: Unpack[Options]) -> Result: ...
    @overload
    def generate(
        self, prompt: list[str] | list[list[int]], **options: Unpack[Options]
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
            One for a single prompt, a list for a list of prompts.

        Raises
        ------
        Interrupted
            Ctrl-C; `results` holds what was there by then.
        PromptError, ParameterError, TokenizerError, NonFiniteError, DeviceOutOfMemory
        """
        if not isinstance(prompt, Sequence | np.ndarray):
            raise PromptError(
                f"the prompt is {prompt!r}, expected a text, token ids, or a list of those"
            )
        single = isinstance(prompt, str) or is_ids(prompt)
        prompts = cast("list[Prompt]", [prompt] if single else list(prompt))
        results: dict[int, Result] = {}
        steps = self._steps(*self._plan(prompts, options))
        try:
            for chunk in steps:
                if chunk.result is not None:
                    results[chunk.sequence] = chunk.result
        except Interrupted:
            raise
        except KeyboardInterrupt as interrupt:  # it came here, between two chunks
            steps.throw(interrupt)
        return results[0] if single else [results[i] for i in range(len(prompts))]

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Chunks:
        """Continue one prompt, a `Chunk` a token; the last has the `result`.

        Raises what `generate` raises: what is wrong with the call at once, the rest on the way. A
        KeyboardInterrupt after the first chunk can be thrown in (`throw`) for an `Interrupted`.
        """
        return self._steps(*self._plan([prompt], options))

    def _plan(
        self, prompts: list[Prompt], options: Options
    ) -> tuple[list[TokenGenerator], list[Output]]:
        """Check everything; one `TokenGenerator` a batch, one `Output` a prompt."""
        params, stop = check_options(options)
        allow_special = options.get("allow_special", False)
        batch_size = options.get("batch_size", BATCH_SIZE)
        eos_id = None if options.get("ignore_eos", False) else self.config.eos_token_id
        rest: dict[str, Any] = {k: v for k, v in options.items() if k in ENGINE_OPTIONS}
        if not prompts:
            raise PromptError("there is no prompt: give at least one")
        if (cache := options.get("cache")) is not None:
            self._check_cache(cache, prompts)
        # Stop strings mean nothing without text: `self.tokenizer` says what is missing.
        tokenizer = self.tokenizer if self.files.tokenizer or stop else None
        ids = [self._ids(prompt, allow_special) for prompt in prompts]
        streams = streams_of(ids)
        runs: list[TokenGenerator] = []
        outputs: list[Output] = []
        for first in range(0, len(ids), batch_size):
            batch = slice(first, first + batch_size)
            run = TokenGenerator(
                self.gpt2, ids[batch], params, streams=streams[batch], eos_id=eos_id, **rest
            )
            params = run.params  # with the seed that was taken for the first batch
            runs.append(run)
            outputs += [
                Output(first + i, prompt, len(used), tokenizer, stop, run)
                for i, (prompt, used) in enumerate(zip(prompts[batch], run.prompts, strict=True))
            ]
        return runs, outputs

    def _steps(self, runs: list[TokenGenerator], outputs: list[Output]) -> Chunks:
        """The chunks of all prompts as they come, batch by batch."""
        first = 0
        try:
            for run in runs:
                for step in run:
                    for token in step:
                        chunk = outputs[first + token.sequence].add(token)
                        if chunk.finish_reason is not None:
                            run.finish(token.sequence)
                        yield chunk
                first += len(run.prompts)
        except KeyboardInterrupt:
            raise Interrupted([output.result("interrupted") for output in outputs]) from None

    def _ids(self, prompt: Prompt, allow_special: bool) -> list[int]:
        if not isinstance(prompt, str):
            return check_ids(prompt, self.gpt2)
        if not prompt:
            raise PromptError(
                "the prompt is empty: give at least one character (to start a new text, "
                "'<|endoftext|>' with allow_special=True)"
            )
        return check_ids(self.encode(prompt, allow_special=allow_special), self.gpt2)

    def prefill(self, prompt: Prompt, *, allow_special: bool = False) -> KVCache:
        """Read a prompt, to be continued later: `generate(prompt + more, cache=...)`.

        The cache can be saved (`cache.save(path)`) and loaded on any backend (`load_cache`).
        """
        ids = self._ids(prompt, allow_special)
        self._check_context(ids)
        cache = KVCache(self.config, self.backend, 1, len(ids))
        with self.backend.scope():
            # Lazy libraries compute when a number is asked for; a logit needs all keys and values.
            self.backend.to_numpy(prefill(self.gpt2, [ids], cache)[:, :1])
        cache.tokens = [ids]
        cache.fingerprint = self.fingerprint
        return cache

    def load_cache(self, path: str | Path) -> KVCache:
        """A cache that `KVCache.save` wrote, from this model on any backend.

        Raises
        ------
        NotFoundError, DataError
            It is not there, is damaged, or comes from another model.
        """
        with self.backend.scope():
            cache = KVCache.load(path, self.config, self.backend)
        if cache.fingerprint != self.fingerprint:
            raise DataError(f"{path} was computed with other weights than those of {self.name}")
        return cache

    def _check_cache(self, cache: KVCache, prompts: list[Prompt]) -> None:
        if len(prompts) > 1 or len(cache.lengths) > 1:
            raise ParameterError("a cache goes with one prompt, and holds one sequence")
        if cache.fingerprint != self.fingerprint:
            raise ParameterError("the cache belongs to another model: prefill one with this model")

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """The logits of the token after each of `ids`: n token ids -> NumPy float32 [n, V].

        They are what the model computed, a NaN of damaged weights included.
        """
        checked = check_ids(ids, self.gpt2)
        self._check_context(checked)
        with self.backend.scope():
            logits = all_logits(self.gpt2, checked)
            return self.backend.to_numpy(logits).astype(np.float32, copy=False)

    def score(
        self, text: Prompt, *, stride: int | None = None, allow_special: bool = False
    ) -> Score:
        """The log-probability of each token of a text, or of token ids.

        A text longer than the context is read in windows of one context that move on by `stride`
        tokens (default: a whole context, so that windows do not overlap). Every token but the first
        is scored once: in the first window that holds all of what comes before it, or as much of
        that as a context holds.
        """
        ids, n_context = self._ids(text, allow_special), self.config.n_positions
        stride = n_context if stride is None else stride
        if not is_int(stride) or not 1 <= stride <= n_context:
            raise ParameterError(f"stride is {stride!r}, expected 1 to {n_context} (the context)")
        if len(ids) < 2:
            raise PromptError("the text is a single token, which has none before it: give more")
        with self.backend.scope():
            return score(self.gpt2, ids, stride)

    def _check_context(self, ids: list[int]) -> None:
        if len(ids) > self.config.n_positions:
            raise PromptError(
                f"{len(ids)} tokens were given, the context holds {self.config.n_positions}"
            )


def load(
    model: str | os.PathLike[str] = "gpt2",
    *,
    backend: str | Any = "numpy",
    dtype: str | None = None,
    device: Any = None,
    threads: int | None = None,
    generic: bool = False,
    compile: bool = True,
    cache_dtype: str | None = None,
    quantize: str | None = None,
    group_size: int = GROUP_SIZE,
    revision: str | None = None,
    offline: bool = False,
    token: str | None = None,
) -> Model:
    """Load a model.

    Parameters
    ----------
    model
        An embedded name ("shakespeare"), a folder, or a Hub id ("openai-community/gpt2", and the
        short names gpt2, gpt2-medium, gpt2-large and gpt2-xl).
    **options
        See `gptx.generation.options.LoadOptions`.

    Raises
    ------
    ParameterError
        The model cannot be quantized like that.
    NotFoundError, HubUnavailableError, AuthorizationError, IntegrityError, StorageError
        The files cannot be had.
    ConfigError, WeightsError
        They do not describe a GPT-2 that gptx can run.
    BackendError
        The backend is not there, or does not compute in `dtype`.
    """
    wanted = Quantization.named(quantize, group_size)  # before something large is downloaded
    made = get_backend(backend, dtype=dtype, device=device, threads=threads, generic=generic,
                       compile=compile, cache_dtype=cache_dtype)  # fmt: skip
    files = locate(model, revision=revision, offline=offline, token=token)
    config = GPT2Config.from_file(files.config)
    with made.scope():
        found = read_weights(files.weights, config)
        found, config = quantize_weights(found, config, wanted, threads)
        gpt2 = Transformer(config, to_backend(found, made), made)
    return Model(gpt2, files, fingerprint(found))


def load_once(model: Any, max_tokens: int | None, **options: Unpack[LoadOptions]) -> Model:
    """`load` for a single call, in which it may take longer to compile than is gained by it."""
    loaded = load(model, **options)
    if "compile" not in options and not isinstance(options.get("backend"), Backend):
        expected = loaded.config.n_positions if max_tokens is None else max_tokens
        loaded.backend.compiles = expected * loaded.config.n_parameters >= WORTH_COMPILING
    return loaded


@overload
def generate(
    prompt: str | list[int],
    *,
    model: str | os.PathLike[str] | Model = "gpt2",
    **options: Unpack[AllOptions],
) -> Result: ...
@overload
def generate(
    prompt: list[str] | list[list[int]],
    *,
    model: str | os.PathLike[str] | Model = "gpt2",
    **options: Unpack[AllOptions],
) -> list[Result]: ...
def generate(
    prompt: Any,
    *,
    model: str | os.PathLike[str] | Model = "gpt2",
    **options: Unpack[AllOptions],
) -> Result | list[Result]:
    """Load a model and continue a prompt, or each of several.

    Takes the options of `load` and of `Model.generate`, and returns what the latter returns. To
    continue more than once, `load` once.
    """
    loaded, rest = _loaded(model, options)
    return loaded.generate(prompt, **rest)


def stream(
    prompt: Prompt,
    *,
    model: str | os.PathLike[str] | Model = "gpt2",
    **options: Unpack[AllOptions],
) -> Chunks:
    """Load a model and continue a prompt, a `Chunk` a token; as `generate` otherwise."""
    loaded, rest = _loaded(model, options)
    return loaded.stream(prompt, **rest)


def _loaded(model: Any, options: AllOptions) -> tuple[Model, Options]:
    given = {k: v for k, v in options.items() if k in LoadOptions.__annotations__}
    rest = cast("Options", {k: v for k, v in options.items() if k not in given})
    check_options(rest)  # before something large is downloaded
    if isinstance(model, Model):
        if given:
            raise ParameterError(
                f"{', '.join(given)} belong to gptx.load(): the model that was given is loaded"
            )
        return model, rest
    max_tokens = rest.get("max_tokens", MAX_TOKENS)
    return load_once(model, max_tokens, **cast("LoadOptions", given)), rest
