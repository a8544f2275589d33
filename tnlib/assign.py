"""Which row goes where: the assignment of largest total score, exactly, or block by block where that takes seconds."""

import torch

EXACT = 2048  # rows up to which scipy's solver gets the whole problem; its time grows with the third power at worst
BLOCK = 1024  # rows of a block of a larger problem


def assign(scores, current=None, exact=EXACT):
    """The permutation p that makes sum_i scores[i, p[i]] large: (n,) int64.

    scores: (n, n), row i a place, column x what may go there
    current: (n,) the permutation in force; the answer's total is never below its total
    exact: largest n that is solved as a whole. Above it, places are dealt at random into blocks of at most BLOCK, and each
        block is solved exactly among the rows that it holds; another call deals differently
    Source: scipy's linear_sum_assignment (Crouse 2016). A sparse solver on a shortlist of good scores is no way out: where
        rows differ much in norm it took minutes.
    Exact up to `exact` rows: no permutation has a larger total.
    """
    n = len(scores)
    scores, current = scores.cpu(), torch.arange(n) if current is None else current
    places = torch.arange(n)
    if n <= exact:
        found = _solve(scores)
    else:
        generator = torch.Generator().manual_seed(int((places * current).sum()) % 2**31)  # another order, other blocks
        found = current.clone()
        for some in torch.randperm(n, generator=generator).chunk(-(-n // BLOCK)):
            here = current[some]
            found[some] = here[_solve(scores[some][:, here])]
    better = scores[places, found].double().sum() > scores[places, current].double().sum()
    return found if better else current


def _solve(scores):
    from scipy.optimize import linear_sum_assignment

    cost = scores.to(torch.float64, copy=True).neg_()  # what the solver works on: given anything else it makes such a copy itself, slowly
    return torch.as_tensor(linear_sum_assignment(cost.numpy())[1])
