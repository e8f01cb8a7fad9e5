"""tests.mutation: the mutants of small modules."""

from __future__ import annotations

import pytest

from tests.mutation import ROOT, find_mutants, read_equivalent


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a < b", ["a <= b", "a >= b"]),
        ("a <= b < c", ["a < b < c", "a > b < c", "a <= b <= c", "a <= b >= c"]),
        ("a == b", ["a != b"]),
        ("a not in b", ["a in b"]),
        ("a is None", ["a is not None"]),
        ("a + b", ["a - b"]),
        ("a >> b", ["a << b"]),
        ("a and b", ["a or b"]),
        ("not a", ["a"]),
        ("a if b else c", ["a", "c"]),
        ("True", ["False"]),
        ("7", ["8"]),
        ("'text'", []),
        ("f'{a + 1}'", []),
    ],
)
def test_changes_of_an_expression(source: str, expected: list[str]) -> None:
    assert [mutant.after for mutant in find_mutants(source)] == [f"({x})" for x in expected]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a += b\n", ["a -= b\n"]),
        ("if a:\n    b\n", ["if (False):\n    b\n"]),
        ("if a:\n    b\nelif c:\n    d\n", ["if (False):\n", "elif (False):\n"]),
        ("if TYPE_CHECKING:\n    b\n", []),
        ("assert a < b\n", []),
        ("@dataclass(frozen=True)\nclass A:\n    b = 1\n", ["b = (2)"]),
        ("def f(a: x | y = 1) -> x | y:\n    b: x | y\n", ["a: x | y = (2)"]),
        ("'é'; x = (1 +\n    y)\n", ["'é'; x = ((2) +", "'é'; x = ((1 - y))"]),
    ],
)
def test_changes_of_statements(source: str, expected: list[str]) -> None:
    changed = [mutant.apply(source.encode()).decode() for mutant in find_mutants(source)]
    assert len(changed) == len(expected)
    for part in expected:
        assert any(part in code for code in changed), part


def test_every_equivalent_mutant_exists() -> None:
    for path, code, change in read_equivalent():
        mutants = find_mutants((ROOT / path).read_text(encoding="utf-8"))
        assert (code, change) in {(mutant.code, str(mutant)) for mutant in mutants}, path
