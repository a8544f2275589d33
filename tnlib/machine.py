"""What this machine does a second, measured once and kept in the cache folder, with the plans that won when they were timed.

A plan's time is modeled step by step: a matrix product takes its arithmetic at the rate that products of its smallest side
reach, or its traffic at the rate of memory, whichever is longer; and every call costs something.
"""

import bisect
import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from tnlib.assets import cache_dir
from tnlib.contract import Product
from tnlib.links import Link, apply_link
from tnlib.records import write_atomic

PASSES = 3  # times that everything is measured
SIDES = (1, 4, 16, 64, 512)
TIMED = ("assemble", "chain", "contract", "links", "lookup", "machine", "one_token")  # files whose code is timed, or times
BORDER = 32 << 20  # bytes from which on a result is fresh memory from the system at every call


@dataclass(frozen=True)
class Machine:
    """Rates by which plans are priced."""

    products: tuple  # FLOPs a second of one product whose smallest side is 1, 4, 16, 64, 512
    batches: tuple  # the same for a batch of products with such a side, the others 64
    cached: float  # numbers a second read, or written, below BORDER
    streamed: float  # beyond it
    reordered: float  # numbers a second copied into another order, each alone; runs of them go as many times as fast
    call: float  # seconds a step costs, whatever its size

    def seconds(self, plan, built=True):
        """Predicted time of a plan; built=False: what it builds is at hand."""
        return sum(self._step(step) for step in (*(plan.build if built else ()), *plan.run))

    def _step(self, step):
        if not isinstance(step, Product):
            return self.call + max(step.numbers / (self.reordered * step.run), self._move(2 * step.numbers))
        m, k, n, batch = step.m, step.k, step.n, step.batch
        rate = _between(min(m, k, n), self.batches if batch > 1 else self.products)
        numbers = m * k * (1 if step.shared else batch) + batch * (k * n + m * n)
        return self.call + max(step.flops / rate, self._move(numbers))

    def _move(self, numbers):
        return numbers / (self.cached if 4 * numbers < BORDER else self.streamed)


def _between(side, rates):
    """Rate for a smallest side between the measured ones, linear in logarithms."""
    at = bisect.bisect_left(SIDES, side)
    if at == 0 or at == len(SIDES):
        return rates[min(at, len(SIDES) - 1)]
    share = math.log(side / SIDES[at - 1]) / math.log(SIDES[at] / SIDES[at - 1])
    return rates[at - 1] ** (1 - share) * rates[at] ** share


# Where nothing may be measured, while a graph is captured: a 2-core x86 server in float32, an H100-class GPU in bfloat16.
TYPICAL = {
    "cpu": Machine((1e9, 8e9, 4e10, 9e10, 1.3e11), (1e9, 4e9, 2e10, 6e10, 1e11), 3e9, 8e8, 1e9, 1e-5),
    "cuda": Machine((1e11, 1e12, 1e13, 5e13, 3e14), (1e11, 1e12, 1e13, 5e13, 3e14), 1e12, 1e12, 3e11, 1e-5),
}


def machine(device, dtype):
    """The rates of a device ("cpu", "cuda", "cuda:1") for a dtype, measured at first use: about half a second, once a machine."""
    return _machine(str(device), dtype, torch.get_num_threads())


@functools.lru_cache(maxsize=64)
def _machine(device, dtype, threads):
    name = f"{device.partition(':')[0]} {dtype} rates: {', '.join(field.name for field in fields(Machine))}"
    known = recall(device, name)
    if known is None:
        known = remember(device, name, asdict(_best([_measured(device, dtype) for _ in range(PASSES)])))
    return Machine(**{key: tuple(value) if isinstance(value, list) else value for key, value in known.items()})


def _best(passes):
    """Of each rate the highest, of the calls' times the lowest: what a slow moment touched is not believed."""
    products, batches = (tuple(map(max, *(getattr(one, name) for one in passes))) for name in ("products", "batches"))
    others = {name: max(getattr(one, name) for one in passes) for name in ("cached", "streamed", "reordered")}
    return Machine(products, batches, **others, call=min(one.call for one in passes))


def _measured(device, dtype):
    def numbers(*shape):
        return torch.full(shape, 0.5, device=device, dtype=dtype)

    def rate(*shapes):
        a, b = (numbers(*shape) for shape in shapes)
        room = a @ b  # of its own: where a result is fresh memory, an outer product takes twenty times as long
        return 2 * a.numel() * b.shape[-1] / best_time(lambda: torch.matmul(a, b, out=room), device)

    small, large = numbers(1 << 17), numbers(1 << 24)
    tiny = Link(numbers(2, 2), 2)
    return Machine(
        products=tuple(rate((512, side), (side, 512)) for side in SIDES),
        batches=tuple(rate((256, 64, 64), (256, 64, min(side, 64))) for side in SIDES),
        cached=2 * small.numel() / best_time(small.clone, device),
        streamed=2 * large.numel() / best_time(large.clone, device, repeats=2),
        reordered=small.numel() / best_time(lambda: small.view(32, 128, 32).permute(2, 0, 1).contiguous(), device),
        call=best_time(lambda: apply_link(tiny, tiny.matrix), device),
    )


def best_time(fn, device, repeats=5):
    """Seconds of the fastest of a few runs of fn(), each long enough for the clock."""
    wait = torch.cuda.synchronize if str(device).startswith("cuda") else lambda: None
    fn()
    wait()
    start = time.perf_counter()
    fn()
    wait()
    inner = max(1, min(100, int(2e-4 / max(1e-7, time.perf_counter() - start))))
    found = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            fn()
        wait()
        found = min(found, (time.perf_counter() - start) / inner)
    return found


def recall(device, key):
    """What was remembered for this machine under `key`, or None."""
    return _memory(*_place(device)).get(key)


def remember(device, key, value):
    """Keep a value for later processes and return it; or what another process kept meanwhile, so that all do the same.

    A folder that cannot be written loses nothing but the time to measure again.
    """
    path, memory = _place(device)[0], _memory(*_place(device))
    with contextlib.suppress(OSError):
        from filelock import FileLock  # of huggingface_hub, which transformers needs

        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            memory.update(_read(path))
            memory.setdefault(key, value)
            write_atomic(path, json.dumps(memory, indent=1))
    return memory.setdefault(key, value)


def _place(device):
    """The file of this machine with so many threads and these plans, and what it is about."""
    device = str(device)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    about = f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, plans {_source()}"
    return cache_dir() / "machines" / f"{hashlib.sha256(about.encode()).hexdigest()[:12]}.json", about


@functools.lru_cache(maxsize=1)
def _source():
    """Hash of the code that is timed: what won before a change of it need not win after."""
    files = [Path(__file__).with_name(f"{name}.py") for name in TIMED]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]


@functools.lru_cache(maxsize=1)
def _processor():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


@functools.lru_cache(maxsize=16)
def _memory(path, about):
    return {"machine": about} | _read(path)


def _read(path):
    """The file's content; nothing if there is none, or if somebody damaged it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
