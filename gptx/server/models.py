"""The served models by name, each with its scheduler."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gptx.generation.options import check_options
from gptx.generation.request import Request
from gptx.generation.results import Chunk
from gptx.generation.text_model import Model
from gptx.server.errors import ApiError, Unavailable
from gptx.server.scheduler import Scheduler
from gptx.server.settings import Settings

Load = Callable[[], Model]
WARM_UP_TOKENS = 32  # of the prompt and of the output


class Store(Protocol):
    """A store of uploaded models."""

    def names(self) -> list[str]:
        """Return the names of the complete models."""

    def path(self, name: str) -> Path | None:
        """Return the file or folder of a complete model; None for an unknown name."""


@dataclass
class _Entry:
    """A model that can be served, and what became of it."""

    load: Load
    created: int = field(default_factory=lambda: int(time.time()))
    lock: threading.Lock = field(default_factory=threading.Lock)
    scheduler: Scheduler | None = None
    error: Exception | None = None


class Models:
    """The served models by name.

    A model is loaded by `setup`, at the first request at the latest.

    Parameters
    ----------
    settings
        Limits of the schedulers.
    store
        Store of uploaded models, or None.
    load
        Function that loads a path of the store.

    Attributes
    ----------
    default
        Name of the model of a request that names none: the first one.
    """

    def __init__(
        self,
        *,
        settings: Settings | None = None,
        store: Store | None = None,
        load: Callable[[Path], Model] | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.store = store
        self.default: str | None = None
        self._load_path = load
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def add(self, name: str, model: Model | Load) -> None:
        """Add a model, or the function that loads it; the first one is the default."""
        with self._lock:
            if isinstance(model, Model):
                loaded = model
                entry = _Entry(lambda: loaded)
                entry.scheduler = self._scheduler(loaded)
            else:
                entry = _Entry(model)
            self._entries[name] = entry
            self.default = self.default or name

    def _scheduler(self, model: Model) -> Scheduler:
        settings = self.settings
        return Scheduler(
            model,
            max_queue=settings.max_queue,
            max_running=settings.max_running,
            chunk_tokens=settings.chunk_tokens,
            prefix_bytes=settings.prefix_bytes,
        )

    def names(self) -> list[str]:
        """Return the names of all models, the default first."""
        stored = self.store.names() if self.store is not None else []
        return list(dict.fromkeys([*self._entries, *stored]))

    @property
    def loaded(self) -> Mapping[str, Scheduler]:
        """Schedulers of the models that are loaded, by name."""
        return {
            name: entry.scheduler
            for name, entry in list(self._entries.items())
            if entry.scheduler is not None
        }

    def created(self, name: str) -> int:
        """Return the time at which a model was added, in seconds since 1970."""
        entry = self._entries.get(name)
        return entry.created if entry is not None else 0

    def check_name(self, name: str | None) -> str:
        """Return the name of a model of a request, or the default.

        Raises
        ------
        ApiError
            There is no such model.
        """
        names = self.names()
        found = name if name is not None else (self.default or next(iter(names), None))
        if found is None or found not in names:
            known = ", ".join(names) or "none yet"
            raise ApiError(
                404,
                f"model {str(name)[:100]!r} does not exist, expected one of: {known}",
                param="model",
                code="model_not_found",
            )
        return found

    def get(self, name: str | None = None) -> Scheduler:
        """Return the scheduler of a loaded model; None is the default one.

        Raises
        ------
        ApiError
            There is no such model.
        Unavailable
            The model is not loaded.
        """
        found = self.check_name(name)
        entry = self._entries.get(found)
        if entry is None or entry.scheduler is None:
            if entry is not None and entry.error is not None:
                raise Unavailable(f"model {found} cannot be loaded: {entry.error}", "load_failed")
            raise Unavailable(f"model {found} is not loaded yet: try again later", "loading")
        return entry.scheduler

    def is_stored(self, name: str) -> bool:
        """Return True for a model of the store."""
        return self.store is not None and name in self.store.names()

    @property
    def ready(self) -> bool:
        """True if the default model is loaded, or if there is none yet."""
        return self.default is None or self.default in self.loaded

    def is_loading(self, name: str) -> bool:
        """Return True while a model is being loaded."""
        entry = self._entries.get(name)
        return entry is not None and entry.lock.locked()

    def setup(self, name: str | None = None) -> Scheduler:
        """Load a model if it is not loaded, and return its scheduler; it can take long.

        Raises
        ------
        ApiError
            There is no such model.
        GptxError
            The model cannot be loaded.
        """
        found = self.check_name(name)
        with self._lock:
            if found not in self._entries:
                self._entries[found] = _Entry(self._stored(found))
            entry = self._entries[found]
        with entry.lock:
            if entry.scheduler is None:
                scheduler = None
                try:
                    scheduler = self._scheduler(entry.load())
                    _warm_up(scheduler)
                except Exception as error:
                    entry.error = error
                    if scheduler is not None:
                        scheduler.close()
                    raise
                entry.error, entry.scheduler = None, scheduler
            return entry.scheduler

    def drop(self, name: str) -> None:
        """Forget a model; its scheduler ends."""
        with self._lock:
            entry = self._entries.pop(name, None)
        if entry is not None and entry.scheduler is not None:
            entry.scheduler.close()

    def close(self) -> None:
        """End the engine threads of all models."""
        for scheduler in self.loaded.values():
            scheduler.close()

    def _stored(self, name: str) -> Load:
        path = self.store.path(name) if self.store is not None else None
        load = self._load_path
        if path is None or load is None:
            raise ApiError(404, f"model {name} is not in the store", code="model_not_found")
        return lambda: load(path)

    def facts(self, name: str) -> dict[str, Any]:
        """Return the description of a model in a list of models."""
        facts: dict[str, Any] = {
            "id": name,
            "object": "model",
            "created": self.created(name),
            "owned_by": "gptx",
            "loaded": name in self.loaded,
        }
        if scheduler := self.loaded.get(name):
            model = scheduler.model
            facts["max_model_len"] = model.config.n_positions
            facts["meta"] = {
                "n_vocab": model.config.vocab_size,
                "n_ctx": model.config.n_positions,
                "n_embd": model.config.n_embd,
                "n_params": model.config.n_parameters,
                "size": model.n_bytes,
                "backend": model.backend.name,
                "dtype": model.backend.dtype,
                "fingerprint": model.fingerprint,
            }
        return facts


def _warm_up(scheduler: Scheduler) -> None:
    """Compile the kernels, and measure steps: the first request does not wait for that."""
    model = scheduler.model
    n = min(WARM_UP_TOKENS, model.config.n_positions // 2)
    options = check_options({"max_tokens": n, "ignore_eos": True})
    for _ in range(2):  # the first one compiles
        scheduler.pace.clear()
        ended: Future[None] = Future()

        def listen(event: Chunk | Exception, ended: Future[None] = ended) -> None:
            if isinstance(event, Exception):
                ended.set_exception(event)
            elif event.result is not None:
                ended.set_result(None)

        scheduler.submit(Request([[0] * n], options), listen)
        ended.result()
