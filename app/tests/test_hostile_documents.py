"""Documents made to harm: each is refused in words or bounded, and the reader goes on with the next."""

from __future__ import annotations

import io
import os
import resource
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from llama_index.core.schema import Document
from ragrack.extract import KINDS, Limits
from ragrack.files import DocumentError
from ragrack.ingest import ingest
from ragrack.readers import DocumentReader, ReaderError
from ragrack.settings import Settings

from . import samples

LIMITS = Limits(document_max_pages=50, document_max_characters=200_000, document_read_seconds=4, document_read_mib=512)
NAMESPACE = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
LAUGHS = (
    '<!DOCTYPE x [<!ENTITY l0 "lol">' + "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10)) + "]>"
)
QUADRATIC = f'<!DOCTYPE x [<!ENTITY a "{"a" * 50_000}">]>'
FETCHED = '<!DOCTYPE x [<!ENTITY l9 SYSTEM "file:///etc/passwd">]>'


@pytest.fixture(scope="module")
def reader() -> Iterator[DocumentReader]:
    with DocumentReader(LIMITS) as reader:
        yield reader


def bomb(member: str, package: bytes, megabytes: int) -> bytes:
    """The package with so much of nothing in one of its members."""
    out = io.BytesIO(package)
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as archive, archive.open(member, "w") as file:
        for _ in range(megabytes):
            file.write(b" " * 2**20)
    return out.getvalue()


def with_doctype(package: bytes, member: str, doctype: str, entity: str = "&l9;") -> bytes:
    """The package, whose member declares entities and uses one where its first text was."""
    xml = zipfile.ZipFile(io.BytesIO(package)).read(member).decode()
    declaration, _, rest = xml.partition("?>")
    assert "HERE" in rest
    return samples.replaced(package, {member: f"{declaration}?>{doctype}{rest.replace('HERE', entity)}".encode()})


def nested(depth: int) -> bytes:
    """A page tree of so many levels."""
    objects = {
        20 + n: f"<< /Type /Pages /Kids [{21 + n} 0 R] /Count 1 /Parent {19 + n} 0 R >>".encode() for n in range(depth)
    }
    objects[20 + depth] = f"<< /Type /Page /Parent {19 + depth} 0 R /MediaBox [0 0 9 9] >>".encode()
    return samples.pdf(["x"], objects=objects | {2: b"<< /Type /Pages /Kids [20 0 R] /Count 1 >>"})


