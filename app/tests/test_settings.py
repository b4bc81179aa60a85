"""Everything that is wrong with the settings is told in one go, and before anything uses them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from ragrack import cli
from ragrack.fingerprint import Fingerprint
from ragrack.settings import Problem, Settings, SettingsError, examine, load, read_env_file, table
from ragrack.snapshot import Manifest, SnapshotDir

GOOD = {"RAGRACK_COLLECTIONS": "handbook, wiki"}


def problems(**values: str) -> dict[str, Problem]:
    """Of GOOD with these fields' variables changed, by variable."""
    environ = GOOD | {f"RAGRACK_{name.upper()}": value for name, value in values.items()}
    return {problem.variable: problem for problem in examine(environ, on_host=False)[1]}


def test_the_defaults_hold() -> None:
    settings = load(GOOD, on_host=False)
    assert settings.collections == ("handbook", "wiki")
    assert settings.default_collection == "handbook"
    assert settings.answer == "extractive"


def test_empty_variables_are_unset_ones() -> None:
    assert load(GOOD | {"RAGRACK_LLM_BASE_URL": "", "RAGRACK_TOP_K": ""}, on_host=False).top_k == 5


def test_the_environment_of_this_process_plays_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAGRACK_TOP_K", "7")
    assert load(GOOD, on_host=False).top_k == 5
    assert Settings(collections=("a",)).top_k == 7


def test_all_problems_come_at_once_each_with_variable_and_mend() -> None:
    environ = {
        "RAGRACK_TOP_K": "many",
        "RAGRACK_CHUNK_SIZE": "300",
        "RAGRACK_CHUNKOVERLAP": "3",
        "RAGRACK_ANSWER": "generate",
        "RAGRACK_LLM_API_KEY": "swordfish",
        "RAGRACK_INDEX_DIR": "indexes",
    }
    with pytest.raises(SettingsError) as caught:
        load(environ, on_host=False)
    found = {problem.variable: problem for problem in caught.value.problems}
    assert set(found) == {
        "RAGRACK_COLLECTIONS",
        "RAGRACK_TOP_K",
        "RAGRACK_CHUNK_SIZE",
        "RAGRACK_CHUNKOVERLAP",
        "RAGRACK_LLM_BASE_URL",
        "RAGRACK_LLM_MODEL",
        "RAGRACK_LLM_API_KEY",
        "RAGRACK_INDEX_DIR",
    }
    assert "many" in found["RAGRACK_TOP_K"].problem
    assert "RAGRACK_CHUNK_OVERLAP" in found["RAGRACK_CHUNKOVERLAP"].mend
    assert "credential" in found["RAGRACK_LLM_API_KEY"].mend
    assert "swordfish" not in str(caught.value)
    assert all(problem.mend for problem in found.values())
    assert "8 problems" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("collections", "a,B", "pattern"),
        ("collections", "a,a", "twice"),
        ("collections", "../x", "pattern"),
        ("top_k", "0", "greater"),
        ("similarity_cutoff", "1.1", "less"),
        ("similarity_cutoff", "nan", "less"),
        ("answer", "guess", "extractive"),
        ("chunk_size", "255", "254"),
        ("chunk_overlap", "254", "not less"),
        ("llm_base_url", "llm.example.org", "URL"),
        ("llm_base_url", "http://u:p@llm.example.org", "secrets"),
        ("llm_timeout", "0", "greater"),
        ("llm_timeout", "inf", "less"),
        ("release", "../../etc", "pattern"),
        ("workers", "1.5", "integer"),
    ],
)
def test_each_value_is_checked(name: str, value: str, says: str) -> None:
    found = problems(**{name: value})
    assert list(found) == [f"RAGRACK_{name.upper()}"]
    assert says in str(found[f"RAGRACK_{name.upper()}"])


def test_the_context_window_must_hold_what_is_retrieved_where_an_llm_reads_it() -> None:
    assert problems(top_k="10") == {}
    found = problems(top_k="10", llm_base_url="http://127.0.0.1:1/v1")
    assert "2668" in found["RAGRACK_CONTEXT_WINDOW"].problem


def test_a_password_in_a_url_that_is_wrong_otherwise_is_not_shown() -> None:
    assert "swordfish" not in str(problems(llm_base_url="ftp://u:swordfish@h/")["RAGRACK_LLM_BASE_URL"])


