"""What Office and OpenDocument files have in common: a zip of XML."""

from __future__ import annotations

import zipfile
from io import BytesIO
from typing import Any

from lxml import etree

from ragrack.extract import LimitError, Limits, RefusedError

# Of a member that is XML, as its tree takes several times its size in memory.
XML_SHARE = 8


def check_package(content: bytes, limits: Limits) -> zipfile.ZipFile:
    """The zip, if what it says of itself can be unpacked within the limits. Raises RefusedError."""
    package = zipfile.ZipFile(BytesIO(content))
    members = package.infolist()
    if any(member.flag_bits & 1 for member in members):
        raise RefusedError("is encrypted: save it without a password")
    # Python's zipfile reads no more of a member than the directory says that it has.
    xml = sum(member.file_size for member in members if member.filename.endswith((".xml", ".rels")))
    for size, what in ((xml * XML_SHARE, "XML"), (sum(member.file_size for member in members), "data")):
        if size > limits.document_read_mib * 2**20:
            problem = f"unpacks to too much {what}: it is a zip bomb, or RAGRACK_DOCUMENT_READ_MIB is to be raised"
            raise LimitError(problem)
    return package


def parse(xml: bytes) -> Any:
    """The root element. Nothing is fetched and no entity expanded. Raises RefusedError."""
    root = etree.fromstring(xml, etree.XMLParser(resolve_entities=False, no_network=True))
    if root.getroottree().docinfo.internalDTD is not None:
        # Entities need one.
        raise RefusedError("declares a document type, which no office program writes")
    return root
