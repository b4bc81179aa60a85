"""Splitting and embedding side by side gives what one after the other does."""

import pytest
from llama_index.core.schema import Document
from ragrack.ahead import GROUP_CHARACTERS, SplitAndEmbed
from ragrack.embedding import MiniLMEmbedding
from ragrack.parts import node_parser
from ragrack.settings import Settings


def test_the_nodes_are_those_of_one_after_the_other(settings: Settings, embedding: MiniLMEmbedding) -> None:
    lengths = [number * 40 % 300 + 1 for number in range(15)]
    documents = [Document(id_=f"d{length}", text=f"Document {length} says so to all. " * length) for length in lengths]
    assert sum(len(document.text) for document in documents) > 5 * GROUP_CHARACTERS
    parser = node_parser(settings, embedding.tokens, lambda number, document: f"{document.node_id}#{number}")
    beside = SplitAndEmbed(parser=parser, embedding=embedding)(documents)
    after = embedding(parser(documents))
    assert [node.model_dump() for node in beside] == [node.model_dump() for node in after]
    assert all(node.embedding for node in beside)


def test_what_cannot_be_split_is_told(settings: Settings, embedding: MiniLMEmbedding) -> None:
    narrow = Settings.model_validate(settings.model_dump() | {"chunk_size": 32, "chunk_overlap": 0})
    title = Document(text="Text.", metadata={"title": "xq zk " * 30})
    both = SplitAndEmbed(parser=node_parser(narrow, embedding.tokens), embedding=embedding)
    with pytest.raises(ValueError, match="longer than chunk size"):
        both([Document(text="Text."), title])
