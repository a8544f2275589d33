"""The child of job.py: `python -m tnlib.execute` reads a Job from stdin and lets papermill execute its notebook.

Its kernel is this very interpreter, whatever kernelspecs the user has. The report goes to state/NAME.json at each cell.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from tnlib.job import GRACE, Job, Outcome, kill, write_state
from tnlib.presets import quick_import


def main():
    """Read a Job from stdin, execute it, leave the report in its state file."""
    from filelock import FileLock, Timeout

    job = Job(**json.load(sys.stdin))
    asked_to_stop = threading.Event()

    def on_terminate(*_):
        asked_to_stop.set()
        kill(psutil.Process().children(recursive=True))  # papermill then notices, saves the notebook and returns

    signal.signal(signal.SIGTERM, on_terminate)
    home = tempfile.mkdtemp(prefix="tn-")  # short: a socket's path may have 107 characters
    threading.Thread(target=_end_with, args=(psutil.Process().parent(), home), daemon=True).start()
    outcome = Outcome(
        job.name, job.title, "running", False, job.parameters, time.time(), cells=job.cells, pid=os.getpid()
    )
    try:
        with FileLock(Path(job.out) / "state" / f"{job.name}.lock", timeout=GRACE):
            _clear(job)
            _execute(job, outcome, home, asked_to_stop)
    except Timeout:
        outcome.verdict, outcome.error = "failed", "Locked"
        outcome.message = f"another run is executing it into {job.out}. Wait for that, or give this one another --out"
    finally:
        shutil.rmtree(home, ignore_errors=True)
    write_state(job.out, outcome)


def _end_with(parent, home):
    """Outlive the runner by a second at most: a killed runner must not leave a child that writes beside its successor."""
    while parent is not None and parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.5)
    kill(psutil.Process().children(recursive=True))
    shutil.rmtree(home, ignore_errors=True)
    os._exit(1)


def _clear(job):
    """Remove what an earlier run of this notebook left, so that an existing record means something."""
    out, number = Path(job.out), job.name.split("_")[0] + "_"
    stale = [out / "stamps" / f"{job.name}.json", out / f"{job.name}.ipynb", out / f"{job.name}.html"]
    for path in [*stale, *out.glob(f"figures/{number}*"), *out.glob(f"results/{number}*")]:
        path.unlink(missing_ok=True)


def _execute(job, outcome, home, asked_to_stop):
    """Run papermill, once more if the kernel did not start, and write down how it ended."""
    with quick_import():
        from papermill import PapermillExecutionError

    for attempt in (1, 2):
        try:
            left = _papermill(job, outcome, home)
            outcome.verdict = "failed" if left else "ok"
            if left:  # papermill takes sys.exit() for success
                outcome.error, outcome.message = (
                    "Incomplete",
                    f"stopped {outcome.at}, {left} cells were not run; sys.exit()?",
                )
        except PapermillExecutionError as error:
            outcome.verdict, outcome.error, outcome.message = "failed", error.ename, error.evalue
            outcome.index, outcome.traceback = error.cell_index, "\n".join(error.traceback)
        except Exception as error:
            if attempt == 1 and outcome.cell == 0 and not asked_to_stop.is_set() and not isinstance(error, OSError):
                print(f"the kernel did not start, trying once more: {error!r}", flush=True)
                continue
            outcome.verdict, outcome.error, outcome.message = "failed", type(error).__name__, str(error)
            if outcome.error == "DeadKernelError":
                outcome.message = f"the kernel died {outcome.at}; memory may have run out"
        return


def _papermill(job, outcome, home):
    """One call of papermill, with this interpreter as the kernel; returns how many code cells were not run."""
    from papermill import execute_notebook
    from traitlets.config import Config

    def on_cell_start(cell, cell_index):
        if cell.cell_type == "code" and cell.source.strip():
            outcome.cell, outcome.index = outcome.cell + 1, cell_index
            write_state(job.out, outcome)

    settings = {"connection_file": f"{home}/kernel.json"}
    if os.name == "posix" and len(home) < 80:
        settings["transport"] = "ipc"  # no port to race for, and no warning about unencrypted TCP
    nb = execute_notebook(
        *(path.replace("{", "{{").replace("}", "}}") for path in (job.source, f"{job.out}/{job.name}.ipynb")),
        parameters=job.parameters, kernel_name="python3", language="python", cwd=str(Path(job.source).parent),
        progress_bar=False, on_cell_start=on_cell_start, kernel_manager_class=_this_python(),
        config=Config({"ThisPython": settings}),
    )  # fmt: skip
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    return sum(not cell.execution_count and "skip-execution" not in cell.metadata.get("tags", []) for cell in code)


def _this_python():
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class ThisPython(AsyncKernelManager):
        """Starts sys.executable; a kernelspec named python3 may belong to any other environment."""

        @property
        def kernel_spec(self):
            argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=argv, display_name="Python 3", language="python")

        async def _async_interrupt_kernel(self):
            """Do nothing: only jupyter_client's shutdown asks, and a kernel that is done may log it as an error."""

        interrupt_kernel = _async_interrupt_kernel

    return ThisPython


if __name__ == "__main__":
    main()
