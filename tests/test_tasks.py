"""tasks.py and encode.py: the published layouts, their traps, and each label on the piece it belongs to."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from tnlib import data
from tnlib.assets import AssetError, fetch, load_tokenizer
from tnlib.encode import encode_task
from tnlib.examples import split
from tnlib.tasks import GLUE, NAMES, SPLITS, Task, load_task

REAL = Path(os.environ.get("TNLIB_TEST_DATA", ""))
MNLI = "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n"
FILES = {  # name: file of the validation, its content, the texts and labels in it
    "sst2": ("dev.tsv", 'sentence\tlabel\na "quote \t1\nbad\t0\n', ('a "quote ', "bad"), (1, 0)),
    "mrpc": (
        "dev.tsv",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tone\tother\r\n0\t9\t3\ta\u2028b\tc\r\n",
        (("one", "other"), ("a\u2028b", "c")),
        (1, 0),
    ),
    "qnli": (
        "dev.tsv",
        "index\tquestion\tsentence\tlabel\n0\tWho?\tMe.\tentailment\n1\tWhy?\tNo.\tnot_entailment\n",
        (("Who?", "Me."), ("Why?", "No.")),
        (0, 1),
    ),
    "mnli": ("dev_matched.tsv", f"{MNLI}0\tx\tp\th\tneutral\tcontradiction", (("p", "h"),), (2,)),
    "mnli-mm": ("dev_mismatched.tsv", f"{MNLI}0\tx\tq\th\tneutral\tentailment\n", (("q", "h"),), (0,)),
}
ATIS = {
    "train": (["fly to boston", "fares"], ["O O B-city", "B-x"], ["flight", "fare#flight"]),
    "dev": (["fares to boston"], ["B-new O B-city"], ["flight"]),
    "test": (["fly"], ["O"], ["day"]),
}


def save_atis(folder, parts=ATIS):
    for name, columns in parts.items():
        (folder / name).mkdir()
        for file, lines in zip(("seq.in", "seq.out", "label"), columns):
            (folder / name / file).write_text("".join(f"{line}\n" for line in lines))
    return folder


def wordpiece():
    """Lower-case WordPiece of letters and a few words, with [CLS] and [SEP] as BERT has them."""
    letters = [f"{prefix}{chr(97 + i)}" for prefix in ("", "##") for i in range(26)]
    vocab = {
        t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "to", "fly", "boston", ".", "'", *letters])
    }
    raw = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = ("input_ids", "token_type_ids", "attention_mask")
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", model_input_names=names)


def byte_level():
    """Byte-level BPE, whose pieces begin with the space before a word, and may be that space only."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([" to to to boston boston fly" * 9], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="Ā")


ENDS = {"[SEP]", "[PAD]", "Ā"}
TOKENIZERS = {"wordpiece": wordpiece(), "byte-level": byte_level()}


def slots(texts, labels, names=("O", "B-city", "I-city")):
    return Task(name="toy", split="train", texts=texts, labels=labels, names=names, level="token")


@pytest.mark.parametrize("name", FILES)
def test_glue_files(tmp_path, name):
    file, content, texts, labels = FILES[name]
    (tmp_path / file).write_text(content, encoding="utf-8", newline="")
    task = load_task(name, "validation", tmp_path)
    assert (task.texts, task.labels, task.level) == (texts, labels, "text")
    (tmp_path / "train.tsv").write_text(content, encoding="utf-8", newline="")
    assert load_task(name, "train", str(tmp_path)).texts == texts
    assert task.metrics == (("accuracy", "f1") if name == "mrpc" else ("accuracy",))


