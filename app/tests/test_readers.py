from __future__ import annotations

from pathlib import Path

import pytest
from llama_index.core.schema import MetadataMode
from ragrack.readers import DocumentError, find_documents, read_document

MANUAL = Path(__file__).parent / "data/manual"


def read(name: str) -> tuple[str, dict[str, str]]:
    document = read_document(MANUAL, MANUAL / name)
    return document.text, document.metadata


def test_only_readable_kinds_are_found_in_a_fixed_order(tmp_path: Path) -> None:
    found = [path.relative_to(MANUAL).as_posix() for path in find_documents(MANUAL)]
    assert found == ["backup.html", "indexes.html", "limits.txt", "tasks/passwords.md", "vacuum.html"]
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/page.html").write_text("<p>x</p>")
    (tmp_path / ".fetched").write_text("stamp")
    assert list(find_documents(tmp_path)) == []
    assert list(find_documents(tmp_path / "absent")) == []


def test_html_gives_its_text_without_furniture() -> None:
    text, metadata = read("vacuum.html")
    assert metadata == {"document": "vacuum.html", "title": "Routine vacuuming"}
    assert text.startswith("Routine vacuuming\n\nAn update or a delete leaves the old version")
    assert "VACUUM marks the space of such dead rows as free" in text
    assert "VACUUM | SHARE UPDATE EXCLUSIVE" in text
    assert "Café & naïve text with entities." in text
    for unseen in ("Prev", "Home", "tracked", "color: black", "comment"):
        assert unseen not in text, unseen


def test_html_keeps_the_lines_of_code_and_of_lists() -> None:
    text, _ = read("indexes.html")
    assert "CREATE INDEX orders_unbilled\n    ON orders (order_number)\n    WHERE billed IS NOT TRUE;" in text
    text, _ = read("backup.html")
    assert "The archive must have no gaps.\nTest a restore before you need one." in text.replace("\n\n", "\n")


def test_markdown_loses_its_front_matter_and_keeps_its_code() -> None:
    text, metadata = read("tasks/passwords.md")
    assert metadata == {"document": "tasks/passwords.md", "title": "Passwords in a file"}
    assert "maintainers" not in text
    assert "chmod 0600 ~/.pgpass" in text


def test_the_first_line_of_a_text_is_its_title() -> None:
    assert read("limits.txt")[1]["title"] == "Limits of a table"


def test_the_title_is_embedded_and_the_path_is_not() -> None:
    document = read_document(MANUAL, MANUAL / "vacuum.html")
    embedded = document.get_content(MetadataMode.EMBED)
    assert "Routine vacuuming" in embedded.splitlines()[0]
    assert "vacuum.html" not in embedded


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("latin.txt", "Grüße".encode("latin-1"), "Grüße"),
        ("bom.txt", b"\xef\xbb\xbfhello", "hello"),
        ("windows.txt", b"one\r\ntwo", "one\ntwo"),
        ("latin.html", b'<meta charset="iso-8859-1"><p>Gr\xfc\xdfe', "Grüße"),
        ("utf8.html", "<p>Grüße, 世界".encode(), "Grüße, 世界"),
        ("unclosed.html", b"<p>one<p>two<b>three", "one\n\ntwothree"),
        ("fragment.html", b"no markup at all", "no markup at all"),
    ],
)
def test_encodings_and_bad_markup_are_read(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_document(tmp_path, tmp_path / name).text == expected


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("binary.txt", b"\x00\x01\x02", "is binary"),
        ("empty.html", b"", "cannot be parsed|holds no text"),
        ("blank.md", b" \n\n", "holds no text"),
        ("only-script.html", b"<script>x()</script>", "holds no text"),
    ],
)
def test_what_is_no_document_is_refused_by_name(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DocumentError, match=f"{name}: .*({problem})"):
        read_document(tmp_path, tmp_path / name)


def test_a_long_title_does_not_crowd_out_the_text(tmp_path: Path) -> None:
    (tmp_path / "long.html").write_text(f"<title>{'very ' * 500}long</title><p>text</p>")
    assert len(read_document(tmp_path, tmp_path / "long.html").metadata["title"]) <= 120
