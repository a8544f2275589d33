"""The prose of a README in Markdown: its paragraphs, without headings, badges, lists, tables and code around them."""

import html
import re

_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')]))\s+(?=["'(]*[A-Z])""")
_FEWEST_WORDS = 6


def prose(text):
    """Paragraphs of a Markdown text that end like a sentence, each on one line and without markup, images and addresses.

    Returns: list of str, those of quotations too; of six words or more
    Source: mistune (CommonMark with tables), which nbconvert renders notebooks with. Exact: plain sentences are returned as they are.
    """
    import mistune

    blocks = mistune.create_markdown(renderer=None, plugins=["table", "url"])(text)
    lines = [" ".join(_words(part["children"]).split()) for part in _paragraphs(blocks)]
    return [line for line in lines if len(line.split()) >= _FEWEST_WORDS and re.search(r"[.!?][\"')]*$", line)]


def sentences(text):
    """A paragraph cut at . ! or ? before a capital letter. Exact: joined by spaces they are the paragraph."""
    return _END.split(text)


def _paragraphs(blocks):
    """Paragraphs, of quotations too."""
    for block in blocks:
        if block["type"] == "paragraph":
            yield block
        elif block["type"] == "block_quote":
            yield from _paragraphs(block["children"])


def _words(parts):
    """Text of inline parts, of links the words."""
    said = ""
    for part in parts:
        if part["type"] in ("text", "codespan"):
            said += html.unescape(part["raw"])
        elif part["type"] in ("link", "emphasis", "strong"):
            words = _words(part["children"])
            said += "" if re.match(r"https?://\S+$", words) else words
        elif part["type"] in ("softbreak", "linebreak"):
            said += " "
    return re.sub(r"\s+([,.;:!?)])", r"\1", said)
