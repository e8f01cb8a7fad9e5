"""What the house plan promises of the package as a whole."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import gptx

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"gptx": "gptx", "backends": "gptx.backends", "conversions": "gptx.conversions"}
SOURCES = {
    ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]).removesuffix(
        ".__init__"
    ): path
    for folder, package in PACKAGES.items()
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports(path: Path) -> set[str]:
    """The gptx modules that a file imports when it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(SOURCES)


def test_import_is_lazy() -> None:
    heavy = "numpy cupy mlx numba huggingface_hub tokenizers safetensors matplotlib click"
    code = f"import sys, gptx; print([m for m in {heavy.split()} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_checkout_is_importable_where_it_lies() -> None:
    """As for someone who installed without -e and starts Python in the folder of the clone."""
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)];"
        "import gptx, gptx.conversions; print(gptx.__file__, gptx.get_backend().name)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert out.stdout.split() == [str(ROOT / "gptx" / "__init__.py"), "numpy"]


def test_loading_imports_no_other_backend() -> None:
    code = (
        "import sys, gptx; gptx.load('shakespeare');"
        "print([m for m in ('cupy', 'mlx', 'huggingface_hub', 'tokenizers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", gptx.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(gptx, name) is not None
    assert name in dir(gptx)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = gptx.nonsense


def test_no_circle_of_imports() -> None:
    edges = {name: imports(path) - {name} for name, path in SOURCES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for other in edges[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())
    assert done == set(SOURCES)


# The rooms from the ground up: a file imports from lower ones, and its own room, alone.
RANKS = [
    {"gptx._version", "gptx.errors", "gptx.embedded"},
    {"gptx.files", "gptx.quantization"},
    {"gptx.config"},
    {"gptx.backends"},
    {"gptx.kv_cache", "gptx.generation.sampling", "gptx.tokenization.bpe", "gptx.weights"},
    {"gptx.hub.resolve", "gptx.hub.download", "gptx.hub.errors", "gptx.hub.upload", "gptx.model"},
    {"gptx.generation.engine"},
    {"gptx.generation.options"},
    {"gptx.generation.results"},
    {"gptx.generation.streaming", "gptx.generation.scoring"},
    {"gptx.conversions", "gptx.generation.api"},
    {"gptx.bench"},
    {"gptx.cli"},
]
ALONE = {
    "gptx.kv_cache",
    "gptx.generation.sampling",
    "gptx.tokenization.bpe",
    "gptx.weights",
}  # of those, no arrows


def rank(module: str) -> int:
    for i, names in enumerate(RANKS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return i
    raise AssertionError(f"{module} has no room")


def test_arrows_run_one_way() -> None:
    for name, path in SOURCES.items():
        for other in imports(path) - {name}:
            if name != "gptx" and other != "gptx":  # whose own imports are for type checkers
                assert rank(other) <= rank(name), f"{name} imports {other}"
                assert not (name in ALONE and other in ALONE), f"{name} imports {other}"


@pytest.mark.parametrize("name", SOURCES)
def test_files_are_short_and_importable(name: str) -> None:
    lines = SOURCES[name].read_text().splitlines()
    assert len(lines) <= (150 if name == "gptx.model" else 400)
    if not name.startswith(("gptx.backends.cuda", "gptx.backends.mlx")):  # which need the library
        module = importlib.import_module(name)
        assert module.__doc__


def test_tests_and_benchmarks_are_short_too() -> None:
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert len(files) > 20
    assert [f.name for f in files if len(f.read_text().splitlines()) > 400] == []


def test_the_embedded_model_is_small() -> None:
    folder = ROOT / "gptx" / "embedded" / "shakespeare"
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    assert 5e6 < size <= 6e6
