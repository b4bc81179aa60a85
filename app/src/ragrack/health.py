"""Is this process ready for traffic? Each check is named, timed and, asked often, answered from the last second.

Liveness asks nothing of this: a service whose index is missing must be mended, not restarted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel

log = logging.getLogger(__name__)

CACHED_SECONDS = 1.0
CHECK_TIMEOUT_SECONDS = 2.0


@dataclass(frozen=True)
class Check:
    """`probe` returns None, or the reason in showable words. Where it is not required, the service answers without."""

    name: str
    probe: Callable[[], Awaitable[str | None]]
    required: bool = True


class CheckResult(BaseModel):
    name: str
    ok: bool
    required: bool
    reason: str | None
    ms: float


class ReadinessReport(BaseModel):
    """`degraded`: ready, but a check that is not required failed."""

    ready: bool
    degraded: bool
    release: str
    reasons: list[str]
    """Of the failed checks, each with its name."""
    checks: list[CheckResult]


class Readiness:
    def __init__(self, release: str, checks: Sequence[Check]) -> None:
        self._release = release
        self._checks = checks
        self._lock = asyncio.Lock()
        self._report: ReadinessReport | None = None
        self._at = 0.0

    async def report(self) -> ReadinessReport:
        """Never raises: a check that does has failed."""
        async with self._lock:
            if self._report is None or time.monotonic() - self._at >= CACHED_SECONDS:
                results = await asyncio.gather(*(_run(check) for check in self._checks))
                report = ReadinessReport(
                    ready=all(result.ok for result in results if result.required),
                    degraded=any(not result.ok for result in results if not result.required),
                    release=self._release,
                    reasons=[f"{result.name}: {result.reason}" for result in results if not result.ok],
                    checks=results,
                )
                self._log_changes(report)
                self._report, self._at = report, time.monotonic()
            return self._report

    def _log_changes(self, report: ReadinessReport) -> None:
        before = {result.name: result.ok for result in self._report.checks} if self._report else {}
        for result in report.checks:
            if before.get(result.name) != result.ok:
                level = logging.INFO if result.ok else logging.WARNING
                log.log(level, "check %s: %s", result.name, "ok" if result.ok else result.reason)


async def _run(check: Check) -> CheckResult:
    started = time.perf_counter()
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
            reason = await check.probe()
    except TimeoutError:
        reason = f"no answer in {CHECK_TIMEOUT_SECONDS:g} s"
    except Exception as error:
        log.exception("check %s failed", check.name)
        reason = f"failed with {type(error).__name__}"
    ms = round((time.perf_counter() - started) * 1000, 3)
    return CheckResult(name=check.name, ok=reason is None, required=check.required, reason=reason, ms=ms)
