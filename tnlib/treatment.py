"""How a factorized model is trained back: Heal, a recipe's part, says how; Budget, a run's part, says how much."""

import math
from dataclasses import dataclass, fields

LOSSES = (
    "next_token",
    "task",
    "logits",
    "logits_reverse",
    "hidden",
    "hidden_cosine",
    "attention",
    "embedding",
    "embedding_cosine",
    "local",
)
NEED_TEACHER = frozenset(LOSSES) - {"next_token", "task"}
AFTER_CURRICULUM = frozenset({"next_token", "task", "logits", "logits_reverse"})
SCHEDULES = ("cosine", "linear", "constant")
KINDS = ("factors", "scalars", "rest")


class RecipeError(ValueError):
    """A recipe does not fit itself or the model; the message lists what would."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters with a learning rate or a weight decay of their own; None: the Heal's.

    where: "factors" (of factorized layers), "scalars" (their learnable scales), "rest" (everything else), or a pattern of
        parameter or module names in which `*` is a block number. A parameter belongs to the first group that claims it
    learning_rate: peak; it follows the same schedule as all others, in proportion
    """

    where: str
    learning_rate: float | None = None
    weight_decay: float | None = None

    def __post_init__(self):
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise RecipeError(f"Group {self.where!r}: got {name}={value!r}; needed None or a number of at least 0.")


