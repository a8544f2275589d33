"""heal(): equal to a plain loop, indifferent to how batches are cut, resumed to the bit, polite to its models."""

import copy
import gc
import importlib
import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig

import tnlib.history
import tnlib.resume
from tnlib import Budget, Group, Heal, compress_and_heal, densify_, heal, perplexity, plan, precompute_teacher
from tnlib.examples import Examples
from tnlib.history import Curve, Log, read_history
from tnlib.kronecker import Kronecker
from tnlib.layers import FactorizedEmbedding, FactorizedLinear
from tnlib.low_rank import LowRank
from tnlib.papers import papers
from tnlib.recipe import Recipe, RecipeError, Rule
from tnlib.resume import load_weights_, only_one, save_weights, weights
from tnlib.schedule import included_layers, kinds, parameter_groups, rate
from tnlib.surgery import factorize_

WINDOWS = torch.randint(2, 96, (13, 12), generator=torch.Generator().manual_seed(0))
SHORT = Budget(steps=4, batch=2)
LOGITS = Heal(losses=(("logits", 1.0),), learning_rate=1e-3)
FOLDED = Rule(where="embedding", form=Kronecker(right=(1, 2)))
RECIPE = Recipe(name="tiny", rules=(Rule(where="mlp", form=Kronecker(right=(2, 2), terms=2, scaled=True)), FOLDED))


@pytest.fixture(autouse=True, scope="module")
def _few_to_collect():
    """The Trainer collects garbage in every run; imports are none."""
    gc.freeze()
    yield
    gc.unfreeze()


def models(family="llama", dtype=torch.float64):
    """A factorized student and its dense teacher, without dropout."""
    teacher = tiny(family, dtype)
    for module in teacher.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    student = copy.deepcopy(teacher)
    factorize_(student, RECIPE)
    return student, teacher


def distance(one, other):
    return max((a - b).abs().max().item() for a, b in zip(one.parameters(), other.parameters()))


