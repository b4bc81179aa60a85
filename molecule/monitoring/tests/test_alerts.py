"""Each alert is made to be on, by what it is for, and whoever is to be told is told. The tests build on each other."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fleet
import httpx
import pytest
import yaml
from fleet import Host

# Keeps what it is told: a line each, the path and what was sent.
LISTENER = """
import http.server, json
class Told(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open("/run/told.jsonl", "a") as file:
            file.write(json.dumps([self.path.strip("/"), body]) + chr(10))
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", 9099), Told).serve_forever()
"""
QUESTION = "What does VACUUM do?"


@pytest.fixture(scope="module")
def app() -> Host:
    [host] = fleet.hosts("app")
    return host


@pytest.fixture(scope="module")
def database() -> Host:
    [host] = fleet.hosts("database")
    return host


@pytest.fixture(scope="module")
def watch() -> Iterator[Host]:
    """The host that watches, and on it whoever is told."""
    [host] = fleet.hosts("monitoring")
    host.run(f"rm -f /run/told.jsonl; systemd-run --unit=told python3 -c {shlex.quote(LISTENER)}")
    yield host
    host.run("systemctl stop told")


def ask_prometheus(watch: Host, expression: str) -> list[dict[str, Any]]:
    said = watch.run(
        f"curl -sfG http://127.0.0.1:9090/api/v1/query --data-urlencode {shlex.quote('query=' + expression)}"
    )
    found: list[dict[str, Any]] = json.loads(said)["data"]["result"]
    return found


def told(watch: Host, *, status: str = "firing") -> set[tuple[str, str]]:
    """Who was told of which alerts: (page, HostDown)."""
    lines = watch.run("cat /run/told.jsonl 2>/dev/null || true").splitlines()
    sent = [json.loads(line) for line in lines]
    return {
        (whom, alert["labels"]["alertname"])
        for whom, body in sent
        for alert in body["alerts"]
        if alert["status"] == status
    }


def wait(
    watch: Host, *alerts: tuple[str, str], seconds: float = 90, meanwhile: Callable[[], object] | None = None
) -> None:
    """Until whoever is to be told of them was. Raises AssertionError, with what is on, where that does not happen."""
    deadline = time.monotonic() + seconds
    while missing := set(alerts) - told(watch):
        on = [(each["metric"]["alertname"], each["metric"]["alertstate"]) for each in ask_prometheus(watch, "ALERTS")]
        assert time.monotonic() < deadline, f"nobody was told of {missing}; on: {on}"
        if meanwhile is not None:
            meanwhile()
        time.sleep(0.5)


def on(watch: Host) -> set[str]:
    return {each["metric"]["alertname"] for each in ask_prometheus(watch, 'ALERTS{alertstate="firing"}')}


def generate(app: Host, *, stream: bool = True) -> int:
    """One question to the LLM; the status of the answer."""
    with app.client() as client:
        body = {"query": QUESTION, "answer": "generate", "stream": stream}
        return client.post("/query", json=body).status_code


def retrieve(app: Host, question: str = QUESTION) -> int:
    with app.client() as client:
        return client.post("/query", json={"query": question}).status_code


def test_all_is_asked_and_only_the_watchdog_barks(app: Host, database: Host, watch: Host) -> None:
    wait(watch, ("deadman", "Watchdog"))
    up = {(each["metric"]["job"], each["metric"]["instance"]): each["value"][1] for each in ask_prometheus(watch, "up")}
    named = {
        ("node", "app1"),
        ("node", "db1"),
        ("node", "watch1"),
        ("app", "app1"),
        ("nginx", "app1"),
        ("postgres", "db1"),
    }
    assert up == dict.fromkeys(named | {("probe", f"{app.url}/readyz")}, "1")
    app.run("systemctl start ragrack-golden-metrics ragrack-backup ragrack-backup-check")
    database.run("systemctl start ragrack-archive ragrack-archive-check")
    fleet.until("the golden questions are asked", lambda: ask_prometheus(watch, "ragrack_golden_hit_rate >= 0.8"), 60)
    assert ask_prometheus(watch, "ragrack_certificate_not_after_timestamp_seconds")
    fleet.until("nothing else alarms", lambda: on(watch) == {"Watchdog"}, 60)


def test_nobody_else_is_told_anything(app: Host, database: Host, watch: Host) -> None:
    """What is measured is for hosts with a certificate of Prometheus' CA."""
    for url in (
        f"https://{app.address}:9100/metrics",
        f"https://{app.address}:9146/app",
        f"https://{database.address}:9187/metrics",
    ):
        known = "--cacert ca.pem --cert fullchain.pem --key key.pem"
        assert "# TYPE" in watch.run(f"cd /etc/ragrack/tls/monitoring && curl -sf {known} {url}")
        stranger = watch.shell.run(f"cd /etc/ragrack/tls/monitoring && curl -sf --cacert ca.pem {url}")
        assert (stranger.rc != 0, stranger.stdout) == (True, "")
    for port in (9090, 9093, 9115):
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://{watch.address}:{port}")


def test_units_are_in_sandboxes(app: Host, database: Host, watch: Host) -> None:
    exporters = {app: ["node", "nginx"], database: ["node", "postgres"], watch: ["node", "blackbox"]}
    units = [(host, f"prometheus-{name}-exporter") for host, names in exporters.items() for name in names]
    for host, unit in [
        *units,
        (watch, "prometheus"),
        (watch, "prometheus-alertmanager"),
        (app, "ragrack-golden-metrics"),
    ]:
        host.run(f"systemd-analyze security --no-pager --threshold=40 {unit}.service")


def test_what_happens_on_a_host_is_told(app: Host, watch: Host) -> None:
    for place in ("/srv/filling", "/srv/full"):
        app.run(f"mkdir -p {place} && mount -t tmpfs -o size=10M none {place}")
    app.run("head -c 9700000 /dev/zero >/srv/filling/it && head -c 10400000 /dev/zero >/srv/full/it")
    app.run("systemctl start ragrack-ingest@nothing || true")
    for name, days in (("soon", 10), ("now", 1)):
        made = f"openssl req -x509 -newkey ed25519 -nodes -keyout /dev/null -subj /CN=it -days {days} -out"
        app.run(f"mkdir /etc/ragrack/tls/{name} && {made} /etc/ragrack/tls/{name}/cert.pem 2>/dev/null")
    app.run("systemctl start ragrack-certificate-ends")
    old = time.time() - 20 * 86400
    aged = f"sed -Ei 's/^(ragrack_backup_(success|check)_timestamp_seconds) .*/\\1 {old:.0f}/' backup.prom"
    unasked = f"sed -Ei 's/^(ragrack_golden_asked_timestamp_seconds.*) .*/\\1 {old:.0f}/' golden.prom"
    app.run(f"systemctl stop ragrack-golden-metrics.timer && cd /var/lib/ragrack-metrics && {aged} && {unasked}")
    assert retrieve(app, "Is there a defect?") == httpx.codes.OK
    pages = ("CertificateEnds", "DiskFull")
    tickets = (
        "BackupNotChecked",
        "BackupOld",
        "CertificateEndsSoon",
        "DiskFillsUp",
        "GoldenNotAsked",
        "InstrumentationFails",
        "UnitFailed",
    )
    wait(watch, *(("page", name) for name in pages), *(("ticket", name) for name in tickets))

    app.run("umount /srv/filling /srv/full && rm -r /etc/ragrack/tls/soon /etc/ragrack/tls/now")
    app.run("systemctl reset-failed && systemctl start ragrack-certificate-ends ragrack-golden-metrics.timer")
    app.run("systemctl start ragrack-golden-metrics ragrack-backup ragrack-backup-check")
    fleet.until("what was mended is quiet", lambda: on(watch) <= {"Watchdog", "InstrumentationFails"}, 60)


def test_damaged_backups_are_told(app: Host, watch: Host) -> None:
    pack = app.run("find /srv/backup/data -type f -size +1k | sort | head -n 1")
    app.run(f"cp -a {pack} /root/pack && chmod u+w {pack}")
    app.run(f"printf damage | dd of={pack} bs=1 seek=100 conv=notrunc status=none")
    failed = 'ALERTS{alertname="UnitFailed", name="ragrack-backup-check.service", alertstate="firing"}'
    app.run("! systemctl start ragrack-backup-check")
    fleet.until("it alarms", lambda: ask_prometheus(watch, failed), 60)
    app.run(f"cp -a /root/pack {pack} && systemctl start ragrack-backup-check")
    fleet.until("what was mended is quiet", lambda: not ask_prometheus(watch, failed), 60)


def test_slow_answers_are_told(app: Host, watch: Host) -> None:
    """The LLM stands still for as long as an answer may take: a few of them at first, then most."""

    def late(number: int) -> None:
        with ThreadPoolExecutor(number) as clients:
            app.run("systemctl freeze ragrack-model")
            answers = [clients.submit(generate, app) for _ in range(number)]
            time.sleep(5.5)
            app.run("systemctl thaw ragrack-model")
            assert {answer.result() for answer in answers} == {200}

    # Counters that have not been seen yet grow from their second look.
    for _ in range(6):
        assert generate(app) == httpx.codes.OK
        assert retrieve(app) == httpx.codes.OK
        time.sleep(2)
    late(1)
    late(1)
    wait(watch, ("ticket", "FirstTokenBurnsSlowly"))
    # The golden questions are quick, and many.
    wait(watch, ("ticket", "LatencyBurnsSlowly"), meanwhile=lambda: late(2))
    assert ("page", "LatencyBurnsFast") not in told(watch)
    wait(watch, ("page", "FirstTokenBurnsFast"), ("page", "LatencyBurnsFast"), meanwhile=lambda: late(6), seconds=180)


def test_errors_and_an_open_breaker_are_told(app: Host, watch: Host) -> None:
    """The LLM is gone, and here that is an error: a few of them at first, then most."""
    app.run("systemctl stop ragrack-model")
    wait(
        watch,
        ("ticket", "AvailabilityBurnsSlowly"),
        meanwhile=lambda: [generate(app, stream=False), retrieve(app), retrieve(app)],
        seconds=180,
    )
    wait(watch, ("page", "BreakerOpen"), meanwhile=lambda: [generate(app, stream=False), retrieve(app)])
    wait(
        watch,
        ("page", "AvailabilityBurnsFast"),
        meanwhile=lambda: [generate(app, stream=False) for _ in range(10)],
        seconds=180,
    )
    app.run("systemctl start ragrack-model")


def test_a_snapshot_that_cannot_be_opened_is_told(app: Host, watch: Host) -> None:
    live = app.run("readlink -f /var/lib/ragrack/indexes/postgres/*/current")
    vectors = app.run(f"ls -S {live} | head -1")
    app.run(
        f"cp -a {live}/{vectors} /root/kept && printf damage | dd of={live}/{vectors} bs=1 seek=4096 conv=notrunc 2>&1"
    )
    app.run(f"systemctl restart ragrack@{app.release}")
    wait(watch, ("page", "SnapshotProblem"))
    app.run(f"cp -a /root/kept {live}/{vectors} && systemctl restart ragrack@{app.release}")
    fleet.until("it answers again", lambda: "SnapshotProblem" not in on(watch), 60)


def test_an_old_snapshot_is_told(watch: Host) -> None:
    """What is old is a setting; new rules are read without a restart."""
    begun = watch.run("systemctl show --value -p ActiveEnterTimestamp prometheus")
    played = fleet.play("site", "--tags=monitoring", "--limit=watch1", variables={"monitoring_snapshot_days": 0.0005})
    assert played.status == 0, played.output
    wait(watch, ("ticket", "SnapshotOld"))
    assert watch.run("systemctl show --value -p ActiveEnterTimestamp prometheus") == begun


def test_what_is_down_is_told(app: Host, database: Host, watch: Host) -> None:
    app.run(f"systemctl stop ragrack@{app.release}.service")
    app.run("systemctl start ragrack-golden-metrics")
    database.run("systemctl stop postgresql@17-main")
    wait(watch, ("page", "ServiceDown"), ("page", "EdgeSilent"), ("page", "GoldenHitRateLow"), ("page", "DatabaseDown"))
    app.run("systemctl stop nginx")
    wait(watch, ("page", "NginxDown"))
    # A host that is down explains what else is wrong with it.
    app.run("systemctl stop prometheus-node-exporter")
    wait(watch, ("page", "HostDown"))
    held = json.loads(watch.run("curl -sf http://127.0.0.1:9093/api/v2/alerts"))
    [down] = [each for each in held if each["labels"]["alertname"] == "ServiceDown"]
    assert down["status"]["inhibitedBy"]

    app.run(f"systemctl start prometheus-node-exporter ragrack@{app.release}.service nginx")
    database.run("systemctl start postgresql@17-main")
    down_now = {"HostDown", "NginxDown", "ServiceDown", "EdgeSilent", "DatabaseDown"}
    fleet.until("what is up again is quiet", lambda: not on(watch) & down_now, 90)
    fleet.until("whoever was told of it is told", lambda: ("page", "HostDown") in told(watch, status="resolved"), 360)


def test_each_alert_was_told(watch: Host) -> None:
    rules = yaml.safe_load(watch.run("cat /etc/prometheus/ragrack-rules.yml"))
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    assert {name for _, name in told(watch)} == alerts


def test_a_dashboard_is_there_where_grafana_is(watch: Host) -> None:
    watch.run("mkdir -p /etc/grafana/provisioning/dashboards /etc/grafana/provisioning/datasources")
    played = fleet.play("site", "--tags=monitoring", "--limit=watch1")
    assert played.status == 0, played.output
    board = json.loads(watch.run("cat /etc/grafana/provisioning/dashboards/ragrack.json"))
    for panel in board["panels"]:
        for target in panel["targets"]:
            ask_prometheus(watch, target["expr"])
