"""Every metric of the service, and the page of them; docs/metrics.md is made from here.

Under gunicorn each worker writes to files of its own in $PROMETHEUS_MULTIPROC_DIR, and whichever is asked adds them up.
prometheus_client looks at that variable when it is imported: gunicorn_conf sets it before anything imports this.
"""

from __future__ import annotations

import os

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = CONTENT_TYPE_LATEST

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

REQUESTS = Counter(
    "ragrack_requests",
    "Requests answered. status 499: the client left before its answer.",
    ["route", "method", "status"],
)
REQUEST_SECONDS = Histogram(
    "ragrack_request_seconds", "From a request's arrival to the end of its answer.", ["route"], buckets=_SLOW
)
IN_FLIGHT = Gauge("ragrack_requests_in_flight", "Requests being answered or waiting.", multiprocess_mode="livesum")
SHED = Counter(
    "ragrack_shed",
    "Requests and calls turned away. queue: `requests`, or the upstream's name.",
    ["queue", "reason"],
)
QUEUE_SECONDS = Histogram(
    "ragrack_queue_seconds", "Waiting for a slot. queue: as in ragrack_shed_total.", ["queue"], buckets=_FAST
)
ANSWERS = Counter(
    "ragrack_answers",
    "Answers given, by how they were made and whether the LLM was to make them.",
    ["mode", "degraded"],
)
STAGE_SECONDS = Histogram(
    "ragrack_stage_seconds",
    "LlamaIndex's spans that ended well. stage: embed, retrieve, fusion, rerank (all postprocessors), synthesize.",
    ["stage"],
    buckets=_FAST,
)
STAGE_ERRORS = Counter("ragrack_stage_errors", "LlamaIndex's spans that an exception or a cancel ended.", ["stage"])
LLM_SECONDS = Histogram(
    "ragrack_llm_seconds", "From a call of an LLM to the end of its answer.", ["llm"], buckets=_SLOW
)
LLM_FIRST_TOKEN_SECONDS = Histogram(
    "ragrack_llm_first_token_seconds", "From a streamed call of an LLM to its first token.", ["llm"], buckets=_SLOW
)
LLM_ERRORS = Counter(
    "ragrack_llm_errors", "Calls of an LLM that gave no answer, by the exception's type.", ["llm", "error"]
)
LLM_TOKENS = Counter(
    "ragrack_llm_tokens", "Tokens read and written, as far as LLMs report them. kind: prompt, completion.", ["kind"]
)
ATTEMPTS = Counter(
    "ragrack_upstream_attempts",
    "Requests sent to an upstream. outcome: an HTTP status, or the exception's type.",
    ["upstream", "outcome"],
)
RETRIES = Counter("ragrack_upstream_retries", "Of those, how many are repetitions.", ["upstream"])
BREAKER = Gauge(
    "ragrack_breaker_workers",
    "How many workers have the upstream's circuit breaker in this state: closed, open, half_open.",
    ["upstream", "state"],
    multiprocess_mode="livesum",
)
SNAPSHOT_CREATED = Gauge(
    "ragrack_snapshot_created_timestamp_seconds",
    "When the snapshot that answers was made; the oldest among workers. Its age is time() - this.",
    ["collection"],
    multiprocess_mode="livemin",
)
SNAPSHOT_PROBLEM = Gauge(
    "ragrack_snapshot_problem",
    "1 while an older snapshot, or none, answers. kind: `live`, what is live cannot be opened; `pull`, the last pull "
    "failed.",
    ["collection", "kind"],
    multiprocess_mode="livemax",
)
HANDLER_ERRORS = Counter(
    "ragrack_instrumentation_errors",
    "Exceptions in the service's handlers of LlamaIndex's spans and events, which LlamaIndex would swallow.",
    ["handler", "error"],
)

ALL = (
    REQUESTS,
    REQUEST_SECONDS,
    IN_FLIGHT,
    SHED,
    QUEUE_SECONDS,
    ANSWERS,
    STAGE_SECONDS,
    STAGE_ERRORS,
    LLM_SECONDS,
    LLM_FIRST_TOKEN_SECONDS,
    LLM_ERRORS,
    LLM_TOKENS,
    ATTEMPTS,
    RETRIES,
    BREAKER,
    SNAPSHOT_CREATED,
    SNAPSHOT_PROBLEM,
    HANDLER_ERRORS,
)


def render() -> bytes:
    """The page in Prometheus' text format: of all workers, or of this process where it is the only one."""
    if DIRECTORY_VARIABLE not in os.environ:
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return generate_latest(registry)


def table() -> str:
    """The metrics as a Markdown table, for docs/metrics.md."""
    lines = ["| Metric | Kind | Labels | Meaning |", "|---|---|---|---|"]
    for metric in ALL:
        (family,) = metric.describe()
        suffix = "_total" if family.type == "counter" else ""
        labels = ", ".join(f"`{label}`" for label in metric._labelnames) or "none"
        lines.append(f"| `{family.name}{suffix}` | {family.type} | {labels} | {family.documentation} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