# ---- what is computed


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_equal_to_a_plain_loop(schedule):
    """AdamW, clipping and schedule by torch alone give the same weights and the same losses."""
    student, _ = models()
    twin, steps = copy.deepcopy(student), 5
    how = Heal(learning_rate=1e-2, final_learning_rate=1e-3, schedule=schedule, warmup=0.4, clip=0.5, betas=(0.8, 0.9))
    history = heal(student, None, WINDOWS, how, Budget(steps=steps, batch=3), seed=7)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, betas=(0.8, 0.9), weight_decay=0.0)
    order, seen = Examples({"input_ids": WINDOWS}, steps * 3, 7), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * rate(how, step, steps)
        ids = torch.stack([order[3 * step + k]["input_ids"] for k in range(3)])
        loss = F.cross_entropy(twin(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
        seen.append(loss.item())
    assert distance(student, twin) < 1e-10
    assert [row["loss"] for row in history.rows] == pytest.approx(seen, abs=1e-6)  # kept in float32
    assert [row["learning_rate"] for row in history.rows] == [1e-2 * rate(how, step, steps) for step in range(steps)]
    assert [row["tokens"] for row in history.rows] == [36, 72, 108, 144, 180]


ALL = (
    "next_token",
    "logits",
    "logits_reverse",
    "hidden",
    "hidden_cosine",
    "attention",
    "embedding",
    "embedding_cosine",
)


def test_accumulation_does_not_change_anything():
    """Every loss: 4 windows at once, or 2 + 2, or 1 + 1 + 1 + 1."""
    how = Heal(losses=tuple((name, 1.0) for name in ALL), temperature=2.0, learning_rate=1e-2)
    found = []
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        student, teacher = models("gpt2")
        history = heal(student, teacher, WINDOWS, how, Budget(steps=3, batch=batch, accumulate=accumulate))
        found.append((student, history))
    assert [name for name in found[0][1].rows[0] if name in ALL] == list(ALL)
    for student, history in found[1:]:
        assert distance(student, found[0][0]) < 1e-9
        for row, wanted in zip(history.rows, found[0][1].rows):
            assert {k: row[k] for k in ("loss", *ALL)} == pytest.approx(
                {k: wanted[k] for k in ("loss", *ALL)}, abs=1e-6
            )
            assert row["loss"] == pytest.approx(sum(row[name] for name in ALL), rel=1e-6)


@pytest.mark.parametrize("name", ALL[1:])
def test_a_student_that_is_its_teacher_loses_nothing(name):
    _, teacher = models()
    history = heal(copy.deepcopy(teacher), teacher, WINDOWS, Heal(losses=((name, 1.0),)), Budget(steps=1, batch=2))
    assert history.rows[0][name] == pytest.approx(0, abs=1e-7)


def test_ragged_task_data_weighs_every_text_alike():
    """A classifier on padded texts: label loss and logits do not depend on how the batch is cut."""
    config = BertConfig(vocab_size=96, hidden_size=24, num_attention_heads=2, intermediate_size=48, num_hidden_layers=2)
    config.num_labels, config.hidden_dropout_prob, config.attention_probs_dropout_prob = 3, 0.0, 0.0
    torch.manual_seed(0)
    teacher = AutoModelForSequenceClassification.from_config(config).double()
    mask = (torch.arange(12) < torch.tensor([12, 3, 7, 12, 5, 9, 2, 11])[:, None]).long()
    data = {"input_ids": WINDOWS[:8], "attention_mask": mask, "labels": torch.arange(8) % 3}
    how = Heal(losses=(("task", 1.0), ("logits", 1.0), ("hidden", 1.0), ("attention", 1.0)), learning_rate=1e-2)
    students = []
    for batch, accumulate in ((4, 1), (1, 4)):
        student = copy.deepcopy(teacher)
        factorize_(
            student, Recipe(name="t", rules=(Rule(where="bert.encoder.layer.*.output.dense", form=LowRank(rank=3)),))
        )
        amount = Budget(steps=3, batch=batch, accumulate=accumulate, eval_every=3)
        students.append((student, heal(student, teacher, (data, data), how, amount)))
    assert distance(students[0][0], students[1][0]) < 1e-9
    rows = [history.rows[-1] for _, history in students]
    assert rows[0]["validation_nll"] == pytest.approx(rows[1]["validation_nll"], abs=1e-6)
    with torch.no_grad():
        assert rows[0]["validation_nll"] == pytest.approx(float(students[0][0].eval()(**data).loss), abs=1e-6)


def test_validation_loss_is_that_of_perplexity():
    student, _ = models(dtype=torch.float32)
    history = heal(student, None, (WINDOWS, WINDOWS[:5]), Heal(), Budget(steps=3, batch=2, eval_every=2))
    assert [row["validation_nll"] is None for row in history.rows] == [True, False, False]
    assert history.rows[-1]["validation_nll"] == pytest.approx(perplexity(student, WINDOWS[:5]).nll, abs=1e-5)
    assert history.frame().validation_nll.isna().tolist() == [True, False, False]


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"precision": "bf16"}])
def test_less_memory_comes_to_the_same(changes):
    how = replace(LOGITS, losses=(("next_token", 1.0), ("logits", 1.0), ("hidden", 1.0)))
    histories = []
    for more in ({}, changes):
        student, teacher = models(dtype=torch.float32)
        histories.append(heal(student, teacher, WINDOWS, how, replace(SHORT, **more)))
        assert next(student.parameters()).dtype == torch.float32
        assert not student.is_activation_checkpointing
    tolerance = 2e-2 if "precision" in changes else 1e-6  # bfloat16 has 8 bits
    for a, b in zip(*(history.rows for history in histories)):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)


# ---- schedules, groups, curriculum


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        (
            {"schedule": "linear", "final_learning_rate": 5e-5},
            [1, 15 / 16, 14 / 16, 13 / 16, 12 / 16, 11 / 16, 10 / 16, 9 / 16],
        ),
        ({"schedule": "linear", "warmup": 0.25}, [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"schedule": "cosine"}, [(1 + torch.cos(torch.tensor(torch.pi * k / 8)).item()) / 2 for k in range(8)]),
        (
            {"schedule": "constant", "final_learning_rate": 2e-5, "curriculum_steps": 2, "losses": (("hidden", 1.0),)},
            [1] * 6 + [0.2] * 2,
        ),
    ],
)
def test_rates(how, expected):
    assert [rate(Heal(learning_rate=1e-4, **how), step, 8, layers=3) for step in range(8)] == pytest.approx(expected)