def test_the_llms_key_comes_from_its_credential_and_is_masked(tmp_path: Path) -> None:
    (tmp_path / "credentials_llm_api_key").write_text("swordfish\n")
    settings, _ = examine(GOOD | {"CREDENTIALS_DIRECTORY": str(tmp_path)}, on_host=True)
    assert settings is not None
    assert settings.llm_api_key is not None
    assert settings.llm_api_key.get_secret_value() == "swordfish"
    assert "swordfish" not in repr(settings)


def test_on_a_host_the_model_must_be_there(tmp_path: Path) -> None:
    environ = GOOD | {"RAGRACK_EMBED_MODEL_DIR": str(tmp_path)}
    assert examine(environ, on_host=False)[1] == []
    [problem] = examine(environ, on_host=True)[1]
    assert problem.variable == "RAGRACK_EMBED_MODEL_DIR"
    assert "tokenizer.json" in problem.problem


def test_an_env_file_is_read_as_systemd_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "app.env"
    path.write_text('# comment\n; too\n\nA=plain\nB="with blanks"\nC="a \\"quoted\\" \\\\ one"\nD=\n')
    assert read_env_file(path) == ({"A": "plain", "B": "with blanks", "C": 'a "quoted" \\ one', "D": ""}, [])


@pytest.mark.parametrize(
    "line", ["A", "A B=1", 'A="open', "A=$HOME", "A=with blanks", "A=`id`", "export A=1", "A=1 # no"]
)
def test_a_line_that_two_readers_could_take_differently_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "app.env"
    path.write_text(f"# first\n{line}\n")
    [problem] = read_env_file(path)[1]
    assert problem.variable == f"{path}:2"


def test_config_check_reads_files_alone_and_tells_people_and_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAGRACK_NONSENSE", "1")
    path = tmp_path / "app.env"
    path.write_text("RAGRACK_COLLECTIONS=handbook\n")
    assert cli.main(["config", "check", "--env-file", str(path)]) == 0
    assert "hold" in capsys.readouterr().out

    path.write_text("RAGRACK_COLLECTIONS=handbook\nRAGRACK_TOP_K=many\nRAGRACK_TOPK=3\n")
    assert cli.main(["config", "check", "--env-file", str(path)]) == 1
    assert "RAGRACK_TOPK: is not a setting" in capsys.readouterr().out
    assert cli.main(["config", "check", "--json", "--env-file", str(path)]) == 1
    reported = json.loads(capsys.readouterr().out)
    assert {problem["variable"] for problem in reported} == {"RAGRACK_TOP_K", "RAGRACK_TOPK"}
    assert {frozenset(problem) for problem in reported} == {frozenset({"variable", "problem", "mend"})}

    assert cli.main(["config", "check", "--env-file", str(tmp_path / "nowhere")]) == 1
    assert "cannot be read" in capsys.readouterr().out


def test_keys_new_shows_the_key_once_and_keeps_its_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    new = ["keys", "new", "--name", "reports", "--expires", "2999-12-31", "--file", str(path)]
    assert cli.main([*new, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    stored = json.loads(path.read_text())["keys"][0]
    assert stored["sha256"] == made["sha256"]
    assert made["key"] not in path.read_text()
    assert cli.main(new) == 1
    assert "reports is taken" in capsys.readouterr().err
    assert cli.main(["keys", "new", "--name", "two words", "--expires", "soon"]) == 1
    refused = capsys.readouterr().err
    assert "--name" in refused
    assert "--expires" in refused


def test_keys_are_listed_without_their_hashes_and_revoked_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "keys.json")
    new = ["keys", "new", "--file", path, "--name"]
    assert cli.main([*new, "acme-app", "--tenant", "acme", "--role", "reader", "--role", "ingester"]) == 0
    assert cli.main([*new, "old", "--expires", "2020-01-01"]) == 0
    assert cli.main([*new, "x", "--role", "root"]) == 1
    assert "--role" in capsys.readouterr().err
    assert cli.main(["keys", "revoke", "acme-app", "--file", path]) == 0
    assert "inventory" in capsys.readouterr().err
    assert cli.main(["keys", "list", "--file", path]) == 0
    shown = capsys.readouterr().out
    assert "acme-app of acme: reader, ingester; revoked since" in shown
    assert "old: reader; expired since 2020-01-01" in shown
    assert cli.main(["keys", "list", "--file", path, "--json"]) == 0
    listed = {key["name"]: key for key in json.loads(capsys.readouterr().out)}
    assert listed["acme-app"]["state"] == "revoked"
    assert "sha256" not in listed["old"]
    assert cli.main(["keys", "revoke", "nobody", "--file", path]) == 1
    assert "acme-app, old" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "variables"),
    [
        ({"jwt_issuer": "https://login.example.org"}, ["JWT_AUDIENCE", "JWT_JWKS_URL"]),
        ({"jwt_jwks_url": "https://login.example.org/jwks"}, ["JWT_ISSUER", "JWT_AUDIENCE"]),
        ({"jwt_algorithms": "RS256,HS256"}, ["JWT_ALGORITHMS"]),
        ({"jwt_algorithms": "none"}, ["JWT_ALGORITHMS"]),
        ({"jwt_roles": "staff=root"}, ["JWT_ROLES"]),
        ({"jwt_roles": "staff"}, ["JWT_ROLES"]),
        ({"tenants": "by_name"}, ["TENANTS"]),
    ],
)
def test_what_tokens_and_tenants_need(values: dict[str, str], variables: list[str]) -> None:
    assert sorted(problems(**values)) == sorted(f"RAGRACK_{name}" for name in variables)


