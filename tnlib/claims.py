"""The 24 claims that this workbook tests, in our words, and the rule that makes one verdict out of several.

A notebook of a paper judges parts of a claim ("K1, steps") and writes its words into its record; evidence.py reads them.
T: TQCompressor. K: Krony-PT. H: Hybrid TT. C: CompactifAI. Q: quantization-aware TT BERT.
"""

from dataclasses import dataclass

CONFIRMED, REFUTED, MIXED, UNDECIDED = "confirmed", "refuted", "mixed", "undecided"
UNTESTED = "not testable here"
VERDICTS = (CONFIRMED, MIXED, REFUTED, UNDECIDED, UNTESTED)

# What the notebooks write, and what it comes to. "Not contradicted" is no confirmation: no difference was seen.
_WORDS = {
    "confirmed": CONFIRMED,
    "learning helps": CONFIRMED,  # notebook 07, of claim Q3
    "refuted": REFUTED,
    "learning hurts": REFUTED,
    "mixed": MIXED,
    "mostly confirmed": MIXED,
    "confirmed per byte, not per word": MIXED,
    "undecided": UNDECIDED,
    "not contradicted": UNDECIDED,
    "not seen": UNDECIDED,
    "no difference": UNDECIDED,
    "not decided here": UNDECIDED,
    "not tested here": UNTESTED,
    "not testable at this scale": UNTESTED,
    "not testable: a model that knows nothing is better": UNTESTED,
}


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where claims come from, and the notebook that tests them."""

    name: str
    source: str  # address of the paper, or of the repository where there is no paper
    notebook: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim: what it says, where it was read, and on which parts in the records its verdict rests."""

    key: str
    says: str
    source: str  # section; "asked here" where the paper does not say it and the method stands or falls by it
    turns_on: str  # what the answer depends on, whatever it is
    parts: tuple = ()  # names in the records, besides the key itself, without which the claim is not whole

    @property
    def paper(self):
        return PAPERS[self.key[0]]


PAPERS = {
    "T": Paper(name="TQCompressor", source="https://arxiv.org/abs/2401.16367", notebook="11_tqcompressor"),
    "K": Paper(name="Krony-PT", source="https://arxiv.org/abs/2412.12351", notebook="10_krony_pt"),
    "H": Paper(name="Hybrid TT", source="https://github.com/tkenaz/tt-transformer", notebook="13_hybrid_tt"),
    "C": Paper(name="CompactifAI", source="https://arxiv.org/abs/2401.14109", notebook="12_compactifai"),
    "Q": Paper(name="Yang et al.", source="https://arxiv.org/abs/2306.01076", notebook="14_qat_tt_bert"),
}

_TQ, _KRONY, _HYBRID = "arXiv 2401.16367", "arXiv 2412.12351 v2", "README and hybrid class of tkenaz/tt-transformer"
_COMPACT, _YANG = "arXiv 2401.14109 v2", "arXiv 2306.01076"

