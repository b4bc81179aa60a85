"""The seed's way, as in run-llama/llama_index's examples/fastapi_rag_ollama/app.py: read, embed and index at import in
each worker; a `def` endpoint over `query_engine.query`. The embedding class and the LLM are the same as ours.
"""

from __future__ import annotations

import os
from pathlib import Path

from fastapi import FastAPI
from llama_index.core import Settings, SimpleDirectoryReader, VectorStoreIndex
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from ragrack.embedding import MiniLMEmbedding


class Query(BaseModel):
    query: str


Settings.embed_model = MiniLMEmbedding.load(Path(os.environ["BENCH_MODEL"]))
Settings.llm = OpenAILike(
    model="m", api_base=os.environ["BENCH_LLM"], api_key="none", is_chat_model=True, context_window=8192
)
Settings.chunk_size, Settings.chunk_overlap = 254, 32

documents = SimpleDirectoryReader(os.environ["BENCH_DOCUMENTS"]).load_data()
index = VectorStoreIndex.from_documents(documents)
query_engine = index.as_query_engine(similarity_top_k=5)
retriever = index.as_retriever(similarity_top_k=5)

app = FastAPI()


@app.post("/query")
def query(body: Query) -> dict[str, str]:
    return {"response": str(query_engine.query(body.query))}


@app.post("/retrieve")
def retrieve(body: Query) -> dict[str, list[str]]:
    return {"nodes": [node.text for node in retriever.retrieve(body.query)]}


@app.get("/readyz")
def readyz() -> dict[str, bool]:
    return {"ready": True}