def test_keys_that_anyone_on_the_way_could_change_are_refused() -> None:
    whole = {"jwt_issuer": "https://l.example.org", "jwt_audience": "ragrack"}
    assert problems(**whole, jwt_jwks_url="https://l.example.org/jwks") == {}
    assert problems(**whole, jwt_jwks_url="http://127.0.0.1:8080/jwks") == {}
    found = problems(**whole, jwt_jwks_url="http://l.example.org/jwks")
    assert "not https" in found["RAGRACK_JWT_JWKS_URL"].problem


def test_roles_of_the_sites_own_are_mapped() -> None:
    settings = load(GOOD | {"RAGRACK_JWT_ROLES": "staff=reader, platform=operator"}, on_host=False)
    assert settings.jwt_roles == (("staff", "reader"), ("platform", "operator"))


@pytest.mark.parametrize(
    ("values", "variables"),
    [
        ({"embed_provider": "openai_like"}, ["EMBED_BASE_URL", "EMBED_MODEL", "EMBED_DIMENSIONS"]),
        ({"embed_base_url": "http://u:p@e.example.org"}, ["EMBED_BASE_URL"]),
        ({"llm_fallback_base_url": "http://f/v1"}, ["LLM_FALLBACK_MODEL", "LLM_BASE_URL", "LLM_MODEL"]),
        ({"llm_fallback_model": "m"}, ["LLM_FALLBACK_BASE_URL"]),
        ({"llm_provider": "bedrock"}, ["LLM_PROVIDER"]),
        ({"node_parser": "html"}, ["NODE_PARSER"]),
        ({"embed_api_key": "swordfish"}, ["EMBED_API_KEY"]),
        ({"tokenizer": "tokenizer.json"}, ["TOKENIZER"]),
        ({"ingests": "maybe"}, ["INGESTS"]),
    ],
)
def test_what_the_parts_of_llamaindex_need(values: dict[str, str], variables: list[str]) -> None:
    found = problems(**values)
    assert sorted(found) == sorted(f"RAGRACK_{name}" for name in variables)
    assert "swordfish" not in str(found)


def test_the_chunk_size_must_fit_the_model_behind_the_api() -> None:
    remote = {"embed_provider": "openai_like", "embed_base_url": "http://e/v1", "embed_model": "m"}
    assert problems(**remote, embed_dimensions="8", chunk_size="510") == {}
    found = problems(**remote, embed_dimensions="8", chunk_size="511")
    assert "reads 510 tokens" in found["RAGRACK_CHUNK_SIZE"].problem


@pytest.fixture
def host(tmp_path: Path, model_dir: Path) -> dict[str, str]:
    """The variables of a host on which all is well."""
    (tmp_path / "indexes").mkdir()
    (tmp_path / "documents").mkdir()
    names = {"EMBED_MODEL_DIR": model_dir, "INDEX_DIR": tmp_path / "indexes", "DOCUMENTS_DIR": tmp_path / "documents"}
    return GOOD | {f"RAGRACK_{name}": str(path) for name, path in names.items()}


