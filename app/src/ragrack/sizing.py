"""How many hosts a service needs: measured costs of one question and one node, multiplied out.

What was measured is in `sizing.json`, made by `bin/bench size` out of the figures of `bin/bench serve` and `bin/bench
index` on one machine; those of another machine are given as a file of the same form.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

BUSY = 0.6
"""Share of the cores that a service at its peak may use: above it queues grow faster than what is done."""
SYSTEM_MIB = 1024
"""For the system, nginx and what reads documents."""
MEMORY_SHARE = 0.8
"""Of a host's memory; the rest is for the moment in which two releases, or two snapshots, are there at once."""
LINK_MB_PER_SECOND = 100
"""What a host that ingests can send: one gigabit."""
PULL_SECONDS = 15 * 60
"""In which all hosts should have a new snapshot."""


class SizeError(Exception):
    """What was asked for cannot be answered; the message says why and what would do."""


@dataclass(frozen=True)
class Measured:
    """On one core: `cpu_ms` of one question by what answers it, `search_cpu_ms` of its search by the number of nodes,
    `token_cpu_ms` of each token of a language model's that is handed on.

    The questions were asked of the smallest of those numbers. `core_nodes_per_second` are those that one core ingests.
    """

    machine: str
    cpu_ms: dict[str, float]
    token_cpu_ms: float
    search_cpu_ms: dict[int, float]
    first_worker_mib: float
    further_worker_mib: dict[int, float]
    index_bytes_per_node: float
    core_nodes_per_second: float
    nodes_per_document: float

    @classmethod
    def load(cls, path: Path | None = None) -> Measured:
        """Of the machine that the project was measured on, or of a file. Raises SizeError for one of another form."""
        if path is None:
            text = resources.files("ragrack").joinpath("sizing.json").read_text(encoding="utf-8")
        else:
            try:
                text = path.read_text(encoding="utf-8")
            except OSError as error:
                raise SizeError(f"{path} cannot be read ({error.strerror}); make it with bin/bench size") from error
        try:
            facts: dict[str, Any] = json.loads(text)
            return cls(
                machine=str(facts["machine"]),
                cpu_ms={answer: float(facts["cpu_ms"][answer]) for answer in ("retrieve", "extractive", "generate")},
                token_cpu_ms=float(facts["token_cpu_ms"]),
                search_cpu_ms={int(nodes): float(ms) for nodes, ms in facts["search_cpu_ms"].items()},
                first_worker_mib=float(facts["first_worker_mib"]),
                further_worker_mib={int(nodes): float(mib) for nodes, mib in facts["further_worker_mib"].items()},
                index_bytes_per_node=float(facts["index_bytes_per_node"]),
                core_nodes_per_second=float(facts["core_nodes_per_second"]),
                nodes_per_document=float(facts["nodes_per_document"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SizeError(f"{path} is no file of bin/bench size ({type(error).__name__}: {error})") from error

    def question_ms(self, answer: str, nodes: int, tokens: int) -> float:
        """CPU milliseconds of one question; beyond the largest size measured it grows on as it did before."""
        search = self.search_cpu_ms
        handed_on = tokens * self.token_cpu_ms if answer == "generate" else 0
        return self.cpu_ms[answer] + handed_on + _at(search, nodes) - search[min(search)]

    def worker_mib(self, nodes: int) -> float:
        return _at(self.further_worker_mib, nodes)


def _at(points: dict[int, float], nodes: int) -> float:
    """Between two sizes along the logarithm of the nodes, above the largest as between the last two."""
    if len(points) == 1:
        return next(iter(points.values()))
    sizes = sorted(points)
    upper = next((i for i, size in enumerate(sizes) if size >= nodes and i > 0), len(sizes) - 1)
    low, high = sizes[upper - 1], sizes[upper]
    where = (math.log(max(nodes, 1)) - math.log(low)) / (math.log(high) - math.log(low))
    # Below the smallest size nothing gets dearer, and nothing was measured.
    return points[low] + (points[high] - points[low]) * max(where, 0)


@dataclass(frozen=True)
class Wanted:
    """`questions`: a second, at the peak. `spare`: hosts that may be down at once. `tokens`: of a generated answer."""

    nodes: int
    questions: float
    cores: int = 4
    memory_gib: float = 16
    spare: int = 1
    changed_share: float = 0.01
    answer: str = "extractive"
    tokens: int = 200

    def __post_init__(self) -> None:
        for name, value, least in (
            ("nodes", self.nodes, 1),
            ("cores", self.cores, 1),
            ("spare", self.spare, 0),
            ("tokens", self.tokens, 0),
        ):
            if value < least:
                raise SizeError(f"{name}: {value} is below {least}")
        for name, number in (("qps", self.questions), ("memory", self.memory_gib)):
            if not 0 < number < math.inf:
                raise SizeError(f"{name}: {number:g} is not above 0")
        if not 0 <= self.changed_share <= 1:
            raise SizeError(f"changed: {self.changed_share:g} is no share from 0 to 1")


@dataclass(frozen=True)
class Size:
    """What it takes.

    `memory_mib` and `questions_per_host` (a second) are of one host; `index_mib` is of one snapshot; `build_hours` are
    for all documents on one host, `changed_hours` for a day's changes; `pull_seconds` is until the last host has a
    snapshot.
    `limits`: what speaks against an index in files on each host, in words; without any `store` is `embedded`.
    """

    nodes: int
    store: str
    hosts: int
    workers: int
    questions_per_host: float
    memory_mib: int
    index_mib: int
    build_hours: float
    changed_hours: float
    pull_seconds: float
    limits: list[str]

    def words(self) -> str:
        """For a reader at a terminal."""
        where = "in files on each host" if self.store == "embedded" else "in PostgreSQL (app_vector_store: postgres)"
        lines = [
            f"{self.hosts} app hosts with {self.workers} workers and {self.memory_mib / 1024:.1f} GiB in use on each",
            f"a host answers {self.questions_per_host:.0f} questions a second at {BUSY:.0%} of its cores",
            f"{self.nodes:,} nodes {where}, {self.index_mib / 1024:.1f} GiB",
            f"{self.build_hours:.1f} h to ingest all on one host, {self.changed_hours:.1f} h for a day's changes",
        ]
        if self.store == "embedded":
            lines.append(f"{self.pull_seconds:.0f} s until the last host has a new snapshot")
        return "\n".join([*lines, *(f"not in files on each host: {limit}" for limit in self.limits)])


def size(wanted: Wanted, measured: Measured) -> Size:
    """Raises SizeError where no number of such hosts would do."""
    nodes, workers = wanted.nodes, wanted.cores
    index_mib = nodes * measured.index_bytes_per_node / 2**20
    per_host = workers * BUSY * 1000 / measured.question_ms(wanted.answer, nodes, wanted.tokens)
    hosts = math.ceil(wanted.questions / per_host) + wanted.spare
    least = measured.further_worker_mib[min(measured.further_worker_mib)]
    without_index = SYSTEM_MIB + measured.first_worker_mib + (workers - 1) * least
    with_index = without_index + (workers - 1) * (measured.worker_mib(nodes) - least) + index_mib
    room = wanted.memory_gib * 1024 * MEMORY_SHARE
    if without_index > room:
        raise SizeError(
            f"memory: {workers} workers take {without_index / 1024:.1f} GiB without any index, and of "
            f"{wanted.memory_gib:g} GiB {room / 1024:.1f} may be used; give hosts with more"
        )
    pull = index_mib * 2**20 / 1e6 * (hosts - 1) / LINK_MB_PER_SECOND
    build = nodes / (measured.core_nodes_per_second * wanted.cores) / 3600
    limits = []
    if with_index > room:
        limits.append(f"{with_index / 1024:.1f} GiB on every host, of which {room / 1024:.1f} may be used")
    if pull > PULL_SECONDS:
        limits.append(f"a new snapshot takes {pull / 60:.0f} min to reach all hosts from the one that ingests")
    if build * wanted.changed_share > 24:
        raise SizeError(
            f"changed: a day's changes take {build * wanted.changed_share:.0f} h to ingest on one host; give hosts "
            "with more cores, or run several fleets, each for some of the collections"
        )
    embedded = not limits
    return Size(
        nodes=nodes,
        store="embedded" if embedded else "postgres",
        hosts=hosts,
        workers=workers,
        questions_per_host=round(per_host, 1),
        memory_mib=math.ceil(with_index if embedded else without_index),
        index_mib=math.ceil(index_mib),
        build_hours=round(build, 3),
        changed_hours=round(build * wanted.changed_share, 3),
        pull_seconds=round(pull if embedded else 0, 1),
        limits=limits,
    )


def table(measured: Measured) -> str:
    """Markdown: fleets of growing collections and loads, hosts of 8 cores and 32 GiB."""
    heads = [
        "nodes",
        "questions/s",
        "store",
        "hosts",
        "GiB of memory a host",
        "GiB of index",
        "h to ingest all",
        "min to pull",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for nodes in (10_000, 100_000, 1_000_000, 5_000_000, 20_000_000, 100_000_000):
        for questions in (10, 100, 1_000, 10_000):
            wanted = Wanted(nodes, questions, cores=8, memory_gib=32, changed_share=0)
            one = size(wanted, measured)
            cells = [
                *(f"{nodes:,}", f"{questions:,}", one.store, f"{one.hosts}"),
                *(f"{one.memory_mib / 1024:.1f}", f"{one.index_mib / 1024:.1f}", f"{one.build_hours:.1f}"),
                f"{one.pull_seconds / 60:.1f}" if one.store == "embedded" else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
