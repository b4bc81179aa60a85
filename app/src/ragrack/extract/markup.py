"""HTML pages."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lxml import etree
from lxml import html as lxml_html

from ragrack.extract import Extracted, Limits

UNSEEN = ("script", "style", "noscript", "template", "svg", "nav", "iframe", "object")
BLOCKS = {
    *("address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "dialog", "div", "dl"),
    *("dt", "fieldset", "figcaption", "figure", "footer", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "html"),
    *("li", "main", "ol", "p", "pre", "section", "summary", "table", "tbody", "tfoot", "thead", "tr", "ul"),
}
LINES = {"br", "li", "tr", "dt", "dd"}
# Links to other pages, in the words of DocBook, Sphinx and Docutils: they say nothing about this one.
FURNITURE = {"navheader", "navfooter", "sphinxsidebar", "related", "headerlink", "toc"}


def html(content: bytes, limits: Limits) -> Extracted:
    extracted = Extracted(limits)
    if not content.strip():
        return extracted
    try:
        # Told the encoding, the parser does not believe what the page says about itself.
        content.decode("utf-8")
        encoding = "utf-8"
    except UnicodeDecodeError:
        encoding = None
    parser = lxml_html.HTMLParser(encoding=encoding, remove_comments=True, remove_pis=True, no_network=True)
    tree = lxml_html.document_fromstring(content, parser=parser)
    extracted.title = tree.xpath("string((//title)[1])") or tree.xpath("string((//h1)[1])")
    for element in tree.xpath("//head") + [found for tag in UNSEEN for found in tree.iter(tag)]:
        element.drop_tree()
    for element in tree.xpath("//*[@class]"):
        if FURNITURE & set(element.get("class", "").lower().split()) and element.getparent() is not None:
            element.drop_tree()
    extracted.add("".join(_text(tree)))
    return extracted


def _text(tree: lxml_html.HtmlElement) -> Iterator[str]:
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
