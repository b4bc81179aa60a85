"""A site's hooks with a defect: whoever asks for it gets an event that the service's handler cannot read."""

from __future__ import annotations

from typing import Any

from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index_instrumentation import get_dispatcher


class Defect(BaseNodePostprocessor):
    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is not None and "defect" in query_bundle.query_str:
            unreadable: Any = "no ChatResponse"
            get_dispatcher(__name__).event(LLMChatEndEvent.model_construct(messages=[], response=unreadable))
        return nodes


def node_postprocessors() -> list[BaseNodePostprocessor]:
    return [Defect()]
