"""What the four suites share: their options, and a record that grows by one cell at a time.

A finished cell is in the record at once, by a new file that takes the old one's place, so a stopped run goes on where it
was: cells of the same settings, versions, machine and sources are not measured again (--fresh: all are).
"""

import argparse
import hashlib
import json
import os
import time
from pathlib import Path

import tnlib
from tnlib.records import _provenance, repo_root, write_atomic

SAME = ("settings", "versions", "device", "source")  # what cells of one record have in common


def options(doc, rounds=7, seconds=3.0):
    """A parser with what every suite understands."""
    shown = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=shown)
    parser.add_argument("--quick", action="store_true", help="few small cells and few rounds: does everything run?")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=rounds, help="at least so many of each cell")
    parser.add_argument("--seconds", type=float, default=seconds, help="and more rounds until so many have passed")
    parser.add_argument("--share", type=float, default=20.0, help="seconds of a cell that one contestant may use")
    parser.add_argument("--only", default="", help="cells whose name contains all of these words")
    parser.add_argument("--out", type=Path, default=repo_root() / "figures")
    parser.add_argument("--fresh", action="store_true", help="measure again what the record has")
    return parser


def settle(parser, arguments):
    """Parse, and make the quick run quick; `threads` is set in torch."""
    asked = parser.parse_args(arguments)
    if asked.quick:
        asked.rounds, asked.seconds, asked.share = 3, 0.0, 2.0
    import torch

    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    return asked


class Record:
    """The cells of one suite: {name: {"facts": …, "rows": {contestant: row}}}, in figures/NAME.json."""

    def __init__(self, name, asked):
        self.name = f"{name}_quick" if asked.quick else name
        self.asked, self.path = asked, asked.out / f"{self.name}.json"
        settings = {key: getattr(asked, key) for key in ("quick", "threads", "rounds", "seconds", "share")}
        self.facts = {"name": self.name, "settings": settings, "source": _source()} | _provenance()
        self.cells = {}
        if self.path.exists() and not asked.fresh:
            kept = json.loads(self.path.read_text("utf-8"))
            if all(kept.get(key) == self.facts[key] for key in SAME):
                self.cells = kept["cells"]

    def wants(self, cell):
        """Whether this cell is asked for and not there yet."""
        return all(word in cell for word in self.asked.only.split()) and cell not in self.cells

    def put(self, cell, facts, rows, began):
        """Keep a finished cell, and say so in a line."""
        self.cells[cell] = {"facts": facts, "rows": rows}
        self.save()
        fine = sum(row["status"] == "ok" for row in rows.values())
        print(f"{cell}: {fine} of {len(rows)} measured, {time.perf_counter() - began:.1f} s", flush=True)

    def save(self):
        write_atomic(self.path, json.dumps(self.facts | {"cells": self.cells}, indent=1) + "\n")


def _source():
    """Hash of the library and of what measures it, whatever is committed; the report may change."""
    found = hashlib.sha256()
    for folder in (Path(tnlib.__file__).parent, Path(__file__).parent):
        for path in sorted(folder.glob("*.py")):
            found.update(path.read_bytes() if path.name != "report.py" or path.parent.name == "tnlib" else b"")
    return found.hexdigest()[:12]
