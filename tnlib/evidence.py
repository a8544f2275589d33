"""What the records of all notebooks say about the claims: `evidence()` reads them, `judge(rows)` gives 24 verdicts."""

from dataclasses import dataclass

from tnlib.claims import UNTESTED, Claim, claims, overall_verdict, verdict_of
from tnlib.effects import Effect
from tnlib.readings import effects, share_below, van_loan_gains
from tnlib.records import SCALES, load_results, repo_root, trust

# Notebooks whose verdicts bear on a claim with other means than its paper's: shown beside it, never counted.
BESIDE = ("02_van_loan", "06_distillation", "07_quantization_aware_training")
NOTEBOOKS = (*BESIDE, "03_permutation_search", *dict.fromkeys(claim.paper.notebook for claim in claims.values()))


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One verdict in one record."""

    claim: str
    part: str  # the record's name for it: the claim's key, or such as "K1, healed"
    counts: bool  # whether the claim's verdict rests on it; else it is a variant, shown beside
    verdict: str  # one of claims.VERDICTS
    word: str  # what the record says
    notebook: str
    scale: str
    path: str  # of the record, from the repository's root
    own: bool  # from your own run, not from figures/
    seeds: int | None  # None: nothing random enters
    effect: Effect | None  # None: not in the record


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """The verdict on one claim, the scale that decided it, and every row that was seen."""

    claim: Claim
    verdict: str
    scale: str | None  # the largest at which it could be tested; else the largest with a row; None: no record
    rows: tuple[Evidence, ...]  # the largest scale first
    shown: Evidence | None  # the row whose effect stands for the claim


def evidence(up_to=None, notebooks=NOTEBOOKS):
    """Rows of all records, in the order of the claims, the largest scale first.

    up_to: leave out records of larger scales than this; None: all. Records of scale smoke never count
    notebooks: names of those to read; one without any record is passed over
    Returns: list of Evidence
    Raises: ValueError for a scale, claim or verdict word that is not known, with the record that holds it
    """
    if up_to is not None and up_to not in SCALES[1:]:
        raise ValueError(f"evidence: up_to {up_to!r} is no scale of record; needed one of {', '.join(SCALES[1:])}.")
    rows = []
    for name in notebooks:
        for scale, (record, path) in load_results(name).items():
            if up_to is None or trust(scale) <= trust(up_to):
                rows += read_record(name, record, path)
    order = list(claims)
    return sorted(rows, key=lambda row: (order.index(row.claim), -trust(row.scale), not row.counts, row.notebook))


def read_record(notebook, record, path):
    """The rows of one record, as load_results gives it."""
    metrics, params, rows = record["metrics"], record.get("params") or {}, []
    numbers = effects(notebook, metrics, params)
    own = path.parent.name == "results"
    where = path.relative_to(repo_root()).as_posix() if path.is_relative_to(repo_root()) else path.name
    for said in _said(notebook, metrics):
        part = said["claim"] + (f", one layer, from {said['start']}" if "start" in said else "")
        key = part.split(",")[0]
        if key not in claims:
            raise ValueError(
                f"{where}: got a verdict on {part!r}, which is no claim.\n  Needed: one of {', '.join(claims)}, before the first comma."
            )
        counts = notebook not in BESIDE and (part == key or part in claims[key].parts)
        verdict = verdict_of(said["verdict"], f"{where}, claim {part}")
        facts = {"claim": key, "part": part, "counts": counts, "verdict": verdict, "word": said["verdict"]}
        facts |= {"notebook": notebook, "scale": record["scale"], "path": where, "own": own}
        rows.append(Evidence(**facts, seeds=_seeds(part, record), effect=numbers.get(part)))
    return rows


def judge(rows):
    """One Judgment a claim: the largest scale at which any of its own parts could be tested decides, by `overall_verdict`.

    rows: as evidence() returns them
    Returns: list of Judgment, in the order of the claims
    Exact: rows that do not count change no verdict, nor do rows of smaller scales than the deciding one.
    """
    return [_judge(claim, tuple(row for row in rows if row.claim == key)) for key, claim in claims.items()]


def _judge(claim, rows):
    counting = [row for row in rows if row.counts]
    scales = sorted({row.scale for row in counting}, key=trust, reverse=True)
    tested = (s for s in scales if any(row.verdict != UNTESTED for row in counting if row.scale == s))
    scale = next(tested, scales[0] if scales else None)
    here = [row for row in counting if row.scale == scale]
    verdict = overall_verdict(row.verdict for row in here)
    best = sorted(here, key=lambda row: (row.effect is None, row.verdict != verdict))  # stable: else the record's order
    return Judgment(claim=claim, verdict=verdict, scale=scale, rows=rows, shown=best[0] if best else None)


def _said(notebook, metrics):
    """The verdicts of a record; notebook 02 measures what K6 says and leaves the word to us."""
    if notebook == "02_van_loan":
        gains = van_loan_gains(metrics)
        return [{"claim": "K6", "verdict": share_below(gains, 0.02)}] if gains else []
    return metrics.get("verdicts") or []


# Parts in which nothing random enters: a decomposition, a profile or a clock, not a training run.
_UNSEEDED = ("K1", "K2", "K6", "C1", "C2", "C6", "T2", "C4, not trained", "C4, before healing", "C4, activation-aware")


def _seeds(part, record):
    """How many seeds are behind a part, from the record's parameters."""
    params = record.get("params") or {}
    if part in _UNSEEDED:
        return None
    if part.startswith("T1"):
        return params.get("NULL_SEEDS")  # of the noise that the gain is compared with
    if part.startswith("C5") or part in ("K1, steps", "K3", "K4", "C3"):
        return 1  # the first seed's models, quantized; one matrix trained once
    listed = params.get("HEAL_SEEDS") or params.get("SEEDS")
    return len(listed) if listed else 1
