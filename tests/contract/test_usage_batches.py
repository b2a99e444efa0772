"""Golden bytes of everything that crosses between the programs or outlives one: a change that is not meant fails here.

What is meant to change gets a new schema version in ``licet.wire.envelope``, and readers of both: sidecars, control
planes and logs on disk of two releases meet in every rollout.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import msgpack
import pytest

from licet.domain.catalog import (
    Action,
    Attribute,
    AttributeType,
    Catalog,
    Entitlement,
    Feature,
    Grant,
    License,
    LicenseStatus,
    OnExceeded,
    Plan,
    Policy,
    Rule,
    RuleEffect,
)
from licet.domain.catalog_wire import document_from_wire, license_from_wire
from licet.domain.ids import LimitKey
from licet.domain.money import NANOS, Fee, Price, Step, TierMode, Tiers
from licet.wire import documents, envelope
from licet.wire.documents import Head, Heartbeat, Manifest, catalog_of_chunks, chunk_catalog, digest_of
from licet.wire.envelope import EnvelopeError
from licet.wire.signing import Verifier
from licet.wire.usage import (
    LOST_RANGES_MAX,
    EventKind,
    LostRange,
    UsageBatch,
    UsageEvent,
    decision_id,
    event_seq,
    log_id,
    unpack_event,
)
from licet_sidecar.adapters.log_records import EVENT, HEADER, frame
from licet_sidecar.adapters.usage_log import (
    floor_record,
    lease_record,
)
from licet_sidecar.core.lease import Lease, Terms
from tests.support.published import KEY, Signer, limit
from tests.support.usage import batch, event, packed

LICENSE = License("acme", "pro", LicenseStatus.SUSPENDED, 1, 2, {"extra": 3}, {"reports:month": 4})
TOPPED_UP = replace(LICENSE, grants=(Grant("spring", LimitKey("reports:month"), 5, 6, 7, 8),))
CATALOG = Catalog.of(
    [
        Feature("reports", "report", "Reports"),
        Action("report.export", {"": "reports"}, {"region": Attribute(AttributeType.STRING, "eu")}),
        Plan("pro", {"reports": Entitlement(Price(8 * NANOS, 1_000, "USD"), (limit(10),))}),
        Policy("guard", ("report.*",), (Rule("no", RuleEffect.DENY, "quantity > 1"),)),
    ]
)
BILLED = Plan(
    "pro",
    {
        "reports": Entitlement(
            Price(
                8 * NANOS,
                1_000,
                "USD",
                "context.model",
                {"large": 9},
                Tiers(TierMode.VOLUME, (Step(10, 8 * NANOS, 0, {"large": 9}), Step(0, 6, 5))),
            ),
            (replace(limit(10), on_exceeded=OnExceeded.OVERAGE, overage_price=Price(1, 2, "USD")),),
            included=3,
        )
    },
    fee=Fee(49 * NANOS, "USD"),
)
HEARTBEAT = Heartbeat(
    sidecar="a" * 32,
    incarnation=2,
    at_us=3,
    started_us=4,
    address="127.0.0.1:7420",
    version="0.1.0",
    ready=True,
    draining=False,
    generation=5,
    revision=6,
    as_of_us=7,
    asserted_epoch=8,
    asserted_run="run",
    tenants_held=9,
    log_last_seq=10,
    log_acked_seq=11,
    log_bytes=12,
    hostname="pod",
    pid=13,
    deployment="d" * 32,
    acted_generation=14,
    acted_revision=15,
)


SETTLED = event(2)._replace(
    kind=EventKind.COMMIT,
    about="707265666978303000000000000000ff",
    held=[["reports:monthly:1788220800", 1]],  # type: ignore[list-item]  # as it is read
    units_held={"reports": 3},
    overage={"reports": 2},
    unfunded={"reports": 1},
    expires_us=1_790_000_900_000_000,
)
EXPOSED = event(3)._replace(priced_as={"reports": "large"}, exposures={"new-editor": "on"})


def held() -> Lease:
    """A lease of 10 units, of which 4 are spent."""
    lease = Lease(LimitKey("reports:month"), "0123456789abcdef", 1_788_220_800, 1_790_812_800, Terms(1_000))
    lease.cap, lease.used = 10, 4
    return lease


WRITTEN: dict[str, bytes] = {
    "event": packed(event(1)),
    "event with every field": packed(SETTLED),
    "event with its price and flags": packed(EXPOSED),
    "framed event": frame(EVENT, packed(event(1))),
    "framed header": frame(HEADER, envelope.pack("usage-log", ["a" * 32, 2, 1, 9, b"prefix00", 1])),
    "framed lease": lease_record("acme", held()),
    "framed floor": floor_record(1, 300),
    "license": Signer().license(LICENSE, 7),
    "license with a grant": Signer().license(TOPPED_UP, 8),
    "head": Signer().head(7, "run1", 1_790_000_000_000_000, epoch=2, live=3),
    "acknowledgement": Signer().ack(log_id("a" * 32, 1), 99),
    "bundle": Signer().document("bundle", "bundle", 7, Manifest(("ab", "cd"), True, "why", 5).to_payload()),
    "chunk": chunk_catalog(CATALOG)[0],
    "chunk of a plan": chunk_catalog(Catalog.of([BILLED]))[0],
    "chunks": msgpack.packb(chunk_catalog(CATALOG)),
    "heartbeat": HEARTBEAT.pack(),
    "snapshot": envelope.pack("snapshot", {"generation": 1}),
    "identity": envelope.pack("identity", ["a" * 32, 3, ["boot", 1, 2]]),
}

GOLDEN: dict[str, str] = {
    "event": (
        "dc001601cf00065bfeda25e001a461636d65a475736572a3616461a0ad7265706f72742e6578706f72740101a00181a77265"
        "706f7274730105a355534400a56a6f622d31a0a081a6726567696f6ea265759192ba7265706f7274733a6d6f6e74686c793a"
        "31373838323230383030019080"
    ),
    "event with every field": (
        "dc001d02cf00065bfeda25e002a461636d65a475736572a3616461a0ad7265706f72742e6578706f72740101a00181a77265"
        "706f7274730105a355534400a56a6f622d32a0a081a6726567696f6ea265759192ba7265706f7274733a6d6f6e74686c793a"
        "3137383832323038303001908002d92037303732363536363639373833303330303030303030303030303030303066669192"
        "ba7265706f7274733a6d6f6e74686c793a313738383232303830300181a77265706f7274730381a77265706f7274730281a7"
        "7265706f72747301cf00065bff0fcac900"
    ),
    "event with its price and flags": (
        "dc001f03cf00065bfeda25e003a461636d65a475736572a3616461a0ad7265706f72742e6578706f72740101a00181a77265"
        "706f7274730105a355534400a56a6f622d33a0a081a6726567696f6ea265759192ba7265706f7274733a6d6f6e74686c793a"
        "3137383832323038303001908000a0908080800081a77265706f727473a56c6172676581aa6e65772d656469746f72a26f6e"
    ),
    "framed event": (
        "71000000c4557cf401dc001601cf00065bfeda25e001a461636d65a475736572a3616461a0ad7265706f72742e6578706f72"
        "740101a00181a77265706f7274730105a355534400a56a6f622d31a0a081a6726567696f6ea265759192ba7265706f727473"
        "3a6d6f6e74686c793a31373838323230383030019080"
    ),
    "framed header": (
        "3d00000078e502c3039301a975736167652d6c6f6796d9206161616161616161616161616161616161616161616161616161"
        "616161616161020109c408707265666978303001"
    ),
    "framed lease": (
        "40000000b867984902dc0010a461636d65ad7265706f7274733a6d6f6e7468b030313233343536373839616263646566"
        "ce6a961580ce6abda280cd03e80a04000000a0cd03e8a0a0a0"
    ),
    "framed floor": "05000000791a6c92049201cd012c",
    "license": (
        "9301a67369676e656493b036333638643937366163306266383935c4404f1da40c55cb34ac18de400e66319e676b1b77232c"
        "b1635ae1fc8ac4e012f5624a05a524b946265586ac7a3c6b5e34dc44fbd9a72d37614d3059f98b4ca5fc09c49c96d9206464"
        "646464646464646464646464646464646464646464646464646464646464a76c6963656e7365a461636d65010788a674656e"
        "616e74a461636d65a4706c616ea370726fa6737461747573a973757370656e646564a87374617274735f7301a6656e64735f"
        "7302a66164646f6e7381a5657874726103a96f766572726964657381ad7265706f7274733a6d6f6e746804a66772616e7473"
        "90"
    ),
    "license with a grant": (
        "9301a67369676e656493b036333638643937366163306266383935c44064bc11655e341551adebe4d01298c260cc0687c13d"
        "3f4255bc9392aa776b7ade8e0655c5ff9eb83f92f5767bf8c68a4e698e3ecfbbae2d83cbaac89150422602c4b696d9206464"
        "646464646464646464646464646464646464646464646464646464646464a76c6963656e7365a461636d65010888a674656e"
        "616e74a461636d65a4706c616ea370726fa6737461747573a973757370656e646564a87374617274735f7301a6656e64735f"
        "7302a66164646f6e7381a5657874726103a96f766572726964657381ad7265706f7274733a6d6f6e746804a66772616e7473"
        "9196a6737072696e67ad7265706f7274733a6d6f6e746805060708"
    ),
    "head": (
        "9301a67369676e656493b036333638643937366163306266383935c440e141b2ed2374cf5e9364ad856fb791e3aadcd4d4fe"
        "d4e4f4dc8b4ba08dd8ce4d08a908f6ab8f8b58620413e26b6822be13d4d2e8803a2d61944232ee5a2ac405c47396d9206464"
        "646464646464646464646464646464646464646464646464646464646464a468656164a468656164010786a561745f7573cf"
        "00065bfeda25e000a672756e5f6964a472756e31a565706f636802a46c69766503b16c65646765725f67656e65726174696f"
        "6e00a662756e646c6500"
    ),
    "acknowledgement": (
        "9301a67369676e656493b036333638643937366163306266383935c440cb489bfa963bee5f3eecc6ed20103c4dbe77c3a2d4"
        "d32188fb2a41741a67493936cf8c06490fb0157aa48faba05d9669f468fd3bbe00ce09401430170306d206c44e96d9206464"
        "646464646464646464646464646464646464646464646464646464646464a361636bd9226161616161616161616161616161"
        "6161616161616161616161616161616161613a310163c0"
    ),
    "bundle": (
        "9301a67369676e656493b036333638643937366163306266383935c440da18bcb06685f43fbf1848c307254ab766e2cc8664"
        "f8db5d0ab713ba55b91307e52b65b843fa70bc6721b47cd7c8886a639539d946ee5499edc6ac80b172b40bc46c96d9206464"
        "646464646464646464646464646464646464646464646464646464646464a662756e646c65a662756e646c65010785a66368"
        "756e6b7392a26162a26364a76f627365727665c3a76d657373616765a3776879ac7075626c69736865645f757305a473616c"
        "74c400"
    ),
    "chunk": (
        "9301a56368756e6b9187a46b696e64a6416374696f6ea46e616d65ad7265706f72742e6578706f7274a66d657465727381a0"
        "a77265706f727473aa6174747269627574657381a6726567696f6e92a6737472696e67a26575aa6475726162696c697479a6"
        "6c6f67676564ae6f6e5f756e617661696c61626c6593a464656e790000ab7265736572766174696f6e92cd0384a663616e63"
        "656c"
    ),
    "chunk of a plan": (
        "9301a56368756e6b9186a46b696e64a4506c616ea46e616d65a370726fa57469746c65a0a8666561747572657381a7726570"
        "6f7274739495cf00000001dcd65000cd03e8a3555344ad636f6e746578742e6d6f64656c81a56c61726765099199ad726570"
        "6f7274733a6d6f6e74680aa56d6f6e746890a76f766572616765a863616c656e646172a000c20000a366656592cf0000000b"
        "68a0aa00a3555344a762696c6c696e6781a77265706f72747383a8696e636c7564656403a5746965727392a6766f6c756d65"
        "92940acf00000001dcd650000081a56c61726765099400060580a76f76657261676581ad7265706f7274733a6d6f6e746893"
        "0102a3555344"
    ),
    "chunks": (
        "94c4989301a56368756e6b9187a46b696e64a6416374696f6ea46e616d65ad7265706f72742e6578706f7274a66d65746572"
        "7381a0a77265706f727473aa6174747269627574657381a6726567696f6e92a6737472696e67a26575aa6475726162696c69"
        "7479a66c6f67676564ae6f6e5f756e617661696c61626c6593a464656e790000ab7265736572766174696f6e92cd0384a663"
        "616e63656cc43e9301a56368756e6b9184a46b696e64a746656174757265a46e616d65a77265706f727473a4756e6974a672"
        "65706f7274a57469746c65a75265706f727473c4759301a56368756e6b9184a46b696e64a4506c616ea46e616d65a370726f"
        "a57469746c65a0a8666561747572657381a77265706f7274739495cf00000001dcd65000cd03e8a3555344a0809199ad7265"
        "706f7274733a6d6f6e74680aa56d6f6e746890a464656e79a863616c656e646172a000c20000c4659301a56368756e6b9185"
        "a46b696e64a6506f6c696379a46e616d65a56775617264a7616374696f6e7391a87265706f72742e2aab656e666f7263656d"
        "656e74a7656e666f726365a572756c65739194a26e6fa464656e79ac7175616e74697479203e2031a0"
    ),
    "heartbeat": (
        "9301a9686561727462656174de0019a773696465636172d92061616161616161616161616161616161616161616161616161"
        "61616161616161ab696e6361726e6174696f6e02a561745f757303aa737461727465645f757304a761646472657373ae3132"
        "372e302e302e313a37343230a776657273696f6ea5302e312e30a57265616479c3a8647261696e696e67c2aa67656e657261"
        "74696f6e05a87265766973696f6e06a861735f6f665f757307ae61737365727465645f65706f636808ac6173736572746564"
        "5f72756ea372756eac74656e616e74735f68656c6409ac6c6f675f6c6173745f7365710aad6c6f675f61636b65645f736571"
        "0ba96c6f675f62797465730ca8686f73746e616d65a3706f64a37069640dab61737365727465645f6d7300a7726574697265"
        "64c2a46b65797390aa6465706c6f796d656e74d9206464646464646464646464646464646464646464646464646464646464"
        "646464b061637465645f67656e65726174696f6e0eae61637465645f7265766973696f6e0f"
    ),
    "snapshot": "9301a8736e617073686f7481aa67656e65726174696f6e01",
    "identity": (
        "9301a86964656e7469747993d92061616161616161616161616161616161616161616161616161616161616161610393a4626f6f740102"
    ),
}
OLDER: dict[str, str] = {
    "framed lease, without what is left": (
        "38000000c64f825f029ca461636d65ad7265706f7274733a6d6f6e7468b030313233343536373839616263646566ce6a"
        "961580ce6abda280cd03e80a04000000a0"
    ),
    "bundle": (
        "9301a67369676e656493b036333638643937366163306266383935c440124599d171c7305fd96bf9db401bc3a79e1971c32e"
        "5102de89adb97610d99e1adb6008e8e181180992e5d565edf145959ef36f1281991f3c7b7d5ee392c99106c46596d9206464"
        "646464646464646464646464646464646464646464646464646464646464a662756e646c65a662756e646c65010784a66368"
        "756e6b7392a26162a26364a76f627365727665c3a76d657373616765a3776879ac7075626c69736865645f757305"
    ),
    "head": (
        "9301a67369676e656493b036333638643937366163306266383935c4403229cd7603808a9a41d9d6afb5e54a904c90c888c0"
        "7b48a282dee2e756602b65267d1ca0e2d06c73452b8925995d81788cc2d41ecfd15789032ca22f9caf0004c45896d9206464"
        "646464646464646464646464646464646464646464646464646464646464a468656164a468656164010784a561745f7573cf"
        "00065bfeda25e000a672756e5f6964a472756e31a565706f636802a46c69766503"
    ),
    "heartbeat": (
        "9301a9686561727462656174de0016a773696465636172d92061616161616161616161616161616161616161616161616161"
        "61616161616161ab696e6361726e6174696f6e02a561745f757303aa737461727465645f757304a761646472657373ae3132"
        "372e302e302e313a37343230a776657273696f6ea5302e312e30a57265616479c3a8647261696e696e67c2aa67656e657261"
        "74696f6e05a87265766973696f6e06a861735f6f665f757307ae61737365727465645f65706f636808ac6173736572746564"
        "5f72756ea372756eac74656e616e74735f68656c6409ac6c6f675f6c6173745f7365710aad6c6f675f61636b65645f736571"
        "0ba96c6f675f62797465730ca8686f73746e616d65a3706f64a37069640dab61737365727465645f6d7300a7726574697265"
        "64c2a46b65797390"
    ),
    "framed lease": (
        "34000000092441c20298a461636d65ad7265706f7274733a6d6f6e7468b030313233343536373839616263646566ce6a9615"
        "80ce6abda280cd03e80a04"
    ),
    "license": (
        "9301a67369676e656493b036333638643937366163306266383935c440c62747f9ba84638273747acf39374a61a18f64cf18"
        "9320d5eee51518953d22d5b40ad523e1a135ad77278c2429a97579d6ef2431847240a6dd7677a8b9173608c49496d9206464"
        "646464646464646464646464646464646464646464646464646464646464a76c6963656e7365a461636d65010787a674656e"
        "616e74a461636d65a4706c616ea370726fa6737461747573a973757370656e646564a87374617274735f7301a6656e64735f"
        "7302a66164646f6e7381a5657874726103a96f766572726964657381ad7265706f7274733a6d6f6e746804"
    ),
    "chunk": (
        "9301a56368756e6b9186a46b696e64a6416374696f6ea46e616d65ad7265706f72742e6578706f7274a66d657465727381a0"
        "a77265706f727473aa6174747269627574657381a6726567696f6e92a6737472696e67a26575aa6475726162696c697479a6"
        "6c6f67676564ae6f6e5f756e617661696c61626c6593a464656e790000"
    ),
    "chunks": (
        "94c4819301a56368756e6b9186a46b696e64a6416374696f6ea46e616d65ad7265706f72742e6578706f7274a66d65746572"
        "7381a0a77265706f727473aa6174747269627574657381a6726567696f6e92a6737472696e67a26575aa6475726162696c69"
        "7479a66c6f67676564ae6f6e5f756e617661696c61626c6593a464656e790000c43e9301a56368756e6b9184a46b696e64a7"
        "46656174757265a46e616d65a77265706f727473a4756e6974a67265706f7274a57469746c65a75265706f727473c4699301"
        "a56368756e6b9184a46b696e64a4506c616ea46e616d65a370726fa57469746c65a0a8666561747572657381a77265706f72"
        "74739495cf00000001dcd65000cd03e8a3555344a0809195ad7265706f7274733a6d6f6e74680aa56d6f6e746890a464656e"
        "790000c4659301a56368756e6b9185a46b696e64a6506f6c696379a46e616d65a56775617264a7616374696f6e7391a87265"
        "706f72742e2aab656e666f7263656d656e74a7656e666f726365a572756c65739194a26e6fa464656e79ac7175616e746974"
        "79203e2031a0"
    ),
}
"""What programs wrote before limits had an anchor, actions terms for reservations, licenses grants, and heads the
generation of the ledger."""

BATCH = (
    "9301a5757361676598d9206161616161616161616161616161616161616161616161616161616161616161010000c4087072"
    "6566697830300102c47d7801bbc320c6789e812dfadf2dd5078c4b12937353979416a7162d4e4c495cb0b628b520bfa8442f"
    "b5024431322e606c5c0e112a66645d1c1aecc2b0342b3f49d770c182c66545a9e999f9798b524b274eda055563959b9f5792"
    "91536965686e61616464606160c038a1e10e831813cc4226f22c3422c9420067c1596c"
)
"""Its compressed part depends on the version of zlib: it is compared unpacked."""


@pytest.mark.parametrize("name", list(GOLDEN))
def test_what_is_written_has_not_changed(name: str) -> None:
    assert WRITTEN[name].hex() == GOLDEN[name]


def test_everything_that_is_written_has_golden_bytes() -> None:
    assert set(WRITTEN) == set(GOLDEN)


def test_golden_events_are_read() -> None:
    data = bytes.fromhex(GOLDEN["event"])
    assert unpack_event(data) == event(1)._replace(spends=[["reports:monthly:1788220800", 1]])  # type: ignore[list-item]
    assert event_seq(data) == 1


def test_an_event_without_the_fields_appended_since_is_read() -> None:
    older = msgpack.packb(msgpack.unpackb(bytes.fromhex(GOLDEN["event"]))[:21])
    assert unpack_event(older).shadow == []
    assert unpack_event(older).feature_costs == {}
    assert unpack_event(older).kind == EventKind.CHECK


def test_a_golden_event_with_every_field_is_read() -> None:
    read = unpack_event(bytes.fromhex(GOLDEN["event with every field"]))
    assert read == SETTLED._replace(spends=[["reports:monthly:1788220800", 1]])  # type: ignore[list-item]


def test_a_golden_event_with_its_price_and_flags_is_read() -> None:
    read = unpack_event(bytes.fromhex(GOLDEN["event with its price and flags"]))
    assert (read.priced_as, read.exposures) == ({"reports": "large"}, {"new-editor": "on"})
    assert unpack_event(bytes.fromhex(GOLDEN["event with every field"])).exposures == {}


def test_a_golden_plan_is_read_also_by_a_sidecar_that_knows_nothing_of_bills() -> None:
    chunk = bytes.fromhex(GOLDEN["chunk of a plan"])
    assert catalog_of_chunks([chunk], [digest_of(chunk)]).plans["pro"] == BILLED
    (wire,) = envelope.unpack("chunk", chunk)
    older = document_from_wire({key: value for key, value in wire.items() if key not in ("fee", "billing")})
    assert isinstance(older, Plan)
    assert older.features["reports"].price == replace(BILLED.features["reports"].price, tiers=None)


def test_a_golden_batch_is_read() -> None:
    assert UsageBatch.unpack(bytes.fromhex(BATCH)) == batch(1, 2)


def test_the_layout_of_a_batch_has_not_changed() -> None:
    golden, now = (msgpack.unpackb(data) for data in (bytes.fromhex(BATCH), batch(1, 2).pack()))
    assert golden[:2] == now[:2] == [1, "usage"]
    assert golden[2][:7] == now[2][:7]
    assert zlib.decompress(golden[2][7]) == zlib.decompress(now[2][7]) == packed(event(1)) + packed(event(2))


def payload_of(written: str, kind: str, key: str) -> Any:
    """What a signed document says, from the hexadecimal of its bytes."""
    statement = Verifier([KEY.public_key]).verify(bytes.fromhex(written), kind=kind, key=key)
    assert (statement.deployment, statement.generation) == ("d" * 32, 1)
    return statement.payload


LOST = (LostRange(3, 9, "bytes 700 to 2,100 are damaged"),)
DECLARING = (
    "9301a5757361676599d9206161616161616161616161616161616161616161616161616161616161616161010000c408707265666978303"
    "00a09c40878010300000000019193"
    "0309be62797465732037303020746f20322c313030206172652064616d61676564"
)
"""A batch that only declares: its events, none, are compressed the same by every zlib."""


def test_a_batch_that_declares_what_is_lost_has_golden_bytes() -> None:
    assert batch(10, 9, lost=LOST).pack().hex() == DECLARING
    assert UsageBatch.unpack(bytes.fromhex(DECLARING)) == batch(10, 9, lost=LOST)


def test_a_batch_with_events_declares_too() -> None:
    made = batch(10, 12, lost=LOST)
    assert UsageBatch.unpack(made.pack()) == made
    assert msgpack.unpackb(made.pack())[2][8] == [[3, 9, LOST[0].reason]]


@pytest.mark.parametrize(
    "lost",
    [
        (LostRange(0, 1, "x"),),
        (LostRange(5, 4, "x"),),
        (LostRange(1, 2**63, "x"),),
        (LostRange(1, 2, 7),),  # type: ignore[arg-type]
        (LostRange(1, 1, "x"),) * (LOST_RANGES_MAX + 1),
    ],
    ids=["zero", "backwards", "huge", "no reason", "too many"],
)
def test_what_is_no_range_of_lost_events_is_refused(lost: tuple[LostRange, ...]) -> None:
    with pytest.raises(EnvelopeError):
        UsageBatch.unpack(batch(10, 12, lost=lost).pack())


@pytest.mark.parametrize("seq", [1, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**63 - 1])
def test_a_number_of_any_size_is_read_from_an_event(seq: int) -> None:
    assert event_seq(packed(event(seq))) == seq


def test_golden_documents_verify_and_are_read() -> None:
    def payload(name: str, kind: str, key: str) -> Any:
        return payload_of(GOLDEN[name], kind, key)

    assert license_from_wire(payload("license", documents.LICENSE, "acme")) == LICENSE
    assert license_from_wire(payload("license with a grant", documents.LICENSE, "acme")) == TOPPED_UP
    assert Head.from_payload(payload("head", documents.HEAD, "head")) == Head(1_790_000_000_000_000, "run1", 2, 3)
    assert Manifest.from_payload(payload("bundle", "bundle", "bundle")) == Manifest(("ab", "cd"), True, "why", 5)
    assert payload("acknowledgement", documents.ACK, log_id("a" * 32, 1)) is None


def test_golden_chunks_are_read() -> None:
    chunks = msgpack.unpackb(bytes.fromhex(GOLDEN["chunks"]))
    assert catalog_of_chunks(chunks, [digest_of(chunk) for chunk in chunks]) == CATALOG


def test_what_older_programs_wrote_is_read() -> None:
    assert Manifest.from_payload(payload_of(OLDER["bundle"], "bundle", "bundle")) == Manifest(
        ("ab", "cd"), True, "why", 5
    )
    assert license_from_wire(payload_of(OLDER["license"], documents.LICENSE, "acme")) == LICENSE
    chunks = msgpack.unpackb(bytes.fromhex(OLDER["chunks"]))
    assert bytes.fromhex(OLDER["chunk"]) == chunks[0]
    assert catalog_of_chunks(chunks, [digest_of(chunk) for chunk in chunks]) == CATALOG
    head = payload_of(OLDER["head"], documents.HEAD, "head")
    assert Head.from_payload(head) == Head(1_790_000_000_000_000, "run1", 2, 3, ledger_generation=0)
    older = replace(HEARTBEAT, asserted_ms=0, retired=False, deployment="", acted_generation=0, acted_revision=0)
    assert Heartbeat.unpack(bytes.fromhex(OLDER["heartbeat"])) == older


def test_a_golden_heartbeat_is_read() -> None:
    assert Heartbeat.unpack(bytes.fromhex(GOLDEN["heartbeat"])) == HEARTBEAT


def test_fields_that_a_newer_program_appended_are_ignored() -> None:
    written = msgpack.unpackb(bytes.fromhex(GOLDEN["event"]))
    since = [UsageEvent._field_defaults[name] for name in UsageEvent._fields[len(written) :]]
    newer = msgpack.packb([*written, *since, "new", 7], default=dict)
    assert unpack_event(newer).seq == 1
    heartbeat = envelope.unpack("heartbeat", HEARTBEAT.pack())
    assert Heartbeat.unpack(envelope.pack("heartbeat", {**heartbeat, "new": 1})) == HEARTBEAT
    assert Head.from_payload({"at_us": 1, "run_id": "r", "epoch": 1, "live": 1, "new": 1}) == Head(1, "r", 1, 1)


def test_a_head_of_no_sidecar_counts_one() -> None:
    assert Head.from_payload({"at_us": 1, "run_id": "r", "epoch": 1, "live": 0}).live == 1


def test_events_are_packed_once_and_travel_as_they_are() -> None:
    assert UsageBatch.unpack(batch(5, 9).pack()).events == tuple(packed(event(seq)) for seq in range(5, 10))


@pytest.mark.parametrize(
    "events",
    [
        (),
        (packed(event(1)),),
        (packed(event(2)), packed(event(1))),
        (packed(event(1)), packed(event(2)), packed(event(3))),
        (packed(event(1)), packed(event(1))),
    ],
    ids=["none", "too few", "wrong order", "too many", "twice"],
)
def test_a_batch_holds_exactly_the_events_it_says(events: tuple[bytes, ...]) -> None:
    whole = batch(1, 2)
    spoiled = UsageBatch(whole.sidecar, 1, 0, 0, whole.decision_prefix, 1, 2, events)
    with pytest.raises(EnvelopeError, match="does not hold exactly"):
        UsageBatch.unpack(spoiled.pack())


def test_a_batch_damaged_at_any_byte_is_refused_or_the_same() -> None:
    data = batch(1, 3).pack()
    for offset in range(len(data)):
        damaged = bytearray(data)
        damaged[offset] ^= 0x41
        try:
            found = UsageBatch.unpack(bytes(damaged))
        except EnvelopeError:
            continue
        assert len(found.events) == 3


@pytest.mark.parametrize("size", [0, 1, 10, 50, -1])
def test_a_truncated_batch_is_refused(size: int) -> None:
    with pytest.raises(EnvelopeError):
        UsageBatch.unpack(batch(1, 3).pack()[:size])


def test_a_batch_that_inflates_without_end_is_refused() -> None:
    whole = envelope.unpack("usage", batch(1, 1).pack())
    bomb = zlib.compress(b"\x00" * (envelope.MESSAGE_BYTES_MAX + 1))
    with pytest.raises(EnvelopeError, match="larger than is accepted"):
        UsageBatch.unpack(envelope.pack("usage", [*whole[:7], bomb]))


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x90", b"\x91\x01", b"\xff" * 9, packed(event(1))[:-1]])
def test_what_is_no_event_is_refused(data: bytes) -> None:
    with pytest.raises(EnvelopeError):
        unpack_event(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xc1", "not readable"),
        (msgpack.packb([1, "other", {}]), "expected heartbeat, found 'other'"),
        (msgpack.packb([2, "heartbeat", {}]), "upgrade it"),
        (msgpack.packb([1, "heartbeat"]), "not an envelope"),
        (msgpack.packb({"a": 1}), "not an envelope"),
        (msgpack.packb([1, "heartbeat", {}]), "is missing"),
    ],
)
def test_an_envelope_that_cannot_be_read_says_why(data: bytes, message: str) -> None:
    with pytest.raises(EnvelopeError, match=message):
        Heartbeat.unpack(data)


def test_ids_of_decisions_and_logs_have_not_changed() -> None:
    assert decision_id(b"prefix00", 255) == "707265666978303000000000000000ff"
    assert log_id("a" * 32, 3) == "a" * 32 + ":3"


def test_fields_of_an_event_are_only_ever_appended() -> None:
    assert UsageEvent._fields == (
        *("seq", "at_us", "tenant", "subject_type", "subject_id", "on_behalf_of", "action", "effect", "reason", "rule"),
        *("revision", "units", "cost_nanos", "currency", "flags", "idempotency_key", "resource_type", "resource_id"),
        *("context", "spends", "shadow", "feature_costs", "kind", "about", "held", "units_held", "overage", "unfunded"),
        *("expires_us", "priced_as", "exposures", "access_request_id", "justification"),
    )
