"""What each matrix of a model could be replaced by, what that costs, and how much it hurts: the table that allocation reads."""

import math
from dataclasses import asdict, dataclass, field

from scipy.stats import spearmanr

from tnlib.depth import block_stack
from tnlib.form import Form
from tnlib.low_rank import LowRank
from tnlib.plan import plan, tied_names
from tnlib.recipe import Recipe, RecipeError, Rule, form_from_dict, form_to_dict
from tnlib.shapes import ShapeError

TOKENS = 512  # at once, for FLOPs; as in plan()


@dataclass(frozen=True)
class Unit:
    """What is replaced at once: a matrix, or all claimed matrices of a block."""

    name: str
    block: int
    names: tuple[str, ...]  # of its matrices
    shapes: tuple[tuple[int, int], ...]  # (out, in), one a matrix

    @property
    def params(self):
        """Numbers in the dense matrices, biases not counted."""
        return sum(map(math.prod, self.shapes))

    @property
    def flops(self):
        """Of the dense matrices, a token."""
        return 2.0 * self.params


@dataclass(frozen=True)
class Row:
    """One unit in one form: what it costs and what it does to the model.

    scores: by name, a number a window, or a single one that no window stands behind
        "kl": forward KL from the dense model, nats per token of each window, every position
        "loss": rise of the next-token loss over the dense model's, nats per token of each window; may be negative
        "error": relative Frobenius error of the unit's weights, not squared; "square": the squared error, absolute
        "output", "relative_output": squared error of the outputs over a text, tr(D C D.T), absolute and over tr(W C W.T)
    """

    unit: str
    form: Form  # as asked for; form.resolve(shape) has the ranks really used
    names: tuple[str, ...]  # matrices that are replaced: those of the unit that the form makes smaller
    params: int  # of the whole unit, matrices that stay dense included
    flops: float  # likewise, a token, at TOKENS tokens at a time
    scores: dict = field(default_factory=dict)

    def mean(self, score):
        """Mean over windows. Raises: ValueError for a score that was not measured."""
        if score not in self.scores:
            raise ValueError(
                f"profile: {self.unit} as {self.form} has no score {score!r}; needed one of {', '.join(self.scores) or 'none'}. "
                "sensitivity() measures kl and loss, proxy_profile() error, square and, given moments, output."
            )
        return sum(self.scores[score]) / len(self.scores[score])

    def stderr(self, score):
        """Standard error of the mean over windows; NaN where there are fewer than two."""
        values, mean = self.scores[score], self.mean(score)
        if len(values) < 2:
            return math.nan
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


@dataclass(frozen=True)
class Profile:
    """Rows of all units and forms. Plain data: to_dict() is JSON, and allocation from it needs no model."""

    units: tuple[Unit, ...]
    rows: tuple[Row, ...]
    model_params: int  # of the whole dense model, tied weights once
    model_flops: float  # a token, linear layers and head of the dense model
    dense_losses: tuple[float, ...] = ()  # nats per token of each window
    tokens: int = 0  # of the text

    @property
    def params(self):
        """Numbers in the profiled matrices, dense."""
        return sum(unit.params for unit in self.units)

    def of(self, unit):
        """The rows of one unit, by its name."""
        return [row for row in self.rows if row.unit == unit]

    def table(self, score="kl"):
        """One dictionary a row for a data frame: unit, block, form, params, kept, flops, the score and its standard error."""
        units = {unit.name: unit for unit in self.units}
        return [
            {
                "unit": row.unit,
                "block": units[row.unit].block,
                "form": str(row.form),
                "params": row.params,
                "kept": row.params / units[row.unit].params,
                "flops": row.flops,
                score: row.mean(score),
                "stderr": row.stderr(score),
            }
            for row in self.rows
        ]

    def to_dict(self):
        """Plain data for JSON; from_dict(to_dict()) equals the profile."""
        rows = [row_to_dict(row) for row in self.rows]
        return asdict(self) | {"units": [asdict(unit) for unit in self.units], "rows": rows}

    @classmethod
    def from_dict(cls, data):
        """A profile from plain data."""
        units = (Unit(u["name"], u["block"], tuple(u["names"]), tuple(map(tuple, u["shapes"]))) for u in data["units"])
        plain = {"units": tuple(units), "rows": tuple(map(row_from_dict, data["rows"]))}
        return cls(**data | plain | {"dense_losses": tuple(data["dense_losses"])})


def row_to_dict(row):
    """A Row as plain data."""
    return {name: getattr(row, name) for name in ("unit", "names", "params", "flops", "scores")} | {
        "form": form_to_dict(row.form)
    }


