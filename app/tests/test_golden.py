from __future__ import annotations

from pathlib import Path

import pytest
from ragrack.golden import GoldenError, GoldenSet, evaluate

FOUND = {"first?": ["a.html", "b.html"], "second?": ["b.html", "b.html", "a.html"], "third?": ["c.html"], "none?": []}


async def retrieve(question: str, k: int) -> list[str]:
    return FOUND[question][:k]


def golden(**changes: object) -> GoldenSet:
    questions = [{"question": question, "sources": ["a.html", "z.html"]} for question in FOUND]
    return GoldenSet.model_validate({"k": 3, "min_hit_rate": 0.5, "questions": questions} | changes)


async def test_hit_rate_and_reciprocal_rank_are_counted_by_document() -> None:
    report = await evaluate(golden(), retrieve)
    assert report.hit_rate == 0.5
    assert report.mrr == (1 + 1 / 2) / 4
    assert report.failed == ["third?", "none?"]
    assert report.passed


async def test_below_the_threshold_it_fails_and_names_the_questions() -> None:
    report = await evaluate(golden(min_hit_rate=0.6), retrieve)
    assert not report.passed
    assert "FAILED" in report.summary()
    assert "third?" in report.summary()
    assert "none?" in report.summary()
    assert "first?" not in report.summary()


def test_a_file_is_read_with_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text("questions: [{question: q, sources: [a], phrase: p}]")
    loaded = GoldenSet.load(path, min_hit_rate=0.7)
    assert (loaded.k, loaded.min_hit_rate, loaded.questions[0].phrase) == (5, 0.7, "p")


def test_the_file_has_the_last_word_on_the_threshold(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text("min_hit_rate: 0.9\nquestions: [{question: q, sources: [a]}]")
    assert GoldenSet.load(path, min_hit_rate=0.7).min_hit_rate == 0.9


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "the file"),
        ("- a list", "the file"),
        ("questions: []", "questions"),
        ("questions: [{question: q}]", r"questions\.0\.sources"),
        ("questions: [{question: '', sources: [a]}]", r"questions\.0\.question"),
        ("questions: [{question: q, sources: a}]", r"questions\.0\.sources"),
        ("questions: [{question: q, sources: [a], phrases: x}]", r"questions\.0\.phrases"),
        ("min_hit_rate: 80\nquestions: [{question: q, sources: [a]}]", "min_hit_rate"),
        ("k: 0\nquestions: [{question: q}]", r"k: .*questions\.0\.sources"),
        ("questions: [", "is not YAML"),
    ],
)
def test_a_bad_file_is_refused_with_all_that_is_wrong(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "c.yml"
    path.write_text(content)
    with pytest.raises(GoldenError, match=rf"c\.yml: .*{problem}"):
        GoldenSet.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match=r"gone\.yml: cannot be read"):
        GoldenSet.load(tmp_path / "gone.yml")
