"""Errors, retries and fallbacks, decided without a network."""

from __future__ import annotations

import subprocess
import sys

import grpc
import pytest

from licet.client.channel import resolve_target
from licet.client.errors import (
    InvalidRequest,
    LicetError,
    MessageTooLarge,
    SidecarError,
    SidecarUnavailable,
    Timeout,
    from_status,
)
from licet.client.failure import ATTEMPTS_MAX, BACKOFF_FIRST_S, check_fallback, fall_back, pause_before_retry_s
from licet.client.model import Check, Decision
from licet.domain.outcomes import Effect, Reason

AWAY = SidecarUnavailable("away")
CHECK = Check("acme", "report.view")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, MessageTooLarge),
        (grpc.StatusCode.UNAVAILABLE, SidecarUnavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Timeout),
        (grpc.StatusCode.INTERNAL, SidecarError),
        (grpc.StatusCode.UNIMPLEMENTED, SidecarError),
    ],
)
def test_gives_each_status_its_error(code: grpc.StatusCode, kind: type[LicetError]) -> None:
    error = from_status(code, "quantity: must not be negative", target="127.0.0.1:7420")
    assert type(error) is kind
    assert str(error)


@pytest.mark.parametrize(
    ("details", "field"),
    [
        ("quantity: must not be negative", "quantity"),
        ("quantities['input']: must not be negative", "quantities['input']"),
        ("checks[3].tenant: must not be empty", "checks[3].tenant"),
        ("the request cannot be parsed", ""),
    ],
)
def test_reads_the_field_from_the_message(details: str, field: str) -> None:
    error = from_status(grpc.StatusCode.INVALID_ARGUMENT, details, target="t")
    assert isinstance(error, InvalidRequest)
    assert error.field == field


def test_is_also_the_builtin_error_of_its_kind() -> None:
    assert issubclass(InvalidRequest, ValueError)
    assert issubclass(SidecarUnavailable, ConnectionError)
    assert issubclass(Timeout, TimeoutError)


@pytest.mark.parametrize("attempt", range(1, ATTEMPTS_MAX))
@pytest.mark.parametrize("jitter", [0.0, 0.999])
def test_backs_off_longer_each_time(attempt: int, jitter: float) -> None:
    pause_s = pause_before_retry_s(AWAY, attempt=attempt, remaining_s=10, jitter=jitter)
    whole_s = BACKOFF_FIRST_S * 2 ** (attempt - 1)
    assert pause_s is not None
    assert whole_s / 2 <= pause_s <= whole_s


def test_gives_up_after_the_last_attempt() -> None:
    assert pause_before_retry_s(AWAY, attempt=ATTEMPTS_MAX, remaining_s=10, jitter=0) is None


def test_never_sleeps_past_the_deadline() -> None:
    assert pause_before_retry_s(AWAY, attempt=1, remaining_s=BACKOFF_FIRST_S / 2, jitter=0.5) is None


@pytest.mark.parametrize(
    "error", [Timeout("t"), InvalidRequest("i"), MessageTooLarge("m"), SidecarError("s", code="X")]
)
def test_retries_nothing_but_an_absent_sidecar(error: LicetError) -> None:
    assert pause_before_retry_s(error, attempt=1, remaining_s=10, jitter=0) is None


@pytest.mark.parametrize("error", [AWAY, Timeout("late")])
@pytest.mark.parametrize(
    ("fallback", "effect", "reason"),
    [("allow", Effect.APPROVED, Reason.DEGRADED_ALLOW), ("deny", Effect.DENIED, Reason.DEGRADED_DENY)],
)
def test_answers_with_the_declared_fallback(error: LicetError, fallback: str, effect: Effect, reason: Reason) -> None:
    decision = fall_back(fallback, CHECK, error)  # type: ignore[arg-type]
    assert decision is not None
    assert (decision.effect, decision.reason, decision.fallback) == (effect, reason, True)
    assert (decision.revision, decision.as_of) == (0, None)
    assert str(error) in decision.message


def test_asks_a_function_and_marks_what_it_returns() -> None:
    own = Decision(Effect.DENIED, Reason.DEGRADED_DENY, metadata={"from": "cache"})
    decision = fall_back(lambda check, error: own, CHECK, AWAY)
    assert decision is not None
    assert decision.fallback
    assert decision.metadata == {"from": "cache"}


def test_lets_a_function_answer_by_action() -> None:
    by_action = lambda check, error: check.action == "report.view"  # noqa: E731
    views = fall_back(by_action, CHECK, AWAY)
    deletes = fall_back(by_action, Check("acme", "report.delete"), AWAY)
    assert views is not None
    assert views.approved
    assert deletes is not None
    assert deletes.reason is Reason.DEGRADED_DENY


@pytest.mark.parametrize("error", [InvalidRequest("bad"), MessageTooLarge("big"), SidecarError("s", code="INTERNAL")])
def test_never_hides_a_defect_behind_the_fallback(error: LicetError) -> None:
    assert fall_back("allow", CHECK, error) is None


def test_raises_by_default() -> None:
    assert fall_back("raise", CHECK, AWAY) is None


def test_refuses_a_fallback_that_is_none() -> None:
    with pytest.raises(ValueError, match="'alow'"):
        check_fallback("alow")  # type: ignore[arg-type]


def test_finds_the_sidecar_without_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LICET_SIDECAR", raising=False)
    assert resolve_target(None) == "127.0.0.1:7420"
    monkeypatch.setenv("LICET_SIDECAR", "unix:/run/licet.sock")
    assert resolve_target(None) == "unix:/run/licet.sock"
    assert resolve_target("[::1]:9") == "[::1]:9"


@pytest.mark.parametrize("target", ["http://127.0.0.1:7420", "localhost", "localhost:grpc"])
def test_refuses_a_target_that_is_no_address(target: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        resolve_target(target)


def test_import_loads_no_more_than_is_used() -> None:
    heavy = [
        "grpc",
        "google.protobuf",
        "msgpack",
        "redis",
        "pydantic",
        "typer",
        "rich",
        "httpx",
        "licet.wire",
        "licet.v1",
    ]
    loaded = f"import sys, licet; print(*[m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout.strip() == ""
    )


def test_sdk_needs_only_grpc_and_protobuf() -> None:
    others = ["msgpack", "redis", "pydantic", "typer", "rich", "httpx", "yaml", "cryptography", "licet.wire", "uvloop"]
    loaded = f"import sys, licet; licet.Client, licet.AsyncClient; print(*[m for m in {others} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout.strip() == ""
    )


def test_every_public_name_can_be_had() -> None:
    import licet

    assert {name: getattr(licet, name) for name in licet.__all__}
    with pytest.raises(AttributeError, match="nonsense"):
        licet.nonsense  # noqa: B018
