"""What workers will need, imported once in gunicorn's master before it forks them.

They share the memory that it takes, none waits for it, and one that replaces a dead worker answers in half a second.
Only modules: a model, an index or a client would bring threads or files that no fork survives.
"""

from __future__ import annotations

import gc
import importlib

from ragrack.settings import Settings

PROVIDERS = {"openai_like": "llama_index.llms.openai_like", "ollama": "llama_index.llms.ollama"}


def import_all(settings: Settings) -> None:
    """The service, and the clients of the providers that the settings name. Metrics' directory must be there."""
    # Next to nothing of it is garbage, and to look for that again and again takes a third of the time of the imports.
    gc.disable()
    importlib.import_module("ragrack.api")
    named = {
        provider
        for provider, url in (
            (settings.llm_provider, settings.llm_base_url),
            (settings.llm_fallback_provider, settings.llm_fallback_base_url),
        )
        if url is not None
    }
    for provider in named:
        importlib.import_module(PROVIDERS[provider])
    if settings.vector_store == "qdrant":
        importlib.import_module("ragrack.qdrant_snapshots")
    if settings.vector_store == "postgres":
        importlib.import_module("ragrack.postgres_snapshots")
        importlib.import_module("ragrack.postgres_store")
    else:
        importlib.import_module("ragrack.store")
    if settings.embed_provider != "minilm":
        importlib.import_module("llama_index.embeddings.openai_like")
    # A page that a worker's collector never looks at stays shared.
    gc.freeze()
    gc.enable()
