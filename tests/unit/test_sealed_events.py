"""Events as they are kept: sealed, opened, erased, and altered in any byte."""

from __future__ import annotations

from typing import Any, Final

import msgpack
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from licet.wire.usage import EventKind, UsageEvent, pack_event, unpack_event
from licet_control_plane.core import sealed_events
from licet_control_plane.core.sealed_events import (
    COLUMNS,
    ERASED,
    RANDOM_BYTES,
    UNITS,
    Damaged,
    PublicEvent,
    Sealed,
    belonging,
    fields_of,
    is_same,
    leaf_hash,
    named,
    open_event,
    opened,
    public_event,
    scoped_spends,
    seal,
)
from licet_control_plane.core.subject_keys import PERSON_BYTES, LedgerKey, Subject
from tests.support.usage import event

CIPHER: Final = AESGCM(bytes(32))
RANDOM: Final = bytes(range(RANDOM_BYTES))
LOG: Final = "a" * 32 + ":1"

GOLDEN_PUBLIC: Final = (
    "dc0012010701cf00065bfeda25e001a461636d65a475736572ad7265706f72742e6578706f72740101a00181a77265706f72"
    "74730105a355534400a09192ba7265706f7274733a6d6f6e74686c793a313738383232303830300190"
)
GOLDEN_COMMITMENT: Final = "3c2ff7e7657fcd6e12d985ee612247f4375b365d2f79a07278b739c4d4b64dba"
GOLDEN_PERSONAL: Final = (
    "101112131415161718191a1b96e01a2d7a654d195f90315b05f65c2d767871f7c7ba0cab7373ef442683d56c7ae3e78fef3e"
    "77acb8ad532e62ad3583b0fb2118ffa49e19"
)
GOLDEN_LEAF: Final = "2b7932da3e5e3fcb9e3b39feb2f11a164829b789c897bef4e754e5cd21dc00d7"


names = st.text(max_size=12)
units = st.dictionaries(st.sampled_from(["reports", "tokens"]), st.integers(0, 2**53))
quotas = st.lists(
    st.tuples(st.sampled_from(["reports:month:1", "reports:user@00ff:1"]), st.integers(0, 9)).map(list), max_size=3
)
events = st.builds(
    UsageEvent,
    seq=st.integers(1, 2**40),
    at_us=st.integers(1, 2**60),
    tenant=names,
    subject_type=names,
    subject_id=names,
    on_behalf_of=names,
    action=names,
    effect=st.integers(1, 3),
    reason=st.integers(1, 20),
    rule=names,
    revision=st.integers(0, 2**40),
    units=units,
    cost_nanos=st.integers(0, 2**60),
    currency=st.sampled_from(["", "USD"]),
    flags=st.integers(0, 31),
    idempotency_key=names,
    resource_type=names,
    resource_id=names,
    context=st.dictionaries(names, st.one_of(names, st.integers(-5, 5), st.booleans(), st.lists(names, max_size=2))),
    spends=quotas,
    shadow=st.lists(names, max_size=2),
    feature_costs=units,
    kind=st.sampled_from([int(kind) for kind in EventKind]),
    about=names,
    held=quotas,
    units_held=units,
    overage=st.dictionaries(st.sampled_from(["reports:month:1", "reports:user@00ff:1"]), st.integers(1, 9)),
    unfunded=units,
    expires_us=st.integers(0, 2**60),
)


def sealed(one: UsageEvent, *, log_id: str = LOG, subject: int = 7, random: bytes = RANDOM) -> Sealed:
    packed = pack_event(one)
    return seal(unpack_event(packed), packed, log_id, subject, CIPHER, random)


@given(events)
def test_an_event_that_was_sealed_opens_as_it_was(one: UsageEvent) -> None:
    packed = pack_event(one)
    read = unpack_event(packed)
    kept = seal(read, packed, LOG, 7, CIPHER, RANDOM)
    assert reopened(LOG, kept) == plain(read)
    assert is_same(read, packed, LOG, 7, kept, CIPHER)
    columns = fields_of(kept.public)
    assert columns[1:UNITS] == [7, *(getattr(read, {"at": "at_us"}.get(name, name)) for name in COLUMNS[1:])]
    assert columns[UNITS] == read.units


def reopened(log_id: str, kept: Sealed) -> UsageEvent:
    return plain(open_event(log_id, kept, CIPHER))


def plain(one: UsageEvent) -> UsageEvent:
    """With lists where a default is a tuple, and quotas with a scope last: both say the same."""

    def in_order(quotas: Any) -> Any:
        return sorted((list(pair) for pair in quotas), key=lambda pair: "@" in pair[0])

    return one._replace(held=in_order(one.held), spends=in_order(one.spends))


def test_every_field_of_an_event_is_public_or_personal() -> None:
    """A field that is appended to the event is kept without anybody thinking of it here."""
    assert sorted((*sealed_events._PUBLIC, *sealed_events._PERSONAL)) == sorted(UsageEvent._fields)


