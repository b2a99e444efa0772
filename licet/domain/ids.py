"""Identifiers that would be easy to mix up, and the rules for the ones people write."""

from __future__ import annotations

import re
from typing import Final, NewType

TenantId = NewType("TenantId", str)
SidecarId = NewType("SidecarId", str)
"""128 random bits, 32 lower-case hex digits; made with a sidecar's state directory."""

Revision = NewType("Revision", int)
"""The number of a published change; starts at 1, only grows. 0 means "nothing published"."""

LimitKey = NewType("LimitKey", str)
"""``<feature>:<limit name>``: names a limit for ever, so that a plan change never opens a fresh quota."""

UNITS_MAX: Final = 2**53 - 1
"""Largest quantity, amount or sum of units. Redis scripts compute with doubles, which are exact up to here."""

TENANT_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""A tenant id. No braces or colons: it is part of Redis keys and of their hash tag."""

NAME_PATTERN: Final = re.compile(r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9][a-z0-9_-]*)*")
"""Names of features, actions, plans, policies, roles and flags: lower case, dotted. At most 128 characters."""

NAME_CHARS_MAX: Final = 128
