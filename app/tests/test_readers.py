"""Documents of every kind become text, with a title and a place that a source can name."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import Document, MetadataMode, TextNode
from pypdf import PdfWriter
from ragrack.extract import KINDS, Limits
from ragrack.files import DocumentError, find_documents, read_file
from ragrack.pages import PageByPage
from ragrack.readers import DocumentReader

from . import samples

MANUAL = Path(__file__).parent / "data/manual"
LIMITS = Limits(
    document_max_pages=50, document_max_characters=1_000_000, document_read_seconds=20, document_read_mib=512
)


@pytest.fixture(scope="module")
def reader() -> Iterator[DocumentReader]:
    with DocumentReader(LIMITS) as reader:
        yield reader


@pytest.fixture
def manual(reader: DocumentReader) -> dict[str, Document]:
    return {name: reader.read(name, (MANUAL / name).read_bytes()) for name in find_documents(MANUAL).documents}


def test_only_readable_kinds_are_found_in_a_fixed_order(tmp_path: Path) -> None:
    found = find_documents(MANUAL)
    assert found.documents == ["backup.html", "indexes.html", "limits.txt", "tasks/passwords.md", "vacuum.html"]
    assert found.problems == {}
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/page.html").write_text("<p>x</p>")
    (tmp_path / ".fetched").write_text("stamp")
    for name in ("a.png", "b.png", "c.PDF", "README"):
        (tmp_path / name).write_text("x")
    found = find_documents(tmp_path)
    assert found.documents == ["c.PDF"]
    assert found.others == {".png": 2, "": 1}
    assert find_documents(tmp_path / "absent").documents == []


def test_what_is_called_a_document_and_is_none_is_named(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "secret.txt"
    outside.write_text("not yours")
    (root / "folder.pdf").mkdir(parents=True)
    (root / "folder.pdf/good.txt").write_text("good")
    (root / "link.txt").symlink_to(outside)
    (root / "folder").symlink_to(tmp_path)
    os.mkfifo(root / "pipe.txt")
    Path(os.fsdecode(bytes(root) + b"/caf\xe9.txt")).write_text("x")
    (root / "bell\a.txt").write_text("x")
    found = find_documents(root)
    assert found.documents == ["folder.pdf/good.txt"]
    assert found.problems == {
        "link.txt": "link.txt: is a link, and links are not followed: put what it leads to in its place",
        "folder": "folder: is a link, and links are not followed: put what it leads to in its place",
        "pipe.txt": "pipe.txt: is a pipe, a socket or a device, no file",
        r"caf\udce9.txt": r"caf\udce9.txt: its name is not printable UTF-8: rename it",
        r"bell\x07.txt": r"bell\x07.txt: its name is not printable UTF-8: rename it",
    }


def test_what_takes_a_files_place_after_it_was_found_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("not yours")
    (tmp_path / "link.txt").symlink_to(tmp_path / "secret.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    for name, problem in (
        ("link.txt", "cannot be read"),
        ("pipe.txt", "is a pipe"),
        ("gone.txt", "No such file"),
        ("secret.txt", "larger than 3 bytes.*RAGRACK_DOCUMENT_MAX_BYTES"),
    ):
        with pytest.raises(DocumentError, match=f"{name}: .*{problem}"):
            read_file(tmp_path, name, 3)


def test_html_gives_its_text_without_furniture(manual: dict[str, Document]) -> None:
    text, metadata = manual["vacuum.html"].text, manual["vacuum.html"].metadata
    assert metadata == {"document": "vacuum.html", "title": "Routine vacuuming"}
    assert text.startswith("Routine vacuuming\n\nAn update or a delete leaves the old version")
    assert "VACUUM marks the space of such dead rows as free" in text
    assert "VACUUM | SHARE UPDATE EXCLUSIVE" in text
    assert "Café & naïve text with entities." in text
    for unseen in ("Prev", "Home", "tracked", "color: black", "comment"):
        assert unseen not in text, unseen


def test_html_keeps_the_lines_of_code_and_of_lists(manual: dict[str, Document]) -> None:
    text = manual["indexes.html"].text
    assert "CREATE INDEX orders_unbilled\n    ON orders (order_number)\n    WHERE billed IS NOT TRUE;" in text
    text = manual["backup.html"].text
    assert "The archive must have no gaps.\nTest a restore before you need one." in text.replace("\n\n", "\n")


def test_markdown_loses_its_front_matter_and_keeps_its_code(manual: dict[str, Document]) -> None:
    text, metadata = manual["tasks/passwords.md"].text, manual["tasks/passwords.md"].metadata
    assert metadata == {"document": "tasks/passwords.md", "title": "Passwords in a file"}
    assert "maintainers" not in text
    assert "chmod 0600 ~/.pgpass" in text


def test_the_first_line_of_a_text_is_its_title(manual: dict[str, Document]) -> None:
    assert manual["limits.txt"].metadata["title"] == "Limits of a table"


def test_the_title_is_embedded_and_the_path_is_not(manual: dict[str, Document]) -> None:
    embedded = manual["vacuum.html"].get_content(MetadataMode.EMBED)
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
def test_encodings_and_bad_markup_are_read(reader: DocumentReader, name: str, content: bytes, expected: str) -> None:
    assert reader.read(name, content).text == expected


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("binary.txt", b"\x00\x01\x02", "is binary"),
        ("empty.html", b"", "holds no text"),
        ("blank.md", b" \n\n", "holds no text"),
        ("only-script.html", b"<script>x()</script>", "holds no text"),
        ("page.pdf", b"<p>a page</p>", "is not a PDF, whatever its name says"),
        ("scan.pdf", samples.pdf(["", ""]), "has no text, only pictures of pages: run OCR first"),
        ("locked.docx", b"\xd0\xcf\x11\xe0" + bytes(600), "is encrypted or of an older Office"),
        ("empty.xlsx", samples.workbook({"Sheet": []}), "holds no text"),
    ],
)
def test_what_is_no_document_is_refused_by_name(
    reader: DocumentReader, name: str, content: bytes, problem: str
) -> None:
    with pytest.raises(DocumentError, match=f"{name}: .*({problem})"):
        reader.read(name, content)


def test_an_encrypted_pdf_is_refused_and_one_that_opens_without_a_password_is_read(reader: DocumentReader) -> None:
    def encrypted(password: str) -> bytes:
        writer = PdfWriter(clone_from=io.BytesIO(samples.pdf(["The tide table."])))
        writer.encrypt(password, "owner", algorithm="AES-256")
        out = io.BytesIO()
        writer.write(out)
        return out.getvalue()

    with pytest.raises(DocumentError, match="is encrypted: save it without a password"):
        reader.read("locked.pdf", encrypted("secret"))
    assert reader.read("open.pdf", encrypted("")).text == "The tide table."


def test_a_long_title_does_not_crowd_out_the_text(reader: DocumentReader) -> None:
    page = f"<title>{'very ' * 500}long</title><p>text</p>".encode()
    assert len(reader.read("long.html", page).metadata["title"]) <= 120


OFFICE = {
    "a.pdf": samples.pdf(["The harbour closes\nat nine.", "", "The ferry leaves at ten."], "The harbour"),
    "a.docx": samples.word("The harbour closes at nine.", "The ferry leaves at ten.", title="The harbour"),
    "a.pptx": samples.slides(("The harbour", "It closes at nine."), ("The ferry", "It leaves at ten."), note="Ask Ada"),
    "a.xlsx": samples.workbook(
        {"Depths": [["berth", "depth"], ["north", 4.5], ["east", 3]], "None": [], "B": [[True]]}
    ),
    "a.odt": samples.odt("The harbour closes at nine.", "The ferry leaves at ten.", title="The harbour"),
    "a.odp": samples.odp("The harbour closes at nine.", "The ferry leaves at ten."),
    "a.ods": samples.ods({"Depths": [["berth", "depth"], ["north", 4.5]], "B": [["x"]]}),
}


def test_there_is_a_sample_of_each_kind() -> None:
    assert {Path(name).suffix for name in OFFICE} | {Path(name).suffix for name in find_documents(MANUAL).documents} | {
        *(".htm", ".xhtml", ".markdown"),
    } == set(KINDS)


@pytest.mark.parametrize(
    ("name", "title", "text"),
    [
        ("a.pdf", "The harbour", "The harbour closes\nat nine.\n\nThe ferry leaves at ten."),
        ("a.docx", "The harbour", "The harbour closes at nine.\n\nThe ferry leaves at ten.\n\nberth | depth |"),
        (
            "a.pptx",
            "The harbour",
            "The harbour\n\nIt closes at nine.\n\nAsk Ada\n\nThe ferry\n\nIt leaves at ten.\n\nAsk Ada",
        ),
        ("a.xlsx", "a", "berth | depth\nnorth | 4.5\neast | 3\n\nTRUE"),
        ("a.odt", "The harbour", "The harbour closes at nine.\n\nThe ferry leaves at ten."),
        ("a.odp", "presentation", "The harbour closes at nine.\n\nThe ferry leaves at ten."),
        ("a.ods", "a", "berth | depth\nnorth | 4.5\n\nx"),
    ],
)
def test_office_documents_and_pdf_give_their_text(reader: DocumentReader, name: str, title: str, text: str) -> None:
    document = reader.read(name, OFFICE[name])
    assert document.text == text
    assert document.metadata["title"] == title


def test_word_gives_what_is_in_text_boxes_controls_and_footnotes_and_not_what_was_taken_out(
    reader: DocumentReader,
) -> None:
    w = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    run = "<w:r><w:t>{}</w:t></w:r>"
    body = (
        f'<w:document xmlns:w="{w}" xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"><w:body>'
        f"<w:sdt><w:sdtContent><w:p>{run.format('control')}</w:p></w:sdtContent></w:sdt>"
        f"<w:p><w:r><mc:AlternateContent><mc:Choice><w:txbxContent><w:p>{run.format('box')}</w:p></w:txbxContent>"
        f"</mc:Choice><mc:Fallback><w:p>{run.format('again')}</w:p></mc:Fallback></mc:AlternateContent></w:r></w:p>"
        "<w:p><w:del><w:r><w:delText>deleted</w:delText></w:r></w:del>"
        f"<w:moveFrom>{run.format('moved')}</w:moveFrom></w:p></w:body></w:document>"
    )
    content = samples.replaced(samples.word("x"), {"word/document.xml": body.encode()})
    assert reader.read("a.docx", content).text == "control\n\nbox"


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("a.pdf", [{"page": 1}, {"page": 3}]),
        ("a.pptx", [{"slide": 1}, {"slide": 2}]),
        ("a.xlsx", [{"sheet": "Depths"}, {"sheet": "B"}]),
        ("a.odp", [{"slide": 1}, {"slide": 2}]),
        ("a.docx", [{}]),
    ],
)
def test_a_node_lies_in_one_page_and_says_which(
    reader: DocumentReader, name: str, places: list[dict[str, object]]
) -> None:
    document = reader.read(name, OFFICE[name])
    nodes = PageByPage(parser=SentenceSplitter(id_func=lambda number, page: f"{page.node_id}#{number}"))([document])
    assert [
        {key: value for key, value in node.metadata.items() if key not in {"document", "title"}} for node in nodes
    ] == places
    assert len({node.node_id for node in nodes}) == len(nodes)
    for node in nodes:
        assert isinstance(node, TextNode)
        assert node.ref_doc_id == name
        assert document.text[node.start_char_idx : node.end_char_idx] == node.text
        # A number says nothing about what is on a page; what a sheet is called does.
        assert ("sheet: " in node.get_content(MetadataMode.EMBED)) == ("sheet" in node.metadata)


def test_neither_the_service_nor_the_ingest_loads_a_parser() -> None:
    code = (
        "import sys, ragrack.api, ragrack.ingest\n"
        "print([name for name in ('lxml', 'pypdf', 'docx', 'python_calamine') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
