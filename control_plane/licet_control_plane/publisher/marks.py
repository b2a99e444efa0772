"""The marks of tenants in Redis, through the scripts in ``lua/``, each of which states its own contract.

Every method takes many tenants and costs one round trip. Raises ``RedisUnavailable`` and ``RedisRefused``;
everything may be repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from licet.wire.names import RedisNames
from licet.wire.registers import QUOTA_KEPT_S, SERVER_RUN_LUA, WINDOW_GRACE_S, Mark, Pair, parse_mark
from licet_control_plane.publisher.documents import LUA
from licet_control_plane.redis_link import Redis, redis_errors

_SCRIPTS: Final = ("touch_mark", "begin", "relearn", "fill", "release", "open", "publish_limits")


@dataclass(frozen=True, slots=True)
class MarkState:
    """What a mark says, and the Redis clock, in milliseconds."""

    pair: Pair
    is_open: bool
    since_ms: int
    revision: int
    now_ms: int

    @property
    def learning_s(self) -> float:
        """How long it has been in its phase."""
        return (self.now_ms - self.since_ms) / 1_000


@dataclass(frozen=True, slots=True)
class Fill:
    """Units the ledger knows ``sidecar`` spent of ``quota`` (``<marker name>:<window start>``)."""

    tenant: str
    pair: Pair
    quota: str
    marker: str
    window_start: int
    window_end: int
    sidecar: str
    units: int


class Release(NamedTuple):
    """A register of a quota whose sidecar has said all it holds, and not this."""

    tenant: str
    pair: Pair
    quota: str
    sidecar: str


class KeptQuota(NamedTuple):
    """A quota hash that a marker promises. ``window_start`` and ``window_end`` in seconds since the Unix epoch."""

    name: str
    marker: str
    window_start: int
    window_end: int

    @property
    def expires_s(self) -> int:
        """When the hash goes."""
        return self.window_end + WINDOW_GRACE_S + QUOTA_KEPT_S


class Opened(NamedTuple):
    """What became of openings, by tenant. ``lost``: something was lost while it was learned; learn again."""

    opened: list[str]
    lost: list[str]


@dataclass(frozen=True, slots=True)
class Opening:
    """Ends the learning of one tenant under ``pair``. ``quotas`` are hashes that must exist, ``seats`` the features
    whose set of seats must.
    """

    tenant: str
    pair: Pair
    revision: int
    limits: Mapping[Any, int]
    quotas: Sequence[KeptQuota] = ()
    seats: Sequence[str] = ()


class RedisMarks:
    """The adapter."""

    def __init__(self, redis: Redis, names: RedisNames) -> None:
        self._redis = redis
        self._names = names
        self._scripts = {
            name: redis.register_script(SERVER_RUN_LUA + (LUA / f"{name}.lua").read_text()) for name in _SCRIPTS
        }

    async def touch(self, tenants: Sequence[str]) -> dict[str, MarkState | None]:
        """What each mark says; one last used on another run of the server goes to learning. ``None``: no mark."""
        answers = await self._run("touch_mark", [([self._limits(tenant)], []) for tenant in tenants])
        return {tenant: _state(answer) for tenant, answer in zip(tenants, answers, strict=True)}

    async def begin(self, tenants: Sequence[str], epoch: int) -> dict[str, str]:
        """Make marks, in learning, where there is none. Returns the run id for each that was made."""
        answers = await self._run("begin", [([self._limits(tenant)], [epoch]) for tenant in tenants])
        return {tenant: run.decode() for tenant, run in zip(tenants, answers, strict=True) if run}

    async def relearn(self, epochs: Mapping[str, int], epoch: int) -> list[str]:
        """Put marks that have the given epochs in learning under a new one. Returns the tenants where it was done."""
        calls = [([self._limits(tenant)], [old, epoch]) for tenant, old in epochs.items()]
        answers = await self._run("relearn", calls)
        return [tenant for tenant, run in zip(epochs, answers, strict=True) if run]

    async def publish_limits(self, limits: Mapping[str, Mapping[Any, int]], revisions: Mapping[str, int]) -> list[str]:
        """Write limits in marks, unless newer ones are there. Returns the tenants that have no mark."""
        calls = [
            ([self._limits(tenant)], [revisions[tenant], *_counted(amounts)]) for tenant, amounts in limits.items()
        ]
        answers = await self._run("publish_limits", calls)
        return [tenant for tenant, answer in zip(limits, answers, strict=True) if answer == b"NOMARK"]

    async def read(self, tenants: Sequence[str]) -> dict[str, Mark | None]:
        """Whole marks, with the markers of their quotas."""
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for tenant in tenants:
                    pipe.hgetall(self._limits(tenant))
                answers = await pipe.execute()
        return {tenant: parse_mark(answer) for tenant, answer in zip(tenants, answers, strict=True)}

    async def fill(self, fills: Sequence[Fill]) -> int:
        """Count what the ledger knows, in marks that are learning. Returns how many registers were raised."""
        calls = [
            (
                [self._limits(fill.tenant), self._names.quota(fill.tenant, fill.quota)],
                [
                    fill.pair.epoch,
                    fill.pair.run,
                    fill.sidecar,
                    fill.units,
                    fill.marker,
                    fill.window_start,
                    fill.window_end,
                    WINDOW_GRACE_S,
                    QUOTA_KEPT_S,
                ],
            )
            for fill in fills
        ]
        return sum(await self._run("fill", calls))

    async def release(self, releases: Sequence[Release]) -> int:
        """Free what registers hold, in marks that are learning, and their sidecars do not. Returns how many did."""
        calls = [
            (
                [self._limits(one.tenant), self._names.quota(one.tenant, one.quota)],
                [one.pair.epoch, one.pair.run, one.sidecar],
            )
            for one in releases
        ]
        return sum(await self._run("release", calls))

    async def open(self, openings: Iterable[Opening]) -> Opened:
        """End learning."""
        openings = list(openings)
        calls = [
            (
                [
                    self._limits(one.tenant),
                    *(self._names.quota(one.tenant, quota.name) for quota in one.quotas),
                    *(self._names.seats(one.tenant, feature) for feature in one.seats),
                ],
                [
                    one.pair.epoch,
                    one.pair.run,
                    one.revision,
                    len(one.quotas),
                    *_counted(one.limits),
                    *(part for quota in one.quotas for part in (quota.expires_s, quota.marker, quota.window_start)),
                    *one.seats,
                ],
            )
            for one in openings
        ]
        answers = await self._run("open", calls)
        answered = list(zip((one.tenant for one in openings), answers, strict=True))
        return Opened(
            opened=[tenant for tenant, answer in answered if answer == 1],
            lost=[tenant for tenant, answer in answered if answer == -1],
        )

    def _limits(self, tenant: str) -> str:
        return self._names.limits(tenant)

    async def _run(self, script: str, calls: Sequence[tuple[list[Any], list[Any]]]) -> list[Any]:
        if not calls:
            return []
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for keys, args in calls:
                    await self._scripts[script](keys=keys, args=args, client=pipe)
                answers: list[Any] = await pipe.execute()
                return answers


def quotas_to_keep(mark: Mark, now_s: float) -> list[KeptQuota]:
    """Quota hashes that a mark's markers promise and whose window still takes calls."""
    kept: list[KeptQuota] = []
    for name, marker in mark.markers.items():
        # The window before ended, at the latest, when this one began.
        for start, end in ((marker.start, marker.end), (marker.previous_start, marker.start)):
            if end + WINDOW_GRACE_S > now_s and (start or end == marker.end):
                kept.append(KeptQuota(f"{name}:{start}", name, start, end))
    return kept


def _counted(limits: Mapping[Any, int]) -> list[Any]:
    return [len(limits), *(value for pair in limits.items() for value in pair)]


def _state(answer: list[bytes] | None) -> MarkState | None:
    if answer is None:
        return None
    epoch, run, phase, since, revision, now = answer
    return MarkState(Pair(int(epoch), run.decode()), phase == b"open", int(since), int(revision), int(now))