@pytest.mark.parametrize("name", GLUE)
def test_glue_from_the_hub(monkeypatch, name):
    import datasets

    asked = []

    def rows(*args, **more):
        asked.append((*args, more["split"]))
        columns = GLUE[name][3]
        return [{column: f"{column} {i}" for column in columns} | {"label": i % 2, "idx": i} for i in range(3)]

    monkeypatch.setattr(datasets, "load_dataset", rows)
    task = load_task(name, "validation")
    load_task(name)
    ends = {"mnli": "_matched", "mnli-mm": "_mismatched"}
    assert asked[0] == ("nyu-mll/glue", name.removesuffix("-mm"), f"validation{ends.get(name, '')}")
    assert asked[1][-1] == "train"
    assert task.labels == (0, 1, 0)
    assert task.texts[2] in (
        "sentence 2",
        ("sentence1 2", "sentence2 2"),
        ("question 2", "sentence 2"),
        ("premise 2", "hypothesis 2"),
    )


def test_atis_keeps_the_classes_of_training(tmp_path):
    save_atis(tmp_path)
    intents = {split: load_task("atis-intents", split, tmp_path) for split in SPLITS}
    tags = {split: load_task("atis-slots", split, tmp_path) for split in SPLITS}
    assert {task.names for task in intents.values()} == {("fare#flight", "flight", "unseen")}
    assert {task.names for task in tags.values()} == {("B-city", "B-x", "O", "unseen")}
    assert [task.labels for task in intents.values()] == [(1, 0), (1,), (2,)]
    assert [task.labels for task in tags.values()] == [((2, 2, 0), (1,)), ((3, 2, 0),), ((2,),)]
    assert tags["train"].texts == (("fly", "to", "boston"), ("fares",))
    assert tags["train"].metrics == ("slot_f1", "accuracy")
    assert intents["train"].texts == ("fly to boston", "fares")


def test_atis_from_the_hub(tmp_path, monkeypatch):
    import datasets

    def rows(repository, configuration, split):
        assert (repository, configuration) == ("tuetschek/atis", None)
        return [dict(zip(("text", "slots", "intent"), row)) for row in zip(*ATIS[split])]

    monkeypatch.setattr(datasets, "load_dataset", rows)
    save_atis(tmp_path)
    for name in ("atis-intents", "atis-slots"):
        assert load_task(name, "test") == load_task(name, "test", tmp_path)
    with pytest.raises(ValueError, match=r"split 'validation': the hub has train and test only.*a folder with dev"):
        load_task("atis-slots", "validation")


@pytest.mark.asset
def test_reviews_are_a_task():
    try:
        fetch("rotten-tomatoes")
    except AssetError as error:
        pytest.skip(str(error))
    task = load_task("rotten-tomatoes", "test")
    assert (list(task.texts), list(task.labels)) == data.load_reviews("test")
    assert task.names[task.labels[0]] == "fresh"


def test_fewer_examples_are_the_first_of_more(tmp_path):
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\n" + "".join(f"text {i}\t{i % 2}\n" for i in range(50)))
    some, more, all_ = (load_task("sst2", "validation", tmp_path, n, seed=3) for n in (7, 20, 99))
    assert len(some) == 7
    assert more.texts[:7] == some.texts
    assert sorted(all_.texts) == sorted(load_task("sst2", "validation", tmp_path).texts)
    assert all(int(text[5:]) % 2 == label for text, label in zip(all_.texts, all_.labels))
    assert load_task("sst2", "validation", tmp_path, 7, seed=4).texts != some.texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sst2", "", r"dev.tsv, line 1: columns  lack sentence, label; needed GLUE's header"),
        ("sst2", "index\tsentence\n0\tx\n", r"line 1: columns index, sentence lack label"),
        ("sst2", "sentence\tlabel\nx\t0\ny\n", r"line 3: 1 cells; needed 2 cells"),
        ("sst2", "sentence\tlabel\nx\t2\n", r"line 2: label '2'.*negative, 0, positive, 1. Correct the line"),
        ("qnli", "question\tsentence\tlabel\na\tb\t-\n", r"line 2: label '-'"),
        ("sst2", "sentence\tlabel\n", r"'sst2', split 'validation': 0 texts and 0 labels; needed as many of each"),
    ],
)
def test_malformed_tables_name_the_line(tmp_path, name, content, message):
    (tmp_path / "dev.tsv").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_task(name, "validation", tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ((["a b", "c"], ["O O", "O O"], ["x", "y"]), r"train, line 2: 1 words, 2 slots.*needed a slot for each word"),
        ((["a", "b"], ["O"], ["x", "y"]), r"train, line 2: lines are seq.in 2, seq.out 1, label 2; needed as many"),
        ((["a", "", "c"], ["O", "", "O"], ["x", "y", "z"]), r"line 2: 0 words"),
        ((["a"], ["O"], [""]), r"line 1: 1 words, 1 slots, intent ''"),
    ],
)
def test_malformed_atis_names_the_line(tmp_path, columns, message):
    save_atis(tmp_path, {"train": columns})
    with pytest.raises(ValueError, match=message):
        load_task("atis-slots", "train", tmp_path)


