"""Documents of each kind, made by the libraries that write them; a PDF is written by hand, as hostile ones need it."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import docx
import odfdo
import openpyxl
import pptx

A_PAGE = "Page one says that the harbour of Varholm closes at nine."


def pdf(pages: Sequence[str], title: str = "", *, objects: Mapping[int, bytes] | None = None) -> bytes:
    """A page of text for each string, a line of it for each of its lines. `objects` take the place of those made."""
    kids = " ".join(f"{10 + 2 * number} 0 R" for number in range(len(pages)))
    made: dict[int, bytes] = {
        1: b"<< /Type /Catalog /Pages 2 0 R >>",
        2: f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        3: b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        4: f"<< /Title ({title}) >>".encode(),
    }
    for number, text in enumerate(pages):
        made[10 + 2 * number] = (
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {11 + 2 * number} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        ).encode()
        shown = "".join(f"({line}) Tj T* " for line in text.split("\n")) if text else ""
        made[11 + 2 * number] = stream(f"BT /F1 12 Tf 72 720 Td 14 TL {shown}ET".encode("latin-1"))
    made.update(objects or {})
    out = io.BytesIO(b"%PDF-1.7\n")
    out.seek(0, io.SEEK_END)
    places = {}
    for number, body in sorted(made.items()):
        places[number] = out.tell()
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
    table = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (max(made) + 1))
    for number in range(1, max(made) + 1):
        out.write(b"%010d 00000 n \n" % places[number] if number in places else b"0000000000 65535 f \n")
    out.write(b"trailer\n<< /Size %d /Root 1 0 R /Info 4 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (max(made) + 1, table))
    return out.getvalue()


def stream(data: bytes) -> bytes:
    packed = zlib.compress(data)
    return b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream" % (len(packed), packed)


def word(*paragraphs: str, title: str = "") -> bytes:
    document = docx.Document()
    document.core_properties.title = title
    for text in paragraphs:
        document.add_paragraph(text)
    table = document.add_table(rows=1, cols=2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "berth", "depth"
    return _saved(document)


def slides(*texts: tuple[str, str], note: str = "") -> bytes:
    presentation = pptx.Presentation()
    for heading, body in texts:
        slide = presentation.slides.add_slide(presentation.slide_layouts[1])
        slide.shapes.title.text = heading
        slide.placeholders[1].text = body
        if note:
            slide.notes_slide.notes_text_frame.text = note
    return _saved(presentation)


def workbook(sheets: Mapping[str, Sequence[Sequence[object]]]) -> bytes:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(list(row))
    return _saved(book)


def odt(*paragraphs: str, title: str = "") -> bytes:
    document = odfdo.Document("text")
    document.body.clear()
    document.meta.title = title
    for text in paragraphs:
        document.body.append(odfdo.Paragraph(text))
    return _saved(document)


def odp(*texts: str) -> bytes:
    document = odfdo.Document("presentation")
    document.body.clear()
    for number, text in enumerate(texts):
        page = odfdo.DrawPage(f"page{number}", name=f"Slide {number}")
        page.append(odfdo.Frame.text_frame(text, size=("7cm", "5cm"), position=("11cm", "8cm")))
        document.body.append(page)
    return _saved(document)


def ods(sheets: Mapping[str, Sequence[list[Any]]]) -> bytes:
    document = odfdo.Document("spreadsheet")
    document.body.clear()
    for name, rows in sheets.items():
        table = odfdo.Table(name)
        for values in rows:
            row = odfdo.Row()
            row.set_values(values)
            table.append_row(row)
        document.body.append(table)
    return _saved(document)


def replaced(package: bytes, members: Mapping[str, bytes]) -> bytes:
    """The package with these members in the place of those it had, or beside them."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(package)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            if name not in members:
                new.writestr(name, old.read(name))
        for name, data in members.items():
            new.writestr(name, data)
    return out.getvalue()


def _saved(document: Any) -> bytes:
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()
