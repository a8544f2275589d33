"""One notebook over a grid of parameters: each point is a job of its own, in a folder of its own, and all end in one table.

    tnlib sweep 20_same_budget --preset laptop -p SEED 0,1,2 -p KEPTS '[0.8],[0.7]'

Points run through joblib: in loky's processes on this machine, each holding a slot (slots.py), or on a Dask cluster (cluster.py).
"""

import itertools
import json
import re
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import joblib
import psutil
from joblib.externals.loky.process_executor import BrokenProcessPool

from tnlib.cluster import WorkerPlace, threads_by_host
from tnlib.job import GRACE, STOP, Job, Outcome, is_done, read_state, run_one, write_state
from tnlib.presets import PresetError, find_notebooks, literal, load_preset, resolve, scale_of
from tnlib.records import repo_root, write_atomic
from tnlib.resume import only_one
from tnlib.run import job_of, kept_outcome, require_space
from tnlib.slots import Slots, cores
from tnlib.sweep_page import SweepMonitor, write_table

TRIES = 2  # a lost worker's job is tried once more


@dataclass(frozen=True)
class Point:
    """A point of the grid: its name, which is its folder's too, its own parameters, and its job."""

    label: str
    given: dict
    job: Job

    @property
    def state(self):
        return replace(read_state(self.job.out, self.job.name), folder=f"points/{self.label}")


def sweep(notebook, grid, preset="laptop", *, jobs=1, gpus=None, client=None, timeout=1800, force=False, out=None, folder=None):
    """Run a notebook at every point of a grid, keep what is done already, and return the table.

    notebook: in full or by number; folder: where it is; preset, timeout, force: as for run_notebooks
    grid: {parameter: list of values}; the points are their product
    jobs: points at a time on this machine, which share its cores; gpus: ids of its GPUs, one a point, in place of jobs
    client: a dask.distributed Client: its workers run the points, with `gpus` (any) each on one that offers the resource GPU
    out: the sweep's folder, by default runs/sweep_NOTEBOOK_PRESET; with a client, on a disk that all workers share
    Returns: list of dictionaries, one a point: point, status, its parameters, the numbers of its records. table.csv and
        table.json in `out` hold the same, index.html shows it. A point's failure is a row and not an exception
    Raises: PresetError before anything runs; ValueError where another sweep is at work in `out`
    A worker that is lost, with its machine or killed, costs what its point did so far: the point is tried once more.
    """
    folder = Path(folder or repo_root() / "notebooks").resolve()
    points, out = plan_points(notebook, grid, preset, timeout, out, folder)
    require_space(out)
    with only_one(out):
        (out / "stop").unlink(missing_ok=True)
        STOP.clear()
        todo = []
        for point in points:
            done = not force and is_done(point.job.out, point.job.name, point.job.stamp)
            write_state(point.job.out, kept_outcome(point.job) if done else _waiting(point))
            todo += [] if done else [point]
        heading = f"sweep of {points[0].job.name}, {len(points)} points, scale {points[0].job.scale}"
        monitor = SweepMonitor(out, points, heading)
        monitor.start()
        try:
            if todo:
                _run(todo, *_engine(jobs, gpus, client))
        except BaseException:
            _stop(out, todo, here=client is None)
            raise
        finally:
            monitor.finish()
            rows = write_table(out, points, {name: list(values) for name, values in grid.items()})
    return rows


def plan_points(notebook, grid, preset="laptop", timeout=1800, out=None, folder=None):
    """The points of a grid and the folder of their sweep; nothing is run or written."""
    folder = Path(folder or repo_root() / "notebooks").resolve()
    every, found = find_notebooks(folder), find_notebooks(folder, [notebook])
    (book,) = found.values()
    sections, scale = load_preset(folder, preset), scale_of(preset)
    out = Path(out or repo_root() / "runs" / f"sweep_{book.name}_{scale}").resolve()
    points = []
    for values in itertools.product(*grid.values()):
        given = dict(zip(grid, values))
        parameters = resolve(found, sections, given, every)[book.name]
        label = _label(given)
        if any(label == point.label for point in points):
            raise PresetError(f"sweep: the point {given} is in the grid twice. Needed: every value once. Leave one out.")
        job = job_of(book, parameters, scale, out / "points" / label, timeout, every)
        points.append(Point(label, given, replace(job, title=label, stop=str(out / "stop"))))
    return points, out


