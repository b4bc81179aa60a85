"""The artifact as it lies on a host: a manifest, wheels for each Python of the fleet, the app's wheel and models."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .release_state import StateError

BLOCK = 4096
SHIP_AGAIN = "ship the artifact again"
SIGNER = "ragrack"
SIGNED_FOR = "ragrack-artifact"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_signature(manifest: Path, signature: str, signers: Path) -> None:
    """Raises StateError unless one of the keys that `signers` lists (ssh's ALLOWED SIGNERS) has signed the manifest."""
    asked = ["ssh-keygen", "-Y", "verify", "-f", str(signers), "-I", SIGNER, "-n", SIGNED_FOR]
    with tempfile.NamedTemporaryFile("w", prefix="ragrack-", suffix=".sig") as file:
        file.write(signature)
        file.flush()
        done = subprocess.run([*asked, "-s", file.name], input=manifest.read_bytes(), capture_output=True, check=False)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).decode(errors="replace").split())
        raise StateError(
            f"artifact_dir: {manifest} is not signed by a key that {signers} names ({said}); deploy from where such a "
            "key is, or name the key in release_signers and run playbooks/site.yml. Nothing was changed"
        )


@dataclass(frozen=True)
class ArtifactFile:
    sha256: str
    size: int


@dataclass(frozen=True)
class Artifact:
    """What manifest.json says; `files` by their path in the artifact."""

    dir: Path
    name: str
    version: str
    digest: str
    pythons: list[str]
    platform: str
    files: dict[str, ArtifactFile]

    @classmethod
    def load(cls, directory: Path) -> Artifact:
        """Raises StateError for a manifest that is missing or not one."""
        path = directory / "manifest.json"
        try:
            facts = json.loads(path.read_text())
            files = {
                name: ArtifactFile(str(file["sha256"]), int(file["size"])) for name, file in facts["files"].items()
            }
            artifact = cls(
                directory,
                str(facts["name"]),
                str(facts["version"]),
                str(facts["digest"]),
                [str(python) for python in facts["pythons"]],
                str(facts["platform"]),
                files,
            )
        except FileNotFoundError:
            raise StateError(f"artifact_dir: there is no {path}; {SHIP_AGAIN}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateError(
                f"artifact_dir: {path} is not a manifest ({type(error).__name__}: {error}); {SHIP_AGAIN}"
            ) from error
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise StateError(f"artifact_dir: {path} names {name}, which is outside of the artifact; build it again")
        return artifact

    def verify(self) -> None:
        """Raises StateError that names every file which is missing, is not what the manifest says, or is not in it."""
        wrong = []
        for name, expected in self.files.items():
            path = self.dir / name
            if not path.is_file():
                wrong.append(f"{name} is missing")
            elif path.stat().st_size != expected.size:
                wrong.append(f"{name} has {path.stat().st_size} bytes where the manifest has {expected.size}")
            elif (found := sha256(path)) != expected.sha256:
                wrong.append(f"{name} has SHA-256 {found[:12]}... where the manifest has {expected.sha256[:12]}...")
        there = {str(path.relative_to(self.dir)) for path in self.dir.rglob("*") if not path.is_dir()}
        wrong += [f"{name} is in no manifest" for name in sorted(there - set(self.files) - {"manifest.json"})]
        if wrong:
            shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise StateError(f"artifact_dir: {self.dir} is not what was built: {shown}; {SHIP_AGAIN}")

    def check_fits(self, python: str, machine: str) -> None:
        """Raises StateError where the artifact was built for other Pythons (as 3.13) or machines (as x86_64)."""
        if python not in self.pythons:
            raise StateError(
                f"python: this host has Python {python}, the artifact was built for {', '.join(self.pythons)}; "
                f"build it for {python} as well"
            )
        if machine != self.platform:
            raise StateError(
                f"artifact_dir: this host is {machine}, the artifact was built for {self.platform}; "
                f"build it for {machine}"
            )

    def requirements(self, python: str) -> str:
        """The path in the artifact of the locked third-party packages for a Python."""
        name = f"requirements-{python}.txt"
        if name not in self.files:
            raise StateError(f"artifact_dir: the manifest of {self.dir} has no {name}; build the artifact again")
        return name

    def app_wheel(self) -> str:
        wheels = [name for name in self.files if name.startswith("app/") and name.endswith(".whl")]
        if len(wheels) != 1:
            raise StateError(
                f"artifact_dir: the manifest of {self.dir} has {len(wheels)} wheels below app/ where one belongs; "
                "build the artifact again"
            )
        return wheels[0]

    def models(self) -> list[str]:
        return [name for name in self.files if name.startswith("models/")]

    def wheels(self, python: str) -> Iterator[Path]:
        """The third-party wheels that this Python can take, judged by their names."""
        tag = "cp" + python.replace(".", "")
        for name in self.files:
            if name.startswith("wheels/") and name.endswith(".whl"):
                pythons, abi, _ = PurePosixPath(name).stem.rsplit("-", 3)[1:]
                if tag in pythons.split(".") or abi == "abi3" or "py3" in pythons.split("."):
                    yield self.dir / name


def installed_bytes(wheel: Path) -> int:
    """Bytes that a wheel takes on disk once installed and byte-compiled, rounded up to blocks."""
    total = 0
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            total += _blocks(entry.file_size)
            if entry.filename.endswith(".py"):
                total += 2 * _blocks(entry.file_size)  # its .pyc, which is seldom larger than twice the source
    return total


def _blocks(size: int) -> int:
    return (size // BLOCK + 1) * BLOCK
