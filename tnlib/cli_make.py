"""The commands that write models: compress, heal."""

import contextlib
from dataclasses import replace
from pathlib import Path

import click

from tnlib.console import Answer, command, device_of, say

GROUP = 64  # numbers that share a scale, as in notebook 20's 4-bit rows


@click.command()
@click.argument("model")
@click.option("--recipe", required=True, metavar="RECIPE", help="A name (tnlib recipes) or a JSON file.")
@click.option("--out", required=True, metavar="DIR", help="A new folder; what is not finished is in DIR.part.")
@click.option("--kept", type=float, metavar="SHARE", help="Give every form this share of its matrix's numbers, such as 0.5.")
@click.option("--calibrate", metavar="TEXT", help="Fit to what this text sends into the matrices: a data set, a file or a folder.")
@click.option("--tokens", default=32768, show_default=True, help="Tokens of that text.")
@click.option("--context", default=512, show_default=True, help="Tokens in a window of it.")
@click.option("--quantize", "bits", type=click.Choice(["8", "4"]), help="Then store factors and dense matrices in so many bits.")
@click.option("--seed", default=0, show_default=True, help="Of random initializations.")
@click.option("--shard-mb", default=256, show_default=True, help="Megabytes of a shard, which is what a killed call loses.")
@command(resumes=True)
def compress(model, recipe, out, kept, calibrate, tokens, context, bits, seed, shard_mb):
    """Factorize the checkpoint MODEL by RECIPE into a folder, one matrix at a time.

    The model need not fit into memory, except for --calibrate and --quantize. A killed call goes on where it was. Moments of
    --calibrate stay in DIR.calibration, which may be deleted.
    """
    from tnlib.assets import fetch
    from tnlib.checkpoint_files import skeleton_of
    from tnlib.named import named_recipe
    from tnlib.plan import plan
    from tnlib.saved import bytes_of, compressed, errors_of
    from tnlib.stream import factorize_folder

    source, out = fetch(model), Path(out)
    if compressed(source):
        raise ValueError(f"compress: {model} is compressed already; needed a dense checkpoint. Name the one that it was made from.")
    skeleton = skeleton_of(source)
    chosen = named_recipe(recipe, skeleton, kept)
    predicted = plan(skeleton, chosen)
    say(str(predicted))
    stats = _calibrated(source, chosen, calibrate, tokens, context, out) if calibrate else None
    floats = out.with_name(f"{out.name}.float") if bits else out
    how = {"seed": seed, "shard_mb": shard_mb}
    if not (bits and compressed(out)):
        factorize_folder(model, chosen, floats, stats, progress=True, **how)
    if bits:
        _quantized(floats, out, int(bits), chosen, model)
    errors = errors_of(out)
    size, mean = bytes_of(out), sum(error or 0.0 for error in errors.values()) / max(1, len(errors))
    data = {"out": out, "recipe": chosen.to_dict(), "dense_total": predicted.dense_total, "total": predicted.total}
    data |= {"kept": predicted.kept, "bytes": size, "mean_error": mean, "errors": errors, "bits": bits and int(bits)}
    ended = f"{out}: {predicted.total:,} parameters, {size / 1e6:,.1f} MB on disk, mean relative error of {len(errors)} layers {mean:.4g}"
    return Answer(data, ended)


def _calibrated(source, recipe, text, tokens, context, out):
    """Moments of what a text sends into the matrices that the recipe replaces; kept beside `out`."""
    from tnlib.assets import load_model, load_tokenizer
    from tnlib.calibrate import calibrate
    from tnlib.token_file import load_windows

    windows = load_windows(text, load_tokenizer(source), context, max_tokens=tokens)
    say(f"calibrate on {windows.numel():,} tokens of {text}")
    return calibrate(load_model(source), windows, recipe, out=f"{out}.calibration", progress=True)


def _quantized(floats, out, bits, recipe, base):
    """Write `out`, the quantized model of the folder `floats`, which then goes; a finished one is looked at only."""
    import shutil

    from tnlib.assets import load_tokenizer
    from tnlib.quantize import quantize_
    from tnlib.saved import bits_of, compressed, open_model, recipe_of
    from tnlib.saving import save

    if compressed(out):
        if (replace(recipe_of(out), quantize=None), bits_of(out)) != (replace(recipe, quantize=None), {bits}):
            raise ValueError(f"compress: {out} is of another run; needed the same recipe and bits. Choose another --out, or delete it.")
        return
    say(f"quantize to {bits} bits")
    model = open_model(floats)
    for grid in grids_for(model, bits):
        quantize_(model, grid)
    save(model, out, load_tokenizer(floats), base=base)
    shutil.rmtree(floats)


