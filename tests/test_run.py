"""The runner on tiny notebooks, through the real papermill and real kernels."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import joblib
import nbformat
import psutil
import pytest

from tnlib import cli, execute, job, presets, run
from tnlib.job import read_state
from tnlib.presets import PresetError, find_notebooks, literal, resolve
from tnlib.run import run_notebooks

SAVE = "from tnlib.records import save_result\nsave_result(NAME, metrics={'width': WIDTH, 'scale': SCALE, 'threads': THREADS})"
FACTS = "import os\nSCALE, THREADS = os.environ['TNLIB_SCALE'], os.environ['OMP_NUM_THREADS']"
FIGURE = """import matplotlib.pyplot as plt
from tnlib.figures import save_figure
fig, ax = plt.subplots(figsize=(2, 1))
ax.plot([1, 2])
save_figure(fig, "01_line", {"y": [1, 2]})"""


def make(folder, name, *cells, parameters="WIDTH = 4  # columns\nRATE: float = 0.5\nMODEL = 'tiny'", tag="parameters"):
    """Write a notebook whose kernelspec does not exist here; NAME is its own name."""
    v4 = nbformat.v4
    code = [
        v4.new_code_cell(parameters, metadata={"tags": [tag]}),
        *(v4.new_code_cell(cell.replace("NAME", repr(name))) for cell in cells),
    ]
    spec = {"kernelspec": {"name": "some-other-env", "display_name": "other", "language": "python"}}
    folder.mkdir(exist_ok=True)
    nbformat.write(
        v4.new_notebook(cells=[v4.new_markdown_cell(f"# About {name}"), *code], metadata=spec), folder / f"{name}.ipynb"
    )


def preset(folder, text, name="tiny"):
    (folder / "presets").mkdir(exist_ok=True)
    (folder / "presets" / f"{name}.yaml").write_text(text)


def cells_of(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def main(arguments):
    """The exit code of `tnlib run`."""
    return cli.main(["run", *map(str, arguments)])


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


# -------------------------------------------------------------------------------------------- one batch, looked at from all sides


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory):
    """A copy of the library that nobody edits while the tests run: an edit rightly makes every notebook run again."""
    copy = tmp_path_factory.mktemp("library")
    shutil.copytree(run.LIBRARY, copy / "tnlib", ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "LIBRARY", copy / "tnlib")
        patch.setattr(run, "repo_root", lambda: copy)  # no records there: the batch's own process sees none either
        patch.setenv("PYTHONPATH", str(copy))
        yield


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """Four notebooks, two at a time, through the command line: fine, broken, killed by its own kernel, and a reader of records."""
    root = tmp_path_factory.mktemp("batch")
    make(root / "notebooks", "01_fine", FACTS, FIGURE, SAVE)
    make(root / "notebooks", "02_broken", "print('before')", "1 / 0", "print('never')")
    make(root / "notebooks", "03_dead", "import os; os.kill(os.getpid(), 9)", "print('never')")
    make(
        root / "notebooks",
        "20_reader",
        "from tnlib.records import load_result, save_result\nseen = load_result('01_fine')",
        "save_result('20_reader', metrics={'saw': seen['metrics']['width']})",
    )
    preset(root / "notebooks", "all:\n  WIDTH: 5\n01_fine:\n  RATE: 1e-3\n")
    command = [
        sys.executable,
        "-m",
        "tnlib",
        "run",
        "--folder",
        "notebooks",
        "--out",
        "run",
        "--preset",
        "tiny",
        "--jobs",
        "2",
        "-p",
        "MODEL",
        "small",
    ]
    environment = os.environ | {"MPLBACKEND": "Agg", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    return root, done


def test_a_failure_costs_one_notebook_and_the_exit_code(batch):
    root, done = batch
    assert done.returncode == 1, done.stderr
    assert {name: read_state(root / "run", name).status for name in ("01_fine", "02_broken", "03_dead", "20_reader")} == {
        "01_fine": "ok", "02_broken": "failed", "03_dead": "failed", "20_reader": "ok",
    }  # fmt: skip
    for words in (
        r"\[1/4\] 01_fine  running",
        r"\[1/4\] 01_fine  ok  \d+ s  1 figures",
        r"2 ok, 2 failed in",
        r"index: file:///.*/run/index.html",
    ):
        assert re.search(words, done.stdout), done.stdout
    assert re.search(r"02_broken  failed  \d+ s  ZeroDivisionError: division by zero \(in cell 4 of 5\)", done.stdout)
    assert re.search(r"03_dead  failed  \d+ s  DeadKernelError: the kernel died in cell 3 of 4", done.stdout)


def test_parameters_scale_and_threads_reach_the_notebook(batch):
    root, _ = batch
    result = json.loads((root / "run" / "results" / "01_fine.json").read_text())
    assert result["metrics"]["width"] == 5
    assert result["metrics"]["scale"] == result["scale"] == "tiny"
    assert result["metrics"]["threads"] == str(max(1, joblib.cpu_count() // 2)), "two notebooks share the cores"
    injected = cells_of(root / "run" / "01_fine.ipynb")[1].source.strip()
    assert injected == '# Parameters\nWIDTH = 5\nRATE = 0.001\nMODEL = "small"'
    assert not (root / "notebooks" / "runs").exists()


@pytest.mark.parametrize(
    ("asked", "threads", "expected"),
    [
        ({"OMP": "1"}, 4, "1"),
        ({"MKL": "3", "RAYON": "2"}, 4, "2"),
        ({"OMP": "8"}, 2, "2"),
        ({"OMP": "all"}, 2, "2"),
        ({}, 2, "2"),
    ],
)
def test_a_thread_limit_for_one_library_holds_for_all(tmp_path, monkeypatch, asked, threads, expected):
    """Looked at in the job's process itself, in place of the notebook's."""
    names = [f"{library}_NUM_THREADS" for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "RAYON")]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for library, limit in asked.items():
        monkeypatch.setenv(f"{library}_NUM_THREADS", limit)
    said = f"import json, os; print(json.dumps([os.environ.get(name) for name in {names}]))"
    popen = subprocess.Popen
    monkeypatch.setattr(job.subprocess, "Popen", lambda _, **more: popen([sys.executable, "-c", said], **more))
    job.STOP.clear()
    source = str(tmp_path / "01_a.ipynb")
    job.run_one(job.Job("01_a", "t", source, str(tmp_path), {}, "tiny", "0", 3, False, 60, threads))
    assert json.loads((tmp_path / "logs" / "01_a.log").read_text()) == [expected] * len(names)


def test_the_kernel_is_this_interpreter_and_warns_of_nothing(batch):
    root, _ = batch
    assert (root / "run" / "logs" / "01_fine.log").read_text() == ""


def test_the_figure_is_shown_exactly_once_whatever_the_backend(batch):
    root, _ = batch
    outputs = [output for cell in cells_of(root / "run" / "01_fine.ipynb") for output in cell.outputs]
    assert [sorted(output.get("data", {})) for output in outputs] == [["image/png", "text/plain"]]


def test_partial_notebooks_are_kept_and_say_where_they_stopped(batch):
    root, _ = batch
    for name, statuses in (
        ("02_broken", "completed completed completed failed pending"),
        ("03_dead", "completed completed failed pending"),
    ):
        path = root / "run" / f"{name}.ipynb"
        assert " ".join(cell.metadata.papermill.status for cell in cells_of(path)) == statuses
        assert "papermill-error-cell-tag" in nbformat.read(path, as_version=4).cells[0].metadata.tags
    assert "DeadKernelError" in (root / "run" / "03_dead.html").read_text()


def test_results_and_index_hold_everything(batch):
    root, _ = batch
    merged = json.loads((root / "run" / "results.json").read_text())
    assert [outcome["status"] for outcome in merged["outcomes"]] == ["ok", "failed", "failed", "ok"]
    assert sorted(merged["records"]) == ["01_fine", "20_reader"]
    page = (root / "run" / "index.html").read_text()
    for words in (
        "About 01_fine",
        "data:image/png;base64,",
        "ZeroDivisionError",
        "2 done · 2 failed of 4",
        'href="01_fine.html"',
        "width",
    ):
        assert words in page
    assert "http-equiv" not in page
    assert not re.search(r"""(?:src|href)=["']https?:""", page)


