"""Two servers of one model: while either is down the other answers, and nobody hears of it."""

from __future__ import annotations

import fleet

HOST, *_ = fleet.hosts()
FIRST, SECOND = "ragrack-model", "ragrack-model-2"
# What is the first one's: its port and its directory.
COPY = f"sed 's/--port 8081/--port 8082/; s#{FIRST}$#{SECOND}#; s#/run/{FIRST}/#/run/{SECOND}/#'"


def test_either_of_two_model_servers_may_be_down() -> None:
    HOST.run(f"{COPY} /etc/systemd/system/{FIRST}.service >/run/systemd/system/{SECOND}.service")
    HOST.run(f"systemctl daemon-reload && systemctl start {SECOND}")
    try:
        played = fleet.play("deploy", variables={"app_llm_also_at": ["http://127.0.0.1:8082/v1"]})
        assert played.status == 0, played.output
        for down in (FIRST, SECOND):
            HOST.run(f"systemctl stop {down}")
            for _ in range(3):
                answer = HOST.ask("What does VACUUM do?", answer="generate")
                assert (answer["answer"], answer["degraded"]) == ("generate", False), down
            HOST.run(f"systemctl start {down}")
    finally:
        HOST.run(f"systemctl start {FIRST}; systemctl stop {SECOND}; rm /run/systemd/system/{SECOND}.service")
        HOST.run("systemctl daemon-reload")
    played = fleet.play("rollback")
    assert played.status == 0, played.output
