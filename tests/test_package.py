"""The promises of the package as a whole: its tree, its imports, its prose."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import lru_cache
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

# Rooms, from the ground up: a module imports from lower rows, and from its own room. Rooms of one
# row never import each other. The longest prefix of a module's name is its room.
ROOMS = [
    "gptx._version gptx.errors gptx.embedded",
    "gptx.file_lock gptx.files gptx.html gptx.lfs_pointer gptx.plot_style gptx.process "
    "gptx.safetensors_file gptx.quantization",
    "gptx.config gptx.tokenization gptx.dequantization",
    "gptx.random_weights gptx.model_files gptx.tensor_names",
    "gptx.backends.positions",
    "gptx.backends.base gptx.backends.philox",
    "gptx.backends.graph gptx.backends.gradients",
    "gptx.backends.fusion gptx.backends.replay",
    "gptx.backends.backward",
    "gptx.backends.cpu gptx.backends.cuda gptx.backends.mlx_training",
    "gptx.backends.mlx_backend",
    "gptx.backends",
    "gptx.stored_weights gptx.hub",
    "gptx.safetensors_weights",
    "gptx.weights gptx.kv_cache",
    "gptx.model",
    "gptx.logits gptx.hooks",
    "gptx.conversions.containers",
    "gptx.conversions.vocabularies",
    "gptx.conversions.checkpoint",
    "gptx.conversions.formats gptx.conversions.verify",
    "gptx.conversions.registry",
    "gptx.conversions.reading",
    "gptx.conversions.converter",
    "gptx.conversions",
    "gptx.generation.checks",
    "gptx.generation.params gptx.generation.filters gptx.generation.history "
    "gptx.generation.logprobs",
    "gptx.generation.sampling",
    "gptx.generation.names gptx.generation.prompts",
    "gptx.generation.options",
    "gptx.generation.results",
    "gptx.generation.sequences gptx.generation.slots",
    "gptx.generation.batching",
    "gptx.generation.engine",
    "gptx.generation.streaming gptx.generation.scoring gptx.generation.suggested",
    "gptx.generation.model_info",
    "gptx.generation.request",
    "gptx.generation.found_model gptx.generation.text_model",
    "gptx.generation.api",
    "gptx.generation",
    "gptx.training.data",
    "gptx.training.schedule gptx.training.loss_scale gptx.training.optimizers "
    "gptx.training.initialization gptx.training.callbacks gptx.training.deferral",
    "gptx.training.settings",
    "gptx.training.state gptx.training.parameters",
    "gptx.training.checkpoint gptx.training.llm_c_state",
    "gptx.training.trainer",
    "gptx.training.reports",
    "gptx.training.api",
    "gptx.training",
    "gptx.research.inputs",
    "gptx.research.activations",
    "gptx.research.attribution gptx.research.interventions gptx.research.lens "
    "gptx.research.patching",
    "gptx.research.differentiation",
    "gptx.research",
    "gptx.server.errors gptx.server.settings",
    "gptx.server.api.fields gptx.server.inbox gptx.server.keys gptx.server.logs",
    "gptx.server.origins",
    "gptx.server.states gptx.server.api.templates",
    "gptx.server.api.parameters gptx.server.api.openapi gptx.server.api.writing",
    "gptx.server.scheduler",
    "gptx.server.models gptx.server.streams",
    "gptx.server.api.calls gptx.server.metrics",
    "gptx.server.api.completions gptx.server.api.embeddings gptx.server.gate",
    "gptx.server.api.chat gptx.server.api.inference",
    "gptx.server.api.tokens",
    "gptx.server.app",
    "gptx.server.uploads.stored_models",
    "gptx.server.uploads.model_check gptx.server.uploads.protocol",
    "gptx.server.uploads.store gptx.server.uploads.client",
    "gptx.server.uploads.routes",
    "gptx.server.replicas.upstream gptx.server.replicas.balancing",
    "gptx.server.replicas.process",
    "gptx.server.replicas.front gptx.server.listener",
    "gptx.server",
    "gptx.cluster.items gptx.cluster.in_process",
    "gptx.cluster.results",
    "gptx.cluster.runner",
    "gptx.cluster",
    "gptx.bench",
    "gptx",  # the lazy public names
    "gptx.cli",
    "gptx.__main__",
]
RANK = {room: i for i, rooms in enumerate(ROOMS) for room in rooms.split()}

# Rooms that may import from these rooms only, whatever their rank is.
ONLY = {
    "gptx.hub": "gptx.tokenization gptx.model_files gptx.embedded gptx.files gptx.file_lock "
    "gptx.errors gptx._version",
    "gptx.conversions.containers": "gptx.files gptx.safetensors_file gptx.errors",
    "gptx.backends.base": "gptx.backends.positions gptx.quantization gptx.errors gptx.process",
}


def room(module: str) -> str:
    """The longest prefix of a module's name that is a room."""
    found = [name for name in RANK if module == name or module.startswith(f"{name}.")]
    return max(found, key=len)


