"""The examples of the page run as they are."""

from __future__ import annotations

import re
from pathlib import Path

import gptx

README = Path(gptx.__file__).parent / "research" / "README.md"


def test_the_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 5
    exec(compile("\n".join(blocks), str(README), "exec"), {})
