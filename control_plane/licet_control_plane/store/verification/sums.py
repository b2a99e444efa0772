"""The sums against a recount of the events: what differs, by table and key.

Of a month that was dropped, what its sums say beyond the events that are here must have the digest that the chain has
of it. What registers spent has no month: from windows that such an event may have spent from, and from quotas with a
scope of tenants with somebody who was erased, it may be more than the recount.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from licet_control_plane.core.accounting import window_start_of
from licet_control_plane.store import ledger_sums
from licet_control_plane.store.ledger_sums import Contents, Spend
from licet_control_plane.store.partitions import Month
from licet_control_plane.store.verification.report import Finding, about_the_whole


def differences(stored: Contents, recounted: Contents, departed: Mapping[Month, bytes]) -> Iterator[Finding]:
    """What the tables of sums say that the events do not. ``departed``: digests of the sums of dropped months."""
    beyond: dict[Month, Contents] = {month: [{} for _ in ledger_sums.TABLES] for month in departed}
    seconds = {month: range(month.start_us // 1_000_000, month.end_us // 1_000_000) for month in departed}
    for index, (name, mine, others) in enumerate(zip(ledger_sums.TABLES, stored, recounted, strict=True)):
        for key in mine.keys() | others.keys():
            said, counted = mine.get(key), others.get(key)
            at = ledger_sums.time_of(key)
            month = next((month for month, inside in seconds.items() if at in inside), None)
            if month is not None:
                rest = [a - b for a, b in zip(said or [0] * 4, counted or [0] * 4, strict=False)]
                if any(rest):
                    beyond[month][index][key] = rest
            elif said != counted:
                yield about_the_whole(
                    "sum", f"{name} {_text(key)}: {_numbers(said)}; the events say {_numbers(counted)}"
                )
    for month, digest in departed.items():
        if ledger_sums.digest_of(beyond[month]) != digest:
            what = (
                f"the sums of {month}, less the events of it that are here, are not what they were when it was dropped"
            )
            yield about_the_whole("sum", what)


def spend_differences(
    stored: Spend,
    recounted: Mapping[tuple[str, str, str], tuple[int, int]],
    *,
    unread: Collection[str],
    opened: bool,
    departed_end_s: int,
) -> Iterator[Finding]:
    """What ``register_spend`` says that the events do not. ``unread``: tenants with spends from quotas with a scope
    that cannot be read; without ``opened`` those of all tenants cannot."""
    missing = dict(recounted)
    for (tenant, quota, sidecar), (window_start, *units) in stored.items():
        counted = missing.pop((tenant, quota, sidecar), None)
        name = f"register_spend {tenant}, {quota}, {sidecar}"
        if window_start != window_start_of(quota):
            yield about_the_whole("sum", f"{name}: it names another window than its quota")
        may_be_more = window_start < departed_end_s or ("@" in quota and (not opened or tenant in unread))
        said = (units[0], units[1])
        at_least = counted or (0, 0)
        if said != counted and not (may_be_more and all(a >= b for a, b in zip(said, at_least, strict=True))):
            yield about_the_whole("sum", f"{name}: {_numbers(said)}; the events say {_numbers(counted)}")
    for (tenant, quota, sidecar), counted in missing.items():
        if any(counted):
            what = f"register_spend {tenant}, {quota}, {sidecar}: missing; the events say {_numbers(counted)}"
            yield about_the_whole("sum", what)


def _text(key: tuple[Any, ...]) -> str:
    return ", ".join(str(part) for part in key)


def _numbers(sums: Sequence[int] | None) -> str:
    return ", ".join(f"{number:,}" for number in sums) if sums is not None else "nothing"
