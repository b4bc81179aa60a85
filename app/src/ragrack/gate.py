"""Golden questions asked through the real API: what a release must answer before it takes traffic."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import ssl
import time
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx

from ragrack.golden import GoldenSet, evaluate

CONCURRENCY = 4
TIMEOUT_SECONDS = 120.0
PROBE = "What is this about?"


class GateError(Exception):
    """The service could not be asked, or answered with an error; the message says which."""


@dataclass(frozen=True)
class Target:
    """Where the service is: a unix socket, or a URL with the CA that signs its certificate."""

    socket: Path | None
    url: str | None
    cacert: Path | None
    key: str | None

    def client(self) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(uds=str(self.socket)) if self.socket else None
        verify = ssl.create_default_context(cafile=str(self.cacert)) if self.cacert else True
        return httpx.AsyncClient(
            base_url=self.url or "http://ragrack",
            transport=transport,
            verify=verify,
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=TIMEOUT_SECONDS,
        )


@dataclass(frozen=True)
class Failed:
    question: str
    expected: list[str]
    got: list[str]


@dataclass(frozen=True)
class GateReport:
    """`hit_rate` and `mrr` are None where the collection has no golden questions and only the probe was asked."""

    passed: bool
    hit_rate: float | None
    mrr: float | None
    min_hit_rate: float | None
    k: int
    questions: int
    failed: list[Failed]
    phrases: int
    phrases_missing: list[str]
    """Questions whose answer lacks their phrase: told, but no reason to fail, as an extract need not hold it. Of those
    that were asked for an answer, of which there are `phrases`."""
    degraded: bool
    release: str
    snapshot: str | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def summary(self) -> str:
        """The figures in one line, and a line for each question that failed."""
        verdict = "passed" if self.passed else "FAILED"
        if self.hit_rate is None:
            lines = [f"gate {verdict}: no golden questions; the probe was answered in {self.seconds:.1f} s"]
        else:
            lines = [
                f"gate {verdict}: hit rate@{self.k} {self.hit_rate:.3f} (needed {self.min_hit_rate:.3f}), "
                f"MRR {self.mrr:.3f}, {self.questions} questions in {self.seconds:.1f} s"
            ]
        if self.phrases:
            lines.append(f"  answers with their phrase: {self.phrases - len(self.phrases_missing)} of {self.phrases}")
        if self.degraded:
            lines.append("  degraded: the LLM did not answer, the sentences were given instead")
        for failed in self.failed:
            lines.append(f"  failed: {failed.question}")
            lines.append(f"    expected one of {', '.join(failed.expected)}; got {', '.join(failed.got) or 'nothing'}")
        return "\n".join(lines)


async def ask(
    target: Target, collection: str, golden: GoldenSet | None, *, allow_degraded: bool, answers: int
) -> GateReport:
    """Asks every golden question for its nodes, the first `answers` that have a phrase for an answer too, then one as a
    user would, in the mode that is configured. Raises GateError.

    An answer costs some ten times what its nodes cost, and the gate asks on a host that serves.
    """
    started = time.perf_counter()
    items, k = (golden.questions, golden.k) if golden else ([], 0)
    phrases = dict([(item.question, item.phrase) for item in items if item.phrase][:answers])
    found: dict[str, list[str]] = {}
    said: dict[str, str] = {}
    async with target.client() as client:
        slots = asyncio.Semaphore(CONCURRENCY)

        async def one(question: str) -> None:
            body = {"query": question, "collection": collection, "top_k": k}
            async with slots:
                if question in phrases:
                    # Extractive: an LLM would take minutes over them.
                    answer = await _post(client, "/query", body | {"answer": "extractive"})
                    said[question], sources = answer["response"], answer["sources"]
                else:
                    sources = (await _post(client, "/retrieve", body))["nodes"]
            found[question] = [source["document"] for source in sources]

        await asyncio.gather(*(one(item.question) for item in items))
        first = items[0].question if items else PROBE
        probe = await _post(client, "/query", {"query": first, "collection": collection})
        version = await _json(client.get("/version"))

    failed: list[Failed] = []
    hit_rate = mrr = None
    passed = True
    if probe["degraded"] and not allow_degraded:
        passed = False
        failed.append(Failed(first, ["an answer by the LLM"], ["sentences: the LLM did not answer"]))
    if golden is not None:

        async def retrieved(question: str, _: int) -> list[str]:
            return found[question]

        report = await evaluate(golden, retrieved)
        hit_rate, mrr, passed = report.hit_rate, report.mrr, passed and report.passed
        failed += [
            Failed(item.question, item.sources, await retrieved(item.question, golden.k))
            for item in golden.questions
            if item.question in report.failed
        ]
    return GateReport(
        passed=passed,
        hit_rate=hit_rate,
        mrr=mrr,
        min_hit_rate=golden.min_hit_rate if golden else None,
        k=golden.k if golden else 0,
        questions=len(golden.questions) if golden else 0,
        failed=failed,
        phrases=len(phrases),
        phrases_missing=[q for q, phrase in phrases.items() if phrase.lower() not in said[q].lower()],
        degraded=probe["degraded"],
        release=version["release"],
        snapshot=version["snapshots"].get(collection),
        seconds=round(time.perf_counter() - started, 3),
    )


async def _post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    return await _json(client.post(path, json=body))


async def _json(request: Any) -> dict[str, Any]:
    try:
        response = await request
    except httpx.HTTPError as error:
        raise GateError(f"the service cannot be asked: {error or type(error).__name__}") from error
    if response.status_code == HTTPStatus.OK:
        answer: dict[str, Any] = response.json()
        return answer
    try:
        detail = response.json()["detail"]
    except (json.JSONDecodeError, KeyError, TypeError):
        detail = response.text[:200]
    raise GateError(f"{response.request.method} {response.url.path} answered {response.status_code}: {detail}")
