"""All suites in turn, each in a process of its own: what `make bench` runs.

    python tests/benchmarks/run_all.py [--suites layers decompositions embedding end_to_end] [--quick] [any option of theirs]

Results are in figures/bench_*.{md,json,png,svg,csv}; a stopped run goes on where it was. Peers that are not installed are
named and left out: .venv/bin/python -m pip install -e ".[bench]"
"""

import argparse
import subprocess
import sys
from pathlib import Path

SUITES = ("layers", "decompositions", "embedding", "end_to_end")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    asked, rest = parser.parse_known_args()
    failed = []
    for suite in asked.suites:
        print(f"bench: {suite}", flush=True)
        script = Path(__file__).with_name(f"{suite}.py")
        if subprocess.call([sys.executable, "-W", "ignore", script, *rest]):
            failed.append(suite)
    print(f"bench: failed: {', '.join(failed)}" if failed else "bench: done", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
