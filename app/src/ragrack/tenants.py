"""Tenants: whose a node is, and who may see it.

A node's tenant is written by the ingest, from the folder that its document lies in, and never from what the document
says. What an identity sees follows from the identity alone: a request can only narrow it.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from llama_index.core.schema import Document
from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from ragrack.auth import TENANT_PATTERN, Identity

TENANT = "tenant"
"""The key in a node's metadata."""


class NoFolderError(ValueError):
    """The document is nobody's; the message names it and what mends it."""


class NoTenantError(PermissionError):
    """Nothing is this identity's to see. `ragrack.access` lets none such in; this is the second lock."""


def tenant_filter(identity: Identity) -> MetadataFilters | None:
    """What every retriever made for this identity must filter by; None where it may see all.

    Raises NoTenantError for an identity that has neither a tenant nor the right to see all.
    """
    if identity.all_tenants:
        return None
    if identity.tenant is None:
        raise NoTenantError(f"{identity.name} has no tenant: there is nothing that it may see")
    own = MetadataFilter(key=TENANT, value=identity.tenant, operator=FilterOperator.EQ)
    return MetadataFilters(filters=[own], condition=FilterCondition.AND)


def within(identity: Identity, asked: MetadataFilters | None) -> MetadataFilters | None:
    """The request's own filters, inside of what the identity may see: one term of an AND, whatever they say."""
    own = tenant_filter(identity)
    if own is None or asked is None:
        return own or asked
    return MetadataFilters(filters=[*own.filters, asked], condition=FilterCondition.AND)


def of_all(filters: MetadataFilters) -> str | None:
    """Whose all nodes are that the filters leave; None where they do not say it outright."""
    if filters.condition != FilterCondition.AND:
        return None
    for one in filters.filters:
        if isinstance(one, MetadataFilter) and one.key == TENANT and one.operator == FilterOperator.EQ:
            return one.value if isinstance(one.value, str) else None
    return None


def mark(document: Document) -> None:
    """Writes into a document, and so into its nodes, whose it is: the first folder of its path. Neither the embedding
    nor the LLM sees it. Raises NoFolderError.
    """
    folder, _, rest = document.doc_id.partition("/")
    if not rest or not re.fullmatch(TENANT_PATTERN, folder):
        raise NoFolderError(f"{document.doc_id}: lies in no tenant's folder: move it to <tenant>/{document.doc_id}")
    document.metadata[TENANT] = folder
    document.excluded_embed_metadata_keys.append(TENANT)
    document.excluded_llm_metadata_keys.append(TENANT)


def may_touch(identity: Identity, document: str) -> bool:
    """Whether a document, by its path below its collection's folder, is this identity's to read, write or remove."""
    parts = PurePosixPath(document).parts
    return identity.all_tenants or (len(parts) > 1 and parts[0] == identity.tenant and ".." not in parts)
