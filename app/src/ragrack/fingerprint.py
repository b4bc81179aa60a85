"""What an index was built with: a release opens only a snapshot whose fingerprint is its own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ragrack.settings import Settings

SCHEMA_VERSION = 2
"""Raise it when the files of a snapshot, or the text that the readers draw from a document, change."""

QDRANT = "qdrant"


class ModelError(ValueError):
    """The embedding model's directory is missing, incomplete or not what its model.json says."""


@dataclass(frozen=True)
class Fingerprint:
    """Everything that makes two indexes of the same documents incompatible or different."""

    embedding: str
    model_sha256: str
    dimensions: int
    node_parser: str
    chunk_size: int
    chunk_overlap: int
    tenants: str
    vectors: str = ""
    """Where they are if not beside the nodes."""
    schema_version: int = SCHEMA_VERSION

    @property
    def digest(self) -> str:
        """16 hex digits: the name of the directory that holds the snapshots."""
        parts = asdict(self)
        if not self.vectors:
            del parts["vectors"]  # as it was before there was a choice
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def elsewhere(self) -> Fingerprint:
        """Of the same nodes and vectors, kept the other way."""
        return replace(self, vectors="" if self.vectors else QDRANT)

    @classmethod
    def of(cls, settings: Settings, model_dir: Path | None = None) -> Fingerprint:
        """Of the settings; `model_dir` stands in for the settings' own where that is another machine's path.

        Raises ModelError when there is no readable model.json there. Of a model behind an API its name is all that is
        known: where it changes under its name, ingest anew.
        """
        if settings.embed_provider == "minilm":
            model = read_model_json(model_dir or settings.embed_model_dir)
            name, sha256, dimensions = model["name"], model["files"]["model.onnx"], model["dimensions"]
        else:
            name, sha256, dimensions = settings.embed_model or "", "", settings.embed_dimensions or 0
        return cls(
            embedding=name,
            model_sha256=sha256,
            dimensions=dimensions,
            node_parser=settings.node_parser,
            chunk_size=settings.chunk_size,
            chunk_overlap=settings.chunk_overlap,
            tenants=settings.tenants,
            vectors=QDRANT if settings.vector_store == QDRANT else "",
        )


def read_model_json(model_dir: Path) -> dict[str, Any]:
    """`{name, dimensions, max_tokens, files: {name: sha256}}`, as `ragrack.build_minilm` writes it."""
    path = model_dir / "model.json"
    try:
        model: dict[str, Any] = json.loads(path.read_text())
        missing = {"name", "dimensions", "max_tokens", "files"} - model.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"RAGRACK_EMBED_MODEL_DIR={model_dir}: {path} cannot be read ({error}). "
            "Point it at a directory that `python -m ragrack.build_minilm` wrote."
        ) from error
    if missing or "model.onnx" not in model["files"]:
        raise ModelError(
            f"RAGRACK_EMBED_MODEL_DIR={model_dir}: {path} lacks {', '.join(sorted(missing)) or 'files.model.onnx'}. "
            "Build it again with `python -m ragrack.build_minilm`."
        )
    return model