def test_a_second_call_runs_only_what_is_not_done(batch, capsys):
    root, _ = batch
    before = (root / "run" / "results" / "01_fine.json").read_bytes()
    make(root / "notebooks", "02_broken", "print('mended')")
    outcomes = run_notebooks(
        ["01", "02_broken", "20"], "tiny", {"MODEL": "small"}, out=root / "run", folder=root / "notebooks"
    )
    assert [(outcome.status, outcome.kept) for outcome in outcomes] == [("ok", True), ("ok", False), ("ok", True)]
    assert (root / "run" / "results" / "01_fine.json").read_bytes() == before
    assert "[1/3] 01_fine  ok, kept from an earlier run" in capsys.readouterr().out
    assert "03_dead" in (root / "run" / "index.html").read_text(), "what an earlier call ran stays on the page"


def test_changed_code_parameters_or_inputs_run_again_and_comments_in_text_do_not(batch, monkeypatch):
    root, _ = batch
    monkeypatch.setattr(run, "repo_root", lambda: root)
    every = find_notebooks(root / "notebooks")

    def stamps(books, **given):
        return {name: run.job_of(book, given, "tiny", root / "run", 1, books).stamp for name, book in books.items()}

    first = stamps(every)
    nb = nbformat.read(every["01_fine"].path, as_version=4)
    nb.cells[0].source = "# Another title"
    nb.cells[1].outputs = [nbformat.v4.new_output("stream", text="x")]
    nbformat.write(nb, every["01_fine"].path)
    assert stamps(find_notebooks(root / "notebooks")) == first
    nb.cells[2].source += "\n1 + 1"
    nbformat.write(nb, every["01_fine"].path)
    changed = stamps(find_notebooks(root / "notebooks"))
    assert {name for name in first if changed[name] != first[name]} == {"01_fine"}
    assert all(first[name] != stamp for name, stamp in stamps(every, WIDTH=9).items())
    (root / "run" / "results" / "01_fine.json").write_text("{}")
    assert {name for name, stamp in stamps(every).items() if stamp != first[name]} == {"20_reader"}
    for shelf in ("figures", "runs/long/results"):  # where records lie that are read in place of this run's
        before = stamps(every)
        (root / shelf).mkdir(parents=True)
        (root / shelf / "01_fine_long.json").write_text("{}")
        assert {name for name, stamp in stamps(every).items() if stamp != before[name]} == {"20_reader"}


