"""ci/bootstrap.py: what a newcomer's first command does when all is well, and what it says when it is not."""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pip
import pytest
from nbval.plugin import get_sanitize_patterns

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture
def boot(tmp_path, monkeypatch):
    """bootstrap.py over a small checkout of its own; environments without pip take 0.1 s instead of 5."""
    spec = importlib.util.spec_from_file_location("bootstrap", REPO / "ci" / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "pyproject.toml").write_text('[project]\nname = "tnlib"\nversion = "0"\noptional-dependencies.all = []\n')
    (root / "constraints.txt").write_text("torch==2.13.0\n")
    monkeypatch.chdir(root)
    monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(module, "VENV", root / ".venv")
    make = subprocess.call
    monkeypatch.setattr(module.subprocess, "call", lambda command, **more: make([*command, "--without-pip"], **more))
    return module


@pytest.fixture
def installs(boot, monkeypatch):
    """Counts installs instead of doing them; an exception put into the list is raised by the next one."""
    done = []

    def install():
        if done and isinstance(done[-1], BaseException):
            raise done.pop()
        done.append("uv")
        return "uv"

    monkeypatch.setattr(boot, "install", install)
    return done


def test_a_second_setup_does_nothing(boot, installs, capsys):
    boot.setup()
    boot.setup()
    assert installs == ["uv"]
    assert "up to date" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_install_again_into_the_same_venv(boot, installs, name, capsys):
    boot.setup()
    (boot.VENV / "kept").touch()
    (boot.ROOT / name).write_text((boot.ROOT / name).read_text() + "# changed\n")
    boot.setup()
    assert installs == ["uv", "uv"]
    assert (boot.VENV / "kept").exists()
    assert capsys.readouterr().out.count(".venv made") == 1


