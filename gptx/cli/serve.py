"""`gptx serve`: a model behind an HTTP interface."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from gptx.cli.options import Command, Sections, command_line, load_options
from gptx.errors import BackendError, GptxError, ParameterError, argument
from gptx.generation.api import load
from gptx.generation.found_model import find_model
from gptx.generation.options import LoadOptions
from gptx.generation.text_model import Model
from gptx.process import count_cores

if TYPE_CHECKING:
    from gptx.server.settings import Settings

PORT = 8000
HOST = "127.0.0.1"
FIND_OPTIONS = ("config", "tokenizer", "ignore_unknown", "revision", "offline")
MIB = 2**20


Decorator = Callable[[Command], Command]


def _seconds(name: str, default: float, text: str) -> Decorator[Any]:
    return click.option(
        name, type=float, metavar="SECONDS", default=default, show_default=True, help=text
    )


def _count(name: str, default: int, text: str) -> Decorator[Any]:
    return click.option(
        name, type=click.IntRange(1), metavar="N", default=default, show_default=True, help=text
    )


@click.command(
    cls=Sections,
    sections={
        "Model": "model",
        "Address": "host",
        "Processes": "replicas",
        "Access": "api_key",
        "Models by upload": "store",
        "Batch": "max_running",
        "Limits": "max_queue",
        "Bounded calls": "budget",
        "Log": "log_format",
    },
)
@load_options
@click.option("--name", metavar="NAME", help="Name of the model in the API.  [default: MODEL]")
@click.option(
    "--host",
    metavar="ADDRESS",
    default=HOST,
    show_default=True,
    help="Address to listen at; 0.0.0.0 lets other machines in.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="N",
    default=PORT,
    show_default=True,
    help="Port to listen at; 0 takes a free one.",
)
@_count("--replicas", 1, "Processes that compute, behind one that listens; they share the weights.")
@click.option(
    "--api-key",
    metavar="KEY",
    multiple=True,
    envvar="GPTX_API_KEY",
    help="Answer requests with this key only. Several are possible.",
)
@click.option(
    "--api-key-file", metavar="FILE", type=click.Path(), help="A file of keys, one a line."
)
@click.option(
    "--cors",
    metavar="ORIGIN",
    multiple=True,
    help="Let web pages of this origin call the server, such as https://example.org.",
)
@click.option(
    "--allowed-host",
    metavar="NAME",
    multiple=True,
    help="Answer requests for this host, too. Without a key, a server on loopback answers those "
    "for loopback only, as a web page can give it any other name.",
)
@click.option(
    "--store",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Folder of models that come by `gptx upload`.",
)
@_seconds("--upload-timeout", 86400.0, "Time without a byte that ends an incomplete upload.")
@_count("--max-running", 16, "Sequences that are computed together; others wait.")
@_count("--chunk", 128, "Tokens of prompts that are read between two decode steps.")
@_count("--prefix-cache", 512, "Memory for prompts that can come again, in MiB.")
@_count("--max-queue", 64, "Requests that wait; a further one gets 429 at once.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    metavar="N",
    help="Limit of new tokens of a continuation.  [default: the context]",
)
@_count("--max-n", 16, "Limit of the continuations of a prompt.")
@_count("--max-prompts", 128, "Limit of the prompts of a request.")
@_count("--max-body", 4, "Largest body of a request, in MiB.")
@_seconds("--timeout", 600.0, "Time limit of a request.")
@_seconds("--header-timeout", 10.0, "Time limit for the head of a request.")
@_seconds("--body-timeout", 30.0, "Time limit for the body of a request.")
@_seconds("--keep-alive", 15.0, "Time limit of a connection without a request.")
@_seconds("--send-timeout", 30.0, "Time limit for a client to read a part of the answer.")
@_count("--max-connections", 4096, "Open connections; a further one is closed at once.")
@_seconds("--drain", 30.0, "Time for running requests after SIGTERM or Ctrl-C.")
@click.option(
    "--budget",
    type=float,
    metavar="SECONDS",
    help="Time limit of each call, which then returns a state that the next call continues.",
)
@_count("--max-states", 64, "States that are kept.")
@_seconds("--state-timeout", 600.0, "Time for which a state is kept.")
@click.option(
    "--log-format",
    type=click.Choice(("text", "json")),
    default="text",
    show_default=True,
    help="Form of the log, which has a line for each request.",
)
@click.option("--log-prompts", is_flag=True, help="Write prompts to the log.")
def serve(
    *,
    model: str,
    name: str | None,
    host: str,
    port: int,
    replicas: int,
    api_key: tuple[str, ...],
    api_key_file: str | None,
    cors: tuple[str, ...],
    allowed_host: tuple[str, ...],
    store: str | None,
    upload_timeout: float,
    max_running: int,
    chunk: int,
    prefix_cache: int,
    max_queue: int,
    max_tokens: int | None,
    max_n: int,
    max_prompts: int,
    max_body: int,
    timeout: float,
    header_timeout: float,
    body_timeout: float,
    keep_alive: float,
    send_timeout: float,
    max_connections: int,
    drain: float,
    budget: float | None,
    max_states: int,
    state_timeout: float,
    log_format: str,
    log_prompts: bool,
    **options: Any,
) -> None:
    """Serve a model over HTTP, with the API of OpenAI.

    The server answers /v1/completions, /v1/chat/completions, /v1/embeddings and more; /docs lists
    all paths and fields. It listens at this machine only, unless --host says otherwise; give
    --api-key then. SIGTERM or Ctrl-C ends it when running requests are finished, a second one at
    once.

    \b
    Examples:
      gptx serve -m shakespeare
      curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "ROMEO:", "max_tokens": 40}'
    """
    try:
        from gptx.server.api import inspect
        from gptx.server.app import make_app
        from gptx.server.keys import read_keys
        from gptx.server.listener import make_listener, raise_file_limit
        from gptx.server.models import Models
        from gptx.server.origins import is_loopback
        from gptx.server.replicas.process import inherited_sockets
        from gptx.server.settings import Settings
        from gptx.server.uploads import routes as uploads
        from gptx.server.uploads.store import Store
    except ImportError as error:
        if (error.name or "").startswith("gptx"):
            raise
        raise BackendError(
            f"gptx serve needs the package {error.name}, which is not installed: "
            "run `pip install '.[serve]'` in a checkout of gptx"
        ) from None
    for flag, seconds in (
        ("timeout", timeout),
        ("header_timeout", header_timeout),
        ("body_timeout", body_timeout),
        ("keep_alive", keep_alive),
        ("send_timeout", send_timeout),
        ("state_timeout", state_timeout),
        ("upload_timeout", upload_timeout),
        ("budget", budget),
    ):
        if seconds is not None and not 0 < seconds < 1e9:
            raise ParameterError(f"{argument(flag)} is {seconds}, expected more than 0 seconds")
    keys = read_keys(api_key, api_key_file)
    sockets = inherited_sockets()
    # The front process has checked the hosts of a replica's requests.
    is_local = sockets is None and is_loopback(host) and not keys
    settings = Settings(
        keys=keys,
        cors=cors,
        hosts=(host, *allowed_host) if is_local or (allowed_host and sockets is None) else (),
        max_body_bytes=max_body * MIB,
        max_prompts=max_prompts,
        max_choices=max(max_prompts, max_n),
        max_n=max_n,
        max_tokens=max_tokens,
        max_queue=max_queue,
        max_running=max_running,
        chunk_tokens=chunk,
        prefix_bytes=prefix_cache * MIB,
        request_seconds=timeout,
        header_seconds=header_timeout,
        body_seconds=body_timeout,
        keep_alive_seconds=keep_alive,
        send_seconds=send_timeout,
        max_connections=max_connections,
        budget=budget,
        max_states=max_states,
        state_seconds=state_timeout,
        drain_seconds=drain,
        log_format=log_format,
        log_prompts=log_prompts,
    )
    _log_to_stderr()
    # A model that does not exist is an error of the command, before the server listens.
    find_model(model, **{name: options[name] for name in FIND_OPTIONS})
    if replicas > 1:
        _serve_replicas(replicas, settings, host, port)
        return
    failures: list[Exception] = []

    def load_model() -> Model:
        return load(model, **cast("LoadOptions", options))

    def end(error: Exception) -> None:
        failures.append(error)
        listener.should_exit = True

    def load_stored(path: Path) -> Model:
        return load(str(path), **cast("LoadOptions", options))

    uploaded = None if store is None else Store(store, upload_seconds=upload_timeout)
    models = Models(settings=settings, store=uploaded, load=load_stored)
    models.add(name or Path(model).name, load_model)
    more = inspect.routes(models)
    if uploaded is not None:
        more += uploads.routes(uploaded, models)
    gate = make_app(models, settings, extra_routes=more, preload=True, on_failure=end)
    listener = make_listener(gate, settings, host=host, port=port)
    raise_file_limit(max_connections)
    _note_open_address(host, settings)
    listener.run(sockets)
    if failures:
        raise failures[0]


def _serve_replicas(n: int, settings: Settings, host: str, port: int) -> None:
    """Run the front process of several replicas, which get the options of this command."""
    from gptx.server.listener import make_listener, raise_file_limit
    from gptx.server.replicas.front import Front

    if not hasattr(os, "fork"):
        raise ParameterError(f"{argument('replicas')} is {n}, expected 1 on this system")
    ctx = click.get_current_context()
    if ctx.params["store"] is not None:  # a deleted model would stay loaded in the others
        raise ParameterError(
            f"{argument('replicas')} is {n}, expected 1 with {argument('store')}: omit one of them"
        )
    own = ("replicas", "host", "port")
    command = [sys.executable, "-m", "gptx", "serve", *command_line(ctx, without=own)]
    if ctx.params["threads"] is None:
        command += ["--threads", str(max(1, count_cores() // n))]
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        listener.should_exit = True

    front = Front(command, n, settings, on_failure=end)
    listener = make_listener(front, settings, host=host, port=port)
    raise_file_limit(2 * settings.max_connections)  # one more for each, to its replica
    _note_open_address(host, settings)
    listener.run()
    if codes and codes[0] > 0:  # the replica has printed its error
        ctx.exit(codes[0])
    if codes:
        raise GptxError(f"a replica was ended by the signal {-codes[0]} while it started")


def _note_open_address(host: str, settings: Settings) -> None:
    from gptx.server.origins import is_loopback

    if not is_loopback(host) and not settings.keys:
        click.echo(
            f"Note: {host} is open to other machines, without a key: use --api-key", err=True
        )


def _log_to_stderr() -> None:
    """Write the log of the server to standard error; messages of requests are whole lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("gptx.server", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
    logging.getLogger("gptx.server").setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
