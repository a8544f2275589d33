"""How large an effect is behind each verdict, computed from the numbers in the record that holds the verdict.

One function a notebook: metrics and parameters of its record -> {part of a claim: how to compute its Effect}. What a
record does not hold comes out as None; nothing is filled in.
"""

import statistics
from functools import partial

from tnlib.effects import NATS, Effect, counted, only, over_cases, over_seeds, paired
from tnlib.readings_trains import compactifai, hybrid, qat


def effects(notebook, metrics, params):
    """{part: Effect or None} of one record; parts that are not there have no numbers that we know of."""
    ways = _found(lambda: _READERS[notebook](metrics, params)) or {}
    return {part: _found(compute) for part, compute in ways.items()}


def _found(compute):
    """What `compute` gives, or None where it misses a table, a row or a number."""
    try:
        return compute()
    except (LookupError, TypeError, ZeroDivisionError, statistics.StatisticsError):
        return None


def share_below(gains, limit):
    """Verdict word of claim K6 as notebook 10 judges it, for a record that holds the gains alone."""
    near = sum(gain < limit for gain in gains)
    return "confirmed" if near == len(gains) else "refuted" if near < len(gains) / 2 else "mostly confirmed"


def van_loan_gains(metrics):
    """Gains of rho beyond noise on MLP matrices in the record of notebook 02, Kronecker fits only."""
    rows = metrics.get("depth") or []
    return [r["gain"] for r in rows if r["format"].startswith("Kronecker") and r["matrix"] in ("up", "gate", "down")]


def _krony(m, p):
    """Notebook 10."""
    less = {"unit": NATS, "favors": -1}

    def step0(claim, recipes):
        rows = [r for r in m["compared"] if r["claim"] == claim and (not recipes or r["recipe"] in recipes)]
        of = f"{rows[0]['start']} start minus Van Loan, before training"
        return over_cases([r["minus Van Loan"] for r in rows], "settings (recipe, blocks)", of=of, **less)

    def healed(who, favors=-1):
        row, seeds = only(m["healing"], run=who), len(p["HEAL_SEEDS"])
        of = f"{who} minus Van Loan, after {p['HEAL_TOKENS']:,} tokens"
        spread = (row["minus Van Loan"], row["its stderr"], row["least"], row["most"])
        return paired(*spread, seeds, p["WINDOWS"], unit=NATS, of=of, favors=favors)

    def fitted(who):
        after = {(r["matrix"], r["start"]): r["after"] for r in m["fits"]}
        gaps = [after[matrix, who] - after[matrix, "Van Loan"] for matrix, start in after if start == who]
        of = f"{who} minus Van Loan, error of outputs after training one matrix"
        return over_cases(gaps, "matrices", unit="relative error", of=of, favors=-1, border=-0.01)  # less is none

    return {
        "K1": partial(step0, "K1", ()),
        "K1, healed": partial(healed, "norm-preserving"),
        "K2": partial(step0, "K2", ("krony-96m",)),
        f"K2, healed {p.get('RECIPE')}": partial(healed, "pruning"),
        "K3": partial(fitted, "two terms"),
        "K4": partial(fitted, "scalar"),
        "K5": partial(healed, "Van Loan, distilled", 1),
        "K6": lambda: counted(m["k6_within_002"], m["k6_fits"], f"fits within 0.02 of noise, worst {m['k6_largest_gain']:.3f}"),
    }  # fmt: skip


def _tq(m, p):
    """Notebook 11."""

    def found(search):
        gains = [r["beyond noise"] for r in m["permutations"] if r["search"] == search]
        return counted(
            sum(g >= 0.01 for g in gains), len(gains), f"matrices with 0.01 or more beyond noise, {search} search"
        )

    def reordered():
        rise = {(r["part"], r["order"]): r["rise"] for r in m["damage"]}
        gaps = [rise[part, "permuted"] - rise[part, "as given"] for part, order in rise if order == "permuted"]
        return over_cases(
            gaps, "parts of the model", unit=NATS, of="permuted minus as given, before training", favors=-1
        )

    def stages():
        row = only(m["healing"], run="three stages")
        spread = (row["minus one shot"], row["its stderr"], row["least"], row["most"])
        of = f"three stages minus one shot, after {p['HEAL_TOKENS']:,} tokens"
        return paired(*spread, len(p["HEAL_SEEDS"]), p["WINDOWS"], unit=NATS, of=of, favors=-1)

    def against_removed():
        rise = {(r["run"], r["seed"]): r["rise"] for r in m["healed_by_seed"]}
        gaps = [rise["three stages", s] - rise["blocks removed", s] for s in p["HEAL_SEEDS"]]
        return over_seeds(
            gaps, unit=NATS, of=f"three stages minus blocks removed, after {p['HEAL_TOKENS']:,} tokens", favors=-1
        )

    searches = {r["search"] for r in m.get("permutations") or []}
    return {f"T1, {search} search": partial(found, search) for search in searches} | {
        "T2": reordered,
        "T3": stages,
        "T4": against_removed,
    }


def _search(m, p):
    """Notebook 03."""
    columns = {"T1": "damped beyond", "T1, sorted": "sorted beyond", "T1, sorted, beyond norms": "beyond norms"}

    def found(column):
        gains = [r[column] for r in m["gains"]]
        return counted(sum(gain >= 0.01 for gain in gains), len(gains), f"matrices with 0.01 or more, {column} noise")

    def reordered():
        keys, orders = ("matrix", "right"), ("damped", "sorted")
        given = {tuple(r[k] for k in keys): r["rho"] for r in m["damage"] if r["order"] == "as given"}
        gaps = [
            r["more loss"] for r in m["damage"] if r["order"] in orders and r["rho"] > given[tuple(r[k] for k in keys)]
        ]
        return over_cases(gaps, "reorderings of larger rho", unit=NATS, of="reordered minus as given", favors=-1)

    return {part: partial(found, column) for part, column in columns.items()} | {"T2": reordered}


def _distillation(m, p):
    """Notebook 06."""

    def logits():
        row, n = only(m["k5"], loss="next token + logits"), p["WINDOWS"]
        of = "next token + logits minus next token, low rank, after a local fit"
        return paired(row["minus next token"], row["stderr"], None, None, 1, n, unit=NATS, of=of)

    return {"K5": logits}


def _one_layer(m, p):
    """Notebook 07."""

    def learned(start):
        """The gain of one layer's learned scale, by start."""
        row, seeds = only(m["q3"], start=start), len(p["SEEDS"])
        of = f"error of one layer with a frozen scale minus a learned one, start {start}"
        return Effect(
            value=row["gain of learning"],
            low=row["smallest"],
            high=row["largest"],
            interval=f"range over {seeds} seeds",
            unit="relative error",
            of=of,
        )

    return {f"Q3, one layer, from {r['start']}": partial(learned, r["start"]) for r in m.get("q3") or []}


def _van_loan(m, p):
    """Notebook 02, which measures what claim K6 says but does not judge it."""
    gains = van_loan_gains(m)
    return (
        {
            "K6": lambda: counted(
                sum(g < 0.02 for g in gains), len(gains), f"fits within 0.02 of noise, worst {max(gains):.3f}"
            )
        }
        if gains
        else {}
    )


_READERS = {
    "02_van_loan": _van_loan, "03_permutation_search": _search, "06_distillation": _distillation, "07_quantization_aware_training": _one_layer,
    "10_krony_pt": _krony, "11_tqcompressor": _tq, "12_compactifai": compactifai, "13_hybrid_tt": hybrid, "14_qat_tt_bert": qat,
}  # fmt: skip
