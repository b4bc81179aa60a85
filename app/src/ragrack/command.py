"""What the commands of `ragrack` share."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ragrack.settings import Settings
    from ragrack.snapshot import SnapshotDir


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


def directory_of(settings: Settings, collection: str) -> SnapshotDir:
    """Its snapshots with the fingerprint of these settings. Raises RefusedError."""
    from ragrack.fingerprint import Fingerprint, ModelError
    from ragrack.snapshot import SnapshotDir

    try:
        return SnapshotDir(settings.index_dir, collection, Fingerprint.of(settings).digest)
    except ModelError as error:
        raise RefusedError(str(error)) from error
