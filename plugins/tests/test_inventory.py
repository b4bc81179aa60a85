"""What an inventory's files set, held against what the roles know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lookup import ragrack_inventory as checked

ROOT = Path(__file__).parents[2]
KNOWN = checked.Known.of(ROOT / "roles")
GROUPS = {"all": ["a", "b", "edge1"], "app": ["a", "b"], "edge": ["edge1"], "north": ["a"], "big": ["a", "b"]}
PRECEDENCE = {"all": (0, 1), "app": (1, 1), "edge": (1, 1), "north": (1, 1), "big": (1, 1)}


def found(*files: tuple[str, str]) -> list[str]:
    """Problems of files in group_vars and host_vars, by path."""
    given = [
        one
        for path, text in files
        for one in checked.variables(text, path, Path(path).stem, of_host=path.startswith("host_vars"))
    ]
    return checked.problems(given, KNOWN, GROUPS, PRECEDENCE)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("app_topk: 3", "group_vars/all.yml:1: no role knows app_topk; did you mean app_top_k?"),
        ("a: 1\nnginx_upstreams: x", "group_vars/all.yml:2: nginx_upstreams is not needed any more: take it out"),
        ("deploy_batches: [1]", "group_vars/all.yml:1: deploy_batches is called release_batches now"),
        ("index_threads: many", "group_vars/all.yml:1: argument 'index_threads' is of type str and we were unable"),
        ("app_vector_store: faiss", "value of app_vector_store must be one of: embedded, postgres, qdrant, got: faiss"),
        ("index_collections:\n- {nam: x}", "group_vars/all.yml:1: "),
        ("vault_key: CHANGE-ME", "group_vars/all.yml:1: vault_key is still CHANGE-ME: put your own value in"),
        ("app_top_k:", "group_vars/all.yml:1: app_top_k has no value"),
        ("app_top_k: 3\napp_top_k: 4", "group_vars/all.yml:2: app_top_k is set for all at group_vars/all.yml:1, too"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(text: str, problem: str) -> None:
    [line] = found(("group_vars/all.yml", text))
    assert problem in line


@pytest.mark.parametrize(
    "text",
    [
        "app_top_k: 3\nmine: {index_threads: x}\napplication: 1",
        "index_threads: '{{ 4 }}'",
        "tls_key: !vault |\n  $ANSIBLE_VAULT;1.1;AES256\n  6162",
        "index_collections: [{name: x, source: '{{ a }}', golden: y}]",
        "",
    ],
)
def test_what_is_right_or_only_ansible_can_read_is_left_alone(text: str) -> None:
    assert found(("group_vars/all.yml", text)) == []


def test_what_is_retired_is_no_option_any_more() -> None:
    assert KNOWN.options.keys().isdisjoint(checked.RETIRED)
    assert KNOWN.options.keys() >= {now for now in checked.RETIRED.values() if now}


def test_what_nobody_reads_is_named() -> None:
    assert found(("group_vars/ap.yml", "app_top_k: 3"), ("host_vars/c.yml", "x: 1")) == [
        "group_vars/ap.yml: there is no group ap: nothing that is set here is used",
        "host_vars/c.yml: there is no host c: nothing that is set here is used",
    ]


def test_a_release_has_one_value_for_all_app_hosts() -> None:
    [by_host, by_group] = found(("host_vars/a.yml", "app_top_k: 3"), ("group_vars/north.yml", "release_keep: 3"))[::-1]
    assert "app_top_k has one value for all app hosts: set it for the group app or all, not a" in by_host
    assert "release_keep has one value for all app hosts" in by_group
    assert found(("host_vars/a.yml", "app_workers: 3"), ("group_vars/big.yml", "app_top_k: 3")) == []


def test_groups_that_share_a_host_agree() -> None:
    files = [("group_vars/north.yml", "app_workers: 1"), ("group_vars/big.yml", "app_workers: 2")]
    [line] = found(*files)
    assert line.startswith(
        "group_vars/big.yml:1: app_workers is another for big than for north (group_vars/north.yml:1)"
    )
    assert "and a is in both" in line
    agreed = [(path, "app_workers: 2") for path, _ in files]
    assert found(*agreed) == []
    assert found(("group_vars/all.yml", "app_workers: 1"), files[0]) == [], "a group is more than all"


def test_an_inventory_of_either_kind_is_read() -> None:
    yml = "all:\n  vars: {app_topk: 1}\n  children:\n    app:\n      hosts:\n        a: {app_worker: 2}\n"
    ini = "[app]\na app_worker=2 # why\n[app:children]\nother\n[all:vars]\napp_topk = 1\n"
    for text, lines in ((yml, (2, 6)), (ini, (6, 2))):
        given = list(checked.inventory(text, "hosts"))
        assert {(one.name, one.scope, one.of_host, one.value) for one in given} == {
            ("app_topk", "all", False, 1),
            ("app_worker", "a", True, 2),
        }
        assert {one.name: one.line for one in given} == dict(zip(("app_topk", "app_worker"), lines, strict=True))


@pytest.mark.parametrize("name", ["demo", "staging", "production"])
def test_the_examples_lack_nothing_but_ones_own_values(name: str) -> None:
    inventory = ROOT / "inventories" / name
    given = [
        one
        for directory, of_host in (("group_vars", False), ("host_vars", True))
        for scope, file in checked.files(inventory / directory)
        for one in checked.variables(file.read_text(), file.name, scope, of_host=of_host)
    ]
    hosts = yaml.safe_load((inventory / "hosts.yml").read_text())["all"]
    groups = {"all": list(hosts["hosts"])} | {group: list(one["hosts"]) for group, one in hosts["children"].items()}
    lines = checked.problems(given, KNOWN, groups, dict.fromkeys(groups, (1, 1)))
    assert [line for line in lines if "is still CHANGE-ME" not in line] == []
    assert bool(lines) is (name != "demo")


def test_a_playbook_asks_it_of_a_whole_inventory(tmp_path: Path) -> None:
    """Encrypted files too, by the password that the run has."""
    (tmp_path / "group_vars/all").mkdir(parents=True)
    (tmp_path / "hosts.yml").write_text("all: {children: {app: {hosts: {a: }}}}")
    secrets = tmp_path / "group_vars/all/vault.yml"
    secrets.write_text("app_credential: {llm_api_key: x}\n")
    (tmp_path / "group_vars/app.yml").write_text("app_top_k: 0\n")
    (tmp_path / "password").write_text("x")
    run = [str(Path(sys.executable).parent / "ansible-vault"), "encrypt", f"--vault-password-file={tmp_path}/password"]
    subprocess.run([*run, str(secrets)], check=True, capture_output=True)
    play = [
        str(Path(sys.executable).parent / "ansible-playbook"),
        "-i",
        str(tmp_path),
        str(ROOT / "playbooks/site.yml"),
    ]
    asked = [*play, f"--vault-password-file={tmp_path}/password", "-e", "app_topk=3"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode != 0
    for line in (
        f"{secrets}:1: no role knows app_credential; did you mean app_credentials?",
        "-e app_topk: no role knows app_topk; did you mean app_top_k?",
        "RAGRACK_TOP_K",
        f"app_top_k: {tmp_path}/group_vars/app.yml:1",
        "nothing was changed on any host",
    ):
        assert line in done.stdout, done.stdout
    assert f"{secrets}:1: no role knows app_credential; did you mean app_credentials?" in done.stdout.splitlines()
