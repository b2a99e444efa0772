"""``make bench``: prints what Licet costs. ``ARGS=--json`` for one JSON object; ``ARGS=service`` for that part only."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

SERVICE_US_MAX = 25.0
BATCH_US_MAX = 15.0
APPEND_US_MAX = 5.0
FOUR_LIMITS_RATIO_MAX = 1.5
WAITED_SHARE_MAX = 0.001
ROUND_TRIPS_PER_S_MAX = 2.0
DRAIN_US_MAX = 50.0
YEAR_MS_MAX = 100.0
DRAINED_PER_S_MIN = 20_000
VERIFIED_PER_S_MIN = 100_000
FLAT_RATIO_MAX = 1.2
VALIDATE_S_MAX = 10.0
TAKE_S_MAX = 2.0
BLOCKED_MS_MAX = 5.0
MOVED_KB_MAX = 64.0
ROLLOUT_MS_MAX = 500.0


def main() -> None:
    """Measures, prints, and says which of the promised numbers were held; the exit status is always 0."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parts = ["service", "waits", "processes", "proof", "ledger", "drain", "scale", "rollout"]
    parser.add_argument("part", nargs="?", choices=parts, help="only this part")
    parser.add_argument("--events", type=int, help="size of the ledger; 100,000 unless told otherwise")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()
    out = sys.stderr if arguments.json else sys.stdout
    found: dict[str, Any] = {"yardstick": {"echo_us": _yardstick(out)}}
    if arguments.part in (None, "service"):
        from bench import service

        print("\nService layer in process, log included, no transport: CPU each", file=out)
        costs = service.run()
        for name, cost in costs.items():
            print(f"  {name:48} {cost}", file=out)
        ratio = costs["check, four limits"].best_us / costs["check, one limit"].best_us
        print(f"  four limits cost {ratio:.2f} times what one costs; promised: {FOUR_LIMITS_RATIO_MAX}", file=out)
        found["service"] = {name: dataclasses.asdict(cost) for name, cost in costs.items()}
        print(f"  promised: an append at most {APPEND_US_MAX:.0f} µs", file=out)
        print(f"  promised: a check {SERVICE_US_MAX:.0f} µs, a decision in a batch {BATCH_US_MAX:.0f} µs", file=out)
    if arguments.part in (None, "waits"):
        from bench import waits

        print("\nChecks that wait for the network, simulated with real leasing (takes a minute)", file=out)
        shares = waits.run()
        for name, share in shares.items():
            print(
                f"  {name:62} {100 * share.waited_later_share:7.3f} %   and {share.first:,} first checks of"
                f" {share.checks:,}; up to {100 * share.used_share:.0f} % of a limit used",
                file=out,
            )
        found["waits"] = {name: dataclasses.asdict(share) for name, share in shares.items()}
        print(f"  promised, in steady state: at most {100 * WAITED_SHARE_MAX:.1f} %", file=out)
    if arguments.part in (None, "processes"):
        from bench import processes

        print("\nOver gRPC, one sidecar beside a bare grpc.aio echo in the same run (takes a minute)", file=out)
        results = processes.run()
        _print_processes(results, out)
        found["processes"] = dataclasses.asdict(results)
    if arguments.part in (None, "proof"):
        from bench import proof

        print("\nLedger on SQLite: CPU an event, one process", file=out)
        costs_of_proof = proof.run()
        print(f"  recorded                      {costs_of_proof.record}", file=out)
        print(f"  recorded, each a new subject  {costs_of_proof.record_new_subjects}", file=out)
        print(f"  verified                      {costs_of_proof.verify:7.1f} µs", file=out)
        print(f"  verified, --quick             {costs_of_proof.verify_quick:7.1f} µs", file=out)
        print(f"  {costs_of_proof.bytes_an_event:.0f} bytes an event", file=out)
        print(
            f"  verified by all processors {costs_of_proof.verified_per_s:,.0f} events/s"
            f"   ({costs_of_proof.verified_events:,} events)\n"
            f"  promised: {DRAIN_US_MAX:.0f} µs recorded; verified at {VERIFIED_PER_S_MIN:,}/s by two processors",
            file=out,
        )
        found["proof"] = dataclasses.asdict(costs_of_proof)
    if arguments.part in (None, "ledger"):
        from bench import ledger

        events = arguments.events or ledger.EVENTS_SMALL
        print(f"\nQuestions to a ledger of {events:,} events (10 million: make bench-ledger)", file=out)
        answers = ledger.run(events)
        _print_ledger(answers, out)
        found["ledger"] = dataclasses.asdict(answers)
    if arguments.part in (None, "drain"):
        from bench import drain

        print("\nDrain, one worker: Redis to committed and acknowledged (takes half a minute)", file=out)
        runs = drain.run()
        for name, drained in runs.items():
            print(
                f"  {name:12} {drained.events_per_s:9,.0f} events/s   {drained.cpu_us:5.1f} µs of CPU an event"
                f"   ({drained.events:,} events)",
                file=out,
            )
        found["drain"] = {name: dataclasses.asdict(drained) for name, drained in runs.items()}
        print(f"  promised: at least {DRAINED_PER_S_MIN:,} events/s", file=out)
    if arguments.part in (None, "scale"):
        from bench import scale

        print("\nSize: many rules, many tenants, a large bundle (takes a minute)", file=out)
        sizes = scale.run()
        _print_scale(sizes, out)
        found["scale"] = dataclasses.asdict(sizes)
    if arguments.part in (None, "rollout"):
        from bench import rollout

        print("\nFrom a push to the answers of fifty sidecars, on this machine all of them (takes a minute)", file=out)
        rolled = rollout.run()
        print(
            f"  live at each     median {rolled.each_p50_ms:5.0f} ms, p99 {rolled.each_p99_ms:5.0f}\n"
            f"  live everywhere  median {rolled.all_p50_ms:5.0f} ms, p99 {rolled.all_p99_ms:5.0f}"
            f"   ({rolled.pushes} pushes, {rolled.sidecars} sidecars; a push is answered after"
            f" {rolled.accepted_p50_ms:.0f} ms)\n"
            f"  promised: p99 {ROLLOUT_MS_MAX:.0f} ms\n"
            f"  of {rolled.answers:,} answers {rolled.mixed} mixed revisions and {rolled.reverted} went back;"
            " promised: none",
            file=out,
        )
        found["rollout"] = dataclasses.asdict(rolled)
    if arguments.json:
        print(json.dumps(found))


