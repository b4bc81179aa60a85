"""New credentials under load, and the way back; artifacts that nobody trusted has signed."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fleet
import httpx
import pytest
from load import Load

HOSTS = fleet.hosts()
QUESTIONS = [entry["question"] for entry in fleet.questions()]
NEW = "sk-a-new-secret-of-the-language-model"


@pytest.fixture(scope="module", autouse=True)
def load() -> Iterator[Load]:
    with Load([host.url for host in HOSTS], key=fleet.api_key(), ca=fleet.CA, questions=QUESTIONS) as running:
        yield running


def live() -> str:
    [release] = {host.release for host in HOSTS}
    return release


def reads(host: fleet.Host, secret: str) -> bool:
    """Whether that is the key that the live release was given."""
    main = host.run(f"systemctl show -P MainPID ragrack@{host.release}")
    given = f"/proc/{main}/root/run/credentials/ragrack@*/credentials_llm_api_key"
    return bool(host.shell.run(f"grep -qF {secret} {given}").rc == 0)


def keys(*more: str) -> list[dict[str, str]]:
    """The tests' own key and others, as the inventory has them."""
    return [
        {"name": f"key-{number}", "sha256": hashlib.sha256(key.encode()).hexdigest()}
        for number, key in enumerate([fleet.api_key(), *more])
    ]


def test_new_credentials_are_a_release_that_differs_in_nothing_else(load: Load) -> None:
    before, settings = live(), HOSTS[0].run("cat /opt/ragrack/current/app.env")
    # That the inventory has other settings by now is another matter.
    asked = {"app_credentials": {"llm_api_key": NEW}, "app_top_k": 3, "app_api_keys": keys("a-new-clients-key")}
    played = fleet.play("rotate_credentials", "--diff", "-vvv", variables=asked)
    assert played.status == 0, played.output
    # The command line that gave it is the test's own.
    said = played.output.replace(json.dumps(asked), "")
    assert NEW not in said.replace(json.dumps(asked).replace('"', '\\"'), ""), "told, as so much was asked to be"
    assert live() != before
    for host in HOSTS:
        assert host.run("cat /opt/ragrack/current/app.env") == settings
        assert reads(host, NEW)
        assert host.history()[-1]["what"] == "rotate credentials"
        with host.client("a-new-clients-key") as client:
            assert client.get("/v1/models").status_code == httpx.codes.OK
    again = fleet.play("rotate_credentials", variables=asked)
    assert (again.status, again.changed) == (0, 0), again.output
    assert load.count.failures == []


def test_the_way_back_brings_the_former_ones(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    former = (fleet.INVENTORY / "pki/llm.key").read_text().strip()
    assert fleet.play("rollback").status == 0
    assert all(reads(host, former) for host in HOSTS)
    # The inventory, which has one key for the API, is the whole truth again.
    assert fleet.play("site", "--tags", "app").status == 0
    with HOSTS[0].client("a-new-clients-key") as client:
        assert client.get("/v1/models").status_code == httpx.codes.UNAUTHORIZED
    with capsys.disabled():
        print(f"\nacross new credentials and back: {load.count}")
    assert load.count.failures == []


def test_credentials_lie_sealed_and_a_host_that_cannot_open_them_gets_them_anew() -> None:
    host, secret = HOSTS[0], (fleet.INVENTORY / "pki/llm.key").read_text().strip()
    sealed = host.run("readlink -f /opt/ragrack/current/credentials/llm_api_key")
    opens = f"systemd-creds decrypt --name=credentials_llm_api_key {sealed} -"
    assert host.run(opens) == secret
    key = "/var/lib/systemd/credential.secret"
    host.run(f"cp -a {sealed} /root/sealed; mv {key} /root/lost")
    assert host.shell.run(opens).rc != 0
    # The release is there already: it is its credentials that are written anew.
    played = fleet.play("deploy")
    assert played.status == 0, played.output
    assert host.run(opens) == secret
    assert host.shell.run(f"cmp /root/lost {key}").rc != 0
    # Those of releases that are not deployed again are opened by the key that was.
    host.run(f"mv /root/lost {key}; mv /root/sealed {sealed}")


def test_what_an_earlier_version_left_in_clear_is_sealed() -> None:
    host = HOSTS[0]
    old = "/etc/ragrack/credstore/0123456789ab"
    host.run(f"mkdir {old} && printf an-old-secret >{old}/llm_api_key")
    assert fleet.play("site", "--tags", "app", "--check").changed > 0
    assert host.run(f"cat {old}/llm_api_key") == "an-old-secret"
    assert fleet.play("site", "--tags", "app").status == 0
    assert host.run(f"systemd-creds decrypt --name=credentials_llm_api_key {old}/llm_api_key -") == "an-old-secret"
    host.run(f"rm -r {old}")


def test_an_artifact_that_a_stranger_signed_is_refused(tmp_path: Path, load: Load) -> None:
    before = [(host.release, host.releases(), host.running()) for host in HOSTS]
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "stranger"], check=True)
    strange = {"app_top_k": 2, "release_signing_key": str(tmp_path / "stranger")}
    played = fleet.play("deploy", variables=strange)
    assert played.status != 0
    assert "is not signed by a key that /etc/ragrack/allowed_signers names" in played.output
    assert [(host.release, host.releases(), host.running()) for host in HOSTS] == before
    assert load.count.failures == []