def grid_of(given):
    """{name: list of values} from pairs of texts as `-p` takes them: ("SEED", "0,1,2").

    Raises: PresetError for text that is no YAML, and for a name given twice
    Exact: ("KEPTS", "[0.8],[0.7]") has the two values [0.8] and [0.7].
    """
    grid = {}
    for name, text in given:
        if name in grid:
            raise PresetError(f"-p {name}: got it twice. Needed: once, its values separated by commas.")
        grid[name] = literal(f"[{text}]", f"-p {name}")
        if not grid[name]:
            raise PresetError(f"-p {name}: got no value. Needed: one at least, such as 0,1,2 or '[0.8],[0.7]'.")
    return grid


def _label(given):
    """A folder's name for a point, readable as far as it is short."""
    words = [f"{name}={re.sub(r'[^A-Za-z0-9.+-]+', '_', json.dumps(value)).strip('_')}" for name, value in given.items()]
    label = ",".join(words) or "point"
    short = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(given, sort_keys=True)).hex[:6]
    plain = all(isinstance(value, (int, float)) for value in given.values())
    return label if plain and len(label) <= 80 else f"{label[:80]}-{short}"


def _waiting(point):
    return Outcome(point.job.name, point.label, parameters=point.job.parameters)


# -------------------------------------------------------------------------------------------- engines


def _engine(jobs, gpus, client):
    """What runs the points: settings of joblib.Parallel, of its backend, and the places that jobs hold."""
    if client is not None:
        resources = {"resources": {"GPU": 1}} if gpus else {}
        place = WorkerPlace(bool(gpus), threads_by_host(client))
        return {"n_jobs": -1, "batch_size": 1, "pre_dispatch": "all"}, {"backend": "dask", "client": client, **resources}, place
    if gpus:
        return {"n_jobs": len(gpus), "batch_size": 1}, {"backend": "loky"}, Slots("gpu", tuple(map(str, gpus)))
    jobs = joblib.effective_n_jobs(jobs)
    return {"n_jobs": jobs, "batch_size": 1}, {"backend": "loky"}, cores(joblib.cpu_count(), jobs)


def _run(points, settings, backend, places):
    """Run the points; once more those that a lost worker took along. One that is lost again is a failure."""
    call, left = uuid.uuid4().hex, points
    threads = max(1, joblib.cpu_count() // max(1, settings["n_jobs"]))
    for _ in range(TRIES):
        todo = [replace(point.job, threads=threads) for point in left]
        with suppress(*_lost_workers()), joblib.parallel_config(**backend):
            if backend["backend"] == "dask":
                _always_there()
            joblib.Parallel(**settings)(joblib.delayed(run_point)(job, places, call) for job in todo)
        left = [point for point in left if point.state.status in ("pending", "running")]
        if not left:
            return
    for point in left:
        write_state(point.job.out, _lost(point.job))


def _always_there():
    """joblib runs things in this process where it counts one worker only; a cluster's first worker is seldom its last."""
    backend, _ = joblib.parallel.get_active_backend()
    count = backend.effective_n_jobs
    backend.effective_n_jobs = lambda n_jobs: max(2, count(n_jobs))


def _lost_workers():
    """What an engine raises when it gives up because of a worker that it lost; what is not done is seen from the states."""
    try:
        from distributed.scheduler import KilledWorker
    except ImportError:
        return (BrokenProcessPool,)
    return BrokenProcessPool, KilledWorker


def run_point(job, places, call):
    """What a worker does: wait for a place and run the job there; returns None, the state file says how it went.

    call: of the sweep; with it starts are counted, as an engine may start a lost worker's job more often than is wanted
    """
    book = Path(job.out) / "state" / "starts.json"
    before = json.loads(book.read_text("utf-8")) if book.exists() else {}
    starts = before.get("starts", 0) + 1 if before.get("call") == call else 1
    if starts > TRIES:
        return write_state(job.out, _lost(job))
    with places.take(lambda: Path(job.stop).exists()) as variables:
        write_atomic(book, json.dumps({"call": call, "starts": starts}))
        run_one(replace(job, variables=variables))


def _lost(job):
    """The Outcome of a job whose worker was lost too often."""
    message = f"its worker was lost {TRIES} times. See what ended it (memory, a time limit); the same command tries again"
    return replace(read_state(job.out, job.name), status="failed", error="WorkerLost", message=message, parameters=job.parameters)


def _stop(out, points, here):
    """Ask all jobs to stop, wherever they run, wait until they have, and say so in the states of those that could not.

    here: whether they are this machine's, so that those whose process has gone need not be waited for
    """
    write_atomic(out / "stop", "")
    STOP.set()
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
        running = [state for point in points if (state := point.state).status == "running"]
        if not any(not here or (state.pid and psutil.pid_exists(state.pid)) for state in running):
            break
        time.sleep(0.2)
    for point in points:
        if (state := read_state(point.job.out, point.job.name)).status == "running":
            write_state(point.job.out, replace(state, status="interrupted", message=f"stopped {state.at}"))