# -------------------------------------------------------------------------------------------- killed, late, stopped


def test_a_killed_run_leaves_no_process_and_resumes_with_what_is_not_done(tmp_path, capsys):
    folder, out = tmp_path / "notebooks", tmp_path / "run"
    make(folder, "01_quick", FACTS, SAVE)
    make(folder, "02_slow", "import os, time\nwhile not os.path.exists('../go'): time.sleep(0.1)", FACTS, SAVE)
    preset(folder, "")
    command = [sys.executable, "-m", "tnlib", "run", "--folder", str(folder), "--out", str(out), "--preset", "tiny"]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: read_state(out, "02_slow").cell == 2)
    family = psutil.Process(runner.pid).children(recursive=True)
    assert len(family) >= 2, "a child and its kernel"
    runner.kill()
    runner.wait()
    wait_for(lambda: not any(process.is_running() and process.status() != "zombie" for process in family), 10)
    assert nbformat.read(out / "02_slow.ipynb", as_version=4).cells, "readable"
    assert 'http-equiv="refresh"' in (out / "index.html").read_text()
    (tmp_path / "go").touch()
    assert main(command[4:]) == 0
    told = capsys.readouterr().out
    assert "[1/2] 01_quick  ok, kept" in told
    assert "[2/2] 02_slow  running" in told
    assert main([*command[4:], "--record"]) == 2, "a scale that is not one of ours is not kept as a record"


def test_late_or_stopped_notebooks_are_kept_in_part(tmp_path):
    folder, out = tmp_path / "notebooks", tmp_path / "run"
    for name in ("01_a", "02_b", "03_c"):
        make(folder, name, "import time; time.sleep(60)")
    preset(folder, "")
    (late,) = run_notebooks(["01"], "tiny", timeout=5, out=out, folder=folder)
    assert (late.status, late.error) == ("failed", "Timeout")
    assert "after 5 s. Raise --timeout" in late.message
    assert "This notebook did not finish: Timeout" in nbformat.read(out / "01_a.ipynb", as_version=4).cells[0].source
    command = [
        sys.executable,
        "-m",
        "tnlib",
        "run",
        "02",
        "03",
        "--folder",
        str(folder),
        "--out",
        str(out),
        "--preset",
        "tiny",
        "--jobs",
        "2",
    ]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: read_state(out, "02_b").cell == 2 or read_state(out, "03_c").cell == 2)
    family = psutil.Process(runner.pid).children(recursive=True)
    runner.send_signal(signal.SIGINT)
    told, said = runner.communicate(timeout=30)
    assert runner.returncode == 130, said
    assert "2 interrupted" in told
    assert "the same command goes on from here" in said
    assert not any(process.is_running() for process in family)
    assert "Stopped: 1 failed · 2 interrupted of 3" in (out / "index.html").read_text()


