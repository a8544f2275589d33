"""A notebook over a grid: through loky, and on a real Dask cluster of two processes, one of which is killed in mid-job."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from test_calibrate import WINDOWS, recipe, same
from test_run import make, preset, wait_for
from tiny import tiny

from tnlib import cluster, slots
from tnlib.calibrate import calibrate, calibrate_parts
from tnlib.cli import group
from tnlib.job import read_state
from tnlib.low_rank import LowRank
from tnlib.presets import PresetError
from tnlib.slots import Slots
from tnlib.sweep import grid_of, plan_points, run_point

POINT = """
import os, psutil
from tnlib.records import run_folder, save_result
worker = psutil.Process().parent().parent().pid
seen = {name: int(os.environ.get(name) or -1) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
"""
SAVE = "save_result('20_grid', metrics={'width': WIDTH, 'of': {'rates': sum(RATES)}, 'worker': worker, 'again': AGAIN} | seen)"
PARAMETERS = "WIDTH = 4\nRATES = [0.5]\nWAIT = -1\nAGAIN = 0"
# The first run at WAIT leaves its worker's id and waits to be killed; a second one finds it, and goes on.
WAITS = """
import time
flag = run_folder() / "worker.txt"
AGAIN = int(flag.exists())
if WIDTH == WAIT and not AGAIN:
    flag.with_suffix(".new").write_text(str(worker))
    flag.with_suffix(".new").rename(flag)
    time.sleep(300)
"""


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "notebooks", "20_grid", POINT + WAITS, "assert WIDTH != 3, 'three'", SAVE, parameters=PARAMETERS)
    preset(tmp_path / "notebooks", "")
    return tmp_path


@pytest.fixture(scope="module")
def dask():
    """Two worker processes, each with a GPU that it believes in; the other one of the machine is listed behind it."""
    distributed = pytest.importorskip("distributed")
    settings = {"dashboard_address": None, "resources": {"GPU": 1}, "env": {"CUDA_VISIBLE_DEVICES": "8,9"}}
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, **settings) as found:
        yield found


def tnlib(folder, *arguments):
    """Exit code, standard output and standard error of `tnlib sweep` on the folder's notebook."""
    given = ["sweep", "20", "--preset", "tiny", "--folder", folder / "notebooks", "--out", folder / "out", *arguments]
    done = CliRunner().invoke(group, list(map(str, given)))
    return done.exit_code, done.stdout, done.stderr


# --- here ---------------------------------------------------------------------------------------------------------------


def test_a_grid_runs_here_resumes_and_ends_in_one_table(folder):
    code, out, said = tnlib(folder, "-p", "WIDTH", "2,3", "-p", "RATES", "[0.5],[0.25, 0.5]", "--gpus", "5,7", "--json")
    assert code == 1, said
    found = json.loads(out)
    rows = {(row["WIDTH"], tuple(row["RATES"])): row for row in found["rows"]}
    assert [row["status"] for row in rows.values()] == ["ok", "ok", "failed", "failed"]
    assert rows[2, (0.25, 0.5)]["of.rates"] == 0.75
    assert rows[3, (0.5,)]["error"] == "AssertionError"
    assert "width" not in rows[3, (0.5,)]
    assert {rows[2, key]["CUDA_VISIBLE_DEVICES"] for key in [(0.5,), (0.25, 0.5)]} <= {5, 7}
    with open(found["table"], newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["point"] for row in table] == [row["point"] for row in found["rows"]]
    assert [row["width"] for row in table] == ["2", "2", "", ""]
    about = json.loads((folder / "out" / "table.json").read_text())
    assert about["grid"] == {"WIDTH": [2, 3], "RATES": [[0.5], [0.25, 0.5]]}
    assert about["rows"] == found["rows"]
    page = (folder / "out" / "index.html").read_text()
    for row in found["rows"]:
        assert f'href="points/{row["point"]}/20_grid.ipynb"' in page
        assert (folder / "out" / "points" / row["point"] / "20_grid.html").exists()
    assert "2 done · 2 failed of 4" in page
    code, out, said = tnlib(folder, "-p", "WIDTH", "2", "-p", "RATES", "[0.5]", "--gpus", "5")
    assert code == 0, said
    assert re.search(r"\[1/1\] \S+  ok, kept from an earlier run", out)
    code, out, _ = tnlib(folder, "-p", "WIDTH", "2,9", "-p", "RATES", "[0.5]", "--dry-run")
    assert re.findall(r"  (done|to do)", out) == ["done", "to do"]


def test_a_stop_is_heeded_wherever_a_point_waits_or_runs(folder):
    points, _ = plan_points("20", {"WIDTH": [1]}, "tiny", out=folder / "out", folder=folder / "notebooks")
    Path(points[0].job.stop).parent.mkdir(parents=True)
    Path(points[0].job.stop).touch()
    run_point(points[0].job, Slots("gpu", ("0",), 2), "call")  # two of one: never free
    assert read_state(points[0].job.out, "20_grid").status == "pending"
    assert not list(points[0].job.stop and Path(points[0].job.out).glob("*.ipynb"))


@pytest.mark.parametrize("engine", ["here", "cluster"])
def test_ctrl_c_leaves_no_process_and_the_table_says_what_was_interrupted(folder, engine, request):
    command = [sys.executable, "-m", "tnlib", "sweep", "20", "--preset", "tiny", "--folder", folder / "notebooks", "--out", folder / "out"]
    command += ["-p", "WIDTH", "6", "-p", "WAIT", "6"]
    command += ["--scheduler", request.getfixturevalue("dask").scheduler_address, "--gpus", "all"] if engine == "cluster" else ["--jobs", "2"]
    runner = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(folder.glob("out/points/*/worker.txt")), 120)
    kernel = psutil.Process(json.loads(next(folder.glob("out/points/*/state/20_grid.json")).read_text())["pid"])
    runner.send_signal(signal.SIGINT)
    _, said = runner.communicate(timeout=60)
    assert runner.returncode == 130, said
    assert "the same command goes on from here" in said
    rows = json.loads((folder / "out" / "table.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["interrupted"]
    wait_for(lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE, 10)


def test_a_point_whose_worker_was_lost_twice_has_failed(folder):
    points, _ = plan_points("20", {"WIDTH": [1]}, "tiny", out=folder / "out", folder=folder / "notebooks")
    job = points[0].job
    book = Path(job.out) / "state" / "starts.json"
    book.parent.mkdir(parents=True)
    book.write_text(json.dumps({"call": "this", "starts": 2}))
    run_point(job, None, "this")  # no place is asked for: nothing is started
    state = read_state(job.out, "20_grid")
    assert (state.status, state.error) == ("failed", "WorkerLost")
    assert "the same command tries again" in state.message


def test_grids_are_read_as_lists_of_yaml():
    assert grid_of([("SEED", "0,1,2"), ("KEPTS", "[0.8],[0.7]"), ("MODEL", "gpt2")]) == {
        "SEED": [0, 1, 2], "KEPTS": [[0.8], [0.7]], "MODEL": ["gpt2"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "WIDHT", "1,2"], "unknown parameter 'WIDHT'.*Did you mean 'WIDTH'"),
        (["-p", "WIDTH", "1,a"], "parameter WIDTH: got 'a'"),
        (["-p", "WIDTH", "1,1"], "is in the grid twice"),
        (["-p", "WIDTH", ""], "-p WIDTH: got no value"),
        (["-p", "WIDTH", "[1"], "-p WIDTH: got .*Needed: YAML"),
        (["-p", "WIDTH", "1", "-p", "WIDTH", "2"], "-p WIDTH: got it twice"),
        (["--gpus", ","], "--gpus ,: got no GPU"),
        (["--scheduler", "tcp://x:1", "--slurm", "x"], "got both"),
        (["--slurm", "nowhere.yaml"], "nowhere.yaml: got no such file"),
    ],
)
def test_refusals(folder, arguments, words):
    code, _, said = tnlib(folder, *arguments)
    assert code == 2
    assert re.search("(?s)" + words, said), said
    assert not (folder / "out").exists()


