"""What of a machine a job may use: one GPU, or some cores, locked by files against every other sweep of this user.

A lock is the system's: it goes with the process that holds it, however that ends.
"""

import contextlib
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

ASK_EVERY = 0.5  # seconds
THREAD_LIMITS = tuple(f"{library}_NUM_THREADS" for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "RAYON"))


@dataclass(frozen=True)
class Slots:
    """Places of one kind, of which each job holds `each` while it runs.

    kind: "gpu", whose ids become the job's CUDA_VISIBLE_DEVICES, or "core"
    Exact: never do two processes of a user on one machine hold the same place of a kind.
    """

    kind: str
    ids: tuple[str, ...]
    each: int = 1

    @contextlib.contextmanager
    def take(self, stopping=lambda: False):
        """Wait until `each` places are free, and hold them; gives variables for the job's environment.

        stopping: asked while waiting; once it is true no place is held, and the job is to find out itself
        """
        with contextlib.ExitStack() as held:
            while (ids := self._free(held)) is None and not stopping():
                time.sleep(ASK_EVERY)
            yield {"CUDA_VISIBLE_DEVICES": ",".join(ids)} if self.kind == "gpu" and ids else {}

    def _free(self, held):
        """The ids that were taken now, whose locks are then in `held`; None where there were too few."""
        folder, ids = lock_folder(), []
        with FileLock(folder / "choosing.lock"), contextlib.ExitStack() as mine:  # all at once: two must not wait for each other
            for one in self.ids:
                if len(ids) < self.each:
                    with contextlib.suppress(Timeout):
                        mine.enter_context(FileLock(folder / f"{self.kind}-{one}.lock", timeout=0, is_singleton=False))
                        ids.append(one)
            if len(ids) < self.each:
                return None
            held.enter_context(mine.pop_all())
        return ids


def lock_folder():
    """Where the locks of this user on this machine are: not the sweep's folder, which another sweep does not share."""
    folder = Path(tempfile.gettempdir()) / f"tnlib-slots-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    folder.mkdir(exist_ok=True)
    return folder


def gpu_ids(text):
    """Ids of GPUs: "0,2", or "all" for those that CUDA_VISIBLE_DEVICES names, else all that torch sees.

    Raises: ValueError where there is none
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    ids = tuple(part.strip() for part in (named if text == "all" else text).split(",") if part.strip())
    if text == "all" and not ids and "CUDA_VISIBLE_DEVICES" not in os.environ:
        import torch

        ids = tuple(str(number) for number in range(torch.cuda.device_count()))
    if not ids:
        raise ValueError(f"--gpus {text}: got no GPU; needed one at least. Name them, as --gpus 0,1, or leave --gpus out.")
    return ids


def cores(cpus, jobs):
    """The Slots of `jobs` jobs at a time that share `cpus` cores evenly."""
    return Slots("core", tuple(map(str, range(cpus))), max(1, cpus // jobs))
