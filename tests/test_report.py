import base64
import json
import re
import threading
from html.parser import HTMLParser

import nbformat
import pytest

from tnlib.job import Outcome
from tnlib.report import export_html, flatten, page, span, write_index

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags are closed in order; keeps the text and what a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.open += [] if tag in VOID else [tag]
        self.loads += [attributes[key] for key in ("src", "data", "poster") if key in attributes]
        self.loads += [attributes["href"]] if tag == "link" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if "style" not in self.open else ""


@pytest.fixture
def run(tmp_path):
    """A run's folder with one figure, one record, and the outcomes of four notebooks."""
    (tmp_path / "figures").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "figures" / "01_error.png").write_bytes(PNG)
    metrics = {
        "ppl": {"dense": 31.267891, "none": None},
        "n": 81341952,
        "rows": [{"form": "<TT>", "error": 1.23456e-6}, {"kept": 0.5}],
    }
    record = {"name": "01_a", "metrics": metrics, "seed": 3, "recipe": {"rules": [{"where": "mlp.*"}]}}
    (tmp_path / "results" / "01_a.json").write_text(json.dumps(record))
    outcomes = [
        Outcome(
            "01_a",
            "The `<first>` & best",
            "ok",
            seconds=34.2,
            parameters={"S": "<&\"'>"},
            figures=["01_error"],
            records=["01_a"],
        ),
        Outcome(
            "02_b",
            "Bad",
            "failed",
            seconds=2,
            cell=3,
            cells=5,
            error="ValueError",
            message="<script>",
            traceback="\x1b[31mred\x1b[0m",
        ),
        Outcome("03_c", "Goes", "running", started=0.0, cell=2, cells=9),
        Outcome("04_d", "Waits"),
    ]
    return tmp_path, outcomes


def test_the_page_is_well_formed_escaped_and_loads_nothing(run):
    text = page(*run, "tnlib <b>", 75, finished=False)
    shown = Page(text)
    assert shown.loads == ["data:image/png;base64," + base64.b64encode(PNG).decode()]
    assert not re.search(r"url\(|@import|<script", text)
    for words in (
        "The <first> & best",
        "S = '<&\"\\'>'",
        "ValueError: <script> (in cell 3 of 5)",
        "red",
        "cell 2 of 9",
        "34 s",
    ):
        assert words in shown.text
    assert "1 done · 1 running · 1 failed · 1 pending of 4 · 1 min 15 s" in shown.text


def test_metrics_are_flat_with_four_digits_and_lists_of_rows_are_tables(run):
    shown = Page(page(*run, "x", 0, finished=False)).text
    for words in (
        "ppl.dense",
        "31.27",
        "81,341,952",
        "<TT>",
        "1.235e-06",
        "–",
        'recipe: {"rules": [{"where": "mlp.*"}]}',
    ):
        assert words in shown
    single, tables = flatten({"a": {"b": 1, "c": [{"d": 2}]}, "e": [1, 2]})
    assert (single, tables) == ({"a.b": 1, "e": [1, 2]}, {"a.c": [{"d": 2}]})


def test_only_an_unfinished_page_reloads_itself(run):
    out, outcomes = run
    assert 'http-equiv="refresh"' in page(out, outcomes, "x", 0, finished=False)
    assert 'http-equiv="refresh"' not in page(out, outcomes, "x", 0, finished=True)
    assert "Stopped: " in page(out, outcomes, "x", 0, finished=True), "two notebooks have not run"
    assert "Finished: 1 done of 1" in page(out, outcomes[:1], "x", 0, finished=True)


def test_products_that_have_just_been_removed_do_not_break_the_page(run):
    out, outcomes = run
    (out / "figures" / "01_error.png").unlink()
    (out / "results" / "01_a.json").unlink()
    assert Page(page(out, outcomes, "x", 0, finished=False)).loads == []


def test_readers_see_whole_pages_only(run):
    out, outcomes = run
    write_index(out, outcomes, "x", 0, False)
    partial, over = [], threading.Event()

    def read():
        while not over.is_set():
            text = (out / "index.html").read_text(encoding="utf-8")
            partial.extend([text] if not text.endswith("</html>\n") else [])

    reader = threading.Thread(target=read)
    reader.start()
    for second in range(150):
        write_index(out, outcomes * (1 + second % 7), "x", second, False)
    over.set()
    reader.join()
    assert not partial
    assert [path.name for path in out.iterdir() if path.name.endswith(".tmp")] == []


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (59.6, "1 min 00 s"), (192, "3 min 12 s"), (3725, "1 h 02 min")]
)
def test_span(seconds, words):
    assert span(seconds) == words


def test_a_notebook_page_needs_no_server(tmp_path):
    cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("1 + 1")]
    widgets = {"application/vnd.jupyter.widget-state+json": {"state": {}, "version_major": 2, "version_minor": 0}}
    path = tmp_path / "01_a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"widgets": widgets}), path)
    assert export_html(path) is None
    text = path.with_suffix(".html").read_text(encoding="utf-8")
    assert "Title" in text
    assert not re.findall(r"""(?:src|href)=["']https?:[^"']*|unpkg""", text)


def test_a_notebook_that_cannot_be_exported_says_why_and_fails_nothing(tmp_path):
    (tmp_path / "01_a.ipynb").write_text("{")
    assert "JSONDecodeError" in export_html(tmp_path / "01_a.ipynb")