def test_places_are_names_that_differ_where_parameters_do(folder):
    grid = {"WIDTH": [1, 2], "RATES": [[0.1], [0.1, 2]]}
    points, out = plan_points("20", grid, "tiny", out=folder / "out", folder=folder / "notebooks")
    again, _ = plan_points("20", {"WIDTH": [2], "RATES": [[0.1, 2]]}, "tiny", out=out, folder=folder / "notebooks")
    assert len({point.label for point in points}) == 4
    assert again[0].label == points[3].label, "a grid that grows finds its points again"
    with pytest.raises(PresetError, match="twice"):
        plan_points("20", {"WIDTH": [1, 1]}, "tiny", out=out, folder=folder / "notebooks")


# --- slots --------------------------------------------------------------------------------------------------------------


def test_two_processes_never_hold_one_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(slots.tempfile, "gettempdir", lambda: str(tmp_path))
    code = (
        f"import sys, tempfile, time; tempfile.gettempdir = lambda: {str(tmp_path)!r}\n"
        "from tnlib.slots import Slots\n"
        "with Slots('gpu', ('0', '1')).take() as found: print(found['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(300)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "0\n"
        with Slots("gpu", ("0", "1")).take() as mine:
            assert mine == {"CUDA_VISIBLE_DEVICES": "1"}
            with Slots("gpu", ("0", "1")).take(lambda: True) as third:
                assert third == {}, "none is free, and the sweep is being stopped"
    finally:
        other.kill()
        other.wait()
    with Slots("gpu", ("0",)).take() as freed:
        assert freed == {"CUDA_VISIBLE_DEVICES": "0"}, "a lock goes with the process that held it"


def test_cores_are_shared_out_and_taken_all_or_none(tmp_path, monkeypatch):
    monkeypatch.setattr(slots.tempfile, "gettempdir", lambda: str(tmp_path))
    half = slots.cores(4, 2)
    assert (half.each, len(half.ids)) == (2, 4)
    with half.take() as variables, half.take(), slots.cores(4, 4).take(lambda: True) as none:
        assert variables == none == {}
        assert not slots.cores(4, 4)._free(None)
    assert slots.cores(1, 3).each == 1


@pytest.mark.parametrize(("asked", "named", "ids"), [("0,2", None, ("0", "2")), ("all", "3,4", ("3", "4")), ("1", "3,4", ("1",))])
def test_gpus_are_those_named_or_visible(monkeypatch, asked, named, ids):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named or "")
    assert slots.gpu_ids(asked) == ids


