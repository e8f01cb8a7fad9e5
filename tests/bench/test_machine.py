"""The bandwidth of the memory, and the facts about the machine."""

from __future__ import annotations

import numpy as np
import pytest

from gptx.backends import Backend, get_backend
from gptx.bench import machine
from tests.support.backends import make_backend


@pytest.mark.parametrize("name", ["numpy", "mlx", "cupy-cpu"])
def test_bandwidth_of_a_backend(name: str) -> None:
    backend = make_backend(name)
    assert 1e7 < machine.read_bandwidth(backend, 1_000_000) < 1e13


def test_the_buffer_is_larger_than_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(machine, "read_bandwidth", lambda _, n: sizes.append(n) or 1.0)
    for cache in (0, 200_000_000, 10**12):
        monkeypatch.setattr(machine, "largest_cache_bytes", lambda cache=cache: cache)
        assert list(machine.measure_bandwidth("numpy", 1)) == [{"bandwidth": 1.0}]
    assert sizes == [256_000_000, 400_000_000, 2_000_000_000]
    monkeypatch.setattr(Backend, "device_name", lambda _: "a GPU", raising=True)
    monkeypatch.setattr(machine, "largest_cache_bytes", lambda: 0)
    list(machine.measure_bandwidth("numpy", 1))
    assert sizes[3:] == [2_000_000_000]


def test_facts_about_the_machine() -> None:
    facts = machine.describe(get_backend("numpy"))
    assert facts["library"] == f"numpy {np.__version__}"
    assert facts["cores"] >= 1
    assert all(isinstance(facts[name], str) for name in ("cpu", "date", "gptx", "python", "blas"))
