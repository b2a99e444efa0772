"""The composition root: puts a sidecar together, runs it, and takes it down in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import signal
import socket
import time
from collections.abc import Coroutine
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from licet.wire.documents import Head, Heartbeat
from licet.wire.names import RedisNames
from licet.wire.registers import QUOTA_KEPT_S, Pair
from licet.wire.signing import Verifier
from licet_sidecar.adapters.https_route import HttpsRoute
from licet_sidecar.adapters.redis_lease_store import RedisLeaseStore
from licet_sidecar.adapters.redis_link import connect
from licet_sidecar.adapters.redis_seat_store import RedisSeatStore
from licet_sidecar.adapters.redis_state_source import RedisStateSource
from licet_sidecar.adapters.redis_usage_sink import RedisUsageSink
from licet_sidecar.adapters.state_directory import StateDirectory
from licet_sidecar.adapters.usage_log import LogHeader, Recovered, UsageLog, UsageLogError, floor_record, seat_record
from licet_sidecar.clock import Clock, SystemClock
from licet_sidecar.config import Config, read_public_keys, split_public_keys
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.leases import LeaseBook
from licet_sidecar.core.reservations import ReservationBook
from licet_sidecar.core.seats import SeatBook
from licet_sidecar.logs import Logger
from licet_sidecar.ports import LinkDown, LinkRefused, PulseReport
from licet_sidecar.services import reservation_records
from licet_sidecar.services.access import AccessService
from licet_sidecar.services.approval import ApprovalService
from licet_sidecar.services.durability import DurabilityGate
from licet_sidecar.services.explaining import ExplainingService
from licet_sidecar.services.idempotency import RecentAnswers
from licet_sidecar.services.leasing import LeasingService
from licet_sidecar.services.link import LinkState
from licet_sidecar.services.metrics import CONTENT_TYPE, Metrics
from licet_sidecar.services.seat_keeping import SeatKeeper
from licet_sidecar.services.seats import SeatService
from licet_sidecar.services.shipping import ShippingService
from licet_sidecar.services.syncing import SyncService
from licet_sidecar.services.tally import Tally
from licet_sidecar.services.trust import TrustedKeys
from licet_sidecar.transport.grpc_edge import GrpcEdge
from licet_sidecar.transport.http_edge import HttpEdge

PULSE_S: Final = 1.0
PULSE_S_MIN: Final = 0.05
UPKEEP_S: Final = 1.25
"""With a pulse each second and a blocking read each five that is two round trips a second, whatever is held."""
SECOND_ROUTE_S: Final = 5.0
"""Between rounds over HTTPS while Redis is away: far below ``--staleness-max``, and no burden."""
SECOND_ROUTE_S_AT_START: Final = 0.5
LOOP_STALLED_MS: Final = 10_000
"""Without a turn of the event loop for this long, ``/healthz`` says that the process hangs."""


class Sidecar:
    """One sidecar, its state directory locked, ready to be run."""

    def __init__(self, config: Config, clock: Clock | None = None) -> None:
        """Recovers what an earlier process left.

        Raises:
            StateDirectoryError, UsageLogError: the state directory cannot be used.
            LinkRefused: the Redis URL is not one.
        """
        self.config = config
        self.clock: Clock = clock or SystemClock()
        self._logger = Logger("sidecar")
        self._started_us = self.clock.now_us()
        self._directory = StateDirectory(config.state_dir)
        self.identity = self._directory.claim_identity()
        self.tally = Tally()
        self.link = LinkState()
        self.log = UsageLog(config.state_dir, bytes_max=config.log_bytes_max)
        recovered = self.log.recover(self.identity.sidecar, self.identity.previous, moved=self.identity.moved)
        for damage in recovered.damaged:
            self._logger.error("the usage log is damaged", what=damage)
        if self.identity.previous and not recovered.intact:
            # What this id holds and has spent is not known, so that going on with it might spend units twice. Its
            # registers stay counted as they are; what can be read of its log is shipped, what is open there settled.
            self._logger.error("the end of the usage log is lost; taking a new id", instead_of=self.identity.sidecar)
            self._directory.renounce_identity()
            self.identity = self._directory.claim_identity()
            recovered = Recovered(orphans=recovered.orphans, doubted=recovered.doubted, settled=recovered.settled)
        if recovered.orphans:
            self._logger.warning(
                "reservations of an earlier id are taken up; a commit of one is decided anew, in the present window",
                reservations=len(recovered.orphans),
                expire_unused=len(recovered.doubted),
            )
        leases = LeaseBook(self.identity.incarnation)
        boot_ms = self.clock.boot_ms()
        for (tenant, _), lease in recovered.leases.items():
            if lease.end + QUOTA_KEPT_S > self._started_us // 1_000_000:  # the clock may be ahead, or step back
                leases.restore(tenant, lease, boot_ms)
        self.reservations = ReservationBook()
        reservation_records.recover(self.reservations, recovered, leases, self._started_us, boot_ms)
        self.engine = Engine(leases, tenants_max=config.tenants_max, staleness_us_max=int(config.staleness_max_s * 1e6))
        names = RedisNames(config.redis_prefix)
        self._verifier = verifier = Verifier(list(config.public_keys))
        self._redis = connect(config.redis_url)
        self._blocking = connect(config.redis_url, timeout_s=7.0)
        store = RedisLeaseStore(
            self._redis,
            self._blocking,
            names,
            config.redis_url,
            sidecar=self.identity.sidecar,
            incarnation=self.identity.incarnation,
            replicas=config.durable_replicas,
        )
        self._store = store
        self._sink = RedisUsageSink(self._redis, names, config.redis_url, sidecar=self.identity.sidecar)
        source = RedisStateSource(self._redis, self._blocking, names, config.redis_url)
        self.leasing = LeasingService(
            self.engine, store, self.log, self.clock, self.link, self.tally, on_replaced=self._replaced
        )
        self.log.start(
            LogHeader(
                self.identity.sidecar,
                self.identity.incarnation,
                recovered.incarnation,
                recovered.last_seq,
                secrets.token_bytes(8),
                1,
            ),
            [
                floor_record(*recovered.floor),
                *self.leasing.lease_records(),
                *reservation_records.records_of(self.reservations),
                *(seat_record(tenant, seat_id, packed) for (tenant, seat_id), packed in recovered.seats.items()),
            ],
        )
        self.shipping = ShippingService(
            self.log,
            verifier,
            self.clock,
            self.tally,
            backlog_batches_max=config.usage_backlog_max,
            memory_share_max=config.redis_memory_max,
        )
        self._second: HttpsRoute | None = None
        if config.control_plane_url:
            self._second = HttpsRoute(
                config.control_plane_url, config.sidecar_key, ca_file=config.control_plane_ca_file
            )
        self.sync = SyncService(
            self.engine,
            source,
            verifier,
            self._directory,
            self.log,
            self.clock,
            self.link,
            self.tally,
            on_head=self._head_taken,
            second=self._second,
        )
        self.sync.restore(recovered.floor)
        self.recent = RecentAnswers(self.log, self.tally)
        self.recent.recover()
        gate = DurabilityGate(self.engine, self.log, self.shipping, self.link, self.tally)
        self.service = ApprovalService(
            self.engine,
            self.log,
            self.clock,
            self.link,
            self.leasing,
            self.sync,
            self.recent,
            self.tally,
            self.reservations,
            gate,
        )
        self._metrics = Metrics(
            self.engine, self.log, self.shipping, self.link, self.clock, self.tally, self.reservations
        )
        self.seats = SeatKeeper(
            self.engine,
            SeatBook(self.identity.incarnation),
            RedisSeatStore(
                self._redis,
                names,
                config.redis_url,
                sidecar=self.identity.sidecar,
                incarnation=self.identity.incarnation,
            ),
            store,
            self.log,
            self.clock,
            self.link,
            self.tally,
        )
        for (tenant, _), packed in recovered.seats.items():
            self.seats.restore(tenant, packed)
        seats = SeatService(
            self.engine, self.seats, self.log, self.clock, self.link, self.sync, self.recent, self.tally, gate
        )
        self.service.register(seats.methods())
        explaining = ExplainingService(self.service, self.engine, self.clock, self.link, self.leasing, self.sync)
        self.service.register(explaining.methods())
        self.access = AccessService(self.service, self.engine, self.log, self.clock, self.link, self.sync)
        self.service.register(self.access.methods())
        self.service.register_streams(self.access.streams())
        self._address = ""
        self._draining = False
        self._turned_ms = boot_ms
        self._stop = asyncio.Event()
        self._pulse_soon = asyncio.Event()
        self.leasing.on_asserted = self.seats.on_asserted = self._pulse_soon.set
        self._epoch = 0
        self._exit_reason = ""
        self._retired = False

    async def run(self) -> int:
        """Serves until SIGTERM or SIGINT. The exit status: 0, or 1 when it had to give up.

        Raises:
            ListenError: an address cannot be served.
        """
        edge = GrpcEdge(self.service, message_bytes_max=self.config.message_bytes_max)
        http = HttpEdge(
            self.config.http_listen,
            {"/healthz": self._health_page, "/readyz": self._ready_page, "/metrics": self._metrics_page},
        )
        try:
            served = await edge.start(self.config.listen)
            http.start()
            self._address = served[0]
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop.set)
            self._logger.info(
                "serving", grpc=served, http=http.address, sidecar=self.identity.sidecar,
                incarnation=self.identity.incarnation,
            )  # fmt: skip
            tasks = [
                self._supervised(work, name)
                for name, work in (
                    ("sync", self.sync.run()),
                    ("pulse", self._pulse_loop()),
                    ("shipping", self._ship_loop()),
                    ("second route", self._second_route_loop()),
                    ("upkeep", self._upkeep_loop()),
                    ("recalls", self._recall_loop()),
                    ("seats", self._seats_loop()),
                    ("readiness", self._readiness(edge)),
                    *self._trust_work(),
                    ("answers", self.recent.recover_older()),
                )
            ]
            await self._stop.wait()
            await self._drain(edge, tasks)
        finally:
            http.stop()
            self._metrics.close()
            self.log.close()
            await self._redis.aclose()
            await self._blocking.aclose()
            self._directory.close()
        return 1 if self._exit_reason else 0

    # Loops

    def _trust_work(self) -> list[tuple[str, Coroutine[Any, Any, None]]]:
        path = self.config.public_key_file
        if not path:
            return []
        return [("trust", TrustedKeys(self._verifier, lambda: split_public_keys(read_public_keys(Path(path)))).run())]

    def _supervised(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)

        def done(finished: asyncio.Task[None]) -> None:
            if not finished.cancelled() and (error := finished.exception()) is not None:
                self._logger.error("a part of the sidecar failed; stopping", part=name, exc_info=error)
                self._give_up(f"{name}: {error!r}")

        task.add_done_callback(done)
        return task

    async def _pulse_loop(self) -> None:
        while True:
            started = time.monotonic()
            await self._pulse()
            await self.sync.save_snapshot()
            self.recent.expire()
            if self.log.wants_rotation:
                self._rotate()
            self._pulse_soon.clear()
            pause_s = max(PULSE_S_MIN, PULSE_S - (time.monotonic() - started))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._pulse_soon.wait()

    def _rotate(self) -> None:
        try:
            self.log.rotate(
                [
                    floor_record(*self.sync.state.floor),
                    *self.leasing.lease_records(),
                    *reservation_records.records_of(self.reservations),
                    *self.seats.records(),
                ]
            )
        except UsageLogError as error:
            self.tally.log_failures += 1
            self._logger.error("the usage log goes on in a segment that is due to be closed", error=str(error))

    async def _pulse(self) -> None:
        self._turned_ms = self.clock.boot_ms()
        try:
            report = await self.shipping.hand_over(self._send_pulse)
        except (LinkDown, LinkRefused) as error:
            self._link_failed(error)
            return
        if not self.link.up:
            self._logger.info("Redis answers")
        self.link.succeeded()
        self.shipping.take_report(report)
        self.engine.leases.heard(report.redis_ms, self.clock.boot_ms())
        self.sync.take_head(report)
        if self._epoch:
            # A restarted server is learning until everybody has asserted: do not wait for the head to say so.
            self._assert_all(self._epoch, report.run_id)

    async def _send_pulse(self, batches: list[bytes]) -> PulseReport:
        return await self._sink.pulse((self.identity.sidecar, self._heartbeat().pack()), self.shipping.logs(), batches)

    async def _ship_loop(self) -> None:
        """Between pulses, for answers that wait until their event is shipped. Those that come meanwhile are next."""
        while True:
            await self.shipping.urgent.wait()
            self.shipping.urgent.clear()
            try:
                await self.shipping.hand_over(self._sink.ship)
            except (LinkDown, LinkRefused) as error:
                self._link_failed(error)

    async def _second_route_loop(self) -> None:
        """While Redis cannot be reached the control plane is asked itself, and given what was used."""
        trouble = ""
        while self._second is not None:
            pause_s = SECOND_ROUTE_S if self.sync.ready.is_set() else SECOND_ROUTE_S_AT_START
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            if self.link.up:
                trouble = ""
                continue
            try:
                await self.sync.follow_second_route()
                await self._ship_by_second_route(self._second)
                if trouble or not self.tally.second_route_rounds:
                    self._logger.info("the control plane is asked itself, while Redis is away")
                trouble = ""
                self.tally.second_route_rounds += 1
            except (LinkDown, LinkRefused) as error:
                self.tally.second_route_failures += 1
                if str(error) != trouble:
                    trouble = str(error)
                    self._logger.warning("the second route does not work either", error=trouble)

    async def _ship_by_second_route(self, second: HttpsRoute) -> None:
        acks = await self.shipping.hand_over(second.ship, to_redis=False)
        self.shipping.take_acks(PulseReport(None, acks, ""))

    def _link_failed(self, error: LinkDown | LinkRefused) -> None:
        if self.link.failed(error, refused=isinstance(error, LinkRefused)):
            level = self._logger.error if isinstance(error, LinkRefused) else self._logger.warning
            level("Redis does not answer; leases and cache carry on", error=str(error))
        if not self.sync.ready.is_set():
            self.sync.problem = str(error)

    async def _upkeep_loop(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(UPKEEP_S):
                    await self.leasing.urgent.wait()
            self.leasing.urgent.clear()
            await self.service.reserving.upkeep()
            await self.leasing.upkeep()

    async def _seats_loop(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(UPKEEP_S):
                    await self.seats.urgent.wait()
            self.seats.urgent.clear()
            await self.seats.upkeep()

    async def _recall_loop(self) -> None:
        while True:
            try:
                async for tenant, quotas in self._store.recalls():
                    self.leasing.recalled(tenant, quotas)
            except (LinkDown, LinkRefused):
                await asyncio.sleep(PULSE_S)  # the pulse reports the link

    async def _readiness(self, edge: GrpcEdge) -> None:
        await edge.set_ready(False)
        await self.sync.ready.wait()
        await edge.set_ready(True)
        self._logger.info("ready", revision=self.engine.revision, generation=self.engine.generation)

    async def _drain(self, edge: GrpcEdge, tasks: list[asyncio.Task[None]]) -> None:
        """Takes no new calls, returns every lease, ships what it can within the grace, and says what it could not."""
        self._draining = True
        self._logger.info("draining", grace_s=self.config.drain_grace_s)
        deadline = time.monotonic() + self.config.drain_grace_s
        until_ms = self.clock.boot_ms() + int(1_000 * self.config.drain_grace_s)
        self.access.stop()
        await edge.stop(min(2.0, self.config.drain_grace_s / 2))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.service.reserving.stop()
        await self.leasing.stop()
        await self.seats.stop()
        if self.link.up and not self._exit_reason:
            untold = await self.leasing.give_back_all(until_ms)
            if not untold and not self.reservations.open_count:
                untold = await self._retire(until_ms)
            while self.shipping.unacked_events and time.monotonic() < deadline and self.link.up:
                await self._pulse()
                if self.shipping.unacked_events:
                    await asyncio.sleep(0.1)
            if not untold and self.link.up:
                try:
                    await self._say_goodbye()
                except (LinkDown, LinkRefused) as error:
                    self.link.failed(error)
        if self._second is not None and not self.link.up and not self._exit_reason:
            await self._drain_by_second_route(self._second, deadline)
        await self.sync.save_snapshot(last=True)
        unacked = self.shipping.unacked_events
        if unacked:
            self._logger.error(
                "stopping with events the ledger has not acknowledged; they stay in the state directory",
                events=unacked,
                fix="They are shipped when a sidecar starts on this state directory again; without it they are lost.",
            )
        if self.reservations.open_count:
            self._logger.warning(
                "stopping with open reservations; they go on when a sidecar starts on this state directory again",
                reservations=self.reservations.open_count,
            )
        self._logger.info("stopped", unacknowledged=unacked)

    async def _drain_by_second_route(self, second: HttpsRoute, deadline: float) -> None:
        self.shipping.start_over()
        while self.shipping.unacked_events and time.monotonic() < deadline:
            try:
                await self._ship_by_second_route(second)
            except (LinkDown, LinkRefused) as error:
                self._logger.warning("usage cannot be handed to the control plane either", error=str(error))
                if isinstance(error, LinkRefused):
                    return
                await asyncio.sleep(SECOND_ROUTE_S_AT_START)

    async def _retire(self, until_ms: int) -> int:
        """Everything is returned and nothing reserved: gives up this id and its registers, so that pods that come and
        go leave nothing in Redis. The next start in this directory takes a new id.
        """
        self._directory.renounce_identity()
        self._retired = True
        return await self.leasing.retire(until_ms)

    async def _say_goodbye(self) -> None:
        if self._retired:
            await self._sink.pulse((self.identity.sidecar, self._heartbeat().pack()), [], [])
        else:
            await self._sink.deregister(self.identity.sidecar)

    # Callbacks

    def _head_taken(self, head: Head) -> None:
        self.engine.leases.live = head.live
        self.shipping.ledger_began(head.ledger_generation)
        self._epoch = head.epoch
        self._assert_all(head.epoch, head.run_id)

    def _assert_all(self, epoch: int, run: str) -> None:
        self.leasing.assert_all(epoch, run)
        self.seats.assert_all(epoch, run)

    def _replaced(self, why: str) -> None:
        self._directory.renounce_identity()
        self._give_up(
            f"{why}; this process ends, and its supervisor has to start it again: it then takes a new id, and what was"
            " reserved is decided anew when it is committed"
        )

    def _give_up(self, why: str) -> None:
        self._exit_reason = why
        self._logger.error("stopping", why=why)
        self._stop.set()

    def _heartbeat(self) -> Heartbeat:
        asserted = self.leasing.asserted if self.leasing.asserted == self.seats.asserted else Pair(0, "")
        return Heartbeat(
            sidecar=self.identity.sidecar,
            incarnation=self.identity.incarnation,
            at_us=self.clock.now_us(),
            started_us=self._started_us,
            address=self._address,
            version=_version(),
            ready=self.sync.ready.is_set(),
            draining=self._draining,
            generation=self.engine.generation,
            revision=self.engine.revision,
            as_of_us=self.engine.as_of_us,
            asserted_epoch=asserted.epoch,
            asserted_run=asserted.run,
            asserted_ms=self.engine.leases.answered_after_ms(self.clock.boot_ms()),
            retired=self._retired,
            tenants_held=len(self.engine.leases.tenants),
            log_last_seq=self.log.last_seq,
            log_acked_seq=self.shipping.acked_seq,
            log_bytes=self.log.total_bytes,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            keys=tuple(self._verifier.key_ids),
            deployment=self.sync.state.deployment,
            acted_generation=self.sync.state.floor[0],
            acted_revision=self.sync.state.floor[1],
        )

    # Pages

    def _health_page(self) -> tuple[int, str, bytes]:
        if self.clock.boot_ms() - self._turned_ms > LOOP_STALLED_MS:
            return 503, "text/plain", b"the event loop hangs\n"
        return 200, "text/plain", b"ok\n"

    def _ready_page(self) -> tuple[int, str, bytes]:
        if self._draining:
            return 503, "text/plain", b"draining\n"
        if not self.sync.ready.is_set():
            return 503, "text/plain", f"not ready: {self.sync.problem}\n".encode()
        text = f"ready: revision {self.engine.revision}"
        if not self.link.up:
            text += f"; degraded: {self.link.trouble}"
        return 200, "text/plain", f"{text}\n".encode()

    def _metrics_page(self) -> tuple[int, str, bytes]:
        return 200, CONTENT_TYPE, self._metrics.page()


def _version() -> str:
    try:
        return version("licet")
    except PackageNotFoundError:
        return "unknown"
