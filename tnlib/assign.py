"""Which row goes where: the assignment of largest total score, exactly, or from a shortlist where that takes seconds."""

import torch

EXACT = 1024  # rows up to which scipy's dense solver is used: about 0.1 s there, and it grows with the third power
SHORTLIST = 12  # best candidates of each row and of each column that a larger problem is solved on


def assign(scores, current=None, exact=EXACT):
    """The permutation p that makes sum_i scores[i, p[i]] large: (n,) int64.

    scores: (n, n), row i a place, column x what may go there
    current: (n,) the permutation in force; the answer's total is never below its total
    exact: largest n that is solved exactly. Above it each place has its SHORTLIST best candidates, each candidate its
        SHORTLIST best places, and `current`: the best assignment among those, on noise 0.1 % short of the gain
    Source: scipy's linear_sum_assignment (Crouse 2016); min_weight_full_bipartite_matching (Jonker & Volgenant 1987).
    Exact up to `exact` rows: no permutation has a larger total.
    """
    n = len(scores)
    current = torch.arange(n) if current is None else current
    found = _dense(scores) if n <= exact else _sparse(scores, current)
    places = torch.arange(n)
    better = scores[places, found].double().sum() > scores[places, current].double().sum()
    return found if better else current


def _dense(scores):
    from scipy.optimize import linear_sum_assignment

    return torch.as_tensor(linear_sum_assignment(scores.cpu().numpy(), maximize=True)[1])


def _sparse(scores, current):
    """Sparse Jonker-Volgenant on the shortlist; with `current` in it there is always a full matching."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    n, scores = len(scores), scores.cpu()
    listed = torch.zeros(n, n, dtype=torch.bool)
    listed.scatter_(1, scores.topk(SHORTLIST, 1).indices, True)
    listed.scatter_(0, scores.topk(SHORTLIST, 0).indices, True)
    listed[torch.arange(n), current] = True
    place, row = listed.nonzero(as_tuple=True)  # sorted by place
    cost = scores[place, row].double()
    cost = cost.max() - cost + 1.0  # a zero would be taken for an absent entry
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), listed.sum(1).cumsum(0)])
    graph = csr_array((cost.numpy(), row.int().numpy(), starts.int().numpy()), shape=(n, n))
    return torch.as_tensor(min_weight_full_bipartite_matching(graph)[1]).long()
