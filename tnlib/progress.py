"""Progress of a run: lines for the terminal, and the index page, both read from the state files of the notebooks.

So it does not matter where a notebook runs, in a thread's child here or on a cluster's machine with the same folder.
"""

import json
import shutil
import sys
import threading
import time
from dataclasses import asdict

import psutil

from tnlib.job import products, read_state
from tnlib.records import write_atomic
from tnlib.report import REFRESH, span, write_index

SAY_EVERY = 20  # seconds between two lines about the same notebook, where there is no terminal to write in place


class Monitor(threading.Thread):
    """Looks at the state files twice a second until `finish`; the only writer of index.html and results.json.

    out: the run's folder; names: the notebooks of this call; every: all of the folder, which the page shows if they ran
    """

    def __init__(self, out, names, every, heading):
        super().__init__(daemon=True)
        self.out, self.names, self.every, self.heading = out, names, every, heading
        self.began, self.written, self.over = time.time(), 0.0, threading.Event()
        self.seen, self.said, self.outcomes = {}, {}, []
        self.terminal = sys.stdout.isatty()
        self._print(f"index: {(out / 'index.html').as_uri()}")
        self._look()

    def run(self):
        while not self.over.wait(0.5):
            try:
                self._look()
            except OSError:  # a full disk; the run itself meets it too, and reports it
                return

    def finish(self):
        """Stop looking; write the page once more, now as finished."""
        self.over.set()
        self.join()
        self._look(finished=True)
        counts = [
            (word, sum(o.status == word for o in self.outcomes)) for word in ("ok", "failed", "interrupted", "pending")
        ]
        told = ", ".join(f"{count} {word}" for word, count in counts if count)
        self._print(f"{told} in {span(time.time() - self.began)}; index: {(self.out / 'index.html').as_uri()}")

    def _look(self, finished=False):
        self.outcomes = [self._state(name) for name in self.names]
        changed = [self._tell(outcome) for outcome in self.outcomes]
        if self.terminal:
            self._in_place([o for o in self.outcomes if o.status == "running"])
        if finished or any(changed) or time.time() - self.written > REFRESH:
            self._write(finished)

    def _state(self, name):
        return read_state(self.out, name)

    def _tell(self, outcome):
        """Print a line when the status changes, and now and then while it runs; returns whether it changed."""
        changed = self.seen.get(outcome.label, "pending") != outcome.status
        waited = time.time() - self.said.get(outcome.label, 0) > SAY_EVERY
        if changed or (outcome.status == "running" and waited and not self.terminal):
            place = f"[{self.names.index(outcome.label) + 1}/{len(self.names)}] {outcome.label}"
            self._print(
                f"{place}  {_ended(outcome) if outcome.status != 'running' else 'running' if changed else _cell(outcome)}"
            )
            self.said[outcome.label] = time.time()
        self.seen[outcome.label] = outcome.status
        return changed

    def _print(self, line):
        print(f"\r\033[K{line}" if self.terminal else line, flush=True)

    def _in_place(self, running):
        text = "  |  ".join(f"{outcome.label} {_cell(outcome)}" for outcome in running)
        print("\r\033[K" + text[: shutil.get_terminal_size().columns - 1], end="", flush=True)

    def _write(self, finished):
        others = [read_state(self.out, name) for name in self.every - set(self.names)]
        outcomes = sorted([*self.outcomes, *(o for o in others if o.status != "pending")], key=lambda o: o.name)
        for outcome in outcomes:
            if outcome.status == "running":
                outcome.figures, outcome.records = products(self.out, outcome.name)
                if outcome in others and not (outcome.pid and psutil.pid_exists(outcome.pid)):  # its runner was killed
                    outcome.status = "interrupted"
        seconds = time.time() - self.began
        write_index(self.out, outcomes, self.heading, seconds, finished)
        records = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(self.out.glob("results/*.json"))}
        merged = {"heading": self.heading, "finished": finished, "seconds": round(seconds, 1)}
        merged |= {"outcomes": [asdict(outcome) for outcome in outcomes], "records": records}
        write_atomic(self.out / "results.json", json.dumps(merged, indent=1) + "\n")
        self.written = time.time()


def _cell(outcome):
    return f"cell {outcome.cell}/{outcome.cells}  {span(time.time() - outcome.started)}"


def _ended(outcome):
    words = [outcome.status + (", kept from an earlier run" if outcome.kept else "")]
    words += [span(outcome.seconds)] if outcome.seconds is not None else []
    words += [f"{len(outcome.figures)} figures"] if outcome.status == "ok" else []
    if outcome.message:
        first = outcome.message.splitlines()[0]
        where = "" if outcome.at in first else f" ({outcome.at})"
        words.append(f"{outcome.error}: {first}{where}" if outcome.error else first)
    return "  ".join(words)
