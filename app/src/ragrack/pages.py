"""Nodes of a document that has pages, slides or sheets: none crosses one, so that a source can name it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llama_index.core.node_parser import NodeParser
from llama_index.core.schema import BaseNode, Document, NodeRelationship, RelatedNodeInfo, TextNode, TransformComponent

PAGES = "pages"
"""The key in a document's metadata: `{"unit": "page", "starts": [[0, 1], [1830, 2], ...]}`, where each begins in the
text and what it is called. A node has the unit itself as its key: `{"page": 2}`.
"""
UNITS = ("page", "slide", "sheet")


class PageByPage(TransformComponent):
    """A node parser that is given each page by itself. Offsets stay those of the whole document."""

    parser: NodeParser

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        return list(self._parse(nodes))

    def _parse(self, documents: Sequence[BaseNode]) -> Iterator[BaseNode]:
        for document in documents:
            if PAGES not in document.metadata or not isinstance(document, Document):
                yield from self.parser([document])
                continue
            for start, page in _pages(document):
                for node in self.parser([page]):
                    if isinstance(node, TextNode) and node.start_char_idx is not None and node.end_char_idx is not None:
                        node.start_char_idx += start
                        node.end_char_idx += start
                    yield node


def _pages(document: Document) -> Iterator[tuple[int, Document]]:
    metadata = {key: value for key, value in document.metadata.items() if key != PAGES}
    unit, starts = document.metadata[PAGES]["unit"], document.metadata[PAGES]["starts"]
    # The node parser makes it the source of the page's nodes: they are of the document, not of the page.
    source = RelatedNodeInfo(node_id=document.node_id, hash=document.hash, metadata=metadata)
    # What a sheet is called says what its rows are; a number says nothing.
    unseen = [] if unit == "sheet" else [unit]
    ends = [*(start for start, _ in starts[1:]), len(document.text)]
    for number, ((start, label), end) in enumerate(zip(starts, ends, strict=True)):
        page = Document(
            id_=f"{document.node_id}#{number}",
            text=document.text[start:end].strip(),
            metadata=metadata | {unit: label},
            excluded_embed_metadata_keys=document.excluded_embed_metadata_keys + unseen,
            excluded_llm_metadata_keys=document.excluded_llm_metadata_keys + unseen,
            relationships={NodeRelationship.SOURCE: source},
        )
        yield start, page
