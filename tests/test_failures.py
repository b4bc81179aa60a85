"""The table of failures is what tests told, and each of those tests is there."""

from __future__ import annotations

import failures

PAGE = failures.PAGE.read_text()


def test_each_row_names_a_test_that_tells_it() -> None:
    told = failures.rows(PAGE)
    assert told
    for what, (*_, named) in told.items():
        path, name = named.strip("`").split("::")
        text = (failures.ROOT / "molecule" / path).read_text()
        assert f"def {name}(" in text, what
        assert f'"{what}"' in text, f"{named} does not tell {what!r}"


def test_what_was_told_replaces_its_row_and_no_other() -> None:
    page = f"before\n{failures.BEGIN}| h |\n|---|\n| a | 1 | 2 | 3 | t |\n{failures.END}after\n"
    after = failures.written(page, {"b": ["0", "5 s", "none", "u"]})
    again = failures.written(after, {"a": ["9", "2", "3", "t"]})
    assert failures.rows(again) == {"a": ["9", "2", "3", "t"], "b": ["0", "5 s", "none", "u"]}
    assert again.startswith("before\n")
    assert again.endswith("after\n")
