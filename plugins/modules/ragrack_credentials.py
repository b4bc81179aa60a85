#!/usr/bin/python
"""The credentials of the service as they lie on a host: sealed, a directory for each generation."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ragrack_credentials
short_description: Keep a generation of credentials on a host, sealed by systemd-creds
description:
  - Writes each credential sealed (C(systemd-creds encrypt)), so that root and the unit that loads it
    (C(LoadCredentialEncrypted)) alone get at its value. A generation is there as a whole or not at all.
  - A value that is sealed already is left alone; one that this host cannot open, as after a restore to another
    machine, is sealed anew.
  - Values that lie in clear in the store, from before they were sealed, are sealed where they are.
  - Needs systemd 250 or later.
options:
  store: {description: The directory of the generations., type: path, default: /etc/ragrack/credstore}
  generation:
    description: Name of the directory below O(store); without it only what lies in clear is sealed.
    type: str
  credentials: {description: 'The values by name, as C(llm_api_key).', type: dict, default: {}}
  key:
    description: What seals them, the host's key (C(/var/lib/systemd/credential.secret)), its TPM, or both.
    type: str
    choices: [host, tpm2, host+tpm2]
    default: host
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
- name: Write the credentials of this generation
  ragrack_credentials:
    generation: 0123456789ab
    credentials:
      llm_api_key: "{{ vault_llm_api_key }}"
"""

RETURN = r"""
sealed: {description: 'What was sealed, as GENERATION/NAME.', type: list, elements: str, returned: success}
"""

import base64
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ansible.module_utils.basic import AnsibleModule

if TYPE_CHECKING:
    from module_utils.release_state import STAGING, fsync_dir, write_atomically
else:
    from ansible.module_utils.release_state import STAGING, fsync_dir, write_atomically

SHORTEST_SEALED = 80
"""Bytes that the header, the nonce and the tag of a sealed value take at the least."""


class CredentialsError(Exception):
    """Ends the module with this message."""


@dataclass(frozen=True)
class Seal:
    """systemd-creds with one kind of key. The name is sealed with the value, as the unit loads it."""

    key: str

    def close(self, path: Path, value: str) -> None:
        """Write the value to a file, sealed."""
        options = [f"--with-key={self.key}", f"--name=credentials_{path.name}"]
        write_atomically(path, self._run("encrypt", *options, "-", "-", text=value.encode()).decode(), 0o600)

    def open(self, path: Path) -> str | None:
        """The value, or None for what this host cannot open."""
        try:
            return self._run("decrypt", f"--name=credentials_{path.name}", str(path), "-").decode()
        except (CredentialsError, UnicodeDecodeError):
            return None

    def _run(self, *arguments: str, text: bytes = b"") -> bytes:
        try:
            done = subprocess.run(["systemd-creds", *arguments], input=text, capture_output=True, check=False)
        except FileNotFoundError:
            raise CredentialsError("there is no systemd-creds. Mend: use a host with systemd 250 or later") from None
        if done.returncode:
            raise CredentialsError(f"systemd-creds {arguments[0]}: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout


def in_clear(path: Path) -> bool:
    """Whether a file of the store is no sealed value, judged by its form, as its key may be gone."""
    try:
        return len(base64.b64decode(b"".join(path.read_bytes().split()), validate=True)) < SHORTEST_SEALED
    except ValueError:
        return True


def seal_what_lies_in_clear(store: Path, seal: Seal, *, check: bool) -> list[str]:
    clear = [path for path in sorted(store.glob("[!.]*/[!.]*")) if in_clear(path)]
    for path in clear if not check else ():
        seal.close(path, path.read_text())
    return [f"{path.parent.name}/{path.name}" for path in clear]


def keep(store: Path, generation: str, values: dict[str, str], seal: Seal, *, check: bool) -> list[str]:
    """Have the generation hold these values and no others. Returns what had to be sealed."""
    place = store / generation
    there = {path.name for path in place.iterdir()} if place.is_dir() else set()
    wanted = {name for name, value in values.items() if name not in there or seal.open(place / name) != value}
    if place.is_dir() and not wanted and there == set(values):
        return []
    if not check and place.is_dir():
        # A release may start from it at this moment: each value is replaced in place.
        for name in wanted:
            seal.close(place / name, values[name])
        for name in there - set(values):
            (place / name).unlink()
        fsync_dir(place)
    elif not check:
        aside = store / f"{STAGING}{generation}"
        shutil.rmtree(aside, ignore_errors=True)
        store.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside.mkdir(mode=0o700)
        for name, value in values.items():
            seal.close(aside / name, value)
        aside.rename(place)
        fsync_dir(store)
    return [f"{generation}/{name}" for name in sorted(wanted)] or [f"{generation}/"]


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "store": {"type": "path", "default": "/etc/ragrack/credstore"},
            "generation": {"type": "str"},
            "credentials": {"type": "dict", "default": {}, "no_log": True},
            "key": {"type": "str", "choices": ["host", "tpm2", "host+tpm2"], "default": "host", "no_log": False},
        },
        supports_check_mode=True,
    )
    asked, check = module.params, module.check_mode
    store, seal = Path(asked["store"]), Seal(asked["key"])
    values = {str(name): str(value) for name, value in asked["credentials"].items()}
    try:
        sealed = seal_what_lies_in_clear(store, seal, check=check)
        if asked["generation"]:
            found = keep(store, asked["generation"], values, seal, check=check)
            sealed += [one for one in found if one not in sealed]
    except (CredentialsError, OSError) as error:
        module.fail_json(msg=f"The credentials could not be sealed: {error}")
    module.exit_json(changed=bool(sealed), sealed=sealed)


if __name__ == "__main__":
    main()
