"""What quantization costs: training steps of MiniLM as tensor trains of rank 30, and forward passes of the packed model.

    python tests/benchmarks/quantized_step.py [--steps 2] [--batch 32] [--contexts 32 64] [--repeats 5] [--parts step heal forward]

The models are run in turns, and medians of ratios to the unquantized step of the same turn are printed, so that a busy
machine slows all of them. With --thread-time it is one thread, and its own time instead of the wall's. Not a test: a time
depends on the machine.
"""

import argparse
import copy
import statistics
import time
from dataclasses import replace
from functools import partial

import torch

import tnlib as tn

FACTORS = tn.Quantize(bits=4)
VARIANTS = {"float": None, "INT4 factors": FACTORS, "INT4, activations 8 bits": replace(FACTORS, activation_bits=8)}
HEAL = tn.Heal(losses=(("task", 1.0), ("hidden", 1.0), ("attention", 1.0), ("logits", 1.0)), clip=10.0)


def students(data):
    """The variants by name, and their dense teacher: a classifier on MiniLM, all linear layers as tensor trains."""
    teacher = tn.load_model("minilm-l6", task="sequence-classification", num_labels=2)
    student = copy.deepcopy(teacher)
    form = tn.TensorTrain(order=2, max_rank=30)
    tn.factorize_(student, tn.Recipe(name="rank 30", rules=(tn.Rule(where="linear", form=form),)))
    found = {}
    for name, quantize in VARIANTS.items():
        found[name] = copy.deepcopy(student)
        if quantize:
            tn.fake_quantize_(found[name], quantize, data)
    return found, teacher


def step(student, batch, optimizer, clock):
    """Seconds of forward, backward, clipping and AdamW."""
    student.train()
    began = clock()
    student(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 10.0)
    optimizer.step()
    optimizer.zero_grad()
    return clock() - began


def forward(model, batch, clock):
    """Seconds of one forward pass."""
    model.eval()
    began = clock()
    with torch.no_grad():
        model(**batch)
    return clock() - began


def turns(works, repeats):
    """Run each of `works` (name to a function that returns seconds) in turns; the first turn does not count."""
    found = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            found[name].append(work())
    return {name: seconds[1:] for name, seconds in found.items()}


def show(title, found):
    """Median milliseconds of each, and the median ratio to the first of the same turn."""
    print(title, flush=True)
    first = next(iter(found.values()))
    for name, seconds in found.items():
        ratios = sorted(mine / theirs for mine, theirs in zip(seconds, first))
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(f"  {name:>26}: {1e3 * statistics.median(seconds):8.1f} ms, {statistics.median(ratios):.3f}x ({spread})")


def texts(rows, context):
    """Random texts with labels."""
    ids = torch.randint(1000, 30_522, (rows, context), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}


def healing(model, teacher, data, steps, batch, clock):
    """Seconds of heal() with teacher and layer losses, set-up included."""
    student, amount = copy.deepcopy(model), tn.Budget(steps=steps, batch=batch, log_every=1)
    began = clock()
    tn.heal(student, teacher, data, HEAL, amount, progress=False)
    return clock() - began


def main():
    parser = argparse.ArgumentParser()
    for name, default in (("steps", 2), ("batch", 32), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--contexts", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--parts", nargs="+", default=["step", "heal", "forward"])
    parser.add_argument("--thread-time", action="store_true")
    asked = parser.parse_args()
    clock = time.thread_time if asked.thread_time else time.perf_counter
    if asked.thread_time:
        torch.set_num_threads(1)
    variants, teacher = students(texts(asked.batch, asked.contexts[0]))
    for context in asked.contexts:
        size = f"batch {asked.batch}, context {context}"
        if "step" in asked.parts:
            batch, works = texts(asked.batch, context), {}
            for name, model in variants.items():
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
                works[name] = partial(step, model, batch, optimizer, clock)
            show(f"training step, {size}", turns(works, asked.repeats))
        if "heal" in asked.parts:
            data, amount = texts(asked.steps * asked.batch, context), (asked.steps, asked.batch, clock)
            works = {name: partial(healing, model, teacher, data, *amount) for name, model in variants.items()}
            show(f"heal() of {asked.steps} steps, {size}", turns(works, asked.repeats))
    if "forward" in asked.parts:
        tn.quantize_(variants["INT4 factors"], FACTORS)
        both = {"float": variants["float"], "packed": variants["INT4 factors"]}
        for rows in (1, asked.batch):
            batch = texts(rows, asked.contexts[0])
            works = {name: partial(forward, model, batch, clock) for name, model in both.items()}
            show(f"forward, batch {rows}, context {asked.contexts[0]}", turns(works, 4 * asked.repeats))


if __name__ == "__main__":
    main()
