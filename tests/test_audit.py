"""audit: noise beside every error, structure told from noise, low-rank rows at the same size."""

import math

import torch

from tnlib.audit import audit, error_table, null_rho
from tnlib.kronecker import Kronecker
from tnlib.low_rank import LowRank
from tnlib.tt_matrix import MPO


def test_the_null_of_a_kronecker_fit_follows_the_square_root_law():
    mean, spread = null_rho(Kronecker(right=(2, 2), terms=2), (128, 96))
    assert abs(mean - math.sqrt(2 / 4)) < 0.02  # sqrt(r/K) of papers: 2 of 4 terms
    assert spread < 0.01
    assert null_rho(LowRank(rank=96), (128, 96)) == (1.0, 0.0)


def test_planted_structure_stands_out_and_noise_does_not():
    noise = torch.randn(64, 48)
    planted = torch.kron(torch.randn(32, 24), torch.randn(2, 2))
    assert audit(planted, Kronecker(right=(2, 2))).gain > 0.4
    assert abs(audit(noise, Kronecker(right=(2, 2))).gain) < 0.03


def test_table_has_dense_low_rank_and_null(weight):
    table = error_table(weight, [MPO(order=2, max_rank=4), Kronecker(right=(2, 3), terms=2)])
    assert table["form"][0] == "dense"
    assert sum(form.startswith("LowRank") for form in table["form"]) == 2
    assert {"kept", "error", "rho", "null rho", "null std", "gain"} <= set(table.columns)
    assert ((table["error"] ** 2 + table["rho"] ** 2 - 1).abs() < 1e-9).all()
    for k in (1, 3):  # a low-rank row stores no more than the row above it
        assert table["kept"][k + 1] <= table["kept"][k] + 1e-12
