"""Attributes whose value is not recorded: decided over, and then hidden, before anything is written."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from licet.domain.catalog import (
    Action,
    Attribute,
    AttributeType,
    Catalog,
    Entitlement,
    Feature,
    Plan,
    Policy,
    Rule,
    RuleEffect,
)
from licet.domain.redaction import HASH_PREFIX, REDACTED, RecordMode, hashed, hidden
from licet.v1 import approval_pb2 as pb
from licet.wire.usage import EventKind
from licet_sidecar.services.approval import Malformed
from tests.support.documents import catalog_of
from tests.support.published import Signer, catalog, limit
from tests.support.sidecar import FakeSidecar, World, ask, hurried, running

SECRET = "ada@example.com"
SALT = Signer.salt
values = st.one_of(
    st.text(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.booleans(), st.lists(st.text())
)


@given(values, values, st.text(), st.text(), st.binary(min_size=32, max_size=32))
def test_hashes_are_equal_only_for_equal_values_of_one_attribute(
    one: Any, other: Any, name: str, other_name: str, salt: bytes
) -> None:
    assert hashed(name, one, salt) == hashed(name, one, salt)
    same = type(one) is type(other) and repr(one) == repr(other)
    assert (hashed(name, one, salt) == hashed(name, other, salt)) == same
    assert (hashed(name, one, salt) == hashed(other_name, one, salt)) == (name == other_name)
    assert hashed(name, one, salt) != hashed(name, one, bytes(31) + b"x" if salt != bytes(31) + b"x" else bytes(32))


def test_a_hash_is_what_it_always_was() -> None:
    assert hashed("email", SECRET, bytes(range(32))) == "hmac:bddb986bfa02f8e3f2c3a5c816828b32"


def test_only_what_was_sent_is_hidden_and_without_a_salt_nothing_is_hashed() -> None:
    modes = {"email": RecordMode.HASH, "prompt": RecordMode.REDACT, "region": RecordMode.KEEP}
    assert hidden({"region": "eu"}, modes, SALT) == {}
    sent: dict[str, Any] = {"email": SECRET, "prompt": "x", "region": "eu"}
    assert hidden(sent, modes, SALT) == {"email": hashed("email", SECRET, SALT), "prompt": REDACTED}
    assert hidden(sent, modes, b"") == {"email": REDACTED, "prompt": REDACTED}


def test_documents_say_what_is_recorded() -> None:
    (action,) = catalog_of(
        """\
        {kind: Feature, name: f}
        ---
        kind: Action
        name: a
        feature: f
        attributes: {email: {type: string, record: hash}, note: {type: string, default: "", record: redact}, n: int}
        """
    ).actions.values()
    assert {name: spec.record.value for name, spec in action.attributes.items()} == {
        "email": "hash",
        "note": "redact",
        "n": "keep",
    }


def content() -> Catalog:
    attributes = {
        "email": Attribute(AttributeType.STRING, None, RecordMode.HASH),
        "age": Attribute(AttributeType.INT, 0, RecordMode.REDACT),
        "region": Attribute(AttributeType.STRING, "eu"),
    }
    plan = Plan(
        "pro",
        {"mail": Entitlement(limits=(limit(100, feature="mail"),)), "editor": Entitlement(seats=3)},
    )
    return catalog(
        Feature("mail"),
        Feature("editor"),
        Action("mail.send", {"": "mail"}, attributes),
        Action("edit", {"": "editor"}, attributes),
        Policy("guard", ("mail.send",), (Rule("old", RuleEffect.DENY, "context.age > 90"),)),
        plan,
    )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    hurried(monkeypatch)
    made = World(tmp_path / "state")
    made.push(content())
    made.license("acme")
    return made


@pytest.fixture
async def sidecar(world: World) -> AsyncIterator[FakeSidecar]:
    async with running(world) as made:
        yield made


def mail(*, email: str = SECRET, age: int = 42, **fields: Any) -> pb.CheckRequest:
    return ask(action="mail.send", context={"email": email, "age": age}, **fields)


RECORDED = {"email": hashed("email", SECRET, SALT), "age": REDACTED, "region": "eu"}


async def test_decisions_are_made_over_the_true_values_and_events_have_the_recorded_ones(
    sidecar: FakeSidecar,
) -> None:
    assert (await sidecar.check(mail())).effect == pb.EFFECT_APPROVED
    assert (await sidecar.check(mail(age=91))).reason == pb.REASON_POLICY_DENIED
    approved, denied = sidecar.events()
    assert approved.context == denied.context == RECORDED
    assert str(approved.context["email"]).startswith(HASH_PREFIX)


async def test_no_byte_of_the_state_directory_holds_a_hidden_value(sidecar: FakeSidecar, world: World) -> None:
    await sidecar.check(mail(idempotency_key="one"))
    reserved = await sidecar.reserve(mail())
    await sidecar.extend(reserved.reservation_id, after_s=60)
    await sidecar.commit(reserved.reservation_id, quantity=3)
    await sidecar.upkeep()
    kinds = [event.kind for event in sidecar.events()]
    assert EventKind.RESERVE in kinds
    assert EventKind.COMMIT in kinds
    assert all(event.context == RECORDED for event in sidecar.events())
    await sidecar.stop()
    written = b"".join(path.read_bytes() for path in world.directory.rglob("*") if path.is_file())
    assert b"mail.send" in written
    assert SECRET.encode() not in written


async def test_a_repeat_after_a_restart_is_known_by_what_was_recorded(world: World) -> None:
    async with running(world) as first:
        answer = await first.check(mail(idempotency_key="one"))
        await first.kill()
    async with running(world, incarnation=2) as second:
        assert (await second.check(mail(idempotency_key="one"))).decision_id == answer.decision_id
        with pytest.raises(Malformed, match="idempotency_key"):
            await second.check(mail(email="eve@example.com", idempotency_key="one"))


async def test_what_a_commit_uses_beyond_is_decided_over_true_values_and_denied_once_they_are_lost(
    world: World,
) -> None:
    async with running(world) as first:
        reserved = await first.reserve(mail(quantity=2))
        kept = await first.reserve(mail(quantity=2))
        beyond = await first.commit(reserved.reservation_id, quantity=5)
        assert beyond.decision.effect == pb.EFFECT_APPROVED
        assert first.events()[-1].units == {"mail": 5}
        for _ in range(2):  # Redis learns what is held
            world.advance(1)
            await first.upkeep()
        await first.kill()
    async with running(world, incarnation=2) as second:
        after = await second.commit(kept.reservation_id, quantity=5)
        event = second.events()[-1]
        assert (event.units, event.unfunded, event.context) == ({"mail": 2}, {"mail": 3}, RECORDED)
        assert "reads age, which is not recorded" in after.decision.message
