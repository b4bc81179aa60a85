"""A site's hooks with a defect: whoever asks for it gets an event that the service's handler cannot read."""

from __future__ import annotations

from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle


class Defect(BaseNodePostprocessor):
    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is not None and "defect" in query_bundle.query_str:
            get_dispatcher(__name__).event(LLMChatEndEvent.model_construct(messages=[], response="no ChatResponse"))
        return nodes


def node_postprocessors() -> list[BaseNodePostprocessor]:
    return [Defect()]
