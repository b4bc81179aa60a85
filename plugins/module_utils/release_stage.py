"""Build a release from an artifact, aside, so that it is there as a whole or not at all.

Third-party packages are installed and byte-compiled once for each lock, in the cache; a release hard-links them, so
that it is complete in itself and yet a change of code costs no more than the app's own wheel.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .release_artifact import Artifact, installed_bytes, sha256
from .release_state import STAGING, Releases, StateError, fsync_dir, now

MIB = 2**20


@dataclass
class Stager:
    """What a release is made of and where. `seconds` holds what each step took."""

    releases: Releases
    id: str
    artifact: Artifact
    env: str
    credentials: Path | None
    gid: int
    python: Path
    python_version: str
    uv: Path
    cache: Path
    run_dir: Path
    run: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def env_name(self) -> str:
        lock = self.artifact.files[self.artifact.requirements(self.python_version)].sha256
        return f"{lock[:32]}-{self.python_version}"

    @property
    def cached_env(self) -> Path:
        return self.cache / "envs" / self.env_name

    @property
    def has_env(self) -> bool:
        return (self.cached_env / "manifest.sha256").is_file()

    def check_space(self, min_free_mb: int) -> None:
        """Raises StateError where what is to be written would leave less than `min_free_mb` MiB."""
        here, there = existing_parent(self.releases.dir), existing_parent(self.cache)
        one_disk = here.stat().st_dev == there.stat().st_dev
        packages = 0 if self.has_env else sum(map(installed_bytes, self.artifact.wheels(self.python_version)))
        models = {self.artifact.files[name].sha256: self.artifact.files[name].size for name in self.artifact.models()}
        unseen = sum(size for digest, size in models.items() if not (self.cache / "files" / digest).is_file())
        app = installed_bytes(self.artifact.dir / self.artifact.app_wheel())
        needs = {here: app, there: packages + unseen} if not one_disk else {here: app + packages + unseen}
        if not one_disk:
            cached = sum(path.stat().st_size for path in self.cached_env.rglob("*") if path.is_file())
            needs[here] += max(packages, cached) + sum(models.values())
        for path, need in needs.items():
            free = shutil.disk_usage(path).free
            if free < need + min_free_mb * MIB:
                raise StateError(
                    f"{path} has {free / MIB:.0f} MiB free; release {self.id} needs {need / MIB:.0f} MiB there and "
                    f"{min_free_mb} MiB are to stay free (min_free_mb); free some space or keep fewer releases. "
                    "Nothing was changed"
                )

    def build(self) -> bool:
        """Make the release. Returns whether the environment had to be installed. Nothing is left where it raises."""
        for directory in (self.releases.dir, self.cache / "envs", self.cache / "files"):
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        # An uv that outlived its killed run may still write below the old name: ours is another.
        for stale in (*self.releases.leftovers(), *self.cache.glob(f"envs/{STAGING}*")):
            shutil.rmtree(stale, ignore_errors=True)
        aside = self.releases.dir / f"{STAGING}{self.id}.{os.getpid()}"
        try:
            with self._timed("packages"):
                installed = self._ensure_env()
            with self._timed("link"):
                aside.mkdir(mode=0o755)
                copy_tree(self.cached_env / "venv", aside / "venv")
            with self._timed("app"):
                app_files = self._install_app(aside / "venv")
            self._write(aside, app_files)
            with self._timed("sync"):
                sync_file_system(aside)
                aside.rename(self.releases.path(self.id))
                fsync_dir(self.releases.dir)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StateError(
                    f"the disk filled up while release {self.id} was built; nothing was changed"
                ) from error
            raise StateError(f"release {self.id} could not be built: {error}; nothing was changed") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return installed

    def _ensure_env(self) -> bool:
        if self.has_env:
            return False
        aside = self.cache / "envs" / f"{STAGING}{self.env_name}.{os.getpid()}"
        try:
            venv = aside / "venv"
            requirements = self.artifact.dir / self.artifact.requirements(self.python_version)
            with self._uv_cache(aside) as uv:
                uv("venv", "--relocatable", "--no-project", "--python", self.python, venv)
                uv(
                    *("pip", "install", "--python", venv / "bin/python", "--require-hashes", "--no-deps"),
                    *("--no-index", "--find-links", self.artifact.dir / "wheels", "--only-binary", ":all:"),
                    *("-r", requirements),
                )
            (venv / ".lock").unlink(missing_ok=True)
            compile_bytecode(venv, [site_packages(venv)], jobs="0")
            (aside / "manifest.sha256").write_text(listing(hashes(venv)))
            sync_file_system(aside)
            shutil.rmtree(self.cached_env, ignore_errors=True)
            aside.rename(self.cached_env)
            fsync_dir(self.cached_env.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return True

    def _install_app(self, venv: Path) -> dict[str, str]:
        wheel = self.artifact.dir / self.artifact.app_wheel()
        with self._uv_cache(venv.parent) as uv:
            uv(
                *("pip", "install", "--python", venv / "bin/python", "--no-deps", "--no-index"),
                *("--find-links", wheel.parent, f"{self.artifact.name}=={self.artifact.version}"),
            )
        (venv / ".lock").unlink(missing_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            tops = {Path(name).parts[0] for name in archive.namelist()}
        venv = venv.resolve()
        packages = site_packages(venv)
        compile_bytecode(venv, [packages / top for top in sorted(tops) if not top.endswith((".dist-info", ".data"))])
        [record] = packages.glob(f"{self.artifact.name}-*.dist-info/RECORD")
        installed = {(packages / row[0]).resolve() for row in csv.reader(record.read_text().splitlines())}
        compiled = (pyc for top in tops for pyc in (packages / top).rglob("*.pyc"))
        return {str(path.relative_to(venv)): sha256(path) for path in (*installed, *compiled)}

    def _write(self, aside: Path, app_files: Mapping[str, str]) -> None:
        listed = {f"venv/{name}": digest for name, digest in app_files.items()}
        for line in (self.cached_env / "manifest.sha256").read_text().splitlines():
            digest, name = line.split("  ", 1)
            listed.setdefault(f"venv/{name}", digest)
        for name in self.artifact.models():
            place(self._cached_file(name), aside / name)
            listed[name] = self.artifact.files[name].sha256
        env = self.env if self.env.endswith("\n") else self.env + "\n"
        (aside / "app.env").write_text(env)
        listed["app.env"] = hashlib.sha256(env.encode()).hexdigest()
        os.chown(aside / "app.env", -1, self.gid)
        (aside / "app.env").chmod(0o640)
        if self.credentials is not None:
            (aside / "credentials").symlink_to(self.credentials)
        (aside / "run").symlink_to(self.run_dir / self.id)
        manifest = listing(listed)
        (aside / "manifest.sha256").write_text(manifest)
        facts = {
            "id": self.id,
            "version": self.artifact.version,
            "artifact": self.artifact.digest,
            "python": self.python_version,
            "env": self.env_name,
            "created": now(),
            "manifest": hashlib.sha256(manifest.encode()).hexdigest(),
        }
        (aside / "release.json").write_text(json.dumps(facts, indent=1) + "\n")

    def _cached_file(self, name: str) -> Path:
        """A file of the artifact in the cache, which no later delivery of an artifact writes to."""
        cached = self.cache / "files" / self.artifact.files[name].sha256
        if not cached.is_file():
            aside = cached.with_name(f"{STAGING}{cached.name}")
            try:
                shutil.copyfile(self.artifact.dir / name, aside)
                if sha256(aside) != cached.name:
                    raise StateError(f"artifact_dir: {name} changed while it was copied; ship the artifact again")
                aside.chmod(0o644)
                aside.rename(cached)
            finally:
                aside.unlink(missing_ok=True)
        return cached

    @contextmanager
    def _uv_cache(self, directory: Path) -> Iterator[Callable[..., None]]:
        """uv with a cache below `directory`, from where it hard-links, and which is gone after: ours is `cache`."""
        cache = directory / ".uv"

        def uv(*arguments: str | Path) -> None:
            closed = ["--offline", "--no-config", "--no-python-downloads"]
            command("uv", [self.uv, *arguments, *closed, "--quiet", "--cache-dir", cache], self.id)

        yield uv
        shutil.rmtree(cache)

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[step] = round(time.monotonic() - began, 3)


def host_python(python: Path) -> tuple[str, str]:
    """The version (as 3.13) and machine (as x86_64) of an interpreter."""
    code = "import platform, sys; print('%d.%d' % sys.version_info[:2], platform.machine())"
    version, machine = command("python", [python, "-I", "-c", code], "").split()
    return version, machine


def existing_parent(path: Path) -> Path:
    """The path, or the nearest directory above that exists."""
    return next(parent for parent in (path, *path.parents) if parent.exists())


def command(tool: str, arguments: list[str | Path], release: str) -> str:
    """Run a command and return what it printed. Raises StateError with its last words."""
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": "/nonexistent"}
    try:
        done = subprocess.run(
            [str(argument) for argument in arguments], env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise StateError(
            f"{tool}: there is no {arguments[0]} on this host; run the playbook that prepares it"
        ) from None
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines()
        if any(os.strerror(errno.ENOSPC) in line for line in words):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        shown = " ".join(str(argument) for argument in arguments[1:4])
        raise StateError(
            f"`{tool} {shown} ...` failed with exit code {done.returncode}"
            + (f" while release {release} was built; nothing was changed" if release else ""),
            words[-50:],
        )
    return done.stdout


def site_packages(venv: Path) -> Path:
    return next((venv / "lib").glob("python*")) / "site-packages"


def compile_bytecode(venv: Path, paths: list[Path], jobs: str = "1") -> None:
    """Byte-compile once and for all: nothing on the host checks the sources again, as a release never changes."""
    # -S: the packages have a say in how Python starts, which compiling them neither needs nor should wait for.
    compiler: list[str | Path] = [venv / "bin/python", "-I", "-S", "-m", "compileall", "-q", "-j", jobs]
    done = subprocess.run(
        [*compiler, "--invalidation-mode", "unchecked-hash", *paths],
        capture_output=True,
        text=True,
        check=False,  # packages bring templates that are no Python of this version; nobody imports them
    )
    if os.strerror(errno.ENOSPC) in done.stdout + done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def files_below(directory: Path) -> Iterator[Path]:
    """Regular files, links left out."""
    for path, _, names in os.walk(directory):
        for name in names:
            file = Path(path, name)
            if not file.is_symlink():
                yield file


def hashes(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): sha256(path) for path in files_below(directory)}


def listing(digests: Mapping[str, str]) -> str:
    """In the form of sha256sum, so that `sha256sum --check --quiet manifest.sha256` finds drift."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def copy_tree(source: Path, target: Path) -> None:
    """Hard-link a tree, or copy it to another file system."""
    same = source.stat().st_dev == target.parent.stat().st_dev
    command("cp", ["cp", "-a", *(["-l"] if same else []), source, target], "")


def place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EMLINK, errno.EPERM):
            raise
        shutil.copyfile(source, target)


def sync_file_system(path: Path) -> None:
    """One flush for thousands of files: `sync --file-system` is syncfs(2), which Python does not have."""
    command("sync", ["sync", "--file-system", path], "")


def unused_cache(cache: Path, envs_in_use: set[str]) -> list[Path]:
    """Environments that no release is made of, files that no release links, and what was left half made."""
    unused = [path for path in sorted(cache.glob("envs/*")) if path.name not in envs_in_use]
    unused += [path for path in sorted(cache.glob("files/*")) if path.stat().st_nlink == 1]
    return unused
