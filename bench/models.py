"""The embedding model that every bench measures with."""

from __future__ import annotations

import sys
from pathlib import Path

from ragrack import build_minilm

MODELS = Path(__file__).parents[1] / ".cache/models"


def newest_model() -> Path:
    """The directory of the one that was built last. Ends the bench, with the mend, where there is none."""
    found = sorted(MODELS.glob(f"{build_minilm.NAME}-*/model.json"))
    if not found:
        sys.exit("There is no embedding model yet. Mend: bin/test app/tests/test_embedding.py builds it into .cache.")
    return max(found, key=lambda path: path.stat().st_mtime).parent
