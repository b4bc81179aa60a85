"""`bin/bench simulate`: fleets larger than any that can be made here, simulated from what was measured of one machine.

Questions come at random moments, two edge hosts give each to the app host with which they have the fewest open, and
there one of the workers takes it, whichever, and does one after the other. With the nodes in PostgreSQL a question then
waits for a core of a database host. What a question costs is `ragrack size`'s figure, spread as lognormal.

The second table is of snapshots: each host looks for a new one when its timer says so, and all that pull at a time
share the link of the host that ingests.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from ragrack.sizing import LINK_MB_PER_SECOND, Measured

EDGES = 2
CORES = 8
SPREAD = 0.5
"""Standard deviation of a question's cost, as a share of its mean."""
QUESTIONS = 200_000
WARM = 0.2
"""Share of the questions that fill the queues and are not counted."""
PULL_EVERY = 60.0
"""Seconds between two looks of a host."""
DAY = 24 * 3600.0

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True)
class Fleet:
    """`database` hosts answer searches; 0 where each app host has the index. Costs are CPU seconds of a question."""

    hosts: int
    app_seconds: float
    database: int = 0
    database_seconds: float = 0


def latencies(fleet: Fleet, load: float, questions: int = QUESTIONS, seed: int = 1) -> Floats:
    """Seconds of each question from arrival to answer, at `load`, the share of the busier kind's cores that is used."""
    rng = np.random.default_rng(seed)
    a_second = load / max(
        fleet.app_seconds / (fleet.hosts * CORES),
        fleet.database_seconds / (fleet.database * CORES) if fleet.database else 0,
    )
    arrivals = np.cumsum(rng.exponential(1 / a_second, questions))
    app, database = (_costs(rng, mean, questions) for mean in (fleet.app_seconds, fleet.database_seconds))
    edges = rng.integers(EDGES, size=questions)
    workers = rng.integers(CORES, size=questions)
    replicas = rng.integers(max(fleet.database, 1), size=questions)
    ties = rng.random(questions + fleet.hosts)
    open_ = np.zeros((EDGES, fleet.hosts))
    free = np.zeros((fleet.hosts, CORES))
    cores = [[0.0] * CORES for _ in range(fleet.database)]
    hosts = np.zeros(questions, dtype=np.int64)
    ended = np.zeros(questions)
    asking: list[tuple[float, int]] = []
    leaving: list[tuple[float, int, int]] = []

    def search(until: float) -> None:
        """Every question whose embedding is there by then takes the core of its database host that is free first."""
        while asking and asking[0][0] <= until:
            moment, question = heapq.heappop(asking)
            queue = cores[replicas[question]]
            begun = max(moment, heapq.heappop(queue))
            ended[question] = begun + database[question]
            heapq.heappush(queue, ended[question])
            heapq.heappush(leaving, (ended[question], edges[question], hosts[question]))

    for question, moment in enumerate(arrivals):
        search(moment)
        while leaving and leaving[0][0] <= moment:
            _, edge, host = heapq.heappop(leaving)
            open_[edge, host] -= 1
        edge, worker = edges[question], workers[question]
        host = hosts[question] = int(np.argmin(open_[edge] + ties[question : question + fleet.hosts]))
        open_[edge, host] += 1
        done = max(moment, free[host, worker]) + app[question]
        free[host, worker] = done
        if fleet.database:
            heapq.heappush(asking, (done, question))
        else:
            ended[question] = done
            heapq.heappush(leaving, (done, edge, host))
    search(np.inf)
    return (ended - arrivals)[int(questions * WARM) :]


def _costs(rng: np.random.Generator, mean: float, number: int) -> Floats:
    if mean == 0:
        return np.zeros(number)
    sigma = np.sqrt(np.log(1 + SPREAD**2))
    return rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, number)


def behind(hosts: int, megabytes: float, made_every: float, seconds: float = 4 * DAY, seed: int = 1) -> Floats:
    """Seconds for which a newer snapshot has been there than the one that a host answers from, at random moments.

    One is made each `made_every` seconds, the first at the beginning, which all hosts have.
    """
    rng = np.random.default_rng(seed)
    looks = [(offset, host) for host, offset in enumerate(rng.uniform(0, PULL_EVERY, hosts))]
    heapq.heapify(looks)
    samples = np.sort(rng.uniform(seconds / 4, seconds, 200))
    has = np.zeros(hosts)
    pulling: list[tuple[float, int, float]] = []
    # Megabytes that each of those that pull has got since the beginning: all get the same.
    got, now = 0.0, 0.0
    found: list[Floats] = []
    for sample in samples:
        while True:
            rate = LINK_MB_PER_SECOND / len(pulling) if pulling else 0.0
            ends = now + (pulling[0][0] - got) / rate if pulling else np.inf
            moment = min(ends, looks[0][0] if looks else np.inf, sample)
            got += rate * (moment - now)
            now = moment
            if moment == sample:
                break
            if moment == ends:
                _, host, made = heapq.heappop(pulling)
                has[host] = made
                heapq.heappush(looks, (now + PULL_EVERY, host))
                continue
            _, host = heapq.heappop(looks)
            newest = now // made_every * made_every
            if newest > has[host]:
                heapq.heappush(pulling, (got + megabytes, host, newest))
            else:
                heapq.heappush(looks, (now + PULL_EVERY, host))
        found.append(np.maximum(sample - (has + made_every), 0))
    return np.concatenate(found)


def _loads(measured: Measured) -> Iterator[str]:
    heads = ["app hosts", "nodes in", "cores in use", "questions/s", "p50 ms", "p95 ms", "p99 ms"]
    yield from ("| " + " | ".join(heads) + " |", "|---" * len(heads) + "|")
    nodes = 1_000_000
    files = measured.question_ms("extractive", nodes, 0) / 1000
    client = measured.question_ms("extractive", nodes, 0, "postgres") / 1000
    search = measured.database_ms(nodes) / 1000
    # So many app hosts that both kinds are as busy.
    beside = round(4 * client / search)
    fleets = [(hosts, Fleet(hosts, files), "files") for hosts in (10, 100, 300)]
    for hosts, fleet, where in [*fleets, (beside, Fleet(beside, client, 4, search), "4 databases")]:
        for load in (0.5, 0.6, 0.7, 0.8, 0.9):
            took = latencies(fleet, load) * 1000
            p50, p95, p99 = np.percentile(took, [50, 95, 99])
            a_second = load * hosts * CORES / fleet.app_seconds
            yield f"| {hosts} | {where} | {load:.0%} | {a_second:,.0f} | {p50:.0f} | {p95:.0f} | {p99:.0f} |"


def _snapshots(measured: Measured) -> Iterator[str]:
    heads = ["nodes", "app hosts", "a new one each", "a host is behind: share of the time", "p50 min", "p99 min"]
    yield from ("| " + " | ".join(heads) + " |", "|---" * len(heads) + "|")
    for nodes in (100_000, 1_000_000, 5_000_000):
        megabytes = nodes * measured.index_bytes_per_node / 1e6
        for hosts in (10, 100, 300):
            for hours in (1, 24):
                late = behind(hosts, megabytes, hours * 3600.0) / 60
                p50, p99 = np.percentile(late, [50, 99])
                yield f"| {nodes:,} | {hosts} | {hours} h | {np.mean(late > 0):.1%} | {p50:,.0f} | {p99:,.0f} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench simulate", description="Fleets of hundreds of hosts, simulated.")
    parser.parse_args()
    measured = Measured.load()
    for line in itertools.chain(_loads(measured), [""], _snapshots(measured)):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
