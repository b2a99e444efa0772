"""Break-glass overrides as operators ask for them. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from licet.domain.approvals import OVERRIDE_S_MAX, OVERRIDES_MAX, TEXT_CHARS_MAX, Override, OverrideEffect
from licet.domain.ids import NAME_CHARS_MAX, TENANT_PATTERN
from licet_control_plane.core.refusal import ChangeInvalid

SUBJECT_CHARS_MAX: Final = 1_024
_PATTERN: Final = re.compile(r"\*|[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*(\.\*)?")


def checked(override: Override, lasts_s: int, in_force: int, actions: Collection[str]) -> Override:
    """The override, when it can be. ``in_force`` is how many there are, ``actions`` those of the bundle in force.

    Raises:
        ChangeInvalid: it cannot be.
    """
    if not override.reason.strip() or len(override.reason) > TEXT_CHARS_MAX:
        said = "no reason is given" if not override.reason.strip() else "the reason is too long"
        raise ChangeInvalid("reason", said, f"Say why, in at most {TEXT_CHARS_MAX} characters: it is audited.")
    for field, text in (("reason", override.reason), ("subject", override.subject)):
        if "\0" in text:
            raise ChangeInvalid(field, "it has a NUL in it", "Write words.")
    if not 1 <= lasts_s <= OVERRIDE_S_MAX:
        raise ChangeInvalid(
            "expires_after_s",
            f"an override for {lasts_s} s",
            f"Give 1 s to {OVERRIDE_S_MAX // 3_600} h; what is needed for longer is a policy.",
        )
    if len(override.action) > NAME_CHARS_MAX or not _PATTERN.fullmatch(override.action):
        raise ChangeInvalid("action", f"{override.action!r} matches no action", "Give a name, 'prefix.*' or '*'.")
    if not any(_matches(override.action, action) for action in actions):
        raise ChangeInvalid(
            "action", f"no action of the bundle in force matches {override.action!r}", "Look at the spelling."
        )
    if override.tenant and not TENANT_PATTERN.fullmatch(override.tenant):
        raise ChangeInvalid("tenant", f"{override.tenant!r} cannot name a tenant", "Give a tenant, or none for all.")
    if len(override.subject) > SUBJECT_CHARS_MAX:
        raise ChangeInvalid("subject", "the subject's id is too long", f"Give at most {SUBJECT_CHARS_MAX} characters.")
    if in_force >= OVERRIDES_MAX:
        raise ChangeInvalid("action", f"{in_force} overrides are in force", "Clear one first.")
    return override


def effect_of(written: str) -> OverrideEffect:
    """``allow`` or ``deny``.

    Raises:
        ChangeInvalid: neither.
    """
    try:
        return OverrideEffect(written)
    except ValueError:
        raise ChangeInvalid("effect", f"{written!r} is no effect", "Give 'allow' or 'deny'.") from None


def _matches(pattern: str, action: str) -> bool:
    return Override("", pattern, OverrideEffect.ALLOW, 1, "", "").applies("", "", action, 0)
