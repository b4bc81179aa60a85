"""Ask a deployed service a question, as its users do."""

from __future__ import annotations

import json
import ssl
from pathlib import Path
from typing import Any

import httpx


class AskError(Exception):
    """The service did not answer; the message says what it said instead."""


def ask(
    url: str, question: str, *, key: str, ca: Path | None = None, generate: bool = False, timeout: float = 120
) -> dict[str, Any]:
    """POST /query and return its JSON. The certificate is verified against `ca` (PEM) or the system's authorities.

    Raises AskError where the service is out of reach or refuses.
    """
    body = {"query": question} | ({"answer": "generate"} if generate else {})
    context = ssl.create_default_context(cafile=str(ca) if ca else None)
    try:
        with httpx.Client(base_url=url, verify=context, timeout=timeout) as client:
            response = client.post("/query", json=body, headers={"Authorization": f"Bearer {key}"})
    except httpx.TransportError as error:
        raise AskError(
            f"{url} is out of reach: {error}. Mend: look at `systemctl status nginx 'ragrack@*'` on the host."
        ) from error
    if response.status_code != httpx.codes.OK:
        raise AskError(f"{url}/query answered {response.status_code}: {response.text.strip()[:500]}")
    answer: dict[str, Any] = response.json()
    return answer


def as_text(answer: dict[str, Any]) -> str:
    """The answer for a reader: what it says, then where it is from."""
    lines = [str(answer["response"]).strip(), ""]
    lines += [
        f"  [{number}] {source['document']}{_place(source)}  {source.get('title') or ''}  (score {source['score']:.2f})"
        for number, source in enumerate(answer["sources"], 1)
    ]
    if answer.get("degraded"):
        lines.append("  (the language model did not answer; these are the passages that do)")
    return "\n".join(lines)


def _place(source: dict[str, Any]) -> str:
    """In the document, where it has pages or the like."""
    return "".join(f", {unit} {source[unit]}" for unit in ("page", "slide", "sheet") if source.get(unit) is not None)


def as_json(answer: dict[str, Any]) -> str:
    return json.dumps(answer, indent=2, ensure_ascii=False)
