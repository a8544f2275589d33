"""load_pairs and summarize: what becomes of a README, whatever the source, and text that does not depend on the batch."""

import importlib.metadata
import json
import re
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tnlib import summaries
from tnlib.generate import generate
from tnlib.prose import prose, sentences
from tnlib.summaries import lead, load_pairs, summarize
from tnlib.wheel import AssetError

pytestmark = pytest.mark.usefixtures("one_thread")

MARKDOWN = """
<p align="center">
  <img src="x.svg" alt="This logo is not a sentence of the text.">
</p>

# A title that ends like a sentence.

[![A badge.](https://img.shields.io/x.svg)](https://x.org) [![Two.](y)](z)

The [foo](https://foo.org) package, by **Jane** and *Joe*, folds `maps` at https://foo.org &amp; more.
It reads [the standard][std] too!

> Quoted text counts as text as well, marks of quotation left out.

```python
print("This is code, and no sentence of the text.")
```

- an item of a list is left out, even where it ends like a sentence.

| a table | is left out, even where it ends so. |
|---------|------|

Too short.

These words do not end like a sentence does

[std]: https://std.org
"""
MARKDOWN_PROSE = [
    "The foo package, by Jane and Joe, folds maps at & more. It reads the standard too!",
    "Quoted text counts as text as well, marks of quotation left out.",
]


def test_prose_of_a_readme():
    assert prose(MARKDOWN) == MARKDOWN_PROSE
    assert prose("\n\n".join(MARKDOWN_PROSE)) == MARKDOWN_PROSE
    assert prose(MARKDOWN.replace("\n", "\r\n")) == MARKDOWN_PROSE


def test_sentences_and_lead():
    text = 'It works, e.g. here, in v. 2.0 of it! "Really?" So they say. Yes.'
    assert sentences(text) == ["It works, e.g. here, in v. 2.0 of it!", '"Really?"', "So they say.", "Yes."]
    assert lead([text, "One line\nand another.", "  No end"]) == [
        "It works, e.g. here, in v. 2.0 of it!",
        "One line",
        "No end",
    ]


def words(text):
    return " ".join(re.findall(r"\w+", text.casefold()))


@pytest.mark.parametrize("max_chars", [2000, 400])
def test_packages_of_this_installation(max_chars):
    pairs = load_pairs(max_chars=max_chars)
    assert len(pairs) > 20  # torch, transformers and what they need
    assert len(set(pairs.references)) == len(pairs)
    for text, reference in zip(pairs.texts, pairs.references):
        assert words(reference) not in words(text)
        assert len(reference.split()) >= 4
        assert 200 < len(text) <= max_chars  # 300, or cut at a word
        assert not re.search(r"https?://|\]\(|```", text), text
    assert importlib.metadata.metadata("torch")["Summary"] in pairs.references
    assert str(pairs).startswith(f"package-summaries, test: {len(pairs)} pairs, ")


def test_fewer_pairs_are_the_first_of_more():
    some, more, other = load_pairs(max_pairs=5), load_pairs(max_pairs=9), load_pairs(max_pairs=5, seed=1)
    assert more.texts[:5] == some.texts
    assert more.references[:5] == some.references
    assert load_pairs(max_pairs=5) == some
    assert len({pairs.fingerprint for pairs in (some, more, other)}) == 3


class Facts(dict):
    """Metadata of a package, as importlib.metadata gives it."""

    def get_payload(self):
        return self["text"]


def package(name, summary, text, kind="text/markdown; charset=UTF-8"):
    facts = Facts({"Name": name, "Summary": summary, "text": text, "Description-Content-Type": kind})
    return SimpleNamespace(metadata=facts)


def test_which_packages_are_taken(monkeypatch):
    prose_ = "This sentence says something about what the package is good for. " * 6
    packages = [
        package("Zeta", "Does a thing or two", f"Zeta does: a thing, or two. {prose_}"),
        package("zeta", "Another version further down the path", prose_),
        package("tnlib", "This library, which changes with us", prose_),
        package(
            "alpha",
            "Folds maps. In four ways.",
            f"Folds maps. In four ways.\n\n{prose_}\n\nAlso: folds maps. In four ways.",
        ),
        package("beta", "Too short", prose_),
        package("gamma", "Says too little of itself", "This sentence says something about what it is."),
        package("delta", "Does a thing, or two!", prose_),
        package("epsilon", "Is in another markup than Markdown", prose_, "text/x-rst"),
        package("none", None, ""),
    ]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: packages)
    summaries._packages.cache_clear()
    pairs = load_pairs()
    summaries._packages.cache_clear()
    assert pairs.references == (
        "Folds maps. In four ways.",
        "Does a thing, or two!",
    )  # Zeta's is the same: delta is first
    assert set(pairs.texts) == {prose_.strip()}


ROWS = [
    {"document": f"A document, of number {i}.\nSecond line.", "summary": f"Number\n {i}", "id": i} for i in range(7)
]


