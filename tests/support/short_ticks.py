"""uvicorn's servers in this process, which start and end in hundredths of a second.

uvicorn looks for the end of a server 10 times a second, and waits as long for its connections.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn.server

TICK_SECONDS = 0.005


class ShortSleeps:
    """The module asyncio, with an upper limit of `sleep`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, TICK_SECONDS))


def install() -> None:
    """Shorten the waits of all uvicorn servers of this process."""
    uvicorn.server.asyncio = ShortSleeps()  # type: ignore[attr-defined]
