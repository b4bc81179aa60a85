"""What `bin/bench index` fills an index with: nodes as an ingest makes them, in any number, the same in every run.

A document is a dozen sentences of two pages of PostgreSQL's manual; each of its eight nodes has four of them, and for
its vector a mixture of their real embeddings (MiniLM's) with some noise, of unit length. Made so, they lie among each
other and to questions much as the manual's real nodes do, at 8,339 nodes of either kind:

    similarity, quartiles                  real                 made
    of a node to the nearest               0.72 0.78 0.83       0.71 0.78 0.85
    of a node to the tenth nearest         0.58 0.62 0.66       0.49 0.54 0.58
    of a question to the nearest           0.56 0.65 0.74       0.56 0.61 0.68
    of a question to the tenth nearest     0.44 0.49 0.55       0.46 0.51 0.55
    local dimension as a question sees it  17.1                 18.5

Questions are sentences that no node was made of, and the golden questions, all embedded for real.

The first tenth of the documents is the tenant `big`'s, the rest that of ninety who have a hundredth each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from llama_index.core.schema import NodeRelationship, ObjectType, RelatedNodeInfo, TextNode
from ragrack.embedding import MiniLMEmbedding
from ragrack.extract import Limits
from ragrack.files import find_documents
from ragrack.readers import DocumentReader
from ragrack.sentences import split_sentences
from ragrack.settings import Settings

Floats = np.ndarray[Any, np.dtype[np.float32]]

SENTENCES_OF_A_PAGE = 24
SENTENCE_CHARACTERS = range(40, 401)
HELD_OUT = 50
"""One sentence of so many is a question."""
PAGES_OF_A_DOCUMENT = 2
SENTENCES_OF_A_DOCUMENT = 12
NODES_OF_A_DOCUMENT = 8
SENTENCES_OF_A_NODE = 4
NOISE = 0.3
"""The noise's length, that of the mixture being one."""
BLOCK = 8_000
"""Nodes made at a time: a multiple of a document's."""
BIG = "big"
SMALL_TENANTS = 90
UNSEEN = ["document", "tenant"]


@dataclass(frozen=True)
class Corpus:
    """Sentences and their embeddings, page by page; `starts` has the first sentence of each page, and the end."""

    sentences: Sequence[str]
    vectors: Floats
    starts: np.ndarray[Any, np.dtype[np.int64]]
    questions: Sequence[str]
    question_vectors: Floats

    @classmethod
    def of(cls, pages: Path, golden: Path, model: Path, cache: Path, threads: int) -> Corpus:
        """Embeds some 17 thousand sentences where `cache` has no file for these pages and this model."""
        texts, starts, held_out = _sentences(pages)
        questions = [item["question"] for item in yaml.safe_load(golden.read_text())["questions"]] + held_out
        name = hashlib.sha256(json.dumps([texts, questions, (model / "model.json").read_text()]).encode()).hexdigest()
        kept = cache / f"sentences-{name[:16]}.npy"
        if kept.exists():
            vectors = np.load(kept)
        else:
            embedding = MiniLMEmbedding.load(model, threads)
            vectors = np.asarray(embedding.get_text_embedding_batch([*texts, *questions]), dtype=np.float32)
            embedding.close()
            cache.mkdir(parents=True, exist_ok=True)
            np.save(kept, vectors)
        return cls(texts, vectors[: len(texts)], np.array(starts), questions, vectors[len(texts) :])

    def blocks(self, count: int, seed: int = 7) -> Iterator[tuple[Floats, Sequence[Sequence[int]]]]:
        """The vectors of `count` nodes, a block at a time, with the sentences that each is made of."""
        documents = BLOCK // NODES_OF_A_DOCUMENT
        for start in range(0, count, BLOCK):
            rng = np.random.default_rng([seed, start])
            # A page is taken as often as its sentences are many.
            some = rng.integers(0, len(self.sentences), (documents, PAGES_OF_A_DOCUMENT))
            pages = np.searchsorted(self.starts, some, side="right") - 1
            page = np.take_along_axis(
                pages, rng.integers(0, PAGES_OF_A_DOCUMENT, (documents, SENTENCES_OF_A_DOCUMENT)), 1
            )
            first, length = self.starts[page], self.starts[page + 1] - self.starts[page]
            pool = np.repeat(first + (rng.random(page.shape) * length).astype(np.int64), NODES_OF_A_DOCUMENT, axis=0)
            parts = np.take_along_axis(pool, rng.integers(0, SENTENCES_OF_A_DOCUMENT, (BLOCK, SENTENCES_OF_A_NODE)), 1)
            weights = rng.dirichlet(np.ones(SENTENCES_OF_A_NODE), BLOCK).astype(np.float32)
            mixed = _unit(np.einsum("np,npd->nd", weights, self.vectors[parts]))
            noise = rng.standard_normal(mixed.shape, dtype=np.float32) * (NOISE / np.sqrt(mixed.shape[1]))
            made = _unit(mixed + noise)
            size = min(BLOCK, count - start)
            yield made[:size], parts[:size].tolist()

    def nodes(self, count: int, seed: int = 7) -> Iterator[TextNode]:
        """With their embeddings, in the order of an ingest: by document."""
        for block, (vectors, parts) in enumerate(self.blocks(count, seed)):
            for offset, (vector, sentences) in enumerate(zip(vectors, parts, strict=True)):
                number = block * BLOCK + offset
                text = " ".join(self.sentences[sentence] for sentence in sentences)
                yield _node(number, count, text, vector.tolist())


