"""What a recipe will do to a model, before any weight moves: shapes, ranks, sizes and FLOPs, conventions stated."""

import math
import re
from collections import Counter
from dataclasses import dataclass

from torch import nn

from tnlib.form import Form
from tnlib.layers import FactorizedEmbedding, FactorizedLinear, SplitLinear
from tnlib.recipe import dense_modules, match
from tnlib.shapes import ShapeError, weight_of

_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings)$")


@dataclass(frozen=True)
class PlanRow:
    """One module that the recipe replaces."""

    name: str
    shape: tuple[int, int]  # (out, in) of one band; embeddings (rows, dim)
    split: int  # bands factorized on their own
    asked: Form
    form: Form  # with the modes and ranks that are really used
    dense: int  # weight parameters before, bias not counted
    params: int  # after; 0 where the factors are another row's (a tied head)


@dataclass(frozen=True)
class Plan:
    """Sizes before and after. Totals count tied weights once and include positions, biases and norms."""

    recipe: str
    rows: tuple[PlanRow, ...]
    dense_total: int
    total: int
    positions: int  # learned position embeddings, part of both totals
    head: int  # dense output-head parameters that sharing saves; 0 if the head is stored, or absent
    tokens: int  # of the batch that FLOPs are averaged over: rebuilding a weight is shared by all of them
    dense_flops: (
        float  # a token, linear layers and head; attention scores and BERT's pooler (one token a text) not counted
    )
    flops: float
    index_bytes: int = 0  # of row and column orders (int32), which are no parameters and in none of the totals

    @property
    def compression(self):
        """Parameters before over after, all of the model, tied once."""
        return self.dense_total / self.total

    @property
    def kept(self):
        """Parameters after over before, in the replaced matrices only."""
        return sum(row.params for row in self.rows) / max(1, sum(row.dense for row in self.rows))

    def megabytes(self, bits=32):
        """Size of the compressed model in MB (1e6 bytes), every parameter at `bits`."""
        return self.total * bits / 8 / 1e6

    def table(self):
        """Rows grouped over blocks: one dictionary for each distinct (modules, shape, form)."""
        groups = Counter((_fold(r.name), r.shape, r.split, r.form, r.asked, r.dense, r.params) for r in self.rows)
        return [
            {
                "modules": f"{count} x {name}" + (f" ({split} bands)" if split > 1 else ""),
                "weight (out, in)": f"{shape[0]}x{shape[1]}",
                "form": str(form) + _lowered(asked, form),
                "dense": dense,
                "params": params,
                "kept": round(params / dense, 4),
            }
            for (name, shape, split, form, asked, dense, params), count in groups.items()
        ]

    def conventions(self):
        """Each total with the convention that it was counted by."""
        lines = [
            f"{self.dense_total:,} -> {self.total:,} parameters ({self.compression:.3f}x), tied weights once, with positions",
            f"{self.dense_total - self.positions:,} -> {self.total - self.positions:,} without the {self.positions:,} position embeddings",
            f"{self.megabytes():,.2f} MB at 32 bits, {self.megabytes(16):,.2f} MB at 16",
            f"{self.dense_flops / 1e6:,.1f} -> {self.flops / 1e6:,.1f} MFLOP a token in linear layers and head, {self.tokens} tokens at a time",
        ]
        if self.head:
            lines.insert(
                2,
                f"{self.total + self.head:,} if a dense output head ({self.head:,}) is stored beside the tied factors",
            )
        if self.index_bytes:
            lines.append(
                f"{self.index_bytes:,} bytes of row and column orders (int32) beside the parameters, not counted above"
            )
        return lines

    def __str__(self):
        rows = [
            f"  {r['modules']}  {r['weight (out, in)']}  {r['form']}  {r['dense']:,} -> {r['params']:,}"
            for r in self.table()
        ]
        return "\n".join([f"plan of {self.recipe!r}: {len(self.rows)} modules", *rows, *self.conventions()])

    def _repr_html_(self):
        head = "".join(f"<th>{key}</th>" for key in self.table()[0])
        body = "".join("<tr>" + "".join(f"<td>{_cell(v)}</td>" for v in row.values()) + "</tr>" for row in self.table())
        notes = "<br>".join(self.conventions())
        return f"<table><caption>plan of {self.recipe}</caption><tr>{head}</tr>{body}</table><p>{notes}</p>"