def test_a_tokenizer_that_cannot_be_the_llms_is_told(host: dict[str, str], model_dir: Path, tmp_path: Path) -> None:
    of = {"RAGRACK_TOKENIZER": str(model_dir / "tokenizer.json")}
    assert examine(host | of | {"RAGRACK_LLM_MODEL": "nobody-knows"}, on_host=True)[1] == []
    [problem] = examine(host | of | {"RAGRACK_LLM_MODEL": "Llama-3.1-8B-Instruct"}, on_host=True)[1]
    assert problem.variable == "RAGRACK_TOKENIZER"
    assert "30522 entries" in problem.problem
    for content in ("", "[]", '{"model": {}}'):
        (tmp_path / "t.json").write_text(content)
        [problem] = examine(host | {"RAGRACK_TOKENIZER": str(tmp_path / "t.json")}, on_host=True)[1]
        assert "tokenizer.json" in problem.problem


def test_the_dimensions_given_must_be_the_models(host: dict[str, str]) -> None:
    assert examine(host | {"RAGRACK_EMBED_DIMENSIONS": "384"}, on_host=True)[1] == []
    [problem] = examine(host | {"RAGRACK_EMBED_DIMENSIONS": "768"}, on_host=True)[1]
    assert (problem.variable, "384" in problem.problem) == ("RAGRACK_EMBED_DIMENSIONS", True)


def test_a_snapshot_of_other_dimensions_is_told(host: dict[str, str]) -> None:
    settings = load(host)
    fingerprint = Fingerprint.of(settings)
    directory = SnapshotDir(settings.index_dir, "wiki", fingerprint.digest)
    manifest = Manifest(
        id="20260101T000000Z-00000000",
        collection="wiki",
        fingerprint=fingerprint.digest,
        built_with={},
        content="0" * 64,
        created="20260101T000000Z",
        parent=None,
        documents=1,
        nodes=1,
        dimensions=768,
        engine="flat",
        files={},
        golden=None,
        skipped=[],
    )
    with directory.new() as new:
        directory.flip(directory.publish(new, manifest).id, "test")
    [problem] = examine(host, on_host=True)[1]
    assert problem.variable == "RAGRACK_INDEX_DIR"
    assert "768 dimensions" in problem.problem
    assert examine(host, on_host=False)[1] == []


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
def test_paths_must_be_readable_and_documents_writable_where_this_host_ingests(host: dict[str, str]) -> None:
    """Judged by a user who may not do everything."""
    code = """
import json, os, sys
from ragrack.settings import examine
os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(json.dumps([problem.variable for problem in examine(json.loads(sys.argv[1]), on_host=True)[1]]))
"""
    with tempfile.TemporaryDirectory() as name:
        # Pytest's own directories are closed to others.
        root = Path(name)
        root.chmod(0o755)
        paths = {"RAGRACK_INDEX_DIR": root / "indexes", "RAGRACK_DOCUMENTS_DIR": root / "documents"}
        for path in paths.values():
            path.mkdir()

        def found(mode: int, **more: str) -> list[str]:
            for path in paths.values():
                path.chmod(mode)
            environ = host | {name: str(path) for name, path in paths.items()} | more
            command = [sys.executable, "-c", code, json.dumps(environ)]
            variables: list[str] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            return [variable for variable in variables if variable in paths]

        assert found(0o755) == []
        assert found(0o755, RAGRACK_INGESTS="true") == ["RAGRACK_DOCUMENTS_DIR"]
        assert found(0o777, RAGRACK_INGESTS="true") == []
        assert found(0o700) == ["RAGRACK_INDEX_DIR"]


def test_the_documented_table_is_that_of_the_model() -> None:
    documented = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    assert table() in documented, "write docs/settings.md anew: its table is what `ragrack settings-table` prints"


def test_checking_settings_does_not_import_llamaindex() -> None:
    code = "import sys, ragrack.cli; sys.exit('llama_index' in ' '.join(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


POSTGRES = {"vector_store": "postgres", "postgres_hosts": "db1,db2:6432", "postgres_sslrootcert": "/etc/ragrack/ca.pem"}


def test_postgres_is_found_by_its_hosts() -> None:
    assert problems(**POSTGRES) == {}
    assert problems(vector_store="postgres", postgres_hosts="/run/postgresql") == {}
    environ = GOOD | {f"RAGRACK_{name.upper()}": value for name, value in POSTGRES.items()}
    assert load(environ, on_host=False).postgres_hosts == ("db1", "db2:6432")


