"""A recipe: which modules, which form, how initialized, how healed, how quantized. Data only.

No callables, paths or devices, and no amounts: steps, batches and data sizes belong to a budget. A run is a recipe, a
budget and a seed.
"""

import re
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

from torch import nn

from tnlib.block_low_rank import BlockLowRank
from tnlib.experts import about_experts
from tnlib.families import FAMILIES, ROLES, patterns, translate
from tnlib.form import Form, positive
from tnlib.kronecker import Kronecker
from tnlib.low_rank import LowRank
from tnlib.quant import Quantize
from tnlib.shapes import is_conv1d
from tnlib.tensor_ring import TensorRing
from tnlib.tensor_train import TensorTrain
from tnlib.treatment import Heal, RecipeError
from tnlib.tt_matrix import TTMatrix

FORMS = {form.__name__: form for form in (LowRank, BlockLowRank, Kronecker, TensorTrain, TTMatrix, TensorRing)}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Replace the modules at `where` by `form`.

    where: a pattern of module names in which `*` is a block number, several of them, or a role (see families.py): "mlp",
        "attention", "linear", "embedding", "q", "k", "v", "qkv", "o", "gate", "up", "down", "pooler"
    blocks: "all", "odd", "even" (block numbers from 0) or a tuple of block numbers
    init: "svd", "random", "scratch" (see FactorizedLinear.from_dense), or what the form offers ("norm", "prune" for
        Kronecker, "als" for TensorTrain and TTMatrix)
    split: factorize this many equal bands of the outputs each on its own (3 for a fused q, k, v)
    head: what becomes of an output head tied to this embedding: "tied" shares the factors, "dense" keeps the old matrix
    """

    where: str | tuple[str, ...]
    form: Form
    blocks: str | tuple[int, ...] = "all"
    init: str = "svd"
    split: int = 1
    head: str = "tied"

    def __post_init__(self):
        if isinstance(self.where, list):
            object.__setattr__(self, "where", tuple(self.where))
        if isinstance(self.blocks, list):
            object.__setattr__(self, "blocks", tuple(self.blocks))
        positive(f"rule {self.where!r}", split=self.split)
        if not isinstance(self.form, Form):
            raise RecipeError(f"rule {self.where!r}: got form {self.form!r}; needed a Form such as LowRank(kept=0.5).")
        if not (self.blocks in ("all", "odd", "even") or isinstance(self.blocks, tuple)):
            raise RecipeError(
                f"rule {self.where!r}: got blocks={self.blocks!r}; needed 'all', 'odd', 'even' or block numbers."
            )
        if self.head not in ("tied", "dense"):
            raise RecipeError(f"rule {self.where!r}: got head={self.head!r}; needed 'tied' or 'dense'.")

    def places(self, model_type):
        """Patterns that this rule means in a model family; a role that the family does not have gives ()."""
        given = (self.where,) if isinstance(self.where, str) else self.where
        return tuple(p for where in given for p in (patterns(model_type, where) if where in ROLES else (where,)))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One paper's method, or yours. `base` is the model that it was written for, `source` where its numbers were read.

    stages: the rules in the order of work, where a model is factorized a part at a time and healed after each part. A
        later stage takes a module that an earlier one factorized dense again; each module must end as `rules` says.
        (): everything at once
    """

    name: str
    rules: tuple[Rule, ...]
    source: str = ""
    base: str = ""
    heal: Heal | None = None
    quantize: Quantize | None = None
    stages: tuple[tuple[Rule, ...], ...] = ()
    notes: str = ""

    def __post_init__(self):
        object.__setattr__(self, "rules", (self.rules,) if isinstance(self.rules, Rule) else tuple(self.rules))
        object.__setattr__(self, "stages", tuple(tuple(stage) for stage in self.stages))
        if not self.rules or not all(isinstance(rule, Rule) for rule in self.rules):
            raise RecipeError(f"recipe {self.name!r}: got rules={self.rules!r}; needed at least one Rule.")
        staged = [rule for stage in self.stages for rule in stage]
        if not all(isinstance(rule, Rule) for rule in staged) or not all(self.stages):
            raise RecipeError(
                f"recipe {self.name!r}: got stages={self.stages!r}; needed tuples of at least one Rule each."
            )

    def scaled_to(self, model):
        """The same method for another model: module names by role, printed modes forgotten, small factors and caps kept.

        Raises: RecipeError for a family that families.py does not know
        Exact: a recipe scaled to a model of its own family claims the same modules.
        """
        target = model_type(model)
        if target not in FAMILIES:
            raise RecipeError(
                f"recipe {self.name!r}: model type {target!r} is not known; needed one of {', '.join(FAMILIES)}. Write patterns."
            )

        def adapted(rules):
            return tuple(scaled for rule in rules if (scaled := _scaled(rule, target)) is not None)

        stages = tuple(stage for rules in self.stages if (stage := adapted(rules)))
        base = getattr(model.config, "_name_or_path", "") or target
        return replace(self, rules=adapted(self.rules), stages=stages, base=base)

    def to_dict(self):
        """Plain data for JSON; from_dict(to_dict()) equals the recipe."""
        data = asdict(self)
        data["rules"] = [_plain(rule) for rule in self.rules]
        data["stages"] = [[_plain(rule) for rule in stage] for stage in self.stages]
        return data

    @classmethod
    def from_dict(cls, data):
        """A recipe from plain data (JSON, YAML). Raises: RecipeError on unknown keys, with the known ones."""
        rules = tuple(_rule(rule) for rule in data.get("rules", ()))
        stages = tuple(tuple(_rule(rule) for rule in stage) for stage in data.get("stages", ()))
        heal = data.get("heal") and _build(Heal, data["heal"])
        quantize = data.get("quantize") and _build(Quantize, data["quantize"])
        return _build(cls, {**data, "rules": rules, "stages": stages, "heal": heal, "quantize": quantize})


