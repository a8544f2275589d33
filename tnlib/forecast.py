"""What healing will take before it is started: tokens, steps, hours at a stated rate, memory by its parts.

Works on the meta device (papers.skeleton), so that the cost of a paper's run is known on a laptop.
"""

from dataclasses import dataclass

from torch import nn

from tnlib.papers import papers, skeleton
from tnlib.plan import Plan, plan
from tnlib.recipe import dense_modules
from tnlib.shapes import weight_of

BYTES = {"fp32": 4, "bf16": 2}  # of an activation; weights, gradients and AdamW's two moments stay in float32
BYTES_PER_TOKEN = 4.3  # measured: rotten-tomatoes' training text, 1,717,371 bytes, is 399,724 tokens of SmolLM2


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Cost of one healing run on one device; `memory` in bytes by part, its activations an upper estimate."""

    plan: Plan
    tokens: int
    steps: int
    tokens_per_second: float
    flops: float  # of all steps: 6 a parameter and token for the student, 2 for the teacher
    memory: dict[str, int]

    @property
    def parameters(self):
        """Of the student, tied weights once."""
        return self.plan.total

    @property
    def hours(self):
        return self.tokens / self.tokens_per_second / 3600

    @property
    def gigabytes(self):
        return sum(self.memory.values()) / 1e9

    def __str__(self):
        parts = ", ".join(f"{name} {_bytes(size)}" for name, size in self.memory.items() if size)
        rate = self.flops / self.tokens * self.tokens_per_second / 1e12
        time = f"{self.hours:,.2f} hours" if self.hours >= 1 else f"{60 * self.hours:,.1f} minutes"
        return (
            f"{self.plan.recipe}: {self.tokens:,} tokens in {self.steps:,} steps (about {_bytes(self.tokens * BYTES_PER_TOKEN)} of text); "
            f"{time} at {self.tokens_per_second:,.0f} tokens a second ({rate:,.2f} TFLOP/s); "
            f"{_bytes(sum(self.memory.values()))} of memory ({parts})"
        )


def _bytes(size):
    """A size in the decimal unit that leaves one to three digits before the point."""
    power = next((power for power in (3, 2, 1) if size >= 1000**power), 0)
    return f"{size / 1000**power:,.3g} {('bytes', 'kB', 'MB', 'GB')[power]}"


def forecast(model, recipe, *, tokens, batch, context, tokens_per_second, accumulate=1, precision="fp32"):
    """Predict what healing `model` after factorize_(model, recipe) takes; touches nothing, works on the meta device.

    tokens: in all; batch: windows that are on the device at once; accumulate: such batches a step; context: tokens a window
    tokens_per_second: the rate that hours are computed from; measure it, or state where it comes from
    precision: "fp32", or "bf16" for autocast
    Returns: Forecast; print it, or read hours, gigabytes, memory
    Raises: RecipeError and ShapeError as plan does; ValueError for amounts below 1
    Source: 6 FLOPs a parameter and token, Kaplan et al. 2020; dense contraction assumed, attention scores not counted.
    Exact: weights, gradients and moments are the bytes that a step of AdamW holds.
    """
    amounts = {"tokens": tokens, "batch": batch, "context": context, "accumulate": accumulate}
    for name, value in (amounts | {"tokens_per_second": tokens_per_second}).items():
        if not value > 0:
            raise ValueError(f"forecast: got {name}={value}; needed more than 0. State a measured or published amount.")
    if precision not in BYTES:
        raise ValueError(f"forecast: got precision={precision!r}; needed one of {', '.join(BYTES)}.")
    predicted = plan(model, recipe)
    taught = recipe.heal is not None and bool(recipe.heal.needs_teacher)
    return Forecast(
        plan=predicted,
        tokens=tokens,
        steps=-(-tokens // (batch * accumulate * context)),
        tokens_per_second=tokens_per_second,
        flops=float(tokens) * (6 * predicted.total + 2 * predicted.dense_total * taught),
        memory=_memory(model, predicted, batch * context, BYTES[precision], taught),
    )


def from_parameters(given):
    """The forecast of a notebook that heals, from its parameters; None for one that declares no HEAL_TOKENS.

    given: MODEL, RECIPE, HEAL_TOKENS, HEAL_BATCH, HEAL_ACCUMULATE, CONTEXT, TOKENS_PER_SECOND, PRECISION
    """
    if "HEAL_TOKENS" not in given:
        return None
    model, recipe = skeleton(given["MODEL"]), papers[given["RECIPE"]]
    return forecast(
        model,
        recipe if given["MODEL"] == recipe.base else recipe.scaled_to(model),
        tokens=given["HEAL_TOKENS"],
        batch=given["HEAL_BATCH"],
        accumulate=given.get("HEAL_ACCUMULATE", 1),
        context=given["CONTEXT"],
        tokens_per_second=given["TOKENS_PER_SECOND"],
        precision=given.get("PRECISION", "fp32"),
    )


def _memory(model, predicted, tokens, width, taught):
    """Bytes by part, for `tokens` on the device at once."""
    vocabulary = model.config.vocab_size
    return {
        "weights": 4 * predicted.total,
        "gradients": 4 * predicted.total,
        "AdamW": 8 * predicted.total,
        "teacher": 4 * predicted.dense_total * taught,
        "activations": tokens * width * _kept_for_backward(model),
        "logits": tokens * vocabulary * (width + 4 + 4 + (width + 4) * taught),  # as made, in float32, their gradient
    }


def _kept_for_backward(model):
    """Numbers a token that a forward pass keeps: each linear layer's input and output, an upper estimate as some share one."""
    linear = [
        m for n, m in dense_modules(model).items() if not isinstance(m, nn.Embedding) and not n.endswith("lm_head")
    ]
    return sum(sum(weight_of(module).shape) for module in linear)