def test_what_cannot_be_had(tmp_path, monkeypatch):
    import datasets

    def unreachable(*args, **more):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for name in NAMES[1:]:
        with pytest.raises(AssetError, match=r"the hub gave ConnectionError: Couldn't.*give load_task a folder"):
            load_task(name)
        with pytest.raises(AssetError, match=r"FileNotFoundError, its folder holds nothing; needed the layout"):
            load_task(name, folder=tmp_path / "none")
    for name in GLUE:
        with pytest.raises(
            ValueError, match=r"split 'test', whose labels GLUE keeps back \(-1 on the hub\).*'validation'"
        ):
            load_task(name, "test")
    with pytest.raises(ValueError, match="split 'dev' is unknown; needed one of train, validation, test"):
        load_task("sst2", "dev")
    with pytest.raises(ValueError, match=r"'sst-2'.*unknown name; needed one of rotten-tomatoes, sst2"):
        load_task("sst-2")
    with pytest.raises(ValueError, match="Leave folder out"):
        load_task("rotten-tomatoes", folder=tmp_path)
    (tmp_path / "dev.tsv").write_bytes("sentence\tlabel\ncafé\t1".encode("latin-1"))
    with pytest.raises(ValueError, match=r"dev.tsv: byte 18 is not UTF-8"):
        load_task("sst2", "validation", tmp_path)


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        ((), (), "0 texts and 0 labels"),
        ((("a",),), ((0,), (1,)), "1 texts and 2 labels"),
        ((("a",), ("b", "c")), ((0,), (1,)), "example 1: 2 words and 1 labels"),
        ((("a",),), ((3,),), r"example 0: label 3 with 3 names; needed 0 to 2"),
        ((("a",),), ((-1,),), r"label -1.*take split 'validation'"),
    ],
)
def test_tasks_that_do_not_fit(texts, labels, message):
    with pytest.raises(ValueError, match=message):
        slots(texts, labels)


def test_levels_that_are_none():
    with pytest.raises(ValueError, match="level 'word'; needed 'text' or 'token'"):
        Task(name="toy", split="train", texts=("a",), labels=(0,), names=("x",), level="word")


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.from_regex(r"(to|fly|boston|[a-z]{1,9}|st\.|o'k)", fullmatch=True), min_size=1), min_size=1)
)
def test_each_label_is_on_the_piece_that_begins_its_word(kind, sentences):
    tokenizer = TOKENIZERS[kind]
    labels = tuple(tuple(i % 3 for i in range(len(words))) for words in sentences)
    found = encode_task(slots(tuple(map(tuple, sentences)), labels), tokenizer, max_length=10_000)
    for ids, mask, row, words, own in zip(
        *(found[k] for k in ("input_ids", "attention_mask", "labels")), sentences, labels
    ):
        assert row[row != -100].tolist() == list(own)
        assert ids[mask == 1].tolist() == tokenizer(" ".join(words))["input_ids"]
        starts = (row != -100).nonzero().flatten().tolist()
        for start, end, word in zip(starts, [*starts[1:], len(ids)], words):
            pieces = tokenizer.convert_ids_to_tokens(ids[start:end])
            assert "".join(piece.strip("Ġ#") for piece in pieces if piece not in ENDS) == word


