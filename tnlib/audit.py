"""An error means nothing until it stands beside that of pure noise: every fit with its Gaussian null and its baselines."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from tnlib.form import Form
from tnlib.low_rank import LowRank


@dataclass(frozen=True)
class Fit:
    """One form fitted to one weight, beside the same form fitted to Gaussian noise of the same shape."""

    form: str
    kept: float  # stored over dense numbers
    error: float  # relative Frobenius error
    rho: float  # ||approximation|| / ||weight|| = sqrt(1 - error^2): the share of the norm that was found
    null_rho: float  # mean over the null's seeds
    null_std: float

    @property
    def gain(self):
        """rho minus the null's: structure found beyond what any matrix of this shape would show."""
        return self.rho - self.null_rho


@lru_cache(maxsize=4096)
def null_rho(form: Form, shape, seeds=3):
    """Mean and standard deviation of rho for `form` on standard Gaussian (out, in) matrices, seeds 0, 1, …

    Source: for a Kronecker fit of r terms with K = min(l0*l1, r0*r1), rho is near sqrt(r/K) when the other side is long.
    Exact: 1 at full rank.
    """
    form, found = form.resolve(shape), []
    for seed in range(seeds):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        found.append(_rho(float(form.decompose(noise)[1])))
    values = torch.tensor(found, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def audit(weight, form, seeds=3):
    """Fit `form` to `weight` (out, in) by its least-squares decomposition, and to `seeds` Gaussian matrices beside it."""
    shape = tuple(weight.shape)
    resolved = form.resolve(shape)
    error = float(resolved.decompose(weight)[1])
    return Fit(str(resolved), resolved.share(shape), error, _rho(error), *null_rho(resolved, shape, seeds))


def error_table(weight, forms, seeds=3):
    """The table that every error is shown in: the forms asked for, with dense and low-rank rows beside them.

    weight: (out, in); forms: Forms. For each, a low-rank row of at most the same stored numbers is added.
    Returns: pandas DataFrame with kept, error, rho, the Gaussian null's rho with its spread over seeds, and gain = rho - null
    """
    import pandas as pd

    shape, rows = tuple(weight.shape), []
    for form in forms:
        rows.append(audit(weight, form, seeds))
        share = form.resolve(shape).share(shape)
        if not isinstance(form, LowRank) and share * weight.numel() >= sum(shape):
            rows.append(audit(weight, LowRank(kept=min(1.0, share)), seeds))
    dense = {"form": "dense", "kept": 1.0, "error": 0.0, "rho": 1.0, "null rho": 1.0, "null std": 0.0, "gain": 0.0}
    table = [dense] + [
        {
            "form": r.form,
            "kept": r.kept,
            "error": r.error,
            "rho": r.rho,
            "null rho": r.null_rho,
            "null std": r.null_std,
            "gain": r.gain,
        }
        for r in rows
    ]
    return pd.DataFrame(table).drop_duplicates(ignore_index=True)


def _rho(error):
    return max(0.0, 1 - error**2) ** 0.5
