"""readings.py for the notebooks on trains: Hybrid TT, CompactifAI, tensor-train BERT."""

import math
import re
import statistics
from functools import partial

from tnlib.effects import BITS, NATS, SHARE, Effect, counted, only, over_cases, over_seeds, paired


def hybrid(m, p):
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


def _profiled(m):
    """Claims that a profile of notebook 12 decides: which blocks, and which matrices, lose most."""

    def depth():
        from scipy.stats import spearmanr

        chis = sorted({r["chi"] for r in m["profile"]})
        rows = {chi: [(r["block"], r["kl"]) for r in m["profile"] if r["chi"] == chi] for chi in chis}
        found = [float(spearmanr(*zip(*rows[chi])).statistic) for chi in chis if len({b for b, _ in rows[chi]}) > 3]
        return over_cases(found, "bond dimensions", unit="rank correlation", of="KL with depth", favors=-1)

    def down():
        """How often the down-projection loses most among the MLP's matrices."""
        name = next(r["matrix"] for r in m["profile"] if r["matrix"] in ("down_proj", "c_proj"))
        size = {r["dense numbers"] for r in m["profile"] if r["matrix"] == name}
        worst = {}
        for r in m["profile"]:
            if r["dense numbers"] in size and r["kl"] > worst.get((r["block"], r["chi"]), {"kl": -math.inf})["kl"]:
                worst[r["block"], r["chi"]] = r
        hits = sum(r["matrix"] == name for r in worst.values())
        return counted(hits, len(worst), f"cases where {name} loses most of the MLP's matrices", border=1 / 3)

    return {"C1": depth, "C2": down}


def compactifai(m, p):
    """Notebook 12."""

    def restored():
        fit = [r for r in m["stored"] if r["of dense, 16 bits"] <= 0.3 and r["model"].startswith("MPO")]
        best = max(r["next word right"] for r in fit) / m["dense_next_word"]
        of = f"best of {len(fit)} MPO models in 30 % of the bytes, of the dense model's right next words"
        return Effect(value=best, unit=SHARE, of=of, border=0.9)

    def step():
        """The clock of a training step."""
        row = only(m["work"], model="MPO")
        times, spread = float(row["times dense"]), {"low": row["low"], "high": row["high"], "interval": "quartiles of the ratio"}
        return Effect(value=times, unit="times dense speed", of="training step of the MPO model", border=1.0, **spread)

    return _profiled(m) | _against_low_rank(m, p) | {"C3": restored, "C6": step}


def _against_low_rank(m, p):
    """What notebook 12 says of MPO beside low rank, and of cores in few bits beside a dense model in as few."""
    pairs = {
        "C4, activation-aware": ("shared_out", "MPO, uniform ratio", "low rank, activation-aware"),
        "C5": ("stored", "MPO, rest 4 bits", "dense, 4 bits"),
        "C5, cores too": ("stored", "MPO, all 4 bits", "dense, 4 bits"),
    }
    healing = {
        "C4, before healing": ("before", "before healing"),
        "C4, healed": ("above dense", f"after {p['HEAL_TOKENS']:,} tokens"),
    }

    def uniform():
        row = only(m["gaps"], recipe="low rank, uniform ratio")  # its loss minus the MPO's
        of = "MPO minus low rank, uniform ratio, not trained"
        return paired(-row["value"], row["stderr"], None, None, 1, p["WINDOWS"], unit=NATS, of=of, favors=-1)

    def between(part, table, ours, theirs):
        above = {r["model"]: r["above dense"] for r in m[table]}
        effect = Effect(value=above[ours] - above[theirs], unit=NATS, of=f"{ours} minus {theirs}", favors=-1)
        return _with_stated_error(m, p, part, effect)

    def by_seed(part, column, when):
        found = {(r["run"], r["seed"]): r[column] for r in m["healed"]}
        gaps = [found["MPO", s] - found["low rank", s] for s in p["HEAL_SEEDS"]]
        effect = over_seeds(sorted(set(gaps)), unit=NATS, of=f"MPO minus low rank, {when}", favors=-1)
        return _with_stated_error(m, p, part, effect)

    return {
        "C4, not trained": uniform,
        **{part: partial(by_seed, part, *asked) for part, asked in healing.items()},
        **{part: partial(between, part, *asked) for part, asked in pairs.items()},
    }


def _with_stated_error(m, p, part, effect):
    """The effect with the standard error that notebook 12's record states in words, if it states it of this very number."""
    why = next((r.get("why") or "" for r in m["verdicts"] if r["claim"] == part), "")
    said = re.search(r"([+-]\d+\.\d+) ± (\d+\.\d+) nats", why)
    if effect.low is not None or not said or abs(float(said[1]) - effect.value) > 0.002:
        return effect
    return paired(effect.value, float(said[2]), None, None, 1, p["WINDOWS"], unit=NATS, of=effect.of, favors=-1)


def qat(m, p):
    """Notebook 14."""
    rules = {"Q2, INT8": {"border": -1.5}, "Q2, INT4": {"border": -3.0}, "Q4": {"favors": -1}}

    def points(part):
        """A difference in points, over the tasks that both models know."""
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
