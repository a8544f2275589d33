"""Notebooks and their parameters: which exist, what each declares, and what a preset and -p set them to.

    books = find_notebooks("notebooks", ["02", "10_krony_pt"])
    resolve(books, load_preset("notebooks", "laptop"), {"SEED": 1})      # {"02_van_loan": {"SEED": 1, ...}, ...}

A preset is a YAML file: `all:` for every notebook that declares the key, then one section a notebook. What wins, from
weak to strong: the notebook's own default, `all`, the notebook's section, -p. A misspelled key is refused before
anything runs; papermill alone would only warn, and run with the default.
"""

import ast
import contextlib
import difflib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml


class _Yaml(yaml.SafeLoader):
    """YAML without its surprises: 1e-3 is a number; no, off and 2024-01-31 are text; a key given twice is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((key for number, key in enumerate(keys) if key in keys[:number]), None):
            problem = f"the key {twice!r} twice"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


_Yaml.yaml_implicit_resolvers = {
    first: [
        (tag, form) for tag, form in pairs if not tag.endswith(":timestamp") and (first in "tTfF" or ":bool" not in tag)
    ]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class PresetError(ValueError):
    """A notebook, preset or parameter that does not exist or does not fit."""


@dataclass(frozen=True)
class Notebook:
    """What is known of a notebook before it runs; `defaults` are those of its `parameters` cell."""

    name: str
    path: Path
    title: str
    code: tuple[str, ...]  # sources of the code cells
    defaults: dict
    reads: frozenset | None  # notebook numbers whose records it reads; None: those of all notebooks before it


def find_notebooks(folder, names=None):
    """The notebooks [0-9]*.ipynb of `folder` in order, or those named, in full or by number: {name: Notebook}."""
    paths = {path.stem: path for path in sorted(Path(folder).glob("[0-9]*.ipynb"))}
    if not paths:
        raise PresetError(
            f"no notebook in {folder}: got no file [0-9]*.ipynb.\n  Needed: the notebooks folder of a checkout; "
            "run from the repository's root, or name it with --folder"
        )
    chosen = set(paths if not names else ())
    for name in names or ():
        stem = Path(name).name.removesuffix(".ipynb")
        matches = [stem] if stem in paths else [known for known in paths if known.startswith(f"{stem}_")]
        if len(matches) != 1:
            raise PresetError(f"notebook {name!r}: got {len(matches)} of that name.{_remedy(stem, paths)}")
        chosen.update(matches)
    return {name: read_notebook(path) for name, path in paths.items() if name in chosen}


def read_notebook(path):
    """Read a notebook's title, code and declared parameters; refuse one without a cell tagged `parameters`."""
    with quick_import():
        import nbformat
        from papermill import inspect_notebook

    nb = nbformat.read(path, as_version=4)
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    if not any("parameters" in cell.metadata.get("tags", []) for cell in code):
        raise PresetError(
            f"notebook {path.stem}: no code cell is tagged 'parameters'.\n  Needed: one, holding literals only, so that "
            "presets and -p can change them. Tag its first code cell in JupyterLab's property inspector"
        )
    nb.metadata.setdefault("kernelspec", {}).setdefault("name", "python3")  # papermill asks for both
    nb.metadata.setdefault("language_info", {}).setdefault("name", "python")
    defaults = {name: _default(found["default"]) for name, found in inspect_notebook(nb).items()}
    headings = re.findall(
        r"^#+ +(.+)$", "\n".join(c.source for c in nb.cells if c.cell_type == "markdown"), re.MULTILINE
    )
    title = headings[0].strip() if headings else path.stem
    return Notebook(path.stem, Path(path), title, tuple(cell.source for cell in code), defaults, _reads(code))


@contextlib.contextmanager
def quick_import():
    """Import papermill, nbformat or nbconvert in here: three seconds sooner, because jsonschema does not build a grammar
    for a format that no notebook uses."""
    grammar = "rfc3987_syntax"
    hidden = grammar not in sys.modules
    if hidden:
        sys.modules[grammar] = None  # its import then fails, which jsonschema provides for
    try:
        yield
    finally:
        if hidden:
            sys.modules.pop(grammar, None)


def _reads(code):
    """Which records a notebook loads: it has to run after the notebooks that make them."""
    calls = re.findall(r"""\bload_result\(\s*(?:["'](\d+)_|)""", "\n".join(cell.source for cell in code))
    tagged = any("reads-results" in cell.metadata.get("tags", []) for cell in code)  # for a reading that no call shows
    return None if tagged or "" in calls else frozenset(calls)


