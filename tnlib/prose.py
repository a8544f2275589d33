"""The prose of a README: its sentences, without the markup, headings, badges, tables and code around them."""

import html
import re

_LINE = re.compile(  # begins a line that is no prose
    r"""^\s*(
              \#                                    # Markdown heading
            | \.\.\ |\.\.$|:[\w-]+:                 # reStructuredText directive or option
            | \||\+[-=+]+                           # table
            | >>>|\.\.\.\ |\$\ |%\ |In\ \[          # session
            | [-*+•]\s|\d+[.)]\s                    # item of a list
            | \[[^\]]+\]:                           # target of a link
            | !?\[?!\[                              # image, badge
            | ([^\w\s])\2{2,}\s*$                   # underline, rule
            )""",
    re.VERBOSE,
)
_INLINE = [  # pattern, replacement
    (r"!\[[^\]]*\](\([^)]*\)|\[[^\]]*\])", " "),  # image
    (r"\[([^\]]+)\](\([^)]*\)|\[[^\]]*\])", r"\1"),  # Markdown link
    (r"`([^`<]+?)\s*<[^`>]*>`_+", r"\1"),  # reStructuredText link
    (r":[\w:+-]+:`~?([^`<]+?)(\s*<[^`>]*>)?`", r"\1"),  # role
    (r"`+([^`]+)`+_*", r"\1"),  # code, or a reference
    (r"</?[a-zA-Z][^<>]*>", " "),  # tag, or an address in angle brackets
    (r"https?://\S+", " "),
    (r"\[([^\]]+)\]", r"\1"),  # Markdown link whose target stands elsewhere
    (r"\|[\w .-]+\|_?", " "),  # substitution
    (r"(\*\*|__|\*|(?<!\w)_(?=\w))(\S.*?\S|\S)\1", r"\2"),  # emphasis
    (r"(\w)_(?=[\s.,;:)]|$)", r"\1"),  # reference of one word
]
_QUOTED = re.compile(r"^ {0,3}>(?!>) ?")  # mark of a quotation; >>> is a session
_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')]))\s+(?=["'(]*[A-Z])""")


def prose(text):
    """Paragraphs of a README in Markdown or reStructuredText, each of whole sentences on one line.

    Returns: list of str. A paragraph is text between blank lines that ends like a sentence and has six words or more, and is
        no heading, list, table, badge or code
    Source: rules of our own; no parser of either markup is needed for reading. Exact: plain sentences are returned as they are.
    """
    text = text.replace("\r", "").expandtabs(4)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^\s*(```|~~~).*?^\s*\1[^\n]*$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<(pre|style|script|table|h[1-6])\b.*?</\1>", "\n\n", text, flags=re.DOTALL | re.IGNORECASE)
    found = []
    for block in re.split(r"\n\s*\n", text):
        lines = [_QUOTED.sub("", line) for line in block.strip("\n").split("\n")]
        if any(_LINE.match(line) for line in lines) or lines[0].startswith("    "):
            continue
        line = _plain(" ".join(lines))
        if len(line.split()) >= 6 and re.search(r"[.!?][\"')]*$", line):
            found.append(line)
    return found


def sentences(text):
    """A paragraph cut at . ! or ? before a capital letter. Exact: joined by spaces they are the paragraph."""
    return _END.split(text)


def _plain(line):
    """A line without inline markup and with single spaces."""
    for pattern, replacement in _INLINE:
        line = re.sub(pattern, replacement, line)
    line = re.sub(r"\\(\W)", r"\1", html.unescape(line))
    return re.sub(r"\s+([,.;:!?)])", r"\1", " ".join(line.split()))