def test_curriculum_takes_in_a_layer_at_a_time_then_the_rest():
    how = Heal(losses=(("hidden", 1.0),), schedule="constant", curriculum_steps=2)
    assert [included_layers(how, step, 3) for step in range(8)] == [1, 1, 2, 2, 3, 3, 3, 3]  # Yang et al.
    student, teacher = models()
    how = replace(papers["qat-tt-rank30"].heal, curriculum_steps=2)
    history = heal(student, teacher, WINDOWS, how, Budget(steps=6, batch=2, log_every=1))
    assert [row["task"] > 0 for row in history.rows] == [False] * 4 + [True] * 2  # two layers, two steps each
    assert [row["logits"] > 0 for row in history.rows] == [False] * 4 + [True] * 2
    assert [row["learning_rate"] for row in history.rows] == pytest.approx([1e-3] * 4 + [2e-5] * 2)
    assert all(row["embedding"] >= 0 and row["attention"] > 0 for row in history.rows)


def test_krony_decays_factors_only():
    student, _ = models("gpt2")
    groups, kind = parameter_groups(student, papers["krony-92m"].heal), kinds(student)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {name for name, what in kind.items() if what == "factors"}
    assert sum(what == "scalars" for what in kind.values()) == 4
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_groups_have_their_own_rates():
    student, _ = models("gpt2")
    how = Heal(
        groups=(Group(where="scalars", learning_rate=6e-4), Group(where="transformer.h.*.ln_1", learning_rate=0.0))
    )
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    rates = {id(p): group["lr"] for group in parameter_groups(student, how) for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in student.named_parameters()}
    assert by_name["transformer.h.1.mlp.c_fc.scale"] == 6e-4
    assert by_name["transformer.h.0.ln_1.weight"] == 0.0
    assert by_name["transformer.h.0.ln_2.weight"] == how.learning_rate
    heal(student, None, WINDOWS, how, SHORT)
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".ln_1." not in name}


@pytest.mark.parametrize(
    ("train", "moves"),
    [
        ("factors", lambda name, kind: kind != "rest"),
        (("transformer.h.*.mlp.c_fc",), lambda name, kind: ".c_fc." in name),
        ("transformer.h.1", lambda name, kind: name.startswith("transformer.h.1.")),
    ],
)
def test_only_what_is_asked_for_trains(train, moves):
    student, _ = models("gpt2")
    kind = kinds(student)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    heal(student, None, WINDOWS, Heal(train=train), SHORT)
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if moves(name, kind[name])}
    assert all(p.requires_grad for p in student.parameters())  # as it was


# ---- manners