def test_local_files_and_hub_give_the_same(tmp_path, monkeypatch):
    import datasets
    import pandas

    table = pandas.DataFrame(ROWS)
    table.to_csv(tmp_path / "test.csv", index=False)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    monkeypatch.setitem(summaries.HUB, "xsum", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = [
        load_pairs(tmp_path / "test.csv"),
        load_pairs(tmp_path),
        load_pairs(tmp_path / "rows.jsonl"),
        load_pairs("xsum"),
    ]
    assert {pairs.fingerprint for pairs in found} == {found[0].fingerprint}
    assert found[0].texts == tuple(row["document"] for row in ROWS)
    assert found[0].references == tuple(f"Number {i}" for i in range(7))
    assert load_pairs(tmp_path, max_chars=15).texts[0] == "A document, of"


def test_what_load_pairs_refuses(tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_text('{"document": "a", "summary": "b"}\nnot JSON\n')
    (tmp_path / "text.csv").write_text("text,summary\na,b\n")
    (tmp_path / "empty.csv").write_text("document,summary\na,b\na,\n")
    for source, split, kind, said in [
        ("xsun", "test", AssetError, "neither a local path nor a known name; needed package-summaries"),
        ("package-summaries", "train", ValueError, "needed 'test', it has no other"),
        ("package-summaries", "dev", ValueError, "split 'dev' is unknown"),
        (tmp_path, "test", AssetError, r"holds bad.jsonl, empty.csv, text.csv; needed one file test.csv or test.jsonl"),
        (tmp_path / "bad.jsonl", "test", ValueError, r"bad.jsonl: Expecting value.*a JSON object a line"),
        (
            tmp_path / "text.csv",
            "test",
            ValueError,
            "row 1: columns text, summary lack document; needed document and summary",
        ),
        (tmp_path / "empty.csv", "test", ValueError, r"row 2: \('a', ''\); needed a document and a summary, not empty"),
    ]:
        with pytest.raises(kind, match=said):
            load_pairs(source, split)

    def unreachable(*args, **more):
        raise ConnectionError("Couldn't reach the Hub")

    import datasets

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(AssetError, match=r"the hub gave ConnectionError: Couldn't reach.*use package-summaries"):
        load_pairs("gigaword")


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word: w0 to w95, of which w1 is the end of text."""
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="w1", unk_token="w0")


def prompts(count=5):
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 20, (count,), generator=draw).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(2, 96, (size,), generator=draw).tolist()) for size in sizes]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_text_does_not_depend_on_the_batch(family, tokenizer):
    """Learned and rotary positions, in float64: padding on the left changes nothing, and order is kept."""
    model = tiny(family)
    alone = [generate(model, tokenizer, prompt, max_new_tokens=6) for prompt in prompts()]
    assert len(set(alone)) > 3
    for batch in (2, 5):
        assert generate(model, tokenizer, prompts(), max_new_tokens=6, batch=batch) == alone


def test_text_is_the_arg_max_until_the_end_of_text(tokenizer):
    model = tiny("llama")
    prompt = prompts()[0]
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    before = ids.shape[1]
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    expected = ids[0, before:].tolist()
    assert 1 not in expected
    assert generate(model, tokenizer, prompt, max_new_tokens=12) == " ".join(f"w{i}" for i in expected)
    model.generation_config.eos_token_id = expected[4]  # an end that the tokenizer does not know as one
    first = expected.index(expected[4])
    shown = " ".join(f"w{i}" for i in expected[: first + 1])
    assert generate(model, tokenizer, [prompt, *prompts()], max_new_tokens=12)[0] == shown


@pytest.mark.parametrize(
    ("prompt", "said"),
    [([], "no prompts"), (["w5", ""], "prompt 1 of 2 has no tokens"), ("w5 " * 60, "context 72, but the model has 64")],
)
def test_what_generate_refuses(prompt, said, tokenizer):
    with pytest.raises(ValueError, match=said):
        generate(tiny("gpt2"), tokenizer, prompt, max_new_tokens=12)


def test_the_prompt_and_the_chat_template(tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(
        summaries,
        "generate",
        lambda model, tokenizer, prompts, **more: asked.append((prompts, more)) or [" a "] * len(prompts),
    )
    assert summarize(None, tokenizer, ["x", "{document}"]) == ["a", "a"]
    assert asked[0][0] == ["x\n\nTL;DR:", "{document}\n\nTL;DR:"]
    assert asked[0][1]["chat"] is False
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0]['content'] }}", raising=False)
    summarize(None, tokenizer, ["x"], prompt="In short: {document} {}")
    assert asked[1] == (["In short: x {}"], {"max_new_tokens": 40, "batch": 8, "progress": False, "chat": True})
    with pytest.raises(ValueError, match=r"needed '{document}' where the text goes"):
        summarize(None, tokenizer, ["x"], prompt="Summarize: {}")


def test_a_chat_template_is_written_once(tokenizer, monkeypatch):
    template = "{% for m in messages %}w7 {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} w8{% endif %}"
    plain = generate(tiny("llama"), tokenizer, "w7 w20 w21 w8", max_new_tokens=5)
    monkeypatch.setattr(tokenizer, "chat_template", template, raising=False)
    assert generate(tiny("llama"), tokenizer, "w20 w21", max_new_tokens=5, chat=True) == plain
