"""Recipes: data in and out, rules that claim what they say, and errors that list what the model offers."""

import json
from dataclasses import replace

import pytest
from tiny import tiny

from tnlib.kronecker import Kronecker
from tnlib.low_rank import LowRank
from tnlib.papers import papers
from tnlib.recipe import Recipe, RecipeError, Rule, dense_modules, match
from tnlib.tt_matrix import TTMatrix


def recipe(*rules):
    return Recipe(name="test", rules=rules)


def names(model, *rules):
    return [claim.name for claim in match(model, recipe(*rules))]


@pytest.mark.parametrize("name", list(papers))
def test_recipes_survive_json(name):
    assert Recipe.from_dict(json.loads(json.dumps(papers[name].to_dict()))) == papers[name]


def test_star_is_a_block_number_and_nothing_else():
    model = tiny("gpt2")
    rule = Rule(where="transformer.h.*.mlp.c_fc", form=LowRank(rank=2))
    assert names(model, rule) == ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]
    assert names(model, replace(rule, blocks="odd")) == ["transformer.h.1.mlp.c_fc"]
    assert names(model, replace(rule, blocks="even")) == ["transformer.h.0.mlp.c_fc"]
    assert names(model, replace(rule, blocks=(1,))) == ["transformer.h.1.mlp.c_fc"]
    with pytest.raises(RecipeError, match="claims no module"):
        names(model, replace(rule, where="transformer.h.1.mlp.*"))


def test_roles_mean_the_same_work_in_every_family():
    for family, per_block in (("gpt2", 2), ("llama", 3), ("qwen3", 3), ("bert", 2), ("opt", 2)):
        assert len(names(tiny(family), Rule(where="mlp", form=LowRank(rank=2)))) == 2 * per_block, family
    assert len(names(tiny("t5"), Rule(where="mlp", form=LowRank(rank=2)))) == 8
    assert len(names(tiny("t5-gated"), Rule(where="mlp", form=LowRank(rank=2)))) == 12


def test_a_bare_base_model_needs_no_prefix():
    assert names(tiny("gpt2").transformer, Rule(where="up", form=LowRank(rank=2))) == ["h.0.mlp.c_fc", "h.1.mlp.c_fc"]


def test_a_rule_that_claims_nothing_lists_what_there_is():
    with pytest.raises(RecipeError) as error:
        names(tiny("llama"), Rule(where="transformer.h.*.mlp.c_fc", form=LowRank(rank=2)))
    for words in (
        "recipe 'test'",
        "transformer.h.*.mlp.c_fc",
        "model.layers.*.mlp.up_proj  2 x 48x24",
        "recipe.scaled_to(model)",
    ):
        assert words in str(error.value)


def test_a_module_claimed_twice_is_named_with_both_rules():
    with pytest.raises(RecipeError, match=r"model.layers.0.mlp.up_proj is claimed twice, by rules 'mlp' and 'up'"):
        names(tiny("llama"), Rule(where="mlp", form=LowRank(rank=2)), Rule(where="up", form=LowRank(rank=3)))


def test_scaling_to_the_own_family_claims_the_same_modules():
    model = tiny("gpt2")
    original = papers["krony-81m"]
    assert [c.name for c in match(model, original.scaled_to(model))] == [c.name for c in match(model, original)]


def test_scaling_forgets_printed_modes_and_keeps_small_factors():
    model = tiny("llama")
    scaled = papers["krony-81m"].scaled_to(model)
    claimed = {claim.name for claim in match(model, scaled)}
    assert claimed == {n for n in dense_modules(model) if ".mlp." in n}
    assert scaled.rules[0].form.right == (4, 1)
    hybrid = papers["hybrid-tt"].scaled_to(model)
    assert hybrid.rules[0].form == TTMatrix(order=3, max_rank=48)
    assert hybrid.rules[0].split == 1  # q, k, v are separate here


def test_scaling_to_an_unknown_family_says_what_is_known():
    class Odd:
        config = type("C", (), {"model_type": "odd"})

    with pytest.raises(RecipeError, match="model type 'odd' is not known; needed one of gpt2, llama"):
        papers["krony-81m"].scaled_to(Odd())


BAD = [
    (lambda: papers["krony-80m"], "no such recipe; needed one of krony-81m"),
    (lambda: Recipe(name="x", rules=()), "needed at least one Rule"),
    (lambda: Rule(where="mlp", form="svd"), "needed a Form"),
    (lambda: Rule(where="mlp", form=LowRank(rank=2), blocks="first"), "needed 'all', 'odd', 'even'"),
    (lambda: Rule(where="mlp", form=LowRank(rank=2), head="drop"), "needed 'tied' or 'dense'"),
    (lambda: Recipe.from_dict({"name": "x", "rulez": []}), "got unknown rulez; needed some of name, rules"),
    (
        lambda: Recipe.from_dict({"name": "x", "rules": [{"where": "mlp", "form": {"kind": "CP"}}]}),
        "needed one of LowRank, BlockLowRank, Kronecker",
    ),
    (
        lambda: Recipe.from_dict({"name": "x", "rules": [{"where": "mlp", "form": {"kind": "LowRank", "rnak": 2}}]}),
        "unknown rnak",
    ),
]


@pytest.mark.parametrize(("call", "words"), BAD, ids=[words[:30] for _, words in BAD])
def test_bad_recipes_say_what_was_needed(call, words):
    with pytest.raises(RecipeError, match=words):
        call()


def test_one_rule_may_stand_for_a_tuple_of_one():
    rule = Rule(where="mlp", form=LowRank(rank=2))
    assert Recipe(name="x", rules=rule) == Recipe(name="x", rules=[rule])


def test_a_recipe_written_as_plain_data_is_built():
    data = {
        "name": "mine",
        "rules": [{"where": ["up", "gate"], "blocks": [0, 1], "form": {"kind": "Kronecker", "right": [2, 2]}}],
    }
    built = Recipe.from_dict(data)
    assert built.rules == (Rule(where=("up", "gate"), blocks=(0, 1), form=Kronecker(right=(2, 2))),)
