"""The commands that measure models: eval, bench."""

import click

from tnlib.console import Answer, command, device_of, needs

PLANS_FOR = (1, 512)  # tokens at a time: decoding, reading


@click.command("eval")
@click.argument("model", metavar="DIR")
@click.option("--data", metavar="TEXT", help="A data set, a file or a folder; its split is --split.")
@click.option("--split", default="test", show_default=True, metavar="NAME", help="train, validation, test or all.")
@click.option("--context", default=512, show_default=True, help="Tokens in a window.")
@click.option("--tokens", default=8192, show_default=True, help="Tokens of the text, from its start.")
@click.option("--batch", default=4, show_default=True, help="Windows a forward pass.")
@click.option("--against", metavar="MODEL", help="The dense model: difference of the losses, divergence of the predictions.")
@click.option("--tasks", metavar="NAMES", help="Of lm-evaluation-harness, as hellaswag,boolq; needs the extra eval.")
@click.option("--limit", type=int, help="Questions a task, from its start.  [default: all]")
@click.option("--shots", type=int, help="Solved examples before each.  [default: the task's own]")
@click.option("--task-folder", metavar="DIR", help="YAML files of your own tasks, which are then the only ones known.")
@click.option("--card", is_flag=True, help="Put what was measured into the model card in DIR.")
@click.option("--device", metavar="NAME", help="Where to run.  [default: cuda where there is one, else cpu]")
@command()
def evaluate(model, data, split, context, tokens, batch, against, tasks, limit, shots, task_folder, card, device):
    """Perplexity of DIR on a text, with its standard error, its size, and scores on benchmarks.

    DIR is a compressed folder, or any MODEL. Perplexity is exp of the mean loss of all predicted tokens; the error is over windows.
    """
    if not data and not tasks:
        raise click.UsageError("nothing to judge on: give --data TEXT, --tasks NAMES, or both.")
    if tasks:
        needs("eval", ("lm_eval",))
    from tnlib.assets import load_tokenizer
    from tnlib.cost import size
    from tnlib.model_card import note_measured, read_card
    from tnlib.saved import bytes_of, open_model, require_causal

    if card:
        read_card(model)  # refused now, not after an hour
    device, found, lines = device_of(device), {}, []
    judged = require_causal(model, open_model(model, device))
    tokenizer = load_tokenizer(model)
    found["size"], found["bytes"] = size(judged), bytes_of(model)
    disk = f"; {found['bytes'] / 1e6:,.1f} MB on disk" if found["bytes"] else ""
    lines.append(f"{model}: {found['size']}{disk}")
    if data:
        more, told = _read(judged, tokenizer, data, split, context, tokens, batch, against, device)
        found, lines = found | more, lines + told
    if tasks:
        from tnlib.harness import harness

        scores = harness(judged, tokenizer, tasks.split(","), limit=limit, shots=shots, batch=batch, folder=task_folder)
        found["tasks"], lines = scores, lines + [str(score) for score in scores.values()]
    if card:
        note_measured(model, _told(found, f"{data}, {split}", against))
    return Answer(found, "\n".join(lines))


def _told(found, text, against):
    """{what: number or record} for the model card."""
    told = {f"perplexity, {text}": found["perplexity"]} if "perplexity" in found else {}
    if "against" in found:
        told |= {f"perplexity of {against}, {text}": found["against"], f"divergence from {against}, {text}": found["divergence"]}
    return told | {f"task {name}": score for name, score in found.get("tasks", {}).items()}


def _read(judged, tokenizer, data, split, context, tokens, batch, against, device):
    """Perplexity, and what the dense model makes of the same windows: facts, lines."""
    from tnlib.compare import compare
    from tnlib.evaluate import kl_to_teacher, perplexity
    from tnlib.saved import open_model
    from tnlib.token_file import load_windows

    windows = load_windows(data, tokenizer, context, split, tokens)
    own = perplexity(judged, windows, batch=batch, progress=True)
    found, lines = {"perplexity": own}, [f"perplexity {own}, next token right {100 * own.accuracy:.1f} %"]
    if against:
        dense = open_model(against, device)
        theirs = perplexity(dense, windows, batch=batch, progress=True)
        divergence = kl_to_teacher(judged, dense, windows, batch=batch, progress=True)
        gap = compare(own.losses, theirs.losses) if len(own.losses) > 1 else None
        found |= {"against": theirs, "difference": gap, "divergence": divergence}
        lines += [f"{against}: perplexity {theirs}", f"divergence from it {divergence}, one arg max on {100 * divergence.agreement:.1f} %"]
        lines += [f"loss above it {gap}"] if gap else []
    return found, lines


@click.command()
@click.argument("folder", metavar="DIR")
@click.option("--against", metavar="MODEL", help="The dense model, timed in turns with DIR; ratios are to it.")
@click.option("--measure", "measures", multiple=True, type=click.Choice(["train", "prefill", "decode"]), help="May be given several times.  [default: prefill, decode]")
@click.option("--context", default=256, show_default=True, help="Tokens of a prompt or training window.")
@click.option("--new-tokens", default=32, show_default=True, help="Tokens written after the prompt.")
@click.option("--repeats", default=7, show_default=True, help="Rounds that count, two at least.")
@click.option("--batch", default=1, show_default=True, help="Sequences at a time.")
@click.option("--plans/--no-plans", default=True, show_default=True, help="Time also every way to compute a layer.")
@click.option("--device", metavar="NAME", help="Where to run.  [default: cuda where there is one, else cpu]")
@command()
def bench(folder, against, measures, context, new_tokens, repeats, batch, plans, device):
    """Speed of the model in DIR: prefill, decoding and training, in turns with its dense model, median and quartiles of ratios.

    And for one layer of each kind, every plan by which it could be computed for 1 and 512 tokens, with predicted and measured times.
    """
    from tnlib.saved import open_model, require_causal
    from tnlib.speed import compare_speed

    device = device_of(device)
    models = {against: open_model(against, device)} if against else {}
    models[folder] = judged = require_causal(folder, open_model(folder, device))
    speeds = compare_speed(models, context, new_tokens, repeats, batch, measures=measures or ("prefill", "decode"), progress=True)
    lines = [f"{name}, {measure}: {speed}" for name, own in speeds.items() for measure, speed in own.items()]
    found = {"device": device, "speed": speeds}
    if plans:
        explained = _plans(judged)
        found["plans"] = [{"layer": name, "tokens": tokens, "plans": list(table)} for name, tokens, table in explained]
        lines += [f"\n{name}\n{table}" for name, _, table in explained]
    return Answer(found, "\n".join(lines))


def _plans(model):
    """(layer, tokens, Explanation) of the first factorized layer of each form and shape."""
    from tnlib.explain import explain
    from tnlib.layers import FactorizedLinear

    kinds = {}
    for name, layer in model.named_modules():
        if isinstance(layer, FactorizedLinear):
            kinds.setdefault((layer.form, layer.shape), (name, layer))
    return [(name, tokens, explain(layer, tokens)) for name, layer in kinds.values() for tokens in PLANS_FOR]
