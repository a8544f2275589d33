"""Claims, the rule for their verdicts, the records behind them, and the effects that are computed from those."""

import itertools
import json
import re
import sys

import pytest
from scipy.stats import binomtest, ttest_1samp

from tnlib import records
from tnlib.claims import CONFIRMED, MIXED, REFUTED, UNDECIDED, UNTESTED, VERDICTS, claims, overall_verdict, verdict_of
from tnlib.effects import counted, paired
from tnlib.evidence import NOTEBOOKS, evidence, judge
from tnlib.forest import LOOKS, claim_figure, claims_figure
from tnlib.readings import effects, share_below
from tnlib.records import load_result, load_results


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """An empty checkout; call it to put a record of notebook 10 there."""
    for module in (records, sys.modules["tnlib.evidence"]):
        monkeypatch.setattr(module, "repo_root", lambda: tmp_path)
    monkeypatch.delenv("TNLIB_RESULTS", raising=False)
    monkeypatch.delenv("TNLIB_SCALE", raising=False)

    def put(scale, verdicts, own=False, name="10_krony_pt", **metrics):
        path = f"runs/{scale}/results/{name}.json" if own else f"figures/{name}_{scale}.json"
        said = [{"claim": claim, "verdict": word} for claim, word in verdicts.items()]
        record = {"name": name, "scale": scale, "params": {"HEAL_SEEDS": [0, 1], "WINDOWS": 4, "HEAL_TOKENS": 8}}
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(record | {"metrics": {"verdicts": said} | metrics}), encoding="utf-8")
        return tmp_path / path

    return put


def judged(key, **given):
    return next(judgment for judgment in judge(evidence(**given)) if judgment.claim.key == key)


def test_there_are_24_claims_of_five_papers():
    assert list(claims) == [f"{paper}{n}" for paper, last in zip("TKHCQ", (4, 6, 3, 6, 5)) for n in range(1, last + 1)]
    assert {claim.paper.notebook for claim in claims.values()} < set(NOTEBOOKS)
    assert all(part.split(",")[0] == claim.key for claim in claims.values() for part in claim.parts)


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        ([], UNTESTED),
        ([UNTESTED, UNTESTED], UNTESTED),
        ([CONFIRMED, UNTESTED], CONFIRMED),
        ([CONFIRMED, CONFIRMED], CONFIRMED),
        ([CONFIRMED, UNDECIDED], UNDECIDED),  # half of a claim is no claim
        ([REFUTED, UNDECIDED], REFUTED),  # one part that fails is enough
        ([REFUTED, CONFIRMED, UNDECIDED], MIXED),
        ([MIXED, REFUTED], MIXED),
        ([UNDECIDED, UNTESTED], UNDECIDED),
    ],
)
def test_one_verdict_from_several_whatever_their_order(parts, whole):
    assert {overall_verdict(order) for order in itertools.permutations(parts)} == {whole}


def test_words_of_the_notebooks_come_to_five_verdicts_and_others_are_refused():
    assert verdict_of("not contradicted") == UNDECIDED
    assert verdict_of("mostly confirmed") == MIXED
    assert [verdict_of(verdict) for verdict in VERDICTS] == list(VERDICTS)
    assert set(LOOKS) == set(VERDICTS)
    with pytest.raises(ValueError, match=r"(?s)here: got the verdict 'perhaps'.*Needed: one of confirmed.*claims\.py"):
        verdict_of("perhaps", "here")


def test_an_unknown_word_or_claim_names_the_record_that_holds_it(shelf):
    shelf("laptop", {"K3": "perhaps"})
    with pytest.raises(ValueError, match=r"figures/10_krony_pt_laptop\.json, claim K3: got the verdict 'perhaps'"):
        evidence()
    shelf("laptop", {"X9, healed": "confirmed"})
    with pytest.raises(ValueError, match=r"10_krony_pt_laptop\.json: got a verdict on 'X9, healed', which is no claim"):
        evidence()


def test_larger_scales_win_unless_they_could_not_test_it(shelf):
    shelf("laptop", {"K5": "confirmed", "K3": "refuted"})
    shelf("long", {"K5": "refuted", "K3": "not tested here"})
    assert (judged("K5").verdict, judged("K5").scale, len(judged("K5").rows)) == (REFUTED, "long", 2)
    assert (judged("K3").verdict, judged("K3").scale) == (REFUTED, "laptop")
    assert judged("K5", up_to="laptop").verdict == CONFIRMED
    assert (judged("H1").verdict, judged("H1").scale, judged("H1").shown) == (UNTESTED, None, None)
    with pytest.raises(ValueError, match="no scale of record"):
        evidence(up_to="smoke")


