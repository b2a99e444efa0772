"""The whole path in a minute: a real stack, a real catalog, three tenants, one workload, and books that agree.

`make demo` runs it. It starts `licet dev` with three sidecars in a temporary directory, publishes `examples/catalog`,
gives three tenants different plans, asks a few questions one by one, sends the same recorded workload for each tenant,
and compares the ledger with the answers. Everything is done with the commands and the client that you would use, and
nothing is left behind. Exits with 0 only when every answer is in the ledger, once, to the unit.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import licet

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

HERE = Path(__file__).parent
LICET = [sys.executable, "-m", "licet_control_plane.cli.entry"]
READY_S_MAX = 60.0
STOP_S_MAX = 30.0

TENANTS = {"initech": "free", "acme": "pro", "globex": "enterprise"}


class Question(NamedTuple):
    who: str
    tenant: str
    action: str
    subject: licet.Subject
    arguments: Mapping[str, Any] = MappingProxyType({})


ADA = licet.Subject("ada", type="user", roles=["analyst"])
BOB = licet.Subject("bob", type="user")
BOT = licet.Subject("support-bot", type="agent", on_behalf_of="ada")
TOKENS = {"input": 800, "output": 60}
SMALL, LARGE = {"model": "small"}, {"model": "large"}
QUESTIONS = [
    Question("an analyst exports a report", "acme", "report.export", ADA),
    Question("someone without the role does", "acme", "report.export", BOB),
    Question("the analyst, far too many rows", "acme", "report.export", ADA, {"quantity": 20_000}),
    Question("the analyst, from an embargoed region", "acme", "report.export", ADA, {"context": {"region": "xx"}}),
    Question("an agent calls a small model", "acme", "llm.generate", BOT, {"quantities": TOKENS, "context": SMALL}),
    Question("and a large one", "acme", "llm.generate", BOT, {"quantities": TOKENS, "context": LARGE}),
    Question("the free plan has no reports", "initech", "report.view", ADA),
    Question("a feature in a 20 % rollout that acme is in", "acme", "insights.ask", ADA),
    Question("an action nobody declared", "acme", "report.burn", ADA),
    Question("a tenant without a license", "hooli", "report.view", ADA),
]


class Replay(NamedTuple):
    tenant: str
    arguments: tuple[str, ...]


ONE_METER = ("--action", "llm.complete", "--quantity", "input_tokens+output_tokens")
TWO_METERS = ("--action", "llm.generate", "--meter", "input=input_tokens", "--meter", "output=output_tokens")
REPLAYS = [
    Replay("initech", (*TWO_METERS, "--context", "model=small")),
    Replay("acme", (*TWO_METERS, "--context", "model=small")),
    Replay("acme", ONE_METER),
    Replay("globex", (*TWO_METERS, "--context", "model=large")),
]


def main() -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="licet-demo-") as scratch:
        # A context file of its own, so that a stack that already runs on this machine is neither found nor disturbed.
        os.environ["LICET_CONTEXT"] = str(Path(scratch) / "context.json")
        for name in ("LICET_SERVER", "LICET_API_KEY", "LICET_SIDECAR"):
            os.environ.pop(name, None)
        with running_stack() as stack:
            agrees = tour(stack)
    print(f"\n{'Everything agrees' if agrees else 'SOMETHING DOES NOT AGREE'}, after {time.monotonic() - began:.0f} s.")
    return 0 if agrees else 1


def tour(stack: dict[str, Any]) -> bool:
    title("An operator publishes plans and policies; --wait returns when all three sidecars have them")
    licet_("policy", "push", str(HERE / "catalog"), "--wait")

    title("Each tenant gets a license")
    for tenant, plan in TENANTS.items():
        licet_("license", "create", tenant, "--plan", plan, "--wait")

    title("Services ask, and are answered from memory")
    with licet.Client(stack["sidecars"][0]) as client:
        for question in QUESTIONS:
            decision = client.check(question.tenant, question.action, subject=question.subject, **question.arguments)
            cost = f" {decision.cost}" if decision.cost else ""
            print(f"  {question.tenant:<8} {question.action:<14} {question.who}")
            print(f"           {decision.effect.name:<8} {decision.reason.name}{cost}  {decision.message}")

    title("A recorded workload, over all three sidecars; then the ledger is compared with the answers")
    reports = []
    for replay in REPLAYS:
        reports.append(replayed(replay))
        print_report(reports[-1])

    title("What it cost, from the ledger")
    licet_("usage", "summary")

    title("The sidecars, and the ledger recounted")
    licet_("sidecar", "list")
    verified = licet_("ledger", "verify", check=False).returncode == 0
    return verified and all(report["agrees"] for report in reports)


def replayed(replay: Replay) -> dict[str, Any]:
    """The report of `licet replay --json`, also when the books do not agree."""
    ended = licet_(
        *("replay", str(HERE / "sample_workload.csv"), "--tenant", replay.tenant, *replay.arguments),
        *("--timestamp", "timestamp", "--subject", "user", "--json"),
        check=False,
        capture=True,
    )
    if not ended.stdout:
        raise SystemExit("the replay failed; see above")
    report: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return report


def print_report(report: dict[str, Any]) -> None:
    denied = ", ".join(f"{count:,} {reason}" for reason, count in report["denied"].items()) or "none"
    costs = ", ".join(f"{licet.Cost(nanos, currency)}" for currency, nanos in report["cost_nanos"].items())
    ledger = report["ledger"]
    verdict = "agrees" if report["agrees"] else "DOES NOT AGREE: " + "; ".join(report["differences"])
    print(f"  {report['tenant']}, plan {TENANTS[report['tenant']]}, {report['action']}")
    print(f"    approved  {report['approved']:,} of {report['requests']:,} checks, {report['units_approved']:,} tokens")
    print(f"    denied    {denied}")
    print(f"    cost      {costs or 'nothing'}")
    print(f"    latency   {report['latency_us']['p50']:,} µs (p50), {report['latency_us']['p99']:,} µs (p99)")
    print(f"    ledger    {ledger['events']:,} events, {ledger['units_approved']:,} tokens: {verdict}")


def licet_(*arguments: str, check: bool = True, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a `licet` command, shown as one would type it."""
    shown = " ".join(os.path.relpath(word) if word.startswith(str(HERE)) else word for word in arguments)
    print(f"$ licet {shown}", flush=True)
    ended = subprocess.run([*LICET, *arguments], text=True, stdout=subprocess.PIPE if capture else None, check=False)
    if check and ended.returncode:
        raise SystemExit(f"licet {shown}: ended with exit code {ended.returncode}")
    return ended


@contextmanager
def running_stack() -> Iterator[dict[str, Any]]:
    """A stack on free ports, stopped at the end whatever happens."""
    title("Starting Valkey, the control plane and three sidecars")
    command = [*LICET, "dev", "--temp", "--sidecars", "3", "--log-level", "warning", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as dev:
        try:
            stack = json.loads(first_line(dev))
            print(f"  control plane {stack['server']}, sidecars {', '.join(stack['sidecars'])}")
            yield stack
        finally:
            dev.send_signal(signal.SIGTERM)
            try:
                dev.wait(STOP_S_MAX)
            except subprocess.TimeoutExpired:
                dev.kill()  # its children go with it


def first_line(process: subprocess.Popen[str]) -> str:
    """What the process says when it is ready."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        line = process.stdout.readline() if selector.select(READY_S_MAX) else ""
    if not line:
        raise SystemExit("the stack did not start; see above")
    return line


def title(text: str) -> None:
    print(f"\n── {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
