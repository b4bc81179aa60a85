"""What `ragrack_status` found on each host, as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

# Days after which status reminds, and the playbook or unit that mends it.
CERTIFICATE_DAYS_LEFT = 14
ROTATE_DAYS = {"credentials": 180, "certificates": 365}
BACKUP_DAYS = {"success": 2, "check": 14}
BACKUP_WORDS = {"success": "its last backup", "check": "the last check of its backups"}

HEAD = ("HOST", "RELEASE", "PREVIOUS", "STATE", "COLLECTION", "SERVES", "CURRENT", "HELD")


def ragrack_status_table(hosts: Mapping[str, Mapping[str, Any]]) -> str:
    """The registered results by host, a row for each collection; below it, problems, who changes it, last deploys."""
    rows = [HEAD, *(row for name, found in hosts.items() for row in _rows(name, found))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    problems = [f"{name}: {problem}" for name, found in hosts.items() for problem in found.get("problems", [])]
    locks = [f"{name}: {found['lock']}" for name, found in hosts.items() if found.get("lock")]
    drained = [
        f"{name}: since {out['since']} by {out['who']} ({out['why']})"
        for name, found in hosts.items()
        if (out := found.get("drained"))
    ]
    left_out = [
        f"{name}: sends nothing to {host} ({why})"
        for name, found in hosts.items()
        for host, why in found.get("left_out", {}).items()
    ]
    certificates = [
        f"{name}: " + ", ".join(f"{realm} {days} days" for realm, days in days_left.items())
        for name, found in hosts.items()
        if (days_left := found.get("certificates"))
    ]
    drift = [f"{name}: {file}" for name, found in hosts.items() for file in found.get("drift", [])]
    sections = [
        table,
        _titled("Problems", problems),
        _titled("Not what was installed", drift),
        _titled("Drained", drained),
        _titled("Left out", left_out),
        _titled("Lock", locks or ["free"]),
        _titled("Certificates", certificates),
        _titled("Due", _due(hosts)),
        _titled("Artifact", _artifacts(hosts)),
        _titled("Last runs", _deploys(hosts)),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _rows(host: str, found: Mapping[str, Any]) -> Sequence[tuple[str, ...]]:
    if "state" not in found:
        said = str(found.get("msg", "it did not answer")).strip().splitlines() or ["it did not answer"]
        return [(host, "-", "-", f"unreachable: {said[-1]}", "-", "-", "-", "-")]
    first = (host, _cell(found["release"]), _cell(found["previous"]), str(found["state"]))
    rest = ("", "", "", "")
    cells = [
        (index["collection"], _cell(index["serves"]), _same(index), _held(index["held"])) for index in found["indexes"]
    ] or [("-", "-", "-", "-")]
    return [(*(rest if number else first), *row) for number, row in enumerate(cells)]


def _same(index: Mapping[str, Any]) -> str:
    return "the same" if index["current"] == index["serves"] and index["current"] else _cell(index["current"])


def _held(held: Mapping[str, Any] | None) -> str:
    return f"since {held['at']} ({held['why']})" if held else "-"


def _cell(value: str | None) -> str:
    return value or "-"


def _titled(title: str, lines: Sequence[str]) -> Sequence[str]:
    return [f"{title}:", *(f"  {line}" for line in lines)] if lines else []


def _due(hosts: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """What somebody should do soon, with the way to do it."""
    return [f"{what} (on {', '.join(names)})" for what, names in _by_line(hosts, _due_on).items()]


def _due_on(found: Mapping[str, Any]) -> Iterator[str]:
    for realm, days in found.get("certificates", {}).items():
        if days < CERTIFICATE_DAYS_LEFT:
            yield f"the certificate of realm {realm} ends in {days} days: playbooks/rotate_certificates.yml"
    for thing, days in found.get("rotated", {}).items():
        if days is not None and days > ROTATE_DAYS[thing]:
            yield f"{thing} are as they were {days} days ago: playbooks/rotate_{thing}.yml"
    for thing, days in found.get("backups", {}).items():
        if days is None or days > BACKUP_DAYS[thing]:
            when = "never went well" if days is None else f"went well {days} days ago"
            yield f"{BACKUP_WORDS[thing]} {when}: journalctl -u 'ragrack-backup*'"


def _artifacts(hosts: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """Each artifact that serves, with its hosts: one line where the fleet is on one."""
    by_digest = _by_line(hosts, lambda found: filter(None, [found.get("artifact")]))
    return [f"{digest} on {', '.join(names)}" for digest, names in by_digest.items()]


def _by_line(
    hosts: Mapping[str, Mapping[str, Any]], lines: Callable[[Mapping[str, Any]], Iterable[str]]
) -> Mapping[str, Sequence[str]]:
    """The hosts that each line is true of."""
    true_of: dict[str, list[str]] = {}
    for name, found in hosts.items():
        for line in lines(found):
            true_of.setdefault(line, []).append(name)
    return true_of


def _deploys(hosts: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """One line for each run, newest last, though every host has one of its own."""
    runs: dict[str, dict[str, Any]] = {}
    for name, found in hosts.items():
        for event in found.get("deploys", []):
            key = f"{event.get('run') or event['time']} {event['what']} {event['result']}"
            runs.setdefault(key, {**event, "hosts": []})["hosts"].append(name)
    return [
        f"{event['time']} {event['what']}: {_cell(event.get('from'))} -> {_cell(event.get('to'))} {event['result']}, "
        f"{event.get('seconds', '-')} s, by {event['who']} on {', '.join(event['hosts'])}"
        for event in sorted(runs.values(), key=lambda event: str(event["time"]))
    ]


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"ragrack_status_table": ragrack_status_table}
