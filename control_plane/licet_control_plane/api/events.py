"""A usage event as several routes show it. Only describes: pages of events go out unchecked."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel

from licet_control_plane.api.fields import Currency, Instant, LogId, MoneyText, Revision, Seq, Units, said


class EventSubject(BaseModel):
    """Who did it; all empty once the subject was erased."""

    type: str = said("Such as user")
    id: str = said("As the service calls them")
    on_behalf_of: str = said("For whom they act; empty for themselves")


class EventResource(BaseModel):
    """What it was done to; empty for nothing in particular."""

    type: str = said("Such as report")
    id: str = said("As the service calls it")


class Spend(BaseModel):
    """Units that were taken from one quota."""

    quota: str = said("The name of the quota")
    units: int = said("Units of its limit, nanos of a budget")


class Money(BaseModel):
    """Money."""

    amount: MoneyText
    currency: Currency


class EventFacts(BaseModel):
    """One decision, or what became of one, but for what it cost."""

    decision_id: str = said("32 hex digits, as it was answered")
    log_id: LogId
    seq: Seq
    at: Annotated[Instant, said("By the clock of the sidecar")]
    kind: str = said("CHECK, RESERVE, COMMIT, SEAT_ACQUIRE and so on; a number that this version does not know")
    tenant: str = said("The tenant")
    subject: EventSubject
    action: str = said("The action")
    effect: str = said("APPROVED, DENIED or PENDING; a number that this version does not know")
    reason: str = said("Such as QUOTA_EXHAUSTED; a number that this version does not know")
    rule: str = said("What decided: policy/rule, or the key of a limit; empty for neither")
    revision: Annotated[Revision, said("By which it was decided")]
    units: dict[str, Units] = said("That were asked, by feature; they were taken when it is APPROVED")
    units_held: dict[str, Units] = said("That a reservation holds, by feature")
    unfunded: dict[str, Units] = said("That a commit used and no limit had room for, by feature; not in `units`")
    priced_as: dict[str, str] = said("By feature that is priced by an attribute: the value that picked its price")
    flags: list[str] = said("Of stale, degraded, overage, observed and expired")
    exposures: dict[str, str] = said("Feature flags that it was subject to, with the variant that applied")
    idempotency_key: str = said("As the service sent it; empty for none")
    resource: EventResource
    context: dict[str, Any] = said("Attributes as they were sent: texts, numbers, booleans")
    spends: list[Spend] = said("Which quotas it took from")
    shadow: list[str] = said("What policies and limits in shadow would have objected: policy/rule=effect")
    about: str = said("The reservation or seat that it is about; empty for none")
    access_request_id: str = said("The access request that it waits for or was allowed by; empty for none")
    justification: str = said("Of an access request")
    expires_at: Instant | None = said("When a reservation expires; null for what does not")


class EventView(EventFacts):
    """One decision, or what became of one."""

    cost: Money | None = said("Null when nothing has a price")
