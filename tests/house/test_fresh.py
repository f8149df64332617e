"""Nothing happens at import, and what a program does not need it does not load."""

from __future__ import annotations

import re
from importlib.util import find_spec

GUESTS = {"deepspeed", "webdataset", "sklearn", "matplotlib"}
# A module is imported only where its package is; torch for CPUs brings no Triton.
NEEDS = {"igpt_ds.model.triton_gelu": "triton"}
SLOW = GUESTS | {"torch", "transformers", "scipy", "safetensors", "argcomplete"}


def test_importing_a_module_does_nothing_but_define_names(fresh):
    imports = fresh["imports"]
    assert (imports["error"], imports["printed"]) == ("", "")
    assert len(imports["modules"]) > 200
    for name, report in imports["modules"].items():
        if name in NEEDS and find_spec(NEEDS[name]) is None:
            assert f"No module named '{NEEDS[name]}'" in report["error"]
            continue
        assert not report["error"], f"import {name}\n{report['error']}"
        assert not report["changed"], f"import {name} changed {report['changed']}"
        assert not GUESTS & set(report["loaded"]), f"import {name} loads {GUESTS & set(report['loaded'])}"


def test_every_program_answers_help_and_a_wrong_flag_before_it_loads_anything_slow(fresh):
    for name, report in fresh["programs"].items():
        assert not report["error"], f"{name} --help\n{report['error']}"
        assert (report["status"], report["printed"]) == (0, ""), f"{name} --help: {report['status']}, {report['printed']!r}"
        assert not SLOW & set(report["loaded"]), f"{name} --help loads {SLOW & set(report['loaded'])}"


def test_every_program_answers_a_wrong_flag_in_one_line(fresh):
    for name, report in fresh["programs"].items():
        assert re.fullmatch(r".*: error: unknown flag --hepl; did you mean --help\b.*\n", report["mistake"]), name
        assert report["refused"] == 2, name


def test_every_flag_of_every_program_has_a_text(fresh):
    for name, report in fresh["programs"].items():
        flags = re.split(r"\n  (?=-)", report["help"])[1:]
        bare = [flag.split()[0] for flag in flags if not re.search(r"^\S.*?(?:  +|\n +)\S", flag.split("\n\n")[0], re.DOTALL)]
        assert not bare, f"{name} --help says nothing of {bare}"
        assert "default: None" not in report["help"], f"{name} --help says (default: None)"
