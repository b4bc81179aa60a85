"""How many hosts a service needs: measured costs of one question and one node, multiplied out.

What was measured is in `sizing.json`, made by `bin/bench size` out of the figures of `bin/bench index` and `bin/bench
postgres` on one machine; those of another machine are given as a file of the same form.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

BUSY = 0.6
"""Share of the cores that a service at its peak may use: above it queues grow faster than what is done (`bin/bench
simulate`)."""
SYSTEM_MIB = 1024
"""For the system, nginx and what reads documents."""
MEMORY_SHARE = 0.8
"""Of a host's memory; the rest is for the moment in which two releases, or two snapshots, are there at once."""
LINK_MB_PER_SECOND = 100
"""What a host that ingests can send: one gigabit."""
PULL_SECONDS = 15 * 60
"""In which all hosts should have a new snapshot."""
DATABASES = (3, 5)
"""As many hosts role postgres takes for a database that outlives one of them. All but one answer at the peak."""


class SizeError(Exception):
    """What was asked for cannot be answered; the message says why and what would do."""


@dataclass(frozen=True)
class Measured:
    """On one core: `cpu_ms` of one question by what answers it, `search_cpu_ms` of its search by the number of nodes,
    `token_cpu_ms` of each token of a language model's that is handed on.

    The questions were asked of the smallest of those numbers. `core_nodes_per_second` are those that one core ingests.
    Where the nodes are in PostgreSQL, a search costs its hosts `database_cpu_ms` and the app's `client_cpu_ms`.
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
    database_cpu_ms: dict[int, float]
    client_cpu_ms: dict[int, float]
    database_bytes_per_node: float

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
                search_cpu_ms=_by_nodes(facts["search_cpu_ms"]),
                first_worker_mib=float(facts["first_worker_mib"]),
                further_worker_mib=_by_nodes(facts["further_worker_mib"]),
                index_bytes_per_node=float(facts["index_bytes_per_node"]),
                core_nodes_per_second=float(facts["core_nodes_per_second"]),
                nodes_per_document=float(facts["nodes_per_document"]),
                database_cpu_ms=_by_nodes(facts["database_cpu_ms"]),
                client_cpu_ms=_by_nodes(facts["client_cpu_ms"]),
                database_bytes_per_node=float(facts["database_bytes_per_node"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SizeError(f"{path} is no file of bin/bench size ({type(error).__name__}: {error})") from error

    def question_ms(self, answer: str, nodes: int, tokens: int, store: str = "embedded") -> float:
        """CPU milliseconds of one question; beyond the largest size measured it grows on as it did before."""
        handed_on = tokens * self.token_cpu_ms if answer == "generate" else 0
        search = _at(self.search_cpu_ms if store == "embedded" else self.client_cpu_ms, nodes)
        return self.cpu_ms[answer] + handed_on + search - self.search_cpu_ms[min(self.search_cpu_ms)]

    def database_ms(self, nodes: int) -> float:
        """CPU milliseconds that a search costs the database."""
        return _at(self.database_cpu_ms, nodes)

    def worker_mib(self, nodes: int) -> float:
        return _at(self.further_worker_mib, nodes)


def _by_nodes(figures: dict[str, Any]) -> dict[int, float]:
    return {int(nodes): float(figure) for nodes, figure in figures.items()}


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

    `memory_mib` and `questions_per_host` (a second) are of one app host; `index_mib` is of one snapshot, in files or in
    the database; `build_hours` are for all documents on one host, `changed_hours` for a day's changes; `pull_seconds`
    is until the last host has a snapshot. `databases` are hosts of the same kind, none where `store` is `embedded`.
    `limits`: what speaks against an index in files on each host, then against one in the database, in words.
    """

    nodes: int
    store: str
    hosts: int
    databases: int
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
        else:
            lines.insert(1, f"{self.databases} database hosts of the same kind")
        return "\n".join([*lines, *(f"mind: {limit}" for limit in self.limits)])


