"""How a release has answered, by its own metrics."""

from __future__ import annotations

import http.client
import re
from collections import Counter
from pathlib import Path
from typing import Any

from .release_service import UnixConnection
from .release_state import StateError

ROUTES = ("/query", "/retrieve", "/chat", "/v1/chat/completions", "/v1/embeddings")
"""What clients wait for; the rest are questions about the service itself."""
SAMPLE = re.compile(r"(ragrack_requests_total|ragrack_request_seconds_bucket)\{(.*)\} ([0-9.e+]+)")
LABEL = re.compile(r'(\w+)="([^"]*)"')


def metrics(socket_path: Path) -> str:
    """The page of all workers of a release. Raises StateError where there is none."""
    connection = UnixConnection(socket_path, timeout=10)
    try:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        body = response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise StateError(f"nothing answers on {socket_path}: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise StateError(f"{socket_path} answers GET /metrics with {response.status}")
    return body


def traffic(page: str) -> dict[str, Any]:
    """`requests` and, of those, `errors` (5xx) since the release was started; `buckets`: by seconds, cumulative."""
    requests = errors = 0
    buckets: Counter[str] = Counter()
    for name, labels, value in SAMPLE.findall(page):
        label, count = dict(LABEL.findall(labels)), int(float(value))
        if label["route"] not in ROUTES:
            continue
        if name == "ragrack_request_seconds_bucket":
            buckets[label["le"]] += count
        else:
            requests += count
            errors += count if label["status"].startswith("5") else 0
    return {"requests": requests, "errors": errors, "buckets": dict(buckets)}