# -------------------------------------------------------------------------------------------- refused before anything runs


@pytest.fixture
def folder(tmp_path):
    make(tmp_path, "01_a", "pass", parameters="WIDTH = 4\nON = True\nRANKS = [1, 2]\nMODEL = 'tiny'\nLIMIT = None")
    make(tmp_path, "02_b", "pass", parameters="WIDTH = 4\nDEPTH = 2")
    preset(tmp_path, "all:\n  WIDTH: 8\n02_b:\n  DEPTH: 3\n")
    return tmp_path


def test_what_wins(folder):
    books = find_notebooks(folder)
    assert [book.title for book in books.values()] == ["About 01_a", "About 02_b"]
    given = {"all": {"WIDTH": 8}, "02_b": {"WIDTH": 9, "DEPTH": 3}}
    assert resolve(books, given) == {"01_a": {"WIDTH": 8}, "02_b": {"WIDTH": 9, "DEPTH": 3}}
    assert resolve(books, given, {"WIDTH": 1, "LIMIT": "any"}) == {
        "01_a": {"WIDTH": 1, "LIMIT": "any"},
        "02_b": {"WIDTH": 1, "DEPTH": 3},
    }


@pytest.mark.parametrize(
    ("arguments", "yaml", "words"),
    [
        (["-p", "WIDHT", "10"], None, "unknown parameter 'WIDHT'.*Did you mean 'WIDTH'.*There is: DEPTH, LIMIT"),
        (["01_a", "-p", "DEPTH", "10"], None, "-p for 01_a: got the unknown parameter 'DEPTH'"),
        (["-p", "WIDTH", "1O"], None, "01_a, parameter WIDTH: got '1O' .str.*Needed: int, as its default 4"),
        (["-p", "ON", "1"], None, "parameter ON: got 1 .int.*Needed: bool"),
        (["-p", "MODEL", "7"], None, "parameter MODEL: got 7 .int.*Quote it: \"'7'\""),
        (["-p", "RANKS", "3"], None, "parameter RANKS: got 3 .int.*Needed: list"),
        (["-p", "RANKS", "[3"], None, "-p RANKS: got .*Needed: YAML"),
        (["--preset", "tinny"], None, "preset 'tinny': got no such preset. Did you mean 'tiny'"),
        (["3_c"], None, "notebook '3_c': got 0 of that name.*There is: 01_a, 02_b"),
        ([], "all: {WIDHT: 1}", "section 'all': got the unknown parameter 'WIDHT'.*'WIDTH'"),
        ([], "02_b: {ON: true}", "section '02_b': got the unknown parameter 'ON'.*There is: DEPTH, WIDTH"),
        ([], "02_c: {DEPTH: 1}", "unknown section '02_c'.*Did you mean '02_b'"),
        ([], "WIDTH: 3", "section 'WIDTH': got 3.*indented under 'all:'"),
        ([], "- WIDTH", "got .'WIDTH'.*indented"),
        ([], "all: {WIDTH: 1", "preset tiny.yaml: got .*Needed: YAML"),
    ],
)
def test_refusals(folder, capsys, arguments, yaml, words):
    if yaml:
        preset(folder, yaml)
    assert main(["--preset", "tiny", *arguments, "--folder", str(folder), "--out", str(folder / "run")]) == 2
    said = capsys.readouterr().err
    assert re.search("(?s)" + words, said), said
    assert not (folder / "run").exists()


def test_a_section_for_an_unwritten_notebook_does_not_stop_the_others(folder, capsys):
    preset(folder, "09_later: {DEPTH: 1}")
    assert main(["02", "--preset", "tiny", "--folder", str(folder), "--dry-run"]) == 0
    assert "02_b" in capsys.readouterr().out


def test_dry_run_and_list_print_and_run_nothing(folder, capsys):
    assert (
        main(
            [
                "--preset",
                "tiny",
                "--folder",
                str(folder),
                "--dry-run",
                "-p",
                "ON",
                "false",
                "--out",
                str(folder / "run"),
            ]
        )
        == 0
    )
    assert (
        capsys.readouterr().out == "01_a  About 01_a\n    WIDTH=8, ON=False\n02_b  About 02_b\n    WIDTH=8, DEPTH=3\n"
    )
    assert main(["--folder", str(folder), "--list", "02"]) == 0
    assert capsys.readouterr().out == "02_b  About 02_b\n    WIDTH=4, DEPTH=2\n"
    assert not (folder / "run").exists()


