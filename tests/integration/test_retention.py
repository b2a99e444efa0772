"""Months that leave the ledger, over both databases: exported whole, dropped exactly, never taken again."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, func, select, update

from licet.wire.signing import SigningKey
from licet_control_plane.api.app import make_app
from licet_control_plane.core.accounting import DecodedBatch
from licet_control_plane.server import listen, serve
from licet_control_plane.store import ledger, meta, partitions, retention, usage_reports
from licet_control_plane.store.database import Database
from licet_control_plane.store.partitions import Month
from licet_control_plane.store.schema import audit, events, exports, rollups
from licet_control_plane.store.verification import Verification
from tests.support.command_line import CommandLine, Ended, licet_command
from tests.support.control_plane import Deployment, deployment
from tests.support.ledger import verification_of
from tests.support.usage import batch
from tests.support.valkey import ValkeyProcess

__all__ = ["licet_command"]

MAY, JUNE = Month(2026, 5), Month(2026, 6)


class Stack:
    """A control plane with its API on a port, and the command line."""

    def __init__(self, running: Deployment, port: int, licet: CommandLine, directory: Path) -> None:
        self.running = running
        self.directory = directory
        self._port = port
        self._licet = licet

    @property
    def database(self) -> Database:
        return self.running.plane.database

    async def __call__(self, *arguments: object) -> Ended:
        where = ("--server", f"http://127.0.0.1:{self._port}", "--api-key", self.running.admin_key)
        return await asyncio.to_thread(self._licet, *arguments, *where)

    async def record(self, first: int, last: int, month: Month, **fields: Any) -> ledger.Recorded:
        at_us = fields.pop("at_us", month.start_us + 1_000_000)
        fields.setdefault("spends", [(f"reports:month:{month.start_us // 1_000_000}", 1)])
        made = DecodedBatch.of(batch(first, last, at_us=at_us, **fields).pack())
        return await self.database.write(ledger.record, 0, [made], keys=self.running.keys, now_us=1)

    async def count(self) -> int:
        query = select(func.count()).select_from(events)
        counted: int = await self.database.read(lambda connection: connection.execute(query).scalar_one())
        return counted

    async def verified(self) -> Verification:
        return await asyncio.to_thread(
            verification_of, self.database, self.running.ledger_key, verifier=self.running.verifier
        )

    async def summed(self) -> list[usage_reports.Usage]:
        return (await self.database.read(usage_reports.summary, by=["tenant"]))[0]

    async def export(self, month: Month, name: str = "out.gz") -> Ended:
        return await self("ledger", "export", "--month", month, "--output", self.directory / name, "--json")

    async def begin(self, month: Month) -> list[retention.Range]:
        now_us = Month(2026, 8).start_us
        return await self.database.write(retention.begin, month, self.running.verifier, now_us=now_us)

    async def drop(self, month: Month) -> Ended:
        return await self("ledger", "drop", "--month", month, "--yes", "--json")


@pytest.fixture
async def stack(
    tmp_path: Path, valkey_process: ValkeyProcess, database_url: str, licet_command: CommandLine
) -> AsyncIterator[Stack]:
    async with deployment(tmp_path / "state", valkey_process.url, database_url=database_url, start=False) as running:
        await running.start()
        listener = listen("127.0.0.1", 0)
        stop = asyncio.Event()
        serving = asyncio.create_task(serve(make_app(running.plane), listener, stop))
        # As they would have been made at the time.
        await running.plane.database.write(partitions.ensure, now_us=JUNE.start_us)
        try:
            yield Stack(running, listener.getsockname()[1], licet_command, tmp_path)
        finally:
            stop.set()
            await serving


async def test_an_export_holds_every_event_of_its_month_and_no_other(stack: Stack) -> None:
    await stack.record(1, 40, MAY)
    await stack.record(41, 60, JUNE)
    await stack.record(1, 30, MAY, sidecar="b" * 32, subject_id='quo"te\n')
    ended = await stack.export(MAY)
    assert (ended.code, ended.json["events"]) == (0, 70)
    text = gzip.decompress((stack.directory / "out.gz").read_bytes())
    lines = [json.loads(line) for line in text.splitlines()]
    header, end = lines[0], lines[-1]
    assert (header["month"], header["deployment"], end["events"]) == ("2026-05", "d" * 32, 70)
    assert end["sha256"] == hashlib.sha256(text[: text.rindex(b"\n", 0, -1) + 1]).hexdigest()
    rows = [dict(zip(header["columns"], line, strict=True)) for line in lines if isinstance(line, list)]
    names = {int(number): name for line in lines if "logs" in line for number, name in line["logs"].items()}
    assert sorted((names[row["log"]][0], row["seq"]) for row in rows) == sorted(
        [*(("a", seq) for seq in range(1, 41)), *(("b", seq) for seq in range(1, 31))]
    )
    kept = await stack.database.read(lambda c: c.execute(select(events.c.public).where(events.c.seq == 7)).first())
    mine = next(row for row in rows if (names[row["log"]][0], row["seq"]) == ("a", 7))
    assert mine["public"] == base64.b64encode(kept.public).decode()
    assert (await stack("ledger", "months", "--json")).json["items"][0]["exported"] == 0  # June, which was not


async def test_a_file_that_was_kept_is_whole_or_says_what_is_not(stack: Stack) -> None:
    await stack.record(1, 40, MAY)
    await stack.record(1, 30, MAY, sidecar="b" * 32, subject_id='quo"te\n')
    await stack.export(MAY)
    path = stack.directory / "out.gz"
    by_server = await stack("ledger", "check-export", path)
    assert (by_server.code, "2026-05: 70 events of 2 logs, as signed" in by_server.out) == (0, True)
    key = stack.running.key.public_key
    ended = await stack("ledger", "check-export", path, "--public-key", key, "--server", "http://127.0.0.1:1", "--json")
    (item,) = ended.json["items"]
    assert (ended.json["ok"], item["events"], item["logs"], item["deployment"]) == (True, 70, 2, "d" * 32)
    whole = gzip.decompress(path.read_bytes())
    lines = whole.splitlines(keepends=True)
    wrong = stack.directory / "wrong.gz"

    async def problem(content: bytes, *, key: str = key) -> str:
        wrong.write_bytes(content)
        ended = await stack("ledger", "check-export", path, wrong, "--public-key", key)
        assert ended.code == 1
        return ended.out.splitlines()[-1].partition("NOT WHOLE: ")[2]

    for number in range(len(lines) - 1):
        assert await problem(gzip.compress(b"".join(lines[:number] + lines[number + 1 :])))
    swapped = [*lines[:2], lines[3], lines[2], *lines[4:]]
    assert await problem(gzip.compress(b"".join(swapped)))
    assert "column" in await problem(gzip.compress(whole.replace(b'"acme"', b'"emca"', 1)))
    assert "its end is missing" in await problem(path.read_bytes()[:-30])
    assert await problem(gzip.compress(b"".join(lines[:-1])))
    assert "no gzip file" in await problem(b"not gzip")
    assert await problem(gzip.compress(b""))
    assert await problem(gzip.compress(whole), key=SigningKey.generate().public_key)


async def test_a_dropped_month_is_gone_and_all_that_was_said_of_it_stays(stack: Stack) -> None:
    await stack.record(1, 40, MAY)
    await stack.record(41, 60, JUNE)
    before = await stack.summed()
    await stack.export(MAY)
    ended = await stack.drop(MAY)
    assert (ended.code, ended.json) == (0, {"month": "2026-05", "done": True, "events": 40})
    assert await stack.count() == 20
    assert await stack.summed() == before
    report = await stack.verified()
    assert (report.ok, report.events, report.dropped) == (True, 20, {"2026-05": 40})
    assert report.logs[0].watermark == 60
    [may] = [one for one in (await stack("ledger", "months", "--json")).json["items"] if one["month"] == "2026-05"]
    assert (may["events"], may["dropped"], may["exported"]) == (0, 40, 40)
    assert may["dropped_at"]
    verify = await stack("ledger", "verify")
    assert (verify.code, "dropped: 2026-05, 40 events" in verify.out) == (0, True)


async def test_a_dropped_month_takes_none_of_its_events_again(stack: Stack) -> None:
    await stack.record(1, 40, MAY)
    await stack.export(MAY)
    await stack.drop(MAY)
    done = await stack.record(1, 40, MAY)
    assert (done.inserted, done.duplicates, done.conflicts) == (0, 40, 0)
    assert list(done.watermarks.values()) == [40]
    assert await stack.count() == 0
    assert (await stack.verified()).ok


async def test_a_late_event_of_a_dropped_month_is_billed_exported_and_dropped_too(stack: Stack) -> None:
    await stack.record(1, 40, MAY)
    await stack.export(MAY)
    await stack.drop(MAY)
    assert (await stack.record(41, 45, MAY)).inserted == 5
    assert sum(one.events for one in await stack.summed()) == 45
    assert (await stack.verified()).ok
    refused = await stack.drop(MAY)
    assert (refused.code, "was not exported since it was dropped" in refused.err) == (1, True)
    assert (await stack.export(MAY, "late.gz")).json["events"] == 5
    assert (await stack.drop(MAY)).json["events"] == 5
    report = await stack.verified()
    assert (report.ok, report.events, report.dropped) == (True, 0, {"2026-05": 45})


async def test_what_came_after_the_export_is_not_dropped(stack: Stack) -> None:
    await stack.record(1, 40, MAY)
    await stack.export(MAY)
    await stack.record(41, 45, MAY)
    refused = await stack.drop(MAY)
    assert (refused.code, "5 events that came after it was exported" in refused.err) == (1, True)
    assert await stack.count() == 45


async def test_events_with_holes_between_them_are_dropped_exactly(stack: Stack) -> None:
    for seq in (1, 3, 4, 9):
        await stack.record(seq, seq, MAY)
    await stack.export(MAY)
    parts = await stack.begin(MAY)
    assert [(first, last) for _, first, last in parts] == [(1, 1), (3, 4), (9, 9)]
    await stack.drop(MAY)
    await stack.record(2, 2, MAY)
    assert await stack.count() == 1


async def test_a_drop_that_was_cut_short_goes_on(stack: Stack) -> None:
    await stack.record(1, 40, MAY, at_us=MAY.end_us - 1)
    await stack.export(MAY)
    log = (await stack.begin(MAY))[0][0]
    await stack.database.write(retention.drop_part, MAY, [(log, 1, 15)], now_us=Month(2026, 8).start_us)
    report = await stack.verified()
    assert (report.ok, report.events, report.dropped) == (True, 25, {"2026-05": 15})
    assert (await stack.drop(MAY)).json == {"month": "2026-05", "done": True, "events": 40}
    assert (await stack.verified()).ok


async def test_a_month_that_is_not_closed_or_not_exported_stays(stack: Stack) -> None:
    now = Month.at(int(stack.running.plane.now_s() * 1_000_000))
    await stack.record(1, 5, now)
    await stack.record(6, 9, MAY)
    for refused in (await stack.export(now), await stack.drop(now)):
        assert (refused.code, "is not closed" in refused.err) == (1, True)
    refused = await stack.drop(MAY)
    assert (refused.code, "licet ledger export --month 2026-05" in refused.err) == (1, True)
    assert await stack.count() == 9
    assert list(stack.directory.glob("out*")) == []
    assert (await stack("ledger", "drop", "--month", "May", "--yes")).code == 1


async def test_only_what_this_server_signed_counts_as_an_export(stack: Stack) -> None:
    await stack.record(1, 40, MAY)
    await stack.export(MAY)
    end = json.loads(gzip.decompress((stack.directory / "out.gz").read_bytes()).splitlines()[-1])
    api = make_app(stack.running.plane)
    import httpx

    headers = {"Authorization": f"Bearer {stack.running.admin_key}"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://licet", headers=headers) as http:
        signed = bytearray(base64.b64decode(end["signed"]))
        signed[-1] ^= 1
        forged = await http.post(
            "/v1/ledger/months/2026-05/exports", json={"signed": base64.b64encode(signed).decode()}
        )
        other = await http.post("/v1/ledger/months/2026-06/exports", json={"signed": end["signed"]})
    assert (forged.status_code, other.status_code) == (422, 422)


async def test_exports_and_drops_are_in_the_audit_trail(stack: Stack) -> None:
    await stack.record(1, 4, MAY)
    await stack.export(MAY)
    await stack.drop(MAY)
    query = select(audit.c.action, audit.c.target, audit.c.by).order_by(audit.c.number)
    rows = await stack.database.read(lambda connection: connection.execute(query).all())
    assert [tuple(row) for row in rows] == [
        ("ledger.export", "2026-05", "admin"),
        ("ledger.drop", "2026-05", "admin"),
    ]


async def test_an_event_that_is_removed_otherwise_is_missed(stack: Stack) -> None:
    await stack.record(1, 40, MAY)
    await stack.record(41, 60, JUNE)
    await stack.export(MAY)
    await stack.drop(MAY)
    await stack.database.write(lambda connection: connection.execute(delete(events).where(events.c.seq == 50)))
    report = await stack.verified()
    missing = [one.seq for one in report.findings if one.kind == "removed"]
    assert (report.ok, missing, report.rollups_match) == (False, [50], False)


async def test_sums_of_months_that_are_here_are_still_checked(stack: Stack) -> None:
    await stack.record(1, 40, MAY)
    await stack.record(41, 60, JUNE)
    await stack.export(MAY)
    await stack.drop(MAY)
    june = rollups.c.hour >= JUNE.start_us // 1_000_000
    await stack.database.write(lambda connection: connection.execute(update(rollups).where(june).values(units=1)))
    assert not (await stack.verified()).rollups_match


async def test_a_file_that_is_there_is_not_overwritten(stack: Stack) -> None:
    await stack.record(1, 4, MAY)
    (stack.directory / "out.gz").write_text("precious")
    ended = await stack.export(MAY)
    assert (ended.code, "is there already" in ended.err) == (2, True)
    assert (stack.directory / "out.gz").read_text() == "precious"
    query = select(func.count()).select_from(exports)
    assert await stack.database.read(lambda connection: connection.execute(query).scalar_one()) == 0


async def test_a_restored_ledger_begins_a_generation(stack: Stack) -> None:
    ended = await stack("ledger", "restored", "--yes", "--json")
    assert (ended.code, ended.json) == (0, {"ledger_generation": 2})
    assert (await stack.database.read(meta.read)).ledger_generation == 2
