"""Measuring on a noisy machine: CPU time rather than wall time, many short rounds, and the best and the middle one."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU microseconds an operation: the quietest round, and the median of the rounds."""

    best_us: float
    median_us: float

    def __str__(self) -> str:
        return f"{self.best_us:7.1f} µs  (median {self.median_us:.1f})"


def cpu_cost(operation: Callable[[int], object], *, per_round: int, rounds: int = 25, units: int = 1) -> Cost:
    """CPU time of ``operation(number)``, called ``per_round`` times a round, divided by ``units`` an operation."""
    costs = []
    number = 0
    for _ in range(rounds):
        started = time.process_time_ns()
        for _ in range(per_round):
            operation(number)
            number += 1
        costs.append((time.process_time_ns() - started) / 1_000 / per_round / units)
    return Cost(min(costs), statistics.median(costs))


def cpu_s_of(pid: int) -> float:
    """CPU seconds a process has used, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def resident_mb_of(pid: int) -> float:
    """Resident memory of a process, in MB of 2^20 bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES / 2**20


def percentile(sorted_values: list[float], share: float) -> float:
    """The value below which ``share`` of the sorted values lie."""
    return sorted_values[min(len(sorted_values) - 1, int(share * len(sorted_values)))]
