from __future__ import annotations

import asyncio
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from llama_index.core.schema import TextNode
from ragrack.embedding import MiniLMEmbedding, tenant
from ragrack.fingerprint import ModelError

TEXTS = ["VACUUM reclaims dead rows.", "A partial index has a predicate.", "short", "word " * 400]


def cosine(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def test_vectors_have_unit_length_and_384_dimensions(embedding: MiniLMEmbedding) -> None:
    for vector in embedding.get_text_embedding_batch([*TEXTS, ""]):
        assert len(vector) == 384
        assert math.isclose(cosine(vector, vector), 1, abs_tol=1e-5)


async def test_a_text_has_one_vector_however_it_is_asked_for(embedding: MiniLMEmbedding) -> None:
    alone = [embedding.get_text_embedding(text) for text in TEXTS]
    assert embedding.get_text_embedding_batch(TEXTS) == alone
    assert embedding.get_text_embedding_batch(TEXTS[::-1]) == alone[::-1]
    assert [embedding.get_query_embedding(text) for text in TEXTS] == alone
    assert await embedding.aget_text_embedding_batch(TEXTS) == alone
    assert await asyncio.gather(*(embedding.aget_query_embedding(text) for text in TEXTS)) == alone


def test_what_is_past_the_limit_is_not_seen(embedding: MiniLMEmbedding) -> None:
    assert embedding.get_text_embedding("word " * 254) == embedding.get_text_embedding("word " * 254 + "another")
    assert embedding.get_text_embedding("word " * 253) != embedding.get_text_embedding("word " * 253 + "another")


def test_a_question_is_nearest_to_the_text_that_answers_it(embedding: MiniLMEmbedding) -> None:
    question = embedding.get_query_embedding("How do I get rid of dead rows?")
    similarities = [cosine(question, vector) for vector in embedding.get_text_embedding_batch(TEXTS)]
    assert max(similarities) == similarities[0]
    assert similarities[0] > 0.4


def test_it_is_a_transformation_of_a_pipeline(embedding: MiniLMEmbedding) -> None:
    nodes = embedding([TextNode(text=text) for text in TEXTS])
    assert [node.embedding for node in nodes] == embedding.get_text_embedding_batch(TEXTS)


def test_its_name_is_that_of_its_weights(embedding: MiniLMEmbedding) -> None:
    assert embedding.model_name.startswith("all-minilm-l6-v2@")


def test_the_event_loop_goes_on_while_texts_are_embedded(embedding: MiniLMEmbedding) -> None:
    async def ticks_while_embedding() -> int:
        task = asyncio.ensure_future(embedding.aget_text_embedding_batch(["word " * 254] * 20))
        ticks = 0
        while not task.done():
            await asyncio.sleep(0)
            ticks += 1
        return ticks

    assert asyncio.run(ticks_while_embedding()) > 20


def test_importing_it_loads_no_torch() -> None:
    code = (
        "import sys, ragrack.embedding; "
        "sys.exit(', '.join({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'onnx'}) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_directory_without_a_model_is_refused_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"RAGRACK_EMBED_MODEL_DIR=.*ragrack\.build_minilm"):
        MiniLMEmbedding.load(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "words.bin", "tokenizer.json", "model.json"])
def test_a_damaged_model_is_refused_with_the_mend(model_dir: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(b"{")
    with pytest.raises(ModelError, match=r"ragrack\.build_minilm"):
        MiniLMEmbedding.load(tmp_path / "model")


def test_nothing_is_left_in_the_home_directory_and_nobody_is_told(model_dir: Path, tmp_path: Path) -> None:
    code = "import sys, pathlib, ragrack.embedding as e; e.MiniLMEmbedding.load(pathlib.Path(sys.argv[1])).close()"
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-c", code, model_dir], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []


async def test_the_texts_asked_for_last_are_kept_and_their_vectors_are_the_same(model_dir: Path) -> None:
    model = MiniLMEmbedding.load(model_dir, keep=2)
    fresh = MiniLMEmbedding.load(model_dir)
    try:
        texts = ["one", "two", "three", "three"]
        first = await model.aget_text_embedding_batch(texts)
        assert len(model._kept._vectors) == 2
        assert await model.aget_text_embedding_batch(texts) == first == await fresh.aget_text_embedding_batch(texts)
        assert model.get_text_embedding_batch(texts) == first
        assert not fresh._kept._vectors
        assert await model.aget_query_embedding("three") == first[2]
    finally:
        model.close()
        fresh.close()


async def test_a_vector_that_one_tenant_left_is_not_there_for_another(model_dir: Path) -> None:
    model = MiniLMEmbedding.load(model_dir, keep=10)
    try:
        for name, kept in (("a", 1), ("b", 2), ("a", 2), (None, 3)):
            tenant.set(name)
            await model.aget_query_embedding("Who asked this before?")
            assert len(model._kept._vectors) == kept
    finally:
        model.close()
