"""The chat template of a tokenizer: a program that comes with a model, in jinja2's sandbox.

It gets no files and no attributes of Python, and its time, its text and its numbers have limits.
The module needs jinja2.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sized
from functools import lru_cache
from types import CodeType
from typing import Any

from jinja2 import Template
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.nodes import Node
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 1.0  # of one prompt; a usual one takes less than 5 ms
MAX_CHARACTERS = 2**23  # of a prompt, twice those of the largest body
MAX_BITS = 2**16  # of an integer


class _Ticking(CodeGenerator):
    """A compiler that checks the time in each block: loops, macros and conditions."""

    def blockvisit(self, nodes: Iterable[Node], frame: Frame) -> None:
        self.writeline("environment.tick()")
        super().blockvisit(nodes, frame)


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox for one rendering, with limits."""

    code_generator_class = _Ticking
    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True)
        self.globals["raise_exception"] = _refuse
        self._end = time.monotonic() + MAX_SECONDS

    def tick(self) -> None:
        """Raise SecurityError after the time limit; the compiled template calls it."""
        if time.monotonic() > self._end:
            raise SecurityError(f"it takes longer than {MAX_SECONDS:g} s")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return the result of an operator; SecurityError before one that is too large."""
        if _is_too_large(operator, left, right):
            raise SecurityError(f"the result of its operator {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _is_too_large(operator: str, left: Any, right: Any) -> bool:
    """Test the size that a sum, a product or a power would have."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        return (bits * right if operator == "**" else bits + right.bit_length()) > MAX_BITS
    sizes = [len(one) if isinstance(one, Sized) else one for one in (left, right)]
    if not all(isinstance(size, int) for size in sizes):
        return False
    return (sizes[0] * sizes[1] if operator == "*" else sum(sizes)) > MAX_CHARACTERS


def _refuse(message: str) -> None:
    raise TemplateError(message)


@lru_cache(maxsize=16)
def _compile(template: str) -> CodeType:
    """Return the compiled template, which runs in any environment."""
    code = _Environment().compile(template)
    assert isinstance(code, CodeType)
    return code


def render(template: str, values: dict[str, Any]) -> str:
    """Return the text of a template for these variables.

    Raises
    ------
    Exception
        Any that the template raises, and SecurityError beyond a limit.
    """
    environment = _Environment()
    pieces, size = [], 0
    made = Template.from_code(environment, _compile(template), environment.make_globals(None))
    for piece in made.generate(values):
        environment.tick()
        pieces.append(piece)
        size += len(piece)
        if size > MAX_CHARACTERS:
            raise SecurityError(f"its text has more than {MAX_CHARACTERS} characters")
    return "".join(pieces)
