"""Web pages that may call the server: the hosts by which it is called, and the pages' origins.

A browser sends the requests of any page to any server, also to one on loopback that has no key. A
page with a name of its own can let that name resolve to loopback (DNS rebinding): the requests then
have this name as their host. A request that needs no preflight is sent whatever CORS says.
"""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers
from starlette.types import Scope

from gptx.server.errors import ApiError
from gptx.server.settings import Settings

CHANGING = ("POST", "PUT", "PATCH", "DELETE")  # methods of requests that change something
MAX_SHOWN = 100  # characters of a header in a message


def is_loopback(host: str) -> bool:
    """Test for a name or an address of this machine, such as "localhost" or "::1"."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_caller(scope: Scope, settings: Settings) -> None:
    """Check the host and the origin of a request.

    Raises
    ------
    ApiError
        421 for a host by which the server is not to be called, 403 for a page of another origin
        that sends a request other than a read.
    """
    headers = Headers(scope=scope)
    host, origin = headers.get("host"), headers.get("origin")
    if settings.hosts and host is not None and not _is_known(host, settings):
        known = " or ".join(dict.fromkeys(("localhost", *settings.hosts)))
        raise ApiError(
            421, f"the host of the request is {host[:MAX_SHOWN]}, expected {known}: add it with "
            "`gptx serve --allowed-host`", code="host_not_allowed",
        )  # fmt: skip
    if origin is None or scope["method"] not in CHANGING:
        return
    is_own = host is not None and origin.partition("://")[2].lower() == host.lower()
    if not is_own and not {"*", origin} & set(settings.cors):
        raise ApiError(
            403, f"the origin of the request is {origin[:MAX_SHOWN]}, whose pages may not call the "
            "server: add it with `gptx serve --cors`", code="origin_not_allowed",
        )  # fmt: skip


def _is_known(host: str, settings: Settings) -> bool:
    """Test for a host with or without a port: loopback, or one of the settings."""
    end, start = ("]", 1) if host.startswith("[") else (":", 0)
    name = host[start:].partition(end)[0].lower()
    return is_loopback(name) or name in (one.lower() for one in settings.hosts)
