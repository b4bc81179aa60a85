"""A request's filters by metadata: LlamaIndex's MetadataFilters as JSON, typed and bounded.

    {"condition": "and", "filters": [{"key": "year", "operator": ">=", "value": 2020},
                                     {"condition": "not", "filters": [{"key": "lang", "value": "sv"}]}]}

They mean what they mean in LlamaIndex; a node without a key matches only `!=`, `nin` and `is_empty`. What a caller may
see at all is decided elsewhere (`ragrack.tenants.within`): a filter can only narrow it.
"""

from __future__ import annotations

from typing import Annotated, Any

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    Tag,
    model_validator,
)

MAX_DEPTH = 4
MAX_CONDITIONS = 32
MAX_VALUES = 64
MAX_CHARACTERS = 256

Text = Annotated[StrictStr, Field(max_length=MAX_CHARACTERS)]
Integer = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
Number = Annotated[StrictFloat, Field(allow_inf_nan=False)]
Values = Annotated[list[Text] | list[Integer] | list[Number], Field(max_length=MAX_VALUES)]

_OF_LISTS = {FilterOperator.IN, FilterOperator.NIN, FilterOperator.ANY, FilterOperator.ALL}
_OF_TEXTS = {FilterOperator.TEXT_MATCH, FilterOperator.TEXT_MATCH_INSENSITIVE}


class Condition(BaseModel):
    """What a node's metadata must hold under one key."""

    model_config = ConfigDict(extra="forbid")

    key: Text = Field(min_length=1, examples=["document"])
    operator: FilterOperator = Field(
        FilterOperator.EQ, description="`in`, `nin`, `any`, `all` take a list, `is_empty` nothing, the others a value."
    )
    value: Text | Integer | Number | Values | None = Field(None, examples=["sql-vacuum.html"])

    @model_validator(mode="after")
    def _fits(self) -> Condition:
        name = self.operator.value
        if self.operator == FilterOperator.IS_EMPTY:
            if self.value is not None:
                raise ValueError(f"{name} takes no value")
        elif self.operator in _OF_LISTS:
            if not isinstance(self.value, list):
                raise ValueError(f"{name} takes a list of values")
        elif self.value is None or isinstance(self.value, list):
            raise ValueError(f"{name} takes a single value")
        elif self.operator in _OF_TEXTS and not isinstance(self.value, str):
            raise ValueError(f"{name} takes a text")
        return self


def _kind(value: Any) -> str:
    group = "filters" in value if isinstance(value, dict) else isinstance(value, Filters)
    return "group" if group else "condition"


class Filters(BaseModel):
    """Conditions, and groups of them, of which all (`and`), one (`or`) or none (`not`) must hold."""

    model_config = ConfigDict(extra="forbid")

    filters: list[
        Annotated[Annotated[Condition, Tag("condition")] | Annotated[Filters, Tag("group")], Discriminator(_kind)]
    ] = Field(min_length=1, max_length=MAX_CONDITIONS)
    condition: FilterCondition = FilterCondition.AND

    def as_llama_index(self) -> MetadataFilters:
        return MetadataFilters(
            filters=[
                part.as_llama_index()
                if isinstance(part, Filters)
                else MetadataFilter(key=part.key, value=part.value, operator=part.operator)
                for part in self.filters
            ],
            condition=self.condition,
        )


def _bounded(value: Any) -> Any:
    """Before anything walks into it."""
    conditions, level, depth = 0, [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"groups may be nested {MAX_DEPTH} deep, no more")
        parts = [
            part
            for group in level
            if isinstance(group, dict) and isinstance(group.get("filters"), list)
            for part in group["filters"]
        ]
        conditions += len(parts)
        if conditions > MAX_CONDITIONS:
            raise ValueError(f"there may be {MAX_CONDITIONS} conditions and groups in all, no more")
        level = [part for part in parts if isinstance(part, dict) and "filters" in part]
    return value


RequestFilters = Annotated[Filters, BeforeValidator(_bounded)]
