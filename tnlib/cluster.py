"""Dask, where a sweep's points go when one machine is not enough: a scheduler that runs, or one that submits to SLURM.

A job has a worker's thread to itself, and one GPU if it needs any: workers are started with `--nthreads 1` and, where there are
GPUs, `--resources GPU=1`. Folders of the sweep must be on a disk that all machines share.
"""

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from tnlib.presets import literal
from tnlib.slots import THREAD_LIMITS

PATIENCE = 60  # seconds for a scheduler to answer, and for a first worker that should be there already
GPU_START = "dask cuda worker ADDRESS --resources GPU=1 (package dask-cuda), or dask worker ADDRESS --nthreads 1 --resources GPU=1"


@dataclass(frozen=True)
class WorkerPlace:
    """The part of its machine that a job on a Dask worker may use; has the method of Slots.

    gpu: the worker's GPU, the first that it sees: dask-cuda lists the others of the machine behind it
    threads: Dask threads on each host; cores are shared out among them. Dask's own thread limits are meant for its tasks
    """

    gpu: bool = False
    threads: dict = field(default_factory=dict)

    @contextlib.contextmanager
    def take(self, stopping=lambda: False):
        """Gives variables for the job's environment, at once."""
        import joblib
        from distributed import get_worker

        worker = get_worker()
        sharing = max(self.threads.get(host_of(worker.address), 0), worker.state.nthreads)
        variables = dict.fromkeys(THREAD_LIMITS, str(max(1, joblib.cpu_count() // sharing)))
        seen = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
        yield variables | ({"CUDA_VISIBLE_DEVICES": seen[0]} if self.gpu and seen else {})


def host_of(address):
    return address.rpartition("://")[2].rpartition(":")[0]


@contextlib.contextmanager
def connect(scheduler=None, slurm=None, gpu=False, say=print):
    """A Dask client, of the scheduler at an address or of one that submits a SLURM profile's jobs, with a worker at least.

    Raises: ConnectionError, ValueError with the remedy
    """
    from distributed import Client

    with contextlib.ExitStack() as stack:
        if slurm is not None:
            cluster = stack.enter_context(slurm_cluster(slurm, gpu))
            say(f"submitted {workers_of(slurm)} jobs to SLURM, waiting for the first to start; scheduler {cluster.scheduler_address}")
        try:
            client = stack.enter_context(Client(scheduler or cluster, set_as_default=False, timeout=PATIENCE))
            client.wait_for_workers(1, timeout=None if slurm is not None else PATIENCE)
        except OSError as error:
            raise ConnectionError(
                f"Dask at {scheduler}: {error or 'no answer'}.\n  Needed: a scheduler that answers and a worker. Start them: "
                "dask scheduler; dask worker ADDRESS --nthreads 1"
            ) from error
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        if gpu and not any(worker["resources"].get("GPU") for worker in workers):
            raise ValueError(f"--gpus on a cluster: none of its {len(workers)} workers offers GPU.\n  Needed: {GPU_START}")
        yield client


def threads_by_host(client):
    """{host: Dask threads of all its workers}"""
    found = {}
    for worker in client.scheduler_info(n_workers=-1)["workers"].values():
        found[worker["host"]] = found.get(worker["host"], 0) + worker["nthreads"]
    return found


def read_profile(path):
    """A SLURM profile: dask_jobqueue.SLURMCluster's arguments as YAML, and `workers`, how many jobs to submit.

    Raises: ValueError for a file that there is not, or that is no such thing
    """
    if not Path(path).is_file():
        raise ValueError(f"--slurm {path}: got no such file.\n  Needed: YAML such as: workers: 4, cores: 8, memory: 32GB, walltime: 04:00:00")
    found = literal(Path(path).read_text("utf-8"), f"profile {path}")
    lost = [key for key in ("cores", "memory") if not isinstance(found, dict) or key not in found]
    if lost:
        raise ValueError(f"profile {path}: got no {' and no '.join(lost)}.\n  Needed: both, as cores: 8 and memory: 32GB, of one job.")
    return found


def workers_of(path):
    return int(read_profile(path).get("workers", 1))


def slurm_cluster(path, gpu=False):
    """A SLURMCluster of the profile at `path`, its jobs submitted: each has one worker, which does one job at a time.

    gpu: each worker offers one GPU, which the profile must ask SLURM for, as job_extra_directives: ["--gres=gpu:1"]
    Exact: cluster.job_script() is the script that each job is submitted with.
    """
    from dask_jobqueue import SLURMCluster

    profile = read_profile(path)
    profile.pop("workers", None)
    directives = profile.get("job_extra_directives", [])
    if gpu and not any("gpu" in str(line) for line in directives):
        raise ValueError(f"profile {path}: got job_extra_directives {directives}.\n  Needed with --gpus: one that asks for a GPU, as --gres=gpu:1")
    cpus = profile.pop("cores")
    more = [*profile.pop("worker_extra_args", []), *(["--resources", "GPU=1"] if gpu else [])]
    try:
        cluster = SLURMCluster(cores=1, processes=1, job_cpu=profile.pop("job_cpu", cpus), worker_extra_args=more, **profile)
    except (TypeError, ValueError) as error:  # an argument that it does not know
        said = str(error).splitlines()[0]
        raise ValueError(f"profile {path}: {said}\n  Needed: arguments of dask_jobqueue.SLURMCluster, and workers.") from None
    cluster.scale(jobs=workers_of(path))
    return cluster