def size(wanted: Wanted, measured: Measured) -> Size:
    """Raises SizeError where no number of such hosts would do."""
    nodes, workers = wanted.nodes, wanted.cores
    least = measured.further_worker_mib[min(measured.further_worker_mib)]
    without_index = SYSTEM_MIB + measured.first_worker_mib + (workers - 1) * least
    room = wanted.memory_gib * 1024 * MEMORY_SHARE
    if without_index > room:
        raise SizeError(
            f"memory: {workers} workers take {without_index / 1024:.1f} GiB without any index, and of "
            f"{wanted.memory_gib:g} GiB {room / 1024:.1f} may be used; give hosts with more"
        )
    build = nodes / (measured.core_nodes_per_second * wanted.cores) / 3600
    if build * wanted.changed_share > 24:
        raise SizeError(
            f"changed: a day's changes take {build * wanted.changed_share:.0f} h to ingest on one host; give hosts "
            "with more cores, or run several fleets, each for some of the collections"
        )
    per_host, hosts = _app_hosts(wanted, measured, "embedded")
    index_mib = nodes * measured.index_bytes_per_node / 2**20
    memory = without_index + (workers - 1) * (measured.worker_mib(nodes) - least) + index_mib
    pull = index_mib * 2**20 / 1e6 * (hosts - 1) / LINK_MB_PER_SECOND
    limits = []
    if memory > room:
        limits.append(f"in files it is {memory / 1024:.1f} GiB on every host, of which {room / 1024:.1f} may be used")
    if pull > PULL_SECONDS:
        limits.append(f"in files a new snapshot takes {pull / 60:.0f} min from the host that ingests to the last one")
    store, databases = "embedded", 0
    if limits:
        answering = _answering_databases(wanted, measured)
        databases = next((number for number in DATABASES if number > answering), 0)
        if databases:
            store = "postgres"
            per_host, hosts = _app_hosts(wanted, measured, store)
            memory, pull = without_index, 0
            index_mib = nodes * measured.database_bytes_per_node / 2**20
            if index_mib > room:
                limits.append(
                    f"the database is {index_mib / 1024:.0f} GiB, of which its hosts have {room / 1024:.1f} in memory: "
                    "its searches will read the disk, which is slower than what was measured"
                )
        elif memory > room:
            raise SizeError(
                f"qps: the index does not fit into {wanted.memory_gib:g} GiB of every host, and in the database "
                f"{answering} hosts would have to answer, of {DATABASES[-1]} at most; give hosts with more memory or "
                "cores, or run several fleets, each for some of the collections"
            )
    return Size(
        nodes=nodes,
        store=store,
        hosts=hosts,
        databases=databases,
        workers=workers,
        questions_per_host=round(per_host, 1),
        memory_mib=math.ceil(memory),
        index_mib=math.ceil(index_mib),
        build_hours=round(build, 3),
        changed_hours=round(build * wanted.changed_share, 3),
        pull_seconds=round(pull, 1),
        limits=limits,
    )


def _app_hosts(wanted: Wanted, measured: Measured, store: str) -> tuple[float, int]:
    """What one answers in a second, and how many it takes."""
    question_ms = measured.question_ms(wanted.answer, wanted.nodes, wanted.tokens, store)
    per_host = wanted.cores * BUSY * 1000 / question_ms
    return per_host, math.ceil(wanted.questions / per_host) + wanted.spare


def _answering_databases(wanted: Wanted, measured: Measured) -> int:
    """Database hosts, of the same kind as the app's, that the questions keep busy."""
    cores = wanted.questions * measured.database_ms(wanted.nodes) / 1000 / BUSY
    return math.ceil(cores / wanted.cores)


def table(measured: Measured) -> str:
    """Markdown: fleets of growing collections and loads, hosts of 8 cores and 32 GiB."""
    heads = [
        "nodes",
        "questions/s",
        "store",
        "app hosts",
        "database hosts",
        "GiB of memory an app host",
        "GiB of index",
        "h to ingest all",
        "min to pull",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for nodes in (10_000, 100_000, 1_000_000, 5_000_000, 20_000_000, 100_000_000):
        for questions in (10, 100, 1_000, 10_000, 50_000):
            wanted = Wanted(nodes, questions, cores=8, memory_gib=32, changed_share=0)
            lines.append("| " + " | ".join([f"{nodes:,}", f"{questions:,}", *_cells(wanted, measured)]) + " |")
    return "\n".join(lines) + "\n"


def _cells(wanted: Wanted, measured: Measured) -> list[str]:
    try:
        one = size(wanted, measured)
    except SizeError:
        return ["several fleets", *[""] * 6]
    embedded = one.store == "embedded"
    return [
        *(one.store, f"{one.hosts}", "" if embedded else f"{one.databases}", f"{one.memory_mib / 1024:.1f}"),
        *(f"{one.index_mib / 1024:.1f}", f"{one.build_hours:.1f}"),
        f"{one.pull_seconds / 60:.1f}" if embedded else "",
    ]
