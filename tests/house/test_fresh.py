"""Nothing happens at import, and what a program does not need it does not load."""

from __future__ import annotations

GUESTS = {"deepspeed", "webdataset", "sklearn", "matplotlib"}


def test_importing_a_module_does_nothing_but_define_names(fresh):
    for name, report in fresh["modules"].items():
        assert not report["error"], f"import {name}\n{report['error']}"
        assert not report["printed"], f"import {name} printed {report['printed']!r}"
        changed = [what for what in ("environment_changed", "rng_changed", "torch_changed") if report[what]]
        assert not changed, f"import {name}: {changed}"
        assert not GUESTS & set(report["loaded"]), f"import {name} loads {GUESTS & set(report['loaded'])}"


def test_every_program_answers_help_without_loading_guests(fresh):
    for name, report in fresh["programs"].items():
        assert not report["error"], f"{name} --help\n{report['error']}"
        assert (report["status"], report["printed"]) == (0, ""), f"{name} --help: {report['status']}, {report['printed']!r}"
        assert not GUESTS & set(report["loaded"]), f"{name} --help loads {GUESTS & set(report['loaded'])}"