def _print_scale(sizes: Any, out: Any) -> None:
    for what, costs in (("rules", sizes.by_rules), ("tenants", sizes.by_tenants)):
        (fewer, low), (more, high) = costs.items()
        print(f"  a decision under {fewer:,} {what:8} {low}", file=out)
        print(f"  a decision under {more:,} {what:8} {high}", file=out)
        print(f"  {high.best_us / low.best_us:.2f} times; promised: at most {FLAT_RATIO_MAX}", file=out)
    print(f"  10,000 rules validated in {sizes.validate_s:.1f} s of CPU; promised: {VALIDATE_S_MAX:.0f}", file=out)
    for name, took_s, blocked_ms in (
        ("10,000 rules", sizes.take_s, sizes.blocked_ms),
        ("one changed rule of them", sizes.changed_take_s, sizes.changed_blocked_ms),
    ):
        print(f"  {name} taken in {took_s:.2f} s of CPU, at most {blocked_ms:.1f} ms in one go", file=out)
    print(f"  promised: {TAKE_S_MAX:.0f} s, and {BLOCKED_MS_MAX:.0f} ms", file=out)
    moved = f"{sizes.changed_bytes / 1024:.0f} KB for each sidecar"
    print(f"  a push that changes one rule moves {moved}; promised: less than {MOVED_KB_MAX:.0f}", file=out)


def _yardstick(out: Any) -> float:
    """What an echo costs here, microseconds: how slow this machine is, and how busy."""
    from bench import yardstick

    echo_us = yardstick.echo_us()
    slower = echo_us / yardstick.PROMISED_ECHO_US
    print(
        f"A bare gRPC echo costs {echo_us:.0f} µs of server CPU here. Promises in microseconds, and in operations a\n"
        f"second, are for where it costs {yardstick.PROMISED_ECHO_US:.0f}: here, allow for {slower:.2f} times as much.",
        file=out,
    )
    return echo_us


def _print_ledger(results: Any, out: Any) -> None:
    print(
        f"  built in {results.build_s:.0f} s by the ledger transaction, {results.events_per_s:,.0f} events/s in it;"
        f" {results.file_bytes / 2**20:,.0f} MB",
        file=out,
    )
    for table, rows in results.rows.items():
        of_busy = f", {results.busy_rows[table]:,} of the tenant asked about" if table in results.busy_rows else ""
        print(f"  {table:20} {rows:12,} rows{of_busy}", file=out)
    for name, answer in results.answers.items():
        print(
            f"  {name:48} first {answer.first_ms:8.1f} ms   best {answer.best_ms:8.1f}   median"
            f" {answer.median_ms:8.1f}   {answer.rows:,} rows",
            file=out,
        )
        for step in results.plans[name]:
            print(f"      {step}", file=out)
    print(f"  promised, for a tenant's year: at most {YEAR_MS_MAX:.0f} ms", file=out)


def _print_processes(results: Any, out: Any) -> None:
    rows = (
        ("echo, closed loop", results.echo, 1),
        ("check, closed loop", results.check, 1),
        ("batch of 32, a decision", results.batch, 32),
        ("echo, 2,000/s open loop", results.open_loop_echo, 1),
        ("check, 2,000/s open loop", results.open_loop, 1),
    )
    for name, row, units in rows:
        print(
            f"  {name:26} server CPU {row.cpu_us / units:7.1f} µs   {row.calls_per_s * units:8,.0f}/s"
            f"   p50 {row.p50_ms:6.2f} ms   p99 {row.p99_ms:6.2f} ms"
            f"{f'   {row.failed} failed' if row.failed else ''}",
            file=out,
        )
    print(
        f"  a check costs {results.check.cpu_us - results.echo.cpu_us:.1f} µs more than an echo"
        f" ({results.check.cpu_us / results.echo.cpu_us:.2f} times it)",
        file=out,
    )
    for quotas, per_s in results.round_trips_per_s.items():
        print(f"  {quotas:5,} quotas in use: {per_s:.2f} Redis round trips a second", file=out)
    print(f"  promised: at most {ROUND_TRIPS_PER_S_MAX:.0f}", file=out)
    footprint = results.footprint
    print(
        f"  resident: {footprint.idle_mb:.1f} MB idle, {footprint.loaded_mb:.1f} MB with 1,000 tenants and 100 rules"
        f"\n  ready after {footprint.ready_s:.2f} s and {footprint.ready_cpu_s:.2f} s of CPU;"
        f" idle: {100 * footprint.idle_share:.2f} % of a core",
        file=out,
    )


if __name__ == "__main__":
    main()
