"""Logs, streams, drain workers and the ledger under a seeded scheduler: real cores, faults, and a fake clock.

Sidecars answer at three levels of durability, crash, lose power, disks and volumes; Redis loses entries and all its
data; workers pause with batches in hand and go on after others did them; the ledger is restored from backups; closed
months are dropped; somebody forges acknowledgements and declares events lost that are not. After every step: no event
is billed twice, and none that was never logged; a watermark covers nothing but what is billed or declared lost. At the
end, when all is mended: every event whose answer left is billed exactly once, or its level did not cover what happened
to it, or it was declared.

The sidecars deliver by ``core.delivery``, the ledger counts by ``core.recorded``. What is around them is modeled here
as ``services.shipping``, ``drain.worker`` and ``store.ledger`` do it.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from licet_control_plane.core.recorded import Gap, LogNumbers, RecordedSeqs
from licet_sidecar.core.delivery import RESEND_AFTER_MS, Acknowledgement, Delivery

STEPS: Final = 250
SETTLE_ROUNDS_MAX: Final = 200
BATCH_EVENTS: Final = 4
IN_FLIGHT: Final = 20
RETAINED_MS: Final = 30_000
SHARDS: Final = 2

Log = tuple[str, int]
"""A sidecar's id and its incarnation."""
Event = int
"""What an event says; no two say the same."""


class Violation(AssertionError):
    """A promise was broken. The message says which, and by which seed."""


class Level(Enum):
    """Durability of an answer."""

    LOGGED = auto()
    SYNCED = auto()
    SHIPPED = auto()


class Rule(Enum):
    """What can be left out, to show that it is needed."""

    ONLY_SYNCED_IS_SHIPPED = auto()
    A_START_BEGINS_A_NEW_LOG = auto()
    DELETED_WHEN_ACKNOWLEDGED = auto()
    ACKS_ARE_SIGNED = auto()
    LOSSES_ARE_DECLARED = auto()
    BATCHES_LEAVE_THE_STREAM_AFTER_THE_COMMIT = auto()
    NUMBERS_TELL_WHAT_IS_RECORDED = auto()
    BILLED_IS_WHAT_IS_INSERTED = auto()
    WHAT_COMES_AFTER_ALL_IS_TAKEN = auto()
    RECORDED_IS_NOT_LOST = auto()
    HEADS_TELL_THE_GENERATION = auto()


@dataclass(slots=True)
class LogFile:
    """A log on a volume: events by number as the kernel has them, and how far they are on the disk."""

    events: dict[int, Event] = field(default_factory=dict)
    last_seq: int = 0
    synced_seq: int = 0
    first_held: int = 1
    damaged: set[int] = field(default_factory=set)

    def lost(self, first: int, last: int) -> list[tuple[int, int]]:
        """Ranges of ``first…last`` that are not there."""
        ranges: list[tuple[int, int]] = []
        for seq in range(first, last + 1):
            if seq not in self.events:
                if ranges and ranges[-1][1] == seq - 1:
                    ranges[-1] = (ranges[-1][0], seq)
                else:
                    ranges.append((seq, seq))
        return ranges


