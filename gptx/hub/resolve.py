"""Where a model's files come from: the package itself, a folder, or the Hugging Face Hub.

`locate` turns a name into paths; it opens no tensor. What comes from the Hub is the business of
`hub_cache.py`, which is imported only when a name leads there.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptx.errors import GptxError, NotFoundError, ParameterError, StorageError, WeightsError
from gptx.tokenization.bpe import FILES as TOKENIZER

if TYPE_CHECKING:
    from gptx.hub.download import Repository

EMBEDDED: dict[str, Path] = {"shakespeare": Path(__file__).parents[1] / "embedded" / "shakespeare"}

_OPENAI = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}
ALIASES: dict[str, str] = {
    **{name: f"openai-community/{name}" for name in _OPENAI},
    **{size: f"openai-community/{name}" for name, size in _OPENAI.items()},
    "distilgpt2": "distilbert/distilgpt2",
}

# No "..", no slash at an end: a revision becomes a path in the cache.
_REVISION = re.compile(r"(?!/)(?!.*\.\.)[^\s\\:\0]+(?<!/)")
# No separator, no leading dot: a shard is a file beside its index.
_PLAIN_NAME = re.compile(r"(?!\.)[\w.+=@-]+")


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model, as `locate` found them.

    Attributes
    ----------
    name
        An embedded name, a folder's path, or a Hub id.
    folder
        Where the files lie.
    config
        config.json.
    weights
        The safetensors file, or its shards in the order of the index; empty if not asked for.
    tokenizer
        Name -> path of those of tokenizer.json, vocab.json and merges.txt that exist.
    revision
        Commit hash of a Hub snapshot; None for an embedded model or a folder.
    """

    name: str
    folder: Path
    config: Path
    weights: tuple[Path, ...]
    tokenizer: dict[str, Path]
    revision: str | None


def locate(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    offline: bool = False,
    token: str | None = None,
    weights: bool = True,
    verify_cached: bool = False,
) -> ModelFiles:
    """Find the files of a model; download those that the cache does not hold.

    Parameters
    ----------
    model
        An embedded name (`EMBEDDED`), a folder, an alias (`ALIASES`) or a Hub id, tried in this
        order.
    revision
        Branch, tag or commit of a Hub model; "main" if None. All files come from one commit.
    offline
        Use the cache alone and open no connection; `HF_HUB_OFFLINE=1` does the same.
    token
        For private and gated models; `HF_TOKEN` or the saved login if None.
    weights
        Also find the weights, not only the config and the tokenizer.
    verify_cached
        Hash files that are already in the cache, too, and fetch the damaged ones again.

    Returns
    -------
    ModelFiles
        Paths; every file that was downloaded by this call has the hash that the Hub promised.

    Raises
    ------
    ParameterError
        `model` is empty, or `revision` was given for a model that has none.
    NotFoundError
        No such folder, repository, revision or file; or it is not cached, and gptx is offline.
    AuthorizationError
        The model is gated, or the token may not read it.
    HubUnavailableError
        No connection, a cut connection, too many requests, or an error of the Hub.
    IntegrityError
        A file is not what the Hub promised. It was not put into the cache.
    StorageError
        The disk is full, or the cache cannot be read or written.
    WeightsError
        The index of a sharded model is damaged.
    """
    try:
        name = os.fspath(model)
    except TypeError:
        name = ""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ParameterError(f"model is {model!r}, expected {_expected()}")
    if isinstance(model, str) and name in EMBEDDED:
        return _collect(_Folder(name, EMBEDDED[name], revision), weights)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return _collect(_Folder(name, Path(path).absolute(), revision), weights)
    if os.path.exists(path) and name not in ALIASES:
        raise NotFoundError(f"{name!r} is a file, expected {_expected()}")
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_like_path or not isinstance(model, str):
        raise NotFoundError(f"folder {name!r} does not exist, expected {_expected()}")
    if revision is not None and not (isinstance(revision, str) and _REVISION.fullmatch(revision)):
        raise ParameterError(f"revision is {revision!r}, expected a branch, a tag or a commit hash")
    if token is not None and not isinstance(token, str):
        raise ParameterError(f"token is a {type(token).__name__}, expected a string")
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise ParameterError(
            "token holds a space, a line end or a non-ASCII character: copy it again"
        )

    with importing_hub():
        from gptx.hub.download import Repository, is_repository_name
    repository = ALIASES.get(name, name)
    if not is_repository_name(repository):
        raise NotFoundError(f"there is no model {name!r}, expected {_expected()}")
    source = Repository(repository, revision or "main", offline, token or None, verify_cached)
    files = _collect(source, weights)
    source.write_ref()
    return files


