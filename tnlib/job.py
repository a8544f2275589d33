"""One notebook as a job: run in a process of its own, so that a hang, a crash or a signal costs that notebook only.

`run_one(job)` starts the child (execute.py), watches the clock, and judges what came back. The two share one small file,
state/NAME.json, which the progress lines and the index page read too.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from tnlib.presets import quick_import
from tnlib.records import repo_root, write_atomic
from tnlib.report import export_html

GRACE = 10  # seconds that a child gets to save its partial notebook
STOP = threading.Event()  # set on Ctrl-C: no further notebook starts
THREAD_LIMITS = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "RAYON")  # each with _NUM_THREADS


@dataclass(frozen=True)
class Job:
    """What a child needs to know. Paths are absolute strings: the record travels as JSON, also to another machine."""

    name: str
    title: str
    source: str  # the notebook as it is in the repository
    out: str  # the run's folder
    parameters: dict
    scale: str
    stamp: str
    cells: int  # code cells to come, the injected one included
    records: bool  # whether it promises a record, by calling save_result
    timeout: float  # seconds for the whole notebook
    threads: int
    variables: dict = field(default_factory=dict)  # of the child's environment, stronger than what is there
    stop: str | None = None  # a file: once it is there the job stops, on whatever machine it runs


@dataclass
class Outcome:
    """How it went, or goes. status: pending, running, ok, failed, interrupted; `kept`: done by an earlier call."""

    name: str
    title: str = ""
    status: str = "pending"
    kept: bool = False
    parameters: dict = field(default_factory=dict)
    started: float | None = None
    seconds: float | None = None
    cell: int = 0  # the code cell being run, from 1
    cells: int = 0
    index: int | None = None  # the same cell's place among all cells
    error: str | None = None  # the exception's name
    message: str | None = None
    traceback: str | None = None
    figures: list = field(default_factory=list)
    records: list = field(default_factory=list)
    pid: int | None = None  # the child's
    verdict: str | None = None  # the child's word, ok or failed; the near side decides
    folder: str = ""  # of the job, as seen from the page that shows it; a sweep has one for each point

    @property
    def at(self):
        return f"in cell {self.cell} of {self.cells}" if self.cell else "before its first cell"

    @property
    def label(self):
        return Path(self.folder).name or self.name


def read_state(out, name):
    """The Outcome in state/NAME.json; a pending one where there is none that can be read."""
    try:
        return Outcome(**json.loads((Path(out) / "state" / f"{name}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Outcome(name)


def write_state(out, outcome):
    write_atomic(Path(out) / "state" / f"{outcome.name}.json", json.dumps(asdict(outcome), indent=1) + "\n")


def products(out, name):
    """File names of the notebook's figures and records: those that start with its number, as 02_ of 02_van_loan."""
    number = name.split("_")[0] + "_"
    figures = sorted(path.stem for path in Path(out, "figures").glob(f"{number}*.png"))
    return figures, sorted(path.stem for path in Path(out, "results").glob(f"{number}*.json"))


def run_one(job):
    """Execute one notebook to its end, its failure or its time limit; returns the Outcome, never raises for the notebook."""
    outcome = Outcome(job.name, job.title, "running", parameters=job.parameters, cells=job.cells, started=time.time())
    if _stopping(job):
        outcome.status = "interrupted"
        return outcome
    log = Path(job.out) / "logs" / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    write_state(job.out, outcome)
    with open(log, "wb") as lines:  # a session of its own: the terminal's Ctrl-C reaches the runner only
        child = subprocess.Popen(
            [sys.executable, "-m", "tnlib.execute"], stdin=subprocess.PIPE, stdout=lines, stderr=subprocess.STDOUT,
            env=_environment(job), cwd=Path(job.source).parent, start_new_session=True,
        )  # fmt: skip
        try:
            with child.stdin:
                child.stdin.write(json.dumps(asdict(job)).encode())
            late = _wait(child, job)
        except BaseException:  # Ctrl-C with one job at a time arrives here
            STOP.set()
            stop_tree(child.pid)
            _settle(job, outcome.started, None, False)
            raise
    return _settle(job, outcome.started, child.returncode, late)


def _settle(job, started, code, late):
    """Turn what the child reported into the final Outcome, and keep it; a stamp says that it need not run again."""
    outcome, out = read_state(job.out, job.name), Path(job.out)
    outcome.started, outcome.seconds, outcome.pid = started, round(time.time() - started, 1), None
    _judge(job, outcome, code, late)
    with quick_import():
        export_html(out / f"{job.name}.ipynb")
    if outcome.status == "ok":
        made = {"stamp": job.stamp, "seconds": outcome.seconds, "figures": outcome.figures, "records": outcome.records}
        write_atomic(out / "stamps" / f"{job.name}.json", json.dumps(made, indent=1) + "\n")
    write_state(job.out, outcome)
    return outcome


