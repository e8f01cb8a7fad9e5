"""Checkpoints: the folders of a run, written so that a crash at any point loses no checkpoint.

The output folder is a model folder with the best weights, which `gptx.load` and transformers read.
Its folder `last` has the last checkpoint: a model folder, the optimizer's arrays and the state. It
is replaced atomically, and before the best weights of the same step.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptx.config import GPT2Config
from gptx.errors import DataError, NotFoundError, ParameterError, StorageError, argument
from gptx.files import atomic_path, create
from gptx.model_files import CONFIG, WEIGHTS
from gptx.safetensors_file import SafetensorsFile, write_arrays
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.training.parameters import HostTensor, Read
from gptx.training.settings import TrainingSettings
from gptx.training.state import TrainingState

if TYPE_CHECKING:
    from gptx.conversions.checkpoint import Checkpoint

LAST = "last"
OPTIMIZER = "optimizer.safetensors"
STATE = "training.json"
DATA = "data"  # token files that `gptx.train` prepares
FIRST = (DATA, "log.jsonl")  # written before the first checkpoint
VERSION = 1
MAX_STATE_BYTES = 2**24
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}(\.old)?")


@dataclass(frozen=True)
class StoredRun:
    """A checkpoint in its folder.

    Attributes
    ----------
    folder
        Path of `last`.
    config
        Config of the model.
    tokenizer
        Tokenizer of the model; None without one.
    settings, state
        Settings of the run, and its state.
    data
        Facts of the data, see `gptx.training.data.windows.TrainingData.describe`.
    backend, dtype
        Name of the backend, and type of the activations.
    source
        Arguments with which the data were opened; empty if the caller made them.
    """

    folder: Path
    config: GPT2Config
    tokenizer: PipelineTokenizer | None
    settings: TrainingSettings
    state: TrainingState
    data: Mapping[str, Any]
    backend: str
    dtype: str
    source: Mapping[str, Any]

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield name and array of each weight, with the precision of the run."""
        exact, stored = self.moments().get("weights", {}), SafetensorsFile(self.folder / WEIGHTS)
        for name in self.config.tensor_shapes():
            yield name, exact[name]() if name in exact else stored.read(name)

    def moments(self) -> dict[str, dict[str, Read]]:
        """Return kind ("m") -> name of a weight -> function that reads an array of the optimizer.

        Raises
        ------
        WeightsError
            The file is damaged.
        """
        file = SafetensorsFile(self.folder / OPTIMIZER)
        found: dict[str, dict[str, Read]] = {}
        for stored_name in file.entries:
            kind, _, name = stored_name.partition(".")
            found.setdefault(kind, {})[name] = partial(file.read, stored_name)
        return found