def plan(model, recipe, tokens=512):
    """Predict what factorize_(model, recipe) will make; touches nothing, works on the meta device.

    tokens: how many go through at once; FLOPs are those of the cheapest contraction or rebuilding at that number, a token
    Returns: Plan; print it, or read rows, total, flops
    Raises: RecipeError when rules and model do not fit; ShapeError, with recipe and module, when a form and a weight do not
    Exact: `total` equals the parameters of the factorized model, counted once each.
    """
    rows, removed, added = [], {}, 0
    flops = dense_flops = sum(_dense_flops(name, module) for name, module in dense_modules(model).items())
    head_saved = 0
    for name, module, rule in match(model, recipe):
        row = _row(recipe.name, name, module, rule)
        rows.append(row)
        tied = [n for n in tied_names(model, name) if n != name]
        keep_dense = tied and rule.head == "dense" and not isinstance(module, nn.Linear)
        if not keep_dense:
            removed[id(module.weight)] = module.weight.numel()
        added += row.params
        heads = [n for n in tied if isinstance(model.get_submodule(n), nn.Linear)]
        changed = ([] if isinstance(module, nn.Embedding) else [name]) + ([] if keep_dense else heads)
        flops += sum(
            row.form.flops(row.shape, tokens) / tokens * row.split - row.dense * 2
            for n in changed
            if not n.endswith("pooler.dense")
        )
        head_saved = row.dense if heads and not keep_dense else head_saved
    dense_total = sum(p.numel() for p in model.parameters())
    positions = sum(m.weight.numel() for n, m in model.named_modules() if _POSITIONS.search(n) and hasattr(m, "weight"))
    total = dense_total - sum(removed.values()) + added
    index_bytes = sum(4 * math.prod(n) * row.split for row in rows for n in row.form.index_shapes(row.shape).values())
    return Plan(
        recipe.name, tuple(rows), dense_total, total, positions, head_saved, tokens, dense_flops, flops, index_bytes
    )


def _row(recipe, name, module, rule):
    out, width = weight_of(module).shape
    if out % rule.split:
        raise ShapeError(
            f"recipe {recipe!r}, module {name}: {out} outputs do not split into {rule.split} bands; choose a divisor."
        )
    shape = (out // rule.split, width)
    try:
        form = rule.form.resolve(shape)
        params = form.num_params(shape) * rule.split
    except ShapeError as error:
        raise ShapeError(f"recipe {recipe!r}, module {name}, weight {(out, width)} (out, in):\n  {error}") from None
    return PlanRow(name, shape, rule.split, rule.form, form, out * width, params)


def tied_names(model, name):
    """Names of the modules whose weight is the very parameter of module `name`, itself included."""
    weight = model.get_submodule(name).weight
    return [
        n
        for n, m in model.named_modules(remove_duplicate=False)
        if getattr(m, "_parameters", {}).get("weight") is weight
    ]


def _dense_flops(name, module):
    """2 * out * in for a matrix that every token meets; an embedding is a look-up, and BERT's pooler sees one token a text."""
    if isinstance(module, nn.Embedding) or name.endswith("pooler.dense"):
        return 0
    return 2 * module.weight.numel()


def report(model):
    """What was factorized, from a model's layers: one dictionary a layer with name, form, kept, relative error and rho.

    rho = ||approximation|| / ||weight|| holds for the least-squares initializations only; it is sqrt(1 - error^2)
    """
    rows = []
    for name, layer in model.named_modules():
        if isinstance(layer, SplitLinear):
            rows.append(
                {"module": name, "form": str(layer.parts[0].form), "params": layer.num_params(), "error": layer.error}
            )
        elif isinstance(layer, (FactorizedLinear, FactorizedEmbedding)) and ".parts." not in name:
            rows.append({"module": name, "form": str(layer.form), "params": layer.num_params(), "error": layer.error})
    return rows


def _fold(name):
    return re.sub(r"\.\d+\.", ".*.", name)


def _lowered(asked, form):
    """Say when a rank, a cap or a number of terms was more than the shape allows."""
    for field in ("rank", "terms", "ranks"):
        want, got = getattr(asked, field, None), getattr(form, field, None)
        if want is not None and want != got:
            return f" (asked {field}={want})"
    cap = getattr(asked, "max_rank", None)
    return f" (asked max_rank={cap})" if cap is not None and cap > max(form.ranks) else ""


def _cell(value):
    return f"{value:,}" if isinstance(value, int) else value
