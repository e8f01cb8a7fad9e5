"""The comparison with other engines: an engine in a worker, the check of its logits, the tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.compare.engine_process import EngineProcess, LeftOut
from benchmarks.compare.report import Run, list_goals, results_table
from benchmarks.compare.run import check_model
from benchmarks.compare.workloads import WORKLOADS, Workload, letter_prompts
from gptx.backends import get_backend
from tests.support.bench import parse_table
from tests.support.models import make_model
from tests.support.random_models import CASES


def test_an_engine_in_a_worker(folder: Callable[..., Path], tmp_path: Path) -> None:
    config = CASES["124M"]
    engine = EngineProcess("NumPy float32", folder("124M"), 1, tmp_path)
    try:
        assert engine.about["n_bytes"] == 4 * config.n_parameters
        [ids] = letter_prompts(config, 1, 5, seed=0)
        answer = engine.ask("sample", ids=ids, n_tokens=3)
        model = make_model(config, get_backend("numpy", generic=True, threads=1))
        np.testing.assert_allclose(answer["logits"], model.logits(ids)[-1], atol=1e-4)
        assert answer["tokens"] == model.generate(ids, max_tokens=3, ignore_eos=True).tokens
        for part in ("first", "step"):
            assert 0 < Workload("", part, 4, 3, 1, times=2).measure(engine, config, seed=0) < 10
    finally:
        engine.close()


def test_a_missing_engine_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGPT", "gpt2")
    with pytest.raises(LeftOut, match=r"fastGPT float32 is left out: .*FASTGPT is 'gpt2'"):
        EngineProcess("fastGPT float32", tmp_path, 1, tmp_path)


def test_engines_that_compute_another_model_are_left_out() -> None:
    run, reference = Run({}), {"logits": [3.0, 4.0], "tokens": [1, 2]}
    check_model(run, "gptx float32", {"logits": [3.0, 4.005], "tokens": [1, 9]}, reference)
    assert run.agreement == {"gptx float32": {"same_tokens": 1, "logits_error": 0.001}}
    check_model(run, "fastGPT float32", {"logits": None, "tokens": [1, 2]}, reference)
    for name, logits, tokens, message in (
        ("gptx float32", [3.0, 4.1], [1, 2], "its logits are off by 2.0%"),
        ("fastGPT float32", None, [1, 9], "token 1 differs"),
        ("gptx int8", [3.0, 4.0], [1], "it made 1 of 2 tokens"),
    ):
        with pytest.raises(LeftOut, match=message):
            check_model(run, name, {"logits": logits, "tokens": tokens}, reference)


def test_the_tables() -> None:
    run = Run(
        {"size": "124M", "instructions": "AMX", "isa": None},
        {name: {"n_bytes": 500e6} for name in ("gptx float32", "llama.cpp F32", "llama.cpp Q4_0")},
        seconds={
            "decode": {
                "gptx float32": [0.02, 0.025, 0.03],
                "llama.cpp F32": [0.05],
                "llama.cpp Q4_0": [0.01],
            }
        },
        bandwidth=[20e9, 25e9, 40e9],
    )
    text = results_table(run, ["decode", "deep"])
    assert text.endswith("memory read at 25.0 GB/s (22.5–32.5)")
    rows = [list(row.values())[1:] for row in parse_table(text)]
    assert rows == [
        ["gptx float32", "25.00 ms", "22.50–27.50", "40", "1.00", "2.50", "0.80"],
        ["llama.cpp F32", "50.00 ms", "50.00–50.00", "20", "2.00", "5.00", "0.40"],
        ["llama.cpp Q4_0", "10.00 ms", "10.00–10.00", "100", "1.00", "1.00", "2.00"],
    ]
    values = {goal.text: goal.value for goal in list_goals(run)}
    assert values["decode float32 / llama.cpp F32"] == 0.5
    assert values["decode float32, of the read bandwidth"] == pytest.approx(0.8)
    assert values["prefill 19 int8 / llama.cpp Q8_0"] is None
    assert run.to_dict()["goals"][0] == {
        "goal": "decode float32 / llama.cpp F32 ≤ 1.0",
        "value": 0.5,
    }
    assert set(run.seconds) <= set(WORKLOADS)


def test_goals_on_avx2_leave_out_engines_that_use_more() -> None:
    """onnxruntime chooses by the processor; llama.cpp is restricted if it was built so."""
    engines = {
        "gptx float32": "gptx 0.1.0",
        "onnxruntime float32": "onnxruntime 1.32",
        "transformers float32": "torch 2.13",
        "llama.cpp F32": "llama-cpp-python 0.3 AVX2 FMA",
        "llama.cpp F32, fa off": "llama-cpp-python 0.3 AVX2 AVX512",
        "llama.cpp Q8_0": "llama-cpp-python 0.3 AVX2 FMA",
    }
    seconds = dict(zip(engines, (0.4, 0.1, 0.8, 0.5, 0.2, 0.3), strict=True))
    run = Run(
        {"size": "124M", "instructions": "AVX2", "isa": "avx2"},
        {name: {"n_bytes": 500e6, "version": version} for name, version in engines.items()},
        seconds={"prefill512": {name: [value] for name, value in seconds.items()}},
    )
    assert run.unrestricted() == ["onnxruntime float32", "llama.cpp F32, fa off"]
    values = {goal.text: goal.value for goal in list_goals(run)}
    assert values["prefill of 512, float32 / others"] == pytest.approx(0.8)
    assert values["prefill of 512, int8 / others"] is None
    run.about["isa"] = None  # a processor that has no more
    assert run.unrestricted() == []
