"""A text's sentences, as LlamaIndex splits them, without the data files that it loads along the way.

LlamaIndex's own tokenizer first reads a list of stopwords by NLTK, which refuses files that are hard links; uv installs
hard links, and releases share files by them.
"""

from __future__ import annotations

from nltk.tokenize import PunktSentenceTokenizer

_TOKENIZER = PunktSentenceTokenizer()


def split_sentences(text: str) -> list[str]:
    """The sentences, each with the blanks up to the next one: joined they are the text again but for leading blanks.

    For SentenceSplitter's `chunking_tokenizer_fn` and SentenceEmbeddingOptimizer's `tokenizer_fn`.
    """
    starts = [start for start, _ in _TOKENIZER.span_tokenize(text)]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
