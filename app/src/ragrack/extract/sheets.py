"""Spreadsheets, sheet by sheet: a line for each row, its cells as they are shown or were last computed."""

from __future__ import annotations

from datetime import date, time, timedelta
from io import BytesIO

from python_calamine import CalamineWorkbook, PasswordError

from ragrack.extract import Extracted, Limits, RefusedError
from ragrack.extract.package import check_package

LABEL_CHARACTERS = 64
Cell = int | float | str | bool | time | date | timedelta


def workbook(content: bytes, limits: Limits) -> Extracted:
    check_package(content, limits)
    try:
        book = CalamineWorkbook.from_filelike(BytesIO(content))
    except PasswordError as error:
        raise RefusedError("is encrypted: save it without a password") from error
    # A workbook has no title of its own: its file's name says more than the first cell.
    extracted = Extracted(limits, "sheet", len(book.sheet_names))
    for name in book.sheet_names:
        rows = book.get_sheet_by_name(name).to_python()
        extracted.add("\n".join(_line(row) for row in rows), " ".join(name.split())[:LABEL_CHARACTERS])
    return extracted


def _line(row: list[Cell]) -> str:
    return " | ".join(_shown(cell) for cell in row).rstrip(" |")


def _shown(cell: Cell) -> str:
    if isinstance(cell, bool):
        return "TRUE" if cell else "FALSE"
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return " ".join(str(cell).split())
