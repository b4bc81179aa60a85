"""What the commands of `ragrack` share."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ragrack import catalog
from ragrack.settings import SECRETS, Settings, SettingsError, examine, read_env_file

if TYPE_CHECKING:
    from ragrack.catalog import Snapshots

HOST_ENV = Path("/etc/ragrack/host.env")


class RefusedError(Exception):
    """Ends the command with this message and status 1."""


def print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False))


def collections_of(settings: Settings, named: list[str] | None) -> list[str]:
    """Those named, or all. Raises RefusedError that names those there are."""
    unknown = sorted(set(named or ()) - set(settings.collections))
    if unknown:
        raise RefusedError(
            f"no such collection: {', '.join(unknown)}. Those there are: {', '.join(settings.collections)}"
        )
    return list(named or settings.collections)


def snapshots_of(settings: Settings, collection: str) -> Snapshots:
    """Its snapshots with the fingerprint of these settings. Raises RefusedError."""
    from ragrack.fingerprint import Fingerprint, ModelError

    try:
        return catalog.snapshots(settings, collection, Fingerprint.of(settings).digest)
    except ModelError as error:
        raise RefusedError(str(error)) from error


def own_release() -> Path | None:
    """The directory of the release that this program is part of; None where it was not deployed."""
    release = Path(sys.prefix).resolve().parent
    return release if (release / "app.env").is_file() and release.parent.name == "releases" else None


def settings_here() -> Settings:
    """Of the environment, or, where that names no collections, of the release that this program is part of.

    An operator has none of a unit's variables. What else is wrong with the host must not keep one from going back, so
    only the values are judged. Raises SettingsError.
    """
    environ = dict(os.environ)
    release = own_release()
    if "RAGRACK_COLLECTIONS" not in environ and release is not None:
        for path in (HOST_ENV, release / "app.env"):
            if path.exists():
                environ |= read_env_file(path)[0]
        environ["RAGRACK_EMBED_MODEL_DIR"] = str(next(release.glob("models/*"), release / "models"))
    secrets = unsealed(release / "credentials") if release else {}
    settings, problems = examine(environ, on_host=False, secrets=secrets)
    if settings is None or problems:
        raise SettingsError(problems)
    return settings


def unsealed(credentials: Path) -> dict[str, str]:
    """The secrets by field that lie in a directory sealed by systemd-creds.

    Who may not read it, as anybody but root, gets none. Raises RefusedError for one that this host cannot open.
    """
    opened = {}
    for field, name in SECRETS.items():
        path = credentials / field
        if not os.access(path, os.R_OK):
            continue
        asked = ["systemd-creds", "decrypt", f"--name={name}", str(path), "-"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RefusedError(
                f"the credential {field} cannot be opened on this host ({done.stderr.strip()}). Mend: deploy again, "
                "which seals it anew"
            )
        opened[field] = done.stdout.strip()
    return opened


def act_as_owner(directory: Path) -> None:
    """Root goes on as whoever owns the directory, so that what is written there stays the service's to change."""
    if os.geteuid() != 0 or not directory.exists():
        return
    uid = directory.stat().st_uid
    if uid == 0:
        return
    try:
        user = pwd.getpwuid(uid)
        gid, groups = user.pw_gid, os.getgrouplist(user.pw_name, user.pw_gid)
    except KeyError:
        gid, groups = directory.stat().st_gid, []
    os.setgroups(groups)
    os.setgid(gid)
    os.setuid(uid)
