"""Lint of every committed notebook: parameters, size, execution state. nbval replays their outputs in `make test`."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PRESETS = sorted((ROOT / "notebooks" / "presets").glob("*.yaml"))


@pytest.fixture(params=BOOKS, ids=lambda path: path.stem)
def book(request):
    return request.param, json.loads(request.param.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def code(cells):
    return [cell for cell in cells if cell["cell_type"] == "code" and source(cell).strip()]


def test_there_are_notebooks_and_presets():
    numbers = {int(path.name[:2]) for path in BOOKS}
    assert numbers >= {*range(8), *range(10, 15), *range(20, 24)}
    assert {path.stem for path in PRESETS} == {"smoke", "laptop", "long", "gpu", "paper"}


def test_opens_with_its_title_and_a_question_or_claim(book):
    path, content = book
    first = content["cells"][0]
    assert first["cell_type"] == "markdown"
    assert re.match(rf"# {path.stem[:2]}\b", source(first)), "first cell: '# NN Title'"


def test_first_code_cell_is_tagged_parameters_and_holds_annotated_literals(book):
    cell = code(book[1]["cells"])[0]
    assert "parameters" in cell["metadata"].get("tags", [])
    names = set()
    for node in ast.parse(source(cell)).body:
        assert isinstance(node, ast.AnnAssign), f"annotate, so that papermill knows the type: {ast.unparse(node)}"
        ast.literal_eval(node.value)  # anything computed would not follow an injected value
        names.add(node.target.id)
    assert {"SCALE", "SEED"} <= names
    assert not any("injected-parameters" in c["metadata"].get("tags", []) for c in book[1]["cells"])


def test_was_run_top_to_bottom_without_errors_or_noise(book):
    cells = code(book[1]["cells"])
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for number, cell in enumerate(cells, 1):
        for output in cell["outputs"]:
            assert output["output_type"] != "error", f"cell {number}"
            assert output.get("name") != "stderr", f"cell {number} prints to stderr: {output.get('text')}"


def test_cells_are_short_and_few_functions_are_defined(book):
    cells = code(book[1]["cells"])
    for number, cell in enumerate(cells, 1):
        assert len([line for line in source(cell).splitlines() if line.strip()]) <= 25, f"cell {number}"
    defined = re.findall(r"^\s*def (\w+)", "\n".join(map(source, cells)), flags=re.M)
    assert len(defined) <= 2, defined


def test_has_a_control_a_static_figure_a_record_and_checked_numbers(book):
    text = "\n".join(source(cell) for cell in code(book[1]["cells"]))
    assert re.search(r"_explorer\(|Explorer\(", text)
    assert "tn.save_figure(" in text
    assert f'tn.save_result("{book[0].stem}"' in text
    assert "# NBVAL_CHECK_OUTPUT" in text
    assert "assert " in text


def test_figures_carry_the_number_of_the_notebook(book):
    text = "\n".join(source(cell) for cell in code(book[1]["cells"]))
    for name in re.findall(r'save_figure\(\s*\w+,\s*f?"([^"]+)"', text):
        assert name.startswith(book[0].stem[:2] + "_"), name


def test_says_nothing_about_machines_and_stays_small(book):
    text = book[0].read_text(encoding="utf-8")
    assert not re.search(r"(?:/tmp|/work|/root|/home)/\w", text)
    assert book[0].stat().st_size < 600_000


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_name_notebooks_that_exist(path):
    preset = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    assert set(preset) - {"all"} <= {book.stem for book in BOOKS}