def test_the_public_part_says_nothing_personal() -> None:
    one = event(
        1,
        subject_id="ada",
        on_behalf_of="grace",
        idempotency_key="order-1",
        resource_id="file-9",
        context={"site": "north"},
        about="editor:00ff",
        kind=EventKind.SEAT_ACQUIRE.value,
        spends=[("reports:user@00ff:1", 1)],
    )
    public = sealed(one).public
    assert [word for word in (b"ada", b"grace", b"order", b"file-9", b"north", b"00ff") if word in public] == []
    erased = public_event(public)
    assert (erased.subject_id, erased.tenant, erased.units) == (ERASED, "acme", {"reports": 1})
    assert (erased.context, erased.spends, erased.about, erased.idempotency_key) == ({}, [], "", "")


def test_golden_bytes() -> None:
    kept = sealed(event(1))
    assert kept.public.hex() == GOLDEN_PUBLIC
    assert kept.commitment.hex() == GOLDEN_COMMITMENT
    assert kept.personal is not None
    assert kept.personal.hex() == GOLDEN_PERSONAL
    assert leaf_hash(kept.public, kept.commitment).hex() == GOLDEN_LEAF


@pytest.mark.parametrize("part", ["public", "commitment", "personal"])
def test_a_change_of_any_byte_does_not_open(part: str) -> None:
    kept = sealed(event(1))
    old: bytes = getattr(kept, part)
    for index in range(len(old)):
        new = old[:index] + bytes([old[index] ^ 1]) + old[index + 1 :]
        with pytest.raises(Damaged):
            opened(belonging(LOG), *kept._replace(**{part: new}), CIPHER)
    for shorter in (b"", old[:5], old[:-1]):
        with pytest.raises(Damaged):
            opened(belonging(LOG), *kept._replace(**{part: shorter}), CIPHER)


def test_what_belongs_to_another_log_or_subject_does_not_open() -> None:
    kept = sealed(event(1))
    with pytest.raises(Damaged):
        opened(belonging("other:1"), *kept, CIPHER)
    with pytest.raises(Damaged):
        opened(belonging(LOG), *kept, AESGCM(b"\1" * 32))
    with pytest.raises(Damaged):
        opened(belonging(LOG), *kept._replace(personal=None), CIPHER)


@pytest.mark.parametrize(
    "changes",
    [
        {"subject_id": "eve"},
        {"context": {"region": "us"}},
        {"units": {"reports": 2}},
        {"rule": "x"},
        {"expires_us": 5},
        {"about": "x"},
    ],
)
def test_another_event_is_not_the_same(changes: dict[str, Any]) -> None:
    kept = sealed(event(1))
    other = event(1, **changes)
    assert not is_same(other, pack_event(other), LOG, 7, kept, CIPHER)


def test_after_an_erasure_only_the_public_part_can_differ() -> None:
    kept = sealed(event(1))._replace(personal=None)
    other, another = event(1, subject_id="eve"), event(1, units={"reports": 2})
    assert is_same(other, pack_event(other), LOG, 7, kept, None)
    assert not is_same(another, pack_event(another), LOG, 7, kept, None)


@pytest.mark.parametrize(
    "public", [b"", b"\xc1", b"\x90", b"\x05", msgpack.packb([2] * 18), msgpack.packb([1] * 18), b"\x81\x90\x01"]
)
def test_what_is_no_public_part_is_refused(public: bytes) -> None:
    with pytest.raises(Damaged):
        fields_of(public)


def test_the_ledger_key_names_subjects_and_wraps_their_keys() -> None:
    key, other = LedgerKey(bytes(32)), LedgerKey(b"\1" * 32)
    ada = Subject("acme", "user", "ada", "")
    tag = key.tag(ada)
    assert tag[:PERSON_BYTES] == key.person("acme", "user", "ada")
    others = [ada._replace(tenant="acm", type="euser"), ada._replace(on_behalf_of="bob"), ada._replace(id="adb")]
    assert len({tag, other.tag(ada), *map(key.tag, others)}) == 5
    wrapped = key.wrap(b"k" * 32, tag, bytes(12))
    assert key.unwrap(wrapped, tag) == b"k" * 32
    for bad_key, bad_wrapped, bad_tag in (
        (other, wrapped, tag),
        (key, wrapped[:-1], tag),
        (key, b"", tag),
        (key, wrapped, key.tag(others[0])),
    ):
        with pytest.raises(Damaged):
            bad_key.unwrap(bad_wrapped, bad_tag)
    with pytest.raises(ValueError, match="32 bytes, not 31"):
        LedgerKey(bytes(31))


def test_public_fields_have_the_names_that_an_event_has_for_them() -> None:
    public = [name for name in UsageEvent._fields if name not in sealed_events._PERSONAL]
    assert list(PublicEvent._fields) == ["version", "subject", *public]


@given(events, st.integers(1, 9))
def test_what_is_public_reads_the_same_by_name(one: UsageEvent, subject: int) -> None:
    kept = seal(one, pack_event(one), LOG, subject, CIPHER, RANDOM)
    whole, read = public_event(kept.public), named(fields_of(kept.public))
    assert read.subject == subject
    assert all(getattr(read, name) == getattr(whole, name) for name in PublicEvent._fields[2:])


@given(events)
def test_spends_are_read_from_where_they_were_sealed(one: UsageEvent) -> None:
    kept = seal(one, pack_event(one), LOG, 1, CIPHER, RANDOM)
    public = named(fields_of(kept.public)).spends
    scoped = scoped_spends(opened(belonging(LOG), *kept, CIPHER))
    assert [list(spend) for spend in (*public, *scoped)] == plain(one).spends
    assert not any("@" in quota for quota, _ in public)
