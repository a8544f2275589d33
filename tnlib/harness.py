"""The benchmarks of CompactifAI's tables through EleutherAI's lm-evaluation-harness, an optional extra.

`python -m tnlib.harness run --model hf --model_args pretrained=FOLDER --tasks hellaswag` is lm-eval's own command line, with all of
its options, in a process that has imported tnlib: so transformers can load what tnlib has compressed. harness() takes any model.
"""

import functools
import sys
from dataclasses import dataclass

from tnlib.modes import eval_mode


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A task's score as the harness gives it, between 0 and 1; metric is its name there, with the filter after a comma."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int  # questions asked
    shots: int  # solved examples before each

    def __str__(self):
        spread = "" if self.stderr is None else f" ± {100 * self.stderr:.1f}"
        return f"{self.task}: {100 * self.value:.1f}{spread} % ({self.metric}, {self.shots}-shot, {self.n:,} questions)"


# Tasks: the table of arXiv 2401.14109v2, which names them and neither metric nor shots (papers.md 4.2 lists its scores).
# Metric and shots are therefore those of the Open LLM Leaderboard of 2023 for MMLU, HellaSwag and GSM8K, and 0 shots with the
# only metric that the harness has for BoolQ and TriviaQA. A difference to the paper's level may be one of convention.
TASKS = {  # name: metric, shots
    "mmlu": ("acc,none", 5),
    "hellaswag": ("acc_norm,none", 10),
    "boolq": ("acc,none", 0),
    "triviaqa": ("exact_match,remove_whitespace", 0),
    "gsm8k": ("exact_match,strict-match", 5),
}


def harness(model, tokenizer, tasks=tuple(TASKS), limit=None, shots=None, batch=8, folder=None):
    """Scores of a causal language model on tasks of the harness, one task after the other.

    tasks: names of TASKS, or any other of the harness, whose first metric is then taken
    limit: questions a task (a subtask, for MMLU's 57), from its start; None: all
    shots: solved examples before each question; None: as in TASKS, for other tasks their own default
    batch: sequences a forward pass; folder: with YAML files of your own tasks, which are then the only ones known
    Returns: {task: Benchmark}
    Raises: ImportError without the extra; ValueError for a task that the harness does not know
    Source: Gao et al. 2021, lm_eval.simple_evaluate. Exact: two equal models score alike, question for question.
    """
    lm_eval, wrap, manager = _harness(folder)
    if unknown := sorted(set(tasks) - {*manager.all_subtasks, *manager.all_groups}):
        raise ValueError(
            f"harness: unknown task {unknown[0]!r}; needed tasks such as {', '.join(TASKS)}. Run `lm-eval ls tasks` for all, "
            "or give the folder of its YAML file; with a folder, name only what is in it."
        )
    found = {}
    with eval_mode(model):
        lm = wrap(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        for task in tasks:
            metric, usual = TASKS.get(task, (None, None))
            given = {"num_fewshot": usual if shots is None else shots, "limit": limit, "task_manager": manager}
            found[task] = _read(
                task, metric, lm_eval.simple_evaluate(model=lm, tasks=[task], log_samples=False, **given)
            )
    return found


def _harness(folder):
    """The package, its wrapper of transformers' models, and the tasks it knows."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(_missing(error)) from None
    return lm_eval, HFLM, _published() if folder is None else TaskManager(include_path=folder, include_defaults=False)


def _missing(error):
    return f"harness: lm_eval cannot be imported ({error}); needed the optional extra. Run: pip install 'tnlib[eval]'"


@functools.cache
def _published():
    """The harness's own tasks: thousands of files, which take the better part of a minute to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _read(task, metric, out):
    """The record of one task; a group such as mmlu has its questions in its subtasks."""
    scores = out["results"][task]
    metric = metric or next(name for name, value in scores.items() if "," in name and "_stderr" not in name)
    parts = list(_leaves(out.get("group_subtasks", {}), task))
    stderr = scores.get(metric.replace(",", "_stderr,"))
    return Benchmark(
        task=task,
        metric=metric,
        value=float(scores[metric]),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        n=sum(out["n-samples"][part]["effective"] for part in parts),
        shots=int(out["n-shot"][parts[0]]),
    )


def _leaves(groups, task):
    """The tasks that a group has questions in, at any depth; of a task itself."""
    if not groups.get(task):
        yield task
    for part in groups.get(task, ()):
        yield from _leaves(groups, part)


def main():
    """lm_eval's command line. Returns: 0; 1 where the extra is missing"""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        print(f"error: {_missing(error)}", file=sys.stderr)
        return 1
    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