def scale_of(preset):
    """A run's scale is the name of its preset: laptop, or mine for the file other/mine.yaml."""
    return Path(preset).stem if str(preset).endswith((".yaml", ".yml")) else str(preset)


def load_preset(folder, preset):
    """Read presets/PRESET.yaml beside the notebooks, or the YAML file that `preset` is the path of: a dict of dicts."""
    presets = Path(folder) / "presets"
    path = Path(preset) if str(preset).endswith((".yaml", ".yml")) else presets / f"{preset}.yaml"
    if not path.exists():
        raise PresetError(
            f"preset {preset!r}: got no such preset.{_remedy(preset, [p.stem for p in presets.glob('*.yaml')])}"
        )
    data = literal(path.read_text(encoding="utf-8"), f"preset {path.name}") or {}
    sections = {key: value or {} for key, value in data.items()} if isinstance(data, dict) else {"": data}
    for key, value in sections.items():
        if not isinstance(value, dict):
            raise PresetError(
                f"preset {path.name}, section {key!r}: got {value!r}.\n  Needed: parameters, one 'NAME: value' a line, "
                "indented under 'all:' or a notebook's name"
            )
    return sections


def literal(text, where):
    """The value of a piece of YAML; `where` opens the error if it is none."""
    try:
        return yaml.load(text, _Yaml)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise PresetError(f"{where}: got {said}.\n  Needed: YAML, such as 4, 1e-3, [2, 4] or gpt2") from None


def resolve(books, preset, given=None, every=None):
    """Parameters of each notebook that is to run.

    books: the notebooks to run; every: all notebooks of the folder, so that a preset is judged by them; by default books
    preset: {"all": {...}, notebook: {...}}; given: {parameter: value}, for each notebook that declares it
    Returns: {notebook: {parameter: value}}, only what differs from being left alone
    Raises: PresetError for a key that nothing declares, or a value of another type than the notebook's default
    """
    every, given = every or books, given or {}
    if len(books) == len(every):  # one notebook may run before the others of its preset are written
        _refuse_unknown(
            "section", [key for key in preset if key != "all"], every, "the preset", "the name of a notebook"
        )
    declared = {name for book in every.values() for name in book.defaults}
    _refuse_unknown("parameter", preset.get("all", {}), declared, "the preset's section 'all'", "a declared parameter")
    declared = {name for book in books.values() for name in book.defaults}
    _refuse_unknown("parameter", given, declared, f"-p for {', '.join(books)}", "a declared parameter")
    resolved = {}
    for name, book in books.items():
        section = preset.get(name, {})
        _refuse_unknown("parameter", section, book.defaults, f"the preset's section {name!r}", "a declared parameter")
        layers = preset.get("all", {}) | section | given
        resolved[name] = {key: layers[key] for key in book.defaults if key in layers}
        for key, value in resolved[name].items():
            _refuse_type(name, key, book.defaults[key], value)
    return resolved


def _refuse_unknown(kind, keys, known, where, needed):
    for key in keys:
        if key not in known:
            raise PresetError(f"{where}: got the unknown {kind} {key!r}, needed {needed}.{_remedy(key, known)}")


def _remedy(word, known):
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return f"{meant}\n  There is: {', '.join(sorted(known)) or 'none'}"


def _refuse_type(name, key, default, value):
    """A default's type is a promise: `-p STEPS 12o` must not reach the notebook as text."""
    number = (int, float)
    if default is None or value is None:
        return
    if isinstance(default, bool) or isinstance(value, bool):
        fits = type(default) is type(value)
    else:
        fits = isinstance(value, number if isinstance(default, number) else type(default))
    if not fits:
        quoting = f" Quote it: \"'{value}'\"" if isinstance(default, str) else ""
        raise PresetError(
            f"notebook {name}, parameter {key}: got {value!r} ({type(value).__name__}).\n"
            f"  Needed: {type(default).__name__}, as its default {default!r}.{quoting}"
        )


def _default(source):
    """The value of a default; None, which accepts any type, where it is not a literal."""
    try:
        value = ast.literal_eval(source)
    except (ValueError, SyntaxError):
        return None
    return list(value) if isinstance(value, tuple) else value  # YAML knows lists only
