"""Documents and their one-sentence summaries, and a language model that is asked to write such summaries."""

import csv
import functools
import hashlib
import importlib.metadata
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from tnlib.generate import generate
from tnlib.hub import hub_rows
from tnlib.prose import prose, sentences
from tnlib.wheel import AssetError

PARQUET = "refs/convert/parquet"  # the hub's own copy of a data set whose loading script `datasets` no longer runs
HUB = {"xsum": "EdinburghNLP/xsum", "gigaword": "Harvard/gigaword"}
COLUMNS = ("document", "summary")
FEWEST_WORDS, FEWEST_CHARS = 4, 300  # of a package's summary and description: less says too little to be summarized
CHAT_PROMPT = "Summarize the following text in one short sentence.\n\n{document}"
PLAIN_PROMPT = "{document}\n\nTL;DR:"


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Texts and a reference summary of each; fingerprint tells whether two runs had the same ones."""

    name: str
    split: str
    texts: tuple
    references: tuple

    @property
    def fingerprint(self):
        return hashlib.sha256(json.dumps([self.texts, self.references]).encode()).hexdigest()[:16]

    def __len__(self):
        return len(self.texts)

    def __str__(self):
        words = sum(len(text.split()) for text in self.texts) / len(self)
        return (
            f"{self.name}, {self.split}: {len(self)} pairs, {words:.0f} words a text (fingerprint {self.fingerprint})"
        )


def load_pairs(source="package-summaries", split="test", max_pairs=None, seed=0, max_chars=2000):
    """Texts with a summary of each.

    source: "package-summaries", the installed Python packages that describe themselves in Markdown: the prose of each
        one's description is the text, its one-line summary the reference. A sentence of the text that holds the summary
        word for word is left out, as are packages with little prose or a summary of fewer than four words. It needs no
        network, and depends on what is installed and in which version: compare scores only where the fingerprint is the
        same, as constraints.txt makes it;
        a file .jsonl or .csv with columns document and summary, or a folder with one named for the split, such as
        test.csv;
        "xsum", "gigaword" or a hub repository "owner/name" with such columns
    split: "train", "validation" or "test"; packages and a single file are "test" as a whole
    max_pairs: no more than so many, drawn with `seed` and in its order; None: all, packages by name, others as in the
        file
    max_chars: a text is cut before the word that passes this length
    Returns: Pairs
    Raises: ValueError for a split, row or column that is not as needed; AssetError if a file or the hub cannot be had
    Source: Narayan et al. 2018 (XSum), Rush et al. 2015 (Gigaword); packages by importlib.metadata.
    Exact: no package's text holds its summary, and fewer pairs with the same seed are the first of more.
    """
    rows = _rows(source, split)
    where = f"load_pairs({str(source)!r}), split {split!r}"
    for number, row in enumerate(rows, start=1):
        if not all(isinstance(text, str) and text.strip() for text in row):
            raise ValueError(
                f"{where}, row {number}: {row}; needed a document and a summary, not empty. Correct the row."
            )
    if not rows:
        raise ValueError(f"{where}: no pairs; needed one or more. Name another source, or install tnlib[notebooks].")
    if max_pairs is not None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:max_pairs].tolist()
        rows = [rows[row] for row in order]
    texts, references = zip(*((_cut(text.strip(), max_chars), " ".join(summary.split())) for text, summary in rows))
    return Pairs(name=str(source), split=split, texts=texts, references=references)


def summarize(model, tokenizer, texts, prompt=None, max_new_tokens=40, batch=8, progress=False):
    """One summary of each text, greedily.

    prompt: holds "{document}", where the text goes; None: CHAT_PROMPT where the tokenizer has a chat template, which is
        then used, else PLAIN_PROMPT, whose TL;DR is that of Radford et al. 2019
    Returns: list of str
    Raises: ValueError for a prompt without "{document}", and as generate does
    Exact: but for rounding a summary does not depend on `batch`.
    """
    chat = getattr(tokenizer, "chat_template", None) is not None
    prompt = prompt or (CHAT_PROMPT if chat else PLAIN_PROMPT)
    if "{document}" not in prompt:
        raise ValueError(f"summarize: prompt {prompt!r}; needed '{{document}}' where the text goes. Add it.")
    prompts = [prompt.replace("{document}", text) for text in texts]
    more = {"max_new_tokens": max_new_tokens, "batch": batch, "progress": progress}
    return [text.strip() for text in generate(model, tokenizer, prompts, chat=chat, **more)]


def lead(texts):
    """The first sentence of each text: the baseline that a summary has to beat. Exact: a sentence's lead is itself."""
    return [sentences(text.strip().partition("\n")[0])[0] for text in texts]


