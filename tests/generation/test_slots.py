"""Slots of the KV cache: which one a prompt takes, and the tokens that it shares."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptx.backends import get_backend
from gptx.generation.slots import Slots, common_prefix
from gptx.kv_cache import KVCache
from tests.support.random_models import CASES

CONFIG = CASES["tiny"]


def make_slots(n: int, n_prefixes: int | None = 9) -> tuple[Slots, KVCache]:
    cache = KVCache(CONFIG, get_backend("numpy"), n, 16)
    return Slots(cache, n_prefixes), cache


def use(slots: Slots, cache: KVCache, ids: list[int], salt: str = "") -> tuple[int, int]:
    """Let a sequence of tokens come and go; return its slot, and the tokens that it shared."""
    [slot], n_shared = slots.take(ids, 1, salt)
    for layer in range(CONFIG.n_layer):  # a token's key is its id
        for position in range(n_shared, len(ids)):
            cache.keys[layer][slot.index, :, position] = ids[position]
    cache.lengths[slot.index] = len(ids)
    slots.release(slot, ids)
    return slot.index, n_shared


@given(st.lists(st.integers(0, 2), max_size=9), st.lists(st.integers(0, 2), min_size=1, max_size=9))
def test_the_common_prefix_leaves_a_token_to_compute(known: list[int], ids: list[int]) -> None:
    n = common_prefix(known, ids)
    assert n < len(ids)
    assert known[:n] == ids[:n]
    assert n == len(ids) - 1 or n == len(known) or known[n] != ids[n]


def test_a_prompt_continues_in_the_slot_that_it_extends() -> None:
    slots, cache = make_slots(3)
    assert use(slots, cache, [1, 2, 3]) == (0, 0)
    assert use(slots, cache, [1, 2, 3, 4, 5]) == (0, 3)
    assert use(slots, cache, [1, 2, 3, 4, 5, 6]) == (0, 5)


def test_a_prompt_with_another_end_takes_a_copy() -> None:
    slots, cache = make_slots(3)
    use(slots, cache, [1, 2, 3, 4])
    assert use(slots, cache, [1, 2, 7]) == (1, 2)
    assert cache.keys[0][1, 0, :3, 0].tolist() == [1, 2, 7]
    assert use(slots, cache, [1, 2, 3, 4, 5]) == (0, 4)  # the first one is still there


def test_the_least_recently_used_slot_is_given_away() -> None:
    slots, cache = make_slots(2)
    use(slots, cache, [1, 1, 1])
    use(slots, cache, [2, 2, 2])
    use(slots, cache, [1, 1, 1, 1])
    assert use(slots, cache, [3, 3])[0] == 1
    assert use(slots, cache, [2, 2, 2, 2])[1] == 0


def test_a_running_sequence_shares_its_prompt() -> None:
    slots, cache = make_slots(2)
    [slot], _ = slots.take([5, 6, 7], 1, "")
    cache.keys[0][slot.index, :, :3] = 9
    slot.tokens, cache.lengths[slot.index] = [5, 6, 7], 3
    [other], n_shared = slots.take([5, 6, 8], 1, "")
    assert (other.index, n_shared) == (1, 2)
    assert cache.keys[0][1, 0, :2, 0].tolist() == [9, 9]
    assert slots.n_used == 2


@pytest.mark.parametrize("n_prefixes", [None, 0, 1, 3])
def test_slots_are_used_again_beyond_the_number_of_prefixes(n_prefixes: int | None) -> None:
    """Unused memory stays unused: one sequence at a time needs one slot, and the prefixes."""
    slots, cache = make_slots(8, n_prefixes)
    taken = [use(slots, cache, [i, i])[0] for i in range(20)]
    period = (n_prefixes or 0) + 1
    assert taken == [i % period for i in range(20)]


@pytest.mark.parametrize("salt", ["", "a", "b"])
def test_only_prompts_with_one_salt_share(salt: str) -> None:
    slots, cache = make_slots(4)
    use(slots, cache, [1, 2, 3], "a")
    assert use(slots, cache, [1, 2, 3, 4], salt)[1] == (3 if salt == "a" else 0)


def test_slots_that_do_not_share_keep_nothing() -> None:
    slots, cache = make_slots(2, None)
    use(slots, cache, [1, 2, 3])
    assert use(slots, cache, [1, 2, 3, 4])[1] == 0


def test_copies_take_slots_of_their_own() -> None:
    slots, cache = make_slots(3)
    use(slots, cache, [1, 2, 3])
    taken, n_shared = slots.take([1, 2, 3, 4], 3, "")
    assert n_shared == 3
    assert sorted(slot.index for slot in taken) == [0, 1, 2]
    assert cache.lengths[taken[0].index] == 3
