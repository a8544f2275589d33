"""How fast models train, read and write, measured side by side."""

import statistics
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from tnlib.cost import Latency, elapsed_ms
from tnlib.modes import eval_mode
from tnlib.windows import check_windows


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Time of one step, and how many times faster it is than the first model's of the same round: median and quartiles."""

    time: Latency
    tokens: int  # a step reads, or writes
    ratio: float
    ratio_low: float  # 25 %
    ratio_high: float  # 75 %

    @property
    def tokens_per_second(self):
        return 1e3 * self.tokens / self.time.median_ms

    def __str__(self):
        ratio = f"{self.ratio:.2f} times ({self.ratio_low:.2f} to {self.ratio_high:.2f})"
        return f"{self.time}, {self.tokens_per_second:,.0f} tokens/s, {ratio} the first model's speed"


def compare_speed(models, context=256, new_tokens=32, repeats=7, batch=1, warmup=2, measures=None, progress=False):
    """Training, prefill and decoding speed of causal language models, taken in turns in one process.

    models: {name: model} of transformers, each measured where it is and in its dtype; ratios are to the first
    context: tokens of a training window and of a prompt; new_tokens: written after the prompt, one at a time
    repeats: rounds that count. In a round every model takes one step, and each round begins with the next model, so that a
        slow minute of the machine falls on all of them; warmup: rounds before those; batch: sequences a step
    measures: some of "train": forward, backward and AdamW on all that trains, its moments kept for every model at once;
        "prefill": the prompt read for the logits of its last token; "decode": after a prefill that is not timed. None: all
    Returns: {name: {measure: Speed}}
    Raises: ValueError for no model, an unknown measure, less than two repeats or a context longer than a model's
    Source: time.perf_counter; AdamW at rate 0. Exact: weights, gradients and modes are as before, and the first ratio is 1.
    """
    measures = tuple(STEPS) if measures is None else tuple(measures)
    _check(models, context, new_tokens, repeats, measures)
    found = {name: {} for name in models}
    with tqdm(total=len(measures) * len(models) * (warmup + repeats), desc="speed", disable=not progress) as bar:
        for measure in measures:
            steps = {
                name: STEPS[measure](model, _ids(model, batch, context), new_tokens) for name, model in models.items()
            }
            times = _rounds(steps, warmup + repeats, bar)
            for name, own in times.items():
                found[name][measure] = _speed(
                    own[warmup:],
                    next(iter(times.values()))[warmup:],
                    batch * (new_tokens if measure == "decode" else context),
                )
    return found


def _rounds(steps, rounds, bar):
    """{name: ms of each round}"""
    names, times = list(steps), {name: [] for name in steps}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(steps[name]())
            bar.update()
    return times


def _speed(own, base, tokens):
    low, ratio, high = statistics.quantiles([b / a for a, b in zip(own, base)], n=4, method="inclusive")
    return Speed(time=Latency.of(own), tokens=tokens, ratio=ratio, ratio_low=low, ratio_high=high)


def _trainer(model, ids, new_tokens):
    """A training step as a function that returns its ms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)

    def learn():
        """What is timed."""
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    def step():
        """One step, after which gradients are those of before."""
        held = [p.grad for p in trained]
        optimizer.zero_grad()
        with eval_mode(model):  # for its way back
            model.train()
            ms = elapsed_ms(learn)
        for parameter, grad in zip(trained, held):
            parameter.grad = grad
        return ms

    return step


def _reader(model, ids, new_tokens):
    def step():
        with eval_mode(model), torch.inference_mode():
            return elapsed_ms(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1))

    return step


def _writer(model, ids, new_tokens):
    def write(out):
        for _ in range(new_tokens):
            token = out.logits[:, -1:].argmax(-1)  # (batch, 1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)

    def step():
        with eval_mode(model), torch.inference_mode():
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            return elapsed_ms(lambda: write(out))

    return step


STEPS = {"train": _trainer, "prefill": _reader, "decode": _writer}


def _ids(model, batch, context):
    """Random tokens, the same for models of one vocabulary: (batch, context)."""
    ids = torch.randint(model.config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0))
    return ids.to(next(model.parameters()).device)


def _check(models, context, new_tokens, repeats, measures):
    """Refuse what would fail after the first model was measured."""
    if not models or repeats < 2 or not set(measures) <= set(STEPS):
        raise ValueError(
            f"compare_speed: {len(models)} models, repeats {repeats}, measures {', '.join(measures)}; needed a model, two "
            f"repeats for quartiles, and measures among {', '.join(STEPS)}. Correct them."
        )
    for name, model in models.items():
        check_windows(f"compare_speed, model {name!r}", model, _ids(model, 1, 2), context + new_tokens)
