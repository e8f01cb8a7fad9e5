"""Runs of llm.c: take the optimizer's state of one, and write a state that it continues from."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gptx.errors import ParameterError, argument
from gptx.training.parameters import Parameters


def read(parameters: Parameters, path: str | os.PathLike[str]) -> int:
    """Take moments, and weights if there are, of a state of llm.c; return its number of steps.

    Raises
    ------
    ParameterError
        The optimizer is not AdamW.
    WeightsError, StorageError
        The file is damaged, of another model, or cannot be read.
    """
    from gptx.conversions.formats import llm_c_optimizer_state

    _check_adamw(parameters)
    found = llm_c_optimizer_state.read(Path(path).expanduser(), parameters.config)
    with parameters.backend.scope():
        if found.master is not None:
            parameters.set_weights(found.master.items())
        parameters.set_moments("m", found.m)
        parameters.set_moments("v", found.v)
    return found.step


def write(parameters: Parameters, step: int, path: str | os.PathLike[str]) -> None:
    """Write a state that llm.c continues from; see `Trainer.write_llm_c_state`."""
    from gptx.conversions.formats import llm_c_optimizer_state

    _check_adamw(parameters)
    if len(parameters.trainable) < len(parameters.weights):
        raise ParameterError(f"llm.c trains all weights, expected no {argument('trainable')}")

    def on_host(arrays: Iterable[Any]) -> dict[str, np.ndarray]:
        return dict(zip(parameters.trainable, map(parameters.to_host, arrays), strict=True))

    m, v = (on_host(parameters.moments[kind]) for kind in ("m", "v"))
    master = on_host(parameters.weights[name] for name in parameters.trainable)
    state = llm_c_optimizer_state.OptimizerState(step, m, v, master)
    llm_c_optimizer_state.write(state, parameters.config, Path(path).expanduser())


def _check_adamw(parameters: Parameters) -> None:
    if parameters.settings.optimizer != "adamw":
        raise ParameterError(
            f"the state of llm.c is that of AdamW, expected {argument('optimizer', 'adamw')}"
        )
