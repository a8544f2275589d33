"""Calibration: what a text sends into the matrices that a recipe will replace, found once and kept in a folder.

    stats = tn.calibrate(model, windows, recipe, out="runs/calibration")
    tn.factorize_(model, recipe, stats)

One pass through the model, a block at a time (walk.py): memory is one block's moments and the hidden states of the text, and
with `out` what is finished lies on disk.
"""

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from tnlib.fit_store import digest
from tnlib.moments import Moments, Seen, second_moments
from tnlib.recipe import match
from tnlib.records import write_atomic
from tnlib.shapes import ShapeError
from tnlib.surgery import partners
from tnlib.walk import Walk

FACTS = "calibration.json"


class Calibration(Mapping):
    """{module name: Moments}, in memory or, if it has a folder, read when asked for; None for a module the text never reached.

    fingerprint: of model, text and modules; tokens, context: of the text
    """

    def __init__(self, facts, places, held=None, folder=None):
        self.facts, self.places, self.held, self.folder = facts, places, held, folder

    @property
    def fingerprint(self):
        return self.facts["fingerprint"]

    @property
    def tokens(self):
        return self.facts["tokens"]

    def __getitem__(self, name):
        part, leader = self.places[name]
        if self.held is not None:
            return self.held[leader]
        with safe_open(Path(self.folder) / part, framework="pt") as file:
            return _moments_in(file, leader)

    def __iter__(self):
        return iter(self.places)

    def __len__(self):
        return len(self.places)

    def __repr__(self):
        where = "in memory" if self.folder is None else f"in {self.folder}"
        inputs = len({tuple(place) for place in self.places.values()})
        return f"Calibration of {len(self)} modules ({inputs} distinct inputs) on {self.tokens:,} tokens, {where}"


def calibrate(model, windows, recipe, *, batch=4, out=None, progress=None):
    """Second moments of the inputs of every module that `recipe` claims, in one pass over a text.

    windows: (windows, context) int64 or int32; batch: windows a forward pass, sums in float64 as in second_moments
    out: folder, one file a block; a killed call that is started again goes on with the first block that is missing, and a
        finished one is only read. None: all moments are held, 8 * in * in bytes for each distinct input
    progress: a bar over blocks (default: only on a terminal)
    Memory: the text's hidden states (tokens * width numbers) and the moments of one block. A model without one stack of blocks,
        such as T5, is run whole, and all moments are held until its end. Weights that accelerate keeps elsewhere (device_map)
        are brought in a block at a time
    Returns: Calibration
    Raises: RecipeError as match; ValueError for activations that are not finite and for a folder of another run
    Exact: equals second_moments(model, windows, names).
    """
    names = _names(model, recipe)
    facts = {
        "fingerprint": digest([*model.state_dict().values(), windows], names),
        "tokens": int(windows.numel()),
        "context": int(windows.shape[1]),
        "model": getattr(getattr(model, "config", None), "_name_or_path", ""),
    }
    if out is not None and (found := _finished(out, facts)) is not None:
        return found
    store = _Store(out, facts)
    hide = not (sys.stderr.isatty() if progress is None else progress)
    try:
        walk = Walk(model, windows, batch)
    except ShapeError:
        store.add("all", lambda: second_moments(model, windows, names, batch, missing=True))
        return store.finish(names)
    inside = [[n for n in names if n.startswith(f"{walk.stack}.{k}.")] for k in range(len(walk.blocks))]
    last = max((k for k, own in enumerate(inside) if own), default=-1)
    outside = [n for n in names if not n.startswith(f"{walk.stack}.")]
    if outside:  # what is before the blocks and behind them: a pass with all blocks covered
        last = len(walk.blocks) - 1
    for k in tqdm(range(last + 1), "calibrate", disable=hide):
        store.add(f"block-{k:03d}", partial(_block, walk, k, inside[k]), partial(_block, walk, k, []))
    if outside:
        store.add("outside", partial(_outside, walk, outside))
    return store.finish(names)


def load_calibration(folder):
    """What calibrate left in a folder. Raises: ValueError for one that is not finished."""
    path = Path(folder) / FACTS
    if not path.exists():
        raise ValueError(
            f"load_calibration: {path} is missing; needed a finished calibration. Call calibrate(…, out={str(folder)!r}) again: it "
            "goes on where it was stopped."
        )
    data = json.loads(path.read_text("utf-8"))
    return Calibration(data["facts"], {name: tuple(place) for name, place in data["places"].items()}, folder=folder)


def join_calibrations(parts):
    """Calibrations of several texts for the same model and recipe as one, in memory.

    Raises: ValueError when they are not of the same modules. Exact: equals calibrate on all texts at once.
    """
    first = parts[0]
    if any(part.places.keys() != first.places.keys() for part in parts):
        raise ValueError(
            f"join_calibrations: got calibrations of {', '.join(str(len(part)) for part in parts)} modules, not all the same ones; "
            "needed one model and one recipe for all. Calibrate again with the same recipe."
        )
    held = {}
    for name, place in first.places.items():
        if place[1] not in held:
            seen = [moments for part in parts if (moments := part[name]) is not None]
            held[place[1]] = Moments.joined(seen) if seen else None
    facts = first.facts | {
        "fingerprint": digest([], [part.fingerprint for part in parts]),
        "tokens": sum(part.tokens for part in parts),
    }
    return Calibration(facts, dict(first.places), held)