def test_where_the_nodes_are_makes_no_other_index(model_dir: Path) -> None:
    environ = GOOD | {f"RAGRACK_{name.upper()}": value for name, value in POSTGRES.items()}
    there, here = load(environ, on_host=False), load(GOOD, on_host=False)
    assert Fingerprint.of(there, model_dir) == Fingerprint.of(here, model_dir)


@pytest.mark.parametrize(
    ("more", "variable", "problem"),
    [
        ({"postgres_hosts": ""}, "RAGRACK_POSTGRES_HOSTS", "is not set, but RAGRACK_VECTOR_STORE=postgres needs it"),
        ({"postgres_hosts": "db1,/run/postgresql"}, "RAGRACK_POSTGRES_HOSTS", "the directory of a socket"),
        ({"postgres_hosts": "db1 dbname=other"}, "RAGRACK_POSTGRES_HOSTS", "pattern"),
        ({"postgres_hosts": "user:secret@db1"}, "RAGRACK_POSTGRES_HOSTS", "pattern"),
        ({"postgres_sslrootcert": ""}, "RAGRACK_POSTGRES_SSLROOTCERT", "could stand in for them"),
        ({"postgres_sslrootcert": "ca.pem"}, "RAGRACK_POSTGRES_SSLROOTCERT", "not an absolute path"),
        (
            {
                "embed_provider": "openai_like",
                "embed_base_url": "http://127.0.0.1:1/v1",
                "embed_model": "m",
                "embed_dimensions": "4096",
            },
            "RAGRACK_EMBED_DIMENSIONS",
            "pgvector's index takes vectors of 4000 dimensions",
        ),
    ],
)
def test_what_postgres_needs_is_told(more: dict[str, str], variable: str, problem: str) -> None:
    found = problems(**POSTGRES | more)
    assert list(found) == [variable]
    assert problem in found[variable].problem


def test_postgres_over_the_network_needs_a_password_and_a_readable_ca(host: dict[str, str], tmp_path: Path) -> None:
    environ = host | {f"RAGRACK_{name.upper()}": value for name, value in POSTGRES.items()}
    found = {problem.variable: problem for problem in examine(environ, on_host=True)[1]}
    assert set(found) == {"RAGRACK_POSTGRES_PASSWORD", "RAGRACK_POSTGRES_SSLROOTCERT"}
    assert "credentials_postgres_password" in found["RAGRACK_POSTGRES_PASSWORD"].mend
    (tmp_path / "credentials_postgres_password").write_text("secret\n")
    (tmp_path / "ca.pem").write_text("")
    mended = {"CREDENTIALS_DIRECTORY": str(tmp_path), "RAGRACK_POSTGRES_SSLROOTCERT": str(tmp_path / "ca.pem")}
    settings, left = examine(environ | mended, on_host=True)
    assert left == []
    assert settings is not None
    assert "secret" not in repr(settings)


QDRANT = {"vector_store": "qdrant", "qdrant_url": "https://qdrant.example.org:6333"}


@pytest.mark.parametrize("url", [QDRANT["qdrant_url"], "http://127.0.0.1:6333", "https://[2001:db8::1]:6333"])
def test_qdrant_is_found_by_its_url(url: str) -> None:
    assert problems(**QDRANT | {"qdrant_url": url}) == {}


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "is not set, but RAGRACK_VECTOR_STORE=qdrant needs it"),
        ("http://qdrant.example.org:6333", "is not https"),
        ("https://user:secret@qdrant.example.org:6333", "holds a user name or password"),
        ("qdrant.example.org", "valid URL"),
    ],
)
def test_what_qdrant_needs_is_told(url: str, problem: str) -> None:
    found = problems(**QDRANT | {"qdrant_url": url})
    assert set(found) == {"RAGRACK_QDRANT_URL"}
    assert problem in found["RAGRACK_QDRANT_URL"].problem
    assert "secret@" not in str(found["RAGRACK_QDRANT_URL"])


def test_qdrant_without_its_client_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environ = GOOD | {f"RAGRACK_{name.upper()}": value for name, value in QDRANT.items()}
    environ["RAGRACK_EMBED_MODEL_DIR"] = str(tmp_path)
    assert "RAGRACK_QDRANT_URL" not in {problem.variable for problem in examine(environ, on_host=True)[1]}
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    found = {problem.variable: problem for problem in examine(environ, on_host=True)[1]}
    assert "ragrack[qdrant]" in found["RAGRACK_QDRANT_URL"].mend
