"""A replay of the graph: the bits of the pass, with and without a cache, and little memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gptx.backends import Positions
from gptx.backends.graph import Node, named_weights, trace_names
from gptx.backends.replay import Replay
from gptx.kv_cache import KVCache
from gptx.model import forward
from tests.support.models import EXACT, exact_transformer
from tests.support.random_models import CASES, random_ids


@pytest.mark.parametrize("expanded", [(), (0, 2)], ids=["fused", "expanded"])
@pytest.mark.parametrize("case", ["untied", "gelu-erf", "relu", "layer-scaled"])
def test_a_replay_computes_the_bits_of_the_pass(case: str, expanded: tuple[int, ...]) -> None:
    """Of a ragged prompt, and of the step after it."""
    model = exact_transformer(case)
    weights = dict(named_weights(model.weights))
    caches = [KVCache(model.config, EXACT, 2, 7) for _ in range(2)]
    for last_only, counts in ((True, [5, 3]), (False, [1, 1])):
        graph = trace_names(forward, model, last_only=last_only, expanded=expanded)
        ids = random_ids(model.config, 2, counts[0])
        positions = [cache.extend(counts) for cache in caches]
        replay = Replay(EXACT, graph, weights, ids, positions[0], caches[0])
        wanted = forward(model, ids, positions[1], caches[1], last_only=last_only)
        np.testing.assert_array_equal(replay.run(), wanted)
        assert not replay.results
    for k, wanted in zip(caches[0].keys, caches[1].keys, strict=True):
        np.testing.assert_array_equal(k, wanted)


def test_without_a_cache_all_keys_are_new() -> None:
    model, ids = exact_transformer("untied"), random_ids(CASES["untied"], 2, 4)
    graph = trace_names(forward, model, last_only=False)
    positions = Positions(np.tile(np.arange(4), (2, 1)), 4, True, EXACT.asarray)
    replay = Replay(EXACT, graph, dict(named_weights(model.weights)), ids, positions)
    cache = KVCache(model.config, EXACT, 2, 4)
    wanted = forward(model, ids, cache.extend([4, 4]), cache)
    np.testing.assert_array_equal(replay.run(), wanted)


def test_a_result_is_freed_at_its_last_reader() -> None:
    model, ids = exact_transformer("untied"), random_ids(CASES["untied"], 1, 4)
    graph = trace_names(forward, model, last_only=False)
    kept: list[int] = []

    class Counting(Replay):
        def add_result(self, node: Node, x: Any) -> None:
            super().add_result(node, x)
            kept.append(len(self.results))

    positions = Positions(np.arange(4)[None], 4, True, EXACT.asarray)
    Counting(EXACT, graph, dict(named_weights(model.weights)), ids, positions).run()
    assert len(kept) == len(graph.nodes)
    assert max(kept) <= 7  # ids, positions, the residual stream; q, k, v and their source
