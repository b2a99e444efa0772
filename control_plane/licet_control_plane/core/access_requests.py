"""The life of an access request: opened, decided stage by stage, ended. Pure: one step takes one request to the next.

======== ============================== ====================================================================
from     by                             to
======== ============================== ====================================================================
(asked)  ``opened``                     pending, in the first stage of its chain
pending  ``approved``                   pending, until as many different people as the stage needs said yes;
                                        then in the next stage; after the last one, approved
pending  ``denied``                     denied: one no is enough
pending  ``expired``, when it is time   expired
approved ``revoked``                    revoked
======== ============================== ====================================================================

Everything else is refused, and says why. Repeating what the same person did changes nothing. The chain is the one that
was in force when the request was opened: a bundle pushed meanwhile does not make anybody's approval worth more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from licet.domain.approvals import EXPIRES_AFTER_S, TEXT_CHARS_MAX, RequestEntry, RequestState
from licet.domain.catalog import ApprovalStage
from licet.domain.ids import UNITS_MAX
from licet_control_plane.core.refusal import ChangeInvalid

APPROVER_ROLES: Final = frozenset({"admin", "approver"})
"""Roles of API keys that may decide at all; an ``admin`` of all tenants at any stage: it could push the rule away."""
ADMIN: Final = "admin"
LASTS_S_MAX: Final = 90 * 86_400
"""Longest an approval lasts. What is needed for longer belongs in a plan or a policy."""
ANYBODY: Final = ApprovalStage(approvers=())
"""The chain of what names none: one yes of anybody who may decide."""
_US: Final = 1_000_000


class NotAllowed(Exception):
    """This person must not decide this. ``fix`` says who may."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