def test_dry_run_tells_what_healing_needs(tmp_path, capsys):
    declared = 'MODEL = "gpt2"\nRECIPE = "krony-81m"\nDATASET = "wikitext-2"\nHEAL_DATASET = "openwebtext"\nHEAL_TOKENS = 1000'
    declared += '\nRUNS = ["one"]\nHEAL_SEEDS = [0]\nALSO_TESTED = []'
    make(tmp_path, "01_a", "pass", parameters=declared + "\nHEAL_BATCH = 2\nCONTEXT = 64\nTOKENS_PER_SECOND = 50")
    preset(tmp_path, "01_a:\n  HEAL_TOKENS: 27120000000\n  HEAL_BATCH: 120\n  CONTEXT: 1024\n  TOKENS_PER_SECOND: 150000\n  HEAL_SEEDS: [0, 1]\n  ALSO_TESTED: [lambada]\n")
    assert main(["--preset", "tiny", "--folder", str(tmp_path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for words in ("81,972,576 parameters", "data: openwebtext, wikitext-2, lambada", "2 runs: 100.4 hours", "27,120,000,000 tokens in 220,704 steps", "50.22 hours"):
        assert words in said, said


def test_a_notebook_without_a_parameters_cell_is_refused(folder):
    make(folder, "03_c", "pass", tag="other")
    with pytest.raises(PresetError, match=r"(?s)03_c: no code cell is tagged 'parameters'.*literals only"):
        find_notebooks(folder)


def test_yaml_without_its_surprises():
    given = literal("{a: 1e-3, b: no, c: 2024-01-31, d: true, e: '1e-3', f: -.5E4, g: [1, 2.5], h: null}", "here")
    assert given == {
        "a": 0.001,
        "b": "no",
        "c": "2024-01-31",
        "d": True,
        "e": "1e-3",
        "f": -5000.0,
        "g": [1, 2.5],
        "h": None,
    }
    with pytest.raises(PresetError, match="here: got the key 'a' twice"):
        literal("{a: 1, b: 2, a: 3}", "here")


# -------------------------------------------------------------------------------------------- order, disk


def test_readers_of_records_run_after_those_that_make_them(tmp_path):
    make(tmp_path, "01_a", "pass")
    make(tmp_path, "02_b", "load_result('10_x')['metrics']", "load_result( \"01_y\", 'gpu')")
    make(tmp_path, "10_c", "pass")
    make(tmp_path, "23_d", "[load_result(name) for name in names]")
    make(tmp_path, "24_e", "pass")
    assert run._waves(find_notebooks(tmp_path)) == [["01_a", "10_c", "24_e"], ["02_b"], ["23_d"]]


def test_a_full_disk_is_said_in_one_sentence(folder, capsys, monkeypatch):
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5 * 2**20}))
    assert main(["--preset", "tiny", "--folder", str(folder), "--out", str(folder / "run")]) == 1
    assert re.search(r"(?s)the disk is full.*5 MB free.*Needed: 200 MB.*--out another disk", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([RuntimeError("Kernel died before replying"), 0], ("ok", None)),
        ([RuntimeError("Kernel died before replying")] * 2, ("failed", "RuntimeError")),
        ([OSError(28, "No space left on device")], ("failed", "OSError")),
        ([2], ("failed", "Incomplete")),  # sys.exit(), which papermill takes for success
    ],
)
def test_a_kernel_that_does_not_start_is_tried_once_more(monkeypatch, answers, expected):
    answers = iter(answers)

    def papermill(*_):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(execute, "_papermill", papermill)
    outcome = job.Outcome("01_a")
    execute._execute(None, outcome, "", threading.Event())
    assert (outcome.verdict, outcome.error) == expected
    assert next(answers, None) is None


def test_a_promised_record_that_is_missing_is_a_failure(tmp_path):
    wanted = job.Job("01_a", "t", "s", str(tmp_path), {}, "tiny", "0", 3, True, 1, 1)
    outcome = job.Outcome("01_a", verdict="ok", cells=3)
    job.STOP.clear()
    job._judge(wanted, outcome, 0, late=False)
    assert (outcome.status, outcome.error) == ("failed", "NoRecord")
    assert "End it with save_result('01_a', ...)" in outcome.message


def test_presets_of_the_repository_fit_its_notebooks():
    folder = Path(run.__file__).parent.parent / "notebooks"
    if not list(folder.glob("[0-9]*.ipynb")):
        pytest.skip("no notebooks here")
    books = find_notebooks(folder)
    for path in (folder / "presets").glob("*.yaml"):
        resolve(books, presets.load_preset(folder, path.stem))  # raises where a key does not fit
