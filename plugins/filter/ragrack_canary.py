"""Whether the hosts that have a new release answer worse than those that have it before them."""

from __future__ import annotations

DOCUMENTATION = r"""
name: ragrack_canary
short_description: Compare a canary with what it replaces
description:
  - Takes what module M(ragrack_canary) counted on each host now and at first, and says where the canary does worse.
  - It is compared with the hosts that have not moved, in the same time. Where all have moved, with the release that ran
    before on the same hosts, since that was started.
options:
  _input:
    description: By host, what the module returned now.
    type: dict
    required: true
  first:
    description: By host, what it returned when the watch began.
    type: dict
    required: true
  canary:
    description: The hosts that have moved.
    type: list
    elements: str
    required: true
  limits:
    description:
      - C(requests), how many the canary must have answered to be judged by them.
      - C(errors), by how much its share of 5xx may be above the other's.
      - C(slower), by how many seconds its p95 may be above the other's.
      - C(hit_rate), by how much its share of golden questions found may be below the other's.
    type: dict
    required: true
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
- ansible.builtin.assert:
    that: now | ragrack_canary(first, ['app1'], limits) == []
  vars:
    limits: {requests: 50, errors: 0.01, slower: 0.5, hit_rate: 0}
"""

RETURN = r"""
_value:
  description: What is worse, in words; empty where nothing is.
  type: list
  elements: str
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

Counted = Mapping[str, Any]
Found = Mapping[str, Mapping[str, Counted]]


def ragrack_canary(found: Found, first: Found, canary: Sequence[str], limits: Mapping[str, float]) -> list[str]:
    """See DOCUMENTATION."""
    limit = {name: float(limits[name]) for name in ("requests", "errors", "slower", "hit_rate")}
    since = {host: _since(first[host]["live"], found[host]["live"]) for host in found}
    new = _total(since[host] for host in canary)
    others: list[Counted] = [since[host] for host in found if host not in canary]
    old = _total(others or [first[host]["before"] for host in canary])
    worse = []
    if new["requests"] >= max(1, limit["requests"]):
        mine, theirs = _share(new), _share(old)
        if mine > theirs + limit["errors"]:
            worse.append(f"{mine:.1%} of {new['requests']} requests failed, before {theirs:.1%} of {old['requests']}")
        mine, theirs = _p95(new), _p95(old)
        if old["requests"] >= max(1, limit["requests"]) and mine > theirs + limit["slower"]:
            worse.append(f"p95 is {mine * 1000:.0f} ms, before {theirs * 1000:.0f} ms")
    for host in canary:
        now = found[host]
        for collection, before in (now["before"].get("golden") or {}).items():
            rate = now["live"]["golden"].get(collection, 0.0)
            if rate < before - limit["hit_rate"]:
                worse.append(f"{host}: golden hit rate of {collection} is {rate:.3f}, before {before:.3f}")
    return worse


def _since(begun: Counted, now: Counted) -> dict[str, Any]:
    """Of a release that was started anew in between, what it answered since."""
    if now["requests"] < begun["requests"]:
        return dict(now)
    buckets = {edge: count - begun["buckets"].get(edge, 0) for edge, count in now["buckets"].items()}
    counts = {name: now[name] - begun[name] for name in ("requests", "errors")}
    return {**counts, "buckets": buckets}


def _total(counted: Iterable[Counted]) -> dict[str, Any]:
    requests = errors = 0
    buckets: Counter[str] = Counter()
    for one in counted:
        if one:
            requests += one["requests"]
            errors += one["errors"]
            buckets.update(one["buckets"])
    return {"requests": requests, "errors": errors, "buckets": dict(buckets)}


def _share(counted: Counted) -> float:
    return float(counted["errors"] / counted["requests"]) if counted["requests"] else 0.0


def _p95(counted: Counted) -> float:
    """Seconds, linear within the bucket, as Prometheus's histogram_quantile is."""
    edges = sorted((float(edge), count) for edge, count in counted["buckets"].items())
    if not edges or not edges[-1][1]:
        return 0.0
    rank = 0.95 * edges[-1][1]
    for (low, below), (high, upto) in pairwise([(0.0, 0), *edges]):
        if upto >= rank:
            return low if math.isinf(high) else low + (high - low) * (rank - below) / (upto - below)
    return edges[-1][0]


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"ragrack_canary": ragrack_canary}
