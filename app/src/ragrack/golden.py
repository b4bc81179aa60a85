"""Golden questions: what a release or a snapshot must find before it goes live.

k: 5
min_hit_rate: 0.8
questions:
  - question: How do I make a partial index?
    sources: [indexes-partial.html]      # any of these among the first k documents is a hit
    phrase: WHERE                        # optional: must be in the answer, where answers are asked for
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    from ragrack.settings import Settings

Retrieve = Callable[[str, int], Awaitable[Sequence[str]]]
"""(question, k) -> the documents of the retrieved nodes, best first; documents may repeat."""


class GoldenError(ValueError):
    """A golden file that cannot be used; the message lists all that is wrong with it."""


class GoldenQuestion(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    question: str = Field(min_length=1)
    sources: list[str] = Field(min_length=1)
    phrase: str | None = Field(default=None, min_length=1)


class GoldenSet(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    k: int = Field(default=5, ge=1, le=100)
    min_hit_rate: float = Field(ge=0, le=1)
    questions: list[GoldenQuestion] = Field(min_length=1)

    @classmethod
    def load(cls, path: Path, min_hit_rate: float = 0.8) -> GoldenSet:
        """`min_hit_rate` holds where the file names none. Raises GoldenError."""
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
            return cls.model_validate({"min_hit_rate": min_hit_rate, **raw} if isinstance(raw, dict) else raw)
        except OSError as error:
            raise GoldenError(f"{path}: cannot be read ({error.strerror})") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise GoldenError(f"{path}: is not YAML: {error}") from error
        except ValidationError as error:
            problems = [
                f"{'.'.join(str(part) for part in problem['loc']) or 'the file'}: {problem['msg']}"
                for problem in error.errors()
            ]
            raise GoldenError(
                f"{path}: {'; '.join(problems)}. It needs `questions`, each with a `question` and its `sources`."
            ) from error

    @classmethod
    def of(cls, settings: Settings, collection: str) -> GoldenSet | None:
        """Those of a collection, or None where it has none. Raises GoldenError."""
        path = settings.golden_dir / f"{collection}.yml"
        return cls.load(path, settings.golden_min_hit_rate) if path.exists() else None


class GoldenReport(BaseModel):
    """Hit rate@k is the share of questions with a source among the first k; MRR the mean of 1/rank of the first."""

    questions: int
    k: int
    hit_rate: float
    mrr: float
    min_hit_rate: float
    failed: list[str]
    """The questions without a source among the first k."""

    @property
    def passed(self) -> bool:
        return self.hit_rate >= self.min_hit_rate

    def summary(self) -> str:
        """One line, and one more for each question that failed."""
        verdict = "passed" if self.passed else "FAILED"
        head = (
            f"golden questions {verdict}: hit rate@{self.k} {self.hit_rate:.3f} "
            f"(needed {self.min_hit_rate:.3f}), MRR {self.mrr:.3f}, {self.questions} questions"
        )
        return "\n".join([head, *(f"  not found: {question}" for question in self.failed)])


async def evaluate(golden: GoldenSet, retrieve: Retrieve) -> GoldenReport:
    """Asks every question, one after the other; what `retrieve` raises is not caught."""
    failed = []
    ranks = []
    for item in golden.questions:
        documents = list(dict.fromkeys(await retrieve(item.question, golden.k)))[: golden.k]
        rank = next((n for n, document in enumerate(documents, 1) if document in item.sources), None)
        if rank is None:
            failed.append(item.question)
        else:
            ranks.append(1 / rank)
    count = len(golden.questions)
    return GoldenReport(
        questions=count,
        k=golden.k,
        hit_rate=len(ranks) / count,
        mrr=sum(ranks) / count,
        min_hit_rate=golden.min_hit_rate,
        failed=failed,
    )
