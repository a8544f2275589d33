"""harness(): scores of a model whose answers are known, from tasks in a folder; without the extra, what to install."""

import importlib
import json
import sys
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tnlib.harness import TASKS, harness, main
from tnlib.low_rank import LowRank
from tnlib.recipe import Recipe, Rule
from tnlib.surgery import factorize_

WORDS = ["<end>", "sky", "grass", "is", "blue", "green", "red", "?"]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{thing}}}} is"
doc_to_choice: [blue, green, red]
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
GROUP = """
group: {name}
task: [{members}]
aggregate_metric_list:
  - {{metric: acc, weight_by_size: true}}
metadata: {{version: 1.0}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two tasks, of 3 and 2 questions, in a group within a group as MMLU is."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, labels in {"colors_a": [0, 1, 1], "colors_b": [0, 2]}.items():
        data = tmp_path / f"{name}.json"
        data.write_text(
            "\n".join(
                json.dumps({"thing": thing, "label": label}) for thing, label in zip(["sky", "grass", "sky"], labels)
            )
        )
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    (tmp_path / "inner.yaml").write_text(GROUP.format(name="colors_inner", members="colors_a, colors_b"))
    (tmp_path / "outer.yaml").write_text(GROUP.format(name="colors", members="colors_inner"))
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer():
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>", unk_token="?")


@pytest.fixture
def always_blue():
    """GPT-2 whose logits are largest for "blue" whatever it reads: blocks that add nothing, a bias through ln_f."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), n_embd=8, n_head=2, n_layer=1, n_positions=64))
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(10 * model.transformer.wte.weight[WORDS.index("blue")])
        model.transformer.wte.weight[WORDS.index("blue")] *= 5
    return model.train()


def test_scores_counts_and_shots_of_tasks_and_groups(folder, tokenizer, always_blue):
    found = harness(always_blue, tokenizer, ["colors_a", "colors"], folder=folder, batch=2)
    assert always_blue.training
    alone, group = found["colors_a"], found["colors"]
    assert (alone.task, alone.metric, alone.value, alone.n, alone.shots) == (
        "colors_a",
        "acc,none",
        pytest.approx(1 / 3),
        3,
        0,
    )
    assert alone.stderr == pytest.approx((2 / 9 / 2) ** 0.5)  # of a share 1/3 of 3, by n - 1
    assert (group.value, group.n) == (pytest.approx(2 / 5), 5)
    assert str(alone) == "colors_a: 33.3 ± 33.3 % (acc,none, 0-shot, 3 questions)"
    fewer = harness(always_blue, tokenizer, ["colors_a"], limit=1, shots=1, folder=folder)["colors_a"]
    assert (fewer.value, fewer.n, fewer.shots) == (1.0, 1, 1)


def test_a_factorized_embedding_scores_as_the_dense_one(folder, tokenizer, always_blue):
    dense = harness(always_blue, tokenizer, ["colors_b"], folder=folder)
    factorize_(always_blue, Recipe(name="t", rules=(Rule(where="transformer.wte", form=LowRank(rank=8)),)))
    assert harness(always_blue, tokenizer, ["colors_b"], folder=folder) == dense


def test_the_command_line_is_lm_evals_own_and_scores_as_the_function(folder, tokenizer, always_blue, monkeypatch):
    expected = harness(always_blue, tokenizer, ["colors_b"], folder=folder)["colors_b"]
    always_blue.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    asked = f"run --model hf --model_args pretrained={folder / 'model'} --tasks colors_b --include_path {folder} --device cpu --output_path {folder / 'out'}"
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    monkeypatch.setattr(manager, "__init__", partialmethod(manager.__init__, include_defaults=False))  # which take a minute to read
    monkeypatch.setattr(sys, "argv", ["lm-eval", *asked.split()])
    assert main() == 0
    [written] = (folder / "out").rglob("results_*.json")
    assert json.loads(written.read_text())["results"]["colors_b"]["acc,none"] == pytest.approx(expected.value)


def test_the_papers_tasks_are_known_to_the_harness():
    """Looked up in their own folders: reading all tasks takes the better part of a minute."""
    tasks = Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"
    from lm_eval.tasks import TaskManager

    folders = ["mmlu/default", "hellaswag", "super_glue/boolq", "triviaqa", "gsm8k"]
    known = TaskManager(include_path=[tasks / folder for folder in folders], include_defaults=False)
    assert set(TASKS) <= {*known.all_subtasks, *known.all_groups}


def test_an_unknown_task(folder, tokenizer, always_blue):
    with pytest.raises(ValueError, match=r"unknown task 'colors_c'.*lm-eval ls tasks"):
        harness(always_blue, tokenizer, ["colors_a", "colors_c"], folder=folder)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"lm_eval cannot be imported.*pip install 'tnlib\[eval\]'"):
        harness(None, None)


def test_without_the_extra_the_command_says_so_too(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert main() == 1
    assert "pip install 'tnlib[eval]'" in capsys.readouterr().err
