"""Documents are split while those before them are embedded, so that no core waits for the one that splits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent

GROUP_CHARACTERS = 8_000
"""Of text that is split before its nodes are given to the embedding."""
GROUPS = 2
"""At a time: while the last nodes of one are embedded, the first of the next are, too."""


class SplitAndEmbed(TransformComponent):
    """One after the other to whoever looks at the nodes, side by side to the cores."""

    parser: TransformComponent
    embedding: BaseEmbedding

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        with ThreadPoolExecutor(GROUPS, thread_name_prefix="ahead") as beside:
            embedded = [beside.submit(self.embedding, self.parser(group)) for group in _groups(nodes)]
        return [node for group in embedded for node in group.result()]


def _groups(nodes: Sequence[BaseNode]) -> Iterator[list[BaseNode]]:
    group: list[BaseNode] = []
    characters = 0
    for node in nodes:
        group.append(node)
        characters += len(node.get_content(MetadataMode.NONE))
        if characters >= GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group
