"""Failed connections: their reason, and the setting that explains it."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator
from importlib.metadata import version
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

# huggingface_hub has used requests, httpx and httpx2. Their errors have no common base.
_HTTP_LIBRARIES = ("httpx", "httpcore", "h11", "requests", "urllib3")

_USES_REQUESTS = version("huggingface_hub").startswith("0.")
CERTIFICATE_VARIABLES = (
    ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE") if _USES_REQUESTS else ("SSL_CERT_FILE",)
)
_FILE_ERRORS = (OSError, FileNotFoundError, PermissionError, IsADirectoryError)


class Fault(NamedTuple):
    """A failed request, for the message of an error.

    Attributes
    ----------
    reason
        At most 250 characters, without the token.
    remedy
        Change that can mend it, as an imperative.
    is_setting
        True if a setting causes it, and another attempt fails in the same way.
    """

    reason: str
    remedy: str
    is_setting: bool = False


def explain(error: Exception, address: str) -> Fault:
    """Explain an error of an HTTP library in a request to this address."""
    if status_of(error) is not None:
        return Fault(reason(error), "try again later")
    if not _is_address(address):
        return Fault(
            f"HF_ENDPOINT is {address!r}",
            "unset HF_ENDPOINT, or set it to an https:// address",
            is_setting=True,
        )
    if (problem := certificate_problem(error)) is not None:
        return problem
    if proxy := _proxy(address):
        return Fault(reason(error), f"check the connection and the proxy in {proxy}, and try again")
    return Fault(reason(error), "check the connection and try again")


def certificate_problem(error: Exception) -> Fault | None:
    """Explain an error about certificates; None for any other."""
    faults = [cause for cause in _causes(error) if isinstance(cause, ssl.SSLError)]
    # The error about a missing file of certificates does not name the file.
    if not faults and (type(error) not in _FILE_ERRORS or getattr(error, "filename", None)):
        return None
    for name in CERTIFICATE_VARIABLES:
        path = os.environ.get(name)
        if path and not _holds_certificates(path):
            return Fault(
                f"{name} is {path}, which holds no certificates",
                f"unset {name}, or set it to a file with the certificates of authorities",
                is_setting=True,
            )
    for fault in faults:
        if isinstance(fault, ssl.SSLCertVerificationError):
            return Fault(
                f"certificate refused: {fault.verify_message}",
                f"check the clock, or set {CERTIFICATE_VARIABLES[0]} to a file with the "
                "certificate of the proxy or the mirror",
                is_setting=True,
            )
    return None


def _holds_certificates(path: str) -> bool:
    if _USES_REQUESTS and os.path.isdir(path):
        return True
    try:
        return bool(ssl.create_default_context(cafile=path).get_ca_certs())
    except OSError:
        return False


def _is_address(address: str) -> bool:
    try:
        parts = urlsplit(address)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _proxy(address: str) -> str | None:
    """Return the environment variable of the proxy of an address; None without a proxy."""
    parts = urlsplit(address)
    if proxy_bypass(parts.hostname or ""):
        return None
    names = [f"{kind}_proxy" for kind in (parts.scheme, "all")]
    given = [name for low in names for name in (low, low.upper()) if os.environ.get(name)]
    return given[0] if given else None


def status_of(error: Exception) -> int | None:
    """Return the HTTP status of an error, None if it has none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_connection_fault(error: Exception) -> bool:
    """Test for a failed connection, without an HTTP status."""
    if status_of(error) is not None:
        return False
    origins = [kind.__module__ for kind in type(error).__mro__]
    return isinstance(error, (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)) or any(
        origin.startswith(_HTTP_LIBRARIES) for origin in origins
    )


def reason(error: Exception) -> str:
    """Describe a failed request in at most 250 characters, without the token."""
    if (status := status_of(error)) is not None:
        return f"HTTP status {status}"
    *_, cause = _causes(error)  # the libraries wrap it in representations of objects
    text = " ".join((getattr(cause, "strerror", None) or str(cause)).split())
    if not text or "Bearer" in text:  # the HTTP library quotes an invalid header
        return type(cause).__name__
    return f"{type(cause).__name__}: {text[:200]}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and the error that caused the last one yielded, up to the first."""
    seen: list[BaseException] = []
    cause: object = error
    while isinstance(cause, BaseException) and cause not in seen:
        seen.append(cause)
        yield cause
        wrapped = [arg for arg in (getattr(cause, "reason", None), *cause.args)
                   if isinstance(arg, BaseException)]  # fmt: skip
        cause = cause.__cause__ or (wrapped[0] if wrapped else cause.__context__)