def check_output(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Check that a run may write a folder, before any work, and make the folder.

    A folder belongs to gptx if it is missing, empty or has a checkpoint.

    Raises
    ------
    ParameterError
        The folder has other files; it has a run, and neither `resume` nor `overwrite` is set; or
        both are.
    NotFoundError
        There is no run to resume.
    StorageError
        The folder cannot be made or written.
    """
    if resume and overwrite:
        raise ParameterError(
            f"{argument('resume', True)} continues a run and {argument('overwrite', True)} "
            "replaces it: give one of them"
        )
    _restore_last(folder)
    state = folder / LAST / STATE
    if resume:
        if not state.is_file():
            raise NotFoundError(
                f"{folder} has no run to resume ({state} is missing): give the folder of a run, "
                f"or leave out {argument('resume')}"
            )
    elif state.is_file():
        if not overwrite:
            raise ParameterError(
                f"{folder} has a run already: continue it with {argument('resume', True)}, "
                f"replace it with {argument('overwrite', True)}, or give another "
                f"{argument('output')}"
            )
    elif folder.is_dir():
        others = [p.name for p in folder.iterdir() if p.name not in FIRST and not _is_temporary(p)]
        if others:
            raise ParameterError(
                f"{folder} is not the folder of a run, it has {min(others)}: give a new or an "
                f"empty {argument('output')}"
            )
    elif folder.exists() or folder.is_symlink():
        raise ParameterError(f"{folder} is a file, expected the name of a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder} cannot be made ({error.strerror or error})") from error
    if not os.access(folder, os.W_OK):
        raise StorageError(f"{folder} cannot be written (it is read-only)")


def _restore_last(folder: Path) -> None:
    """Rename the last checkpoint back, after a crash within an exchange by three renames.

    `gptx.files.exchange` needs them where the system cannot exchange two folders.
    """
    if not (folder / LAST).exists():
        for path in folder.glob(f".{LAST}.*.old"):
            with suppress(OSError):
                path.rename(folder / LAST)
                return


def _is_temporary(path: Path) -> bool:
    """Test for a file or folder that an ended process left of `gptx.files.atomic_path`."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_leftovers(folder: Path, *, overwrite: bool) -> None:
    """Remove what an ended process left, and the best weights of a run that is replaced.

    Without those, the folder cannot mix files of two runs.
    """
    for path in [p for p in folder.iterdir() if _is_temporary(p)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
    if overwrite:
        with suppress(FileNotFoundError), _storage_errors(folder / WEIGHTS):
            (folder / WEIGHTS).unlink()


def write_last(
    folder: Path,
    checkpoint: Checkpoint,
    moments: Mapping[str, HostTensor],
    record: Mapping[str, Any],
) -> Path:
    """Write the last checkpoint of a run atomically; return its folder.

    Parameters
    ----------
    folder
        Output folder of the run.
    checkpoint
        The model, whose weights are written as float32.
    moments
        Name such as "m.wte.weight" -> array of the optimizer.
    record
        Contents of training.json.

    Raises
    ------
    StorageError
        The disk is full, or the folder cannot be written; the older checkpoint stays.
    """
    from gptx.conversions.formats import hugging_face

    with atomic_path(folder / LAST) as temporary:
        temporary.mkdir()
        hugging_face.write(checkpoint, temporary, dtype="float32")
        with create(temporary / OPTIMIZER) as file:
            layout = {name: (x.dtype, x.shape) for name, x in moments.items()}
            write_arrays(file, layout, (x.read() for x in moments.values()), {})
        with create(temporary / STATE) as file:
            file.write((json.dumps({"version": VERSION, **record}, indent=2) + "\n").encode())
    return folder / LAST


def publish(folder: Path) -> None:
    """Make the last checkpoint the best one: link its weights into the folder, copy the rest.

    Weights are last, so a folder without them is the only incomplete one.

    Raises
    ------
    StorageError
        A file cannot be written; the older one stays.
    """
    own = (OPTIMIZER, STATE)
    with _storage_errors(folder):
        names = sorted(p.name for p in (folder / LAST).iterdir() if p.name not in own)
        for name in [n for n in names if n != WEIGHTS] + [WEIGHTS]:
            source, path = folder / LAST / name, folder / name
            if path.is_file() and (path.samefile(source) or _is_same(path, source, name)):
                continue
            with atomic_path(path) as temporary:
                if name == WEIGHTS:
                    _link(source, temporary)
                else:
                    shutil.copyfile(source, temporary)


def _is_same(path: Path, source: Path, name: str) -> bool:
    return name != WEIGHTS and path.read_bytes() == source.read_bytes()


def _link(source: Path, path: Path) -> None:
    """Link a file, which is never changed in place; copy it where links do not exist."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (StorageError, FileNotFoundError):
        raise
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror or error})") from error


def read_last(folder: Path) -> StoredRun:
    """Open the last checkpoint of a run.

    Raises
    ------
    DataError
        The checkpoint is damaged, or of a newer gptx.
    NotFoundError, StorageError
        A file is missing or cannot be read.
    """
    last = folder / LAST
    path = last / STATE
    try:
        is_small = path.stat().st_size <= MAX_STATE_BYTES
        record = json.loads(path.read_bytes()) if is_small else {}
        if record["version"] != VERSION:
            raise ValueError
        settings = TrainingSettings.from_dict(record["settings"])
        state = TrainingState.from_dict(record["state"])
        data, source = dict(record["data"]), dict(record["source"])
        backend, dtype = str(record["backend"]), str(record["dtype"])
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist, expected the folder of a run") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, LookupError, TypeError, RecursionError):
        raise DataError(
            f"{path} is damaged, or of another version of gptx: expected version {VERSION}; "
            f"start a new run from its weights, with {argument('init', str(last))}"
        ) from None
    config, tokenizer = GPT2Config.from_file(last / CONFIG), PipelineTokenizer.of_folder(last)
    return StoredRun(last, config, tokenizer, settings, state, data, backend, dtype, source)
