"""Labeled tasks: sentiment, paraphrase, inference, intents and slots.

From local files in the layout in which each task is published, or from the Hugging Face hub.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tnlib.data import load_reviews
from tnlib.hub import hub_rows
from tnlib.wheel import AssetError

SPLITS = ("train", "validation", "test")
UNSEEN = "unseen"  # class of labels that the training split does not have
GLUE = {  # name: hub configuration, file and hub split of the validation, text columns in files, on the hub, label column
    "sst2": ("sst2", "", ("sentence",), ("sentence",), "label"),
    "mrpc": ("mrpc", "", ("#1 String", "#2 String"), ("sentence1", "sentence2"), "Quality"),
    "qnli": ("qnli", "", ("question", "sentence"), ("question", "sentence"), "label"),
    "mnli": ("mnli", "_matched", ("sentence1", "sentence2"), ("premise", "hypothesis"), "gold_label"),
    "mnli-mm": ("mnli", "_mismatched", ("sentence1", "sentence2"), ("premise", "hypothesis"), "gold_label"),
}
CLASSES = {  # by hub configuration, in the hub's order
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qnli": ("entailment", "not_entailment"),
    "mnli": ("entailment", "neutral", "contradiction"),
}
INSTEAD = "give load_task a folder, or use rotten-tomatoes"  # of the hub
NAMES = ("rotten-tomatoes", *GLUE, "atis-intents", "atis-slots")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Examples of a task and their classes.

    texts: str, or pairs of str; at level "token" tuples of words
    labels: a class of each text; at level "token" a tuple, a class of each word. Each indexes `names`
    metrics: as in score(), those the field quotes for this task
    Raises: ValueError when empty, or when texts, labels and names do not fit each other
    """

    name: str
    split: str
    texts: tuple
    labels: tuple
    names: tuple
    level: str = "text"  # or "token"
    metrics: tuple = ("accuracy",)

    def __post_init__(self):
        where = f"task {self.name!r}, split {self.split!r}"
        if self.level not in ("text", "token"):
            raise ValueError(f"{where}: level {self.level!r}; needed 'text' or 'token'. Correct it.")
        if not self.texts or len(self.texts) != len(self.labels):
            raise ValueError(
                f"{where}: {len(self.texts)} texts and {len(self.labels)} labels; needed as many of each, at least one. "
                "Check the file or the filter that they come from."
            )
        rows = self.labels if self.level == "token" else [(label,) for label in self.labels]
        for number, (text, row) in enumerate(zip(self.texts, rows)):
            if self.level == "token" and len(text) != len(row):
                raise ValueError(
                    f"{where}, example {number}: {len(text)} words and {len(row)} labels; needed a label for each word. Correct it."
                )
            if bad := [label for label in row if not 0 <= label < len(self.names)]:
                raise ValueError(
                    f"{where}, example {number}: label {bad[0]} with {len(self.names)} names; needed 0 to {len(self.names) - 1}. "
                    "Hub test sets without labels say -1: take split 'validation'."
                )

    def __len__(self):
        return len(self.texts)


def load_task(name, split="train", folder=None, max_examples=None, seed=0):
    """A labeled task by its name.

    name: one of NAMES. "mnli-mm" is "mnli" with the mismatched validation
    split: "train", "validation" or "test"; GLUE's tasks have no labeled test, the hub's ATIS no validation
    folder: holds train.tsv and dev.tsv (MNLI: dev_matched.tsv, dev_mismatched.tsv) as GLUE publishes them, for ATIS the
        folders train, dev and test with label, seq.in and seq.out; None: the hub
    max_examples: no more than so many, drawn with `seed` and in its order; None: all, in the order of the file
    Returns: Task. ATIS has the classes of its training split, sorted, and "unseen" for any other; "a#b" is a class of its own
    Raises: ValueError for a name, split or line that is not as needed; AssetError if a file or the hub cannot be had
    Source: Pang & Lee 2004; Wang et al. 2019 (GLUE); Hemphill et al. 1990 in the cut of Goo et al. 2018, 4478/500/893.
    Exact: names do not depend on the split, and fewer examples with the same seed are the first of more.
    A dev.tsv cut from SST-2's training phrases, as some mirrors have it, is no held-out set: of one with 6,735 phrases
    5,969 stood word for word within a training phrase. GLUE's own has 872 sentences.
    """
    _check(name, split, folder)
    if name == "rotten-tomatoes":
        texts, labels = load_reviews(split)
        task = Task(name=name, split=split, texts=tuple(texts), labels=tuple(labels), names=("rotten", "fresh"))
    else:
        read = _glue if name in GLUE else _atis
        task = read(name, split, None if folder is None else Path(folder).expanduser())
    if max_examples is None:
        return task
    kept = torch.randperm(len(task), generator=torch.Generator().manual_seed(seed))[:max_examples].tolist()
    return replace(task, texts=tuple(task.texts[i] for i in kept), labels=tuple(task.labels[i] for i in kept))


