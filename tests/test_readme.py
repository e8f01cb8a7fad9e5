"""The examples of gptx/README.md, with the numbers that they print."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np

README = Path(__file__).parents[1] / "gptx" / "README.md"


def test_the_steps_from_text_to_token() -> None:
    with np.printoptions():  # an example changes them
        results = doctest.testfile(str(README), module_relative=False)
    assert results.attempted > 20
    assert not results.failed
