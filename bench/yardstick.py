"""What a bare gRPC echo costs on this machine: the promises in microseconds were made where it cost 230.

Machines differ by more than the promises leave room for, so every run begins with this. In a process of its own:
grpc.aio does not take kindly to several event loops in one. ``python -m bench.yardstick`` prints it.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Final

from bench.processes import CHECK, closed_loop, echo_server

PROMISED_ECHO_US: Final = 230.0
"""Server CPU of an echo on the machine that the promises were written for."""
_ROUNDS: Final = 3
_CALLS: Final = 4_000
_REQUEST: Final = bytes(100)


def echo_us() -> float:
    """Server CPU of an echo here, microseconds; the quietest of a few rounds, some five seconds."""
    done = subprocess.run([sys.executable, "-m", "bench.yardstick"], capture_output=True, text=True, check=True)
    return float(done.stdout)


async def _quietest_us() -> float:
    with echo_server() as (address, pid):
        await closed_loop(address, CHECK, [_REQUEST] * 500, pid)  # warm
        rounds = [await closed_loop(address, CHECK, [_REQUEST] * _CALLS, pid) for _ in range(_ROUNDS)]
    return min(one.cpu_us for one in rounds)


if __name__ == "__main__":
    print(asyncio.run(_quietest_us()))