def test_starting_from_inside_the_venv_is_no_change(boot, installs):
    boot.setup()
    code = ("import importlib.util as u, pathlib; s = u.spec_from_file_location('b', {0!r}); b = u.module_from_spec(s); "
            "s.loader.exec_module(b); b.ROOT = pathlib.Path({1!r}); print(b.fingerprint())")
    code = code.format(str(REPO / "ci" / "bootstrap.py"), str(boot.ROOT))
    seen = subprocess.run([boot.venv_python(), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert seen == (boot.VENV / "tnlib-stamp").read_text()


def test_an_interrupted_setup_is_made_anew(boot, installs, capsys):
    installs.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        boot.setup()
    assert not (boot.VENV / "tnlib-stamp").exists()
    (boot.VENV / "half-written").touch()
    boot.setup()
    assert "half made" in capsys.readouterr().out
    assert not (boot.VENV / "half-written").exists()


def test_a_venv_whose_python_is_gone_is_made_anew(boot, installs, capsys):
    boot.setup()
    python = Path(boot.venv_python())
    python.unlink()
    python.write_text("not a program")
    assert "broken" in boot.flaw()
    python.unlink()
    boot.setup()
    assert installs == ["uv", "uv"]
    assert boot.flaw() is None


def test_a_venv_that_somebody_else_made_is_kept(boot, installs, capsys):
    venv.create(boot.VENV, with_pip=False)
    boot.setup()
    assert installs == ["uv"]
    assert ".venv made" not in capsys.readouterr().out


def test_a_refused_install_leaves_no_stamp_and_the_next_run_goes_on(boot, installs, capsys):
    installs.append(SystemExit("no network"))
    with pytest.raises(SystemExit):
        boot.setup()
    assert not (boot.VENV / "tnlib-stamp").exists()
    boot.setup()
    assert installs == ["uv"]
    assert capsys.readouterr().out.count(".venv made") == 1


def test_no_network_is_said_in_four_parts(boot, tmp_path, monkeypatch):
    """The real install step, against a port where nobody listens."""
    shutil.copytree(Path(pip.__file__).parent, tmp_path / "only_pip" / "pip")
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://me:secret@127.0.0.1:9/simple", "PIP_RETRIES": "0",
                "PIP_DEFAULT_TIMEOUT": "1", "PYTHONPATH": str(tmp_path / "only_pip"), "NO_PROXY": "*"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as refused:
        boot.setup()
    words = str(refused.value)
    for part in (".venv", "uv and pip failed", "127.0.0.1:9/simple", "needed:", "do this: connect", "PIP_INDEX_URL"):
        assert part in words
    assert "secret" not in words
    assert not (boot.VENV / "tnlib-stamp").exists()
    assert boot.flaw() is None


def test_an_old_python_is_told_plainly(boot):
    with pytest.raises(SystemExit) as refused:
        boot.check_python((3, 9, 18))
    for part in ("this is Python 3.9", "needed: Python 3.11 or newer", "make TARGET PYTHON=python3.12"):
        assert part in str(refused.value)
    boot.check_python((3, 11, 0))
    boot.check_python((4, 0, 0))


def test_old_pythons_can_read_the_file(boot):
    """Python 3.7's grammar, the oldest that ast still checks."""
    boot.ast.parse((REPO / "ci" / "bootstrap.py").read_text(), feature_version=(3, 7))


def test_a_python_without_ensurepip_is_told_what_to_install(boot, monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(SystemExit, match=r"(?s)no module ensurepip.*needed:.*apt install python3-venv"):
        boot.check_modules()


def test_pip_settings_are_told_to_uv(boot, tmp_path):
    flags, variables = boot.uv_settings("\n".join([
        ":env:.find-links='{0} {0}/missing'".format(tmp_path.as_posix()),
        ":env:.disable-pip-version-check='1'",
        "global.find-links='https://overruled.example/wheels'",
        "global.extra-index-url='file:///no/such/folder https://one.example/simple\\nhttps://two.example/simple'",
        "global.index-url='https://mirror.example/simple?a=b'",
        "install.cert='bundle.pem'",
        "list.index-url='https://not-for-installing.example'",
    ]))
    assert flags == ["--index-strategy", "unsafe-best-match", "--index-url=https://mirror.example/simple?a=b",
                     "--extra-index-url=https://one.example/simple", "--extra-index-url=https://two.example/simple",
                     f"--find-links={tmp_path.as_posix()}"]
    assert variables["SSL_CERT_FILE"] == "bundle.pem"
    assert int(variables["UV_HTTP_TIMEOUT"]) >= 300
    assert boot.uv_settings("")[0] == flags[:2]
    assert "--no-index" in boot.uv_settings("global.no-index='true'")[0]


def test_children_see_the_venv_first_and_the_users_settings(boot, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("PYTHONHOME", "elsewhere")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    env = boot.environment(MPLBACKEND="Agg")
    assert env["PATH"].split(os.pathsep)[0] == os.path.dirname(boot.venv_python())
    assert (env["OMP_NUM_THREADS"], env["MPLBACKEND"]) == ("3", "Agg")
    assert not {"PYTHONHOME", "PYTHONDONTWRITEBYTECODE"} & set(env)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert int(boot.environment()["OMP_NUM_THREADS"]) >= 1


def test_every_test_step_runs_and_one_failure_counts(boot, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(boot, "run", lambda *command, **more: seen.append((command, more)) or int("ruff" in command))
    assert boot.test([]) == 1
    assert [command[1] for command, _ in seen] == ["ruff", "pytest"]
    assert re.search(r"test: lint FAILED \d+ s, unit ok \d+ s$", capsys.readouterr().out)
    (boot.ROOT / "notebooks").mkdir()
    (boot.ROOT / "notebooks" / "00_start_here.ipynb").touch()
    monkeypatch.setattr(boot, "run", lambda *command, **more: seen.append((command, more)) or 0)
    assert boot.test([]) == 0
    assert os.path.join("notebooks", "00_start_here.ipynb") in seen[-1][0]
    assert "TNLIB_RESULTS" in seen[-1][1]


@pytest.mark.parametrize(("cores", "asked", "lanes", "threads"), [(1, None, 1, 1), (2, None, 2, 1), (16, None, 2, 8), (16, "3", 2, 3)])
def test_two_notebooks_at_a_time_share_the_cores(boot, monkeypatch, cores, asked, lanes, threads):
    seen = []
    monkeypatch.setattr(boot, "run", lambda *command, **more: seen.append((command, more)) or 0)
    monkeypatch.setattr(boot, "cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    (boot.ROOT / "notebooks").mkdir()
    for name in ("00_first", "10_long"):
        (boot.ROOT / "notebooks" / f"{name}.ipynb").touch()
    boot.test([])
    command, more = seen[-1]
    assert command[command.index("-n") + 1] == str(lanes)
    assert more["OMP_NUM_THREADS"] == str(threads)
    assert seen[1][1]["OMP_NUM_THREADS"] == (asked or "1"), "the unit tests' models are tiny"
    assert [Path(book).stem for book in command[-2:]] == ["10_long", "00_first"], "the longest first"


@pytest.mark.parametrize(("force", "flags"), [("1", ["--force"]), ("true", ["--force"]), ("0", []), ("", [])])
def test_workbook_passes_force_and_the_rest(boot, monkeypatch, force, flags):
    seen = []
    monkeypatch.setenv("FORCE", force)
    monkeypatch.setattr(boot, "run", lambda *command, **more: seen.append(list(command)) or 7)
    assert boot.workbook(["--jobs", "2"]) == 7
    assert seen == [["-m", "tnlib", "run", "--preset", "laptop", *flags, "--jobs", "2"]]


def test_an_unknown_target_names_the_known_ones(boot):
    with pytest.raises(SystemExit, match=r"(?s)'wrokbook'.*setup, workbook, test, bench, lab"):
        boot.main("wrokbook")


def test_ctrl_c_says_how_to_go_on(boot, installs, monkeypatch, capsys):
    installs.append(KeyboardInterrupt())
    assert boot.main("workbook") == 130
    assert "workbook: stopped; the same command goes on from here" in capsys.readouterr().out


@pytest.mark.parametrize(("printed", "left"), [
    ("fit in 1.23 s, 12 ms each", "fit in DURATION, DURATION each"),
    ("saved /srv/runs/a.svg and C:\\runs\\a.svg", "saved PATH and PATH"),
    ("kept 3/4 of runs/a/b, https://example.org/a/b", "kept 3/4 of runs/a/b, https://example.org/a/b"),
    ("<Layer at 0x7f00aa12bb34> on cuda:0", "<Layer at ADDRESS> on DEVICE"),
    ("2026-11-21 23:05:01, 2 threads, threads=4", "DATE, THREADS, THREADS"),
    ("torch 2.13.0+cpu, 1,234 tokens/s", "torch VERSION, RATE"),
    ("NVIDIA H100 80GB HBM3", "DEVICE"),
    ("relative error 0.123, kept 0.501 of 1,536 weights", "relative error 0.123, kept 0.501 of 1,536 weights"),
])
def test_what_notebook_checks_overlook(printed, left):
    for pattern, replacement in get_sanitize_patterns((REPO / "ci" / "nbval.cfg").read_text()):
        printed = re.sub(pattern, replacement, printed)
    assert printed == left
