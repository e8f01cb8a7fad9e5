"""The choice of a replica."""

from __future__ import annotations

from dataclasses import dataclass, field

from gptx.server.replicas import balancing
from gptx.server.replicas.balancing import BLOCK_CHARACTERS, MAX_BLOCKS, Prefixes, blocks_of, ranked

PROMPT = "To be, or not to be: that is the question. " * 10


@dataclass
class Replica:
    """A replica as the choice sees it."""

    number: int
    active: int = 0
    prefixes: Prefixes = field(default_factory=Prefixes)


def order(replicas: list[Replica], prompt: str = "", slots: int = 2) -> list[int]:
    return [one.number for one in ranked(replicas, blocks_of(prompt, ""), slots)]


def test_blocks_are_checksums_of_prefixes() -> None:
    blocks = blocks_of(PROMPT, "")
    assert len(blocks) == len(PROMPT) // BLOCK_CHARACTERS
    assert blocks_of(PROMPT[: 2 * BLOCK_CHARACTERS], "") == blocks[:2]
    changed = blocks_of(f"x{PROMPT[1:]}", "")
    assert not set(blocks) & set(changed)
    assert not set(blocks) & set(blocks_of(PROMPT, "key"))
    assert blocks_of(PROMPT[: BLOCK_CHARACTERS - 1], "") == []
    assert len(blocks_of("x" * 10**6, "")) == MAX_BLOCKS
    assert len(blocks_of("\ud800" * BLOCK_CHARACTERS, "\ud800")) == 1


def test_the_fewest_waiting_requests_come_first() -> None:
    replicas = [Replica(0, active=4), Replica(1, active=2), Replica(2, active=3)]
    replicas[0].prefixes.add(blocks_of(PROMPT, ""))
    assert order(replicas, PROMPT) == [1, 2, 0]


def test_then_the_longest_common_prefix() -> None:
    replicas = [Replica(0), Replica(1, active=1), Replica(2, active=2)]
    replicas[1].prefixes.add(blocks_of(PROMPT[:BLOCK_CHARACTERS], ""))
    replicas[2].prefixes.add(blocks_of(PROMPT, ""))
    assert order(replicas, PROMPT) == [2, 1, 0]


def test_then_the_fewest_requests() -> None:
    assert order([Replica(0, active=2), Replica(1, active=1), Replica(2, active=1)]) == [1, 2, 0]


def test_a_replica_forgets_the_oldest_prompts() -> None:
    prefixes = Prefixes()
    first, second = blocks_of(PROMPT, ""), blocks_of(f"x{PROMPT}", "")
    prefixes.add(first)
    limit = balancing.MAX_KNOWN_BLOCKS
    for n in range(limit - 3):
        prefixes.add([str(n).encode()])
    assert prefixes.common(first) == 3  # its first blocks are the last to go
    prefixes.add(second)
    assert prefixes.common(second) == len(second)
    assert prefixes.common(first) == 0
    prefixes.clear()
    assert prefixes.common(second) == 0
