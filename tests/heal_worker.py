"""Imports once, then forks a child for each scenario of tests/test_heal.py: python heal_worker.py FOLDER

Every child heals the same tiny model for the same budget on one thread; some are killed, some run out of disk, some are
two ranks of one run. What they leave in FOLDER/SCENARIO is for the tests to compare.
"""

import gc
import importlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
from tiny import tiny

import tnlib.resume
import tnlib.trainer
from tnlib.keeper import Keeper
from tnlib.kronecker import Kronecker
from tnlib.recipe import Recipe, Rule
from tnlib.surgery import factorize_
from tnlib.treatment import Budget, Heal
from tnlib.tt_matrix import MPO

healing = importlib.import_module("tnlib.heal")  # tnlib.heal itself is the function
WINDOWS = torch.randint(2, 96, (13, 12), generator=torch.Generator().manual_seed(0))
HEAL = Heal(losses=(("next_token", 1.0), ("logits", 0.5), ("hidden", 0.1)), temperature=2.0, learning_rate=1e-2)
BUDGET = Budget(steps=12, batch=2, accumulate=2, save_every=3, eval_every=4, patience=9, log_every=5)
EMBEDDING = Rule(where="embedding", form=Kronecker(right=(1, 2)))
ATTENTION = Rule(where="attention", form=MPO(order=3, max_rank=3))
RECIPE = Recipe(name="tiny", rules=(Rule(where="mlp", form=Kronecker(right=(2, 2), terms=2)), ATTENTION, EMBEDDING))


def models(family="gpt2"):
    """A dense teacher and a student with factorized MLPs, attention and tied embedding; GPT-2's has dropout."""
    teacher, student = tiny(family, torch.float32), tiny(family, torch.float32)
    factorize_(student, RECIPE)
    return student, teacher


def run(out, family="gpt2", **changes):
    """The run that all scenarios share."""
    student, teacher = models(family)
    if os.environ.get("RANK") == "1":  # a fit that came out a little different there must not matter
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1 + 5e-4)
    budget = Budget(**{**BUDGET.to_dict(), **changes})
    return student, healing.heal(student, teacher, (WINDOWS, WINDOWS[:5]), HEAL, budget, out, seed=3, progress=False)


def fork(work, *args, **env):
    """Run work(*args) in a child; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(env)
        work(*args)
        code = 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid):
    """How a child ended: its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def slow():
    """Make every step last, so that a signal finds the run somewhere in the middle."""
    ending = Keeper.on_step_end

    def on_step_end(self, *args, **kwargs):
        time.sleep(0.2)
        return ending(self, *args, **kwargs)

    Keeper.on_step_end = on_step_end


def slowly(out):
    slow()
    run(out)


def killed(folder, number):
    """Send a signal to a run at a random moment after its first checkpoint or row."""
    pid = fork(slowly, folder)
    while not any(folder.glob("checkpoint-*")):
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.25))
    os.kill(pid, number)
    return ended(pid)


def dies_while_saving(out):
    """Killed when the second checkpoint is written, but does not have its name yet."""
    flush = tnlib.resume._flush

    def last_act(path):
        flush(path)
        if path.name == "checkpoint-6.part":
            os.kill(os.getpid(), signal.SIGKILL)

    tnlib.resume._flush = last_act
    run(out)


def runs_out_of_disk(out):
    """Every file beyond a few kilobytes fails from the second checkpoint on."""
    save, calls = tnlib.trainer.save_weights, []

    def save_weights(model, path):
        calls.append(path)
        if len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        save(model, path)

    tnlib.trainer.save_weights = save_weights
    try:
        run(out)
    except OSError as error:
        (out / "error.txt").write_text(str(error), encoding="utf-8")
        os._exit(3)


