"""MetadataFilters as SQL over the column `filter` (jsonb). Every key and every value is a bound parameter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, LiteralString

from llama_index.core.vector_stores.types import MetadataFilters
from psycopg import sql

from ragrack.conditions import select
from ragrack.postgres_text import encode, plain


@dataclass(frozen=True)
class Condition:
    """SQL that is true or false for a node, never null, and its parameters by name."""

    text: sql.Composable
    parameters: dict[str, Any]

    def key(self) -> str:
        """The same for conditions that mean the same."""
        return f"{self.text.as_string(None)} {self.parameters!r}"


EVERYTHING = Condition(sql.SQL("true"), {})


def condition(
    filters: MetadataFilters | None, node_ids: Sequence[str] | None, doc_ids: Sequence[str] | None
) -> Condition:
    """Which nodes may be found. Raises ValueError for a filter that makes no sense."""
    selector = _Selector()
    parts = []
    if filters is not None and filters.filters:
        parts.append(select(filters, selector))
    for column, ids in (("node_id", node_ids), ("ref_doc_id", doc_ids)):
        if ids is not None:
            among = sql.SQL("coalesce({} = ANY ({}::text[]), false)")
            parts.append(among.format(sql.Identifier(column), selector.bind([encode(one) for one in ids])))
    return Condition(selector.both(parts), selector.parameters) if parts else EVERYTHING


class _Selector:
    """Puts a name of its own for each value into the SQL, and the value aside."""

    def __init__(self) -> None:
        self.parameters: dict[str, Any] = {}

    def bind(self, value: Any) -> sql.Placeholder:
        name = f"f{len(self.parameters)}"
        self.parameters[name] = value
        return sql.Placeholder(name)

    def everything(self) -> sql.Composable:
        return sql.SQL("true")

    def all_but(self, selected: sql.Composable) -> sql.Composable:
        return sql.SQL("NOT ({})").format(selected)

    def both(self, sets: Sequence[sql.Composable]) -> sql.Composable:
        return _joined(" AND ", sets)

    def either(self, sets: Sequence[sql.Composable]) -> sql.Composable:
        return _joined(" OR ", sets)

    def equal(self, key: str, values: Sequence[Any]) -> sql.Composable:
        return self._any_of(key, [one for one in map(plain, values) if one is not None])

    def hold(self, key: str, values: Sequence[Any]) -> sql.Composable:
        return self._any_of(key, [[one] for one in map(plain, values) if one is not None])

    def filled(self, key: str) -> sql.Composable:
        # jsonpath knows no answer to whether a number is a text, so the type comes first.
        return self._of_key(key, """jsonb_path_exists(filter -> {key}, '$[*] ? (@.type() != "string" || @ != "")')""")

    def compare(self, key: str, comparison: str, value: Any) -> sql.Composable:
        known = plain(value)
        if known is None:
            return sql.SQL("false")
        if isinstance(known, str):
            return self._of_key(key, _COMPARED_TEXTS[comparison], known)
        return self._of_key(key, _COMPARED_NUMBERS[comparison], json.dumps(known))

    def has_text(self, key: str, text: str, *, any_case: bool) -> sql.Composable:
        if any_case:
            return self._of_key(key, _HAS_TEXT_OF_ANY_CASE, encode(text.lower()))
        return self._of_key(key, _HAS_TEXT, encode(text))

    def _any_of(self, key: str, values: Sequence[Any]) -> sql.Composable:
        # One condition each, for each can be answered by the index.
        contained = [
            sql.SQL("filter @> {}::jsonb").format(self.bind(json.dumps({encode(key): value}))) for value in values
        ]
        return self.either(contained) if contained else sql.SQL("false")

    def _of_key(self, key: str, test: LiteralString, value: Any = None) -> sql.Composable:
        names = {"key": self.bind(encode(key))} | ({} if value is None else {"value": self.bind(value)})
        return sql.SQL("coalesce({}, false)").format(sql.SQL(test).format(**names))


def _joined(word: LiteralString, parts: Sequence[sql.Composable]) -> sql.Composable:
    return sql.SQL(word).join([sql.SQL("({})").format(part) for part in parts])


_COMPARISONS: tuple[LiteralString, ...] = (">", ">=", "<", "<=")
_COMPARED_TEXTS: dict[str, LiteralString] = {
    sign: "jsonb_typeof(filter -> {key}) = 'string' AND (filter ->> {key}) COLLATE \"C\" " + sign + " {value}"
    for sign in _COMPARISONS
}
_COMPARED_NUMBERS: dict[str, LiteralString] = {
    sign: "jsonb_typeof(filter -> {key}) = 'number' AND (filter -> {key}) " + sign + " {value}::jsonb"
    for sign in _COMPARISONS
}
_HAS_TEXT: LiteralString = "jsonb_typeof(filter -> {key}) = 'string' AND strpos(filter ->> {key}, {value}) > 0"
_HAS_TEXT_OF_ANY_CASE: LiteralString = """
jsonb_typeof(filter -> {key}) = 'string' AND strpos(lower((filter ->> {key}) COLLATE "pg_c_utf8"), {value}) > 0"""
