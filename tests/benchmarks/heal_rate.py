"""What heal() costs beyond forward and backward: its token rate over that of a bare PyTorch loop, on SmolLM2-135M.

    python tests/benchmarks/heal_rate.py [--steps 4] [--context 64] [--batch 2] [--repeats 3]

Same student, same batches, AdamW and clipping in both; next-token loss only. The two are run in turns, and the median of
each is compared, so that a busy machine slows both. Not a test: a time depends on the machine.
"""

import argparse
import copy
import statistics
import time

import torch

import tnlib as tn


def bare(student, windows, steps, batch):
    """Seconds of a loop of nothing but forward, backward, clipping, step."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    student.train()
    began = time.perf_counter()
    for step in range(steps):
        ids = windows[step * batch : (step + 1) * batch]
        student(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - began


def healed(student, windows, steps, batch):
    """Seconds that heal() reports for the same work, and seconds of the whole call, which sets up and restores as well."""
    began = time.perf_counter()
    budget = tn.Budget(steps=steps, batch=batch, log_every=1)
    history = tn.heal(student, None, windows, tn.Heal(learning_rate=1e-5), budget, progress=False)
    return history.rows[-1]["seconds"], time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser()
    for name, default in (("steps", 4), ("context", 64), ("batch", 2), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    student = tn.load_model("smollm2-135m")
    tn.factorize_(student, tn.papers["krony-96m"].scaled_to(student))
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(
        0, student.config.vocab_size, (asked.steps * asked.batch, asked.context), generator=generator
    )
    tokens = asked.steps * asked.batch * asked.context
    bare(copy.deepcopy(student), windows[: asked.batch], 1, asked.batch)  # warm up
    found = {"bare loop": [], "heal": [], "heal, whole call": []}
    for _ in range(asked.repeats):
        found["bare loop"].append(bare(copy.deepcopy(student), windows, asked.steps, asked.batch))
        for name, seconds in zip(
            ("heal", "heal, whole call"), healed(copy.deepcopy(student), windows, asked.steps, asked.batch)
        ):
            found[name].append(seconds)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    for name, seconds in medians.items():
        spread = ", ".join(f"{tokens / s:.1f}" for s in found[name])
        print(f"{name:>17}: {tokens / seconds:7.1f} tokens a second ({spread})")
    print(
        f"heal keeps {medians['bare loop'] / medians['heal']:.1%} of the bare rate, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