@dataclass(slots=True)
class Sidecar:
    """One pod: its volume, and what its process knows while it runs."""

    name: str
    volume: dict[Log, LogFile] = field(default_factory=dict)
    log: Log = ("", 0)
    alive: bool = False
    deliveries: dict[Log, Delivery] = field(default_factory=dict)
    acked_ms: dict[Log, list[tuple[int, int]]] = field(default_factory=dict)
    waiting: list[tuple[Level, int, Event]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Batch:
    """What a stream entry carries."""

    log: Log
    first_seq: int
    events: tuple[Event, ...]
    lost: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Ack:
    """An entry of the hash of acknowledgements. ``forged``: its signature does not fit."""

    log: Log
    word: Acknowledgement
    forged: bool = False


@dataclass(slots=True)
class Redis:
    """One server's worth: entries by shard (id to batch), which of them a worker has, and acknowledgements by log."""

    entries: dict[int, dict[int, Batch]] = field(default_factory=lambda: {shard: {} for shard in range(SHARDS)})
    pending: dict[int, str] = field(default_factory=dict)
    acks: dict[Log, Ack] = field(default_factory=dict)
    next_id: int = 1


@dataclass(slots=True)
class Ledger:
    """The database. ``rows`` can be dropped with their month; ``billed`` is what invoices are made of."""

    generation: int = 1
    numbers: dict[Log, LogNumbers] = field(default_factory=dict)
    rows: dict[tuple[Log, int], Event] = field(default_factory=dict)
    billed: Counter[Event] = field(default_factory=Counter)
    conflicts: int = 0


@dataclass(slots=True)
class Worker:
    """A drain worker, with what it has read and not done: (shard, entry, batch)."""

    name: str
    hand: list[tuple[int, int, Batch]] = field(default_factory=list)


class UsageSimulation:
    """One history. ``without`` leaves rules out, ``delivery`` makes the sidecars' cores."""

    def __init__(
        self,
        seed: int,
        *,
        without: frozenset[Rule] = frozenset(),
        delivery: type[Delivery] = Delivery,
    ) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.without = without
        self.make_delivery = delivery
        self.now_ms = 1_000_000
        self.sidecars = [Sidecar(f"pod{number}") for number in range(self.chance.choice((1, 2, 3)))]
        self.redis = Redis()
        self.workers = [Worker("one"), Worker("two")]
        self.ledger = Ledger()
        self.backup: Ledger | None = None
        self.ids = 0
        self.incarnations: Counter[str] = Counter()
        self.events = 0
        self.logged: dict[Event, tuple[Log, int]] = {}
        self.answered: dict[Event, Level] = {}
        self.excused: dict[Event, str] = {}
        self.in_lost_redis: set[Event] = set()
        self._only_in_redis: set[Event] = set()
        self.restored_away: set[Event] = set()
        self.trace: list[str] = []
        self.disasters = self.chance.choice((0.0, 0.3, 1.0, 3.0))
        for sidecar in self.sidecars:
            self.start(sidecar, new_id=True)

    def run(self) -> None:
        """The whole history.

        Raises:
            Violation: a promise was broken.
        """
        steps: list[tuple[Callable[[], None], float]] = [
            (self.answer, 60),
            (self.sync, 20),
            (self.ship, 40),
            (self.hear, 25),
            (self.read, 30),
            (self.commit, 40),
            (self.claim, 6),
            (self.pass_time, 15),
            (self.crash, 3 * self.disasters),
            (self.lose_power, 2 * self.disasters),
            (self.lose_volume, 0.7 * self.disasters),
            (self.damage, 1.5 * self.disasters),
            (self.lose_entry, 2 * self.disasters),
            (self.empty_redis, 1 * self.disasters),
            (self.deliver_again, 3),
            (self.back_up, 2),
            (self.restore, 0.8 * self.disasters),
            (self.drop_month, 1),
            (self.forge_ack, 1 * self.disasters),
            (self.forge_loss, 1 * self.disasters),
        ]
        moves, weights = [move for move, _ in steps], [weight for _, weight in steps]
        for move in self.chance.choices(moves, weights, k=STEPS):
            move()
            self.check()
        self.settle()

    # Sidecars

    def start(self, sidecar: Sidecar, *, new_id: bool) -> None:
        """A process begins on the volume."""
        resumes = Rule.A_START_BEGINS_A_NEW_LOG in self.without
        if new_id and not (resumes and sidecar.volume):
            self.ids += 1
            name = f"s{self.ids}"
        else:
            name = sidecar.log[0]
        if not (resumes and sidecar.volume):
            self.incarnations[name] += 1
            sidecar.log = (name, self.incarnations[name])
            sidecar.volume[sidecar.log] = LogFile()
        for log in [log for log, file in sidecar.volume.items() if log != sidecar.log and not file.last_seq]:
            del sidecar.volume[log]
        sidecar.alive = True
        sidecar.waiting = []
        sidecar.deliveries = {}
        sidecar.acked_ms = {}
        for file in sidecar.volume.values():
            file.synced_seq = file.last_seq  # as recovery does

    def answer(self) -> None:
        """A call: logged, and answered at once or when its event is safe."""
        sidecar = self._a_living()
        if sidecar is None:
            return
        level = self.chance.choice(list(Level))
        file = sidecar.volume[sidecar.log]
        self.events += 1
        file.last_seq += 1
        file.events[file.last_seq] = self.events
        self.logged[self.events] = (sidecar.log, file.last_seq)
        self._note(f"{sidecar.log} logs {file.last_seq} = event {self.events} at {level.name}")
        if level is Level.LOGGED:
            self.answered[self.events] = level
        else:
            sidecar.waiting.append((level, file.last_seq, self.events))

    def sync(self) -> None:
        """What is in the kernel goes to the disk."""
        sidecar = self._a_living()
        if sidecar is not None:
            file = sidecar.volume[sidecar.log]
            file.synced_seq = file.last_seq
            self._let_answers_go(sidecar)

    def ship(self) -> None:
        """One handing over, of one batch for each log; it may be lost on the way, or its answer."""
        sidecar = self._a_living()
        if sidecar is None:
            return
        if Rule.ONLY_SYNCED_IS_SHIPPED not in self.without:
            file = sidecar.volume[sidecar.log]
            file.synced_seq = file.last_seq
            self._let_answers_go(sidecar)
        fate = self.chance.random()
        for log, file in list(sidecar.volume.items()):
            delivery = self._delivery(sidecar, log)
            delivery.resend_if_stuck(self.now_ms)
            first, last = delivery.next_range(delivery.shipped, file.last_seq, IN_FLIGHT)
            last = min(last, first + self.chance.randint(1, BATCH_EVENTS) - 1)
            if first > last:
                continue
            batch = self._batch(log, file, first, last)
            if batch is None:
                continue
            if fate > 0.1:
                self._add(batch)
            if fate > 0.2:
                delivery.handed_over(batch.first_seq + len(batch.events) - 1, self.now_ms)
                if Rule.DELETED_WHEN_ACKNOWLEDGED in self.without:
                    self._delete(file, delivery.shipped)
        self._let_answers_go(sidecar)

    def hear(self) -> None:
        """Acknowledgements of all logs of a volume."""
        sidecar = self._a_living()
        if sidecar is None:
            return
        for log, file in list(sidecar.volume.items()):
            ack = self.redis.acks.get(log)
            delivery = sidecar.deliveries.get(log)
            if delivery is not None and Rule.HEADS_TELL_THE_GENERATION not in self.without:
                delivery.ledger_began(self.ledger.generation, self.now_ms)
            if ack is None or delivery is None:
                continue
            if (ack.forged or ack.log != log) and Rule.ACKS_ARE_SIGNED not in self.without:
                continue
            held = [seq for first, last in ack.word.lost for seq in range(first, last + 1) if seq in file.events]
            delivery.acknowledged(ack.word, file.last_seq, min(held, default=None), self.now_ms)
            self._release(sidecar, log, file, delivery.acked)
        self._let_answers_go(sidecar)

    def _batch(self, log: Log, file: LogFile, first: int, last: int) -> Batch | None:
        """Events from ``first`` on without a hole, and before them what is not there."""
        begins = first
        while begins <= last and begins not in file.events:
            begins += 1
        lost = file.lost(first, begins - 1)
        if lost and Rule.LOSSES_ARE_DECLARED in self.without:
            lost = []
        events = []
        while begins + len(events) <= last and begins + len(events) in file.events:
            events.append(file.events[begins + len(events)])
        if not events and not lost:
            return None
        return Batch(log, begins, tuple(events), tuple(lost))

    def _delivery(self, sidecar: Sidecar, log: Log) -> Delivery:
        if log not in sidecar.deliveries:
            begun = self.make_delivery.begun(sidecar.volume[log].first_held, self.now_ms)
            sidecar.deliveries[log] = self.make_delivery(begun.acked, begun.shipped, begun.moved_ms, begun.reached)
        return sidecar.deliveries[log]

    def _release(self, sidecar: Sidecar, log: Log, file: LogFile, acked: int) -> None:
        times = sidecar.acked_ms.setdefault(log, [])
        if times and acked < times[-1][0]:
            times.clear()
        if not times or acked > times[-1][0]:
            times.append((acked, self.now_ms))
        past = [watermark for watermark, at_ms in times if at_ms + RETAINED_MS <= self.now_ms]
        if past:
            self._delete(file, max(past))
            if file.first_held > file.last_seq and log != sidecar.log:
                del sidecar.volume[log]  # its last file is gone: nothing is known of it any more

    @staticmethod
    def _delete(file: LogFile, up_to: int) -> None:
        for seq in range(file.first_held, up_to + 1):
            file.events.pop(seq, None)
            file.damaged.discard(seq)
        file.first_held = max(file.first_held, up_to + 1)

    def _let_answers_go(self, sidecar: Sidecar) -> None:
        file, delivery = sidecar.volume[sidecar.log], sidecar.deliveries.get(sidecar.log)
        kept = []
        for level, seq, event in sidecar.waiting:
            reached = file.synced_seq if level is Level.SYNCED else delivery.reached if delivery else 0
            if seq <= reached:
                self.answered[event] = level
            else:
                kept.append((level, seq, event))
        sidecar.waiting = kept

    # Redis and the drain

    def read(self) -> None:
        """A worker takes what nobody has."""
        worker = self.chance.choice(self.workers)
        shard = self.chance.randrange(SHARDS)
        for entry, batch in list(self.redis.entries[shard].items())[: self.chance.randint(1, 3)]:
            if entry not in self.redis.pending:
                self.redis.pending[entry] = worker.name
                worker.hand.append((shard, entry, batch))
                if Rule.BATCHES_LEAVE_THE_STREAM_AFTER_THE_COMMIT in self.without:
                    self.redis.entries[shard].pop(entry, None)

    def claim(self) -> None:
        """A worker takes what another has had for long, who is only paused and goes on later."""
        worker = self.chance.choice(self.workers)
        for shard, entries in self.redis.entries.items():
            for entry, batch in entries.items():
                if self.redis.pending.get(entry) not in (None, worker.name):
                    self.redis.pending[entry] = worker.name
                    worker.hand.append((shard, entry, batch))

    def commit(self) -> None:
        """A worker does what it has, in any order; it may die on the way, after any part of it."""
        worker = self.chance.choice(self.workers)
        if not worker.hand:
            return
        self.chance.shuffle(worker.hand)
        hand, worker.hand = worker.hand[:3], worker.hand[3:]
        if self.chance.random() < 0.1:
            worker.hand = []
            return  # it died before the commit; its entries are claimed
        for log in self._record([batch for _, _, batch in hand]):
            if self.chance.random() < 0.9:
                self._acknowledge(log)
        if self.chance.random() < 0.9:
            for shard, entry, _ in hand:
                self.redis.entries[shard].pop(entry, None)
                self.redis.pending.pop(entry, None)

    def _record(self, batches: list[Batch]) -> set[Log]:
        """The ledger transaction."""
        ledger = self.ledger
        for batch in batches:
            numbers = ledger.numbers.setdefault(batch.log, LogNumbers(RecordedSeqs()))
            for first, last in batch.lost:
                if Rule.RECORDED_IS_NOT_LOST in self.without:
                    numbers.gaps[first, last] = Gap("lost", 0)
                    numbers.recorded.add(first, last)
                else:
                    numbers.declare(first, last, Gap("lost", 0))
            last_seq = batch.first_seq + len(batch.events) - 1
            if not batch.events:
                continue
            if Rule.WHAT_COMES_AFTER_ALL_IS_TAKEN in self.without:
                missing = numbers.recorded.missing(batch.first_seq, last_seq)
            else:
                missing = numbers.missing(batch.first_seq, last_seq)
            wanted = {seq for first, last in missing for seq in range(first, last + 1)}
            if Rule.NUMBERS_TELL_WHAT_IS_RECORDED in self.without:
                wanted = {seq for seq in range(batch.first_seq, last_seq + 1) if (batch.log, seq) not in ledger.rows}
            for seq, event in enumerate(batch.events, batch.first_seq):
                if seq in wanted:
                    ledger.rows[batch.log, seq] = event
                elif ledger.rows.get((batch.log, seq), event) != event:
                    ledger.conflicts += 1
                if seq in wanted or Rule.BILLED_IS_WHAT_IS_INSERTED in self.without:
                    ledger.billed[event] += 1
            for first, last in missing:
                numbers.add(first, last)
        return {batch.log for batch in batches}

    def _acknowledge(self, log: Log) -> None:
        numbers = self.ledger.numbers[log]
        word = Acknowledgement(self.ledger.generation, numbers.recorded.watermark, tuple(sorted(numbers.gaps)))
        self.redis.acks[log] = Ack(log, word)

    def _add(self, batch: Batch) -> None:
        shard = sum(map(ord, batch.log[0])) % SHARDS
        self.redis.entries[shard][self.redis.next_id] = batch
        self.redis.next_id += 1

    # Faults

    def pass_time(self) -> None:
        """Enough, now and then, for a repeat and for the end of a retention."""
        self.now_ms += self.chance.choice((100, 1_000, RESEND_AFTER_MS + 1, RETAINED_MS))

    def crash(self) -> None:
        """``kill -9``: what is in the kernel stays."""
        sidecar = self._a_living()
        if sidecar is not None:
            self._note(f"{sidecar.log} crashes")
            sidecar.alive = False
            self.start(sidecar, new_id=False)

    def lose_power(self) -> None:
        """What was not on the disk is gone, from some event on. The node's boot is another: a new id."""
        sidecar = self._a_living()
        if sidecar is None:
            return
        file = sidecar.volume[sidecar.log]
        kept = self.chance.randint(file.synced_seq, file.last_seq)
        self._note(f"{sidecar.log} loses power, and what it logged after {kept}")
        for seq in range(kept + 1, file.last_seq + 1):
            event = file.events.pop(seq, 0)
            if self.answered.get(event) is Level.LOGGED:
                self.excused[event] = "the power went"
        file.last_seq = kept
        self.start(sidecar, new_id=True)

    def lose_volume(self) -> None:
        """The pod is gone, and what it had."""
        sidecar = self._a_living()
        if sidecar is None:
            return
        self._note(f"{sidecar.log} is gone with its volume")
        for log, file in sidecar.volume.items():
            delivery = sidecar.deliveries.get(log)
            for seq, event in file.events.items():
                shipped = delivery is not None and seq <= delivery.reached
                lost_before = event in self.in_lost_redis or event in self.restored_away
                if not shipped or lost_before or self.answered.get(event) is not Level.SHIPPED:
                    self.excused[event] = "the volume went"
                else:
                    self.in_lost_redis.discard(event)
                    self._only_in_redis.add(event)
        sidecar.volume = {}
        self.start(sidecar, new_id=True)

    def damage(self) -> None:
        """A disk forgets an event."""
        sidecar = self._a_living()
        if sidecar is None:
            return
        log, file = self.chance.choice(list(sidecar.volume.items()))
        if file.events:
            seq = self.chance.choice(list(file.events))
            self._note(f"event {seq} of {log} is damaged")
            self.excused[file.events.pop(seq)] = "the disk forgot it"
            file.damaged.add(seq)

    def lose_entry(self) -> None:
        """A failover loses the newest entries of a stream, and the newest acknowledgements."""
        shard = self.chance.randrange(SHARDS)
        for entry in list(self.redis.entries[shard])[-self.chance.randint(1, 3) :]:
            self._redis_loses(self.redis.entries[shard].pop(entry))
            self.redis.pending.pop(entry, None)

    def empty_redis(self) -> None:
        """``FLUSHALL``."""
        self._note("Redis is emptied")
        for entries in self.redis.entries.values():
            for batch in entries.values():
                self._redis_loses(batch)
        self.redis = Redis(next_id=self.redis.next_id)

    def _redis_loses(self, batch: Batch) -> None:
        """Redis lost what it had acknowledged: if the pod's volume goes too, nobody has it."""
        for event in batch.events:
            self.in_lost_redis.add(event)
            if event in self._only_in_redis:
                self.excused[event] = "Redis and the volume went"

    def deliver_again(self) -> None:
        """A batch comes once more, whenever it was."""
        shard = self.chance.randrange(SHARDS)
        if self.redis.entries[shard]:
            self._add(self.chance.choice(list(self.redis.entries[shard].values())))
        elif self.workers[0].hand:
            self._add(self.chance.choice(self.workers[0].hand)[2])

    def back_up(self) -> None:
        """A copy of the database."""
        self.backup = copy.deepcopy(self.ledger)

    def restore(self) -> None:
        """The database is as it was at its backup; workers begin anew, what is in Redis stays as it is."""
        if self.backup is None:
            return
        self._note(f"the ledger is restored, generation {self.ledger.generation + 1}")
        lost = self.ledger.billed - self.backup.billed
        generation = self.ledger.generation + 1
        self.ledger = copy.deepcopy(self.backup)
        self.ledger.generation = generation
        for worker in self.workers:
            worker.hand = []
        self.redis.pending = {}
        files = [file for sidecar in self.sidecars for file in sidecar.volume.values()]
        held = {event for file in files for event in file.events.values()}
        for event in lost:
            if event not in held:
                self.excused[event] = "the ledger was restored, and the log had deleted it"
        self.restored_away |= set(lost)

    def drop_month(self) -> None:
        """Rows of a closed month go; numbers and sums stay."""
        for key in list(self.ledger.rows)[: len(self.ledger.rows) // 2]:
            del self.ledger.rows[key]

    def forge_ack(self) -> None:
        """Somebody who can write Redis says that everything is in the ledger."""
        sidecar = self._a_living()
        if sidecar is not None:
            log, file = self.chance.choice(list(sidecar.volume.items()))
            word = Acknowledgement(self.ledger.generation, file.last_seq)
            self.redis.acks[log] = Ack(log, word, forged=True)

    def forge_loss(self) -> None:
        """Somebody who can write Redis declares events lost that are not."""
        sidecar = self._a_living()
        if sidecar is not None:
            log, file = self.chance.choice(list(sidecar.volume.items()))
            if file.last_seq:
                first = self.chance.randint(1, file.last_seq)
                self._note(f"somebody declares {first} to {file.last_seq} of {log} lost")
                self._add(Batch(log, file.last_seq + 1, (), ((first, file.last_seq),)))

    # Promises

    def check(self) -> None:
        """Holds after every step."""
        for event, times in self.ledger.billed.items():
            if times > 1:
                self._fail(f"event {event} is billed {times} times")
            if event not in self.logged:
                self._fail(f"event {event} was never logged")
        if self.ledger.conflicts:
            self._fail("one number has two contents")
        for log, numbers in self.ledger.numbers.items():
            declared = {seq for first, last in numbers.gaps for seq in range(first, last + 1)}
            recorded = set(range(1, numbers.recorded.watermark + 1)) | {
                seq for first, last in numbers.recorded.ranges for seq in range(first, last + 1)
            }
            billed = {self.logged[event][1] for event in self.ledger.billed if self.logged[event][0] == log}
            if recorded - declared != billed:
                differ = sorted((recorded - declared) ^ billed)
                self._fail(f"{log}: {differ} are recorded and not billed, or the reverse")
            if declared & billed:
                self._fail(f"{log}: {sorted(declared & billed)} are billed and declared lost")

    def settle(self) -> None:
        """All is mended; at the end every event that was answered is where it belongs."""
        self.disasters = 0
        for _ in range(SETTLE_ROUNDS_MAX):
            if self._is_quiet():
                break
            self.now_ms += RESEND_AFTER_MS + 1
            for sidecar in self.sidecars:
                self._round(sidecar)
        self.check()
        held = {(log, seq) for sidecar in self.sidecars for log, file in sidecar.volume.items() for seq in file.events}
        for log, numbers in self.ledger.numbers.items():
            contested = {seq for first, last in numbers.gaps for seq in range(first, last + 1) if (log, seq) in held}
            if contested:
                self._fail(f"{log}: {sorted(contested)} are declared lost, and the log has them")
        for event, level in self.answered.items():
            if self.ledger.billed[event] == 1 or event in self.excused:
                continue
            self._fail(f"event {event} {self.logged[event]}, answered at {level.name}, is not in the ledger")
        if not self._is_quiet():
            self._fail("a log never comes to an end")

    def _round(self, sidecar: Sidecar) -> None:
        """Everything once, without faults."""
        file = sidecar.volume[sidecar.log]
        file.synced_seq = file.last_seq
        self._let_answers_go(sidecar)
        for log, one in sidecar.volume.items():
            delivery = self._delivery(sidecar, log)
            delivery.resend_if_stuck(self.now_ms)
            while True:
                first, last = delivery.next_range(delivery.shipped, one.last_seq, 10**9)
                batch = self._batch(log, one, first, last) if first <= last else None
                if batch is None:
                    break
                self._add(batch)
                delivery.handed_over(batch.first_seq + len(batch.events) - 1, self.now_ms)
        for worker in self.workers:
            logs = self._record([batch for _, _, batch in worker.hand])
            worker.hand = []
            for entries in self.redis.entries.values():
                logs |= self._record(list(entries.values()))
                entries.clear()
            for log in logs:
                self._acknowledge(log)
        self.redis.pending.clear()
        for log, one in sidecar.volume.items():
            ack = self.redis.acks.get(log)
            if Rule.HEADS_TELL_THE_GENERATION not in self.without:
                self._delivery(sidecar, log).ledger_began(self.ledger.generation, self.now_ms)
            if ack is not None and (not ack.forged or Rule.ACKS_ARE_SIGNED in self.without):
                held = [seq for first, last in ack.word.lost for seq in range(first, last + 1) if seq in one.events]
                self._delivery(sidecar, log).acknowledged(ack.word, one.last_seq, min(held, default=None), self.now_ms)

    def _is_quiet(self) -> bool:
        return all(
            self._delivery(sidecar, log).acked >= file.last_seq
            and log in self.ledger.numbers
            and self.ledger.numbers[log].recorded.watermark >= file.last_seq
            for sidecar in self.sidecars
            for log, file in sidecar.volume.items()
            if file.last_seq
        ) and not any(self.redis.entries.values())

    # Inside

    def _a_living(self) -> Sidecar | None:
        return self.chance.choice([one for one in self.sidecars if one.alive] or [None])  # type: ignore[list-item]

    def _note(self, what: str) -> None:
        self.trace.append(what)

    def _fail(self, what: str) -> None:
        tail = "\n  ".join(self.trace[-40:])
        raise Violation(f"seed {self.seed}: {what}\n  {tail}")
