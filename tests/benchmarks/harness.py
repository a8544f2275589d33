"""Contestants measured side by side: in turns, in shuffled rounds, as ratios formed inside each round.

A machine's speed drifts by more than what is to be seen here, so no time is compared with one of another minute. In a round
every contestant is timed once, in an order drawn anew (a fixed one leaves the same contestant a warm cache each time), and
its ratio is to the baseline's time of that round; medians and quartiles are over rounds. The baseline is entered twice: a
difference smaller than that between its two entries says nothing. Every answer is checked before it is timed, and who
fails, is wrong or too slow stays in the table with the reason.

pytest-benchmark was considered: it finishes one contestant before it begins the next, so that the drift of minutes is in
every ratio of its times.
"""

import contextlib
import ctypes
import gc
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 2e-3  # a sample is as many calls as take this long, else the clock and the scheduler are measured
LEAST_ROUNDS = 3  # of a contestant that has used its share


class Unavailable(Exception):
    """A contestant that cannot take part here: the message says why, and what to do about it."""


@dataclass(frozen=True)
class Contestant:
    """Who is measured. `build` returns the call that is timed and a check: its answer -> None, or what is wrong with it."""

    name: str
    build: Callable
    probe: bool = False  # measures the machine; its time serves the floors, its ratio nobody


def race(contestants, baseline, rounds=7, seconds=0.0, share=10.0, computed=None, seed=0):
    """Time the contestants in shuffled rounds.

    baseline: name of the contestant whose time of the same round is 1
    rounds: at least so many, and more until `seconds` have passed
    share: seconds a contestant may use before it sits out the rounds after its third; a single call that takes longer than
        that is reported and not timed
    computed: {name: function of a round's seconds by name -> seconds}, such as a floor
    Returns: {name: row}, row = {"status": "ok", "ms", "ratio", "low", "high" (quartiles), "rounds", "calls"}, or
        {"status": "failed", "wrong", "slow" or "missing", "reason"}
    """
    rows, steps = {}, {}
    for one in contestants:
        rows[one.name], step = _enter(one, share)
        if step is not None:
            steps[one.name] = step
    taken = _rounds(steps, rows, rounds, seconds, share, random.Random(seed), baseline) if baseline in steps else []
    for name, rule in (computed or {}).items():
        for found in taken:
            found[name] = rule(found)
        rows[name] = {"status": "ok"} if taken else {"status": "failed", "reason": f"no time of {baseline}"}
    for name, row in rows.items():
        if row["status"] == "ok":
            row |= summary(name, baseline, taken)
    return rows


def _enter(contestant, share):
    """Build, check, and find out how many calls make a sample: the row so far, and the timed step or None."""
    try:
        call, check = contestant.build()
        took, answer = _clock(call, 1)
        wrong = check(answer)
        del answer
        if wrong:
            return {"status": "wrong", "reason": wrong}, None
        took = min(_clock(call, 1)[0] for _ in range(1 if took > share else 2 if took > SAMPLE_S else 5))
        if took > share:  # the second call too: the first may have imported something
            return {"status": "slow", "reason": f"a call takes {took:.0f} s"}, None
    except Unavailable as reason:
        return {"status": "missing", "reason": str(reason)}, None
    except Exception as error:  # whatever a peer raises is its result
        return {"status": "failed", "reason": said(error)}, None
    calls = max(1, math.ceil(SAMPLE_S / took))
    row = {"status": "ok", "calls": calls} | ({"probe": True} if contestant.probe else {})
    return row, lambda: _clock(call, calls)[0] / calls


def _clock(call, times):
    began = time.perf_counter()
    for _ in range(times):
        answer = call()
    return time.perf_counter() - began, answer


def _rounds(steps, rows, rounds, seconds, share, shuffle, baseline):
    """[{name: seconds a call} of each round]"""
    taken, used, began = [], dict.fromkeys(steps, 0.0), time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        while len(taken) < rounds or time.perf_counter() - began < seconds:
            order = [n for n in steps if n == baseline or used[n] < share or len(taken) < LEAST_ROUNDS]
            shuffle.shuffle(order)
            found = {}
            for name in order:
                start = time.perf_counter()
                try:
                    found[name] = steps[name]()
                except Exception as error:
                    rows[name] = {"status": "failed", "reason": said(error)}
                    del steps[name]
                used[name] += time.perf_counter() - start
            taken.append(found)
    finally:
        gc.enable()
    return taken


def summary(name, baseline, taken):
    """Median time and quartiles of the ratio to the baseline, over the rounds that have both."""
    own = [(found[name], found[baseline]) for found in taken if name in found and baseline in found]
    if not own:
        return {"status": "failed", "reason": f"no round with {baseline}"}
    ratios = [mine / theirs for mine, theirs in own]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    ms = 1e3 * statistics.median(mine for mine, _ in own)
    return {"ms": ms, "ratio": middle, "low": low, "high": high, "rounds": len(own)}


def said(error):
    """Class and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def peak_mb(fn):
    """fn's result, and the MB by which the resident set was highest during fn() above what it was before, and in all.

    torch's memory is invisible to tracemalloc, so the kernel is asked, in a fresh process: memory that an earlier step has
    freed and the allocator kept would hide a peak. Where the high-water mark cannot be set back, it is the process's.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")
    before = _high_water_mb()
    result = fn()
    after = _high_water_mb()
    return result, after - before, after


def _high_water_mb():
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def fresh(script, *arguments, timeout=600):
    """What `script` prints as JSON in its last line, run in a fresh process: {"status": "ok", …}, or failed or slow."""
    command = [sys.executable, "-W", "ignore", str(script), *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"status": "slow", "reason": f"more than {timeout:.0f} s in a process of its own"}
    if done.returncode == 0 and done.stdout.strip():
        return {"status": "ok"} | json.loads(done.stdout.strip().splitlines()[-1])
    lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
    return {"status": "failed", "reason": lines[-1][:160]}
