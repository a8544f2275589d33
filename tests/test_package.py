"""Wheel and sdist: what they hold, what they ask for, and that the installed wheel is the library and the command."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Both, built by setuptools from a copy of the checkout."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, copy / name)
    shutil.copytree(ROOT / "tnlib", copy / "tnlib", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return copy / "dist"


def test_the_wheel_has_every_module_and_asks_for_no_notebooks(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        about = next(name for name in names if name.endswith("METADATA"))
        needs = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", wheel.read(about).decode(), re.M)
        extras = set(re.findall(r"^Provides-Extra: (\w+)", wheel.read(about).decode(), re.M))
    assert {f"tnlib/{path.name}" for path in (ROOT / "tnlib").glob("*.py")} <= set(names)
    assert {"torch", "transformers", "click", "safetensors"} <= set(needs)
    assert not {"papermill", "jupyterlab", "matplotlib", "joblib", "distributed", "pytest"} & set(needs)
    assert {"notebooks", "gpu", "cluster", "eval", "quant", "dev"} <= extras


def test_the_sdist_can_be_built_from(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", *(f"tnlib/{path.name}" for path in (ROOT / "tnlib").glob("*.py"))} <= names


def test_the_installed_wheel_is_the_library_and_the_command(dist, tmp_path):
    """Beside the requirements that are here already; `make package` installs those too."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", tmp_path / "site", next(dist.glob("*.whl"))]
    subprocess.run(install, check=True, cwd=tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    script = [sys.executable, tmp_path / "site" / "bin" / "tnlib"]
    ask = [sys.executable, "-P", "-c", "import tnlib; print(tnlib.__file__)"]
    if (tmp_path / "site" / "bin").exists():  # elsewhere the script is an executable
        done = subprocess.run([*script, "--version"], capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert re.fullmatch(r"tnlib, version [\d.]+\n", done.stdout), done.stderr
    done = subprocess.run(ask, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "site"), done.stderr


def test_the_script_is_installed_beside_python():
    script = Path(sys.executable).parent / ("tnlib.exe" if os.name == "nt" else "tnlib")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("tnlib, version ")
