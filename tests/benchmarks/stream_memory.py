"""Peak memory and seconds of factorize_folder on a checkpoint of Llama-2-7B's matrices, random, bfloat16, a few layers.

    python tests/benchmarks/stream_memory.py [--layers 3] [--folder FOLDER] [--recipe compactifai] [--shard-mb 256]

The checkpoint (0.4 GB a layer and 0.5 GB of embedding and head) is written shard by shard if it is not there. The work is done
in a fresh process, whose largest resident set (Linux) is printed beside what it was after the imports, and beside its bound,
four times the largest matrix and 1 GiB; it must not grow with --layers.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

WORK = """
import json, re, sys, time
import torch, transformers, accelerate, scipy.optimize
import tnlib as tn
torch.set_num_threads(int(sys.argv[5]))
tn.factorize_folder, tn.papers
def peak():  # ru_maxrss of a child begins at what its parent had; this does not
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
idle, began = peak(), time.perf_counter()
tn.factorize_folder(sys.argv[1], tn.papers[sys.argv[3]], sys.argv[2], shard_mb=float(sys.argv[4]))
print(json.dumps({"idle_mb": idle, "peak_mb": peak(), "seconds": time.perf_counter() - began}))
"""


def write(folder, layers):
    """A random checkpoint, one shard a block, never more than a block in memory."""
    config = transformers.LlamaConfig(num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        names = {n: p.shape for n, p in transformers.LlamaForCausalLM(config).named_parameters()}
    groups, where = {}, {}
    for name in names:
        groups.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else name, []).append(name)
    config.save_pretrained(folder)
    for number, group in enumerate(groups.values()):
        shard = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: torch.randn(names[name], dtype=torch.bfloat16) / 64 for name in group}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        where |= dict.fromkeys(group, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "llama7b_shape")
    parser.add_argument("--recipe", default="compactifai")
    parser.add_argument("--shard-mb", type=float, default=256)
    asked = parser.parse_args()
    folder, out = (asked.folder / f"{asked.layers}_layers{end}" for end in ("", "_out"))
    if not (folder / "model.safetensors.index.json").exists():
        write(folder, asked.layers)
    if out.exists():
        sys.exit(f"{out} is there already: remove it, or there is nothing to measure.")
    settings = [asked.recipe, str(asked.shard_mb), str(torch.get_num_threads())]
    done = subprocess.run([sys.executable, "-c", WORK, folder, out, *settings], stdout=subprocess.PIPE, check=True)
    found, mb = json.loads(done.stdout), 1e6
    before, after = (sum(path.stat().st_size for path in place.glob("*.safetensors")) / mb for place in (folder, out))
    largest, block = 2 * 4096 * 11008 / mb, 2 * (4 * 4096**2 + 3 * 4096 * 11008) / mb
    print(
        f"{asked.layers} layers, {before:,.0f} MB -> {after:,.0f} MB in {found['seconds']:.0f} s, {settings[2]} threads"
    )
    print(f"peak {found['peak_mb']:,.0f} MiB resident, {found['idle_mb']:,.0f} of them after the imports")
    bound = 4 * largest * mb / 2**20 + 1024
    print(f"bound {bound:,.0f} MiB: {'kept' if found['peak_mb'] <= bound else 'broken'}")
    print(
        f"for comparison: one block {block:,.0f} MB, its largest matrix {largest:,.0f} MB, {2 * largest:,.0f} in float32"
    )


if __name__ == "__main__":
    main()
