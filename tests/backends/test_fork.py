"""os.fork() after a generation: servers that load a model before they fork, and multiprocessing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptx
from gptx.backends import Backend, get_backend
from gptx.errors import BackendError
from tests.support.backends import make_backend


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_parent_and_child_generate_after_a_fork(shakespeare: gptx.Model) -> None:
    """The child has the text of the parent, or an error if the library does not survive a fork."""
    options: dict[str, Any] = {
        "float32": {},
        "int8": {"quantize": "int8"},
        "op by op": {"compile": False, "threads": 2},
        "generic": {"generic": True},
    }
    if importlib.util.find_spec("mlx"):
        options["mlx"] = {"backend": "mlx"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.fork_child", json.dumps(options)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    child, parent = json.loads(done.stdout)
    assert set(child) == set(options)
    error = child.pop("mlx", "BackendError: the mlx backend was used in process")
    assert error.startswith("BackendError: the mlx backend was used in process")
    parent.pop("mlx", None)
    assert child == parent
    expected = shakespeare.generate("ROMEO:", max_tokens=4, temperature=0).text
    assert parent["float32"] == expected


@pytest.mark.parametrize("name", ["mlx", "cupy-cpu"])
def test_a_library_that_does_not_survive_a_fork(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backend, "_used_by", {})
    backend = make_backend(name)
    with backend.scope():
        backend.to_numpy(backend.zeros((2,)))
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a forked child
    for use in (backend.scope, lambda: get_backend(backend.name)):
        with pytest.raises(BackendError, match=r"was used in process \d+ before os\.fork\(\)"):
            use()


def test_mlx_that_was_only_loaded_survives_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arrays are not computed: MLX starts its threads later, in the child."""
    monkeypatch.setattr(Backend, "_used_by", {})
    backend = make_backend("mlx")
    with backend.scope():
        backend.asarray(np.ones(3, np.float32))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with backend.scope():
        assert backend.to_numpy(backend.zeros((2,))).tolist() == [0, 0]
