"""What `ragrack_status` found on each host as a page for a browser: the table, and what the last runs did when."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from html import escape
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #1c1c1c }
pre { overflow-x: auto; background: #f5f5f2; padding: 1em; border-radius: 6px; font-size: 13px }
h2 { font-size: 1.1em; margin: 2em 0 .3em } .failed { color: #a32020 }
.row { display: flex; align-items: center; gap: 1em } .row b { width: 9em; font-weight: 500; text-align: right }
.track { position: relative; flex: 1; height: 22px; background: #eeeeea; border-radius: 4px; margin: 3px 0 }
.track i { position: absolute; top: 0; bottom: 0; border-left: 2px solid #2a6f97; padding-left: 4px;
  font: 11px/22px system-ui }
@media (prefers-color-scheme: dark) {
  body { background: #16181a; color: #e6e6e3 } pre, .track { background: #24272a } .failed { color: #ff8a80 }
  .track i { border-color: #7fc4e8 }
}
"""


def ragrack_status_page(hosts: Mapping[str, Mapping[str, Any]], table: str, now: str) -> str:
    """The registered results by host, with their table as text. `now` is shown as the time at which they were asked."""
    runs = "\n".join(part for run in _runs(hosts) for part in _run(run, hosts))
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>ragrack: the fleet</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{STYLE}</style>\n<h1>The fleet</h1>\n<p>As it was at {escape(now)}.</p>\n"
        f"<pre>{escape(table)}</pre>\n{runs}\n</html>\n"
    )


def _runs(hosts: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """Ids of the runs that any host knows, the newest first."""
    begun: dict[str, str] = {}
    for event in _events(hosts.values()):
        begun[event["run"]] = min(begun.get(event["run"], event["time"]), event["time"])
    return sorted(begun, key=lambda run: begun[run], reverse=True)


def _events(found: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (event for host in found for event in host.get("timeline", []))


def _run(run: str, hosts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A heading, and a line for each host on which its events lie where they were in time."""
    events = [event for event in _events(hosts.values()) if event["run"] == run]
    audits = [event for event in events if event["event"] == "audit"]
    first = min(_seconds(event) - float(event.get("seconds") or 0) for event in events)
    length = max(max(_seconds(event) for event in events) - first, 1.0)
    results = {str(audit["result"]) for audit in audits}
    kind = "" if results == {"ok"} else ' class="failed"'
    ended = ", ".join(sorted(results)) or "did not end"
    words = f"{events[0].get('what', '')}: {ended}, {length:.0f} s, by {events[0]['who']}"
    yield f"<h2{kind}>{escape(events[0]['time'])} {escape(words)}</h2>"
    for name, found in hosts.items():
        marks = [_mark(event, (_seconds(event) - first) / length) for event in _events([found]) if event["run"] == run]
        if marks:
            yield f'<div class="row"><b>{escape(name)}</b><div class="track">{"".join(marks)}</div></div>'


def _mark(event: Mapping[str, Any], share: float) -> str:
    # The last word, too, is within the line.
    word, time = escape("end" if event["event"] == "audit" else event["event"]), escape(event["time"])
    return f'<i style="left:{share * 92:.1f}%" title="{time}">{word}</i>'


def _seconds(event: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"ragrack_status_page": ragrack_status_page}
