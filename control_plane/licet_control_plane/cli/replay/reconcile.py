"""Holding the ledger to the answers: wait until it has caught up, then compare to the unit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from licet_control_plane.cli.replay.tally import Answers

POLL_S: Final = 0.2


def wait_for_ledger(
    fetch: Callable[[], dict[str, Any]],
    *,
    expected: int,
    stall_s_max: float,
    progress: Callable[[int], None],
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Ask for the tally until it holds ``expected`` events, or has not grown for ``stall_s_max`` seconds.

    The deadline is one of progress, not of time: a ledger that was down catches up at its own pace. When nothing more
    than expected is awaited, one further look shows an event that is there twice.
    """
    best, since = -1, now()
    while True:
        tally = fetch()
        events = int(tally["events"])
        progress(events)
        if events > best:
            best, since = events, now()
        if events >= expected:
            sleep(POLL_S)
            return fetch()
        if now() - since >= stall_s_max:
            return tally
        sleep(POLL_S)


def differences(answers: Answers, ledger: dict[str, Any]) -> list[str]:
    """What does not agree, one sentence each; empty when the ledger holds exactly what was answered."""
    found = []
    if answers.errors:
        found.append(f"{answers.errors:,} calls failed, so what became of their checks is not known")
    pairs: list[tuple[str, int, int]] = [
        ("events", answers.answered, int(ledger["events"])),
        ("approved", answers.approved, int(ledger["approved"])),
        ("units approved", answers.units_approved, int(ledger["units_approved"])),
        ("pending", answers.pending, int(ledger.get("pending", 0))),
    ]
    answered_denials, recorded_denials = answers.denied(), dict(ledger["denied"])
    pairs += [
        (f"denied {reason}", answered_denials.get(reason, 0), int(recorded_denials.get(reason, 0)))
        for reason in sorted({*answered_denials, *recorded_denials})
    ]
    found += [
        f"{name}: answered {answered:,}, the ledger holds {recorded:,}"
        for name, answered, recorded in pairs
        if answered != recorded
    ]
    return found