def _rows(source, split):
    """(document, summary) of each pair."""
    path = Path(source).expanduser()
    if split not in ("train", "validation", "test"):
        raise ValueError(f"load_pairs: split {split!r} is unknown; needed train, validation or test. Choose one.")
    if split != "test" and (source == "package-summaries" or path.is_file()):
        raise ValueError(
            f"load_pairs({str(source)!r}): split {split!r}; needed 'test', it has no other. Leave split out."
        )
    if source == "package-summaries":
        return list(_packages())
    if path.is_dir():
        found = sorted(file for kind in ("csv", "jsonl") for file in path.glob(f"{split}.{kind}"))
        if len(found) != 1:
            there = ", ".join(sorted(file.name for file in path.iterdir())[:10]) or "nothing"
            raise AssetError(
                f"load_pairs({str(source)!r}): holds {there}; needed one file {split}.csv or {split}.jsonl. Name its file so."
            )
        path = found[0]
    if path.is_file():
        return _file(path)
    if source not in HUB and "/" not in str(source):
        raise AssetError(
            f"load_pairs({str(source)!r}): neither a local path nor a known name; needed package-summaries (no network), "
            f"{', '.join(HUB)}, a hub repository owner/name, or a file .jsonl or .csv. Correct it"
        )
    repository, more = (HUB[source], {"revision": PARQUET}) if source in HUB else (str(source), {})
    instead = "give load_pairs a local file, or use package-summaries"
    return _columns(hub_rows(repository, None, split, instead, **more), repository)


def _file(path):
    """Rows of a file .jsonl or .csv."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            rows = (
                list(csv.DictReader(file))
                if path.suffix == ".csv"
                else [json.loads(line) for line in file if line.strip()]
            )
        except ValueError as error:  # not JSON, not UTF-8
            raise ValueError(
                f"file {path}: {error}; needed UTF-8, a JSON object a line in .jsonl, or .csv with a header. Correct it."
            ) from None
    return _columns(rows, path)


def _columns(rows, where):
    """The two columns of rows that are dictionaries."""
    for number, row in enumerate(rows, start=1):
        if missing := [column for column in COLUMNS if column not in row]:
            raise ValueError(
                f"{where}, row {number}: columns {', '.join(row)} lack {', '.join(missing)}; needed document and summary. "
                "Rename its columns."
            )
    return [tuple(row[column] for column in COLUMNS) for row in rows]


def _cut(text, max_chars):
    return text if len(text) <= max_chars else text[: max_chars + 1].rpartition(" ")[0] or text[:max_chars]


@functools.cache
def _packages():
    """(description, summary) of each package whose Markdown has enough of both; of equal summaries the first."""
    about = {}
    for package in importlib.metadata.distributions():  # the first of a name is the one that Python imports
        facts = package.metadata
        about.setdefault(re.sub(r"[-_.]+", "-", facts.get("Name") or "").lower(), facts)
    found = {}
    for name in sorted(about.keys() - {"", "tnlib"}):
        summary = about[name].get("Summary") or ""
        if (about[name].get("Description-Content-Type") or "").partition(";")[0] != "text/markdown":
            continue
        text = _without(prose(about[name].get_payload() or about[name].get("Description") or ""), summary)
        if len(summary.split()) >= FEWEST_WORDS and len(text) >= FEWEST_CHARS:
            found.setdefault(_letters(summary), (text, summary))
    return tuple(found.values())


def _without(paragraphs, summary):
    """Paragraphs, one a line, without the sentences, or else the paragraphs, that hold the summary."""
    kept = (" ".join(s for s in sentences(part) if _letters(summary) not in _letters(s)) for part in paragraphs)
    return "\n".join(part for part in kept if part and _letters(summary) not in _letters(part))


def _letters(text):
    """What is left of a text when case, spaces and punctuation do not matter, a space between words."""
    return " ".join(re.findall(r"\w+", text.casefold()))
