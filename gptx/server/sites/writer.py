"""A static site with a model: the page of `gptx serve`, computing in the browser.

    DIR/index.html, DIR/page/    the page, with `wasm_engine.js` as its engine
    DIR/ort/                     onnxruntime-web
    DIR/model/model.json         sizes of the model, and the pieces of its files
    DIR/model/*.bin              pieces: graphs, weights, tokenizer
    DIR/_headers                 the headers that threads need, for hosts that read such a file

A piece is named after its SHA-256: a browser keeps it as long as the model has it, and a download
that broke off continues after its last complete piece.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from gptx._version import __version__
from gptx.config import GPT2Config
from gptx.conversions import read
from gptx.conversions.checkpoint import Array, Checkpoint, float_array
from gptx.conversions.containers.binary import write_array
from gptx.conversions.converter import Progress, with_progress
from gptx.conversions.formats.onnx_folder import ALIGNMENT_BYTES, import_tracer, refer_to_data
from gptx.errors import ParameterError, StorageError, TokenizerError, argument
from gptx.files import atomic_path, check_replaceable, create
from gptx.server.sites.onnx_runtime_web import read_runtime
from gptx.tokenization.byte_level import byte_of_letter
from gptx.tokenization.saving import is_gpt2

DTYPES = ("float32", "float16")
PIECE_BYTES = 2**24  # a browser reads a cut download again from the last piece on
NAME_DIGITS = 32  # of the SHA-256 of a piece

INDEX, MANIFEST = "index.html", "model/model.json"
SERVER_ENGINE, WASM_ENGINE = "server_engine.js", "wasm_engine.js"
POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; "
    "style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'"
)
# Threads share memory, which a page has only with the first two headers.
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def make_site(
    source: str,
    folder: str | Path,
    *,
    ort: Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Checkpoint:
    """Write a static site that runs a model in the browser.

    Parameters
    ----------
    source
        A model of any format, see `gptx.conversions.read`.
    folder
        The folder to write, atomically: it does not exist, is empty, or is a site (`overwrite`).
    ort
        Folder of onnxruntime-web; None: npm fetches it.
    dtype
        Type that the files store, "float32" or "float16"; the browser computes in float32. None:
        float16 for tensors of that type in the source, float32 for the others.
    overwrite
        Replace a site.
    progress
        See `gptx.conversions.convert`.
    **options
        config, tokenizer, ignore_unknown, revision, offline: see `gptx.conversions.read`.

    Returns
    -------
    Checkpoint
        The model.

    Raises
    ------
    ParameterError
        An option is invalid, or the folder exists.
    TokenizerError
        The tokenizer is no byte-level BPE as that of GPT-2.
    BackendError, NotFoundError, HubUnavailableError, StorageError
        A package, a program or a file is missing, or cannot be read or written.
    """
    folder = Path(folder).expanduser()
    _check_destination(folder, overwrite)
    if dtype not in (None, *DTYPES):
        raise ParameterError(
            f"{argument('dtype')} is {dtype!r}, expected one of {', '.join(DTYPES)}"
        )
    checkpoint = read(source, **options)[1].as_floats()
    tokenizer = _tokenizer_definition(checkpoint)
    runtime = read_runtime(ort)
    if progress is not None:
        checkpoint = with_progress(checkpoint, progress)
    with atomic_path(folder) as path:
        for part in (path, path / "model", path / "ort", path / "page"):
            part.mkdir()
        manifest = {
            "name": Path(source).name,
            "gptx": __version__,
            "config": _sizes(checkpoint.config),
            "end_ids": list(checkpoint.config.eos_token_ids),
            "files": _write_model(checkpoint, tokenizer, path / "model", dtype),
        }
        _write(path / MANIFEST, json.dumps(manifest, indent=1).encode())
        for name, data in runtime.items():
            _write(path / "ort" / name, data)
        _write_page(path)
    return checkpoint


def _check_destination(folder: Path, overwrite: bool) -> None:
    check_replaceable(folder)
    if not folder.absolute().parent.is_dir():
        raise StorageError(f"{folder} cannot be written (its folder does not exist)")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ParameterError(f"{folder} is a file, expected the name of a folder")
    if not any(folder.iterdir()):
        return
    if not (folder / MANIFEST).is_file():
        raise ParameterError(
            f"folder {folder} has files that are no site of gptx and would be lost: give another "
            "folder"
        )
    if not overwrite:
        raise ParameterError(
            f"{folder} already exists: give another name, or {argument('overwrite', True)}"
        )


def _tokenizer_definition(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return what `tokenizer.js` reads of a tokenizer.json; None for a model without a tokenizer.

    Raises
    ------
    TokenizerError
        `tokenizer.js` would give other ids.
    """
    if checkpoint.tokenizer is None:
        return None
    definition = checkpoint.tokenizer.definition()
    model, added = definition["model"], definition["added_tokens"]
    if (
        not is_gpt2(definition)
        or definition["pre_tokenizer"]["add_prefix_space"]
        or not all(token["special"] for token in added)
        or not all(letter in model["vocab"] for letter in byte_of_letter())
    ):
        raise TokenizerError(
            "the page has byte-level BPE as GPT-2 has it: no prefix space, no added tokens but "
            f"special ones. This tokenizer is another one: give {argument('tokenizer')}, or use "
            "`gptx serve`"
        )
    return {
        "model": {"vocab": model["vocab"], "merges": model["merges"]},
        "added_tokens": [{"id": token["id"], "content": token["content"]} for token in added],
    }


