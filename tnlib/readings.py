"""How large an effect is behind each verdict, computed from the numbers in the record that holds the verdict.

One function a notebook: metrics and parameters of its record -> {part of a claim: how to compute its Effect}. What a
record does not hold comes out as None; nothing is filled in.
"""

import math
import re
import statistics
from functools import partial

from tnlib.effects import BITS, NATS, SHARE, Effect, counted, only, over_cases, over_seeds, paired


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


def _hybrid(m, p):
    """Notebook 13."""

    def gap(part):
        row = only(m["gaps"], claim=part)
        spread = (row["bits"], row["stderr"], row["least seed"], row["most"])
        return paired(
            *spread, len(p["SEEDS"]), p["WINDOWS"], unit=BITS, of=f"{row['of']} minus {row['against']}", favors=-1
        )

    def percent(bits):
        return 100 * (2**bits - 1)

    cost = {"unit": "% perplexity a byte", "border": 30.0, "favors": -1}

    def healed(start):
        row, seeds = only(m["healing"], model=f"FFN alone, {start}"), len(p["SEEDS"])
        low, high = (percent(row["least rise"]), percent(row["most"])) if seeds > 1 else (None, None)
        said = f"range over {seeds} seeds" if seeds > 1 else "no interval in the record"
        of = f"FFN at {p['FFN_KEPT']:g} from {start}, healed; {row['+% a word']:.0f} % a word"
        return Effect(value=row["perplexity +% a byte"], low=low, high=high, interval=said, of=of, **cost)

    def scratch():
        bits = {(r["model"], r["seed"]): r["bits"] for r in m["by_seed"]}
        rises = [percent(bits["FFN alone", s] - bits["dense", s]) for s in p["SEEDS"]]
        return over_seeds(rises, of=f"FFN at {p['FFN_KEPT']:g}, trained so from scratch", **cost)

    starts = ("TT", "low rank", "random cores")
    return {part: partial(gap, part) for part in ("H1", "H1, low rank", "H2")} | {
        **{f"H3, {start}": partial(healed, start) for start in starts},
        "H3, from scratch": scratch,
    }


def _compactifai(m, p):
    """Notebook 12."""

    def depth():
        from scipy.stats import spearmanr

        chis = sorted({r["chi"] for r in m["profile"]})
        rows = {chi: [(r["block"], r["kl"]) for r in m["profile"] if r["chi"] == chi] for chi in chis}
        found = [float(spearmanr(*zip(*rows[chi])).statistic) for chi in chis if len({b for b, _ in rows[chi]}) > 3]
        return over_cases(found, "bond dimensions", unit="rank correlation", of="KL with depth", favors=-1)

    def down():
        name = next(r["matrix"] for r in m["profile"] if r["matrix"] in ("down_proj", "c_proj"))
        size = {r["dense numbers"] for r in m["profile"] if r["matrix"] == name}
        worst = {}
        for r in m["profile"]:
            if r["dense numbers"] in size and r["kl"] > worst.get((r["block"], r["chi"]), {"kl": -math.inf})["kl"]:
                worst[r["block"], r["chi"]] = r
        hits = sum(r["matrix"] == name for r in worst.values())
        return counted(hits, len(worst), f"cases where {name} loses most of the MLP's matrices", border=1 / 3)

    def restored():
        fit = [r for r in m["stored"] if r["of dense, 16 bits"] <= 0.3 and r["model"].startswith("MPO")]
        best = max(r["next word right"] for r in fit) / m["dense_next_word"]
        of = f"best of {len(fit)} MPO models in 30 % of the bytes, of the dense model's right next words"
        return Effect(value=best, unit=SHARE, of=of, border=0.9)

    def between(part, table, ours, theirs):
        above = {r["model"]: r["above dense"] for r in m[table]}
        return stated(
            part, Effect(value=above[ours] - above[theirs], unit=NATS, of=f"{ours} minus {theirs}", favors=-1)
        )

    def stated(part, effect):
        """With the standard error that the record states in words, if it states it of this very number."""
        why = next((r.get("why") or "" for r in m["verdicts"] if r["claim"] == part), "")
        said = re.search(r"([+-]\d+\.\d+) ± (\d+\.\d+) nats", why)
        if effect.low is not None or not said or abs(float(said[1]) - effect.value) > 0.002:
            return effect
        return paired(effect.value, float(said[2]), None, None, 1, p["WINDOWS"], unit=NATS, of=effect.of, favors=-1)

    def uniform():
        row = only(m["gaps"], recipe="low rank, uniform ratio")  # its loss minus the MPO's
        of = "MPO minus low rank, uniform ratio, not trained"
        return paired(-row["value"], row["stderr"], None, None, 1, p["WINDOWS"], unit=NATS, of=of, favors=-1)

    def by_seed(part, column, when):
        found = {(r["run"], r["seed"]): r[column] for r in m["healed"]}
        gaps = [found["MPO", s] - found["low rank", s] for s in p["HEAL_SEEDS"]]
        return stated(part, over_seeds(sorted(set(gaps)), unit=NATS, of=f"MPO minus low rank, {when}", favors=-1))

    def step():
        row = only(m["work"], model="MPO")
        low, high = row["low"], row["high"]
        return Effect(
            value=float(row["times dense"]),
            low=low,
            high=high,
            unit="times dense speed",
            of="training step of the MPO model",
            interval="quartiles of the ratio",
            border=1.0,
        )

    healing = {
        "C4, before healing": ("before", "before healing"),
        "C4, healed": ("above dense", f"after {p['HEAL_TOKENS']:,} tokens"),
    }
    pairs = {"C4, activation-aware": ("shared_out", "MPO, uniform ratio", "low rank, activation-aware")}
    pairs |= {
        "C5": ("stored", "MPO, rest 4 bits", "dense, 4 bits"),
        "C5, cores too": ("stored", "MPO, all 4 bits", "dense, 4 bits"),
    }
    return {
        "C1": depth,
        "C2": down,
        "C3": restored,
        "C4, not trained": uniform,
        "C6": step,
        **{part: partial(by_seed, part, *asked) for part, asked in healing.items()},
        **{part: partial(between, part, *asked) for part, asked in pairs.items()},
    }


def _qat(m, p):
    """Notebook 14."""
    rules = {"Q2, INT8": {"border": -1.5}, "Q2, INT4": {"border": -3.0}, "Q4": {"favors": -1}}

    def points(part):
        rows = [r for r in m["claims"] if r["claim"] == part]
        rows = [r for r in rows if r["both know the task"]] or rows
        seeds, row = len(p["SEEDS"]), rows[0]
        ends = ("least seed", "most") if seeds > 1 else ("low", "high")
        low, high = min(r[ends[0]] for r in rows), max(r[ends[1]] for r in rows)
        said = (f"range over {seeds} seeds" if seeds > 1 else "95 % bootstrap over examples") + (
            f", {len(rows)} tasks" if len(rows) > 1 else ""
        )
        of = f"{row['of']} minus {row['against']}, {', '.join(r['task'] for r in rows)}"
        value = statistics.fmean(r["points"] for r in rows)
        return Effect(value=value, low=low, high=high, interval=said, unit="points", of=of, **rules.get(part, {}))

    return {part: partial(points, part) for part in {r["claim"] for r in m.get("claims") or []}}


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
    "10_krony_pt": _krony, "11_tqcompressor": _tq, "12_compactifai": _compactifai, "13_hybrid_tt": _hybrid, "14_qat_tt_bert": _qat,
}  # fmt: skip
