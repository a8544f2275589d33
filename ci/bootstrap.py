"""Set up and run the workbook: python3 ci/bootstrap.py TARGET [ARGUMENTS]

  setup      make .venv, install tnlib[all] into it, fetch the models and texts; with nothing to do it takes a second
  workbook   setup, then run every notebook at laptop scale (FORCE=1: also those already done)
  test       setup, then lint, unit tests and notebooks
  bench      setup, then tnlib against its peers, into figures/bench_*; hours
  lab        setup, then JupyterLab on notebooks/00_start_here.ipynb
  package    setup, then wheel and sdist into dist/, and the wheel, without extras, tried in an environment of its own

ARGUMENTS go to the notebook runner (workbook), the unit tests (test), the benchmarks (bench) or JupyterLab (lab).
pip's settings are honored: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, PIP_CERT, pip.conf.
On Linux the package index offers torch for CUDA, several GB; for the smaller CPU build:
  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu python3 ci/bootstrap.py workbook
"""
# Standard library only, and readable by Python 3.7: an old Python must get a sentence, not a SyntaxError.
import ast
import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

try:
    import fcntl
except ImportError:  # Windows: keeping two setups apart is then up to the user
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BASE = getattr(sys, "_base_executable", None) or sys.executable  # started from inside .venv: what .venv was made from
INDEXES = ("index-url", "extra-index-url", "find-links")  # named alike in pip and uv


def say(line, start=None):
    """One line at once, also into a pipe; with the seconds since `start`."""
    print(line if start is None else f"{line}, {time.monotonic() - start:.1f} s", flush=True)


def refuse(where, got, needed, do):
    """End with the four things a reader needs, exit status 1."""
    raise SystemExit(f"{where}: {got}\n  needed: {needed}\n  do this: {do}")


def check_python(version=sys.version_info):
    """Refuse a Python older than the packages allow."""
    if tuple(version[:2]) < (3, 11):
        refuse("ci/bootstrap.py", f"this is Python {version[0]}.{version[1]} ({sys.executable})", "Python 3.11 or newer",
               "python3.12 ci/bootstrap.py TARGET, or make TARGET PYTHON=python3.12; where there is none, install it "
               "(python.org, your package manager, conda)")


