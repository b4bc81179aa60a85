"""A node as SQLite holds it, in the staging area of an ingest and in a snapshot alike."""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

from llama_index.core.schema import BaseNode, MetadataMode, TextNode


class StoredNode(NamedTuple):
    """Two nodes of which all parts are the same are the same node, whatever made them."""

    node_id: str
    ref_doc_id: str | None
    text: str
    metadata: str
    """JSON."""
    rest: str
    """JSON of all else that is not as it is by default; not the embedding."""

    @classmethod
    def of(cls, node: BaseNode) -> StoredNode:
        rest = node.model_dump(
            mode="json", exclude_defaults=True, exclude={"id_", "embedding", "metadata", "text", "text_resource"}
        )
        rest.pop("class_name", None)
        return cls(
            node.node_id,
            node.ref_doc_id,
            node.get_content(MetadataMode.NONE),
            json.dumps(node.metadata, ensure_ascii=False),
            json.dumps(rest, ensure_ascii=False),
        )

    def node(self) -> TextNode:
        return TextNode(id_=self.node_id, text=self.text, metadata=json.loads(self.metadata), **json.loads(self.rest))

    def digest(self) -> bytes:
        """16 bytes by which it is known from any other version of itself."""
        return hashlib.blake2b(json.dumps(self).encode(), digest_size=16).digest()
