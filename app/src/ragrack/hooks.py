"""A module of the site's own, by RAGRACK_HOOKS: a file or a module's name. What it may define, each without arguments:

    def node_postprocessors() -> list[BaseNodePostprocessor]   # applied to what was retrieved, in this order
    def callback_handlers() -> list[BaseCallbackHandler]       # told of events; traces of requests at once mix

Each is called once in a worker. Code from before LlamaIndex 0.10 is told what replaced ServiceContext, before it runs.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_index.core.callbacks.base_handler import BaseCallbackHandler
    from llama_index.core.postprocessor.types import BaseNodePostprocessor

GONE = {"ServiceContext", "set_global_service_context", "service_context", "LLMPredictor"}
# What ServiceContext took, and where it is said now.
REPLACEMENTS = {
    "llm": "Settings.llm (here RAGRACK_LLM_BASE_URL and RAGRACK_LLM_MODEL)",
    "llm_predictor": "Settings.llm (here RAGRACK_LLM_BASE_URL and RAGRACK_LLM_MODEL)",
    "embed_model": "Settings.embed_model (here RAGRACK_EMBED_PROVIDER)",
    "node_parser": "Settings.node_parser (here RAGRACK_NODE_PARSER)",
    "text_splitter": "Settings.text_splitter (here RAGRACK_NODE_PARSER)",
    "chunk_size": "Settings.chunk_size (here RAGRACK_CHUNK_SIZE)",
    "chunk_size_limit": "Settings.chunk_size (here RAGRACK_CHUNK_SIZE)",
    "chunk_overlap": "Settings.chunk_overlap (here RAGRACK_CHUNK_OVERLAP)",
    "prompt_helper": "Settings.prompt_helper (here RAGRACK_CONTEXT_WINDOW and RAGRACK_NUM_OUTPUT)",
    "context_window": "Settings.context_window (here RAGRACK_CONTEXT_WINDOW)",
    "num_output": "Settings.num_output (here RAGRACK_NUM_OUTPUT)",
    "transformations": "Settings.transformations (here RAGRACK_NODE_PARSER)",
    "callback_manager": "Settings.callback_manager (here `callback_handlers` in the hooks)",
    "llama_logger": "Settings.callback_manager (here `callback_handlers` in the hooks)",
}
INSTEAD = "LlamaIndex's Settings, which this service writes once from its RAGRACK_* variables, or hand the part over"


class HooksError(Exception):
    """The module cannot be used; `problem` says what is wrong with it, `mend` what to write instead."""

    def __init__(self, problem: str, mend: str) -> None:
        super().__init__(f"{problem}; {mend}")
        self.problem = problem
        self.mend = mend


@dataclass(frozen=True)
class Hooks:
    node_postprocessors: tuple[BaseNodePostprocessor, ...] = ()
    callback_handlers: tuple[BaseCallbackHandler, ...] = ()


def check(hooks: str) -> None:
    """Reads the module without running it, nor LlamaIndex. Raises HooksError."""
    path = _path(hooks)
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (OSError, SyntaxError, ValueError) as error:
        raise HooksError(f"{path} cannot be read as Python ({error})", "mend the file, or name another") from error
    lines: dict[int, dict[str, str]] = {}
    for line, what, instead in _old_uses(tree):
        lines.setdefault(line, {})[what] = instead
    if lines:
        uses = [f"line {line}: {', '.join(whats)}" for line, whats in sorted(lines.items())]
        mends = dict.fromkeys(instead for whats in lines.values() for instead in whats.values() if instead != INSTEAD)
        mend = f"instead use {'; '.join(mends) or INSTEAD}"
        raise HooksError(f"{path} uses LlamaIndex's ServiceContext, which is gone ({'; '.join(uses)})", mend)


@functools.lru_cache(maxsize=1)
def load(hooks: str | None) -> Hooks:
    """Runs the module, once in a process. Raises HooksError, whatever the module raises."""
    if hooks is None:
        return Hooks()
    check(hooks)
    try:
        module = _run(hooks)
        return Hooks(*(tuple(getattr(module, name, list)()) for name in Hooks.__dataclass_fields__))
    except Exception as error:
        old = "ServiceContext" in str(error)
        mend = f"instead use {INSTEAD}" if old else "mend the module, or unset it"
        # LlamaIndex's own words go on for lines.
        reason = str(error).split("\n", 1)[0] or "it says no more"
        raise HooksError(f"{hooks} fails when it is loaded ({type(error).__name__}: {reason})", mend) from error


def _is_file(hooks: str) -> bool:
    return "/" in hooks or hooks.endswith(".py")


def _path(hooks: str) -> Path:
    if _is_file(hooks):
        return Path(hooks)
    try:
        spec = importlib.util.find_spec(hooks)
    except (ImportError, ValueError) as error:
        raise HooksError(f"there is no module {hooks} ({error})", "install it, or name a file by its path") from error
    if spec is None or spec.origin is None:
        raise HooksError(f"there is no module {hooks}", "install it, or name a file by its path")
    return Path(spec.origin)


def _run(hooks: str) -> ModuleType:
    if not _is_file(hooks):
        return importlib.import_module(hooks)
    spec = importlib.util.spec_from_file_location("ragrack_site_hooks", hooks)
    if spec is None or spec.loader is None:
        raise ImportError(f"{hooks} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _old_uses(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Line, what is used, and what replaces it."""
    gone = set(GONE)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            of_gone = isinstance(node, ast.ImportFrom) and (node.module or "").endswith("service_context")
            for alias in node.names:
                if of_gone or alias.name.rpartition(".")[2] in GONE:
                    gone.add(alias.asname or alias.name)
                    yield node.lineno, alias.name, INSTEAD
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in gone:
                yield node.lineno, name, INSTEAD
            case ast.Constant(value=str(name)) if name in ("ServiceContext", "set_global_service_context"):
                yield node.lineno, name, INSTEAD
            case ast.Call(func=function, keywords=keywords):
                of_context = any(
                    getattr(part, "id", getattr(part, "attr", None)) in gone for part in ast.walk(function)
                )
                for keyword in keywords:
                    if keyword.arg in ("service_context", "llm_predictor") or (of_context and keyword.arg is not None):
                        yield node.lineno, f"{keyword.arg}=", REPLACEMENTS.get(keyword.arg, INSTEAD)