def imported(nodes: Iterator[ast.AST] | list[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = names & set(SOURCES)
            # `from package import module` needs the module; the package's own names, the package.
            found |= modules if len(modules) == len(names) else modules | {node.module}
    return found & set(SOURCES)


@lru_cache
def imports(path: Path, *, lazy: bool) -> set[str]:
    """The modules that a file imports: at import and for type checkers, or also in functions."""
    tree = ast.parse(path.read_text("utf-8"))
    if lazy:
        return imported(ast.walk(tree))
    nodes: list[ast.AST] = []
    for node in tree.body:
        nodes += ast.walk(node) if isinstance(node, ast.If | ast.Try | ast.With) else [node]
    return imported(nodes)


def test_import_is_lazy() -> None:
    heavy = (
        "numpy cupy mlx numba huggingface_hub tokenizers safetensors matplotlib click starlette "
        "uvicorn prometheus_client"
    )
    code = f"import sys, gptx; print([m for m in {heavy.split()} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_checkout_is_importable_without_installation() -> None:
    """Like after an installation without -e, with Python started in the folder of the clone."""
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
def test_public_names_exist(name: str) -> None:
    assert getattr(gptx, name) is not None
    assert name in dir(gptx)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = gptx.nonsense


def test_the_wheel_has_every_package() -> None:
    """A package that pyproject.toml does not list is missing from the wheel without an error."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    tree = {name for name, path in SOURCES.items() if path.name == "__init__.py"}
    assert set(settings["tool"]["setuptools"]["packages"]) == tree
    for path in [p for p in SOURCES.values() if p.name != "__init__.py"]:
        assert path.with_name("__init__.py").is_file(), path


def test_imports_have_no_circles() -> None:
    """Imports for type checkers count; lazy imports inside functions do not."""
    edges = {name: imports(path, lazy=False) - {name} for name, path in SOURCES.items()}
    edges["gptx"] = set()  # its public names are lazy
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


def test_arrows_run_one_way() -> None:
    """Lazy imports inside functions count too."""
    wrong = []
    for name, path in SOURCES.items():
        own = room(name)
        for other in imports(path, lazy=True) - {"gptx"}:
            its = room(other)
            allowed = its == own or RANK[its] < RANK[own]
            if own in ONLY:
                allowed = its == own or its in ONLY[own].split()
            if not allowed:
                wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", SOURCES)
def test_modules_are_importable(name: str) -> None:
    if name.startswith(("gptx.backends.cuda.", "gptx.backends.mlx")):
        pytest.skip("the tests of that backend import it, with its library")
    assert importlib.import_module(name).__doc__


def test_no_docstring_begins_with_a_relative_clause() -> None:
    first = re.compile(r"\s*(What|Who|Whose|Whether|Where|Which)\b")
    wrong = []
    folders = [*PACKAGES, "tests", "benchmarks"]
    for path in [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]:
        text = path.read_text("utf-8")
        if not re.search(rf'"""{first.pattern}', text):  # parsing all files takes seconds
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                docstring = ast.get_docstring(node, clean=False)
                if docstring and first.match(docstring):
                    wrong.append(f"{path.relative_to(ROOT)}: {docstring.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


def test_large_folders_have_a_readme() -> None:
    missing = []
    for folder in [*PACKAGES, "benchmarks"]:
        for path in [ROOT / folder, *(ROOT / folder).rglob("*/")]:
            files = [p for p in path.glob("*") if p.suffix in (".py", ".cu", ".cuh")]
            count = len([p for p in files if p.name != "__init__.py"])
            if count > 5 and not (path / "README.md").is_file() and path != ROOT / "gptx":
                missing.append(str(path.relative_to(ROOT)))
    assert not missing


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.split()) <= 1000
    assert max(map(len, text.splitlines())) <= 100


def test_the_embedded_model_is_small() -> None:
    folder = ROOT / "gptx" / "embedded" / "shakespeare"
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    assert 5e6 < size <= 6e6