def _plain(rule):
    return asdict(rule) | {"form": form_to_dict(rule.form)}


def form_to_dict(form):
    """A form as plain data: its kind and what differs from the defaults; form_from_dict gives it back."""
    given = {f.name: getattr(form, f.name) for f in fields(form) if getattr(form, f.name) != f.default}
    return {"kind": type(form).__name__, **given}


def _rule(data):
    return data if isinstance(data, Rule) else _build(Rule, {**data, "form": form_from_dict(data.get("form"))})


def _build(kind, data):
    known = [field.name for field in fields(kind)]
    if unknown := set(data) - set(known):
        raise RecipeError(
            f"{kind.__name__}: got unknown {', '.join(sorted(unknown))}; needed some of {', '.join(known)}."
        )
    return kind(**{key: _tuples(value) for key, value in data.items()})


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def form_from_dict(data):
    """The form again; a Form passes. Raises: RecipeError on an unknown kind or field, with the known ones."""
    if isinstance(data, Form):
        return data
    kind = (data or {}).get("kind")
    if kind not in FORMS:
        raise RecipeError(f"form: got kind={kind!r}; needed one of {', '.join(FORMS)}.")
    return _build(FORMS[kind], {key: value for key, value in data.items() if key != "kind"})


def _scaled(rule, target):
    """One rule for another family; None when that family has no such module (a pooler, say)."""
    given = (rule.where,) if isinstance(rule.where, str) else rule.where
    where = []
    for place in given:
        home = next(
            (kind for kind, roles in FAMILIES.items() if any(place in places for places in roles.values())), None
        )
        where += [place] if place in ROLES or home is None else translate(place, home, target)
    fused = rule.split > 1 and not any(place in FAMILIES[target].get("qkv", ()) for place in where)
    return (
        replace(rule, where=tuple(where), form=_loose(rule.form), split=1 if fused else rule.split) if where else None
    )


def _loose(form):
    """The form without what was printed for one size: modes become an order, the large Kronecker factor is inferred."""
    if isinstance(form, Kronecker):
        return replace(form, left=None) if form.right else form
    if isinstance(form, (TensorTrain, TTMatrix)) and form.order is None:
        cap = max(form.ranks) if form.ranks else form.max_rank
        return replace(form, out_modes=None, in_modes=None, order=len(form.in_modes), ranks=None, max_rank=cap)
    return form


class Match(NamedTuple):
    """A module that a rule claims."""

    name: str
    module: nn.Module
    rule: Rule


def model_type(model):
    """The transformers family of a model ("gpt2", "llama", …), or "" for a plain module."""
    return getattr(getattr(model, "config", None), "model_type", "")


def dense_modules(model):
    """Every module that a rule could claim, by name: nn.Linear, Conv1D, nn.Embedding.

    Not an embedding that does more than look up, as OPT's of positions does: no other layer can stand in for it.
    """
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m) or _looks_up(m)}


def _looks_up(module):
    return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward


def match(model, recipe):
    """The modules that each rule claims, in the model's order.

    Raises: RecipeError when a rule claims nothing or two rules claim one module; it lists what the model offers
    Exact: no module is claimed twice.
    """
    offered, prefix = dense_modules(model), getattr(model, "base_model_prefix", "")
    claimed = {}
    for rule in recipe.rules:
        places = rule.places(model_type(model))
        found = [name for name in offered if claims(rule, places, name, prefix)]
        if not found:
            raise RecipeError(
                f"recipe {recipe.name!r}: rule {rule.where!r} (blocks={rule.blocks!r}) claims no module of this "
                f"{model_type(model) or type(model).__name__} model. It offers:\n  {_offer(offered)}\n"
                f"{about_experts(model)}Use one of these patterns, a role such as 'mlp', or recipe.scaled_to(model)."
            )
        for name in found:
            if name in claimed:
                raise RecipeError(
                    f"recipe {recipe.name!r}: module {name} is claimed twice, by rules {claimed[name].where!r} and {rule.where!r}; "
                    "needed at most one rule a module. Narrow one of them with blocks= or a longer pattern."
                )
            claimed[name] = rule
    return [Match(name, offered[name], claimed[name]) for name in offered if name in claimed]


def claims(rule, places, name, prefix=""):
    """Whether a rule, whose patterns in this family are `places`, claims the module of this name."""
    for place in places:
        short = place.removeprefix(f"{prefix}.")  # a bare GPT2Model has no "transformer." before "h.0"
        for candidate in {place, short}:
            found = re.fullmatch(re.escape(candidate).replace(r"\*", r"(\d+)"), name)
            if found and _in_blocks(rule.blocks, found.groups()):
                return True
    return False


def _in_blocks(blocks, numbers):
    if blocks == "all" or not numbers:
        return True
    number = int(numbers[0])
    return number in blocks if isinstance(blocks, tuple) else number % 2 == (blocks == "odd")


def _offer(offered):
    """The model's modules, block numbers folded into `*`, with how many there are and their (out, in) shapes."""
    seen = Counter((re.sub(r"\.\d+\.", ".*.", name), _shape(module)) for name, module in offered.items())
    return (
        "\n  ".join(f"{pattern}  {count} x {shape[0]}x{shape[1]}" for (pattern, shape), count in seen.items())
        or "nothing"
    )


def _shape(module):
    size = tuple(module.weight.shape)
    return size[::-1] if is_conv1d(module) else size
