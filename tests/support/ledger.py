"""The ledger, read as anybody could who has the file."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import NullPool, create_engine, text

from licet.domain.outcomes import Effect
from licet.wire.signing import Verifier
from licet.wire.usage import decision_id
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store.checkpoints import Checkpoint
from licet_control_plane.store.database import Database
from licet_control_plane.store.verification import Verification, verify
from tests.support.fleet import Fleet

_QUERY = """
    SELECT logs.decision_prefix, events.seq, events.effect, events.units_total
    FROM ledger_events AS events JOIN ledger_logs AS logs ON logs.log = events.log
"""


def recorded_decisions(fleet: Fleet, tenant: str = "") -> dict[str, tuple[int, int]]:
    """(effect, units) of every recorded decision, of one tenant or of all, by its id."""
    found = _recorded(fleet, f"{_QUERY} WHERE :tenant IN ('', events.tenant)", tenant=tenant)
    return {name: (effect, units) for name, effect, units in found}


def approved_units(fleet: Fleet, tenant: str) -> dict[str, int]:
    """Units of every recorded approval of a tenant, by its decision id."""
    query = f"{_QUERY} WHERE events.tenant = :tenant AND events.effect = :effect"
    found = _recorded(fleet, query, tenant=tenant, effect=int(Effect.APPROVED))
    return {name: units for name, _, units in found}


def _recorded(fleet: Fleet, query: str, **values: object) -> list[tuple[str, int, int]]:
    engine = create_engine(fleet.database_url, poolclass=NullPool)
    with engine.connect() as connection:
        rows = connection.execute(text(query), values)
        return [(decision_id(bytes(prefix), seq), effect, units) for prefix, seq, effect, units in rows]


def verification_of(
    database: Database,
    ledger_key: LedgerKey | None,
    *,
    verifier: Verifier | None = None,
    given: Sequence[Checkpoint] = (),
    processes: int = 1,
) -> Verification:
    """What verifying a database comes to."""
    url = database.engine.url.render_as_string(hide_password=False)
    *_, last = verify(url, ledger_key, verifier, given=given, processes=processes)
    assert isinstance(last, Verification)
    return last