def test_models_are_given_back_as_they_came():
    student, teacher = models("gpt2", torch.float32)
    student.train()
    student.transformer.h[0].eval()
    student.lm_head.requires_grad_(False)
    frozen = [p.requires_grad for p in student.parameters()]
    seen, modes = weights(teacher), [module.training for module in student.modules()]
    seen = {name: tensor.clone() for name, tensor in seen.items()}
    kernel, keys = student.config._attn_implementation, [set(vars(model)) for model in (student, teacher)]
    state = torch.get_rng_state()
    how = Heal(losses=(("attention", 1.0), ("hidden", 1.0)))
    heal(student, teacher, WINDOWS, how, Budget(steps=2, batch=2, precision="bf16", gradient_checkpointing=True))
    assert [module.training for module in student.modules()] == modes
    assert [p.requires_grad for p in student.parameters()] == frozen
    assert (student.config._attn_implementation, teacher.config._attn_implementation) == (kernel, kernel)
    assert [set(vars(model)) - have for model, have in zip((student, teacher), keys)] == [set(), set()]
    assert all(torch.equal(tensor, seen[name]) for name, tensor in weights(teacher).items())
    assert all(p.grad is None for p in student.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert student.config.use_cache
    assert not any("teacher" in name for name in student.state_dict())


def test_shared_factors_stay_shared_and_are_stored_once(tmp_path):
    student, teacher = models("gpt2")
    budget = Budget(steps=4, batch=2, save_every=1)
    heal(student, teacher, WINDOWS, LOGITS, budget, tmp_path / "run")
    assert student.transformer.wte.left is student.lm_head.left
    stored = sum(tensor.numel() for tensor in weights(student).values())
    assert stored == sum(p.numel() for p in student.parameters())
    again, _ = models("gpt2")
    heal(again, teacher, WINDOWS, LOGITS, budget, tmp_path / "run")
    assert again.transformer.wte.left is again.lm_head.left
    assert distance(again, student) == 0
    order = torch.arange(96)
    for module in (student.transformer.wte, student.lm_head):  # as a permuted table keeps it
        module.register_buffer("order", order)
    save_weights(student, tmp_path / "x.safetensors")
    order.zero_()
    load_weights_(student, tmp_path / "x.safetensors")
    assert order.tolist() == list(range(96))
    with pytest.raises(ValueError, match=r"x\.safetensors: tensors .* do not fit the student"):
        load_weights_(teacher, tmp_path / "x.safetensors")


def test_patience_stops_and_keeps_the_best():
    student, _ = models(dtype=torch.float32)
    harmful = Heal(learning_rate=0.3, schedule="constant")
    budget = Budget(steps=30, batch=2, eval_every=1, patience=3)
    history = heal(student, None, (WINDOWS[:2], WINDOWS[8:]), harmful, budget)
    losses = [row["validation_nll"] for row in history.rows]
    assert len(losses) == losses.index(min(losses)) + 1 + 3 < 30
    assert perplexity(student, WINDOWS[8:]).nll == pytest.approx(min(losses), abs=1e-4)


def test_windows_from_a_file_train_as_those_in_memory():
    ends = []
    for windows in (WINDOWS, WINDOWS.int()):
        student, teacher = models()
        heal(student, teacher, (windows, windows[:3]), Heal(losses=(("next_token", 1.0), ("logits", 1.0))), SHORT)
        ends.append(list(student.parameters()))
    assert all(torch.equal(*pair) for pair in zip(*ends))


def test_a_loss_that_is_not_finite_stops_the_run():
    student, _ = models(dtype=torch.float32)
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.left[0, 0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="loss, next_token not finite by step 1; needed finite losses"):
        heal(student, None, WINDOWS, Heal(), SHORT)


def test_local_distillation_comes_first(monkeypatch):
    calls = []

    def fit_layers_(student, teacher, windows, **options):
        calls.append((windows.shape, options["steps"], options["seed"], options["out"]))

    monkeypatch.setattr(importlib.import_module("tnlib.heal"), "fit_layers_", fit_layers_)
    student, teacher = models()
    how = Heal(losses=(("local", 1.0), ("next_token", 1.0)))
    history = heal(student, teacher, WINDOWS, how, replace(SHORT, local_steps=7), seed=5)
    read = SHORT.steps * SHORT.batch * SHORT.accumulate
    assert calls == [((read, WINDOWS.shape[1]), 7, 5, None)]  # no more text than the training reads
    assert "local" not in history.rows[0]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: Heal(losses=(("logit", 1.0),)),
            RecipeError,
            "got losses 'logit'; needed one of next_token, task, logits",
        ),
        (lambda: Heal(losses=()), RecipeError, "needed at least one"),
        (lambda: Heal(losses=(("logits", 1.0), ("logits", 2.0))), RecipeError, "no name twice"),
        (lambda: Heal(losses=(("logits", -1.0),)), RecipeError, "weights above 0"),
        (lambda: Heal(schedule="cosin"), RecipeError, "needed one of cosine, linear, constant"),
        (lambda: Heal(warmup=100), RecipeError, "a share of all steps"),
        (lambda: Heal(temperature=0), RecipeError, "temperature=0; needed a number above 0"),
        (lambda: Heal(curriculum_steps=5), RecipeError, "needed 'constant'"),
        (lambda: Heal(curriculum_steps=5, schedule="constant"), RecipeError, "next_token, which all wait for its end"),
        (lambda: Heal(groups=({"wher": "rest"},)), RecipeError, "some of where, learning_rate, weight_decay"),
        (lambda: Budget(steps=0), ValueError, "steps=0; needed a whole number of at least 1"),
        (lambda: Budget(steps=5, precision="fp16"), ValueError, "needed one of fp32, bf16"),
        (lambda: Budget(steps=5, patience=2), ValueError, "Set eval_every"),
        (lambda: Budget(steps=5, batch=2.0), ValueError, "batch=2.0"),
    ],
)
def test_what_heal_and_budget_refuse(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": None}, "losses logits need a teacher, got None"),
        ({"data": WINDOWS.float()}, r"data is \(13, 12\) torch.float32; needed windows \(n, context\) int64"),
        ({"data": WINDOWS + 90}, "with a vocabulary of 96.*own tokenizer"),
        ({"data": torch.ones(3, 5000, dtype=torch.long)}, "context 5000, but the model has 2048 positions"),
        ({"budget": replace(SHORT, eval_every=2)}, "eval_every=2 without validation data"),
        ({"heal": replace(LOGITS, train="lm_tail")}, r"train='lm_tail' claims no parameter.*model.layers.\*"),
        ({"heal": replace(LOGITS, groups=(Group(where="x.*"),))}, r"group 'x\.\*' claims no parameter"),
        ({"heal": Heal(losses=(("local", 1.0),))}, "no loss but 'local'"),
        ({"student": torch.nn.Linear(2, 2)}, "student is a Linear; needed a transformers model"),
    ],
)
def test_what_a_call_is_refused_for(change, words, monkeypatch):
    monkeypatch.setattr(importlib.import_module("tnlib.heal"), "fit_layers_", lambda *args, **options: None)
    student, teacher = models()
    given = {"student": student, "teacher": teacher, "data": WINDOWS, "heal": LOGITS, "budget": SHORT} | change
    with pytest.raises(ValueError, match=f"(?s){words}"):
        heal(**given)
    assert all(p.requires_grad for p in student.parameters())