def row_from_dict(data):
    """The Row again."""
    scores = {name: tuple(values) for name, values in data["scores"].items()}
    return Row(**data | {"form": form_from_dict(data["form"]), "names": tuple(data["names"]), "scores": scores})


def blank_profile(model, forms, where="linear", unit="matrix"):
    """The profile before anything is measured: all units, and a Row without scores for each form that makes one smaller.

    where: names, patterns or roles as in Rule.where; all that they claim must be in the model's one stack of blocks
    unit: "matrix", or "block": all claimed matrices of a block at once
    Forms that come to the same for a unit give one row, the first's. Works on the meta device.
    Raises: RecipeError where `where` claims nothing, or matrices outside the blocks or tied; ShapeError where a form does not fit
    """
    forms = list(forms)
    if unit not in ("matrix", "block") or not forms or not all(isinstance(form, Form) for form in forms):
        raise RecipeError(
            f"profile: got forms {forms} and unit {unit!r}; needed at least one Form and unit 'matrix' or 'block'. "
            "Write forms=[MPO(order=3, max_rank=32)], say."
        )
    probe = plan(model, Recipe(name="profile", rules=(Rule(where=where, form=LowRank(rank=1)),)))
    units = _units(model, probe.rows, unit)
    rows = tuple(row for one in units for row in _rows(one, forms))
    return Profile(units, rows, probe.dense_total, probe.dense_flops)


def _units(model, claimed, unit):
    stack, blocks = block_stack(model, "profile")
    numbers = {f"{stack}.{k}": k for k in range(len(blocks))}
    groups = {}
    for row in claimed:
        block = ".".join(row.name.split(".")[: stack.count(".") + 2])
        if block not in numbers or len(tied_names(model, row.name)) > 1:
            raise RecipeError(
                f"profile: {row.name} is not in one of the {len(blocks)} blocks {stack}.*, or is tied; needed matrices of blocks, "
                "each for itself. Narrow where= to 'linear', 'mlp' or 'attention'."
            )
        groups.setdefault(row.name if unit == "matrix" else block, []).append((numbers[block], row))
    return tuple(
        Unit(name, found[0][0], tuple(row.name for _, row in found), tuple(row.shape for _, row in found))
        for name, found in groups.items()
    )


def _rows(unit, forms):
    """A Row for each form that makes a matrix of the unit smaller, equal ones once."""
    seen, rows = set(), []
    for form in forms:
        kept = {
            name: shape for name, shape in zip(unit.names, unit.shapes) if _fits(form, name, shape) < math.prod(shape)
        }
        same = tuple((name, str(form.resolve(shape))) for name, shape in kept.items())
        if kept and same not in seen:
            seen.add(same)
            saved = sum(math.prod(shape) - form.num_params(shape) for shape in kept.values())
            faster = sum(2.0 * math.prod(shape) - form.flops(shape, TOKENS) / TOKENS for shape in kept.values())
            rows.append(Row(unit.name, form, tuple(kept), unit.params - saved, unit.flops - faster))
    return rows


def _fits(form, name, shape):
    """Numbers that the form stores; an error that names the matrix."""
    try:
        return form.num_params(shape)
    except ShapeError as error:
        raise ShapeError(f"profile, matrix {name}, weight {shape} (out, in):\n  {error}") from None


def rank_correlation(profile, other, score="kl", other_score="output"):
    """Spearman's rank correlation between the scores of two profiles, over the (unit, form) pairs that both have.

    Returns: {"all": over all pairs, and for each form its own by str(form)}; NaN for fewer than three pairs or a constant score
    Raises: ValueError where nothing is common, or a score was not measured
    Exact: 1 for a profile against itself, and against any increasing function of it.
    """
    theirs = {(row.unit, row.form): row.mean(other_score) for row in other.rows}
    pairs = [
        (row.form, row.mean(score), theirs[row.unit, row.form])
        for row in profile.rows
        if (row.unit, row.form) in theirs
    ]
    if not pairs:
        raise ValueError(
            f"rank_correlation: profiles of {len(profile.rows)} and {len(other.rows)} rows have none in common; needed the same "
            "units and forms. Make the proxy with the profile's own forms and where=."
        )
    forms = dict.fromkeys(form for form, _, _ in pairs)
    groups = {"all": pairs} | {str(form): [pair for pair in pairs if pair[0] == form] for form in forms}
    return {name: _spearman([a for _, a, _ in some], [b for _, _, b in some]) for name, some in groups.items()}


def _spearman(a, b):
    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return math.nan
    return float(spearmanr(a, b).statistic)
