"""Every setting of the service: its environment variable, what it may be, and what is wrong with the one you gave.

The model is the only list of settings: `ragrack config check`, the table in docs/settings.md and the app's own
start all read it. Nothing here imports LlamaIndex, so a check costs no more than pydantic's import.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AnyHttpUrl, BeforeValidator, Field, SecretStr, StringConstraints, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from ragrack import hooks
from ragrack.auth import Role
from ragrack.fingerprint import Fingerprint, ModelError
from ragrack.snapshot import SnapshotDir, SnapshotError

PREFIX = "RAGRACK_"
# By systemd's LoadCredentialEncrypted; a secret never has a variable, as /proc/<pid>/environ shows those.
SECRETS = {
    "embed_api_key": "credentials_embed_api_key",
    "llm_api_key": "credentials_llm_api_key",
    "llm_fallback_api_key": "credentials_llm_fallback_api_key",
    "postgres_password": "credentials_postgres_password",
    "qdrant_api_key": "credentials_qdrant_api_key",
}
PGVECTOR_DIMENSIONS = 4000
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
SPECIAL_TOKENS = 2
MINILM_MAX_TOKENS = 256
# Entries of the tokenizers of well-known LLMs, special ones included or not, by what their names hold.
VOCABULARIES = {
    r"llama-?3": (128_000, 128_512),
    r"llama-?2": (32_000, 32_064),
    r"qwen-?(2|3)": (151_643, 152_064),
    r"smollm2": (49_152, 49_408),
    r"gemma-?2": (256_000, 256_128),
}


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _pairs(value: Any) -> Any:
    return [part.partition("=")[::2] for part in _split(value)] if isinstance(value, str) else value


CollectionName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=63)]

PostgresHost = Annotated[
    str,
    StringConstraints(
        pattern=r"^(/[^,\s]+|([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?)$",
        max_length=255,
    ),
]


class Settings(BaseSettings):
    """The service's settings, read from RAGRACK_* variables. Immutable: a change of settings is a new release."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    collections: Annotated[tuple[CollectionName, ...], NoDecode, BeforeValidator(_split)] = Field(
        min_length=1,
        description="Names of the collections served, separated by commas; a query that names none goes to the first.",
        examples=["postgres"],
    )
    index_dir: Path = Field(
        Path("/var/lib/ragrack/indexes"),
        description="Where index snapshots live.",
        examples=["/var/lib/ragrack/indexes"],
    )
    documents_dir: Path = Field(
        Path("/var/lib/ragrack/documents"),
        description="Where documents to ingest live, a directory per collection.",
        examples=["/var/lib/ragrack/documents"],
    )
    ingests: bool = Field(
        False,
        description="Whether this host ingests, so that documents may be written here. It is the host's own.",
        examples=["true"],
    )
    index_source: str | None = Field(
        None,
        pattern=r"^[^-\s'\"][^\s'\"]*[:/]$",
        description="Where this host pulls snapshots from, as rsync names it; none: it ingests. It is the host's own.",
        examples=["ragrack-pull@198.18.0.3:"],
    )
    index_ssh_config: Path = Field(
        Path("/etc/ragrack/pull/ssh_config"),
        description="Configuration of the ssh that it pulls by.",
        examples=["/etc/ragrack/pull/ssh_config"],
    )
    golden_dir: Path = Field(
        Path("/etc/ragrack/golden"),
        description="Where golden questions live, as <collection>.yml.",
        examples=["/etc/ragrack/golden"],
    )
    golden_min_hit_rate: float = Field(
        0.8,
        ge=0,
        le=1,
        description="Share of golden questions whose source must be retrieved, where the file gives none.",
        examples=["0.8"],
    )

    embed_provider: Literal["minilm", "openai_like"] = Field(
        "minilm",
        description="Which embedding model: the release's own, or one behind an OpenAI-compatible API.",
        examples=["minilm"],
    )
    embed_model_dir: Path = Field(
        Path("/opt/ragrack/current/models/all-minilm-l6-v2"),
        description="Holds model.onnx, words.bin, tokenizer.json and model.json. The unit sets it to its release's.",
        examples=["/opt/ragrack/current/models/all-minilm-l6-v2"],
    )
    embed_threads: int = Field(
        1, ge=1, le=64, description="Texts that a worker embeds at a time, each on one core.", examples=["1"]
    )
    embed_base_url: AnyHttpUrl | None = Field(
        None, description="Base URL of the embedding model's API.", examples=["http://127.0.0.1:8082/v1"]
    )
    embed_model: str | None = Field(
        None, min_length=1, description="Name of the embedding model at that API.", examples=["bge-m3"]
    )
    embed_dimensions: int | None = Field(
        None, ge=1, le=65536, description="Numbers in a vector of that model.", examples=["1024"]
    )
    embed_max_tokens: int = Field(
        512, ge=34, le=100_000, description="Tokens that that model reads of a text.", examples=["8192"]
    )
    embed_api_key: SecretStr | None = Field(
        None, description="Key of that API: the systemd credential `credentials_embed_api_key`, never a variable."
    )
    embed_timeout: float = Field(
        10,
        gt=0,
        le=600,
        description="Seconds that the embedding model's API has. It is bounded and asked again as the LLM is.",
        examples=["10"],
    )
    node_parser: Literal["sentence", "token"] = Field(
        "sentence",
        description="How documents are split into nodes: at the ends of sentences, or after so many tokens.",
        examples=["sentence"],
    )
    chunk_size: int = Field(
        254, ge=32, le=8192, description="Length of a node, in tokens of the embedding model.", examples=["254"]
    )
    chunk_overlap: int = Field(
        32, ge=0, le=4096, description="Tokens that a node shares with the one before it.", examples=["32"]
    )

    document_max_bytes: int = Field(
        50 * 1024 * 1024,
        ge=1,
        le=1024**3,
        description="Largest document that the API and an ingest take, in bytes.",
        examples=["52428800"],
    )
    document_max_pages: int = Field(
        5000,
        ge=1,
        le=100_000,
        description="Pages, slides or sheets of the longest document that is read.",
        examples=["5000"],
    )
    document_max_characters: int = Field(
        50_000_000,
        ge=1,
        le=500_000_000,
        description="Characters of text in the longest document that is read.",
        examples=["50000000"],
    )
    document_read_seconds: int = Field(
        120,
        ge=1,
        le=3600,
        description="Seconds of a processor that a document may take to be read.",
        examples=["120"],
    )
    document_read_mib: int = Field(
        1024,
        ge=256,
        le=65_536,
        description="Memory that the process that reads documents may have, in MiB.",
        examples=["1024"],
    )
    ingest_threads: int | None = Field(
        None,
        ge=1,
        le=256,
        description="Texts embedded at a time by an ingest; none means one per core.",
        examples=["2"],
    )
    keep_snapshots: int = Field(
        5,
        ge=1,
        le=1000,
        description="Snapshots of an index that stay, besides the live one and the one that a rollback goes to.",
        examples=["5"],
    )

    vector_store: Literal["embedded", "postgres", "qdrant"] = Field(
        "embedded",
        description="Where nodes and vectors are: in files of each host; in PostgreSQL with pgvector for all hosts; "
        "or nodes in files of each host and vectors in Qdrant (needs the extra `qdrant`).",
        examples=["postgres"],
    )
    postgres_hosts: Annotated[tuple[PostgresHost, ...], NoDecode, BeforeValidator(_split)] = Field(
        (),
        description="Hosts of one PostgreSQL cluster, each with :port where that is not 5432; or a socket's directory.",
        examples=["db1.example.org,db2.example.org"],
    )
    postgres_database: str = Field("ragrack", min_length=1, description="Name of the database.", examples=["ragrack"])
    postgres_user: str = Field("ragrack", min_length=1, description="Who asks there.", examples=["ragrack"])
    postgres_password: SecretStr | None = Field(
        None, description="Password of that user: the systemd credential `credentials_postgres_password`."
    )
    postgres_sslrootcert: Path | None = Field(
        None,
        description="CA that signed the certificates of those hosts, whose names are checked too.",
        examples=["/etc/ragrack/tls/ca.crt"],
    )
    postgres_connections: int = Field(
        4, ge=1, le=64, description="Queries that a worker asks of PostgreSQL at a time.", examples=["4"]
    )
    postgres_timeout: float = Field(
        5, gt=0, le=600, description="Seconds that PostgreSQL has for a query.", examples=["5"]
    )

    qdrant_url: AnyHttpUrl | None = Field(
        None,
        description="URL of a Qdrant server, with its port. Left here by a release that does not use it, old indexes "
        "are removed there too.",
        examples=["https://qdrant.example.org:6333"],
    )
    qdrant_api_key: SecretStr | None = Field(
        None, description="Key of that server: the systemd credential `credentials_qdrant_api_key`, never a variable."
    )
    qdrant_timeout: int = Field(5, ge=1, le=600, description="Seconds that Qdrant has for a query.", examples=["5"])

    top_k: int = Field(5, ge=1, le=50, description="Nodes retrieved for a query that does not say.", examples=["5"])
    similarity_cutoff: float = Field(
        0.3,
        ge=0,
        le=1,
        description='Nodes less similar than this are dropped; when none is left the answer is "I don\'t know".',
        examples=["0.3"],
    )
    retrieval: Literal["hybrid", "dense"] = Field(
        "hybrid",
        description="How nodes are found: by meaning and by words (BM25) together, or by meaning alone.",
        examples=["hybrid"],
    )
    answer: Literal["extractive", "generate"] = Field(
        "extractive",
        description="How a query that does not say is answered: by the sentences that answer, or by the LLM.",
        examples=["extractive"],
    )

    llm_provider: Literal["openai_like", "ollama"] = Field(
        "openai_like", description="Which interface the LLM has.", examples=["openai_like"]
    )
    llm_base_url: AnyHttpUrl | None = Field(
        None, description="Base URL of the LLM's API.", examples=["http://127.0.0.1:8081/v1"]
    )
    llm_model: str | None = Field(
        None, min_length=1, description="Name of the model at that API.", examples=["smollm2-135m-instruct"]
    )
    llm_api_key: SecretStr | None = Field(
        None, description="Key of that API: the systemd credential `credentials_llm_api_key`, never a variable."
    )
    llm_also_at: Annotated[tuple[AnyHttpUrl, ...], NoDecode, BeforeValidator(_split)] = Field(
        (),
        description="Base URLs of further servers of that model with that key, separated by commas: each call goes to "
        "the one that has the fewest, and to the next where that one fails.",
        examples=["http://192.0.2.32:8081/v1"],
    )
    llm_timeout: float = Field(
        30,
        gt=0,
        le=600,
        description="Seconds that the LLM has for an answer before the sentences are given instead.",
        examples=["30"],
    )
    llm_fallback_provider: Literal["openai_like", "ollama"] = Field(
        "openai_like", description="Which interface the second LLM has.", examples=["openai_like"]
    )
    llm_fallback_base_url: AnyHttpUrl | None = Field(
        None,
        description="Base URL of a second LLM, asked where the first fails.",
        examples=["http://127.0.0.1:8082/v1"],
    )
    llm_fallback_model: str | None = Field(
        None, min_length=1, description="Name of the model at the second LLM.", examples=["smollm2-135m-instruct"]
    )
    llm_fallback_api_key: SecretStr | None = Field(
        None,
        description="Key of the second LLM: the systemd credential `credentials_llm_fallback_api_key`.",
    )
    context_window: int = Field(
        2048, ge=256, le=10_000_000, description="Tokens that the LLM reads and writes in all.", examples=["2048"]
    )
    num_output: int = Field(
        128, ge=1, le=1_000_000, description="Tokens that the LLM may write in an answer.", examples=["128"]
    )

    llm_in_flight: int = Field(
        8, ge=1, le=10_000, description="Calls of an LLM at a time, for each worker.", examples=["8"]
    )
    llm_queue: int = Field(
        16, ge=0, le=10_000, description="Calls of an LLM that wait, for each worker; more fail.", examples=["16"]
    )
    llm_retries: int = Field(
        2,
        ge=0,
        le=10,
        description="How often a call is tried again that failed before its first token.",
        examples=["2"],
    )
    llm_breaker_failures: int = Field(
        5, ge=1, le=1000, description="Failures in a row after which a worker leaves an LLM alone.", examples=["5"]
    )
    llm_breaker_seconds: float = Field(
        10, gt=0, le=3600, description="For how many seconds; then one call tries whether it is back.", examples=["10"]
    )
    degrade: bool = Field(
        True,
        description="Whether `/query` gives sentences where the LLM fails, marked as degraded; else it answers 503.",
        examples=["true"],
    )

    request_timeout: float = Field(
        120,
        gt=0,
        le=3600,
        description="Seconds that a request has; its client may ask for fewer by `X-Request-Timeout`.",
        examples=["120"],
    )
    max_in_flight: int = Field(
        64, ge=1, le=10_000, description="Requests answered at a time, by each worker.", examples=["64"]
    )
    max_queue: int = Field(
        128,
        ge=0,
        le=10_000,
        description="Requests that wait, for each worker; more are answered 503.",
        examples=["128"],
    )
    otlp_endpoint: AnyHttpUrl | None = Field(
        None,
        description="Base URL of an OpenTelemetry collector (OTLP over HTTP) that traces go to; none sends none.",
        examples=["http://127.0.0.1:4318"],
    )
    otlp_sample_ratio: float = Field(
        1,
        ge=0,
        le=1,
        description="Share of the traces begun here that is sent; a caller's trace is sent if it says so.",
        examples=["0.1"],
    )
    log_content: bool = Field(
        False, description="Whether questions, prompts and answers are written to the log.", examples=["false"]
    )

    tokenizer: Path | None = Field(
        None,
        description="The LLM's tokenizer.json, to count prompts with; none means the embedding model's.",
        examples=["/etc/ragrack/tokenizer.json"],
    )
    hooks: str | None = Field(
        None,
        min_length=1,
        description="A Python file or module of your own, with node_postprocessors and callback_handlers.",
        examples=["/etc/ragrack/hooks.py"],
    )

    api_keys_file: Path = Field(
        Path("/etc/ragrack/api-keys.json"),
        description="Hashes of the API keys; re-read when it changes.",
        examples=["/etc/ragrack/api-keys.json"],
    )
    tenants: Literal["off", "by_folder"] = Field(
        "off",
        description="`by_folder` keeps tenants apart: a document in <collection>/<tenant>/ is that tenant's alone.",
        examples=["by_folder"],
    )
    jwt_issuer: str | None = Field(
        None,
        min_length=1,
        description="Issuer (iss) of the tokens that are taken beside API keys; none means keys alone.",
        examples=["https://login.example.org/realms/staff"],
    )
    jwt_audience: str | None = Field(
        None, min_length=1, description="Audience (aud) that a token must name.", examples=["ragrack"]
    )
    jwt_jwks_url: AnyHttpUrl | None = Field(
        None,
        description="Where the issuer's public keys are; fetched again and again, the last good ones kept.",
        examples=["https://login.example.org/realms/staff/protocol/openid-connect/certs"],
    )
    jwt_algorithms: Annotated[tuple[Literal["RS256", "ES256"], ...], NoDecode, BeforeValidator(_split)] = Field(
        ("RS256", "ES256"), min_length=1, description="What a token may be signed with.", examples=["RS256"]
    )
    jwt_leeway: int = Field(
        30, ge=0, le=300, description="Seconds that the issuer's clock and this one may differ.", examples=["30"]
    )
    jwt_tenant_claim: str = Field(
        "tenant",
        min_length=1,
        description="Claim that names the tenant; read where tenants are kept apart. `a.b` is b within a.",
        examples=["tenant"],
    )
    jwt_roles_claim: str = Field(
        "roles",
        min_length=1,
        description="Claim that lists roles, as a list or separated by blanks.",
        examples=["realm_access.roles"],
    )
    jwt_roles: Annotated[tuple[tuple[str, Role], ...], NoDecode, BeforeValidator(_pairs)] = Field(
        (("reader", "reader"), ("ingester", "ingester"), ("operator", "operator")),
        description="What a value of that claim means here.",
        examples=["staff=reader,editors=ingester,platform=operator"],
    )
    release: str = Field(
        "dev",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$",
        max_length=128,
        description="Id of the release. The unit sets it.",
        examples=["0.1.0-0123456789ab"],
    )
    runtime_dir: Path = Field(
        Path("/run/ragrack/dev"),
        description="Directory of the socket and of the gate's key. The unit sets it.",
        examples=["/run/ragrack/0.1.0-0123456789ab"],
    )

    workers: int = Field(2, ge=1, le=256, description="gunicorn workers.", examples=["2"])
    worker_class: Literal["uvicorn", "asgi"] = Field(
        "uvicorn", description="gunicorn's worker: uvicorn's, or its own.", examples=["uvicorn"]
    )
    graceful_timeout: int = Field(
        30, ge=1, le=3600, description="Seconds that requests in flight have when a release stops.", examples=["30"]
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe of the service's own log lines that is written.", examples=["info"]
    )

    @property
    def default_collection(self) -> str:
        return self.collections[0]

    @property
    def socket(self) -> Path:
        return self.runtime_dir / "gunicorn.sock"

    @property
    def gate_key_file(self) -> Path:
        return self.runtime_dir / "gate.key"


