"""Seconds of a permutation search beside one written without care: full SVD and float32 scores handed to scipy as they are.

    python tests/benchmarks/permutation_search.py [--rows 3072] [--columns 768] [--sweeps 5] [--repeats 3]

All on one Gaussian matrix, published search ("damped") for both, ours ("sorted") beside it; in turns, medians compared. The
floor of a sweep is two GEMMs of inner products, also timed. Not a test: a time depends on the machine.
"""

import argparse
import statistics
import time
from functools import partial

import torch
from scipy.optimize import linear_sum_assignment

import tnlib as tn


def careless(weight, left, right, terms, sweeps):
    """The published alternation as it would be written first."""
    rows, columns = torch.randperm(weight.shape[0]), torch.randperm(weight.shape[1])
    target = torch.randn(weight.shape) * weight.std()
    for sweep in range(sweeps):
        t = 0.5 + 0.5 * sweep / max(1, sweeps - 1)
        for axis in range(2):
            u, s, v = torch.linalg.svd(tn.rearrange(weight[rows][:, columns], left, right), full_matrices=False)
            parts = zip((u * s).T[:terms], v[:terms])
            target = (1 - t) * target + t * sum(torch.kron(a.reshape(left), b.reshape(right)) for a, b in parts)
            scores = target @ weight[:, columns].T if axis == 0 else target.T @ weight[rows]
            found = torch.as_tensor(linear_sum_assignment(scores.numpy(), maximize=True)[1])
            rows, columns = (found, columns) if axis == 0 else (rows, found)


def main():
    parser = argparse.ArgumentParser()
    for name, default in (("rows", 3072), ("columns", 768), ("sweeps", 5), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    weight = torch.randn(asked.rows, asked.columns, generator=torch.Generator().manual_seed(0))
    size = f"{asked.rows} x {asked.columns}, {asked.sweeps} sweeps, {torch.get_num_threads()} threads"
    print(f"{size}; seconds, medians of {asked.repeats}")
    for right, terms in (((4, 2), 4), ((2, 2), 1), ((asked.rows // 64, asked.columns // 32), 1)):
        left = (asked.rows // right[0], asked.columns // right[1])
        ways = {"careless": partial(careless, weight, left, right, terms, asked.sweeps)}
        for search in ("damped", "sorted"):
            options = {"search": search, "sweeps": asked.sweeps}
            ways[search] = partial(tn.permute_kronecker, weight, left, right, terms, **options)
        ways["two GEMMs a sweep"] = lambda: [(weight @ weight.T, weight.T @ weight) for _ in range(asked.sweeps)]
        found = {name: [] for name in ways}
        for _ in range(asked.repeats):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                found[name].append(time.perf_counter() - began)
        times = {name: statistics.median(values) for name, values in found.items()}
        print(f"right {right}, {terms} term(s): " + ", ".join(f"{name} {value:.2f}" for name, value in times.items()))


if __name__ == "__main__":
    main()
