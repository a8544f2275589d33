"""The command tnlib: what it prints, how it ends, and that it does what the library does."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from tiny import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import tnlib.stream
from tnlib import console
from tnlib.cli import COMMANDS, Lazy, group, main
from tnlib.console import Lines
from tnlib.evaluate import perplexity
from tnlib.harness import Benchmark
from tnlib.heal import heal
from tnlib.low_rank import LowRank
from tnlib.named import BASES, named_recipe
from tnlib.papers import papers, skeleton
from tnlib.quant import Quantize
from tnlib.quantize import quantize_
from tnlib.recipe import Recipe, Rule
from tnlib.resume import weights
from tnlib.saved import open_model
from tnlib.surgery import factorize_
from tnlib.token_file import load_windows
from tnlib.treatment import Budget, Heal

ROOT = Path(__file__).resolve().parent.parent
MINE = Recipe(name="mine", rules=(Rule(where="mlp", form=LowRank(kept=0.5)),))
pytestmark = pytest.mark.usefixtures("one_thread")


def tn(*arguments):
    """Exit code, standard output and standard error of a command line."""
    done = CliRunner().invoke(group, [str(part) for part in arguments])
    return done.exit_code, done.stdout, done.stderr


def asked(*arguments):
    """What a command line prints with --json; it must succeed."""
    code, out, said = tn(*arguments, "--json")
    assert code == 0, said
    return json.loads(out)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense checkpoint with a tokenizer, a text of 4,000 words in it, and a recipe as JSON."""
    root = tmp_path_factory.mktemp("place")
    tiny("llama", torch.float32).save_pretrained(root / "dense")
    words = Tokenizer(models.WordLevel({f"w{k}": k for k in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(root / "dense")
    drawn = torch.randint(96, (400, 10), generator=torch.Generator().manual_seed(0))
    (root / "text.txt").write_text("\n".join(" ".join(f"w{k}" for k in line) for line in drawn.tolist()) + "\n")
    tiny("bert", torch.float32).save_pretrained(root / "encoder")
    (root / "mine.json").write_text(json.dumps(MINE.to_dict()))
    assert tn("compress", root / "dense", "--recipe", root / "mine.json", "--out", root / "small")[0] == 0
    return root


def in_memory(place, recipe=MINE):
    model = AutoModelForCausalLM.from_pretrained(place / "dense").eval()
    factorize_(model, recipe)
    return model


def windows_of(place, split, context=32, tokens=None):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place / "dense")
    return load_windows(str(place / "text.txt"), tokenizer, context, split, tokens)


def same(one, other):
    a, b = weights(one), weights(other)
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# --- the group ----------------------------------------------------------------------------------------------------------


def test_help_and_import_load_nothing_heavy():
    code = """
        import sys, tnlib
        from tnlib.cli import main
        assert main(["--help"]) == 0
        print(sorted({"torch", "transformers", "numpy", "papermill", "joblib", "matplotlib"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", re.sub("^ {8}", "", code, flags=re.M).strip()], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_readme_shows_the_real_help():
    code, out, _ = tn("--help")
    assert code == 0
    assert f"```\n$ tnlib --help\n{out}```" in (ROOT / "README.md").read_text("utf-8")


def test_every_command_in_the_readme_parses():
    """The examples of the section: known commands, known options."""
    section = (ROOT / "README.md").read_text("utf-8").split("## Command line")[1].split("\n## ")[0]
    examples = re.findall(r"^tnlib (\w+) ?(.*?)(?:  +#.*)?$", section, re.M)
    assert {name for name, _ in examples} == set(COMMANDS)
    for name, rest in examples:
        command = group.get_command(None, name)
        known = {flag for option in command.params for flag in option.opts}
        assert set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", f" {rest}")) <= known, f"{name} {rest}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_documented(name):
    command = group.get_command(None, name)
    assert command.help
    assert [option.name for option in command.params if isinstance(option, click.Option) and not option.help] == []
    code, out, _ = tn(name, "--help")
    assert code == 0
    assert "--json" in out
    assert "--debug" in out


def test_each_public_name_works_without_the_extras():
    """As `pip install tnlib` leaves it: nothing of any extra can be imported."""
    code = """
        import importlib.machinery, sys
        class Without(importlib.machinery.PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                return None if name.split(".")[0] in LOST else super().find_spec(name, path, target)
        LOST = {"matplotlib", "IPython", "ipywidgets", "papermill", "nbformat", "nbconvert", "joblib", "mistune", "distributed",
                "dask", "torchao", "triton", "lm_eval", "tensorly", "pytest"}
        sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Without
        import tnlib
        from tnlib.cli import COMMANDS, main
        notebooks = {"explore", "figures", "forest"}
        for module, names in tnlib._PUBLIC.items():
            if module not in notebooks:
                for name in names:
                    getattr(tnlib, name)
        for name in COMMANDS:
            assert main([name, "--help"]) == 0
        assert main(["plan", "gpt2", "--recipe", "krony-81m"]) == 0
    """
    done = subprocess.run([sys.executable, "-c", re.sub("^ {8}", "", code, flags=re.M).strip()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_without_the_notebooks_extra_run_says_what_to_install(monkeypatch, name):
    found = console.importlib.util.find_spec
    monkeypatch.setattr(console.importlib.util, "find_spec", lambda n: None if n in ("papermill", "joblib") else found(n))
    code, _, said = tn(name, "20")
    assert code == 1
    assert re.search("(?s)needs joblib, papermill, which are not installed.*pip install 'tnlib.notebooks.'", said)


# --- errors, JSON, progress ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["plan", "gpt2", "--recipe", "krony-82m"], 2, "neither a paper's nor a file. Did you mean 'krony-"),
        (["plan", "gpt2", "--recipe", "krony-81m", "--kept", "1.5"], 2, "got kept=1.5; needed a share"),
        (["recipes", "nope"], 2, "no such recipe; needed one of krony-81m"),
        (["plan"], 2, "Missing argument 'MODEL'"),
        (["plan", "gpt2"], 2, "--recipe says what to do"),
        (["paln"], 2, "No such command 'paln'"),
        (["compress", "./nowhere", "--recipe", "krony-81m", "--out", "x"], 1, "no such file or folder"),
        (["eval", "gpt2"], 2, "nothing to judge on"),
        (["eval", "ENCODER", "--data", "x"], 2, "is a BertForMaskedLM, which predicts no next token"),
        (["bench", "ENCODER"], 2, "is a BertForMaskedLM, which predicts no next token"),
        (["heal", "nowhere", "--data", "x", "--steps", "1", "--out", "y"], 2, "no folder of tnlib compress"),
    ],
)
def test_refusals_are_sentences(arguments, code, words, place):
    found, out, said = tn(*(place / "encoder" if part == "ENCODER" else part for part in arguments))
    assert found == code
    assert words in said
    assert "Traceback" not in said + out


def test_a_bad_recipe_file_is_named(tmp_path):
    for text, words in [("{", "needed JSON"), ("[]", "got a list"), ('{"name": "x", "rulez": []}', "unknown rulez")]:
        (tmp_path / "bad.json").write_text(text)
        code, _, said = tn("plan", "gpt2", "--recipe", tmp_path / "bad.json")
        assert code == 2
        assert words in said


@click.command()
@click.argument("kind")
@console.command(resumes=True)
def ends(kind):
    """Ends as it is told."""
    print("noise from a library")
    errors = {"value": ValueError("needed another value"), "os": OSError("no room"), "bug": TypeError("odd")}
    errors["stop"] = KeyboardInterrupt()
    if kind in errors:
        raise errors[kind]
    return console.Answer({"half": float("nan"), "path": Path("a"), "form": LowRank(rank=2)}, "text", code=1 if kind == "part" else 0)


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("value", 2, "error: needed another value"),
        ("os", 1, "error: no room"),
        ("bug", 1, "error: TypeError: odd. Nothing was meant to end so; --debug shows"),
        ("stop", 130, "stopped; the same command goes on from here"),
        ("part", 1, ""),
        ("well", 0, ""),
    ],
)
def test_each_way_of_ending_has_its_code_and_json_stays_json(kind, code, said):
    plain = CliRunner().invoke(ends, [kind])
    assert (plain.exit_code, said in plain.stderr) == (code, True)
    assert "Traceback" not in plain.stderr
    noted = CliRunner().invoke(ends, [kind, "--json"])
    found = json.loads(noted.stdout)
    assert noted.exit_code == code
    assert "noise from a library" in noted.stderr
    if said:
        assert found["error"]["code"] == code
    else:
        assert found == {"half": None, "path": "a", "form": {"rank": 2, "kept": None}}
    debug = CliRunner().invoke(ends, [kind, "--debug"])
    assert ("Traceback" in debug.stderr) == (kind in ("value", "os", "bug"))


def test_main_returns_the_code_of_every_way_of_ending(monkeypatch, capsys):
    assert main(["recipes"]) == 0
    assert main(["--help"]) == 0
    assert main(["recipes", "nope"]) == 2
    assert main(["recipes", "--nope"]) == 2
    assert "No such option" in capsys.readouterr().err
    monkeypatch.setattr(Lazy, "get_command", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["recipes"]) == 130


def test_a_reader_that_has_enough_is_no_traceback():
    line = f"{sys.executable} -m tnlib recipes compactifai | head -c 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "c"
    assert "Traceback" not in done.stderr


def test_run_lists_as_json():
    rows = asked("run", "--list", "02")
    assert [(row["name"], row["parameters"]["SCALE"]) for row in rows] == [("02_van_loan", "smoke")]


def test_bars_are_plain_lines_in_a_log(monkeypatch):
    from tqdm import tqdm

    class Log(list):
        def write(self, text):
            self.append(text)

        def flush(self):
            pass

    log = Log()
    lines = Lines(log)
    print("before", file=lines)
    for _ in tqdm(range(3), "work", file=lines, mininterval=0):
        pass
    print("after", file=lines)
    text = "".join(log)
    assert re.fullmatch(r"before\nwork: 100% 3/3 \[.*\]\nafter\n", text), text
    monkeypatch.setattr(console, "SAY_EVERY", -1)
    for _ in tqdm(range(3), "work", file=lines, mininterval=0):
        pass
    assert "work:  67% 2/3" in "".join(log)
    assert "\r" not in "".join(log)


# --- recipes, plan, assets ----------------------------------------------------------------------------------------------


def test_recipes_are_listed_with_source_and_size_and_printed_in_full():
    rows = {row["name"]: row for row in asked("recipes")}
    assert set(rows) == set(papers)
    assert rows["krony-81m"]["parameters"] == 81_972_576
    assert "2412.12351" in rows["krony-81m"]["source"]
    assert Recipe.from_dict(asked("recipes", "compactifai")) == papers["compactifai"]
    code, out, _ = tn("recipes", "krony-81m")
    assert code == 0
    assert "81,972,576 parameters" in out


def test_plan_reads_no_weights(place, tmp_path):
    assert asked("plan", "gpt2", "--recipe", "krony-81m")["total"] == 81_972_576
    (tmp_path / "config.json").write_bytes((place / "dense" / "config.json").read_bytes())
    found = asked("plan", tmp_path, "--recipe", place / "mine.json")
    assert found["total"] == sum(p.numel() for p in in_memory(place).parameters())
    assert asked("plan", tmp_path, "--recipe", place / "mine.json", "--kept", "0.3")["kept"] < 0.3 < found["kept"]
    assert asked("plan", tmp_path, "--recipe", "krony-96m")["recipe"] == "krony-96m", "a paper's recipe is scaled to another model"
    assert {row["form"] for row in asked("plan", place / "small")["layers"]} == {"LowRank(rank=8)"}


def test_bases_are_those_of_skeleton_and_other_names_are_asked_of_the_hub(monkeypatch):
    assert all(sum(1 for _ in skeleton(name).parameters()) for name in BASES)
    monkeypatch.setattr("tnlib.named.skeleton_of", lambda name: (_ for _ in ()).throw(OSError(f"no {name}\nlong story")))
    code, _, said = tn("plan", "gpt3", "--recipe", "krony-81m")
    assert code == 1
    assert re.search("(?s)model 'gpt3': no folder, and the hub gave: no gpt3\n  Needed: .*distilgpt2.*minilm-l6", said)


def test_a_recipe_named_by_its_file_is_the_recipe(tmp_path):
    for name, recipe in papers.items():
        (tmp_path / "r.json").write_text(json.dumps(asked("recipes", name)))
        assert named_recipe(str(tmp_path / "r.json"), skeleton(recipe.base)) == recipe
    halved = named_recipe("compactifai", skeleton("gpt2"), 0.3)
    assert {rule.form.kept for rule in halved.rules} == {0.3}


def test_assets_are_listed_with_their_place(tmp_path, monkeypatch):
    monkeypatch.setenv("TNLIB_CACHE", str(tmp_path))
    found = asked("assets")
    assert found["cache"] == str(tmp_path)
    assert {row["name"]: row["fetched"] for row in found["assets"]} == {"smollm2-135m": False, "minilm-l6": False, "rotten-tomatoes": False}
    (tmp_path / "local").mkdir()
    assert asked("assets", tmp_path / "local") == {str(tmp_path / "local"): str(tmp_path / "local")}
    code, _, said = tn("assets", "minilm-l7/x/y")
    assert code == 1
    assert "With no hub needed there are" in said


# --- compress, heal, eval, bench ----------------------------------------------------------------------------------------


def test_compress_equals_factorize_in_memory(place):
    assert same(open_model(place / "small"), in_memory(place))
    found = asked("compress", place / "dense", "--recipe", place / "mine.json", "--out", place / "small")
    assert found["bytes"] == sum(path.stat().st_size for path in (place / "small").glob("*.safetensors"))
    assert len(found["errors"]) == 6
    code, _, said = tn("compress", place / "dense", "--recipe", place / "mine.json", "--out", place / "small", "--seed", 1)
    assert code == 2
    assert "of another run (another seed" in said
    code, _, said = tn("compress", place / "small", "--recipe", place / "mine.json", "--out", place / "twice")
    assert code == 2
    assert "compressed already" in said


def test_compress_stopped_by_ctrl_c_goes_on(place, tmp_path, monkeypatch):
    save, written = tnlib.stream.save_file, []

    def stopped(tensors, path, **more):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        save(tensors, path, **more)

    line = ["compress", place / "dense", "--recipe", place / "mine.json", "--out", tmp_path / "out", "--shard-mb", 0]
    monkeypatch.setattr(tnlib.stream, "save_file", stopped)
    code, _, said = tn(*line)
    assert code == 130
    assert "stopped; the same command goes on from here" in said
    monkeypatch.setattr(tnlib.stream, "save_file", lambda *a, **more: written.append(a[1]) or save(*a, **more))
    assert tn(*line)[0] == 0
    assert len(set(written)) == len(written), "no shard twice"
    assert same(open_model(tmp_path / "out"), in_memory(place))


def test_compress_fits_to_a_text(place, tmp_path):
    line = ["compress", place / "dense", "--recipe", place / "mine.json", "--out", tmp_path / "out"]
    found = asked(*line, "--calibrate", place / "text.txt", "--tokens", 512, "--context", 32)
    assert found["mean_error"] > asked("compress", place / "dense", "--recipe", place / "mine.json", "--out", place / "small")["mean_error"]
    test = windows_of(place, "test")
    assert (tmp_path / "out.calibration").is_dir()
    assert perplexity(open_model(tmp_path / "out"), test).nll != perplexity(in_memory(place), test).nll


@pytest.mark.parametrize("bits", [4, 8])
def test_compress_quantizes(place, tmp_path, bits):
    line = ["compress", place / "dense", "--recipe", place / "mine.json", "--out", tmp_path / "out", "--quantize", bits]
    found = asked(*line)
    wanted = in_memory(place)
    for what, scales in (("factors", 64), ("dense", "channel")):  # rows of the embedding have 24 numbers, no whole 64
        quantize_(wanted, Quantize(bits=bits, what=what, when="after", scales=scales, start="mse", learn="frozen"))
    assert same(open_model(tmp_path / "out"), wanted)
    assert found["bytes"] < (place / "small" / "model-00001-of-00001.safetensors").stat().st_size / 2
    assert not (tmp_path / "out.float").exists()
    assert asked(*line)["bytes"] == found["bytes"]
    code, _, said = tn(*line[:-1], {4: 8, 8: 4}[bits])
    assert code == 2
    assert "of another run" in said
    assert asked("plan", tmp_path / "out")["layers"][0]["error"] is not None


def test_heal_trains_as_the_library_does_and_is_done_once(place, tmp_path):
    line = ["heal", place / "small", "--data", place / "text.txt", "--steps", 6, "--batch", 2, "--context", 32, "--out", tmp_path / "out"]
    line += ["--loss", "logits", 1, "--loss", "next_token", 0.5, "--learning-rate", 1e-3, "--train", "factors", "--device", "cpu"]
    code, _, said = tn(*line)
    assert code == 2
    assert "Give --teacher MODEL" in said
    line += ["--teacher", place / "dense"]
    found = asked(*line)
    student, how = in_memory(place), Heal(losses=(("logits", 1.0), ("next_token", 0.5)), learning_rate=1e-3, train="factors")
    teacher = AutoModelForCausalLM.from_pretrained(place / "dense").eval()
    budget = Budget(steps=6, batch=2, save_every=100)
    history = heal(student, teacher, windows_of(place, "train", tokens=6 * 2 * 32), how, budget)
    assert [row["loss"] for row in found["history"]] == [row["loss"] for row in history.rows]
    assert same(open_model(tmp_path / "out"), student)
    assert found["budget"] == asdict(budget)
    assert f"| {sum(p.numel() for p in student.parameters()):,} |" in (tmp_path / "out" / "README.md").read_text("utf-8")
    again = asked(*line)
    assert [row["seconds"] for row in again["history"]] == [row["seconds"] for row in found["history"]], "it is not trained again"


def test_eval_says_what_perplexity_says(place):
    line = ["eval", place / "small", "--data", place / "text.txt", "--context", 32, "--device", "cpu"]
    found = asked(*line, "--against", place / "dense")
    test = windows_of(place, "test", tokens=8192)
    own, dense = perplexity(in_memory(place), test), perplexity(AutoModelForCausalLM.from_pretrained(place / "dense"), test)
    assert (found["perplexity"]["nll"], found["perplexity"]["stderr"]) == (own.nll, own.stderr)
    assert found["against"]["nll"] == dense.nll
    assert found["difference"]["value"] == pytest.approx(own.nll - dense.nll, abs=1e-6)
    assert found["size"]["parameters"] == sum(p.numel() for p in in_memory(place).parameters())
    code, out, _ = tn(*line)
    assert code == 0
    assert re.search(r"perplexity [\d.]+ ± [\d.]+ \(\d+ tokens, context 32", out)


def test_eval_writes_into_the_card_what_model_card_would(place, tmp_path):
    folder = shutil.copytree(place / "small", tmp_path / "small")
    line = ["eval", folder, "--data", place / "text.txt", "--context", 32, "--device", "cpu", "--card"]
    for more in (["--tokens", 64], ["--tokens", 128, "--against", place / "dense"]):
        assert tn(*line, *more)[0] == 0
    card = (folder / "README.md").read_text("utf-8")
    own = perplexity(open_model(folder), windows_of(place, "test", tokens=128), batch=4)
    assert card.count("## Measured") == 1
    assert f"| {own} |" in card
    assert f"perplexity of {place / 'dense'}" in card
    other = (place / "small" / "README.md").read_text("utf-8")
    assert card.split("\n\n## Measured")[0] == other.split("\n\n## Load")[0]
    assert card.split("## Load")[1] == other.split("## Load")[1]
    (folder / "README.md").write_text("mine")
    code, _, said = tn(*line)
    assert code == 2
    assert "no model card of tnlib's" in said
    assert (folder / "README.md").read_text() == "mine"


def test_eval_asks_the_harness(place, monkeypatch):
    monkeypatch.setattr(console.importlib.util, "find_spec", lambda name: None)
    code, _, said = tn("eval", place / "small", "--tasks", "hellaswag")
    assert code == 1
    assert "pip install 'tnlib[eval]'" in said
    monkeypatch.setattr(console.importlib.util, "find_spec", lambda name: name)
    given = []

    def harness(model, tokenizer, tasks, **how):
        given.append((tasks, how))
        return {task: Benchmark(task=task, metric="acc,none", value=0.5, stderr=0.1, n=4, shots=2) for task in tasks}

    monkeypatch.setattr(sys.modules[Benchmark.__module__], "harness", harness)
    line = ["eval", place / "small", "--tasks", "boolq,mine", "--limit", 4, "--shots", 2, "--task-folder", place, "--batch", 3, "--device", "cpu"]
    found = asked(*line)
    assert found["tasks"]["mine"]["value"] == 0.5
    assert given == [(["boolq", "mine"], {"limit": 4, "shots": 2, "batch": 3, "folder": str(place)})]
    assert "boolq: 50.0 ± 10.0 %" in tn(*line)[1]


def test_bench_times_in_turns_and_explains_each_kind_of_layer(place):
    line = ["bench", place / "small", "--against", place / "dense", "--context", 16, "--new-tokens", 2, "--repeats", 2, "--device", "cpu"]
    found = asked(*line)
    dense, small = found["speed"].values()
    assert dense["prefill"]["ratio"] == 1
    assert set(small) == {"prefill", "decode"}
    assert small["decode"]["time"]["median_ms"] > 0
    assert {(row["layer"].rpartition(".")[2], row["tokens"]) for row in found["plans"]} == {
        (name, tokens) for name in ("gate_proj", "down_proj") for tokens in (1, 512)
    }
    code, out, _ = tn(*line, "--measure", "train", "--no-plans")
    assert code == 0
    assert re.search(r"small, train: .*tokens/s, [\d.]+ times", out)