def test_another_vocabulary_and_another_depth_are_refused():
    student, _ = models()
    other = tiny("llama", torch.float64)
    other.resize_token_embeddings(64)
    with pytest.raises(ValueError, match=r"student logits \(2, 12, 96\), teacher logits \(2, 12, 64\)"):
        heal(student, other, WINDOWS % 60, LOGITS, SHORT)
    shallow = tiny("llama", torch.float64)
    shallow.model.layers = shallow.model.layers[:1]
    with pytest.raises(ValueError, match="student has 2 layers, teacher 1"):
        heal(student, shallow, WINDOWS, Heal(losses=(("hidden", 1.0),)), SHORT)


def test_importing_the_library_imports_no_transformers():
    code = "import sys, tnlib; tnlib.Heal(), tnlib.Budget(steps=1); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=_environment()).returncode == 0


# ---- the precomputed teacher


def test_all_logits_from_disk_give_the_same_run_as_the_live_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr("tnlib.teacher.SHARD_BYTES", 20_000)
    for temperature in (1.0, 3.0):
        how, found = replace(LOGITS, temperature=temperature), []
        student, teacher = models(dtype=torch.float32)
        stored = precompute_teacher(teacher, WINDOWS, tmp_path / "full", batch=2)
        for source in (teacher, stored):
            student, _ = models(dtype=torch.float32)
            found.append(([row["logits"] for row in heal(student, source, WINDOWS, how, SHORT).rows], student))
        # batches of another composition round differently in the last bits
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
        assert distance(found[0][1], found[1][1]) < 1e-4
    assert len(list((tmp_path / "full").glob("*.safetensors"))) == 4


def test_top_logits_from_disk_approach_the_full_divergence(tmp_path):
    _, teacher = models(dtype=torch.float32)
    losses = []
    for top in (1, 8, 48, 96):
        stored = precompute_teacher(teacher, WINDOWS, tmp_path / str(top), top, temperature=2.0)
        student, _ = models(dtype=torch.float32)
        history = heal(student, stored, WINDOWS, replace(LOGITS, temperature=2.0), replace(SHORT, steps=1))
        losses.append(history.rows[0]["logits"])
    student, _ = models(dtype=torch.float32)
    full = heal(student, teacher, WINDOWS, replace(LOGITS, temperature=2.0), replace(SHORT, steps=1)).rows[0]["logits"]
    assert losses == sorted(losses)
    assert losses[-1] == pytest.approx(full, rel=1e-4)
    assert losses[1] < 0.9 * full


def test_damaged_and_missing_shards_are_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr("tnlib.teacher.SHARD_BYTES", 20_000)
    _, teacher = models(dtype=torch.float32)
    calls = []
    teacher.register_forward_hook(lambda *args: calls.append(1))
    stored = precompute_teacher(teacher, WINDOWS, tmp_path, batch=4)
    whole = stored.batch(torch.arange(13)).logits
    assert len(calls) == 4
    first, second, third, _ = sorted(tmp_path.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-100])  # cut off
    third.write_bytes(b"\0" * 50)
    third.with_suffix(".part").write_bytes(b"half")
    again = precompute_teacher(teacher, WINDOWS, tmp_path, batch=4)
    assert len(calls) == 7
    assert torch.equal(again.batch(torch.arange(13)).logits, whole)
    assert not list(tmp_path.glob("*.part"))
    precompute_teacher(teacher, WINDOWS, tmp_path, batch=4)
    assert len(calls) == 7


