"""From a file's content to a LlamaIndex document, by a process of its own, as the content may be anyone's.

`ragrack.extract` lists the kinds. Nothing here parses a document.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

from llama_index.core.schema import Document
from pydantic import BaseModel

from ragrack.extract import Limits, Unit
from ragrack.files import DocumentError, shown
from ragrack.pages import PAGES
from ragrack.reader_process import LENGTH_BYTES, OUT_OF_MEMORY

PATIENCE = 4
GRACE = 60
"""A document is waited for so many times the seconds of CPU that it may take, and so many seconds more: the machine may
have much else to do, and the process may have to be started.
"""


class ReaderError(Exception):
    """The process that reads documents cannot do so at all: no document is to blame."""


class _Answer(BaseModel, strict=True):
    title: str = ""
    parts: list[tuple[int | str, str]] = []
    unit: Unit | None = None
    problem: str | None = None
    last: bool


@dataclass(frozen=True)
class _Running:
    """The process and our ends of its pipes."""

    process: subprocess.Popen[bytes]
    requests: int
    answers: int

    def write(self, data: bytes, deadline: float) -> None:
        rest = memoryview(data)
        while rest:
            _wait(self.requests, select.POLLOUT, deadline)
            rest = rest[os.write(self.requests, rest) :]

    def read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            _wait(self.answers, select.POLLIN, deadline)
            chunk = os.read(self.answers, min(size - len(data), 1 << 20))
            if not chunk:
                raise EOFError
            data += chunk
        return bytes(data)

    def end(self) -> int:
        """Its exit status, once it has one."""
        os.close(self.requests)
        os.close(self.answers)
        return self.process.wait()


class DocumentReader:
    """The process that reads, started when the first document comes and again when one has killed it. For `with`."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._running: _Running | None = None

    def __enter__(self) -> DocumentReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """A document that is being read is let go."""
        if self._running is not None:
            self._running.process.kill()
            self._end()

    def _end(self) -> int | None:
        running, self._running = self._running, None
        return running.end() if running is not None else None

    def read(self, name: str, content: bytes) -> Document:
        """The document whose path is `name`.

        Its id and its metadata `document` are `name`, its metadata `title` what it calls itself. The title is embedded
        with the text, the path is not. One that has pages, slides or sheets has `pages` too, as `ragrack.pages` reads
        it. Raises DocumentError, ReaderError.
        """
        answer = self._ask(name, content)
        if answer.problem is not None:
            # Its words may be the document's.
            raise DocumentError(name, shown(answer.problem))
        texts: list[str] = []
        starts: list[tuple[int, int | str]] = []
        at = 0
        for label, text in answer.parts:
            if text:
                starts.append((at, label))
                texts.append(text)
                at += len(text) + 2
        if not texts:
            raise DocumentError(name, "holds no text")
        metadata: dict[str, object] = {"document": name, "title": _short(answer.title) or PurePosixPath(name).stem}
        if answer.unit is not None:
            metadata[PAGES] = {"unit": answer.unit, "starts": starts}
        return Document(
            id_=name,
            text="\n\n".join(texts),
            metadata=metadata,
            excluded_embed_metadata_keys=["document"],
            excluded_llm_metadata_keys=["document"],
        )

    def _ask(self, name: str, content: bytes) -> _Answer:
        request = json.dumps({"suffix": PurePosixPath(name).suffix.lower(), "bytes": len(content)}).encode()
        patience = self._limits.document_read_seconds * PATIENCE + GRACE
        deadline = time.monotonic() + patience
        # A character is six bytes at most, `\u0001`; a page's label and its quotes are the rest.
        most = 6 * self._limits.document_max_characters + 1000 * self._limits.document_max_pages + 10_000
        running = self._running = self._running or self._start()
        try:
            running.write(len(request).to_bytes(LENGTH_BYTES, "big") + request, deadline)
            running.write(content, deadline)
            length = int.from_bytes(running.read(LENGTH_BYTES, deadline), "big")
            if length > most:
                raise ValueError("an answer of more bytes than a document may have characters")
            answer = _Answer.model_validate_json(running.read(length, deadline))
        except TimeoutError as error:
            self.close()
            raise DocumentError(name, f"was not read within {patience} seconds", again=True) from error
        except (EOFError, BrokenPipeError) as error:
            raise self._died(name, self._end() or 0) from error
        except ValueError as error:
            # It is no longer ours: whatever the document made of it speaks.
            self.close()
            raise DocumentError(name, f"made its reader answer nonsense ({type(error).__name__})") from error
        except BaseException:
            self.close()
            raise
        if answer.last:
            self._end()
        return answer

    def _start(self) -> _Running:
        command = [sys.executable, "-I", "-B", "-m", "ragrack.reader_process", json.dumps(asdict(self._limits))]
        theirs_in, requests = os.pipe()
        answers, theirs_out = os.pipe()
        try:
            process = subprocess.Popen(command, stdin=theirs_in, stdout=theirs_out, env={})
        except OSError as error:
            os.close(requests)
            os.close(answers)
            raise ReaderError(f"the process that reads documents cannot be started ({error})") from error
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        os.set_blocking(requests, False)
        return _Running(process, requests, answers)

    def _died(self, name: str, status: int) -> DocumentError:
        """Raises ReaderError where it was not the document that killed it."""
        if status == OUT_OF_MEMORY:
            most = self._limits.document_read_mib
            problem = f"needs more than {most} MiB to be read: split it, or raise RAGRACK_DOCUMENT_READ_MIB"
            return DocumentError(name, problem)
        if status == -signal.SIGXCPU:
            most = self._limits.document_read_seconds
            problem = f"takes more than {most} seconds to be read: split it, or raise RAGRACK_DOCUMENT_READ_SECONDS"
            return DocumentError(name, problem)
        if status >= 0 or status in (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP):
            raise ReaderError(f"the process that reads documents has ended with status {status} at {name}")
        killer = signal.Signals(-status).name
        problem = f"killed its reader ({killer}): it is broken, or needs more than {self._limits.document_read_mib} MiB"
        return DocumentError(name, problem, again=status == -signal.SIGKILL)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    """Raises TimeoutError."""
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _short(title: str) -> str:
    """A title is part of every node: a long one would crowd out the text."""
    return " ".join(title.split()[:16])[:120]