def _sizes(config: GPT2Config) -> dict[str, int]:
    names = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    return {name: getattr(config, name) for name in names}


def _write_model(
    checkpoint: Checkpoint, tokenizer: dict[str, Any] | None, folder: Path, dtype: str | None
) -> dict[str, list[dict[str, Any]]]:
    """Write the pieces of graphs, weights and tokenizer; return the pieces of each file."""
    graphs = import_tracer("gptx.server.sites.graphs")
    config = checkpoint.config
    dtypes = {n: dtype or _stored_type(tensor.dtype) for n, tensor in checkpoint.stored.items()}
    lens = graphs.lens_weights(config)
    step_graph, lens_graph = graphs.step_graph(config, dtypes), graphs.lens_graph(config, dtypes)
    weights = {"head": Pieces(folder), "body": Pieces(folder)}  # the lens reads the head only
    for name, tensor in checkpoint.tensors.items():
        location = "head" if name in lens else "body"
        place = weights[location].add_tensor(name, float_array(tensor), dtypes[name])
        refer_to_data(step_graph.graph, name, location, *place)
        if name in lens:
            refer_to_data(lens_graph.graph, name, location, *place)
    written = {name: pieces.close() for name, pieces in weights.items()}
    others = {
        "step": step_graph.SerializeToString(deterministic=True),
        "lens": lens_graph.SerializeToString(deterministic=True),
    }
    if tokenizer is not None:
        others["tokenizer"] = json.dumps(tokenizer, ensure_ascii=False).encode()
    for name, data in others.items():
        pieces = Pieces(folder)
        pieces.write(data)
        written[name] = pieces.close()
    return written


def _stored_type(dtype: Any) -> str:
    return "float16" if dtype == "float16" else "float32"


class Pieces:
    """A file that is written as pieces of `PIECE_BYTES`, each named after its content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: list[dict[str, Any]] = []
        self.size = 0
        self.buffer = bytearray()

    def write(self, data: Any) -> None:
        """Append bytes."""
        view = memoryview(data).cast("B")
        self.size += len(view)
        while len(view):
            room = PIECE_BYTES - len(self.buffer)
            self.buffer += view[:room]
            view = view[room:]
            if len(self.buffer) == PIECE_BYTES:
                self._end_piece()

    def add_tensor(self, name: str, floats: Array, dtype: str) -> tuple[int, int]:
        """Append a tensor; return its offset and its length in bytes."""
        self.write(bytes(-self.size % ALIGNMENT_BYTES))
        begin = self.size
        write_array(self, floats, dtype, f"tensor {name}")
        return begin, self.size - begin

    def close(self) -> list[dict[str, Any]]:
        """Write the rest; return name and size of each piece."""
        if self.buffer:
            self._end_piece()
        return self.done

    def _end_piece(self) -> None:
        name = f"{hashlib.sha256(self.buffer).hexdigest()[:NAME_DIGITS]}.bin"
        if not (self.folder / name).exists():  # equal pieces are one file
            _write(self.folder / name, self.buffer)
        self.done.append({"name": name, "bytes": len(self.buffer)})
        self.buffer = bytearray()


def _write_page(folder: Path) -> None:
    """Write the files of the page, with the engine of the browser, and the headers."""
    for name, data in _page_files():
        if name == INDEX:
            _write(folder / INDEX, _index(data.decode()).encode())
        elif name != SERVER_ENGINE:
            _write(folder / "page" / name, data)
    lines = ["/*", *(f"  {name}: {value}" for name, value in HEADERS.items())]
    _write(folder / "_headers", ("\n".join(lines) + "\n").encode())


def _page_files() -> Iterator[tuple[str, bytes]]:
    for file in (files("gptx.server") / "page").iterdir():
        if file.name.endswith((".html", ".css", ".js", ".svg")):
            yield file.name, file.read_bytes()


def _index(page: str) -> str:
    """Return the page with the engine of the browser, and the policy that a server would send."""
    charset = '<meta charset="utf-8" />'
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}" />'
    return _replace(_replace(page, SERVER_ENGINE, WASM_ENGINE), charset, f"{charset}\n    {policy}")


def _replace(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old} is {text.count(old)} times in the page"
    return text.replace(old, new)


def _write(path: Path, data: bytes | bytearray) -> None:
    with create(path) as file:
        file.write(data)
