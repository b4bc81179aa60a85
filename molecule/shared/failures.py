"""What each failure costs: the tests tell it as they see it, and this makes the table in docs/operations.md of that.

`python molecule/shared/failures.py` writes what the last runs told (`.state/failures.json`) into the table.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOLD = ROOT / ".state/failures.json"
PAGE = ROOT / "docs/operations.md"
BEGIN, END = "<!-- told by the tests: begin -->\n", "<!-- told by the tests: end -->\n"
HEADS = ("what fails", "requests that fail", "until", "what is lost", "test")


def tell(what: str, *, requests: str, until: str, lost: str, test: str) -> None:
    """Keep what a test saw of a failure; of one that it saw before, the last is kept."""
    known = json.loads(TOLD.read_text()) if TOLD.exists() else {}
    known[what] = [requests, until, lost, test]
    TOLD.parent.mkdir(exist_ok=True)
    aside = TOLD.with_suffix(".new")
    aside.write_text(json.dumps(known, indent=2) + "\n")
    aside.replace(TOLD)


def rows(page: str) -> dict[str, list[str]]:
    """Of the table that a page has."""
    table = page[page.index(BEGIN) + len(BEGIN) : page.index(END)]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {what: rest for what, *rest in lines}


def written(page: str, told: dict[str, list[str]]) -> str:
    """The page with its table brought up to date; what was not told this time stays."""
    table = [" | ".join(HEADS), "|".join("---" for _ in HEADS)]
    table += [" | ".join([what, *rest]) for what, rest in sorted((rows(page) | told).items())]
    text = "".join(f"| {line} |\n" if "---" not in line else f"|{line}|\n" for line in table)
    return page[: page.index(BEGIN) + len(BEGIN)] + text + page[page.index(END) :]


def main() -> int:
    if not TOLD.exists():
        print(f"there is no {TOLD}. Mend: run the scenarios cluster, postgres and recovery first", file=sys.stderr)
        return 1
    aside = PAGE.with_suffix(".new")
    aside.write_text(written(PAGE.read_text(), json.loads(TOLD.read_text())))
    aside.replace(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
