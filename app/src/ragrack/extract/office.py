"""Word and PowerPoint documents, and OpenDocument's texts and presentations.

python-docx opens the packages. The text is gathered here from the XML, in its order, because python-docx passes over
content controls and text boxes.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from io import BytesIO
from typing import Any

from docx.opc.constants import RELATIONSHIP_TYPE
from docx.opc.package import OpcPackage
from docx.opc.part import Part
from lxml import etree

from ragrack.extract import Extracted, Limits
from ragrack.extract.package import check_package, parse

RELATIONSHIP = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"
# Word keeps a second form of some drawings, and a first place of what was moved.
OOXML_UNSEEN = {"Fallback", "moveFrom"}
OFFICE = "{urn:oasis:names:tc:opendocument:xmlns:office:1.0}"
TEXT = "{urn:oasis:names:tc:opendocument:xmlns:text:1.0}"
DRAW = "{urn:oasis:names:tc:opendocument:xmlns:drawing:1.0}"
ODF_UNSEEN = {f"{OFFICE}annotation", f"{TEXT}tracked-changes"}


def docx(content: bytes, limits: Limits) -> Extracted:
    package = _open(content, limits)
    main = package.main_document_part
    extracted = Extracted(limits)
    shown = [main, *_related(main, RELATIONSHIP_TYPE.FOOTNOTES)]
    extracted.add("".join(text for part in shown for text in _ooxml_text(parse(part.blob))))
    extracted.title = _title(package) or extracted.first_line
    return extracted


def pptx(content: bytes, limits: Limits) -> Extracted:
    package = _open(content, limits)
    main = package.main_document_part
    slides = [main.related_parts[element.get(RELATIONSHIP)] for element in parse(main.blob).iter("{*}sldId")]
    extracted = Extracted(limits, "slide", len(slides))
    for number, slide in enumerate(slides, start=1):
        shown = [slide, *_related(slide, RELATIONSHIP_TYPE.NOTES_SLIDE)]
        extracted.add("".join(text for part in shown for text in _ooxml_text(parse(part.blob))), number)
    extracted.title = _title(package) or extracted.first_line
    return extracted


def odt(content: bytes, limits: Limits) -> Extracted:
    package = check_package(content, limits)
    extracted = Extracted(limits)
    extracted.add("".join(_odf_text(parse(package.read("content.xml")))))
    extracted.title = _odf_title(package) or extracted.first_line
    return extracted


def odp(content: bytes, limits: Limits) -> Extracted:
    package = check_package(content, limits)
    slides = list(parse(package.read("content.xml")).iter(f"{DRAW}page"))
    extracted = Extracted(limits, "slide", len(slides))
    for number, slide in enumerate(slides, start=1):
        extracted.add("".join(_odf_text(slide)), number)
    extracted.title = _odf_title(package) or extracted.first_line
    return extracted


def _open(content: bytes, limits: Limits) -> OpcPackage:
    check_package(content, limits)
    return OpcPackage.open(BytesIO(content))


def _related(part: Part, kind: str) -> list[Part]:
    return [rel.target_part for rel in part.rels.values() if rel.reltype == kind and not rel.is_external]


def _title(package: OpcPackage) -> str:
    return (package.core_properties.title or "").strip()


def _ooxml_text(root: Any) -> Iterator[str]:
    """Of WordprocessingML and DrawingML alike: their names for text, paragraphs and tables are the same."""
    cells = 0
    walk = etree.iterwalk(root, events=("start", "end"))
    for event, element in walk:
        name = element.tag.rpartition("}")[2]
        if event == "start":
            if name in OOXML_UNSEEN:
                walk.skip_subtree()
            elif name == "t":
                yield element.text or ""
            elif name == "tab":
                yield " "
            elif name in {"br", "cr"}:
                yield "\n"
            elif name == "tc":
                cells += 1
        elif name == "p":
            yield " " if cells else "\n\n"
        elif name == "tc":
            cells -= 1
            yield "| "
        elif name in {"tr", "tbl"}:
            yield "\n"


def _odf_text(root: Any) -> Iterator[str]:
    inside = 0
    cells = 0
    walk = etree.iterwalk(root, events=("start", "end"))
    for event, element in walk:
        name = element.tag.rpartition("}")[2]
        paragraph = element.tag in {f"{TEXT}p", f"{TEXT}h"}
        if event == "start":
            if element.tag in ODF_UNSEEN:
                walk.skip_subtree()
                continue
            inside += paragraph
            cells += name == "table-cell"
            if name in {"s", "tab"}:
                yield " "
            elif name == "line-break":
                yield "\n"
            yield (element.text or "") if inside else ""
            continue
        inside -= paragraph
        if paragraph:
            yield " " if cells else "\n\n"
        elif name == "table-cell":
            cells -= 1
            yield "| "
        elif name in {"table-row", "table"}:
            yield "\n"
        yield (element.tail or "") if inside else ""


def _odf_title(package: zipfile.ZipFile) -> str:
    if "meta.xml" not in package.namelist():
        return ""
    return (parse(package.read("meta.xml")).findtext(".//{http://purl.org/dc/elements/1.1/}title") or "").strip()