def calibrate_parts(pool, load, windows, recipe, out, parts, **settings):
    """calibrate, with the text cut into `parts` that are worked on side by side, and joined.

    pool: anything with concurrent.futures' submit: a ProcessPoolExecutor, or a dask.distributed Client
    load: called in each worker to get the model, e.g. functools.partial(tn.load_model, "smollm2-135m")
    out: folder that all workers reach; each part has its own in it, so that a lost worker's part is all that is done again
    settings: batch, as in calibrate
    Exact: equals calibrate(load(), windows, recipe) up to the rounding of sums.
    """
    pieces = [piece for piece in windows.tensor_split(parts) if len(piece)]
    folders = [str(Path(out) / f"part-{k:03d}") for k in range(len(pieces))]
    work = [pool.submit(_part, load, piece, recipe, folder, settings) for piece, folder in zip(pieces, folders)]
    for one in work:
        one.result()
    return join_calibrations([load_calibration(folder) for folder in folders])


def _part(load, windows, recipe, folder, settings):
    calibrate(load(), windows, recipe, out=folder, **settings)
    return folder


def _names(model, recipe):
    """Every module that the recipe claims, and those that share a claimed table."""
    return [use for claim in match(model, recipe) for use in (claim.name, *partners(model, recipe, *claim))]


def _block(walk, number, names):
    """Take the text through a block; the moments of its modules. Without names only the first."""
    seen = Seen(walk.model, names)

    def visit(at, run):
        state = run()
        seen.forget()
        walk.keep(at, 0, state)

    with seen:
        walk.through(number, visit)
    return seen.moments(missing=True)


def _outside(walk, names):
    """Moments of modules before and behind the blocks, which are not run again."""
    seen = Seen(walk.model, names)
    with seen:
        walk.through(len(walk.blocks), None, names)
    return seen.moments(missing=True)


class _Store:
    """Moments as they come: in memory, or one file for each call of `add`."""

    def __init__(self, out, facts):
        self.folder, self.facts, self.places = None if out is None else Path(out), facts, {}
        self.held = {} if out is None else None

    def add(self, part, work, again=None):
        """What work() finds, unless a file has it already; then again() is called, which does what else work does."""
        path = None if self.folder is None else self.folder / f"{part}.safetensors"
        if path is not None and path.exists():
            self._known(path)
            if again is not None:
                again()
            return
        found = work()
        leaders = {}
        for name, moments in found.items():
            leaders[name] = next((n for n, other in found.items() if other is moments and moments is not None), name)
        own = {leader: found[leader] for leader in leaders.values()}
        if path is None:
            self.held |= own
        else:
            write_atomic(
                path,
                save(
                    _tensors(own), metadata={"fingerprint": self.facts["fingerprint"], "leaders": json.dumps(leaders)}
                ),
            )
        self.places |= {name: (f"{part}.safetensors", leader) for name, leader in leaders.items()}

    def _known(self, path):
        try:
            with safe_open(path, framework="pt") as file:
                kept = file.metadata()
        except SafetensorError as error:
            raise ValueError(f"calibrate: {path} is damaged ({error}); needed a whole file. Delete it.") from error
        _check(path, (kept or {}).get("fingerprint"), self.facts)
        self.places |= {name: (path.name, leader) for name, leader in json.loads(kept["leaders"]).items()}

    def finish(self, names):
        """The Calibration of all that was added, in the order of `names`."""
        places = {name: self.places[name] for name in names}
        if self.folder is not None:
            write_atomic(self.folder / FACTS, json.dumps({"facts": self.facts, "places": places}))
        return Calibration(self.facts, places, self.held, self.folder)


def _finished(out, facts):
    """The calibration in `out` if it is this one; None if there is none. Raises: ValueError for another one."""
    path = Path(out) / FACTS
    if not path.exists():
        return None
    found = load_calibration(out)
    _check(path, found.fingerprint, facts)
    return found


def _check(path, fingerprint, facts):
    if fingerprint != facts["fingerprint"]:
        raise ValueError(
            f"calibrate: {path} is of another model, text or recipe; needed the same ones to go on with it. Give out= another "
            "folder, or delete this one."
        )


def _tensors(own):
    """Moments as named tensors."""
    found = {}
    for leader, moments in own.items():
        if moments is not None:
            parts = {name: getattr(moments, name) for name in ("mean", "second", "counts")}
            parts["tokens"] = torch.tensor(moments.tokens)
            found |= {f"{leader}/{name}": part.cpu().contiguous() for name, part in parts.items() if part is not None}
    return found


def _moments_in(file, leader):
    """Moments again out of an open file; None where the text never came."""
    names = [name for name in ("mean", "second", "counts", "tokens") if f"{leader}/{name}" in file.keys()]  # noqa: SIM118
    if not names:
        return None
    parts = {name: file.get_tensor(f"{leader}/{name}") for name in names}
    return Moments(**parts | {"tokens": int(parts["tokens"])})