class _OnlyGiven(Settings):
    """Settings out of the values given and nothing else, whatever this process' environment holds."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the settings: which variable, what is wrong with its value, and what mends it."""

    variable: str
    problem: str
    mend: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.variable}: {self.problem}\n  mend: {self.mend}"


class SettingsError(Exception):
    """The settings do not hold; `problems` has all of what is wrong."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        heading = f"{count} problem{'s' if count > 1 else ''} with the settings:"
        super().__init__("\n".join([heading, *(f"- {problem}" for problem in self.problems)]))


def variable(field: str) -> str:
    """The environment variable of a field of `Settings`."""
    return PREFIX + field.upper()


def load(environ: Mapping[str, str] = os.environ, *, on_host: bool = True) -> Settings:
    """The settings in `environ`; raises SettingsError with all problems at once.

    Secrets are those of $CREDENTIALS_DIRECTORY. on_host: also check that what the paths name is there.
    """
    settings, problems = examine(environ, on_host=on_host)
    if settings is None or problems:
        raise SettingsError(problems)
    return settings


def examine(
    environ: Mapping[str, str], *, on_host: bool, secrets: Mapping[str, str] | None = None
) -> tuple[Settings | None, list[Problem]]:
    """As `load`, but returns the problems; the settings are None where a field of theirs has one.

    secrets: a release's credentials by field, for who is not started by systemd.
    """
    fields = Settings.model_fields
    problems = list(_unknown(environ))
    values: dict[str, Any] = {
        name: environ[variable(name)] for name in fields if name not in SECRETS and environ.get(variable(name))
    }
    values |= _secrets(environ) | dict(secrets or {})
    bad: set[str] = set()
    settings = None
    try:
        settings = _OnlyGiven(**values)
        sound: Settings = settings
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=False):
            name = str(detail["loc"][0])
            if name not in bad:
                problems.append(_field_problem(name, values.get(name), detail["msg"], detail["type"]))
            bad.add(name)
        # The cross-checks that concern only sound fields are still worth telling in the same go.
        sound = _OnlyGiven.model_construct(**_validated_alone(values, bad))
    problems += [problem for names, problem in _across(sound) if not bad & set(names)]
    if on_host:
        problems += [problem for name, problem in _on_host(sound) if name not in bad]
    return settings, problems


def read_env_file(path: Path) -> tuple[dict[str, str], list[Problem]]:
    """The variables of a file in the form that systemd's EnvironmentFile and a shell read alike, and its bad lines."""
    values: dict[str, str] = {}
    problems = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        return {}, [Problem(str(path), f"cannot be read: {reason}", "name a text file of NAME=value lines")]
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith(("#", ";")):
            continue
        match = re.fullmatch(r'\s*([A-Za-z_][A-Za-z0-9_]*)=(?:"((?:[^"\\$`]|\\.)*)"|([^"\'\\$`\s#]*))\s*', line)
        if match is None:
            mend = 'write NAME=value, or NAME="value" where the value has blanks; no expansion'
            problems.append(Problem(f"{path}:{number}", "is not a variable's assignment", mend))
            continue
        name, quoted, plain = match.groups()
        if name in values:
            problems.append(Problem(name, f"is set twice in {path}", "keep one of the lines"))
        values[name] = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain
    return values, problems


