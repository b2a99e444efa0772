"""The event loop of the commands that need one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


def run_on_fast_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run ``main`` to its end, on uvloop where there is one (not on Windows)."""
    try:
        import uvloop
    except ModuleNotFoundError:
        asyncio.run(main)
    else:
        uvloop.run(main)