def test_a_precomputed_teacher_is_refused_where_it_does_not_fit(tmp_path):
    student, teacher = models(dtype=torch.float32)
    stored = precompute_teacher(teacher, WINDOWS, tmp_path, 8, temperature=2.0)
    how = replace(LOGITS, temperature=2.0)
    for data, change, words in (
        (WINDOWS, {"temperature": 1.0}, "temperature 1.0, but .* holds the largest probabilities at 2.0"),
        (WINDOWS.flip(0), {}, "are not those that the teacher in"),
        (WINDOWS, {"losses": (("hidden", 1.0),)}, "losses hidden need the teacher itself"),
    ):
        with pytest.raises(ValueError, match=words):
            heal(student, stored, data, replace(how, **change), SHORT)
    with pytest.raises(ValueError, match=r"holds another computation \(differs in top"):
        precompute_teacher(teacher, WINDOWS, tmp_path, 9, temperature=2.0)
    with pytest.raises(ValueError, match="differs in teacher"):
        precompute_teacher(tiny("gpt2", torch.float32), WINDOWS, tmp_path, 8, temperature=2.0)
    with pytest.raises(ValueError, match="got top=97; needed 1 to 96"):
        precompute_teacher(teacher, WINDOWS, tmp_path, 97)


# ---- stages


def test_what_is_skipped_was_the_start_of_the_same_order():
    whole, rest = (Examples({"input_ids": WINDOWS}, 30 - skip, 5, skip) for skip in (0, 8))
    assert all(torch.equal(whole[8 + i]["input_ids"], rest[i]["input_ids"]) for i in range(22))  # over two epochs' ends


def test_tqcompressor_in_three_stages(tmp_path, monkeypatch):
    model, seen, read = tiny("gpt2", torch.float32), [], []
    recipe = papers["tqcompressor-81m"]

    def watched(student, *args, **options):
        seen.append((student.transformer.wte.form.right, type(student.transformer.h[1].mlp.c_fc).__name__))
        assert student.transformer.wte.left is student.lm_head.left
        read.append(args[-1])
        return heal(student, *args, **options)

    monkeypatch.setattr("tnlib.stages.heal", watched)
    student, history = compress_and_heal(model, recipe, WINDOWS, Budget(steps=7, batch=2), out=tmp_path)
    assert read == [0, 4, 8]  # examples read before each stage
    assert seen == [((1, 2), "Conv1D"), ((1, 2), "FactorizedLinear"), ((1, 4), "FactorizedLinear")]
    assert sum(p.numel() for p in student.parameters()) == plan(model, recipe).total
    assert isinstance(student.transformer.wte, FactorizedEmbedding)
    assert isinstance(student.lm_head, FactorizedLinear)
    assert [row["stage"] for row in history.rows] == [0, 0, 1, 1, 2, 2, 2]
    assert [row["step"] for row in history.rows] == list(range(1, 8))
    assert history.rows[-1]["tokens"] == 7 * 2 * 12
    assert [row["learning_rate"] for row in history.rows[:3]] == pytest.approx([1e-4, 5e-5, 1e-4])  # starts anew
    again, _ = compress_and_heal(model, recipe, WINDOWS, Budget(steps=7, batch=2), out=tmp_path)
    assert distance(again, student) == 0
    densify_(student)
    assert student.transformer.wte.weight is student.lm_head.weight


def test_without_stages_it_is_factorize_and_heal():
    _, teacher = models(dtype=torch.float32)
    recipe = replace(RECIPE, heal=LOGITS)
    student, history = compress_and_heal(teacher, recipe, WINDOWS, SHORT, seed=2)
    by_hand, _ = models(dtype=torch.float32)
    wanted = heal(by_hand, teacher, WINDOWS, LOGITS, SHORT, seed=2)
    assert distance(student, by_hand) == 0
    assert [row["loss"] for row in history.rows] == [row["loss"] for row in wanted.rows]
    assert "stage" not in history.rows[0]


