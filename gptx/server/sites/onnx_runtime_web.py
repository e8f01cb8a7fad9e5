"""The files of onnxruntime-web that a static site needs: from a folder, or from npm."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from gptx.errors import HubUnavailableError, NotFoundError, argument

PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"  # the one that the tests run
MODULE = "ort.wasm.min.mjs"
FILES = (MODULE, "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def read_runtime(folder: Path | None = None) -> dict[str, bytes]:
    """Return the contents of `FILES` by name.

    Parameters
    ----------
    folder
        The package, its `dist`, or a folder with `node_modules`. None: npm fetches `VERSION`.

    Raises
    ------
    NotFoundError
        The folder lacks a file, or npm is not installed.
    HubUnavailableError
        npm cannot fetch the package.
    """
    if folder is None:
        return _fetch()
    for place in (folder, folder / "dist", folder / "node_modules" / PACKAGE / "dist"):
        if (place / MODULE).is_file():
            missing = [name for name in FILES if not (place / name).is_file()]
            if missing:
                raise NotFoundError(f"{place} lacks {missing[0]}: expected {PACKAGE} {VERSION}")
            return {name: (place / name).read_bytes() for name in FILES}
    raise NotFoundError(
        f"{folder} has no {MODULE}: expected the npm package {PACKAGE} {VERSION}, unpacked"
    )


def _fetch() -> dict[str, bytes]:
    npm = shutil.which("npm")
    if npm is None:
        raise NotFoundError(
            f"npm, which fetches {PACKAGE}, is not installed: install Node.js, or unpack the "
            f"package {PACKAGE} {VERSION} and give its folder by {argument('ort')}"
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--silent", "--ignore-scripts", f"{PACKAGE}@{VERSION}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode != 0 or not archives:
            reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            raise HubUnavailableError(
                f"npm cannot fetch {PACKAGE} {VERSION} ({reason}): connect to the npm registry, "
                f"or give the folder of the package by {argument('ort')}"
            )
        with tarfile.open(archives[0]) as archive:
            return {name: _member(archive, f"package/dist/{name}") for name in FILES}


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, f"{name} is no regular file"
    return file.read()
