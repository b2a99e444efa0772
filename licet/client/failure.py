"""What to do when a call fails: ask again, or answer with what the caller declared. Pure; both clients obey it.

Retrying is safe because every request carries an idempotency key, and only against the *same* sidecar: it is that
sidecar which remembers the key. So a target has to name one sidecar, which a sidecar on localhost always does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final, Literal

from licet.client.errors import LicetError, SidecarUnavailable, Timeout
from licet.client.model import Check, Decision
from licet.domain.outcomes import Effect, Reason

Fallback = Literal["raise", "deny", "allow"] | Callable[[Check, LicetError], Decision | bool]
"""What answers when the sidecar is away.

``"raise"`` (the default) raises; ``"deny"`` and ``"allow"`` answer so, with reason ``DEGRADED_DENY`` or
``DEGRADED_ALLOW``; a function gets the check and the error and returns a decision, or whether to allow.
"""

ATTEMPTS_MAX: Final = 4
"""Four attempts, about 0.1 s, cover a blip. A restart takes longer; to wait for it would make every call that slow."""

BACKOFF_FIRST_S: Final = 0.02
"""The sidecar is on this machine, so a refused connection costs nothing and a short pause is enough."""


def pause_before_retry_s(error: LicetError, *, attempt: int, remaining_s: float, jitter: float) -> float | None:
    """Seconds to wait before attempt number ``attempt + 1``, or ``None`` to give up.

    Only ``SidecarUnavailable`` is retried: a timeout has used up the deadline, and the rest would fail the same way.
    ``jitter`` is random in [0, 1); the pause is between half of the backoff and all of it, so that the threads of a
    service do not come back together.
    """
    if not isinstance(error, SidecarUnavailable) or attempt >= ATTEMPTS_MAX:
        return None
    pause_s: float = BACKOFF_FIRST_S * 2 ** (attempt - 1) * (0.5 + jitter / 2)
    return pause_s if pause_s < remaining_s else None


def check_fallback(fallback: Fallback) -> Fallback:
    """``fallback`` itself, once it is known to be one.

    Raises:
        ValueError: it is not.
    """
    if fallback in ("raise", "deny", "allow") or callable(fallback):
        return fallback
    raise ValueError(f"fallback must be 'raise', 'deny', 'allow' or a function, not {fallback!r}")


def fall_back(fallback: Fallback, check: Check, error: LicetError) -> Decision | None:
    """The caller's declared answer to ``check``, or ``None`` when ``error`` has to be raised."""
    if fallback == "raise" or not isinstance(error, SidecarUnavailable | Timeout):
        return None
    outcome = fallback(check, error) if callable(fallback) else fallback == "allow"
    if isinstance(outcome, Decision):
        return replace(outcome, fallback=True)
    return Decision(
        effect=Effect.APPROVED if outcome else Effect.DENIED,
        reason=Reason.DEGRADED_ALLOW if outcome else Reason.DEGRADED_DENY,
        message=f"Answered by the caller's fallback: {error}",
        degraded=True,
        fallback=True,
    )
