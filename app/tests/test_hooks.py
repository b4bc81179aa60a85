"""Modules of a site's own: what they may bring, and what code from before LlamaIndex 0.10 is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ragrack import hooks
from ragrack.hooks import HooksError
from ragrack.settings import examine


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("from llama_index.core import ServiceContext", ["line 1: ServiceContext", "LlamaIndex's Settings"]),
        (
            "import llama_index\nllama_index.ServiceContext.from_defaults(llm=1)",
            ["line 2", "llm=", "RAGRACK_LLM_MODEL"],
        ),
        (
            "from llama_index import ServiceContext as SC\nx = SC.from_defaults(chunk_size=5, embed_model='local')",
            ["line 2", "Settings.chunk_size", "RAGRACK_CHUNK_SIZE", "Settings.embed_model"],
        ),
        (
            "def f(c):\n    return c(nodes, service_context=None)",
            ["line 2: service_context=", "LlamaIndex's Settings"],
        ),
        ("from llama_index.core.service_context import set_global_service_context as s\ns(1)", ["line 1", "line 2"]),
        ("import llama_index.core as c\ngetattr(c, 'ServiceContext')", ["line 2: ServiceContext"]),
        ("f(llm_predictor=1)", ["Settings.llm"]),
    ],
)
def test_old_code_is_told_what_replaced_it_before_it_runs(tmp_path: Path, code: str, says: list[str]) -> None:
    path = tmp_path / "old.py"
    path.write_text(f"{code}\nraise AssertionError('it ran')\n")
    with pytest.raises(HooksError) as caught:
        hooks.load(str(path))
    assert "ServiceContext, which is gone" in caught.value.problem
    for words in says:
        assert words in str(caught.value)


def test_what_no_reading_finds_is_told_when_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "sly.py"
    path.write_text("import llama_index.core as c\ngetattr(c, 'Service' + 'Context').from_defaults(llm=None)\n")
    hooks.check(str(path))
    with pytest.raises(HooksError, match=r"ServiceContext is deprecated.*LlamaIndex's Settings"):
        hooks.load(str(path))


def test_a_module_brings_postprocessors_and_callbacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
from llama_index.core.callbacks import LlamaDebugHandler
from llama_index.core.postprocessor import LongContextReorder

def node_postprocessors():
    return [LongContextReorder()]

def callback_handlers():
    return [LlamaDebugHandler(print_trace_on_end=False)]
"""
    (tmp_path / "site_hooks_of_a_test.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("site_hooks_of_a_test", str(tmp_path / "site_hooks_of_a_test.py")):
        found = hooks.load(name)
        assert [type(part).__name__ for part in found.node_postprocessors] == ["LongContextReorder"]
        assert [type(part).__name__ for part in found.callback_handlers] == ["LlamaDebugHandler"]
    assert hooks.load(None).node_postprocessors == ()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("no_such_module_here", None, "there is no module"),
        ("no.such.module", None, "there is no module"),
        ("gone.py", None, "cannot be read"),
        ("broken.py", "def", "cannot be read"),
        ("raises.py", "1 / 0", "ZeroDivisionError"),
        ("wrong.py", "node_postprocessors = 3", "TypeError"),
    ],
)
def test_a_module_that_cannot_be_used_says_why(tmp_path: Path, name: str, content: str | None, says: str) -> None:
    target = str(tmp_path / name) if name.endswith(".py") else name
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(HooksError, match=says):
        hooks.load(target)


def test_a_release_with_old_hooks_does_not_start(tmp_path: Path, model_dir: Path) -> None:
    path = tmp_path / "old.py"
    path.write_text("from llama_index.core import ServiceContext\n")
    environ = {
        "RAGRACK_COLLECTIONS": "manual",
        "RAGRACK_EMBED_MODEL_DIR": str(model_dir),
        "RAGRACK_RUNTIME_DIR": str(tmp_path),
        "RAGRACK_HOOKS": str(path),
    }
    [problem] = [p for p in examine(environ, on_host=True)[1] if p.variable == "RAGRACK_HOOKS"]
    assert "ServiceContext" in problem.problem
    assert examine(environ, on_host=False)[1] == []
    command = [sys.executable, "-m", "gunicorn", "--config", "python:ragrack.gunicorn_conf", "ragrack.api:create_app()"]
    done = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "instead use LlamaIndex's Settings" in done.stderr