def test_stages_survive_json_and_scaling():
    recipe = papers["tqcompressor-81m"]
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    model = tiny("llama", torch.float32)
    student, _ = compress_and_heal(model, recipe.scaled_to(model), WINDOWS, Budget(steps=3, batch=2))
    assert sum(p.numel() for p in student.parameters()) == plan(model, recipe.scaled_to(model)).total
    for name in ("krony-92m", "qat-tt-rank30"):
        assert Recipe.from_dict(json.loads(json.dumps(papers[name].to_dict()))) == papers[name]


def test_stages_that_do_not_end_in_the_rules_are_refused():
    recipe = papers["tqcompressor-81m"]
    short = replace(recipe, stages=recipe.stages[:2])
    with pytest.raises(RecipeError, match=r"the stages do not end in its rules, for modules transformer\.wte"):
        compress_and_heal(tiny("gpt2"), short, WINDOWS, SHORT)
    with pytest.raises(RecipeError, match="it has no heal"):
        compress_and_heal(tiny("gpt2"), replace(recipe, heal=None), WINDOWS, SHORT)
    with pytest.raises(ValueError, match="steps=2 for 3 stages"):
        compress_and_heal(tiny("gpt2"), recipe, WINDOWS, Budget(steps=2))


# ---- the folder


def test_a_finished_run_is_read_not_repeated(tmp_path, monkeypatch):
    student, teacher = models(dtype=torch.float32)
    history = heal(student, teacher, WINDOWS, LOGITS, SHORT, tmp_path)
    assert read_history(tmp_path / "history.csv").rows == history.rows
    monkeypatch.setattr(sys.modules["tnlib.heal"], "HealTrainer", None)
    again, _ = models(dtype=torch.float32)
    assert heal(again, teacher, WINDOWS, LOGITS, replace(SHORT, save_every=2), tmp_path).rows == history.rows
    assert distance(again, student) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budget": replace(SHORT, steps=5)}, "budget.steps: 4 there, 5 here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"heal": replace(LOGITS, clip=2.0)}, "heal.clip: 1.0 there, 2.0 here"),
        ({"data": WINDOWS.flip(0)}, "data.input_ids"),
        ({"teacher": tiny("gpt2", torch.float32)}, "teacher: another model"),
    ],
)
def test_other_arguments_in_the_same_folder_are_refused(tmp_path, change, words):
    student, teacher = models(dtype=torch.float32)
    given = {"teacher": teacher, "data": WINDOWS, "heal": LOGITS, "budget": SHORT, "out": tmp_path}
    heal(student, **given)
    student, _ = models(dtype=torch.float32)
    with pytest.raises(ValueError, match=f"holds a run with other arguments .{words}"):
        heal(student, **(given | change))
    other = tiny("llama", torch.float32)
    factorize_(other, replace(RECIPE, rules=(replace(RECIPE.rules[0], init="random"), FOLDED)))
    with pytest.raises(ValueError, match="student: another model"):
        heal(other, **given)


def test_one_process_at_a_time_works_in_a_folder(tmp_path):
    student, teacher = models(dtype=torch.float32)
    with only_one(tmp_path), pytest.raises(ValueError, match="another process is at work in it"):
        heal(student, teacher, WINDOWS, LOGITS, SHORT, tmp_path)
    heal(student, teacher, WINDOWS, LOGITS, SHORT, tmp_path)


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path):
    path = tmp_path / "history.csv"
    log = Log(path)
    for step in (1, 2, 3):
        row = {"step": step, "tokens": 8 * step, "loss": 0.1 * step, "learning_rate": 1e-4, "seconds": 1.0}
        log.add(row | {"validation_nll": None if step < 3 else 0.5})
    assert read_history(path).rows == log.rows
    with path.open("a") as file:
        file.write("4,32,0.")
    assert read_history(path).rows == log.rows
    assert Log(path, step=2).rows == log.rows[:2]
    assert read_history(path).rows == log.rows[:2]


def test_the_curve_is_drawn_where_someone_watches_and_only_there(monkeypatch):
    shown = []
    handle = types.SimpleNamespace(update=lambda figure: shown.append("update"))
    monkeypatch.setattr("IPython.display.display", lambda figure, display_id: shown.append("display") or handle)
    history = tnlib.history.History([{"step": 1, "tokens": 8, "loss": 1.0, "seconds": 1.0, "validation_nll": 2.0}])
    for kernel, expected in ((None, []), (types.SimpleNamespace(_allow_stdin=False), [])):
        monkeypatch.setattr(tnlib.history, "_kernel", lambda kernel=kernel: kernel)
        Curve(history, None).draw(last=True)
        assert shown == expected
    monkeypatch.setattr(tnlib.history, "_kernel", lambda: types.SimpleNamespace(_allow_stdin=True))
    curve = Curve(history, None, pause=60)
    for last in (False, False, True):
        curve.draw(last)
    assert shown == ["display", "update"]  # the second was too soon