def test_words_cut_off_have_no_label():
    task = slots((("fly", "to", "abc", "boston"), ("to",)), ((1, 2, 1, 2), (2,)))
    found = encode_task(task, TOKENIZERS["wordpiece"], max_length=6)  # [CLS] fly to a ##b [SEP]
    assert found["labels"].tolist() == [[-100, 1, 2, 1, -100, -100], [-100, 2, -100, -100, -100, -100]]
    assert found["attention_mask"].sum(1).tolist() == [6, 3]


def test_texts_and_pairs_have_a_label_each():
    task = Task(name="toy", split="train", texts=("fly", "fly to boston"), labels=(1, 0), names=("x", "y"))
    found = encode_task(task, TOKENIZERS["wordpiece"])
    assert found["labels"].tolist() == [1, 0]
    assert found["input_ids"].tolist() == [[2, 5, 3, 0, 0], [2, 5, 4, 6, 3]]
    assert {tensor.dtype for tensor in found.values()} == {torch.int64}
    train, _ = split(found)  # as heal() reads it
    assert train["labels"].tolist() == [1, 0]
    pairs = Task(name="toy", split="train", texts=(("fly", "to boston"),), labels=(1,), names=("x", "y"))
    found = encode_task(pairs, TOKENIZERS["wordpiece"])
    assert found["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]


class Slow(PreTrainedTokenizer):
    """A tokenizer in Python, which knows no offsets."""

    vocab_size = 1

    def get_vocab(self):
        return {"a": 0}


def test_tokenizers_that_will_not_do():
    task = slots((("fly", "\u200b"),), ((0, 1),))
    with pytest.raises(ValueError, match=r"example 0: the tokenizer makes no piece of the word '\\u200b'"):
        encode_task(task, TOKENIZERS["wordpiece"])
    with pytest.raises(ValueError, match="a slow tokenizer does not tell where a piece stands; needed a fast one"):
        encode_task(task, Slow(pad_token="a"))
    bare = byte_level()
    bare.pad_token = None
    with pytest.raises(ValueError, match=r"no padding token.*tokenizer.pad_token = tokenizer.eos_token"):
        encode_task(task, bare)


@pytest.mark.asset
@pytest.mark.skipif(not (REAL / "atis").is_dir(), reason="TNLIB_TEST_DATA names no folder with atis")
@pytest.mark.parametrize(
    ("split", "examples", "words", "intents", "tags"),
    [("train", 4478, 50497, 0, 0), ("validation", 500, 5703, 1, 1), ("test", 893, 9164, 5, 6)],
)
def test_real_atis(split, examples, words, intents, tags):
    by_intent = load_task("atis-intents", split, REAL / "atis")
    task = load_task("atis-slots", split, REAL / "atis")
    assert (len(by_intent.names), len(task.names)) == (22, 121)  # 21 and 120, as published, and "unseen"
    assert (len(task), by_intent.labels.count(21), sum(row.count(120) for row in task.labels)) == (
        examples,
        intents,
        tags,
    )
    found = encode_task(task, load_tokenizer("minilm-l6"))
    assert int((found["labels"] != -100).sum()) == words


@pytest.mark.skipif(not (REAL / "sst2").is_dir(), reason="TNLIB_TEST_DATA names no folder with sst2")
def test_phrases_of_sst2_are_no_held_out_set():
    train, dev = (load_task("sst2", split, REAL / "sst2").texts for split in ("train", "validation"))
    assert (len(train), len(dev)) == (60614, 6735)
    known = {text.strip() for text in train}
    assert sum(text.strip() in known for text in dev) == 75
    joined = "\n".join(f" {text} " for text in known)
    assert sum(f" {text.strip()} " in joined for text in dev[:500]) == 429  # 5969 of all, as load_task says; slow
