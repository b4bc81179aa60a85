from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from ragrack.fingerprint import Fingerprint, ModelError
from ragrack.settings import Settings


def test_it_is_the_same_for_the_same_settings_and_model(settings: Settings) -> None:
    again = Settings.model_validate(settings.model_dump() | {"top_k": 9, "workers": 7, "release": "other"})
    assert Fingerprint.of(settings).digest == Fingerprint.of(again).digest
    assert len(Fingerprint.of(settings).digest) == 16


@pytest.mark.parametrize("change", [{"chunk_size": 128}, {"chunk_overlap": 0}, {"tenants": "by_folder"}])
def test_it_differs_by_what_an_index_depends_on(settings: Settings, change: dict[str, object]) -> None:
    other = Settings.model_validate(settings.model_dump() | change)
    assert Fingerprint.of(settings).digest != Fingerprint.of(other).digest


def test_one_with_vectors_elsewhere_is_another_and_the_others_are_what_they_were(settings: Settings) -> None:
    fingerprint = Fingerprint.of(settings)
    here = asdict(fingerprint)
    assert here.pop("vectors") == ""
    assert fingerprint.digest == hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:16]
    there = settings.model_copy(update={"vector_store": "qdrant"})
    assert Fingerprint.of(there).digest != fingerprint.digest


def test_it_differs_by_the_weights(settings: Settings, tmp_path: Path) -> None:
    model = json.loads((settings.embed_model_dir / "model.json").read_text())
    model["files"]["model.onnx"] = "0" * 64
    (tmp_path / "model.json").write_text(json.dumps(model))
    assert Fingerprint.of(settings, tmp_path).digest != Fingerprint.of(settings).digest


@pytest.mark.parametrize("content", [None, "no json", "[]", "{}", '{"name": "x", "dimensions": 1}'])
def test_no_model_is_refused_with_the_variable_and_the_mend(
    settings: Settings, tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "model.json").write_text(content)
    with pytest.raises(ModelError, match=r"RAGRACK_EMBED_MODEL_DIR=.*ragrack\.build_minilm"):
        Fingerprint.of(settings, tmp_path)