def _check(name, split, folder):
    """Refuse what is not offered, before anything is read."""
    if name not in NAMES:
        raise ValueError(f"load_task({name!r}): unknown name; needed one of {', '.join(NAMES)}. Choose one.")
    if split not in SPLITS:
        raise ValueError(
            f"load_task({name!r}): split {split!r} is unknown; needed one of {', '.join(SPLITS)}. Choose one."
        )
    if split == "test" and name in GLUE:
        raise ValueError(
            f"load_task({name!r}): split 'test', whose labels GLUE keeps back (-1 on the hub); needed labels. Take 'validation'."
        )
    if folder is not None and name == "rotten-tomatoes":
        raise ValueError(f"load_task({name!r}): folder {str(folder)!r}; needed none, it is fetched. Leave folder out.")


def _glue(name, split, folder):
    """A task of GLUE from its own files, tab-separated without quoting, or from the hub."""
    configuration, suffix, columns, on_hub, label = GLUE[name]
    names = CLASSES[configuration]
    if folder is None:
        rows = hub_rows("nyu-mll/glue", configuration, "train" if split == "train" else f"validation{suffix}", INSTEAD)
        rows = [(*(row[column] for column in on_hub), row["label"]) for row in rows]
    else:
        path = folder / ("train.tsv" if split == "train" else f"dev{suffix}.tsv")
        rows = _table(path, (*columns, label), {key: i for i, own in enumerate(names) for key in (own, str(i))})
    texts = tuple(row[0] if len(row) == 2 else row[:2] for row in rows)
    metrics = ("accuracy", "f1") if name == "mrpc" else ("accuracy",)
    return Task(
        name=name, split=split, texts=texts, labels=tuple(row[-1] for row in rows), names=names, metrics=metrics
    )


def _table(path, columns, classes):
    """The columns of a tab-separated file with a header, the last one looked up in `classes`."""
    header, *lines = [line.split("\t") for line in _lines(path)] or [[]]
    if missing := [column for column in columns if column not in header]:
        raise ValueError(
            f"file {path}, line 1: columns {', '.join(header)} lack {', '.join(missing)}; needed GLUE's header. Take GLUE's file."
        )
    places, rows = [header.index(column) for column in columns], []
    for number, cells in enumerate(lines, start=2):
        if len(cells) != len(header) or cells[places[-1]] not in classes:
            got = f"label {cells[places[-1]]!r}" if len(cells) == len(header) else f"{len(cells)} cells"
            raise ValueError(
                f"file {path}, line {number}: {got}; needed {len(header)} cells between tabs and a label among "
                f"{', '.join(classes)}. Correct the line."
            )
        rows.append((*(cells[place] for place in places[:-1]), classes[cells[places[-1]]]))
    return rows


def _atis(name, split, folder):
    """Intents or slots of ATIS, with the classes of the training split."""
    rows = _atis_rows(split, folder)
    train = rows if split == "train" else _atis_rows("train", folder)
    if name == "atis-intents":
        names = (*sorted({intent for _, _, intent in train}), UNSEEN)
        texts, metrics = tuple(" ".join(words) for words, _, _ in rows), ("accuracy",)
    else:
        names = (*sorted({slot for _, slots, _ in train for slot in slots}), UNSEEN)
        texts, metrics = tuple(words for words, _, _ in rows), ("slot_f1", "accuracy")
    known, last, level = {own: i for i, own in enumerate(names)}, len(names) - 1, "text"
    labels = tuple(known.get(intent, last) for _, _, intent in rows)
    if name == "atis-slots":
        labels, level = tuple(tuple(known.get(slot, last) for slot in slots) for _, slots, _ in rows), "token"
    return Task(name=name, split=split, texts=texts, labels=labels, names=names, level=level, metrics=metrics)


def _atis_rows(split, folder):
    """(words, slots, intent) of each line."""
    where, files = f"ATIS on the hub, split {split!r}", ("text", "slots", "intent")
    if folder is None and split == "validation":
        raise ValueError(f"{where}: the hub has train and test only; needed a folder with dev. Give it, or cut train.")
    if folder is None:
        columns = [[row[file] for row in hub_rows("tuetschek/atis", None, split, INSTEAD)] for file in files]
    else:
        where, files = folder / {"validation": "dev"}.get(split, split), ("seq.in", "seq.out", "label")
        columns = [_lines(where / file) for file in files]
    found, ends = [], {len(column) for column in columns}
    for number, (text, slots, intent) in enumerate(zip(*columns), start=1):
        found.append((tuple(text.split()), tuple(slots.split()), intent.strip()))
        if len(found[-1][0]) != len(found[-1][1]) or not text.strip() or not intent.strip():
            got = f"{len(found[-1][0])} words, {len(found[-1][1])} slots, intent {intent!r}"
            raise ValueError(f"{where}, line {number}: {got}; needed a slot for each word, and an intent. Correct it.")
    if len(ends) > 1:
        counts = ", ".join(f"{file} {len(column)}" for file, column in zip(files, columns))
        raise ValueError(f"{where}, line {min(ends) + 1}: lines are {counts}; needed as many in each. Correct them.")
    return found


def _lines(path):
    """Lines of a file, ended by a line feed only: texts may hold other characters that Python takes for line ends."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        there = ", ".join(sorted(file.name for file in path.parent.glob("*"))[:10]) or "nothing"
        raise AssetError(
            f"file {path}: {type(error).__name__}, its folder holds {there}; needed the layout that load_task describes. "
            "Correct the folder, or leave it out to ask the hub"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"file {path}: byte {error.start} is not UTF-8; needed UTF-8, save it as that") from None
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
