"""Whether one model does better than another on the same windows."""

import math
from dataclasses import dataclass

import torch
from scipy.special import stdtrit


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Difference of two models' losses over the same windows: mean, its standard error, and what may be said of it."""

    value: float  # nats per token
    stderr: float
    verdict: str  # "lower", "higher" or "no different"

    def __str__(self):
        return f"{self.value:+.3f} ± {self.stderr:.3f} nats ({self.verdict})"


def compare(losses, base, level=0.05):
    """Whether a model's loss is lower or higher than another's, from their losses on the same windows.

    losses, base: nats per token of each window, as in Perplexity.losses; level: of the two-sided paired t test
    Returns: Comparison
    Raises: ValueError for fewer than two windows, or unequal numbers of them
    Source: Student 1908. Exact: compare(x, x) is zero and "no different".
    """
    if len(losses) != len(base) or len(base) < 2:
        raise ValueError(
            f"compare: {len(losses)} and {len(base)} windows; needed the same windows, at least two. Evaluate both models on them."
        )
    gap = torch.tensor(list(losses), dtype=torch.float64) - torch.tensor(list(base), dtype=torch.float64)
    value, stderr = float(gap.mean()), float(gap.std() / math.sqrt(len(gap)))
    clear = abs(value) > stdtrit(len(gap) - 1, 1 - level / 2) * stderr
    verdict = "no different" if not clear else "lower" if value < 0 else "higher"
    return Comparison(value=value, stderr=stderr, verdict=verdict)