# --- Dask ---------------------------------------------------------------------------------------------------------------


def test_a_killed_worker_costs_its_point_one_more_try(folder, dask):
    killed = []

    def kill():
        wait_for(lambda: list(folder.glob("out/points/*/worker.txt")), 120)
        killed.append(int(next(folder.glob("out/points/*/worker.txt")).read_text()))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    grid = ["-p", "WIDTH", "1,2,4", "-p", "WAIT", "2"]
    code, out, said = tnlib(folder, *grid, "--scheduler", dask.scheduler_address, "--gpus", "all", "--json")
    killer.join()
    assert code == 0, said
    rows = {row["WIDTH"]: row for row in json.loads(out)["rows"]}
    assert [row["status"] for row in rows.values()] == ["ok"] * 3
    assert [rows[width]["again"] for width in (1, 2, 4)] == [0, 1, 0], "only the lost point ran twice"
    assert {row["CUDA_VISIBLE_DEVICES"] for row in rows.values()} == {8}, "one GPU a job"
    assert killed[0] not in {row["worker"] for row in rows.values()} - {rows[1]["worker"]}
    starts = {path.parent.parent.name: json.loads(path.read_text())["starts"] for path in folder.glob("out/points/*/state/starts.json")}
    assert sorted(starts.values()) == [1, 1, 2]
    code, out, _ = tnlib(folder, *grid, "--scheduler", dask.scheduler_address)
    assert code == 0
    assert out.count("kept from an earlier run") == 3


def test_a_text_is_calibrated_in_parts_on_the_cluster(dask, tmp_path):
    from distributed import Client

    wanted = recipe(LowRank(rank=2), "linear")
    with Client(dask) as client:
        found = calibrate_parts(client, partial(tiny, "gpt2"), WINDOWS, wanted, tmp_path, parts=2)
    assert same(found, calibrate(tiny("gpt2"), WINDOWS, wanted))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-000", "part-001"]
    assert found.tokens == WINDOWS.numel()


