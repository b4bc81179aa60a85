"""`ragrack`: what an operator, a unit or a playbook asks of the package without a running service.

Exit status: 0 done, 1 refused or failed (the output says why), 2 not understood. What a command needs is imported
when it runs, so that `ragrack config check` takes a fraction of LlamaIndex's import.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ragrack import index_cli, size_cli
from ragrack.command import RefusedError, act_as_owner, collections_of, print_json, settings_here, snapshots_of
from ragrack.index_cli import figures
from ragrack.settings import Problem, Settings, SettingsError, examine, load, read_env_file, table
from ragrack.snapshot import SnapshotError

if TYPE_CHECKING:
    from ragrack.golden import GoldenSet


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except (SettingsError, RefusedError, SnapshotError) as error:
        print(error, file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ragrack", description="A LlamaIndex RAG service: its settings, indexes, keys."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    config = commands.add_parser("config", help="check the settings").add_subparsers(required=True, metavar="COMMAND")
    check = config.add_parser("check", help="report all that is wrong with the settings, in one go")
    _env_file(check)
    check.add_argument(
        "--on-host", action="store_true", help="with --env-file: check also that what paths name is there"
    )
    check.add_argument("--json", action="store_true", help='print [{"variable", "problem", "mend"}]')
    check.set_defaults(run=_config_check)
    fingerprint = config.add_parser("fingerprint", help="print the fingerprint that an index must have")
    _env_file(fingerprint)
    fingerprint.add_argument(
        "--model-dir", type=Path, help="the embedding model, where it lies elsewhere on this machine"
    )
    fingerprint.set_defaults(run=_config_fingerprint)

    settings = commands.add_parser("settings-table", help="print all settings as a Markdown table (docs/settings.md)")
    settings.set_defaults(run=_settings_table)

    ingest = commands.add_parser("ingest", help="build a snapshot of a collection from its documents, and switch to it")
    which = ingest.add_mutually_exclusive_group()
    which.add_argument("--collection", action="append", help="this one (may be repeated); all by default")
    which.add_argument("--missing", action="store_true", help="only those that have no snapshot for these settings")
    ingest.add_argument("--json", action="store_true", help="progress and result as JSON lines")
    ingest.set_defaults(run=_ingest)

    index_cli.add_commands(commands)
    size_cli.add_commands(commands)

    golden = commands.add_parser("golden", help="ask a running service its golden questions")
    where = golden.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket", type=Path, help="gunicorn's socket")
    where.add_argument("--url", help="e.g. https://rag.example.org")
    golden.add_argument("--cacert", type=Path, help="with --url: the CA that signed its certificate")
    golden.add_argument("--collection", required=True)
    golden.add_argument("--golden-file", type=Path, help="default: <RAGRACK_GOLDEN_DIR>/<collection>.yml")
    golden.add_argument("--key-file", type=Path, help="holds the API key; default: gate.key beside the socket")
    golden.add_argument("--allow-missing", action="store_true", help="no golden file: one answered question is enough")
    golden.add_argument("--allow-degraded", action="store_true", help="pass even if the LLM does not answer")
    golden.add_argument(
        "--answers",
        type=int,
        default=4,
        help="how many of those with a phrase are asked for an answer, too (default 4)",
    )
    golden.add_argument("--json", action="store_true")
    golden.set_defaults(run=_golden)

    ask = commands.add_parser("ask", help="ask a running service a question")
    ask.add_argument("--url", required=True, help="e.g. https://rag.example.org")
    ask.add_argument("--cacert", type=Path, help="the CA that signed its certificate; the system's by default")
    ask.add_argument("--key-file", type=Path, required=True, help="holds the API key")
    ask.add_argument("--generate", action="store_true", help="let the language model answer, whatever the setting")
    ask.add_argument("--json", action="store_true", help="print the answer as the service gave it")
    ask.add_argument("question")
    ask.set_defaults(run=_ask)

    keys = commands.add_parser("keys", help="make, list and revoke API keys").add_subparsers(
        required=True, metavar="COMMAND"
    )
    new = keys.add_parser("new", help="make a key: shown once, only its hash is kept")
    new.add_argument("--name", required=True, help="whose it is; appears in the log")
    new.add_argument("--expires", help="ISO date or time, UTC unless it names a zone")
    new.add_argument("--tenant", help="sees this tenant's documents alone; needed where tenants are kept apart")
    new.add_argument("--role", action="append", help="reader (default), ingester or operator; may be repeated")
    new.add_argument("--file", type=Path, help="add the hash to this keys file")
    new.add_argument("--json", action="store_true")
    new.set_defaults(run=_keys_new)
    listed = keys.add_parser("list", help="list the keys: whose, for what, and whether still valid")
    revoke = keys.add_parser("revoke", help="refuse a key from now on; running services see it at once")
    revoke.add_argument("name", help="whose it is")
    default = os.environ.get("RAGRACK_API_KEYS_FILE") or Settings.model_fields["api_keys_file"].default
    for command in (listed, revoke):
        command.add_argument("--file", type=Path, default=Path(default), help="the keys file (default: %(default)s)")
        command.add_argument("--json", action="store_true")
    listed.set_defaults(run=_keys_list)
    revoke.set_defaults(run=_keys_revoke)
    hashed = keys.add_parser("hash", help="print the hash of a key read from standard input")
    hashed.set_defaults(run=_keys_hash)
    return parser


def _env_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--env-file",
        type=Path,
        action="append",
        help="judge this file's variables instead of the environment's; may be repeated, the last one wins",
    )


def _examine(arguments: argparse.Namespace) -> tuple[Settings | None, list[Problem]]:
    if not arguments.env_file:
        return examine(os.environ, on_host=True)
    environ: dict[str, str] = {}
    problems: list[Problem] = []
    for path in arguments.env_file:
        values, wrong = read_env_file(path)
        environ |= values
        problems += wrong
    settings, more = examine(environ, on_host=getattr(arguments, "on_host", False))
    return settings, problems + more


def _config_check(arguments: argparse.Namespace) -> int:
    _, problems = _examine(arguments)
    if arguments.json:
        print_json([problem.as_dict() for problem in problems])
    elif problems:
        print(SettingsError(problems))
    else:
        print("the settings hold")
    return 1 if problems else 0


def _config_fingerprint(arguments: argparse.Namespace) -> int:
    from ragrack.fingerprint import Fingerprint, ModelError

    if arguments.env_file:
        settings, problems = _examine(arguments)
        if settings is None or problems:
            raise SettingsError(problems)
    else:
        settings = settings_here()
    try:
        print(Fingerprint.of(settings, arguments.model_dir).digest)
    except ModelError as error:
        raise RefusedError(str(error)) from error
    return 0


def _settings_table(_: argparse.Namespace) -> int:
    print(table(), end="")
    return 0


def _ingest(arguments: argparse.Namespace) -> int:
    settings = load()
    collections = collections_of(settings, arguments.collection)
    if arguments.missing:
        collections = [name for name in collections if snapshots_of(settings, name).current_id() is None]
    if not collections:
        print("every collection has a snapshot", file=sys.stderr)
        return 0
    from ragrack.ingest import IngestError, ingest
    from ragrack.progress import progress_to

    act_as_owner(settings.index_dir)
    failed = 0
    for name in collections:
        directory = snapshots_of(settings, name)
        before, there = directory.current_id(), {snapshot.id for snapshot in directory.list()}
        try:
            snapshot = ingest(settings, name, progress_to(sys.stderr, arguments.json))
        except IngestError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = 1
            continue
        manifest = snapshot.manifest
        live, hold = directory.current_id() == snapshot.id, directory.held()
        if arguments.json:
            state = {"from": before, "snapshot": snapshot.id, "built": snapshot.id not in there, "live": live}
            held = asdict(hold) if hold else None
            print_json({"collection": name, **state, "held": held, **figures(manifest)})
        else:
            not_live = f"; not live: {name} is {hold.words()}" if hold and not live else ""
            print(f"{name}: snapshot {snapshot.id}, {manifest.documents} documents, {manifest.nodes} nodes{not_live}")
    return failed


def _ask(arguments: argparse.Namespace) -> int:
    from ragrack.client import AskError, as_json, as_text, ask

    try:
        answer = ask(
            arguments.url,
            arguments.question,
            key=_key(arguments.key_file),
            ca=arguments.cacert,
            generate=arguments.generate,
        )
    except AskError as error:
        raise RefusedError(str(error)) from error
    print(as_json(answer) if arguments.json else as_text(answer))
    return 0


def _golden(arguments: argparse.Namespace) -> int:
    import asyncio

    from ragrack.gate import GateError, Target, ask

    key_file = arguments.key_file or (arguments.socket.with_name("gate.key") if arguments.socket else None)
    target = Target(arguments.socket, arguments.url, arguments.cacert, _key(key_file) if key_file else None)
    golden = _golden_set(arguments)
    try:
        report = asyncio.run(
            ask(
                target,
                arguments.collection,
                golden,
                allow_degraded=arguments.allow_degraded,
                answers=arguments.answers,
            )
        )
    except GateError as error:
        raise RefusedError(str(error)) from error
    if arguments.json:
        print_json(report.as_dict())
    else:
        print(report.summary())
    return 0 if report.passed else 1


def _key(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise RefusedError(f"the API key cannot be read from {path}: {error.strerror}") from error


def _golden_set(arguments: argparse.Namespace) -> GoldenSet | None:
    from ragrack.golden import GoldenError, GoldenSet

    directory = os.environ.get("RAGRACK_GOLDEN_DIR") or Settings.model_fields["golden_dir"].default
    path = arguments.golden_file or Path(directory) / f"{arguments.collection}.yml"
    if not path.exists() and arguments.allow_missing:
        return None
    rate = os.environ.get("RAGRACK_GOLDEN_MIN_HIT_RATE") or Settings.model_fields["golden_min_hit_rate"].default
    try:
        return GoldenSet.load(path, float(rate))
    except GoldenError as error:
        raise RefusedError(str(error)) from error


def _keys_new(arguments: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from ragrack.auth import ApiKey, KeysError, add_key, hash_key, new_key

    key = new_key()
    try:
        entry = ApiKey(
            name=arguments.name,
            sha256=hash_key(key),
            tenant=arguments.tenant,
            roles=tuple(dict.fromkeys(arguments.role or ["reader"])),
            expires=arguments.expires,
        )
        if arguments.file is not None:
            add_key(arguments.file, entry)
    except ValidationError as error:
        options = {"roles": "role"}
        complaints = [f"--{options.get(str(e['loc'][0]), e['loc'][0])}: {e['msg']}" for e in error.errors()]
        raise RefusedError("; ".join(complaints)) from error
    except KeysError as error:
        raise RefusedError(str(error)) from error
    stored = entry.model_dump(mode="json", exclude_none=True)
    if arguments.json:
        print_json({"key": key, **stored})
    else:
        print(f"key:   {key}\nentry: {json.dumps(stored)}")
        print("The key is shown this once.", file=sys.stderr)
    return 0


def _keys_list(arguments: argparse.Namespace) -> int:
    from datetime import UTC, datetime

    from ragrack.auth import KeysError, read_keys

    now = datetime.now(UTC)
    try:
        keys = read_keys(arguments.file)
    except KeysError as error:
        raise RefusedError(str(error)) from error
    if arguments.json:
        hidden = {"sha256"}
        print_json([key.model_dump(mode="json", exclude=hidden) | {"state": key.state(now)} for key in keys])
        return 0
    for key in keys:
        state = key.state(now)
        moment = key.revoked if state == "revoked" else key.expires
        when = f" {'until' if state == 'active' else 'since'} {moment:%Y-%m-%d %H:%M} UTC" if moment else ""
        tenant = f" of {key.tenant}" if key.tenant else ""
        print(f"{key.name}{tenant}: {', '.join(key.roles)}; {state}{when}")
    return 0


def _keys_revoke(arguments: argparse.Namespace) -> int:
    from datetime import UTC, datetime

    from ragrack.auth import KeysError, revoke_key

    try:
        key = revoke_key(arguments.file, arguments.name, datetime.now(UTC))
    except KeysError as error:
        raise RefusedError(str(error)) from error
    if arguments.json:
        print_json(key.model_dump(mode="json", exclude={"sha256"}))
    else:
        print(f"{key.name} is revoked since {key.revoked:%Y-%m-%d %H:%M:%S} UTC")
        print(
            "Where an inventory writes this file, revoke it there too: else the next play brings it back.",
            file=sys.stderr,
        )
    return 0


def _keys_hash(_: argparse.Namespace) -> int:
    from ragrack.auth import hash_key

    print(hash_key(sys.stdin.read().strip()))
    return 0
