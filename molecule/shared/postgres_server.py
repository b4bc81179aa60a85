"""A real PostgreSQL 17 with pgvector out of Debian 13: a root file system of the test hosts with two packages more.

It runs in a mount and process namespace of its own and dies with the process that started it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from testhosts import image
from testhosts.shell import locked

CACHE = Path(__file__).parents[2] / ".cache"
PACKAGES = ("postgresql-17", "postgresql-17-pgvector")
BIN = "/usr/lib/postgresql/17/bin"
START_TIMEOUT_S = 30
INSTALL = f"""
set -eu
mount --rbind /dev "$1/dev"; mount -t proc proc "$1/proc"; mount -t tmpfs tmpfs "$1/run"
mkdir -p "$1/run/systemd/resolve"
cat /etc/resolv.conf > "$1/run/systemd/resolve/stub-resolv.conf"
printf '#!/bin/sh\\nexit 101\\n' > "$1/usr/sbin/policy-rc.d"; chmod +x "$1/usr/sbin/policy-rc.d"
mkdir -p "$1/etc/postgresql-common"; echo create_main_cluster = false > "$1/etc/postgresql-common/createcluster.conf"
export DEBIAN_FRONTEND=noninteractive
chroot "$1" apt-get -q update
chroot "$1" apt-get -q install --yes --no-install-recommends {" ".join(PACKAGES)}
"""
ENTER = """
set -eu
mount --rbind /dev "$1/dev"; mount -t proc proc "$1/proc"; mount --bind "$2" "$1/mnt"
shift; shift
# Not exec: this shell is the namespace's first process and keeps the signal of its parent's death, which a change of
# user would take from it.
chroot --userspec=postgres:postgres "$@" || exit $?
"""
CONFIG = """
jit = off
fsync = off  # the machine does not die in a test, the server does
full_page_writes = off
wal_level = replica
listen_addresses = '127.0.0.1'
unix_socket_directories = '/mnt'
ssl = on
ssl_cert_file = '/mnt/server.crt'
ssl_key_file = '/mnt/server.key'
shared_buffers = 256MB
hot_standby_feedback = off
"""
HBA = """
local all all peer map=root
local replication all peer map=root
hostssl all all 127.0.0.1/32 scram-sha-256
hostssl replication all 127.0.0.1/32 scram-sha-256
"""


def installed(say: Callable[[str], None]) -> Path:
    """The root file system, made once for each image of Debian 13 and kept in .cache."""
    tarball = image.ensure("trixie", CACHE / "hosts", say)
    root = CACHE / "postgres" / tarball.stem
    with locked(CACHE / "postgres.lock"):
        if not root.exists():
            say(f"PostgreSQL of Debian 13: install it (about 20 s, then kept in {root})")
            shutil.rmtree(root.parent, ignore_errors=True)
            aside = root.with_name(f"{root.name}.part")
            aside.mkdir(parents=True)
            _run("tar", "--extract", f"--file={tarball}", f"--directory={aside}", "--numeric-owner")
            _run("unshare", "--mount", "sh", "-c", INSTALL, "sh", str(aside))
            aside.rename(root)
    return root


@dataclass
class Server:
    """One PostgreSQL server; `directory` (short, for the socket's sake) holds its data, its socket and its keys."""

    root: Path
    directory: Path
    port: int = field(default_factory=lambda: _free_port())
    password: str = field(default_factory=secrets.token_hex, repr=False)
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def ca(self) -> Path:
        return self.directory / "server.crt"

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def initialise(self) -> None:
        """A new primary with the role and the database `ragrack`, as the role `postgres` leaves them."""
        self._own()
        self.inside("initdb", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8", "--pgdata=/mnt/data")
        (self.data / "postgresql.conf").open("a").write(CONFIG)
        (self.data / "pg_hba.conf").write_text(HBA)
        (self.data / "pg_ident.conf").write_text("root postgres postgres\nroot root postgres\n")
        self.start()
        self.sql(f"CREATE ROLE ragrack LOGIN REPLICATION PASSWORD '{self.password}'")
        self.sql("CREATE DATABASE ragrack")
        self.sql("CREATE EXTENSION vector", database="ragrack")
        self.sql("CREATE SCHEMA ragrack AUTHORIZATION ragrack", database="ragrack")

    def follow(self, primary: Server) -> None:
        """A standby of that one."""
        self._own(primary)
        self.inside(
            *["pg_basebackup", "--pgdata=/mnt/data", "--write-recovery-conf", "--checkpoint=fast", "--no-sync"],
            *["--wal-method=stream", f"--dbname=host=127.0.0.1 port={primary.port} user=ragrack sslmode=require"],
            environment={"PGPASSWORD": primary.password},
        )
        self.start()

    def start(self) -> None:
        log = (self.directory / "log").open("ab")
        command = [f"{BIN}/postgres", "-D", "/mnt/data", "-p", str(self.port)]
        self.process = subprocess.Popen(self._enter(*command), stdout=log, stderr=log)
        until = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"PostgreSQL does not start: {(self.directory / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """As if its plug were pulled: every process of it gets SIGKILL."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None
            # The namespace is torn down after its first process; until then the port may still answer.
            until = time.monotonic() + START_TIMEOUT_S
            while self._answers():
                if time.monotonic() > until:
                    raise RuntimeError(f"PostgreSQL on port {self.port} outlives its SIGKILL")
                time.sleep(0.01)

    def promote(self) -> None:
        self.sql("SELECT pg_promote(wait => true)")

    def sql(self, statement: str, database: str = "postgres") -> str:
        """As the superuser, over the socket; what psql prints."""
        at = f"host=/mnt port={self.port} dbname={database}"
        return self.inside("psql", "--no-psqlrc", "-Atqc", statement, at)

    def inside(self, program: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
        return _run(*self._enter(f"{BIN}/{program}", *arguments), environment=environment)

    def _enter(self, *command: str) -> list[str]:
        # Not root's home, where libpq would look for certificates that the server's user cannot read.
        apart = [
            "env",
            "HOME=/",
            "setpriv",
            "--pdeathsig=KILL",
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child=KILL",
        ]
        return [*apart, "sh", "-c", ENTER, "sh", str(self.root), str(self.directory), str(self.root), *command]

    def _own(self, like: Server | None = None) -> None:
        self.directory.mkdir(mode=0o755)
        if like is None:
            self.certify()
        else:
            for name in ("server.key", "server.crt"):
                shutil.copy(like.directory / name, self.directory / name)
        numbers = _run("chroot", str(self.root), "sh", "-c", "id -u postgres; id -g postgres").split()
        for path in (self.directory, *self.directory.iterdir()):
            os.chown(path, int(numbers[0]), int(numbers[1]))

    def certify(self) -> None:
        """Its own certificate, which is its own CA."""
        _run(
            *["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"],
            *["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"],
            *["-keyout", str(self.directory / "server.key"), "-out", str(self.ca)],
        )

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.directory / f".s.PGSQL.{self.port}"))
            except OSError:
                return False
        try:
            self.sql("SELECT 1")
        except RuntimeError:
            return False
        return True


def database_settings(server: Server, *others: Server) -> dict[str, object]:
    """What a `Settings` must have to find it."""
    return {
        "vector_store": "postgres",
        "postgres_hosts": tuple(one.address for one in (server, *others)),
        "postgres_sslrootcert": server.ca,
        "postgres_password": server.password,
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(*command: str, environment: dict[str, str] | None = None) -> str:
    variables = {**os.environ, "LC_ALL": "C.UTF-8", **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout
