"""What MetadataFilters select, whatever holds the metadata: one meaning for every store of ours.

A store says how it finds the nodes of one condition (`Selector`); here is which conditions there are, what they need
and how they combine. A node's value is a text, a number (true is 1, false 0) or a list of those; others cannot be
asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

S = TypeVar("S")
"""A set of nodes: a bitmap, a piece of SQL."""

_NEED_A_LIST = {FilterOperator.IN, FilterOperator.NIN, FilterOperator.ANY, FilterOperator.ALL}
_COMPARE = {FilterOperator.GT: ">", FilterOperator.GTE: ">=", FilterOperator.LT: "<", FilterOperator.LTE: "<="}


class Selector(Protocol[S]):
    """How a store finds nodes."""

    def everything(self) -> S: ...

    def all_but(self, selected: S) -> S: ...

    def both(self, sets: Sequence[S]) -> S:
        """Those in each of the sets, of which there is at least one."""

    def either(self, sets: Sequence[S]) -> S:
        """Those in any of the sets, of which there is at least one."""

    def equal(self, key: str, values: Sequence[Any]) -> S:
        """Those with any of the values under the key."""

    def hold(self, key: str, values: Sequence[Any]) -> S:
        """Those with a list under the key that has any of the values."""

    def filled(self, key: str) -> S:
        """Those with a value under the key that is not the empty text, or a list that has one."""

    def compare(self, key: str, comparison: str, value: Any) -> S:
        """Those whose text (number) under the key is `>`, `>=`, `<` or `<=` a text (number)."""

    def has_text(self, key: str, text: str, *, any_case: bool) -> S:
        """Those whose text under the key has that one in it."""


def select(filters: MetadataFilters, selector: Selector[S]) -> S:
    """Raises ValueError, which names the key, for a condition that makes no sense."""
    sets = [select(f, selector) if isinstance(f, MetadataFilters) else _one(f, selector) for f in filters.filters]
    if not sets:
        return selector.everything()
    match filters.condition:
        case FilterCondition.OR:
            return selector.either(sets)
        case FilterCondition.NOT:
            return selector.all_but(selector.either(sets))
        case _:
            return selector.both(sets)


def _one(condition: MetadataFilter, selector: Selector[S]) -> S:
    key, value, operator = condition.key, condition.value, condition.operator
    needs = f"the filter on {key!r} with {operator.value!r} needs"
    if operator == FilterOperator.IS_EMPTY:
        return selector.all_but(selector.filled(key))
    if operator in _NEED_A_LIST:
        if not isinstance(value, list):
            raise ValueError(f"{needs} a list")
        match operator:
            case FilterOperator.IN:
                return selector.equal(key, value)
            case FilterOperator.NIN:
                return selector.all_but(selector.equal(key, value))
            case FilterOperator.ANY:
                return selector.hold(key, value)
            case _:
                return selector.both([selector.everything(), *(selector.hold(key, [one]) for one in value)])
    if value is None or isinstance(value, list):
        raise ValueError(f"{needs} a single value")
    match operator:
        case FilterOperator.EQ:
            return selector.equal(key, [value])
        case FilterOperator.NE:
            return selector.all_but(selector.equal(key, [value]))
        case FilterOperator.GT | FilterOperator.GTE | FilterOperator.LT | FilterOperator.LTE:
            return selector.compare(key, _COMPARE[operator], value)
        case FilterOperator.CONTAINS if not isinstance(value, str):
            return selector.hold(key, [value])
    if not isinstance(value, str):
        raise ValueError(f"{needs} a text")
    match operator:
        case FilterOperator.CONTAINS:
            return selector.either([selector.hold(key, [value]), selector.has_text(key, value, any_case=False)])
        case FilterOperator.TEXT_MATCH:
            return selector.has_text(key, value, any_case=False)
        case FilterOperator.TEXT_MATCH_INSENSITIVE:
            return selector.has_text(key, value, any_case=True)
    raise ValueError(f"the filter on {key!r} uses {operator.value!r}, which is not supported")