def is_done(out, name, stamp):
    """Whether an earlier run finished this very notebook, and all that it made is still there."""
    try:
        made = json.loads((Path(out) / "stamps" / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    figures, records = products(out, name)
    there = set(made["figures"]) <= set(figures) and set(made["records"]) <= set(records)
    return made["stamp"] == stamp and there and Path(out, f"{name}.ipynb").exists()


def _stopping(job):
    return STOP.is_set() or bool(job.stop and os.path.exists(job.stop))


def _wait(child, job):
    """Wait for the child; stop it when its time is over (True) or the run is being stopped."""
    deadline = time.monotonic() + job.timeout
    while True:
        try:
            child.wait(timeout=0.2)
            return False
        except subprocess.TimeoutExpired:
            late = time.monotonic() > deadline
            if late or _stopping(job):
                stop_tree(child.pid)
                child.wait()
                return late


def _judge(job, outcome, code, late):
    """Settle what the child could not report itself: the time limit, its own death, a promised record that is missing."""
    outcome.figures, outcome.records = products(job.out, job.name)
    outcome.status = outcome.verdict or "failed"
    if late:
        outcome.status, outcome.error = "failed", "Timeout"
        outcome.message = f"still {outcome.at} after {job.timeout:g} s. Raise --timeout, or take a smaller preset"
    elif _stopping(job) and outcome.verdict != "ok":
        outcome.status, outcome.error, outcome.message = "interrupted", None, f"stopped {outcome.at}"
    elif outcome.verdict is None:
        outcome.error = "ProcessDied"
        outcome.message = (
            f"its process ended {outcome.at} with code {code}. See logs/{job.name}.log; memory may have run out"
        )
    elif outcome.verdict == "ok" and job.records and not outcome.records:
        number = job.name.split("_")[0]
        outcome.status, outcome.error = "failed", "NoRecord"
        outcome.message = (
            f"all cells ran, but no record {number}_* was saved. End it with save_result({job.name!r}, ...)"
        )
    if outcome.status != "ok":
        _mark_unfinished(Path(job.out) / f"{job.name}.ipynb", outcome)


def _mark_unfinished(path, outcome):
    """papermill marks the cells after a crash as completed; say in the partial notebook what really happened."""
    import nbformat

    try:
        nb = nbformat.read(path, as_version=4)
    except (OSError, ValueError):  # killed before the first cell, or while writing
        return
    tag = "papermill-error-cell-tag"  # papermill removes cells with this tag when it runs a notebook again
    if any(tag in cell.metadata.get("tags", []) for cell in nb.cells):  # an exception: papermill's own marks are right
        return
    for index, cell in enumerate(nb.cells):
        if index >= (outcome.index or 0):
            cell.metadata.setdefault("papermill", {})["status"] = "failed" if index == outcome.index else "pending"
    text = f"**This notebook did not finish: {outcome.error or outcome.status}, {outcome.message}.**"
    nb.cells.insert(0, nbformat.v4.new_markdown_cell(text, metadata={"tags": [tag]}))
    write_atomic(path, nbformat.writes(nb))


def _environment(job):
    """The child's environment, which its kernel inherits."""
    env = dict(os.environ, TNLIB_RESULTS=job.out, TNLIB_SCALE=job.scale, PYDEVD_DISABLE_FILE_VALIDATION="1")
    env.pop("MPLBACKEND", None)  # a batch machine's Agg would leave the notebooks without figures
    limits = [f"{library}_NUM_THREADS" for library in THREAD_LIMITS]
    asked = [int(env[name]) for name in limits if env.get(name, "").isdigit()]  # one of them is meant for all
    env |= dict.fromkeys(limits, str(min([job.threads, *asked])))
    if (repo_root() / "pyproject.toml").exists():  # a checkout that is not installed: the kernel must find this tnlib
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(repo_root()), env.get("PYTHONPATH")]))
    return env | job.variables


def stop_tree(pid):
    """Ask a child to save and stop; after GRACE seconds kill it and everything it started."""
    try:
        child = psutil.Process(pid)
        others = child.children(recursive=True)
        child.terminate()
    except psutil.NoSuchProcess:
        return
    _, alive = psutil.wait_procs([child], timeout=GRACE)
    kill([*others, *alive])


def kill(processes):
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