WORD = samples.word("HERE")
STRINGS = f'<?xml version="1.0"?><sst {NAMESPACE}><si><t>HERE</t></si></sst>'
SHEET = samples.replaced(samples.workbook({"S": [["x"]]}), {"xl/sharedStrings.xml": STRINGS.encode()})
# Two cells, in the first and in the last place of a sheet.
CORNERS = (
    f'<worksheet {NAMESPACE}><sheetData><row r="1"><c r="A1"><v>1</v></c></row>'
    '<row r="1048576"><c r="XFD1048576"><v>2</v></c></row></sheetData></worksheet>'
)
# A page that shows a form, which shows itself.
FORM = {
    10: b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] /Contents 11 0 R "
    b"/Resources << /XObject << /F 12 0 R >> >> >>",
    11: samples.stream(b"/F Do\n" * 1000),
    12: b"<< /Type /XObject /Subtype /Form /BBox [0 0 9 9] /Resources << /XObject << /F 12 0 R >> >> /Length 6 >>\n"
    b"stream\n/F Do \nendstream",
}
LOOP = {
    2: b"<< /Type /Pages /Kids [20 0 R] /Count 1 >>",
    20: b"<< /Type /Pages /Kids [2 0 R] /Count 1 /Parent 2 0 R >>",
}
MANY = {2: b"<< /Type /Pages /Kids [%s] /Count 10000 >>" % b" ".join([b"10 0 R"] * 10_000)}
COUNT = {2: b"<< /Type /Pages /Kids [10 0 R] /Count 999999999 >>"}
BOMB = {11: samples.stream(b"BT (" + b"a" * 200_000_000 + b") Tj ET")}
DEEP = b"".join(b"<div>" for _ in range(200_000))
HOSTILE = {
    "zip-bomb.docx": (bomb("word/more.xml", WORD, 2000), "it is a zip bomb, or RAGRACK_DOCUMENT_READ_MIB"),
    "picture-bomb.pptx": (
        bomb("ppt/media/more.png", samples.slides(("a", "b")), 2000),
        "it is a zip bomb, or RAGRACK_DOCUMENT_READ_MIB",
    ),
    "zip-bomb.ods": (
        bomb("more.xml", samples.ods({"S": [["x"]]}), 2000),
        "it is a zip bomb, or RAGRACK_DOCUMENT_READ_MIB",
    ),
    "laughs.docx": (with_doctype(WORD, "word/document.xml", LAUGHS), "entity amplification"),
    "quadratic.docx": (with_doctype(WORD, "word/document.xml", QUADRATIC, "&a;" * 50_000), "entity amplification"),
    "fetched.docx": (with_doctype(WORD, "word/document.xml", FETCHED), "Entity 'l9' not defined"),
    "laughs.odt": (with_doctype(samples.odt("HERE"), "content.xml", LAUGHS), "entity amplification"),
    "laughs.xlsx": (with_doctype(SHEET, "xl/sharedStrings.xml", LAUGHS), "cannot be read|holds no text"),
    "laughs.xhtml": (f"<?xml version='1.0'?>{LAUGHS}<html><body>&l9;</body></html>".encode(), None),
    "svg.html": (f"<p>a</p><svg>{LAUGHS}<text>&l9;</text></svg>".encode(), None),
    "deep.html": (DEEP + b"deep", "holds no text"),
    "nested.pdf": (nested(5000), "cannot be read as a PDF"),
    "loop.pdf": (samples.pdf(["x"], objects=LOOP), "cannot be read as a PDF|has no text"),
    "many.pdf": (samples.pdf(["x"], objects=MANY), "has more than 50 pages.*RAGRACK_DOCUMENT_MAX_PAGES"),
    "count.pdf": (samples.pdf(["one page"], objects=COUNT), None),
    "bomb.pdf": (samples.pdf(["x"], objects=BOMB), "cannot be read as a PDF|needs more than|takes more than"),
    "form.pdf": (samples.pdf(["x"], objects=FORM), "has no text|cannot be read|takes more than"),
    "cut.pdf": (samples.pdf(["a", "b"])[:400], "cannot be read as a PDF|has no text"),
    "cut.docx": (WORD[:-2000], "cannot be read as a Word document"),
    "cut.xlsx": (SHEET[:-200], "cannot be read as an Excel workbook"),
    "a-pdf.docx": (samples.pdf(["a"]), "is not a Word document"),
    "a-sheet.pptx": (SHEET, "cannot be read|holds no text"),
    "a-zip.pdf": (WORD, "is not a PDF"),
    "long.txt": (b"word " * 100_000, "has more than 200000 characters.*RAGRACK_DOCUMENT_MAX_CHARACTERS"),
    "corners.xlsx": (
        samples.replaced(SHEET, {"xl/worksheets/sheet1.xml": CORNERS.encode()}),
        "killed its reader",
    ),
    "slow.html": (b"<svg></svg>words" * 50_000, "takes more than 4 seconds.*RAGRACK_DOCUMENT_READ_SECONDS"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_document_is_refused_or_bounded_and_the_next_is_read(reader: DocumentReader, name: str) -> None:
    content, problem = HOSTILE[name]
    if problem is None:
        assert len(reader.read(name, content).text) < len(content)
    else:
        with pytest.raises(DocumentError, match=f"^{name}: .*({problem})"):
            reader.read(name, content)
    assert reader.read("good.pdf", samples.pdf([samples.A_PAGE])).text == samples.A_PAGE


def test_beside_hostile_documents_the_good_ones_are_ingested(settings: Settings) -> None:
    own = Settings.model_validate(settings.model_dump() | {f"{name}": value for name, value in vars(LIMITS).items()})
    root = own.documents_dir / "manual"
    for name, (content, _) in HOSTILE.items():
        (root / name).write_bytes(content)
    (root / "good.pdf").write_bytes(samples.pdf([samples.A_PAGE, "Page two."]))
    os.mkfifo(root / "pipe.txt")
    refused = ["pipe.txt", *(name for name, (_, problem) in HOSTILE.items() if problem is not None)]
    for _ in range(2):
        manifest = ingest(own, "manual", lambda *_args, **_more: None).manifest
        assert sorted(problem.partition(":")[0] for problem in manifest.skipped) == sorted(refused)
        # The five of the manual, the good one, and those that are harmless once bounded.
        assert manifest.documents == 6 + len(HOSTILE) - len(refused) + 1


@hypothesis_settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(suffix=st.sampled_from(sorted(KINDS)), tail=st.binary(max_size=400), sample=st.booleans(), data=st.data())
def test_any_bytes_are_a_document_or_a_refusal(
    reader: DocumentReader, suffix: str, tail: bytes, sample: bool, data: st.DataObject
) -> None:
    content = (KINDS[suffix].signature or b"") + tail
    if sample and suffix in GOOD:
        good = bytearray(GOOD[suffix])
        for _ in range(data.draw(st.integers(1, 8))):
            good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
        content = bytes(good[: data.draw(st.integers(1, len(good)))]) if data.draw(st.booleans()) else bytes(good)
    try:
        document = reader.read(f"a{suffix}", content)
    except DocumentError as error:
        assert str(error).startswith(f"a{suffix}: ")
        assert str(error).isprintable()
    else:
        assert isinstance(document, Document)
        assert document.text.strip()


GOOD = {
    ".pdf": samples.pdf(["one", "two"]),
    ".docx": WORD,
    ".pptx": samples.slides(("a", "b")),
    ".xlsx": SHEET,
    ".odt": samples.odt("a"),
    ".odp": samples.odp("a"),
    ".ods": samples.ods({"S": [["x"]]}),
}


@pytest.mark.parametrize("suffix", GOOD)
def test_what_the_hostile_ones_are_made_of_is_read(reader: DocumentReader, suffix: str) -> None:
    assert reader.read(f"good{suffix}", GOOD[suffix]).text


def test_the_process_that_reads_is_held_by_the_kernel(reader: DocumentReader) -> None:
    reader.read("good.txt", b"good")
    assert reader._running is not None
    process = reader._running.process
    held = {
        kind: resource.prlimit(process.pid, kind)
        for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE)
    }
    assert held == {
        resource.RLIMIT_AS: (512 * 2**20, 512 * 2**20),
        resource.RLIMIT_FSIZE: (0, 0),
        resource.RLIMIT_NPROC: (0, 0),
        resource.RLIMIT_CORE: (0, 0),
    }
    assert Path(f"/proc/{process.pid}/environ").read_bytes() == b""


def test_one_that_is_silent_for_too_long_is_killed_and_the_document_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    impatient = DocumentReader(Limits(50, 200_000, 1, 512))
    impatient.read("good.txt", b"good")
    assert impatient._running is not None
    process = impatient._running.process
    process.send_signal(signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr("ragrack.readers.GRACE", 0)
        with pytest.raises(DocumentError, match="was not read within 4 seconds") as caught:
            impatient.read("slow.txt", b"slow")
    assert caught.value.again
    assert process.poll() == -signal.SIGKILL
    assert impatient.read("good.txt", b"good").text == "good"
    impatient.close()


def test_a_reader_that_was_stopped_blames_no_document(reader: DocumentReader) -> None:
    reader.read("good.txt", b"good")
    assert reader._running is not None
    reader._running.process.terminate()
    reader._running.process.wait()
    with pytest.raises(ReaderError, match="has ended"):
        reader.read("good.txt", b"good")
    assert reader.read("good.txt", b"good").text == "good"


def test_what_was_refused_is_not_read_again_until_the_limits_are_others(settings: Settings) -> None:
    root = settings.documents_dir / "manual"
    (root / "many.pdf").write_bytes(samples.pdf([f"Page {number}" for number in range(9)]))
    few = Settings.model_validate(settings.model_dump() | {"document_max_pages": 5})
    read: list[str] = []

    class Spy(DocumentReader):
        def read(self, name: str, content: bytes) -> Document:
            read.append(name)
            return super().read(name, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ragrack.ingest.DocumentReader", Spy)
        for _ in range(2):
            skipped = ingest(few, "manual", lambda *_args, **_more: None).manifest.skipped
            assert [problem.partition(":")[0] for problem in skipped] == ["many.pdf"]
        assert read.count("many.pdf") == 1
        assert ingest(settings, "manual", lambda *_args, **_more: None).manifest.skipped == []
    assert read.count("many.pdf") == 2
