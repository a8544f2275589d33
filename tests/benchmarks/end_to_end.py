"""End to end: SmolLM2-135M with its MLP matrices in each form at half of the numbers, beside the dense model.

    python tests/benchmarks/end_to_end.py [--quick] [--context 512] [--new-tokens 32] [--rounds 7] [--out figures]

prefill, decode and train are compare_speed's: models take turns within a round, ratios are to the dense model of that round,
and the dense model is entered twice. Weights are random: no time depends on them. Peak memory of a training step (forward,
backward, AdamW, moments included) and the time to load from the disk are taken in a fresh process for each model, the latter
after the imports and the median of three loads. For prefill and decode, also with merged factors kept ("auto") and with the
rebuilt weight kept ("always").
"""

import copy
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import ours
import report
import torch
from harness import fresh, peak_mb
from suite import Record, options, settle

import tnlib as tn

ASSET = "smollm2-135m"
FORMS = {
    "Kronecker, right (2,1)": tn.Kronecker(right=(2, 1)),
    "TT 3+3": tn.TensorTrain(order=3, kept=0.5),
    "MPO 3 cores": tn.MPO(order=3, kept=0.5),
    "low rank": tn.LowRank(kept=0.5),
}
TIMED = ("prefill", "decode", "train")
LOADS = 3


def recipe(name):
    return tn.Recipe(name="bench", rules=(tn.Rule(where="mlp", form=FORMS[name], init="random"),))


def student(name):
    """The model with its MLPs in the form `name`; "dense" is as loaded."""
    model = tn.load_model(ASSET, dtype="float32")
    if name in FORMS:
        tn.factorize_(model, recipe(name), progress=False)
    return model


def twin(model):
    """A model of its own that shares the parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def models(measure):
    """{name: model}"""
    found = {"dense": student("dense")}
    found["dense again"] = twin(found["dense"])
    for name in FORMS:
        found[name] = student(name)
        tn.materialize_(found[name], ours.SETTINGS[0])
        for setting in ours.SETTINGS[1:] if measure != "train" else ():  # in training nothing is kept
            found[f"{name}, {setting}"] = other = twin(found[name])
            tn.materialize_(other, setting)
    return found


def timed(measure, asked):
    """Rows of one measure of compare_speed; ratio is time over dense."""
    rows, found = {}, models(measure)
    pace = {"context": asked.context, "new_tokens": asked.new_tokens, "repeats": asked.rounds}
    for name, own in tn.compare_speed(found, measures=[measure], **pace).items():
        speed = own[measure]
        ratios = {"ratio": 1 / speed.ratio, "low": 1 / speed.ratio_high, "high": 1 / speed.ratio_low}
        more = {"ms": speed.time.median_ms, "rounds": speed.time.repeats, "tokens/s": speed.tokens_per_second}
        rows[name] = {"status": "ok"} | ratios | more
    return rows


def step_memory(name, asked):
    """In a fresh process: MB at the highest of a training step, all in all and on top of the model."""
    model = copy.deepcopy(student(name)).train()  # else pages of the checkpoint, which stays mapped, would count
    ids = torch.randint(model.config.vocab_size, (1, asked.context))

    def step():
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    _, above, highest = peak_mb(step)
    return {"peak, MB": highest, "of these by the step, MB": above}


def load_time(name, asked):
    """In a fresh process: seconds until the model is in memory, from a folder, files in the page cache."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, load = tn.fetch(ASSET), partial(tn.load_model, ASSET)
        if name in FORMS:
            folder = Path(scratch) / "student"
            tn.factorize_folder(ASSET, recipe(name), folder, progress=False)
            load = partial(tn.load, folder)
        load()
        taken = []
        for _ in range(LOADS):
            began = time.perf_counter()
            load()
            taken.append(time.perf_counter() - began)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 1e6
    return {"seconds": statistics.median(taken), "on disk, MB": size}


ALONE = {"memory of a training step": step_memory, "load": load_time}


def alone(measure, asked):
    """Rows of a measure that each model is alone for; ratio is to the dense model."""
    given = ("--context", asked.context, "--threads", asked.threads, "--timeout", asked.timeout)
    names = ["dense", *FORMS]
    rows = {n: fresh(__file__, "--worker", measure, "--model", n, *given, timeout=asked.timeout) for n in names}
    key = "peak, MB" if measure == "memory of a training step" else "seconds"
    for row in rows.values():
        if row["status"] == "ok" and rows["dense"]["status"] == "ok":
            row["ratio"] = row["low"] = row["high"] = row[key] / rows["dense"][key]
    return rows


def main(arguments=None):
    parser = options(__doc__)
    parser.add_argument("--context", type=int, default=512, help="tokens of a prompt and of a training window")
    parser.add_argument("--new-tokens", type=int, default=32, help="written after the prompt")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of a model in a process of its own")
    parser.add_argument("--worker", help="used by the script itself")
    parser.add_argument("--model", help="used by the script itself")
    asked = settle(parser, arguments)
    if asked.worker:
        print(json.dumps(ALONE[asked.worker](asked.model, asked)))
        return
    if asked.quick:
        asked.context, asked.new_tokens = 32, 2
    record = Record("bench_end_to_end", asked)
    for measure in (*TIMED, *ALONE):
        if record.wants(measure):
            began = time.perf_counter()
            rows = timed(measure, asked) if measure in TIMED else alone(measure, asked)
            title = f"{measure}, {asked.context} tokens" if measure != "load" else "load from disk"
            record.put(measure, {"table": title}, rows, began)
    report.end_to_end(record)


if __name__ == "__main__":
    sys.exit(main())
