"""``licet policy simulate``: recorded decisions, asked again under another bundle."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from licet_control_plane.cli.arguments import ApiKeyOption, JsonOption, ServerOption, bad, seconds
from licet_control_plane.cli.bundles import print_errors, read_sources
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.failure import EXIT_NO, EXIT_USAGE, CliError
from licet_control_plane.cli.output import emit_json, note, say, table

if TYPE_CHECKING:
    from licet.domain.catalog import Catalog, License
    from licet_control_plane.cli.evaluator import Evaluator
    from licet_control_plane.cli.rest import ControlPlane
    from licet_control_plane.core.simulation import Summary, Unrecorded

PAGE: Final = 2_000
"""Decisions fetched and held at once."""
ROWS_MAX: Final = 50
"""Rows of a table for people; the JSON form has all."""
ROLES_KNOWN_MAX: Final = 10_000
_HOUR_S: Final = 3_600
LIVE: Final = "live"
CANDIDATE: Final = "candidate"


def simulate(
    what: Annotated[
        str, typer.Argument(metavar="[DIR|REV]", help="The candidate: a directory of documents, or a revision.")
    ] = "",
    since: Annotated[str, typer.Option("--since", help="How far back: 24h, 7d; from a whole hour on.")] = "24h",
    tenant: Annotated[str, typer.Option("--tenant", help="Only this tenant's decisions.")] = "",
    fail_on_change: Annotated[
        bool, typer.Option("--fail-on-change", help="Exit with 1 when an answer or a cost would be another.")
    ] = False,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Replay recorded decisions against a candidate, and list which answers, and which costs, would be others.

    Each decision is asked again of what is live and of the candidate, by the sidecar's own engine, tenant by tenant
    in the order of their time, each with quotas of its own. Without a candidate, what is live is compared with what
    was recorded. It says what could not be replayed exactly, and why. Changes nothing.

    \b
    Examples:
      licet policy simulate catalog/ --since 24h
      licet policy simulate 12 --since 7d --tenant acme
      licet policy simulate --since 1h
    """
    from licet_control_plane.cli.evaluator import Evaluator
    from licet_control_plane.cli.replay.command import ProgressBar
    from licet_control_plane.cli.rest import ControlPlane
    from licet_control_plane.core.simulation import Summary, Unrecorded

    # Whole hours: what was used before is known by the hour.
    now_s = time.time()
    since_s = int((now_s - seconds(since, "--since")) // _HOUR_S) * _HOUR_S
    if since_s < 0:
        raise bad(f"--since {since!r} is before 1970.", "--since 24h")
    summary = Summary()
    with ControlPlane(server_target(server, api_key)) as control_plane, Evaluator() as engine:
        note(f"reading decisions of {control_plane.target.server} since {_shown(since_s)}; nothing is changed")
        current = control_plane.get("/v1/bundles/current")
        live = _catalog_of(control_plane, int(current["revision"]))
        candidate, called, observe = _candidate(control_plane, what, as_json)
        catalogs = [live] if candidate is None else [live, candidate]
        engine.load(LIVE, live)
        if candidate is not None:
            engine.load(CANDIDATE, candidate)
        unrecorded = Unrecorded(catalogs)
        first = _page(control_plane, since_s, now_s, tenant, "")
        with ProgressBar("decisions", first["total"]) as bar:
            run = _Run(control_plane, engine, catalogs, unrecorded, summary, since_s)
            done = 0
            for events in _by_tenant(_pages(control_plane, first, since_s, now_s, tenant)):
                run.replay(events)
                done += len(events)
                bar.show(done)
    names = [f"revision {current['revision']}", called] if candidate is not None else ["recorded", "live"]
    if as_json:
        emit_json(_as_json(summary, since_s, names, current["revision"]))
    else:
        _print(summary, names, observe=observe)
    different = summary.changed or any(before != after for before, after in summary.costs.values())
    if fail_on_change and different:
        raise typer.Exit(EXIT_NO)


class _Run:
    """One tenant after the other; of each, its license and what it had used before."""

    def __init__(
        self,
        control_plane: ControlPlane,
        engine: Evaluator,
        catalogs: list[Catalog],
        unrecorded: Unrecorded,
        summary: Summary,
        since_s: int,
    ) -> None:
        self._control_plane = control_plane
        self._engine = engine
        self._catalogs = catalogs
        self._unrecorded = unrecorded
        self._summary = summary
        self._since_s = since_s
        self._tenant = ""
        self._license_changed_us = 0
        self._roles: dict[tuple[str, ...], tuple[str, ...]] = {}

    def replay(self, events: list[dict[str, Any]]) -> None:
        """Decisions of one tenant, in the order of their time, after those that were replayed before."""
        from licet_control_plane.core.simulation import Doubt, Skipped, answer_of, check_of, recorded_answer

        if events[0]["tenant"] != self._tenant:
            self._begin(events[0]["tenant"])
        checked = [event for event in events if event["kind"] == "CHECK"]
        self._summary.skipped[Skipped.KIND] += len(events) - len(checked)
        checks = [check_of(event, self._roles_of(event)) for event in checked]
        live = self._engine.check(LIVE, checks)
        after = live if len(self._catalogs) == 1 else self._engine.check(CANDIDATE, checks)
        for event, one, other in zip(checked, live, after, strict=True):
            recorded = recorded_answer(event)
            doubts = self._unrecorded.doubts(event["action"])
            if event["at_us"] < self._license_changed_us:
                doubts.add(Doubt.LICENSE)
            if event["degraded"] or event["stale"]:
                doubts.add(Doubt.DEGRADED)
            before = one
            if len(self._catalogs) == 1:
                before = recorded if "invalid" not in one else one
            elif "invalid" not in one and answer_of(one) != answer_of(recorded):
                doubts.add(Doubt.OTHERWISE)
            self._summary.add(event, before, other, doubts)

    def _begin(self, tenant: str) -> None:
        self._tenant = tenant
        license_ = self._license(tenant)
        for name in (LIVE, CANDIDATE)[: len(self._catalogs)]:
            self._engine.begin(name, license_)
        if license_ is not None:
            self._use_earlier(license_)

    def _use_earlier(self, license_: License) -> None:
        """Counts what the ledger's sums say was used in windows that were open when the replay begins."""
        from licet.domain.money import parse_nanos
        from licet_control_plane.core.simulation import priors

        wanted, unknown = priors(license_, self._catalogs, self._since_s)
        self._summary.unknown_start |= unknown
        sums: dict[int, list[dict[str, Any]]] = {}
        for prior in sorted(wanted):
            if prior.from_s not in sums:
                sums[prior.from_s] = self._control_plane.get(
                    "/v1/usage/summary",
                    tenant=license_.tenant,
                    by="feature,effect",
                    **{"from": str(prior.from_s), "to": str(self._since_s)},
                )["items"]
            units = 0
            for item in sums[prior.from_s]:
                if item["feature"] != prior.feature or item["effect"] != "APPROVED":
                    continue
                if prior.currency:
                    units += sum(
                        parse_nanos(cost["amount"]) for cost in item["cost"] if cost["currency"] == prior.currency
                    )
                else:
                    units += item["units"]
            for name in (LIVE, CANDIDATE)[: len(self._catalogs)]:
                self._engine.use(
                    name, license_.tenant, prior.limit, units, who={}, now_us=(self._since_s - 1) * 1_000_000
                )

    def _license(self, tenant: str) -> License | None:
        from licet_control_plane.cli.rest import Problem

        try:
            found = self._control_plane.get(f"/v1/licenses/{tenant}")
        except Problem as problem:
            if problem.status != 404:
                raise
            self._license_changed_us = 0
            return None
        self._license_changed_us = _us(found["updated_at"])
        return license_of(found)

    def _roles_of(self, event: dict[str, Any]) -> tuple[str, ...]:
        """Roles under which what is live gives the recorded answer, as far as quotas do not decide it."""
        from licet_control_plane.core.simulation import check_of

        choices = self._unrecorded.roles(event["action"])
        if len(choices) == 1:
            return choices[0]
        key = (event["action"], event["effect"], event["reason"], event["rule"])
        found = self._roles.get(key)
        if found is None:
            checks = [{**check_of(event, roles), "peek": True} for roles in choices]
            answers = self._engine.check(LIVE, checks)
            access = [_access(answer) for answer in answers]
            wanted = _access(event)
            found = choices[access.index(wanted)] if wanted in access else choices[-1]
            if len(self._roles) >= ROLES_KNOWN_MAX:
                self._roles.clear()
            self._roles[key] = found
        return found


def license_of(found: dict[str, Any]) -> License:
    """The license that the API describes."""
    from licet.domain.catalog import Grant, License, LicenseStatus
    from licet.domain.ids import LimitKey

    return License(
        tenant=found["tenant"],
        plan=found["plan"],
        status=LicenseStatus(found["status"]),
        starts_s=_us(found["starts_at"]) // 1_000_000,
        ends_s=_us(found["ends_at"]) // 1_000_000,
        addons=found["addons"],
        overrides={key: _units(amount) for key, amount in found["overrides"].items()},
        grants=tuple(
            Grant(
                grant["id"],
                LimitKey(grant["limit"]),
                _units(grant["amount"]),
                _us(grant["starts_at"]) // 1_000_000,
                _us(grant["expires_at"]) // 1_000_000,
                grant["priority"],
            )
            for grant in found["grants"]
        ),
        # Without them it is of a server that knows neither, and its licenses have none.
        grace_s=found.get("grace_s", 0),
        cancels=found.get("cancels", False),
    )


_BY_QUOTA: Final = frozenset(("OK", "OVERAGE", "QUOTA_EXHAUSTED", "RATE_LIMITED", "DEGRADED_ALLOW", "DEGRADED_DENY"))


def _access(answer: dict[str, Any]) -> tuple[str, str]:
    """What was decided before quotas were looked at: the same for all that got so far."""
    reason = answer.get("reason", "invalid")
    return ("", "") if reason in _BY_QUOTA else (reason, answer.get("rule", ""))


def _candidate(control_plane: ControlPlane, what: str, as_json: bool) -> tuple[Catalog | None, str, bool]:
    """The candidate's catalog, what to call it, and whether it was pushed in observe mode."""
    from licet_control_plane.core.documents import SourceFile, validate

    if not what:
        return None, "", False
    if what.isascii() and what.isdecimal():
        observe = bool(control_plane.get(f"/v1/bundles/{what}")["observe"])
        return _catalog_of(control_plane, int(what)), f"revision {what}", observe
    directory = Path(what)
    validated = validate([SourceFile(path, text) for path, text in read_sources(directory)])
    if validated.catalog is None:
        errors = [error.as_json() for error in validated.errors]
        if as_json:
            emit_json({"errors": errors})
        print_errors(errors, directory, so="nothing was replayed")
        raise typer.Exit(EXIT_USAGE)
    return validated.catalog, what, False


def _catalog_of(control_plane: ControlPlane, revision: int) -> Catalog:
    from licet_control_plane.core.documents import SourceFile, validate

    files = control_plane.get(f"/v1/bundles/{revision}/files", canonical=True)["files"]
    validated = validate([SourceFile(one["path"], one["content"]) for one in files])
    if validated.catalog is None:
        raise CliError(
            f"revision {revision} cannot be read by this version: {validated.errors[0]}",
            fix="use the command line in the version of the control plane",
        )
    return validated.catalog


def _page(control_plane: ControlPlane, since_s: int, to_s: float, tenant: str, after: str) -> dict[str, Any]:
    found: dict[str, Any] = control_plane.get(
        "/v1/decisions", tenant=tenant, after=after, limit=PAGE, **{"from": str(since_s), "to": f"{to_s:.6f}"}
    )
    return found


def _pages(
    control_plane: ControlPlane, first: dict[str, Any], since_s: int, to_s: float, tenant: str
) -> Iterator[list[dict[str, Any]]]:
    page = first
    while True:
        yield page["items"]
        if page["next"] is None:
            return
        page = _page(control_plane, since_s, to_s, tenant, page["next"])


def _by_tenant(pages: Iterator[list[dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
    """Pages cut where the tenant changes."""
    for page in pages:
        start = 0
        for place in range(1, len(page) + 1):
            if place == len(page) or page[place]["tenant"] != page[start]["tenant"]:
                yield page[start:place]
                start = place


def _as_json(summary: Summary, since_s: int, names: list[str], live: int) -> dict[str, Any]:
    from licet_control_plane.core.simulation import cost_rows

    return {
        "since": _shown(since_s),
        "live": live,
        "before": names[0],
        "after": names[1],
        "replayed": summary.replayed,
        "changed": summary.changed,
        "changes": [
            {**change._asdict(), "decisions": one.decisions, "units": one.units, "examples": one.examples}
            for change, one in _ordered(summary)
        ],
        "costs": list(cost_rows(summary)),
        "inexact": summary.doubtful,
        "inexact_because": {doubt.name.lower(): count for doubt, count in summary.doubts.items()},
        "not_replayed": {why.name.lower(): count for why, count in summary.skipped.items() if count},
        "begin_empty": sorted(summary.unknown_start),
    }


def _ordered(summary: Summary) -> list[Any]:
    return sorted(summary.changes.items(), key=lambda one: (-one[1].decisions, one[0]))


def _print(summary: Summary, names: list[str], *, observe: bool) -> None:
    from licet_control_plane.core.simulation import cost_rows

    say(f"{summary.replayed:,} decisions replayed; {summary.changed:,} would be answered otherwise.")
    if summary.changes:
        rows = _ordered(summary)
        table(
            ("tenant", names[0], names[1], "decisions", "units", "such as"),
            [
                (change.tenant, change.before, change.after, one.decisions, one.units, one.examples[0])
                for change, one in rows[:ROWS_MAX]
            ],
            numeric=("decisions", "units"),
        )
        if len(rows) > ROWS_MAX:
            say(f"… and {len(rows) - ROWS_MAX:,} more rows: --json has all of them.")
    costs = list(cost_rows(summary))
    if costs:
        say()
        table(
            ("tenant", f"cost: {names[0]}", names[1], "difference"),
            [(one["tenant"], one["before"], one["after"], one["difference"]) for one in costs[:ROWS_MAX]],
            numeric=(f"cost: {names[0]}", names[1], "difference"),
        )
    elif summary.replayed:
        say("No cost would be another.")
    if summary.doubtful:
        say(f"{summary.doubtful:,} of them could not be replayed exactly:")
        for doubt, count in summary.doubts.most_common():
            say(f"  {count:>8,}  {doubt.value}")
    for why, count in summary.skipped.most_common():
        if count:
            say(f"{count:,} not replayed: {why.value}")
    if summary.unknown_start:
        limits = ", ".join(sorted(summary.unknown_start)[:10])
        say(f"Earlier use is not known of limits by subject or attribute, and of grants; these begin empty: {limits}")
    if observe:
        say("The candidate was pushed in observe mode; these are its real decisions, which callers do not see.")


def _shown(at_s: int) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat().replace("+00:00", "Z")


def _us(text: str | None) -> int:
    if not text:
        return 0
    at = datetime.fromisoformat(text)
    return int(at.timestamp()) * 1_000_000 + at.microsecond


def _units(amount: int | str) -> int:
    from licet.domain.money import parse_budget

    return amount if isinstance(amount, int) else parse_budget(amount)[0]