def check_modules():
    """Refuse a Python that cannot make environments; Debian ships it in two parts."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        refuse("ci/bootstrap.py", f"this Python ({sys.executable}) has no module {error.name}",
               "the standard modules venv and ensurepip, which make .venv",
               "sudo apt install python3-venv (Debian, Ubuntu); elsewhere a complete Python, as from python.org")


def venv_python():
    """The environment's own interpreter."""
    return str(VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(**more):
    """What every child process gets; for threads and the like, what the user has set wins."""
    env = {"OMP_NUM_THREADS": str(cores()), "JUPYTER_PLATFORM_DIRS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **os.environ}
    env.pop("PYTHONHOME", None)  # it would send .venv to another standard library
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # as containers set it: each notebook would compile 1,400 modules anew, 10 s
    path = os.pathsep.join([os.path.dirname(venv_python()), env.get("PATH", os.defpath)])
    env.update(PATH=path, VIRTUAL_ENV=str(VENV), PYTHONUNBUFFERED="1", PIP_USER="0", PIP_DISABLE_PIP_VERSION_CHECK="1")
    return {**env, **more}


def run(*arguments, **more):
    """Run .venv's Python with these arguments and further variables; returns the exit status as shells count it."""
    child = subprocess.Popen([venv_python(), *arguments], env=environment(**more), close_fds=False)

    def end(*_):
        child.terminate()  # unlike Ctrl-C, this signal came to us alone
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        status = child.wait()
    except KeyboardInterrupt:  # let the child put its own children away
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            child.wait(timeout=10)
        child.kill()
        raise
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def one_at_a_time():
    """Keep two setups of one checkout apart; the lock ends with the processes that hold it, however they end."""
    with open(ROOT / "pyproject.toml") as handle:
        os.set_inheritable(handle.fileno(), True)  # so that an installer that outlives a killed setup holds it too
        with contextlib.suppress(OSError if fcntl else AttributeError):  # some network drives cannot lock
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("setup: another setup works on this folder; waiting for it")
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def fingerprint():
    """What .venv was made from; when any of it changes, packages are installed again."""
    files = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    return hashlib.sha256(b"\0".join([*files, f"{sys.version} {os.path.realpath(BASE)} {ROOT}".encode()])).hexdigest()


def flaw():
    """Why the .venv that is there cannot be kept, or None."""
    if not VENV.exists():
        return "there was none"
    if (VENV / "tnlib-unfinished").exists():
        return "an interrupted setup had left it half made"
    ask = "import sys, sysconfig; print(sysconfig.get_python_version(), sys.prefix != sys.base_prefix)"
    try:
        found = subprocess.run([venv_python(), "-c", ask], stdout=subprocess.PIPE, timeout=60).stdout.decode().split()
    except (OSError, subprocess.TimeoutExpired):
        found = []
    ours = sysconfig.get_python_version()
    return None if found == [ours, "True"] else f"its Python was {found[0] if found else 'broken'}, this one is {ours}"


def make_venv():
    """An empty environment, marked unfinished from its first moment."""
    if VENV.exists():
        shutil.rmtree(VENV)
    VENV.mkdir()
    (VENV / "tnlib-unfinished").touch()
    if subprocess.call([BASE, "-m", "venv", str(VENV)], close_fds=False):
        refuse("setup, making .venv", "`python -m venv` failed, with the message above",
               "a complete Python and a folder on a disk with room", "mend that, then run this again")


def place(value):
    """A package index or folder as uv takes it, or None for a folder that is not there: pip overlooks it, uv stops."""
    if "://" in value and not value.startswith("file:"):
        return value
    local = url2pathname(urlparse(value).path) if value.startswith("file:") else os.path.expanduser(value)
    return (value if value.startswith("file:") else local) if os.path.exists(local) else None


def uv_settings(listing):
    """Flags and variables that tell uv what `pip config list` says, as uv reads none of pip's settings."""
    said = {}
    for section in ("global.", "install.", ":env:."):  # pip's order: the later one wins
        rows = [line.partition("=") for line in listing.splitlines() if line.startswith(section)]
        said.update((name[len(section):], ast.literal_eval(value)) for name, _, value in rows)
    # as pip does: the best version on all indexes, not what the first index that knows the name has
    flags = ["--index-strategy", "unsafe-best-match"]
    for name in INDEXES:
        flags += [f"--{name}={found}" for found in map(place, said.get(name, "").split()) if found]
    if said.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        flags.append("--no-index")
    variables = {"UV_HTTP_TIMEOUT": os.environ.get("UV_HTTP_TIMEOUT", "300")}  # 30 s is short for torch
    if said.get("cert"):
        variables["SSL_CERT_FILE"] = os.path.expanduser(said["cert"])
    return flags, variables


def pip_listing():
    """What pip has been told; an environment that uv made has no pip, so it gets one first."""
    if run("-c", "import importlib.util as u, sys; sys.exit(u.find_spec('pip') is None)"):
        run("-m", "ensurepip")
    ask = [venv_python(), "-m", "pip", "config", "list"]
    return subprocess.run(ask, stdout=subprocess.PIPE, env=environment()).stdout.decode()


def install():
    """tnlib[all] in the tested versions: by uv in seconds, else by pip in minutes."""
    flags, variables = uv_settings(pip_listing())
    what = ["-e", ".[all]", "-c", "constraints.txt"]
    quiet = [] if sys.stderr.isatty() else ["-q"]  # progress for people, only errors for logs
    pip = ["-P", "-m", "pip", "install"]  # -P: tnlib.egg-info in the checkout is not an installed package
    if run(*pip, "-qq", "--retries=2", "uv>=0.5,<1") == 0:
        uv = ["-m", "uv", "pip", "install", "--python", venv_python()]
        if run(*uv, *quiet, *flags, *what, **variables) == 0:
            return "uv"
    say("setup: uv could not be used (see above); falling back to pip, which takes some minutes")
    if run(*pip, *quiet, *what) == 0:
        return "pip"
    asked = [re.sub("//[^@/]*@", "//***@", flag) for flag in flags[2:]] or ["https://pypi.org/simple"]
    return refuse("setup, installing tnlib[all] into .venv", f"uv and pip failed, with the messages above; asked was "
                  f"{' '.join(asked)}", "a package index that can be reached, and some GB of disk",
                  "connect to the network, or set PIP_INDEX_URL or PIP_FIND_LINKS to a mirror, then run this again; "
                  "nothing has to be cleaned up")


def setup():
    """Bring .venv to what pyproject.toml and constraints.txt say; no work when it is there."""
    check_modules()
    with one_at_a_time():
        start, stamp, unfinished = time.monotonic(), VENV / "tnlib-stamp", VENV / "tnlib-unfinished"
        if os.path.exists(venv_python()) and stamp.exists() and stamp.read_text() == fingerprint():
            return say("setup: .venv is up to date", start)
        reason = flaw()
        if reason:
            make_venv()
            say(f"setup: .venv made ({reason})", start)
        unfinished.touch()
        stamp.unlink(missing_ok=True)
        say("setup: installing packages; a first time downloads 1 GB or more")
        start = time.monotonic()
        try:
            tool = install()
        except SystemExit:
            unfinished.unlink()  # a clean refusal: the next run can go on from here
            raise
        stamp.write_text(fingerprint())
        unfinished.unlink()
        return say(f"setup: packages installed by {tool}", start)


def workbook(rest):
    """Every notebook at laptop scale; the runner skips what is done."""
    force = ["--force"] if os.environ.get("FORCE", "").lower() in {"1", "true", "yes"} else []
    return run("-m", "tnlib", "run", "--preset", "laptop", *force, *rest)


def test(rest):
    """Lint, unit tests, notebooks: all three, whatever one of them says."""
    books = sorted(map(str, Path("notebooks").glob("*.ipynb")), reverse=True)  # the later ones, which train, take longest
    lanes = min(2, cores())  # a notebook keeps one core busy, seldom two; a test one
    shared = ["-n", str(lanes), "--dist", "loadfile", "--no-loadscope-reorder"]
    nbval = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300", "--nbval-sanitize-with", "ci/nbval.cfg"]
    verdicts, failed, asked = [], False, os.environ.get("OMP_NUM_THREADS")
    with tempfile.TemporaryDirectory() as scratch:  # notebooks write here, not into the records
        unit = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": asked or "1"}  # tiny models: more threads only wait for one another
        replay = {"TNLIB_RESULTS": scratch, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
        replay["OMP_NUM_THREADS"] = asked or str(cores() // lanes)
        steps = [("lint", ["ruff", "check", "."], {}), ("unit", ["pytest", "tests", *shared, *rest], unit),
                 ("notebooks", ["pytest", *shared, *nbval, *books], replay)]
        for name, command, variables in steps if books else steps[:2]:
            start = time.monotonic()
            status = run("-m", *command, **variables)
            failed = failed or status != 0
            verdicts.append(f"{name} {'FAILED' if status else 'ok'} {time.monotonic() - start:.0f} s")
            say(f"test: {verdicts[-1]}")
    say(f"test: {', '.join(verdicts)}")
    return int(failed)


def bench(rest):
    """tnlib against its peers, as far as they are installed."""
    return run(os.path.join("tests", "benchmarks", "run_all.py"), *rest)


def lab(rest):
    """JupyterLab on the first notebook."""
    signal.signal(signal.SIGINT, lambda *_: None)  # JupyterLab asks whether to stop: leave the answer to it
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    return run("-m", "jupyterlab", "notebooks/00_start_here.ipynb", f"--ServerApp.root_dir={ROOT}", *root, *rest)


def package(rest):
    """Wheel and sdist, the wheel from the sdist; then what `pip install tnlib` alone gives has to plan a paper's model."""
    flags, variables = uv_settings(pip_listing())
    shutil.rmtree(str(ROOT / "dist"), ignore_errors=True)
    with tempfile.TemporaryDirectory() as clean:
        python, script = (os.path.join(clean, os.path.relpath(venv_python(), str(VENV).rstrip(os.sep))),
                          "Scripts/tnlib.exe" if os.name == "nt" else "bin/tnlib")
        steps = [["build", "--out-dir", "dist", *flags], ["venv", "--clear", "--python", BASE, clean],
                 ["pip", "install", "--python", python, "-c", "constraints.txt", *flags]]
        for step in steps:
            wheel = [str(path) for path in (ROOT / "dist").glob("*.whl")] if step[0] == "pip" else []
            if run("-m", "uv", *step, *wheel, *rest, **variables):
                return 1
        status = subprocess.call([os.path.join(clean, script), "plan", "gpt2", "--recipe", "krony-81m"])
    say(f"package: {', '.join(sorted(path.name for path in (ROOT / 'dist').glob('tnlib-*')))}{' FAILED' if status else ''}")
    return int(status != 0)


def main(target="--help", *rest):
    """Returns the exit status."""
    check_python()
    targets = {"setup": lambda rest: 0, "workbook": workbook, "test": test, "bench": bench, "lab": lab, "package": package}
    if target in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if target not in targets:
        refuse("ci/bootstrap.py", f"unknown target {target!r}", f"one of {', '.join(targets)}",
               "python3 ci/bootstrap.py --help")
    os.chdir(ROOT)
    try:
        setup()
        return run("-m", "tnlib", "assets", "--all", "--quiet") or targets[target](rest)
    except KeyboardInterrupt:
        say(f"\n{target}: stopped; the same command goes on from here")
        return 130


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