@dataclass(frozen=True, kw_only=True)
class Heal:
    """How a factorized model is trained back: losses by weight, learning rates, order of work. Amounts are in a Budget.

    losses: (name, weight) pairs, names from LOSSES; see losses.py for what each is
    temperature: of teacher and student in "logits" and "logits_reverse", whose gradients are scaled by its square
    learning_rate, final_learning_rate: peak and end of the schedule; None ends "cosine" and "linear" at 0
    schedule: "cosine", "linear" or "constant", after `warmup`, a share of all steps, has risen linearly to the peak
    weight_decay: of tensors with two axes or more; biases, norms and scalars are never decayed
    train: "all" (that the caller did not freeze), "factors" (of factorized layers, all else frozen), or patterns of
        parameter or module names
    curriculum_steps: one more layer's hidden states and attention are matched every so many steps; the losses in
        AFTER_CURRICULUM join after the last layer, and the learning rate drops to its final value then. 0: all at once
    Raises: RecipeError that names the field and lists what is known
    """

    losses: tuple[tuple[str, float], ...] = (("next_token", 1.0),)
    temperature: float = 1.0
    learning_rate: float = 1e-4
    final_learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # norm of all gradients together; 0: not clipped
    train: str | tuple[str, ...] = "all"
    groups: tuple[Group, ...] = ()
    curriculum_steps: int = 0
    source: str = ""

    def __post_init__(self):
        object.__setattr__(self, "losses", tuple((name, float(weight)) for name, weight in self.losses))
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "groups", tuple(_group(item) for item in self.groups))
        if isinstance(self.train, list):
            object.__setattr__(self, "train", tuple(self.train))
        self._check_losses()
        _refuse_unknown("Heal", "schedule", self.schedule, SCHEDULES)
        _check("Heal", self, "temperature", "learning_rate", above=0)
        _check("Heal", self, "weight_decay", "clip", "curriculum_steps", "final_learning_rate", least=0)
        if not 0 <= self.warmup < 1:
            raise RecipeError(f"Heal: got warmup={self.warmup!r}; needed a share of all steps, 0 <= warmup < 1.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"Heal: got betas={self.betas!r}; needed two numbers, each at least 0 and below 1.")
        if self.curriculum_steps and self.schedule != "constant":
            raise RecipeError(
                f"Heal: got curriculum_steps={self.curriculum_steps} with schedule={self.schedule!r}; needed 'constant': "
                "the curriculum itself changes the rate, from learning_rate to final_learning_rate. Set it."
            )
        if self.curriculum_steps and not self.weights.keys() - AFTER_CURRICULUM:
            raise RecipeError(
                f"Heal: got curriculum_steps={self.curriculum_steps} with losses {', '.join(self.weights)}, which all wait for "
                "its end; needed one that matches layers, such as 'hidden'. Add it, or set curriculum_steps=0."
            )

    def _check_losses(self):
        names = [name for name, _ in self.losses]
        for name in names:
            _refuse_unknown("Heal", "losses", name, LOSSES)
        if not names or len(set(names)) < len(names) or not all(math.isfinite(w) and w > 0 for _, w in self.losses):
            raise RecipeError(
                f"Heal: got losses={self.losses!r}; needed at least one (name, weight), no name twice, weights above 0."
            )

    @property
    def weights(self):
        """Loss weights by name, without "local", which is a pass of its own before the training."""
        return {name: weight for name, weight in self.losses if name != "local"}

    @property
    def needs_teacher(self):
        """Names of the losses that compare with a teacher."""
        return tuple(name for name, _ in self.losses if name in NEED_TEACHER)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a model is healed: steps, batches, precision, and how often it is looked at and saved.

    steps: optimizer steps; with stages, of all of them together
    batch, accumulate: windows in a forward pass, over all processes together, and passes in a step
    precision: "fp32" or "bf16" (autocast; weights and optimizer stay in the student's own dtype)
    gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more work
    save_every: steps between checkpoints; 0: none, an interrupted run starts again
    eval_every: steps between evaluations on the validation windows (and one at the end); 0: none
    patience: stop after so many evaluations without a better validation loss, and keep the best weights; None: never
    log_every: steps in a row of the history; 0: a hundredth of all steps, at least 1
    local_steps: of the local feature distillation that the loss "local" asks for; it reads as many windows as the training
    Raises: ValueError that names the field
    """

    steps: int
    batch: int = 4
    accumulate: int = 1
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    save_every: int = 0
    eval_every: int = 0
    patience: int | None = None
    log_every: int = 0
    local_steps: int = 100

    def __post_init__(self):
        _refuse_unknown("Budget", "precision", self.precision, ("fp32", "bf16"))
        for name in ("steps", "batch", "accumulate", "local_steps", "patience"):
            _check_whole("Budget", name, getattr(self, name), 1, optional=name == "patience")
        for name in ("save_every", "eval_every", "log_every"):
            _check_whole("Budget", name, getattr(self, name), 0)
        if self.patience is not None and not self.eval_every:
            raise ValueError(
                f"Budget: got patience={self.patience} and eval_every=0; needed evaluations. Set eval_every."
            )

    @property
    def every(self):
        """Steps in a row of the history."""
        return self.log_every or max(1, self.steps // 100)

    def tokens(self, context):
        """Tokens that all steps read, for windows of `context` tokens."""
        return self.steps * self.batch * self.accumulate * context

    def to_dict(self):
        """Plain data, for a record."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _group(item):
    if isinstance(item, Group):
        return item
    known = [field.name for field in fields(Group)]
    if not isinstance(item, dict) or set(item) - set(known):
        raise RecipeError(f"Heal: got group {item!r}; needed a Group, or a dictionary with some of {', '.join(known)}.")
    return Group(**item)


def _refuse_unknown(where, field, got, known):
    if got not in known:
        raise RecipeError(f"{where}: got {field} {got!r}; needed one of {', '.join(known)}. Correct the name.")


def _check(where, record, *names, above=None, least=None):
    for name in names:
        value = getattr(record, name)
        if name == "final_learning_rate" and value is None:
            continue
        low = above if above is not None else least
        if not (math.isfinite(value) and (value > low if above is not None else value >= low)):
            raise RecipeError(
                f"{where}: got {name}={value!r}; needed a number {'above' if above == low else 'of at least'} {low}."
            )


def _check_whole(where, name, value, least, optional=False):
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{where}: got {name}={value!r}; needed a whole number of at least {least}.")