def test_variants_and_other_notebooks_stand_beside_a_claim_and_do_not_count(shelf):
    shelf("laptop", {"K2": "confirmed", "K2, healed krony-81m": "refuted"})
    shelf("long", {"K2": "refuted"}, name="06_distillation")
    assert [row.counts for row in judged("K2").rows] == [False, True, False]
    assert (judged("K2").verdict, judged("K2").scale) == (CONFIRMED, "laptop")
    shelf("laptop", {"K2": "confirmed", "K2, healed krony-96m": "refuted"})  # at half of the numbers, as claimed
    assert judged("K2").verdict == MIXED


def test_records_of_your_own_win_and_smoke_never_counts(shelf, monkeypatch, tmp_path):
    committed, smoke = shelf("laptop", {"K5": "confirmed"}), shelf("smoke", {"K5": "mixed"}, own=True)
    assert smoke.exists()
    assert {scale: path for scale, (_, path) in load_results("10_krony_pt").items()} == {"laptop": committed}
    own = shelf("laptop", {"K5": "refuted"}, own=True)
    row = judged("K5").shown
    assert (row.verdict, row.own, row.path) == (REFUTED, True, "runs/laptop/results/10_krony_pt.json")
    assert load_results("10_krony_pt")["laptop"] == (load_result("10_krony_pt", "laptop"), own)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "results").mkdir(parents=True)
    own.rename(elsewhere / "results" / own.name)
    monkeypatch.setenv("TNLIB_RESULTS", str(elsewhere))
    assert judged("K5").verdict == REFUTED


def test_effects_come_from_the_record_and_what_it_lacks_is_not_made_up(shelf):
    row = {"run": "Van Loan, distilled", "minus Van Loan": -0.2, "its stderr": 0.01, "least": -0.3, "most": -0.1}
    shelf("long", {"K5": "refuted", "K6": "confirmed", "K3": "mixed", "K4, of tomorrow": "refuted"}, healing=[row])
    effect = judged("K5").shown.effect
    assert (effect.value, effect.low, effect.high, effect.interval) == (-0.2, -0.3, -0.1, "range over 2 seeds")
    assert effect.toward() == -0.2
    assert effect.toward(-0.3) == -0.3
    assert (judged("K5").shown.seeds, judged("K6").shown.seeds) == (2, None)
    assert judged("K3").shown.effect is None
    assert judged("K4").rows[0].counts is False  # a part that nobody has named yet is shown, and changes nothing
    assert effects("99_unheard_of", {}, {}) == {}


def test_intervals_are_those_of_scipy():
    low, high = binomtest(7, 20).proportion_ci(method="exact")
    found = counted(7, 20, "")
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)
    assert (counted(0, 5, "").low, counted(5, 5, "").high) == (0.0, 1.0)
    gaps = [0.1, 0.3, 0.2, 0.6]
    test = ttest_1samp(gaps, 0.0)
    expected = test.confidence_interval()
    found = paired(0.3, test.statistic and 0.3 / test.statistic, None, None, 1, 4, unit="", of="")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(
    ("gains", "word"),
    [([0.0, 0.01], "confirmed"), ([0.0, 0.01, 0.1], "mostly confirmed"), ([0.0, 0.1, 0.1], "refuted")],
)
def test_k6_is_judged_as_in_notebook_10(gains, word):
    assert share_below(gains, 0.02) == word


def test_the_committed_records_can_be_read_and_their_effects_agree_with_their_verdicts():
    rows = [row for row in evidence() if not row.own]
    assert {row.claim for row in rows} == set(claims)
    for row in rows:
        assert re.fullmatch(r"figures/\w+\.json", row.path)
        if row.effect is not None and row.effect.low is not None:
            assert row.effect.low <= row.effect.value <= row.effect.high, row
        if row.effect is not None and row.verdict in (CONFIRMED, REFUTED):
            assert row.effect.toward() * {CONFIRMED: 1, REFUTED: -1}[row.verdict] >= 0, row


def test_pictures_show_every_counting_row_and_claims_without_a_record():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    judgments = judge(evidence())
    figure = claims_figure(judgments)
    shown = [tick.get_text() for axis in figure.axes for tick in axis.get_yticklabels()]
    assert sorted(shown) == sorted(r.part for j in judgments for r in j.rows if r.counts and r.scale == j.scale)
    for judgment in (*judgments, judge([])[0]):
        drawn = claim_figure(judgment)
        assert sum(len(axis.get_yticklabels()) for axis in drawn.axes) == len(judgment.rows)
        plt.close(drawn)
    plt.close(figure)
