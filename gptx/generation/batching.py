"""The running batch: sequences join and leave between steps; a step computes tokens of many.

A sequence gets the tokens of a separate run, whatever the others do. A step is one pass of the
model: the next token of all sequences whose prompts are read, and a chunk of the other prompts, so
a long prompt does not stop the other sequences. If the model computes padding, the two would be a
large rectangle of it; there they alternate. Each sequence has a slot of the KV cache (`slots.py`),
and leaves without a copy of the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gptx.backends.base import HostTokens, NextTokens
from gptx.errors import GptxError, ParameterError, argument
from gptx.generation.logprobs import logprobs_of
from gptx.generation.results import Token
from gptx.generation.sampling import ALL_BANNED, NOT_FINITE, Sampler, make_sampler
from gptx.generation.sequences import Sampling, Sequence
from gptx.generation.slots import Slot, Slots, common_prefix
from gptx.kv_cache import KVCache
from gptx.logits import non_finite_error, pad
from gptx.model import Transformer

Array = Any
Made = tuple[Sequence, Token | GptxError]
MAX_PASSED_OVER = 4  # chunks of shorter prompts before the oldest prompt has its turn


@dataclass(eq=False)
class Reading:
    """A prompt that is read, or that waits for slots; copies of a sequence share it.

    Attributes
    ----------
    sequences
        Sequences that continue the prompt.
    ids
        Token ids to read.
    known
        Cache of an earlier prompt, one sequence. The tokens that this one shares with it are not
        computed again.
    prompt_logprobs
        N: compute the log-probabilities of the prompt, with those of the N most probable tokens.
    salt
        Only prompts with the same salt share keys and values.
    slots
        A slot for each sequence, of which the first one holds the prompt; empty while it waits.
    n_done
        Number of tokens that are read.
    n_passed_over
        Number of chunks of other prompts since its last one.
    """

    sequences: list[Sequence]
    ids: list[int]
    known: KVCache | None = None
    prompt_logprobs: int | None = None
    salt: str = ""
    slots: list[Slot] = field(default_factory=list)
    n_done: int = 0
    n_passed_over: int = 0

    @property
    def n_left(self) -> int:
        """Number of tokens that are not read."""
        return len(self.ids) - self.n_done

    @property
    def is_scored(self) -> bool:
        """True if its log-probabilities are requested, which need the logits of all tokens."""
        return self.prompt_logprobs is not None


@dataclass(eq=False)
class Group:
    """Running sequences that share a sampler, in the order of its rows.

    Attributes
    ----------
    slots
        Slot of each sequence.
    tokens
        Newest token of each sequence.
    """

    sampling: Sampling
    sampler: Any
    sequences: list[Sequence]
    slots: list[Slot]
    tokens: NextTokens

    @property
    def needs_tokens(self) -> bool:
        """True if a step of the sampler depends on the tokens of the step before, on the host."""
        return self.sampling.params.uses_history


class Batch:
    """Sequences that are computed together. All calls are in one thread.

    Parameters
    ----------
    model
        The model.
    n_slots
        Number of sequences in the KV cache.
    capacity
        Number of positions of each.
    n_prefixes
        Number of the slots that keep prompts and outputs, for later prompts that begin like them;
        the others are for running sequences. None: nothing is kept.
    chunk_tokens
        Number of tokens of prompts to read between two decode steps; None reads whole prompts.

    Attributes
    ----------
    n_computed
        Number of tokens that the newest step read.
    """

    def __init__(
        self,
        model: Transformer,
        n_slots: int,
        capacity: int,
        *,
        n_prefixes: int | None = None,
        chunk_tokens: int | None = None,
    ) -> None:
        self.model, self._backend = model, model.backend
        self.max_running = n_slots - (n_prefixes or 0)
        self._chunk_tokens = chunk_tokens
        self.cache = KVCache(model.config, model.backend, n_slots, capacity)
        self._slots = Slots(self.cache, n_prefixes)
        self._waiting: list[Reading] = []
        self._reading: list[Reading] = []
        self._groups: list[Group] = []
        self._leaving: set[Sequence] = set()
        self._mixes = getattr(model.forward, "skips_padding", False)
        self._has_decoded = True  # in the newest step
        self.n_computed = 0
        self._is_ahead = False  # the device computes the next decode step already

    @property
    def sequences(self) -> list[Sequence]:
        """Sequences that have not ended: running ones, then those whose prompts are not read."""
        parts: list[Group | Reading] = [*self._groups, *self._reading, *self._waiting]
        found = [sequence for part in parts for sequence in part.sequences]
        return [sequence for sequence in found if sequence not in self._leaving]

    @property
    def is_idle(self) -> bool:
        """True if all sequences have ended."""
        parts: list[Group | Reading] = [*self._groups, *self._reading, *self._waiting]
        return all(one in self._leaving for part in parts for one in part.sequences)

    @property
    def n_waiting(self) -> int:
        """Number of prompts that wait for slots."""
        return len(self._waiting)

    def add(
        self,
        sequences: list[Sequence],
        *,
        known: KVCache | None = None,
        prompt_logprobs: int | None = None,
        salt: str = "",
    ) -> None:
        """Add copies of a sequence: they have one prompt, which is read once; see `Reading`.

        Raises
        ------
        ParameterError
            There are more copies than can run at a time.
        """
        if len(sequences) > self.max_running:
            raise ParameterError(
                f"{argument('n')} is {len(sequences)}, expected at most {self.max_running}, the "
                "number of sequences that run at a time"
            )
        if self._leaving.intersection(sequences):  # they come back before a step
            with self._backend.scope():
                self._leave()
        n_positions = self.model.config.n_positions
        for sequence in sequences:
            # A sequence that was in a batch before continues with the part that it kept by then.
            sequence.window = sequence.window or [*sequence.prompt, *sequence.output]
            if len(sequence.window) > n_positions:
                sequence.window = sequence.window[-(n_positions - n_positions // 2) :]
            sequence.n_cached = 0
            sequence.added = time.perf_counter()
        ids = list(sequences[0].window)
        self._waiting.append(Reading(list(sequences), ids, known, prompt_logprobs, salt))

    def remove(self, sequence: Sequence) -> None:
        """End a sequence: the next step leaves it out."""
        self._leaving.add(sequence)

    def step(self) -> list[Made]:
        """Run one pass; return new tokens, or the error that ended a sequence.

        The list can be empty: after a chunk that completes no prompt, or without sequences.

        Raises
        ------
        GptxError
            The pass failed for all sequences, which stay: out of memory, for one.
        """
        with self._backend.scope():
            self._leave()
            self._slide()
            self._join()
            self.n_computed = 0
            if self._reading and (self._has_decoded or not self._groups):
                return self._read_chunk()
            self._has_decoded = True
            return self._decode() if self._groups else []

    # Joining and leaving

    def _leave(self) -> None:
        """Drop the sequences that have ended, and free their slots."""
        if self._leaving:
            for group in self._groups:
                for sequence, slot in self._keep(group, lambda one: one not in self._leaving):
                    self._slots.release(slot, sequence.window[: sequence.n_cached])
            for reading in (*self._waiting, *self._reading):
                reading.sequences = [x for x in reading.sequences if x not in self._leaving]
                if not reading.sequences:
                    self._release(reading)
            self._leaving.clear()
        self._groups = [group for group in self._groups if group.sequences]
        self._waiting = [reading for reading in self._waiting if reading.sequences]
        self._reading = [reading for reading in self._reading if reading.sequences]
        self._is_ahead = self._is_ahead and bool(self._groups)

    def _keep(self, group: Group, test: Any) -> list[tuple[Sequence, Slot]]:
        """Keep the sequences of a group that pass a test; return the others, with their slots."""
        members = list(zip(group.sequences, group.slots, strict=True))
        kept = [i for i, (sequence, _) in enumerate(members) if test(sequence)]
        if len(kept) == len(members):
            return []
        group.sequences, group.slots = [members[i][0] for i in kept], [members[i][1] for i in kept]
        if kept:
            group.sampler.keep(kept)
            group.tokens = self._backend.keep_tokens(group.tokens, kept)
        return [member for member in members if not test(member[0])]

    def _release(self, reading: Reading) -> None:
        """Free the slots of a prompt that has no sequences left."""
        for slot in reading.slots:
            self._slots.release(slot, reading.ids[: reading.n_done] if slot.tokens else [])
        reading.slots = []

    def _slide(self) -> None:
        """Let sequences with a full context read the newer half of it, as a prompt."""
        n_positions = self.model.config.n_positions
        for group in self._groups:
            for sequence, slot in self._keep(group, lambda one: len(one.window) <= n_positions):
                sequence.window = sequence.window[-(n_positions - n_positions // 2) :]
                sequence.n_cached = 0
                slot.tokens = []
                self.cache.lengths[slot.index] = 0
                self._reading.append(Reading([sequence], list(sequence.window), slots=[slot]))
        self._groups = [group for group in self._groups if group.sequences]

    def _join(self) -> None:
        """Give slots to the prompts that wait, in order, as long as there are enough."""
        while self._waiting:
            reading = self._waiting[0]
            n = len(reading.sequences)
            if self._slots.n_used + n > self.max_running:
                return
            self._reading.append(self._waiting.pop(0))
            ids = reading.ids[:1] if reading.is_scored else reading.ids
            reading.slots, reading.n_done = self._slots.take(ids, n, reading.salt)
            known = reading.known
            if known is not None and known.tokens and not reading.is_scored:
                n_known = common_prefix(known.tokens[0], ids)
                if n_known:
                    self.cache.copy(n_known, [reading.slots[0].index], known)
                    reading.n_done = n_known
            reading.known = None
            for sequence in reading.sequences:
                sequence.n_reused = min(reading.n_done, len(sequence.prompt))

    # Prompts

    def _read_chunk(self) -> list[Made]:
        """Read a chunk of prompts; sample the first token after each that is complete.

        The same pass may compute the next token of the running sequences.
        """
        picked = self._pick_chunk()
        is_scored = picked[0][0].is_scored
        self._has_decoded = self._mixes and not is_scored
        groups = list(self._merge_groups()) if self._has_decoded else []
        newest = [[id] for group in groups for id in self._backend.to_numpy(group.tokens.ids)]
        parts = [reading.ids[reading.n_done : reading.n_done + n] for reading, n in picked]
        slots = [slot.index for group in groups for slot in group.slots]
        slots += [reading.slots[0].index for reading, _ in picked]
        logits = self._forward(newest + parts, slots, last_only=not is_scored)
        made = self._sample_groups(groups, logits[:, -1, :])
        for group in groups:
            made += self._read(group, group.tokens)
        complete: list[tuple[int, Reading]] = []
        for row, (reading, n) in enumerate(picked, len(newest)):
            failed = self._score(reading, logits[row, :n, :]) if is_scored else []
            made += failed
            reading.n_done += n
            reading.slots[0].tokens = reading.ids[: reading.n_done]
            if reading.n_left == 0 and not failed:
                complete.append((row, reading))
                self._reading.remove(reading)
        return made + self._begin(complete, logits[:, -1, :])

    def _forward(self, parts: list[list[int]], slots: list[int], *, last_only: bool) -> Array:
        """Run a pass over new tokens of the sequences in `slots`."""
        positions = self.cache.extend([len(part) for part in parts], slots)
        self.n_computed = sum(map(len, parts))
        ids = self._backend.asarray(pad(parts))
        return self.model.forward(ids, positions, self.cache, last_only=last_only)

    def _pick_chunk(self) -> list[tuple[Reading, int]]:
        """Return the prompts of the next pass, and the number of tokens to read of each.

        Without a limit they are all. With one, the shortest come first: they are complete soonest,
        and a part of a long one does not make their pass longer. The oldest has its turn after
        `MAX_PASSED_OVER` chunks of others.
        """
        if self._chunk_tokens is None:
            return [(reading, reading.n_left) for reading in self._reading]
        oldest = self._reading[0]
        order = sorted(self._reading, key=lambda reading: reading.n_left)
        if oldest.n_passed_over >= MAX_PASSED_OVER:
            order = [oldest]
        picked: list[tuple[Reading, int]] = []
        for reading in order:
            if not picked or reading.is_scored == picked[0][0].is_scored:
                n = self._fitting(reading, [n for _, n in picked])
                picked += [(reading, n)] if n else []
        oldest.n_passed_over += 1
        for reading, _ in picked:
            reading.n_passed_over = 0
        return picked

    def _fitting(self, reading: Reading, counts: list[int]) -> int:
        """Return the number of tokens of a prompt that fit a pass with some of others, maybe 0."""
        assert self._chunk_tokens is not None
        n = min(reading.n_left, self._chunk_tokens)
        # A rectangle has all sequences padded to the longest one.
        packs = self._mixes and not reading.is_scored
        total = sum(counts) + n if packs else (len(counts) + 1) * n
        return n if not counts or total <= self._chunk_tokens else 0

    def _score(self, reading: Reading, logits: Array) -> list[Made]:
        """Add the log-probabilities of the tokens after the next ones, from logits [T, V]."""
        after = reading.ids[reading.n_done + 1 : reading.n_done + 1 + logits.shape[0]]
        try:
            n_top = reading.prompt_logprobs or 0
            found = logprobs_of(self.model, logits[: len(after), :], after, n_top)
        except GptxError as error:
            return self._fail(reading.sequences, error)
        for sequence in reading.sequences:
            before = sequence.prompt_logprobs
            sequence.prompt_logprobs = found if before is None else before.joined(found)
        return []

    def _begin(self, complete: list[tuple[int, Reading]], logits: Array) -> list[Made]:
        """Start the sequences of complete prompts, whose logits are rows of logits [B, V].

        Sequences of one request that begin together share a sampler.
        """
        made: list[Made] = []
        for sampling in dict.fromkeys(reading.sequences[0].sampling for _, reading in complete):
            rows: list[int] = []
            sequences: list[Sequence] = []
            slots: list[Slot] = []
            for row, reading in complete:
                if reading.sequences[0].sampling is sampling:
                    rows += [row] * len(reading.sequences)
                    sequences += reading.sequences
                    slots += self._share_prompt(reading)
            made += self._begin_group(sampling, sequences, slots, self._take(logits, rows))
        return made

    def _share_prompt(self, reading: Reading) -> list[Slot]:
        """Copy a complete prompt to the slots of all its sequences; return these slots."""
        n = len(reading.sequences)
        slots, surplus = reading.slots[:n], reading.slots[n:]
        if n > 1:
            self.cache.copy(reading.n_done, [slot.index for slot in slots[1:]], slot=slots[0].index)
        for slot in surplus:  # their sequences have left
            self._slots.release(slot, [])
        return slots

    def _take(self, logits: Array, rows: list[int]) -> Array:
        if rows == list(range(logits.shape[0])):
            return logits
        return self._backend.xp.take(logits, self._backend.asarray(np.asarray(rows)), axis=0)

    def _begin_group(
        self, sampling: Sampling, sequences: list[Sequence], slots: list[Slot], logits: Array
    ) -> list[Made]:
        sampler = make_sampler(
            sampling.params,
            self._backend,
            [sequence.prompt for sequence in sequences],
            [sequence.stream for sequence in sequences],
            self.model.config.vocab_size,
            sampling.end_ids,
            [sequence.output for sequence in sequences],
        )
        group = Group(sampling, sampler, sequences, slots, NextTokens(None, None))
        self._groups.append(group)
        made = self._sample(group, logits)
        return made or self._read(group, group.tokens)

    # Tokens

    def _decode(self) -> list[Made]:
        """Compute the next token of each running sequence."""
        made: list[Made] = []
        if not self._is_ahead:
            self._merge_groups()
            made = self._compute_next()
        newest = [(group, group.tokens) for group in self._groups if group.sequences]
        # The device computes the next step while the host reads the tokens of this one.
        self._is_ahead = not made and self._may_run_ahead()
        if self._is_ahead:
            self._compute_next()
        for group, tokens in newest:
            made += self._read(group, tokens)
        return made

    def _merge_groups(self) -> list[Group]:
        """Let the groups whose parameters differ in the seed only share a sampler; return all."""
        merged: list[Group] = []
        for group in self._groups:
            own = group.sampling.without_seed
            other = next((one for one in merged if one.sampling.without_seed == own), None)
            if other is None or not isinstance(group.sampler, Sampler):
                merged.append(group)
            else:
                other.sampler.join(group.sampler)
                other.sequences += group.sequences
                other.slots += group.slots
                ids = self._backend.xp.concat([other.tokens.ids, group.tokens.ids])
                other.tokens = NextTokens(ids, None)
        self._groups = merged
        return merged

    def _compute_next(self) -> list[Made]:
        """Start the step that adds the newest tokens to the sequences, and samples the next."""
        groups = self._groups
        slots = [slot.index for group in groups for slot in group.slots]
        self.n_computed = len(slots)
        positions = self.cache.extend([1] * len(slots), slots)
        if len(groups) == 1:
            ids = groups[0].tokens.ids
            arguments = self.model, ids, positions, self.cache, groups[0].sampler
            return self._set_tokens(groups[0], self._backend.decode, *arguments)
        ids = self._backend.xp.concat([group.tokens.ids for group in groups])
        ids = self._backend.xp.reshape(ids, (-1, 1))
        logits = self.model.forward(ids, positions, self.cache)[:, -1, :]
        return self._sample_groups(groups, logits)

    def _sample_groups(self, groups: list[Group], logits: Array) -> list[Made]:
        """Sample the next tokens of groups, whose logits are the first rows of logits [B, V]."""
        made: list[Made] = []
        first = 0
        for group in groups:
            n = len(group.sequences)
            made += self._sample(group, logits[first : first + n, :])
            first += n
        return made

    def _sample(self, group: Group, logits: Array) -> list[Made]:
        """Sample the next token of each sequence of a group from logits [B, V]."""
        return self._set_tokens(group, self._backend.sample, logits, group.sampler)

    def _set_tokens(self, group: Group, compute: Any, *arguments: Any) -> list[Made]:
        """Set the newest tokens of a group; an error of its sampler ends its sequences only."""
        sampling = group.sampling
        options = {"logprobs": sampling.logprobs, "top_logprobs": sampling.top_logprobs}
        try:
            group.tokens = compute(*arguments, **options)
        except ParameterError as error:  # of `logits_processor`
            return self._fail(group.sequences, error)
        return []

    def _may_run_ahead(self) -> bool:
        """Return True if the device can start the next step before this one's tokens are read.

        It can unless the counts of tokens show that this step ends a sequence, or a step of the
        sampler depends on its tokens, or a prompt is to be read. Hooks see no step that is dropped.
        """
        return (
            self._backend.asynchronous
            and not self.model.has_hooks
            and not self._waiting
            and not self._reading
            and not self._leaving
            and all(
                not group.needs_tokens
                and all(
                    one.n_left > 1 and len(one.window) < self.model.config.n_positions
                    for one in group.sequences
                )
                for group in self._groups
            )
        )

    def _read(self, group: Group, tokens: NextTokens) -> list[Made]:
        """Wait for the newest tokens of a group."""
        read = self._backend.read_tokens(tokens)
        if group.needs_tokens:
            group.sampler.history.add(read.ids)
        sequences = list(group.sequences)
        made: list[Made] = []
        for i, sequence in enumerate(sequences):
            if sequence in self._leaving:
                continue
            if (error := self._error(read.ids[i])) is not None:
                made += self._fail([sequence], error)
            else:
                made.append((sequence, self._add_token(sequence, read, i)))
        return made

    def _error(self, id: int) -> GptxError | None:
        """Return the error of a sequence for which the sampler has no token."""
        if id == NOT_FINITE:
            return non_finite_error(self.model)
        if id == ALL_BANNED:
            return ParameterError(
                f"no token is left after the tokens so far: {argument('logit_bias')}, "
                f"{argument('sequence_bias')}, {argument('ban')}, "
                f"{argument('no_repeat_ngram_size')}, {argument('min_tokens')} and "
                f"{argument('logits_processor')} have to leave one with a finite logit"
            )
        return None

    def _add_token(self, sequence: Sequence, read: HostTokens, i: int) -> Token:
        """Add token `i` of a step to its sequence."""
        id = read.ids[i]
        logprob = None if read.logprobs is None else read.logprobs[i]
        top = None if read.top_logprobs is None else read.top_logprobs[i]
        sequence.n_cached = len(sequence.window)
        if not sequence.prefill_seconds:
            sequence.prefill_seconds = time.perf_counter() - sequence.added
        if id in sequence.sampling.end_ids:
            self.remove(sequence)
            return Token(sequence.index, None, logprob, "stop", top, id)
        sequence.output.append(id)
        sequence.window.append(id)
        sequence.n_left -= 1
        if sequence.n_left > 0:
            return Token(sequence.index, id, logprob, None, top)
        self.remove(sequence)
        return Token(sequence.index, id, logprob, "length", top)

    def _fail(self, sequences: Iterable[Sequence], error: GptxError) -> list[Made]:
        """End sequences with an error."""
        failed = list(sequences)
        for sequence in failed:
            self.remove(sequence)
        return [(sequence, error) for sequence in failed]
