"""Errors of the API, in OpenAI's form, and the HTTP status of each error of gptx."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptx.errors import (
    BackendError,
    DataError,
    DeviceOutOfMemory,
    GptxError,
    HubUnavailableError,
    NonFiniteError,
    NotFoundError,
    ParameterError,
    PromptError,
)

RETRY_SECONDS = 1  # advice of a refusal
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer other than success.

    Attributes
    ----------
    status
        HTTP status.
    message
        One line for the caller.
    param
        Name of the field that is invalid, if one is.
    code
        Word for programs, such as "model_not_found".
    headers
        Headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """Type of the error in OpenAI's words."""
        default = TYPES[400] if self.status < 500 else "server_error"
        return TYPES.get(self.status, default)

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the answer."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class QueueFull(ApiError):
    """The queue of the engine is full."""

    def __init__(self, waiting: int) -> None:
        super().__init__(
            429,
            f"{waiting} requests wait, which is the limit: try again later",
            code="queue_full",
            headers={"Retry-After": str(RETRY_SECONDS)},
        )


class Unavailable(ApiError):
    """The server starts, ends, or its engine has ended."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(503, message, code=code, headers={"Retry-After": str(RETRY_SECONDS)})


def too_long(seconds: float) -> ApiError:
    """Return the error of a request that takes longer than its limit."""
    return ApiError(
        504,
        f"the request takes longer than {seconds:g} s: ask for less",
        code="timeout",
        headers={"x-should-retry": "false"},
    )


def api_error(error: BaseException) -> ApiError:
    """Return the answer for an error; one that is not known has no details for the caller."""
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, GptxError):
        return ApiError(500, "the server failed: its log has the error", code="internal_error")
    names: list[str] = []

    def show(name: str, values: list[str]) -> str:
        names.append(name)
        return f"{name} {' or '.join(values)}" if values else name

    message = error.text(show)
    if isinstance(error, PromptError):
        is_length = "context" in message
        return ApiError(
            400, message, param="prompt", code="context_length_exceeded" if is_length else None
        )
    if isinstance(error, ParameterError):
        return ApiError(400, message, param=names[0] if names else None, code="invalid_value")
    if isinstance(error, DataError | BackendError):
        return ApiError(400, message)
    if isinstance(error, NotFoundError):
        return ApiError(404, message, code="not_found")
    if isinstance(error, DeviceOutOfMemory | HubUnavailableError):
        return Unavailable(message, "out_of_memory")
    code = "not_finite" if isinstance(error, NonFiniteError) else "internal_error"
    return ApiError(500, message, code=code)
