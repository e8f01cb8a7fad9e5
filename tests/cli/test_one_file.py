"""gptx in one file, built by the command in gptx/cli/README.md; needs pex."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cli import GENERATE, run
from tests.support.permissions import obey_permissions

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "gptx", "backends", "conversions")
README = ROOT / "gptx" / "cli" / "README.md"

pytestmark = pytest.mark.pyz


@pytest.fixture(scope="module")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the documented command builds, in a copy of the checkout."""
    found = re.findall(r"^    (pex .*)$", README.read_text("utf-8"), re.MULTILINE)
    assert len(found) == 1
    checkout = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, checkout / name)
    pex, *options = shlex.split(found[0])
    program = shutil.which(pex, path=os.path.dirname(sys.executable)) or shutil.which(pex)
    assert program is not None, "pex is not installed (pip install pex)"
    done = subprocess.run([program, *options], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return checkout / "gptx.pyz"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder, in which the file is unpacked once."""
    return tmp_path_factory.mktemp("home")


def start(
    one_file: Path,
    home: Path,
    folder: Path,
    *args: str,
    before: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python gptx.pyz args` in another folder, with no variables but the home folder."""
    return subprocess.run(
        [sys.executable, "-I", str(one_file), *args],
        cwd=folder,
        env={"HOME": str(home), "PATH": os.defpath},
        capture_output=True,
        text=True,
        preexec_fn=before,
    )


def test_the_embedded_model(one_file: Path, home: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second one finds the unpacked file
        done = start(one_file, home, tmp_path, *GENERATE, "-q", "-n", "20", "ROMEO:")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == run(*GENERATE, "-q", "-n", "20", "ROMEO:").out
    assert list(tmp_path.iterdir()) == []


def test_errors_have_their_exit_code(one_file: Path, home: Path, tmp_path: Path) -> None:
    done = start(one_file, home, tmp_path, "generate", "-m", "./nothing", "ROMEO:")
    assert done.returncode == 66
    assert done.stderr.startswith("Error: ")


def test_kernels_are_compiled_once(one_file: Path, home: Path, tmp_path: Path) -> None:
    first, second = (start(one_file, home, tmp_path, "compile", "int4") for _ in range(2))
    assert re.fullmatch(r"int4: compiled in \d+ s\n", first.stdout), first.stderr
    assert second.stdout == "int4: is there\n"


def test_processes_that_it_starts_import_the_same_gptx(
    one_file: Path, home: Path, tmp_path: Path
) -> None:
    """The workers of `gptx bench`, and the replicas of a server."""
    options = ("--generic", "-p", "4", "-n", "0", "-r", "1", "-o", "jsonl")
    done = start(one_file, home, tmp_path, "bench", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt"] == 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="root obeys no permissions")
def test_a_read_only_home(one_file: Path, tmp_path: Path) -> None:
    """It is unpacked to a temporary folder, with a warning."""
    home, folder = tmp_path / "home", tmp_path / "folder"
    home.mkdir(mode=0o555)
    folder.mkdir()
    arguments = (*GENERATE, "-q", "-n", "5", "ROMEO:")
    done = start(one_file, home, folder, *arguments, before=obey_permissions)
    assert done.returncode == 0, done.stderr
    assert done.stdout == run(*arguments).out
    assert "un-writeable" in done.stderr
    assert list(home.iterdir()) == []
