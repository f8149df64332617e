"""`make install` in a copy of the files that it reads: what it runs and when, with a Python whose pip notes its arguments."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
case "$*" in
"-m venv --clear .venv") rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
"-m pip"*" config list") [ ! -e settings ] || cat settings ;;
"-m pip"*) echo "$* $PIP_EXTRA_INDEX_URL" >>notes ;;
*) exec {real} "$@" ;;
esac
"""
Make = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make("install", "TORCH=cpu", where=) -> CompletedProcess; `notes` in the directory lists the calls of pip."""
    python = tmp_path / "python3"
    python.write_text(PYTHON.format(real=sys.executable))
    python.chmod(0o755)
    (tmp_path / "clone" / "tools").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "pyproject.toml", "tools/install.sh"):
        shutil.copy(ROOT / name, tmp_path / "clone" / name)
    mirror, more = "global.index-url='https://example.org/simple'\n", "global.more='x'\n" * 10_000  # longer than a pipe holds
    (tmp_path / "clone" / "settings").write_text(mirror + more)  # so that pip installs, not uv

    def run(*words: str, where: Path = tmp_path / "clone", **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "--directory", str(where), f"PYTHON={python}", *words]
        variables = {name: value for name, value in os.environ.items() if name not in ("TORCH", "CXX")} | environment
        return subprocess.run(command, env=variables, capture_output=True, encoding="utf-8", errors="replace")

    return run


def pins(name: str) -> list[str]:
    """The lines of requirements.txt that pin a package."""
    return re.findall(rf"^{name}==\S+", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)


def test_what_is_installed_stays_until_the_pins_the_place_or_the_build_change(make, tmp_path):
    notes = tmp_path / "clone" / "notes"

    def installs(*words: str) -> int:
        notes.write_text("")
        done = make("install", *words)
        assert done.returncode == 0, done.stderr
        return notes.read_text().count("--requirement requirements.txt")

    assert [installs() for _ in range(2)] == [1, 0]
    assert [installs("TORCH=cpu"), installs("TORCH=cpu"), installs(), installs("TORCH=cu126")] == [1, 0, 0, 1]
    later = (tmp_path / "clone" / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(tmp_path / "clone" / "requirements.txt", (later, later))
    assert installs() == 1
    assert "torch==2.13.0+cu126" in notes.read_text()  # the build chosen before stays chosen
    shutil.copytree(tmp_path / "clone", tmp_path / "moved")
    assert make("install", where=tmp_path / "moved").returncode == 0
    assert (tmp_path / "moved" / ".venv" / ".installed").read_text().splitlines() == [str(tmp_path / "moved"), "cu126"]


@pytest.mark.parametrize("build", ["cpu", "cu126", "rocm7.1"])
def test_a_build_of_pytorch_comes_from_its_index_and_is_never_pypis(make, tmp_path, build):
    assert make("install", f"TORCH={build}").returncode == 0
    first, second = (tmp_path / "clone" / "notes").read_text().splitlines()
    (pin,) = pins("torch")
    assert first.endswith(f"{pin}+{build} https://download.pytorch.org/whl/{build}")
    assert second.strip().endswith("install --requirement requirements.txt")


def test_uv_installs_where_pip_has_no_settings(make, tmp_path):
    clone = tmp_path / "clone"
    (clone / "settings").unlink()
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text('#!/bin/sh\necho "uv $*" >>notes\nexit $(cat status)\n')
    uv.chmod(0o755)
    for status, expected in (("0", ["uv"]), ("2", ["uv", "-m"])):  # pip tries again after uv failed
        (clone / "status").write_text(status)
        done = make("install", PATH=f"{uv.parent}{os.pathsep}{os.environ['PATH']}")
        assert done.returncode == 0, done.stderr
        assert [line.split()[0] for line in (clone / "notes").read_text().splitlines()] == expected
        shutil.rmtree(clone / ".venv")
        (clone / "notes").unlink()


def test_all_that_a_machine_lacks_is_one_line_before_any_download(make, tmp_path):
    python = tmp_path / "python3"
    lacking = "*ensurepip*|*Python.h*) exit 1 ;;\n*) exec"
    python.write_text(python.read_text().replace("*) exec", lacking))
    done = make("install", CXX="no-such-compiler")
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    for word in ("venv", "no-such-compiler", "Python.h", "g++", "python3-venv", "python3-dev"):
        assert word in line
    assert not (tmp_path / "clone" / "notes").exists()
    assert not (tmp_path / "clone" / ".venv").exists()


@pytest.mark.parametrize("words", [["PYTHON=/no/python3"], ["PYTHON=/bin/false"], ["TORCH=gpu"]])
def test_a_wrong_choice_is_named(make, tmp_path, words):
    done = make("install", *words)
    assert done.returncode != 0
    assert words[0].partition("=")[2] in done.stderr
    assert not (tmp_path / "clone" / ".venv").exists()


def test_a_link_in_place_of_the_environment_is_not_emptied(make, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "kept").touch()
    (tmp_path / "clone" / ".venv").symlink_to(tmp_path / "other")
    done = make("install")
    assert done.returncode != 0
    assert ".venv is a link" in done.stderr
    assert (tmp_path / "other" / "kept").exists()


def test_every_supported_python_has_one_pin_a_package():
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    lines = [line for line in lines if line and not line.startswith("-")]
    asked = [Requirement(line) for line in lines]
    for python in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        names = [each.name for each in asked if not each.marker or each.marker.evaluate({"python_version": python})]
        assert len(names) == len(set(names)), python
        assert set(names) == {each.name for each in asked}