# key, what it says, where it was read, what the answer turns on, further parts
_CLAIMS = (
    ("T1", "a permutation search finds at least 0.01 of rho beyond what it finds in noise, on at least half of the matrices", f"{_TQ}, abstract",
     "what the same search finds in noise: an order is fitted to the accidents of the entries too", ("T1, damped search",)),
    ("T2", "a larger rho means a smaller rise of the loss, before training", f"{_TQ}, abstract",
     "whether the loss weighs the directions of a weight as the Frobenius norm does, which counts all alike", ()),
    ("T3", "compressing and distilling in three stages beats one shot at as many tokens", f"{_TQ}, abstract; its config.yaml",
     "how much text is left after the last stage: each stage throws the model back", ()),
    ("T4", "at equal stored parameters the model beats one with blocks removed, as DistilGPT-2 is", f"{_TQ}, abstract",
     "how far training has come: a model with blocks removed keeps every other matrix exact", ()),
    ("K1", "the norm-preserving start has a smaller loss than plain Van Loan, at once and after as many steps", f"{_KRONY}, section 4",
     "how much is lost at the start: rescaling moves the weight away from the original, which helps only where the loss asks for something else",
     ("K1, steps", "K1, healed")),
    ("K2", "at half of the numbers the pruning start is at least as good as Van Loan", f"{_KRONY}, section 4",
     "the kind of error: pruning keeps some rows exact and gives up the others, Van Loan gets every row somewhat wrong", ("K2, healed krony-96m",)),
    ("K3", "at equal size, terms with a small right factor beat one term with a larger left factor", f"{_KRONY}, tables I and II",
     "the matrix: a factor (4, 1) of an up-projection leaves training almost nothing to change", ()),
    ("K4", "learnable scalars matter", f"{_KRONY}, section 4",
     "the optimizer: a scalar adds no function that the factors do not have", ()),
    ("K5", "distillation adds nothing at equal tokens", "README of its repository, which shows no numbers",
     "what is held equal: with a teacher as many tokens take longer", ()),
    ("K6", "on MLP matrices Van Loan finds less than 0.02 of rho beyond noise", "asked here; the paper's norm table lies at the noise's values",
     "whether neighboring neurons are alike: in an MLP their order is arbitrary", ()),
    ("H1", "at one total size, attention should get more of the numbers than the MLP", _HYBRID,
     "the form: low rank, judged beside it where it was run, need not agree with trains", ()),
    ("H2", "a uniform ratio loses to an allocation by sensitivity, after healing", "asked here; the README allocates by kind of matrix",
     "how unequal the matrices are: a uniform ratio cuts the touchy ones as deep as the others", ()),
    ("H3", "an MLP at a twentieth of its numbers costs less than 30 % of perplexity, after training", _HYBRID,
     "the unit: a rise per byte compounds over the bytes of a word", ("H3, TT", "H3, random cores", "H3, from scratch")),
    ("C1", "late blocks bear smaller bond dimensions than early ones", f"{_COMPACT}, sections 2 and 3",
     "whether depth decides at all, or single matrices and the two ends of the model do", ()),
    ("C2", "down_proj is the most sensitive matrix", f"{_COMPACT}, section 3",
     "what it is compared with: by chance one of an MLP's three matrices would be the worst in a third of the cases", ()),
    ("C3", "short healing restores 90 % of the metric at 30 % of the size", f"{_COMPACT}, section 3",
     "the text read in healing, which at small scales is a tiny part of the paper's", ()),
    ("C4", "an MPO beats low rank at equal numbers", "asked here; the paper has no such baseline",
     "whether the bonds of an MPO follow anything in a weight: noise of the same shape says", ("C4, not trained", "C4, before healing", "C4, healed")),
    ("C5", "an MPO with the rest in 4 bits beats 4 bits alone at equal bytes", "asked here; the paper's own table has both",
     "which is dearer, few numbers or coarse ones", ()),
    ("C6", "a training step of the tensorized model is faster", f"{_COMPACT}, section 3",
     "where time goes: in arithmetic and many small products, or, as in the paper perhaps, in moving weights between devices", ()),
    ("Q1", "matching the teacher layer by layer learns faster than all layers at once", f"{_YANG}; its repository",
     "how many steps there are: those spent on the first layers teach the last ones nothing", ()),
    ("Q2", "8 bits cost at most 1.5 points and 4 bits at most 3, trained through the grid", f"{_YANG}, section 4",
     "training through the grid: rounding afterwards costs more", ("Q2, INT8", "Q2, INT4")),
    ("Q3", "a learned scale beats a fixed one at 4 bits", f"{_YANG}; its repository",
     "how the fixed scale starts: from a good start little is left to learn", ()),
    ("Q4", "a train is no better than low rank of the same rank", "asked here; such a train is a matrix of that rank",
     "whether cores train better than plain factors, since they can represent no more", ()),
    ("Q5", "starting from TT-SVD beats random cores", "asked here; the repository starts at random",
     "how much of the weight such small ranks keep: with little kept there is little to start from", ()),
)  # fmt: skip
claims = {row[0]: Claim(**dict(zip(("key", "says", "source", "turns_on", "parts"), row))) for row in _CLAIMS}


def verdict_of(word, where="verdict_of"):
    """One of the five verdicts for a word that a notebook has written.

    Raises: ValueError for a word that is not known, listing those that are
    Exact: a verdict is its own.
    """
    known = _WORDS | {verdict: verdict for verdict in VERDICTS}
    if word not in known:
        raise ValueError(
            f"{where}: got the verdict {word!r}, which no rule knows.\n  Needed: one of {', '.join(known)}.\n"
            "  Do: say in tnlib/claims.py what the new word comes to, or correct the notebook that wrote it."
        )
    return known[word]


def overall_verdict(verdicts):
    """One verdict for a claim, from those on its parts: a claim stands only if all of its parts do.

    Parts that could not be tested do not count. All confirmed: confirmed. Some refuted and none confirmed or mixed:
    refuted. Some confirmed and some undecided, or all undecided: undecided. Confirmed here and refuted there, or any
    mixed: mixed. None left: not testable here.
    Exact: overall_verdict([v]) == v, and the order does not matter.
    """
    left = {verdict_of(verdict, "overall_verdict") for verdict in verdicts} - {UNTESTED}
    if not left:
        return UNTESTED
    if MIXED in left or {CONFIRMED, REFUTED} <= left:
        return MIXED
    if REFUTED in left:
        return REFUTED
    return UNDECIDED if UNDECIDED in left else CONFIRMED
