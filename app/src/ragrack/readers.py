"""Files to documents: HTML, Markdown and plain text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from llama_index.core.schema import Document
from lxml import etree, html

UNSEEN = ("script", "style", "noscript", "template", "svg", "nav", "iframe", "object")
BLOCKS = {
    *("address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "dialog", "div", "dl"),
    *("dt", "fieldset", "figcaption", "figure", "footer", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "html"),
    *("li", "main", "ol", "p", "pre", "section", "summary", "table", "tbody", "tfoot", "thead", "tr", "ul"),
}
LINES = {"br", "li", "tr", "dt", "dd"}
# Links to other pages, in the words of DocBook, Sphinx and Docutils: they say nothing about this one.
FURNITURE = {"navheader", "navfooter", "sphinxsidebar", "related", "headerlink", "toc"}


class DocumentError(Exception):
    """A file that cannot be read as a document; the message says why."""


def find_documents(root: Path) -> Iterator[Path]:
    """The readable kinds of files below root, in a fixed order; hidden ones are not looked at."""
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if not hidden and path.suffix.lower() in READERS and path.is_file():
            yield path


def read_document(root: Path, path: Path, data: bytes | None = None) -> Document:
    """The document at `path` (whose content is `data`, if you have read it already).

    Its id and its metadata `document` are the path below root, its metadata `title` what it calls itself. The title is
    embedded with the text, the path is not. Raises DocumentError.
    """
    name = path.relative_to(root).as_posix()
    try:
        content = path.read_bytes() if data is None else data
        if b"\0" in content[:8192]:
            raise DocumentError(f"{name}: is binary, whatever its name says")
        text, title = READERS[path.suffix.lower()](content)
    except OSError as error:
        raise DocumentError(f"{name}: cannot be read ({error.strerror})") from error
    except (etree.LxmlError, ValueError, RecursionError) as error:
        raise DocumentError(f"{name}: cannot be parsed ({error})") from error
    if not text:
        raise DocumentError(f"{name}: holds no text")
    return Document(
        id_=name,
        text=text,
        metadata={"document": name, "title": _short(title) or path.stem},
        excluded_embed_metadata_keys=["document"],
        excluded_llm_metadata_keys=["document"],
    )


def _html(content: bytes) -> tuple[str, str]:
    try:
        # Told the encoding, the parser does not believe what the page says about itself.
        content.decode("utf-8")
        parser = html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True)
    except UnicodeDecodeError:
        parser = html.HTMLParser(remove_comments=True, remove_pis=True)
    tree = html.document_fromstring(content, parser=parser)
    title = tree.xpath("string((//title)[1])") or tree.xpath("string((//h1)[1])")
    for element in tree.xpath("//head") + [found for tag in UNSEEN for found in tree.iter(tag)]:
        element.drop_tree()
    for element in tree.xpath("//*[@class]"):
        if FURNITURE & set(element.get("class", "").lower().split()) and element.getparent() is not None:
            element.drop_tree()
    return _tidy("".join(_text(tree))), title


def _text(tree: html.HtmlElement) -> Iterator[str]:
    """The page's text, a blank line between blocks and the lines of `pre` as they are."""
    preformatted = 0
    line_starts = True
    for event, element in etree.iterwalk(tree, events=("start", "end")):
        tag = element.tag
        if tag == "pre":
            preformatted += 1 if event == "start" else -1
        if tag in BLOCKS or tag == "br":
            line_starts = True
            yield "\n" if tag in LINES else "\n\n"
        elif tag in {"td", "th"} and event == "end":
            yield " | "
        # A tail lies outside of its element, so what was counted above is right for both.
        text = (element.text if event == "start" else element.tail) or ""
        if not preformatted:
            text = re.sub(r"\s+", " ", text)
            text = text.lstrip() if line_starts else text
        if text:
            line_starts = False
            yield text


def _markdown(content: bytes) -> tuple[str, str]:
    text = _tidy(_decode(content))
    # A front matter is about the page, not of it.
    text = re.sub(r"\A---\n.*?\n---\n", "", text, count=1, flags=re.DOTALL).strip()
    heading = re.search(r"^#\s+(.+?)\s*#*$|^(.+)\n=+$", text, flags=re.MULTILINE)
    return text, (heading[1] or heading[2]) if heading else ""


def _plain(content: bytes) -> tuple[str, str]:
    text = _tidy(_decode(content))
    return text, text.split("\n", 1)[0]


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _tidy(text: str) -> str:
    lines = [line.rstrip() for line in text.replace("\xa0", " ").splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _short(title: str) -> str:
    """A title is part of every node: a long one would crowd out the text."""
    return " ".join(title.split()[:16])[:120]


READERS: dict[str, Callable[[bytes], tuple[str, str]]] = {
    ".html": _html,
    ".htm": _html,
    ".xhtml": _html,
    ".md": _markdown,
    ".markdown": _markdown,
    ".txt": _plain,
}
"""From a file's content to its text and title, by the end of its name."""