class NotPossible(Exception):
    """The request is not in a state in which that can be done. ``fix`` says what can."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


class OwnRequest(NotAllowed):
    """Nobody approves what they asked for themselves."""


class Settled(NotPossible):
    """People decided about it already."""


class Expired(NotPossible):
    """Its time was over before anybody decided."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who decides: the name of an API key, its role, the groups that the name is in, and the only tenant that it
    reaches; empty for all."""

    name: str
    role: str
    groups: frozenset[str] = frozenset()
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Terms:
    """What an approval gives: ``lasts_s`` seconds from then on, and ``units`` in all (0: any number).

    Of a budget in money, ``money`` is how much, as people write it.
    """

    lasts_s: int
    units: int = 0
    money: str = ""


@dataclass(frozen=True, slots=True)
class AccessRequest:
    """A request with all that who decides it must know. Times are microseconds since the Unix epoch, 0 for never.

    ``units`` are what was asked for, by feature. ``stages`` is its chain; ``stage`` the index of the present one, and
    ``votes`` who said yes in it. ``ends_at`` is the first instant after an approval; ``units_approved`` what it is for.
    """

    id: str
    key: str
    tenant: str
    subject_type: str
    subject_id: str
    on_behalf_of: str
    action: str
    rule: str
    asked_at: int
    units: Mapping[str, int] = field(default_factory=dict)
    resource_type: str = ""
    resource_id: str = ""
    justification: str = ""
    chain: str = ""
    stages: Sequence[ApprovalStage] = (ANYBODY,)
    stage: int = 0
    votes: tuple[str, ...] = ()
    state: RequestState = RequestState.PENDING
    changed_at: int = 0
    expires_at: int = 0
    ends_at: int = 0
    units_approved: int = 0
    money_approved: str = ""
    decided_by: str = ""
    reason: str = ""

    @property
    def now_stage(self) -> ApprovalStage:
        """Who decides now."""
        return self.stages[min(self.stage, len(self.stages) - 1)]

    @property
    def names_limit(self) -> bool:
        """Whether a limit wants the approval, ``feature:limit``, and not a rule, ``policy/rule``."""
        return "/" not in self.rule

    @property
    def feature(self) -> str:
        """The one feature that it asks units of; empty when there are several, or none."""
        return next(iter(self.units)) if len(self.units) == 1 else ""

    def entry(self) -> RequestEntry:
        """As sidecars are told of it."""
        until = self.ends_at if self.state is RequestState.APPROVED else self.expires_at
        counted = self.units_approved if not self.names_limit else 0
        return RequestEntry(
            id=self.id,
            key=self.key,
            state=self.state,
            at_us=self.changed_at,
            until_us=until,
            by=self.decided_by,
            reason=self.reason,
            feature=self.feature if counted else "",
            units=counted,
        )


def opened(asked: AccessRequest, chain: str, stages: Sequence[ApprovalStage], now_us: int) -> AccessRequest:
    """The request, for people to decide; its time runs since it was asked. It may be over already."""
    pinned = tuple(stages) or (ANYBODY,)
    asked_at = min(asked.asked_at, now_us)  # a sidecar's clock may be ahead
    expires_at = asked_at + (pinned[0].deny_after_s or EXPIRES_AFTER_S) * _US
    state = RequestState.PENDING if now_us < expires_at else RequestState.EXPIRED
    return replace(
        asked,
        asked_at=asked_at,
        chain=chain,
        stages=pinned,
        stage=0,
        votes=(),
        state=state,
        changed_at=now_us,
        expires_at=expires_at,
    )


def approved(request: AccessRequest, by: Principal, terms: Terms, reason: str, now_us: int) -> AccessRequest:
    """The request after one more yes; approved with it, when it was the last that was needed.

    ``terms`` are those of the last yes, since the clock starts with it.

    Raises:
        NotAllowed: ``by`` must not; ``OwnRequest`` when they asked for it.
        Settled: it is decided otherwise, or was approved with other terms.
        Expired: nobody decided in time.
        ChangeInvalid: the terms cannot be.
    """
    _check_may(request, by)
    _check_not_own(request, by)
    _check_terms(request, terms)
    _check_text(reason)
    if request.state is RequestState.APPROVED and request.decided_by == by.name and _has_terms(request, terms):
        return request
    _check_pending(request, now_us)
    if by.name in request.votes:
        return request
    votes = (*request.votes, by.name)
    if len(votes) < request.now_stage.need:
        return replace(request, votes=votes)
    if request.stage + 1 < len(request.stages):
        following = request.stages[request.stage + 1]
        expires_at = now_us + (following.deny_after_s or EXPIRES_AFTER_S) * _US
        return replace(request, stage=request.stage + 1, votes=(), changed_at=now_us, expires_at=expires_at)
    return replace(
        request,
        votes=votes,
        state=RequestState.APPROVED,
        changed_at=now_us,
        ends_at=now_us + terms.lasts_s * _US,
        units_approved=terms.units,
        money_approved=terms.money,
        decided_by=by.name,
        reason=reason,
    )


def denied(request: AccessRequest, by: Principal, reason: str, now_us: int) -> AccessRequest:
    """The request, denied. Raises as ``approved``; who asked may take it back so."""
    if by.name.casefold() in _own(request):
        _check_role(by)
    else:
        _check_may(request, by)
    _check_reason(reason)
    if request.state is RequestState.DENIED and request.decided_by == by.name:
        return request
    _check_pending(request, now_us)
    return replace(request, state=RequestState.DENIED, changed_at=now_us, decided_by=by.name, reason=reason)


def revoked(request: AccessRequest, by: Principal, reason: str, now_us: int) -> AccessRequest:
    """The request, whose approval is taken back. Raises as ``approved``."""
    _check_role(by)
    _check_reason(reason)
    if request.state is RequestState.REVOKED:
        return request
    if request.state is not RequestState.APPROVED or now_us >= request.ends_at:
        raise NotPossible(
            f"the request is {_state(request, now_us)}: there is no approval to take back",
            "Deny one that is pending; one that has ended lifts nothing any more.",
        )
    return replace(request, state=RequestState.REVOKED, changed_at=now_us, decided_by=by.name, reason=reason)


def expired(request: AccessRequest, now_us: int) -> AccessRequest:
    """The request, expired if its time is over."""
    if request.state is not RequestState.PENDING or now_us < request.expires_at:
        return request
    return replace(request, state=RequestState.EXPIRED, changed_at=request.expires_at)


def may_decide(stage: ApprovalStage, by: Principal) -> bool:
    """Whether somebody is among those who decide at a stage."""
    if by.role == ADMIN and not by.tenant:
        return True
    if by.role not in APPROVER_ROLES:
        return False
    return not stage.approvers or any(_names(approver, by) for approver in stage.approvers)


def groups_of(name: str, members: Mapping[str, Iterable[str]]) -> frozenset[str]:
    """The groups that somebody is in, by the members of each."""
    return frozenset(group for group, names in members.items() if name in names)


def _names(approver: str, by: Principal) -> bool:
    kind, _, name = approver.partition(":")
    return {"user": name == by.name, "role": name == by.role, "group": name in by.groups}.get(kind, False)


def _own(request: AccessRequest) -> set[str]:
    return {request.subject_id.casefold(), request.on_behalf_of.casefold()} - {""}


def _check_not_own(request: AccessRequest, by: Principal) -> None:
    name = by.name.casefold()
    # As a bare name or as the local part of an address: a key "ana" and a subject "ana@example.com" are taken for one.
    own = _own(request)
    if name in own or name.partition("@")[0] in {one.partition("@")[0] for one in own}:
        raise OwnRequest(f"{by.name} asked for this, and nobody approves their own request", "Ask somebody else.")


def _check_role(by: Principal) -> None:
    if by.role not in APPROVER_ROLES:
        raise NotAllowed(
            f"a key of the role {by.role} decides no access requests", "Use a key of the role approver or admin."
        )


def _check_may(request: AccessRequest, by: Principal) -> None:
    _check_role(by)
    stage = request.now_stage
    if not may_decide(stage, by):
        who = ", ".join(stage.approvers)
        chain = f" of {request.chain}" if request.chain else ""
        raise NotAllowed(
            f"{by.name} is not among those who decide at stage {request.stage + 1}{chain}: {who}",
            "Ask one of them. Who is in a group is said in LICET_APPROVER_GROUPS.",
        )


def _check_pending(request: AccessRequest, now_us: int) -> None:
    state = _state(request, now_us)
    if state is RequestState.EXPIRED:
        raise Expired("the request is expired already", "Ask again, and decide before it expires.")
    if state is not RequestState.PENDING:
        by = f" by {request.decided_by}" if request.decided_by else ""
        raise Settled(f"the request is {state} already{by}", "Nothing can be decided about it any more.")


def _state(request: AccessRequest, now_us: int) -> RequestState:
    return expired(request, now_us).state


def _check_terms(request: AccessRequest, terms: Terms) -> None:
    if not 1 <= terms.lasts_s <= LASTS_S_MAX:
        raise ChangeInvalid(
            "expires_after_s", f"an approval for {terms.lasts_s} s", f"Give 1 s to {LASTS_S_MAX // 86_400} days."
        )
    if not 0 <= terms.units <= UNITS_MAX:
        raise ChangeInvalid("units", f"an approval for {terms.units} units", f"Give 1 to {UNITS_MAX}.")
    if request.names_limit:
        if not terms.units and not terms.money:
            raise ChangeInvalid(
                "units",
                f"{request.rule} is exceeded, and an approval says by how much more",
                "Give units, or for a budget money such as '50.00 USD'.",
            )
    elif terms.money:
        raise ChangeInvalid("units", f"{terms.money!r}, and {request.rule} is no budget", "Give units, or nothing.")
    elif terms.units and not request.feature:
        raise ChangeInvalid(
            "units",
            f"{request.action} draws on several meters or on none, and units of which is not said",
            "Approve it without units, for a shorter time.",
        )


def _check_text(reason: str) -> None:
    if "\0" in reason:
        raise ChangeInvalid("reason", "a reason with a NUL", "Write words.")
    if len(reason) > TEXT_CHARS_MAX:
        raise ChangeInvalid("reason", f"a reason of {len(reason)} characters", f"Use at most {TEXT_CHARS_MAX}.")


def _check_reason(reason: str) -> None:
    if not reason.strip():
        raise ChangeInvalid("reason", "no reason is given", "Say why: whoever asked is told.")
    _check_text(reason)


def _has_terms(request: AccessRequest, terms: Terms) -> bool:
    """Whether it was approved with these: then approving it again is no mistake."""
    lasts_us = request.ends_at - request.changed_at
    return (lasts_us, request.units_approved, request.money_approved) == (
        terms.lasts_s * _US,
        terms.units,
        terms.money,
    )
