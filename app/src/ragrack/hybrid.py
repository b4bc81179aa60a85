"""Meaning and words together: which words of a question are looked for, and how the two orders become one.

The same for every store, so that a collection that moves to another one is found in as it was.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

RRF_K = 60
"""Of reciprocal rank fusion, as in Cormack, Clarke and Büttcher, SIGIR 2009."""
CANDIDATES = 20
"""Nodes that each half of a hybrid query puts forward, at least."""
WORDS_READ = 128
"""Of a question, the first: what is past them decides nothing."""
FREQUENT_SHARE = 8
"""A word in more than one of so many nodes is not looked for: it says little about any, and fusion counts ranks."""
MATCHES = 2_000
"""Nodes that the words looked for may match, each counted alone: what a question costs at most, a microsecond each."""
MATCHES_SHARE = 100
"""Or one of so many nodes, where that is more: the more nodes there are, the more hold a word, however rare it is."""


def words_of(text: str) -> Sequence[str]:
    """In lower case, each once."""
    return list(dict.fromkeys(re.findall(r"[^\W_]+", text.lower())))[:WORDS_READ]


def most_matches(nodes: int) -> int:
    """Nodes that the words looked for may match, of so many. Counting a word may stop one past it."""
    return max(MATCHES, nodes // MATCHES_SHARE)


def frequent(count: int, nodes: int) -> bool:
    """Whether a word that so many of the nodes hold is in too many."""
    return count > max(min(nodes // FREQUENT_SHARE, most_matches(nodes)), 1)


def worth_asking(counts: Mapping[str, int], nodes: int, rare: Collection[str] = ()) -> Sequence[str]:
    """The words to look for, the rarest first. `counts`: the nodes that hold each, of `nodes` in all.

    Where these are a part of the index, such as a tenant's, `rare` names the words that are not frequent in all of it:
    they say much about a node, in however many of a few nodes they are.
    """
    budget, asked = most_matches(nodes), []
    for word in sorted((word for word in counts if counts[word]), key=lambda word: counts[word]):
        budget -= counts[word]
        if budget < 0 or (frequent(counts[word], nodes) and word not in rare):
            break
        asked.append(word)
    return asked


def candidates(k: int) -> int:
    """Nodes that each half puts forward for an answer of `k`."""
    return max(2 * k, CANDIDATES)


def fuse(
    dense: Sequence[int], matched: Sequence[int], similarity: Mapping[int, float], k: int, cutoff: float | None
) -> list[tuple[int, float]]:
    """The best `k` rows with their cosines, by reciprocal rank in both orders.

    `similarity` has the cosine of every row. One below the cut-off takes no other's place.
    """
    fused = {row: 0.0 for row, cosine in similarity.items() if cutoff is None or cosine >= cutoff}
    for order in (dense, matched):
        for rank, row in enumerate((row for row in order if row in fused), start=1):
            fused[row] += 1 / (RRF_K + rank)
    best = sorted(fused, key=lambda row: (-fused[row], -similarity[row], row))[:k]
    return [(row, similarity[row]) for row in best]