# ---- interruptions and ranks: see heal_worker.py


def _environment():
    path = os.pathsep.join([str(Path(tnlib.history.__file__).parents[1]), *sys.path])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    """The folder in which heal_worker.py has run all its scenarios, and what it found."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    folder = tmp_path_factory.mktemp("worker")
    worker = subprocess.run(
        [sys.executable, Path(__file__).with_name("heal_worker.py"), folder],
        capture_output=True,
        text=True,
        timeout=300,
        env=_environment(),
    )
    assert worker.returncode == 0, worker.stderr[-3000:]
    return folder, json.loads((folder / "found.json").read_text()), worker.stderr


@pytest.mark.parametrize(("way", "code"), [("kill", -9), ("interrupt", 130), ("saving", -9), ("disk", 3)])
def test_stopped_anywhere_it_ends_with_the_same_bits(worked, way, code):
    """SIGKILL or Ctrl-C at a random moment, SIGKILL while a checkpoint is written, a full disk; dropout is on."""
    folder, found, log = worked
    found = found["interruptions"]
    assert (found["codes"][way], found["again"][way]) == (code, 0), log[-3000:]
    assert "model.safetensors" not in found["left"][way]
    assert any(name.startswith("checkpoint-") for name in found["left"][way])
    assert (folder / way / "model.safetensors").read_bytes() == (
        folder / "whole" / "model.safetensors"
    ).read_bytes()
    rows, wanted = (read_history(folder / name / "history.csv").rows for name in (way, "whole"))
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in wanted]
    assert sorted(path.name for path in (folder / way).iterdir() if path.name != "error.txt") == found["left"]["whole"]


def test_no_partial_checkpoint_is_taken_for_a_whole_one(worked):
    folder, found, _ = worked
    assert "checkpoint-6.part" in found["interruptions"]["left"]["saving"]
    assert "checkpoint-6" not in found["interruptions"]["left"]["saving"]
    words = (folder / "disk" / "error.txt").read_text()
    assert "checkpoint of step 6" in words
    assert "the run goes on from step 3" in words
    assert "checkpoint-6.part" not in found["interruptions"]["left"]["disk"]


@pytest.mark.parametrize(("way", "kind"), [("ddp", "DistributedDataParallel"), ("fsdp", "FSDPLlamaForCausalLM")])
def test_two_processes_give_the_loss_curve_of_one(worked, way, kind):
    folder, found, log = worked
    assert found["ranks"]["codes"][way] == [0, 0, 0], log[-3000:]
    facts = json.loads((folder / f"{way}.json").read_text())
    assert (facts["trained"], facts["student"]) == (kind, "LlamaForCausalLM")
    wanted = read_history(folder / "one" / "history.csv").rows
    assert len(facts["rows"]) == len(wanted) == 5
    for row, other in zip(facts["rows"], wanted):
        row, other = ({k: v for k, v in r.items() if k != "seconds" and v is not None} for r in (row, other))
        assert row == pytest.approx(other, rel=2e-5)  # float32 sums in another order, 12 steps of AdamW
    one, two = (tnlib.resume.load_file(folder / name / "model.safetensors") for name in ("one", way))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-3
    loaded = weights(AutoModelForCausalLM.from_pretrained(folder / way, dtype=torch.float32))
    assert loaded.keys() < two.keys()  # the folder is a checkpoint like any other; guards are no parameters
    assert all(torch.equal(loaded[name], two[name]) for name in loaded)


def test_a_sharded_run_resumes_as_well(worked):
    folder, found, log = worked
    assert found["ranks"]["codes"]["fsdp stopped"] == [9, 9]
    assert found["ranks"]["codes"]["fsdp again"] == [0, 0], log[-3000:]
    one, two = (folder / name / "model.safetensors" for name in ("fsdp", "fsdp-again"))
    assert one.read_bytes() == two.read_bytes()
    rows, wanted = (json.loads((folder / f"{name}.json").read_text())["rows"] for name in ("fsdp-again", "fsdp"))
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in wanted]