def rank(out, result, last=None):
    """One of two ranks; rank 0 writes down its history and what the student is afterwards."""
    built = []

    class Watched(healing.HealTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            built.append(self)

    healing.HealTrainer = Watched
    if last is not None:
        stop_after(last)
    student, history = run(out, "llama")
    if os.environ["RANK"] == "0":
        facts = {"trained": type(built[0].model_wrapped).__name__, "student": type(student).__name__}
        result.write_text(json.dumps(facts | {"rows": history.rows}), encoding="utf-8")


def stop_after(last):
    """Leave without a word at the end of a step."""
    ending = Keeper.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > last:
            os._exit(9)
        return ending(self, args, state, control, **kwargs)

    Keeper.on_step_end = on_step_end


def pair(out, result, *more, **env):
    """Two ranks, with the environment that `accelerate launch` gives them; their exit codes."""
    env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    env["ACCELERATE_USE_CPU"] = "true"
    return [ended(pid) for pid in [fork(rank, out, result, *more, RANK=r, LOCAL_RANK=r, **env) for r in "01"]]


CLIENT = """
import json, os, sys, time
ours, theirs = (f"{sys.argv[1]}-{what}-{os.environ['RANK']}" for what in ("env", "code"))
with open(ours + ".part", "w") as file:
    json.dump(dict(os.environ), file)
os.rename(ours + ".part", ours)
while not os.path.exists(theirs):
    time.sleep(0.02)
sys.exit(int(open(theirs).read()))
"""


def launched(name, out, result, *options):
    """Two ranks by `accelerate launch` itself. What it starts only hands its environment to us, to save two imports."""
    names = ["--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *options,
        *names,
        f"--main_process_port={free_port()}",
    ]
    command += ["--no_python", sys.executable, "-I", "-S", "-c", CLIENT, str(name)]
    launcher = subprocess.Popen(command, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    asked = [Path(f"{name}-env-{rank}") for rank in "01"]
    while not all(path.exists() for path in asked) and launcher.poll() is None:
        time.sleep(0.02)
    pids = [fork(rank, out, result, **json.loads(path.read_text())) for path in asked if path.exists()]
    codes = [ended(pid) for pid in pids]
    for number, code in enumerate(codes):
        part = Path(f"{name}-part-{number}")
        part.write_text(str(code))
        part.rename(f"{name}-code-{number}")
    return [*codes, launcher.wait(60)]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def interruptions(folder):
    """Every way to be stopped, and the same call again."""
    codes = {"whole": ended(fork(run, folder / "whole"))}
    codes["kill"] = killed(folder / "kill", signal.SIGKILL)
    codes["interrupt"] = killed(folder / "interrupt", signal.SIGINT)
    codes["saving"] = ended(fork(dies_while_saving, folder / "saving"))
    codes["disk"] = ended(fork(runs_out_of_disk, folder / "disk"))
    left = {name: sorted(path.name for path in (folder / name).iterdir()) for name in codes}
    again = {name: ended(fork(run, folder / name)) for name in codes}
    return {"codes": codes, "left": left, "again": again}


def ranks(folder):
    """One process, two by DDP, two by FSDP2, and the last two stopped and started again."""
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    codes = {"one": ended(fork(run, folder / "one", "llama"))}
    shard = ["--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"]
    shard += ["--fsdp_transformer_layer_cls_to_wrap=LlamaDecoderLayer"]
    codes["ddp"] = launched(
        folder / "ddp", folder / "ddp", folder / "ddp.json", "--multi_gpu"
    )  # two processes, here on CPU
    codes["fsdp"] = launched(folder / "fsdp", folder / "fsdp", folder / "fsdp.json", *shard)
    sharded |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}
    codes["fsdp stopped"] = pair(folder / "fsdp-again", folder / "fsdp-again.json", 7, **sharded)
    codes["fsdp again"] = pair(folder / "fsdp-again", folder / "fsdp-again.json", **sharded)
    return {"codes": codes}


def main(folder):
    torch.set_num_threads(1)
    run(None, steps=1)  # what is imported late is imported here, once
    gc.freeze()  # and is nothing that a child's collections need to look at
    found = {"interruptions": interruptions(folder), "ranks": ranks(folder)}
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
