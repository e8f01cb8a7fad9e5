"""Limits and settings of the server, as one dataclass."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """Limits and settings of the server.

    Attributes
    ----------
    keys
        API keys; without any, every request is answered.
    cors
        Origins whose pages may call the server; none by default.
    hosts
        Hosts by which the server may be called, besides loopback; without any, by each.
    max_body_bytes
        Largest body of a request.
    max_prompts, max_choices
        Limits of the prompts of a request, and of its continuations: prompts times copies.
    max_n
        Limit of `n` and `best_of`.
    max_tokens
        Limit of the new tokens of a continuation; None for the context of the model.
    max_logprobs
        Limit of the most probable tokens in the place of each token.
    max_queue
        Number of requests that wait for the engine; a further one is refused at once.
    max_running
        Number of sequences in the running batch.
    chunk_tokens
        Number of prompt tokens between two decode steps.
    prefix_bytes
        Memory of the prefix cache.
    request_seconds
        Time limit of a request, from its arrival.
    header_seconds, body_seconds
        Time limits for the head of a request, and for its body.
    keep_alive_seconds
        Time limit of a connection without a request.
    send_seconds
        Time limit for a client to read a part of a response.
    ping_seconds
        Time without data of a stream after which a comment is sent.
    max_connections
        Number of open connections; a further one is closed at once.
    budget
        Seconds that a call may take before it returns a state; None for no such limit.
    max_states, state_seconds
        Number of states that are kept, and the time for which they are.
    drain_seconds
        Time that running requests have after a SIGTERM.
    log_format
        "text" or "json".
    log_prompts
        True to write prompts to the log.
    """

    keys: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_body_bytes: int = 4 * MIB
    max_prompts: int = 128
    max_choices: int = 128
    max_n: int = 16
    max_tokens: int | None = None
    max_logprobs: int = 100
    max_queue: int = 64
    max_running: int = 16
    chunk_tokens: int = 128
    prefix_bytes: int = 512 * MIB
    request_seconds: float = 600.0
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    keep_alive_seconds: float = 15.0
    send_seconds: float = 30.0
    ping_seconds: float = 15.0
    max_connections: int = 4096
    budget: float | None = None
    max_states: int = 64
    state_seconds: float = 600.0
    drain_seconds: float = 30.0
    log_format: str = "text"
    log_prompts: bool = False
