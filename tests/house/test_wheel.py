"""`pip install .` gives a wheel that works: the whole package, the shipped ds_configs, a plan without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the wheel would install, built from a copy of the sources."""
    copy, made = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("igpt_ds", "ds_configs"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(made)], cwd=copy, check=True, capture_output=True)
    with zipfile.ZipFile(next(made.glob("*.whl"))) as wheel:
        wheel.extractall(made)
    return made


def test_a_wheel_has_the_package_and_the_ds_configs(unpacked):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "igpt_ds").rglob("*.py")}
    ds_configs = {f"igpt_ds/{path.relative_to(ROOT)}" for path in (ROOT / "ds_configs").glob("*.json")}
    found = {str(path.relative_to(unpacked)) for path in (unpacked / "igpt_ds").rglob("*") if path.is_file()}
    assert found == modules | ds_configs
    assert {path.name.split("-")[0] for path in unpacked.iterdir()} == {"igpt_ds"}


def test_a_wheel_plans_from_another_directory(unpacked, tmp_path):
    def python(*words: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(unpacked)}
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout

    assert python("-c", "from igpt_ds.ds_config import SHIPPED; print(SHIPPED)").strip() == f"{unpacked}/igpt_ds/ds_configs"
    assert "zero3_bf16.json" in python("-m", "igpt_ds.plan", "--recipe", "igpt_xl_ar_64", "--gpus", "64")