@contextmanager
def importing_hub() -> Iterator[None]:
    """Around an import of what imports huggingface_hub, which reads its settings then.

    Raises
    ------
    ParameterError
        One of them cannot be read.
    """
    try:
        with redirect_stdout(sys.stderr):  # where huggingface_hub's own words belong
            yield
    except ValueError as error:
        raise ParameterError(
            f"an HF_ environment variable is no good ({error}): correct or unset it"
        ) from error


def _expected() -> str:
    names = ", ".join(EMBEDDED)
    return f"an embedded name ({names}), a folder, or a Hub id such as openai-community/gpt2"


class _Folder:
    """A model in a folder; it has the interface of a `Repository`."""

    revision = None

    def __init__(self, name: str, folder: Path, revision: str | None) -> None:
        if revision is not None:
            raise ParameterError(f"revision is {revision!r}, but {name!r} is not from the Hub")
        self.name, self.folder = name, folder

    def find(self, filename: str) -> Path | None:
        """Path of a file, or None if it is absent."""
        path = self.folder / filename
        return path if os.path.isfile(path) else None

    def need(self, filename: str) -> Path:
        """Path of a file that has to be there."""
        if path := self.find(filename):
            return path
        raise NotFoundError(
            f"{filename} is missing in folder {self.folder}: expected config.json and "
            "model.safetensors (or its index and every shard that it names)"
        )

    def no_weights(self) -> GptxError:
        """What to raise if there is no safetensors file."""
        if found := sorted(self.folder.glob("*.bin*")):
            return NotFoundError(
                f"folder {self.folder} holds {found[0].name} and no safetensors: "
                f"run `gptx convert {self.folder} DST` to make safetensors of it"
            )
        return NotFoundError(
            f"model.safetensors is missing in folder {self.folder}: fetch it, or make it "
            f"from weights of another format with `gptx convert {self.folder} DST`"
        )


def _collect(source: _Folder | Repository, weights: bool) -> ModelFiles:
    config = source.need("config.json")
    tokenizer: dict[str, Path] = {}
    for name in TOKENIZER:
        if "tokenizer.json" in tokenizer and source.revision is not None:
            break  # it says all that the other two say: spare the download
        if path := source.find(name):
            tokenizer[name] = path
    return ModelFiles(
        name=source.name,
        folder=config.parent,
        config=config,
        weights=_weights(source) if weights else (),
        tokenizer=tokenizer,
        revision=source.revision,
    )


def _weights(source: _Folder | Repository) -> tuple[Path, ...]:
    if single := source.find("model.safetensors"):
        return (single,)
    if index := source.find("model.safetensors.index.json"):
        return tuple(source.need(shard) for shard in shard_names(index))
    raise source.no_weights()


def shard_names(index: Path) -> list[str]:
    """File names of an index, each once, in its order. They come from outside: trust none."""
    try:
        names = list(json.loads(index.read_bytes())["weight_map"].values())
    except OSError as error:
        raise StorageError(f"cannot read {index}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WeightsError(
            f'{index} is not JSON with an object "weight_map": fetch the model again'
        ) from None
    for name in names:
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise WeightsError(f"{index} names shard {name!r}, expected a file name without a path")
    if not names:
        raise WeightsError(f'{index} has an empty "weight_map": fetch the model again')
    return list(dict.fromkeys(names))
