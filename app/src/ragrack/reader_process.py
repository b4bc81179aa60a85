"""The process that reads documents, which are anyone's: `python -m ragrack.reader_process LIMITS`.

It is given the content of one document after the other over its standard input and answers on its standard output, in
frames: four bytes of length, then JSON. It opens no document itself, writes no file and starts no process, and the
kernel holds it to its memory and its seconds of CPU. What it says is checked by who reads it (`ragrack.readers`).
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import resource
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, BinaryIO

from ragrack.extract import HEAD_BYTES, KINDS, Extracted, Limits, RefusedError

LENGTH_BYTES = 4
OUT_OF_MEMORY = 12
"""The exit status where a document needs more memory than it may have."""


def main() -> None:
    limits = Limits(**json.loads(sys.argv[1]))
    _confine(limits)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # What a library prints must not be taken for an answer.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    try:
        while (request := _receive(sys.stdin.buffer)) is not None:
            content = sys.stdin.buffer.read(request["bytes"])
            answer = _answer(request["suffix"], content, limits)
            del content
            answer["last"] = _address_space() > limits.document_read_mib * 2**20 // 2
            frame = json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace")
            answers.write(len(frame).to_bytes(LENGTH_BYTES, "big") + frame)
            answers.flush()
            if answer["last"]:
                break
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def _confine(limits: Limits) -> None:
    # The one who started it decides when it stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable()
    warnings.simplefilter("ignore")
    for kind, most in (
        (resource.RLIMIT_AS, limits.document_read_mib * 2**20),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _receive(stream: BinaryIO) -> dict[str, Any] | None:
    length = stream.read(LENGTH_BYTES)
    if len(length) < LENGTH_BYTES:
        return None
    request: dict[str, Any] = json.loads(stream.read(int.from_bytes(length, "big")))
    return request


def _answer(suffix: str, content: bytes, limits: Limits) -> dict[str, Any]:
    kind = KINDS[suffix]
    module, _, function = kind.reader.partition(":")
    # Outside of what is blamed on the document: an installation that lacks a library is no document's fault.
    read = getattr(importlib.import_module(f"ragrack.extract.{module}"), function)
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + limits.document_read_seconds
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    try:
        if not kind.fits(content[:HEAD_BYTES]):
            raise RefusedError(kind.misfit(content))
        extracted: Extracted = read(content, limits)
    except MemoryError:
        raise
    except RefusedError as error:
        return {"problem": str(error)}
    except RecursionError:
        return {"problem": f"cannot be read as {kind.name} (it is nested too deeply)"}
    except BaseException as error:  # a panic of native code is no Exception
        return {"problem": f"cannot be read as {kind.name} ({str(error)[:200] or type(error).__name__})"}
    return {"title": extracted.title, "unit": extracted.unit, "parts": extracted.parts}


def _address_space() -> int:
    """Bytes, as RLIMIT_AS counts them."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
