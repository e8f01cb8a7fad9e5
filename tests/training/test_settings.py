"""gptx.training.settings: the checks of a run's settings."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from gptx.config import GPT2Config
from gptx.errors import ParameterError
from gptx.training.settings import TrainingSettings

NAN, INF = float("nan"), float("inf")
INVALID: dict[str, list[Any]] = {
    "steps": [0, -1, 1.5, "10", True, None],
    "batch_size": [0, -4],
    "accumulate": [0],
    "eval_every": [0],
    "eval_batches": [0],
    "patience": [0],
    "save_every": [0, 2.0],
    "warmup": [-1],
    "seed": [-1, 2**63],
    "learning_rate": [NAN, INF, 0, -1e-3, "fast", None],
    "eps": [0, NAN],
    "weight_decay": [-0.1, NAN],
    "final_fraction": [-0.1, 1.1],
    "beta1": [1, -0.1, NAN],
    "beta2": [1],
    "momentum": [1],
    "dropout": [1, -0.1],
    "clip": [0, NAN, "1"],
    "skip_z": [0],
    "optimizer": ["adam", None],
    "schedule": ["step"],
    "recompute": ["all"],
    "trainable": [[], "h.*", [1]],
}
CASES = [(name, value) for name, values in INVALID.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{n}-{v!r}" for n, v in CASES])
def test_an_invalid_value_is_one_line_with_its_name(name: str, value: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        TrainingSettings(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} ")
    assert "expected" in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_numbers_of_numpy_are_numbers() -> None:
    settings = TrainingSettings(steps=np.int64(5), learning_rate=np.float32(0.5))  # type: ignore[arg-type]
    assert json.dumps([settings.steps, settings.learning_rate]) == "[5, 0.5]"


def test_json_and_back() -> None:
    settings = TrainingSettings(trainable=("h.1.*", "ln_f.*"), clip=None, learning_rate=1 / 3)
    assert TrainingSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert TrainingSettings.from_dict({"steps": 7}) == TrainingSettings(steps=7)


def test_an_unknown_setting_is_an_error() -> None:
    with pytest.raises(ParameterError, match="did you mean learning_rate"):
        TrainingSettings.from_dict({"learning_rat": 1})


def test_patterns_select_weights_in_the_order_of_the_model() -> None:
    names = list(GPT2Config(n_layer=2).tensor_shapes())
    settings = TrainingSettings(trainable=("ln_f.*", "h.1.ln_?.bias"))
    chosen = ["h.1.ln_1.bias", "h.1.ln_2.bias", "ln_f.weight", "ln_f.bias"]
    assert settings.select_trainable(names) == chosen
    assert TrainingSettings().select_trainable(names) == names
    with pytest.raises(ParameterError, match=r"'h\.2\.\*', which matches no weight"):
        TrainingSettings(trainable=("h.2.*",)).select_trainable(names)