def test_a_cluster_without_gpus_or_without_an_answer_is_refused(folder, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(cluster, "PATIENCE", 2)
    with distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=None) as found:
        code, _, said = tnlib(folder, "-p", "WIDTH", "1", "--gpus", "all", "--scheduler", found.scheduler_address)
        assert code == 2
        assert re.search("(?s)none of its 1 workers offers GPU.*dask cuda worker ADDRESS --resources GPU=1", said)
    code, _, said = tnlib(folder, "-p", "WIDTH", "1", "--scheduler", "tcp://127.0.0.1:9")
    assert code == 1
    assert "Start them: dask scheduler; dask worker ADDRESS" in said


def test_without_the_extra_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr("tnlib.console.CLUSTER", ("no_such_package",))
    monkeypatch.setattr("tnlib.cli_sweep.CLUSTER", ("no_such_package",))
    code, _, said = tnlib(folder, "-p", "WIDTH", "1", "--scheduler", "tcp://127.0.0.1:9")
    assert code == 1
    assert "pip install 'tnlib[cluster]'" in said


# --- SLURM --------------------------------------------------------------------------------------------------------------

LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
PROFILE = f"interface: {LOOPBACK}\nworkers: 2\nqueue: gpu\naccount: thesis\ncores: 6\nmemory: 20GB\nwalltime: '02:00:00'\njob_extra_directives: ['--gres=gpu:1']\n"


def fake_sbatch(folder):
    """An sbatch that starts its script at once, on this machine."""
    folder.mkdir(exist_ok=True)
    (folder / "sbatch").write_text('#!/bin/sh\ncp "$1" "$0.$$.sh"\nnohup sh "$0.$$.sh" >"$0.$$.log" 2>&1 &\necho "Submitted batch job $!"\n')
    (folder / "scancel").write_text('#!/bin/sh\nkill "$@" 2>/dev/null; pkill -P "$1" 2>/dev/null; exit 0\n')
    for name in ("sbatch", "scancel"):
        (folder / name).chmod(0o755)


@pytest.mark.skipif(os.name == "nt", reason="SLURM's scripts are for a Unix shell")
def test_a_slurm_profile_submits_workers_that_run_the_points(folder, monkeypatch):
    """sbatch is a stand-in that runs the very script which SLURM would get."""
    pytest.importorskip("dask_jobqueue")
    fake_sbatch(folder / "bin")
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(folder)
    (folder / "profile.yaml").write_text(PROFILE)
    code, out, said = tnlib(folder, "-p", "WIDTH", "1", "--slurm", "profile.yaml", "--gpus", "all", "--json")
    assert code == 0, said
    assert json.loads(out)["rows"][0]["width"] == 1
    assert "submitted 2 jobs to SLURM" in said
    scripts = [path.read_text() for path in (folder / "bin").glob("sbatch.*.sh")]
    assert len(scripts) == 2
    for line in ("#SBATCH -p gpu", "#SBATCH -A thesis", "#SBATCH --cpus-per-task=6", "#SBATCH --mem=19G", "#SBATCH -t 02:00:00", "#SBATCH --gres=gpu:1"):
        assert line in scripts[0].splitlines(), scripts[0]
    started = scripts[0].splitlines()[-1]
    assert sys.executable in started
    assert "--nthreads 1 " in started
    assert "--resources GPU=1" in started


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("memory: 1GB\n", "got no cores.*cores: 8 and memory: 32GB"),
        ("- 3\n", "got no cores and no memory"),
        (PROFILE.replace("--gres=gpu:1", "--exclusive"), "Needed with --gpus: one that asks for a GPU"),
        (PROFILE + "quueue: x\n", "quueue.*Needed: arguments of dask_jobqueue.SLURMCluster"),
        ("cores: [1", "profile .*Needed: YAML"),
    ],
)
def test_slurm_refusals(tmp_path, text, words):
    pytest.importorskip("dask_jobqueue")
    (tmp_path / "profile.yaml").write_text(text)
    with pytest.raises(ValueError, match="(?s)" + words):
        cluster.slurm_cluster(tmp_path / "profile.yaml", gpu=True)
