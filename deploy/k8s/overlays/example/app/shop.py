"""A stand-in for your service: asks its sidecar once every five seconds, and prints the answer."""

import signal
import sys
import time

import licet

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with licet.Client(fallback="deny") as client:
    while True:
        decision = client.check("acme", "report.export", subject="ada")
        print(decision.effect, decision.reason, decision.message, flush=True)
        time.sleep(5)
