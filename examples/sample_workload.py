"""Writes ``sample_workload.csv``: requests to a language model over ten minutes, the same ones each time.

Token counts are log-normal and arrivals come in bursts, as in traces of real services: many small requests and a few
that are very large. Run it after changing it; the file it writes is committed.
"""

from __future__ import annotations

import csv
import random
from datetime import datetime, timedelta
from pathlib import Path

ROWS = 3_000
USERS = 40
FILE = Path(__file__).with_name("sample_workload.csv")


def main() -> None:
    chance = random.Random(20270104)
    at = datetime(2027, 1, 4, 9)
    with FILE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["timestamp", "user", "input_tokens", "output_tokens"])
        for _ in range(ROWS):
            # Three of four requests follow the one before at once; the rest wait for somebody to type.
            at += timedelta(seconds=chance.expovariate(20 if chance.random() < 0.75 else 1.5))
            input_tokens = min(int(chance.lognormvariate(6.2, 1.1)) + 1, 16_000)
            output_tokens = min(int(chance.lognormvariate(4.1, 0.9)) + 1, 2_000)
            writer.writerow([at.isoformat(sep=" "), f"user-{chance.randrange(USERS):02d}", input_tokens, output_tokens])


if __name__ == "__main__":
    main()