def grids_for(model, bits):
    """The Quantize of factors and that of dense matrices, where a model has any: a scale for GROUP numbers or a channel."""
    from torch import nn

    from tnlib.layers import FactorizedEmbedding
    from tnlib.quant import Quantize, QuantizeError
    from tnlib.quantize import targets

    grids = []
    for what in ("factors", "dense"):
        grid = Quantize(bits=bits, what=what, when="after", scales=GROUP, start="mse", learn="frozen")
        with contextlib.suppress(QuantizeError):  # no tensor of this kind
            found = targets(model, grid)
            tables = [one.original for one in found if isinstance(one.module, (nn.Embedding, FactorizedEmbedding))]
            whole = all(table.shape[-1] % GROUP == 0 for table in tables)  # a row that is looked up begins with a scale
            grids.append(grid if whole else replace(grid, scales="channel"))
    return grids


@click.command()
@click.argument("folder", metavar="DIR")
@click.option("--data", required=True, metavar="TEXT", help="To train on: a data set, a file or a folder.")
@click.option("--steps", required=True, type=int, help="Optimizer steps.")
@click.option("--out", required=True, metavar="DIR", help="A new folder for checkpoints, history and the healed model.")
@click.option("--teacher", metavar="MODEL", help="The dense model, for losses that compare with it.")
@click.option("--loss", "losses", nargs=2, multiple=True, metavar="NAME WEIGHT", help="As next_token 1 or logits 1.  [default: the recipe's, else next_token 1]")
@click.option("--learning-rate", type=float, help="At its peak.  [default: the recipe's, else 0.0001]")
@click.option("--train", metavar="WHICH", help="all, or factors, all else frozen.  [default: the recipe's, else all]")
@click.option("--batch", default=4, show_default=True, help="Windows a step.")
@click.option("--context", default=512, show_default=True, help="Tokens in a window.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="bf16: autocast.")
@click.option("--save-every", default=100, show_default=True, help="Steps between checkpoints.")
@click.option("--seed", default=0, show_default=True, help="Order of the data, and dropout.")
@click.option("--device", metavar="NAME", help="Where to train.  [default: cuda where there is one, else cpu]")
@command(resumes=True)
def heal(folder, data, steps, out, teacher, losses, learning_rate, train, batch, context, precision, save_every, seed, device):
    """Train the compressed model in DIR back, by its recipe's losses and rates or those given here.

    A killed call goes on from its last checkpoint. On several GPUs call tn.heal under accelerate launch.
    """
    from tnlib.assets import load_tokenizer
    from tnlib.heal import heal as train_back
    from tnlib.model_card import CARD, model_card
    from tnlib.records import write_atomic
    from tnlib.saved import bits_of, bytes_of, compressed, open_model, recipe_of
    from tnlib.token_file import load_windows
    from tnlib.treatment import Budget, Heal

    if not compressed(folder) or bits_of(folder):
        raise ValueError(f"heal: {folder} is no folder of tnlib compress without --quantize; needed one. Compress first, quantize last.")
    own = {"losses": tuple((name, float(weight)) for name, weight in losses) or None, "learning_rate": learning_rate, "train": train}
    how = replace(recipe_of(folder).heal or Heal(), **{key: value for key, value in own.items() if value is not None})
    if how.needs_teacher and not teacher:
        raise ValueError(f"heal: losses {', '.join(how.needs_teacher)} compare with a teacher. Give --teacher MODEL, or other --loss.")
    device = device_of(device)
    tokenizer = load_tokenizer(folder)
    windows = load_windows(data, tokenizer, context, max_tokens=steps * batch * context)
    student, taught = open_model(folder, device), open_model(teacher, device) if teacher else None
    budget = Budget(steps=steps, batch=batch, precision=precision, save_every=save_every)
    say(f"heal on {windows.numel():,} tokens of {data}, {steps:,} steps of {batch} windows, on {device}")
    history = train_back(student, taught, windows, how, budget, out=out, seed=seed, progress=True)
    tokenizer.save_pretrained(out)
    write_atomic(Path(out) / CARD, model_card(student, size_mb=bytes_of(out) / 1e6))
    last = history.rows[-1]
    ended = f"{out}: {last['tokens']:,} tokens in {last['seconds']:,.0f} s, loss {history.rows[0]['loss']:.4g} -> {last['loss']:.4g}"
    return Answer({"out": out, "bytes": bytes_of(out), "heal": how, "budget": budget, "history": history.rows}, ended)