def tenant_of(number: int, count: int) -> str:
    """Whose the node with this number is, of `count`."""
    share = number // NODES_OF_A_DOCUMENT * NODES_OF_A_DOCUMENT * 100 // count
    return BIG if share < 100 - SMALL_TENANTS else f"t{share - (100 - SMALL_TENANTS):02}"


def node_id(number: int, count: int) -> str:
    return f"{_document(number, count)}#{number % NODES_OF_A_DOCUMENT}"


def _document(number: int, count: int) -> str:
    return f"{tenant_of(number, count)}/{number // NODES_OF_A_DOCUMENT:07}.html"


def _node(number: int, count: int, text: str, vector: list[float]) -> TextNode:
    tenant, place = tenant_of(number, count), number % NODES_OF_A_DOCUMENT
    document = _document(number, count)
    metadata = {"document": document, "title": text[:40], "tenant": tenant}
    related = {NodeRelationship.SOURCE: _related(document, ObjectType.DOCUMENT, metadata)}
    if place > 0:
        related[NodeRelationship.PREVIOUS] = _related(f"{document}#{place - 1}", ObjectType.TEXT, metadata)
    if place < NODES_OF_A_DOCUMENT - 1:
        related[NodeRelationship.NEXT] = _related(f"{document}#{place + 1}", ObjectType.TEXT, {})
    return TextNode(
        id_=node_id(number, count),
        text=text,
        metadata=metadata,
        embedding=vector,
        excluded_embed_metadata_keys=UNSEEN,
        excluded_llm_metadata_keys=UNSEEN,
        start_char_idx=place * len(text),
        end_char_idx=(place + 1) * len(text),
        relationships=related,
    )


def _related(node_id: str, kind: ObjectType, metadata: dict[str, str]) -> RelatedNodeInfo:
    return RelatedNodeInfo(
        node_id=node_id, node_type=kind, metadata=metadata, hash=hashlib.sha256(node_id.encode()).hexdigest()
    )


def _sentences(pages: Path) -> tuple[list[str], list[int], list[str]]:
    """Of all pages, with where each page begins and the end; and those held out."""
    texts: list[str] = []
    starts, held_out = [0], []
    with DocumentReader(Limits.of(Settings(collections=("pages",)))) as reader:
        read = [reader.read(name, (pages / name).read_bytes()).text for name in find_documents(pages).documents]
    for text in read:
        page = [
            part for part in dict.fromkeys(map(str.strip, split_sentences(text))) if len(part) in SENTENCE_CHARACTERS
        ]
        page = page[:: -(-len(page) // SENTENCES_OF_A_PAGE) or 1]
        # One of so many, wherever it falls; but a page is never left with none.
        question = HELD_OUT - 1 - len(texts) % HELD_OUT
        if question < len(page) and len(page) > 1:
            held_out.append(page.pop(question))
        if page:
            texts += page
            starts.append(len(texts))
    return texts, starts, held_out


def _unit(vectors: Floats) -> Floats:
    lengths: Floats = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / lengths
