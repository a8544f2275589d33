"""What a command line names: a RECIPE, a MODEL's shapes."""

import difflib
import json
from dataclasses import fields, replace
from pathlib import Path

from tnlib.assets import ASSETS, fetch
from tnlib.checkpoint_files import skeleton_of
from tnlib.families import FAMILIES
from tnlib.papers import papers, skeleton
from tnlib.plan import plan
from tnlib.recipe import Recipe, RecipeError, model_type
from tnlib.shapes import ShapeError
from tnlib.wheel import AssetError

BASES = ("gpt2", "gpt2-50k", "distilgpt2", "smollm2-135m", "bert-base-uncased", "meta-llama/Llama-2-7b-hf")  # of skeleton
AMOUNTS = ("rank", "terms", "ranks", "max_rank")  # fields of forms that `kept` stands in place of


def named_recipe(text, model, kept=None):
    """The Recipe that `text` names, for a model.

    text: a key of papers, or the path of a JSON file as Recipe.to_dict gives it
    model: whom it is for. A recipe with a base, where it does not fit as it is printed, is scaled to the model
    kept: the share of its matrix's numbers that every form gets in place of its ranks; None: as the recipe says
    Raises: RecipeError for a name or file that there is not, or that is none
    Exact: a recipe written as JSON and named by its file is the recipe.
    """
    recipe = _read(text)
    if kept is not None:
        given = replace(recipe, rules=_rekept(recipe.rules, kept), stages=tuple(_rekept(s, kept) for s in recipe.stages))
        recipe = replace(given, name=f"{recipe.name}, kept {kept:g}")
    try:
        plan(model, recipe)
    except (RecipeError, ShapeError):
        if recipe.base and model_type(model) in FAMILIES:
            return recipe.scaled_to(model)
    return recipe


def _read(text):
    if text in papers:
        return papers[text]
    path = Path(text)
    if not path.is_file():
        near = difflib.get_close_matches(text, papers, n=1)
        raise RecipeError(
            f"recipe {text!r}: neither a paper's nor a file.{f' Did you mean {near[0]!r}?' if near else ''}\n"
            f"  There is: {', '.join(papers)}. Or write one: tnlib recipes NAME --json > mine.json"
        )
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RecipeError(f"recipe {path}: got {error}; needed JSON, as tnlib recipes NAME --json prints it.") from None
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {path}: got a {type(data).__name__}; needed an object, as tnlib recipes NAME --json prints it.")
    return Recipe.from_dict(data)


def _rekept(rules, kept):
    """The rules with every form's amount given as `kept`."""

    def amounts(form):
        return {field.name: None for field in fields(form) if field.name in AMOUNTS} | {"kept": kept}

    return tuple(replace(rule, form=replace(rule.form, **amounts(rule.form))) for rule in rules)


def model_skeleton(name):
    """The model's shapes on the meta device: of a folder, a base of the papers, or else of the hub; no weights are read.

    Raises: AssetError where it is none of these, or the hub is not reached
    """
    if Path(name).is_dir():
        return skeleton_of(Path(name))
    if name in BASES:
        return skeleton(name)
    try:
        return skeleton_of(fetch(name) if name in ASSETS else name)
    except OSError as error:
        raise AssetError(
            f"model {name!r}: no folder, and the hub gave: {str(error).splitlines()[0]}\n"
            f"  Needed: a folder, a hub name and a network that reaches it, or one of {', '.join((*BASES, *ASSETS))}"
        ) from error