def table() -> str:
    """The settings as a Markdown table, for docs/settings.md."""
    lines = ["| Variable | Default | Values | Meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        shown = "credential" if name in SECRETS else f"`{variable(name)}`"
        default = "required" if field.is_required() else _text(field.default)
        lines.append(f"| {shown} | {default} | {_values(field)} | {field.description} |")
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        value = ",".join(item if isinstance(item, str) else "=".join(item) for item in value)
    return f"`{value}`" if value not in (None, "") else "none"


def _values(field: FieldInfo) -> str:
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        item = get_args(annotation)[0]
        if get_origin(item) is Literal:
            return f"{', '.join(f'`{choice}`' for choice in get_args(item))}, separated by commas"
        if get_origin(item) is tuple:
            return f"value=role, separated by commas; a role is one of {', '.join(get_args(get_args(item)[1]))}"
        return "names, separated by commas"
    kind: Any = next((part for part in get_args(annotation) if part is not type(None)), annotation)
    words = {
        bool: "`true` or `false`",
        int: "an integer",
        float: "a number",
        Path: "an absolute path",
        AnyHttpUrl: "an http(s) URL",
        SecretStr: "a secret",
    }
    limits = [
        f"{word} {getattr(bound, name)}"
        for bound in field.metadata
        for name, word in {"gt": "above", "ge": "from", "le": "to"}.items()
        if hasattr(bound, name)
    ]
    return " ".join([words.get(kind, "a text"), *limits])


def _unknown(environ: Mapping[str, str]) -> Iterator[Problem]:
    known = {variable(name) for name in Settings.model_fields if name not in SECRETS}
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in known:
            continue
        secret = name.removeprefix(PREFIX).lower()
        if secret in SECRETS:
            yield Problem(
                name,
                "is a secret in the environment, where other processes can read it",
                f"remove it, rotate it, and give it as the systemd credential {SECRETS[secret]}",
            )
            continue
        nearest = difflib.get_close_matches(name, known, n=1)
        mend = f"did you mean {nearest[0]}?" if nearest else "remove it; docs/settings.md lists all variables"
        yield Problem(name, "is not a setting", mend)


def _secrets(environ: Mapping[str, str]) -> dict[str, str]:
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        return {}
    files = {field: Path(directory) / name for field, name in SECRETS.items()}
    readable = {field: path for field, path in files.items() if os.access(path, os.R_OK)}
    return {field: path.read_text(encoding="utf-8").strip() for field, path in readable.items()}


def _field_problem(name: str, value: Any, message: str, kind: str) -> Problem:
    field = Settings.model_fields[name]
    example = f"{variable(name)}={field.examples[0]}" if field.examples else f"the credential {SECRETS.get(name)}"
    if kind == "missing":
        return Problem(variable(name), "is not set", f"set it, e.g. {example}")
    shown = "its value" if name in SECRETS else repr(re.sub(r"//[^/@]*@", "//***@", str(value)))
    complaint = re.sub(r"^(Value error, |Input |String |URL )", "", message)
    return Problem(variable(name), f"{shown} {complaint}", f"give {_values(field)}, e.g. {example}")


def _validated_alone(values: Mapping[str, Any], bad: set[str]) -> dict[str, Any]:
    filler = {name: "unset" for name in bad if Settings.model_fields[name].is_required()}
    sound = {name: value for name, value in values.items() if name not in bad}
    return dict(_OnlyGiven(**(filler | sound)))


def _across(settings: Settings) -> Iterator[tuple[tuple[str, ...], Problem]]:
    """What fields that are sound alone say against each other: the fields looked at, and the problem."""
    paths = [
        name for name, field in Settings.model_fields.items() if Path in (field.annotation, *get_args(field.annotation))
    ]
    for name in paths:
        path: Path | None = getattr(settings, name)
        if path is not None and not path.is_absolute():
            yield (name,), Problem(variable(name), f"'{path}' is not an absolute path", f"write /.../{path}")
    twice = {name for name in settings.collections if settings.collections.count(name) > 1}
    if twice:
        names = ", ".join(sorted(twice))
        yield ("collections",), Problem(variable("collections"), f"names twice: {names}", "name each collection once")
    own = settings.embed_provider == "minilm"
    room = (MINILM_MAX_TOKENS if own else settings.embed_max_tokens) - SPECIAL_TOKENS
    if settings.chunk_size > room:
        yield (
            ("chunk_size", "embed_provider", "embed_max_tokens"),
            Problem(
                variable("chunk_size"),
                f"{settings.chunk_size}, but the {settings.embed_provider} model reads {room} tokens of a node: "
                "what is beyond would never be found",
                f"give at most {room}",
            ),
        )
    if settings.chunk_overlap >= settings.chunk_size:
        yield (
            ("chunk_overlap", "chunk_size"),
            Problem(
                variable("chunk_overlap"),
                f"{settings.chunk_overlap} is not less than {variable('chunk_size')}={settings.chunk_size}",
                f"give at most {settings.chunk_size // 2}",
            ),
        )
    keyed = {f"{upstream}_base_url": f"{upstream}_api_key" for upstream in ("embed", "llm", "llm_fallback")}
    keyed |= {"qdrant_url": "qdrant_api_key", "llm_also_at": "llm_api_key"}
    for name, key in keyed.items():
        value = getattr(settings, name)
        urls: tuple[AnyHttpUrl | None, ...] = value if isinstance(value, tuple) else (value,)
        if any(at is not None and (at.username or at.password) for at in urls):
            yield (
                (name,),
                Problem(
                    variable(name),
                    "holds a user name or password, and an environment is no place for secrets",
                    f"take it out and give the key as the systemd credential {SECRETS[key]}",
                ),
            )
    if not own:
        yield from _needed(settings, "embed_provider", ("embed_base_url", "embed_model", "embed_dimensions"))
    if settings.llm_also_at:
        yield from _needed(settings, "llm_also_at", ("llm_base_url", "llm_model"))
    if settings.llm_fallback_base_url is not None:
        yield from _needed(settings, "llm_fallback_base_url", ("llm_fallback_model", "llm_base_url", "llm_model"))
    elif settings.llm_fallback_model is not None:
        yield from _needed(settings, "llm_fallback_model", ("llm_fallback_base_url",))
    url = settings.llm_base_url
    yield from _jwt(settings)
    if settings.vector_store == "postgres":
        yield from _postgres(settings)
    yield from _qdrant(settings)
    if settings.answer == "generate":
        for name in ("llm_base_url", "llm_model"):
            if getattr(settings, name) is None:
                example = Settings.model_fields[name].examples or [""]
                yield (
                    (name, "answer"),
                    Problem(
                        variable(name),
                        f"is not set, but {variable('answer')}=generate needs it",
                        f"set it, e.g. {variable(name)}={example[0]}, or set {variable('answer')}=extractive",
                    ),
                )
    calls = settings.llm_in_flight + settings.llm_queue
    if url is not None and calls >= settings.max_in_flight:
        yield (
            ("max_in_flight", "llm_in_flight", "llm_queue"),
            Problem(
                variable("max_in_flight"),
                f"{settings.max_in_flight} is not more than llm_in_flight + llm_queue = {calls}: a slow LLM would take "
                "every place, and retrieval with it",
                f"give at least {calls + 1}, or lower {variable('llm_queue')}",
            ),
        )
    needed = settings.num_output + settings.top_k * settings.chunk_size
    if url is not None and settings.context_window < needed:
        yield (
            ("context_window", "num_output", "top_k", "chunk_size"),
            Problem(
                variable("context_window"),
                f"{settings.context_window} is less than num_output + top_k x chunk_size = {settings.num_output} + "
                f"{settings.top_k} x {settings.chunk_size} = {needed}",
                f"give at least {needed} if the LLM has that, or lower {variable('top_k')} or {variable('num_output')}",
            ),
        )


def _needed(settings: Settings, by: str, names: Iterable[str]) -> Iterator[tuple[tuple[str, ...], Problem]]:
    for name in names:
        if getattr(settings, name) is None:
            example = (Settings.model_fields[name].examples or [""])[0]
            value = getattr(settings, by)
            given = f"{variable(by)}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
            mend = f"set it, e.g. {variable(name)}={example}"
            yield (name, by), Problem(variable(name), f"is not set, but {given} needs it", mend)


def _postgres(settings: Settings) -> Iterator[tuple[tuple[str, ...], Problem]]:
    hosts = settings.postgres_hosts
    if not hosts:
        given = f"{variable('vector_store')}=postgres needs it"
        mend = f"set it, e.g. {variable('postgres_hosts')}=db1.example.org,db2.example.org"
        yield ("postgres_hosts", "vector_store"), Problem(variable("postgres_hosts"), f"is not set, but {given}", mend)
    sockets = [host for host in hosts if host.startswith("/")]
    if sockets and len(hosts) > 1:
        yield (
            ("postgres_hosts",),
            Problem(
                variable("postgres_hosts"),
                f"names '{sockets[0]}', the directory of a socket, beside other hosts",
                "name it alone, or name hosts alone",
            ),
        )
    if hosts and not sockets and settings.postgres_sslrootcert is None:
        yield (
            ("postgres_sslrootcert", "postgres_hosts"),
            Problem(
                variable("postgres_sslrootcert"),
                f"is not set, but {variable('postgres_hosts')} are reached over the network, and whoever is on the way "
                "could stand in for them",
                f"give the CA of their certificates, e.g. {variable('postgres_sslrootcert')}=/etc/ragrack/tls/ca.crt",
            ),
        )
    dimensions = settings.embed_dimensions
    if dimensions is not None and dimensions > PGVECTOR_DIMENSIONS:
        yield (
            ("embed_dimensions", "vector_store"),
            Problem(
                variable("embed_dimensions"),
                f"{dimensions}, but pgvector's index takes vectors of {PGVECTOR_DIMENSIONS} dimensions",
                f"use a model with fewer, or {variable('vector_store')}=embedded",
            ),
        )


def _qdrant(settings: Settings) -> Iterator[tuple[tuple[str, ...], Problem]]:
    if settings.vector_store == "qdrant":
        yield from _needed(settings, "vector_store", ("qdrant_url",))
    yield from _https(
        settings,
        "qdrant_url",
        "could read the key, and the questions' vectors",
        "give the server a certificate that the hosts trust, and its https URL",
    )


def _jwt(settings: Settings) -> Iterator[tuple[tuple[str, ...], Problem]]:
    together = ("jwt_issuer", "jwt_audience", "jwt_jwks_url")
    given = [name for name in together if getattr(settings, name) is not None]
    for name in together if given else ():
        if name not in given:
            example = (Settings.model_fields[name].examples or [""])[0]
            yield (
                together,
                Problem(
                    variable(name),
                    f"is not set, but {variable(given[0])} is, and a token is judged by all three",
                    f"set it, e.g. {variable(name)}={example}",
                ),
            )
    yield from _https(
        settings,
        "jwt_jwks_url",
        "could put keys of their own into it",
        "give the https URL, which the issuer's /.well-known/openid-configuration names as jwks_uri",
    )


def _https(settings: Settings, name: str, harm: str, mend: str) -> Iterator[tuple[tuple[str, ...], Problem]]:
    url = getattr(settings, name)
    if url is not None and url.scheme != "https" and url.host not in LOOPBACK:
        problem = f"'{url}' is not https: whoever is on the way {harm}"
        yield (name,), Problem(variable(name), problem, mend)


def _on_host(settings: Settings) -> Iterator[tuple[str, Problem]]:
    """What the paths name must be there. Not the index: a service without one starts, and says so at /readyz."""
    if settings.embed_provider == "minilm":
        yield from _model(settings)
    if settings.index_dir.exists() and not os.access(settings.index_dir, os.R_OK | os.X_OK):
        mend = "let it (chown or chmod), or name another directory"
        yield "index_dir", Problem(variable("index_dir"), f"'{settings.index_dir}' cannot be read by this user", mend)
    if settings.ingests and not os.access(settings.documents_dir, os.W_OK | os.X_OK):
        yield (
            "documents_dir",
            Problem(
                variable("documents_dir"),
                f"'{settings.documents_dir}' cannot be written by this user, and {variable('ingests')}=true needs it",
                f"make it and let this user write there, or set {variable('ingests')}=false",
            ),
        )
    if settings.vector_store == "postgres":
        yield from _postgres_credentials(settings)
    if settings.qdrant_url is not None and importlib.util.find_spec("qdrant_client") is None:
        yield (
            "qdrant_url",
            Problem(
                variable("qdrant_url"),
                "needs the extra `qdrant`, which is not installed",
                "install `ragrack[qdrant]`; a deploy with app_qdrant_url brings it",
            ),
        )
    yield from _dimensions(settings)
    if settings.tokenizer is not None:
        yield from _tokenizer(settings, settings.tokenizer)
    if settings.hooks is not None:
        try:
            hooks.check(settings.hooks)
        except hooks.HooksError as error:
            yield "hooks", Problem(variable("hooks"), error.problem, error.mend)


def _postgres_credentials(settings: Settings) -> Iterator[tuple[str, Problem]]:
    ca = settings.postgres_sslrootcert
    if ca is not None and not os.access(ca, os.R_OK):
        mend = "put the CA's certificate there, readable to this user"
        yield "postgres_sslrootcert", Problem(variable("postgres_sslrootcert"), f"'{ca}' cannot be read", mend)
    over_network = any(not host.startswith("/") for host in settings.postgres_hosts)
    if over_network and settings.postgres_password is None:
        yield (
            "postgres_password",
            Problem(
                variable("postgres_password"),
                f"is not given, and {variable('postgres_hosts')} take nobody without one",
                f"give it as the systemd credential {SECRETS['postgres_password']}",
            ),
        )


def _model(settings: Settings) -> Iterator[tuple[str, Problem]]:
    names = ("model.onnx", "words.bin", "tokenizer.json", "model.json")
    missing = [name for name in names if not os.access(settings.embed_model_dir / name, os.R_OK)]
    if missing:
        yield (
            "embed_model_dir",
            Problem(
                variable("embed_model_dir"),
                f"'{settings.embed_model_dir}' has no {' nor '.join(missing)} that this user can read",
                "point it to the model of the release, or deploy the release again",
            ),
        )


def _dimensions(settings: Settings) -> Iterator[tuple[str, Problem]]:
    try:
        fingerprint = Fingerprint.of(settings)
    except ModelError:
        return
    given = settings.embed_dimensions
    if given is not None and given != fingerprint.dimensions:
        problem = f"{given}, but the embedding model's vectors have {fingerprint.dimensions}"
        yield "embed_dimensions", Problem(variable("embed_dimensions"), problem, "leave it out, or give that number")
    for name in settings.collections if settings.vector_store != "postgres" else ():
        try:
            current = SnapshotDir(settings.index_dir, name, fingerprint.digest).current()
        except (SnapshotError, OSError):
            continue
        if current is not None and current.manifest.dimensions != fingerprint.dimensions:
            yield (
                "index_dir",
                Problem(
                    variable("index_dir"),
                    f"snapshot {current.id} of {name} holds vectors of {current.manifest.dimensions} dimensions, "
                    f"the embedding model gives {fingerprint.dimensions}",
                    f"remove that snapshot and run `ragrack ingest --collection {name}`",
                ),
            )


def _tokenizer(settings: Settings, path: Path) -> Iterator[tuple[str, Problem]]:
    """As far as can be known: the file is one, and has as many entries as the LLM that the name tells of."""
    try:
        tokenizer = json.loads(path.read_bytes())
        entries = len(tokenizer["model"]["vocab"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        problem = f"'{path}' cannot be read as a tokenizer.json ({type(error).__name__})"
        yield "tokenizer", Problem(variable("tokenizer"), problem, "give the tokenizer.json that comes with the LLM")
        return
    for pattern, (least, most) in VOCABULARIES.items():
        if re.search(pattern, (settings.llm_model or "").lower()) and not least <= entries <= most:
            yield (
                "tokenizer",
                Problem(
                    variable("tokenizer"),
                    f"'{path}' has {entries} entries, {settings.llm_model}'s has about {least}",
                    "give the tokenizer.json that comes with that model, or leave it out",
                ),
            )
